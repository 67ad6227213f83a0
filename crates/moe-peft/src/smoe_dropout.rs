//! SMoE-Dropout: experts are trained under frozen random routers, and ever more of them per token.
//!
//! Source: arXiv 2303.01610 and its code. Routers are random linear maps; the weights are the softmax of the chosen
//! logits; the experts per token grow from `k_min` to `k_max` over the training, and change between optimizer steps
//! alone. Afterwards any number of experts does.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use moe_core::{
    RouterTokens, RoutingOverlay, RoutingRule, RuleGradients,
    adaptive::{PerLayer, RandomRouter, RoutingConfig, RunTimeRouting},
    router::{Combine, Routed},
    train::Parameters,
};
use serde::{Deserialize, Serialize};

use crate::{
    AdapterSet, Artifacts, Error, Installed, Result, Setting, TrainingHooks, TuningMethod, model_weights::OwnWeights,
};

/// Trains experts under random routers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SmoeDropout {
    /// Seed of the routers.
    pub seed: u64,
    /// Experts per token at first.
    pub k_min: usize,
    /// Experts per token in the end; all by default.
    pub k_max: Option<usize>,
    /// How it grows.
    pub growth: Growth,
    /// Steps over which it grows.
    pub steps: usize,
    /// The weights that are trained.
    pub weights: OwnWeights,
}

/// How the number of experts per token grows with the step s of S.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Growth {
    /// `k_min + round((k_max - k_min) s / S)`.
    #[default]
    Linear,
    /// `k_max + round((k_min - k_max) cos(pi s / 2S))`.
    Cosine,
    /// `k_max + round((k_min - k_max) 0.99^floor(s / (S / 300)))`.
    Exponential,
    /// 1, 2, 4, 8, .. in equal parts of the training.
    Doubling,
}

impl Default for SmoeDropout {
    fn default() -> Self {
        let weights = OwnWeights { experts: true, ..OwnWeights::default() };
        Self { seed: 0, k_min: 1, k_max: None, growth: Growth::Linear, steps: 500, weights }
    }
}

impl Growth {
    /// Experts per token at step `step` of `steps`, both from 0.
    pub fn k(self, k_min: usize, k_max: usize, step: usize, steps: usize) -> usize {
        let (low, high) = (k_min as f64, k_max as f64);
        let (s, all) = (step.min(steps) as f64, steps.max(1) as f64);
        let k = match self {
            Self::Linear => low + ((high - low) * s / all).round(),
            Self::Cosine => high + ((low - high) * (std::f64::consts::FRAC_PI_2 * s / all).cos()).round(),
            Self::Exponential if step >= steps => high,
            Self::Exponential => high + ((low - high) * 0.99f64.powf((s / (all / 300.0)).floor())).round(),
            Self::Doubling => {
                let levels = (high / low.max(1.0)).log2().floor() as i32 + 1;
                let level = ((s / all * f64::from(levels)).floor() as i32).min(levels - 1);
                if step >= steps { high } else { low.max(1.0) * 2f64.powi(level) }
            }
        };
        (k as usize).clamp(k_min, k_max)
    }
}

/// Random routers whose experts per token grow.
#[derive(Debug)]
pub struct RandomRouting {
    method: SmoeDropout,
    k_max: usize,
    k: Arc<AtomicUsize>,
}

impl RandomRouting {
    /// The routing as it is when training ends.
    pub fn routing(&self) -> RoutingConfig {
        RoutingConfig::Random(RandomRouter { seed: self.method.seed, k: PerLayer::All(self.k.load(Ordering::Relaxed)) })
    }
}

#[derive(Debug)]
struct GrowingRule(Arc<AtomicUsize>);

impl RoutingRule for GrowingRule {
    fn route(&self, tokens: &RouterTokens<'_>) -> moe_core::Result<Routed> {
        let router = tokens.router.with_top_k(self.0.load(Ordering::Relaxed)).with_combine(Combine::Renorm)?;
        Ok(router.route(tokens.logits, tokens.experts, None))
    }

    fn backward(
        &self,
        tokens: &RouterTokens<'_>,
        routed: &Routed,
        d_weights: &[f32],
        _: bool,
    ) -> moe_core::Result<RuleGradients> {
        let router = tokens.router.with_combine(Combine::Renorm)?;
        Ok(router.backward(tokens.logits, routed, d_weights).into())
    }
}

struct Overlay {
    random: RunTimeRouting,
    rule: Arc<GrowingRule>,
}

impl RoutingOverlay for Overlay {
    fn router(&self, layer: usize) -> Option<Vec<f32>> {
        self.random.router(layer)
    }

    fn rule(&self, layer: usize) -> Option<Arc<dyn RoutingRule>> {
        self.random.rules.contains_key(&layer).then(|| self.rule.clone() as _)
    }
}

impl SmoeDropout {
    fn k_max(&self, on: &Setting<'_>) -> usize {
        let config = on.model.config();
        let experts = (0..config.layers.len()).filter_map(|layer| config.moe(layer)).map(|moe| moe.num_experts());
        let most = experts.map(|experts| on.model.router().reachable(experts)).min().unwrap_or(0);
        self.k_max.unwrap_or(most)
    }
}

impl TuningMethod for SmoeDropout {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        let k_max = self.k_max(on);
        if self.k_min == 0 || self.k_min > k_max {
            return Err(Error::input("k_min", self.k_min, format!("1 to {k_max}")));
        }
        if self.steps == 0 {
            return Err(Error::input("steps", 0, "at least 1"));
        }
        if self.weights.router {
            return Err(Error::input("weights.router", "true", "false: random routers are not trained"));
        }
        if on.model.routing_overlay().is_some() {
            return Err(Error::Unsupported("random routers on a model whose routing is changed already".into()));
        }
        RandomRouter { seed: self.seed, k: PerLayer::All(k_max) }.on(on.model)?;
        self.weights.check(on)
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        let installed = self.weights.install(on, set)?;
        let random = RandomRouter { seed: self.seed, k: PerLayer::All(self.k_min) }.on(on.model)?;
        let k = Arc::new(AtomicUsize::new(self.k_min));
        let overlay = Overlay { random, rule: Arc::new(GrowingRule(k.clone())) };
        let model = Some(on.model.routed_by(Arc::new(overlay))?);
        let routing = Arc::new(RandomRouting { method: self.clone(), k_max: self.k_max(on), k });
        let artifacts = Artifacts { random_routing: Some(routing.clone()), ..installed.artifacts.clone() };
        Ok(Installed { model, hooks: Some(Box::new(routing)), artifacts, ..installed })
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        self.weights.outline(on, set)
    }
}

impl TrainingHooks for Arc<RandomRouting> {
    fn before_step(&mut self, step: usize, _: &AdapterSet, _: &mut Parameters) -> Result<()> {
        let SmoeDropout { k_min, growth, steps, .. } = self.method;
        self.k.store(growth.k(k_min, self.k_max, step - 1, steps - 1), Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_growth_begins_with_the_least_ends_with_the_most_and_never_falls() {
        for growth in [Growth::Linear, Growth::Cosine, Growth::Exponential, Growth::Doubling] {
            for (low, high) in [(1, 16), (8, 16), (2, 2)] {
                let ks: Vec<usize> = (0..=1000).map(|s| growth.k(low, high, s, 1000)).collect();
                assert_eq!((ks[0], ks[1000], growth.k(low, high, 2000, 1000)), (low, high, high), "{growth:?}");
                assert!(ks.windows(2).all(|pair| pair[0] <= pair[1]), "{growth:?}");
            }
        }
        assert_eq!(Growth::Linear.k(8, 16, 250, 1000), 10);
        assert_eq!(Growth::Doubling.k(1, 16, 500, 1000), 4);
    }
}

//! Losses on router logits beside the objective: load balance and z-loss.
//!
//! For a wave of T tokens (there is no padding), E experts and k experts per token, with `p_te` the share of expert e in the scores of token
//! t (softmax; for sigmoid routing the sigmoid divided by the sum of them) and `P_e` its mean over the tokens:
//!
//! * balance, Switch Transformers' form (arXiv 2101.03961, equations 4 to 6; Mixtral's): `a E sum_e f_e P_e`, `f_e` the share of tokens that go
//!   to expert e. It is `a k` at perfect balance;
//! * balance, normalised: `f_e` divided by k, so that it is `a` at perfect balance;
//! * z-loss (ST-MoE, arXiv 2202.08906, equation 5): `b mean_t (log sum_e exp z_te)^2`.
//!
//! Every MoE layer adds its own losses. `f_e` is a constant of the gradient. They stand beside the mean loss per predicted token, so that
//! their gradients are multiplied by the predicted tokens of the wave.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use moe_checkpoint::RoutingKind;
use moe_core::{Model, adapters::RouterAdapter, trace::LayerTrace};
use serde::{Deserialize, Serialize};

use crate::{AdapterSet, Error, Result};

/// What the coefficient of a balance loss is multiplied by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalanceForm {
    /// A loss that is the number of experts per token at perfect balance: Switch, Mixtral, Qwen.
    #[default]
    Switch,
    /// A loss that is 1 at perfect balance: counts are divided by tokens times experts per token.
    Normalised,
}

/// A balance loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalanceLoss {
    /// Its factor, for the given form; 0 or more. Switch Transformers' is 0.01, as that of most families.
    pub coefficient: f64,
    /// Which form.
    #[serde(default)]
    pub form: BalanceForm,
}

/// Losses on the routers of all MoE layers. None by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterLosses {
    /// Load balance.
    pub balance: Option<BalanceLoss>,
    /// Factor of the z-loss; 0 or more. ST-MoE's is 0.001.
    pub z: Option<f64>,
}

/// Mean losses per wave of a layer, coefficients included.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerLosses {
    /// Of the balance loss.
    pub balance: f64,
    /// Of the z-loss.
    pub z: f64,
    /// Waves seen.
    pub waves: u64,
}

/// What the losses were.
#[derive(Debug, Default)]
pub struct RouterLossReport(Mutex<BTreeMap<usize, LayerLosses>>);

impl RouterLossReport {
    /// Mean losses per wave of each layer since the last call.
    pub fn take(&self) -> BTreeMap<usize, LayerLosses> {
        let mut layers = std::mem::take(&mut *self.lock());
        for losses in layers.values_mut() {
            let waves = losses.waves.max(1) as f64;
            (losses.balance, losses.z) = (losses.balance / waves, losses.z / waves);
        }
        layers
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, LayerLosses>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RouterLosses {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        let fields = [("balance.coefficient", self.balance.map(|balance| balance.coefficient)), ("z", self.z)];
        for (field, value) in fields {
            if let Some(value) = value.filter(|value| !(*value >= 0.0 && value.is_finite())) {
                return Err(Error::input(field, value, "a finite number of 0 or more"));
            }
        }
        Ok(())
    }

    /// Adds the losses to the routers of all MoE layers. They reach whatever is trained at the router or below it.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn attach(&self, model: &Model, set: &mut AdapterSet) -> Result<Arc<RouterLossReport>> {
        self.validate()?;
        let report = Arc::new(RouterLossReport::default());
        let config = model.config();
        let sigmoid = matches!(config.routing.kind, RoutingKind::Sigmoid { .. });
        for layer in (0..config.layers.len()).filter(|&layer| config.moe(layer).is_some()) {
            set.add_router(layer, Arc::new(LayerLoss { losses: *self, sigmoid, report: report.clone() }));
        }
        Ok(report)
    }
}

/// The losses of one layer.
#[derive(Debug)]
struct LayerLoss {
    losses: RouterLosses,
    sigmoid: bool,
    report: Arc<RouterLossReport>,
}

/// Scores of a token's experts.
struct Scores {
    /// Shares of them; they sum to 1.
    shares: Vec<f64>,
    /// d log of an expert's score / d logit.
    slopes: Vec<f64>,
    /// `log sum exp` of the logits.
    log_sum: f64,
}

impl LayerLoss {
    fn scores(&self, logits: &[f32]) -> Scores {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exp = |z: &f32| (f64::from(*z) - f64::from(max)).exp();
        let sum: f64 = logits.iter().map(exp).sum();
        let log_sum = f64::from(max) + sum.ln();
        if !self.sigmoid {
            let shares = logits.iter().map(|z| exp(z) / sum).collect();
            return Scores { shares, slopes: vec![1.0; logits.len()], log_sum };
        }
        let scores: Vec<f64> = logits.iter().map(|z| 1.0 / (1.0 + (-f64::from(*z)).exp())).collect();
        let sum: f64 = scores.iter().sum();
        let shares = scores.iter().map(|s| s / sum.max(f64::MIN_POSITIVE)).collect();
        Scores { shares, slopes: scores.iter().map(|s| 1.0 - s).collect(), log_sum }
    }

    /// `coefficient * E * f_e`, the gradient of the balance loss with respect to `P_e`.
    fn loads(&self, trace: &LayerTrace<'_>) -> Option<Vec<f64>> {
        let BalanceLoss { coefficient, form } = self.losses.balance?;
        let mut counts = vec![0.0f64; trace.experts];
        let chosen = trace.selected.iter().zip(trace.weights).filter(|(_, w)| **w != 0.0);
        chosen.for_each(|(&e, _)| counts[e as usize] += 1.0);
        let of: f64 = match form {
            BalanceForm::Switch => (trace.logits.len() / trace.experts.max(1)) as f64,
            BalanceForm::Normalised => counts.iter().sum(),
        };
        let factor = coefficient * trace.experts as f64 / of.max(1.0);
        counts.iter_mut().for_each(|count| *count *= factor);
        Some(counts)
    }
}

impl RouterAdapter for LayerLoss {
    fn routed(&self, trace: &LayerTrace<'_>) {
        let (mut balance, mut z) = (0.0, 0.0);
        let loads = self.loads(trace);
        for logits in trace.logits.chunks_exact(trace.experts.max(1)) {
            let scores = self.scores(logits);
            if let Some(loads) = &loads {
                balance += loads.iter().zip(&scores.shares).map(|(f, p)| f * p).sum::<f64>();
            }
            z += self.losses.z.unwrap_or(0.0) * scores.log_sum * scores.log_sum;
        }
        let tokens = (trace.logits.len() / trace.experts.max(1)).max(1) as f64;
        let mut report = self.report.lock();
        let layer = report.entry(trace.layer).or_default();
        layer.balance += balance / tokens;
        layer.z += z / tokens;
        layer.waves += 1;
    }

    fn add_gradient(&self, trace: &LayerTrace<'_>, d_logits: &mut [f32]) {
        let loads = self.loads(trace);
        let tokens = (trace.logits.len() / trace.experts.max(1)).max(1) as f64;
        let factor = trace.wave.loss_tokens() as f64 / tokens;
        let rows = trace.logits.chunks_exact(trace.experts.max(1));
        for (logits, d) in rows.zip(d_logits.chunks_exact_mut(trace.experts.max(1))) {
            let Scores { shares, slopes, log_sum } = self.scores(logits);
            let mean = loads.as_ref().map(|loads| loads.iter().zip(&shares).map(|(f, p)| f * p).sum::<f64>());
            // of log sum exp the derivative is the softmax, whatever the rule
            let z = self.losses.z.map(|z| 2.0 * z * log_sum);
            for (e, d) in d.iter_mut().enumerate() {
                let mut sum = 0.0;
                if let (Some(loads), Some(mean)) = (&loads, mean) {
                    sum += shares[e] * slopes[e] * (loads[e] - mean);
                }
                if let Some(z) = z {
                    sum += z * (f64::from(logits[e]) - log_sum).exp();
                }
                *d += (factor * sum) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_core::trace::{SequenceInfo, WaveInfo};

    fn wave(tokens: usize, loss_tokens: usize) -> WaveInfo {
        WaveInfo { id: 0, tokens, sequences: vec![SequenceInfo { tokens: 0..tokens, loss_tokens }] }
    }

    fn adapter(losses: RouterLosses, sigmoid: bool) -> LayerLoss {
        LayerLoss { losses, sigmoid, report: Arc::default() }
    }

    fn balance(coefficient: f64, form: BalanceForm) -> RouterLosses {
        RouterLosses { balance: Some(BalanceLoss { coefficient, form }), z: None }
    }

    /// The losses of these logits, with experts chosen beforehand.
    fn losses(adapter: &LayerLoss, wave: &WaveInfo, logits: &[f32], experts: usize, selected: &[u32]) -> LayerLosses {
        let weights = vec![1.0; selected.len()];
        let top_k = selected.len() / wave.tokens;
        adapter.routed(&LayerTrace { layer: 3, wave, experts, top_k, logits, selected, weights: &weights });
        adapter.report.take()[&3]
    }

    #[test]
    fn at_perfect_balance_each_form_has_its_value() {
        let wave = wave(2, 1);
        for (form, expected) in [(BalanceForm::Switch, 0.5 * 2.0), (BalanceForm::Normalised, 0.5)] {
            let found = losses(&adapter(balance(0.5, form), false), &wave, &[0.0; 8], 4, &[0, 1, 2, 3]);
            assert!((found.balance - expected).abs() < 1e-12 && found.z == 0.0, "{found:?}");
        }
        // everything to one expert: E times its share
        let found =
            losses(&adapter(balance(1.0, BalanceForm::Switch), false), &wave, &[9.0, 0.0, 9.0, 0.0], 2, &[0, 0]);
        assert!((found.balance - 2.0 / (1.0 + (-9.0f64).exp())).abs() < 1e-12);
        let z = adapter(RouterLosses { balance: None, z: Some(0.1) }, false);
        let found = losses(&z, &wave, &[0.0; 8], 4, &[0, 1, 2, 3]);
        assert!((found.z - 0.1 * 4f64.ln().powi(2)).abs() < 1e-12);
    }

    #[test]
    fn gradients_match_difference_quotients() {
        let wave = wave(3, 5);
        let logits: Vec<f32> = (0..12).map(|i| ((i * 7 % 11) as f32 - 5.0) * 0.3).collect();
        let selected = [0, 1, 2, 0, 3, 1];
        let both = RouterLosses { z: Some(0.3), ..balance(0.7, BalanceForm::Switch) };
        for (config, sigmoid) in [
            (both, false),
            (both, true),
            (balance(0.7, BalanceForm::Normalised), false),
            (balance(1.0, BalanceForm::Switch), true),
        ] {
            let adapter = adapter(config, sigmoid);
            let weights = [1.0; 6];
            let trace = LayerTrace {
                layer: 3,
                wave: &wave,
                experts: 4,
                top_k: 2,
                logits: &logits,
                selected: &selected,
                weights: &weights,
            };
            let mut found = vec![0.25; 12];
            adapter.add_gradient(&trace, &mut found);
            for i in 0..12 {
                let at = |h: f32| {
                    let mut moved = logits.clone();
                    moved[i] += h;
                    let found = losses(&adapter, &wave, &moved, 4, &selected);
                    (found.balance + found.z) * 5.0
                };
                let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
                assert!((numeric + 0.25 - f64::from(found[i])).abs() < 1e-4, "{i}: {numeric} {}", found[i]);
            }
        }
    }

    #[test]
    fn recipes_are_checked() {
        let parsed: RouterLosses =
            serde_json::from_str(r#"{"balance": {"coefficient": 0.01, "form": "normalised"}, "z": 0.001}"#).unwrap();
        assert!(parsed.validate().is_ok());
        let error = RouterLosses { z: Some(-1.0), ..parsed }.validate().unwrap_err().to_string();
        assert!(error.contains("z: found -1"), "{error}");
        let error = balance(f64::NAN, BalanceForm::Switch).validate().unwrap_err().to_string();
        assert!(error.contains("balance.coefficient"), "{error}");
        assert!(serde_json::from_str::<RouterLosses>(r#"{"z_loss": 1.0}"#).is_err());
    }
}

//! Routing of one layer with a bias and condensers, its gradient, and how the bias moves.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use moe_checkpoint::{Routing, RoutingKind};
use moe_core::{
    RouterTokens, RoutingRule, RuleGradients,
    adapters::RouterAdapter,
    kernels::math,
    router::{Routed, Router},
    trace::LayerTrace,
};
use rayon::prelude::*;

use super::{Center, CondenserLayer, CondenserMode, CondenserOptions};
use crate::{Error, Result};

/// The rule of one layer.
#[derive(Debug)]
pub(super) struct LayerRule {
    experts: usize,
    top_k: usize,
    routing: Routing,
    normalize: bool,
    mode: CondenserMode,
    /// The model's own.
    router: Router,
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    learnt: CondenserLayer,
    /// Use since the last step `[E]`.
    pending: Vec<f64>,
    /// Times routed to since the last step `[E]`.
    pending_routed: Vec<u64>,
    /// Chooses beside condensers.
    beside: Option<Router>,
}

/// Scores of a token: the softmax with the bias.
fn softmax(logits: &[f32], out: &mut Vec<f32>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    out.clear();
    out.extend(logits.iter().map(|z| math::exp(*z - max)));
    let sum: f32 = out.iter().sum();
    out.iter_mut().for_each(|p| *p /= sum);
}

impl LayerRule {
    pub fn new(routing: &Routing, experts: usize, mode: CondenserMode) -> Result<Self> {
        let normalize =
            matches!(routing.kind, RoutingKind::TopKSoftmax | RoutingKind::SoftmaxTopK { renormalize: true });
        let learnt = CondenserLayer {
            bias: vec![0.0; experts],
            usage: vec![0.0; experts],
            routed: vec![0; experts],
            condensers: None,
        };
        let (pending, pending_routed) = (vec![0.0; experts], vec![0; experts]);
        Ok(Self {
            experts,
            top_k: routing.top_k.min(experts),
            normalize,
            mode,
            router: Router::new(routing)?,
            routing: routing.clone(),
            state: RwLock::new(State { learnt, pending, pending_routed, beside: None }),
        })
    }

    pub fn experts(&self) -> usize {
        self.experts
    }

    /// In the budget mode one expert at least is routed to.
    pub fn most_condensers(&self) -> usize {
        match self.mode {
            CondenserMode::Additive => self.experts,
            CondenserMode::Budget => self.top_k.saturating_sub(1),
        }
    }

    pub fn learnt(&self) -> CondenserLayer {
        self.read().learnt.clone()
    }

    pub fn add_pending(&self, usage: &[f64]) {
        self.write().pending.iter_mut().zip(usage).for_each(|(sum, u)| *sum += u);
    }

    /// Experts of the next wave on are those of the token and `condensers`, ascending.
    pub fn condense(&self, condensers: Vec<u32>) {
        let mut state = self.write();
        state.beside = self.chooser(condensers.len());
        state.learnt.condensers = Some(condensers);
    }

    fn chooser(&self, condensers: usize) -> Option<Router> {
        let top_k = match self.mode {
            CondenserMode::Additive => self.top_k,
            CondenserMode::Budget => self.top_k - condensers.min(self.top_k),
        };
        let routing = Routing { top_k, ..self.routing.clone() };
        // the rule is known to be one that there is
        Some(Router::new(&routing).unwrap_or_else(|_| self.router.clone())).filter(|_| condensers > 0)
    }

    pub fn check(&self, layer: usize, learnt: &CondenserLayer) -> Result<()> {
        let lengths = [learnt.bias.len(), learnt.usage.len(), learnt.routed.len()];
        if lengths != [self.experts; 3] {
            let what = format!("biases, uses and counts of layer {layer}");
            return Err(Error::input(what, format!("{lengths:?}"), format!("{} of each", self.experts)));
        }
        if learnt.bias.iter().any(|b| !b.is_finite()) || learnt.usage.iter().any(|u| !u.is_finite()) {
            return Err(Error::input(format!("biases and uses of layer {layer}"), "NaN or infinity", "finite numbers"));
        }
        let condensers = learnt.condensers.as_deref().unwrap_or_default();
        let ascending = condensers.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || condensers.iter().any(|e| *e as usize >= self.experts) {
            let expected = format!("ascending, below the {} experts", self.experts);
            return Err(Error::input(format!("condensers of layer {layer}"), format!("{condensers:?}"), expected));
        }
        if condensers.len() > self.most_condensers() {
            let expected = format!("at most {} in this mode", self.most_condensers());
            return Err(Error::input(format!("condensers of layer {layer}"), condensers.len(), expected));
        }
        Ok(())
    }

    pub fn restore(&self, learnt: CondenserLayer) {
        let mut state = self.write();
        state.beside = self.chooser(learnt.condensers.as_ref().map_or(0, Vec::len));
        (state.pending, state.pending_routed) = (vec![0.0; self.experts], vec![0; self.experts]);
        state.learnt = learnt;
    }

    pub fn step(&self, options: &CondenserOptions) {
        let mut state = self.write();
        let State { learnt, pending, pending_routed, .. } = &mut *state;
        if pending.iter().all(|u| *u == 0.0) {
            return;
        }
        let center = match options.center {
            Center::Mean => pending.iter().sum::<f64>() / pending.len() as f64,
            Center::Median => median(pending),
        };
        for (b, u) in learnt.bias.iter_mut().zip(pending.iter()) {
            if *u > center && options.clip.is_none_or(|clip| *b < clip) {
                *b += options.speed;
            } else if *u < center {
                *b -= options.speed;
            }
        }
        learnt.usage.iter_mut().zip(pending.iter_mut()).for_each(|(sum, u)| *sum += std::mem::take(u));
        learnt.routed.iter_mut().zip(pending_routed.iter_mut()).for_each(|(sum, n)| *sum += std::mem::take(n));
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn biased(&self, logits: &[f32], bias: &[f32]) -> Vec<f32> {
        let rows = logits.chunks_exact(self.experts);
        rows.flat_map(|row| row.iter().zip(bias).map(|(z, b)| z + b)).collect()
    }

    /// How many times each expert of a token's list counts: those routed to come first, then condensers, then what only
    /// fills the list.
    fn multiplicity(&self, slot: usize, expert: u32, condensers: &[u32]) -> f32 {
        let first = match self.mode {
            CondenserMode::Additive => self.top_k,
            CondenserMode::Budget => self.top_k - condensers.len(),
        };
        let routed = slot < first;
        f32::from(u8::from(routed) + u8::from(condensers.contains(&expert)))
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

impl RoutingRule for LayerRule {
    fn route(&self, tokens: &RouterTokens<'_>) -> moe_core::Result<Routed> {
        let RouterTokens { logits, experts, .. } = *tokens;
        let state = self.read();
        let biased = self.biased(logits, &state.learnt.bias);
        let condensers = state.learnt.condensers.as_deref().unwrap_or_default();
        let Some(beside) = state.beside.as_ref().filter(|_| !condensers.is_empty()) else {
            return Ok(self.router.route(&biased, experts, None));
        };
        let excluded: Option<Vec<f32>> = (self.mode == CondenserMode::Budget).then(|| {
            let out = |e: u32| if condensers.contains(&e) { f32::NEG_INFINITY } else { 0.0 };
            (0..experts as u32).map(out).collect()
        });
        let picked = beside.route(&biased, experts, excluded.as_deref());
        let slots = match self.mode {
            CondenserMode::Additive => (self.top_k + condensers.len()).min(experts),
            CondenserMode::Budget => self.top_k,
        };
        let tokens = logits.len() / experts.max(1);
        let (mut selected, mut weights) = (vec![0u32; tokens * slots], vec![0.0f32; tokens * slots]);
        let rows = selected.par_chunks_mut(slots).zip(weights.par_chunks_mut(slots)).zip(biased.par_chunks(experts));
        rows.zip(picked.selected.par_chunks(picked.top_k)).with_min_len(64).for_each_init(
            Vec::new,
            |p, (((selected, weights), logits), picked)| {
                softmax(logits, p);
                let rest = condensers.iter().copied().filter(|e| !picked.contains(e));
                let neither = |e: &u32| !picked.contains(e) && !condensers.contains(e);
                let list = picked.iter().copied().chain(rest).chain((0..experts as u32).filter(neither));
                let mut sum = 0.0;
                for (slot, e) in list.take(slots).enumerate() {
                    selected[slot] = e;
                    weights[slot] = self.multiplicity(slot, e, condensers) * p[e as usize];
                    sum += weights[slot];
                }
                let divisor = if self.normalize { sum } else { 1.0 };
                weights.iter_mut().for_each(|w| *w = *w / divisor * self.routing.scale);
            },
        );
        Ok(Routed { experts, top_k: slots, selected, weights })
    }

    /// `w_s = scale m_s p_s / c` with the multiplicity m, and c the sum of `m p` over the list or 1.
    fn backward(
        &self,
        tokens: &RouterTokens<'_>,
        routed: &Routed,
        d_weights: &[f32],
        _: bool,
    ) -> moe_core::Result<RuleGradients> {
        let logits = tokens.logits;
        let state = self.read();
        let biased = self.biased(logits, &state.learnt.bias);
        let condensers = state.learnt.condensers.as_deref().unwrap_or_default();
        if condensers.is_empty() {
            return Ok(self.router.backward(&biased, routed, d_weights).into());
        }
        let (experts, k) = (routed.experts, routed.top_k);
        let mut out = vec![0.0f32; logits.len()];
        let rows = out.par_chunks_mut(experts).zip(biased.par_chunks(experts));
        let slots = routed.selected.par_chunks(k).zip(routed.weights.par_chunks(k)).zip(d_weights.par_chunks(k));
        rows.zip(slots).with_min_len(64).for_each_init(Vec::new, |p, ((out, logits), ((selected, weights), dw))| {
            softmax(logits, p);
            // sum(dw w) = sum(g p) before the divisor is differentiated; with it, that of the softmax vanishes
            let inner: f32 = dw.iter().zip(weights).map(|(d, w)| d * w).sum();
            if !self.normalize {
                out.iter_mut().zip(p.iter()).for_each(|(out, p)| *out = -p * inner);
            }
            let through_sum = if self.normalize { inner / self.routing.scale } else { 0.0 };
            for ((e, w), d) in selected.iter().zip(weights).zip(dw) {
                out[*e as usize] += w * (d - through_sum);
            }
        });
        Ok(out.into())
    }
}

impl RouterAdapter for LayerRule {
    fn routed(&self, trace: &LayerTrace<'_>) {
        let mut state = self.write();
        let State { learnt, pending, pending_routed, .. } = &mut *state;
        let (mut biased, mut p) = (Vec::new(), Vec::new());
        for logits in trace.logits.chunks_exact(self.experts) {
            biased.clear();
            biased.extend(logits.iter().zip(&learnt.bias).map(|(z, b)| z + b));
            softmax(&biased, &mut p);
            pending.iter_mut().zip(&p).for_each(|(sum, p)| *sum += f64::from(*p));
        }
        for (&e, _) in trace.selected.iter().zip(trace.weights).filter(|(_, w)| **w != 0.0) {
            pending_routed[e as usize] += 1;
        }
    }
}

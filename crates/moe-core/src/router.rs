//! Routing: from router logits to experts and weights, and back.
//!
//! All semantics live in one enum-configured [`Router`], on the host: `[tokens, experts]` numbers are few, and every backend then
//! breaks ties the same way (the lower expert index wins).

use moe_checkpoint::{Routing, RoutingKind};
use rayon::prelude::*;

use crate::{
    error::{Error, Result},
    kernels::math,
};

/// The routing rule of a model.
#[derive(Clone, Debug)]
pub struct Router {
    top_k: usize,
    renormalise: bool,
    scale: f32,
}

/// Routing of a number of tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Routed {
    /// Experts, E.
    pub experts: usize,
    /// Experts per token, k.
    pub top_k: usize,
    /// Selected experts `[T, k]`, best first.
    pub selected: Vec<u32>,
    /// Routing weights as applied `[T, k]`.
    pub weights: Vec<f32>,
}

/// The tokens of every expert, grouped: expert e owns `offsets[e]..offsets[e + 1]` of the other arrays.
#[derive(Clone, Debug, PartialEq)]
pub struct Dispatch {
    offsets: Vec<usize>,
    rows: Vec<u32>,
    slots: Vec<u32>,
    weights: Vec<f32>,
}

/// The tokens of one expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertRows<'a> {
    /// Token of each row, ascending.
    pub rows: &'a [u32],
    /// Where the routing weight of each row stands in [`Routed::weights`].
    pub slots: &'a [u32],
    /// Routing weight of each row.
    pub weights: &'a [f32],
}

impl Router {
    /// Router of a configuration.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a rule this crate does not implement.
    pub fn new(routing: &Routing) -> Result<Self> {
        match &routing.kind {
            RoutingKind::SoftmaxTopK { renormalise } => {
                Ok(Self { top_k: routing.top_k, renormalise: *renormalise, scale: routing.scale })
            }
            // softmax over the selected logits is the renormalised softmax
            RoutingKind::TopKSoftmax => Ok(Self { top_k: routing.top_k, renormalise: true, scale: routing.scale }),
            other => Err(Error::Unsupported(format!("routing {other:?}"))),
        }
    }

    /// Routes tokens by `logits [T, E]`. A token goes to `min(top_k, E)` experts.
    pub fn route(&self, logits: &[f32], experts: usize) -> Routed {
        let top_k = self.top_k.min(experts);
        let tokens = logits.len() / experts.max(1);
        let mut selected = vec![0u32; tokens * top_k];
        let mut weights = vec![0.0f32; tokens * top_k];
        if top_k > 0 {
            selected
                .par_chunks_mut(top_k)
                .zip(weights.par_chunks_mut(top_k))
                .zip(logits.par_chunks(experts))
                .with_min_len(64)
                .for_each(|((selected, weights), logits)| self.route_token(logits, selected, weights));
        }
        Routed { experts, top_k, selected, weights }
    }

    fn route_token(&self, logits: &[f32], selected: &mut [u32], weights: &mut [f32]) {
        // Insertion into a short sorted list; strict comparison keeps the lower index on a tie. NaN never enters.
        let mut found = 0;
        for (e, &logit) in logits.iter().enumerate() {
            let mut at = found;
            while at > 0 && logit > weights[at - 1] {
                at -= 1;
            }
            if at >= selected.len() {
                continue;
            }
            found = (found + 1).min(selected.len());
            for i in (at + 1..found).rev() {
                selected[i] = selected[i - 1];
                weights[i] = weights[i - 1];
            }
            selected[at] = e as u32;
            weights[at] = logit;
        }
        let max = weights.first().copied().unwrap_or(0.0);
        let sum = if self.renormalise {
            weights.iter().map(|l| math::exp(l - max)).sum::<f32>()
        } else {
            softmax_sum(logits, max)
        };
        for weight in weights {
            *weight = math::exp(*weight - max) / sum * self.scale;
        }
    }

    /// Gradient with respect to the logits `[T, E]`, from the gradient of each routing weight `[T, k]`. The choice of experts
    /// is not differentiated.
    pub fn backward(&self, logits: &[f32], routed: &Routed, d_weights: &[f32]) -> Vec<f32> {
        let (experts, k) = (routed.experts, routed.top_k);
        let mut out = crate::kernels::zeros(logits.len());
        out.par_chunks_mut(experts).zip(logits.par_chunks(experts)).enumerate().with_min_len(64).for_each(
            |(t, (out, logits))| {
                let slots = t * k..(t + 1) * k;
                let (selected, weights) = (&routed.selected[slots.clone()], &routed.weights[slots.clone()]);
                let dw = &d_weights[slots];
                // w = scale * p, so sum(dw * w) = sum(d loss/dp * p)
                let inner: f32 = dw.iter().zip(weights).map(|(d, w)| d * w).sum();
                if self.renormalise {
                    // p is a softmax over the selected logits only
                    for ((&e, w), d) in selected.iter().zip(weights).zip(dw) {
                        out[e as usize] = w * (d - inner / self.scale);
                    }
                } else {
                    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let sum = softmax_sum(logits, max);
                    for (out, logit) in out.iter_mut().zip(logits) {
                        *out = -math::exp(logit - max) / sum * inner;
                    }
                    for ((&e, w), d) in selected.iter().zip(weights).zip(dw) {
                        out[e as usize] += w * d;
                    }
                }
            },
        );
        out
    }
}

fn softmax_sum(logits: &[f32], max: f32) -> f32 {
    logits.iter().map(|l| math::exp(l - max)).sum()
}

impl Routed {
    /// Groups tokens by expert.
    pub fn dispatch(&self) -> Dispatch {
        let mut offsets = vec![0usize; self.experts + 1];
        for &e in &self.selected {
            offsets[e as usize + 1] += 1;
        }
        for e in 0..self.experts {
            offsets[e + 1] += offsets[e];
        }
        let mut next = offsets.clone();
        let n = self.selected.len();
        let (mut rows, mut slots, mut weights) = (vec![0u32; n], vec![0u32; n], vec![0.0f32; n]);
        for (slot, &e) in self.selected.iter().enumerate() {
            let at = next[e as usize];
            next[e as usize] += 1;
            rows[at] = (slot / self.top_k) as u32;
            slots[at] = slot as u32;
            weights[at] = self.weights[slot];
        }
        Dispatch { offsets, rows, slots, weights }
    }
}

impl Dispatch {
    /// Tokens of expert `e`.
    pub fn expert(&self, e: usize) -> ExpertRows<'_> {
        let range = self.offsets[e]..self.offsets[e + 1];
        ExpertRows { rows: &self.rows[range.clone()], slots: &self.slots[range.clone()], weights: &self.weights[range] }
    }

    /// Most tokens any expert has.
    pub fn largest(&self) -> usize {
        self.offsets.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router(renormalise: bool) -> Router {
        Router { top_k: 2, renormalise, scale: 1.5 }
    }

    #[test]
    fn selects_the_largest_and_breaks_ties_by_index() {
        let routed = router(false).route(&[0.0, 2.0, 2.0, -1.0, 5.0, 5.0, 5.0, 5.0], 4);
        assert_eq!(routed.selected, [1, 2, 0, 1]);
        let p = 1.0 / (2.0 + (-2.0f32).exp() + (-3.0f32).exp());
        assert!((routed.weights[0] - 1.5 * p).abs() < 1e-6);
        let renormalised = router(true).route(&[0.0, 2.0, 2.0, -1.0], 4);
        assert!((renormalised.weights[0] - 0.75).abs() < 1e-6);
    }

    #[test]
    fn top_k_larger_than_the_number_of_experts_takes_all() {
        let routed = Router { top_k: 5, renormalise: true, scale: 1.0 }.route(&[1.0, 0.0], 2);
        assert_eq!((routed.top_k, routed.selected), (2, vec![0, 1]));
    }

    #[test]
    fn dispatch_covers_every_slot_once() {
        let logits: Vec<f32> = (0..60).map(|i| ((i * 7) % 13) as f32).collect();
        let routed = router(true).route(&logits, 6);
        let dispatch = routed.dispatch();
        let mut seen = vec![false; routed.selected.len()];
        for e in 0..6 {
            let rows = dispatch.expert(e);
            assert!(rows.rows.is_sorted());
            for ((&slot, &row), &w) in rows.slots.iter().zip(rows.rows).zip(rows.weights) {
                assert_eq!(routed.selected[slot as usize], e as u32);
                assert_eq!(row as usize, slot as usize / 2);
                assert_eq!(w, routed.weights[slot as usize]);
                assert!(!std::mem::replace(&mut seen[slot as usize], true));
            }
        }
        assert!(seen.into_iter().all(|s| s));
    }

    #[test]
    fn backward_matches_a_difference_quotient() {
        for renormalise in [false, true] {
            let router = router(renormalise);
            let logits = [0.3f32, -0.2, 1.1, 0.8, -0.5];
            let d = [0.7f32, -1.3];
            let routed = router.route(&logits, 5);
            let gradient = router.backward(&logits, &routed, &d);
            for i in 0..5 {
                let at = |h: f32| {
                    let mut moved = logits;
                    moved[i] += h;
                    let r = router.route(&moved, 5);
                    assert_eq!(r.selected, routed.selected);
                    r.weights.iter().zip(d).map(|(w, d)| *w as f64 * d as f64).sum::<f64>()
                };
                let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
                assert!((numeric - gradient[i] as f64).abs() < 1e-3, "{renormalise} {i}: {numeric} {}", gradient[i]);
            }
        }
    }
}

//! SparseMixer routing as applied at inference (arXiv 2409.12136), Phi-3.5-MoE's rule.
//!
//! Experts are chosen one after the other. The weight of the chosen expert is its softmax over the experts not chosen
//! before whose logit is close to the largest: `(max - z_e) / max(|z_e|, max) <= 2 jitter`. Weights of a token do not
//! sum to one.

use crate::kernels::math;

/// Whether expert `e` shares the softmax of the expert with the largest remaining logit `max`.
fn competes(logit: f32, max: f32, jitter: f32) -> bool {
    let distance = (max - logit) / logit.abs().max(max);
    distance <= 2.0 * jitter || distance.is_nan() // 0 / 0
}

/// Calls `f(e, p_e)` for the experts in the softmax of slot `slot`.
fn for_competitors(logits: &[f32], selected: &[u32], slot: usize, jitter: f32, mut f: impl FnMut(usize, f32)) {
    let max = logits[selected[slot] as usize];
    let earlier = &selected[..slot];
    let competing = |e: usize| competes(logits[e], max, jitter) && !earlier.contains(&(e as u32));
    let sum: f32 = (0..logits.len()).filter(|&e| competing(e)).map(|e| math::exp(logits[e] - max)).sum();
    for e in (0..logits.len()).filter(|&e| competing(e)) {
        f(e, math::exp(logits[e] - max) / sum);
    }
}

/// Weights of the experts `selected`, the largest logits in descending order.
pub(super) fn weights(logits: &[f32], selected: &[u32], jitter: f32, weights: &mut [f32]) {
    for (slot, weight) in weights.iter_mut().enumerate() {
        for_competitors(logits, selected, slot, jitter, |e, p| {
            if e as u32 == selected[slot] {
                *weight = p;
            }
        });
    }
}

/// Gradient with respect to the logits, added to `out`, from that of each weight.
pub(super) fn backward(logits: &[f32], selected: &[u32], jitter: f32, d_weights: &[f32], out: &mut [f32]) {
    for (slot, &d) in d_weights.iter().enumerate() {
        let mut chosen = 0.0;
        for_competitors(logits, selected, slot, jitter, |e, p| {
            if e as u32 == selected[slot] {
                chosen = p;
            }
        });
        for_competitors(logits, selected, slot, jitter, |e, p| {
            out[e] += d * chosen * (f32::from(u8::from(e as u32 == selected[slot])) - p);
        });
    }
}

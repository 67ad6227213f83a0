//! Causal softmax attention with grouped key/value heads, an optional sliding window and optional sinks, forward and
//! backward.
//!
//! The scores of one block of queries and one head are the largest temporary; nothing of size tokens x tokens exists.
//! The same kernel serves both sweeps of the engine, so that a recomputed layer has the bits of the first run.

use std::{ops::Range, sync::Arc};

use burn::tensor::Tensor;

#[cfg(feature = "flex")]
use crate::host;

#[cfg(feature = "flex")]
pub(crate) mod cpu;
mod device;
mod selection;
#[cfg(all(test, feature = "flex"))]
mod tests;

pub use selection::Selection;

/// What an attention layer is, apart from its projections.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a query or key head, D.
    pub head_dim: usize,
    /// Width of a value head, D_v; equal to `head_dim` but for latent attention.
    pub value_dim: usize,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Keys a query sees, itself included; `None` for all earlier ones.
    pub window: Option<usize>,
    /// Size of the chunks that a sequence is cut into, where a query sees no key of an earlier one.
    pub chunk: Option<usize>,
    /// One score per query head that takes part in the softmax without having a value `[heads]`.
    pub sinks: Option<Arc<[f32]>>,
}

impl AttentionShape {
    /// First key visible to the query at absolute position `position`.
    fn first_key(&self, position: usize) -> usize {
        let of_window = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
        of_window.max(self.chunk.map_or(0, |chunk| position / chunk * chunk))
    }
}

/// Attention of independent sequences: `q [T, heads * D]`, `k [T, kv_heads * D]`, `v [T, kv_heads * D_v]` ->
/// `[T, heads * D_v]`. `sequences` are disjoint row ranges; tokens see earlier tokens of their own sequence only, and
/// of these the keys of the selection, where there is one.
pub fn attention(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    sequences: &[Range<usize>],
    shape: &AttentionShape,
    selection: Option<&Selection>,
) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if host::is_host(&q.device()) {
        return cpu::forward(q, k, v, sequences, shape, selection);
    }
    let outputs = sequences
        .iter()
        .map(|s| {
            let part = selection.map(|selection| selection.part(s));
            device::forward(&rows(q, s), &rows(k, s), &rows(v, s), shape, part.as_ref())
        })
        .collect();
    Tensor::cat(outputs, 0)
}

/// Attention of the last `q.dims()[0]` tokens of one sequence over its cached keys and values, `[keys, kv_heads * D]`
/// and `[keys, kv_heads * D_v]`.
pub fn attention_cached(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    shape: &AttentionShape,
    selection: Option<&Selection>,
) -> Tensor<2> {
    device::forward(q, k, v, shape, selection)
}

/// Gradients of [`attention`] with respect to `q`, `k` and `v`, given the gradient of its output.
pub fn attention_backward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    sequences: &[Range<usize>],
    shape: &AttentionShape,
    selection: Option<&Selection>,
    d_out: &Tensor<2>,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    #[cfg(feature = "flex")]
    if host::is_host(&q.device()) {
        return cpu::backward(q, k, v, sequences, shape, selection, d_out);
    }
    let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
    for s in sequences {
        let part = selection.map(|selection| selection.part(s));
        let (q, k, v) = (rows(q, s), rows(k, s), rows(v, s));
        let (q, k, v) = device::backward(&q, &k, &v, shape, part.as_ref(), &rows(d_out, s));
        dq.push(q);
        dk.push(k);
        dv.push(v);
    }
    (Tensor::cat(dq, 0), Tensor::cat(dk, 0), Tensor::cat(dv, 0))
}

fn rows(x: &Tensor<2>, range: &Range<usize>) -> Tensor<2> {
    x.clone().narrow(0, range.start, range.len())
}

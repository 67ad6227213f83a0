//! Multi-head latent attention (arXiv 2405.04434 section 2.1): queries, keys and values through low-rank latents.
//!
//! Sweeps expand the latent to keys and values of every head. Generation keeps the latent and the shared rotated key
//! only, and moves the expansion to the other side of the products ("absorbed"): queries go into the latent space,
//! results come out of it.

use burn::tensor::Tensor;

use super::{
    Linear, Norm,
    grouped::{for_columns, over_columns},
    scaled, sum_of,
};
use crate::{
    adapters::{Tokens, Wanted},
    kernels::{attention::AttentionShape, latent::LatentHeads, rope::RotaryTable, weight::Weight},
};

/// Projections of latent attention. R_kv is the rank of the key/value latent.
#[derive(Clone, Debug)]
pub struct LatentProjections {
    /// Queries `[n, heads * (nope + rope)]`.
    pub query: QueryProjection,
    /// To the latent and the rotary key `[R_kv + rope, H]`.
    pub kv_down: Linear,
    /// Norm of the latent `[R_kv]`.
    pub kv_norm: Norm,
    /// Factor on the normed latent.
    pub kv_scale: f32,
    /// From the latent to keys and values `[heads * (nope + value), R_kv]`.
    pub kv_up: Weight,
    /// Sizes of the heads.
    pub heads: LatentHeads,
    /// Whether queries and the shared key are rotated.
    pub rotary: bool,
    /// Projection of gates on the outputs of the heads `[heads, H]`, where there are some.
    pub gate: Option<Linear>,
}

/// Projection to the queries.
#[derive(Clone, Debug)]
pub enum QueryProjection {
    /// `[heads * (nope + rope), H]`.
    Full(Weight),
    /// Through a latent.
    LowRank(Box<LowRankQuery>),
}

/// Projection to the queries through a latent of rank R_q.
#[derive(Clone, Debug)]
pub struct LowRankQuery {
    /// `[R_q, H]`.
    pub down: Linear,
    /// `[R_q]`.
    pub norm: Norm,
    /// `[heads * (nope + rope), R_q]`.
    pub up: Weight,
}

/// Latents before their norms.
#[derive(Clone, Debug)]
pub(super) struct Saved {
    query: Option<Tensor<2>>,
    kv: Tensor<2>,
}

impl QueryProjection {
    /// Queries of `z`, and their latent before its norm.
    pub(super) fn forward(&self, z: &Tensor<2>) -> (Tensor<2>, Option<Tensor<2>>) {
        match self {
            Self::Full(weight) => (weight.forward(z, None), None),
            Self::LowRank(query) => {
                let latent = query.down.forward(z);
                (query.up.forward(&query.norm.forward(&latent), None), Some(latent))
            }
        }
    }

    /// The normed latent of queries, where there is one.
    pub(super) fn normed(&self, latent: &Tensor<2>) -> Option<Tensor<2>> {
        match self {
            Self::LowRank(query) => Some(query.norm.forward(latent)),
            Self::Full(_) => None,
        }
    }

    /// Gradient with respect to `z`, if it is wanted.
    pub(super) fn backward(
        &self,
        z: &dyn Fn() -> Tensor<2>,
        latent: Option<&Tensor<2>>,
        dq: &Tensor<2>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        match (self, latent) {
            (Self::LowRank(query), Some(latent)) => {
                let through = Wanted { input: true, ..wanted };
                let d_normed = query.up.gradient(|| query.norm.forward(latent), dq, Tokens::WAVE, through)?;
                query.down.backward(z, &query.norm.backward(latent, &d_normed, wanted.parameters), wanted)
            }
            (Self::Full(weight), _) => weight.gradient(z, dq, Tokens::WAVE, wanted),
            (Self::LowRank(_), None) => unreachable!("the forward pass saves the latent"),
        }
    }
}

impl LatentProjections {
    fn rank(&self) -> usize {
        self.kv_up.dims()[1]
    }

    /// What keys and values are made of, from the latent before its norm.
    fn normed_latent(&self, latent: &Tensor<2>) -> Tensor<2> {
        scaled(self.kv_norm.forward(latent), self.kv_scale)
    }

    /// Queries rotated, with their latent; latent of keys and values before its norm `[n, R_kv]`; rotated key `[n,
    /// rope]`.
    fn down(&self, z: &Tensor<2>, table: &RotaryTable) -> (Tensor<2>, Saved, Tensor<2>) {
        let (q, query) = self.query.forward(z);
        let q = table.grow(self.rotate(q, table, self.heads.heads, self.heads.nope, false));
        let both = self.rotate(self.kv_down.forward(z), table, 1, self.rank(), false); // [n, R_kv + rope]
        let shared = both.clone().narrow(1, self.rank(), self.heads.rope);
        (q, Saved { query, kv: both.narrow(1, 0, self.rank()) }, shared)
    }

    fn rotate(&self, x: Tensor<2>, table: &RotaryTable, heads: usize, first: usize, inverse: bool) -> Tensor<2> {
        if self.rotary { table.rotate(x, heads, first, inverse) } else { x }
    }

    /// The normed latent of queries `[n, R_q]`, where there is one.
    pub(super) fn query_latent(&self, saved: &Saved) -> Option<Tensor<2>> {
        saved.query.as_ref().and_then(|latent| self.query.normed(latent))
    }

    /// Logits of the gates on the outputs of the heads, for every column of a head `[n, heads * value]`.
    pub(super) fn gates(&self, z: &Tensor<2>) -> Option<Tensor<2>> {
        self.gate.as_ref().map(|gate| for_columns(gate.forward(z), self.heads.value))
    }

    pub(super) fn project(&self, z: &Tensor<2>, table: &RotaryTable) -> ([Tensor<2>; 3], Saved) {
        let (q, saved, shared) = self.down(z, table);
        let kv = self.kv_up.forward(&self.normed_latent(&saved.kv), None);
        let (k, v) = self.heads.join(&kv, &shared);
        ([q, k, v], saved)
    }

    /// Gradient with respect to `z`, if it is wanted.
    pub(super) fn backward(
        &self,
        z: &dyn Fn() -> Tensor<2>,
        saved: &Saved,
        table: &RotaryTable,
        [dq, dk, dv]: [Tensor<2>; 3],
        d_gate: Option<Tensor<2>>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let dq = self.rotate(table.grow(dq), table, self.heads.heads, self.heads.nope, true);
        let from_query = self.query.backward(z, saved.query.as_ref(), &dq, wanted);
        let (d_kv, d_shared) = self.heads.join_backward(&dk, &dv);
        let through = Wanted { input: true, ..wanted };
        let d_normed = self.kv_up.gradient(|| self.normed_latent(&saved.kv), &d_kv, Tokens::WAVE, through)?;
        let d_latent = self.kv_norm.backward(&saved.kv, &scaled(d_normed, self.kv_scale), wanted.parameters);
        let d_both = self.rotate(Tensor::cat(vec![d_latent, d_shared], 1), table, 1, self.rank(), true);
        let from_gate = match (&self.gate, d_gate) {
            (Some(gate), Some(d)) => gate.backward(z, &over_columns(d, self.heads.value), wanted),
            _ => None,
        };
        sum_of([from_query, self.kv_down.backward(z, &d_both, wanted), from_gate])
    }

    /// Queries in the latent space `[n, heads * (R_kv + rope)]`, and `[latent | rotated key]` `[n, R_kv + rope]`, which
    /// is all that generation keeps of a token; and the latents.
    pub(super) fn absorbed(&self, z: &Tensor<2>, table: &RotaryTable) -> (Tensor<2>, Tensor<2>, Saved) {
        let (q, saved, shared) = self.down(z, table);
        let (n, LatentHeads { heads, nope, rope, .. }) = (z.dims()[0], self.heads);
        let q = q.reshape([n, heads, nope + rope]).swap_dims(0, 1); // [heads, n, nope + rope]
        let latent = q.clone().narrow(2, 0, nope).matmul(self.up(0, nope)); // [heads, n, R_kv]
        let q = Tensor::cat(vec![latent, q.narrow(2, nope, rope)], 2);
        let q = q.swap_dims(0, 1).reshape([n, heads * (self.rank() + rope)]);
        (q, Tensor::cat(vec![self.normed_latent(&saved.kv), shared], 1), saved)
    }

    /// Shape of attention with queries in the latent space: one key head for all, which is the value too.
    pub(super) fn absorbed_shape(&self, shape: &AttentionShape) -> AttentionShape {
        let head_dim = self.rank() + self.heads.rope;
        AttentionShape { kv_heads: 1, head_dim, value_dim: head_dim, ..shape.clone() }
    }

    /// `[n, heads * (R_kv + rope)]`, weighted sums of what was kept, to `[n, heads * value]`.
    pub(super) fn expand_absorbed(&self, heads: Tensor<2>) -> Tensor<2> {
        let n = heads.dims()[0];
        let h = self.heads;
        let latent = heads.reshape([n, h.heads, self.rank() + h.rope]).narrow(2, 0, self.rank()).swap_dims(0, 1);
        let values = latent.matmul(self.up(h.nope, h.value).swap_dims(1, 2)); // [heads, n, value]
        values.swap_dims(0, 1).reshape([n, h.heads * h.value])
    }

    /// Rows `first..first + count` of every head of the projection from the latent `[heads, count, R_kv]`.
    fn up(&self, first: usize, count: usize) -> Tensor<3> {
        let h = self.heads;
        self.kv_up.to_tensor().reshape([h.heads, h.nope + h.value, self.rank()]).narrow(1, first, count)
    }
}

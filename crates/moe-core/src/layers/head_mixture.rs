//! A mixture of attention heads (arXiv 2210.05144), the attention of JetMoE, with its norm and residual.
//!
//! A router chooses experts for every token. An expert has a projection to query heads, one for every head of keys and
//! values, and an output projection; keys and values are shared. What the chosen experts give is added up by their
//! routing weights. The experts are frozen, and so is their router; keys and values may be trained.

use std::ops::Range;

use burn::tensor::Tensor;

use super::{Linear, Norm, sum_of};
use crate::{
    adapters::{Tokens, Wanted},
    experts::row_products,
    host::{self, HostView},
    kernels::{
        attention::{AttentionShape, attention, attention_backward},
        rope::RotaryTable,
        rows::{RowAccumulator, gather_rows},
        weight::Weight,
    },
    router::{Routed, Router},
};

/// A mixture of attention heads with its norm. `C = kv_heads * D`, the width of keys, of values, and of the queries of
/// an expert.
#[derive(Clone, Debug)]
pub struct HeadMixtureLayer {
    /// Input norm.
    pub norm: Norm,
    /// Rows of the router `[E, H]`.
    pub router: Weight,
    /// How it routes.
    pub rule: Router,
    /// Query projection of every expert `[C, H]`.
    pub queries: Vec<Weight>,
    /// Output projection of every expert `[H, C]`.
    pub outputs: Vec<Weight>,
    /// Keys, then values `[2 C, H]`.
    pub key_value: Linear,
    /// Added to what the experts give `[H]`.
    pub bias: Tensor<1>,
    /// Heads of one token: those of all its experts, the ones that share keys and values side by side.
    pub shape: AttentionShape,
}

/// What the backward pass of [`HeadMixtureLayer`] needs of the forward pass.
#[derive(Clone, Debug)]
pub struct HeadMixtureTape {
    /// Rotated queries `[T, kv_heads * k * D]`.
    pub q: Tensor<2>,
    /// Rotated keys `[T, C]`.
    pub k: Tensor<2>,
    /// Values `[T, C]`.
    pub v: Tensor<2>,
    logits: Vec<f32>,
    routed: Routed,
}

impl HeadMixtureLayer {
    fn width(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim
    }

    fn top_k(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// From a row per token and slot `[T * k, C]` to rows of heads `[T, kv_heads * k * D]`, those of one head of keys
    /// side by side.
    fn by_heads(&self, slots: &[f32]) -> Vec<f32> {
        let (k, d, c) = (self.top_k(), self.shape.head_dim, self.width());
        let mut out = vec![0.0; slots.len()];
        for (row, slots) in out.chunks_exact_mut(k * c).zip(slots.chunks_exact(k * c)) {
            for (slot, heads) in slots.chunks_exact(c).enumerate() {
                for (kv, head) in heads.chunks_exact(d).enumerate() {
                    row[(kv * k + slot) * d..][..d].copy_from_slice(head);
                }
            }
        }
        out
    }

    /// The reverse of [`by_heads`](Self::by_heads).
    fn by_slots(&self, heads: &[f32]) -> Vec<f32> {
        let (k, d, c) = (self.top_k(), self.shape.head_dim, self.width());
        let mut out = vec![0.0; heads.len()];
        for (slots, row) in out.chunks_exact_mut(k * c).zip(heads.chunks_exact(k * c)) {
            for (slot, slots) in slots.chunks_exact_mut(c).enumerate() {
                for (kv, head) in slots.chunks_exact_mut(d).enumerate() {
                    head.copy_from_slice(&row[(kv * k + slot) * d..][..d]);
                }
            }
        }
        out
    }

    /// Routing, queries, keys and values of `x [T, H]`, rotated by `table`.
    pub fn project(&self, x: &Tensor<2>, table: &RotaryTable) -> HeadMixtureTape {
        let (z, c, tokens, device) = (self.norm.forward(x), self.width(), x.dims()[0], x.device());
        let logits = host::into_vec(self.router.forward(&z, None));
        let routed = self.rule.route(&logits, self.queries.len(), None);
        let dispatch = routed.dispatch();
        let mut slots = RowAccumulator::zeros(tokens * self.top_k(), c, &device);
        for (expert, weight) in self.queries.iter().enumerate() {
            let of = dispatch.expert(expert);
            if !of.rows.is_empty() {
                slots.add_rows(
                    of.slots,
                    None,
                    &weight.forward_for(&gather_rows(&z, of.rows), None, Tokens::Rows(of.rows)),
                );
            }
        }
        let q = self.by_heads(HostView::new(&slots.into_tensor()).as_slice());
        let q = host::from_vec(q, [tokens, self.top_k() * c], &device);
        let both = self.key_value.forward(&z);
        HeadMixtureTape {
            q: table.rotate(q, self.shape.heads, 0, false),
            k: table.rotate(both.clone().narrow(1, 0, c), self.shape.kv_heads, 0, false),
            v: both.narrow(1, c, c),
            logits,
            routed,
        }
    }

    /// `x` plus what the experts make of the outputs of their heads `[T, kv_heads * k * D]`.
    pub fn finish(&self, x: &Tensor<2>, tape: &HeadMixtureTape, heads: &Tensor<2>) -> Tensor<2> {
        let slots = self.slots(heads);
        let dispatch = tape.routed.dispatch();
        let bias = self.bias.clone().unsqueeze::<2>().repeat_dim(0, x.dims()[0]); // [T, H]
        let mut sum = RowAccumulator::from_tensor(bias);
        for (expert, weight) in self.outputs.iter().enumerate() {
            let of = dispatch.expert(expert);
            if !of.rows.is_empty() {
                let y = weight.forward_for(&gather_rows(&slots, of.slots), None, Tokens::Rows(of.rows));
                sum.add_rows(of.rows, Some(of.weights), &y);
            }
        }
        sum.add(x);
        sum.into_tensor()
    }

    fn slots(&self, heads: &Tensor<2>) -> Tensor<2> {
        let rows = heads.dims()[0] * self.top_k();
        let slots = self.by_slots(HostView::new(heads).as_slice());
        host::from_vec(slots, [rows, self.width()], &heads.device())
    }

    /// The layer's output, given the projections of `x`.
    pub fn mix(&self, x: &Tensor<2>, tape: &HeadMixtureTape, sequences: &[Range<usize>]) -> Tensor<2> {
        self.finish(x, tape, &attention(&tape.q, &tape.k, &tape.v, sequences, &self.shape, None))
    }

    /// Gradient with respect to `x`, if it is wanted, from the gradient of [`mix`](Self::mix)'s result; and those of
    /// what is trained.
    pub fn backward(
        &self,
        x: &Tensor<2>,
        tape: &HeadMixtureTape,
        sequences: &[Range<usize>],
        table: &RotaryTable,
        dy: Tensor<2>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let (tokens, c, device) = (x.dims()[0], self.width(), x.device());
        let heads = attention(&tape.q, &tape.k, &tape.v, sequences, &self.shape, None);
        let slots = self.slots(&heads);
        let dispatch = tape.routed.dispatch();
        let through = Wanted { input: true, parameters: false };
        let mut d_slots = RowAccumulator::zeros(slots.dims()[0], c, &device);
        let mut d_weights = vec![0.0; tape.routed.weights.len()];
        for (expert, weight) in self.outputs.iter().enumerate() {
            let of = dispatch.expert(expert);
            if of.rows.is_empty() {
                continue;
            }
            let own = gather_rows(&slots, of.slots);
            let d = weight.gradient(|| own.clone(), &gather_rows(&dy, of.rows), Tokens::Rows(of.rows), through)?;
            for (slot, d) in of.slots.iter().zip(row_products(&own, &d)) {
                d_weights[*slot as usize] = d;
            }
            d_slots.add_rows(of.slots, Some(of.weights), &d);
        }
        let d_heads = self.by_heads(HostView::new(&d_slots.into_tensor()).as_slice());
        let d_heads = host::from_vec(d_heads, heads.dims(), &device);
        let (dq, dk, dv) = attention_backward(&tape.q, &tape.k, &tape.v, sequences, &self.shape, None, &d_heads);
        let dq = self.slots(&table.rotate(dq, self.shape.heads, 0, true));
        let dk = table.rotate(dk, self.shape.kv_heads, 0, true);
        let z = || self.norm.forward(x);
        let wanted_z = Wanted { input: wanted.input || self.norm.is_trained(), ..wanted };
        let from_key_value = self.key_value.backward(z, &Tensor::cat(vec![dk, dv], 1), wanted_z);
        if !wanted_z.input {
            return None;
        }
        let mut from_queries = RowAccumulator::zeros(tokens, x.dims()[1], &device);
        for (expert, weight) in self.queries.iter().enumerate() {
            let of = dispatch.expert(expert);
            if !of.rows.is_empty() {
                let d = gather_rows(&dq, of.slots);
                let d = weight.gradient(|| gather_rows(&z(), of.rows), &d, Tokens::Rows(of.rows), through)?;
                from_queries.add_rows(of.rows, None, &d);
            }
        }
        let d_logits = self.rule.backward(&tape.logits, &tape.routed, &d_weights);
        let d_logits = host::from_vec(d_logits, [tokens, self.queries.len()], &device);
        let from_router = self.router.gradient(z, &d_logits, Tokens::WAVE, through);
        let dz = sum_of([from_key_value, Some(from_queries.into_tensor()), from_router])?;
        let dx = self.norm.backward(x, &dz, wanted.parameters);
        wanted.input.then(|| {
            let mut dx = RowAccumulator::from_tensor(dx);
            dx.add(&dy);
            dx.into_tensor()
        })
    }
}

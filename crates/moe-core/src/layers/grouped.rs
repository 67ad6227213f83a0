//! Queries, keys and values by one projection each, with their norms, clipping and rotation.

use burn::tensor::Tensor;

use super::{Linear, Norm, sum_of};
use crate::{
    adapters::Wanted,
    kernels::{attention::AttentionShape, rope::RotaryTable},
};

/// Query, key and value projections.
#[derive(Clone, Debug)]
pub struct GroupedProjections {
    /// Query `[heads * D, H]` (or `[heads * 2 D, H]`, see [`gated`](Self::gated)), key and value `[kv_heads * D, H]`.
    pub qkv: [Linear; 3],
    /// Norms of queries and keys.
    pub norms: Option<HeadNorms>,
    /// Bound that queries, keys and values are clamped to before the rotation.
    pub clip: Option<f32>,
    /// Whether queries and keys are rotated.
    pub rotary: bool,
    /// Whether every query head comes with a gate on its output, `[query | gate]`.
    pub gated: bool,
}

/// Norms of queries and keys before the rotation.
#[derive(Clone, Debug)]
pub struct HeadNorms {
    /// Norm of queries.
    pub query: Norm,
    /// Norm of keys.
    pub key: Norm,
    /// Whether the norms are over each head `[D]` rather than over the whole projection.
    pub per_head: bool,
}

/// Queries and keys before norm and clipping, where there is either.
#[derive(Clone, Debug)]
pub(super) struct Saved(Option<(Tensor<2>, Tensor<2>)>);

impl GroupedProjections {
    pub(super) fn project(
        &self,
        z: &Tensor<2>,
        table: &RotaryTable,
        shape: &AttentionShape,
    ) -> ([Tensor<2>; 3], Option<Tensor<2>>, Saved) {
        let [q, k, v] = [0, 1, 2].map(|i| self.qkv[i].forward(z));
        let (q, gate) = if self.gated { split_gate(q, shape) } else { (q, None) };
        let saved = (self.norms.is_some() || self.clip.is_some()).then(|| (q.clone(), k.clone()));
        let [q, k, v] = match &self.norms {
            Some(norms) => [norms.forward(&norms.query, q, shape), norms.forward(&norms.key, k, shape), v],
            None => [q, k, v],
        };
        let [q, k, v] = match self.clip {
            Some(bound) => [q, k, v].map(|x| x.clamp(-bound, bound)),
            None => [q, k, v],
        };
        let (q, k) = (self.rotate(q, shape.heads, table, false), self.rotate(k, shape.kv_heads, table, false));
        ([q, k, v], gate, Saved(saved))
    }

    fn rotate(&self, x: Tensor<2>, heads: usize, table: &RotaryTable, inverse: bool) -> Tensor<2> {
        if self.rotary { table.rotate(x, heads, 0, inverse) } else { x }
    }

    /// Gradient with respect to `z`, if it is wanted; `v` as [`project`](Self::project) returned it.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn backward(
        &self,
        z: &dyn Fn() -> Tensor<2>,
        saved: &Saved,
        v: &Tensor<2>,
        table: &RotaryTable,
        shape: &AttentionShape,
        [dq, dk, mut dv]: [Tensor<2>; 3],
        d_gate: Option<Tensor<2>>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let mut dq = self.rotate(dq, shape.heads, table, true);
        let mut dk = self.rotate(dk, shape.kv_heads, table, true);
        if let Some((q, k)) = &saved.0 {
            if let Some(bound) = self.clip {
                let normed = |x: &Tensor<2>, query: bool| match &self.norms {
                    Some(norms) => norms.forward(if query { &norms.query } else { &norms.key }, x.clone(), shape),
                    None => x.clone(),
                };
                dq = dq.mask_fill(normed(q, true).abs().greater_elem(bound), 0.0);
                dk = dk.mask_fill(normed(k, false).abs().greater_elem(bound), 0.0);
                // a value on the bound was clamped to it
                dv = dv.mask_fill(v.clone().abs().greater_equal_elem(bound), 0.0);
            }
            if let Some(norms) = &self.norms {
                dq = norms.backward(&norms.query, q, dq, shape, wanted.parameters);
                dk = norms.backward(&norms.key, k, dk, shape, wanted.parameters);
            }
        }
        if let Some(d_gate) = d_gate {
            dq = join_gate(dq, d_gate, shape);
        }
        let [query, key, value] = &self.qkv;
        sum_of([(query, dq), (key, dk), (value, dv)].map(|(linear, dy)| linear.backward(z, &dy, wanted)))
    }
}

/// Queries and gates `[n, heads * D]` of `[n, heads * 2 D]`.
fn split_gate(both: Tensor<2>, shape: &AttentionShape) -> (Tensor<2>, Option<Tensor<2>>) {
    let (n, heads, head_dim) = (both.dims()[0], shape.heads, shape.head_dim);
    let both = both.reshape([n, heads, 2 * head_dim]); // [n, heads, 2 D]
    let part = |first: usize| both.clone().narrow(2, first, head_dim).reshape([n, heads * head_dim]);
    (part(0), Some(part(head_dim)))
}

/// The reverse of [`split_gate`].
fn join_gate(query: Tensor<2>, gate: Tensor<2>, shape: &AttentionShape) -> Tensor<2> {
    let (n, heads, head_dim) = (query.dims()[0], shape.heads, shape.head_dim);
    let part = |x: Tensor<2>| x.reshape([n, heads, head_dim]);
    Tensor::cat(vec![part(query), part(gate)], 2).reshape([n, heads * 2 * head_dim])
}

impl HeadNorms {
    /// Rows that a norm is over.
    fn rows(&self, [n, columns]: [usize; 2], shape: &AttentionShape) -> [usize; 2] {
        if self.per_head { [n * columns / shape.head_dim, shape.head_dim] } else { [n, columns] }
    }

    fn forward(&self, norm: &Norm, x: Tensor<2>, shape: &AttentionShape) -> Tensor<2> {
        let dims = x.dims();
        norm.forward(&x.reshape(self.rows(dims, shape))).reshape(dims)
    }

    fn backward(
        &self,
        norm: &Norm,
        x: &Tensor<2>,
        dy: Tensor<2>,
        shape: &AttentionShape,
        parameters: bool,
    ) -> Tensor<2> {
        let (dims, rows) = (x.dims(), self.rows(x.dims(), shape));
        norm.backward(&x.clone().reshape(rows), &dy.reshape(rows), parameters).reshape(dims)
    }
}

//! Queries, keys and values of grouped-query attention, with their norms, clipping and rotation.

use burn::tensor::Tensor;

use super::{Linear, Norm, sum_of};
use crate::{
    adapters::Wanted,
    kernels::{attention::AttentionShape, rope::RotaryTable},
};

/// Query, key and value projections.
#[derive(Clone, Debug)]
pub struct GroupedProjections {
    /// What gives queries, keys and values.
    pub qkv: QkvProjections,
    /// Norms of queries and keys.
    pub norms: Option<HeadNorms>,
    /// Norm of every value head `[D]`.
    pub value_norm: Option<Norm>,
    /// Bound that queries, keys and values are clamped to before the rotation.
    pub clip: Option<f32>,
    /// Whether queries and keys are rotated.
    pub rotary: bool,
    /// Whether queries grow with their position.
    pub grows: bool,
    /// Where gates on the outputs of the heads come from.
    pub gate: HeadGate,
}

/// What gives queries, keys and values.
#[derive(Clone, Debug)]
pub enum QkvProjections {
    /// Query `[heads * D, H]` (or `[heads * 2 D, H]` with [`HeadGate::Query`]), key and value `[kv_heads * D, H]`.
    Separate(Box<[Linear; 3]>),
    /// Query and key; what the latter gives are the values, too.
    Tied(Box<[Linear; 2]>),
    /// The rows of query, key and value in one matrix `[(heads + 2 kv_heads) * D, H]`.
    Packed(Box<Linear>),
}

/// Where gates on the outputs of the heads come from.
#[derive(Clone, Debug)]
pub enum HeadGate {
    /// There are none.
    None,
    /// Every query head comes with one, `[query | gate]`.
    Query,
    /// A projection `[heads * D, H]`.
    Projection(Box<Linear>),
    /// A projection `[heads, H]`: one for all columns of a head.
    Head(Box<Linear>),
}

/// Norms of queries and keys.
#[derive(Clone, Debug)]
pub struct HeadNorms {
    /// Norm of queries.
    pub query: Norm,
    /// Norm of keys.
    pub key: Norm,
    /// Whether the norms are over each head `[D]` rather than over the whole projection.
    pub per_head: bool,
    /// Whether they come after the rotation instead of before it.
    pub after_rotation: bool,
}

/// What norms and clipping were given.
#[derive(Clone, Debug)]
pub(super) struct Saved {
    /// Queries and keys as projected, where there is a norm or a bound.
    qk: Option<(Tensor<2>, Tensor<2>)>,
    /// Values as projected, where they are normed.
    v: Option<Tensor<2>>,
}

impl QkvProjections {
    fn forward(&self, z: &Tensor<2>, shape: &AttentionShape) -> [Tensor<2>; 3] {
        match self {
            Self::Separate(qkv) => [0, 1, 2].map(|i| qkv[i].forward(z)),
            Self::Tied(qk) => {
                let [q, k] = [0, 1].map(|i| qk[i].forward(z));
                [q, k.clone(), k]
            }
            Self::Packed(all) => {
                let (all, [q, kv]) = (all.forward(z), packed_widths(shape));
                let part = |start, len| all.clone().narrow(1, start, len);
                [part(0, q), part(q, kv), part(q + kv, kv)]
            }
        }
    }

    fn backward(&self, z: &dyn Fn() -> Tensor<2>, [dq, dk, dv]: [Tensor<2>; 3], wanted: Wanted) -> Option<Tensor<2>> {
        match self {
            Self::Separate(qkv) => {
                let [query, key, value] = &**qkv;
                sum_of([(query, dq), (key, dk), (value, dv)].map(|(linear, dy)| linear.backward(z, &dy, wanted)))
            }
            Self::Tied(qk) => {
                let [query, key] = &**qk;
                sum_of([(query, dq), (key, dk + dv)].map(|(linear, dy)| linear.backward(z, &dy, wanted)))
            }
            Self::Packed(all) => all.backward(z, &Tensor::cat(vec![dq, dk, dv], 1), wanted),
        }
    }
}

/// Columns of queries, and of keys or values.
fn packed_widths(shape: &AttentionShape) -> [usize; 2] {
    [shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim]
}

impl GroupedProjections {
    pub(super) fn project(
        &self,
        z: &Tensor<2>,
        table: &RotaryTable,
        shape: &AttentionShape,
    ) -> ([Tensor<2>; 3], Option<Tensor<2>>, Saved) {
        let [q, k, v] = self.qkv.forward(z, shape);
        let (q, gate) = match &self.gate {
            HeadGate::None => (q, None),
            HeadGate::Query => split_gate(q, shape),
            HeadGate::Projection(gate) => (q, Some(gate.forward(z))),
            HeadGate::Head(gate) => (q, Some(for_columns(gate.forward(z), shape.head_dim))),
        };
        let saved = Saved {
            qk: (self.norms.is_some() || self.clip.is_some()).then(|| (q.clone(), k.clone())),
            v: self.value_norm.is_some().then(|| v.clone()),
        };
        let v = match &self.value_norm {
            Some(norm) => by_heads(&v, shape.head_dim, |rows| norm.forward(&rows)),
            None => v,
        };
        let (early, late) = self.norms_by_place();
        let [q, k] = match early {
            Some(norms) => [norms.forward(&norms.query, q, shape), norms.forward(&norms.key, k, shape)],
            None => [q, k],
        };
        let [q, k, v] = match self.clip {
            Some(bound) => [q, k, v].map(|x| x.clamp(-bound, bound)),
            None => [q, k, v],
        };
        let (q, k) = (self.rotate(q, shape.heads, table, false), self.rotate(k, shape.kv_heads, table, false));
        let [q, k] = match late {
            Some(norms) => [norms.forward(&norms.query, q, shape), norms.forward(&norms.key, k, shape)],
            None => [q, k],
        };
        let q = if self.grows { table.grow(q) } else { q };
        ([q, k, v], gate, saved)
    }

    /// The norms, before or after the rotation.
    fn norms_by_place(&self) -> (Option<&HeadNorms>, Option<&HeadNorms>) {
        match &self.norms {
            Some(norms) if norms.after_rotation => (None, Some(norms)),
            norms => (norms.as_ref(), None),
        }
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
        let mut dq = if self.grows { table.grow(dq) } else { dq };
        let mut dk = dk;
        let (early, late) = self.norms_by_place();
        if let (Some(norms), Some((q, k))) = (late, &saved.qk) {
            let (q, k) = (
                self.rotate(q.clone(), shape.heads, table, false),
                self.rotate(k.clone(), shape.kv_heads, table, false),
            );
            dq = norms.backward(&norms.query, &q, dq, shape, wanted.parameters);
            dk = norms.backward(&norms.key, &k, dk, shape, wanted.parameters);
        }
        dq = self.rotate(dq, shape.heads, table, true);
        dk = self.rotate(dk, shape.kv_heads, table, true);
        if let Some((q, k)) = &saved.qk {
            if let Some(bound) = self.clip {
                let normed = |x: &Tensor<2>, query: bool| match early {
                    Some(norms) => norms.forward(if query { &norms.query } else { &norms.key }, x.clone(), shape),
                    None => x.clone(),
                };
                dq = dq.mask_fill(normed(q, true).abs().greater_elem(bound), 0.0);
                dk = dk.mask_fill(normed(k, false).abs().greater_elem(bound), 0.0);
                // a value on the bound was clamped to it
                dv = dv.mask_fill(v.clone().abs().greater_equal_elem(bound), 0.0);
            }
            if let Some(norms) = early {
                dq = norms.backward(&norms.query, q, dq, shape, wanted.parameters);
                dk = norms.backward(&norms.key, k, dk, shape, wanted.parameters);
            }
        }
        if let (Some(norm), Some(v)) = (&self.value_norm, &saved.v) {
            let rows = |x: &Tensor<2>| x.clone().reshape(head_rows(x.dims(), shape.head_dim));
            dv = norm.backward(&rows(v), &rows(&dv), wanted.parameters).reshape(v.dims());
        }
        let mut through_gate = None;
        match (&self.gate, d_gate) {
            (HeadGate::Query, Some(d_gate)) => dq = join_gate(dq, d_gate, shape),
            (HeadGate::Projection(gate), Some(d_gate)) => through_gate = gate.backward(z, &d_gate, wanted),
            (HeadGate::Head(gate), Some(d_gate)) => {
                through_gate = gate.backward(z, &over_columns(d_gate, shape.head_dim), wanted);
            }
            _ => {}
        }
        sum_of([self.qkv.backward(z, [dq, dk, dv], wanted), through_gate])
    }
}

/// Rows `[n * heads, D]` of `[n, heads * D]`.
fn head_rows([n, columns]: [usize; 2], head_dim: usize) -> [usize; 2] {
    [n * columns / head_dim, head_dim]
}

/// What `f` makes of the heads of `x [n, heads * D]`, row by row.
fn by_heads(x: &Tensor<2>, head_dim: usize, f: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<2> {
    let dims = x.dims();
    f(x.clone().reshape(head_rows(dims, head_dim))).reshape(dims)
}

/// Queries and gates `[n, heads * D]` of `[n, heads * 2 D]`.
fn split_gate(both: Tensor<2>, shape: &AttentionShape) -> (Tensor<2>, Option<Tensor<2>>) {
    let (n, heads, head_dim) = (both.dims()[0], shape.heads, shape.head_dim);
    let both = both.reshape([n, heads, 2 * head_dim]); // [n, heads, 2 D]
    let part = |first: usize| both.clone().narrow(2, first, head_dim).reshape([n, heads * head_dim]);
    (part(0), Some(part(head_dim)))
}

/// A number per head `[n, heads]` for every column of the head `[n, heads * D]`.
pub(super) fn for_columns(x: Tensor<2>, head_dim: usize) -> Tensor<2> {
    let [n, heads] = x.dims();
    x.reshape([n, heads, 1]).repeat_dim(2, head_dim).reshape([n, heads * head_dim])
}

/// The sum of the columns of every head `[n, heads]` of `[n, heads * D]`.
pub(super) fn over_columns(x: Tensor<2>, head_dim: usize) -> Tensor<2> {
    let [n, columns] = x.dims();
    let heads = columns / head_dim;
    x.reshape([n, heads, head_dim]).sum_dim(2).reshape([n, heads])
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
        if self.per_head { head_rows([n, columns], shape.head_dim) } else { [n, columns] }
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

//! Weights of the parts of a decoder layer, and their forward and backward passes.
//!
//! Backward passes are written by hand: base weights are frozen, so only gradients with respect to inputs are needed, nothing is
//! recorded that is not used, and every temporary has a known size.

use std::ops::Range;

use burn::tensor::Tensor;

use crate::host;
use crate::{
    experts::ExpertTensors,
    kernels::{
        attention::{AttentionShape, attention, attention_backward},
        math,
        norm::{rms_norm, rms_norm_backward},
        rope::RotaryTable,
        rows::{RowAccumulator, gather_rows},
        swiglu::{swiglu, swiglu_backward},
        weight::Weight,
    },
};

/// Rows of a dense or shared feed-forward block computed at a time: bounds its temporaries. Part of the numerics, since
/// another chunking may round differently.
pub const DENSE_ROWS: usize = 1024;

/// Self-attention with its norm.
#[derive(Clone, Debug)]
pub struct AttentionLayer {
    /// Input norm `[H]`.
    pub norm: Tensor<1>,
    /// Query, key and value projections `[heads * D, H]`, with biases.
    pub qkv: [(Weight, Option<Tensor<1>>); 3],
    /// Output projection `[H, heads * D]`, with bias.
    pub output: (Weight, Option<Tensor<1>>),
    /// Norms of each query and key head `[D]`.
    pub qk_norm: Option<(Tensor<1>, Tensor<1>)>,
    /// Heads, scale and window.
    pub shape: AttentionShape,
    /// Epsilon of the norms.
    pub eps: f32,
}

/// What the backward pass of [`AttentionLayer`] needs of the forward pass.
#[derive(Clone, Debug)]
pub struct AttentionTape {
    /// Rotated queries `[T, heads * D]`.
    pub q: Tensor<2>,
    /// Rotated keys `[T, kv_heads * D]`.
    pub k: Tensor<2>,
    /// Values `[T, kv_heads * D]`.
    pub v: Tensor<2>,
    /// Queries and keys before their norms, where there are any.
    before_norm: Option<(Tensor<2>, Tensor<2>)>,
}

impl AttentionLayer {
    /// Queries, keys and values of `x [T, H]`, rotated by `table`.
    pub fn project(&self, x: &Tensor<2>, table: &RotaryTable) -> AttentionTape {
        let z = rms_norm(x, &self.norm, self.eps);
        let [mut q, mut k, v] = [0, 1, 2].map(|i| self.qkv[i].0.forward(&z, self.qkv[i].1.as_ref()));
        let mut before_norm = None;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            let normed = (self.head_norm(&q, q_norm), self.head_norm(&k, k_norm));
            before_norm = Some((q, k));
            (q, k) = normed;
        }
        AttentionTape {
            q: table.rotate(q, self.shape.heads, false),
            k: table.rotate(k, self.shape.kv_heads, false),
            v,
            before_norm,
        }
    }

    /// `x + attention(norm(x))`, given the projections of `x`.
    pub fn mix(&self, x: &Tensor<2>, tape: &AttentionTape, sequences: &[Range<usize>]) -> Tensor<2> {
        let heads = attention(&tape.q, &tape.k, &tape.v, sequences, &self.shape);
        self.residual(x, &heads)
    }

    /// `x + output(heads)`.
    pub fn residual(&self, x: &Tensor<2>, heads: &Tensor<2>) -> Tensor<2> {
        let mut sum = RowAccumulator::from_tensor(self.output.0.forward(heads, self.output.1.as_ref()));
        sum.add(x);
        sum.into_tensor()
    }

    /// Gradient with respect to `x` from the gradient of [`mix`](Self::mix)'s result.
    pub fn backward(
        &self,
        x: &Tensor<2>,
        tape: &AttentionTape,
        sequences: &[Range<usize>],
        table: &RotaryTable,
        dy: Tensor<2>,
    ) -> Tensor<2> {
        let d_heads = self.output.0.backward(&dy);
        let (dq, dk, dv) = attention_backward(&tape.q, &tape.k, &tape.v, sequences, &self.shape, &d_heads);
        drop(d_heads);
        let mut dq = table.rotate(dq, self.shape.heads, true);
        let mut dk = table.rotate(dk, self.shape.kv_heads, true);
        if let (Some((q_norm, k_norm)), Some((q, k))) = (&self.qk_norm, &tape.before_norm) {
            dq = self.head_norm_backward(q, q_norm, dq);
            dk = self.head_norm_backward(k, k_norm, dk);
        }
        let mut dz = RowAccumulator::from_tensor(self.qkv[0].0.backward(&dq));
        dz.add(&self.qkv[1].0.backward(&dk));
        dz.add(&self.qkv[2].0.backward(&dv));
        let mut dx = RowAccumulator::from_tensor(rms_norm_backward(x, &self.norm, self.eps, &dz.into_tensor()));
        dx.add(&dy);
        dx.into_tensor()
    }

    fn head_norm(&self, x: &Tensor<2>, weight: &Tensor<1>) -> Tensor<2> {
        let ([n, columns], d) = (x.dims(), self.shape.head_dim);
        rms_norm(&x.clone().reshape([n * columns / d, d]), weight, self.eps).reshape([n, columns])
    }

    fn head_norm_backward(&self, x: &Tensor<2>, weight: &Tensor<1>, dy: Tensor<2>) -> Tensor<2> {
        let ([n, columns], d) = (x.dims(), self.shape.head_dim);
        let heads = [n * columns / d, d];
        rms_norm_backward(&x.clone().reshape(heads), weight, self.eps, &dy.reshape(heads)).reshape([n, columns])
    }
}

impl AttentionTape {
    /// Bytes it holds.
    pub fn bytes(&self) -> u64 {
        let extra = self.before_norm.as_ref().map_or(0, |(q, k)| elements(q) + elements(k));
        4 * (elements(&self.q) + elements(&self.k) + elements(&self.v) + extra)
    }
}

fn elements(x: &Tensor<2>) -> u64 {
    x.dims().iter().product::<usize>() as u64
}

/// A feed-forward block that every token passes: a dense layer, or the shared expert of an MoE layer.
#[derive(Clone, Debug)]
pub struct DenseBlock {
    /// Its weights.
    pub weights: ExpertTensors,
    /// Row `[1, H]` of a sigmoid gate on the output.
    pub gate: Option<Weight>,
}

impl DenseBlock {
    /// Adds the block's output on `z [T, H]` to `out`. Keeps the pre-activations of each chunk of rows in `keep` if given.
    pub fn forward(&self, z: &Tensor<2>, out: &mut RowAccumulator, mut keep: Option<&mut Vec<Tensor<2>>>) {
        for_chunks(z.dims()[0], |rows| {
            let z = slice_rows(z, &rows);
            let gate_up = self.weights.gate_up.forward(&z, None);
            let y = self.weights.down.forward(&swiglu(&gate_up), None);
            let ids: Vec<u32> = (rows.start as u32..rows.end as u32).collect();
            out.add_rows(&ids, self.gate_values(&z).as_deref(), &y);
            if let Some(keep) = keep.as_deref_mut() {
                keep.push(gate_up);
            }
        });
    }

    /// Adds the gradient with respect to `z` to `dz`, from `dy [T, H]`, the gradient of the output.
    pub fn backward(&self, z: &Tensor<2>, dy: &Tensor<2>, kept: Option<Vec<Tensor<2>>>, dz: &mut RowAccumulator) {
        let mut kept = kept.map(Vec::into_iter);
        for_chunks(z.dims()[0], |rows| {
            let (z, dy) = (slice_rows(z, &rows), slice_rows(dy, &rows));
            let gate_up = match kept.as_mut().and_then(Iterator::next) {
                Some(kept) => kept,
                None => self.weights.gate_up.forward(&z, None),
            };
            let gate = self.gate_values(&z);
            let du = self.weights.down.backward(&dy);
            let gradients = swiglu_backward(&gate_up, du, gate.as_deref(), false);
            let ids: Vec<u32> = (rows.start as u32..rows.end as u32).collect();
            dz.add_rows(&ids, None, &self.weights.gate_up.backward(&gradients.d_gate_up));
            if let (Some(gate), Some(row)) = (gate, &self.gate) {
                let d_logit: Vec<f32> =
                    gate.iter().zip(&gradients.d_row_weights).map(|(s, d)| d * s * (1.0 - s)).collect();
                let d_logit = host::from_vec(d_logit, [rows.len(), 1], &z.device());
                dz.add_rows(&ids, None, &row.backward(&d_logit));
            }
        });
    }

    /// `sigmoid(z . gate)` per row.
    fn gate_values(&self, z: &Tensor<2>) -> Option<Vec<f32>> {
        let logits = host::into_vec(self.gate.as_ref()?.forward(z, None));
        Some(logits.into_iter().map(math::sigmoid).collect())
    }
}

fn for_chunks(rows: usize, mut f: impl FnMut(Range<usize>)) {
    for start in (0..rows).step_by(DENSE_ROWS) {
        f(start..(start + DENSE_ROWS).min(rows));
    }
}

pub(crate) fn slice_rows(x: &Tensor<2>, rows: &Range<usize>) -> Tensor<2> {
    if rows.len() == x.dims()[0] { x.clone() } else { x.clone().narrow(0, rows.start, rows.len()) }
}

/// The feed-forward half of a layer with its norm.
#[derive(Clone, Debug)]
pub struct FfnLayer {
    /// Input norm `[H]`.
    pub norm: Tensor<1>,
    /// Epsilon of the norm.
    pub eps: f32,
    /// Dense block of a dense layer, shared expert of an MoE layer.
    pub dense: Option<DenseBlock>,
    /// Router rows `[E, H]` of an MoE layer.
    pub router: Option<Weight>,
}

impl FfnLayer {
    /// `norm(x)`.
    pub fn normed(&self, x: &Tensor<2>) -> Tensor<2> {
        rms_norm(x, &self.norm, self.eps)
    }

    /// `dy + norm'(x) dz`: the gradient through the residual and the norm.
    pub fn input_gradient(&self, x: &Tensor<2>, dz: RowAccumulator, dy: &Tensor<2>) -> Tensor<2> {
        let mut dx = RowAccumulator::from_tensor(rms_norm_backward(x, &self.norm, self.eps, &dz.into_tensor()));
        dx.add(dy);
        dx.into_tensor()
    }
}

/// Pre-activations `[n, 2I]` of an expert on some rows of `z`.
pub(crate) fn expert_gate_up(z: &Tensor<2>, rows: &[u32], weights: &ExpertTensors) -> (Tensor<2>, Tensor<2>) {
    let x = gather_rows(z, rows);
    let gate_up = weights.gate_up.forward(&x, None);
    (x, gate_up)
}

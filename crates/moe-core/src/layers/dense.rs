//! A feed-forward block that every token passes.

use std::ops::Range;

use burn::tensor::Tensor;

use super::slice_rows;
use crate::{
    experts::ExpertTensors,
    host,
    kernels::{math, rows::RowAccumulator, weight::Weight},
};

/// Rows of a dense or shared feed-forward block computed at a time: bounds its temporaries. Part of the numerics, since
/// another chunking may round differently.
pub const DENSE_ROWS: usize = 1024;

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
            let gate_up = self.weights.pre_activations(&z);
            let y = self.weights.output(&self.weights.units(&gate_up));
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
                None => self.weights.pre_activations(&z),
            };
            let gate = self.gate_values(&z);
            let gradients = self.weights.backward(&gate_up, &dy, gate.as_deref(), false);
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

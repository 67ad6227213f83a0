//! A feed-forward block that every token passes.

use std::{ops::Range, sync::Arc};

use burn::tensor::Tensor;

use super::slice_rows;
use crate::{
    adapters::{BlockAdapter, Tokens, Wanted},
    experts::{ExpertTensors, row_products, weighted_rows},
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
    /// What stands beside or instead of the weights as a whole.
    pub adapter: Option<Arc<dyn BlockAdapter>>,
}

impl DenseBlock {
    /// Whether something of it is trained.
    pub(crate) fn is_trained(&self) -> bool {
        let weights = [Some(&self.weights.gate_up), Some(&self.weights.down), self.gate.as_ref()];
        self.adapter.is_some() || weights.into_iter().flatten().any(|weight| weight.adapter().is_some())
    }

    /// Adds the block's output on `z [T, H]` to `out`. Keeps the pre-activations of each chunk of rows in `keep` if
    /// given.
    pub fn forward(&self, z: &Tensor<2>, out: &mut RowAccumulator, mut keep: Option<&mut Vec<Tensor<2>>>) {
        for_chunks(z.dims()[0], |rows| {
            let (z, tokens) = (slice_rows(z, &rows), Tokens::From(rows.start));
            let ids: Vec<u32> = (rows.start as u32..rows.end as u32).collect();
            let gate = self.gate_values(&z, tokens);
            if let Some(adapter) = &self.adapter {
                out.add_rows(&ids, gate.as_deref(), &adapter.forward(&self.weights, &z, tokens));
                return;
            }
            let gate_up = self.weights.pre_activations_for(&z, tokens);
            let y = self.weights.output_for(&self.weights.units(&gate_up), tokens);
            out.add_rows(&ids, gate.as_deref(), &y);
            if let Some(keep) = keep.as_deref_mut() {
                keep.push(gate_up);
            }
        });
    }

    /// Adds the gradient with respect to `z` to `dz`, if there is one, from `dy [T, H]`, the gradient of the output.
    /// With `parameters`, also those of what is trained are added up.
    pub fn backward(
        &self,
        z: &Tensor<2>,
        dy: &Tensor<2>,
        kept: Option<Vec<Tensor<2>>>,
        mut dz: Option<&mut RowAccumulator>,
        parameters: bool,
    ) {
        let wanted = Wanted { input: dz.is_some(), parameters };
        let mut kept = kept.map(Vec::into_iter);
        for_chunks(z.dims()[0], |rows| {
            let (z, dy, tokens) = (slice_rows(z, &rows), slice_rows(dy, &rows), Tokens::From(rows.start));
            let gate = self.gate_values(&z, tokens);
            let (dx, d_factors) = match &self.adapter {
                Some(adapter) => self.adapted_backward(&**adapter, &z, &dy, gate.as_deref(), tokens, wanted),
                None => {
                    let gate_up = match kept.as_mut().and_then(Iterator::next) {
                        Some(kept) => kept,
                        None => self.weights.pre_activations_for(&z, tokens),
                    };
                    let gradients =
                        self.weights.backward_for(&gate_up, &dy, gate.as_deref(), tokens, false, wanted.parameters);
                    let dx = self.weights.gate_up.gradient(|| z.clone(), &gradients.d_gate_up, tokens, wanted);
                    (dx, gradients.d_row_weights)
                }
            };
            let d_logit = gate.as_ref().map(|gate| {
                let d = gate.iter().zip(&d_factors).map(|(s, d)| d * s * (1.0 - s)).collect();
                host::from_vec(d, [rows.len(), 1], &z.device())
            });
            let through_gate = match (&self.gate, &d_logit) {
                (Some(row), Some(d_logit)) => row.gradient(|| z.clone(), d_logit, tokens, wanted),
                _ => None,
            };
            if let Some(dz) = dz.as_deref_mut() {
                let ids: Vec<u32> = (rows.start as u32..rows.end as u32).collect();
                dx.iter().chain(&through_gate).for_each(|d| dz.add_rows(&ids, None, d));
            }
        });
    }

    /// Gradients of a block with an adapter as a whole: with respect to its input, and to the factor on each row of its
    /// output.
    fn adapted_backward(
        &self,
        adapter: &dyn BlockAdapter,
        z: &Tensor<2>,
        dy: &Tensor<2>,
        factors: Option<&[f32]>,
        tokens: Tokens<'_>,
        wanted: Wanted,
    ) -> (Option<Tensor<2>>, Vec<f32>) {
        let d_factors = match factors {
            None => Vec::new(),
            Some(_) => row_products(&adapter.forward(&self.weights, z, tokens), dy),
        };
        let dy = weighted_rows(dy.clone(), factors);
        (adapter.backward(&self.weights, z, &dy, tokens, wanted), d_factors)
    }

    /// `sigmoid(z . gate)` per row.
    fn gate_values(&self, z: &Tensor<2>, tokens: Tokens<'_>) -> Option<Vec<f32>> {
        let logits = host::into_vec(self.gate.as_ref()?.forward_for(z, None, tokens));
        Some(logits.into_iter().map(math::sigmoid).collect())
    }
}

fn for_chunks(rows: usize, mut f: impl FnMut(Range<usize>)) {
    for start in (0..rows).step_by(DENSE_ROWS) {
        f(start..(start + DENSE_ROWS).min(rows));
    }
}

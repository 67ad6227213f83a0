//! Routed experts of a layer, each on its tokens.

use std::{
    borrow::Cow,
    sync::{Mutex, MutexGuard, PoisonError},
};

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::Engine;
use crate::{
    adapters::{Tokens, Wanted},
    error::Result,
    experts::{ExpertTensors, row_products, weighted_rows},
    kernels::{rows::gather_rows, swiglu::SwigluGradients},
    memory,
    overlay::ExpertOverlay,
    router::{Dispatch, ExpertRows},
    trace::{Segment, WaveInfo},
};

/// An expert's forward pass on its tokens.
pub(super) struct ExpertRun {
    pub weights: ExpertTensors,
    pub input: Tensor<2>,
    pub gate_up: Tensor<2>,
    pub units: Tensor<2>,
    pub output: Option<Tensor<2>>,
}

/// An expert's backward pass on its tokens.
pub(super) struct ExpertBackwardRun {
    pub weights: ExpertTensors,
    pub input: Tensor<2>,
    pub upstream: Tensor<2>,
    pub gradients: SwigluGradients,
    pub output: Option<Tensor<2>>,
    pub d_input: Option<Tensor<2>>,
}

/// What of an expert's backward pass is wanted.
#[derive(Clone, Copy)]
pub(super) struct ExpertWanted {
    /// The gradient of its input.
    pub input: bool,
    /// The gradient of its units.
    pub units: bool,
    /// Its output.
    pub output: bool,
    /// The gradients of what is trained, added up where it is.
    pub parameters: bool,
}

impl Engine<'_> {
    /// Calls `compute` for each expert and `then` with its result, if it has one, in ascending order. On the host a few
    /// experts are computed at a time, each mostly by one thread, which wastes less than sharing out every small
    /// product.
    pub(super) fn for_experts<R: Send>(
        &self,
        experts: usize,
        compute: impl Fn(usize) -> Result<Option<R>> + Sync,
        mut then: impl FnMut(usize, R) -> Result<()>,
    ) -> Result<()> {
        let together = memory::experts_together(self.model.device());
        let all: Vec<usize> = (0..experts).collect();
        for chunk in all.chunks(together) {
            let results: Vec<Result<Option<R>>> = match chunk {
                [e] => vec![compute(*e)],
                _ => chunk.par_iter().map(|&e| compute(e)).collect(),
            };
            for (&e, result) in chunk.iter().zip(results) {
                if let Some(result) = result? {
                    then(e, result)?;
                }
            }
        }
        Ok(())
    }

    /// Whether routing weights multiply what experts read instead of what they give.
    pub(super) fn weights_inputs(&self) -> bool {
        self.model.config().routing.on_inputs
    }

    /// Factors on the outputs of an expert, given its routing weights: ones where those are on its inputs.
    pub(super) fn output_weights<'w>(&self, weights: &'w [f32]) -> Cow<'w, [f32]> {
        if self.weights_inputs() { Cow::Owned(vec![1.0; weights.len()]) } else { Cow::Borrowed(weights) }
    }

    /// What an expert reads of its tokens.
    fn expert_input(&self, z: &Tensor<2>, tokens: ExpertRows<'_>) -> Tensor<2> {
        weighted_rows(gather_rows(z, tokens.rows), self.weights_inputs().then_some(tokens.weights))
    }

    /// Runs one expert, as `overlay` changes it if there is one, on its tokens; nothing for an expert without any.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn expert_forward(
        &self,
        layer: usize,
        expert: usize,
        z: &Tensor<2>,
        dispatch: &Dispatch,
        overlay: Option<&dyn ExpertOverlay>,
        want_output: bool,
        observed: bool,
    ) -> Result<Option<ExpertRun>> {
        let tokens = dispatch.expert(expert);
        if tokens.rows.is_empty() {
            return Ok(None);
        }
        let weights = match overlay {
            Some(overlay) => self.model.replaced_expert(overlay, layer, expert)?,
            None => self.model.expert(layer, expert)?,
        };
        if weights.is_zero() && !observed {
            return Ok(None);
        }
        self.model.count().expert(tokens.rows.len());
        let input = self.expert_input(z, tokens);
        let tokens = Tokens::Rows(tokens.rows);
        let gate_up = weights.pre_activations_for(&input, tokens);
        let units = weights.units(&gate_up);
        let output = want_output.then(|| weights.output_for(&units, tokens));
        Ok(Some(ExpertRun { weights, input, gate_up, units, output }))
    }

    /// Gradients of one expert on its tokens; nothing for an expert without any.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn expert_backward(
        &self,
        layer: usize,
        expert: usize,
        z: &Tensor<2>,
        dy: &Tensor<2>,
        kept: Option<Tensor<2>>,
        dispatch: &Dispatch,
        wanted: ExpertWanted,
    ) -> Result<Option<ExpertBackwardRun>> {
        let tokens = dispatch.expert(expert);
        if tokens.rows.is_empty() {
            return Ok(None);
        }
        let weights = self.model.expert(layer, expert)?;
        let input = self.expert_input(z, tokens);
        let on_inputs = self.weights_inputs();
        let (rows, factors) = (Tokens::Rows(tokens.rows), (!on_inputs).then_some(tokens.weights));
        let gate_up = kept.unwrap_or_else(|| weights.pre_activations_for(&input, rows));
        let upstream = gather_rows(dy, tokens.rows); // [n, H], without the routing weight
        let mut gradients = weights.backward_for(&gate_up, &upstream, factors, rows, wanted.units, wanted.parameters);
        let output = wanted.output.then(|| weights.output_for(&gradients.units, rows));
        let through = Wanted { input: wanted.input || on_inputs, parameters: wanted.parameters };
        let mut d_input = weights.gate_up.gradient(|| input.clone(), &gradients.d_gate_up, rows, through);
        if let Some(d) = d_input.take_if(|_| on_inputs) {
            gradients.d_row_weights = row_products(&d, &gather_rows(z, tokens.rows));
            d_input = wanted.input.then(|| weighted_rows(d, Some(tokens.weights)));
        }
        Ok(Some(ExpertBackwardRun { weights, input, upstream, gradients, output, d_input }))
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Groups an expert's rows, ascending wave tokens, by sequence.
pub(super) fn segments(rows: &[u32], wave: &WaveInfo) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut start = 0;
    for (sequence, info) in wave.sequences.iter().enumerate() {
        let end = start + rows[start..].partition_point(|&t| (t as usize) < info.tokens.end);
        if end > start {
            segments.push(Segment { sequence, rows: start..end, loss_tokens: info.loss_tokens });
        }
        start = end;
    }
    segments
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::trace::SequenceInfo;

    #[test]
    fn rows_are_grouped_by_sequence() {
        let sequence = |tokens: Range<usize>| SequenceInfo { loss_tokens: tokens.len() - 1, tokens };
        let wave = WaveInfo {
            id: 0,
            tokens: 12,
            ids: Vec::new(),
            sequences: vec![sequence(0..4), sequence(4..7), sequence(7..12)],
        };
        let found = segments(&[0, 3, 7, 8, 11], &wave);
        assert_eq!(
            found,
            [Segment { sequence: 0, rows: 0..2, loss_tokens: 3 }, Segment { sequence: 2, rows: 2..5, loss_tokens: 4 }]
        );
        assert!(segments(&[], &wave).is_empty());
    }
}

//! Mean outputs over all tokens: every expert is run on every token.

use std::collections::BTreeMap;

use moe_core::Model;
use moe_core::host::{self, HostView};
use moe_core::trace::{ExpertTrace, LayerTrace};

use crate::evidence::OutputMean;

/// Tokens that an expert is run on at a time.
const TOKENS: usize = 2048;

/// Sums of outputs `[E, H]` over all tokens of the layers seen, plain and weighted with the softmax of the router's logits.
///
/// Costs E / k times the experts of a forward pass. Memory: the inputs `[T, H]` and logits `[T, E]` of a wave in one layer.
pub(crate) struct DenseMeans<'m> {
    model: &'m Model,
    pending: Option<Pending>,
    sums: BTreeMap<usize, Sums>,
}

/// The wave in progress in one layer.
struct Pending {
    layer: usize,
    experts: usize,
    logits: Vec<f32>,
    inputs: Vec<f32>,
    seen: Vec<bool>,
}

#[derive(Default)]
struct Sums {
    all: Vec<f64>,
    gated: Vec<f64>,
    tokens: u64,
}

impl<'m> DenseMeans<'m> {
    pub fn new(model: &'m Model) -> Self {
        Self { model, pending: None, sums: BTreeMap::new() }
    }

    /// A layer begins; the one before is complete.
    pub fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        self.flush()?;
        self.pending = Some(Pending {
            layer: trace.layer,
            experts: trace.experts,
            logits: trace.logits.to_vec(),
            inputs: vec![0.0; trace.wave.tokens * self.model.config().hidden_size],
            seen: vec![false; trace.wave.tokens],
        });
        Ok(())
    }

    /// Takes the inputs of an expert's tokens.
    pub fn expert(&mut self, trace: &ExpertTrace<'_>) {
        let Some(pending) = self.pending.as_mut().filter(|pending| pending.layer == trace.layer) else { return };
        let hidden = trace.input.dims()[1];
        let input = HostView::new(trace.input);
        for (token, row) in trace.rows.iter().zip(input.as_slice().chunks_exact(hidden)) {
            let at = *token as usize;
            if !std::mem::replace(&mut pending.seen[at], true) {
                pending.inputs[at * hidden..(at + 1) * hidden].copy_from_slice(row);
            }
        }
    }

    /// Runs every expert on the tokens of the layer in progress.
    pub fn flush(&mut self) -> moe_core::Result<()> {
        let Some(Pending { layer, experts, logits, inputs, seen }) = self.pending.take() else { return Ok(()) };
        let hidden = self.model.config().hidden_size;
        let sums = self.sums.entry(layer).or_default();
        sums.all.resize(experts * hidden, 0.0);
        sums.gated.resize(experts * hidden, 0.0);
        let tokens: Vec<usize> = (0..seen.len()).filter(|token| seen[*token]).collect();
        sums.tokens += tokens.len() as u64;
        for tokens in tokens.chunks(TOKENS) {
            let rows: Vec<f32> = tokens.iter().flat_map(|t| &inputs[t * hidden..(t + 1) * hidden]).copied().collect();
            let gates: Vec<Vec<f64>> =
                tokens.iter().map(|t| softmax(&logits[t * experts..(t + 1) * experts])).collect();
            let x = host::from_vec(rows, [tokens.len(), hidden], self.model.device());
            for expert in 0..experts {
                let weights = self.model.expert(layer, expert)?;
                if weights.is_zero() {
                    continue;
                }
                let output = HostView::new(&weights.output(&weights.units(&weights.pre_activations(&x))));
                let at = expert * hidden..(expert + 1) * hidden;
                let (all, gated) = (&mut sums.all[at.clone()], &mut sums.gated[at]);
                for (row, gates) in output.as_slice().chunks_exact(hidden).zip(&gates) {
                    for ((all, gated), y) in all.iter_mut().zip(gated.iter_mut()).zip(row) {
                        *all += f64::from(*y);
                        *gated += gates[expert] * f64::from(*y);
                    }
                }
            }
        }
        Ok(())
    }

    /// The means of a layer `[E, H]`; nothing is kept of it.
    pub fn take(&mut self, layer: usize) -> Option<[(OutputMean, Vec<f64>); 2]> {
        let Sums { all, gated, tokens } = self.sums.remove(&layer).filter(|sums| sums.tokens > 0)?;
        let mean = |sums: Vec<f64>| sums.into_iter().map(|sum| sum / tokens as f64).collect();
        Some([(OutputMean::All, mean(all)), (OutputMean::Gated, mean(gated))])
    }
}

fn softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut values: Vec<f64> = logits.iter().map(|z| f64::from(z - largest).exp()).collect();
    let sum: f64 = values.iter().sum();
    values.iter_mut().for_each(|v| *v /= sum);
    values
}

//! Mean outputs over all tokens: every expert is run on every token.

use std::collections::BTreeMap;

use moe_checkpoint::{ArrayKind, Extent, Fold, Statistics};
use moe_core::Model;
use moe_core::host::{self, HostView};
use moe_core::trace::{ExpertTrace, LayerTrace, Signals, WaveInfo};
use moe_importance::collectors::Collector;
use moe_importance::{Result, StatisticId, StatisticSpec};

use crate::evidence::{OUTPUT_ALL, OUTPUT_ALL_TOKENS, OUTPUT_GATED};

/// Tokens that an expert is run on at a time.
const TOKENS: usize = 2048;

/// Sums of outputs `[E, H]` over all tokens of the layers seen, plain and weighted with the softmax of the router's
/// logits.
///
/// Costs E / k times the experts of a forward pass. Memory: the inputs `[T, H]` and logits `[T, E]` of a wave in one
/// layer; the logits of all layers where other statistics ask for gradients, with which experts are shown in the
/// backward sweep.
pub(crate) struct DenseMeans<'m> {
    model: &'m Model,
    specs: [StatisticSpec; 3],
    pending: BTreeMap<usize, Pending>,
}

/// The wave in progress in one layer.
struct Pending {
    experts: usize,
    logits: Vec<f32>,
    /// Filled with the first expert.
    inputs: Vec<f32>,
    seen: Vec<bool>,
}

impl<'m> DenseMeans<'m> {
    pub fn new(model: &'m Model) -> Self {
        let sums = |id: StatisticId| StatisticSpec { id, kind: ArrayKind::Vector(Extent::Hidden), fold: Fold::Sum };
        let specs = [sums(OUTPUT_ALL), sums(OUTPUT_GATED), StatisticSpec::expert_sum(OUTPUT_ALL_TOKENS)];
        Self { model, specs, pending: BTreeMap::new() }
    }

    fn expect(&mut self, trace: &LayerTrace<'_>) {
        let seen = vec![false; trace.wave.tokens];
        let pending = Pending { experts: trace.experts, logits: trace.logits.to_vec(), inputs: Vec::new(), seen };
        self.pending.insert(trace.layer, pending);
    }

    /// Runs every expert on the tokens of a layer.
    fn flush(&mut self, layer: usize, into: &mut Statistics) -> Result<()> {
        let Some(Pending { experts, logits, inputs, seen }) = self.pending.remove(&layer) else { return Ok(()) };
        let hidden = self.model.config().expert_hidden_size();
        let tokens: Vec<usize> = (0..seen.len()).filter(|token| seen[*token]).collect();
        let counts = into.expert_mut(OUTPUT_ALL_TOKENS.as_str(), Fold::Sum, layer)?;
        counts.iter_mut().for_each(|count| *count += tokens.len() as f64);
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
                let rows = || output.as_slice().chunks_exact(hidden).zip(&gates);
                let mut add = |id: StatisticId, gate: &dyn Fn(&[f64]) -> f64| -> Result<()> {
                    let sums = into.vector_mut(id.as_str(), Extent::Hidden, Fold::Sum, layer, expert)?;
                    for (row, gates) in rows() {
                        let gate = gate(gates);
                        sums.iter_mut().zip(row).for_each(|(sum, y)| *sum += gate * f64::from(*y));
                    }
                    Ok(())
                };
                add(OUTPUT_ALL, &|_| 1.0)?;
                add(OUTPUT_GATED, &|gates| gates[expert])?;
            }
        }
        Ok(())
    }
}

impl Collector for DenseMeans<'_> {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.specs
    }

    fn needs(&self) -> Signals {
        Signals::ROUTING | Signals::UNITS
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn begin_wave(&mut self, _: &WaveInfo) -> Result<()> {
        self.pending.clear();
        Ok(())
    }

    fn layer(&mut self, trace: &LayerTrace<'_>, _: &mut Statistics) -> Result<()> {
        self.expect(trace);
        Ok(())
    }

    fn recall(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        self.expect(trace);
        Ok(())
    }

    /// Takes the inputs of an expert's tokens.
    fn expert(&mut self, trace: &ExpertTrace<'_>, _: &mut Statistics) -> Result<()> {
        let Some(pending) = self.pending.get_mut(&trace.layer) else { return Ok(()) };
        let hidden = trace.input.dims()[1];
        pending.inputs.resize(pending.seen.len() * hidden, 0.0);
        let input = HostView::new(trace.input);
        for (token, row) in trace.rows.iter().zip(input.as_slice().chunks_exact(hidden)) {
            let at = *token as usize;
            if !std::mem::replace(&mut pending.seen[at], true) {
                pending.inputs[at * hidden..(at + 1) * hidden].copy_from_slice(row);
            }
        }
        Ok(())
    }

    fn end_layer(&mut self, layer: usize, into: &mut Statistics) -> Result<()> {
        self.flush(layer, into)
    }
}

fn softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut values: Vec<f64> = logits.iter().map(|z| f64::from(z - largest).exp()).collect();
    let sum: f64 = values.iter().sum();
    values.iter_mut().for_each(|v| *v /= sum);
    values
}

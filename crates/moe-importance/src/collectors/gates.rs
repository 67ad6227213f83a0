//! Routing gates of an expert's rows in other normalizations than the model's.

use std::collections::BTreeMap;

use moe_core::trace::LayerTrace;

use crate::kernels::softmax::softmax;
use crate::scorers::Gate;

/// Gates of every slot of a layer, expert by expert, tokens ascending: the order of the rows of an
/// [`ExpertTrace`](moe_core::trace::ExpertTrace).
#[derive(Debug, Default)]
pub(super) struct LayerGates {
    /// Start of each expert's rows, and the end of the last.
    starts: Vec<usize>,
    softmax: Vec<f32>,
    renormalized: Vec<f32>,
}

impl LayerGates {
    /// Of a layer's routing. Softmax probabilities only if `with_softmax`.
    pub fn new(trace: &LayerTrace<'_>, with_softmax: bool) -> Self {
        let (experts, top_k) = (trace.experts, trace.top_k.max(1));
        let mut starts = vec![0; experts + 1];
        let seen = |slot: &usize| trace.is_seen(*slot);
        (0..trace.selected.len()).filter(seen).for_each(|slot| starts[trace.selected[slot] as usize + 1] += 1);
        (0..experts).for_each(|e| starts[e + 1] += starts[e]);
        let mut next = starts.clone();
        let mut probabilities = vec![0.0; experts];
        let mut gates = Self {
            starts,
            softmax: vec![0.0; if with_softmax { trace.selected.len() } else { 0 }],
            renormalized: vec![0.0; trace.selected.len()],
        };
        let tokens = trace.selected.chunks_exact(top_k).zip(trace.weights.chunks_exact(top_k));
        for (t, ((selected, weights), logits)) in tokens.zip(trace.logits.chunks_exact(experts.max(1))).enumerate() {
            if with_softmax {
                softmax(logits, &mut probabilities);
            }
            let total: f32 = weights.iter().sum();
            for (slot, (expert, weight)) in selected.iter().zip(weights).enumerate() {
                if !trace.is_seen(t * top_k + slot) {
                    continue;
                }
                let expert = *expert as usize;
                let at = next[expert];
                next[expert] += 1;
                // Weights of zero stay zero, however many there are.
                gates.renormalized[at] = if total > 0.0 { weight / total } else { 0.0 };
                if with_softmax {
                    gates.softmax[at] = probabilities[expert];
                }
            }
        }
        gates
    }

    /// Gates of an expert's rows; empty for [`Gate::AsApplied`], which an expert's trace has, and for softmax
    /// probabilities that were not asked for.
    pub fn rows(&self, gate: Gate, expert: usize) -> &[f32] {
        let values = match gate {
            Gate::AsApplied => return &[],
            Gate::Renormalized => &self.renormalized,
            Gate::Softmax => &self.softmax,
        };
        values.get(self.starts[expert]..self.starts[expert + 1]).unwrap_or_default()
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.starts.len() - 1
    }
}

/// Gates of the layers of a wave, kept from the forward sweep that shows routing to the backward sweep that shows
/// experts: two numbers for each of a token's top-k experts and each MoE layer.
#[derive(Debug, Default)]
pub(super) struct Gates {
    layers: BTreeMap<usize, LayerGates>,
}

impl Gates {
    pub fn remember(&mut self, trace: &LayerTrace<'_>, with_softmax: bool) {
        self.layers.insert(trace.layer, LayerGates::new(trace, with_softmax));
    }

    /// As [`LayerGates::rows`]; empty for a layer that was not shown.
    pub fn rows(&self, gate: Gate, layer: usize, expert: usize) -> &[f32] {
        self.layers.get(&layer).filter(|gates| expert < gates.experts()).map_or(&[], |gates| gates.rows(gate, expert))
    }
}

#[cfg(test)]
mod tests {
    use moe_core::trace::WaveInfo;

    use super::*;

    #[test]
    fn gates_follow_the_rows_of_an_expert() {
        let wave = WaveInfo { id: 0, tokens: 2, ids: Vec::new(), sequences: vec![] };
        let trace = LayerTrace {
            layer: 5,
            wave: &wave,
            experts: 3,
            top_k: 2,
            logits: &[0.0, 1.0, 0.0, 2.0, 0.0, f32::NEG_INFINITY],
            selected: &[1, 0, 0, 2],
            weights: &[0.6, 0.2, 0.0, 0.0],
            scale: 1.0,
            idle: &[],
        };
        let mut gates = Gates::default();
        gates.remember(&trace, true);
        let close = |found: &[f32], expected: &[f32]| {
            assert_eq!(found.len(), expected.len());
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?} and {expected:?}");
        };
        close(gates.rows(Gate::Renormalized, 5, 0), &[0.25, 0.0]);
        close(gates.rows(Gate::Renormalized, 5, 1), &[0.75]);
        let (e, e2) = (1f32.exp(), 2f32.exp());
        close(gates.rows(Gate::Softmax, 5, 0), &[1.0 / (2.0 + e), e2 / (1.0 + e2)]);
        close(gates.rows(Gate::Softmax, 5, 2), &[0.0]);
        assert!(gates.rows(Gate::AsApplied, 5, 0).is_empty() && gates.rows(Gate::Softmax, 4, 0).is_empty());
    }
}

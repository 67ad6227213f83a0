//! Gradients of an expert's matrices, from what a backward sweep shows of it.

use moe_core::host::HostView;
use moe_core::trace::ExpertTrace;

use crate::linalg::{product, view};

/// What an expert's weight gradient is made of, for its n tokens.
pub(super) struct Operands<'a> {
    pub hidden: usize,
    /// `[n, H]`
    pub input: &'a [f32],
    /// `[n, I]`
    pub units: &'a [f32],
    /// Gradient at the output, routing weight included `[n, H]`.
    pub output: &'a [f32],
    /// Gradient at gate and up, routing weight included `[n, 2I]`.
    pub gate_up: &'a [f32],
}

impl Operands<'_> {
    /// Gradients of gate `[I, H]`, up `[I, H]` and down `[H, I]`; none without tokens.
    pub fn matrices(&self) -> Option<[Vec<f32>; 3]> {
        let Self { hidden, input, units, output, gate_up } = *self;
        let n = input.len() / hidden.max(1);
        let width = units.len() / n.max(1);
        if n == 0 || width == 0 {
            return None;
        }
        let both = view(gate_up, n, 2 * width).transpose();
        let gate = product(both.subrows(0, width), view(input, n, hidden));
        let up = product(both.subrows(width, width), view(input, n, hidden));
        let down = product(view(output, n, hidden).transpose(), view(units, n, width));
        Some([gate, up, down])
    }
}

/// Gradients of the matrices of the expert of a trace with gradients, of the objective's sum over its tokens.
pub(super) fn weight_gradients(trace: &ExpertTrace<'_>) -> Option<[Vec<f32>; 3]> {
    let (backward, units) = (trace.backward?, trace.units?);
    let hidden = trace.input.dims()[1];
    let output = weighted(HostView::new(backward.upstream).as_slice(), trace.routing_weights, hidden);
    let (input, units, gate_up) = (HostView::new(trace.input), HostView::new(units), HostView::new(backward.gate_up));
    let (input, units, gate_up) = (input.as_slice(), units.as_slice(), gate_up.as_slice());
    Operands { hidden, input, units, output: &output, gate_up }.matrices()
}

/// Rows `[n, H]` times a weight each.
pub(super) fn weighted(rows: &[f32], weights: &[f32], hidden: usize) -> Vec<f32> {
    rows.chunks_exact(hidden).zip(weights).flat_map(|(row, weight)| row.iter().map(move |v| weight * v)).collect()
}

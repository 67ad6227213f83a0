//! Expert weights on a device.

use burn::tensor::Device;
use moe_checkpoint::ExpertWeights;

use crate::{host, kernels::weight::Weight};

/// One gated feed-forward block `f(x) = down (act(gate x) * (up x))` on a device: a routed expert, a shared expert or a
/// dense layer. Gate and up are stacked so that both are one matrix product.
#[derive(Clone, Debug)]
pub struct ExpertTensors {
    /// Gate rows, then up rows: `[2I, H]`.
    pub gate_up: Weight,
    /// `[H, I]`.
    pub down: Weight,
}

impl ExpertTensors {
    /// Moves canonical host weights to `device`, as f32.
    pub fn new(weights: ExpertWeights, device: &Device) -> Self {
        let ExpertWeights { mut gate, up, down, width, hidden, .. } = weights;
        gate.extend_from_slice(&up);
        Self {
            gate_up: Weight::dense(host::from_vec(gate, [2 * width, hidden], device)),
            down: Weight::dense(host::from_vec(down, [hidden, width], device)),
        }
    }

    /// Number of units, I. May be 0.
    pub fn width(&self) -> usize {
        self.down.dims()[1]
    }
}

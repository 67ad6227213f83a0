//! Expert weights on a device.

use burn::tensor::{Device, Tensor};
use moe_checkpoint::ExpertWeights;

use crate::host;

/// One gated feed-forward block `f(x) = down (act(gate x) * (up x))` on a device: a routed expert, a shared expert or a
/// dense layer. Gate and up are stacked so that both are one matrix product.
#[derive(Clone, Debug)]
pub struct ExpertTensors {
    /// Gate rows, then up rows: `[2I, H]`.
    pub gate_up: Tensor<2>,
    /// `[H, I]`.
    pub down: Tensor<2>,
}

impl ExpertTensors {
    /// Moves canonical host weights to `device`.
    pub fn new(weights: ExpertWeights, device: &Device) -> Self {
        let ExpertWeights { mut gate, up, down, width, hidden } = weights;
        gate.extend_from_slice(&up);
        Self {
            gate_up: host::from_vec(gate, [2 * width, hidden], device),
            down: host::from_vec(down, [hidden, width], device),
        }
    }

    /// Number of units, I. May be 0.
    pub fn width(&self) -> usize {
        self.down.dims()[1]
    }
}

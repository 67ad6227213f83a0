//! What of an MoE layer is trained besides linear maps: its routing, and what its experts read.

use std::fmt::Debug;

use burn::tensor::Tensor;

use crate::{router::Routed, trace::LayerTrace};

/// Watches the routing of an MoE layer while the model is trained, and may add a loss to it.
pub trait RouterAdapter: Debug + Send + Sync {
    /// The routing of a wave, in the forward pass of a sweep that trains: once per wave and layer, whatever is computed
    /// again later, and never when the model is only run.
    fn routed(&self, trace: &LayerTrace<'_>) {
        let _ = trace;
    }

    /// Adds to `d_logits [T, E]`, the gradient of the sum of the objective over the wave's predicted tokens. A loss
    /// that stands beside the mean of the objective is therefore multiplied by
    /// [`WaveInfo::loss_tokens`](crate::trace::WaveInfo::loss_tokens). Only for layers that the backward sweep
    /// [reaches](super::Adapters::depth).
    fn add_gradient(&self, trace: &LayerTrace<'_>, d_logits: &mut [f32]) {
        let _ = (trace, d_logits);
    }
}

/// Factors on what the experts of a layer read and on their units, for all tokens of a wave, the same for all experts
/// of a token: `f(x; c) = down((act(gate (x * gate_c)) * (up (x * up_c))) * units_c)`.
#[derive(Clone, Debug)]
pub struct Modulation {
    /// On the input of the gate projection `[T, H]`.
    pub gate: Tensor<2>,
    /// On the units `[T, I]`.
    pub units: Tensor<2>,
    /// On the input of the up projection `[T, H]`.
    pub up: Tensor<2>,
}

/// Lets the best experts of each token run under factors that come from the token's other experts, which do not run.
///
/// Statistics of experts cannot be collected under it, since experts read what no observer is shown.
pub trait ExpertModulation: Debug + Send + Sync {
    /// How many of the experts of a token run, at least 1: the first of [`Routed::selected`]. Those after them only
    /// give factors.
    fn main_experts(&self) -> usize;

    /// The factors of every token.
    fn factors(&self, routed: &Routed) -> Modulation;

    /// Given the gradients at the factors, writes those of the routing weights of experts that did not run into
    /// `d_weights [T, k]`, where they are 0. Adds up the gradients of its parameters if they are wanted.
    fn backward(&self, routed: &Routed, d_factors: &Modulation, parameters: bool, d_weights: &mut [f32]);
}

//! Gated experts: SwiGLU and its siblings.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{Activation, ExpertNetworks, matrices, of_expert};
use crate::assignment::Segments;
use crate::grouped::grouped_product;

/// Limits of gate and up, as GPT-OSS has them: `gate = min(gate, limit)`, `up = clamp(up, -limit, limit)`, and
/// `gate * sigmoid(alpha * gate) * (up + 1)` in place of `act(gate) * up`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clamped {
    /// The limit, 7 in GPT-OSS.
    pub limit: f64,
    /// The slope of the sigmoid, 1.702 in GPT-OSS.
    pub alpha: f64,
}

/// Configuration of [`GatedExperts`].
#[derive(Config, Debug)]
pub struct GatedExpertsConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Intermediate size of one expert.
    pub d_ff: usize,
    /// The number of experts.
    pub num_experts: usize,
    /// The activation of the gate.
    #[config(default = "Activation::Silu")]
    pub activation: Activation,
    /// Whether the three maps have biases.
    #[config(default = false)]
    pub bias: bool,
    /// Limits of gate and up.
    pub clamped: Option<Clamped>,
}

/// `down(act(gate(x)) * up(x))` per expert.
#[derive(Module, Debug)]
pub struct GatedExperts {
    /// `[experts, hidden, intermediate]`.
    pub gate: Param<Tensor<3>>,
    /// `[experts, hidden, intermediate]`.
    pub up: Param<Tensor<3>>,
    /// `[experts, intermediate, hidden]`.
    pub down: Param<Tensor<3>>,
    /// `[experts, intermediate]`.
    pub gate_bias: Option<Param<Tensor<2>>>,
    /// `[experts, intermediate]`.
    pub up_bias: Option<Param<Tensor<2>>>,
    /// `[experts, hidden]`.
    pub down_bias: Option<Param<Tensor<2>>>,
    #[module(skip)]
    pub(crate) activation: Activation,
    #[module(skip)]
    pub(crate) clamped: Option<Clamped>,
}

impl GatedExpertsConfig {
    /// Makes the experts.
    ///
    /// # Panics
    ///
    /// If a size is 0.
    pub fn init(&self, device: &Device) -> GatedExperts {
        let (d, f, e) = (self.d_model, self.d_ff, self.num_experts);
        assert!(d > 0 && f > 0 && e > 0, "experts need sizes above 0, found {e} of {d} x {f}");
        let bias = |width: usize| self.bias.then(|| Initializer::Zeros.init([e, width], device));
        GatedExperts {
            gate: matrices(e, d, f, device),
            up: matrices(e, d, f, device),
            down: matrices(e, f, d, device),
            gate_bias: bias(f),
            up_bias: bias(f),
            down_bias: bias(d),
            activation: self.activation,
            clamped: self.clamped,
        }
    }
}

impl GatedExperts {
    /// The activation of gate and up, `[rows, intermediate]` each.
    pub(super) fn combine(&self, gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
        match self.clamped {
            None => self.activation.of(gate) * up,
            Some(Clamped { limit, alpha }) => {
                let (gate, up) = (gate.clamp_max(limit), up.clamp(-limit, limit));
                gate.clone() * burn::tensor::activation::sigmoid(gate * alpha) * (up + 1.0)
            }
        }
    }

    /// The experts with other matrices, each `[experts, in, out]`.
    pub(super) fn forward_with(
        &self,
        rows: Tensor<2>,
        [gate, up, down]: [Tensor<3>; 3],
        segments: &Segments,
    ) -> Tensor<2> {
        let biased = |product: Tensor<2>, bias: &Option<Param<Tensor<2>>>| match bias {
            Some(bias) => product + of_expert(bias, segments),
            None => product,
        };
        let offsets = segments.offsets();
        let gate = biased(grouped_product(rows.clone(), gate, offsets), &self.gate_bias); // [rows, intermediate]
        let up = biased(grouped_product(rows, up, offsets), &self.up_bias);
        biased(grouped_product(self.combine(gate, up), down, offsets), &self.down_bias) // [rows, hidden]
    }
}

impl ExpertNetworks for GatedExperts {
    fn num_experts(&self) -> usize {
        self.up.dims()[0]
    }

    fn forward(&self, rows: Tensor<2>, segments: &Segments) -> Tensor<2> {
        self.forward_with(rows, [self.gate.val(), self.up.val(), self.down.val()], segments)
    }
}

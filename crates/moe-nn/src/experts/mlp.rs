//! Experts without a gate: two maps and an activation between.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};

use super::{Activation, ExpertNetworks, matrices, of_expert};
use crate::assignment::Segments;
use crate::grouped::grouped_product;

/// Configuration of [`MlpExperts`].
#[derive(Config, Debug)]
pub struct MlpExpertsConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Intermediate size of one expert.
    pub d_ff: usize,
    /// The number of experts.
    pub num_experts: usize,
    /// The activation; `SquaredRelu` is that of Nemotron-H.
    #[config(default = "Activation::Gelu")]
    pub activation: Activation,
    /// Whether the two maps have biases.
    #[config(default = false)]
    pub bias: bool,
}

/// `down(act(up(x)))` per expert: the feed-forward networks of Switch Transformers and Nemotron-H.
#[derive(Module, Debug)]
pub struct MlpExperts {
    /// `[experts, hidden, intermediate]`.
    pub up: Param<Tensor<3>>,
    /// `[experts, intermediate, hidden]`.
    pub down: Param<Tensor<3>>,
    /// `[experts, intermediate]`.
    pub up_bias: Option<Param<Tensor<2>>>,
    /// `[experts, hidden]`.
    pub down_bias: Option<Param<Tensor<2>>>,
    #[module(skip)]
    activation: Activation,
}

impl MlpExpertsConfig {
    /// Makes the experts.
    ///
    /// # Panics
    ///
    /// If a size is 0.
    pub fn init(&self, device: &Device) -> MlpExperts {
        let (d, f, e) = (self.d_model, self.d_ff, self.num_experts);
        assert!(d > 0 && f > 0 && e > 0, "experts need sizes above 0, found {e} of {d} x {f}");
        let bias = |width: usize| self.bias.then(|| Initializer::Zeros.init([e, width], device));
        MlpExperts {
            up: matrices(e, d, f, device),
            down: matrices(e, f, d, device),
            up_bias: bias(f),
            down_bias: bias(d),
            activation: self.activation,
        }
    }
}

impl ExpertNetworks for MlpExperts {
    fn num_experts(&self) -> usize {
        self.up.dims()[0]
    }

    fn forward(&self, rows: Tensor<2>, segments: &Segments) -> Tensor<2> {
        let biased = |product: Tensor<2>, bias: &Option<Param<Tensor<2>>>| match bias {
            Some(bias) => product + of_expert(bias, segments),
            None => product,
        };
        let up = biased(grouped_product(rows, self.up.val(), segments.offsets()), &self.up_bias);
        biased(grouped_product(self.activation.of(up), self.down.val(), segments.offsets()), &self.down_bias)
    }
}

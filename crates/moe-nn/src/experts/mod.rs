//! Expert networks: what runs on the tokens of each expert.
//!
//! They see tokens sorted by expert and know nothing of routers. Matrices of all experts are stacked, `[experts, in,
//! out]`, so that one parameter is one entry of an optimizer. An expert without a token then has a gradient of zeros,
//! where it would have none if it were a module of its own: optimizers with momentum or weight decay go on moving it.

mod film;
mod gated;
mod low_rank;
mod mlp;
mod shared;
mod ternary;

pub use film::{FilmExperts, FilmExpertsConfig};
pub use gated::{Clamped, GatedExperts, GatedExpertsConfig};
pub use low_rank::{LowRankExperts, LowRankExpertsConfig, LowRankMap};
pub use mlp::{MlpExperts, MlpExpertsConfig};
pub use shared::{FeedForward, FeedForwardConfig, SharedExpert, SharedExpertConfig};
pub use ternary::{TernaryExperts, TernaryExpertsConfig, ternary};

use burn::module::{Module, ModuleDisplay, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor, activation};
use serde::{Deserialize, Serialize};

use crate::assignment::Segments;

/// Networks of the same shape, one per expert.
pub trait ExpertNetworks: Module + ModuleDisplay {
    /// The number of experts.
    fn num_experts(&self) -> usize;

    /// The outputs of sorted rows: `[rows, hidden] -> [rows, hidden]`, at least one row, whose experts `segments`
    /// names.
    fn forward(&self, rows: Tensor<2>, segments: &Segments) -> Tensor<2>;
}

/// An activation function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    #[default]
    Silu,
    /// GELU with the error function.
    Gelu,
    /// GELU by its tanh approximation.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`.
    SquaredRelu,
    /// None: `x`.
    Identity,
}

impl Activation {
    /// The function of a tensor.
    pub fn of<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Activation::Silu => activation::silu(x),
            Activation::Gelu => activation::gelu(x),
            Activation::GeluTanh => activation::gelu_approximate(x),
            Activation::Relu => activation::relu(x),
            Activation::SquaredRelu => activation::relu(x).square(),
            Activation::Identity => x,
        }
    }
}

/// Matrices `[experts, in, out]`, drawn as Burn's `Linear` draws them: uniform within `1 / sqrt(in)`.
pub(crate) fn matrices(experts: usize, input: usize, output: usize, device: &Device) -> Param<Tensor<3>> {
    let bound = 1.0 / (input as f64).sqrt();
    Initializer::Uniform { min: -bound, max: bound }.init([experts, input, output], device)
}

/// The row of a table `[experts, width]` for each row of a segment: `[rows, width]`.
pub(crate) fn of_expert(table: &Param<Tensor<2>>, segments: &Segments) -> Tensor<2> {
    let table = table.val();
    let device = table.device();
    table.select(0, segments.experts(&device))
}

//! Experts of low rank, with or without a network that they have in common.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Initializer, Linear};
use burn::tensor::{Device, Tensor};

use super::{Activation, ExpertNetworks, FeedForward, FeedForwardConfig, matrices};
use crate::assignment::Segments;
use crate::grouped::grouped_product;

/// Configuration of [`LowRankExperts`].
#[derive(Config, Debug)]
pub struct LowRankExpertsConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Intermediate size.
    pub d_ff: usize,
    /// The number of experts.
    pub num_experts: usize,
    /// The rank of each matrix of an expert, or of its difference from the common network.
    pub rank: usize,
    /// Whether experts are differences from a common network, which they all are at the start.
    #[config(default = false)]
    pub common: bool,
    /// The activation of the gate.
    #[config(default = "Activation::Silu")]
    pub activation: Activation,
}

/// A map per expert, `x a_e b_e`, with `a_e` of `[in, rank]` and `b_e` of `[rank, out]`.
#[derive(Module, Debug)]
pub struct LowRankMap {
    /// `[experts, in, rank]`.
    pub a: Param<Tensor<3>>,
    /// `[experts, rank, out]`.
    pub b: Param<Tensor<3>>,
}

impl LowRankMap {
    /// Makes the map of each expert, of zeros if wanted.
    pub(crate) fn new(experts: usize, [input, output]: [usize; 2], rank: usize, zero: bool, device: &Device) -> Self {
        let b = if zero {
            Initializer::Zeros.init([experts, rank, output], device)
        } else {
            matrices(experts, rank, output, device)
        };
        LowRankMap { a: matrices(experts, input, rank, device), b }
    }

    pub(crate) fn forward(&self, rows: Tensor<2>, segments: &Segments) -> Tensor<2> {
        let inner = grouped_product(rows, self.a.val(), segments.offsets()); // [rows, rank]
        grouped_product(inner, self.b.val(), segments.offsets())
    }
}

/// Gated experts whose matrices are products of two thin ones: `W_e = A_e B_e`, or `W + A_e B_e` with a common `W` and
/// `B_e = 0` at the start, as mixtures of LoRA experts have it (MoLoRA, arXiv 2309.05444).
#[derive(Module, Debug)]
pub struct LowRankExperts {
    /// The network that experts differ from.
    pub network: Option<FeedForward>,
    /// Hidden to intermediate.
    pub gate: LowRankMap,
    /// Hidden to intermediate.
    pub up: LowRankMap,
    /// Intermediate to hidden.
    pub down: LowRankMap,
    #[module(skip)]
    activation: Activation,
}

impl LowRankExpertsConfig {
    /// Makes the experts.
    ///
    /// # Panics
    ///
    /// If the rank is 0 or above the sizes, or there is no expert.
    pub fn init(&self, device: &Device) -> LowRankExperts {
        let (d, f, e, rank) = (self.d_model, self.d_ff, self.num_experts, self.rank);
        assert!(e > 0, "there is no expert");
        assert!(rank > 0 && rank <= d.min(f), "the rank must be within 1..={}, found {rank}", d.min(f));
        let network = || FeedForwardConfig::new(d, f).with_activation(self.activation).init(device);
        LowRankExperts {
            network: self.common.then(network),
            gate: LowRankMap::new(e, [d, f], rank, self.common, device),
            up: LowRankMap::new(e, [d, f], rank, self.common, device),
            down: LowRankMap::new(e, [f, d], rank, self.common, device),
            activation: self.activation,
        }
    }
}

impl ExpertNetworks for LowRankExperts {
    fn num_experts(&self) -> usize {
        self.up.a.dims()[0]
    }

    fn forward(&self, rows: Tensor<2>, segments: &Segments) -> Tensor<2> {
        let map = |x: Tensor<2>, low_rank: &LowRankMap, common: Option<&Linear>| match common {
            Some(common) => common.forward(x.clone()) + low_rank.forward(x, segments),
            None => low_rank.forward(x, segments),
        };
        let common = self.network.as_ref();
        let gate = map(rows.clone(), &self.gate, common.map(|network| &network.gate)); // [rows, intermediate]
        let up = map(rows, &self.up, common.map(|network| &network.up));
        map(self.activation.of(gate) * up, &self.down, common.map(|network| &network.down))
    }
}

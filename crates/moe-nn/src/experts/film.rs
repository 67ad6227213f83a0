//! Experts that modulate one network instead of being one each (FiLM).

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};

use super::{ExpertNetworks, FeedForward, FeedForwardConfig, of_expert};
use crate::assignment::Segments;

/// Configuration of [`FilmExperts`].
#[derive(Config, Debug)]
pub struct FilmExpertsConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Intermediate size of the common network.
    pub d_ff: usize,
    /// The number of experts.
    pub num_experts: usize,
}

/// `down(gamma_e * h + beta_e)` with `h = act(gate(x)) * up(x)` of one common network: an expert is two vectors.
///
/// The feature-modulated experts of MoFME (arXiv 2312.16610) in the form of FiLM, with vectors in place of matrices. At
/// the start gamma is 1 and beta 0, so that every expert is the common network. That network runs once per row, hence
/// once per expert that a token chose.
#[derive(Module, Debug)]
pub struct FilmExperts {
    /// The common network.
    pub network: FeedForward,
    /// `[experts, intermediate]`.
    pub gamma: Param<Tensor<2>>,
    /// `[experts, intermediate]`.
    pub beta: Param<Tensor<2>>,
}

impl FilmExpertsConfig {
    /// Makes the experts.
    ///
    /// # Panics
    ///
    /// If there is no expert.
    pub fn init(&self, device: &Device) -> FilmExperts {
        assert!(self.num_experts > 0, "there is no expert");
        let vectors = [self.num_experts, self.d_ff];
        FilmExperts {
            network: FeedForwardConfig::new(self.d_model, self.d_ff).init(device),
            gamma: Initializer::Ones.init(vectors, device),
            beta: Initializer::Zeros.init(vectors, device),
        }
    }
}

impl ExpertNetworks for FilmExperts {
    fn num_experts(&self) -> usize {
        self.gamma.dims()[0]
    }

    fn forward(&self, rows: Tensor<2>, segments: &Segments) -> Tensor<2> {
        let hidden = self.network.hidden(rows); // [rows, intermediate]
        self.network.down.forward(hidden * of_expert(&self.gamma, segments) + of_expert(&self.beta, segments))
    }
}

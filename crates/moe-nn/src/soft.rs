//! Soft MoE: experts that read mixtures of tokens.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::activation::softmax;
use burn::tensor::{Device, Tensor};

use crate::assignment::Segments;
use crate::experts::ExpertNetworks;
use crate::routing::RouteContext;

/// Configuration of a [`SoftMoe`].
#[derive(Config, Debug)]
pub struct SoftMoeConfig {
    /// Hidden size.
    pub d_model: usize,
    /// The number of mixtures that each expert reads.
    #[config(default = 1)]
    pub slots: usize,
}

/// Soft MoE (arXiv 2308.00951): every expert reads `slots` weighted means of the tokens, and every token gets a
/// weighted mean of all their outputs. Nothing is dropped and nothing chosen, but tokens of a sequence mix: it is for
/// encoders.
#[derive(Module, Debug)]
pub struct SoftMoe<X: Module> {
    /// A direction per slot, `[hidden, experts * slots]`.
    pub phi: Param<Tensor<2>>,
    /// The scale of the normalized directions, `[1]`.
    pub scale: Param<Tensor<1>>,
    /// The experts.
    pub experts: X,
    slots: usize,
}

impl SoftMoeConfig {
    /// Makes the layer.
    ///
    /// # Panics
    ///
    /// If there is no slot.
    pub fn init<X: ExpertNetworks>(&self, experts: X, device: &Device) -> SoftMoe<X> {
        assert!(self.slots > 0, "experts of no slot read nothing");
        let std = 1.0 / (self.d_model as f64).sqrt();
        let phi =
            Initializer::Normal { mean: 0.0, std }.init([self.d_model, experts.num_experts() * self.slots], device);
        SoftMoe { phi, scale: Initializer::Ones.init([1], device), experts, slots: self.slots }
    }
}

impl<X: ExpertNetworks> SoftMoe<X> {
    /// Runs one sequence or image, `[tokens, hidden] -> [tokens, hidden]`.
    ///
    /// # Panics
    ///
    /// If the context says that tokens must not see later ones, or that some are padding.
    pub fn forward(&self, x: Tensor<2>, context: &RouteContext) -> Tensor<2> {
        assert!(!context.causal, "soft routing mixes all tokens: a causal model cannot use it");
        assert!(context.padding.is_none(), "soft routing mixes all tokens: leave padding out");
        let unit = |x: Tensor<2>, dim: usize| x.clone() / (x.square().sum_dim(dim).sqrt() + 1e-6);
        let phi = unit(self.phi.val(), 0) * self.scale.val().unsqueeze();
        let logits = unit(x.clone(), 1).matmul(phi); // [tokens, experts * slots]
        let read = softmax(logits.clone(), 0).transpose().matmul(x); // [experts * slots, hidden]
        let written = self.experts.forward(read, &Segments::even(self.experts.num_experts(), self.slots));
        softmax(logits, 1).matmul(written)
    }
}

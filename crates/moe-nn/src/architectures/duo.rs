//! Duo-LLM's layer: a big network and a small one, and a choice between them.

use burn::config::Config;
use burn::module::{Flag, Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Distribution, Tensor};

use crate::experts::{FeedForward, FeedForwardConfig};
use crate::router::gate;
use crate::routing::logits;

/// Configuration of [`DuoLayer`].
#[derive(Config, Debug)]
pub struct DuoLayerConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Intermediate size of the big network.
    pub big_ff: usize,
    /// Intermediate size of the small one.
    pub small_ff: usize,
    /// Temperature of the router's sigmoid; lowered over training, the choice hardens.
    #[config(default = 1.0)]
    pub temperature: f64,
    /// Whether training chooses at random, half and half, so that both networks learn before any router does.
    #[config(default = false)]
    pub random: bool,
}

/// The feed-forward layer of Duo-LLM (arXiv 2410.10846). In training, outputs are mixed by the probability of the big
/// network, or chosen at random; in evaluation the likelier one alone counts. Hold the mean of the probabilities of all
/// layers to a target with [`budget`](crate::losses::budget).
#[derive(Module, Debug)]
pub struct DuoLayer {
    /// The big network.
    pub big: FeedForward,
    /// The small network.
    pub small: FeedForward,
    /// Hidden to the logit of the big one.
    pub router: Linear,
    /// Whether the choice is soft or random. [`Module::valid`] turns it off.
    pub training: Param<Flag>,
    temperature: f64,
    random: bool,
}

/// What a [`DuoLayer`] returns.
#[derive(Clone, Debug)]
pub struct DuoOutput {
    /// `[tokens, hidden]`.
    pub hidden: Tensor<2>,
    /// The probability of the big network, `[tokens, 1]`.
    pub big: Tensor<2>,
}

impl DuoLayerConfig {
    /// Makes the layer.
    ///
    /// # Panics
    ///
    /// If the temperature is not positive.
    pub fn init(&self, device: &Device) -> DuoLayer {
        assert!(self.temperature > 0.0, "the temperature must be positive, found {}", self.temperature);
        DuoLayer {
            big: FeedForwardConfig::new(self.d_model, self.big_ff).init(device),
            small: FeedForwardConfig::new(self.d_model, self.small_ff).init(device),
            router: gate(self.d_model, 1, true, device),
            training: Param::from_bool(true),
            temperature: self.temperature,
            random: self.random,
        }
    }
}

impl DuoLayer {
    /// This layer with another temperature.
    pub fn with_temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }

    /// Runs the layer on `[tokens, hidden]`.
    pub fn forward(&self, x: Tensor<2>) -> DuoOutput {
        let big = sigmoid(logits(x.clone(), &self.router) / self.temperature); // [tokens, 1]
        let training = self.training.val().is_enabled() && x.device().is_autodiff();
        let share = match (training, self.random) {
            (true, true) => big.random_like(Distribution::Bernoulli(0.5)),
            (true, false) => big.clone(),
            (false, _) => big.clone().greater_equal_scalar(0.5).float(),
        };
        let hidden = self.big.forward(x.clone()) * share.clone() + self.small.forward(x) * (-share + 1.0);
        DuoOutput { hidden, big }
    }
}

//! MoFME: experts that modulate the features of one network, weighted by how sure the router is.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Initializer};
use burn::tensor::{Device, Tensor};

use crate::experts::{FeedForward, FeedForwardConfig};
use crate::router::{Router, TopKRouter, TopKRouterConfig};
use crate::routing::{RouteContext, Routing};

/// Configuration of [`MofmeLayer`].
#[derive(Config, Debug)]
pub struct MofmeLayerConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Intermediate size of the common network.
    pub d_ff: usize,
    /// The number of experts.
    pub num_experts: usize,
    /// Experts per token.
    #[config(default = 2)]
    pub top_k: usize,
    /// Routings with dropout in training, whose weights are averaged by their certainty; 1 routes once.
    #[config(default = 1)]
    pub samples: usize,
    /// Dropout on what the router reads, without which all samples are equal.
    #[config(default = 0.1)]
    pub dropout: f64,
}

/// The feature-modulated experts of MoFME (arXiv 2312.16610): `y = down(h * sum_e w_e gamma_e + sum_e w_e beta_e)` with
/// `h = act(gate(x)) * up(x)`. An expert is two vectors instead of the two square matrices of the paper, and the common
/// network runs once per token. In training the weights are a mean over samples of the router under dropout, in which a
/// sample counts the less the farther it is from their mean, relative to their deviation: the diagonal form of the
/// paper's whitening.
#[derive(Module, Debug)]
pub struct MofmeLayer {
    /// The common network.
    pub network: FeedForward,
    /// The router.
    pub router: TopKRouter,
    /// `[experts, intermediate]`, ones at the start.
    pub gamma: Param<Tensor<2>>,
    /// `[experts, intermediate]`, zeros at the start.
    pub beta: Param<Tensor<2>>,
    /// Dropout on what the router reads.
    pub dropout: Dropout,
    samples: usize,
}

impl MofmeLayerConfig {
    /// Makes the layer.
    ///
    /// # Panics
    ///
    /// If there is no sample, or a token takes more experts than there are.
    pub fn init(&self, device: &Device) -> MofmeLayer {
        assert!(self.samples > 0, "there is no sample of the router");
        let vectors = [self.num_experts, self.d_ff];
        MofmeLayer {
            network: FeedForwardConfig::new(self.d_model, self.d_ff).init(device),
            router: TopKRouterConfig::new(self.d_model, self.num_experts).with_top_k(self.top_k).init(device),
            gamma: Initializer::Ones.init(vectors, device),
            beta: Initializer::Zeros.init(vectors, device),
            dropout: DropoutConfig::new(self.dropout).init(),
            samples: self.samples,
        }
    }
}

/// The weights of a routing as `[tokens, experts]`, zeros where an expert was not chosen.
fn dense(routing: &Routing) -> Tensor<2> {
    let device = routing.logits.device();
    let zeros = Tensor::<2>::zeros([routing.assignment.tokens(), routing.num_experts], &device);
    zeros.scatter(1, routing.assignment.indices(&device), routing.weights.clone(), burn::tensor::IndexingUpdateOp::Add)
}

impl MofmeLayer {
    /// `[tokens, hidden] -> [tokens, hidden]`, with the last routing.
    pub fn forward(&self, x: Tensor<2>, context: &RouteContext) -> (Tensor<2>, Routing) {
        let training = self.dropout.training.val().is_enabled() && x.device().is_autodiff();
        let samples = if training { self.samples } else { 1 };
        let route = || self.router.route(self.dropout.forward(x.clone()), context);
        let mut routings: Vec<Routing> = (0..samples).map(|_| route()).collect();
        let weights: Vec<Tensor<2>> = routings.iter().map(dense).collect();
        let weights = match weights.len() {
            1 => weights[0].clone(),
            _ => certain(weights),
        };
        let hidden = self.network.hidden(x); // [tokens, intermediate]
        let gamma = weights.clone().matmul(self.gamma.val());
        let output = self.network.down.forward(hidden * gamma + weights.matmul(self.beta.val()));
        let last = routings.len() - 1;
        (output, routings.swap_remove(last))
    }
}

/// The mean over samples `[tokens, experts]` with weights `1 / (1 + distance^2)`, rows normalized.
fn certain(samples: Vec<Tensor<2>>) -> Tensor<2> {
    let stack = Tensor::stack::<3>(samples, 0); // [samples, tokens, experts]
    let mean = stack.clone().mean_dim(0);
    let difference = (stack.clone() - mean).detach();
    let variance = difference.clone().square().mean_dim(0) + 1e-5;
    let distance = (difference.square() / variance).mean_dim(2); // [samples, tokens, 1]
    let certainty = (distance + 1.0).recip();
    let weights = (stack * certainty.clone()).sum_dim(0) / certainty.sum_dim(0);
    let weights = weights.squeeze_dim::<2>(0);
    weights.clone() / weights.sum_dim(1).clamp_min(1e-20)
}

//! MoME: small experts beside a frozen model, one router for all granularities.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};

use crate::dispatch::dispatch;
use crate::experts::{Activation, ExpertNetworks, MlpExperts, MlpExpertsConfig};
use crate::router::{Router, TopKRouter, TopKRouterConfig};
use crate::routing::{RouteContext, Routing};

/// Configuration of [`Mome`].
#[derive(Config, Debug)]
pub struct MomeConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Width of an expert's bottleneck, down to 1.
    pub rank: usize,
    /// The number of routed experts.
    pub num_experts: usize,
    /// Experts per token.
    #[config(default = 2)]
    pub top_k: usize,
    /// Experts that every token runs through.
    #[config(default = 1)]
    pub shared: usize,
}

/// The mixture of Matryoshka experts (MoME, arXiv 2510.04136): `x + sum_shared + sum_top-k g_i expert_i` beside a
/// frozen block, an expert being down, GELU, up with a tiny bottleneck. Sequences pooled to several granularities go
/// through the very same router and experts, one call each; losses are averaged over them. Up projections begin at
/// zero, so that the model begins as its base.
#[derive(Module, Debug)]
pub struct Mome {
    /// The router of all granularities.
    pub router: TopKRouter,
    /// The routed experts.
    pub experts: MlpExperts,
    /// The experts of all tokens, as one of several times the width.
    pub shared: Option<MlpExperts>,
}

impl MomeConfig {
    /// Makes the module.
    ///
    /// # Panics
    ///
    /// If a token takes more experts than there are.
    pub fn init(&self, device: &Device) -> Mome {
        let experts = |rank: usize, count: usize| {
            let mut experts =
                MlpExpertsConfig::new(self.d_model, rank, count).with_activation(Activation::Gelu).init(device);
            let zeros: Param<Tensor<3>> = Initializer::Zeros.init([count, rank, self.d_model], device);
            experts.down = zeros;
            experts
        };
        Mome {
            router: TopKRouterConfig::new(self.d_model, self.num_experts).with_top_k(self.top_k).init(device),
            experts: experts(self.rank, self.num_experts),
            shared: (self.shared > 0).then(|| experts(self.rank * self.shared, 1)),
        }
    }
}

impl Mome {
    /// What is added beside a block that reads `[tokens, hidden]`.
    pub fn forward(&self, x: Tensor<2>, context: &RouteContext) -> (Tensor<2>, Routing) {
        let routing = self.router.route(x.clone(), context);
        let routed = dispatch(x.clone(), &routing, |rows, segments| self.experts.forward(rows, segments));
        let tokens = x.dims()[0];
        let output = match &self.shared {
            Some(shared) if tokens > 0 => routed + shared.forward(x, &crate::Segments::even(1, tokens)),
            _ => routed,
        };
        (output, routing)
    }

    /// Mean pooling of a sequence `[tokens, hidden]` by a factor; a rest forms a shorter group.
    ///
    /// # Panics
    ///
    /// If the factor is 0.
    pub fn pooled(x: Tensor<2>, factor: usize) -> Tensor<2> {
        assert!(factor > 0, "tokens are pooled by a factor of at least 1");
        let tokens = x.dims()[0];
        let groups =
            (0..tokens).step_by(factor).map(|from| x.clone().narrow(0, from, factor.min(tokens - from)).mean_dim(0));
        Tensor::cat(groups.collect(), 0)
    }
}

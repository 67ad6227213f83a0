//! Chain-of-Experts: the same experts several times, each time chosen anew.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Tensor};

use crate::dispatch::dispatch;
use crate::experts::{ExpertNetworks, GatedExperts, GatedExpertsConfig, SharedExpert, SharedExpertConfig};
use crate::router::{Router, TopKRouter, TopKRouterConfig};
use crate::routing::{Combine, RouteContext, Routing};

/// Configuration of [`ChainOfExperts`].
#[derive(Config, Debug)]
pub struct ChainOfExpertsConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Intermediate size of one expert.
    pub d_ff: usize,
    /// The number of routed experts.
    pub num_experts: usize,
    /// Calls of experts per token in all rounds together.
    #[config(default = 4)]
    pub top_k: usize,
    /// The number of rounds, a divisor of `top_k`.
    #[config(default = 2)]
    pub rounds: usize,
    /// Width of the shared expert; 0 for none.
    #[config(default = 0)]
    pub shared_ff: usize,
    /// Whether every round adds what it read. Published ablations need it; without, rounds replace.
    #[config(default = true)]
    pub inner_residual: bool,
}

/// Chain-of-Experts (arXiv 2506.18945): `x' = shared(x) + sum s_i F_i(x) + x` in each round, one pool of experts, a
/// router of its own per round, `top_k / rounds` experts each. A block around it adds no residual of its own if the
/// inner one is there.
#[derive(Module, Debug)]
pub struct ChainOfExperts {
    /// The router of each round.
    pub routers: Vec<TopKRouter>,
    /// The experts of all rounds.
    pub experts: GatedExperts,
    /// For all tokens, in each round.
    pub shared: Option<SharedExpert>,
    inner_residual: bool,
}

impl ChainOfExpertsConfig {
    /// Makes the layer.
    ///
    /// # Panics
    ///
    /// If rounds do not divide the experts per token, or there are fewer experts.
    pub fn init(&self, device: &Device) -> ChainOfExperts {
        let divides = self.rounds > 0 && self.top_k.is_multiple_of(self.rounds);
        assert!(divides, "{} rounds do not divide {} experts per token", self.rounds, self.top_k);
        let router = TopKRouterConfig::new(self.d_model, self.num_experts)
            .with_top_k(self.top_k / self.rounds)
            .with_combine(Combine::Raw);
        let shared = SharedExpertConfig::new(self.d_model, self.shared_ff);
        ChainOfExperts {
            routers: (0..self.rounds).map(|_| router.init(device)).collect(),
            experts: GatedExpertsConfig::new(self.d_model, self.d_ff, self.num_experts).init(device),
            shared: (self.shared_ff > 0).then(|| shared.init(device)),
            inner_residual: self.inner_residual,
        }
    }
}

impl ChainOfExperts {
    /// `[tokens, hidden] -> [tokens, hidden]`, with the routing of each round.
    pub fn forward(&self, x: Tensor<2>, context: &RouteContext) -> (Tensor<2>, Vec<Routing>) {
        let mut routings = Vec::with_capacity(self.routers.len());
        let mut x = x;
        for router in &self.routers {
            let routing = router.route(x.clone(), context);
            let mut next = dispatch(x.clone(), &routing, |rows, segments| self.experts.forward(rows, segments));
            if let Some(shared) = &self.shared {
                next = next + shared.forward(x.clone());
            }
            x = if self.inner_residual { next + x } else { next };
            routings.push(routing);
        }
        (x, routings)
    }
}

//! Union-of-Experts: one network, cut into experts that together are it.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::assignment::Assignment;
use crate::dispatch::dispatch;
use crate::experts::{ExpertNetworks, FeedForward, GatedExperts, GatedExpertsConfig};
use crate::router::{Router, TopKRouter, TopKRouterConfig};
use crate::routing::{RouteContext, Routing, host};

/// Who chooses together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnionRouting {
    /// Every token by itself.
    #[default]
    Token,
    /// All tokens of a call, by their mean scores: expert selection of a sequence.
    Sequence,
}

/// Configuration of [`UnionOfExperts`].
#[derive(Config, Debug)]
pub struct UnionOfExpertsConfig {
    /// The number of parts.
    pub num_experts: usize,
    /// Parts per token; all of them are the network.
    pub top_k: usize,
    /// Who chooses together.
    #[config(default = "UnionRouting::Token")]
    pub routing: UnionRouting,
}

/// Union-of-Experts (arXiv 2503.02495): the gate and up maps of one network are cut by columns and its down map by
/// rows, as tensor parallelism cuts them. Parts have weight 1, chosen or not: with all of them the layer is the
/// network. The published code multiplies no gate either.
#[derive(Module, Debug)]
pub struct UnionOfExperts {
    /// Hidden to parts. It gets no gradient from outputs: weights are 1; train it by a loss on its routing.
    pub router: TopKRouter,
    /// The parts.
    pub experts: GatedExperts,
    #[module(skip)]
    routing: UnionRouting,
}

impl UnionOfExpertsConfig {
    /// Cuts a network.
    ///
    /// # Panics
    ///
    /// If the parts do not divide its width, or a token takes more than there are.
    pub fn init_from(&self, network: &FeedForward, device: &Device) -> UnionOfExperts {
        let ([d, width], parts) = (network.up.weight.dims(), self.num_experts);
        assert!(parts > 0 && width.is_multiple_of(parts), "{parts} parts do not divide a width of {width}");
        let size = width / parts;
        let columns = |map: &burn::nn::Linear| {
            Param::from_tensor(map.weight.val().reshape([d, parts, size]).swap_dims(0, 1).detach())
        };
        let made = GatedExpertsConfig::new(1, 1, 1).with_activation(network.activation).init(device);
        UnionOfExperts {
            router: TopKRouterConfig::new(d, parts).with_top_k(self.top_k).init(device),
            experts: GatedExperts {
                gate: columns(&network.gate),
                up: columns(&network.up),
                down: Param::from_tensor(network.down.weight.val().reshape([parts, size, d]).detach()),
                ..made
            },
            routing: self.routing,
        }
    }
}

impl UnionOfExperts {
    /// `[tokens, hidden] -> [tokens, hidden]`; by sequence, one sequence per call, which is no causal choice.
    ///
    /// # Panics
    ///
    /// If a causal model lets a sequence choose.
    pub fn forward(&self, x: Tensor<2>, context: &RouteContext) -> (Tensor<2>, Routing) {
        let mut routing = self.router.route(x.clone(), context);
        if self.routing == UnionRouting::Sequence {
            assert!(!context.causal, "a sequence that chooses as a whole sees its later tokens");
            let (tokens, k) = (x.dims()[0], self.router.top_k());
            let chosen = crate::router::top(&host(&routing.scores.clone().mean_dim(0)), k);
            routing.assignment = Assignment::new(tokens, k, chosen.repeat(tokens));
        }
        routing.weights = routing.assignment.mask(&x.device());
        let output = dispatch(x, &routing, |rows, segments| self.experts.forward(rows, segments));
        (output, routing)
    }
}

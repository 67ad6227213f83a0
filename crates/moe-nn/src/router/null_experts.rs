//! Experts that do nothing, so that a token may take fewer.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};

use super::{Router, TopKRouter, check_top_k, gate, top};
use crate::assignment::Assignment;
use crate::routing::{Combine, RouteContext, Routing, Score, host, logits};

/// Configuration of a [`NullExpertRouter`].
#[derive(Config, Debug)]
pub struct NullExpertRouterConfig {
    /// Hidden size.
    pub d_model: usize,
    /// The number of true experts.
    pub num_experts: usize,
    /// The number of null experts.
    pub num_null: usize,
    /// Experts per token, null ones included.
    #[config(default = 3)]
    pub top_k: usize,
}

/// AdaMoE (arXiv 2406.13233): true and null experts compete for the places of a token; places that null experts win
/// stay empty, and the weights of the others sum to one. [`balance`](crate::losses::balance) treats null experts as the
/// paper does.
#[derive(Module, Debug)]
pub struct NullExpertRouter {
    /// Hidden to true experts and then null experts.
    pub gate: Linear,
    num_experts: usize,
    top_k: usize,
}

impl NullExpertRouterConfig {
    fn check(&self) {
        assert!(self.num_experts > 0, "there is no true expert");
        check_top_k(self.top_k, self.num_experts + self.num_null);
    }

    /// Makes the router.
    ///
    /// # Panics
    ///
    /// If a token takes more experts than there are, null ones included.
    pub fn init(&self, device: &Device) -> NullExpertRouter {
        self.check();
        let gate = gate(self.d_model, self.num_experts + self.num_null, false, device);
        NullExpertRouter { gate, num_experts: self.num_experts, top_k: self.top_k }
    }

    /// Makes the router from a trained one, whose rows null experts copy, as the paper does.
    ///
    /// # Panics
    ///
    /// If the other router has a bias or other sizes, or its experts do not divide the null ones.
    pub fn init_from(&self, router: &TopKRouter) -> NullExpertRouter {
        self.check();
        let weight = router.gate.weight.val(); // [hidden, experts]
        let found = weight.dims();
        assert_eq!(found, [self.d_model, self.num_experts], "the router is of {found:?}");
        assert!(router.gate.bias.is_none(), "null experts copy a router without bias");
        let (experts, nulls) = (self.num_experts, self.num_null);
        assert!(nulls.is_multiple_of(experts), "{nulls} null experts are no multiple of {experts} experts");
        let weight = weight.repeat_dim(1, 1 + nulls / experts);
        let gate = Linear { weight: Param::from_tensor(weight.detach()), bias: None };
        NullExpertRouter { gate, num_experts: experts, top_k: self.top_k }
    }
}

impl Router for NullExpertRouter {
    fn num_experts(&self) -> usize {
        self.num_experts
    }

    fn route(&self, x: Tensor<2>, _context: &RouteContext) -> Routing {
        let logits = logits(x, &self.gate);
        let scores = Score::Softmax.of(logits.clone());
        let columns = logits.dims()[1];
        let values = host(&scores);
        let experts = values
            .chunks_exact(columns)
            .flat_map(|row| top(row, self.top_k))
            .map(|expert| if (expert as usize) < self.num_experts { expert } else { Assignment::NONE });
        let assignment = Assignment::new(logits.dims()[0], self.top_k, experts.collect());
        let weights = Combine::Renormalize.weights(&logits, &scores, &assignment);
        Routing { logits, scores, assignment, weights, num_experts: self.num_experts }
    }
}

//! Experts that choose their tokens.

use burn::config::Config;
use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};

use super::{Router, gate, top};
use crate::assignment::Assignment;
use crate::routing::{Combine, RouteContext, Routing, Score, host, logits};

/// Configuration of an [`ExpertChoiceRouter`].
#[derive(Config, Debug)]
pub struct ExpertChoiceRouterConfig {
    /// Hidden size.
    pub d_model: usize,
    /// The number of experts.
    pub num_experts: usize,
    /// Experts per token on average.
    #[config(default = 2.0)]
    pub capacity_factor: f64,
}

/// Every expert takes the tokens that score it highest, all equally many: perfectly balanced by construction (expert
/// choice, arXiv 2202.09368). A token's experts depend on the other tokens of the batch, later ones included, so that
/// it refuses causal models.
#[derive(Module, Debug)]
pub struct ExpertChoiceRouter {
    /// Hidden to experts.
    pub gate: Linear,
    capacity_factor: f64,
}

impl ExpertChoiceRouterConfig {
    /// Makes the router.
    ///
    /// # Panics
    ///
    /// If the capacity is not positive, or there is no expert.
    pub fn init(&self, device: &Device) -> ExpertChoiceRouter {
        assert!(self.num_experts > 0, "there is no expert");
        assert!(self.capacity_factor > 0.0, "the capacity factor must be positive, found {}", self.capacity_factor);
        let gate = gate(self.d_model, self.num_experts, false, device);
        ExpertChoiceRouter { gate, capacity_factor: self.capacity_factor }
    }
}

impl Router for ExpertChoiceRouter {
    fn num_experts(&self) -> usize {
        self.gate.weight.dims()[1]
    }

    fn route(&self, x: Tensor<2>, context: &RouteContext) -> Routing {
        assert!(!context.causal, "expert choice compares a token with later ones: a causal model cannot use it");
        let logits = logits(x, &self.gate);
        let scores = Score::Softmax.of(logits.clone());
        let (experts, tokens) = (self.num_experts(), logits.dims()[0]);
        let capacity = (self.capacity_factor * tokens as f64 / experts as f64).ceil() as usize;
        let by_expert = host(&scores.clone().transpose());
        let mut lists = vec![vec![]; tokens];
        for (expert, column) in by_expert.chunks_exact(tokens).enumerate() {
            top(column, capacity).into_iter().for_each(|token| lists[token as usize].push(expert as u32));
        }
        let assignment = Assignment::from_lists(&lists);
        let weights = Combine::Raw.weights(&logits, &scores, &assignment);
        Routing { logits, scores, assignment, weights, num_experts: experts }
    }
}

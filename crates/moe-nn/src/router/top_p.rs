//! As many experts as a token's probability needs.

use burn::config::Config;
use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};

use super::{Router, check_top_k, gate, top};
use crate::assignment::Assignment;
use crate::routing::{Combine, RouteContext, Routing, Score, host, logits};

/// Configuration of a [`TopPRouter`].
#[derive(Config, Debug)]
pub struct TopPRouterConfig {
    /// Hidden size.
    pub d_model: usize,
    /// The number of experts.
    pub num_experts: usize,
    /// The probability that the chosen experts must exceed.
    #[config(default = 0.4)]
    pub mass: f64,
    /// The fewest experts per token.
    #[config(default = 1)]
    pub min_k: usize,
    /// The most experts per token; none allows all.
    pub max_k: Option<usize>,
    /// How scores become weights; the published code takes them as they are.
    #[config(default = "Combine::Raw")]
    pub combine: Combine,
}

/// The smallest set of experts whose probabilities exceed a mass: more experts for harder tokens (arXiv 2403.07652).
/// Train it with [`entropy`](crate::losses::entropy), or sets grow.
#[derive(Module, Debug)]
pub struct TopPRouter {
    /// Hidden to experts.
    pub gate: Linear,
    mass: f64,
    min_k: usize,
    max_k: usize,
    #[module(skip)]
    combine: Combine,
}

impl TopPRouterConfig {
    /// Makes the router.
    ///
    /// # Panics
    ///
    /// If the mass is not positive, or the limits are not within the number of experts or cross.
    pub fn init(&self, device: &Device) -> TopPRouter {
        let max_k = self.max_k.unwrap_or(self.num_experts);
        check_top_k(max_k, self.num_experts);
        check_top_k(self.min_k, max_k);
        assert!(self.mass > 0.0, "the mass must be positive, found {}", self.mass);
        let gate = gate(self.d_model, self.num_experts, false, device);
        TopPRouter { gate, mass: self.mass, min_k: self.min_k, max_k, combine: self.combine }
    }
}

impl Router for TopPRouter {
    fn num_experts(&self) -> usize {
        self.gate.weight.dims()[1]
    }

    fn route(&self, x: Tensor<2>, _context: &RouteContext) -> Routing {
        let logits = logits(x, &self.gate);
        let scores = Score::Softmax.of(logits.clone());
        let experts = self.num_experts();
        let lists: Vec<Vec<u32>> = host(&scores)
            .chunks_exact(experts)
            .map(|row| {
                let mut order = top(row, self.max_k);
                let mut sum = 0.0;
                // The expert that crosses the mass is kept.
                let needed = order.iter().position(|&expert| {
                    sum += f64::from(row[expert as usize]);
                    sum > self.mass
                });
                order.truncate(needed.map_or(self.max_k, |last| last + 1).max(self.min_k));
                order
            })
            .collect();
        let assignment = Assignment::from_lists(&lists);
        let weights = self.combine.weights(&logits, &scores, &assignment);
        Routing { logits, scores, assignment, weights, num_experts: experts }
    }
}

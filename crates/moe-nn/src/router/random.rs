//! A router that is drawn once and never trained.

use burn::config::Config;
use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{Router, check_top_k, gate, top_of_rows};
use crate::routing::{Combine, RouteContext, Routing, Score, host, logits};

/// How the number of experts per token grows over training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum GrowthSchedule {
    /// `round((k_max - k_min) * s) + k_min`.
    #[default]
    Linear,
    /// `round((k_min - k_max) * cos(pi s / 2)) + k_max`.
    Cosine,
    /// The cosine replaced by `0.99^floor(300 s)`.
    Exponential,
}

/// Configuration of a [`RandomRouter`].
#[derive(Config, Debug)]
pub struct RandomRouterConfig {
    /// Hidden size.
    pub d_model: usize,
    /// The number of experts.
    pub num_experts: usize,
    /// Experts per token when training begins.
    pub k_min: usize,
    /// Experts per token when it ends.
    pub k_max: usize,
    /// How the number grows.
    #[config(default = "GrowthSchedule::Linear")]
    pub schedule: GrowthSchedule,
}

/// SMoE-Dropout (arXiv 2303.01610): a frozen random router with more experts per token as training goes on. Afterwards
/// it runs with any number of them, best with all.
#[derive(Module, Debug)]
pub struct RandomRouter {
    /// Hidden to experts, frozen.
    pub gate: Linear,
    top_k: usize,
    k_min: usize,
    k_max: usize,
    #[module(skip)]
    schedule: GrowthSchedule,
}

impl RandomRouterConfig {
    /// Makes the router at the beginning of its schedule.
    ///
    /// # Panics
    ///
    /// If the numbers of experts per token are not within the number of experts, or cross.
    pub fn init(&self, device: &Device) -> RandomRouter {
        check_top_k(self.k_max, self.num_experts);
        check_top_k(self.k_min, self.k_max);
        RandomRouter {
            gate: gate(self.d_model, self.num_experts, false, device).no_grad(),
            top_k: self.k_min,
            k_min: self.k_min,
            k_max: self.k_max,
            schedule: self.schedule,
        }
    }
}

impl RandomRouter {
    /// This router at a place of its schedule, from 0 to 1.
    pub fn at(mut self, progress: f64) -> Self {
        let (low, high) = (self.k_min as f64, self.k_max as f64);
        let progress = progress.clamp(0.0, 1.0);
        let k = match self.schedule {
            GrowthSchedule::Linear => ((high - low) * progress).round() + low,
            GrowthSchedule::Cosine => ((low - high) * (std::f64::consts::FRAC_PI_2 * progress).cos()).round() + high,
            GrowthSchedule::Exponential => ((low - high) * 0.99f64.powf((300.0 * progress).floor())).round() + high,
        };
        self.top_k = (k as usize).clamp(self.k_min, self.k_max);
        self
    }

    /// This router with any number of experts per token, for evaluation.
    ///
    /// # Panics
    ///
    /// If there are fewer experts.
    pub fn with_top_k(mut self, top_k: usize) -> Self {
        check_top_k(top_k, self.num_experts());
        self.top_k = top_k;
        self
    }

    /// Experts per token.
    pub fn top_k(&self) -> usize {
        self.top_k
    }
}

impl Router for RandomRouter {
    fn num_experts(&self) -> usize {
        self.gate.weight.dims()[1]
    }

    fn route(&self, x: Tensor<2>, _context: &RouteContext) -> Routing {
        let logits = logits(x, &self.gate);
        let scores = Score::Softmax.of(logits.clone());
        let assignment = top_of_rows(&host(&logits), self.num_experts(), self.top_k);
        let weights = Combine::SoftmaxOfChosen.weights(&logits, &scores, &assignment);
        Routing { logits, scores, assignment, weights, num_experts: self.num_experts() }
    }
}

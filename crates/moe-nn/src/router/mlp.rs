//! A router of two layers, or of distances to centroids (ModuleFormer).

use burn::config::Config;
use burn::module::{Flag, Module, Param};
use burn::nn::{Dropout, DropoutConfig, Initializer, Linear, LinearConfig};
use burn::tensor::activation::gelu;
use burn::tensor::{DType, Device, Tensor};
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use super::{Router, check_top_k, top};
use crate::assignment::Assignment;
use crate::routing::{Combine, RouteContext, Routing, Score, host, logits};

/// What the logits of an [`MlpRouter`] are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum GateKind {
    /// `hidden -> d_router -> experts` with GELU and dropout between.
    #[default]
    Mlp,
    /// The cosine of a projection to `d_router` with a centroid per expert, times a learned temperature.
    Cosine,
}

/// Configuration of an [`MlpRouter`].
#[derive(Config, Debug)]
pub struct MlpRouterConfig {
    /// Hidden size.
    pub d_model: usize,
    /// The number of experts.
    pub num_experts: usize,
    /// Experts per token.
    #[config(default = 2)]
    pub top_k: usize,
    /// The width between.
    #[config(default = 256)]
    pub d_router: usize,
    /// What the logits are.
    #[config(default = "GateKind::Mlp")]
    pub kind: GateKind,
    /// The dropout between the two layers.
    #[config(default = 0.1)]
    pub dropout: f64,
    /// How many of a token's experts are sampled in training, in proportion to their probabilities, instead of chosen.
    #[config(default = 0)]
    pub sampled: usize,
}

/// The gate of ModuleFormer (arXiv 2306.04640). Weights are probabilities as they are; train it with
/// [`mutual_information`](crate::losses::mutual_information).
#[derive(Module, Debug)]
pub struct MlpRouter {
    /// Hidden to `d_router`.
    pub project: Linear,
    /// `d_router` to experts, without bias; the centroids of a cosine gate.
    pub gate: Linear,
    /// The logarithm of a cosine gate's temperature, `[1]`.
    pub temperature: Option<Param<Tensor<1>>>,
    /// Dropout between the two layers.
    pub dropout: Dropout,
    /// Whether experts are sampled. [`Module::valid`] turns it off.
    pub training: Param<Flag>,
    top_k: usize,
    sampled: usize,
}

impl MlpRouterConfig {
    /// Makes the router.
    ///
    /// # Panics
    ///
    /// If a token takes more experts than there are, or samples more than it takes.
    pub fn init(&self, device: &Device) -> MlpRouter {
        check_top_k(self.top_k, self.num_experts);
        assert!(self.sampled <= self.top_k, "{} of {} experts cannot be sampled", self.sampled, self.top_k);
        let temperature =
            (self.kind == GateKind::Cosine).then(|| Initializer::Constant { value: 10f64.ln() }.init([1], device));
        MlpRouter {
            project: LinearConfig::new(self.d_model, self.d_router).init(device),
            gate: LinearConfig::new(self.d_router, self.num_experts).with_bias(false).init(device),
            temperature,
            dropout: DropoutConfig::new(self.dropout).init(),
            training: Param::from_bool(true),
            top_k: self.top_k,
            sampled: self.sampled,
        }
    }
}

impl MlpRouter {
    fn logits(&self, x: Tensor<2>) -> Tensor<2> {
        let inner = logits(x, &self.project);
        match &self.temperature {
            None => logits(self.dropout.forward(gelu(inner)), &self.gate),
            Some(temperature) => {
                let unit = |x: Tensor<2>, dim: usize| {
                    let norm = x.clone().square().sum_dim(dim).sqrt();
                    x / norm.clamp_min(1e-6)
                };
                let centroids = unit(self.gate.weight.val().cast(DType::F32), 0); // [d_router, experts]
                unit(inner, 1).matmul(centroids) * temperature.val().exp().unsqueeze()
            }
        }
    }
}

/// The best `k - sampled` experts and `sampled` others, drawn without replacement in proportion to `row`.
fn sample(row: &[f32], k: usize, sampled: usize, random: &mut impl Rng) -> Vec<u32> {
    let mut chosen = top(row, k - sampled);
    while chosen.len() < k {
        let rest = || (0..row.len() as u32).filter(|expert| !chosen.contains(expert));
        let sum: f32 = rest().map(|expert| row[expert as usize]).sum();
        let mut place = random.random::<f32>() * sum;
        let drawn = rest().find(|&expert| {
            place -= row[expert as usize];
            place < 0.0
        });
        // Rounding, or probabilities that are all zero, may leave the place beyond the last expert.
        let Some(drawn) = drawn.or_else(|| rest().next_back()) else { break };
        chosen.push(drawn);
    }
    chosen
}

impl Router for MlpRouter {
    fn num_experts(&self) -> usize {
        self.gate.weight.dims()[1]
    }

    fn route(&self, x: Tensor<2>, _context: &RouteContext) -> Routing {
        let training = self.training.val().is_enabled() && x.device().is_autodiff();
        let logits = self.logits(x);
        let scores = Score::Softmax.of(logits.clone());
        let experts = self.num_experts();
        let sampled = if training { self.sampled } else { 0 };
        let random = &mut rand::rng();
        let places =
            host(&scores).chunks_exact(experts).flat_map(|row| sample(row, self.top_k, sampled, random)).collect();
        let assignment = Assignment::new(logits.dims()[0], self.top_k, places);
        let weights = Combine::Raw.weights(&logits, &scores, &assignment);
        Routing { logits, scores, assignment, weights, num_experts: experts }
    }
}

//! Routers that are random and stay so.

use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{
    PerLayer, RunTimeRouting,
    top_k::{KRule, check_k},
};
use crate::{Model, error::Result, router::Combine};

/// SMoE-Dropout (arXiv 2303.01610): every router is a random linear map that is never trained, and the weights are the
/// softmax of the chosen logits. While experts are trained, `k` grows; afterwards any `k` does, all experts
/// included.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandomRouter {
    /// Seed of the routers, whose weights are even in `[-H^-0.5, H^-0.5]`, as PyTorch initializes linear maps.
    #[serde(default)]
    pub seed: u64,
    /// Experts per token.
    pub k: PerLayer<usize>,
}

impl RandomRouter {
    /// The routers and rules of a model's layers.
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) for a number of experts per token out of range,
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a model whose rule cannot renormalize.
    pub fn on(&self, model: &Model) -> Result<RunTimeRouting> {
        model.router().with_combine(Combine::Renorm)?;
        let hidden = model.config().hidden_size;
        let bound = (hidden as f32).powf(-0.5);
        let mut routing = RunTimeRouting::default();
        for (layer, experts, k) in self.k.of(model.config(), "k")? {
            check_k(model, layer, experts, k)?;
            let mut random = ChaCha8Rng::seed_from_u64(self.seed);
            random.set_stream(layer as u64);
            let weight = (0..experts * hidden).map(|_| (random.random::<f32>() * 2.0 - 1.0) * bound).collect();
            routing.routers.insert(layer, weight);
            routing.rules.insert(layer, Arc::new(KRule { k, combine: Combine::Renorm }));
        }
        Ok(routing)
    }
}

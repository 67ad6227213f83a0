//! Experts by token id, without parameters.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Tensor};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::{Router, check_top_k};
use crate::assignment::Assignment;
use crate::routing::{Combine, RouteContext, Routing};

/// Configuration of a [`HashRouter`].
#[derive(Config, Debug)]
pub struct HashRouterConfig {
    /// The number of experts.
    pub num_experts: usize,
    /// The number of token ids.
    pub vocab_size: usize,
    /// Experts per token, each with the same weight.
    #[config(default = 1)]
    pub top_k: usize,
    /// The seed of the table.
    #[config(default = 0)]
    pub seed: u64,
}

/// A fixed table from token ids to experts (Hash Layers, arXiv 2106.04426). Ids are dealt out evenly; the k experts of
/// an id differ. It needs [`RouteContext::token_ids`].
#[derive(Module, Debug)]
pub struct HashRouter {
    num_experts: usize,
    top_k: usize,
    #[module(skip)]
    table: Vec<u32>,
}

impl HashRouterConfig {
    /// Makes the router.
    ///
    /// # Panics
    ///
    /// If a token takes more experts than there are.
    pub fn init(&self) -> HashRouter {
        check_top_k(self.top_k, self.num_experts);
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let mut first: Vec<u32> = (0..self.vocab_size).map(|id| (id % self.num_experts) as u32).collect();
        first.shuffle(&mut random);
        let table = first.into_iter().flat_map(|first| {
            let mut others: Vec<u32> = (0..self.num_experts as u32).filter(|&expert| expert != first).collect();
            others.shuffle(&mut random);
            std::iter::once(first).chain(others).take(self.top_k).collect::<Vec<u32>>()
        });
        HashRouter { num_experts: self.num_experts, top_k: self.top_k, table: table.collect() }
    }
}

impl HashRouter {
    /// The experts of a token id.
    ///
    /// # Panics
    ///
    /// If the id is beyond the vocabulary.
    pub fn experts_of(&self, id: u32) -> &[u32] {
        let (from, count) = (id as usize * self.top_k, self.table.len() / self.top_k);
        assert!((id as usize) < count, "token id {id} is beyond the {count} ids of the table");
        &self.table[from..from + self.top_k]
    }
}

impl Router for HashRouter {
    fn num_experts(&self) -> usize {
        self.num_experts
    }

    fn route(&self, x: Tensor<2>, context: &RouteContext) -> Routing {
        let ids = context.token_ids.expect("routing by token id needs the token ids in the context");
        let ([tokens, _], device): (_, Device) = (x.dims(), x.device());
        assert_eq!(ids.len(), tokens, "{} token ids for {tokens} tokens", ids.len());
        let experts = ids.iter().flat_map(|&id| self.experts_of(id)).copied().collect();
        let assignment = Assignment::new(tokens, self.top_k, experts);
        let logits = Tensor::<2>::zeros([tokens, self.num_experts], &device);
        let scores = logits.ones_like() / self.num_experts as f32;
        let weights = Combine::Renormalize.weights(&logits, &scores, &assignment);
        Routing { logits, scores, assignment, weights, num_experts: self.num_experts }
    }
}

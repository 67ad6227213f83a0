//! Read-ME: one router for all layers, which decides before the first of them runs.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, RmsNorm, RmsNormConfig};
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::dispatch::dispatch;
use crate::experts::{ExpertNetworks, FeedForward, FeedForwardConfig, GatedExperts, GatedExpertsConfig};
use crate::router::{check_top_k, gate, top, top_of_rows};
use crate::routing::{Routing, Score, host, logits};
use crate::transformer::{Attention, AttentionConfig};

/// Configuration of [`PreGate`].
#[derive(Config, Debug)]
pub struct PreGateConfig {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// The number of experts of every layer.
    pub num_experts: usize,
    /// Hidden size of the router.
    #[config(default = 64)]
    pub d_model: usize,
    /// Heads of its attention.
    #[config(default = 4)]
    pub heads: usize,
    /// Its layers.
    #[config(default = 1)]
    pub layers: usize,
}

/// A small causal transformer on token ids whose logits are those of experts (Read-ME, arXiv 2410.19123): the expert of
/// a token is the same in all layers, and known before the first one runs, so that experts can be fetched and tokens
/// batched ahead.
#[derive(Module, Debug)]
pub struct PreGate {
    /// Token embeddings.
    pub embedding: Embedding,
    /// Norms before attention, and before the network, of each layer.
    pub norms: Vec<[RmsNorm; 2]>,
    /// Attention of each layer.
    pub attentions: Vec<Attention>,
    /// Network of each layer.
    pub networks: Vec<FeedForward>,
    /// Norm before the head.
    pub norm: RmsNorm,
    /// Hidden to experts.
    pub head: Linear,
}

impl PreGateConfig {
    /// Makes the router.
    ///
    /// # Panics
    ///
    /// If there is no expert, or heads do not divide the hidden size into even parts.
    pub fn init(&self, device: &Device) -> PreGate {
        let d = self.d_model;
        check_top_k(1, self.num_experts);
        assert!(self.heads > 0 && d.is_multiple_of(self.heads), "{} heads do not divide {d}", self.heads);
        let attention = AttentionConfig::new(self.heads, self.heads, d / self.heads);
        let norm = || RmsNormConfig::new(d).init(device);
        PreGate {
            embedding: EmbeddingConfig::new(self.vocab_size, d).init(device),
            norms: (0..self.layers).map(|_| [norm(), norm()]).collect(),
            attentions: (0..self.layers).map(|_| attention.init(d, device)).collect(),
            networks: (0..self.layers).map(|_| FeedForwardConfig::new(d, 2 * d).init(device)).collect(),
            norm: norm(),
            head: gate(d, self.num_experts, false, device),
        }
    }
}

impl PreGate {
    /// The expert of every token of `[batch, tokens]`, with a weight of 1.
    pub fn route(&self, ids: Tensor<2, Int>) -> Routing {
        let [batch, tokens] = ids.dims();
        let mut x = self.embedding.forward(ids);
        for ((norms, attention), network) in self.norms.iter().zip(&self.attentions).zip(&self.networks) {
            x = x.clone() + attention.forward(norms[0].forward(x));
            x = x.clone() + network.forward(norms[1].forward(x));
        }
        let [_, _, d] = x.dims();
        let logits = logits(self.norm.forward(x).reshape([batch * tokens, d]), &self.head);
        let num_experts = logits.dims()[1];
        let scores = Score::Softmax.of(logits.clone());
        let assignment = top_of_rows(&host(&logits), num_experts, 1);
        let weights = assignment.mask(&logits.device());
        Routing { logits, scores, assignment, weights, num_experts }
    }

    /// What the router is trained by, where the networks of a layer stay as they are: of the scores of
    /// [`domain_scores`], `[tokens, experts]`, the cross-entropy with the best expert under a label smoothing of a
    /// half, by three quarters, and the cross-entropy with their softmax by one. Add it up over layers.
    ///
    /// # Panics
    ///
    /// If the scores are not those of the routing's tokens and experts.
    pub fn loss(routing: &Routing, scores: &[f32]) -> Tensor<1> {
        let [tokens, experts] = routing.logits.dims();
        assert_eq!(scores.len(), tokens * experts, "{} scores of {tokens} tokens and {experts} experts", scores.len());
        let device = routing.logits.device();
        let hard = scores.chunks_exact(experts).flat_map(|row| {
            let best = top(row, 1)[0] as usize;
            (0..experts).map(move |expert| 0.5 * f32::from(expert == best) + 0.5 / experts as f32)
        });
        let table = |values: Vec<f32>| Tensor::<2>::from_data(TensorData::new(values, [tokens, experts]), &device);
        let (hard, soft) = (table(hard.collect()), Score::Softmax.of(table(scores.to_vec())));
        let target = hard * 0.75 + soft * 0.25;
        -(target * log_softmax(routing.logits.clone(), 1)).sum_dim(1).mean()
    }
}

/// How well each domain's units fit a token, `[tokens, experts]`: the share of the domain's own units among the token's
/// `most` most active ones, counted at five thresholds, `most` and four fifths of it and so on, centered per token and
/// multiplied by ten. `activations` are those of the whole network, `[tokens, units]`; `own` are the units of each
/// domain that not all share.
///
/// # Panics
///
/// If there is no unit, or a domain names one that there is not.
pub fn domain_scores(activations: &[f32], units: usize, own: &[Vec<u32>], most: usize) -> Vec<f32> {
    assert!(units > 0 && own.iter().flatten().all(|unit| (*unit as usize) < units), "units beyond {units}");
    let mut scores = Vec::with_capacity(activations.len() / units * own.len());
    for token in activations.chunks_exact(units) {
        let sizes: Vec<f32> = token.iter().map(|value| value.abs()).collect();
        let order = top(&sizes, most.min(units));
        let mut rank = vec![usize::MAX; units];
        order.iter().enumerate().for_each(|(place, unit)| rank[*unit as usize] = place);
        let score = |domain: &Vec<u32>| {
            let within = |fifths: usize| {
                let threshold = most * fifths / 5;
                domain.iter().filter(|unit| rank[**unit as usize] < threshold).count() as f32
            };
            (1..=5).map(within).sum::<f32>() / (5 * domain.len().max(1)) as f32
        };
        let row: Vec<f32> = own.iter().map(score).collect();
        let mean = row.iter().sum::<f32>() / row.len().max(1) as f32;
        scores.extend(row.into_iter().map(|value| (value - mean) * 10.0));
    }
    scores
}

/// Configuration of [`ReadMe`].
#[derive(Config, Debug)]
pub struct ReadMeConfig {
    /// The router.
    pub router: PreGateConfig,
    /// Hidden size of the model.
    pub d_model: usize,
    /// Layers of the model.
    pub layers: usize,
    /// Intermediate size of one expert.
    pub d_ff: usize,
    /// Intermediate size of what all tokens run through.
    pub d_shared: usize,
}

/// The networks of a Read-ME model, without what stands between them: one router, and in each layer a shared network
/// and an expert per domain. `moe upcycle --method domains` makes these of a dense model, with a router per layer,
/// which stock families need.
#[derive(Module, Debug)]
pub struct ReadMe {
    /// The router of all layers.
    pub router: PreGate,
    /// The experts of each layer.
    pub experts: Vec<GatedExperts>,
    /// The shared network of each layer.
    pub shared: Vec<FeedForward>,
}

impl ReadMeConfig {
    /// Makes the networks.
    ///
    /// # Panics
    ///
    /// As [`PreGateConfig::init`].
    pub fn init(&self, device: &Device) -> ReadMe {
        let experts = GatedExpertsConfig::new(self.d_model, self.d_ff, self.router.num_experts);
        let shared = FeedForwardConfig::new(self.d_model, self.d_shared);
        ReadMe {
            router: self.router.init(device),
            experts: (0..self.layers).map(|_| experts.init(device)).collect(),
            shared: (0..self.layers).map(|_| shared.init(device)).collect(),
        }
    }
}

impl ReadMe {
    /// Runs one layer on `[tokens, hidden]`, by what the router said of the tokens before the first one.
    ///
    /// # Panics
    ///
    /// If there is no such layer, or the routing is of other tokens.
    pub fn forward(&self, layer: usize, x: Tensor<2>, routing: &Routing) -> Tensor<2> {
        let shared = self.shared[layer].forward(x.clone());
        shared + dispatch(x, routing, |rows, segments| self.experts[layer].forward(rows, segments))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_scored_by_the_units_that_are_active_on_them() {
        // Units 0 and 1 are of the first domain, 2 and 3 of the second, 4 of all.
        let own = [vec![0, 1], vec![2, 3]];
        let scores = domain_scores(&[9.0, -8.0, 0.1, 0.2, 7.0, 0.0, 0.3, 5.0, 6.0, 9.0], 5, &own, 5);
        // Ranks of the first token: 0, 1, 4, 3 and 2; thresholds 1 to 5: 1 + 2 + 2 + 2 + 2 of the first, 1 + 2 of the
        // second, halved for two units.
        let (first, second) = (9.0 / 10.0, 3.0 / 10.0);
        assert!(
            (scores[0] - (first - second) * 5.0).abs() < 1e-5 && (scores[0] + scores[1]).abs() < 1e-5,
            "{scores:?}"
        );
        assert!(scores[3] > 0.0 && scores[2] < 0.0, "{scores:?}");
    }
}

//! BAM: the attentions of several models as experts of one.

use burn::config::Config;
use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::Device;
use burn::tensor::Tensor;

use crate::router::gate;
use crate::routing::{Score, logits};
use crate::transformer::{Attention, AttentionConfig, QkNorm};

/// Configuration of [`AttentionMixture`].
#[derive(Config, Debug)]
pub struct AttentionMixtureConfig {
    /// Hidden size.
    pub d_model: usize,
    /// The number of attentions.
    pub num_experts: usize,
    /// Each of them: grouped queries without norms.
    pub attention: AttentionConfig,
    /// Whether keys and values are common, those of the first one; otherwise each has its own.
    #[config(default = false)]
    pub shared_keys: bool,
}

/// Attention as a soft mixture of whole attentions, `sum_i g_i(x) A_i(x)` with g the softmax of a router of their own
/// (BAM, arXiv 2408.08274): every token runs through all of them; choosing one or two loses what they gain. With common
/// keys and values the cache is that of one. The feed-forward experts beside them are those of `moe upcycle --method
/// models`; in BAM both read the same normed input.
#[derive(Module, Debug)]
pub struct AttentionMixture {
    /// Hidden to attentions.
    pub router: Linear,
    /// Hidden to queries, of each.
    pub queries: Vec<Linear>,
    /// Hidden to keys, of each, or one for all.
    pub keys: Vec<Linear>,
    /// Hidden to values, of each, or one for all.
    pub values: Vec<Linear>,
    /// Values to hidden, of each.
    pub outputs: Vec<Linear>,
    #[module(skip)]
    config: AttentionConfig,
}

impl AttentionMixtureConfig {
    /// Makes the mixture.
    ///
    /// # Panics
    ///
    /// If there is no attention, or it has norms or a latent.
    pub fn init(&self, device: &Device) -> AttentionMixture {
        let attentions: Vec<Attention> =
            (0..self.num_experts).map(|_| self.attention.init(self.d_model, device)).collect();
        AttentionMixture::of(&attentions, self.shared_keys, device)
    }
}

impl AttentionMixture {
    /// The mixture of attentions that were trained in models of their own, under a new router.
    ///
    /// # Panics
    ///
    /// If there is none, they differ in their configuration, or have norms or a latent.
    pub fn of(attentions: &[Attention], shared_keys: bool, device: &Device) -> Self {
        let first = attentions.first().expect("a mixture needs an attention");
        let plain = first.config.latent.is_none() && first.config.qk_norm == QkNorm::None;
        assert!(plain, "attentions with norms or a latent are not mixed");
        let same = |other: &Attention| {
            let sizes = |of: &Attention| [of.query.weight.dims(), of.key.weight.dims()];
            other.config.to_string() == first.config.to_string() && sizes(other) == sizes(first)
        };
        assert!(attentions.iter().all(same), "attentions of different configurations are not mixed");
        let of_all = |part: fn(&Attention) -> &Linear, count: usize| -> Vec<Linear> {
            attentions[..count].iter().map(|attention| part(attention).clone()).collect()
        };
        let all = attentions.len();
        let keys = if shared_keys { 1 } else { all };
        AttentionMixture {
            router: gate(first.query.weight.dims()[0], all, false, device),
            queries: of_all(|attention| &attention.query, all),
            keys: of_all(|attention| &attention.key, keys),
            values: of_all(|attention| &attention.value, keys),
            outputs: of_all(|attention| &attention.output, all),
            config: first.config.clone(),
        }
    }

    /// `[batch, tokens, hidden] -> [batch, tokens, hidden]`, with the weights of the attentions, `[batch * tokens,
    /// attentions]`.
    pub fn forward(&self, x: Tensor<3>) -> (Tensor<3>, Tensor<2>) {
        let [batch, tokens, hidden] = x.dims();
        let weights = Score::Softmax.of(logits(x.clone().reshape([batch * tokens, hidden]), &self.router));
        let mut sum = None;
        for (expert, (query, output)) in self.queries.iter().zip(&self.outputs).enumerate() {
            let of = expert.min(self.keys.len() - 1);
            let attention = Attention {
                query: query.clone(),
                query_down: None,
                query_latent_norm: None,
                key: self.keys[of].clone(),
                value: self.values[of].clone(),
                latent_norm: None,
                output: output.clone(),
                query_norm: None,
                key_norm: None,
                config: self.config.clone(),
            };
            let weight = weights.clone().narrow(1, expert, 1).reshape([batch, tokens, 1]).cast(x.dtype());
            let weighted = attention.forward(x.clone()) * weight;
            sum = Some(match sum {
                Some(sum) => sum + weighted,
                None => weighted,
            });
        }
        (sum.unwrap_or_else(|| x.zeros_like()), weights)
    }
}

//! A decoder of the modules of this crate.

mod attention;
#[cfg(feature = "checkpoint")]
mod load;
#[cfg(feature = "checkpoint")]
mod save;

pub use attention::{Attention, AttentionConfig, LatentConfig, QkNorm};
#[cfg(feature = "checkpoint")]
pub use load::LoadError;

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Initializer, Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor};

use crate::experts::{FeedForward, FeedForwardConfig};
use crate::layer::{MoeConfig, SwigluMoe};
use crate::losses;
use crate::routing::{RouteContext, Routing};

/// Configuration of a [`MoeTransformer`].
#[derive(Config, Debug)]
pub struct TransformerConfig {
    /// The number of token ids.
    pub vocab_size: usize,
    /// Hidden size.
    pub d_model: usize,
    /// The number of layers.
    pub num_layers: usize,
    /// Attention, the same in all layers.
    pub attention: AttentionConfig,
    /// Experts, the same in all layers that have some; its `d_model` is replaced by that above.
    pub moe: MoeConfig,
    /// Layers with a dense network instead of experts.
    #[config(default = "Vec::new()")]
    pub dense_layers: Vec<usize>,
    /// Width of those networks.
    #[config(default = 0)]
    pub d_ff: usize,
    /// Epsilon of the norms.
    #[config(default = 1e-6)]
    pub norm_eps: f64,
    /// Whether the head is the embedding.
    #[config(default = false)]
    pub tie_embeddings: bool,
}

/// One layer: `x + attention(norm(x))`, then `x + experts(norm(x))`.
#[derive(Module, Debug)]
pub struct Block {
    /// Norm before the attention.
    pub attention_norm: RmsNorm,
    /// The attention.
    pub attention: Attention,
    /// Norm before the experts.
    pub ffn_norm: RmsNorm,
    /// The experts.
    pub moe: Option<SwigluMoe>,
    /// The dense network of a layer without experts.
    pub dense: Option<FeedForward>,
}

/// A decoder with experts: what Qwen2-MoE, Qwen3-MoE, Mixtral, OLMoE and DeepSeek-V2 are.
///
/// ```
/// use burn::tensor::{Device, Int, Tensor, TensorData};
/// use moe_nn::{AttentionConfig, MoeConfig, TransformerConfig};
///
/// let device = Device::default().autodiff();
/// let model = TransformerConfig::new(50, 16, 2, AttentionConfig::new(4, 2, 4), MoeConfig::new(16, 8, 4)).init(&device);
/// let ids = Tensor::<2, Int>::from_data(TensorData::from([[1i64, 2, 3], [4, 5, 6]]), &device);
/// let output = model.forward(ids.clone());
/// assert_eq!((output.logits.dims(), output.routings.len()), ([2, 3, 50], 2));
/// let loss = output.next_token_loss(ids);
/// loss.backward();
/// ```
#[derive(Module, Debug)]
pub struct MoeTransformer {
    /// Token ids to hidden.
    pub embedding: Embedding,
    /// The layers.
    pub blocks: Vec<Block>,
    /// Norm before the head.
    pub norm: RmsNorm,
    /// Hidden to logits; none where the embedding is the head.
    pub head: Option<Linear>,
}

/// What a decoder returns.
#[derive(Clone, Debug)]
pub struct TransformerOutput {
    /// `[batch, tokens, vocabulary]`.
    pub logits: Tensor<3>,
    /// The routers' losses times their coefficients, summed over layers.
    pub router_loss: Option<Tensor<1>>,
    /// The routing of each layer that has experts.
    pub routings: Vec<Routing>,
}

impl TransformerOutput {
    /// The mean cross-entropy of the next token in nats, for the ids `[batch, tokens]` that the model read, without
    /// router losses.
    pub fn next_token_loss(&self, ids: Tensor<2, Int>) -> Tensor<1> {
        let [batch, tokens, vocabulary] = self.logits.dims();
        let rows = batch * (tokens - 1);
        let logits = self.logits.clone().narrow(1, 0, tokens - 1).reshape([rows, vocabulary]);
        let targets = ids.narrow(1, 1, tokens - 1).reshape([rows, 1]);
        -log_softmax(logits, 1).gather(1, targets).mean()
    }
}

impl TransformerConfig {
    /// Makes the model.
    ///
    /// # Panics
    ///
    /// If sizes do not fit together, as those of its parts say; if a dense layer does not exist or has no width.
    pub fn init(&self, device: &Device) -> MoeTransformer {
        let (d, layers) = (self.d_model, self.num_layers);
        if let Some(layer) = self.dense_layers.iter().find(|layer| **layer >= layers) {
            panic!("layer {layer} is to be dense, but there are {layers}");
        }
        assert!(self.dense_layers.is_empty() || self.d_ff > 0, "dense layers need a width, found 0");
        let norm = || RmsNormConfig::new(d).with_epsilon(self.norm_eps).init(device);
        let moe = MoeConfig { d_model: d, ..self.moe.clone() };
        let block = |layer: usize| {
            let dense = self.dense_layers.contains(&layer);
            Block {
                attention_norm: norm(),
                attention: self.attention.init(d, device),
                ffn_norm: norm(),
                moe: (!dense).then(|| moe.init(device)),
                dense: dense.then(|| FeedForwardConfig::new(d, self.d_ff).init(device)),
            }
        };
        let initializer = Initializer::Normal { mean: 0.0, std: 0.02 };
        MoeTransformer {
            embedding: EmbeddingConfig::new(self.vocab_size, d).with_initializer(initializer).init(device),
            blocks: (0..layers).map(block).collect(),
            norm: norm(),
            head: (!self.tie_embeddings).then(|| LinearConfig::new(d, self.vocab_size).with_bias(false).init(device)),
        }
    }
}

impl MoeTransformer {
    /// Runs the model on token ids `[batch, tokens]`, all sequences of one length.
    pub fn forward(&self, ids: Tensor<2, Int>) -> TransformerOutput {
        let mut x = self.embedding.forward(ids);
        let (mut router_loss, mut routings) = (None, Vec::new());
        for block in &self.blocks {
            x = x.clone() + block.attention.forward(block.attention_norm.forward(x));
            let read = block.ffn_norm.forward(x.clone());
            if let Some(moe) = &block.moe {
                let output = moe.forward_in(read, &RouteContext { causal: true, ..RouteContext::default() });
                x = x + output.hidden;
                router_loss = losses::add(router_loss, output.losses.total());
                routings.push(output.routing);
            } else if let Some(dense) = &block.dense {
                x = x + dense.forward(read);
            }
        }
        let x = self.norm.forward(x);
        let logits = match &self.head {
            Some(head) => head.forward(x),
            None => x.matmul(self.embedding.weight.val().transpose().unsqueeze()),
        };
        TransformerOutput { logits, router_loss, routings }
    }
}

//! Causal attention: grouped queries, or keys and values from a latent.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::tensor::activation::softmax;
use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

/// Norms of queries and keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum QkNorm {
    /// No norms.
    #[default]
    None,
    /// Of every head (Qwen3).
    Head,
    /// Of the whole projection (OLMoE).
    Projection,
}

/// Sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
#[derive(Config, Debug)]
pub struct LatentConfig {
    /// Rank of the latent of queries; none for a plain projection.
    pub q_rank: Option<usize>,
    /// Rank of the latent of keys and values.
    pub kv_rank: usize,
    /// Part of a head without position.
    pub nope_dim: usize,
    /// Part of a head that is rotated; its key is shared by all heads.
    pub rope_dim: usize,
    /// Width of a value head.
    pub v_dim: usize,
}

/// Configuration of [`Attention`].
#[derive(Config, Debug)]
pub struct AttentionConfig {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values, a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of a head, even; without meaning for latent attention.
    pub head_dim: usize,
    /// Base of the rotary embedding.
    #[config(default = 10000.0)]
    pub rope_theta: f64,
    /// Whether neighboring dimensions are turned together, instead of the two halves of a head.
    #[config(default = false)]
    pub interleaved: bool,
    /// Whether queries, keys and values have biases.
    #[config(default = false)]
    pub qkv_bias: bool,
    /// Whether the output has a bias.
    #[config(default = false)]
    pub output_bias: bool,
    /// Norms of queries and keys.
    #[config(default = "QkNorm::None")]
    pub qk_norm: QkNorm,
    /// Epsilon of those norms and of the norms of latents.
    #[config(default = 1e-6)]
    pub norm_eps: f64,
    /// Bound of queries, keys and values.
    pub clip: Option<f64>,
    /// Tokens that a query sees, itself included; none for all before it.
    pub window: Option<usize>,
    /// Latent attention instead of grouped queries.
    pub latent: Option<LatentConfig>,
    /// Factor on the dot products where it is not `1 / sqrt(width of a query head)`.
    pub scale: Option<f64>,
}

/// Causal attention of one layer.
#[derive(Module, Debug)]
pub struct Attention {
    /// Hidden to queries; with a latent of queries, from that.
    pub query: Linear,
    /// Hidden to the latent of queries.
    pub query_down: Option<Linear>,
    /// Norm of that latent.
    pub query_latent_norm: Option<RmsNorm>,
    /// Hidden to keys; in latent attention, to the latent and the rotated key.
    pub key: Linear,
    /// Hidden to values; in latent attention, from the latent to keys and values.
    pub value: Linear,
    /// Norm of the latent of keys and values.
    pub latent_norm: Option<RmsNorm>,
    /// Values to hidden.
    pub output: Linear,
    /// Norm of queries.
    pub query_norm: Option<RmsNorm>,
    /// Norm of keys.
    pub key_norm: Option<RmsNorm>,
    /// The sizes.
    #[module(skip)]
    pub config: AttentionConfig,
}

impl AttentionConfig {
    /// Makes the attention of a layer.
    ///
    /// # Panics
    ///
    /// If heads of keys do not divide those of queries, or a rotated width is odd.
    pub fn init(&self, d_model: usize, device: &Device) -> Attention {
        assert!(self.heads.is_multiple_of(self.kv_heads), "{} heads of {} keys", self.heads, self.kv_heads);
        assert!(self.rotary_dim().is_multiple_of(2), "the rotated width {} is odd", self.rotary_dim());
        let linear = |from: usize, to: usize, bias: bool| LinearConfig::new(from, to).with_bias(bias).init(device);
        let norm = |width: usize| RmsNormConfig::new(width).with_epsilon(self.norm_eps).init(device);
        let Some(latent) = &self.latent else {
            let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
            let widths = match self.qk_norm {
                QkNorm::None => None,
                QkNorm::Head => Some((self.head_dim, self.head_dim)),
                QkNorm::Projection => Some((queries, keys)),
            };
            return Attention {
                query: linear(d_model, queries, self.qkv_bias),
                query_down: None,
                query_latent_norm: None,
                key: linear(d_model, keys, self.qkv_bias),
                value: linear(d_model, keys, self.qkv_bias),
                latent_norm: None,
                output: linear(queries, d_model, self.output_bias),
                query_norm: widths.map(|(width, _)| norm(width)),
                key_norm: widths.map(|(_, width)| norm(width)),
                config: self.clone(),
            };
        };
        let queries = self.heads * (latent.nope_dim + latent.rope_dim);
        Attention {
            query: linear(latent.q_rank.unwrap_or(d_model), queries, false),
            query_down: latent.q_rank.map(|rank| linear(d_model, rank, false)),
            query_latent_norm: latent.q_rank.map(norm),
            key: linear(d_model, latent.kv_rank + latent.rope_dim, false),
            value: linear(latent.kv_rank, self.heads * (latent.nope_dim + latent.v_dim), false),
            latent_norm: Some(norm(latent.kv_rank)),
            output: linear(self.heads * latent.v_dim, d_model, self.output_bias),
            query_norm: None,
            key_norm: None,
            config: self.clone(),
        }
    }

    fn rotary_dim(&self) -> usize {
        self.latent.as_ref().map_or(self.head_dim, |latent| latent.rope_dim)
    }
}

/// Turns `[batch, heads, tokens, width]` by the position of each token, from 0.
fn rotated(x: Tensor<4>, theta: f64, interleaved: bool) -> Tensor<4> {
    let [batch, heads, tokens, width] = x.dims();
    let (half, device) = (width / 2, x.device());
    let angle = |token: usize, pair: usize| token as f64 * theta.powf(-2.0 * pair as f64 / width as f64);
    let table = |of: fn(f64) -> f64| {
        let values = (0..tokens).flat_map(|t| (0..half).map(move |pair| of(angle(t, pair)) as f32));
        Tensor::<4>::from_data(TensorData::new(values.collect::<Vec<f32>>(), [1, 1, tokens, half]), &device)
    };
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    if interleaved {
        let pairs = x.reshape([batch, heads, tokens, half, 2]);
        let part = |i: usize| pairs.clone().narrow(4, i, 1).reshape([batch, heads, tokens, half]);
        let (a, b) = (part(0), part(1));
        let turned = [a.clone() * cos.clone() - b.clone() * sin.clone(), b * cos + a * sin];
        return Tensor::stack::<5>(turned.to_vec(), 4).reshape([batch, heads, tokens, width]);
    }
    let (a, b) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    Tensor::cat(vec![a.clone() * cos.clone() - b.clone() * sin.clone(), b * cos + a * sin], 3)
}

impl Attention {
    /// `[batch, tokens, hidden] -> [batch, tokens, hidden]`; a token sees itself and those before it.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        let (q, k, v) = match self.config.latent.clone() {
            Some(latent) => self.through_latent(x, &latent),
            None => self.grouped(x),
        };
        let width = q.dims()[3];
        let scale = self.config.scale.unwrap_or((width as f64).powf(-0.5));
        let scores = q.matmul(k.transpose()) * scale + self.mask(tokens, &v.device());
        let values = softmax(scores, 3).matmul(v); // [batch, heads, tokens, width of a value]
        let [_, heads, _, width] = values.dims();
        self.output.forward(values.swap_dims(1, 2).reshape([batch, tokens, heads * width]))
    }

    fn mask(&self, tokens: usize, device: &Device) -> Tensor<4> {
        let window = self.config.window.unwrap_or(usize::MAX);
        let seen = |query: usize, key: usize| key <= query && query - key < window;
        let rows = (0..tokens).flat_map(|q| (0..tokens).map(move |k| if seen(q, k) { 0.0 } else { f32::NEG_INFINITY }));
        Tensor::from_data(TensorData::new(rows.collect::<Vec<f32>>(), [1, 1, tokens, tokens]), device)
    }

    fn grouped(&self, x: Tensor<3>) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
        let [batch, tokens, _] = x.dims();
        let config = &self.config;
        let (heads, kv_heads, width) = (config.heads, config.kv_heads, config.head_dim);
        let whole = |linear: &Linear, norm: Option<&RmsNorm>| {
            let projected = linear.forward(x.clone());
            let projected = match norm.filter(|_| config.qk_norm == QkNorm::Projection) {
                Some(norm) => norm.forward(projected),
                None => projected,
            };
            match config.clip {
                Some(clip) => projected.clamp(-clip, clip),
                None => projected,
            }
        };
        let split = |x: Tensor<3>, heads: usize| x.reshape([batch, tokens, heads, width]).swap_dims(1, 2);
        let per_head = |x: Tensor<4>, norm: Option<&RmsNorm>| match norm.filter(|_| config.qk_norm == QkNorm::Head) {
            Some(norm) => norm.forward(x),
            None => x,
        };
        let turned = |x: Tensor<4>| rotated(x, config.rope_theta, config.interleaved);
        let (query_norm, key_norm) = (self.query_norm.as_ref(), self.key_norm.as_ref());
        let q = turned(per_head(split(whole(&self.query, query_norm), heads), query_norm));
        let k = turned(per_head(split(whole(&self.key, key_norm), kv_heads), key_norm));
        let v = split(whole(&self.value, None), kv_heads);
        let group = heads / kv_heads;
        let repeated = |x: Tensor<4>| match group {
            1 => x,
            _ => x.unsqueeze_dim::<5>(2).repeat_dim(2, group).reshape([batch, heads, tokens, width]),
        };
        (q, repeated(k), repeated(v))
    }

    fn through_latent(&self, x: Tensor<3>, latent: &LatentConfig) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
        let [batch, tokens, _] = x.dims();
        let config = &self.config;
        let (heads, nope, rope, v_dim) = (config.heads, latent.nope_dim, latent.rope_dim, latent.v_dim);
        let turned = |x: Tensor<4>| rotated(x, config.rope_theta, config.interleaved);
        let normed = |norm: &Option<RmsNorm>, x: Tensor<3>| match norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        let queries = match &self.query_down {
            Some(down) => self.query.forward(normed(&self.query_latent_norm, down.forward(x.clone()))),
            None => self.query.forward(x.clone()),
        };
        let queries = queries.reshape([batch, tokens, heads, nope + rope]).swap_dims(1, 2);
        let q = Tensor::cat(vec![queries.clone().narrow(3, 0, nope), turned(queries.narrow(3, nope, rope))], 3);
        let down = self.key.forward(x); // [batch, tokens, rank + rope]
        let inner = normed(&self.latent_norm, down.clone().narrow(2, 0, latent.kv_rank));
        let key = down.narrow(2, latent.kv_rank, rope).reshape([batch, 1, tokens, rope]);
        let key = turned(key).repeat_dim(1, heads);
        let up = self.value.forward(inner).reshape([batch, tokens, heads, nope + v_dim]).swap_dims(1, 2);
        let k = Tensor::cat(vec![up.clone().narrow(3, 0, nope), key], 3);
        (q, k, up.narrow(3, nope, v_dim))
    }
}

//! From a checkpoint.
//!
//! Reading goes through `moe-checkpoint` and not through `burn-store`, which maps tensors to parameters of the same
//! shape: here one parameter holds the matrices of all experts of a layer, and files have them apart, fused, transposed
//! or quantized. What is read is what the engine runs.

use burn::module::Param;
use burn::nn::{Embedding, Linear, RmsNorm};
use burn::tensor::{Device, Tensor, TensorData};
use moe_checkpoint::{
    Activation as CheckpointActivation, AttentionKind, Checkpoint, ExpertBiases, ExpertPart, Ffn, GroupScore,
    LayerRole, Mixer, ModelConfig, Multipliers, NormKind, NormPlacement, OutputGate, QkNorm as CheckpointQkNorm, Role,
    RopeScaling, RoutingKind,
};

use super::{Attention, AttentionConfig, Block, LatentConfig, MoeTransformer, QkNorm, TransformerConfig};
use crate::experts::{
    Activation, FeedForward, FeedForwardConfig, GatedExperts, GatedExpertsConfig, SharedExpert, SharedExpertConfig,
};
use crate::layer::{MoeConfig, MoeLayer, SwigluMoe};
use crate::router::{GroupLimit, TopKRouterConfig};
use crate::routing::{Combine, Score};

/// What stands between a checkpoint and a [`MoeTransformer`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The checkpoint cannot be read or written.
    #[error(transparent)]
    Checkpoint(Box<moe_checkpoint::Error>),
    /// The model has what these modules have not, or the other way round.
    #[error("{what} cannot be represented: {}", .reasons.join("; "))]
    NotRepresentable {
        /// The model.
        what: String,
        /// Everything that stands against it.
        reasons: Vec<String>,
    },
}

impl From<moe_checkpoint::Error> for LoadError {
    fn from(error: moe_checkpoint::Error) -> Self {
        Self::Checkpoint(Box::new(error))
    }
}

/// The configuration of the modules that a checkpoint's config describes.
fn described(config: &ModelConfig) -> Result<TransformerConfig, LoadError> {
    let mut reasons = Vec::new();
    let mut refuse = |unless: bool, reason: &str| {
        if !unless {
            reasons.push(reason.to_string());
        }
    };
    let attention = &config.attention;
    refuse(config.norm == NormKind::Rms, "its norms are no RMS norms");
    refuse(config.placement == NormPlacement::Before, "it has norms after the halves of a layer");
    refuse(config.final_norm_eps.is_none(), "the norm before its head has an epsilon of its own");
    let factors = config.multipliers != Multipliers::default() || config.normed_residual.is_some();
    refuse(!factors, "it has factors on the residual stream");
    refuse(config.logit_cap.is_none() && !config.head_bias, "its logits are bounded or biased");
    refuse(config.local.is_none() && !config.layer_scale, "layers have attention or factors of their own");
    refuse(config.rope.scaling == RopeScaling::Default, "its rotary embedding is scaled");
    let plain = attention.gate == OutputGate::None
        && !attention.packed
        && !attention.tied_values
        && !attention.value_norm
        && !attention.norm_after_rotation
        && attention.growth.is_none()
        && attention.selects.is_none()
        && !attention.sinks
        && attention.qk_norm != CheckpointQkNorm::Unit;
    refuse(plain, "its attention has gates, sinks, an indexer or other extras");
    let layers = &config.layers;
    let same = layers.iter().all(|layer| {
        layer.mixer == Mixer::Attention
            && layer.rotary
            && layer.chunk.is_none()
            && layer.sliding_window == layers[0].sliding_window
    });
    refuse(same, "its layers differ in what looks at other tokens");
    let latent = match &attention.kind {
        AttentionKind::Grouped => {
            refuse(attention.rotary_dim == attention.head_dim, "a part of the head is rotated");
            None
        }
        AttentionKind::Latent(latent) => {
            refuse(!attention.qkv_bias, "its latent attention has biases");
            Some(LatentConfig {
                q_rank: latent.q_lora_rank,
                kv_rank: latent.kv_lora_rank,
                nope_dim: latent.qk_nope_head_dim,
                rope_dim: latent.qk_rope_head_dim,
                v_dim: latent.v_head_dim,
            })
        }
        _ => {
            refuse(false, "its attention is not described");
            None
        }
    };
    let routing = &config.routing;
    let groups = |groups: moe_checkpoint::Groups| GroupLimit {
        groups: groups.count,
        chosen: groups.top,
        by_best: if groups.score == GroupScore::TopTwoSum { 2 } else { 1 },
    };
    let (combine, limit) = match routing.kind {
        RoutingKind::SoftmaxTopK { renormalize: true } => (Combine::Renormalize, None),
        RoutingKind::SoftmaxTopK { renormalize: false } => (Combine::Raw, None),
        RoutingKind::TopKSoftmax => (Combine::SoftmaxOfChosen, None),
        RoutingKind::SoftmaxGroupTopK { groups: found } => (Combine::Raw, Some(groups(found))),
        _ => {
            refuse(false, "its routing is no softmax");
            (Combine::Raw, None)
        }
    };
    let plain = !routing.bias && !routing.on_inputs && !routing.own_norm && !routing.expert_scales;
    refuse(plain, "its router has biases, norms or factors of its own");
    let activation = match config.hidden_act {
        CheckpointActivation::Silu => Activation::Silu,
        CheckpointActivation::Gelu => Activation::Gelu,
        CheckpointActivation::GeluTanh => Activation::GeluTanh,
        CheckpointActivation::Relu => Activation::Relu,
        _ => {
            refuse(false, "its activation is clamped");
            Activation::Silu
        }
    };
    let mut found: Option<&moe_checkpoint::MoeConfig> = None;
    let (mut dense_layers, mut d_ff) = (Vec::new(), 0);
    for (layer, of_layer) in layers.iter().enumerate() {
        match &of_layer.ffn {
            Ffn::Moe(moe) => {
                let plain = moe.biases == ExpertBiases::None && !moe.gateless && moe.sets.is_none();
                refuse(plain, "its experts have biases or no gate, or share weights");
                refuse(found.is_none_or(|found| found == moe), "its layers have different experts");
                refuse(moe.widths.iter().all(|width| *width == moe.widths[0]), "its experts have different widths");
                if let Some(shared) = &moe.shared {
                    let plain = !shared.packed
                        && !shared.apart
                        && !shared.gateless
                        && !shared.averaged
                        && shared.limit.is_none();
                    refuse(plain, "its shared expert is packed, apart, averaged or without a gate");
                }
                found = Some(moe);
            }
            Ffn::Dense { intermediate_size, gateless } => {
                refuse(
                    !gateless && (d_ff == 0 || d_ff == *intermediate_size),
                    "its dense layers differ or have no gate",
                );
                d_ff = *intermediate_size;
                dense_layers.push(layer);
            }
            Ffn::None => refuse(false, "it has layers of one half"),
        }
    }
    let Some(moe) = found.filter(|_| reasons.is_empty()) else {
        reasons.sort();
        reasons.dedup();
        return Err(LoadError::NotRepresentable { what: format!("`{}`", config.model_type), reasons });
    };
    let router = TopKRouterConfig::new(config.hidden_size, moe.num_experts())
        .with_combine(combine)
        .with_score(Score::Softmax)
        .with_scale(f64::from(routing.scale))
        .with_groups(limit);
    let shared = moe.shared.as_ref().map(|shared| {
        SharedExpertConfig::new(config.hidden_size, shared.intermediate_size)
            .with_gated(shared.gated)
            .with_activation(activation)
    });
    let moe = MoeConfig::new(config.hidden_size, moe.widths[0], moe.num_experts())
        .with_top_k(routing.top_k)
        .with_router(Some(router))
        .with_shared(shared)
        .with_activation(activation);
    let norm_eps = match &attention.kind {
        AttentionKind::Latent(latent) => latent.norm_eps,
        _ => config.norm_eps,
    };
    let attention = AttentionConfig::new(attention.num_heads, attention.num_kv_heads, attention.head_dim)
        .with_rope_theta(config.rope.theta)
        .with_interleaved(config.rope.interleaved)
        .with_qkv_bias(attention.qkv_bias)
        .with_output_bias(attention.output_bias)
        .with_qk_norm(match attention.qk_norm {
            CheckpointQkNorm::Head => QkNorm::Head,
            CheckpointQkNorm::Projection => QkNorm::Projection,
            _ => QkNorm::None,
        })
        .with_norm_eps(norm_eps)
        .with_clip(attention.qkv_clip)
        .with_window(layers[0].sliding_window)
        .with_latent(latent)
        .with_scale(attention.scale);
    let transformer = TransformerConfig::new(config.vocab_size, config.hidden_size, layers.len(), attention, moe);
    Ok(transformer
        .with_dense_layers(dense_layers)
        .with_d_ff(d_ff)
        .with_norm_eps(config.norm_eps)
        .with_tie_embeddings(config.tie_word_embeddings))
}

/// Reads modules of one checkpoint onto one device.
struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    device: &'a Device,
}

type Loaded<T> = Result<T, LoadError>;

impl Reader<'_> {
    fn values<const D: usize>(&self, role: Role) -> Loaded<Tensor<D>> {
        let shape = self.checkpoint.role(role)?.shape.clone();
        let values = self.checkpoint.read_f32(role)?;
        Ok(Tensor::from_data(TensorData::new(values, shape), self.device))
    }

    fn linear(&self, weight: Role, bias: Option<Role>) -> Loaded<Linear> {
        // Files have `[out, in]`.
        let weight = self.values::<2>(weight)?.transpose();
        let bias = bias.map(|bias| self.values::<1>(bias)).transpose()?;
        Ok(Linear { weight: Param::from_tensor(weight), bias: bias.map(Param::from_tensor) })
    }

    fn norm(&self, weight: Role, epsilon: f64) -> Loaded<RmsNorm> {
        Ok(RmsNorm { gamma: Param::from_tensor(self.values::<1>(weight)?), epsilon })
    }

    fn attention(&self, config: &AttentionConfig, layer: usize) -> Loaded<Attention> {
        let role = |role| Role::Layer(layer, role);
        let bias = |of: LayerRole| config.qkv_bias.then_some(role(of));
        let output = self.linear(role(LayerRole::Output), config.output_bias.then_some(role(LayerRole::OutputBias)))?;
        let config = config.clone();
        let eps = config.norm_eps;
        if let Some(latent) = &config.latent {
            let (query, query_down, query_latent_norm) = match latent.q_rank {
                None => (self.linear(role(LayerRole::Query), None)?, None, None),
                Some(_) => (
                    self.linear(role(LayerRole::LatentQueryUp), None)?,
                    Some(self.linear(role(LayerRole::LatentQueryDown), None)?),
                    Some(self.norm(role(LayerRole::LatentQueryNorm), eps)?),
                ),
            };
            return Ok(Attention {
                query,
                query_down,
                query_latent_norm,
                key: self.linear(role(LayerRole::LatentKvDown), None)?,
                value: self.linear(role(LayerRole::LatentKvUp), None)?,
                latent_norm: Some(self.norm(role(LayerRole::LatentKvNorm), eps)?),
                output,
                query_norm: None,
                key_norm: None,
                config,
            });
        }
        let norm = |of| match config.qk_norm {
            QkNorm::None => Ok(None),
            QkNorm::Head | QkNorm::Projection => self.norm(role(of), eps).map(Some),
        };
        Ok(Attention {
            query: self.linear(role(LayerRole::Query), bias(LayerRole::QueryBias))?,
            query_down: None,
            query_latent_norm: None,
            key: self.linear(role(LayerRole::Key), bias(LayerRole::KeyBias))?,
            value: self.linear(role(LayerRole::Value), bias(LayerRole::ValueBias))?,
            latent_norm: None,
            output,
            query_norm: norm(LayerRole::QueryNorm)?,
            key_norm: norm(LayerRole::KeyNorm)?,
            config,
        })
    }

    fn network(&self, layer: usize, roles: [LayerRole; 3], activation: Activation) -> Loaded<FeedForward> {
        let [gate, up, down] = roles.map(|role| self.linear(Role::Layer(layer, role), None));
        // The sizes are those of the weights that replace these.
        let network = FeedForwardConfig::new(1, 1).with_activation(activation).init(self.device);
        Ok(FeedForward { gate: gate?, up: up?, down: down?, ..network })
    }

    fn experts(&self, config: &MoeConfig, layer: usize) -> Loaded<GatedExperts> {
        let (d, f, experts) = (config.d_model, config.d_ff, config.num_experts);
        let stacked = |part: ExpertPart| -> Loaded<Param<Tensor<3>>> {
            let mut values = Vec::with_capacity(experts * d * f);
            for expert in 0..experts {
                let lacking = || LoadError::NotRepresentable {
                    what: format!("layer {layer}"),
                    reasons: vec![format!("expert {expert} has no {part}")],
                };
                values.extend(self.checkpoint.expert_part(layer, expert, part)?.ok_or_else(lacking)?.to_f32());
                self.checkpoint.release_expert(layer, expert)?;
            }
            let (rows, columns) = part.dims(d, f);
            let stack = Tensor::<3>::from_data(TensorData::new(values, [experts, rows, columns]), self.device);
            Ok(Param::from_tensor(stack.transpose()))
        };
        let made = GatedExpertsConfig::new(1, 1, 1).with_activation(config.activation).init(self.device);
        Ok(GatedExperts {
            gate: stacked(ExpertPart::Gate)?,
            up: stacked(ExpertPart::Up)?,
            down: stacked(ExpertPart::Down)?,
            ..made
        })
    }

    fn moe(&self, config: &MoeConfig, layer: usize) -> Loaded<SwigluMoe> {
        let mut router = config.router_config().init(self.device);
        router.gate = self.linear(Role::Layer(layer, LayerRole::Router), None)?;
        let made = MoeLayer::new(router, self.experts(config, layer)?);
        let Some(shared) = &config.shared else { return Ok(made) };
        let roles = [LayerRole::SharedGate, LayerRole::SharedUp, LayerRole::SharedDown];
        let network = self.network(layer, roles, shared.activation)?;
        let gate = match shared.gated {
            true => Some(self.linear(Role::Layer(layer, LayerRole::SharedExpertGate), None)?),
            false => None,
        };
        Ok(made.with_shared(SharedExpert { network, gate }))
    }
}

impl MoeTransformer {
    /// Reads a checkpoint in f32: of the families of Qwen2-MoE, Qwen3-MoE, Mixtral, OLMoE, DeepSeek-V2 and whatever
    /// else has nothing that these modules lack. On an autodiff device it is ready to be trained.
    ///
    /// ```no_run
    /// use burn::tensor::Device;
    /// use moe_checkpoint::Checkpoint;
    /// use moe_nn::MoeTransformer;
    ///
    /// let checkpoint = Checkpoint::open("models/OLMoE-1B-7B")?;
    /// let (model, config) = MoeTransformer::from_checkpoint(&checkpoint, &Device::default().autodiff())?;
    /// println!("{config}");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`LoadError::NotRepresentable`], which lists everything that these modules lack, and those of reading.
    pub fn from_checkpoint(checkpoint: &Checkpoint, device: &Device) -> Result<(Self, TransformerConfig), LoadError> {
        let config = described(checkpoint.config())?;
        let reader = Reader { checkpoint, device };
        let mut blocks = Vec::with_capacity(config.num_layers);
        for layer in 0..config.num_layers {
            let dense = config.dense_layers.contains(&layer);
            let roles = [LayerRole::DenseGate, LayerRole::DenseUp, LayerRole::DenseDown];
            blocks.push(Block {
                attention_norm: reader.norm(Role::Layer(layer, LayerRole::AttentionNorm), config.norm_eps)?,
                attention: reader.attention(&config.attention, layer)?,
                ffn_norm: reader.norm(Role::Layer(layer, LayerRole::FfnNorm), config.norm_eps)?,
                moe: if dense { None } else { Some(reader.moe(&config.moe, layer)?) },
                dense: match dense {
                    true => Some(reader.network(layer, roles, config.moe.activation)?),
                    false => None,
                },
            });
        }
        let model = Self {
            embedding: Embedding { weight: Param::from_tensor(reader.values::<2>(Role::Embedding)?) },
            blocks,
            norm: reader.norm(Role::FinalNorm, config.norm_eps)?,
            head: if config.tie_embeddings { None } else { Some(reader.linear(Role::LmHead, None)?) },
        };
        Ok((model, config))
    }
}

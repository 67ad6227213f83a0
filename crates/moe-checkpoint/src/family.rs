//! What a model family is: how its `config.json` reads and what its tensors are called.
//!
//! A family is one file in `families/` and one line in its registry.

use std::fmt;

use serde_json::Value;

use crate::config::ModelConfig;
use crate::experts::{ExpertLayout, ExpertTensor};
use crate::families::{DENSE, FAMILIES, names};
use crate::human::variant;
use crate::json::Fields;
use crate::naming;
use crate::{Error, Result};

/// File name in error messages about a config whose directory is not known.
pub(crate) const CONFIG: &str = "config.json";

/// A tensor by what it does, whatever a family calls it. Shapes: `H` hidden size, `V` vocabulary, `E` experts,
/// `D` head dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Token embedding `[V, H]`.
    Embedding,
    /// Norm before the head `[H]`.
    FinalNorm,
    /// Bias of the norm before the head `[H]`.
    FinalNormBias,
    /// Head `[V, H]`; the embedding in a model with tied embeddings.
    LmHead,
    /// Bias of the head `[V]`.
    LmHeadBias,
    /// Rows of the [inputs of layers](crate::LayerInputs) by token `[V_P, layers * P]`.
    LayerInputEmbedding,
    /// Projection of the embedding to the inputs of all layers `[layers * P, H]`.
    LayerInputProjection,
    /// Norm of what that gives for each layer `[P]`.
    LayerInputNorm,
    /// Map of the weights of several residual streams in what the head reads `[n, n H]`.
    HeadStreams,
    /// Its bias `[n]`.
    HeadStreamsBase,
    /// Its scale `[1]`.
    HeadStreamsScale,
    /// A tensor of a decoder layer.
    Layer(usize, LayerRole),
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layer(layer, role) => write!(f, "{role} of layer {layer}"),
            _ => f.write_str(&variant(self)),
        }
    }
}

impl fmt::Display for LayerRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&variant(self))
    }
}

/// A tensor of a decoder layer other than its routed experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerRole {
    /// Norm before the attention `[H]`.
    AttentionNorm,
    /// Bias of the norm before the attention `[H]`.
    AttentionNormBias,
    /// Norm before the FFN `[H]`.
    FfnNorm,
    /// Bias of the norm before the FFN `[H]`.
    FfnNormBias,
    /// Norm of what the attention gives `[H]`.
    AttentionOutputNorm,
    /// Norm of what the FFN gives `[H]`.
    FfnOutputNorm,
    /// Norm of what a shared expert apart from the others reads `[H]`.
    SharedNorm,
    /// Norm of what a shared expert apart from the others gives `[H]`.
    SharedOutputNorm,
    /// Norm of what the routed experts beside it give `[H]`.
    ExpertsOutputNorm,
    /// Factor on the output of the layer `[1]`.
    LayerScale,
    /// Gate on the layer's own input `[P, H]`; see [`LayerInputs`](crate::LayerInputs).
    LayerInputGate,
    /// Projection of the gated input to the residual stream `[H, P]`.
    LayerInputOutput,
    /// Norm of what that gives `[H]`.
    LayerInputOutputNorm,
    /// Projections of queries, keys and values in one `[(heads + 2 kv_heads) * D, H]`.
    Qkv,
    /// Projection of the gates on the outputs of the heads `[heads * D, H]`; one per head `[heads, H]`.
    AttentionGate,
    /// Query projection `[heads * D, H]`; in latent attention, where queries have no latent.
    Query,
    /// Key projection `[kv_heads * D, H]`.
    Key,
    /// Value projection `[kv_heads * D, H]`.
    Value,
    /// Output projection `[H, heads * D]`, `D` that of the values.
    Output,
    /// Bias of the query projection `[heads * D]`.
    QueryBias,
    /// Bias of the key projection `[kv_heads * D]`.
    KeyBias,
    /// Bias of the value projection `[kv_heads * D]`.
    ValueBias,
    /// Bias of the output projection `[H]`.
    OutputBias,
    /// Norm of each query head `[D]` or of all `[heads * D]`.
    QueryNorm,
    /// Norm of each key head `[D]` or of all `[kv_heads * D]`.
    KeyNorm,
    /// Logit per head that takes part in the softmax without a value `[heads]`.
    Sinks,
    /// Queries, keys and values of gated DeltaNet `[2 key_heads * D_k + value_heads * D_v, H]`.
    DeltaQkv,
    /// Gate on the output of gated DeltaNet `[value_heads * D_v, H]`.
    DeltaGate,
    /// Down projection of the gate on the output of Kimi delta attention `[D, H]`.
    DeltaGateDown,
    /// Up projection of that `[heads * D, D]`.
    DeltaGateUp,
    /// How much every head of a delta rule writes `[value_heads, H]`.
    DeltaBeta,
    /// How fast every head of gated DeltaNet forgets `[value_heads, H]`; every channel of Kimi delta attention
    /// `[heads * D, H]`.
    DeltaDecay,
    /// Down projection of how fast channels of Kimi delta attention forget `[D, H]`.
    DeltaDecayDown,
    /// Up projection of that `[heads * D, D]`.
    DeltaDecayUp,
    /// Convolution of the queries of Kimi delta attention `[heads * D, 1, K]`.
    QueryConvolution,
    /// Convolution of its keys `[heads * D, 1, K]`.
    KeyConvolution,
    /// Convolution of its values `[heads * D, 1, K]`.
    ValueConvolution,
    /// Queries, keys, values and gates of gated DeltaNet, per key head `[2 key_heads * D_k + 2 value_heads * D_v, H]`.
    DeltaQkvGate,
    /// How much every head of gated DeltaNet writes and how fast it forgets, per key head `[2 value_heads, H]`.
    DeltaBetaDecay,
    /// Convolution of queries, keys and values `[2 key_heads * D_k + value_heads * D_v, 1, K]`.
    DeltaConvolution,
    /// Logarithm of the rate of forgetting, one per head.
    DeltaRate,
    /// Added to what [`DeltaDecay`](Self::DeltaDecay) gives `[value_heads]`, `[heads * D]` in Kimi delta attention.
    DeltaRateBias,
    /// Norm of every head of the output of gated DeltaNet `[D_v]`.
    DeltaNorm,
    /// Output projection of gated DeltaNet `[H, value_heads * D_v]`.
    DeltaOutput,
    /// Gate, inputs and steps of a state space layer `[2 heads * P + 2 groups * N + heads, H]`.
    MambaInput,
    /// Convolution of its inputs `[heads * P + 2 groups * N, 1, K]`.
    MambaConvolution,
    /// Bias of that `[heads * P + 2 groups * N]`.
    MambaConvolutionBias,
    /// Logarithm of its rates `[heads]`.
    MambaRate,
    /// Added to its steps `[heads]`.
    MambaStepBias,
    /// Factor on its input that is added to its output `[heads]`.
    MambaSkip,
    /// Norm of its output `[heads * P]`.
    MambaNorm,
    /// Output projection of a state space layer `[H, heads * P]`.
    MambaOutput,
    /// Queries, keys and values of lightning attention, head by head `[3 heads * D, H]`.
    LightningQkv,
    /// Gate on its output `[heads * D, H]`.
    LightningGate,
    /// Norm of its output `[heads * D]`.
    LightningNorm,
    /// Its output projection `[H, heads * D]`.
    LightningOutput,
    /// Rates at which its heads forget `[heads, 1, 1]`, which files may leave out.
    LightningRate,
    /// Both gates and the input of a short convolution `[3 H, H]`.
    ConvolutionInput,
    /// A short convolution `[H, 1, K]`.
    ConvolutionTaps,
    /// Output projection of a short convolution `[H, H]`.
    ConvolutionOutput,
    /// Projection down to the latent of queries `[q_lora_rank, H]`.
    LatentQueryDown,
    /// Its bias `[q_lora_rank]`.
    LatentQueryDownBias,
    /// Norm of the latent of queries `[q_lora_rank]`.
    LatentQueryNorm,
    /// Projection from the latent to the queries `[heads * D, q_lora_rank]`.
    LatentQueryUp,
    /// Projection down to the latent of keys and values, and to the rotary key `[kv_lora_rank + qk_rope_head_dim, H]`.
    LatentKvDown,
    /// Its bias `[kv_lora_rank + qk_rope_head_dim]`.
    LatentKvDownBias,
    /// Norm of the latent of keys and values `[kv_lora_rank]`.
    LatentKvNorm,
    /// Projection from the latent `[heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank]`.
    LatentKvUp,
    /// Map of several residual streams before the attention `[(2 + n) n, n H]`.
    AttentionStreams,
    /// Its bias `[(2 + n) n]`.
    AttentionStreamsBase,
    /// Its scales: of the weights, of the multiples and of the mixture `[3]`.
    AttentionStreamsScale,
    /// The same map before the FFN `[(2 + n) n, n H]`.
    FfnStreams,
    /// Its bias `[(2 + n) n]`.
    FfnStreamsBase,
    /// Its scales `[3]`.
    FfnStreamsScale,
    /// Projection to the one head of keys that are values, too `[D, H]`.
    KeyValue,
    /// Output projections of groups of heads, one below the other `[groups * R, heads * D / groups]`.
    OutputGroups,
    /// Projection of what they give `[H, groups * R]`.
    OutputJoin,
    /// Projection to the keys that are compressed, one or two per token `[D, H]` or `[2 D, H]`.
    CompressorKey,
    /// Projection to the logits of their weights, of the same shape.
    CompressorGate,
    /// Bias on those, for each place in a group `[rate, D]` or `[rate, 2 D]`.
    CompressorBias,
    /// Norm of compressed keys `[D]`.
    CompressorNorm,
    /// Projection to the keys that an indexer compresses `[2 D, H]`, D the width of its heads.
    IndexerCompressorKey,
    /// Projection to the logits of their weights `[2 D, H]`.
    IndexerCompressorGate,
    /// Bias on those `[rate, 2 D]`.
    IndexerCompressorBias,
    /// Norm of the compressed keys of an indexer `[D]`.
    IndexerCompressorNorm,
    /// Router of a mixture of attention heads `[E, H]`.
    HeadRouter,
    /// Query projections of its experts `[E, kv_heads * D, H]`.
    HeadQueries,
    /// Output projections of its experts `[E, H, kv_heads * D]`.
    HeadOutputs,
    /// Added to what it gives `[H]`.
    HeadBias,
    /// Projection of its keys, then of its values `[2 kv_heads * D, H]`.
    HeadKeyValue,
    /// Added to the sum of what routed experts give `[H]`.
    ExpertsBias,
    /// Queries of an indexer, from the latent of queries `[index_heads * index_dim, q_lora_rank]`.
    IndexerQuery,
    /// Keys of an indexer, one head `[index_dim, H]`.
    IndexerKey,
    /// Weight of the LayerNorm of those `[index_dim]`.
    IndexerKeyNorm,
    /// Its bias `[index_dim]`.
    IndexerKeyNormBias,
    /// Weights of the heads of an indexer `[index_heads, H]`.
    IndexerHeads,
    /// Router `[E, H]`.
    Router,
    /// Bias on the router logits `[E]`.
    RouterBias,
    /// Bias on the selection of experts, not on their weights; `E` elements.
    CorrectionBias,
    /// The experts of every token of the vocabulary, whole numbers `[V, k]`, in layers that route by a table.
    ExpertTable,
    /// Weight of the norm of what the router reads, less the factor `H^-0.5` `[H]`.
    RouterNorm,
    /// Factors on the weights of the experts `[E]`.
    ExpertScale,
    /// Projection of what routed experts read down to their latent `[L, H]`.
    ExpertLatentDown,
    /// Projection of what they give together up from it `[H, L]`.
    ExpertLatentUp,
    /// Gate and up projection of the shared expert in one `[2 I, H]`.
    SharedGateUp,
    /// Gate projection of the shared expert `[I, H]`.
    SharedGate,
    /// Up projection of the shared expert `[I, H]`.
    SharedUp,
    /// Down projection of the shared expert `[H, I]`.
    SharedDown,
    /// Gate on the output of the shared expert `[1, H]`.
    SharedExpertGate,
    /// Gate projection of a dense layer `[I, H]`.
    DenseGate,
    /// Up projection of a dense layer `[I, H]`.
    DenseUp,
    /// Down projection of a dense layer `[H, I]`.
    DenseDown,
}

/// Reads the configs and names the tensors of one model family.
pub trait Family: Send + Sync {
    /// `model_type` of its configs.
    fn model_type(&self) -> &'static str;

    /// Reads `config.json`, with the end-of-text ids of `generation_config.json` where there is one.
    ///
    /// # Errors
    /// A missing, malformed or contradictory field, named.
    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig>;

    /// Name of a tensor in the checkpoint; by default as most decoder models of transformers have it.
    fn tensor_name(&self, role: Role) -> String {
        names::tensor_name(role)
    }

    /// Name of a tensor that holds routed experts, in any of the layouts. The layout of a checkpoint is told by which
    /// of these names it has. By default `mlp.experts` of its layer.
    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        names::expert_tensor_name(layer, tensor)
    }

    /// Whether files may hold gate and up projections under the numbers that follow those of the routed experts, which
    /// nothing reads: transformers gives them to identity experts when it saves, and asks for them when it loads.
    fn identity_expert_tensors(&self) -> bool {
        false
    }

    /// Layouts that routed experts of this family may have on disk.
    fn layouts(&self) -> &'static [ExpertLayout] {
        &[ExpertLayout::PerExpert, ExpertLayout::Fused, ExpertLayout::Transposed, ExpertLayout::Ragged]
    }

    /// The layout that stock loaders read when nothing else is known: where a ragged checkpoint goes back to one width.
    fn stock_layout(&self) -> ExpertLayout {
        ExpertLayout::PerExpert
    }

    /// Config key of the number of shared experts in families whose shared experts have together that many times the
    /// width of a routed one.
    fn shared_count_key(&self) -> Option<&'static str> {
        None
    }

    /// Whether the shared expert has the width of a routed one, and a config no other number for it: then no export
    /// gives the routed ones another width.
    fn shared_follows_width(&self) -> bool {
        false
    }

    /// Where a config has the text model's fields, if that is a part of it in models with other modalities: keys from
    /// the outermost in, separated by dots.
    fn text_key(&self) -> Option<&'static str> {
        None
    }

    /// The object with the text model's fields; the config itself where there is none.
    fn text_config<'a>(&self, config: &'a Value) -> &'a Value {
        self.text_key().and_then(|place| naming::inner(config, place)).unwrap_or(config)
    }

    /// The same, to change it.
    fn text_config_mut<'a>(&self, config: &'a mut Value) -> &'a mut Value {
        match self.text_key().filter(|place| naming::inner(config, place).is_some()) {
            // Looked at twice, since what is borrowed to be given away cannot be fallen back from.
            Some(place) => naming::inner_mut(config, place).unwrap_or_else(|| unreachable!("it is there")),
            None => config,
        }
    }

    /// Other words for parts of the decoder, each a list of the family's words and those in their place: how
    /// transformers 5 calls in memory what a release called otherwise.
    fn other_words(&self) -> &'static [&'static [(&'static str, &'static str)]] {
        &[]
    }

    /// The same family by the names that other writers give its tensors, where a prefix or a few words do not say the
    /// difference.
    fn dialects(&self) -> &'static [&'static dyn Family] {
        &[]
    }

    /// Decoder layer that a tensor belongs to, by its name.
    fn layer_of(&self, name: &str) -> Option<usize> {
        names::layer_of(name)
    }

    /// Config key of the width of all routed experts.
    fn width_key(&self) -> &'static str {
        "moe_intermediate_size"
    }

    /// Config keys of the number of routed experts. A config has one of them, or several that agree.
    fn expert_count_keys(&self) -> &'static [&'static str];

    /// Whether transformers has a module for either matrix of the routed experts, whose parameter `weight` it is, in
    /// place of one module with both.
    fn expert_matrices_are_modules(&self) -> bool {
        false
    }

    /// Whether attention has as many experts as the feed-forward halves and takes as many for a token, and a config no
    /// other numbers for them: then an export that changes these changes attention, too, or is refused.
    fn attention_has_experts(&self) -> bool {
        false
    }

    /// Config keys of the number of experts per token. A config has the first of them, and maybe others that agree.
    fn top_k_keys(&self) -> &'static [&'static str] {
        &["num_experts_per_tok"]
    }

    /// Config keys of the number of groups of experts. A config with groups has one of them, or several that agree.
    fn group_count_keys(&self) -> &'static [&'static str] {
        &["n_group"]
    }

    /// Config keys that give the size of a tensor, for error messages.
    fn size_keys(&self, role: Role) -> &'static str {
        names::size_keys(role)
    }
}

/// Every family that is known.
pub fn families() -> &'static [&'static dyn Family] {
    FAMILIES
}

/// The family of this `model_type`.
///
/// # Errors
/// [`Error::UnknownFamily`], listing the known ones.
pub fn family(model_type: &str) -> Result<&'static dyn Family> {
    let found = families().iter().copied().find(|family| family.model_type() == model_type);
    found.ok_or_else(|| Error::UnknownFamily {
        file: CONFIG.to_string(),
        found: model_type.chars().take(80).collect(),
        known: known(),
    })
}

/// The family of a parsed `config.json`; that of the original model for a ragged checkpoint, and that of the text model
/// (`text_config`) for a wrapper without a family of its own.
///
/// # Errors
/// [`Error::MissingField`] without `model_type`, [`Error::NotMoe`] for a model without routed experts,
/// [`Error::UnknownFamily`] for another unknown `model_type`.
pub fn family_of(config: &Value) -> Result<&'static dyn Family> {
    let fields = Fields::new(config, CONFIG)?;
    let expected = || format!("one of the known families: {}", known());
    let model_type = fields.string("model_type")?.ok_or_else(|| fields.missing("model_type", expected()))?;
    family(model_type).or_else(|error| naming::wrapped(config, families()).ok_or(error)).map_err(|error| {
        if naming::mentions_experts(config) {
            return error;
        }
        let reason = format!(
            "config has model_type `{}` and no field about experts; known families: {}",
            model_type.chars().take(80).collect::<String>(),
            known()
        );
        Error::NotMoe { file: CONFIG.to_string(), reason }
    })
}

/// The dense family of a parsed `config.json`.
///
/// # Errors
/// [`Error::MissingField`] without `model_type`, [`Error::UnknownFamily`] for one that is not dense or not known.
pub(crate) fn dense_family_of(config: &Value) -> Result<&'static dyn Family> {
    let fields = Fields::new(config, CONFIG)?;
    let known = || DENSE.iter().map(|family| family.model_type()).collect::<Vec<_>>().join(", ");
    let expected = || format!("one of the dense families: {}", known());
    let model_type = fields.string("model_type")?.ok_or_else(|| fields.missing("model_type", expected()))?;
    let found = DENSE.iter().copied().find(|family| family.model_type() == model_type);
    found.ok_or_else(|| Error::UnknownFamily {
        file: CONFIG.to_string(),
        found: model_type.chars().take(80).collect(),
        known: format!("dense ones: {}", known()),
    })
}

fn known() -> String {
    families().iter().map(|family| family.model_type()).collect::<Vec<_>>().join(", ")
}

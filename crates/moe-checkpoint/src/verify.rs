//! Checks that the weights are those the config describes.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use safetensors::Dtype;

use crate::config::{
    AttentionKind, ChannelDelta, CompressedAttention, DeltaNet, Ffn, HeadMixture, LatentAttention, LayerConfig,
    LayerInputs, LightningAttention, Mamba, Mixer, ModelConfig, MoeConfig, NormKind, NormPlacement, OutputGate, QkNorm,
};
use crate::convert::float_bytes;
use crate::experts::{ExpertLayout, ExpertTensor};
use crate::family::{Family, LayerRole, Role};
use crate::formats;
use crate::naming;
use crate::weights::TensorInfo;
use crate::{Error, Result};

/// Dtypes that weights are read from, for messages.
pub(crate) const FLOATS: &str = "F32, F16 or BF16";

/// What is checked.
pub(crate) struct Weights<'a> {
    pub dir: &'a Path,
    pub config: &'a ModelConfig,
    pub family: &'static dyn Family,
    pub ragged: bool,
    /// All tensors, those of quantized weights as they are without quantization.
    pub tensors: &'a BTreeMap<String, TensorInfo>,
    /// `model_type` of the whole, where the decoder is a part of a model with other modalities.
    pub wrapper: Option<&'a str>,
}

/// What makes the keys and values of grouped attention.
const KEY_ROLES: [LayerRole; 5] =
    [LayerRole::Key, LayerRole::KeyBias, LayerRole::KeyNorm, LayerRole::Value, LayerRole::ValueBias];

/// What the check found.
pub(crate) struct Verified {
    /// The expert layout of every MoE layer.
    pub layouts: BTreeMap<usize, ExpertLayout>,
    /// What of the attention does not fit the config, where it is carried along all the same.
    pub unfit: Option<String>,
}

/// Checks every tensor that the config calls for, and that no others are in the decoder layers.
pub(crate) fn verify(weights: &Weights<'_>) -> Result<Verified> {
    let mut expected = HashSet::with_capacity(weights.tensors.len());
    // Linear attention comes in more variants than configs tell apart. One that does not fit its config cannot run, but
    // scores that need no run, pruning and writing never look at it.
    let is_linear = |mixer: &Mixer| matches!(mixer, Mixer::DeltaNet(_) | Mixer::ChannelDelta(_));
    let linear = weights.config.layers.iter().any(|layer| is_linear(&layer.mixer));
    let mut unfit = None;
    for (role, shape, mixes) in roles(weights.config) {
        match weights.check_role(role, shape) {
            Ok(name) => drop(expected.insert(name)),
            Err(error @ (Error::UnexpectedShape { .. } | Error::MissingTensor { .. })) if mixes && linear => {
                unfit.get_or_insert_with(|| error.to_string());
            }
            Err(error) => return Err(error),
        }
    }
    if let Some(reason) = &unfit {
        tracing::warn!(
            "the model can be pruned and written, but not run, since its attention does not fit its config: {reason}"
        );
    }
    let mut layouts = BTreeMap::new();
    for (layer, config) in weights.config.layers.iter().enumerate() {
        if let Ffn::Moe(moe) = &config.ffn {
            layouts.insert(layer, weights.check_experts(layer, moe, &mut expected)?);
        }
    }
    // What belongs to a quantized weight that is read is not among these tensors.
    if let Some(info) = weights.tensors.values().find(|info| is_quantized(info.dtype)) {
        return Err(weights.unread(info));
    }
    let carried = unfit.is_some();
    weights.tensors.values().try_for_each(|info| weights.check_expected(info, &expected, carried))?;
    Ok(Verified { layouts, unfit })
}

/// Every tensor of the config other than routed experts, with its shape, and whether it is of what looks at other
/// tokens.
fn roles(config: &ModelConfig) -> impl Iterator<Item = (Role, Vec<usize>, bool)> + '_ {
    let (hidden, vocabulary) = (config.hidden_size, config.vocab_size);
    let mut outer = vec![(Role::Embedding, vec![vocabulary, hidden]), (Role::FinalNorm, vec![hidden])];
    if config.norm == NormKind::Layer {
        outer.push((Role::FinalNormBias, vec![hidden]));
    }
    if !config.tie_word_embeddings {
        outer.push((Role::LmHead, vec![vocabulary, hidden]));
    }
    if config.head_bias {
        outer.push((Role::LmHeadBias, vec![vocabulary]));
    }
    if let Some(LayerInputs { width, vocab_size }) = config.layer_inputs {
        // A width below 2^28 and at most 2^12 layers.
        let all = config.layers.len() * width;
        outer.push((Role::LayerInputEmbedding, vec![vocab_size, all]));
        outer.push((Role::LayerInputProjection, vec![all, hidden]));
        outer.push((Role::LayerInputNorm, vec![width]));
    }
    if let Some(streams) = &config.streams {
        outer.push((Role::HeadStreams, vec![streams.count, streams.count * hidden]));
        outer.push((Role::HeadStreamsBase, vec![streams.count]));
        outer.push((Role::HeadStreamsScale, vec![1]));
    }
    let layers = config.layers.iter().enumerate().flat_map(move |(layer, layer_config)| {
        let mixing = match &layer_config.mixer {
            Mixer::Attention => {
                attention_roles(config, layer).into_iter().chain(indexer_roles(config, layer)).collect()
            }
            Mixer::DeltaNet(delta) => delta_roles(config.hidden_size, delta),
            Mixer::ChannelDelta(delta) => channel_delta_roles(config.hidden_size, delta),
            Mixer::ShortConvolution { kernel } => vec![
                (LayerRole::ConvolutionInput, vec![3 * hidden, hidden]),
                (LayerRole::ConvolutionTaps, vec![hidden, 1, *kernel]),
                (LayerRole::ConvolutionOutput, vec![hidden, hidden]),
            ],
            Mixer::Mamba(mamba) => mamba_roles(hidden, mamba),
            Mixer::Lightning(lightning) => lightning_roles(hidden, lightning),
            Mixer::HeadMixture(mixture) => head_mixture_roles(hidden, mixture),
            Mixer::Compressed(compressed) => compressed_roles(hidden, compressed),
            Mixer::None => Vec::new(),
        };
        let others = norm_roles(config, layer_config).into_iter().chain(ffn_roles(config, &layer_config.ffn));
        let others = others.chain(stream_roles(config));
        let of_layer = move |mixes| move |(role, shape)| (Role::Layer(layer, role), shape, mixes);
        others.map(of_layer(false)).chain(mixing.into_iter().map(of_layer(true)))
    });
    outer.into_iter().map(|(role, shape)| (role, shape, false)).chain(layers)
}

/// What the layers have besides routed experts, as the config has them.
pub(crate) fn layer_roles(config: &ModelConfig) -> HashSet<(usize, LayerRole)> {
    let of_layer = |(role, ..): (Role, Vec<usize>, bool)| match role {
        Role::Layer(layer, role) => Some((layer, role)),
        _ => None,
    };
    // Files may leave the rates of lightning attention out.
    let lightning = |(_, layer): &(usize, &LayerConfig)| matches!(layer.mixer, Mixer::Lightning(_));
    let rates = config.layers.iter().enumerate().filter(lightning).map(|(layer, _)| (layer, LayerRole::LightningRate));
    roles(config).filter_map(of_layer).chain(rates).collect()
}

fn norm_roles(config: &ModelConfig, layer: &LayerConfig) -> Vec<(LayerRole, Vec<usize>)> {
    let mut roles = Vec::new();
    let halves = [
        (
            layer.mixer != Mixer::None,
            LayerRole::AttentionNorm,
            LayerRole::AttentionNormBias,
            LayerRole::AttentionOutputNorm,
        ),
        (layer.ffn != Ffn::None, LayerRole::FfnNorm, LayerRole::FfnNormBias, LayerRole::FfnOutputNorm),
    ];
    let early = |norm| match config.placement {
        NormPlacement::After => false,
        // One norm for both halves.
        NormPlacement::Parallel => norm == LayerRole::AttentionNorm,
        NormPlacement::Before | NormPlacement::Both => true,
    };
    for (_, before, bias, after) in halves.into_iter().filter(|half| half.0) {
        if early(before) {
            roles.push(before);
            if config.norm == NormKind::Layer {
                roles.push(bias);
            }
        }
        if config.norms_experts() {
            roles.push(after);
        }
    }
    let mut roles: Vec<_> = roles.into_iter().map(|role| (role, vec![config.hidden_size])).collect();
    if config.layer_scale {
        roles.push((LayerRole::LayerScale, vec![1]));
    }
    if let Some(LayerInputs { width, .. }) = config.layer_inputs {
        roles.push((LayerRole::LayerInputGate, vec![width, config.hidden_size]));
        roles.push((LayerRole::LayerInputOutput, vec![config.hidden_size, width]));
        roles.push((LayerRole::LayerInputOutputNorm, vec![config.hidden_size]));
    }
    roles
}

/// The maps of several residual streams.
fn stream_roles(config: &ModelConfig) -> Vec<(LayerRole, Vec<usize>)> {
    let Some(streams) = &config.streams else { return Vec::new() };
    let (rows, width) = (streams.rows(), config.stream_width());
    vec![
        (LayerRole::AttentionStreams, vec![rows, width]),
        (LayerRole::AttentionStreamsBase, vec![rows]),
        (LayerRole::AttentionStreamsScale, vec![3]),
        (LayerRole::FfnStreams, vec![rows, width]),
        (LayerRole::FfnStreamsBase, vec![rows]),
        (LayerRole::FfnStreamsScale, vec![3]),
    ]
}

fn compressed_roles(hidden: usize, attention: &CompressedAttention) -> Vec<(LayerRole, Vec<usize>)> {
    let CompressedAttention { heads, head_dim, query_rank, output_groups, output_rank, .. } = *attention;
    let (queries, groups) = (attention.queries(), output_groups * output_rank);
    let mut roles = vec![
        (LayerRole::LatentQueryDown, vec![query_rank, hidden]),
        (LayerRole::LatentQueryNorm, vec![query_rank]),
        (LayerRole::LatentQueryUp, vec![queries, query_rank]),
        (LayerRole::KeyValue, vec![head_dim, hidden]),
        (LayerRole::KeyNorm, vec![head_dim]),
        (LayerRole::Sinks, vec![heads]),
        (LayerRole::OutputGroups, vec![groups, queries / output_groups]),
        (LayerRole::OutputJoin, vec![hidden, groups]),
    ];
    if let Some(compression) = &attention.compression {
        let (rate, columns) = (compression.rate, compression.series() * head_dim);
        roles.extend([
            (LayerRole::CompressorKey, vec![columns, hidden]),
            (LayerRole::CompressorGate, vec![columns, hidden]),
            (LayerRole::CompressorBias, vec![rate, columns]),
            (LayerRole::CompressorNorm, vec![head_dim]),
        ]);
        if let Some(indexer) = &compression.indexer {
            let columns = 2 * indexer.head_dim;
            roles.extend([
                (LayerRole::IndexerQuery, vec![indexer.heads * indexer.head_dim, query_rank]),
                (LayerRole::IndexerHeads, vec![indexer.heads, hidden]),
                (LayerRole::IndexerCompressorKey, vec![columns, hidden]),
                (LayerRole::IndexerCompressorGate, vec![columns, hidden]),
                (LayerRole::IndexerCompressorBias, vec![rate, columns]),
                (LayerRole::IndexerCompressorNorm, vec![indexer.head_dim]),
            ]);
        }
    }
    roles
}

fn attention_roles(config: &ModelConfig, layer: usize) -> Vec<(LayerRole, Vec<usize>)> {
    let (hidden, attention) = (config.hidden_size, config.attention_of(layer));
    // Each factor is below 2^28, so that products of two fit.
    let queries = attention.num_heads * attention.head_dim;
    let keys = attention.num_kv_heads * attention.head_dim;
    let values = attention.num_heads * attention.value_head_dim();
    let own_keys = config.layers[layer].keys_of.is_none();
    let mut roles = Vec::new();
    match &attention.kind {
        AttentionKind::Grouped if attention.packed => roles.push((LayerRole::Qkv, vec![queries + 2 * keys, hidden])),
        AttentionKind::Grouped => {
            let with_gates = if attention.gate == OutputGate::Query { 2 * queries } else { queries };
            let own_values = own_keys && !attention.tied_values;
            roles.push((LayerRole::Query, vec![with_gates, hidden]));
            roles.extend(own_keys.then(|| (LayerRole::Key, vec![keys, hidden])));
            roles.extend(own_values.then(|| (LayerRole::Value, vec![keys, hidden])));
            if attention.qkv_bias {
                roles.push((LayerRole::QueryBias, vec![with_gates]));
                roles.extend(own_keys.then(|| (LayerRole::KeyBias, vec![keys])));
                roles.extend(own_values.then(|| (LayerRole::ValueBias, vec![keys])));
            }
            match attention.gate {
                OutputGate::Projection => roles.push((LayerRole::AttentionGate, vec![queries, hidden])),
                OutputGate::Head => roles.push((LayerRole::AttentionGate, vec![attention.num_heads, hidden])),
                OutputGate::None | OutputGate::Query => {}
            }
        }
        AttentionKind::Latent(latent) => {
            roles.extend(latent_roles(config, latent));
            if attention.gate == OutputGate::Head {
                roles.push((LayerRole::AttentionGate, vec![attention.num_heads, hidden]));
            }
        }
    }
    roles.push((LayerRole::Output, vec![hidden, values]));
    if attention.output_bias {
        roles.push((LayerRole::OutputBias, vec![hidden]));
    }
    let norms = match attention.qk_norm {
        QkNorm::None | QkNorm::Unit => None,
        QkNorm::Head => Some((attention.head_dim, attention.head_dim)),
        QkNorm::Projection => Some((queries, keys)),
    };
    if let Some((query, key)) = norms {
        roles.push((LayerRole::QueryNorm, vec![query]));
        roles.extend(own_keys.then(|| (LayerRole::KeyNorm, vec![key])));
    }
    if attention.sinks {
        roles.push((LayerRole::Sinks, vec![attention.num_heads]));
    }
    roles
}

/// The indexer of a layer that has one.
fn indexer_roles(config: &ModelConfig, layer: usize) -> Vec<(LayerRole, Vec<usize>)> {
    let attention = config.attention_of(layer);
    let Some(selection) = attention.selects.as_ref().filter(|selection| selection.is_own(layer)) else {
        return Vec::new();
    };
    let rank = match &attention.kind {
        AttentionKind::Latent(latent) => latent.q_lora_rank.unwrap_or(config.hidden_size),
        AttentionKind::Grouped => config.hidden_size,
    };
    vec![
        (LayerRole::IndexerQuery, vec![selection.heads * selection.head_dim, rank]),
        (LayerRole::IndexerKey, vec![selection.head_dim, config.hidden_size]),
        (LayerRole::IndexerKeyNorm, vec![selection.head_dim]),
        (LayerRole::IndexerKeyNormBias, vec![selection.head_dim]),
        (LayerRole::IndexerHeads, vec![selection.heads, config.hidden_size]),
    ]
}

fn delta_roles(hidden: usize, delta: &DeltaNet) -> Vec<(LayerRole, Vec<usize>)> {
    let (values, channels, heads) = (delta.values(), delta.channels(), delta.value_heads);
    let mut roles = match delta.grouped {
        true => vec![
            (LayerRole::DeltaQkvGate, vec![channels + values, hidden]),
            (LayerRole::DeltaBetaDecay, vec![2 * heads, hidden]),
        ],
        false => vec![
            (LayerRole::DeltaQkv, vec![channels, hidden]),
            (LayerRole::DeltaGate, vec![values, hidden]),
            (LayerRole::DeltaBeta, vec![heads, hidden]),
            (LayerRole::DeltaDecay, vec![heads, hidden]),
        ],
    };
    roles.extend([
        (LayerRole::DeltaConvolution, vec![channels, 1, delta.kernel]),
        (LayerRole::DeltaRate, vec![heads]),
        (LayerRole::DeltaRateBias, vec![heads]),
        (LayerRole::DeltaNorm, vec![delta.value_head_dim]),
        (LayerRole::DeltaOutput, vec![hidden, values]),
    ]);
    roles
}

fn channel_delta_roles(hidden: usize, delta: &ChannelDelta) -> Vec<(LayerRole, Vec<usize>)> {
    let (width, dim, heads) = (delta.width(), delta.head_dim, delta.heads);
    let mut roles = vec![
        (LayerRole::Query, vec![width, hidden]),
        (LayerRole::Key, vec![width, hidden]),
        (LayerRole::Value, vec![width, hidden]),
        (LayerRole::QueryConvolution, vec![width, 1, delta.kernel]),
        (LayerRole::KeyConvolution, vec![width, 1, delta.kernel]),
        (LayerRole::ValueConvolution, vec![width, 1, delta.kernel]),
        (LayerRole::DeltaRate, vec![heads]),
        (LayerRole::DeltaRateBias, vec![width]),
        (LayerRole::DeltaBeta, vec![heads, hidden]),
        (LayerRole::DeltaNorm, vec![dim]),
        (LayerRole::Output, vec![hidden, width]),
    ];
    roles.extend(match delta.low_rank {
        true => vec![
            (LayerRole::DeltaDecayDown, vec![dim, hidden]),
            (LayerRole::DeltaDecayUp, vec![width, dim]),
            (LayerRole::DeltaGateDown, vec![dim, hidden]),
            (LayerRole::DeltaGateUp, vec![width, dim]),
        ],
        false => {
            vec![(LayerRole::DeltaDecay, vec![width, hidden]), (LayerRole::AttentionGate, vec![width, hidden])]
        }
    });
    roles
}

fn mamba_roles(hidden: usize, mamba: &Mamba) -> Vec<(LayerRole, Vec<usize>)> {
    let (values, channels, heads) = (mamba.values(), mamba.channels(), mamba.heads);
    let mut roles = vec![
        (LayerRole::MambaInput, vec![values + channels + heads, hidden]),
        (LayerRole::MambaConvolution, vec![channels, 1, mamba.kernel]),
        (LayerRole::MambaRate, vec![heads]),
        (LayerRole::MambaStepBias, vec![heads]),
        (LayerRole::MambaSkip, vec![heads]),
        (LayerRole::MambaNorm, vec![values]),
        (LayerRole::MambaOutput, vec![hidden, values]),
    ];
    if mamba.convolution_bias {
        roles.push((LayerRole::MambaConvolutionBias, vec![channels]));
    }
    roles
}

fn lightning_roles(hidden: usize, lightning: &LightningAttention) -> Vec<(LayerRole, Vec<usize>)> {
    let width = lightning.width();
    vec![
        (LayerRole::LightningQkv, vec![3 * width, hidden]),
        (LayerRole::LightningGate, vec![width, hidden]),
        (LayerRole::LightningNorm, vec![width]),
        (LayerRole::LightningOutput, vec![hidden, width]),
    ]
}

fn head_mixture_roles(hidden: usize, mixture: &HeadMixture) -> Vec<(LayerRole, Vec<usize>)> {
    let (experts, width) = (mixture.experts, mixture.width());
    vec![
        (LayerRole::HeadRouter, vec![experts, hidden]),
        (LayerRole::HeadQueries, vec![experts, width, hidden]),
        (LayerRole::HeadOutputs, vec![experts, hidden, width]),
        (LayerRole::HeadBias, vec![hidden]),
        (LayerRole::HeadKeyValue, vec![2 * width, hidden]),
    ]
}

fn latent_roles(config: &ModelConfig, latent: &LatentAttention) -> Vec<(LayerRole, Vec<usize>)> {
    let (hidden, attention) = (config.hidden_size, &config.attention);
    let queries = attention.num_heads * attention.head_dim;
    let keys_values = attention.num_heads * (latent.qk_nope_head_dim + latent.v_head_dim);
    let down = latent.kv_lora_rank + latent.qk_rope_head_dim;
    let mut roles = vec![
        (LayerRole::LatentKvDown, vec![down, hidden]),
        (LayerRole::LatentKvNorm, vec![latent.kv_lora_rank]),
        (LayerRole::LatentKvUp, vec![keys_values, latent.kv_lora_rank]),
    ];
    if attention.qkv_bias {
        roles.push((LayerRole::LatentKvDownBias, vec![down]));
    }
    match latent.q_lora_rank {
        None => roles.push((LayerRole::Query, vec![queries, hidden])),
        Some(rank) => {
            roles.push((LayerRole::LatentQueryDown, vec![rank, hidden]));
            roles.push((LayerRole::LatentQueryNorm, vec![rank]));
            roles.push((LayerRole::LatentQueryUp, vec![queries, rank]));
            if attention.qkv_bias {
                roles.push((LayerRole::LatentQueryDownBias, vec![rank]));
            }
        }
    }
    roles
}

fn ffn_roles(config: &ModelConfig, ffn: &Ffn) -> Vec<(LayerRole, Vec<usize>)> {
    let hidden = config.hidden_size;
    match ffn {
        Ffn::None => Vec::new(),
        Ffn::Dense { intermediate_size, gateless } => {
            let up_down = [
                (LayerRole::DenseUp, vec![*intermediate_size, hidden]),
                (LayerRole::DenseDown, vec![hidden, *intermediate_size]),
            ];
            let gate = (!gateless).then(|| (LayerRole::DenseGate, vec![*intermediate_size, hidden]));
            gate.into_iter().chain(up_down).collect()
        }
        Ffn::Moe(moe) => {
            let mut roles = vec![(LayerRole::Router, vec![moe.router_rows(), hidden])];
            if config.routing.bias {
                roles.push((LayerRole::RouterBias, vec![moe.router_rows()]));
            }
            if moe.by_table {
                roles.push((LayerRole::ExpertTable, vec![config.vocab_size, config.routing.top_k]));
            } else if config.routing.correction_bias() {
                roles.push((LayerRole::CorrectionBias, vec![moe.router_rows()]));
            }
            if moe.output_bias {
                roles.push((LayerRole::ExpertsBias, vec![hidden]));
            }
            if config.routing.own_norm {
                roles.push((LayerRole::RouterNorm, vec![hidden]));
            }
            if config.routing.expert_scales {
                roles.push((LayerRole::ExpertScale, vec![moe.num_experts()]));
            }
            if let Some(latent) = config.expert_latent {
                roles.push((LayerRole::ExpertLatentDown, vec![latent, hidden]));
                roles.push((LayerRole::ExpertLatentUp, vec![hidden, latent]));
            }
            if let Some(shared) = &moe.shared {
                match shared.packed {
                    true => roles.push((LayerRole::SharedGateUp, vec![2 * shared.intermediate_size, hidden])),
                    false => {
                        if !shared.gateless {
                            roles.push((LayerRole::SharedGate, vec![shared.intermediate_size, hidden]));
                        }
                        roles.push((LayerRole::SharedUp, vec![shared.intermediate_size, hidden]));
                    }
                }
                if shared.apart {
                    for role in [LayerRole::SharedNorm, LayerRole::SharedOutputNorm, LayerRole::ExpertsOutputNorm] {
                        roles.push((role, vec![hidden]));
                    }
                }
                roles.push((LayerRole::SharedDown, vec![hidden, shared.intermediate_size]));
                if shared.gated {
                    roles.push((LayerRole::SharedExpertGate, vec![1, hidden]));
                }
            }
            roles
        }
    }
}

/// The tensors that files may hold for the identity experts of a layer, which nothing reads, with the shape of those of
/// routed experts; see [`Family::identity_expert_tensors`].
pub(crate) fn identity_tensors(family: &dyn Family, config: &ModelConfig, layer: usize) -> Vec<(String, Vec<usize>)> {
    let Some(moe) = config.moe(layer).filter(|_| family.identity_expert_tensors()) else { return Vec::new() };
    let width = moe.widths.iter().copied().max().unwrap_or(0);
    let named = (moe.num_experts()..moe.router_rows()).flat_map(|row| {
        [ExpertTensor::Gate(row), ExpertTensor::Up(row)].map(|tensor| family.expert_tensor_name(layer, tensor))
    });
    named.map(|name| (name, vec![width, config.hidden_size])).collect()
}

fn is_quantized(dtype: Dtype) -> bool {
    matches!(
        dtype,
        Dtype::F4
            | Dtype::F6_E2M3
            | Dtype::F6_E3M2
            | Dtype::F8_E5M2
            | Dtype::F8_E4M3
            | Dtype::F8_E8M0
            | Dtype::F8_E4M3FNUZ
            | Dtype::F8_E5M2FNUZ
    )
}

impl Weights<'_> {
    fn check_role(&self, role: Role, shape: Vec<usize>) -> Result<String> {
        let name = self.family.tensor_name(role);
        // Ernie stores its correction bias as one row, Kimi-Linear its rates as they multiply heads.
        let found = self.tensors.get(&name).map_or(1, |info| info.shape.len());
        let shape = match role {
            Role::Layer(_, LayerRole::CorrectionBias) if found == 2 => [vec![1], shape].concat(),
            Role::Layer(_, LayerRole::DeltaRate) if found == 4 => [vec![1, 1], shape, vec![1]].concat(),
            _ => shape,
        };
        match role {
            Role::Layer(_, LayerRole::ExpertTable) => self.check_integers(&name, shape, self.family.size_keys(role))?,
            _ => self.check(&name, shape, self.family.size_keys(role))?,
        }
        Ok(name)
    }

    /// What calls for tensors, for messages.
    fn caller(&self) -> String {
        match self.wrapper {
            Some(wrapper) => format!("config.json (of a `{wrapper}` around a `{}`)", self.config.model_type),
            None => "config.json".to_string(),
        }
    }

    /// Checks a tensor of whole numbers, which no quantization changes.
    fn check_integers(&self, name: &str, expected: Vec<usize>, fields: &str) -> Result<()> {
        let info = self.found(name, &expected, fields)?;
        let (file, tensor) = (info.file.to_path_buf(), info.name.clone());
        if info.shape != expected {
            let (found, fields) = (info.shape.clone(), fields.into());
            return Err(Error::UnexpectedShape { file, tensor, found, expected, fields });
        }
        match matches!(info.dtype, Dtype::I64 | Dtype::I32) {
            true => Ok(()),
            false => Err(Error::UnsupportedDtype { file, tensor, found: info.dtype, expected: "I64 or I32".into() }),
        }
    }

    fn found(&self, name: &str, expected: &[usize], fields: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| {
            let hint = naming::hint(name, self.tensors.keys());
            let reason = format!("{} calls for it, with shape {expected:?} from {fields}{hint}", self.caller());
            Error::MissingTensor { dir: self.dir.to_path_buf(), tensor: name.to_string(), reason }
        })
    }

    fn check(&self, name: &str, expected: Vec<usize>, fields: &str) -> Result<()> {
        let info = self.found(name, &expected, fields)?;
        // The shape of codes is not that of the weight.
        if is_quantized(info.dtype) || (float_bytes(info.dtype).is_none() && self.config.quantization.is_some()) {
            return Err(self.unread(info));
        }
        let (file, tensor) = (info.file.to_path_buf(), info.name.clone());
        if info.shape != expected {
            let (found, fields) = (info.shape.clone(), fields.into());
            return Err(Error::UnexpectedShape { file, tensor, found, expected, fields });
        }
        if float_bytes(info.dtype).is_none() {
            return Err(Error::UnsupportedDtype { file, tensor, found: info.dtype, expected: FLOATS.to_string() });
        }
        Ok(())
    }

    /// The refusal of a tensor that is quantized, but not as any format has it.
    fn unread(&self, info: &TensorInfo) -> Error {
        let what = "companions (scales, zero points) of a format that is read";
        match self.config.quantization {
            None => formats::quantized_tensor(info, &format!("{FLOATS}, or {what}")),
            Some(quantization) => Error::Quantized {
                file: self.dir.join("config.json").display().to_string(),
                method: format!(
                    "\"{}\", but tensor `{}` of dtype {:?} lacks {what}",
                    quantization.method(),
                    info.name,
                    info.dtype
                ),
                also: formats::READ,
            },
        }
    }

    fn check_experts(&self, layer: usize, moe: &MoeConfig, expected: &mut HashSet<String>) -> Result<ExpertLayout> {
        let layout = self.expert_layout(layer, moe)?;
        let width = match self.ragged {
            true => "`moe_ragged.expert_widths`".to_string(),
            false => format!("`{}`", self.family.width_key()),
        };
        let read = if self.config.expert_latent.is_some() { "the width of the latent" } else { "`hidden_size`" };
        let fields = format!("{width}, the number of experts and {read}");
        let tensors =
            layout.tensors(self.config.expert_hidden_size(), &moe.stored_widths(), moe.biases).ok_or_else(|| {
                Error::ExpertLayout {
                    dir: self.dir.to_path_buf(),
                    layer,
                    found: format!("the layout {layout}"),
                    expected: format!("one that holds the different widths of {width}"),
                }
            })?;
        for tensor in tensors {
            let name = self.family.expert_tensor_name(layer, tensor.tensor);
            self.check(&name, tensor.shape, &fields)?;
            expected.insert(name);
        }
        for (name, shape) in identity_tensors(self.family, self.config, layer) {
            if self.tensors.contains_key(&name) {
                self.check(&name, shape, &fields)?;
                expected.insert(name);
            }
        }
        Ok(layout)
    }

    /// The layout of a layer, told by which names exist and, where two layouts share names, by the shapes.
    fn expert_layout(&self, layer: usize, moe: &MoeConfig) -> Result<ExpertLayout> {
        // Ragged tensors count only if the config says so too: a stock loader would take random experts instead.
        let layouts = self.family.layouts().iter().map(|layout| (*layout, layout.signature()));
        let layouts: Vec<(ExpertLayout, &[ExpertTensor])> =
            layouts.filter(|(layout, _)| self.ragged || *layout != ExpertLayout::Ragged).collect();
        let usable = || layouts.iter();
        let name = |tensor: &ExpertTensor| self.family.expert_tensor_name(layer, *tensor);
        let found: Vec<_> =
            usable().filter(|(_, names)| names.iter().any(|t| self.tensors.contains_key(&name(t)))).collect();
        if let [(layout, _)] = found[..] {
            return Ok(*layout);
        }
        if let [(first, names), rest @ ..] = &found[..]
            && rest.iter().all(|(_, others)| others == names)
        {
            // One orientation fits unless both do, in one of the two tensors: `2I = H` and `I = H` exclude each other.
            let fits = |layout: ExpertLayout| {
                let tensors = layout.tensors(self.config.expert_hidden_size(), &moe.stored_widths(), moe.biases)?;
                let found = |tensor| Some(&self.tensors.get(&self.family.expert_tensor_name(layer, tensor))?.shape);
                Some(tensors.iter().all(|tensor| found(tensor.tensor) == Some(&tensor.shape)))
            };
            let fitting = found.iter().map(|(layout, _)| *layout).find(|layout| fits(*layout) == Some(true));
            return Ok(fitting.unwrap_or(*first));
        }
        let list = |layouts: Vec<&(ExpertLayout, &[ExpertTensor])>| {
            let names = layouts.iter().map(|(_, tensors)| format!("`{}`", name(&tensors[0])));
            names.collect::<Vec<_>>().join(" or ")
        };
        let hint = match found.is_empty() {
            true => naming::hint(&name(&layouts[0].1[0]), self.tensors.keys()),
            false => String::new(),
        };
        Err(Error::ExpertLayout {
            dir: self.dir.to_path_buf(),
            layer,
            expected: format!("exactly one layout, with {}{hint}", list(usable().collect())),
            found: if found.is_empty() { "no known layout".to_string() } else { list(found).replace(" or ", " and ") },
        })
    }

    /// Whether a layer after the decoder layers predicts further tokens though the config does not say so: only such a
    /// layer has these.
    fn is_undeclared_mtp(&self, layer: usize) -> bool {
        const MARKS: [&str; 5] = [".eh_proj.", ".enorm.", ".hnorm.", ".shared_head.", ".embed_tokens."];
        layer >= self.config.layers.len()
            && self
                .tensors
                .keys()
                .any(|name| MARKS.iter().any(|mark| name.contains(mark)) && self.family.layer_of(name) == Some(layer))
    }

    /// Refuses tensors of decoder layers that would silently go unused. Tensors elsewhere are carried along.
    fn check_expected(&self, info: &TensorInfo, expected: &HashSet<String>, carried: bool) -> Result<()> {
        let Some(layer) = self.family.layer_of(&info.name) else { return Ok(()) };
        if carried && (info.name.contains("attn.") || info.name.contains(".attention.")) {
            return Ok(());
        }
        // Layers that take the keys of another layer may have an indexer in the files all the same.
        if self.config.attention.selects.is_some() && info.name.contains(".self_attn.indexer.") {
            return Ok(());
        }
        // Layers that read keys and values of another layer may have the maps that made their own in the files.
        let reads = self.config.layers.get(layer).is_some_and(|layer| layer.keys_of.is_some());
        let is = |role| self.family.tensor_name(Role::Layer(layer, role)) == info.name;
        if reads && KEY_ROLES.into_iter().any(is) {
            return Ok(());
        }
        // A constant that old files store.
        if expected.contains(&info.name) || info.name.ends_with(".rotary_emb.inv_freq") {
            return Ok(());
        }
        // Rates of lightning attention, and what follows from them.
        const RATES: [&str; 4] = [".slope_rate", ".query_decay", ".key_decay", ".diagonal_decay"];
        let lightning = self.config.layers.get(layer).is_some_and(|layer| matches!(layer.mixer, Mixer::Lightning(_)));
        if lightning && RATES.iter().any(|name| info.name.ends_with(name)) {
            return Ok(());
        }
        let layers = self.config.layers.len();
        // Layers of multi-token prediction come after the decoder layers.
        if (layers..layers + self.config.mtp_layers).contains(&layer) || self.is_undeclared_mtp(layer) {
            return Ok(());
        }
        let reason = match layer < layers {
            true => format!("config.json has no place for it in layer {layer}"),
            false => format!("`num_hidden_layers` in config.json is {layers}"),
        };
        Err(Error::UnexpectedTensor { file: info.file.to_path_buf(), tensor: info.name.clone(), reason })
    }
}

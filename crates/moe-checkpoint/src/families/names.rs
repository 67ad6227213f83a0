//! Tensor names that the decoder models of transformers share. A family takes them and overrides what differs.

use crate::experts::ExpertTensor;
use crate::family::{LayerRole, Role};

/// Name of a tensor other than routed experts.
pub(crate) fn tensor_name(role: Role) -> String {
    let (layer, role) = match role {
        Role::Embedding => return "model.embed_tokens.weight".to_string(),
        Role::FinalNorm => return "model.norm.weight".to_string(),
        Role::FinalNormBias => return "model.norm.bias".to_string(),
        Role::LmHead => return "lm_head.weight".to_string(),
        Role::LmHeadBias => return "lm_head.bias".to_string(),
        Role::LayerInputEmbedding => return "model.embed_tokens_per_layer.weight".to_string(),
        Role::LayerInputProjection => return "model.per_layer_model_projection.weight".to_string(),
        Role::LayerInputNorm => return "model.per_layer_projection_norm.weight".to_string(),
        Role::HeadStreams => return "model.hc_head.hc_fn".to_string(),
        Role::HeadStreamsBase => return "model.hc_head.hc_base".to_string(),
        Role::HeadStreamsScale => return "model.hc_head.hc_scale".to_string(),
        Role::Layer(layer, role) => (layer, role),
    };
    let name = match role {
        LayerRole::AttentionNorm => "input_layernorm.weight",
        LayerRole::AttentionNormBias => "input_layernorm.bias",
        LayerRole::FfnNorm => "post_attention_layernorm.weight",
        LayerRole::FfnNormBias => "post_attention_layernorm.bias",
        LayerRole::AttentionOutputNorm => "post_attention_layernorm.weight",
        LayerRole::FfnOutputNorm => "post_feedforward_layernorm.weight",
        LayerRole::SharedNorm => "pre_feedforward_layernorm.weight",
        LayerRole::SharedOutputNorm => "post_feedforward_layernorm_1.weight",
        LayerRole::ExpertsOutputNorm => "post_feedforward_layernorm_2.weight",
        LayerRole::LayerScale => "layer_scalar",
        LayerRole::LayerInputGate => "per_layer_input_gate.weight",
        LayerRole::LayerInputOutput => "per_layer_projection.weight",
        LayerRole::LayerInputOutputNorm => "post_per_layer_input_norm.weight",
        LayerRole::Qkv => "self_attn.query_key_value.weight",
        LayerRole::AttentionGate => "self_attn.gate_proj.weight",
        LayerRole::RouterNorm => "router.scale",
        LayerRole::ExpertScale => "router.per_expert_scale",
        LayerRole::SharedGateUp => "shared_mlp.input_linear.weight",
        LayerRole::Query => "self_attn.q_proj.weight",
        LayerRole::Key => "self_attn.k_proj.weight",
        LayerRole::Value => "self_attn.v_proj.weight",
        LayerRole::Output => "self_attn.o_proj.weight",
        LayerRole::QueryBias => "self_attn.q_proj.bias",
        LayerRole::KeyBias => "self_attn.k_proj.bias",
        LayerRole::ValueBias => "self_attn.v_proj.bias",
        LayerRole::OutputBias => "self_attn.o_proj.bias",
        LayerRole::QueryNorm => "self_attn.q_norm.weight",
        LayerRole::KeyNorm => "self_attn.k_norm.weight",
        LayerRole::Sinks => "self_attn.sinks",
        LayerRole::DeltaQkv => "linear_attn.in_proj_qkv.weight",
        LayerRole::DeltaGate => "linear_attn.in_proj_z.weight",
        LayerRole::DeltaGateDown => "self_attn.g_a_proj.weight",
        LayerRole::DeltaGateUp => "self_attn.g_b_proj.weight",
        LayerRole::DeltaDecayDown => "self_attn.f_a_proj.weight",
        LayerRole::DeltaDecayUp => "self_attn.f_b_proj.weight",
        LayerRole::QueryConvolution => "self_attn.q_conv1d.weight",
        LayerRole::KeyConvolution => "self_attn.k_conv1d.weight",
        LayerRole::ValueConvolution => "self_attn.v_conv1d.weight",
        LayerRole::DeltaBeta => "linear_attn.in_proj_b.weight",
        LayerRole::DeltaDecay => "linear_attn.in_proj_a.weight",
        LayerRole::DeltaQkvGate => "linear_attn.in_proj_qkvz.weight",
        LayerRole::DeltaBetaDecay => "linear_attn.in_proj_ba.weight",
        LayerRole::DeltaConvolution => "linear_attn.conv1d.weight",
        LayerRole::DeltaRate => "linear_attn.A_log",
        LayerRole::DeltaRateBias => "linear_attn.dt_bias",
        LayerRole::DeltaNorm => "linear_attn.norm.weight",
        LayerRole::DeltaOutput => "linear_attn.out_proj.weight",
        LayerRole::MambaInput => "mamba.in_proj.weight",
        LayerRole::MambaConvolution => "mamba.conv1d.weight",
        LayerRole::MambaConvolutionBias => "mamba.conv1d.bias",
        LayerRole::MambaRate => "mamba.A_log",
        LayerRole::MambaStepBias => "mamba.dt_bias",
        LayerRole::MambaSkip => "mamba.D",
        LayerRole::MambaNorm => "mamba.norm.weight",
        LayerRole::MambaOutput => "mamba.out_proj.weight",
        LayerRole::LightningQkv => "self_attn.qkv_proj.weight",
        LayerRole::LightningGate => "self_attn.output_gate.weight",
        LayerRole::LightningNorm => "self_attn.norm.weight",
        LayerRole::LightningOutput => "self_attn.out_proj.weight",
        LayerRole::LightningRate => "self_attn.slope_rate",
        LayerRole::ConvolutionInput => "conv.in_proj.weight",
        LayerRole::ConvolutionTaps => "conv.conv.weight",
        LayerRole::ConvolutionOutput => "conv.out_proj.weight",
        LayerRole::LatentQueryDown => "self_attn.q_a_proj.weight",
        LayerRole::LatentQueryDownBias => "self_attn.q_a_proj.bias",
        LayerRole::LatentQueryNorm => "self_attn.q_a_layernorm.weight",
        LayerRole::LatentQueryUp => "self_attn.q_b_proj.weight",
        LayerRole::LatentKvDown => "self_attn.kv_a_proj_with_mqa.weight",
        LayerRole::LatentKvDownBias => "self_attn.kv_a_proj_with_mqa.bias",
        LayerRole::LatentKvNorm => "self_attn.kv_a_layernorm.weight",
        LayerRole::LatentKvUp => "self_attn.kv_b_proj.weight",
        LayerRole::HeadRouter => "self_attention.experts.router.layer.weight",
        LayerRole::HeadQueries => "self_attention.experts.input_linear.weight",
        LayerRole::HeadOutputs => "self_attention.experts.output_linear.weight",
        LayerRole::HeadBias => "self_attention.experts.bias",
        LayerRole::HeadKeyValue => "self_attention.kv_proj.weight",
        LayerRole::ExpertsBias => "mlp.bias",
        LayerRole::IndexerQuery => "self_attn.indexer.wq_b.weight",
        LayerRole::IndexerKey => "self_attn.indexer.wk.weight",
        LayerRole::IndexerKeyNorm => "self_attn.indexer.k_norm.weight",
        LayerRole::IndexerKeyNormBias => "self_attn.indexer.k_norm.bias",
        LayerRole::IndexerHeads => "self_attn.indexer.weights_proj.weight",
        LayerRole::ExpertTable => "mlp.gate.tid2eid",
        LayerRole::AttentionStreams => "attn_hc.fn",
        LayerRole::AttentionStreamsBase => "attn_hc.base",
        LayerRole::AttentionStreamsScale => "attn_hc.scale",
        LayerRole::FfnStreams => "ffn_hc.fn",
        LayerRole::FfnStreamsBase => "ffn_hc.base",
        LayerRole::FfnStreamsScale => "ffn_hc.scale",
        LayerRole::KeyValue => "self_attn.kv_proj.weight",
        LayerRole::OutputGroups => "self_attn.o_a_proj.weight",
        LayerRole::OutputJoin => "self_attn.o_b_proj.weight",
        LayerRole::CompressorKey => "self_attn.compressor.kv_proj.weight",
        LayerRole::CompressorGate => "self_attn.compressor.gate_proj.weight",
        LayerRole::CompressorBias => "self_attn.compressor.position_bias",
        LayerRole::CompressorNorm => "self_attn.compressor.kv_norm.weight",
        LayerRole::IndexerCompressorKey => "self_attn.compressor.indexer.kv_proj.weight",
        LayerRole::IndexerCompressorGate => "self_attn.compressor.indexer.gate_proj.weight",
        LayerRole::IndexerCompressorBias => "self_attn.compressor.indexer.position_bias",
        LayerRole::IndexerCompressorNorm => "self_attn.compressor.indexer.kv_norm.weight",
        LayerRole::Router => "mlp.gate.weight",
        LayerRole::RouterBias => "mlp.gate.bias",
        LayerRole::CorrectionBias => "mlp.gate.e_score_correction_bias",
        LayerRole::ExpertLatentDown => "mlp.fc1_latent_proj.weight",
        LayerRole::ExpertLatentUp => "mlp.fc2_latent_proj.weight",
        LayerRole::SharedGate => "mlp.shared_expert.gate_proj.weight",
        LayerRole::SharedUp => "mlp.shared_expert.up_proj.weight",
        LayerRole::SharedDown => "mlp.shared_expert.down_proj.weight",
        LayerRole::SharedExpertGate => "mlp.shared_expert_gate.weight",
        LayerRole::DenseGate => "mlp.gate_proj.weight",
        LayerRole::DenseUp => "mlp.up_proj.weight",
        LayerRole::DenseDown => "mlp.down_proj.weight",
    };
    format!("model.layers.{layer}.{name}")
}

/// Name of a tensor that holds routed experts.
pub(crate) fn expert_tensor_name(layer: usize, tensor: ExpertTensor) -> String {
    let experts = format!("model.layers.{layer}.mlp.experts");
    match tensor {
        ExpertTensor::Gate(expert) => format!("{experts}.{expert}.gate_proj.weight"),
        ExpertTensor::Up(expert) => format!("{experts}.{expert}.up_proj.weight"),
        ExpertTensor::Down(expert) => format!("{experts}.{expert}.down_proj.weight"),
        ExpertTensor::StackedGate => format!("{experts}.gate_proj"),
        ExpertTensor::StackedUp => format!("{experts}.up_proj"),
        ExpertTensor::FusedGateUp => format!("{experts}.gate_up_proj"),
        ExpertTensor::FusedDown => format!("{experts}.down_proj"),
        ExpertTensor::RaggedGateUp => format!("{experts}.ragged_gate_up"),
        ExpertTensor::FusedGateUpBias => format!("{experts}.gate_up_proj_bias"),
        ExpertTensor::FusedDownBias => format!("{experts}.down_proj_bias"),
        ExpertTensor::RaggedDown => format!("{experts}.ragged_down"),
        ExpertTensor::RaggedGateUpBias => format!("{experts}.ragged_gate_up_bias"),
        ExpertTensor::RaggedDownBias => format!("{experts}.ragged_down_bias"),
    }
}

/// Name of a tensor in families that call shared experts by their plural.
pub(super) fn shared_experts(role: Role) -> String {
    let (layer, name) = match role {
        Role::Layer(layer, LayerRole::SharedGate) => (layer, "gate_proj"),
        Role::Layer(layer, LayerRole::SharedUp) => (layer, "up_proj"),
        Role::Layer(layer, LayerRole::SharedDown) => (layer, "down_proj"),
        role => return tensor_name(role),
    };
    format!("model.layers.{layer}.mlp.shared_experts.{name}.weight")
}

/// Name of a tensor in families that call one shared expert `shared_mlp`.
pub(super) fn shared_mlp(role: Role) -> String {
    match role {
        Role::Layer(_, LayerRole::SharedGate | LayerRole::SharedUp | LayerRole::SharedDown) => {
            shared_experts(role).replace(".shared_experts.", ".shared_mlp.")
        }
        role => tensor_name(role),
    }
}

/// Name of a tensor in families whose MoE block is called `block_sparse_moe`.
pub(super) fn block_sparse(role: Role) -> String {
    match role {
        Role::Layer(layer, LayerRole::Router) => format!("model.layers.{layer}.block_sparse_moe.gate.weight"),
        role => tensor_name(role),
    }
}

/// Name of a tensor that holds routed experts in those families.
pub(super) fn block_sparse_expert(layer: usize, tensor: ExpertTensor) -> String {
    let experts = format!("model.layers.{layer}.block_sparse_moe.experts");
    match tensor {
        ExpertTensor::Gate(expert) => format!("{experts}.{expert}.w1.weight"),
        ExpertTensor::Up(expert) => format!("{experts}.{expert}.w3.weight"),
        ExpertTensor::Down(expert) => format!("{experts}.{expert}.w2.weight"),
        tensor => expert_tensor_name(layer, tensor).replace(".mlp.", ".block_sparse_moe."),
    }
}

/// Name of a tensor in families with Kimi delta attention, all of whose tensors are in `self_attn`.
pub(super) fn channel_delta(role: Role) -> String {
    let Role::Layer(layer, of) = role else { return tensor_name(role) };
    let name = match of {
        LayerRole::DeltaRate => "A_log",
        LayerRole::DeltaRateBias => "dt_bias",
        LayerRole::DeltaBeta => "b_proj.weight",
        LayerRole::DeltaDecay => "f_proj.weight",
        LayerRole::AttentionGate => "g_proj.weight",
        LayerRole::DeltaNorm => "o_norm.weight",
        _ => return tensor_name(role),
    };
    format!("model.layers.{layer}.self_attn.{name}")
}

/// Decoder layer of a tensor, by its name.
pub(crate) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// Config keys that give the size of a tensor.
pub(crate) fn size_keys(role: Role) -> &'static str {
    let role = match role {
        Role::Embedding | Role::LmHead => return "`vocab_size` and `hidden_size`",
        Role::FinalNorm | Role::FinalNormBias => return "`hidden_size`",
        Role::LmHeadBias => return "`vocab_size`",
        Role::LayerInputEmbedding => {
            return "`vocab_size_per_layer_input`, `num_hidden_layers` and `hidden_size_per_layer_input`";
        }
        Role::LayerInputProjection => {
            return "`num_hidden_layers`, `hidden_size_per_layer_input` and `hidden_size`";
        }
        Role::LayerInputNorm => return "`hidden_size_per_layer_input`",
        Role::HeadStreams => return "`hc_mult` and `hidden_size`",
        Role::HeadStreamsBase => return "`hc_mult`",
        Role::HeadStreamsScale => return "nothing: it is one number",
        Role::Layer(_, role) => role,
    };
    match role {
        LayerRole::AttentionNorm
        | LayerRole::AttentionNormBias
        | LayerRole::FfnNorm
        | LayerRole::FfnNormBias
        | LayerRole::AttentionOutputNorm
        | LayerRole::FfnOutputNorm
        | LayerRole::SharedNorm
        | LayerRole::SharedOutputNorm
        | LayerRole::ExpertsOutputNorm
        | LayerRole::LayerInputOutputNorm
        | LayerRole::RouterNorm
        | LayerRole::OutputBias
        | LayerRole::HeadBias
        | LayerRole::ExpertsBias
        | LayerRole::SharedExpertGate => "`hidden_size`",
        LayerRole::LayerScale => "nothing: it is one number",
        LayerRole::LayerInputGate | LayerRole::LayerInputOutput => "`hidden_size_per_layer_input` and `hidden_size`",
        LayerRole::Qkv => "`num_attention_heads`, `num_key_value_heads`, `head_dim` and `hidden_size`",
        LayerRole::Query | LayerRole::Output | LayerRole::AttentionGate => {
            "`num_attention_heads`, the width of a head (`head_dim`, or `v_head_dim` of latent attention) and `hidden_size`"
        }
        LayerRole::QueryBias => "`num_attention_heads` and `head_dim`",
        LayerRole::Key | LayerRole::Value => "`num_key_value_heads`, `head_dim` and `hidden_size`",
        LayerRole::KeyBias | LayerRole::ValueBias => "`num_key_value_heads` and `head_dim`",
        LayerRole::QueryNorm | LayerRole::KeyNorm => "the width of a head",
        LayerRole::Sinks => "`num_attention_heads`",
        LayerRole::DeltaQkv
        | LayerRole::DeltaGate
        | LayerRole::DeltaQkvGate
        | LayerRole::DeltaConvolution
        | LayerRole::DeltaOutput => {
            "`linear_num_key_heads`, `linear_num_value_heads`, `linear_key_head_dim`, `linear_value_head_dim`, `linear_conv_kernel_dim` and `hidden_size`"
        }
        LayerRole::DeltaGateDown
        | LayerRole::DeltaGateUp
        | LayerRole::DeltaDecayDown
        | LayerRole::DeltaDecayUp
        | LayerRole::QueryConvolution
        | LayerRole::KeyConvolution
        | LayerRole::ValueConvolution => {
            "the heads of linear attention, their width and convolution (`linear_attn_config`, or `linear_num_heads`, `linear_head_dim` and `linear_conv_kernel_dim`) and `hidden_size`"
        }
        LayerRole::DeltaBeta | LayerRole::DeltaDecay | LayerRole::DeltaBetaDecay => {
            "`linear_num_value_heads` and `hidden_size`"
        }
        LayerRole::DeltaRate | LayerRole::DeltaRateBias => "`linear_num_value_heads`",
        LayerRole::DeltaNorm => "`linear_value_head_dim`",
        LayerRole::MambaRate | LayerRole::MambaStepBias | LayerRole::MambaSkip => "the number of state space heads",
        LayerRole::MambaInput
        | LayerRole::MambaConvolution
        | LayerRole::MambaConvolutionBias
        | LayerRole::MambaNorm
        | LayerRole::MambaOutput => {
            "the state space sizes: heads, their width, groups, state, convolution; and `hidden_size`"
        }
        LayerRole::LightningQkv
        | LayerRole::LightningGate
        | LayerRole::LightningNorm
        | LayerRole::LightningOutput
        | LayerRole::LightningRate => "`num_attention_heads`, `head_dim` and `hidden_size`",
        LayerRole::ConvolutionInput | LayerRole::ConvolutionOutput => "`hidden_size`",
        LayerRole::ConvolutionTaps => "`hidden_size` and `conv_L_cache`",
        LayerRole::LatentQueryDown => "`q_lora_rank` and `hidden_size`",
        LayerRole::LatentQueryDownBias | LayerRole::LatentQueryNorm => "`q_lora_rank`",
        LayerRole::LatentQueryUp => "`num_attention_heads`, `qk_nope_head_dim`, `qk_rope_head_dim` and `q_lora_rank`",
        LayerRole::LatentKvDown => "`kv_lora_rank`, `qk_rope_head_dim` and `hidden_size`",
        LayerRole::LatentKvDownBias => "`kv_lora_rank` and `qk_rope_head_dim`",
        LayerRole::LatentKvNorm => "`kv_lora_rank`",
        LayerRole::LatentKvUp => "`num_attention_heads`, `qk_nope_head_dim`, `v_head_dim` and `kv_lora_rank`",
        LayerRole::HeadRouter => "`num_local_experts` and `hidden_size`",
        LayerRole::HeadQueries | LayerRole::HeadOutputs => {
            "`num_local_experts`, `num_key_value_heads`, `kv_channels` and `hidden_size`"
        }
        LayerRole::HeadKeyValue => "`num_key_value_heads`, `kv_channels` and `hidden_size`",
        LayerRole::IndexerQuery => "`index_n_heads`, `index_head_dim` and `q_lora_rank`",
        LayerRole::IndexerKey => "`index_head_dim` and `hidden_size`",
        LayerRole::IndexerKeyNorm | LayerRole::IndexerKeyNormBias => "`index_head_dim`",
        LayerRole::IndexerHeads => "`index_n_heads` and `hidden_size`",
        LayerRole::Router => {
            "the number of experts (`num_experts`, `num_local_experts` or `n_routed_experts`) and `hidden_size`"
        }
        LayerRole::RouterBias | LayerRole::CorrectionBias | LayerRole::ExpertScale => "the number of experts",
        LayerRole::ExpertTable => "`vocab_size` and the number of experts per token",
        LayerRole::AttentionStreams | LayerRole::FfnStreams => "`hc_mult` and `hidden_size`",
        LayerRole::AttentionStreamsBase | LayerRole::FfnStreamsBase => "`hc_mult`",
        LayerRole::AttentionStreamsScale | LayerRole::FfnStreamsScale => "nothing: it is three numbers",
        LayerRole::KeyValue => "`head_dim` and `hidden_size`",
        LayerRole::OutputGroups => "`o_groups`, `o_lora_rank`, `num_attention_heads` and `head_dim`",
        LayerRole::OutputJoin => "`o_groups`, `o_lora_rank` and `hidden_size`",
        LayerRole::CompressorKey | LayerRole::CompressorGate => "`head_dim`, the kind of the layer and `hidden_size`",
        LayerRole::CompressorBias => "`compress_rates`, `head_dim` and the kind of the layer",
        LayerRole::CompressorNorm => "`head_dim`",
        LayerRole::IndexerCompressorKey | LayerRole::IndexerCompressorGate => "`index_head_dim` and `hidden_size`",
        LayerRole::IndexerCompressorBias => "`compress_rates` and `index_head_dim`",
        LayerRole::IndexerCompressorNorm => "`index_head_dim`",
        LayerRole::ExpertLatentDown | LayerRole::ExpertLatentUp => "`moe_latent_size` and `hidden_size`",
        LayerRole::SharedGate | LayerRole::SharedUp | LayerRole::SharedDown | LayerRole::SharedGateUp => {
            "the width of the shared experts (`shared_expert_intermediate_size`, or their number times that of a routed one) and `hidden_size`"
        }
        LayerRole::DenseGate | LayerRole::DenseUp | LayerRole::DenseDown => "`intermediate_size` and `hidden_size`",
    }
}

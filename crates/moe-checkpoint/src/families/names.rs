//! Tensor names that the decoder models of transformers share. A family takes them and overrides what differs.

use crate::experts::ExpertTensor;
use crate::family::{LayerRole, Role};

/// Name of a tensor other than routed experts.
pub(super) fn tensor_name(role: Role) -> String {
    let (layer, role) = match role {
        Role::Embedding => return "model.embed_tokens.weight".to_string(),
        Role::FinalNorm => return "model.norm.weight".to_string(),
        Role::LmHead => return "lm_head.weight".to_string(),
        Role::Layer(layer, role) => (layer, role),
    };
    let name = match role {
        LayerRole::AttentionNorm => "input_layernorm.weight",
        LayerRole::FfnNorm => "post_attention_layernorm.weight",
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
        LayerRole::Router => "mlp.gate.weight",
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
pub(super) fn expert_tensor_name(layer: usize, tensor: ExpertTensor) -> String {
    let experts = format!("model.layers.{layer}.mlp.experts");
    match tensor {
        ExpertTensor::Gate(expert) => format!("{experts}.{expert}.gate_proj.weight"),
        ExpertTensor::Up(expert) => format!("{experts}.{expert}.up_proj.weight"),
        ExpertTensor::Down(expert) => format!("{experts}.{expert}.down_proj.weight"),
        ExpertTensor::FusedGateUp => format!("{experts}.gate_up_proj"),
        ExpertTensor::FusedDown => format!("{experts}.down_proj"),
        ExpertTensor::RaggedGateUp => format!("{experts}.ragged_gate_up"),
        ExpertTensor::RaggedDown => format!("{experts}.ragged_down"),
    }
}

/// Decoder layer of a tensor, by its name.
pub(super) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// Config keys that give the size of a tensor.
pub(super) fn size_keys(role: Role) -> &'static str {
    let Role::Layer(_, role) = role else {
        return if role == Role::FinalNorm { "`hidden_size`" } else { "`vocab_size` and `hidden_size`" };
    };
    match role {
        LayerRole::AttentionNorm | LayerRole::FfnNorm | LayerRole::OutputBias | LayerRole::SharedExpertGate => {
            "`hidden_size`"
        }
        LayerRole::Query | LayerRole::Output => "`num_attention_heads`, `head_dim` and `hidden_size`",
        LayerRole::QueryBias => "`num_attention_heads` and `head_dim`",
        LayerRole::Key | LayerRole::Value => "`num_key_value_heads`, `head_dim` and `hidden_size`",
        LayerRole::KeyBias | LayerRole::ValueBias => "`num_key_value_heads` and `head_dim`",
        LayerRole::QueryNorm | LayerRole::KeyNorm => "`head_dim`",
        LayerRole::Router => "the number of experts (`num_experts` or `num_local_experts`) and `hidden_size`",
        LayerRole::SharedGate | LayerRole::SharedUp | LayerRole::SharedDown => {
            "`shared_expert_intermediate_size` and `hidden_size`"
        }
        LayerRole::DenseGate | LayerRole::DenseUp | LayerRole::DenseDown => "`intermediate_size` and `hidden_size`",
    }
}

//! Kimi-Linear: the routed experts. Attention (in most layers a linear one with a decay per channel) is not described,
//! so that such a checkpoint can be read, pruned and written, but not run.

use serde_json::Value;

use crate::Result;
use crate::config::{AttentionConfig, AttentionKind, ModelConfig, RopeConfig, RopeScaling, Routing, RoutingKind};
use crate::experts::ExpertTensor;
use crate::family::{CONFIG, Family, LayerRole, Role};
use crate::json::Fields;

use super::read::MAX_SIZE;
use super::{names, read};

/// The family `kimi_linear`.
pub(crate) struct KimiLinear;

impl Family for KimiLinear {
    fn model_type(&self) -> &'static str {
        "kimi_linear"
    }

    fn parse(&self, config: &Value, generation: Option<&Value>) -> Result<ModelConfig> {
        let config = Fields::new(config, CONFIG)?;
        let num_heads = read::size(&config, "num_attention_heads")?;
        let layers = read::num_layers(&config)?;
        let dense = config.integer("first_k_dense_replace", 0, MAX_SIZE)?.unwrap_or(0);
        for (key, only) in [("moe_layer_freq", 1), ("num_expert_group", 1)] {
            if config.integer(key, 0, MAX_SIZE)?.is_some_and(|found| found != only) {
                return Err(config.invalid(key, format!("{only}, as in all released models")));
            }
        }
        let moe = read::MoeLayers {
            expert_count_keys: self.expert_count_keys(),
            top_k_key: "num_experts_per_token",
            width_key: "moe_intermediate_size",
            bias: false,
            shared: read::shared_experts(&config, "num_shared_experts")?,
            is_moe: (0..layers).map(|layer| layer >= dense).collect(),
            why: format!("`first_k_dense_replace` {dense}"),
            windows: &vec![None; layers],
        };
        let (layers, top_k) = moe.read(&config)?;
        let attention = AttentionConfig {
            kind: AttentionKind::Other,
            ..read::grouped_attention(num_heads, num_heads, read::size(&config, "v_head_dim")?)
        };
        let renormalize = config.bool("moe_renormalize")?.unwrap_or(true);
        let model = read::Model {
            model_type: self.model_type(),
            attention,
            // Its attention knows no positions.
            rope: RopeConfig { theta: 10_000.0, interleaved: false, scaling: RopeScaling::Default },
            routing: Routing {
                scale: read::scaling(&config, ("routed_scaling_factor", 1.0))?,
                ..Routing::new(top_k, RoutingKind::Sigmoid { renormalize, correction_bias: true, groups: None })
            },
            layers,
        };
        model.read(&config, generation)
    }

    fn tensor_name(&self, role: Role) -> String {
        match role {
            Role::Layer(layer, LayerRole::CorrectionBias) => {
                format!("model.layers.{layer}.block_sparse_moe.gate.e_score_correction_bias")
            }
            Role::Layer(_, LayerRole::SharedGate | LayerRole::SharedUp | LayerRole::SharedDown) => {
                names::shared_experts(role).replace(".mlp.", ".block_sparse_moe.")
            }
            role => names::block_sparse(role),
        }
    }

    fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        names::block_sparse_expert(layer, tensor)
    }

    fn shared_count_key(&self) -> Option<&'static str> {
        Some("num_shared_experts")
    }

    fn expert_count_keys(&self) -> &'static [&'static str] {
        &["num_experts", "n_routed_experts"]
    }

    fn top_k_keys(&self) -> &'static [&'static str] {
        &["num_experts_per_token"]
    }
}

//! The config and the tensors of the Mixture of Experts that a dense model becomes.

use moe_checkpoint::{Checkpoint, Dtype, ExpertTensor, Ffn, LayerRole, QkNorm, Role, TensorSpec, family};
use serde_json::{Map, Value, json};

use super::{UpcycleMethod, Upcycling};
use crate::{Error, Result};

/// Units of a shared expert of zeros, in families that cannot be without one.
const NO_SHARED: usize = 8;

/// What becomes of a dense model.
pub(super) struct Target {
    pub config: Value,
    pub tensors: Vec<TensorSpec>,
    pub family: &'static str,
    /// Width of the dense network.
    pub dense: usize,
    /// Width of one routed expert.
    pub width: usize,
    /// Width of the shared expert as it is stored: that of the recipe, or of zeros where the family needs one.
    pub stored_shared: usize,
}

/// The width of the dense network, the same in all layers.
pub(super) fn dense_width(base: &Checkpoint) -> Result<usize> {
    let widths = base.config().layers.iter().map(|layer| match layer.ffn {
        Ffn::Dense { intermediate_size, gateless: false } => Some(intermediate_size),
        _ => None,
    });
    let widths: Option<Vec<usize>> = widths.collect();
    let found = widths.as_deref().and_then(<[usize]>::first).copied();
    found.filter(|_| base.is_dense()).ok_or_else(|| {
        let reason = format!("`{}` has experts, or layers without a gated network", base.config().model_type);
        Error::infeasible(base.dir().display().to_string(), reason)
    })
}

/// The family whose stock implementation has what the model has.
fn sibling(base: &Checkpoint, recipe: &Upcycling) -> Result<&'static str> {
    let config = base.config();
    let attention = &config.attention;
    let shared = recipe.shared_width > 0 || matches!(recipe.method, UpcycleMethod::Ternary { .. });
    let windows = config.layers.iter().any(|layer| layer.sliding_window.is_some());
    let refused = |reason: &str| Err(Error::infeasible(format!("`{}`", config.model_type), reason));
    if attention.qk_norm == QkNorm::Head {
        return match shared {
            true => refused(
                "norms of queries and keys and a shared expert are together in no stock family: leave `shared_width` \
                 out, and take another method than `ternary`",
            ),
            false => Ok("qwen3_moe"),
        };
    }
    if attention.output_bias {
        return refused(
            "no stock family with experts has a bias on the output of its attention without norms of queries",
        );
    }
    match (attention.qkv_bias || shared, windows) {
        (true, true) => refused("a shared expert or biases of attention and windows are together in no stock family"),
        (true, false) => Ok("qwen2_moe"),
        (false, _) => Ok("mixtral"),
    }
}

impl Target {
    pub fn new(base: &Checkpoint, recipe: &Upcycling) -> Result<Self> {
        let dense = dense_width(base)?;
        let family = sibling(base, recipe)?;
        let (width, shared) = (recipe.width(dense), recipe.shared(dense));
        let stored_shared = match family {
            "qwen2_moe" if shared == 0 => NO_SHARED,
            _ => shared,
        };
        let config = config(base, recipe, family, (width, stored_shared, dense))?;
        let tensors = tensors(base, recipe, family, (width, stored_shared))?;
        Ok(Self { config, tensors, family, dense, width, stored_shared })
    }
}

/// The config of the sibling: that of the dense model, with what the sibling would read otherwise spelled out.
fn config(
    base: &Checkpoint,
    recipe: &Upcycling,
    family: &str,
    (width, shared, dense): (usize, usize, usize),
) -> Result<Value> {
    let Value::Object(mut config) = base.raw_config().clone() else {
        return Err(Error::infeasible(base.dir().display().to_string(), "config.json is no object"));
    };
    let (parsed, attention) = (base.config(), &base.config().attention);
    for key in ["mlp_bias", "pretraining_tp", "attention_bias", "max_window_layers", "layer_types", "auto_map"] {
        config.remove(key);
    }
    let mut set = |values: Value| {
        let Value::Object(values) = values else { return };
        config.extend(values);
    };
    set(json!({
        "model_type": family,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": parsed.norm_eps,
        "tie_word_embeddings": parsed.tie_word_embeddings,
        "num_experts_per_tok": recipe.top_k(),
        "output_router_logits": false,
        "router_aux_loss_coef": 0.001,
    }));
    let qwen = json!({
        "num_experts": recipe.experts,
        "moe_intermediate_size": width,
        "intermediate_size": dense,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": true,
        "use_sliding_window": false,
        "sliding_window": null,
    });
    match family {
        "mixtral" => {
            let window = parsed.layers.first().and_then(|layer| layer.sliding_window);
            set(json!({
                "architectures": ["MixtralForCausalLM"],
                "num_local_experts": recipe.experts,
                "intermediate_size": width,
                "sliding_window": window,
            }));
        }
        "qwen2_moe" => {
            set(qwen);
            set(json!({
                "architectures": ["Qwen2MoeForCausalLM"],
                "shared_expert_intermediate_size": shared,
                "qkv_bias": attention.qkv_bias,
            }));
        }
        _ => {
            set(qwen);
            set(json!({"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": attention.qkv_bias}));
        }
    }
    spell_out_theta(&mut config, parsed.rope.theta);
    Ok(Value::Object(config))
}

/// Families differ in the `rope_theta` of a config without one.
fn spell_out_theta(config: &mut Map<String, Value>, theta: f64) {
    match config.get_mut("rope_parameters").and_then(Value::as_object_mut) {
        Some(parameters) => {
            parameters.entry("rope_theta").or_insert_with(|| json!(theta));
        }
        None => {
            config.entry("rope_theta").or_insert_with(|| json!(theta));
        }
    }
}

/// The name of a tensor of the sibling where the decoder of the dense model is, which may be found under another prefix
/// than the family's own.
pub(super) fn in_place(base: &Checkpoint, layer: usize, name: String) -> String {
    let found = base.family().tensor_name(Role::Layer(layer, LayerRole::DenseGate));
    match found.strip_suffix(&format!("layers.{layer}.mlp.gate_proj.weight")) {
        Some(prefix) => format!("{prefix}{}", name.strip_prefix("model.").unwrap_or(&name)),
        None => name,
    }
}

/// The tensors of the sibling: those of the dense model but for its networks, and experts under the same prefix.
fn tensors(
    base: &Checkpoint,
    recipe: &Upcycling,
    target: &str,
    (width, shared): (usize, usize),
) -> Result<Vec<TensorSpec>> {
    let hidden = base.config().hidden_size;
    let family = family(target)?;
    let mut specs: Vec<TensorSpec> = base.plain_tensors().map(|info| info.spec()).collect();
    for layer in 0..base.config().layers.len() {
        let role = |role| Role::Layer(layer, role);
        let dense = [LayerRole::DenseGate, LayerRole::DenseUp, LayerRole::DenseDown];
        let names = dense.map(|part| base.family().tensor_name(role(part)));
        let dtypes: [Dtype; 3] =
            [base.plain_info(&names[0])?.dtype, base.plain_info(&names[1])?.dtype, base.plain_info(&names[2])?.dtype];
        specs.retain(|spec| !names.contains(&spec.name));
        let mut add = |name: String, dtype: Dtype, shape: Vec<usize>| {
            specs.push(TensorSpec { name: in_place(base, layer, name), dtype, shape });
        };
        add(family.tensor_name(role(LayerRole::Router)), dtypes[0], vec![recipe.experts, hidden]);
        for expert in 0..recipe.experts {
            add(family.expert_tensor_name(layer, ExpertTensor::Gate(expert)), dtypes[0], vec![width, hidden]);
            add(family.expert_tensor_name(layer, ExpertTensor::Up(expert)), dtypes[1], vec![width, hidden]);
            add(family.expert_tensor_name(layer, ExpertTensor::Down(expert)), dtypes[2], vec![hidden, width]);
        }
        if shared > 0 {
            add(family.tensor_name(role(LayerRole::SharedGate)), dtypes[0], vec![shared, hidden]);
            add(family.tensor_name(role(LayerRole::SharedUp)), dtypes[1], vec![shared, hidden]);
            add(family.tensor_name(role(LayerRole::SharedDown)), dtypes[2], vec![hidden, shared]);
            add(family.tensor_name(role(LayerRole::SharedExpertGate)), dtypes[0], vec![1, hidden]);
        }
    }
    Ok(specs)
}

//! Files that are made here, of a few hundred bytes each: a model, and artifacts of every kind that belong to it.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use moe_checkpoint::{
    Checkpoint, Denominator, Dtype, Granularity, LayerScores, MoeLayerShape, MoeShape, Pool, Provenance, ScoreTable,
    Statistics, WholeScores,
};
use moe_peft::codec::{ComPeft, KeptValues, PlainDelta, TaskVector};
use moe_peft::lora::Maps;
use moe_prune::{Edits, ExpertEdit, PrunePlan};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::scratch;

const HIDDEN: usize = 8;
const WIDTH: usize = 3;
const EXPERTS: usize = 2;
const VOCABULARY: usize = 4;

/// A safetensors file of zeros in f32.
pub fn safetensors(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in tensors {
        let begin = end;
        end += 4 * shape.iter().product::<usize>();
        header.insert(name.to_string(), json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}));
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; end]].concat()
}

/// The config of the model: a Mixtral of one layer.
pub fn model_config() -> Vec<u8> {
    let config = json!({
        "model_type": "mixtral", "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1, "num_hidden_layers": 1, "vocab_size": VOCABULARY, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": HIDDEN, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 16, "tie_word_embeddings": false
    });
    config.to_string().into_bytes()
}

/// Names and shapes of its tensors.
fn tensors() -> Vec<(String, Vec<usize>)> {
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_string(), vec![VOCABULARY, HIDDEN]),
        ("lm_head.weight".to_string(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_string(), vec![HIDDEN]),
        (layer("input_layernorm"), vec![HIDDEN]),
        (layer("post_attention_layernorm"), vec![HIDDEN]),
        (layer("block_sparse_moe.gate"), vec![EXPERTS, HIDDEN]),
    ];
    for part in ["q", "k", "v", "o"] {
        tensors.push((layer(&format!("self_attn.{part}_proj")), vec![HIDDEN, HIDDEN]));
    }
    for expert in 0..EXPERTS {
        for (part, shape) in [("w1", [WIDTH, HIDDEN]), ("w2", [HIDDEN, WIDTH]), ("w3", [WIDTH, HIDDEN])] {
            tensors.push((layer(&format!("block_sparse_moe.experts.{expert}.{part}")), shape.into()));
        }
    }
    tensors
}

/// The weights of the model.
pub fn model_weights() -> Vec<u8> {
    let tensors = tensors();
    let tensors: Vec<_> = tensors.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect();
    safetensors(&tensors)
}

/// Indices of the model: of one file that is there, and of one that is not.
pub fn indices() -> Vec<Vec<u8>> {
    let index = |file: &str| {
        let map: Map<String, Value> = tensors().into_iter().map(|(name, _)| (name, json!(file))).collect();
        json!({"metadata": {"total_size": 8}, "weight_map": map}).to_string().into_bytes()
    };
    vec![index("model.safetensors"), index("model-00001-of-00002.safetensors")]
}

/// The model, which indices, edits and adapters are read for.
pub static MODEL: LazyLock<Checkpoint> = LazyLock::new(|| {
    let made = TempDir::new().and_then(|dir| {
        fs::write(dir.path().join("config.json"), model_config())?;
        fs::write(dir.path().join("model.safetensors"), model_weights())?;
        Ok(dir)
    });
    // The folder goes at the end: nothing but the config and the header is ever read.
    let dir = made.unwrap_or_else(|error| panic!("{error}"));
    Checkpoint::open(dir.path()).unwrap_or_else(|error| panic!("{error}"))
});

/// Its linear maps.
pub static MAPS: LazyLock<Maps<'static>> = LazyLock::new(|| Maps::new(&MODEL));

/// The plan that keeps all of it.
pub static PLAN: LazyLock<PrunePlan> = LazyLock::new(|| PrunePlan::keep_all(MODEL.shape(), MODEL.fingerprint()));

/// What a writer leaves in a file.
fn written<E: std::fmt::Display>(write: impl Fn(&Path) -> Result<(), E>) -> Vec<u8> {
    let path = scratch::place("made");
    write(&path).unwrap_or_else(|error| panic!("{error}"));
    let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    fs::remove_file(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    bytes
}

/// Small files of tensors.
pub fn headers() -> Vec<Vec<u8>> {
    vec![
        safetensors(&[]),
        safetensors(&[("a", &[])]),
        safetensors(&[("a", &[2, 0]), ("b", &[1, 3])]),
        safetensors(&[("model.norm.weight", &[HIDDEN]), ("lm_head.weight", &[2, HIDDEN])]),
    ]
}

/// A shape of experts that differ in width.
fn shape() -> MoeShape {
    let layer = |layer| MoeLayerShape { layer, widths: vec![3, 2] };
    MoeShape { gateless: false, hidden_size: 4, top_k: 1, layers: vec![layer(0), layer(2)] }
}

/// Score tables of units and of experts.
pub fn scores() -> Vec<Vec<u8>> {
    let table = |granularity, whole: bool| {
        let layers = shape().layers.into_iter().map(|layer| LayerScores {
            layer: layer.layer,
            scores: match granularity {
                Granularity::Unit => layer.widths.iter().map(|width| vec![0.5; *width]).collect(),
                Granularity::Expert => vec![vec![1.0]; layer.widths.len()],
            },
            routed: Some(vec![3, 0]),
            whole: whole.then(|| WholeScores { layer: 1.0, experts: vec![0.5, -0.5] }),
        });
        ScoreTable {
            scorer: r#"{"type":"reap"}"#.into(),
            granularity,
            pool: Pool::Layer,
            additive: None,
            denominator: Denominator::AllTokens,
            layers: layers.collect(),
            provenance: Provenance::new("model", "data", "{}"),
        }
    };
    [(Granularity::Unit, true), (Granularity::Unit, false), (Granularity::Expert, false)]
        .map(|(granularity, whole)| written(|path| table(granularity, whole).save(path)))
        .into()
}

/// Statistics without arrays, and with one of each extent.
pub fn statistics() -> Vec<Vec<u8>> {
    use moe_checkpoint::Fold;
    let empty = || Statistics::new(&shape(), Provenance::new("model", "data", "{}"));
    let mut full = empty();
    full.begin(3);
    full.add_counts(5, 2, 4);
    let filled = full
        .unit_mut("units", Fold::Sum, 2, 1)
        .map(|values| values.fill(0.5))
        .and_then(|()| full.expert_mut("experts", Fold::Max, 0).map(|values| values.fill(2.0)))
        .and_then(|()| full.matrix_mut("matrix", [2, 2], Fold::Sum).map(|values| values.fill(1.0)));
    filled.unwrap_or_else(|error| panic!("{error}"));
    [empty(), full].map(|statistics| written(|path| statistics.save(path))).into()
}

/// Edits of the plan.
pub fn edits() -> Vec<Vec<u8>> {
    let mut edits = Edits::new();
    edits.set_expert(0, 1, ExpertEdit { down: Some(vec![0.5; HIDDEN * WIDTH]), down_bias: Some(vec![0.25; HIDDEN]) });
    edits.set_router(0, vec![0.125; EXPERTS * HIDDEN]);
    vec![written(|path| edits.save(path, &PLAN)), written(|path| Edits::new().save(path, &PLAN))]
}

/// The config that adapters are read by.
pub fn adapter_config() -> Vec<u8> {
    let config = json!({
        "peft_type": "LORA", "base_model_name_or_path": "m", "r": 2, "lora_alpha": 4, "bias": "none",
        "target_modules": ["q_proj", "v_proj", "w1"], "modules_to_save": null, "use_dora": false, "use_rslora": false,
        "target_parameters": ["mlp.experts.down_proj"], "trainable_token_indices": null, "task_type": "CAUSAL_LM"
    });
    config.to_string().into_bytes()
}

/// Adapters of attention, of experts by themselves and all in one, of the head, and with trained parts beside.
pub fn adapters() -> Vec<Vec<u8>> {
    const LAYER: &str = "base_model.model.model.layers.0.";
    let of = |tensors: &[(&str, &[usize])]| {
        let names: Vec<String> = tensors.iter().map(|(name, _)| format!("{LAYER}{name}")).collect();
        let tensors: Vec<_> = names.iter().zip(tensors).map(|(name, (_, shape))| (name.as_str(), *shape)).collect();
        safetensors(&tensors)
    };
    const Q: [(&str, &[usize]); 2] =
        [("self_attn.q_proj.lora_A.weight", &[2, HIDDEN]), ("self_attn.q_proj.lora_B.weight", &[HIDDEN, 2])];
    vec![
        of(&Q),
        of(&[Q[0], Q[1], ("self_attn.q_proj.lora_magnitude_vector", &[HIDDEN])]),
        of(&[Q[0], Q[1], ("self_attn.v_proj.base_layer.bias", &[HIDDEN])]),
        of(&[
            ("block_sparse_moe.experts.1.w1.lora_A.weight", &[2, HIDDEN]),
            ("block_sparse_moe.experts.1.w1.lora_B.weight", &[WIDTH, 2]),
        ]),
        of(&[
            ("mlp.experts.lora_A.weight", &[2 * EXPERTS, WIDTH]),
            ("mlp.experts.lora_B.weight", &[HIDDEN, 2 * EXPERTS]),
        ]),
        safetensors(&[
            ("base_model.model.lm_head.lora_A.weight", &[2, HIDDEN]),
            ("base_model.model.lm_head.lora_B.weight", &[VOCABULARY, 2]),
            ("base_model.model.model.embed_tokens.lora_embedding_A", &[2, VOCABULARY]),
            ("base_model.model.model.embed_tokens.lora_embedding_B", &[HIDDEN, 2]),
        ]),
    ]
}

/// Deltas of an adapter, in every coding.
pub fn deltas() -> Vec<Vec<u8>> {
    let (mut weights, ones) = (adapters().swap_remove(0), 1.5f32.to_le_bytes());
    // Every other value of the last rows.
    let end = weights.len();
    weights[end - 40..].chunks_exact_mut(8).for_each(|pair| pair[..4].copy_from_slice(&ones));
    scratch::file("delta-of/adapter_config.json", &adapter_config());
    let weights = scratch::file("delta-of/adapter_model.safetensors", &weights);
    let directory = weights.parent().unwrap_or(&weights);
    let of = TaskVector::Adapter { directory, start: 0.0 };
    let sparse = |values| ComPeft { density: 0.2, values };
    vec![
        written(|path| PlainDelta::Changed.encode(of, path).map(drop)),
        written(|path| PlainDelta::Difference { dtype: Dtype::BF16 }.encode(of, path).map(drop)),
        written(|path| sparse(KeptValues::SignedMean).encode(of, path).map(drop)),
        written(|path| sparse(KeptValues::Unchanged { dtype: Dtype::F16 }).encode(of, path).map(drop)),
    ]
}

//! To a checkpoint: what the modules hold, as a model that is written, pruned or run like any other.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use burn::nn::Linear;
use burn::tensor::Tensor;
use moe_checkpoint::{
    Checkpoint, Dtype, ExpertPart, ExpertTensor, Family, LayerRole, ModelDescription, ModelSource, RawMatrix, Role,
    Step, TensorInfo, TensorSpec, encode, family, sliced,
};
use serde_json::{Value, json};

use super::{LoadError, MoeTransformer, QkNorm, TransformerConfig};
use crate::routing::{Combine, Score, host};

/// Matrices of the experts of a layer on the host, `[experts, out, in]`: gate, up, down.
type Experts = [Vec<f32>; 3];

/// The weights of a model in memory.
struct Trained {
    base: Option<Arc<Checkpoint>>,
    tensors: BTreeMap<String, Vec<f32>>,
    experts: BTreeMap<usize, Experts>,
    dtypes: BTreeMap<usize, Dtype>,
    hidden: usize,
    width: usize,
    digest: String,
}

fn encoded(values: &[f32], dtype: Dtype, what: &str) -> moe_checkpoint::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(values.len() * dtype.bitsize() / 8);
    match encode(dtype, values, &mut bytes) && values.iter().all(|value| value.is_finite()) {
        true => Ok(bytes),
        false => Err(moe_checkpoint::Error::method(std::io::Error::other(format!(
            "{what}: values that are not finite, or no {dtype}"
        )))),
    }
}

impl ModelSource for Trained {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> moe_checkpoint::Result<Cow<'_, [u8]>> {
        match (self.tensors.get(&tensor.name), &self.base) {
            (Some(values), _) => Ok(sliced(Cow::Owned(encoded(values, tensor.dtype, &tensor.name)?), range)),
            // Carried along: nothing that runs.
            (None, Some(base)) => base.plain_bytes(&tensor.name, range),
            (None, None) => Err(moe_checkpoint::Error::method(std::io::Error::other(format!("no {}", tensor.name)))),
        }
    }

    fn makes_experts(&self, layer: usize) -> bool {
        self.experts.contains_key(&layer)
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> moe_checkpoint::Result<Option<RawMatrix<'_>>> {
        let Some(position) = ExpertPart::ALL.iter().position(|of| *of == part) else { return Ok(None) };
        let (Some(stacks), Some(dtype)) = (self.experts.get(&layer), self.dtypes.get(&layer)) else { return Ok(None) };
        let (rows, cols) = part.dims(self.hidden, self.width);
        let Some(values) = stacks[position].chunks_exact(rows * cols).nth(set) else { return Ok(None) };
        let bytes = encoded(values, *dtype, &format!("expert {set} of layer {layer}"))?;
        Ok(Some(RawMatrix { bytes: bytes.into(), dtype: *dtype, rows, cols }))
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        self.base.as_ref()
    }

    fn step(&self) -> Option<Step> {
        let base = self.base.as_ref()?;
        let recipe = json!({ "weights": self.digest });
        Some(Step::new("train", base, recipe, "all weights trained as Burn modules"))
    }

    fn fingerprint(&self, _model: &Checkpoint) -> String {
        self.step().map_or_else(|| self.digest.clone(), |step| step.digest)
    }
}

/// What of a model no stock family has: everything at once.
fn refused(config: &TransformerConfig) -> Vec<String> {
    let mut reasons = Vec::new();
    let mut refuse = |unless: bool, reason: &str| {
        if !unless {
            reasons.push(reason.to_string());
        }
    };
    let router = config.moe.router_config();
    refuse(config.attention.latent.is_none(), "latent attention: give the checkpoint that it was read from");
    refuse(config.attention.clip.is_none() && !config.attention.interleaved, "bounds or neighboring rotation");
    refuse(!config.attention.output_bias, "a bias on the output of the attention");
    refuse(config.attention.scale.is_none() && config.attention.window.is_none(), "a window or scale of attention");
    refuse(config.moe.capacity.is_none(), "a capacity of experts");
    refuse(router.score == Score::Softmax && router.scale == 1.0, "scores other than a softmax, or scaled ones");
    refuse(!router.bias && !router.selection_bias && router.groups.is_none(), "biases or groups of the router");
    let qk_norm = config.attention.qk_norm;
    refuse(qk_norm != QkNorm::Projection, "norms of whole projections: give the checkpoint that it was read from");
    let shared = config.moe.shared.as_ref();
    refuse(qk_norm == QkNorm::None || shared.is_none(), "norms of queries and a shared expert together");
    refuse(qk_norm == QkNorm::Head || shared.is_some_and(|shared| shared.gated), "no shared expert with a gate");
    refuse(config.moe.activation == crate::Activation::Silu, "an activation other than SiLU");
    reasons
}

/// The stock config of a model that came from no checkpoint: `qwen3_moe` with norms of queries, else `qwen2_moe`.
fn stock_config(config: &TransformerConfig) -> Value {
    let (attention, moe) = (&config.attention, &config.moe);
    let qwen3 = attention.qk_norm == QkNorm::Head;
    let renormalize = moe.router_config().combine != Combine::Raw;
    let mut stock = json!({
        "architectures": [if qwen3 { "Qwen3MoeForCausalLM" } else { "Qwen2MoeForCausalLM" }],
        "model_type": if qwen3 { "qwen3_moe" } else { "qwen2_moe" },
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "rope_theta": attention.rope_theta,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.d_ff,
        "intermediate_size": config.d_ff.max(1),
        "mlp_only_layers": config.dense_layers,
        "decoder_sparse_step": 1,
        "norm_topk_prob": renormalize,
        "use_sliding_window": false,
        "torch_dtype": "float32",
    });
    match &moe.shared {
        Some(shared) => {
            stock["shared_expert_intermediate_size"] = json!(shared.d_ff);
            stock["qkv_bias"] = json!(attention.qkv_bias);
        }
        None => stock["attention_bias"] = json!(attention.qkv_bias),
    }
    stock
}

/// Collects tensors by the names of a family.
struct Collected<'a> {
    family: &'a dyn Family,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Collected<'_> {
    fn add<const D: usize>(&mut self, role: Role, tensor: Tensor<D>) {
        self.tensors.insert(self.family.tensor_name(role), (tensor.dims().to_vec(), host(&tensor)));
    }

    fn linear(&mut self, weight: Role, bias: Option<Role>, linear: &Linear) {
        self.add(weight, linear.weight.val().transpose());
        if let (Some(role), Some(bias)) = (bias, &linear.bias) {
            self.add(role, bias.val());
        }
    }
}

impl MoeTransformer {
    /// This model as a checkpoint: to be [written](moe_checkpoint::write()), pruned, run by the engine. With the
    /// checkpoint that it was read from, names, layouts, dtypes and side files are that one's; without, it is a stock
    /// `qwen3_moe` if it has norms of queries and keys, else a `qwen2_moe`, in f32.
    ///
    /// # Errors
    /// [`LoadError::NotRepresentable`], which lists everything that the stock families lack; those of verification, for
    /// a base of another shape.
    pub fn to_checkpoint(
        &self,
        config: &TransformerConfig,
        base: Option<&Arc<Checkpoint>>,
    ) -> Result<Arc<Checkpoint>, LoadError> {
        let base = base.map(|base| base.dequantized()).transpose()?;
        let stock = stock_config(config);
        let family = match &base {
            Some(base) => base.family(),
            None => {
                let reasons = refused(config);
                if !reasons.is_empty() {
                    return Err(LoadError::NotRepresentable { what: "the model".into(), reasons });
                }
                family(stock["model_type"].as_str().unwrap_or_default())?
            }
        };
        let mut collected = Collected { family, tensors: BTreeMap::new() };
        self.collect(&mut collected);
        let experts: BTreeMap<usize, Experts> = self.expert_stacks();
        let mut hasher = blake3::Hasher::new();
        let mut hash = |values: &[f32]| {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            hasher.update(&bytes);
        };
        collected.tensors.values().for_each(|(_, values)| hash(values));
        experts.values().flatten().for_each(|values| hash(values));
        let digest = hasher.finalize().to_hex().to_string();
        let mut dtypes = BTreeMap::new();
        for layer in experts.keys() {
            let of_base = base.as_ref().map(|base| base.expert_dtype(*layer, 0, ExpertPart::Up)).transpose()?;
            dtypes.insert(*layer, of_base.flatten().unwrap_or(Dtype::F32));
        }
        let description = match &base {
            Some(base) => ModelDescription::of(base),
            None => {
                let specs = collected.tensors.iter().map(|(name, (shape, _))| (name.clone(), shape.clone()));
                let (d, f) = (config.d_model, config.moe.d_ff);
                let of_experts = experts.keys().flat_map(|layer| {
                    (0..config.moe.num_experts).flat_map(move |expert| {
                        let tensors = [
                            (ExpertTensor::Gate(expert), vec![f, d]),
                            (ExpertTensor::Up(expert), vec![f, d]),
                            (ExpertTensor::Down(expert), vec![d, f]),
                        ];
                        tensors.map(|(tensor, shape)| (family.expert_tensor_name(*layer, tensor), shape))
                    })
                });
                let spec = |(name, shape)| TensorSpec { name, dtype: Dtype::F32, shape };
                ModelDescription {
                    config: stock,
                    generation: None,
                    tensors: specs.chain(of_experts).map(spec).collect(),
                }
            }
        };
        let source = Trained {
            base,
            tensors: collected.tensors.into_iter().map(|(name, (_, values))| (name, values)).collect(),
            experts,
            dtypes,
            hidden: config.d_model,
            width: config.moe.d_ff,
            digest,
        };
        Ok(Arc::new(Checkpoint::from_source(description, Arc::new(source))?))
    }

    fn expert_stacks(&self) -> BTreeMap<usize, Experts> {
        let stacks = self.blocks.iter().enumerate().filter_map(|(layer, block)| {
            let experts = &block.moe.as_ref()?.experts;
            Some((layer, [&experts.gate, &experts.up, &experts.down].map(|stack| host(&stack.val().transpose()))))
        });
        stacks.collect()
    }

    fn collect(&self, into: &mut Collected<'_>) {
        into.add(Role::Embedding, self.embedding.weight.val());
        into.add(Role::FinalNorm, self.norm.gamma.val());
        if let Some(head) = &self.head {
            into.linear(Role::LmHead, None, head);
        }
        for (layer, block) in self.blocks.iter().enumerate() {
            let role = |role| Role::Layer(layer, role);
            let attention = &block.attention;
            into.add(role(LayerRole::AttentionNorm), block.attention_norm.gamma.val());
            into.add(role(LayerRole::FfnNorm), block.ffn_norm.gamma.val());
            into.linear(role(LayerRole::Output), Some(role(LayerRole::OutputBias)), &attention.output);
            if attention.config.latent.is_some() {
                let query = match &attention.query_down {
                    Some(down) => {
                        into.linear(role(LayerRole::LatentQueryDown), None, down);
                        LayerRole::LatentQueryUp
                    }
                    None => LayerRole::Query,
                };
                into.linear(role(query), None, &attention.query);
                into.linear(role(LayerRole::LatentKvDown), None, &attention.key);
                into.linear(role(LayerRole::LatentKvUp), None, &attention.value);
            } else {
                into.linear(role(LayerRole::Query), Some(role(LayerRole::QueryBias)), &attention.query);
                into.linear(role(LayerRole::Key), Some(role(LayerRole::KeyBias)), &attention.key);
                into.linear(role(LayerRole::Value), Some(role(LayerRole::ValueBias)), &attention.value);
            }
            let norms = [
                (LayerRole::LatentQueryNorm, &attention.query_latent_norm),
                (LayerRole::LatentKvNorm, &attention.latent_norm),
                (LayerRole::QueryNorm, &attention.query_norm),
                (LayerRole::KeyNorm, &attention.key_norm),
            ];
            for (of, norm) in norms {
                if let Some(norm) = norm {
                    into.add(role(of), norm.gamma.val());
                }
            }
            if let Some(dense) = &block.dense {
                into.linear(role(LayerRole::DenseGate), None, &dense.gate);
                into.linear(role(LayerRole::DenseUp), None, &dense.up);
                into.linear(role(LayerRole::DenseDown), None, &dense.down);
            }
            let Some(moe) = &block.moe else { continue };
            into.linear(role(LayerRole::Router), None, &moe.router.gate);
            if let Some(shared) = &moe.shared {
                into.linear(role(LayerRole::SharedGate), None, &shared.network.gate);
                into.linear(role(LayerRole::SharedUp), None, &shared.network.up);
                into.linear(role(LayerRole::SharedDown), None, &shared.network.down);
                if let Some(gate) = &shared.gate {
                    into.linear(role(LayerRole::SharedExpertGate), None, gate);
                }
            }
        }
    }
}

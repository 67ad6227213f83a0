//! A decoder model whose weights are read from a checkpoint piece by piece.

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

use burn::tensor::{Device, Tensor};
use moe_checkpoint::{Checkpoint, Dtype, Ffn, LayerRole, ModelConfig, QkNorm, RawMatrix, Role};

use crate::{
    error::{Error, Result},
    experts::ExpertTensors,
    host,
    kernels::{
        attention::AttentionShape,
        rope::RotaryEmbedding,
        weight::{Bf16Source, Weight},
    },
    layers::{AttentionLayer, DenseBlock, FfnLayer},
    memory::{self, Residency},
    overlay::ExpertOverlay,
    router::Router,
};

/// A checkpoint on a device. Weights are converted to f32 when they are used; a [`Residency`] says which stay.
///
/// Cloning is cheap in memory only through [`with_overlay`](Self::with_overlay), which shares the open checkpoint.
pub struct Model {
    checkpoint: Arc<Checkpoint>,
    device: Device,
    max_memory: Option<u64>,
    overlay: Option<Arc<dyn ExpertOverlay>>,
    rope: RotaryEmbedding,
    router: Router,
    cache: Mutex<Cache>,
}

#[derive(Default)]
struct Cache {
    residency: Residency,
    attention: Vec<Option<AttentionLayer>>,
    ffn: Vec<Option<FfnLayer>>,
    experts: Vec<Option<ExpertTensors>>,
    head: Option<Vec<Weight>>,
    final_norm: Option<Tensor<1>>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("dir", &self.checkpoint.dir()).field("device", &self.device).finish()
    }
}

impl Model {
    /// Opens the checkpoint directory `dir` on `device`. `max_memory` in bytes bounds what sweeps and generation keep;
    /// without it, six tenths of the machine's free memory. It never changes results.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`], and [`Error::Unsupported`] for routing or rope rules without an implementation.
    pub fn open(dir: impl AsRef<Path>, device: &Device, max_memory: Option<u64>) -> Result<Self> {
        Self::new(Arc::new(Checkpoint::open(dir)?), device, max_memory)
    }

    /// The same for a checkpoint that is already open.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn new(checkpoint: Arc<Checkpoint>, device: &Device, max_memory: Option<u64>) -> Result<Self> {
        let config = checkpoint.config();
        let rope = RotaryEmbedding::new(&config.rope, config.attention.head_dim)?;
        let router = Router::new(&config.routing)?;
        let (layers, experts) = (config.layers.len(), checkpoint.shape().layers.iter().map(|l| l.widths.len()).sum());
        let cache = Cache {
            attention: (0..layers).map(|_| None).collect(),
            ffn: (0..layers).map(|_| None).collect(),
            experts: (0..experts).map(|_| None).collect(),
            ..Cache::default()
        };
        Ok(Self { device: device.clone(), max_memory, overlay: None, rope, router, cache: Mutex::new(cache), checkpoint })
    }

    /// The same checkpoint seen through `overlay`, with a cache of its own.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_overlay(&self, overlay: Arc<dyn ExpertOverlay>) -> Result<Self> {
        let mut model = Self::new(self.checkpoint.clone(), &self.device, self.max_memory)?;
        model.overlay = Some(overlay);
        Ok(model)
    }

    /// Its configuration.
    pub fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    /// The checkpoint it reads.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// The device it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The memory limit asked for, in bytes.
    pub fn max_memory(&self) -> Option<u64> {
        self.max_memory
    }

    /// Rotary embedding of its heads.
    pub(crate) fn rope(&self) -> &RotaryEmbedding {
        &self.rope
    }

    /// Routing rule.
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// Decides what stays in memory from now on and drops what does not.
    pub(crate) fn set_residency(&self, residency: Residency) {
        let mut cache = self.lock();
        for layer in residency.layers..cache.attention.len() {
            cache.attention[layer] = None;
            cache.ffn[layer] = None;
        }
        for expert in cache.experts.iter_mut().skip(residency.experts) {
            *expert = None;
        }
        if !residency.head {
            cache.head = None;
        }
        cache.residency = residency;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Cache> {
        // a panic elsewhere cannot leave the cache half-changed: entries are whole or absent
        self.cache.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Attention of decoder layer `layer`.
    pub(crate) fn attention(&self, layer: usize) -> Result<AttentionLayer> {
        if let Some(found) = &self.lock().attention[layer] {
            return Ok(found.clone());
        }
        let config = self.config();
        let a = &config.attention;
        let role = |r| Role::Layer(layer, r);
        let (h, q, kv) = (config.hidden_size, a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim);
        let bias = |present: bool, r, len| present.then(|| self.vector(role(r), len)).transpose();
        let loaded = AttentionLayer {
            norm: self.vector(role(LayerRole::AttentionNorm), h)?,
            qkv: [
                (self.weight(&[role(LayerRole::Query)], [q, h])?, bias(a.qkv_bias, LayerRole::QueryBias, q)?),
                (self.weight(&[role(LayerRole::Key)], [kv, h])?, bias(a.qkv_bias, LayerRole::KeyBias, kv)?),
                (self.weight(&[role(LayerRole::Value)], [kv, h])?, bias(a.qkv_bias, LayerRole::ValueBias, kv)?),
            ],
            output: (self.weight(&[role(LayerRole::Output)], [h, q])?, bias(a.output_bias, LayerRole::OutputBias, h)?),
            qk_norm: match a.qk_norm {
                QkNorm::None => None,
                _ => Some((
                    self.vector(role(LayerRole::QueryNorm), a.head_dim)?,
                    self.vector(role(LayerRole::KeyNorm), a.head_dim)?,
                )),
            },
            shape: AttentionShape {
                heads: a.num_heads,
                kv_heads: a.num_kv_heads,
                head_dim: a.head_dim,
                scale: 1.0 / (a.head_dim as f32).sqrt(),
                window: config.layers[layer].sliding_window,
            },
            eps: config.norm_eps as f32,
        };
        let mut cache = self.lock();
        if layer < cache.residency.layers {
            cache.attention[layer] = Some(loaded.clone());
        }
        Ok(loaded)
    }

    /// Norm, router, and dense or shared block of decoder layer `layer`.
    pub(crate) fn ffn(&self, layer: usize) -> Result<FfnLayer> {
        if let Some(found) = &self.lock().ffn[layer] {
            return Ok(found.clone());
        }
        let config = self.config();
        let h = config.hidden_size;
        let role = |r| Role::Layer(layer, r);
        let block = |gate, up, down, width: usize| -> Result<ExpertTensors> {
            Ok(ExpertTensors {
                gate_up: self.weight(&[role(gate), role(up)], [2 * width, h])?,
                down: self.weight(&[role(down)], [h, width])?,
            })
        };
        let (dense, router) = match &config.layers[layer].ffn {
            Ffn::Dense { intermediate_size } => {
                let weights =
                    block(LayerRole::DenseGate, LayerRole::DenseUp, LayerRole::DenseDown, *intermediate_size)?;
                (Some(DenseBlock { weights, gate: None }), None)
            }
            Ffn::Moe(moe) => {
                let shared = match &moe.shared {
                    Some(shared) => {
                        let width = shared.intermediate_size;
                        let weights = block(LayerRole::SharedGate, LayerRole::SharedUp, LayerRole::SharedDown, width)?;
                        let gate = match shared.gated {
                            true => Some(self.weight(&[role(LayerRole::SharedExpertGate)], [1, h])?),
                            false => None,
                        };
                        Some(DenseBlock { weights, gate })
                    }
                    None => None,
                };
                (shared, Some(self.weight(&[role(LayerRole::Router)], [moe.num_experts(), h])?))
            }
        };
        let norm = self.vector(role(LayerRole::FfnNorm), h)?;
        let loaded = FfnLayer { norm, eps: config.norm_eps as f32, dense, router };
        let mut cache = self.lock();
        if layer < cache.residency.layers {
            cache.ffn[layer] = Some(loaded.clone());
        }
        Ok(loaded)
    }

    /// Routed expert `expert` of decoder layer `layer`, through the overlay.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it cannot be read, or the overlay's error.
    pub fn expert(&self, layer: usize, expert: usize) -> Result<ExpertTensors> {
        let index = self.expert_index(layer, expert)?;
        if let Some(found) = &self.lock().experts[index] {
            return Ok(found.clone());
        }
        let loaded = match &self.overlay {
            Some(overlay) => {
                ExpertTensors::new(overlay.apply(layer, expert, self.checkpoint.expert(layer, expert)?)?, &self.device)
            }
            None => self.load_expert(layer, expert)?,
        };
        let mut cache = self.lock();
        if index < cache.residency.experts {
            cache.experts[index] = Some(loaded.clone());
        }
        Ok(loaded)
    }

    fn load_expert(&self, layer: usize, expert: usize) -> Result<ExpertTensors> {
        let bytes = self.checkpoint.expert_bytes(layer, expert)?;
        let bf16 = [&bytes.gate, &bytes.up, &bytes.down].iter().all(|m| m.dtype == Dtype::BF16);
        if !(bf16 && Weight::prefers_bf16(&self.device)) {
            return Ok(ExpertTensors::new(self.checkpoint.expert(layer, expert)?, &self.device));
        }
        let (width, hidden) = (bytes.gate.rows, bytes.gate.cols);
        let source = |down: bool| -> Bf16Source {
            let checkpoint = self.checkpoint.clone();
            Box::new(move |f| {
                let bytes = checkpoint.expert_bytes(layer, expert).expect("found when the weight was made");
                if down {
                    f(&rows(&bytes.down));
                } else {
                    f(&[rows(&bytes.gate), rows(&bytes.up)].concat());
                }
                checkpoint.release_expert(layer, expert).expect("found when the weight was made");
            })
        };
        Ok(ExpertTensors {
            gate_up: Weight::from_bf16(2 * width, hidden, &self.device, source(false)),
            down: Weight::from_bf16(hidden, width, &self.device, source(true)),
        })
    }

    fn expert_index(&self, layer: usize, expert: usize) -> Result<usize> {
        let mut index = 0;
        for l in &self.checkpoint.shape().layers {
            if l.layer == layer && expert < l.widths.len() {
                return Ok(index + expert);
            }
            index += l.widths.len();
        }
        Err(Error::input("routed expert", format!("layer {layer}, expert {expert}"), "one of the model's"))
    }

    /// Embeddings of token ids `[T, H]`.
    ///
    /// # Errors
    /// [`Error::Input`] for an id past the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor<2>> {
        let (h, vocab) = (self.config().hidden_size, self.config().vocab_size);
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::input("token id", id, format!("below the vocabulary size {vocab}")));
        }
        let mut values = Vec::with_capacity(ids.len() * h);
        for &id in ids {
            values.extend(self.checkpoint.read_f32_rows(Role::Embedding, id as usize..id as usize + 1)?);
        }
        Ok(host::from_vec(values, [ids.len(), h], &self.device))
    }

    /// Weight of the final norm `[H]`.
    pub(crate) fn final_norm(&self) -> Result<Tensor<1>> {
        if let Some(found) = &self.lock().final_norm {
            return Ok(found.clone());
        }
        let loaded = self.vector(Role::FinalNorm, self.config().hidden_size)?;
        self.lock().final_norm = Some(loaded.clone());
        Ok(loaded)
    }

    /// Number of vocabulary blocks of the output head.
    pub(crate) fn head_blocks(&self) -> usize {
        let config = self.config();
        config.vocab_size.div_ceil(memory::head_block_rows(config.hidden_size))
    }

    /// Block `block` of the output head `[V_b, H]`.
    pub(crate) fn head_block(&self, block: usize) -> Result<Weight> {
        if let Some(found) = &self.lock().head {
            return Ok(found[block].clone());
        }
        let load = |block: usize| -> Result<Weight> {
            let config = self.config();
            let (rows, h) = (memory::head_block_rows(config.hidden_size), config.hidden_size);
            let range = block * rows..((block + 1) * rows).min(config.vocab_size);
            let n = range.len();
            if let Some(weight) = self.bf16_weight(&[Role::LmHead], Some(range.clone()), [n, h])? {
                return Ok(weight);
            }
            let values = self.checkpoint.read_f32_rows(Role::LmHead, range)?;
            Ok(Weight::dense(host::from_vec(values, [n, h], &self.device)))
        };
        if self.lock().residency.head {
            let all = (0..self.head_blocks()).map(load).collect::<Result<Vec<_>>>()?;
            let found = all[block].clone();
            self.lock().head = Some(all);
            return Ok(found);
        }
        load(block)
    }

    /// The rows of some tensors, one after the other, as one weight.
    fn weight(&self, roles: &[Role], shape: [usize; 2]) -> Result<Weight> {
        if let Some(weight) = self.bf16_weight(roles, None, shape)? {
            return Ok(weight);
        }
        let mut stacked = self.checkpoint.read_f32(roles[0])?;
        for role in &roles[1..] {
            stacked.extend(self.checkpoint.read_f32(*role)?);
        }
        Ok(Weight::dense(host::from_vec(stacked, shape, &self.device)))
    }

    /// The same straight from bf16 storage, where the device multiplies that best; `rows` of the first tensor only, if given.
    fn bf16_weight(
        &self,
        roles: &[Role],
        rows: Option<std::ops::Range<usize>>,
        [outputs, inputs]: [usize; 2],
    ) -> Result<Option<Weight>> {
        let infos = roles.iter().map(|&role| Ok(self.checkpoint.role(role)?)).collect::<Result<Vec<_>>>()?;
        if !(Weight::prefers_bf16(&self.device) && infos.iter().all(|info| info.dtype == Dtype::BF16)) {
            return Ok(None);
        }
        let names: Vec<String> = infos.iter().map(|info| info.name.clone()).collect();
        let checkpoint = self.checkpoint.clone();
        let source: Bf16Source = Box::new(move |f| {
            let mut all = Vec::with_capacity(outputs);
            for name in &names {
                let bytes = checkpoint.bytes(name).expect("found when the weight was made");
                let (start, count) = rows.as_ref().map_or((0, usize::MAX), |r| (r.start, r.len()));
                all.extend(bytes.chunks_exact(2 * inputs).skip(start).take(count));
            }
            f(&all);
            for name in &names {
                checkpoint.release_tensor(name).expect("found when the weight was made");
            }
        });
        Ok(Some(Weight::from_bf16(outputs, inputs, &self.device, source)))
    }

    fn vector(&self, role: Role, len: usize) -> Result<Tensor<1>> {
        Ok(host::from_vec(self.checkpoint.read_f32(role)?, [len], &self.device))
    }
}

fn rows<'a>(matrix: &RawMatrix<'a>) -> Vec<&'a [u8]> {
    (0..matrix.rows).filter_map(|i| matrix.row(i)).collect()
}

//! A decoder model whose weights are read from a checkpoint piece by piece.

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

use burn::tensor::Device;
use moe_checkpoint::human::variant;
use moe_checkpoint::{Activation, Checkpoint, ModelConfig};

mod adapted;
mod attention;
mod compressed;
mod experts;
mod ffn;
mod head;
mod layer_input;
mod mixers;
mod read_ahead;
mod streams;
mod tensors;
mod views;
mod work;

pub use work::Work;

use crate::{
    adapters::Adapters,
    adaptive::RunTime,
    depth::{DepthRule, LayerPath},
    error::{Error, Result},
    expert_cache::{ExpertCacheStatistics, ExpertStream},
    experts::ExpertTensors,
    kernels::{
        rope::{Positions, RotaryEmbedding, RotaryTable},
        swiglu::GatedActivation,
        weight::ReadFailure,
    },
    layers::{FfnLayer, HeadInput, LayerInput, Linear, MixerLayer},
    memory::Residency,
    overlay::{ExpertOverlay, RoutingOverlay},
    precision::Precision,
    router::Router,
};

/// A checkpoint on a device. Weights are converted to f32 when they are used; a [`Residency`] says which stay.
///
/// [`with_overlays`](Self::with_overlays) gives another view of the same open checkpoint.
pub struct Model {
    checkpoint: Arc<Checkpoint>,
    device: Device,
    max_memory: Option<u64>,
    precision: Precision,
    decoded_per_use: bool,
    stream: Option<ExpertStream>,
    experts: Option<Arc<dyn ExpertOverlay>>,
    routing: Option<Arc<dyn RoutingOverlay>>,
    adapters: Option<Arc<dyn Adapters>>,
    path: Arc<LayerPath>,
    depth: Option<Arc<dyn DepthRule>>,
    /// Whether the residual stream has mean zero, so that LayerNorms are RMSNorms.
    centered: bool,
    work: work::WorkCounts,
    ahead: read_ahead::ReadAhead,
    rope: RotaryEmbedding,
    /// Of layers with a window, where they have their own.
    local_rope: Option<RotaryEmbedding>,
    router: Router,
    /// Of the routed experts of every layer.
    activations: Vec<GatedActivation>,
    failure: ReadFailure,
    cache: Mutex<Cache>,
}

/// Rotary embedding of some tokens in all layers.
pub(crate) struct RotaryTables {
    all: RotaryTable,
    local: Option<RotaryTable>,
}

impl RotaryTables {
    /// That of a layer.
    pub fn of(&self, config: &ModelConfig, layer: usize) -> &RotaryTable {
        self.local.as_ref().filter(|_| config.local_of(layer).is_some()).unwrap_or(&self.all)
    }
}

#[derive(Default)]
struct Cache {
    residency: Residency,
    mixers: Vec<Option<MixerLayer>>,
    ffn: Vec<Option<FfnLayer>>,
    layer_inputs: Vec<Option<LayerInput>>,
    experts: Vec<Option<ExpertTensors>>,
    head: Option<Vec<Linear>>,
    final_norm: Option<HeadInput>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("dir", &self.checkpoint.dir()).field("device", &self.device).finish()
    }
}

impl Model {
    /// Opens the checkpoint directory `dir` on `device`, and runs it as the file
    /// [`run_time.json`](crate::adaptive::RunTime::save_beside) in it says, if there is one. `max_memory` in bytes
    /// bounds what sweeps and generation keep; without it, six tenths of the machine's free memory. It never changes
    /// results.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`], [`Error::Unsupported`] for a rule without an implementation (routing, rope,
    /// attention, norm, activation), and [`Error::Input`] for routing by groups that do not fit the number of experts,
    /// and for run-time options that do not fit the model.
    pub fn open(dir: impl AsRef<Path>, device: &Device, max_memory: Option<u64>) -> Result<Self> {
        let run_time = RunTime::beside(dir.as_ref())?;
        let model = Self::new(Arc::new(Checkpoint::open(dir)?), device, max_memory)?;
        Ok(run_time.on(&model)?.unwrap_or(model))
    }

    /// The same for a checkpoint that is already open.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn new(checkpoint: Arc<Checkpoint>, device: &Device, max_memory: Option<u64>) -> Result<Self> {
        let config = checkpoint.config();
        if let Some(reason) = checkpoint.cannot_run() {
            return Err(Error::Unsupported(format!("running `{}`: {reason}", config.model_type)));
        }
        let rope =
            RotaryEmbedding::new(&config.rope, config.attention.rotary_dim)?.with_growth(config.attention.growth);
        let local_rope = match &config.local {
            Some(local) => Some(RotaryEmbedding::new(&local.rope, local.attention.rotary_dim)?),
            None => None,
        };
        if config.layer_inputs.is_some() && !config.norms_experts() {
            let what = "inputs of the layers' own without norms after the halves of layers";
            return Err(Error::Unsupported(what.into()));
        }
        let router = Router::new(&config.routing)?;
        for moe in (0..config.layers.len()).filter_map(|layer| config.moe(layer)) {
            router.check(moe.router_rows())?;
        }
        let activations = (0..config.layers.len()).map(|layer| gated_activation(config.expert_activation(layer)));
        let activations = activations.collect::<Result<_>>()?;
        let (layers, experts) = (config.layers.len(), checkpoint.shape().layers.iter().map(|l| l.widths.len()).sum());
        let cache = Cache {
            mixers: (0..layers).map(|_| None).collect(),
            ffn: (0..layers).map(|_| None).collect(),
            layer_inputs: (0..layers).map(|_| None).collect(),
            experts: (0..experts).map(|_| None).collect(),
            ..Cache::default()
        };
        let cache = Mutex::new(cache);
        Ok(Self {
            device: device.clone(),
            max_memory,
            precision: Precision::F32,
            decoded_per_use: false,
            stream: None,
            experts: None,
            routing: None,
            adapters: None,
            path: Arc::new(LayerPath::whole(checkpoint.config().layers.len())),
            depth: None,
            centered: false,
            work: work::WorkCounts::default(),
            ahead: read_ahead::ReadAhead::default(),
            rope,
            local_rope,
            router,
            activations,
            failure: ReadFailure::default(),
            cache,
            checkpoint,
        })
    }

    /// How its products with weights are computed.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The layers that its tokens go through: all, once, unless it is under a [path](Self::with_path).
    pub fn path(&self) -> &Arc<LayerPath> {
        &self.path
    }

    /// What decides about depth while it runs.
    pub fn depth_rule(&self) -> Option<&Arc<dyn DepthRule>> {
        self.depth.as_ref()
    }

    /// What the cache of experts did, if there is one.
    pub fn expert_cache_statistics(&self) -> Option<ExpertCacheStatistics> {
        self.stream.as_ref().map(ExpertStream::statistics)
    }

    pub(crate) fn expert_stream(&self) -> Option<&ExpertStream> {
        self.stream.as_ref()
    }

    /// Bytes of the cache of experts; 0 without one.
    pub(crate) fn expert_cache_bytes(&self) -> u64 {
        self.stream.as_ref().map_or(0, |stream| stream.options().bytes.max(1))
    }

    /// Whether [weights are decoded wherever they are used](Self::with_weights_decoded_per_use).
    pub fn decodes_per_use(&self) -> bool {
        self.decoded_per_use
    }

    /// The overlay its experts are seen through.
    pub fn expert_overlay(&self) -> Option<&Arc<dyn ExpertOverlay>> {
        self.experts.as_ref()
    }

    /// The overlay its routing is seen through.
    pub fn routing_overlay(&self) -> Option<&Arc<dyn RoutingOverlay>> {
        self.routing.as_ref()
    }

    /// What this model has computed in forward passes so far, generation included.
    pub fn work(&self) -> Work {
        self.work.get()
    }

    /// How many pairs of a token and a routed expert this model has computed so far: [`work`](Self::work) has more.
    pub fn expert_rows(&self) -> u64 {
        self.work().expert_rows
    }

    pub(crate) fn count(&self) -> &work::WorkCounts {
        &self.work
    }

    /// Fails if a weight could not be read since the last time, which some weights are at their first product only.
    ///
    /// # Errors
    /// Those of reading the checkpoint.
    pub(crate) fn check_reads(&self) -> Result<()> {
        self.failure.check()
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

    /// Rotary embedding of tokens at these positions of their sequences.
    pub(crate) fn rotary_tables(&self, positions: &[Positions]) -> RotaryTables {
        let table = |rope: &RotaryEmbedding| rope.table(positions);
        RotaryTables { all: table(&self.rope), local: self.local_rope.as_ref().map(table) }
    }

    /// Routing rule.
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// How gate and up of the routed experts of a layer become a unit.
    pub fn activation(&self, layer: usize) -> GatedActivation {
        self.activations.get(layer).copied().unwrap_or_default()
    }

    /// Decides what stays in memory from now on and drops what does not.
    pub(crate) fn set_residency(&self, residency: Residency) {
        let mut cache = self.lock();
        for layer in residency.layers..cache.mixers.len() {
            cache.mixers[layer] = None;
            cache.ffn[layer] = None;
            cache.layer_inputs[layer] = None;
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
}

/// The kernel of an activation.
fn gated_activation(activation: Activation) -> Result<GatedActivation> {
    Ok(match activation {
        Activation::Silu => GatedActivation::Silu,
        Activation::ClampedSwiglu { alpha, limit } => {
            GatedActivation::ClampedSilu { alpha: alpha as f32, limit: limit as f32 }
        }
        Activation::LimitedSilu { limit } => GatedActivation::LimitedSilu { limit: limit as f32 },
        Activation::BoundedSilu { limit } => GatedActivation::BoundedSilu { limit: limit as f32 },
        Activation::Gelu => GatedActivation::Gelu,
        Activation::GeluTanh => GatedActivation::GeluTanh,
        Activation::Relu => GatedActivation::Relu,
        other => return Err(Error::Unsupported(format!("activation {}", variant(&other)))),
    })
}

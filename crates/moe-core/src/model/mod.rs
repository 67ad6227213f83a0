//! A decoder model whose weights are read from a checkpoint piece by piece.

use std::{
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use burn::tensor::{Device, Tensor};
use moe_checkpoint::{
    Activation, Checkpoint, Dtype, ExpertPart, ExpertWeights, ModelConfig, RawMatrix, Role, StreamEdit,
};

mod adapted;
mod head;
mod layers;

use crate::{
    adapters::Adapters,
    adaptive::RunTime,
    depth::{DepthRule, LayerPath},
    error::{Error, Result},
    expert_cache::{ExpertCacheOptions, ExpertCacheStatistics, ExpertStream},
    experts::ExpertTensors,
    host,
    kernels::{
        rope::{Positions, RotaryEmbedding, RotaryTable},
        swiglu::GatedActivation,
        weight::{Bf16Source, ReadFailure, Weight},
    },
    layers::{FfnLayer, Linear, MixerLayer, Norm},
    memory::Residency,
    overlay::{self, ExpertOverlay, RoutingOverlay, StackedRouting},
    router::Router,
};

/// A checkpoint on a device. Weights are converted to f32 when they are used; a [`Residency`] says which stay.
///
/// [`with_overlays`](Self::with_overlays) gives another view of the same open checkpoint.
pub struct Model {
    checkpoint: Arc<Checkpoint>,
    device: Device,
    max_memory: Option<u64>,
    decoded_per_use: bool,
    stream: Option<ExpertStream>,
    experts: Option<Arc<dyn ExpertOverlay>>,
    routing: Option<Arc<dyn RoutingOverlay>>,
    adapters: Option<Arc<dyn Adapters>>,
    path: Arc<LayerPath>,
    depth: Option<Arc<dyn DepthRule>>,
    /// Whether the residual stream has mean zero, so that LayerNorms are RMSNorms.
    centered: bool,
    expert_rows: AtomicU64,
    routed_tokens: AtomicU64,
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
    experts: Vec<Option<ExpertTensors>>,
    head: Option<Vec<Linear>>,
    final_norm: Option<Norm>,
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
        let router = Router::new(&config.routing)?;
        for moe in (0..config.layers.len()).filter_map(|layer| config.moe(layer)) {
            router.check(moe.num_experts())?;
        }
        let activations = (0..config.layers.len()).map(|layer| gated_activation(config.expert_activation(layer)));
        let activations = activations.collect::<Result<_>>()?;
        let (layers, experts) = (config.layers.len(), checkpoint.shape().layers.iter().map(|l| l.widths.len()).sum());
        let cache = Cache {
            mixers: (0..layers).map(|_| None).collect(),
            ffn: (0..layers).map(|_| None).collect(),
            experts: (0..experts).map(|_| None).collect(),
            ..Cache::default()
        };
        let cache = Mutex::new(cache);
        Ok(Self {
            device: device.clone(),
            max_memory,
            decoded_per_use: false,
            stream: None,
            experts: None,
            routing: None,
            adapters: None,
            path: Arc::new(LayerPath::whole(checkpoint.config().layers.len())),
            depth: None,
            centered: false,
            expert_rows: AtomicU64::new(0),
            routed_tokens: AtomicU64::new(0),
            rope,
            local_rope,
            router,
            activations,
            failure: ReadFailure::default(),
            cache,
            checkpoint,
        })
    }

    /// The same checkpoint seen through `overlay`, with a cache of its own and without the overlays of this model.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_overlay(&self, overlay: Arc<dyn ExpertOverlay>) -> Result<Self> {
        self.with_overlays(Some(overlay), None)
    }

    /// The same checkpoint seen through overlays of its experts and of its routing, with a cache of its own and without
    /// the overlays of this model. Sweeps, generation and evaluation honor them alike.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::Input`] for a routing overlay that does not fit the model: experts that do not
    /// exist, none left in a layer, gains or router weights of another size, groups of experts that do not lose as many
    /// each.
    pub fn with_overlays(
        &self,
        experts: Option<Arc<dyn ExpertOverlay>>,
        routing: Option<Arc<dyn RoutingOverlay>>,
    ) -> Result<Self> {
        let mut model = Self::new(self.checkpoint.clone(), &self.device, self.max_memory)?;
        if let Some(routing) = &routing {
            overlay::routing::check(&**routing, model.config(), &model.router)?;
        }
        (model.experts, model.routing) = (experts, routing);
        model.decoded_per_use = self.decoded_per_use;
        (model.path, model.depth, model.centered) = (self.path.clone(), self.depth.clone(), self.centered);
        Ok(model)
    }

    /// The same model, overlays and adapters included, with `routing` on top of what changes its routing already.
    ///
    /// # Errors
    /// As [`with_overlays`](Self::with_overlays), and [`Error::Input`] for a layer in which both have a rule, or remove
    /// experts.
    pub fn routed_by(&self, routing: Arc<dyn RoutingOverlay>) -> Result<Self> {
        let routing: Arc<dyn RoutingOverlay> = match &self.routing {
            Some(own) => Arc::new(StackedRouting::new(own.clone(), routing, self.config().layers.len())?),
            None => routing,
        };
        let model = self.with_overlays(self.experts.clone(), Some(routing))?;
        Ok(Self { adapters: self.adapters.clone(), ..model })
    }

    /// The same model, overlays and adapters included, whose tokens go through these layers. What the embeddings and
    /// the head do stays as it is.
    ///
    /// # Errors
    /// [`Error::Input`] for layers that the model does not have; [`Error::Unsupported`] where a rule decides about
    /// depth already.
    pub fn with_path(&self, path: LayerPath) -> Result<Self> {
        path.check(self.config().layers.len())?;
        if self.depth.is_some() {
            return Err(Error::Unsupported("a path of layers beside a rule that decides about them".into()));
        }
        let model = self.with_overlays(self.experts.clone(), self.routing.clone())?;
        Ok(Self { adapters: self.adapters.clone(), path: Arc::new(path), ..model })
    }

    /// The same model, overlays and adapters included, of which `rule` decides while it runs how often sequences go
    /// through a layer and which tokens skip its feed-forward half.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model under a path that leaves layers out or repeats them.
    pub fn with_depth_rule(&self, rule: Arc<dyn DepthRule>) -> Result<Self> {
        if !self.path.is_whole(self.config().layers.len()) {
            return Err(Error::Unsupported("a rule that decides about layers beside a path of layers".into()));
        }
        let model = self.with_overlays(self.experts.clone(), self.routing.clone())?;
        Ok(Self { adapters: self.adapters.clone(), depth: Some(rule), ..model })
    }

    /// The same model with the mean taken out of its residual stream, so that its LayerNorms run as RMSNorms: exact but
    /// for rounding (arXiv 2305.14858). The checkpoint is that of [`StreamEdit::Center`], which its family's loaders
    /// read as LayerNorms with the same outcome.
    ///
    /// # Errors
    /// Those of [`StreamEdit::on`]: for models that have no LayerNorms, or something else that reads the stream.
    /// [`Error::Unsupported`] for a model with overlays or adapters, which may write means of their own.
    pub fn with_folded_norms(&self) -> Result<Self> {
        if self.experts.is_some() || self.routing.is_some() || self.adapters.is_some() {
            return Err(Error::Unsupported("folding norms of a model with overlays or adapters".into()));
        }
        let model = Self::new(StreamEdit::Center.on(&self.checkpoint)?, &self.device, self.max_memory)?;
        Ok(Self { path: self.path.clone(), depth: self.depth.clone(), centered: true, ..model })
    }

    /// The layers that its tokens go through: all, once, unless it is under a [path](Self::with_path).
    pub fn path(&self) -> &Arc<LayerPath> {
        &self.path
    }

    /// What decides about depth while it runs.
    pub fn depth_rule(&self) -> Option<&Arc<dyn DepthRule>> {
        self.depth.as_ref()
    }

    /// The same model whose weights are decoded wherever they are used: between uses there are only the bytes that the
    /// checkpoint holds, so that a [packed](moe_checkpoint::Checkpoint::packed_in_memory) checkpoint takes the memory
    /// of its codes and scales whatever `max_memory` is, and a sweep decodes each matrix once forward and once
    /// backward. Adapters, overlays and generation work as ever, and results are the same to the bit.
    #[must_use]
    pub fn with_weights_decoded_per_use(mut self) -> Self {
        self.set_residency(Residency::default());
        self.decoded_per_use = true;
        self
    }

    /// The same model that reads its routed experts through a cache of so many bytes, for generation where they do not
    /// all fit. Without a second precision results are those of the model. Overlays and adapters of experts do not go
    /// with it: a model that is made of this one by them has no cache.
    ///
    /// # Errors
    /// [`Error::Input`] for a threshold outside [0, 1], a model with overlays or adapters of experts, and a second
    /// precision with other experts.
    pub fn with_expert_cache(mut self, options: ExpertCacheOptions) -> Result<Self> {
        if self.experts.is_some() || self.adapters.is_some() {
            return Err(Error::input("a model with a cache of experts", "overlays or adapters", "neither"));
        }
        if let Some(low) = &options.low {
            if !(0.0..=1.0).contains(&low.threshold) {
                return Err(Error::input("threshold", low.threshold, "a number in [0, 1]"));
            }
            if low.model.shape() != self.checkpoint.shape() {
                return Err(Error::input("the second precision", "other experts", "the model's, in another format"));
            }
        }
        self.set_residency(Residency::default());
        self.stream = Some(ExpertStream::new(&self.checkpoint, options));
        Ok(self)
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

    /// How many (token, routed expert) pairs this model has computed in forward passes so far, generation included.
    pub fn expert_rows(&self) -> u64 {
        self.expert_rows.load(Ordering::Relaxed)
    }

    /// How many (token, MoE layer) pairs this model has passed in forward passes so far, generation included: with
    /// [`expert_rows`](Self::expert_rows), the experts that a token goes to on average.
    pub fn routed_tokens(&self) -> u64 {
        self.routed_tokens.load(Ordering::Relaxed)
    }

    pub(crate) fn count_routed_tokens(&self, tokens: usize) {
        self.routed_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    pub(crate) fn count_expert_rows(&self, rows: usize) {
        self.expert_rows.fetch_add(rows as u64, Ordering::Relaxed);
    }

    /// Fails if a weight could not be read since the last time, which some weights are at their first product only.
    ///
    /// # Errors
    /// Those of reading the checkpoint.
    pub(crate) fn check_reads(&self) -> Result<()> {
        self.failure.check()
    }

    /// Fails for a sequence of so many tokens in which queries would not see all keys, but those that an indexer
    /// chooses.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub(crate) fn check_length(&self, tokens: usize) -> Result<()> {
        match self.config().attention.selects {
            Some(keys) if tokens > keys => Err(Error::Unsupported(format!(
                "running `{}` on a sequence of {tokens} tokens: its indexer would choose {keys} keys for each of them (`index_topk`); \
                 sequences of up to {keys} tokens",
                self.config().model_type
            ))),
            _ => Ok(()),
        }
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

    /// Routed expert `expert` of decoder layer `layer`, through the overlay.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it cannot be read, or the overlay's error.
    pub fn expert(&self, layer: usize, expert: usize) -> Result<ExpertTensors> {
        if let Some(stream) = &self.stream {
            return Ok(self.on_device(layer, stream.expert(layer, expert)?));
        }
        let index = self.expert_index(layer, expert)?;
        if let Some(found) = index.and_then(|index| self.lock().experts[index].clone()) {
            return Ok(found);
        }
        let loaded = self.adapted_expert(layer, expert, || match &self.experts {
            Some(overlay) => {
                Ok(self.on_device(layer, overlay.apply(layer, expert, self.checkpoint.expert(layer, expert)?)?))
            }
            None => self.load_expert(layer, expert),
        })?;
        let mut cache = self.lock();
        if let Some(index) = index.filter(|index| *index < cache.residency.experts) {
            cache.experts[index] = Some(loaded.clone());
        }
        Ok(loaded)
    }

    /// An expert as `overlay` changes what this model has.
    pub(crate) fn replaced_expert(
        &self,
        overlay: &dyn ExpertOverlay,
        layer: usize,
        expert: usize,
    ) -> Result<ExpertTensors> {
        let mut weights = self.checkpoint.expert(layer, expert)?;
        if let Some(own) = &self.experts {
            weights = own.apply(layer, expert, weights)?;
        }
        let weights = overlay.apply(layer, expert, weights)?;
        self.adapted_expert(layer, expert, || Ok(self.on_device(layer, weights)))
    }

    fn on_device(&self, layer: usize, weights: ExpertWeights) -> ExpertTensors {
        let gateless = self.config().moe(layer).is_some_and(|moe| moe.gateless);
        let make = if gateless { ExpertTensors::gateless } else { ExpertTensors::new };
        make(weights, &self.device).with_activation(self.activation(layer))
    }

    fn load_expert(&self, layer: usize, expert: usize) -> Result<ExpertTensors> {
        let config = self.config();
        let mut packed = Weight::prefers_bf16(&self.device);
        for part in ExpertPart::ALL {
            packed = packed && self.checkpoint.expert_dtype(layer, expert, part)? == Some(Dtype::BF16);
        }
        if !packed {
            return Ok(self.on_device(layer, self.checkpoint.expert(layer, expert)?));
        }
        let (width, hidden) = (config.moe(layer).map_or(0, |moe| moe.widths[expert]), config.expert_hidden_size());
        let source = |parts: &'static [ExpertPart]| -> Bf16Source {
            let checkpoint = self.checkpoint.clone();
            Box::new(move |f| {
                let mut matrices = Vec::with_capacity(parts.len());
                for part in parts {
                    matrices.extend(checkpoint.expert_part(layer, expert, *part)?);
                }
                f(&matrices.iter().flat_map(rows).collect::<Vec<_>>());
                Ok(checkpoint.release_expert(layer, expert)?)
            })
        };
        // Biases are few: f32 beside the packed matrices.
        let bias = |parts: &[ExpertPart]| -> Result<Option<Tensor<1>>> {
            let mut values = Vec::new();
            for part in parts {
                let Some(bias) = self.checkpoint.expert_part(layer, expert, *part)? else { return Ok(None) };
                values.extend(bias.to_f32());
            }
            let len = values.len();
            Ok(Some(host::from_vec(values, [len], &self.device)))
        };
        const GATE_UP: [ExpertPart; 2] = [ExpertPart::Gate, ExpertPart::Up];
        let stacked = |parts: &'static [ExpertPart]| {
            Weight::from_bf16([parts.len() * width, hidden], &self.device, source(parts), &self.failure)
        };
        Ok(ExpertTensors {
            gate_up: match config.moe(layer).is_some_and(|moe| moe.gateless) {
                true => stacked(&GATE_UP[1..])?.twice(),
                false => stacked(&GATE_UP)?,
            },
            gate_up_bias: bias(&[ExpertPart::GateBias, ExpertPart::UpBias])?,
            down: Weight::from_bf16([hidden, width], &self.device, source(&[ExpertPart::Down]), &self.failure)?,
            down_bias: bias(&[ExpertPart::DownBias])?,
            activation: self.activation(layer),
        })
    }

    /// Where an expert is cached: experts that share weights share the place. `None` where an overlay may make such
    /// experts differ.
    fn expert_index(&self, layer: usize, expert: usize) -> Result<Option<usize>> {
        let config = self.config();
        let mut index = 0;
        for l in &self.checkpoint.shape().layers {
            let Some(moe) = config.moe(l.layer) else { continue };
            if l.layer == layer && expert < moe.num_experts() {
                let differ = moe.sets.is_some() && (self.experts.is_some() || self.adapters.is_some());
                return Ok((!differ).then_some(index + moe.stored(expert)));
            }
            index += moe.stored_widths().len();
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
        let adapter = self.adapters.as_ref().and_then(|adapters| adapters.embedding());
        if !adapter.as_ref().is_some_and(|adapter| adapter.replaces()) {
            for &id in ids {
                values.extend(self.checkpoint.read_f32_rows(Role::Embedding, id as usize..id as usize + 1)?);
            }
        }
        if let Some(adapter) = adapter {
            values = adapter.rows(ids, &values);
        }
        let factor = self.config().multipliers.embedding as f32;
        if factor != 1.0 {
            values.iter_mut().for_each(|x| *x *= factor);
        }
        Ok(host::from_vec(values, [ids.len(), h], &self.device))
    }

    /// The norm before the head.
    pub(crate) fn final_norm(&self) -> Result<Norm> {
        if let Some(found) = &self.lock().final_norm {
            return Ok(found.clone());
        }
        let loaded = self.norm(Role::FinalNorm, Role::FinalNormBias)?;
        self.lock().final_norm = Some(loaded.clone());
        Ok(loaded)
    }

    /// Block `block` of the output head, from memory if it stays there.
    fn cached_head_block(&self, block: usize, load: impl Fn(usize) -> Result<Linear>) -> Result<Linear> {
        if let Some(found) = &self.lock().head {
            return Ok(found[block].clone());
        }
        if self.lock().residency.head {
            let all = (0..self.head_blocks()).map(load).collect::<Result<Vec<_>>>()?;
            let found = all[block].clone();
            self.lock().head = Some(all);
            return Ok(found);
        }
        load(block)
    }

    /// Some rows of a matrix.
    fn row_weight(&self, role: Role, rows: Range<usize>, shape: [usize; 2]) -> Result<Weight> {
        if let Some(weight) = self.bf16_weight(&[role], Some(rows.clone()), shape)? {
            return Ok(weight);
        }
        Ok(Weight::dense(host::from_vec(self.checkpoint.read_f32_rows(role, rows)?, shape, &self.device)))
    }

    /// The rows of some tensors, one after the other, as one weight.
    pub(super) fn weight(&self, roles: &[Role], shape: [usize; 2]) -> Result<Weight> {
        if let Some(weight) = self.bf16_weight(roles, None, shape)? {
            return Ok(weight);
        }
        let mut stacked = self.checkpoint.read_f32(roles[0])?;
        for role in &roles[1..] {
            stacked.extend(self.checkpoint.read_f32(*role)?);
        }
        Ok(Weight::dense(host::from_vec(stacked, shape, &self.device)))
    }

    /// The same straight from bf16 storage, where the device multiplies that best; `rows` of the first tensor only, if
    /// given.
    fn bf16_weight(
        &self,
        roles: &[Role],
        rows: Option<Range<usize>>,
        [outputs, inputs]: [usize; 2],
    ) -> Result<Option<Weight>> {
        let infos = roles.iter().map(|&role| Ok(self.checkpoint.role(role)?)).collect::<Result<Vec<_>>>()?;
        if !(Weight::prefers_bf16(&self.device) && infos.iter().all(|info| info.dtype == Dtype::BF16)) {
            return Ok(None);
        }
        let names: Vec<String> = infos.iter().map(|info| info.name.clone()).collect();
        let checkpoint = self.checkpoint.clone();
        let source: Bf16Source = Box::new(move |f| {
            let read = |name: &String| match &rows {
                Some(rows) => checkpoint.tensor_bytes(name, 2 * inputs * rows.start..2 * inputs * rows.end),
                None => checkpoint.bytes(name),
            };
            let parts = names.iter().map(read).collect::<moe_checkpoint::Result<Vec<_>>>()?;
            f(&parts.iter().flat_map(|bytes| bytes.chunks_exact(2 * inputs)).collect::<Vec<_>>());
            names.iter().try_for_each(|name| checkpoint.release_tensor(name))?;
            Ok(())
        });
        Ok(Some(Weight::from_bf16([outputs, inputs], &self.device, source, &self.failure)?))
    }

    pub(super) fn vector(&self, role: Role, len: usize) -> Result<Tensor<1>> {
        Ok(host::from_vec(self.checkpoint.read_f32(role)?, [len], &self.device))
    }
}

/// The kernel of an activation.
fn gated_activation(activation: Activation) -> Result<GatedActivation> {
    Ok(match activation {
        Activation::Silu => GatedActivation::Silu,
        Activation::ClampedSwiglu { alpha, limit } => {
            GatedActivation::ClampedSilu { alpha: alpha as f32, limit: limit as f32 }
        }
        Activation::BoundedSilu { limit } => GatedActivation::BoundedSilu { limit: limit as f32 },
        Activation::Gelu => GatedActivation::Gelu,
        Activation::GeluTanh => GatedActivation::GeluTanh,
        Activation::Relu => GatedActivation::Relu,
        other => return Err(Error::Unsupported(format!("activation {other:?}"))),
    })
}

fn rows<'a>(matrix: &'a RawMatrix<'_>) -> impl Iterator<Item = &'a [u8]> {
    (0..matrix.rows).filter_map(|i| matrix.row(i))
}

//! The adapters of a model, by place.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::{Arc, PoisonError, RwLock},
};

use moe_checkpoint::Role;
use moe_core::{
    adapters::{
        Adapters, BlockAdapter, Depth, EmbeddingAdapter, ExpertModulation, LinearAdapter, RouterAdapter, Site,
        VectorAdapter,
    },
    trace::WaveInfo,
};

use crate::{Bank, Error, Result};

/// What some adapters of a set have in common besides their places: told when a sweep begins.
pub trait SweepListener: std::fmt::Debug + Send + Sync {
    /// A sweep over a wave begins.
    fn begin_wave(&self, wave: &WaveInfo);

    /// The sweeps that follow train, as part of this step, or do not train.
    fn training(&self, step: Option<usize>) {
        let _ = step;
    }

    /// The losses beside the objective of the wave that was swept last, coefficients included, by name.
    fn losses(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }
}

/// Adapters by place, and what they train. What makes adapters puts them here;
/// [`Model::with_adapters`](moe_core::Model::with_adapters) takes the set.
#[derive(Debug)]
pub struct AdapterSet {
    linear: BTreeMap<Site, Arc<dyn LinearAdapter>>,
    head: BTreeMap<(usize, usize), Arc<dyn LinearAdapter>>,
    vectors: BTreeMap<Role, Arc<dyn VectorAdapter>>,
    blocks: BTreeMap<usize, Arc<dyn BlockAdapter>>,
    embedding: Option<Arc<dyn EmbeddingAdapter>>,
    routers: BTreeMap<usize, Vec<Arc<dyn RouterAdapter>>>,
    dense_routers: BTreeSet<usize>,
    modulations: BTreeMap<usize, Arc<dyn ExpertModulation>>,
    listeners: Vec<Arc<dyn SweepListener>>,
    bank: Bank,
    depth: RwLock<Depth>,
}

impl Default for AdapterSet {
    fn default() -> Self {
        Self {
            linear: BTreeMap::new(),
            head: BTreeMap::new(),
            vectors: BTreeMap::new(),
            blocks: BTreeMap::new(),
            embedding: None,
            routers: BTreeMap::new(),
            dense_routers: BTreeSet::new(),
            modulations: BTreeMap::new(),
            listeners: Vec::new(),
            bank: Bank::new(),
            depth: RwLock::new(Depth::Head),
        }
    }
}

impl AdapterSet {
    /// Without any.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts an adapter on a linear map of a layer or expert.
    ///
    /// # Errors
    /// [`Error::Input`] if it has one.
    pub fn add(&mut self, site: Site, adapter: Arc<dyn LinearAdapter>) -> Result<()> {
        self.reach(Depth::of(site));
        self.linear.insert(site, adapter).map_or(Ok(()), |_| Err(twice(site)))
    }

    /// Puts an adapter on rows of the output head: one of the [blocks](moe_core::Model::head_rows) it is computed in.
    ///
    /// # Errors
    /// [`Error::Input`] if they have one.
    pub fn add_head(&mut self, rows: Range<usize>, adapter: Arc<dyn LinearAdapter>) -> Result<()> {
        let what = format!("rows {rows:?} of the output head");
        self.head.insert((rows.start, rows.end), adapter).map_or(Ok(()), |_| Err(twice(what)))
    }

    /// Puts an adapter on a vector; `depth` is where in the model it is.
    ///
    /// # Errors
    /// [`Error::Input`] if it has one.
    pub fn add_vector(&mut self, role: Role, depth: Depth, adapter: Arc<dyn VectorAdapter>) -> Result<()> {
        self.reach(depth);
        self.vectors.insert(role, adapter).map_or(Ok(()), |_| Err(twice(role.to_string())))
    }

    /// Puts an adapter on the dense block or shared expert of a layer.
    ///
    /// # Errors
    /// [`Error::Input`] if it has one.
    pub fn add_block(&mut self, layer: usize, adapter: Arc<dyn BlockAdapter>) -> Result<()> {
        self.reach(Depth::FeedForward(layer));
        self.blocks.insert(layer, adapter).map_or(Ok(()), |_| Err(twice(format!("the block of layer {layer}"))))
    }

    /// Puts an adapter on the embeddings.
    ///
    /// # Errors
    /// [`Error::Input`] if they have one.
    pub fn add_embedding(&mut self, adapter: Arc<dyn EmbeddingAdapter>) -> Result<()> {
        self.reach(Depth::Embedding);
        self.embedding.replace(adapter).map_or(Ok(()), |_| Err(twice("the embeddings")))
    }

    /// Has the routing of an MoE layer watched in training, with whatever loss the adapter adds to it. There may be
    /// many.
    pub fn add_router(&mut self, layer: usize, adapter: Arc<dyn RouterAdapter>) {
        self.routers.entry(layer).or_default().push(adapter);
    }

    /// Has the router of an MoE layer get its gradient from all experts.
    pub fn set_dense_router(&mut self, layer: usize) {
        self.dense_routers.insert(layer);
    }

    /// Modulates the experts of an MoE layer.
    ///
    /// # Errors
    /// [`Error::Input`] if they are.
    pub fn add_modulation(&mut self, layer: usize, modulation: Arc<dyn ExpertModulation>) -> Result<()> {
        self.reach(Depth::FeedForward(layer));
        let before = self.modulations.insert(layer, modulation);
        before.map_or(Ok(()), |_| Err(twice(format!("the experts of layer {layer} together"))))
    }

    /// Puts an adapter that is not trained on a linear map, so that no sweep goes deeper for it.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn add_frozen(&mut self, site: Site, adapter: Arc<dyn LinearAdapter>) -> Result<()> {
        self.linear.insert(site, adapter).map_or(Ok(()), |_| Err(twice(site)))
    }

    /// The same on a vector.
    ///
    /// # Errors
    /// As [`add_vector`](Self::add_vector).
    pub fn add_frozen_vector(&mut self, role: Role, adapter: Arc<dyn VectorAdapter>) -> Result<()> {
        self.vectors.insert(role, adapter).map_or(Ok(()), |_| Err(twice(role.to_string())))
    }

    /// The same on the embeddings.
    ///
    /// # Errors
    /// As [`add_embedding`](Self::add_embedding).
    pub fn add_frozen_embedding(&mut self, adapter: Arc<dyn EmbeddingAdapter>) -> Result<()> {
        self.embedding.replace(adapter).map_or(Ok(()), |_| Err(twice("the embeddings")))
    }

    /// Has `listener` told of every sweep.
    pub fn add_listener(&mut self, listener: Arc<dyn SweepListener>) {
        self.listeners.push(listener);
    }

    /// Tells the listeners what the sweeps that follow are for: a step of training, or anything else.
    pub fn tell_training(&self, step: Option<usize>) {
        self.listeners.iter().for_each(|listener| listener.training(step));
    }

    /// The losses beside the objective of the wave that was swept last, coefficients included, by name.
    pub fn losses(&self) -> BTreeMap<String, f64> {
        let mut sums = BTreeMap::new();
        for (name, loss) in self.listeners.iter().flat_map(|listener| listener.losses()) {
            *sums.entry(name.to_owned()).or_insert(0.0) += loss;
        }
        sums
    }

    /// What the adapters train.
    pub fn bank(&self) -> &Bank {
        &self.bank
    }

    /// What the adapters train, to add to.
    pub fn bank_mut(&mut self) -> &mut Bank {
        &mut self.bank
    }

    /// The places of linear maps that have an adapter, in order.
    pub fn sites(&self) -> impl Iterator<Item = (&Site, &Arc<dyn LinearAdapter>)> {
        self.linear.iter()
    }

    /// The adapters of the output head, by their rows, in order.
    pub fn heads(&self) -> impl Iterator<Item = (Range<usize>, &Arc<dyn LinearAdapter>)> {
        self.head.iter().map(|((start, end), adapter)| (*start..*end, adapter))
    }

    /// The vectors that have an adapter, in order.
    pub fn vectors(&self) -> impl Iterator<Item = (&Role, &Arc<dyn VectorAdapter>)> {
        self.vectors.iter()
    }

    /// The layers whose experts are modulated, in order.
    pub fn modulated_layers(&self) -> impl Iterator<Item = usize> {
        self.modulations.keys().copied()
    }

    /// What a model still needs beside weights that everything else was folded into; `None` if that is nothing.
    pub(crate) fn beside_weights(&self) -> Option<Self> {
        let modulations = self.modulations.clone();
        (!modulations.is_empty()).then(|| Self { modulations, ..Self::default() })
    }

    /// The first layer whose block has an adapter as a whole.
    pub fn first_block(&self) -> Option<usize> {
        self.blocks.keys().next().copied()
    }

    /// Whether the output head has an adapter.
    pub fn has_head(&self) -> bool {
        !self.head.is_empty()
    }

    /// Sets how deep something is trained, for sets of which not everything is trained all the time. At first, as deep
    /// as there is an adapter.
    pub fn set_depth(&self, depth: Depth) {
        *self.depth.write().unwrap_or_else(PoisonError::into_inner) = depth;
    }

    pub(crate) fn reach(&mut self, depth: Depth) {
        let own = self.depth.get_mut().unwrap_or_else(PoisonError::into_inner);
        *own = own.deeper(depth);
    }
}

fn twice(place: impl ToString) -> Error {
    Error::input(format!("adapters of {}", place.to_string()), "two", "one; adapters that add up go into one")
}

impl Adapters for AdapterSet {
    fn linear(&self, site: Site) -> Option<Arc<dyn LinearAdapter>> {
        self.linear.get(&site).cloned()
    }

    fn head(&self, rows: Range<usize>) -> Option<Arc<dyn LinearAdapter>> {
        self.head.get(&(rows.start, rows.end)).cloned()
    }

    fn vector(&self, role: Role) -> Option<Arc<dyn VectorAdapter>> {
        self.vectors.get(&role).cloned()
    }

    fn block(&self, layer: usize) -> Option<Arc<dyn BlockAdapter>> {
        self.blocks.get(&layer).cloned()
    }

    fn embedding(&self) -> Option<Arc<dyn EmbeddingAdapter>> {
        self.embedding.clone()
    }

    fn router(&self, layer: usize) -> Vec<Arc<dyn RouterAdapter>> {
        self.routers.get(&layer).cloned().unwrap_or_default()
    }

    fn dense_router(&self, layer: usize) -> bool {
        self.dense_routers.contains(&layer)
    }

    fn modulation(&self, layer: usize) -> Option<Arc<dyn ExpertModulation>> {
        self.modulations.get(&layer).cloned()
    }

    fn depth(&self) -> Depth {
        *self.depth.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_wave(&self, wave: &WaveInfo) {
        self.listeners.iter().for_each(|listener| listener.begin_wave(wave));
    }
}

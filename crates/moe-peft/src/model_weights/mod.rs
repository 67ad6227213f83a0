//! Training the model's own weights: which of them, and where they live meanwhile.

mod blocks;
mod matrix;
mod sampled;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use moe_checkpoint::{Checkpoint, Role};
use moe_core::{
    Model,
    adapters::{Depth, LayerSite, Site},
};
use serde::{Deserialize, Serialize};

pub use blocks::{Block, OwnBlocks};
pub use matrix::{OwnEmbedding, OwnMatrix, OwnVector};
pub use sampled::SampledLayers;

use moe_core::train::StoredValues;

use crate::{
    AdapterSet, Error, Installed, Live, Result, Setting, TuningMethod,
    parked_values::OfCheckpoint,
    trainable_tensors::{self, Place},
};

/// Where the values of weights begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    /// In memory, as f32.
    InMemory,
    /// In the checkpoint, where matrices of layers stay in their stored form until they are trained. What always
    /// trains, and what is small, is in memory.
    Stored,
    /// In the checkpoint, all of them: to see what would be trained.
    Outlined,
}

/// Which of a model's own weights are trained. By default none are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OwnWeights {
    /// Linear maps of attention.
    pub attention: bool,
    /// Whether routers are trained.
    pub router: bool,
    /// Gate, up and down projections of routed experts.
    pub experts: bool,
    /// Only these experts of each layer; all if not given.
    #[serde(deserialize_with = "numbered")]
    pub only: Option<BTreeMap<usize, BTreeSet<usize>>>,
    /// Gate, up and down projections of shared experts.
    pub shared: bool,
    /// Gates on the output of shared experts.
    pub shared_gate: bool,
    /// Dense layers, and what layers make of inputs of their own.
    pub dense: bool,
    /// Weights and biases of norms.
    pub norms: bool,
    /// Biases of linear maps.
    pub biases: bool,
    /// Token embeddings.
    pub embeddings: bool,
    /// The output head; with tied embeddings the same as `embeddings`.
    pub head: bool,
    /// Only these decoder layers; all if not given.
    pub layers: Option<BTreeSet<usize>>,
}

/// Layers as keys of a JSON object, which are text; within a tagged enum serde does not make numbers of them by itself.
fn numbered<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<BTreeMap<usize, BTreeSet<usize>>>, D::Error> {
    use serde::de::Error as _;
    let Some(map) = Option::<BTreeMap<String, BTreeSet<usize>>>::deserialize(deserializer)? else { return Ok(None) };
    let layer = |key: String| {
        key.parse::<usize>().map_err(|_| D::Error::custom(format!("only: found layer `{key}`, expected a number")))
    };
    map.into_iter()
        .map(|(key, experts)| Ok((layer(key)?, experts)))
        .collect::<std::result::Result<_, D::Error>>()
        .map(Some)
}

impl OwnWeights {
    /// Everything: full fine-tuning.
    pub fn full() -> Self {
        Self {
            attention: true,
            router: true,
            experts: true,
            only: None,
            shared: true,
            shared_gate: true,
            dense: true,
            norms: true,
            biases: true,
            embeddings: true,
            head: true,
            layers: None,
        }
    }

    /// The routers alone.
    pub fn router() -> Self {
        Self { router: true, ..Self::default() }
    }

    /// The gates of shared experts alone.
    pub fn shared_gate() -> Self {
        Self { shared_gate: true, ..Self::default() }
    }

    /// These experts of each layer alone, with the other parts frozen.
    pub fn these_experts(only: BTreeMap<usize, BTreeSet<usize>>) -> Self {
        Self { experts: true, only: Some(only), ..Self::default() }
    }

    /// Whether this map is among them.
    pub fn has(&self, site: Site) -> bool {
        if self.layers.as_ref().is_some_and(|layers| !layers.contains(&site.layer())) {
            return false;
        }
        match site {
            Site::Expert { layer, expert, .. } => {
                let listed =
                    |only: &BTreeMap<_, BTreeSet<_>>| only.get(&layer).is_some_and(|set| set.contains(&expert));
                self.experts && self.only.as_ref().is_none_or(listed)
            }
            Site::Layer(_, LayerSite::Router) => self.router,
            Site::Layer(_, LayerSite::SharedGateUp | LayerSite::SharedPacked | LayerSite::SharedDown) => self.shared,
            // Without them, experts do not read what they did.
            Site::Layer(_, LayerSite::ExpertLatentDown | LayerSite::ExpertLatentUp) => {
                self.experts && self.only.is_none()
            }
            Site::Layer(_, LayerSite::SharedExpertGate) => self.shared_gate,
            Site::Layer(
                _,
                LayerSite::DenseGateUp | LayerSite::DenseDown | LayerSite::LayerInputGate | LayerSite::LayerInputOutput,
            ) => self.dense,
            Site::Layer(_, site) => self.attention && site.is_attention(),
        }
    }

    fn has_vector(&self, depth: Depth, norm: bool) -> bool {
        let layer = match depth {
            Depth::Attention(layer) | Depth::FeedForward(layer) => Some(layer),
            _ => None,
        };
        let layers = |layers: &BTreeSet<usize>| layer.is_none_or(|layer| layers.contains(&layer));
        (if norm { self.norms } else { self.biases }) && self.layers.as_ref().is_none_or(layers)
    }

    /// Checks the fields against a checkpoint.
    ///
    /// # Errors
    /// [`Error::Input`] for layers or experts that it does not have, and if nothing is trained.
    pub fn validate(&self, checkpoint: &Checkpoint) -> Result<()> {
        let config = checkpoint.config();
        let layers = config.layers.len();
        let listed = self.layers.iter().flatten().chain(self.only.iter().flat_map(|only| only.keys()));
        if let Some(layer) = listed.into_iter().find(|layer| **layer >= layers) {
            return Err(Error::input("trained layer", layer, format!("below the {layers} of the model")));
        }
        for (layer, experts) in self.only.iter().flatten() {
            let Some(moe) = config.moe(*layer) else {
                return Err(Error::input("layer of trained experts", layer, "one with routed experts"));
            };
            if let Some(expert) = experts.iter().find(|expert| **expert >= moe.num_experts()) {
                let expected = format!("below its {}", moe.num_experts());
                return Err(Error::input(format!("trained expert of layer {layer}"), expert, expected));
            }
        }
        Ok(())
    }

    /// Puts the weights into a set, where they are trained. Experts that share a set of weights in a grouped checkpoint
    /// are trained each by itself.
    pub(crate) fn put_into(&self, model: &Model, set: &mut AdapterSet, begin: Begin) -> Result<()> {
        let checkpoint = model.checkpoint();
        let mut any = false;
        for Place { site, dims } in
            trainable_tensors::linear_maps(checkpoint).into_iter().filter(|place| self.has(place.site))
        {
            if dims.contains(&0) {
                continue;
            }
            let live = put_map(model, set, site, dims, begin)?;
            set.add(site, Arc::new(OwnMatrix(live)))?;
            any = true;
        }
        for vector in trainable_tensors::vectors(checkpoint).into_iter().filter(|v| self.has_vector(v.depth, v.norm)) {
            let stored = || OfCheckpoint::Vector(checkpoint.clone(), vector.role);
            let live = live(model, vector_name(vector.role), [1, vector.len], begin == Begin::Outlined, stored)?;
            set.bank_mut().insert(live.clone())?;
            set.add_vector(vector.role, vector.depth, Arc::new(OwnVector(live)))?;
            any = true;
        }
        any |= self.attach_vocabulary(model, set, begin == Begin::Outlined)?;
        if !any {
            let expected = "a part that the model has; nothing would be trained";
            return Err(Error::input("trained weights", serde_json::json!(self), expected));
        }
        checkpoint.release();
        Ok(())
    }

    fn attach_vocabulary(&self, model: &Model, set: &mut AdapterSet, outlined: bool) -> Result<bool> {
        let (checkpoint, config) = (model.checkpoint(), model.config());
        let tied = tied(checkpoint)?;
        let (embeddings, head) = match tied {
            true => (self.embeddings || self.head, self.embeddings || self.head),
            false => (self.embeddings, self.head),
        };
        let ranges: Vec<_> = model.head_rows().collect();
        let mut blocks = |role: Role, name: &str| -> Result<Vec<Arc<Live>>> {
            let mut lives = Vec::new();
            for rows in &ranges {
                let name = format!("{name}.rows_{}_{}", rows.start, rows.end);
                let stored = || OfCheckpoint::Rows(checkpoint.clone(), role, rows.clone());
                let live = live(model, name, [rows.len(), config.hidden_size], outlined, stored)?;
                set.bank_mut().insert(live.clone())?;
                lives.push(live);
            }
            Ok(lives)
        };
        let embedding = if embeddings { blocks(Role::Embedding, "embeddings")? } else { Vec::new() };
        let head_blocks = match (head, tied) {
            (true, true) => embedding.clone(),
            (true, false) => blocks(Role::LmHead, "head")?,
            (false, _) => Vec::new(),
        };
        for (rows, live) in ranges.iter().zip(head_blocks) {
            set.add_head(rows.clone(), Arc::new(OwnMatrix(live)))?;
        }
        if embeddings {
            let rows = ranges.first().map_or(1, ExactSizeIterator::len);
            set.add_embedding(Arc::new(OwnEmbedding::new(embedding, rows, config.hidden_size)))?;
        }
        Ok(embeddings || head)
    }
}

impl TuningMethod for OwnWeights {
    /// # Errors
    /// As [`validate`](OwnWeights::validate).
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        self.validate(on.model.checkpoint())
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        self.put_into(on.model, set, Begin::InMemory)?;
        Ok(Installed::default())
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        self.put_into(on.model, set, Begin::Outlined)?;
        Ok(Installed::default())
    }
}

/// Puts the values of a map among the parameters of a set.
pub(crate) fn put_map(
    model: &Model,
    set: &mut AdapterSet,
    site: Site,
    dims: [usize; 2],
    begin: Begin,
) -> Result<Arc<Live>> {
    let stored = || OfCheckpoint::Map(model.checkpoint().clone(), site);
    let live = live(model, site.path(), dims, begin != Begin::InMemory, stored)?;
    set.bank_mut().insert(live.clone())?;
    Ok(live)
}

/// Values of a checkpoint, read now or left there.
fn live(
    model: &Model,
    name: String,
    shape: [usize; 2],
    leave: bool,
    stored: impl FnOnce() -> OfCheckpoint,
) -> Result<Arc<Live>> {
    match leave {
        true => Ok(Live::of_base(name, shape, Arc::new(stored()), model.device())),
        false => Live::new(name, shape, stored().read()?, model.device()),
    }
}

/// Whether embeddings and head are one tensor.
pub(crate) fn tied(checkpoint: &Checkpoint) -> Result<bool> {
    Ok(checkpoint.role(Role::LmHead)?.name == checkpoint.role(Role::Embedding)?.name)
}

/// Name of a vector among the parameters.
pub(crate) fn vector_name(role: Role) -> String {
    match role {
        Role::Layer(layer, role) => format!("layers.{layer}.{role}"),
        other => other.to_string(),
    }
}

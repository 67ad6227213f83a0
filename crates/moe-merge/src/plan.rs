//! The plan: which experts of a model become one.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use moe_checkpoint::{Checkpoint, ModelConfig, MoeShape, write_atomic};
use moe_checkpoint::{ExpertId, Ratio};
use serde::{Deserialize, Serialize};

use crate::recipe::Recipe;
use crate::{Error, Result};

/// Version of the plan format that is written, and the newest that is read.
pub const MERGE_PLAN_VERSION: u64 = 1;

/// Which experts of a model become one and how, in the indices of that model. A versioned JSON file.
///
/// A plan belongs to one checkpoint, by fingerprint. It says everything that depends on calibration but the sampled
/// tokens that some alignments and combinations fit on; those are given again when it is applied, and must be the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergePlan {
    /// Version of the format.
    pub version: u64,
    /// Fingerprint of the checkpoint.
    pub model: String,
    /// Shape of the checkpoint.
    pub shape: MoeShape,
    /// Fraction of the experts that go.
    pub ratio: Ratio,
    /// How it was made, and how it is carried out.
    pub recipe: Recipe,
    /// Digest of the evidence it was made from; empty for none.
    #[serde(default)]
    pub evidence: String,
    /// Experts that no calibration token was routed to: they weigh nothing in averages by usage.
    #[serde(default)]
    pub never_used: Vec<ExpertId>,
    /// MoE layers in ascending order.
    pub layers: Vec<LayerPlan>,
}

/// What becomes of one MoE layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// Decoder layer index.
    pub layer: usize,
    /// Groups by ascending dominant.
    pub groups: Vec<Group>,
    /// Experts in no group, ascending: they go.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dissolved: Vec<u32>,
    /// Experts that neither absorb nor are absorbed, ascending: they are alone in their groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub protected: Vec<u32>,
    /// Importance that the groups were made by `[E]`; empty if there was none. As f32, so that text and back change
    /// nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub importance: Vec<f32>,
}

/// Experts that become one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// The expert that the others join.
    pub dominant: u32,
    /// All of them, the dominant included, strictly ascending.
    pub members: Vec<u32>,
    /// Weight of each member; they sum to 1, but for their rounding to f32, which [`Group::shares`] takes out.
    pub weights: Vec<f32>,
}

impl Group {
    /// Weights of the members, which sum to 1.
    pub fn shares(&self) -> Vec<f64> {
        // In an order that the numbering of the members does not enter.
        let mut ordered: Vec<f64> = self.weights.iter().copied().map(f64::from).collect();
        ordered.sort_by(f64::total_cmp);
        let total: f64 = ordered.iter().sum();
        self.weights.iter().map(|w| f64::from(*w) / total).collect()
    }

    /// Members and shares by falling share, ties by index.
    pub(crate) fn by_weight(&self) -> Vec<(usize, f64)> {
        let mut order: Vec<(usize, f64)> = self.members.iter().map(|e| *e as usize).zip(self.shares()).collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        order
    }
}

impl LayerPlan {
    /// The layer as it is.
    pub fn keep_all(layer: usize, experts: usize) -> Self {
        let alone = |e: u32| Group { dominant: e, members: vec![e], weights: vec![1.0] };
        Self { layer, groups: (0..experts as u32).map(alone).collect(), ..Self::default() }
    }

    /// Whether an expert is protected.
    pub fn protected(&self, expert: usize) -> bool {
        self.protected.binary_search(&(expert as u32)).is_ok()
    }

    /// Whether nothing happens: every expert is a group of its own.
    pub fn is_identity(&self) -> bool {
        self.dissolved.is_empty() && self.groups.iter().all(|group| group.members.len() == 1)
    }

    /// Position of the group of every expert, `[E]`; `None` for dissolved ones.
    pub fn index_map(&self, experts: usize) -> Vec<Option<u32>> {
        let mut map = vec![None; experts];
        for (position, group) in self.groups.iter().enumerate() {
            for member in &group.members {
                map[*member as usize] = Some(position as u32);
            }
        }
        map
    }

    /// Experts that are not dominant, ascending.
    pub fn removed(&self, experts: usize) -> Vec<u32> {
        (0..experts as u32).filter(|e| self.groups.binary_search_by_key(e, |group| group.dominant).is_err()).collect()
    }

    fn validate(&self, experts: usize) -> Result<()> {
        let layer = self.layer;
        let invalid = |reason: String| Err(Error::invalid_plan(format!("layer {layer}: {reason}")));
        if self.groups.is_empty() {
            return invalid("no groups".into());
        }
        if let Some(pair) = self.groups.windows(2).find(|pair| pair[0].dominant >= pair[1].dominant) {
            return invalid(format!("dominant {} stands before {}", pair[0].dominant, pair[1].dominant));
        }
        let mut owner: Vec<Option<String>> = vec![None; experts];
        let groups = self.groups.iter().map(|g| (format!("the group of {}", g.dominant), &g.members));
        for (name, members) in groups.chain([("the dissolved experts".to_string(), &self.dissolved)]) {
            if members.windows(2).any(|pair| pair[0] >= pair[1]) {
                return invalid(format!("members {members:?} of {name} do not ascend"));
            }
            for member in members {
                match owner.get_mut(*member as usize) {
                    None => return invalid(format!("expert {member} of {name} does not exist")),
                    Some(Some(other)) => return invalid(format!("expert {member} is in {other} and in {name}")),
                    Some(owner) => *owner = Some(name.clone()),
                }
            }
        }
        if let Some(expert) = owner.iter().position(Option::is_none) {
            return invalid(format!("expert {expert} is in no group and not dissolved"));
        }
        for Group { dominant, members, weights } in &self.groups {
            if members.binary_search(dominant).is_err() {
                return invalid(format!("dominant {dominant} is not among its members {members:?}"));
            }
            if weights.len() != members.len() {
                return invalid(format!("{} weights for the {} members of {dominant}", weights.len(), members.len()));
            }
            let sum: f32 = weights.iter().sum();
            if !((sum - 1.0).abs() < 1e-4 && weights.iter().all(|w| (0.0..=1.0).contains(w))) {
                return invalid(format!("weights {weights:?} of the group of {dominant} are not shares of 1"));
            }
        }
        if self.protected.windows(2).any(|pair| pair[0] >= pair[1]) {
            return invalid(format!("protected experts {:?} do not ascend", self.protected));
        }
        for expert in &self.protected {
            if !self.groups.iter().any(|group| group.members == [*expert]) {
                return invalid(format!("protected expert {expert} is not alone in its group"));
            }
        }
        let importance = &self.importance;
        if !importance.is_empty() && (importance.len() != experts || importance.iter().any(|v| !v.is_finite())) {
            return invalid(format!("importance {importance:?}, expected {experts} finite numbers"));
        }
        Ok(())
    }
}

impl MergePlan {
    /// The plan in which every expert is a group of its own, under this name: what experts that were changed in place
    /// are written with.
    pub fn keep_all(checkpoint: &Checkpoint, name: &str) -> Self {
        let shape = checkpoint.shape();
        Self {
            version: MERGE_PLAN_VERSION,
            model: checkpoint.fingerprint(),
            shape: shape.clone(),
            ratio: Ratio::default(),
            recipe: Recipe::keep_all(name),
            evidence: String::new(),
            never_used: Vec::new(),
            layers: shape.layers.iter().map(|l| LayerPlan::keep_all(l.layer, l.num_experts())).collect(),
        }
    }

    /// Groups in all layers.
    pub fn groups(&self) -> usize {
        self.layers.iter().map(|layer| layer.groups.len()).sum()
    }

    /// Experts in all layers.
    pub fn experts(&self) -> usize {
        self.shape.layers.iter().map(|layer| layer.num_experts()).sum()
    }

    /// Whether nothing happens.
    pub fn is_identity(&self) -> bool {
        self.layers.iter().all(LayerPlan::is_identity)
    }

    /// What becomes of the MoE layer with this decoder layer index.
    pub fn layer(&self, layer: usize) -> Option<&LayerPlan> {
        self.layers.binary_search_by_key(&layer, |plan| plan.layer).ok().map(|at| &self.layers[at])
    }

    /// Experts that are not dominant, by decoder layer: what a router that loses their rows does without.
    pub fn removed(&self) -> BTreeMap<usize, Vec<u32>> {
        let layers = self.layers.iter().zip(&self.shape.layers);
        layers.map(|(layer, shape)| (layer.layer, layer.removed(shape.num_experts()))).collect()
    }

    /// Checks the plan by itself and that it is for a model of this shape.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`] names the layer and the expert; [`Error::Version`].
    pub fn validate(&self, shape: &MoeShape) -> Result<()> {
        self.validate_alone()?;
        match self.shape == *shape {
            true => Ok(()),
            false => {
                let describe = |shape: &MoeShape| {
                    let experts: Vec<usize> = shape.layers.iter().map(|l| l.num_experts()).collect();
                    format!("hidden size {}, top-k {}, experts {experts:?}", shape.hidden_size, shape.top_k)
                };
                let (ours, theirs) = (describe(&self.shape), describe(shape));
                Err(Error::invalid_plan(format!("it is for {ours}, but the model has {theirs}")))
            }
        }
    }

    /// Checks that routing by groups of experts still works without the rows of experts that are not dominant.
    ///
    /// # Errors
    /// [`moe_checkpoint::Error::BrokenRouting`] names the layer.
    pub fn validate_routing(&self, config: &ModelConfig) -> Result<()> {
        for (layer, shape) in self.layers.iter().zip(&self.shape.layers) {
            let kept: Vec<usize> = layer.groups.iter().map(|group| group.dominant as usize).collect();
            if kept.len() < shape.num_experts() {
                config.routing.check_kept(layer.layer, shape.num_experts(), &kept)?;
            }
        }
        Ok(())
    }

    fn validate_alone(&self) -> Result<()> {
        if self.version == 0 || self.version > MERGE_PLAN_VERSION {
            let (found, supported) = (self.version, MERGE_PLAN_VERSION);
            return Err(Error::Version { path: None, what: "merge plan", found, supported });
        }
        self.shape.validate().map_err(|error| Error::invalid_plan(format!("shape: {error}")))?;
        self.recipe.validate()?;
        let (found, expected): (Vec<_>, Vec<_>) =
            (self.layers.iter().map(|l| l.layer).collect(), self.shape.layers.iter().map(|l| l.layer).collect());
        if found != expected {
            let reason = format!("groups of MoE layers {found:?}, but its shape has {expected:?}");
            return Err(Error::invalid_plan(reason));
        }
        for (layer, shape) in self.layers.iter().zip(&self.shape.layers) {
            layer.validate(shape.num_experts())?;
            if self.recipe.router.keeps_rows() && !layer.dissolved.is_empty() {
                return Err(Error::invalid_plan(format!(
                    "layer {}: experts {:?} are dissolved, but their router rows stay",
                    layer.layer, layer.dissolved
                )));
            }
        }
        let (experts, groups) = (self.experts(), self.groups());
        let achieved = (experts - groups) as f64 / experts.max(1) as f64;
        if self.ratio.achieved.is_nan() || (self.ratio.achieved - achieved).abs() > 1e-9 {
            let found = self.ratio.achieved;
            return Err(Error::invalid_plan(format!("ratio.achieved is {found}, but {achieved} of its experts go")));
        }
        Ok(())
    }

    /// The plan as JSON.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`] if it cannot be written as JSON.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|error| Error::invalid_plan(error.to_string()))
    }

    /// Reads a plan from JSON and validates it by itself.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`], [`Error::Version`].
    pub fn from_json(json: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u64,
        }
        let malformed = |error: serde_json::Error| Error::invalid_plan(error.to_string());
        // The version first: a newer format may lack fields of this one.
        let Versioned { version: found } = serde_json::from_str(json).map_err(malformed)?;
        if found == 0 || found > MERGE_PLAN_VERSION {
            return Err(Error::Version { path: None, what: "merge plan", found, supported: MERGE_PLAN_VERSION });
        }
        let plan: Self = serde_json::from_str(json).map_err(malformed)?;
        plan.validate_alone()?;
        Ok(plan)
    }

    /// Writes the plan as JSON, atomically.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`] if it contradicts itself, [`Error::Checkpoint`] for the file system.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.validate_alone()?;
        Ok(write_atomic(path, self.to_json()?.as_bytes())?)
    }

    /// Reads a plan and validates it by itself.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::InvalidPlan`], [`Error::Version`], naming the file.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let json = fs::read_to_string(path).map_err(Error::io(path))?;
        Self::from_json(&json).map_err(|error| error.in_file(path))
    }
}

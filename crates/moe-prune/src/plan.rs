//! The plan: which units of a model stay.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use moe_checkpoint::{
    ExpertId, Granularity, ModelConfig, MoeShape, Protected, ProtectionMask, Ratio, ScoreTable, TopKClamp, write_atomic,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Error, Result};

/// Version of the plan format that is written, and the newest that is read.
pub const PLAN_VERSION: u64 = 2;

/// Which units of a model stay, in the indices of that model. A versioned JSON file.
///
/// A plan belongs to one checkpoint, by fingerprint. It is made once and applied to that checkpoint in any export mode.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrunePlan {
    /// Version of the format.
    pub version: u64,
    /// Fingerprint of the checkpoint.
    pub model: String,
    /// Shape of the checkpoint.
    pub shape: MoeShape,
    /// Fraction of routed-expert units dropped.
    pub ratio: Ratio,
    /// How the plan was made: pruner, budget, scorer, calibration.
    pub recipe: Value,
    /// Experts that no calibration token was routed to, so that their scores say nothing.
    #[serde(default)]
    pub never_routed: Vec<ExpertId>,
    /// What stays, MoE layers in ascending order.
    pub kept: Vec<LayerKept>,
    /// What else a user should know of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What stays of one MoE layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerKept {
    /// Decoder layer index.
    pub layer: usize,
    /// Kept unit ids of every expert, strictly ascending; an empty list leaves an expert without units.
    pub experts: Vec<Vec<u32>>,
    /// Experts that go wholly, with their rows of the router: strictly ascending, none of their units kept. An expert
    /// without units that is not listed is still chosen by the router, and gives nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<u32>,
}

impl LayerKept {
    /// These units of every expert, of which none goes wholly.
    pub fn of_units(layer: usize, experts: Vec<Vec<u32>>) -> Self {
        Self { layer, experts, removed: Vec::new() }
    }

    /// Experts that stay, in the indices of the checkpoint.
    pub fn experts_kept(&self) -> Vec<usize> {
        (0..self.experts.len()).filter(|expert| self.removed.binary_search(&(*expert as u32)).is_err()).collect()
    }
}

impl PrunePlan {
    /// The plan that drops nothing of the model with this fingerprint.
    pub fn keep_all(shape: &MoeShape, model: impl Into<String>) -> Self {
        let all = |width: &usize| (0..*width as u32).collect();
        let layers = shape.layers.iter();
        Self {
            version: PLAN_VERSION,
            model: model.into(),
            shape: shape.clone(),
            ratio: Ratio::default(),
            recipe: json!({ "pruner": { "type": "keep_all" } }),
            never_routed: Vec::new(),
            kept: layers
                .map(|layer| LayerKept {
                    layer: layer.layer,
                    experts: layer.widths.iter().map(all).collect(),
                    removed: Vec::new(),
                })
                .collect(),
            notes: Vec::new(),
        }
    }

    /// The plan that removes these experts of each decoder layer with their router rows, and nothing else. Whether the
    /// router works without them is for [`PrunePlan::validate`] to say.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`] for layers and experts that do not exist.
    pub fn without_experts(
        shape: &MoeShape,
        model: impl Into<String>,
        removed: &BTreeMap<usize, Vec<u32>>,
    ) -> Result<Self> {
        let mut plan = Self::keep_all(shape, model);
        plan.recipe = json!({ "pruner": { "type": "removed" } });
        for (layer, removed) in removed {
            let Some(kept) = plan.kept.iter_mut().find(|kept| kept.layer == *layer) else {
                let layers: Vec<_> = shape.layers.iter().map(|l| l.layer).collect();
                return Err(Error::invalid_plan(format!(
                    "layer {layer} is removed from, but the MoE layers are {layers:?}"
                )));
            };
            let experts = kept.experts.len();
            for expert in removed {
                let Some(units) = kept.experts.get_mut(*expert as usize) else {
                    return Err(Error::invalid_plan(format!(
                        "layer {layer}: expert {expert} is removed, of {experts}"
                    )));
                };
                units.clear();
            }
            kept.removed.clone_from(removed);
            kept.removed.sort_unstable();
            kept.removed.dedup();
        }
        let units = shape.units();
        let achieved = (units - plan.units_kept()) as f64 / units.max(1) as f64;
        plan.ratio = Ratio { asked: achieved, achieved };
        Ok(plan)
    }

    /// The plan that keeps what is listed, in the layers that the list names, and all of the others: whole experts, or
    /// some units of an expert. The list has the form of a [`ProtectionMask`],
    /// `[{"layer":1,"expert":68},{"layer":2,"expert":3,"units":[17]}]`. Experts of a named layer that are not listed go
    /// with their router rows.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for what the model does not have; [`Error::InvalidPlan`] for an empty list.
    pub fn keep_only(shape: &MoeShape, model: impl Into<String>, list: &ProtectionMask) -> Result<Self> {
        list.validate(shape)?;
        if list.is_empty() {
            return Err(Error::invalid_plan("the list of what is kept is empty"));
        }
        let mut plan = Self::keep_all(shape, model);
        plan.recipe = json!({ "pruner": { "type": "keep_only", "kept": list } });
        let mut named: BTreeMap<usize, BTreeMap<usize, Option<Vec<u32>>>> = BTreeMap::new();
        for Protected { layer, expert, units } in list.entries() {
            named.entry(layer).or_default().insert(expert, units);
        }
        for kept in &mut plan.kept {
            let Some(listed) = named.get(&kept.layer) else { continue };
            for (expert, units) in kept.experts.iter_mut().enumerate() {
                match listed.get(&expert) {
                    Some(None) => {}
                    Some(Some(few)) => units.clone_from(few),
                    None => {
                        units.clear();
                        kept.removed.push(expert as u32);
                    }
                }
            }
        }
        let units = shape.units();
        let achieved = (units - plan.units_kept()) as f64 / units.max(1) as f64;
        plan.ratio = Ratio { asked: achieved, achieved };
        Ok(plan)
    }

    /// Units that stay.
    pub fn units_kept(&self) -> usize {
        self.kept.iter().flat_map(|layer| &layer.experts).map(Vec::len).sum()
    }

    /// Fewer experts per token, where a layer has fewer left than the router selects.
    pub fn top_k_clamp(&self) -> Option<TopKClamp> {
        TopKClamp::of(self.shape.top_k, self.kept.iter().map(|kept| kept.experts.len() - kept.removed.len()))
    }

    /// Shape of the model after the plan.
    pub fn pruned_shape(&self) -> MoeShape {
        let mut shape = self.shape.clone();
        for (layer, kept) in shape.layers.iter_mut().zip(&self.kept) {
            layer.widths = kept.experts_kept().into_iter().map(|expert| kept.experts[expert].len()).collect();
        }
        shape.top_k = self.top_k_clamp().map_or(shape.top_k, |clamp| clamp.after);
        shape
    }

    /// What stays of the MoE layer with this decoder layer index.
    pub fn layer(&self, layer: usize) -> Option<&LayerKept> {
        self.kept.binary_search_by_key(&layer, |kept| kept.layer).ok().map(|position| &self.kept[position])
    }

    /// Checks the plan by itself and that it is for a model of this shape.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`] names the layer, expert and unit; [`Error::PlanVersion`].
    pub fn validate(&self, shape: &MoeShape) -> Result<()> {
        self.validate_alone()?;
        if self.shape == *shape {
            return Ok(());
        }
        let (ours, theirs) = (&self.shape, shape);
        let differs = if ours.hidden_size != theirs.hidden_size {
            format!("hidden_size {}, but the model has {}", ours.hidden_size, theirs.hidden_size)
        } else if ours.top_k != theirs.top_k {
            format!("top_k {}, but the model has {}", ours.top_k, theirs.top_k)
        } else {
            let pair = ours.layers.iter().zip(&theirs.layers).find(|(a, b)| a != b);
            match pair {
                Some((a, b)) if a.layer != b.layer => format!("MoE layer {}, but the model has {}", a.layer, b.layer),
                Some((a, b)) if a.num_experts() != b.num_experts() => {
                    format!("{} experts in layer {}, but the model has {}", a.num_experts(), a.layer, b.num_experts())
                }
                Some((a, b)) => {
                    format!("widths {:?} in layer {}, but the model has {:?}", a.widths, a.layer, b.widths)
                }
                None => format!("{} MoE layers, but the model has {}", ours.layers.len(), theirs.layers.len()),
            }
        };
        Err(Error::invalid_plan(format!("it is for {differs}")))
    }

    fn validate_alone(&self) -> Result<()> {
        if self.version == 0 || self.version > PLAN_VERSION {
            return Err(Error::PlanVersion { path: None, found: self.version, supported: PLAN_VERSION });
        }
        let invalid = |reason: String| Err(Error::invalid_plan(reason));
        self.shape.validate().map_err(|error| Error::invalid_plan(format!("shape: {error}")))?;
        let (found, expected): (Vec<_>, Vec<_>) =
            (self.kept.iter().map(|l| l.layer).collect(), self.shape.layers.iter().map(|l| l.layer).collect());
        if found != expected {
            return invalid(format!("kept units of MoE layers {found:?}, but its shape has {expected:?}"));
        }
        for (LayerKept { layer, experts, removed }, shape) in self.kept.iter().zip(&self.shape.layers) {
            if experts.len() != shape.num_experts() {
                let (found, expected) = (experts.len(), shape.num_experts());
                return invalid(format!("layer {layer}: kept units of {found} experts, but its shape has {expected}"));
            }
            if let Some(pair) = removed.windows(2).find(|pair| pair[0] >= pair[1]) {
                return invalid(format!(
                    "layer {layer}: removed expert {} stands before {}, expected strictly ascending",
                    pair[0], pair[1]
                ));
            }
            for expert in removed {
                match experts.get(*expert as usize) {
                    None => return invalid(format!("layer {layer}: removed expert {expert} does not exist")),
                    Some(kept) if !kept.is_empty() => {
                        return invalid(format!("layer {layer}: removed expert {expert} keeps {} units", kept.len()));
                    }
                    Some(_) => {}
                }
            }
            if experts.len() == removed.len() {
                return invalid(format!("layer {layer}: no expert is left"));
            }
            for (expert, (kept, width)) in experts.iter().zip(&shape.widths).enumerate() {
                if let Some(pair) = kept.windows(2).find(|pair| pair[0] >= pair[1]) {
                    return invalid(format!(
                        "layer {layer}, expert {expert}: unit {} stands before {}, expected strictly ascending",
                        pair[0], pair[1]
                    ));
                }
                if let Some(last) = kept.last().filter(|last| **last as usize >= *width) {
                    return invalid(format!("layer {layer}, expert {expert}: unit {last}, but it has {width} units"));
                }
            }
        }
        let units = self.shape.units();
        let achieved = (units - self.units_kept()) as f64 / units.max(1) as f64;
        // Text and back may cost the last bits.
        if self.ratio.achieved.is_nan() || (self.ratio.achieved - achieved).abs() > 1e-9 {
            return invalid(format!("ratio.achieved is {}, but {achieved} of its units go", self.ratio.achieved));
        }
        if !(0.0..=1.0).contains(&self.ratio.asked) {
            return invalid(format!("ratio.asked is {}, expected a number in [0, 1]", self.ratio.asked));
        }
        Ok(())
    }

    /// Checks that routing by groups still works: as many experts left in every group of a layer, and enough of them in
    /// the selected groups.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`] names the layer.
    pub fn validate_routing(&self, config: &ModelConfig) -> Result<()> {
        for kept in self.kept.iter().filter(|kept| !kept.removed.is_empty()) {
            let left = config.routing.check_kept(kept.layer, kept.experts.len(), &kept.experts_kept());
            left.map_err(|error| Error::invalid_plan(error.to_string()))?;
        }
        Ok(())
    }

    /// A mask of the model in the indices of what this plan leaves of it. What the plan drops is protected no more.
    pub fn reindex(&self, mask: &ProtectionMask) -> ProtectionMask {
        let mut new = ProtectionMask::none();
        for Protected { layer, expert, units } in mask.entries() {
            let Some(kept) = self.layer(layer) else { continue };
            let Some(place) = kept.experts_kept().iter().position(|found| *found == expert) else { continue };
            match units {
                None => new.protect_expert(layer, place),
                Some(units) => {
                    let places = units.iter().filter_map(|unit| kept.experts[expert].binary_search(unit).ok());
                    places.for_each(|unit| new.protect_unit(layer, place, unit as u32));
                }
            }
        }
        new
    }

    /// This plan, then `next`, which is one of what this plan leaves: one plan in the indices of this one's model.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`] if `next` is for another shape than [`PrunePlan::pruned_shape`].
    pub fn then(&self, next: &PrunePlan) -> Result<PrunePlan> {
        next.validate(&self.pruned_shape())?;
        let mut plan = self.clone();
        plan.recipe = json!({ "pruner": { "type": "sequence" }, "steps": [self.recipe, next.recipe] });
        for (kept, next) in plan.kept.iter_mut().zip(&next.kept) {
            let experts = kept.experts_kept();
            for (new, old) in experts.iter().enumerate() {
                let units = &kept.experts[*old];
                kept.experts[*old] = next.experts[new].iter().map(|unit| units[*unit as usize]).collect();
            }
            kept.removed.extend(next.removed.iter().map(|new| experts[*new as usize] as u32));
            kept.removed.sort_unstable();
        }
        for id in &next.never_routed {
            let experts = self.layer(id.layer).map(LayerKept::experts_kept).unwrap_or_default();
            let found = experts.get(id.expert).map(|expert| ExpertId { layer: id.layer, expert: *expert });
            plan.never_routed.extend(found);
        }
        plan.notes.extend(next.notes.iter().cloned());
        plan.never_routed.sort_unstable();
        plan.never_routed.dedup();
        let units = self.shape.units();
        plan.ratio = Ratio {
            asked: 1.0 - (1.0 - self.ratio.asked) * (1.0 - next.ratio.asked),
            achieved: (units - plan.units_kept()) as f64 / units.max(1) as f64,
        };
        plan.validate(&self.shape)?;
        Ok(plan)
    }

    /// The part of a table of the whole model that belongs to what this plan keeps, in the indices of the pruned model.
    ///
    /// # Errors
    /// Those of [`ScoreTable::validate_for`].
    pub fn restrict(&self, scores: &ScoreTable) -> Result<ScoreTable> {
        scores.validate_for(&self.shape)?;
        let mut table = scores.clone();
        for (layer, kept) in table.layers.iter_mut().zip(&self.kept) {
            let experts = kept.experts_kept();
            let pick = |expert: &usize| match scores.granularity {
                Granularity::Expert => layer.scores[*expert].clone(),
                Granularity::Unit => {
                    kept.experts[*expert].iter().map(|unit| layer.scores[*expert][*unit as usize]).collect()
                }
            };
            let picked = experts.iter().map(pick).collect();
            layer.scores = picked;
            if let Some(routed) = &mut layer.routed {
                *routed = experts.iter().map(|expert| routed[*expert]).collect();
            }
            if let Some(whole) = &mut layer.whole {
                whole.experts = experts.iter().map(|expert| whole.experts[*expert]).collect();
            }
        }
        Ok(table)
    }

    /// A table of the pruned model in the indices of the whole one; what is gone scores 0 and counts no tokens.
    ///
    /// # Errors
    /// Those of [`ScoreTable::validate_for`].
    pub fn expand(&self, scores: &ScoreTable) -> Result<ScoreTable> {
        scores.validate_for(&self.pruned_shape())?;
        let mut table = scores.clone();
        for ((layer, kept), shape) in table.layers.iter_mut().zip(&self.kept).zip(&self.shape.layers) {
            let width = |width: usize| if scores.granularity == Granularity::Expert { 1 } else { width };
            let mut spread: Vec<Vec<f32>> = shape.widths.iter().map(|w| vec![0.0; width(*w)]).collect();
            let mut routed = vec![0; shape.num_experts()];
            for (new, old) in kept.experts_kept().into_iter().enumerate() {
                match scores.granularity {
                    Granularity::Expert => spread[old] = layer.scores[new].clone(),
                    Granularity::Unit => {
                        for (unit, score) in kept.experts[old].iter().zip(&layer.scores[new]) {
                            spread[old][*unit as usize] = *score;
                        }
                    }
                }
                routed[old] = layer.routed.as_ref().map_or(0, |counts| counts[new]);
            }
            layer.scores = spread;
            layer.routed = layer.routed.as_ref().map(|_| routed);
            if let Some(whole) = &mut layer.whole {
                let mut experts = vec![0.0; shape.num_experts()];
                kept.experts_kept().into_iter().zip(&whole.experts).for_each(|(old, weight)| experts[old] = *weight);
                whole.experts = experts;
            }
        }
        Ok(table)
    }

    /// The plan as compact JSON, and as [`PrunePlan::save`] writes it.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`] if it cannot be written as JSON.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|error| Error::invalid_plan(error.to_string()))
    }

    /// Reads a plan from JSON and validates it by itself.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`], [`Error::PlanVersion`].
    pub fn from_json(json: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u64,
        }
        let malformed = |error: serde_json::Error| Error::invalid_plan(error.to_string());
        // The version first: a newer format may lack fields of this one.
        let Versioned { version: found } = serde_json::from_str(json).map_err(malformed)?;
        if found == 0 || found > PLAN_VERSION {
            return Err(Error::PlanVersion { path: None, found, supported: PLAN_VERSION });
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
    /// [`Error::Io`], [`Error::InvalidPlan`], [`Error::PlanVersion`], naming the file.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let json = fs::read_to_string(path).map_err(|source| Error::Io { path: path.into(), source })?;
        Self::from_json(&json).map_err(|error| error.in_file(path))
    }
}

#[cfg(test)]
mod tests {
    use moe_checkpoint::MoeLayerShape;

    use super::*;

    #[test]
    fn masks_follow_a_plan() {
        let layers = vec![MoeLayerShape { layer: 2, widths: vec![4; 3] }];
        let shape = MoeShape { gateless: false, hidden_size: 2, top_k: 1, layers };
        let mut plan = PrunePlan::keep_all(&shape, "model");
        plan.kept[0].experts = vec![vec![], vec![1, 3], vec![0, 1, 2, 3]];
        plan.kept[0].removed = vec![0];
        let mut mask = ProtectionMask::none();
        mask.protect_unit(2, 1, 3);
        mask.protect_expert(2, 2);
        mask.protect_expert(2, 0);
        let mut expected = ProtectionMask::none();
        expected.protect_unit(2, 0, 1);
        expected.protect_expert(2, 1);
        assert_eq!(plan.reindex(&mask), expected);
    }
}

//! Plans for checkpoints whose experts share sets of weights.

use std::collections::BTreeMap;

use moe_checkpoint::{
    Checkpoint, Granularity, LayerScores, MoeLayerShape, MoeShape, Pool, Protected, ProtectionMask, Ratio, ScoreTable,
    WholeScores, regrouped_config, ungrouped_config,
};
use serde_json::Value;

use super::PruneOptions;
use super::target::TargetLayer;
use crate::plan::{LayerKept, PrunePlan};
use crate::{Budget, Error, Pruner, Result};

/// The sets of weights of a [grouped](Checkpoint::grouped) checkpoint as if each were one expert: what units go from.
///
/// A unit that goes from a set goes from all its experts. So the scores of a set are made of those of its experts, any
/// pruner works on the sets, and its plan is spread to the experts again.
///
/// ```no_run
/// use moe_checkpoint::{Checkpoint, ProtectionMask, ScoreTable};
/// use moe_prune::{Budget, Scope, SharedSets, UnitPruner};
///
/// let model = Checkpoint::open("out/merged")?;
/// let scores = ScoreTable::load("scores.safetensors")?;
/// if let Some(shared) = SharedSets::of(&model) {
///     let plan = shared.prune(&UnitPruner::new(Scope::Layer), &scores, Budget::Ratio(0.5), &ProtectionMask::none())?;
///     plan.save("plan.json")?;
/// }
/// # Ok::<(), moe_prune::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct SharedSets {
    /// Shape of the model: a width per expert.
    experts: MoeShape,
    /// The same with a width per set.
    sets: MoeShape,
    /// Set of every expert, by MoE layer.
    maps: Vec<Vec<usize>>,
}

impl SharedSets {
    /// The sets of a checkpoint; `None` if its experts do not share.
    pub fn of(model: &Checkpoint) -> Option<Self> {
        if !model.grouped() {
            return None;
        }
        let experts = model.shape().clone();
        let (mut layers, mut maps) = (Vec::new(), Vec::new());
        for layer in &experts.layers {
            let moe = model.config().moe(layer.layer)?;
            layers.push(MoeLayerShape { layer: layer.layer, widths: moe.stored_widths().into_owned() });
            maps.push((0..moe.num_experts()).map(|expert| moe.stored(expert)).collect());
        }
        // Two experts per token may share a set: there need not be as many sets as the router selects.
        let least = layers.iter().map(MoeLayerShape::num_experts).min().unwrap_or(1);
        let sets = MoeShape { layers, top_k: experts.top_k.min(least), ..experts.clone() };
        Some(Self { experts, sets, maps })
    }

    /// The shape of the model with a set in place of its experts: what a plan of the sets is for.
    pub fn shape(&self) -> &MoeShape {
        &self.sets
    }

    /// Scores of the sets: sums over their experts where scores add up, otherwise the highest, since what matters to
    /// one expert matters. Counts of routed tokens are added up.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for scores of another shape, [`Error::PoolTooNarrow`] for scores that compare within an
    /// expert alone.
    pub fn scores(&self, scores: &ScoreTable) -> Result<ScoreTable> {
        scores.validate_for(&self.experts)?;
        if !scores.pool.supports(Pool::Layer) {
            return Err(Error::PoolTooNarrow { wanted: Pool::Layer, supported: scores.pool });
        }
        let adds_up = scores.adds_up(Pool::Layer);
        let layers = scores.layers.iter().zip(&self.maps).zip(&self.sets.layers).map(|((layer, map), sets)| {
            let width = |width: usize| if scores.granularity == Granularity::Expert { 1 } else { width };
            let start = if adds_up { 0.0 } else { f32::MIN };
            let mut sums: Vec<Vec<f32>> = sets.widths.iter().map(|w| vec![start; width(*w)]).collect();
            let mut routed = vec![0; sums.len()];
            for (expert, set) in map.iter().enumerate() {
                let pairs = sums[*set].iter_mut().zip(&layer.scores[expert]);
                pairs.for_each(|(sum, score)| *sum = if adds_up { *sum + score } else { sum.max(*score) });
                routed[*set] += layer.routed.as_ref().map_or(0, |counts| counts[expert]);
            }
            let whole = layer.whole.as_ref().map(|whole| {
                let mut experts = vec![0.0; sums.len()];
                map.iter().zip(&whole.experts).for_each(|(set, weight)| experts[*set] += weight);
                WholeScores { layer: whole.layer, experts }
            });
            LayerScores { layer: layer.layer, scores: sums, routed: layer.routed.as_ref().map(|_| routed), whole }
        });
        Ok(ScoreTable { layers: layers.collect(), ..scores.clone() })
    }

    /// What of the sets is protected, if this is of their experts: whatever one of them protects.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for protected experts or units that do not exist.
    pub fn protect(&self, experts: &ProtectionMask) -> Result<ProtectionMask> {
        experts.validate(&self.experts)?;
        let mut mask = ProtectionMask::none();
        for Protected { layer, expert, units } in experts.entries() {
            let Some(map) = self.experts.position(layer).map(|position| &self.maps[position]) else { continue };
            match units {
                None => mask.protect_expert(layer, map[expert]),
                Some(units) => units.into_iter().for_each(|unit| mask.protect_unit(layer, map[expert], unit)),
            }
        }
        Ok(mask)
    }

    /// The plan for the experts that does to each what a plan of the sets does to its set: units go from all of them,
    /// and all go with their rows of the router where the set is removed. The achieved ratio counts units of experts.
    ///
    /// # Errors
    /// [`Error::InvalidPlan`] for a plan that is none of these sets, or that leaves fewer experts than the router
    /// selects.
    pub fn plan(&self, sets: &PrunePlan) -> Result<PrunePlan> {
        sets.validate(&self.sets)?;
        let layer = |(kept, map): (&LayerKept, &Vec<usize>)| {
            let removed = |expert: &u32| kept.removed.binary_search(&(map[*expert as usize] as u32)).is_ok();
            LayerKept {
                layer: kept.layer,
                experts: map.iter().map(|set| kept.experts[*set].clone()).collect(),
                removed: (0..map.len() as u32).filter(removed).collect(),
            }
        };
        let mut plan = PrunePlan {
            shape: self.experts.clone(),
            kept: sets.kept.iter().zip(&self.maps).map(layer).collect(),
            never_routed: Vec::new(),
            ..sets.clone()
        };
        let units = self.experts.units();
        let achieved = (units - plan.units_kept()) as f64 / units.max(1) as f64;
        plan.ratio = Ratio { achieved, ..sets.ratio };
        plan.validate(&self.experts)?;
        Ok(plan)
    }

    /// [`SharedSets::plan`] of what a pruner makes of [`SharedSets::scores`]. The budget is one of the sets, which are
    /// what is stored.
    ///
    /// # Errors
    /// Those of both, and those of the pruner.
    pub fn prune(
        &self,
        pruner: &dyn Pruner,
        scores: &ScoreTable,
        budget: Budget,
        protect: &ProtectionMask,
    ) -> Result<PrunePlan> {
        let sets = pruner.prune(&self.scores(scores)?, &self.sets, budget, &self.protect(protect)?)?.plan;
        Ok(PrunePlan { never_routed: scores.never_routed(), ..self.plan(&sets)? })
    }
}

/// Refuses a plan or edits under which experts that share a set of weights would no longer be the same.
pub(super) fn check(plan: &PrunePlan, base: &Checkpoint, options: &PruneOptions<'_>) -> Result<()> {
    if !base.grouped() {
        return Ok(());
    }
    for kept in &plan.kept {
        let Some(moe) = base.config().moe(kept.layer) else { continue };
        let mut first_of: BTreeMap<usize, usize> = BTreeMap::new();
        for expert in kept.experts_kept() {
            let first = *first_of.entry(moe.stored(expert)).or_insert(expert);
            if first == expert {
                continue;
            }
            let what = format!("experts {first} and {expert} of layer {} share a set of weights", kept.layer);
            if kept.experts[first] != kept.experts[expert] {
                return Err(options.form.refused(format!(
                    "{what}, but the plan keeps different units of them; make a plan of the sets, as SharedSets does"
                )));
            }
            let edited = |edits: &std::sync::Arc<dyn crate::EditSource>| -> Result<bool> {
                let none = Default::default();
                Ok(edits.sizes(kept.layer, first)? != none || edits.sizes(kept.layer, expert)? != none)
            };
            if options.edits.as_ref().map(edited).transpose()?.unwrap_or(false) {
                return Err(options
                    .form
                    .refused(format!("{what}, but a repair changed one of them: repair before merging")));
            }
        }
    }
    Ok(())
}

/// The config that `change` makes of that of a checkpoint, experts sharing sets as the layers say where they did
/// before.
pub(super) fn shared_config(
    from: &Checkpoint,
    layers: &[TargetLayer],
    change: impl FnOnce(&Value) -> Result<Value>,
) -> Result<Value> {
    if !from.grouped() {
        return change(from.raw_config());
    }
    let config = change(&ungrouped_config(from.raw_config())?)?;
    let missing = |layer: usize| Error::invalid_plan(format!("layer {layer}: which experts share is unknown"));
    let sets = layers.iter().map(|layer| {
        let sharing = layer.sharing.clone().ok_or_else(|| missing(layer.layer))?;
        Ok((layer.layer, sharing))
    });
    Ok(regrouped_config(&config, &sets.collect::<Result<_>>()?)?)
}

//! Layers merged one after the other, each on what the merged layers before it give.

use std::path::Path;
use std::sync::OnceLock;

use moe_checkpoint::group::{Alone, Group};
use moe_checkpoint::{ExpertId, LayerRole, ProtectionMask, Ratio, Role, SharedFold, Statistics};
use moe_core::data::Wave;
use moe_core::trace::{ExpertTrace, LayerTrace, Observer, Signals, SweepPart, WaveInfo};
use moe_core::{Engine, EngineOptions, LayerChange, LayerVisitor, Model};
use moe_importance::Collection;
use moe_importance::calibration::waves_hash;

use super::EvidenceOptions;
use super::overlay::LayerOverlay;
use crate::combination::{Combination, LayerJob};
use crate::context::LayerContext;
use crate::evidence::{Evidence, LayerEvidence};
use crate::experts::LayerExperts;
use crate::merged::not_grouped;
use crate::merged::weights::{LayerRecord, MergedWeights, MergedWriter};
use crate::plan::{LayerPlan, MERGE_PLAN_VERSION, MergePlan};
use crate::planner::protected_experts;
use crate::recipe::Recipe;
use crate::{Error, Result, Scope};

/// Merges a model layer by layer: all waves run through a layer, the layer is merged on what they showed, and the next
/// layer sees the merged one's outputs (REAM, arXiv 2604.04356, step 7). Merged experts go to `dir`, an artifact from
/// which [`MergePlan::on`] makes the model in any form, as often as wanted. A run that was interrupted goes on with the
/// layers that `dir` has.
///
/// ```no_run
/// use moe_checkpoint::{ProtectionMask, WriteOptions, write};
/// use moe_core::{Model, device::device};
/// use moe_merge::{EvidenceOptions, MergeOptions, OutputForm, Recipe, merge_sequentially};
///
/// # let waves = vec![];
/// let model = Model::open("models/Qwen1.5-MoE-A2.7B", &device("default")?, None)?;
/// let recipe = Recipe::named("ream")?;
/// let options = EvidenceOptions::for_recipe(&recipe, 4096);
/// let weights = merge_sequentially(&model, &waves, &recipe, &ProtectionMask::none(), &options, "work".as_ref())?;
/// let plan = weights.plan().clone();
/// let options = MergeOptions { merged: Some(weights), ..MergeOptions::new(OutputForm::Stock) };
/// write(plan.on(model.checkpoint(), &options)?.model(), "out/merged", &WriteOptions::default())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::InvalidParameter`] for a budget that layers share, [`Error::Engine`] with what went wrong in a layer,
/// [`Error::InvalidPlan`] for a directory of another run.
pub fn merge_sequentially(
    model: &Model,
    waves: &[Wave],
    recipe: &Recipe,
    protect: &ProtectionMask,
    options: &EvidenceOptions,
    dir: &Path,
) -> Result<MergedWeights> {
    merge_sequentially_in_group(&Alone, model, waves, recipe, protect, options, dir)
}

/// As [`merge_sequentially`], with the other ranks of a group, which all call it with the same, in a directory that all
/// see: each runs every Nth wave through a layer, what all have seen is added in the order of the waves, the first rank
/// merges the layer, and all go on with what it wrote. The merged experts are those of one process, to the bit.
///
/// # Errors
/// Those of [`merge_sequentially`]; a directory that a rank does not see; what has stopped another rank.
pub fn merge_sequentially_in_group(
    group: &dyn Group,
    model: &Model,
    waves: &[Wave],
    recipe: &Recipe,
    protect: &ProtectionMask,
    options: &EvidenceOptions,
    dir: &Path,
) -> Result<MergedWeights> {
    group.agree(on_this_rank(group, model, waves, recipe, protect, options, dir))
}

fn on_this_rank(
    group: &dyn Group,
    model: &Model,
    waves: &[Wave],
    recipe: &Recipe,
    protect: &ProtectionMask,
    options: &EvidenceOptions,
    dir: &Path,
) -> Result<MergedWeights> {
    recipe.validate()?;
    if recipe.budget.scope != Scope::Layer {
        let found = moe_checkpoint::human::variant(&recipe.budget.scope);
        return Err(Error::parameter("budget.scope", found, "`layer`, to merge one layer after the other"));
    }
    let checkpoint = model.checkpoint();
    not_grouped(checkpoint)?;
    protect.validate(checkpoint.shape())?;
    let data = waves_hash(waves);
    let what = serde_json::json!({"evidence": options.digest(model, waves), "recipe": recipe, "protect": protect});
    let digest = blake3::hash(what.to_string().as_bytes()).to_hex().to_string();
    group.same("merge", &digest)?;
    // The first makes the directory, the others find it.
    let writer = match group.rank() {
        0 => Some(MergedWriter::create_or_resume(dir, &digest)?),
        _ => None,
    };
    group.check(None)?;
    let writer = match writer {
        Some(writer) => writer,
        None => MergedWriter::of_first_rank(dir, &digest)?,
    };
    let own: Vec<Wave> = waves.iter().skip(group.rank()).step_by(group.size()).cloned().collect();
    let collection = options.collection(model, data)?;
    let mut visitor = Sequential {
        group,
        waves: waves.len(),
        rounds: 0,
        statistics: SharedFold::new(group, collection.shape(), collection.provenance()),
        model,
        recipe,
        protect,
        collection,
        writer,
        layers: Vec::new(),
        never_used: Vec::new(),
    };
    if own.is_empty() && !waves.is_empty() {
        // Nothing to run, but all ranks go from layer to layer together.
        for layer in &checkpoint.shape().layers {
            visitor.end_layer(layer.layer)?;
        }
    } else {
        Engine::new(model, EngineOptions::default()).run_layerwise(&own, &mut visitor)?;
    }
    let Sequential { writer, layers, never_used, .. } = visitor;
    let shape = checkpoint.shape();
    let experts: usize = shape.layers.iter().map(|layer| layer.num_experts()).sum();
    let kept: usize = layers.iter().map(|layer| layer.groups.len()).sum();
    let gone = (experts - kept) as f64 / experts.max(1) as f64;
    let plan = MergePlan {
        version: MERGE_PLAN_VERSION,
        model: checkpoint.fingerprint(),
        shape: shape.clone(),
        ratio: Ratio { asked: gone, achieved: gone },
        recipe: recipe.clone(),
        evidence: digest,
        never_used,
        layers,
    };
    plan.validate(shape)?;
    if group.rank() == 0 {
        writer.finish(plan)?;
    }
    group.check(None)?;
    MergedWeights::open(dir)
}

struct Sequential<'a> {
    group: &'a dyn Group,
    /// Of all ranks.
    waves: usize,
    /// Rounds of waves, one by each rank, that are over in the layer in progress.
    rounds: usize,
    model: &'a Model,
    recipe: &'a Recipe,
    protect: &'a ProtectionMask,
    collection: Collection<'a>,
    /// Of the layer in progress.
    statistics: SharedFold<'a>,
    writer: MergedWriter,
    layers: Vec<LayerPlan>,
    never_used: Vec<ExpertId>,
}

impl Observer for Sequential<'_> {
    fn needs(&self) -> Signals {
        self.collection.needs()
    }

    fn begin_wave(&mut self, wave: &WaveInfo) -> moe_core::Result<()> {
        self.collection.begin_wave(wave)
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        self.collection.layer(trace)
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        self.collection.expert(trace)
    }

    fn done(&mut self, part: SweepPart) -> moe_core::Result<()> {
        self.collection.done(part)
    }

    fn end_wave(&mut self, wave: &WaveInfo) -> moe_core::Result<()> {
        self.collection.end_wave(wave)?;
        let mut seen = self.collection.take();
        // As the file of a wave holds it, so that a sequential run starts from the same numbers as one over all layers.
        seen.iter_mut().for_each(Statistics::round_to_f32);
        self.end_round(Vec::from_iter(seen)).map_err(moe_core::Error::observer)
    }
}

impl LayerVisitor for Sequential<'_> {
    fn end_layer(&mut self, layer: usize) -> moe_core::Result<LayerChange> {
        self.merge(layer).map_err(moe_core::Error::observer)
    }
}

impl Sequential<'_> {
    /// Adds the waves that the ranks have run; one that had none in this round gives none.
    fn end_round(&mut self, own: Vec<Statistics>) -> Result<()> {
        let begun = self.rounds * self.group.size();
        let ranks = (self.waves - begun).min(self.group.size());
        self.rounds += 1;
        Ok(self.statistics.round(&Vec::from_iter(0..ranks), own)?)
    }

    /// What all ranks have seen of the layer in progress.
    fn seen(&mut self) -> Result<Statistics> {
        while self.rounds * self.group.size() < self.waves {
            self.end_round(Vec::new())?;
        }
        self.rounds = 0;
        let next = SharedFold::new(self.group, self.collection.shape(), self.collection.provenance());
        Ok(std::mem::replace(&mut self.statistics, next).whole()?)
    }

    fn merge(&mut self, layer: usize) -> Result<LayerChange> {
        let checkpoint = self.model.checkpoint();
        let statistics = self.seen()?;
        let evidence = Evidence::from_statistics(&statistics)?.layers.into_iter().find(|l| l.layer == layer);
        let evidence = evidence.unwrap_or(LayerEvidence { layer, ..LayerEvidence::default() });
        let never_used = evidence.never_used().into_iter();
        self.never_used.extend(never_used.map(|expert| ExpertId { layer, expert: expert as usize }));
        let record = match self.group.rank() {
            0 => Some(self.merged(layer, &evidence)?),
            _ => None,
        };
        self.group.check(None)?;
        let record = match record {
            Some(record) => record,
            None => self.writer.finished(layer)?.ok_or_else(|| self.writer.unseen())?,
        };
        self.layers.push(record.plan.clone());
        if record.plan.is_identity() {
            return Ok(LayerChange::default());
        }
        let dir = self.writer.dir().to_path_buf();
        Ok(LayerOverlay::new(dir, checkpoint, record, self.recipe.router)?.change())
    }

    /// Merges a layer, or takes what an earlier run merged.
    fn merged(&self, layer: usize, evidence: &LayerEvidence) -> Result<LayerRecord> {
        if let Some(record) = self.writer.finished(layer)? {
            return Ok(record);
        }
        let checkpoint = self.model.checkpoint();
        let experts = LayerExperts { checkpoint, layer };
        let count = checkpoint.config().moe(layer).map_or(0, |moe| moe.num_experts());
        let excluded = self.recipe.budget.exclude.contains(&layer);
        let groups = if excluded { count } else { self.recipe.budget.of_layer(count) };
        let importance = match excluded {
            true => vec![0.0; count],
            false => self.recipe.importance.of(evidence, count)?,
        };
        let mut router = checkpoint.read_f32(Role::Layer(layer, LayerRole::Router))?;
        router.truncate(count * checkpoint.config().hidden_size);
        let context = LayerContext {
            layer,
            experts: &experts,
            router: Some(&router),
            evidence,
            activation: checkpoint.config().expert_activation(layer),
            importance: &importance,
            protected: &protected_experts(self.protect, layer, count),
            router_groups: self.recipe.router_groups(checkpoint),
        };
        let plan = self.recipe.plan_layer(&context, groups)?;
        self.writer.write(checkpoint, plan, |plan, sink| {
            let job = LayerJob {
                plan,
                experts: &experts,
                sample: evidence.sample.as_ref(),
                activation: checkpoint.config().expert_activation(layer),
                alignment: &self.recipe.alignment,
                basis: &OnceLock::new(),
                reference: self.recipe.reference,
            };
            self.recipe.combination.combine(&job, sink)
        })
    }
}

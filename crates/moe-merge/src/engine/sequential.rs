//! Layers merged one after the other, each on what the merged layers before it give.

use std::path::Path;
use std::sync::OnceLock;

use moe_checkpoint::{ExpertId, ProtectionMask, Ratio};
use moe_checkpoint::{LayerRole, Role, Statistics};
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
use crate::merged::weights::{MergedWeights, MergedWriter};
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
    let mut visitor = Sequential {
        model,
        recipe,
        protect,
        collection: options.collection(model, data)?,
        statistics: None,
        writer: MergedWriter::create_or_resume(dir, &digest)?,
        layers: Vec::new(),
        never_used: Vec::new(),
    };
    Engine::new(model, EngineOptions::default()).run_layerwise(waves, &mut visitor)?;
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
    writer.finish(plan)
}

struct Sequential<'a> {
    model: &'a Model,
    recipe: &'a Recipe,
    protect: &'a ProtectionMask,
    collection: Collection<'a>,
    /// Of the layer in progress.
    statistics: Option<Statistics>,
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
        let Some(mut seen) = self.collection.take() else { return Ok(()) };
        // As the file of a wave holds it, so that a sequential run starts from the same numbers as one over all layers.
        seen.round_to_f32();
        match &mut self.statistics {
            None => self.statistics = Some(seen),
            Some(statistics) => statistics.fold(&seen).map_err(moe_core::Error::observer)?,
        }
        Ok(())
    }
}

impl LayerVisitor for Sequential<'_> {
    fn end_layer(&mut self, layer: usize) -> moe_core::Result<LayerChange> {
        self.merge(layer).map_err(moe_core::Error::observer)
    }
}

impl Sequential<'_> {
    fn merge(&mut self, layer: usize) -> Result<LayerChange> {
        let checkpoint = self.model.checkpoint();
        let statistics = self.statistics.take();
        let evidence = match statistics {
            Some(statistics) => Evidence::from_statistics(&statistics)?.layers.into_iter().find(|l| l.layer == layer),
            None => None,
        };
        let evidence = evidence.unwrap_or(LayerEvidence { layer, ..LayerEvidence::default() });
        let never_used = evidence.never_used().into_iter();
        self.never_used.extend(never_used.map(|expert| ExpertId { layer, expert: expert as usize }));
        let record = match self.writer.finished(layer)? {
            Some(record) => record,
            None => {
                let experts = LayerExperts { checkpoint, layer };
                let count = checkpoint.config().moe(layer).map_or(0, |moe| moe.num_experts());
                let excluded = self.recipe.budget.exclude.contains(&layer);
                let groups = if excluded { count } else { self.recipe.budget.of_layer(count) };
                let importance = match excluded {
                    true => vec![0.0; count],
                    false => self.recipe.importance.of(&evidence, count)?,
                };
                let mut router = checkpoint.read_f32(Role::Layer(layer, LayerRole::Router))?;
                router.truncate(count * checkpoint.config().hidden_size);
                let context = LayerContext {
                    layer,
                    experts: &experts,
                    router: Some(&router),
                    evidence: &evidence,
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
                })?
            }
        };
        self.layers.push(record.plan.clone());
        if record.plan.is_identity() {
            return Ok(LayerChange::default());
        }
        let dir = self.writer.dir().to_path_buf();
        Ok(LayerOverlay::new(dir, checkpoint, record, self.recipe.router)?.change())
    }
}

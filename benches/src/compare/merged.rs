//! A merged model, as it would be written.

use std::path::Path;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, Dtype};
use moe_core::Model;
use moe_merge::{
    CompactModel, Compression, EvidenceOptions, MergeOptions, MergePlan, MergedModel, OutputForm, Recipe,
    merge_sequentially,
};
use moe_prune::{ProtectionMask, PrunePlan};

use super::catalog::Merge;
use super::scored::Scored;
use super::subject::{Subject, training_waves};
use crate::{Error, Result};

/// Tokens of each layer that alignments and fits see.
pub(crate) const SAMPLE: usize = 2048;

/// Merges away a fraction of the bytes of the experts; what has to be kept is kept under `scratch`.
///
/// # Errors
/// A budget that the recipe cannot meet; whatever stops the model or the export.
pub(super) fn subject<'m>(
    full: &'m Model,
    merge: &Merge,
    scored: &Scored,
    ratio: f64,
    scratch: &Path,
) -> Result<Subject<'m>> {
    let recipe = merge.recipe(ratio)?;
    let (merged, plan) = merged(full, &recipe, scored, OutputForm::Grouped, scratch)?;
    let open = |model: &Arc<Checkpoint>| Model::new(model.clone(), full.device(), full.max_memory());
    let shown = open(merged.model())?;
    let Some(compression) = recipe.compression else { return Ok(Subject::exported(full, shown, plan)) };
    let allowed = (1.0 - ratio) * expert_bytes(full.checkpoint())? as f64;
    let compression = filled(merged.model(), &compression, allowed, &scratch.join("narrower"))?;
    let compact = scratch.join("compact");
    let report = match merge.trained {
        Some(on) => {
            let (training, evaluation) = training_waves(&scored.waves);
            let mut how = on.of(compression);
            how.train.max_steps = merge.steps.or(how.train.max_steps);
            how.fit(full, &shown, &training, &evaluation, &compact, false, &mut |_| Ok(()))?.compact
        }
        None => compression.compress(merged.model(), &compact, None, false)?,
    };
    let formed = CompactModel::open(&compact)?.on(merged.model(), Some(Dtype::F32))?;
    let shown = open(formed.model())?;
    Ok(Subject::exported(full, shown, plan).compressed(report.parameters_before, report.parameters_after))
}

/// Merges by a recipe; also gives what is left of the full model. Experts that are merged layer by layer are kept under
/// `scratch`.
///
/// # Errors
/// As [`subject`].
pub(super) fn merged(
    full: &Model,
    recipe: &Recipe,
    scored: &Scored,
    form: OutputForm,
    scratch: &Path,
) -> Result<(MergedModel, PrunePlan)> {
    let (from, none) = (full.checkpoint(), ProtectionMask::none());
    let options = MergeOptions::new(form);
    recipe.check(from, form, None)?;
    if recipe.sequential {
        let work = scratch.join(format!("{}.layers", recipe.name));
        let evidence = EvidenceOptions::for_recipe(recipe, SAMPLE);
        let weights = merge_sequentially(full, &scored.waves, recipe, &none, &evidence, &work)?;
        let plan = weights.plan().clone();
        let merged = plan.on(from, &MergeOptions { merged: Some(weights), ..options })?;
        return Ok((merged, left(&plan)?));
    }
    let evidence = scored.evidence.clone().ok_or_else(|| Error::Invalid("no evidence was collected".into()))?;
    let plan = recipe.plan(from, &evidence, &none)?;
    let merged = plan.on(from, &MergeOptions { evidence: Some(evidence), ..options })?;
    Ok((merged, left(&plan)?))
}

/// The pruning plan that leaves the dominants alone: what a merged model is compared as.
fn left(plan: &MergePlan) -> Result<PrunePlan> {
    let mut left = PrunePlan::without_experts(&plan.shape, plan.model.clone(), &plan.removed())?;
    left.never_routed.clone_from(&plan.never_used);
    Ok(left)
}

/// Bytes of all routed experts.
fn expert_bytes(checkpoint: &Checkpoint) -> Result<u64> {
    let layers = checkpoint.shape().layers.iter();
    Ok(layers.map(|layer| checkpoint.expert_bytes_on_disk(layer.layer)).sum::<moe_checkpoint::Result<u64>>()?)
}

/// The compression of the largest rank whose experts take at most so many bytes: which rows of S stay, and how long
/// they are, one of a rank that is small enough in any case shows, which is kept in `trial`.
fn filled(checkpoint: &Checkpoint, compression: &Compression, allowed: f64, trial: &Path) -> Result<Compression> {
    let safe = Compression { rank: rank(checkpoint, compression, allowed)?, ..*compression };
    let (mut per_rank, mut parameters) = (0, 0);
    for layer in &checkpoint.shape().layers {
        let stored = checkpoint.config().moe(layer.layer).map(|moe| moe.stored_widths()).unwrap_or_default();
        for width in stored.iter().copied() {
            per_rank += 3 * (width + checkpoint.shape().hidden_size);
            parameters += 3 * width * checkpoint.shape().hidden_size;
        }
    }
    let element = expert_bytes(checkpoint)? as f64 / parameters.max(1) as f64;
    let used = |compression: &Compression, to: &Path| -> Result<f64> {
        Ok(compression.compress(checkpoint, to, None, false)?.bytes_after as f64)
    };
    let more = (allowed - used(&safe, trial)?) / (element * per_rank.max(1) as f64);
    let wider = Compression { rank: safe.rank + more.max(0.0) as usize, ..safe };
    if wider.rank == safe.rank || used(&wider, &trial.with_extension("wider"))? > allowed {
        return Ok(safe);
    }
    Ok(wider)
}

/// The largest rank at which the compressed experts of a checkpoint take at most so many bytes, rows of S and their
/// indices included.
fn rank(checkpoint: &Checkpoint, compression: &Compression, allowed: f64) -> Result<usize> {
    let hidden = checkpoint.shape().hidden_size;
    // Rows of S, the length of the longest, and both dimensions of a matrix together.
    let (mut rows, mut longest, mut factors) = (0, hidden, 0);
    let mut parameters = 0;
    for layer in &checkpoint.shape().layers {
        let stored = checkpoint.config().moe(layer.layer).map(|moe| moe.stored_widths()).unwrap_or_default();
        for width in stored.iter().copied() {
            rows += 2 * width + hidden;
            longest = longest.max(width);
            factors += 3 * (width + hidden);
            parameters += 3 * width * hidden;
        }
    }
    let element = expert_bytes(checkpoint)? as f64 / parameters.max(1) as f64;
    let kept = (rows as f64 * compression.keep_rows).floor();
    let left = allowed - kept * (element * longest as f64 + size_of::<u32>() as f64);
    let rank = (left / (element * factors as f64)).floor();
    if rank < 1.0 {
        return Err(Error::Invalid(format!("{allowed:.0} bytes are too few for rank 1 and {kept} rows")));
    }
    Ok(rank as usize)
}

//! From scores to written checkpoints.

use std::path::PathBuf;

use moe_checkpoint::{Existing, Record, ScoreTable, WriteOptions, write as write_model};
use moe_prune::{
    Budget, Export, PRUNE_METHOD, ProtectionMask, PrunePlan, PruneRecord, Pruner, Report, Scope, SharedSets, UnitPruner,
};

use super::job::Job;
use crate::progress::{Progress, Unit};
use crate::{Error, Result};

/// A pruned checkpoint.
#[derive(Debug)]
pub struct PrunedModel {
    /// Name of the method.
    pub method: &'static str,
    /// Fraction of units asked to drop.
    pub ratio: f64,
    /// Where it is.
    pub dir: PathBuf,
    /// What was done.
    pub plan: PrunePlan,
    /// What that did.
    pub report: Report,
}

/// Plans of every method and ratio. Nothing is written.
///
/// # Errors
/// Scores or budgets that do not fit the model.
pub fn plans(job: &Job, tables: &[ScoreTable]) -> Result<Vec<(&'static str, f64, PrunePlan)>> {
    let scope = job.arguments.scope;
    let mut pruner = UnitPruner::new(scope);
    if scope == Scope::Expert && job.export != Export::Uniform {
        // only stock loaders of smaller matrices care about multiples
        pruner = pruner.round_to(1);
    }
    let checkpoint = job.model.checkpoint();
    let (shape, shared, none) = (checkpoint.shape(), SharedSets::of(checkpoint), ProtectionMask::none());
    let mut plans = Vec::new();
    for (method, table) in job.methods.iter().zip(tables) {
        for &ratio in &job.arguments.ratio {
            let budget = Budget::Ratio(ratio);
            let plan = match &shared {
                Some(shared) => shared.prune(&pruner, table, budget, &none)?,
                None => pruner.prune(table, shape, budget, &none)?.plan,
            };
            plans.push((method.name, ratio, plan));
        }
    }
    Ok(plans)
}

/// Writes a checkpoint per plan. One that is there already, of the same plan, is left as it is; an unfinished one is
/// continued.
///
/// # Errors
/// Files that cannot be written; a checkpoint of another plan in the output directory.
pub fn write(job: &Job, plans: Vec<(&'static str, f64, PrunePlan)>, progress: Progress) -> Result<Vec<PrunedModel>> {
    let checkpoint = job.model.checkpoint();
    let mut written = Vec::with_capacity(plans.len());
    for (number, (method, ratio, plan)) in plans.into_iter().enumerate() {
        if number == 0 {
            plan.save(job.out.plan())?;
        }
        let dir = job.out.checkpoint(method, ratio);
        let report = if dir.exists() {
            let applied: Option<PruneRecord> = Record::load(&dir)?.recipe(PRUNE_METHOD)?;
            let applied = applied.filter(|applied| {
                applied.plan.digest() == plan.digest()
                    && applied.export == job.export
                    && applied.mtp == job.arguments.mtp
            });
            let Some(applied) = applied else {
                let advice = "choose another --out, or --force to begin anew";
                let path = dir.display();
                return Err(Error::Invalid(format!("{path}: a checkpoint of another plan or export; {advice}")));
            };
            applied.report
        } else {
            let bar = progress.bar(format!("writing {method}-{ratio}"), 0, Unit::Bytes);
            let tell = |at: &moe_checkpoint::Progress<'_>| {
                bar.total(at.total);
                bar.at(at.done);
                Ok(())
            };
            let existing = if job.arguments.resume { Existing::Resume } else { Existing::Refuse };
            let options = WriteOptions { existing, progress: Some(&tell), ..WriteOptions::default() };
            let pruned = plan.on(checkpoint, &job.options)?;
            write_model(pruned.model(), &dir, &options)?;
            pruned.report().clone()
        };
        written.push(PrunedModel { method, ratio, dir, plan, report });
    }
    Ok(written)
}

//! From scores to written checkpoints.

use std::path::PathBuf;

use moe_checkpoint::ScoreTable;
use moe_prune::{Applied, ApplyOptions, Budget, Export, ProtectionMask, PrunePlan, Pruner, Report, Scope, UnitPruner};

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
    let shape = job.model.checkpoint().shape();
    let mut plans = Vec::new();
    for (method, table) in job.methods.iter().zip(tables) {
        for &ratio in &job.arguments.ratio {
            let plan = pruner.prune(table, shape, Budget::Ratio(ratio), &ProtectionMask::none())?.plan;
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
            let applied = Applied::load(&dir)?;
            if applied.plan != plan || applied.export != job.export {
                let advice = "choose another --out, or --force to begin anew";
                let path = dir.display();
                return Err(Error::Invalid(format!("{path}: a checkpoint of another plan or export; {advice}")));
            }
            applied.report
        } else {
            let bar = progress.bar(format!("writing {method}-{ratio}"), 0, Unit::Bytes);
            let tell = |at: &moe_prune::Progress<'_>| {
                bar.total(at.total);
                bar.at(at.done);
                Ok(())
            };
            let resume = job.arguments.resume;
            let options = ApplyOptions { resume, progress: Some(&tell), ..ApplyOptions::new(job.export) };
            plan.apply(checkpoint, &dir, &options)?
        };
        written.push(PrunedModel { method, ratio, dir, plan, report });
    }
    Ok(written)
}

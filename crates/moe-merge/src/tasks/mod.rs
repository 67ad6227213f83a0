//! Several fine-tuned checkpoints of one base, merged expert by expert.
//!
//! A *task vector* is what fine-tuning changed, `tau_k = theta_k - theta_0`. Rules here work on one matrix of one expert at a time, so
//! that memory stays at that of a few experts whatever the model; everything outside the routed experts stays that of the base.

mod arithmetic;
mod dare;
mod ties;

use std::path::Path;

use moe_checkpoint::{Checkpoint, ExpertId, ExpertPart, ExpertWeights};
use serde::{Deserialize, Serialize};

pub use arithmetic::TaskArithmetic;
pub use dare::{Dare, DareThen};
pub use ties::Ties;

use crate::apply::{MergeOptions, MergedExperts, OutputForm};
use crate::combination::{GroupSink, Merged};
use crate::plan::MergePlan;
use crate::report::MergeReport;
use crate::router::RouterAddition;
use crate::{Error, Result};

/// Turns task vectors of one tensor into what is added to the base.
pub trait TaskRule {
    /// The change of a part of an expert, from those of the tasks, all of one length. Task vectors may be used as scratch.
    fn change(&self, expert: ExpertId, part: ExpertPart, tasks: Vec<Vec<f32>>) -> Vec<f32>;

    /// Checks the parameters, for this number of tasks.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`].
    fn validate(&self, tasks: usize) -> Result<()>;
}

/// Every rule, as JSON tagged by `type`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum TaskRuleConfig {
    /// The scaled sum.
    TaskArithmetic(TaskArithmetic),
    /// Trimmed, one sign elected, the mean of those that agree.
    Ties(Ties),
    /// Random elements dropped and the others scaled up, then one of the other rules.
    Dare(Dare),
}

impl TaskRuleConfig {
    fn rule(&self) -> &dyn TaskRule {
        match self {
            Self::TaskArithmetic(rule) => rule,
            Self::Ties(rule) => rule,
            Self::Dare(rule) => rule,
        }
    }
}

impl TaskRule for TaskRuleConfig {
    fn change(&self, expert: ExpertId, part: ExpertPart, tasks: Vec<Vec<f32>>) -> Vec<f32> {
        self.rule().change(expert, part, tasks)
    }

    fn validate(&self, tasks: usize) -> Result<()> {
        self.rule().validate(tasks)
    }
}

/// The experts of a base with the changes of several fine-tuned checkpoints.
pub struct TaskExperts<'a> {
    base: &'a Checkpoint,
    tuned: Vec<&'a Checkpoint>,
    rule: TaskRuleConfig,
}

impl<'a> TaskExperts<'a> {
    /// Checks that all checkpoints are of one shape.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a rule that does not go with so many tasks, or none; [`Error::InvalidEvidence`] naming the
    /// checkpoint that differs.
    pub fn new(base: &'a Checkpoint, tuned: &[&'a Checkpoint], rule: TaskRuleConfig) -> Result<Self> {
        if tuned.is_empty() {
            return Err(Error::parameter("tuned", "no checkpoint", "at least one"));
        }
        rule.validate(tuned.len())?;
        for other in tuned {
            same_experts(base, other)?;
        }
        if base.grouped() {
            let reason = "the experts of the checkpoint share sets of weights";
            return Err(Error::infeasible(base.dir().display().to_string(), reason));
        }
        Ok(Self { base, tuned: tuned.to_vec(), rule })
    }

    /// An expert of the merged model; `None` if no task changed it.
    ///
    /// # Errors
    /// What keeps weights from being read.
    pub fn expert(&self, layer: usize, expert: usize) -> Result<Option<ExpertWeights>> {
        let base = self.base.expert(layer, expert)?;
        let tuned = self.tuned.iter().map(|tuned| tuned.expert(layer, expert));
        let tuned = tuned.collect::<moe_checkpoint::Result<Vec<_>>>()?;
        if tuned.iter().all(|tuned| *tuned == base) {
            return Ok(None);
        }
        let mut merged = base.clone();
        for which in ExpertPart::ALL.into_iter().chain(ExpertPart::BIASES) {
            let Some(from) = base.part(which) else { continue };
            let task = |tuned: &ExpertWeights| -> Vec<f32> {
                let to = tuned.part(which).unwrap_or_default();
                to.iter().zip(from).map(|(a, b)| a - b).collect()
            };
            let change = self.rule.change(ExpertId { layer, expert }, which, tuned.iter().map(task).collect());
            if let Some(into) = merged.part_mut(which) {
                into.iter_mut().zip(&change).for_each(|(w, d)| *w += d);
            }
        }
        Ok(Some(merged))
    }
}

impl MergedExperts for TaskExperts<'_> {
    fn layer(&self, layer: usize, sink: GroupSink<'_>) -> Result<Vec<RouterAddition>> {
        let experts = self.base.config().moe(layer).map_or(0, |moe| moe.num_experts());
        for expert in 0..experts {
            let merged = match self.expert(layer, expert)? {
                None => Merged::Unchanged(expert),
                Some(weights) => Merged::Changed(Box::new(weights)),
            };
            sink(expert, merged)?;
        }
        Ok(Vec::new())
    }

    fn digest(&self) -> String {
        let fingerprints: Vec<String> = self.tuned.iter().map(|tuned| tuned.fingerprint()).collect();
        serde_json::json!({ "rule": self.rule, "tuned": fingerprints }).to_string()
    }
}

/// Refuses a checkpoint whose experts differ in shape from those of the base.
pub(crate) fn same_experts(base: &Checkpoint, other: &Checkpoint) -> Result<()> {
    let biases = |model: &Checkpoint| -> Vec<_> {
        let layers = model.shape().layers.iter();
        layers.map(|layer| model.config().moe(layer.layer).map(|moe| (moe.biases, moe.sets.clone()))).collect()
    };
    if other.shape() != base.shape() || biases(other) != biases(base) {
        let reason = format!("the experts of {} differ in shape from those of the base", other.dir().display());
        return Err(Error::invalid_evidence(reason));
    }
    Ok(())
}

/// Writes the base with experts that hold several fine-tuned checkpoints, streamed, atomic and resumable like a
/// [plan](MergePlan::apply). Experts that no task changed are copied byte for byte.
///
/// # Errors
/// As [`TaskExperts::new`] and [`MergePlan::apply`].
pub fn merge_tasks(
    base: &Checkpoint,
    tuned: &[&Checkpoint],
    rule: &TaskRuleConfig,
    to: &Path,
    options: &MergeOptions<'_>,
) -> Result<MergeReport> {
    let experts = TaskExperts::new(base, tuned, rule.clone())?;
    let plan = MergePlan::keep_all(base, "tasks");
    plan.apply(base, to, &MergeOptions { form: OutputForm::Stock, merged: Some(&experts), ..*options })
}

#[cfg(test)]
mod tests;

//! Several fine-tuned checkpoints of one base, merged expert by expert.
//!
//! A *task vector* is what fine-tuning changed, `tau_k = theta_k - theta_0`. Rules here work on one matrix of one
//! expert at a time, so that memory stays at that of a few experts whatever the model; everything outside the routed
//! experts stays that of the base, which the report tells kind by kind.

mod arithmetic;
mod dare;
mod ties;

use std::fmt;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, ExpertId, ExpertPart, Step};
use serde::{Deserialize, Serialize};

pub use arithmetic::TaskArithmetic;
pub use dare::{Dare, DareThen};
pub use ties::Ties;

use crate::in_place::{self, LeftAtBase, PartChange, left_at_base};
use crate::{Error, Result};

/// Turns task vectors of one tensor into what is added to the base.
pub trait TaskRule {
    /// The change of a part of an expert, from those of the tasks, all of one length. Task vectors may be used as
    /// scratch.
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

/// A base with experts that hold several fine-tuned models of it.
#[derive(Clone, Debug)]
pub struct MergedTasks {
    model: Arc<Checkpoint>,
    report: TaskReport,
}

impl MergedTasks {
    pub(crate) fn new(model: Arc<Checkpoint>, report: TaskReport) -> Self {
        for note in report.notes() {
            tracing::warn!("{note}");
        }
        Self { model, report }
    }

    /// The model: to be run, scored, pruned, [written](moe_checkpoint::write()).
    pub fn model(&self) -> &Arc<Checkpoint> {
        &self.model
    }

    /// What became of the tasks.
    pub fn report(&self) -> &TaskReport {
        &self.report
    }
}

/// What a merge of fine-tuned models did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskReport {
    /// Fingerprints of the fine-tuned models.
    pub tasks: Vec<String>,
    /// What stays that of the base, kind by kind.
    pub left: Vec<LeftAtBase>,
}

impl TaskReport {
    /// The report of a merge of these models.
    pub(crate) fn of(base: &Checkpoint, tuned: &[Arc<Checkpoint>]) -> Result<Self> {
        let tasks = tuned.iter().map(|tuned| tuned.fingerprint()).collect();
        Ok(Self { tasks, left: left_at_base(base, tuned)? })
    }

    /// What the fine-tuned models have learnt and the merged one has not.
    pub fn notes(&self) -> Vec<String> {
        let changed = self.left.iter().filter(|left| left.changed > 0);
        let note = |left: &LeftAtBase| {
            let LeftAtBase { kind, tensors, changed } = left;
            format!("{kind}: {changed} of {tensors} tensors differ from the base in a task, and stay that of the base")
        };
        changed.map(note).collect()
    }

    /// The merge in a sentence, with what it leaves.
    pub(crate) fn summary(&self, how: &str) -> String {
        let kinds: Vec<&str> = self.left.iter().map(|left| left.kind.as_str()).collect();
        let changed: Vec<&str> =
            self.left.iter().filter(|left| left.changed > 0).map(|left| left.kind.as_str()).collect();
        let lost = match changed.is_empty() {
            true => String::new(),
            false => format!(", though tasks changed {}", changed.join(", ")),
        };
        format!(
            "routed experts of {} fine-tuned models merged by {how}; left as the base has them: {}{lost}",
            self.tasks.len(),
            kinds.join(", ")
        )
    }
}

impl fmt::Display for TaskReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<24} {:>8} {:>16}", "left at the base", "tensors", "changed by tasks")?;
        for LeftAtBase { kind, tensors, changed } in &self.left {
            writeln!(f, "{kind:<24} {tensors:>8} {changed:>16}")?;
        }
        write!(f, "{} tasks", self.tasks.len())?;
        for note in self.notes() {
            write!(f, "\nnote: {note}")?;
        }
        Ok(())
    }
}

/// What the record of such a model holds: `Record::load(dir)?.recipe::<TaskRecord>("merge-tasks")`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskRecord {
    /// How the tasks were merged.
    pub rule: TaskRuleConfig,
    /// What that did.
    pub report: TaskReport,
}

impl TaskRuleConfig {
    /// The model whose routed experts are those of `base` with the changes of several fine-tuned models, merged by this
    /// rule. Parts of experts that no task changed are those of the base, bit for bit; everything outside the routed
    /// experts is, and the report says what of it a task has changed.
    ///
    /// Memory is that of one matrix per task. Reads everything outside the routed experts once, to compare it.
    ///
    /// ```no_run
    /// use std::sync::Arc;
    /// use moe_checkpoint::{Checkpoint, WriteOptions, write};
    /// use moe_merge::{TaskRuleConfig, Ties};
    ///
    /// let open = |dir: &str| Checkpoint::open(dir).map(Arc::new);
    /// let (base, tuned) = (open("models/base")?, [open("models/law")?, open("models/code")?]);
    /// let merged = TaskRuleConfig::Ties(Ties { density: 0.2, scale: 1.0 }).on(&base, &tuned)?;
    /// println!("{}", merged.report());
    /// write(merged.model(), "out/merged", &WriteOptions::default())?;
    /// # Ok::<(), moe_merge::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a rule that does not go with so many tasks, or none; [`Error::InvalidEvidence`]
    /// naming the model whose experts differ from the base's in shape.
    pub fn on(&self, base: &Arc<Checkpoint>, tuned: &[Arc<Checkpoint>]) -> Result<MergedTasks> {
        if tuned.is_empty() {
            return Err(Error::parameter("tuned", "no checkpoint", "at least one"));
        }
        self.validate(tuned.len())?;
        for other in tuned {
            same_experts(base, other)?;
        }
        let (base, tuned) = (base.dequantized()?, dequantized(tuned)?);
        let report = TaskReport::of(&base, &tuned)?;
        let record = TaskRecord { rule: self.clone(), report: report.clone() };
        let recipe = serde_json::to_value(&record).map_err(|error| Error::invalid_plan(error.to_string()))?;
        let step = Step::new(METHOD, &base, recipe, report.summary(self.name()));
        let model = in_place::model(&base, Changes { rule: self.clone(), tuned }, None, step)?;
        Ok(MergedTasks::new(model, report))
    }

    fn name(&self) -> &'static str {
        match self {
            Self::TaskArithmetic(_) => "task arithmetic",
            Self::Ties(_) => "TIES",
            Self::Dare(_) => "DARE",
        }
    }
}

/// The method of the [step](Step) that a merge of tasks adds to the record of a model.
pub(crate) const METHOD: &str = "merge-tasks";

/// Models in plain floats.
pub(crate) fn dequantized(models: &[Arc<Checkpoint>]) -> Result<Vec<Arc<Checkpoint>>> {
    models.iter().map(|model| Ok(model.dequantized()?)).collect()
}

/// What a rule adds to the parts of experts.
struct Changes {
    rule: TaskRuleConfig,
    tuned: Vec<Arc<Checkpoint>>,
}

impl PartChange for Changes {
    fn part(&self, base: &Checkpoint, layer: usize, set: usize, part: ExpertPart) -> Result<Option<Vec<f32>>> {
        let Some(own) = base.set_part(layer, set, part)?.map(|matrix| matrix.to_f32()) else { return Ok(None) };
        let mut tasks = Vec::with_capacity(self.tuned.len());
        for tuned in &self.tuned {
            let task = tuned.set_part(layer, set, part)?.map(|matrix| matrix.to_f32()).unwrap_or_default();
            tuned.release_set(layer, set);
            tasks.push(task);
        }
        if tasks.iter().all(|task| *task == own) {
            return Ok(None);
        }
        for task in &mut tasks {
            task.iter_mut().zip(&own).for_each(|(task, own)| *task -= own);
        }
        let change = self.rule.change(ExpertId { layer, expert: set }, part, tasks);
        Ok(Some(own.iter().zip(&change).map(|(own, change)| own + change).collect()))
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

#[cfg(test)]
mod tests;

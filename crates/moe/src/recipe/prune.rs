//! The step that drops units or experts, and what a pruned model looks like.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, Mtp, Routing};
use moe_prune::{Budget, ExpertPruner, FineGrained, PruneForm, PrunerConfig, Scope, UnitPruner};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Named;
use crate::Result;

/// Drops units or experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Prune {
    /// Name of a scorer of an earlier score, or a score file; by default the first of the last score. `auto`: of all
    /// scorers of earlier scores of this model, the one whose pruned model stays closest to the full one on rows of
    /// calibration that are held back from its scores.
    pub scores: Option<PathBuf>,
    /// How much is kept.
    #[schemars(with = "Option<Value>")]
    pub budget: Option<Budget>,
    /// What decides.
    pub pruner: Option<Named>,
    /// A saved plan, instead of scores and a pruner.
    pub plan: Option<PathBuf>,
    /// A file with what stays, in the form of a protection mask, instead of scores and a pruner: experts of the layers
    /// that it names go unless it lists them, other layers stay whole.
    pub keep_list: Option<PathBuf>,
    /// A saved plan may be of another model, such as a sibling of the same shape.
    pub rebind: bool,
    /// What becomes of layers that predict further tokens.
    #[schemars(with = "Option<Value>")]
    pub mtp: Option<Mtp>,
    /// What the model looks like.
    pub form: Form,
    /// Pieces of an expert, in the form `fine_grained`.
    pub pieces: Option<usize>,
    /// Pieces per token, in the form `fine_grained`; by default as many as keep what a token computes.
    pub pieces_per_token: Option<usize>,
}

impl Default for Prune {
    fn default() -> Self {
        Self {
            scores: None,
            budget: None,
            pruner: None,
            plan: None,
            keep_list: None,
            rebind: false,
            mtp: None,
            form: Form::Auto,
            pieces: None,
            pieces_per_token: None,
        }
    }
}

impl Prune {
    /// The name that stands for the scorer that measures best.
    pub const AUTO: &str = "auto";

    /// Whether the scorer is chosen by measuring.
    pub fn chooses_scorer(&self) -> bool {
        self.scores.as_deref().is_some_and(|name| name == Path::new(Self::AUTO))
    }

    /// The pruner that scorers are compared by: that of the step, or units that compete within their layer where the
    /// form is chosen by measuring, too, or has pieces, which compete there.
    ///
    /// # Errors
    /// Those of [`Prune::pruner`].
    pub(crate) fn comparing_pruner(&self, routing: &Routing) -> Result<PrunerConfig> {
        match (&self.pruner, self.form, self.budget) {
            (_, _, Some(Budget::ExpertsPerLayer(_))) => self.pruner(routing),
            (None, Form::Auto, _) | (_, Form::FineGrained, _) => Ok(PrunerConfig::Unit(UnitPruner::new(Scope::Layer))),
            _ => self.pruner(routing),
        }
    }

    /// The budget in numbers of `base`, and in bytes of the form.
    ///
    /// # Errors
    /// A budget that the model cannot meet.
    pub(crate) fn budget_on(&self, base: &Arc<Checkpoint>) -> Result<Option<Budget>> {
        let stays = matches!(self.form, Form::Auto | Form::Uniform);
        Ok(self.budget.map(|budget| budget.resolve_as(base, stays)).transpose()?)
    }

    /// The pruner for a model that routes like this: for `auto` and `uniform` one width per expert where nothing is
    /// said, so that stock loaders read the outcome; else units over the whole model. Whole experts go by as many per
    /// group where the router selects groups first.
    ///
    /// # Errors
    /// [`Error::Usage`](crate::Error::Usage) for one that is unknown.
    pub fn pruner(&self, routing: &Routing) -> Result<PrunerConfig> {
        let unit = || match self.form {
            Form::Auto | Form::Uniform => UnitPruner::new(Scope::Expert),
            _ => UnitPruner::new(Scope::Global),
        };
        let Some(pruner) = &self.pruner else {
            return Ok(match self.budget {
                Some(Budget::ExpertsPerLayer(_)) => PrunerConfig::Expert(ExpertPruner::new().for_routing(routing)),
                _ => PrunerConfig::Unit(unit()),
            });
        };
        let mut object = pruner.object("type");
        if object.get("type").is_some_and(|name| name == "unit") && !object.contains_key("allocator") {
            let UnitPruner { allocator, limits } = unit();
            object.insert("allocator".into(), serde_json::json!(allocator));
            let given = object.insert("limits".into(), serde_json::json!(limits));
            if let (Some(Value::Object(limits)), Some(Value::Object(given))) = (object.get_mut("limits"), given) {
                limits.extend(given);
            }
        }
        let read: PrunerConfig = Named::Parameters(object).read("type", "pruner")?;
        Ok(match read {
            PrunerConfig::Expert(expert) if (expert.groups, expert.min_experts) == (1, 0) => {
                PrunerConfig::Expert(expert.for_routing(routing))
            }
            PrunerConfig::Subset(subset) if (subset.groups, subset.min_experts) == (1, 0) => {
                PrunerConfig::Subset(subset.for_routing(routing))
            }
            PrunerConfig::Genetic(genetic) if (genetic.groups, genetic.min_experts) == (1, 0) => {
                PrunerConfig::Genetic(genetic.for_routing(routing))
            }
            other => other,
        })
    }
}

/// What a pruned model looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// The smallest that stock loaders read: `uniform` where all experts keep one width, else `fine_grained` where they
    /// can be cut into pieces, else an error that names the other forms.
    #[default]
    Auto,
    /// One width for all experts: loads in stock runtimes.
    Uniform,
    /// Experts as equal pieces: loads in stock runtimes.
    FineGrained,
    /// A width per expert: opens with these crates alone.
    Ragged,
    /// Shapes as they were, zeros for what went: loads in stock runtimes, saves nothing.
    Masked,
}

impl Form {
    /// As plans are applied: `pieces` says how experts are cut where they are.
    pub fn with<'a>(self, pieces: FineGrained<'a>) -> PruneForm<'a> {
        match self {
            Self::Auto | Self::Uniform => PruneForm::Uniform,
            Self::FineGrained => PruneForm::FineGrained(pieces),
            Self::Ragged => PruneForm::Ragged,
            Self::Masked => PruneForm::Masked,
        }
    }
}

//! What most programs use: `use moe::prelude::*;`.

pub use moe_checkpoint::{Checkpoint, Existing, ModelSource, ProtectionMask, ScoreTable, WriteOptions, write};
pub use moe_core::data::{Dataset, DatasetOptions, Tokenizer, WaveOptions};
pub use moe_core::generate::{GenerateOptions, generate};
pub use moe_core::{Engine, EngineOptions, Model, device::device};
pub use moe_importance::scorers::{Fisher, Reap};
pub use moe_importance::{Calibration, Scorer, ScorerConfig};
pub use moe_merge::OutputForm;
pub use moe_prune::{Budget, ExpertPruner, Export, PruneForm, PruneOptions, PrunePlan, Pruner, Scope, UnitPruner};

pub use crate::eval_file::EvalOptions;
pub use crate::jobs::{measure, merge, prune, rows, score, training_rows, tune};
pub use crate::recipe::Recipe;
pub use crate::run::{Measurement, RunOptions, run};

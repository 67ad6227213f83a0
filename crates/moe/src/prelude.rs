//! What most programs use: `use moe::prelude::*;`.

pub use moe_checkpoint::{Checkpoint, Existing, ModelSource, ScoreTable, WriteOptions, write};
pub use moe_core::data::{Dataset, DatasetOptions, Tokenizer, WaveOptions};
pub use moe_core::{Engine, EngineOptions, Model, device::device};
pub use moe_importance::{Scorer, ScorerConfig};
pub use moe_prune::{Budget, Export, PrunePlan, Pruner, Scope, UnitPruner};

//! Ways to merge.

use moe_merge::{Amount, CompactTraining, Compression, Recipe};
use serde::Deserialize;

use super::{EXPERTS, GLOBAL, Line, MAIN_SCORER, UNIFORM, line};
use crate::Result;

/// What merges go by instead of a scorer.
pub const EVIDENCE: &str = "evidence";

/// Ways to merge that are trained afterwards.
pub const TRAINED: [&str; 2] = ["mc-smoe-trained", "mc-smoe-distilled"];

/// All ways to merge. Budgets are met by the experts that are left, where experts are compressed by them and by the
/// rank.
#[rustfmt::skip]
pub const MERGES: &[Line] = &[
    line("dominant-only", r#"{"type": "merge", "recipe": "dominant-only"}"#),
    line("m-smoe", r#"{"type": "merge", "recipe": "m-smoe"}"#),
    line("hc-smoe", r#"{"type": "merge", "recipe": "hc-smoe"}"#),
    line("ream", r#"{"type": "merge", "recipe": "ream"}"#),
    line("ream-square", r#"{"type": "merge", "recipe": "ream-square"}"#),
    line("sub-moe", r#"{"type": "merge", "recipe": "sub-moe"}"#),
    line("mergemoe", r#"{"type": "merge", "recipe": "mergemoe"}"#),
    line("dern", r#"{"type": "merge", "recipe": "dern"}"#),
    line("uncurl", r#"{"type": "merge", "recipe": "uncurl"}"#),
    line("mc-smoe", r#"{"type": "merge", "recipe": "mc-smoe"}"#),
    line(TRAINED[0], r#"{"type": "merge", "recipe": "mc-smoe", "trained": "task_and_teacher"}"#),
    line(TRAINED[1], r#"{"type": "merge", "recipe": "mc-smoe", "trained": "teacher"}"#),
];

/// What merges are compared with: a scorer and a way to prune.
pub const RIVALS: &[(&str, &str)] = &[
    ("reap", EXPERTS),
    ("frequency", EXPERTS),
    ("random", EXPERTS),
    (MAIN_SCORER, UNIFORM),
    (MAIN_SCORER, "pieces4"),
    (MAIN_SCORER, GLOBAL),
];

/// A way to merge.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Merge {
    /// A recipe by name.
    pub recipe: String,
    /// What the low-rank and sparse parts of a recipe that compresses are trained on, if they are.
    #[serde(default)]
    pub trained: Option<Training>,
    /// Steps of that training, at most; by default as many as twenty passes take.
    #[serde(default)]
    pub steps: Option<usize>,
}

/// What compressed experts are trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Training {
    /// The next tokens and, at a fifth of their weight, the full model's distributions: what MC-SMoE does.
    TaskAndTeacher,
    /// The full model's distributions alone.
    Teacher,
}

impl Training {
    /// Passes over the calibration rows.
    const EPOCHS: usize = 20;

    /// The training of a compression.
    pub fn of(self, compression: Compression) -> CompactTraining {
        let mut how = CompactTraining { compression, ..CompactTraining::default() };
        how.train.epochs = Self::EPOCHS;
        if self == Self::Teacher {
            (how.task, how.distillation, how.temperature) = (0.0, 1.0, 1.0);
        }
        how
    }
}

impl Merge {
    /// The recipe at a fraction of the bytes of the experts that go. One that compresses merges half of that away,
    /// which leaves the other half to the rank.
    ///
    /// # Errors
    /// A recipe that is not known.
    pub fn recipe(&self, ratio: f64) -> Result<Recipe> {
        let recipe = Recipe::named(&self.recipe)?;
        let merged = if recipe.compression.is_some() { ratio / 2.0 } else { ratio };
        Ok(recipe.with_amount(Amount::Ratio(merged)))
    }
}

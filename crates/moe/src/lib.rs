//! Mixture-of-Experts compression and fine-tuning, all crates behind one door.
//!
//! The crates that do the work are re-exported under short names, with what a program needs most in [`prelude`].
//! Beside them stand the parts that programs share: progress, tables, figures and the HTML report.

pub mod error;
pub mod eval_file;
pub mod expert_ranking;
pub mod figures;
pub mod format;
pub mod out_dir;
pub mod prelude;
pub mod progress;
pub mod recipe;
pub mod report;
pub mod run;
pub mod table;

pub use error::{Error, Result};
pub use {
    moe_checkpoint as checkpoint, moe_core as core, moe_importance as importance, moe_merge as merge, moe_peft as peft,
    moe_prune as prune,
};

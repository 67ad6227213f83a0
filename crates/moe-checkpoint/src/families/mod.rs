//! The families, one file each, and their registry.

mod names;
mod qwen2_moe;
mod qwen3_moe;
mod read;
mod rope;

use crate::family::Family;

pub(crate) use read::MAX_SIZE;

/// Every family. Adding one is its file, and a line here.
pub(crate) static FAMILIES: &[&dyn Family] = &[&qwen2_moe::Qwen2Moe, &qwen3_moe::Qwen3Moe];

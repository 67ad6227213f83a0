//! The most important experts stay.

use serde::{Deserialize, Serialize};

use super::{Grouping, Groups, Members, retained};
use crate::Result;
use crate::context::LayerContext;

/// The most important experts stay, each a group of its own; the others are dissolved. Expert pruning, and the first step of
/// DERN (arXiv 2509.10377).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retain {}

impl Grouping for Retain {
    fn group(&self, context: &LayerContext<'_>, count: usize) -> Result<Groups> {
        let kept = retained(context, count)?;
        let dissolved = (0..context.count()).filter(|e| !kept.contains(e)).collect();
        let groups = kept.into_iter().map(|e| Members { dominant: e, members: vec![e] });
        Ok(Groups::sorted(groups.collect(), dissolved))
    }

    fn validate(&self) -> Result<()> {
        Ok(())
    }
}

//! The most important experts stay.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Grouping, Groups, Members, retained, tagged};
use crate::Result;
use crate::context::LayerContext;
use crate::similarity::Features;

/// The most important experts stay, each a group of its own; the others are dissolved. Expert pruning, and the first
/// step of DERN (arXiv 2509.10377).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retain {}

impl Grouping for Retain {
    fn recipe(&self) -> Value {
        tagged("retain", self)
    }

    fn needs(&self) -> Vec<Features> {
        Vec::new()
    }

    fn dissolves(&self) -> bool {
        true
    }

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

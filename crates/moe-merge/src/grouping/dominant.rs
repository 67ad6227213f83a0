//! Dominant experts and those that join them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Grouping, Groups, Members, dominants, tagged};
use crate::context::LayerContext;
use crate::similarity::{Features, Similarity};
use crate::{Error, Result};

/// The most important experts are dominant; each of the others, in falling importance, joins the dominant it is most
/// like.
///
/// Source: M-SMoE (arXiv 2310.01334), stage 3, where importance is usage and likeness that of router logits; MergeMoE
/// (arXiv 2510.14436) with likeness of gate and up weights. Ties of likeness go to the more important dominant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dominant {
    /// What makes experts alike.
    pub similarity: Similarity,
    /// Most members of a group, the dominant included; a full group takes no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<usize>,
}

impl Grouping for Dominant {
    fn recipe(&self) -> Value {
        tagged("dominant", self)
    }

    fn needs(&self) -> Vec<Features> {
        self.similarity.features()
    }

    fn group(&self, context: &LayerContext<'_>, count: usize) -> Result<Groups> {
        let experts = context.count();
        let dominants = dominants(context, count)?;
        let similarity = self.similarity.matrix(context)?;
        let mut groups: Vec<Members> = dominants.iter().map(|e| Members { dominant: *e, members: vec![*e] }).collect();
        for expert in context.ranked() {
            if dominants.contains(&expert) {
                continue;
            }
            let mut best: Option<(usize, f64)> = None;
            for (label, group) in groups.iter().enumerate() {
                let full = self.capacity.is_some_and(|capacity| group.members.len() >= capacity);
                let likeness = similarity[expert * experts + group.dominant];
                if !full && !context.protected[group.dominant] && best.is_none_or(|(_, most)| likeness > most) {
                    best = Some((label, likeness));
                }
            }
            let (label, _) = best.ok_or_else(|| {
                let capacity = self.capacity.unwrap_or(experts);
                context.infeasible(format!("{experts} experts do not fit into {count} groups of at most {capacity}"))
            })?;
            groups[label].members.push(expert);
        }
        Ok(Groups::sorted(groups, Vec::new()))
    }

    fn validate(&self) -> Result<()> {
        self.similarity.validate()?;
        match self.capacity {
            Some(0) => Err(Error::parameter("grouping.capacity", 0, "at least 1")),
            _ => Ok(()),
        }
    }
}

//! The dominant alone.

use serde::{Deserialize, Serialize};

use super::{Combination, GroupSink, GroupWeights, LayerJob, Merged};
use crate::Result;
use crate::importance::Importance;
use crate::router::RouterAddition;

/// The dominant as it is; nothing of the others. With their router rows deleted this is expert pruning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DominantOnly {}

impl Combination for DominantOnly {
    fn combine(&self, job: &LayerJob<'_>, sink: GroupSink<'_>) -> Result<Vec<RouterAddition>> {
        for (position, group) in job.plan.groups.iter().enumerate() {
            sink(position, Merged::Unchanged(group.dominant as usize))?;
        }
        Ok(Vec::new())
    }

    fn weights(&self) -> GroupWeights {
        GroupWeights::by(Importance::Equal)
    }

    fn as_wide_as_dominant(&self) -> bool {
        true
    }

    fn validate(&self) -> Result<()> {
        Ok(())
    }
}

//! k-means++.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::clustering::{Center, kmeans};
use super::{Grouping, Groups, cluster_unprotected, tagged};
use crate::context::LayerContext;
use crate::similarity::{Features, Metric};
use crate::{Error, Result};

/// k-means++ on the experts, with restarts. Random choices go by rank of importance, so that the numbering of the
/// experts does not matter.
///
/// Source: Sub-MoE (arXiv 2506.23266): outputs with cosine distance, where centers are directions of mean unit vectors.
/// The other metrics take means.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KMeans {
    /// The space.
    pub features: Features,
    /// The distance in it.
    #[serde(default)]
    pub metric: Metric,
    /// Seed of the starts.
    #[serde(default)]
    pub seed: u64,
    /// Starts, of which the best is taken.
    #[serde(default = "ten")]
    pub restarts: usize,
}

fn ten() -> usize {
    10
}

impl Grouping for KMeans {
    fn recipe(&self) -> Value {
        tagged("k_means", self)
    }

    fn needs(&self) -> Vec<Features> {
        vec![self.features]
    }

    fn group(&self, context: &LayerContext<'_>, count: usize) -> Result<Groups> {
        let gram = self.features.gram(context)?;
        let gram = if self.metric == Metric::UnitEuclidean { gram.normalized() } else { gram };
        let center = if self.metric == Metric::Cosine { Center::Direction } else { Center::Mean };
        cluster_unprotected(context, count, |experts, clusters| {
            Ok(kmeans(&gram.reordered(experts), clusters, center, self.seed, self.restarts))
        })
    }

    fn validate(&self) -> Result<()> {
        match self.restarts {
            0 => Err(Error::parameter("grouping.restarts", 0, "at least 1")),
            _ => Ok(()),
        }
    }
}

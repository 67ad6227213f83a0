//! Spectral clustering.

use faer::Mat;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::clustering::{Center, kmeans};
use super::{Grouping, Groups, cluster_unprotected, tagged};
use crate::context::{Gram, LayerContext};
use crate::linalg::leading_eigenvectors;
use crate::similarity::{Features, Similarity};
use crate::{Error, Result};

/// Experts as a graph whose edges are similarities: the leading eigenvectors of `D^-1/2 A D^-1/2` embed them, rows are
/// normalized, k-means clusters them (Ng, Jordan and Weiss 2001).
///
/// Source: UNCURL clusters experts by their router logits; the affinity is inferred, here `((1 + cos) / 2)` by default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spectral {
    /// The edges.
    pub similarity: Similarity,
    /// Seed of the k-means starts.
    #[serde(default)]
    pub seed: u64,
    /// Starts, of which the best is taken.
    #[serde(default = "ten")]
    pub restarts: usize,
}

fn ten() -> usize {
    10
}

impl Grouping for Spectral {
    fn recipe(&self) -> Value {
        tagged("spectral", self)
    }

    fn needs(&self) -> Vec<Features> {
        self.similarity.features()
    }

    fn group(&self, context: &LayerContext<'_>, count: usize) -> Result<Groups> {
        let (n, similarity) = (context.count(), self.similarity.matrix(context)?);
        cluster_unprotected(context, count, |experts, clusters| {
            let edge = |i: usize, j: usize| similarity[experts[i] * n + experts[j]];
            let m = experts.len();
            let degrees: Vec<f64> = (0..m).map(|i| (0..m).map(|j| edge(i, j)).sum()).collect();
            let scale = |i: usize| if degrees[i] > 0.0 { degrees[i].powf(-0.5) } else { 0.0 };
            let graph = Mat::from_fn(m, m, |i, j| scale(i) * edge(i, j) * scale(j));
            let (vectors, _) = leading_eigenvectors(&graph, clusters)?;
            let rows: Vec<f64> = (0..m * clusters).map(|k| vectors[(k / clusters, k % clusters)]).collect();
            // Inner products of rows do not depend on the signs of eigenvectors.
            let embedded = Gram::of_vectors(&rows, m).normalized();
            Ok(kmeans(&embedded, clusters, Center::Mean, self.seed, self.restarts))
        })
    }

    fn validate(&self) -> Result<()> {
        self.similarity.validate()?;
        match self.restarts {
            0 => Err(Error::parameter("grouping.restarts", 0, "at least 1")),
            _ => Ok(()),
        }
    }
}

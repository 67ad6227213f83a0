//! Agglomerative clustering.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Grouping, Groups, cluster_unprotected, tagged};
use crate::Result;
use crate::context::LayerContext;
use crate::similarity::{Features, Metric};

/// Distance of two clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Linkage {
    /// Mean distance of their members.
    #[default]
    Average,
    /// Smallest distance of their members.
    Single,
    /// Largest distance of their members.
    Complete,
}

/// Clusters are joined two by two, the nearest first, until there are as many as wanted.
///
/// Source: HC-SMoE (arXiv 2410.08589): Euclidean distance of mean outputs over all tokens, average linkage.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hierarchical {
    /// The space.
    pub features: Features,
    /// The distance in it.
    #[serde(default = "euclidean")]
    pub metric: Metric,
    /// The distance of clusters.
    #[serde(default)]
    pub linkage: Linkage,
}

fn euclidean() -> Metric {
    Metric::Euclidean
}

impl Grouping for Hierarchical {
    fn recipe(&self) -> Value {
        tagged("hierarchical", self)
    }

    fn needs(&self) -> Vec<Features> {
        vec![self.features]
    }

    fn group(&self, context: &LayerContext<'_>, count: usize) -> Result<Groups> {
        let gram = self.features.gram(context)?;
        let distances = self.metric.distances(&gram);
        cluster_unprotected(context, count, |experts, clusters| {
            let n = experts.len();
            let mut condensed = Vec::with_capacity(n * n.saturating_sub(1) / 2);
            for (at, i) in experts.iter().enumerate() {
                condensed.extend(experts[at + 1..].iter().map(|j| distances[i * gram.count + j]));
            }
            Ok(cut(n, clusters, &mut condensed, self.linkage))
        })
    }

    fn validate(&self) -> Result<()> {
        Ok(())
    }
}

/// Labels of `n` points after `n - clusters` joins.
fn cut(n: usize, clusters: usize, condensed: &mut [f64], linkage: Linkage) -> Vec<usize> {
    let method = match linkage {
        Linkage::Average => kodama::Method::Average,
        Linkage::Single => kodama::Method::Single,
        Linkage::Complete => kodama::Method::Complete,
    };
    let dendrogram = kodama::linkage(condensed, n, method);
    // Clusters n, n + 1, … are made by the joins in order.
    let mut cluster: Vec<Vec<usize>> = (0..n).map(|point| vec![point]).collect();
    for step in dendrogram.steps().iter().take(n.saturating_sub(clusters)) {
        let mut joined = std::mem::take(&mut cluster[step.cluster1]);
        joined.extend(std::mem::take(&mut cluster[step.cluster2]));
        cluster.push(joined);
    }
    let mut labels = vec![0; n];
    for (label, points) in cluster.iter().filter(|points| !points.is_empty()).enumerate() {
        points.iter().for_each(|point| labels[*point] = label);
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn average_linkage_joins_the_nearest_clusters() {
        // Points 0, 1, 4, 5.5, 100 on a line.
        let points = [0.0, 1.0, 4.0, 5.5, 100.0f64];
        let condensed =
            || -> Vec<f64> { (0..5).flat_map(|i| (i + 1..5).map(move |j| (points[i] - points[j]).abs())).collect() };
        let cut = |clusters| cut(5, clusters, &mut condensed(), Linkage::Average);
        let same = |labels: &[usize], a: usize, b: usize| labels[a] == labels[b];
        let four = cut(4);
        assert!(same(&four, 0, 1) && !same(&four, 2, 3));
        let three = cut(3);
        assert!(same(&three, 0, 1) && same(&three, 2, 3) && !same(&three, 1, 2));
        let two = cut(2);
        assert!(same(&two, 1, 2) && !same(&two, 3, 4));
        assert_eq!(cut(1), [0; 5]);
        let mut five = cut(5);
        five.sort_unstable();
        assert_eq!(five, [0, 1, 2, 3, 4]);
    }
}

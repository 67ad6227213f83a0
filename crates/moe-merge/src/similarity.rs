//! What makes two experts of a layer alike.

use serde::{Deserialize, Serialize};

use crate::context::{Gram, LayerContext, gram_of_blocks};
use crate::evidence::OutputMean;
use crate::experts::padded;
use crate::{Error, Result};

/// The space that experts are compared in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Features {
    /// Columns of router logits over all calibration tokens (M-SMoE, UNCURL), by their Gram matrix: logits are never
    /// kept.
    RouterLogits,
    /// Rows of the router's weight.
    RouterRows,
    /// Matrices of the expert, flattened as they are, units in the order they have; units that it lacks beside the
    /// widest are zeros.
    Weights {
        /// Which matrices.
        #[serde(default)]
        parts: WeightParts,
    },
    /// Mean outputs.
    Outputs {
        /// Over which tokens.
        over: OutputMean,
    },
}

/// Matrices of an expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightParts {
    /// Gate, up and down.
    #[default]
    All,
    /// Gate and up (MergeMoE).
    GateUp,
}

impl Features {
    /// Inner products of the layer's experts in this space.
    ///
    /// # Errors
    /// [`Error::MissingEvidence`], and whatever keeps weights from being read.
    pub fn gram(self, context: &LayerContext<'_>) -> Result<Gram> {
        let count = context.count();
        match self {
            Self::RouterLogits => {
                let what = || "the Gram matrix of the router's logits".to_string();
                let evidence = context.evidence;
                if let Some(gram) = &evidence.logit_gram {
                    return Ok(Gram::new(count, gram));
                }
                let sample = evidence.sample.as_ref().filter(|sample| sample.tokens() > 0);
                let sample = sample.ok_or_else(|| evidence.missing("router-logit similarity", what()))?;
                let finite = |z: &f32| f64::from(if z.is_finite() { *z } else { 0.0 });
                let tokens = sample.tokens();
                let column = |e: usize| (0..tokens).map(move |t| finite(&sample.logits[t * count + e]));
                let columns: Vec<f64> = (0..count).flat_map(column).collect();
                Ok(Gram::of_vectors(&columns, count))
            }
            Self::RouterRows => {
                let rows = context.router.ok_or_else(|| {
                    context.evidence.missing("router-row similarity", "the weight of the router".into())
                })?;
                let rows: Vec<f64> = rows.iter().map(|v| f64::from(*v)).collect();
                Ok(Gram::of_vectors(&rows, count))
            }
            Self::Weights { parts } => {
                let mut width = 0;
                for expert in 0..count {
                    width = width.max(context.experts.width(expert)?);
                }
                gram_of_blocks(count, &|expert| {
                    let weights = padded(context.experts.expert(expert)?, width);
                    let mut flat = weights.gate;
                    flat.extend(weights.up);
                    if parts == WeightParts::All {
                        flat.extend(weights.down);
                    }
                    Ok(flat)
                })
            }
            Self::Outputs { over } => Ok(Gram::of_vectors(&context.mean_outputs(over)?, count)),
        }
    }
}

/// How inner products become a similarity in [0, 1].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// `(1 + cos) / 2`.
    #[default]
    Cosine,
    /// `1 - d / d_max`, d the Euclidean distance and `d_max` the largest of the layer.
    Euclidean,
    /// The same of vectors divided by their lengths.
    UnitEuclidean,
}

impl Metric {
    fn similarity(self, gram: &Gram) -> Vec<f64> {
        let n = gram.count;
        let pairs = (0..n * n).map(|k| (k / n, k % n));
        let near = |gram: &Gram| -> Vec<f64> {
            let distances: Vec<f64> = pairs.clone().map(|(i, j)| gram.distance(i, j)).collect();
            let largest = distances.iter().copied().fold(0.0, f64::max);
            distances.iter().map(|d| if largest > 0.0 { 1.0 - d / largest } else { 1.0 }).collect()
        };
        match self {
            Self::Cosine => pairs.map(|(i, j)| (1.0 + gram.cosine(i, j)) / 2.0).collect(),
            Self::Euclidean => near(gram),
            Self::UnitEuclidean => near(&gram.normalized()),
        }
    }

    /// Distances `[E, E]` for clustering: `1 - cos`, or Euclidean.
    pub(crate) fn distances(self, gram: &Gram) -> Vec<f64> {
        let n = gram.count;
        let pairs = (0..n * n).map(|k| (k / n, k % n));
        match self {
            Self::Cosine => pairs.map(|(i, j)| if i == j { 0.0 } else { 1.0 - gram.cosine(i, j) }).collect(),
            Self::Euclidean => pairs.map(|(i, j)| gram.distance(i, j)).collect(),
            Self::UnitEuclidean => {
                let gram = gram.normalized();
                pairs.map(|(i, j)| gram.distance(i, j)).collect()
            }
        }
    }
}

/// One term of a [`Similarity`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Term {
    /// The space.
    pub features: Features,
    /// The similarity in it.
    #[serde(default)]
    pub metric: Metric,
    /// Its share.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

/// How alike two experts are: the weighted mean of similarities in [0, 1], in JSON a list of terms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Similarity(pub Vec<Term>);

impl Similarity {
    /// The spaces of its terms.
    pub fn features(&self) -> Vec<Features> {
        self.0.iter().map(|term| term.features).collect()
    }

    /// A single term.
    pub fn of(features: Features, metric: Metric) -> Self {
        Self(vec![Term { features, metric, weight: 1.0 }])
    }

    /// REAM's (arXiv 2604.04356): the mean of the cosine of gated mean outputs and of the nearness of normalized
    /// columns of router logits.
    pub fn ream() -> Self {
        let term = |features, metric| Term { features, metric, weight: 0.5 };
        Self(vec![
            term(Features::Outputs { over: OutputMean::Gated }, Metric::Cosine),
            term(Features::RouterLogits, Metric::UnitEuclidean),
        ])
    }

    /// Checks the weights.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] without terms or for weights that are not positive.
    pub fn validate(&self) -> Result<()> {
        if self.0.is_empty() {
            return Err(Error::parameter("similarity", "an empty list", "at least one term"));
        }
        match self.0.iter().find(|term| !(term.weight.is_finite() && term.weight > 0.0)) {
            Some(term) => Err(Error::parameter("similarity.weight", term.weight, "a positive number")),
            None => Ok(()),
        }
    }

    /// Similarities `[E, E]` of the layer's experts.
    ///
    /// # Errors
    /// As [`Features::gram`].
    pub fn matrix(&self, context: &LayerContext<'_>) -> Result<Vec<f64>> {
        let total: f64 = self.0.iter().map(|term| term.weight).sum();
        let mut sum = vec![0.0; context.count() * context.count()];
        for Term { features, metric, weight } in &self.0 {
            let similarity = metric.similarity(&features.gram(context)?);
            sum.iter_mut().zip(similarity).for_each(|(sum, s)| *sum += weight / total * s);
        }
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_in_the_unit_interval_and_one_on_the_diagonal() {
        // Vectors (1, 0), (0, 2), (-3, 0), (0, 0).
        let gram = Gram::of_vectors(&[1.0, 0.0, 0.0, 2.0, -3.0, 0.0, 0.0, 0.0], 4);
        let cosine = Metric::Cosine.similarity(&gram);
        assert_eq!(&cosine[..4], &[1.0, 0.5, 0.0, 0.5]);
        let euclidean = Metric::Euclidean.similarity(&gram);
        let close = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        close(euclidean[1], 1.0 - 5f64.sqrt() / 4.0);
        close(euclidean[2], 0.0);
        // Unit vectors (1, 0), (0, 1), (-1, 0).
        let unit = Metric::UnitEuclidean.similarity(&gram);
        close(unit[1], 1.0 - 2f64.sqrt() / 2.0);
        close(unit[2], 0.0);
        for (i, metric) in [euclidean, unit].iter().enumerate() {
            assert!((0..4).all(|e| metric[e * 5] == 1.0), "{i}");
        }
        assert_eq!(Metric::Cosine.distances(&gram)[..3], [0.0, 1.0, 2.0]);
    }

    #[test]
    fn a_similarity_is_a_list_of_terms() {
        let json = r#"[{"features": {"type": "outputs", "over": "gated"}, "metric": "cosine", "weight": 0.5},
                       {"features": {"type": "router_logits"}, "metric": "unit_euclidean", "weight": 0.5}]"#;
        assert_eq!(serde_json::from_str::<Similarity>(json).unwrap(), Similarity::ream());
        assert!(Similarity(vec![]).validate().is_err());
    }
}

//! Global ranking of scores that are first made comparable, layer by layer.

use moe_checkpoint::{Granularity, Pool};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Allocation, AllocationRequest, Allocator, global};
use crate::probe::ModelProbe;
use crate::ranking::{Queue, compare, queues};
use crate::recipe::tagged;
use crate::{Error, Needs, Result};

/// All units (or experts) of the model compete by normalized scores. The order within a layer stays; the scores need
/// not be comparable between layers. Where they become shares of a sum, they must be additive within a layer
/// ([`ScoreTable::additive`](moe_checkpoint::ScoreTable::additive)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalized {
    /// How the scores of a layer are normalized.
    #[serde(default)]
    pub by: Normalization,
}

/// How the scores of a layer are made comparable with those of other layers. `s_1 <= s_2 <= ...` are the scores of a
/// layer in ascending order, without what an earlier round dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Normalization {
    /// LAMP (arXiv 2010.07611) of norms: `s_u^2 / (s_u^2 + s_{u+1}^2 + ...)`. The largest of a layer scores 1, so that
    /// no layer is emptied.
    #[default]
    Lamp,
    /// LAMP of scores that are squares already: `s_u / (s_u + s_{u+1} + ...)`.
    LampOfSquares,
    /// Divided by the sum of their absolute values.
    Sum,
    /// Divided by the mean of their absolute values.
    Mean,
    /// Divided by the largest absolute value.
    Max,
    /// `(s_1 + ... + s_u) / (s_1 + s_2 + ...)`: every layer keeps the fewest whose scores cover one common share of its
    /// total, as SHAPE (arXiv 2606.09886) finds by binary search.
    Coverage,
}

impl Allocator for Normalized {
    fn recipe(&self) -> Value {
        tagged("normalized", self)
    }

    fn needs(&self, granularity: Granularity) -> Needs {
        let needs = Needs::new(granularity, Pool::Layer);
        match self.by.adds() {
            true => needs.adding(Pool::Layer, "the normalization by a share of the layer"),
            false => needs,
        }
    }

    fn allocate_with(&self, request: &AllocationRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        request.validate(&self.needs(request.granularity()), probe)?;
        let mut queues = queues(request)?;
        for layer in &mut queues {
            self.by.apply(layer)?;
        }
        global::allocate(self.recipe(), request, &queues)
    }
}

impl Normalization {
    /// Whether scores of a layer are added up to shares of their sum. A mean or the largest only sets the scale.
    fn adds(self) -> bool {
        match self {
            Self::Lamp | Self::LampOfSquares | Self::Sum | Self::Coverage => true,
            Self::Mean | Self::Max => false,
        }
    }

    fn apply(self, layer: &mut [Queue]) -> Result<()> {
        let number = layer.first().map_or(0, |queue| queue.layer);
        let mut values: Vec<&mut f64> = layer.iter_mut().flat_map(|queue| queue.values_mut()).collect();
        let divide = |values: &mut [&mut f64], by: f64| {
            values.iter_mut().for_each(|value| **value = if by > 0.0 { **value / by } else { 0.0 });
        };
        let count = values.len().max(1) as f64;
        let sum: f64 = values.iter().map(|value| value.abs()).sum();
        match self {
            Self::Sum => divide(&mut values, sum),
            Self::Mean => divide(&mut values, sum / count),
            Self::Max => {
                let max = values.iter().fold(0.0, |max: f64, value| max.max(value.abs()));
                divide(&mut values, max);
            }
            Self::Lamp | Self::LampOfSquares | Self::Coverage => {
                if let Some(negative) = values.iter().find(|value| ***value < 0.0) {
                    let found = format!("{negative} in layer {number}");
                    let expected = "no negative score: a share of a sum needs magnitudes".into();
                    return Err(Error::InvalidParameter { field: "scores", found, expected });
                }
                // Stable: what is equal stays in natural order.
                values.sort_by(|a, b| compare(**a, **b));
                let mut gathered = 0.0;
                let mut share = |value: &mut f64, addend: f64| {
                    gathered += addend;
                    *value = if gathered > 0.0 { addend / gathered } else { 0.0 };
                };
                match self {
                    Self::Lamp => values.into_iter().rev().for_each(|value| share(value, *value * *value)),
                    Self::LampOfSquares => values.into_iter().rev().for_each(|value| share(value, *value)),
                    _ => {
                        let mut covered = 0.0;
                        for value in values {
                            covered += *value;
                            *value = if sum > 0.0 { covered / sum } else { 0.0 };
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use moe_checkpoint::{Denominator, Granularity, LayerScores, MoeLayerShape, MoeShape, Provenance, ScoreTable};

    use super::*;
    use crate::{Budget, Limits, ProtectionMask, WidthLimits};

    fn values(by: Normalization, scores: &[f32]) -> Vec<f64> {
        let table = ScoreTable {
            scorer: "{}".into(),
            granularity: Granularity::Unit,
            pool: Pool::Layer,
            additive: Some(Pool::Layer),
            denominator: Denominator::None,
            layers: vec![LayerScores { layer: 0, scores: vec![scores.to_vec()], routed: None, whole: None }],
            provenance: Provenance::new("", "", "{}"),
        };
        let layers = vec![MoeLayerShape { layer: 0, widths: vec![scores.len()] }];
        let shape = MoeShape { gateless: false, hidden_size: 1, top_k: 1, layers };
        let (budget, protect) = (Budget::Ratio(0.5), ProtectionMask::none());
        let limits = Limits::Units(WidthLimits::default());
        let request =
            AllocationRequest { scores: &table, shape: &shape, budget, protect: &protect, limits, gone: None };
        let mut found = queues(&request).unwrap();
        by.apply(&mut found[0]).unwrap();
        found[0][0].values_mut().to_vec()
    }

    #[test]
    fn formulas() {
        let close = |by, scores: &[f32], expected: &[f64]| {
            let found = values(by, scores);
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{by:?}: {found:?}");
        };
        // Ascending: 1, 2, 3.
        let scores = [3.0, 1.0, 2.0];
        close(Normalization::Lamp, &scores, &[1.0 / 14.0, 4.0 / 13.0, 1.0]);
        close(Normalization::LampOfSquares, &scores, &[1.0 / 6.0, 2.0 / 5.0, 1.0]);
        close(Normalization::Coverage, &scores, &[1.0 / 6.0, 0.5, 1.0]);
        close(Normalization::Sum, &scores, &[1.0 / 6.0, 2.0 / 6.0, 0.5]);
        close(Normalization::Mean, &scores, &[0.5, 1.0, 1.5]);
        close(Normalization::Max, &[-4.0, 2.0], &[-1.0, 0.5]);
        for by in [Normalization::Lamp, Normalization::Coverage, Normalization::Sum] {
            close(by, &[0.0, 0.0], &[0.0, 0.0]);
        }
    }
}

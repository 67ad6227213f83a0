//! Shares by depth.

use moe_checkpoint::{Granularity, MoeShape};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Allocation, AllocationRequest, Allocator};
use crate::paths::{Problem, Within};
use crate::plan::LayerKept;
use crate::probe::{ModelProbe, everything};
use crate::recipe::tagged;
use crate::{Error, Needs, Questions, Result};

/// Layers keep units in proportion to a weight times their size. A layer that would keep more than it has keeps all,
/// one that would fall below its floor keeps that, and the others share the rest, still in proportion.
///
/// Weights by depth are how MoLA gives higher layers more experts and TENP (arXiv 2606.09885) deeper layers more
/// experts of full width; its exact schedule is not published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DepthPrior {
    /// The weights.
    pub prior: Prior,
    /// How the units of a layer go.
    #[serde(default)]
    pub within: Within,
}

/// Weights of layers. `x` in [0, 1] is the place of a layer among the MoE layers: 0 for the first, 1 for the last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Prior {
    /// One weight per MoE layer.
    Weights(Vec<f64>),
    /// From `first` at `x = 0` to `last` at `x = 1`: ascending or descending.
    Linear {
        /// Weight of the first MoE layer.
        first: f64,
        /// Weight of the last.
        last: f64,
    },
    /// From `edge` at `x = 0` up to `top` at `x = rise`, level until `x = fall`, and back to `edge` at `x = 1`.
    Trapezoid {
        /// Weight at the ends.
        edge: f64,
        /// Weight in between.
        top: f64,
        /// Where it begins to be level, in [0, 1].
        rise: f64,
        /// Where it ceases to be level, in [`rise`, 1]; 1 for layers that never get less again.
        fall: f64,
    },
    /// Amounts, not fractions, in proportion to the sum of the dimensions of the experts' matrices, `hidden_size + I`
    /// each: the released form of Erdos-Renyi-kernel sparsity.
    Erk,
    /// What losing one expert of the layer does to the model, as a mean over its experts: the divergence from the full
    /// model, which a probe measures once per expert. The analysis of layers of MoE-I² (arXiv 2411.01016).
    Importance,
}

impl Prior {
    /// Weights of `layers` MoE layers in ascending order; those of [`Prior::Erk`] and, as long as no model was asked,
    /// of [`Prior::Importance`] are 1.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a weight that is negative or not finite, for all weights 0, another number of
    /// them than of layers, or a trapezoid whose corners are not in order.
    pub fn weights(&self, layers: usize) -> Result<Vec<f64>> {
        let invalid = |field, found: String, expected: String| Err(Error::InvalidParameter { field, found, expected });
        let place = |index: usize| if layers > 1 { index as f64 / (layers - 1) as f64 } else { 0.0 };
        let weights: Vec<f64> = match self {
            Self::Weights(weights) if weights.len() != layers => {
                let expected = format!("{layers}, one per MoE layer");
                return invalid("prior.weights", format!("{} numbers", weights.len()), expected);
            }
            Self::Weights(weights) => weights.clone(),
            Self::Linear { first, last } => (0..layers).map(|l| first + (last - first) * place(l)).collect(),
            Self::Trapezoid { edge, top, rise, fall } => {
                if !(0.0 <= *rise && rise <= fall && *fall <= 1.0) {
                    let found = format!("rise {rise}, fall {fall}");
                    return invalid("prior.trapezoid", found, "0 <= rise <= fall <= 1".into());
                }
                let of = |x: f64| match x {
                    x if x < *rise => edge + (top - edge) * x / rise,
                    x if x > *fall => edge + (top - edge) * (1.0 - x) / (1.0 - fall),
                    _ => *top,
                };
                (0..layers).map(|l| of(place(l))).collect()
            }
            Self::Erk | Self::Importance => vec![1.0; layers],
        };
        if let Some(layer) = weights.iter().position(|weight| !(weight.is_finite() && *weight >= 0.0)) {
            let found = format!("{} for MoE layer number {layer}", weights[layer]);
            return invalid("prior", found, "finite weights of at least 0".into());
        }
        if layers > 0 && weights.iter().all(|weight| *weight == 0.0) {
            return invalid("prior", "weights of 0 only".into(), "a positive one".into());
        }
        Ok(weights)
    }

    /// What every layer's share is proportional to.
    fn amounts(&self, shape: &MoeShape) -> Result<Vec<f64>> {
        let weights = self.weights(shape.layers.len())?;
        let size = |layer: &moe_checkpoint::MoeLayerShape| match self {
            Self::Erk => layer.widths.iter().map(|width| (shape.hidden_size + width) as f64).sum(),
            _ => layer.units() as f64,
        };
        Ok(shape.layers.iter().zip(weights).map(|(layer, weight)| weight * size(layer)).collect())
    }
}

impl Allocator for DepthPrior {
    fn recipe(&self) -> Value {
        tagged("depth_prior", self)
    }

    fn needs(&self, granularity: Granularity) -> Needs {
        let needs = Needs::new(granularity, self.within.pool());
        match self.prior {
            Prior::Importance => needs.asking(Questions { distortion: true, ..Questions::NONE }),
            _ => needs,
        }
    }

    fn allocate_with(&self, request: &AllocationRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        request.validate(&self.needs(request.granularity()), probe)?;
        let amounts = match self.prior {
            Prior::Importance => importance(request, probe)?,
            _ => self.prior.amounts(request.shape)?,
        };
        let problem = Problem::new(request, self.within)?;
        let positions = spread(&problem, &amounts)?;
        problem.allocation(self.recipe(), &positions)
    }
}

/// Of every layer, the mean divergence of the model without one of its experts, times its units.
fn importance(request: &AllocationRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Vec<f64>> {
    let whole = request.gone.map_or_else(|| everything(request.shape), <[LayerKept]>::to_vec);
    let mut amounts = Vec::with_capacity(whole.len());
    for (position, layer) in request.shape.layers.iter().enumerate() {
        let (mut sum, mut count) = (0.0, 0);
        for expert in 0..layer.num_experts() {
            if whole[position].experts[expert].is_empty() {
                continue;
            }
            let mut without = whole.clone();
            without[position].experts[expert].clear();
            if layer.num_experts() - without[position].removed.len() > request.shape.top_k {
                without[position].removed.push(expert as u32);
                without[position].removed.sort_unstable();
            }
            let divergence = probe.distortion(&without)?.mean;
            if !divergence.is_finite() {
                let (layer, expected) = (layer.layer, "finite distortions".into());
                let found = format!("a distortion of {divergence} without expert {expert} of layer {layer}");
                return Err(Error::InvalidParameter { field: "probe", found, expected });
            }
            // A model may be a hair better without an expert.
            sum += divergence.max(0.0);
            count += 1;
        }
        amounts.push(sum / f64::from(count.max(1)) * layer.units() as f64);
    }
    match amounts.iter().any(|amount| *amount > 0.0) {
        true => Ok(amounts),
        false => Err(Error::InvalidParameter {
            field: "prior.importance",
            found: "a model that no expert is missed in".into(),
            expected: "a layer that changes the model; more data, perhaps".into(),
        }),
    }
}

/// Positions at which what paths keep is in proportion to the amounts of their layers, as far as floors and sizes
/// allow.
pub(crate) fn spread(problem: &Problem<'_>, amounts: &[f64]) -> Result<Vec<usize>> {
    let sizes: Vec<usize> =
        (0..amounts.len()).map(|l| problem.paths.iter().filter(|p| p.layer == l).map(|p| p.total).sum()).collect();
    let bounds: Vec<(f64, f64, f64)> = problem
        .paths
        .iter()
        .map(|path| {
            let part = path.total as f64 / sizes[path.layer].max(1) as f64;
            (amounts[path.layer] * part, path.kept(path.end()) as f64, path.total as f64)
        })
        .collect();
    let shares = fill_level(&bounds, problem.keep as f64).ok_or_else(|| Error::Infeasible {
        what: "the model".into(),
        asked: problem.keep,
        reason: "the layers of positive weight have fewer units than that".into(),
    })?;
    let step = problem.step as f64;
    // Shares are whole steps but for rounding: an epsilon keeps 3.9999999 from becoming 3.
    let whole = |share: f64| (share / step + 1e-9).floor();
    let mut positions: Vec<usize> =
        problem.paths.iter().zip(&shares).map(|(path, share)| path.position((whole(*share) * step) as usize)).collect();
    problem.settle(&mut positions, |index, to| {
        // What is left goes to the path that is furthest below its share.
        let path = &problem.paths[index];
        (shares[index] - path.kept(to) as f64) * (path.units[to] - path.units[to - 1]).max(1) as f64
    });
    Ok(positions)
}

/// `clamp(level * amount, low, high)` for the level at which these sum to `total`; `None` if no level does.
fn fill_level(bounds: &[(f64, f64, f64)], total: f64) -> Option<Vec<f64>> {
    let at = |level: f64| bounds.iter().map(move |(amount, low, high)| (level * amount).clamp(*low, *high));
    let full = |(amount, low, high): &(f64, f64, f64)| if *amount > 0.0 { *high } else { *low };
    if bounds.iter().map(full).sum::<f64>() < total {
        return None;
    }
    let (mut below, mut above) = (0.0, 1.0);
    let mut doublings = 0;
    while at(above).sum::<f64>() < total && doublings < 1000 {
        above *= 2.0;
        doublings += 1;
    }
    for _ in 0..200 {
        let middle = 0.5 * (below + above);
        if at(middle).sum::<f64>() < total { below = middle } else { above = middle }
    }
    Some(at(above).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        let linear = Prior::Linear { first: 0.5, last: 1.5 };
        assert_eq!(linear.weights(3).unwrap(), [0.5, 1.0, 1.5]);
        assert_eq!(linear.weights(1).unwrap(), [0.5]);
        let trapezoid = Prior::Trapezoid { edge: 0.0, top: 2.0, rise: 0.5, fall: 0.75 };
        assert_eq!(trapezoid.weights(5).unwrap(), [0.0, 1.0, 2.0, 2.0, 0.0]);
        let plateau = Prior::Trapezoid { edge: 1.0, top: 2.0, rise: 0.0, fall: 1.0 };
        assert_eq!(plateau.weights(3).unwrap(), [2.0, 2.0, 2.0]);
        for (prior, part) in [
            (Prior::Weights(vec![1.0]), "one per MoE layer"),
            (Prior::Weights(vec![1.0, -1.0]), "MoE layer number 1"),
            (Prior::Weights(vec![0.0, 0.0]), "a positive one"),
            (Prior::Trapezoid { edge: 0.0, top: 1.0, rise: 0.8, fall: 0.2 }, "rise <= fall"),
        ] {
            let text = prior.weights(2).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn levels_respect_bounds_and_redistribute() {
        let near = |found: Option<Vec<f64>>, expected: &[f64]| {
            let found = found.unwrap();
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9), "{found:?}");
        };
        near(fill_level(&[(1.0, 0.0, 10.0), (3.0, 0.0, 10.0)], 8.0), &[2.0, 6.0]);
        near(fill_level(&[(1.0, 0.0, 10.0), (3.0, 0.0, 5.0)], 8.0), &[3.0, 5.0]);
        near(fill_level(&[(1.0, 4.0, 10.0), (3.0, 0.0, 10.0)], 8.0), &[4.0, 4.0]);
        near(fill_level(&[(0.0, 1.0, 10.0), (3.0, 0.0, 10.0)], 8.0), &[1.0, 7.0]);
        assert_eq!(fill_level(&[(0.0, 1.0, 10.0), (3.0, 0.0, 5.0)], 8.0), None);
    }
}

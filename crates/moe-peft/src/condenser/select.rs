//! Which experts become condensers, and how many of each layer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::CondenserLayer;
use crate::{Error, Result};

/// Which end of the biases becomes condensers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Starved {
    /// The lowest biases: the experts that are used least.
    #[default]
    Lowest,
    /// The highest, for comparison.
    Highest,
}

/// What a layer's share of the condensers is proportional to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerScore {
    /// The standard deviation of its biases.
    BiasDeviation,
    /// The [Gini coefficient](gini) of how often each of its experts was routed to, to this power (the code tries 1, 2,
    /// 3 and 5).
    Gini(f64),
}

/// Condensers of the first, the middle and the last third of the MoE layers.
pub type Depths = [usize; 3];

/// How many condensers each layer has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum CondenserCounts {
    /// As many in every layer; the paper takes 2.
    Each(usize),
    /// So many in all, shared out by a score of the layers.
    Shared {
        /// In all layers together.
        total: usize,
        /// Most of one layer.
        cap: usize,
        /// What a layer's share is proportional to.
        by: LayerScore,
    },
    /// By thirds of the stack, the earlier ones the larger if they are not equal; the code tries 4-2-0, 0-2-4, 1-3-2
    /// and 2-2-2.
    Thirds(Depths),
}

impl Default for CondenserCounts {
    fn default() -> Self {
        Self::Each(2)
    }
}

impl CondenserCounts {
    /// Of each layer, in order.
    pub(super) fn of_layers(&self, layers: &BTreeMap<usize, CondenserLayer>) -> Result<Vec<usize>> {
        match self {
            Self::Each(r) => Ok(vec![*r; layers.len()]),
            Self::Thirds(depths) => {
                let n = layers.len();
                Ok((0..n).map(|i| depths[3 * i / n]).collect())
            }
            Self::Shared { total, cap, by } => {
                let score = |layer: &CondenserLayer| match by {
                    LayerScore::BiasDeviation => deviation(&layer.bias),
                    LayerScore::Gini(power) => {
                        gini(&layer.routed.iter().map(|n| *n as f64).collect::<Vec<_>>()).powf(*power)
                    }
                };
                share_out(*total, *cap, &layers.values().map(score).collect::<Vec<_>>())
            }
        }
    }
}

fn deviation(values: &[f32]) -> f64 {
    let n = values.len().max(1) as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    (values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n).sqrt()
}

/// Shares `total` out in proportion to `scores`, at most `cap` each: what would get more than the cap gets the cap, and
/// the rest is shared out among the others, until nothing is above it; then by the largest remainders, the lower index
/// first. Scores that are all zero count as equal.
fn share_out(total: usize, cap: usize, scores: &[f64]) -> Result<Vec<usize>> {
    if total > cap * scores.len() {
        let expected = format!("at most {cap} in each of {} layers", scores.len());
        return Err(Error::input("condensers in all", total, expected));
    }
    if let Some(score) = scores.iter().find(|score| !(score.is_finite() && **score >= 0.0)) {
        return Err(Error::input("score of a layer", score, "a finite number of 0 or more"));
    }
    let mut shares = vec![None; scores.len()]; // those at the cap
    loop {
        let open: Vec<usize> = (0..scores.len()).filter(|&i| shares[i].is_none()).collect();
        let left = total - cap * (scores.len() - open.len());
        let sum: f64 = open.iter().map(|&i| scores[i]).sum();
        let exact = |i: usize| match sum > 0.0 {
            true => left as f64 * scores[i] / sum,
            false => left as f64 / open.len().max(1) as f64,
        };
        let above: Vec<usize> = open.iter().copied().filter(|&i| exact(i) > cap as f64).collect();
        if !above.is_empty() {
            above.into_iter().for_each(|i| shares[i] = Some(cap));
            continue;
        }
        let mut counts: Vec<usize> = shares.iter().map(|share| share.unwrap_or(0)).collect();
        let mut order = open.clone();
        open.iter().for_each(|&i| counts[i] = exact(i).floor() as usize);
        order.sort_by(|&a, &b| exact(b).fract().total_cmp(&exact(a).fract()).then(a.cmp(&b)));
        let mut missing = total - counts.iter().sum::<usize>();
        // no remainder lifts a share above the cap, as shares at the cap are whole
        for &i in order.iter().cycle().take(order.len() * (cap + 1)) {
            if missing > 0 && counts[i] < cap {
                (counts[i], missing) = (counts[i] + 1, missing - 1);
            }
        }
        return Ok(counts);
    }
}

/// The r experts of a layer that become condensers, ascending.
pub(super) fn starved(layer: &CondenserLayer, r: usize, which: Starved) -> Vec<u32> {
    let mut experts: Vec<u32> = (0..layer.bias.len() as u32).collect();
    experts.sort_by(|&a, &b| {
        let (a, b) = (a as usize, b as usize);
        let bias = layer.bias[a].total_cmp(&layer.bias[b]);
        let usage = layer.usage[a].total_cmp(&layer.usage[b]);
        let order = match which {
            Starved::Lowest => bias.then(usage),
            Starved::Highest => bias.then(usage).reverse(),
        };
        order.then(a.cmp(&b))
    });
    experts.truncate(r);
    experts.sort_unstable();
    experts
}

/// The Gini coefficient of numbers that are not negative: 0 if all are equal, `1 - 1/n` if one has everything, 0 for
/// none.
pub fn gini(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (n, sum) = (sorted.len() as f64, sorted.iter().sum::<f64>());
    if sum <= 0.0 {
        return 0.0;
    }
    let ranked: f64 = sorted.iter().enumerate().map(|(i, v)| (i as f64 + 1.0) * v).sum();
    (2.0 * ranked / (n * sum) - (n + 1.0) / n).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_biases_win_then_the_lowest_use_then_the_index() {
        let layer = CondenserLayer {
            bias: vec![0.1, -0.2, -0.2, -0.2, 0.3],
            usage: vec![9.0, 3.0, 2.0, 3.0, 9.0],
            ..CondenserLayer::default()
        };
        assert_eq!(starved(&layer, 1, Starved::Lowest), [2]);
        assert_eq!(starved(&layer, 2, Starved::Lowest), [1, 2]);
        assert_eq!(starved(&layer, 3, Starved::Lowest), [1, 2, 3]);
        assert_eq!(starved(&layer, 2, Starved::Highest), [0, 4]);
        assert!(starved(&layer, 0, Starved::Lowest).is_empty());
    }

    #[test]
    fn condensers_are_shared_out_up_to_a_cap() {
        // 8 by 5:2:1 is 5, 2, 1; the first is capped and 4 are left for 2:1
        assert_eq!(share_out(8, 4, &[5.0, 2.0, 1.0]).unwrap(), [4, 3, 1]);
        assert_eq!(share_out(8, 8, &[5.0, 2.0, 1.0]).unwrap(), [5, 2, 1]);
        assert_eq!(share_out(4, 4, &[1.0, 1.0, 1.0]).unwrap(), [2, 1, 1]);
        assert_eq!(share_out(6, 2, &[100.0, 1.0, 0.0]).unwrap(), [2, 2, 2]);
        assert_eq!(share_out(3, 2, &[0.0, 0.0]).unwrap(), [2, 1]);
        assert!(share_out(7, 2, &[1.0; 3]).unwrap_err().to_string().contains("found 7"));
        assert!(share_out(1, 2, &[f64::NAN]).is_err());
    }

    #[test]
    fn thirds_of_the_stack() {
        let layers = |n: usize| (0..n).map(|l| (2 * l, CondenserLayer::default())).collect::<BTreeMap<_, _>>();
        let counts = CondenserCounts::Thirds([4, 2, 0]);
        assert_eq!(counts.of_layers(&layers(6)).unwrap(), [4, 4, 2, 2, 0, 0]);
        assert_eq!(counts.of_layers(&layers(4)).unwrap(), [4, 4, 2, 0]);
        assert_eq!(counts.of_layers(&layers(1)).unwrap(), [4]);
        assert_eq!(CondenserCounts::default().of_layers(&layers(2)).unwrap(), [2, 2]);
    }

    #[test]
    fn gini_of_equal_and_of_single_numbers() {
        assert!(gini(&[2.0; 5]).abs() < 1e-12);
        assert!((gini(&[0.0, 0.0, 0.0, 8.0]) - 0.75).abs() < 1e-12);
        assert!((gini(&[1.0, 3.0]) - 0.25).abs() < 1e-12);
        assert_eq!(gini(&[0.0; 3]), 0.0);
        assert_eq!(gini(&[]), 0.0);
    }
}

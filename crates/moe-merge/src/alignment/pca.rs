//! Matching by weights in few dimensions.

use moe_checkpoint::ExpertWeights;
use serde::{Deserialize, Serialize};

use super::{Alignment, AlignmentContext};
use crate::experts::{UnitParts, unit_vectors};
use crate::linalg::{normalize_rows, truncated_svd};
use crate::{Error, Result};

/// The match with the smallest summed distance of the units' weight vectors `[gate | up | down]`, each divided by its
/// length, after a principal component analysis of the units of both experts together.
///
/// Source: REAM (arXiv 2604.04356), step 4, with 64 components. Components are found by subspace iteration from a fixed
/// start in the space of weights, which the order of the units does not enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PcaMatching {
    /// Dimensions that are kept.
    #[serde(default = "sixty_four")]
    pub components: usize,
}

fn sixty_four() -> usize {
    64
}

impl Default for PcaMatching {
    fn default() -> Self {
        Self { components: sixty_four() }
    }
}

impl Alignment for PcaMatching {
    fn costs(&self, reference: &ExpertWeights, expert: &ExpertWeights, _: &AlignmentContext<'_>) -> Result<Vec<f32>> {
        let (mut points, length) = unit_vectors(reference, UnitParts::ALL);
        points.extend(unit_vectors(expert, UnitParts::ALL).0);
        normalize_rows(&mut points, length);
        center(&mut points, length);
        let scores = truncated_svd(&points, length, self.components)?.scores;
        let kept = scores.len() / (2 * reference.width).max(1);
        let (a, b) = scores.split_at(reference.width * kept);
        Ok(distances(a, b, kept))
    }

    fn validate(&self) -> Result<()> {
        match self.components {
            0 => Err(Error::parameter("alignment.components", 0, "at least 1")),
            _ => Ok(()),
        }
    }
}

/// Takes the mean of the rows out of each.
fn center(points: &mut [f32], length: usize) {
    let mut mean = vec![0.0f64; length];
    let count = points.len() / length.max(1);
    for row in points.chunks_exact(length.max(1)) {
        mean.iter_mut().zip(row).for_each(|(mean, v)| *mean += f64::from(*v));
    }
    for row in points.chunks_exact_mut(length.max(1)) {
        row.iter_mut().zip(&mean).for_each(|(v, mean)| *v -= (mean / count as f64) as f32);
    }
}

/// Euclidean distances of rows `[n, k]` and `[n, k]`.
fn distances(a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
    let squares = |rows: &[f32]| -> Vec<f32> {
        rows.chunks_exact(k.max(1)).map(|row| crate::linalg::dot(row, row) as f32).collect()
    };
    let (left, right) = (squares(a), squares(b));
    let mut out = crate::linalg::row_products(a, b, k);
    for (row, square) in out.chunks_exact_mut(right.len().max(1)).zip(&left) {
        row.iter_mut().zip(&right).for_each(|(p, other)| *p = (square + other - 2.0 * *p).max(0.0).sqrt());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    #[test]
    fn with_all_components_distances_are_those_of_the_points() {
        let (n, length) = (12, 5);
        let mut points = noise(n * length, 3);
        center(&mut points, length);
        let scores = truncated_svd(&points, length, 64).unwrap().scores;
        let found = distances(&scores, &scores, length);
        let expected = distances(&points, &points, length);
        for (k, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(k / n == k % n || (found - expected).abs() < 1e-4, "{found} {expected}");
        }
    }

    #[test]
    fn the_leading_direction_is_the_one_of_largest_spread() {
        let length = 6;
        let along = noise(20, 1);
        let mut points: Vec<f32> = noise(20 * length, 2).iter().map(|v| v * 0.01).collect();
        points.chunks_exact_mut(length).zip(&along).for_each(|(row, a)| row[2] += 3.0 * a);
        center(&mut points, length);
        let scores = truncated_svd(&points, length, 1).unwrap().scores;
        let sign = (scores[0] * points[2]).signum();
        for (score, row) in scores.iter().zip(points.chunks_exact(length)) {
            assert!((sign * score - row[2]).abs() < 0.05);
        }
    }
}

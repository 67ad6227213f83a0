//! Matching by weights in few dimensions.

use moe_checkpoint::ExpertWeights;
use serde::{Deserialize, Serialize};

use super::{Alignment, AlignmentContext, unit_distances};
use crate::experts::{ExpertSource, UnitParts, unit_vectors};
use crate::linalg::{leading_directions, normalize_rows, product, row_products, view};
use crate::{Error, Result};

/// The match with the smallest summed distance of the units' weight vectors `[gate | up | down]`, each divided by its
/// length, after a principal component analysis of the units of all experts of the layer. Components count in
/// proportion to their singular values, and what is left of a vector is divided by its length again.
///
/// Source: REAM (arXiv 2604.04356), step 4, with 64 components, as its code has it. Components are found by subspace
/// iteration from a fixed start in the space of weights, which the order of units and experts does not enter but by
/// rounding.
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

/// The leading components of the units of all experts of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitBasis {
    /// Mean of the unit vectors, each divided by its length.
    mean: Vec<f32>,
    /// Components times their singular values, row-major `[length, kept]`.
    directions: Vec<f32>,
    /// Number of components.
    kept: usize,
}

impl UnitBasis {
    /// Reads every expert once for the mean and once for each round of the subspace iteration; one is in memory at a
    /// time.
    fn of(experts: &dyn ExpertSource, components: usize) -> Result<Self> {
        let (mut sum, mut units) = (Vec::new(), 0);
        for expert in 0..experts.count() {
            let (points, length) = normalized(&experts.expert(expert)?);
            sum.resize(length, 0.0f64);
            for row in points.chunks_exact(length.max(1)) {
                sum.iter_mut().zip(row).for_each(|(sum, v)| *sum += f64::from(*v));
                units += 1;
            }
        }
        let mean: Vec<f32> = sum.iter().map(|sum| (sum / f64::from(units.max(1))) as f32).collect();
        let length = mean.len();
        let (directions, values) = leading_directions(length, components.min(units as usize), &|visit| {
            for expert in 0..experts.count() {
                let mut points = normalized(&experts.expert(expert)?).0;
                subtract(&mut points, &mean);
                visit(&points);
            }
            Ok(())
        })?;
        let kept = values.len();
        let directions =
            directions.chunks_exact(kept.max(1)).flat_map(|row| row.iter().zip(&values).map(|(v, s)| v * *s as f32));
        Ok(Self { directions: directions.collect(), mean, kept })
    }

    /// Units in the components, row-major `[I, kept]`, each divided by its length.
    fn place(&self, expert: &ExpertWeights) -> Vec<f32> {
        let (mut points, length) = normalized(expert);
        subtract(&mut points, &self.mean);
        let rows = points.len() / length.max(1);
        let mut placed = product(view(&points, rows, length), view(&self.directions, length, self.kept));
        normalize_rows(&mut placed, self.kept);
        placed
    }
}

/// Unit vectors, each divided by its length, and their number of elements.
fn normalized(expert: &ExpertWeights) -> (Vec<f32>, usize) {
    let (mut points, length) = unit_vectors(expert, UnitParts::ALL);
    normalize_rows(&mut points, length);
    (points, length)
}

fn subtract(points: &mut [f32], mean: &[f32]) {
    for row in points.chunks_exact_mut(mean.len().max(1)) {
        row.iter_mut().zip(mean).for_each(|(v, mean)| *v -= mean);
    }
}

impl Alignment for PcaMatching {
    fn costs(
        &self,
        reference: &ExpertWeights,
        expert: &ExpertWeights,
        context: &AlignmentContext<'_>,
    ) -> Result<Vec<f32>> {
        let basis = match context.basis.get() {
            Some(basis) => basis,
            None => {
                let found = UnitBasis::of(context.experts, self.components)?;
                context.basis.get_or_init(|| found)
            }
        };
        let (a, b) = (basis.place(reference), basis.place(expert));
        Ok(unit_distances(row_products(&a, &b, basis.kept)))
    }

    fn validate(&self) -> Result<()> {
        match self.components {
            0 => Err(Error::parameter("alignment.components", 0, "at least 1")),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{expert, noise};

    #[test]
    fn components_are_those_of_all_units_of_the_layer_times_their_singular_values() {
        const HIDDEN: usize = 5;
        let experts: Vec<ExpertWeights> = (0..3).map(|seed| expert(HIDDEN, 9, seed)).collect();
        let basis = UnitBasis::of(&experts, 4).unwrap();
        let length = 3 * HIDDEN;
        let all: Vec<f32> = experts.iter().flat_map(|e| normalized(e).0).collect();
        let rows = all.len() / length;
        let mean = |c: usize| (0..rows).map(|r| f64::from(all[r * length + c])).sum::<f64>() / rows as f64;
        let means: Vec<f64> = (0..length).map(mean).collect();
        let centered = faer::Mat::from_fn(rows, length, |r, c| f64::from(all[r * length + c]) - means[c]);
        let svd = centered.thin_svd().unwrap();
        for (component, expected) in (0..4).map(|j| svd.S().column_vector()[j]).enumerate() {
            let column = |c: usize| f64::from(basis.directions[c * 4 + component]);
            let found: Vec<f64> = (0..length).map(column).collect();
            let norm = found.iter().map(|v| v * v).sum::<f64>().sqrt();
            assert!((norm - expected).abs() < 1e-3 * expected, "{norm} {expected}");
            let along: f64 = (0..length).map(|c| found[c] / norm * svd.V()[(c, component)]).sum();
            assert!((along.abs() - 1.0).abs() < 1e-3, "component {component}: {along}");
        }
    }

    #[test]
    fn a_third_expert_of_the_layer_decides_what_two_are_compared_in() {
        const HIDDEN: usize = 4;
        // The units of two experts differ along two directions; only a third expert says which of them counts.
        let unit = |along: [f32; 2]| [1.0, along[0], along[1], 0.0];
        let of = |rows: &[[f32; HIDDEN]]| ExpertWeights {
            gate: rows.concat(),
            up: vec![0.0; rows.len() * HIDDEN],
            down: vec![0.0; rows.len() * HIDDEN],
            ..expert(HIDDEN, rows.len(), 1)
        };
        let reference = of(&[unit([0.3, 0.1]), unit([-0.3, -0.1])]);
        let other = of(&[unit([0.3, -0.1]), unit([-0.3, 0.1])]);
        let spread = |at: usize| {
            let rows = noise(20, 7).into_iter().flat_map(|v| [v, -v]).map(|v| {
                let mut along = [0.0; 2];
                along[at] = 4.0 * v;
                unit(along)
            });
            of(&rows.collect::<Vec<_>>())
        };
        let order = |third: ExpertWeights| {
            let experts = vec![reference.clone(), other.clone(), third];
            let basis = std::sync::OnceLock::new();
            let context = AlignmentContext {
                sample: None,
                activation: moe_checkpoint::Activation::Silu,
                layer: 0,
                experts: &experts,
                basis: &basis,
            };
            let costs = PcaMatching { components: 1 }.costs(&reference, &other, &context).unwrap();
            crate::alignment::assign(&costs, 2).unwrap()
        };
        assert_eq!(order(spread(0)), [0, 1]);
        assert_eq!(order(spread(1)), [1, 0]);
    }
}

//! Weighted spherical k-means of one expert's segments.

use rayon::prelude::*;

use super::{Centers, Scale};
use crate::linalg::{dot, normalize_rows, row_products};

/// Cosine from which two segments count as one direction.
const SAME_DIRECTION: f64 = 1.0 - 1e-6;

/// Segments of an expert and those moved to it, `N = own + moved`.
pub(crate) struct Points {
    /// `[N, length]`: gate row, up row, down column, and biases.
    pub vectors: Vec<f32>,
    /// Elements of a segment.
    pub length: usize,
    /// Importance of the expert each came from `[N]`.
    pub weights: Vec<f64>,
    /// How many are the expert's own; they come first. It is also how many are wanted.
    pub own: usize,
    /// Elements of a gate row.
    pub hidden: usize,
}

impl Points {
    fn count(&self) -> usize {
        self.weights.len()
    }

    fn vector(&self, point: usize) -> &[f32] {
        &self.vectors[point * self.length..(point + 1) * self.length]
    }

    /// The centers `[own, length]`; `None` if they are the expert's own segments.
    pub fn cluster(&self, centers: Centers, scale: Scale, rounds: usize) -> Option<Vec<f32>> {
        let (clusters, length) = (self.own, self.length);
        if clusters == 0 || self.count() == clusters {
            return None;
        }
        let mut unit = self.vectors.clone();
        normalize_rows(&mut unit, length);
        let seeds = match centers {
            Centers::Own => (0..clusters).collect(),
            Centers::LargestGate => self.largest_gates(&unit),
        };
        let direction = |point: usize| &unit[point * length..(point + 1) * length];
        let mut directions: Vec<f32> = seeds.iter().flat_map(|seed| direction(*seed)).copied().collect();
        // Similarities [N, clusters]; of a round, only those with centers that moved are computed again.
        let mut similarities = vec![0.0f32; self.count() * clusters];
        let mut moved: Vec<usize> = (0..clusters).collect();
        let mut members: Vec<Vec<usize>> = vec![Vec::new(); clusters];
        for _ in 0..rounds {
            let some: Vec<f32> =
                moved.iter().flat_map(|c| &directions[c * length..(c + 1) * length]).copied().collect();
            let products = row_products(&unit, &some, length); // [N, moved]
            let rows = similarities.par_chunks_exact_mut(clusters).zip(products.par_chunks_exact(moved.len()));
            rows.for_each(|(row, products)| moved.iter().zip(products).for_each(|(c, p)| row[*c] = *p));
            let labels: Vec<usize> = similarities.par_chunks_exact(clusters).map(nearest).collect();
            let mut next: Vec<Vec<usize>> = vec![Vec::new(); clusters];
            labels.iter().enumerate().for_each(|(point, label)| next[*label].push(point));
            moved = (0..clusters).filter(|c| next[*c] != members[*c]).collect();
            members = next;
            if moved.is_empty() {
                break;
            }
            for cluster in &moved {
                if let Some(mean) = self.mean_direction(&unit, &members[*cluster]) {
                    directions[cluster * length..(cluster + 1) * length].copy_from_slice(&mean);
                }
            }
        }
        let as_it_was = members.iter().enumerate().all(|(at, members)| members[..] == [at]);
        if as_it_was {
            return None;
        }
        let center = |cluster: usize| match members[cluster][..] {
            // Nothing came: the segment it started from.
            [] => self.vector(seeds[cluster]).to_vec(),
            [alone] => self.vector(alone).to_vec(),
            _ => self.scaled(&directions[cluster * length..(cluster + 1) * length], &members[cluster], scale),
        };
        Some((0..clusters).into_par_iter().flat_map_iter(center).collect())
    }

    #[cfg(test)]
    pub fn seeds(&self) -> Vec<usize> {
        let mut unit = self.vectors.clone();
        normalize_rows(&mut unit, self.length);
        self.largest_gates(&unit)
    }

    /// The points with the largest absolute element of the gate row, in ascending order; one that points where another
    /// of them does only if there are no others.
    fn largest_gates(&self, unit: &[f32]) -> Vec<usize> {
        let largest =
            |point: usize| self.vector(point)[..self.hidden].iter().fold(0.0f32, |largest, g| largest.max(g.abs()));
        let gates: Vec<f32> = (0..self.count()).map(largest).collect();
        let mut order: Vec<usize> = (0..self.count()).collect();
        order.sort_by(|a, b| gates[*b].total_cmp(&gates[*a]).then(a.cmp(b)));
        let direction = |point: usize| &unit[point * self.length..(point + 1) * self.length];
        let (mut chosen, mut passed): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
        for point in order {
            // Copies have the same largest element: only neighbors in the order can be copies.
            let near = |other: &&usize| gates[**other] <= gates[point] * (1.0 + 1e-6);
            let copy = chosen
                .iter()
                .rev()
                .take_while(near)
                .any(|other| dot(direction(*other), direction(point)) > SAME_DIRECTION);
            match copy {
                true => passed.push(point),
                false => chosen.push(point),
            }
        }
        chosen.extend(passed);
        chosen.truncate(self.own);
        chosen.sort_unstable();
        chosen
    }

    /// Weights of some points that sum to 1; equal ones if none has any.
    fn shares(&self, members: &[usize]) -> Vec<f64> {
        let total: f64 = members.iter().map(|point| self.weights[*point]).sum();
        let share = |point: &usize| match total > 0.0 {
            true => self.weights[*point] / total,
            false => 1.0 / members.len() as f64,
        };
        members.iter().map(share).collect()
    }

    /// The direction of the weighted mean of unit vectors; `None` if there is none.
    fn mean_direction(&self, unit: &[f32], members: &[usize]) -> Option<Vec<f32>> {
        let mut sum = vec![0.0f64; self.length];
        for (point, share) in members.iter().zip(self.shares(members)) {
            let row = &unit[point * self.length..(point + 1) * self.length];
            sum.iter_mut().zip(row).for_each(|(sum, v)| *sum += share * f64::from(*v));
        }
        let norm = sum.iter().map(|v| v * v).sum::<f64>().sqrt();
        (norm > 0.0).then(|| sum.iter().map(|v| (v / norm) as f32).collect())
    }

    /// A direction at the weighted mean length of some points.
    fn scaled(&self, direction: &[f32], members: &[usize], scale: Scale) -> Vec<f32> {
        let shares = self.shares(members);
        let length = |part: std::ops::Range<usize>| -> f64 {
            let norm = |point: &usize| {
                let row = &self.vector(*point)[part.clone()];
                dot(row, row).sqrt()
            };
            members.iter().zip(&shares).map(|(point, share)| share * norm(point)).sum()
        };
        let mut center = direction.to_vec();
        match scale {
            Scale::Whole => {
                let mean = length(0..self.length);
                center.iter_mut().for_each(|v| *v = (f64::from(*v) * mean) as f32);
            }
            Scale::Parts => {
                let hidden = self.hidden;
                // Biases follow the part they belong to: gate and up.
                let biases = (self.length - 3 * hidden) / 2;
                for part in 0..3 {
                    let range = part * hidden..(part + 1) * hidden;
                    let (own, mean) =
                        (dot(&direction[range.clone()], &direction[range.clone()]).sqrt(), length(range.clone()));
                    let factor = if own > 0.0 { mean / own } else { 0.0 };
                    center[range].iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32);
                    if part < 2 && biases > 0 {
                        let at = 3 * hidden + part;
                        center[at] = (f64::from(direction[at]) * factor) as f32;
                    }
                }
            }
        }
        center
    }
}

/// The largest element; the first of equal ones.
fn nearest(row: &[f32]) -> usize {
    let mut best = 0;
    for (at, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = at;
        }
    }
    best
}

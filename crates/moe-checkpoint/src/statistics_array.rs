//! What an array of statistics holds, and how two waves of it become one.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::human::variant;
use crate::{MoeLayerShape, MoeShape};

/// What an array of [`Statistics`](crate::Statistics) holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ArrayKind {
    /// A value per unit, all units of a layer expert after expert.
    Unit,
    /// A value per expert.
    Expert,
    /// A vector per expert, `[experts, len]` per layer.
    Vector(Extent),
    /// One matrix of this shape for the whole model, row-major: what is seen of other parts of a model than experts,
    /// such as the covariance of the inputs of a linear map. With [`Fold::Lowest`] it has at most as many rows.
    Matrix {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        columns: usize,
    },
}

/// How long the vectors of an array are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Extent {
    /// The hidden size, H.
    Hidden,
    /// The number of experts of the layer, E: with one vector per expert, a matrix `[E, E]`.
    Experts,
    /// Count, mean and spread of vectors of hidden size, `1 + 2H`: the number of vectors n, their mean `[H]`, and their
    /// summed squared deviations from it `[H]`. The layout of [`Fold::Moments`].
    Moments,
}

/// How the values of two waves become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Fold {
    /// Values of waves are added, in f64.
    Sum,
    /// The larger one is kept. For magnitudes: arrays start at 0.
    Max,
    /// For vectors of [`Extent::Moments`] and only those: mean and squared deviations of both samples together, by the
    /// parallel form of Welford's update (Chan, Golub, LeVeque 1979). Sums of squares would cancel where the spread is
    /// small beside the mean; this does not, even from values rounded to f32.
    Moments,
    /// For matrices: of the rows of both, those with the lowest first `key` numbers are kept, in ascending order, as
    /// many as the matrix may have. What is drawn at random by a hash of its identity becomes a sample that depends
    /// neither on the order of the waves nor on how they are shared out.
    Lowest {
        /// Numbers of a row that order it.
        key: usize,
    },
}

impl fmt::Display for ArrayKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unit => f.write_str("a value per unit"),
            Self::Expert => f.write_str("a value per expert"),
            Self::Vector(extent) => write!(f, "a vector per expert ({})", variant(extent)),
            Self::Matrix { rows, columns } => write!(f, "a matrix [{rows}, {columns}]"),
        }
    }
}

impl fmt::Display for Fold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lowest { key } => write!(f, "lowest by {key}"),
            _ => f.write_str(&variant(self)),
        }
    }
}

impl ArrayKind {
    /// Values of an array of this kind of a model of this shape, at most: a matrix that keeps the lowest rows may have
    /// fewer.
    pub fn values(self, shape: &MoeShape) -> usize {
        match self {
            Self::Matrix { rows, columns } => rows * columns,
            _ => shape.layers.iter().map(|layer| self.len(shape, layer)).sum(),
        }
    }

    /// Values of a layer.
    pub(crate) fn len(self, shape: &MoeShape, layer: &MoeLayerShape) -> usize {
        match self {
            Self::Unit => layer.units(),
            Self::Expert => layer.num_experts(),
            Self::Vector(extent) => layer.num_experts() * extent.len(shape, layer),
            Self::Matrix { rows, columns } => rows * columns,
        }
    }

    /// Shape of a layer's tensor in a file.
    pub(crate) fn dims(self, shape: &MoeShape, layer: &MoeLayerShape) -> Vec<usize> {
        match self {
            Self::Vector(extent) => vec![layer.num_experts(), extent.len(shape, layer)],
            Self::Matrix { rows, columns } => vec![rows, columns],
            _ => vec![self.len(shape, layer)],
        }
    }

    /// Values that are folded together, at least 1.
    pub(crate) fn vector_len(self, shape: &MoeShape, layer: &MoeLayerShape) -> usize {
        match self {
            Self::Vector(extent) => extent.len(shape, layer).max(1),
            _ => self.len(shape, layer).max(1),
        }
    }

    /// Values that must stay together where the values of a layer are shared out, at least 1.
    pub(crate) fn atom_len(self, shape: &MoeShape, layer: Option<&MoeLayerShape>) -> usize {
        match (self, layer) {
            (Self::Vector(extent), Some(layer)) => extent.len(shape, layer).max(1),
            _ => 1,
        }
    }

    /// Whether arrays of this kind can be folded so.
    pub(crate) fn takes(self, fold: Fold) -> bool {
        match (self, fold) {
            (Self::Matrix { columns, .. }, Fold::Lowest { key }) => key > 0 && key <= columns,
            (_, Fold::Lowest { .. }) => false,
            _ => (self == Self::Vector(Extent::Moments)) == (fold == Fold::Moments),
        }
    }
}

impl Extent {
    /// Length of a vector in a layer of this shape.
    pub fn len(self, shape: &MoeShape, layer: &MoeLayerShape) -> usize {
        match self {
            Self::Hidden => shape.hidden_size,
            Self::Experts => layer.num_experts(),
            Self::Moments => 1 + 2 * shape.hidden_size,
        }
    }
}

impl Fold {
    /// Combines `from` into `into`; with [`Fold::Moments`] one vector of [`Extent::Moments`], otherwise any values.
    /// Rows of [`Fold::Lowest`] are whole only together: [`Statistics::fold`](crate::Statistics::fold) combines them.
    ///
    /// # Panics
    /// With [`Fold::Lowest`].
    pub fn combine(self, into: &mut [f64], from: &[f64]) {
        match self {
            Fold::Sum => into.iter_mut().zip(from).for_each(|(a, b)| *a += b),
            Fold::Max => into.iter_mut().zip(from).for_each(|(a, b)| *a = a.max(*b)),
            Fold::Moments => combine_moments(into, from),
            Fold::Lowest { .. } => panic!("rows of `lowest` are combined by Statistics::fold"),
        }
    }
}

/// Of the rows of both, the `rows` with the lowest first `key` numbers, ascending.
pub(crate) fn combine_lowest(into: &mut Vec<f64>, from: &[f64], [rows, columns]: [usize; 2], key: usize) {
    let order = |a: &[f64], b: &[f64]| {
        let pairs = a[..key].iter().zip(&b[..key]);
        pairs.map(|(a, b)| a.total_cmp(b)).find(|order| order.is_ne()).unwrap_or(std::cmp::Ordering::Equal)
    };
    let mut all: Vec<&[f64]> = into.chunks_exact(columns).chain(from.chunks_exact(columns)).collect();
    all.sort_by(|a, b| order(a, b));
    all.truncate(rows);
    *into = all.concat();
}

/// `[n, mean, squared deviations]` of two samples together.
fn combine_moments(into: &mut [f64], from: &[f64]) {
    let (Some(n), Some(m)) = (into.first().copied(), from.first().copied().filter(|m| *m > 0.0)) else { return };
    let total = n + m;
    let hidden = (into.len() - 1) / 2;
    let (mean, squares) = into[1..].split_at_mut(hidden);
    let (other_mean, other_squares) = from[1..].split_at(hidden);
    for (((a, b), s), t) in mean.iter_mut().zip(other_mean).zip(squares).zip(other_squares) {
        let delta = b - *a;
        *s += t + delta * delta * (n * m / total);
        *a += delta * (m / total);
    }
    into[0] = total;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Moments of numbers, as of vectors of length 1.
    fn moments(values: &[f64]) -> [f64; 3] {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        [values.len() as f64, mean, values.iter().map(|v| (v - mean).powi(2)).sum()]
    }

    #[test]
    fn moments_of_parts_are_those_of_the_whole_where_sums_of_squares_cancel() {
        // A mean a million times the spread: the sum of squares has no digit left for the spread in f32.
        let values: Vec<f64> = (0..40).map(|i| 1e6 + f64::from(i * 7 % 11)).collect();
        let mut folded = [0.0; 3];
        for part in [&values[..1], &values[1..18], &[], &values[18..]] {
            let part = if part.is_empty() { [0.0; 3] } else { moments(part) };
            Fold::Moments.combine(&mut folded, &part);
        }
        let expected = moments(&values);
        for (found, expected) in folded.iter().zip(expected) {
            assert!((found - expected).abs() <= 1e-9 * expected, "{found}, expected {expected}");
        }
    }

    #[test]
    fn the_lowest_rows_of_parts_are_those_of_the_whole() {
        let rows: Vec<[f64; 3]> =
            (0..23).map(|i| [f64::from(i * 7 % 5), f64::from(i * 11 % 23), f64::from(i)]).collect();
        let mut sorted = rows.clone();
        sorted.sort_by(|a, b| a.partial_cmp(b).unwrap());
        for cut in [0, 1, 9, 23] {
            let mut folded = Vec::new();
            for part in [&rows[cut..], &rows[..cut]] {
                combine_lowest(&mut folded, &part.concat(), [6, 3], 2);
            }
            assert_eq!(folded, sorted[..6].concat(), "cut at {cut}");
        }
        let matrix = ArrayKind::Matrix { rows: 6, columns: 3 };
        assert!(matrix.takes(Fold::Lowest { key: 3 }) && matrix.takes(Fold::Sum));
        assert!(!matrix.takes(Fold::Lowest { key: 4 }) && !ArrayKind::Unit.takes(Fold::Lowest { key: 1 }));
    }

    #[test]
    fn moments_have_a_layout_of_their_own() {
        assert!(ArrayKind::Vector(Extent::Moments).takes(Fold::Moments));
        assert!(!ArrayKind::Vector(Extent::Moments).takes(Fold::Sum));
        assert!(!ArrayKind::Vector(Extent::Hidden).takes(Fold::Moments));
        assert!(ArrayKind::Unit.takes(Fold::Max));
    }
}

//! Norms of an expert's weights, unit by unit.

use moe_checkpoint::ExpertWeights;

/// `sum_h down[h,j]^2` of each unit j `[I]`.
pub(super) fn down_column_squares(weights: &ExpertWeights) -> Vec<f64> {
    let mut squares = vec![0.0; weights.width];
    if weights.width > 0 {
        for row in weights.down.chunks_exact(weights.width) {
            squares.iter_mut().zip(row).for_each(|(sum, w)| *sum += f64::from(*w) * f64::from(*w));
        }
    }
    squares
}

/// `sum_h w[j,h]^2` of each row j of a `[I, H]` matrix.
pub(super) fn row_squares(matrix: &[f32], hidden: usize) -> impl Iterator<Item = f64> {
    matrix.chunks_exact(hidden.max(1)).map(|row| row.iter().map(|w| f64::from(*w) * f64::from(*w)).sum())
}

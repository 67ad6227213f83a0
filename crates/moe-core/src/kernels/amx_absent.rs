//! Stands in for the matrix units where there are none.

use super::packed::PackedWeights;

/// Always false: there are none here.
pub fn available() -> bool {
    false
}

/// Only called where they are available.
pub fn multiply(_: &[f32], _: usize, _: &PackedWeights) -> Vec<f32> {
    unreachable!("a product on matrix units that are not there")
}

/// Only called where they are available.
pub fn multiply_rounded(_: &[f32], _: usize, _: &PackedWeights) -> Vec<f32> {
    unreachable!("a product on matrix units that are not there")
}

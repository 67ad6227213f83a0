//! Stands in for dot products of bf16 where the processor has none.

use super::packed::{Line, PackedWeights};

/// Always false: there are none here.
pub fn available() -> bool {
    false
}

/// Only called where they are available.
pub fn multiply(_: &[f32], _: usize, _: &PackedWeights) -> Vec<f32> {
    unreachable!("a product by instructions that are not there")
}

/// Only called where they are available.
pub(super) fn round_row(_: &[f32], _: &mut [Line], _: usize) {
    unreachable!("rounding by instructions that are not there")
}

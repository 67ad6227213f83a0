//! Stands in for the matrix units where there are none.

use super::packed::{Line, PackedWeights};

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

/// Only called where they are available.
///
/// # Safety
/// None is needed: it does nothing.
pub(super) unsafe fn multiply_tiles(
    _: (&[Line], usize),
    _: (&[Line], usize, usize),
    _: usize,
    _: bool,
    _: *mut f32,
    _: usize,
) {
    unreachable!("a product by instructions that are not there")
}

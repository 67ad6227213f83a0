//! Quantized weights as released: FP8 with one scale per block, and MXFP4. Both are read as BF16.

use half::bf16;
use rayon::prelude::*;

/// How the weights of a checkpoint are quantized, from `quantization_config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Quantization {
    /// Tensors of dtype F8_E4M3 with one factor per block of `rows x cols` elements in a tensor of the same name plus
    /// `_scale_inv`: `weight_block_size` of quantization method `fp8`.
    Fp8Blocks {
        /// Rows of a block.
        rows: usize,
        /// Columns of a block.
        cols: usize,
    },
    /// Routed experts as 4-bit floats in blocks of 32 with one power of two each: OCP MX specification, `mxfp4`.
    Mxfp4,
}

/// What a tensor name plus this is the tensor of its block factors.
pub(crate) const SCALE_SUFFIX: &str = "_scale_inv";

/// Value of an E8M0 byte, a power of two: 8 exponent bits with bias 127, all ones is NaN.
pub(crate) fn e8m0(byte: u8) -> f32 {
    match byte {
        u8::MAX => f32::NAN,
        exponent => 2f64.powi(i32::from(exponent) - 127) as f32,
    }
}

/// Value of an E4M3 byte: 4 exponent bits with bias 7, 3 mantissa bits, no infinities, `S.1111.111` is NaN.
fn e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xF), f32::from(byte & 7));
    match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa * 2f32.powi(-9),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

/// Values of the 4-bit floats E2M1.
const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Rows of an E4M3 matrix as BF16 bytes: each element times the factor of its block, rounded to nearest even.
///
/// `bytes` are whole rows of `cols` elements, the first of them row `first` of the matrix. `scales` are the factors of the
/// whole matrix, row-major.
pub(crate) fn fp8_rows(bytes: &[u8], first: usize, cols: usize, scales: &[f32], block: (usize, usize)) -> Vec<u8> {
    let mut table = [0f32; 256];
    for (value, byte) in table.iter_mut().zip(0..=u8::MAX) {
        *value = e4m3(byte);
    }
    let mut out = vec![0u8; 2 * bytes.len()];
    if cols == 0 {
        return out;
    }
    let per_row = cols.div_ceil(block.1);
    let rows = out.par_chunks_exact_mut(2 * cols).zip(bytes.par_chunks_exact(cols)).enumerate();
    rows.for_each(|(row, (out, bytes))| {
        let scales = &scales[(first + row) / block.0 * per_row..][..per_row];
        for ((out, bytes), scale) in out.chunks_mut(2 * block.1).zip(bytes.chunks(block.1)).zip(scales) {
            for (out, byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
                *out = bf16::from_f32(table[usize::from(*byte)] * scale).to_le_bytes();
            }
        }
    });
    out
}

/// MXFP4 rows as BF16 bytes. `row(i)` gives the 16-byte blocks of row `i` and their exponents (bias 127); the low half of a
/// byte is the earlier element. Every value is exact.
pub(crate) fn mxfp4_rows<'a>(rows: usize, cols: usize, row: impl Fn(usize) -> (&'a [u8], &'a [u8]) + Sync) -> Vec<u8> {
    let mut out = vec![0u8; 2 * rows * cols];
    if cols == 0 {
        return out;
    }
    out.par_chunks_exact_mut(2 * cols).enumerate().for_each(|(index, out)| {
        let (blocks, exponents) = row(index);
        for ((out, block), exponent) in out.chunks_exact_mut(64).zip(blocks.chunks_exact(16)).zip(exponents) {
            let scale = 2f64.powi(i32::from(*exponent) - 127) as f32;
            for (out, byte) in out.as_chunks_mut::<4>().0.iter_mut().zip(block) {
                let [low, high] = [byte & 0xF, byte >> 4].map(|half| bf16::from_f32(E2M1[usize::from(half)] * scale));
                out[..2].copy_from_slice(&low.to_le_bytes());
                out[2..].copy_from_slice(&high.to_le_bytes());
            }
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(bytes: &[u8]) -> Vec<f32> {
        bytes.as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect()
    }

    #[test]
    fn e4m3_has_the_values_of_its_definition() {
        assert_eq!([0x00, 0x01, 0x08, 0x38, 0x7E, 0xB8].map(e4m3), [0.0, 1.0 / 512.0, 1.0 / 64.0, 1.0, 448.0, -1.0]);
        assert!(e4m3(0x7F).is_nan() && e4m3(0xFF).is_nan() && e4m3(0x80).is_sign_negative());
    }

    #[test]
    fn e8m0_is_a_power_of_two() {
        assert_eq!([0, 126, 127, 130, 254].map(e8m0), [2f32.powi(-127), 0.5, 1.0, 8.0, 2f32.powi(127)]);
        assert!(e8m0(255).is_nan());
    }

    #[test]
    fn every_fp8_element_takes_the_factor_of_its_block() {
        // 3 x 5 in blocks of 2 x 2: 2 x 3 factors.
        let scales = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let expected = [[1.0, 1.0, 2.0, 2.0, 3.0], [1.0, 1.0, 2.0, 2.0, 3.0], [4.0, 4.0, 5.0, 5.0, 6.0]];
        assert_eq!(values(&fp8_rows(&[0x38; 15], 0, 5, &scales, (2, 2))), expected.concat());
        assert_eq!(values(&fp8_rows(&[0x38; 5], 2, 5, &scales, (2, 2))), expected[2]);
    }

    #[test]
    fn mxfp4_blocks_hold_the_low_half_first() {
        let blocks: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
        let found = values(&mxfp4_rows(1, 32, |_| (&blocks, &[128])));
        let expected: Vec<f32> = (0..16).flat_map(|i| [2.0 * E2M1[i], 2.0 * E2M1[15 - i]]).collect();
        assert_eq!(found, expected);
    }
}

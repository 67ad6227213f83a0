//! Casts between the bytes of a file and `f32`.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use safetensors::Dtype;

use crate::experts::Placement;

/// Elements converted at a time: enough to pay for a task, little enough that the pages behind it can be given back
/// early.
pub(crate) const CHUNK: usize = 256 << 10;

/// Bytes of one element of a dtype that weights are read from, `None` for any other dtype.
pub(crate) fn float_bytes(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        _ => None,
    }
}

/// Converts little-endian `bytes` of F32, F16 or BF16 to f32, in parallel. `done` is called with each range of `bytes`
/// that is not needed any more.
///
/// Bytes need no alignment. Every value is exact; NaN payloads of F16 may be quietened.
///
/// # Panics
/// If `dtype` is another one or the lengths differ; callers check both when a checkpoint is opened.
pub(crate) fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32], done: impl Fn(std::ops::Range<usize>) + Sync) {
    let Some(size) = float_bytes(dtype) else { panic!("{dtype:?} is not decoded") };
    assert_eq!(bytes.len(), out.len() * size, "bytes of {} elements of {dtype:?}", out.len());
    let chunk = |(index, (bytes, out)): (usize, (&[u8], &mut [f32]))| {
        decode_chunk(dtype, bytes, out);
        let start = index * CHUNK * size;
        done(start..start + bytes.len());
    };
    if out.len() <= CHUNK {
        chunk((0, (bytes, out)));
    } else {
        bytes.par_chunks(CHUNK * size).zip(out.par_chunks_mut(CHUNK)).enumerate().for_each(chunk);
    }
}

fn decode_chunk(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::BF16 => {
            // BF16 is the upper half of an f32. The plain loop vectorizes, unlike a call per element.
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        _ => {
            // The conversion of `half` uses F16C, but wants aligned input.
            let mut aligned = [f16::ZERO; 512];
            for (out, bytes) in out.chunks_mut(aligned.len()).zip(bytes.chunks(2 * aligned.len())) {
                let aligned = &mut aligned[..out.len()];
                for (value, bytes) in aligned.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f16::from_le_bytes(*bytes);
                }
                aligned.convert_to_f32_slice(out);
            }
        }
    }
}

/// The elements of a part, row-major, from the bytes between its first and its last element.
pub(crate) fn gather(bytes: &[u8], place: &Placement, size: usize) -> Vec<u8> {
    /// Rows and columns of a tile, so that both sides stay in cache.
    const TILE: usize = 64;
    let (rows, cols) = (place.rows, place.cols);
    let mut out = vec![0u8; rows * cols * size];
    if out.is_empty() {
        return out;
    }
    out.par_chunks_mut(TILE * cols * size).enumerate().for_each(|(band, out)| {
        let first = band * TILE;
        for tile in (0..cols).step_by(TILE) {
            for col in tile..cols.min(tile + TILE) {
                for row in 0..out.len() / (cols * size) {
                    let from = ((first + row) * place.row_stride + col * place.col_stride) * size;
                    let into = (row * cols + col) * size;
                    out[into..into + size].copy_from_slice(&bytes[from..from + size]);
                }
            }
        }
    });
    out
}

/// Appends the elements of little-endian F32, F16 or BF16 `bytes` to `out`; every value is exact.
///
/// Returns false, with nothing appended, for any other dtype and for bytes that are no whole number of elements.
pub fn decode_f32(dtype: Dtype, bytes: &[u8], out: &mut Vec<f32>) -> bool {
    let Some(size) = float_bytes(dtype).filter(|size| bytes.len().is_multiple_of(*size)) else { return false };
    let start = out.len();
    out.resize(start + bytes.len() / size, 0.0);
    decode(dtype, bytes, &mut out[start..], |_| {});
    true
}

/// Appends `values` as little-endian F32, F16 or BF16, rounded to nearest even.
///
/// Returns false, with nothing appended, for any other dtype.
pub fn encode(dtype: Dtype, values: &[f32], out: &mut Vec<u8>) -> bool {
    match dtype {
        Dtype::F32 => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Dtype::F16 => out.extend(values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes())),
        Dtype::BF16 => out.extend(values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes())),
        _ => return false,
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_16_bit_pattern_converts_as_half_does_from_any_alignment() {
        let patterns: Vec<u16> = (0..=u16::MAX).collect();
        for shift in 0..3 {
            let mut bytes = vec![0u8; shift];
            bytes.extend(patterns.iter().flat_map(|p| p.to_le_bytes()));
            let mut out = vec![0f32; patterns.len()];
            decode(Dtype::BF16, &bytes[shift..], &mut out, |_| {});
            assert!(patterns.iter().zip(&out).all(|(p, v)| v.to_bits() == u32::from(*p) << 16));
            decode(Dtype::F16, &bytes[shift..], &mut out, |_| {});
            for (pattern, value) in patterns.iter().zip(&out) {
                let expected = f16::from_bits(*pattern).to_f32();
                assert!(expected.to_bits() == value.to_bits() || (expected.is_nan() && value.is_nan()), "{pattern}");
            }
        }
    }

    #[test]
    fn long_input_is_converted_in_chunks_that_cover_it_once() {
        let values: Vec<f32> = (0..CHUNK * 2 + 77).map(|i| i as f32 * 0.5).collect();
        let mut bytes = Vec::new();
        assert!(encode(Dtype::F32, &values, &mut bytes));
        let mut out = vec![0f32; values.len()];
        let covered = std::sync::Mutex::new(0);
        decode(Dtype::F32, &bytes, &mut out, |range| *covered.lock().unwrap() += range.len());
        assert_eq!(out, values);
        assert_eq!(covered.into_inner().unwrap(), bytes.len());
    }

    #[test]
    fn encode_inverts_decode() {
        for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
            let values = [1.5f32, -0.0, 3.0, f32::INFINITY, 0.0078125];
            let mut bytes = Vec::new();
            assert!(encode(dtype, &values, &mut bytes));
            let mut out = [0f32; 5];
            decode(dtype, &bytes, &mut out, |_| {});
            let mut appended = vec![7.0];
            assert!(decode_f32(dtype, &bytes, &mut appended) && !decode_f32(dtype, &bytes[1..], &mut appended));
            assert_eq!(appended[1..].iter().map(|v| v.to_bits()).collect::<Vec<_>>(), out.map(f32::to_bits));
            assert_eq!(out.map(f32::to_bits), values.map(f32::to_bits));
        }
        assert!(!encode(Dtype::I8, &[1.0], &mut Vec::new()));
    }
}

//! Rows and columns of a matrix, as raw bytes: no element is converted unless it is changed.

use std::borrow::Cow;

use moe_checkpoint::{Dtype, ExpertPart, RawMatrix, encode};
use rayon::prelude::*;

use crate::ExpertEdit;

/// What becomes of one expert.
#[derive(Clone, Copy)]
pub(super) struct Selection<'a> {
    /// Units that stay, ascending.
    pub units: &'a [u32],
    /// Width afterwards: units of zeros follow where it is more than `units`.
    pub width: usize,
    /// All shapes stay; the other units are zeroed.
    pub zero: bool,
    /// Factor on the down projection.
    pub down_factor: f32,
    /// Factor on the bias of down.
    pub bias_factor: f32,
    /// Other values, with the units that the columns of its down projection belong to, ascending.
    pub edit: Option<(&'a ExpertEdit, &'a [u32])>,
}

#[cfg(test)]
impl<'a> Selection<'a> {
    fn keep(units: &'a [u32]) -> Self {
        Self { units, width: units.len(), zero: false, down_factor: 1.0, bias_factor: 1.0, edit: None }
    }

    fn zero(units: &'a [u32]) -> Self {
        Self { zero: true, ..Self::keep(units) }
    }
}

/// Bytes that one thread works on: enough to pay for handing it over.
const PIECE: usize = 1 << 18;

/// One part of an expert after the selection: as it is where nothing of it goes. A bias of down belongs to no unit.
///
/// # Errors
/// Why it cannot be made: changed values too large for the dtype.
pub(super) fn select<'m>(
    part: ExpertPart,
    matrix: RawMatrix<'m>,
    selection: &Selection<'_>,
) -> Result<RawMatrix<'m>, String> {
    use ExpertPart::{Down, DownBias};
    let Selection { units, width, zero, down_factor, bias_factor, edit } = *selection;
    let RawMatrix { dtype, rows, cols, .. } = matrix;
    match part {
        Down => {
            let width = if zero { cols } else { width };
            if let Some((down, kept)) = edit.and_then(|(edit, kept)| Some((edit.down.as_ref()?, kept))) {
                let values = edited_columns(down, kept, units, (zero, width), rows);
                return changed(dtype, values, down_factor).map(|bytes| made(bytes, dtype, rows, width));
            }
            let selected = match (zero, units.len() == cols && width == cols) {
                (_, true) => matrix,
                (true, false) => made(zero_columns(matrix, units), dtype, rows, cols),
                (false, false) => made(keep_columns(&matrix, units, width), dtype, rows, width),
            };
            if down_factor == 1.0 {
                return Ok(selected);
            }
            changed(dtype, selected.to_f32(), down_factor).map(|bytes| made(bytes, dtype, rows, width))
        }
        DownBias => {
            let values = match edit.and_then(|(edit, _)| edit.down_bias.clone()) {
                Some(values) => values,
                None if bias_factor == 1.0 => return Ok(matrix),
                None => matrix.to_f32(),
            };
            changed(dtype, values, bias_factor).map(|bytes| made(bytes, dtype, rows, cols))
        }
        _ => Ok(match (zero, units.len() == rows && width == rows) {
            (_, true) => matrix,
            (true, false) => made(zero_rows(matrix, units), dtype, rows, cols),
            (false, false) => made(keep_rows(&matrix, units, width), dtype, width, cols),
        }),
    }
}

fn made(bytes: Vec<u8>, dtype: Dtype, rows: usize, cols: usize) -> RawMatrix<'static> {
    RawMatrix { bytes: Cow::Owned(bytes), dtype, rows, cols }
}

/// A bias of down that a repair added to a layer: zeros for experts without one.
pub(super) fn added_bias(
    hidden_size: usize,
    dtype: Dtype,
    selection: &Selection<'_>,
) -> Result<RawMatrix<'static>, String> {
    let values = selection.edit.and_then(|(edit, _)| edit.down_bias.clone());
    let values = values.unwrap_or_else(|| vec![0.0; hidden_size]);
    changed(dtype, values, selection.bias_factor).map(|bytes| made(bytes, dtype, hidden_size, 1))
}

/// Columns of `units` from a matrix `[rows, kept.len()]`, among `width` columns of zeros: at their places, or one after
/// the other.
fn edited_columns(
    down: &[f32],
    kept: &[u32],
    units: &[u32],
    (in_place, width): (bool, usize),
    rows: usize,
) -> Vec<f32> {
    // Units of a plan's expert are among its kept ones, and both ascend.
    let columns: Vec<usize> = units.iter().filter_map(|unit| kept.binary_search(unit).ok()).collect();
    let mut values = vec![0.0; rows * width];
    if width == 0 || kept.is_empty() {
        return values;
    }
    for (row, from) in values.chunks_exact_mut(width).zip(down.chunks_exact(kept.len())) {
        for (at, (column, unit)) in columns.iter().zip(units).enumerate() {
            row[if in_place { *unit as usize } else { at }] = from[*column];
        }
    }
    values
}

/// Values times a factor in a dtype, rounded to nearest even.
pub(super) fn changed(dtype: Dtype, mut values: Vec<f32>, factor: f32) -> Result<Vec<u8>, String> {
    if factor != 1.0 {
        values.par_iter_mut().for_each(|value| *value *= factor);
    }
    let mut out = Vec::with_capacity(values.len() * dtype.bitsize() / 8);
    if !encode(dtype, &values, &mut out) {
        return Err(format!("values cannot be stored as {dtype:?}"));
    }
    let infinite = match dtype {
        Dtype::F16 => |bytes: [u8; 2]| u16::from_le_bytes(bytes) & 0x7C00 == 0x7C00,
        Dtype::BF16 => |bytes: [u8; 2]| u16::from_le_bytes(bytes) & 0x7F80 == 0x7F80,
        _ => |_: [u8; 2]| false,
    };
    let lost = out.as_chunks().0.iter().any(|bytes| infinite(*bytes)) || values.iter().any(|v| !v.is_finite());
    match lost {
        true => Err(format!("a changed value is too large for {dtype:?}, or not finite")),
        false => Ok(out),
    }
}

fn row_bytes(matrix: &RawMatrix<'_>) -> usize {
    matrix.cols * matrix.element_bytes()
}

fn keep_rows(matrix: &RawMatrix<'_>, kept: &[u32], height: usize) -> Vec<u8> {
    let length = row_bytes(matrix);
    let mut out = vec![0; height * length];
    if length == 0 {
        return out;
    }
    let rows = out.par_chunks_exact_mut(length).with_min_len(PIECE.div_ceil(length));
    rows.zip(kept).for_each(|(row, unit)| {
        let start = *unit as usize * length;
        row.copy_from_slice(&matrix.bytes[start..start + length]);
    });
    out
}

fn keep_columns(matrix: &RawMatrix<'_>, kept: &[u32], width: usize) -> Vec<u8> {
    let mut out = vec![0; matrix.rows * width * matrix.element_bytes()];
    match matrix.element_bytes() {
        2 => gather::<2>(matrix, kept, width, &mut out),
        4 => gather::<4>(matrix, kept, width, &mut out),
        // A checkpoint opens with F32, F16 and BF16 experts only.
        other => debug_assert!(false, "experts with elements of {other} bytes"),
    }
    out
}

/// Copies columns of elements of `N` bytes to the first of `width` columns.
fn gather<const N: usize>(matrix: &RawMatrix<'_>, kept: &[u32], width: usize, out: &mut [u8]) {
    if kept.is_empty() || matrix.cols == 0 {
        return;
    }
    let (from, into) = (matrix.bytes.as_chunks::<N>().0, out.as_chunks_mut::<N>().0);
    let rows = into.par_chunks_exact_mut(width).with_min_len(PIECE.div_ceil(width * N));
    rows.zip(from.par_chunks_exact(matrix.cols)).for_each(|(row, from)| {
        for (element, unit) in row.iter_mut().zip(kept) {
            *element = from[*unit as usize];
        }
    });
}

fn zero_rows(matrix: RawMatrix<'_>, kept: &[u32]) -> Vec<u8> {
    let (length, rows) = (row_bytes(&matrix), matrix.rows);
    let mut out = matrix.bytes.into_owned();
    for unit in dropped(kept, rows) {
        out[unit * length..(unit + 1) * length].fill(0);
    }
    out
}

fn zero_columns(matrix: RawMatrix<'_>, kept: &[u32]) -> Vec<u8> {
    let (length, size, cols) = (row_bytes(&matrix), matrix.element_bytes(), matrix.cols);
    let mut out = matrix.bytes.into_owned();
    let gone: Vec<usize> = dropped(kept, cols).collect();
    if gone.is_empty() {
        return out;
    }
    out.par_chunks_exact_mut(length).with_min_len(PIECE.div_ceil(length)).for_each(|row| {
        for unit in &gone {
            row[unit * size..(unit + 1) * size].fill(0);
        }
    });
    out
}

/// Units that are not kept. `kept` is ascending.
fn dropped(kept: &[u32], width: usize) -> impl Iterator<Item = usize> {
    (0..width).filter(|unit| kept.binary_search(&(*unit as u32)).is_err())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(bytes: &[u8], rows: usize, cols: usize) -> RawMatrix<'_> {
        RawMatrix { bytes: bytes.into(), dtype: Dtype::BF16, rows, cols }
    }

    fn selected(part: ExpertPart, selection: Selection<'_>) -> Vec<u8> {
        // Width 3, hidden size 2; element k of each matrix has bytes [k, 100 + k].
        let bytes: Vec<u8> = (0..6).flat_map(|k| [k, 100 + k]).collect();
        let of = if part == ExpertPart::Down { matrix(&bytes, 2, 3) } else { matrix(&bytes, 3, 2) };
        let out = select(part, of, &selection).unwrap();
        let width = if selection.zero { 3 } else { selection.width };
        assert_eq!((out.rows, out.cols), part.dims(2, width));
        let out = out.bytes;
        assert!(out.as_chunks::<2>().0.iter().all(|[low, high]| *high == low + 100 || (*low, *high) == (0, 0)));
        out.as_chunks::<2>().0.iter().map(|[low, high]| if *high == 0 { 99 } else { *low }).collect()
    }

    #[test]
    fn rows_and_columns() {
        use ExpertPart::{Down, Gate, Up};
        assert_eq!(selected(Gate, Selection::keep(&[0, 2])), [0, 1, 4, 5]);
        assert_eq!(selected(Up, Selection::keep(&[1])), [2, 3]);
        assert_eq!(selected(Down, Selection::keep(&[0, 2])), [0, 2, 3, 5]);
        assert_eq!(selected(Down, Selection::keep(&[0, 1, 2])), [0, 1, 2, 3, 4, 5]);
        for part in [Gate, Up, Down] {
            assert_eq!(selected(part, Selection::keep(&[])), [0u8; 0]);
            assert_eq!(selected(part, Selection::zero(&[])), [99; 6]);
        }
        assert_eq!(selected(Gate, Selection::zero(&[1])), [99, 99, 2, 3, 99, 99]);
        let wider = |units| Selection { width: 4, ..Selection::keep(units) };
        assert_eq!(selected(Gate, wider(&[0, 2])), [0, 1, 4, 5, 99, 99, 99, 99]);
        assert_eq!(selected(Down, wider(&[0, 1, 2])), [0, 1, 2, 99, 3, 4, 5, 99]);
        assert_eq!(selected(Down, Selection::zero(&[1])), [99, 1, 99, 99, 4, 99]);
    }

    #[test]
    fn edits_and_factors_change_down_alone() {
        let encoded = |values: &[f32]| {
            let mut bytes = Vec::new();
            assert!(encode(Dtype::BF16, values, &mut bytes));
            bytes
        };
        let bytes = encoded(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let block = |part: ExpertPart, selection: &Selection<'_>| {
            let of = match part {
                ExpertPart::Down => matrix(&bytes, 2, 3),
                ExpertPart::DownBias => {
                    return added_bias(2, Dtype::BF16, selection).map(|bias| bias.bytes.into_owned());
                }
                _ => matrix(&bytes, 3, 2),
            };
            select(part, of, selection).map(|matrix| matrix.bytes.into_owned())
        };
        let doubled = Selection { down_factor: 2.0, ..Selection::keep(&[0, 2]) };
        assert_eq!(block(ExpertPart::Gate, &doubled).unwrap(), encoded(&[1.0, 2.0, 5.0, 6.0]));
        assert_eq!(block(ExpertPart::Down, &doubled).unwrap(), encoded(&[2.0, 6.0, 8.0, 12.0]));
        // 1 + 2^-8 lies half way between two numbers of BF16: the even one is 1.
        let edit =
            ExpertEdit { down: Some(vec![1.0 + 1.0 / 256.0, 10.0, 20.0, 30.0]), down_bias: Some(vec![7.0, 8.0]) };
        let edited = Selection { edit: Some((&edit, &[0, 2])), ..Selection::keep(&[2]) };
        assert_eq!(block(ExpertPart::Down, &edited).unwrap(), encoded(&[10.0, 30.0]));
        assert_eq!(block(ExpertPart::DownBias, &edited).unwrap(), encoded(&[7.0, 8.0]));
        let wider = Selection { width: 3, ..edited };
        assert_eq!(block(ExpertPart::Down, &wider).unwrap(), encoded(&[10.0, 0.0, 0.0, 30.0, 0.0, 0.0]));
        let masked = Selection { edit: Some((&edit, &[0, 2])), ..Selection::zero(&[0, 2]) };
        assert_eq!(block(ExpertPart::Down, &masked).unwrap(), encoded(&[1.0, 0.0, 10.0, 20.0, 0.0, 30.0]));
        // An expert of a biased layer that has none of its own.
        assert_eq!(block(ExpertPart::DownBias, &Selection::keep(&[])).unwrap(), encoded(&[0.0, 0.0]));
        let huge = Selection { down_factor: f32::MAX, ..Selection::keep(&[0, 1, 2]) };
        assert!(block(ExpertPart::Down, &huge).unwrap_err().contains("too large for BF16"));
    }
}

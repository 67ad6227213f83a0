//! Rows and columns of a matrix, as raw bytes: no element is converted unless it is changed.

use std::borrow::Cow;

use moe_checkpoint::{Dtype, ExpertBlock, ExpertBytes, ExpertPart, RawMatrix, encode};
use rayon::prelude::*;

use crate::ExpertEdit;

/// What becomes of one expert.
#[derive(Clone, Copy)]
pub(crate) struct Selection<'a> {
    /// Units that stay, ascending.
    pub units: &'a [u32],
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
        Self { units, zero: false, down_factor: 1.0, bias_factor: 1.0, edit: None }
    }

    fn zero(units: &'a [u32]) -> Self {
        Self { zero: true, ..Self::keep(units) }
    }
}

/// Bytes that one thread works on: enough to pay for handing it over.
const PIECE: usize = 1 << 18;

/// The bytes of one block of an expert after the selection, into a buffer that is reused.
///
/// # Errors
/// Why it cannot be made: a part that the expert lacks, parts of a block that differ in dtype, values too large for it.
pub(crate) fn select_block(
    expert: &ExpertBytes<'_>,
    block: ExpertBlock,
    selection: &Selection<'_>,
    out: &mut Vec<u8>,
) -> Result<(), String> {
    if let ExpertBlock::Part(part) = block {
        return select(expert, part, selection, out).map(|_| ());
    }
    let width = if selection.zero { expert.gate.rows } else { selection.units.len() };
    let pick = |part: ExpertPart| {
        let mut bytes = Vec::new();
        // Parts that the block does not need stay empty.
        let dtype = match block.parts().contains(&part) {
            true => select(expert, part, selection, &mut bytes)?,
            false => expert.gate.dtype,
        };
        let (rows, cols) = part.dims(expert.gate.cols, width);
        Ok::<_, String>(RawMatrix { bytes: Cow::Owned(bytes), dtype, rows, cols })
    };
    let [gate, up, down] = ExpertPart::ALL;
    let gate_up_bias = match block {
        ExpertBlock::GateUpBias => Some([pick(ExpertPart::GateBias)?, pick(ExpertPart::UpBias)?]),
        _ => None,
    };
    let picked = ExpertBytes { gate: pick(gate)?, up: pick(up)?, down: pick(down)?, gate_up_bias, down_bias: None };
    out.clear();
    out.extend_from_slice(&block.bytes(&picked).ok_or("its gate and up differ in dtype")?);
    Ok(())
}

/// One part after the selection, and its dtype. A bias of down belongs to no unit.
fn select(
    expert: &ExpertBytes<'_>,
    part: ExpertPart,
    selection: &Selection<'_>,
    out: &mut Vec<u8>,
) -> Result<Dtype, String> {
    use ExpertPart::{Down, DownBias, Gate, GateBias, Up, UpBias};
    let Selection { units, zero, down_factor, bias_factor, edit } = *selection;
    let matrix = match (expert.part(part), part) {
        (Some(matrix), _) => matrix,
        // One that a repair added to the layer.
        (None, DownBias) => {
            let values = edit.and_then(|(edit, _)| edit.down_bias.clone());
            let values = values.unwrap_or_else(|| vec![0.0; expert.down.rows]);
            return changed(expert.down.dtype, values, bias_factor, out);
        }
        (None, _) => return Err(format!("it has no {part:?}")),
    };
    match part {
        Gate | Up | GateBias | UpBias if zero => zero_rows(matrix, units, out),
        Gate | Up | GateBias | UpBias => keep_rows(matrix, units, out),
        Down => {
            if let Some((down, kept)) = edit.and_then(|(edit, kept)| Some((edit.down.as_ref()?, kept))) {
                let values = edited_columns(down, kept, units, zero.then_some(matrix.cols), matrix.rows);
                return changed(matrix.dtype, values, down_factor, out);
            }
            match zero {
                true => zero_columns(matrix, units, out),
                false => keep_columns(matrix, units, out),
            }
            if down_factor != 1.0 {
                let cols = if zero { matrix.cols } else { units.len() };
                let selected = RawMatrix { bytes: out.as_slice().into(), dtype: matrix.dtype, rows: matrix.rows, cols };
                return changed(matrix.dtype, selected.to_f32(), down_factor, out);
            }
        }
        DownBias => {
            if let Some(values) = edit.and_then(|(edit, _)| edit.down_bias.clone()) {
                return changed(matrix.dtype, values, bias_factor, out);
            }
            if bias_factor != 1.0 {
                return changed(matrix.dtype, matrix.to_f32(), bias_factor, out);
            }
            out.clear();
            out.extend_from_slice(&matrix.bytes);
        }
        _ => return Err(format!("{part:?} is unknown")),
    }
    Ok(matrix.dtype)
}

/// Columns of `units` from a matrix `[rows, kept.len()]`, or at their places among `width` columns of zeros.
fn edited_columns(down: &[f32], kept: &[u32], units: &[u32], width: Option<usize>, rows: usize) -> Vec<f32> {
    // Units of a plan's expert are among its kept ones, and both ascend.
    let columns: Vec<usize> = units.iter().filter_map(|unit| kept.binary_search(unit).ok()).collect();
    let into = width.unwrap_or(units.len());
    let mut values = vec![0.0; rows * into];
    if into == 0 || kept.is_empty() {
        return values;
    }
    for (row, from) in values.chunks_exact_mut(into).zip(down.chunks_exact(kept.len())) {
        for (at, (column, unit)) in columns.iter().zip(units).enumerate() {
            row[if width.is_some() { *unit as usize } else { at }] = from[*column];
        }
    }
    values
}

/// Values times a factor in a dtype, rounded to nearest even.
pub(crate) fn changed(dtype: Dtype, mut values: Vec<f32>, factor: f32, out: &mut Vec<u8>) -> Result<Dtype, String> {
    if factor != 1.0 {
        values.par_iter_mut().for_each(|value| *value *= factor);
    }
    out.clear();
    if !encode(dtype, &values, out) {
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
        false => Ok(dtype),
    }
}

fn row_bytes(matrix: &RawMatrix<'_>) -> usize {
    matrix.cols * matrix.element_bytes()
}

fn keep_rows(matrix: &RawMatrix<'_>, kept: &[u32], out: &mut Vec<u8>) {
    let length = row_bytes(matrix);
    out.clear();
    out.resize(kept.len() * length, 0);
    if length == 0 {
        return;
    }
    let rows = out.par_chunks_exact_mut(length).with_min_len(PIECE.div_ceil(length));
    rows.zip(kept).for_each(|(row, unit)| {
        let start = *unit as usize * length;
        row.copy_from_slice(&matrix.bytes[start..start + length]);
    });
}

fn keep_columns(matrix: &RawMatrix<'_>, kept: &[u32], out: &mut Vec<u8>) {
    out.clear();
    if kept.len() == matrix.cols {
        out.extend_from_slice(&matrix.bytes);
        return;
    }
    out.resize(matrix.rows * kept.len() * matrix.element_bytes(), 0);
    match matrix.element_bytes() {
        2 => gather::<2>(matrix, kept, out),
        4 => gather::<4>(matrix, kept, out),
        // A checkpoint opens with F32, F16 and BF16 experts only.
        other => debug_assert!(false, "experts with elements of {other} bytes"),
    }
}

/// Copies columns of elements of `N` bytes.
fn gather<const N: usize>(matrix: &RawMatrix<'_>, kept: &[u32], out: &mut [u8]) {
    if kept.is_empty() || matrix.cols == 0 {
        return;
    }
    let (from, into) = (matrix.bytes.as_chunks::<N>().0, out.as_chunks_mut::<N>().0);
    let rows = into.par_chunks_exact_mut(kept.len()).with_min_len(PIECE.div_ceil(kept.len() * N));
    rows.zip(from.par_chunks_exact(matrix.cols)).for_each(|(row, from)| {
        for (element, unit) in row.iter_mut().zip(kept) {
            *element = from[*unit as usize];
        }
    });
}

fn zero_rows(matrix: &RawMatrix<'_>, kept: &[u32], out: &mut Vec<u8>) {
    let length = row_bytes(matrix);
    out.clear();
    out.extend_from_slice(&matrix.bytes);
    for unit in dropped(kept, matrix.rows) {
        out[unit * length..(unit + 1) * length].fill(0);
    }
}

fn zero_columns(matrix: &RawMatrix<'_>, kept: &[u32], out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(&matrix.bytes);
    let (length, size) = (row_bytes(matrix), matrix.element_bytes());
    let gone: Vec<usize> = dropped(kept, matrix.cols).collect();
    if gone.is_empty() {
        return;
    }
    out.par_chunks_exact_mut(length).with_min_len(PIECE.div_ceil(length)).for_each(|row| {
        for unit in &gone {
            row[unit * size..(unit + 1) * size].fill(0);
        }
    });
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
        let (wide, tall) = (matrix(&bytes, 3, 2), matrix(&bytes, 2, 3));
        let mut out = vec![9; 50];
        let expert = ExpertBytes { gate: wide.clone(), up: wide, down: tall, gate_up_bias: None, down_bias: None };
        select_block(&expert, ExpertBlock::Part(part), &selection, &mut out).unwrap();
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
        let (wide, tall) = (matrix(&bytes, 3, 2), matrix(&bytes, 2, 3));
        let expert = ExpertBytes { gate: wide.clone(), up: wide, down: tall, gate_up_bias: None, down_bias: None };
        let block = |part, selection: &Selection<'_>| {
            let mut out = Vec::new();
            select_block(&expert, ExpertBlock::Part(part), selection, &mut out).map(|()| out)
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
        let masked = Selection { edit: Some((&edit, &[0, 2])), ..Selection::zero(&[0, 2]) };
        assert_eq!(block(ExpertPart::Down, &masked).unwrap(), encoded(&[1.0, 0.0, 10.0, 20.0, 0.0, 30.0]));
        // An expert of a biased layer that has none of its own.
        assert_eq!(block(ExpertPart::DownBias, &Selection::keep(&[])).unwrap(), encoded(&[0.0, 0.0]));
        let huge = Selection { down_factor: f32::MAX, ..Selection::keep(&[0, 1, 2]) };
        assert!(block(ExpertPart::Down, &huge).unwrap_err().contains("too large for BF16"));
        assert!(block(ExpertPart::GateBias, &doubled).unwrap_err().contains("no GateBias"));
    }
}

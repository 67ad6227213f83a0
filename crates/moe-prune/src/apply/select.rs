//! Rows and columns of a matrix, as raw bytes: no element is converted.

use std::borrow::Cow;

use moe_checkpoint::{ExpertBlock, ExpertBytes, ExpertPart, RawMatrix};
use rayon::prelude::*;

/// What becomes of one expert.
#[derive(Clone, Copy)]
pub(crate) enum Selection<'a> {
    /// Only these units stay, ascending.
    Keep(&'a [u32]),
    /// All shapes stay; the other units are zeroed.
    Zero(&'a [u32]),
}

/// Bytes that one thread works on: enough to pay for handing it over.
const PIECE: usize = 1 << 18;

/// The bytes of one block of an expert after the selection, into a buffer that is reused. `None` if the expert lacks a part
/// of the block, or its parts differ in dtype.
pub(crate) fn select_block(
    expert: &ExpertBytes<'_>,
    block: ExpertBlock,
    selection: Selection<'_>,
    out: &mut Vec<u8>,
) -> Option<()> {
    if let ExpertBlock::Part(part) = block {
        return select(expert.part(part)?, part, selection, out);
    }
    let pick = |part: ExpertPart| {
        let matrix = expert.part(part)?;
        let mut bytes = Vec::new();
        // Parts that the block does not need stay empty.
        if block.parts().contains(&part) {
            select(matrix, part, selection, &mut bytes)?;
        }
        let width = match selection {
            Selection::Keep(kept) => kept.len(),
            Selection::Zero(_) => expert.gate.rows,
        };
        let (rows, cols) = part.dims(expert.gate.cols, width);
        Some(RawMatrix { bytes: Cow::Owned(bytes), dtype: matrix.dtype, rows, cols })
    };
    let biases = match &expert.biases {
        None => None,
        Some(_) => {
            let [gate, up, down] = ExpertPart::BIASES;
            Some([pick(gate)?, pick(up)?, pick(down)?])
        }
    };
    let [gate, up, down] = ExpertPart::ALL;
    let picked = ExpertBytes { gate: pick(gate)?, up: pick(up)?, down: pick(down)?, biases };
    out.clear();
    out.extend_from_slice(&block.bytes(&picked)?);
    Some(())
}

/// One part after the selection. A bias of down belongs to no unit.
fn select(matrix: &RawMatrix<'_>, part: ExpertPart, selection: Selection<'_>, out: &mut Vec<u8>) -> Option<()> {
    use ExpertPart::{Down, DownBias, Gate, GateBias, Up, UpBias};
    match (part, selection) {
        (Gate | Up | GateBias | UpBias, Selection::Keep(kept)) => keep_rows(matrix, kept, out),
        (Gate | Up | GateBias | UpBias, Selection::Zero(kept)) => zero_rows(matrix, kept, out),
        (Down, Selection::Keep(kept)) => keep_columns(matrix, kept, out),
        (Down, Selection::Zero(kept)) => zero_columns(matrix, kept, out),
        (DownBias, _) => {
            out.clear();
            out.extend_from_slice(&matrix.bytes);
        }
        _ => return None,
    }
    Some(())
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
    use moe_checkpoint::Dtype;

    use super::*;

    fn matrix(bytes: &[u8], rows: usize, cols: usize) -> RawMatrix<'_> {
        RawMatrix { bytes: bytes.into(), dtype: Dtype::BF16, rows, cols }
    }

    fn selected(part: ExpertPart, selection: Selection<'_>) -> Vec<u8> {
        // Width 3, hidden size 2; element k of each matrix has bytes [k, 100 + k].
        let bytes: Vec<u8> = (0..6).flat_map(|k| [k, 100 + k]).collect();
        let (wide, tall) = (matrix(&bytes, 3, 2), matrix(&bytes, 2, 3));
        let mut out = vec![9; 50];
        let expert = ExpertBytes { gate: wide.clone(), up: wide, down: tall, biases: None };
        select_block(&expert, ExpertBlock::Part(part), selection, &mut out).unwrap();
        assert!(out.as_chunks::<2>().0.iter().all(|[low, high]| *high == low + 100 || (*low, *high) == (0, 0)));
        out.as_chunks::<2>().0.iter().map(|[low, high]| if *high == 0 { 99 } else { *low }).collect()
    }

    #[test]
    fn rows_and_columns() {
        use ExpertPart::{Down, Gate, Up};
        assert_eq!(selected(Gate, Selection::Keep(&[0, 2])), [0, 1, 4, 5]);
        assert_eq!(selected(Up, Selection::Keep(&[1])), [2, 3]);
        assert_eq!(selected(Down, Selection::Keep(&[0, 2])), [0, 2, 3, 5]);
        assert_eq!(selected(Down, Selection::Keep(&[0, 1, 2])), [0, 1, 2, 3, 4, 5]);
        for part in [Gate, Up, Down] {
            assert_eq!(selected(part, Selection::Keep(&[])), [0u8; 0]);
            assert_eq!(selected(part, Selection::Zero(&[])), [99; 6]);
        }
        assert_eq!(selected(Gate, Selection::Zero(&[1])), [99, 99, 2, 3, 99, 99]);
        assert_eq!(selected(Down, Selection::Zero(&[1])), [99, 1, 99, 99, 4, 99]);
    }
}

//! A quantized matrix whose bytes are at hand: codes, and the parameters of groups of them.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};

use half::bf16;
use rayon::prelude::*;
use safetensors::Dtype;

use crate::convert;

/// The bytes of one stored tensor of a weight.
pub(crate) struct Part<'a> {
    pub dtype: Dtype,
    pub bytes: Cow<'a, [u8]>,
}

impl Part<'_> {
    /// Elements of a float type, or of bytes that are powers of two, as f32.
    pub fn floats(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F8_E8M0 | Dtype::U8 => self.bytes.iter().map(|byte| super::floats::e8m0(*byte)).collect(),
            Dtype::F8_E4M3 => self.bytes.iter().map(|byte| super::floats::e4m3(*byte)).collect(),
            dtype => {
                let mut out = Vec::new();
                convert::decode_f32(dtype, &self.bytes, &mut out);
                out
            }
        }
    }

    /// Elements of 32 bits.
    pub fn words(&self) -> impl Iterator<Item = u32> + '_ {
        self.bytes.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes))
    }
}

/// Where the codes of a matrix are. Every code fits in a byte.
pub(crate) enum Codes<'a> {
    /// One byte each, row-major.
    Bytes(Cow<'a, [u8]>),
    /// Two per byte, row-major over the whole matrix.
    Halves {
        bytes: Cow<'a, [u8]>,
        /// Whether the high half is the earlier element.
        high_first: bool,
    },
    /// Rows of `row_bytes`, each a little-endian stream of codes of `bits` bits.
    Bits { bytes: Cow<'a, [u8]>, bits: usize, row_bytes: usize },
    /// Words `[columns * bits / 32, rows]`: consecutive columns of a row share a word, the first in its low bits
    /// (GPTQ).
    Columns { bytes: Cow<'a, [u8]>, bits: usize },
    /// Words `[columns, rows / 8]` of eight rows in the order 0, 2, 4, 6, 1, 3, 5, 7 (AWQ).
    EightRows(Cow<'a, [u8]>),
}

/// Which elements share parameters.
pub(crate) enum Groups {
    /// Blocks of so many rows and columns; those at the edge may be cut.
    Grid { rows: usize, cols: usize },
    /// The group of every column; every row has its own groups, so many of them.
    Columns { of: Vec<u32>, count: usize },
    /// Runs of so many elements over the whole matrix, across rows.
    Runs(usize),
}

/// A quantized matrix `[rows, cols]`: element `= (level[code] - zero) * scale + bias`, times `factor`, each operation
/// rounded to f32.
pub(crate) struct Matrix<'a> {
    pub rows: usize,
    pub cols: usize,
    pub codes: Codes<'a>,
    /// Value of every code, 256 of them.
    pub levels: Vec<f32>,
    pub groups: Groups,
    pub scales: Vec<f32>,
    /// Empty where there are none.
    pub zeros: Vec<f32>,
    /// Empty where there are none.
    pub biases: Vec<f32>,
    pub factor: f32,
}

/// Rows of a matrix: `count` of them from `first` on, every `step`-th.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    pub first: usize,
    pub step: usize,
    pub count: usize,
}

impl Rows {
    /// Consecutive rows.
    pub fn range(range: std::ops::Range<usize>) -> Self {
        Self { first: range.start, step: 1, count: range.len() }
    }
}

impl<'a> Matrix<'a> {
    /// A matrix whose elements are levels times scales.
    pub fn scaled(
        (rows, cols): (usize, usize),
        codes: Codes<'a>,
        levels: Vec<f32>,
        groups: Groups,
        scales: Vec<f32>,
    ) -> Self {
        Self { rows, cols, codes, levels, groups, scales, zeros: Vec::new(), biases: Vec::new(), factor: 1.0 }
    }

    /// Rows as f32; `None` where a code or a parameter is no number.
    pub fn f32(&self, rows: Rows) -> Option<Vec<f32>> {
        let mut out = vec![0f32; rows.count * self.cols];
        self.each(rows, &mut out, self.cols, |out, values| out.copy_from_slice(values)).then_some(out)
    }

    /// Rows as little-endian BF16, each element rounded once; `None` where a code or a parameter is no number.
    pub fn bf16(&self, rows: Rows) -> Option<Vec<u8>> {
        let mut out = vec![0u8; 2 * rows.count * self.cols];
        let whole = self.each(rows, &mut out, 2 * self.cols, |out, values| {
            for (out, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *out = bf16::from_f32(*value).to_le_bytes();
            }
        });
        whole.then_some(out)
    }

    /// Decodes rows into pieces of `length` of `out`; whether all elements are numbers.
    fn each<T: Send>(&self, rows: Rows, out: &mut [T], length: usize, put: impl Fn(&mut [T], &[f32]) + Sync) -> bool {
        if length == 0 || rows.count == 0 {
            return true;
        }
        let numbers = AtomicBool::new(true);
        let levels: &[f32; 256] = match self.levels.as_slice().try_into() {
            Ok(levels) => levels,
            Err(_) => return false,
        };
        let scratch = || (vec![0u8; self.cols], vec![0f32; self.cols]);
        out.par_chunks_exact_mut(length).enumerate().for_each_init(scratch, |(codes, values), (index, out)| {
            let row = rows.first + index * rows.step;
            self.codes.row(row, (self.rows, self.cols), codes);
            self.values(row, codes, levels, values);
            if values.iter().any(|value| value.is_nan()) {
                numbers.store(false, Ordering::Relaxed);
            }
            put(out, values);
        });
        numbers.into_inner()
    }

    fn values(&self, row: usize, codes: &[u8], levels: &[f32; 256], out: &mut [f32]) {
        match &self.groups {
            Groups::Grid { rows, cols } => {
                let first = row / rows * self.cols.div_ceil(*cols);
                for (index, (codes, out)) in codes.chunks(*cols).zip(out.chunks_mut(*cols)).enumerate() {
                    self.group(first + index, codes, levels, out);
                }
            }
            Groups::Columns { of, count } => {
                for ((code, out), group) in codes.iter().zip(&mut *out).zip(of) {
                    self.group(row * count + *group as usize, &[*code], levels, std::slice::from_mut(out));
                }
            }
            Groups::Runs(length) => {
                let mut done = 0;
                while done < codes.len() {
                    let at = row * self.cols + done;
                    let end = codes.len().min(done + length - at % length);
                    self.group(at / length, &codes[done..end], levels, &mut out[done..end]);
                    done = end;
                }
            }
        }
        if self.factor != 1.0 {
            out.iter_mut().for_each(|value| *value *= self.factor);
        }
    }

    fn group(&self, group: usize, codes: &[u8], levels: &[f32; 256], out: &mut [f32]) {
        let scale = self.scales[group];
        let level = |code: &u8| levels[usize::from(*code)];
        match (self.zeros.get(group), self.biases.get(group)) {
            (None, None) => out.iter_mut().zip(codes).for_each(|(out, code)| *out = level(code) * scale),
            (Some(zero), _) => out.iter_mut().zip(codes).for_each(|(out, code)| *out = (level(code) - zero) * scale),
            (None, Some(bias)) => out.iter_mut().zip(codes).for_each(|(out, code)| *out = level(code) * scale + bias),
        }
    }
}

impl Codes<'_> {
    /// The codes of a row of a matrix `[rows, cols]`.
    pub fn row(&self, row: usize, (rows, cols): (usize, usize), out: &mut [u8]) {
        match self {
            Self::Bytes(bytes) => out.copy_from_slice(&bytes[row * cols..(row + 1) * cols]),
            Self::Halves { bytes, high_first } => {
                let half = |at: usize| {
                    let high = (at % 2 == 1) != *high_first;
                    if high { bytes[at / 2] >> 4 } else { bytes[at / 2] & 0xF }
                };
                if cols.is_multiple_of(2) {
                    let bytes = &bytes[row * cols / 2..(row + 1) * cols / 2];
                    let [first, second] = if *high_first { [4, 0] } else { [0, 4] };
                    for (out, byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
                        *out = [byte >> first & 0xF, byte >> second & 0xF];
                    }
                } else {
                    out.iter_mut().enumerate().for_each(|(col, out)| *out = half(row * cols + col));
                }
            }
            Self::Bits { bytes, bits, row_bytes } => stream(&bytes[row * row_bytes..(row + 1) * row_bytes], *bits, out),
            Self::Columns { bytes, bits } => {
                let (per_word, mask) = (32 / bits, (1u32 << bits) - 1);
                for (index, out) in out.chunks_mut(per_word).enumerate() {
                    let word = word(bytes, index * rows + row);
                    for (position, out) in out.iter_mut().enumerate() {
                        *out = (word >> (position * bits) & mask) as u8;
                    }
                }
            }
            Self::EightRows(bytes) => {
                let (per_line, shift) = (rows / 8, 4 * EIGHT_ROWS[row % 8]);
                for (col, out) in out.iter_mut().enumerate() {
                    *out = (word(bytes, col * per_line + row / 8) >> shift & 0xF) as u8;
                }
            }
        }
    }
}

/// Nibble of a word that holds each of eight rows, as AWQ orders them.
pub(crate) const EIGHT_ROWS: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

fn word(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes([bytes[4 * index], bytes[4 * index + 1], bytes[4 * index + 2], bytes[4 * index + 3]])
}

/// Codes of `bits` bits, at most 8, of a little-endian stream.
pub(crate) fn stream(bytes: &[u8], bits: usize, out: &mut [u8]) {
    match bits {
        8 => out.copy_from_slice(&bytes[..out.len()]),
        4 => {
            for (out, byte) in out.chunks_mut(2).zip(bytes) {
                out.iter_mut().zip([byte & 0xF, byte >> 4]).for_each(|(out, code)| *out = code);
            }
        }
        _ => {
            for (index, out) in out.iter_mut().enumerate() {
                let (byte, shift) = (index * bits / 8, index * bits % 8);
                let next = bytes.get(byte + 1).copied().unwrap_or(0);
                *out = (u16::from_le_bytes([bytes[byte], next]) >> shift) as u8 & ((1u16 << bits) - 1) as u8;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn levels() -> Vec<f32> {
        (0..256).map(|code| code as f32).collect()
    }

    fn codes(codes: &Codes<'_>, row: usize, dims: (usize, usize)) -> Vec<u8> {
        let mut out = vec![0; dims.1];
        codes.row(row, dims, &mut out);
        out
    }

    #[test]
    fn every_element_takes_the_parameters_of_its_group() {
        // 3 x 5 in blocks of 2 x 2: 2 x 3 scales, those at the edge cut.
        let matrix = |groups, scales: &[f32]| {
            Matrix::scaled((3, 5), Codes::Bytes(Cow::Owned(vec![1; 15])), levels(), groups, scales.to_vec())
        };
        let grid = matrix(Groups::Grid { rows: 2, cols: 2 }, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let expected = [[1.0, 1.0, 2.0, 2.0, 3.0], [1.0, 1.0, 2.0, 2.0, 3.0], [4.0, 4.0, 5.0, 5.0, 6.0]];
        assert_eq!(grid.f32(Rows::range(0..3)).unwrap(), expected.concat());
        assert_eq!(grid.f32(Rows { first: 0, step: 2, count: 2 }).unwrap(), [expected[0], expected[2]].concat());
        let runs = matrix(Groups::Runs(4), &[1.0, 2.0, 3.0, 4.0]);
        assert_eq!(runs.f32(Rows::range(1..2)).unwrap(), [2.0, 2.0, 2.0, 3.0, 3.0]);
        let indexed = matrix(Groups::Columns { of: vec![1, 0, 1, 0, 0], count: 2 }, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(indexed.f32(Rows::range(1..2)).unwrap(), [4.0, 3.0, 4.0, 3.0, 3.0]);
        let nan = matrix(Groups::Grid { rows: 3, cols: 5 }, &[f32::NAN]);
        assert_eq!((nan.f32(Rows::range(0..1)), nan.bf16(Rows::range(0..1))), (None, None));
    }

    #[test]
    fn codes_are_found_in_every_packing() {
        let low = Codes::Halves { bytes: Cow::Owned(vec![0x21, 0x43, 0x65]), high_first: false };
        assert_eq!(codes(&low, 1, (2, 3)), [4, 5, 6]);
        assert_eq!(codes(&low, 0, (1, 6)), [1, 2, 3, 4, 5, 6]);
        let high = Codes::Halves { bytes: Cow::Owned(vec![0x12, 0x34, 0x56]), high_first: true };
        assert_eq!((codes(&high, 0, (1, 6)), codes(&high, 1, (2, 3))), (vec![1, 2, 3, 4, 5, 6], vec![4, 5, 6]));
        // 6 bits: 1, 2, 3, 63 as a stream of 24 bits.
        let stream = 1u32 | 2 << 6 | 3 << 12 | 63 << 18;
        let bits = Codes::Bits { bytes: Cow::Owned(stream.to_le_bytes().to_vec()), bits: 6, row_bytes: 4 };
        assert_eq!(codes(&bits, 0, (1, 4)), [1, 2, 3, 63]);
        let words: Vec<u8> = [0x8765_4321u32, 0xFEDC_BA98].iter().flat_map(|word| word.to_le_bytes()).collect();
        let columns = Codes::Columns { bytes: Cow::Owned(words.clone()), bits: 4 };
        assert_eq!(codes(&columns, 1, (2, 8)), [8, 9, 10, 11, 12, 13, 14, 15]);
        let eight = Codes::EightRows(Cow::Owned(words));
        let rows: Vec<Vec<u8>> = (0..8).map(|row| codes(&eight, row, (8, 2))).collect();
        assert_eq!(rows.iter().map(|row| row[0]).collect::<Vec<_>>(), [1, 5, 2, 6, 3, 7, 4, 8]);
    }
}

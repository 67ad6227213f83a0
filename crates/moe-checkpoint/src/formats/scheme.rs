//! How matrices become codes and parameters, and the bytes of those: rounding to nearest, packing, and taking rows and
//! columns out of what is quantized already.

use rayon::prelude::*;
use safetensors::Dtype;

use super::floats;
use super::matrix::Matrix;
use crate::convert;

/// What a code is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    /// A byte of E4M3.
    E4m3,
    /// Four bits of E2M1, the earlier element in the low half of a byte.
    E2m1,
    /// Four bits of NF4, the earlier element in the high half of a byte. Groups are runs of the flattened matrix.
    Nf4,
    /// An unsigned integer of so many bits, in a little-endian stream of whole words per row.
    Integer(usize),
    /// -1, 0 or 1 times one scale of the whole matrix, which every row repeats; stored as [`Element::Integer`] of two
    /// bits.
    Ternary,
}

/// How the scale of a matrix and those of groups make a factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Global {
    /// Divided by.
    Divides,
    /// Multiplied with.
    Multiplies,
}

/// How matrices are quantized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scheme {
    pub element: Element,
    /// Rows and columns of a group; `usize::MAX` for all of the matrix.
    pub group: (usize, usize),
    /// Dtype of scales.
    pub scale: Dtype,
    /// Whether groups have a zero point, packed like the codes but along the rows.
    pub zeros: bool,
    /// Whether there is an F32 scale of the matrix, too.
    pub global: Option<Global>,
}

/// Codes and parameters of a matrix, apart.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Parted {
    pub dims: (usize, usize),
    /// Row-major.
    pub codes: Vec<u8>,
    /// As stored, group after group, row-major.
    pub scales: Vec<f32>,
    /// Codes of the zero points; empty where there are none.
    pub zeros: Vec<u8>,
    pub global: Option<f32>,
}

impl Parted {
    /// What an opened matrix is made of; `scales` are those of groups as stored.
    pub fn of(matrix: &Matrix<'_>, scales: Vec<f32>, global: Option<f32>) -> Self {
        let dims = (matrix.rows, matrix.cols);
        let mut codes = vec![0u8; dims.0 * dims.1];
        if dims.1 > 0 {
            let rows = codes.par_chunks_exact_mut(dims.1).enumerate();
            rows.for_each(|(row, out)| matrix.codes.row(row, dims, out));
        }
        let zeros = matrix.zeros.iter().map(|zero| *zero as u8).collect();
        Self { dims, codes, scales, zeros, global }
    }
}

/// A group: its codes, its scale as stored and its zero point.
struct Group {
    codes: Vec<u8>,
    scale: f32,
    zero: u8,
}

/// Largest magnitude of E2M1.
const E2M1_MAX: f32 = 6.0;

impl Scheme {
    /// Whether groups are runs of the flattened matrix, across rows. Such a matrix is one row to everything below.
    pub fn is_flat(&self) -> bool {
        self.element == Element::Nf4
    }

    /// Rows and columns as groups see them.
    fn seen(&self, (rows, cols): (usize, usize)) -> (usize, usize) {
        if self.is_flat() { (1, rows * cols) } else { (rows, cols) }
    }

    /// Sides of a group in a matrix of these sides.
    pub fn sides(&self, dims: (usize, usize)) -> (usize, usize) {
        let (rows, cols) = self.seen(dims);
        (self.group.0.min(rows).max(1), self.group.1.min(cols).max(1))
    }

    /// Groups along the rows and along the columns.
    pub fn groups(&self, dims: (usize, usize)) -> (usize, usize) {
        let ((height, width), (rows, cols)) = (self.sides(dims), self.seen(dims));
        (rows.div_ceil(height), cols.div_ceil(width))
    }

    /// Why a matrix of so many columns cannot be stored; `None` if it can be.
    pub fn misfit(&self, (rows, cols): (usize, usize)) -> Option<String> {
        let (height, width) = self.group;
        if self.is_flat() {
            return None;
        }
        let unit = match self.element {
            _ if width != usize::MAX => width,
            Element::E2m1 => 2,
            _ => 1,
        };
        if !cols.is_multiple_of(unit) {
            return Some(format!("{cols} columns are no multiple of {unit}"));
        }
        (height != usize::MAX && !rows.is_multiple_of(height))
            .then(|| format!("{rows} rows are no multiple of {height}"))
    }

    /// The matrix rounded to nearest.
    pub fn encode(&self, values: &[f32], dims: (usize, usize)) -> Parted {
        let (rows, cols) = self.seen(dims);
        let ((height, width), (bands, across)) = (self.sides(dims), self.groups(dims));
        let global = self.global_of(values);
        let mut out = Parted {
            dims,
            codes: vec![0; rows * cols],
            scales: vec![0.0; bands * across],
            zeros: if self.zeros { vec![0; bands * across] } else { Vec::new() },
            global,
        };
        if values.is_empty() {
            return out;
        }
        let mut no_zeros = vec![0u8; if self.zeros { 0 } else { bands * across }];
        let zeros = if self.zeros { &mut out.zeros } else { &mut no_zeros };
        let bands = out.codes.par_chunks_mut(height * cols).zip(values.par_chunks(height * cols));
        let bands = bands.zip(out.scales.par_chunks_mut(across).zip(zeros.par_chunks_mut(across)));
        bands.for_each(|((codes, values), (scales, zeros))| {
            let mut group = Vec::with_capacity(height * width);
            for start in (0..cols).step_by(width) {
                let end = cols.min(start + width);
                group.clear();
                values.chunks_exact(cols).for_each(|row| group.extend_from_slice(&row[start..end]));
                let made = self.group(&group, global);
                let rows = codes.chunks_exact_mut(cols).zip(made.codes.chunks_exact(end - start));
                rows.for_each(|(row, codes)| row[start..end].copy_from_slice(codes));
                (scales[start / width], zeros[start / width]) = (made.scale, made.zero);
            }
        });
        out
    }

    /// The scale of a matrix.
    fn global_of(&self, values: &[f32]) -> Option<f32> {
        let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        if self.element == Element::Ternary {
            return Some(ternary_scale(values));
        }
        let most = E2M1_MAX * floats::E4M3_MAX;
        self.global.map(|global| match global {
            _ if largest == 0.0 => 1.0,
            Global::Divides => most / largest,
            Global::Multiplies => largest / most,
        })
    }

    /// What codes of a group are multiplied with.
    fn factor(&self, scale: f32, global: Option<f32>) -> f32 {
        match (self.global, global) {
            (Some(Global::Divides), Some(global)) => scale / global,
            (Some(Global::Multiplies), Some(global)) => scale * global,
            _ => scale,
        }
    }

    /// A scale as its dtype holds it.
    fn stored(&self, scale: f32) -> f32 {
        match self.scale {
            Dtype::BF16 => half::bf16::from_f32(scale).to_f32(),
            Dtype::F16 => half::f16::from_f32(scale).to_f32(),
            Dtype::F8_E4M3 => floats::e4m3(floats::to_e4m3(scale)),
            _ => scale,
        }
    }

    /// A group rounded to nearest, ties to even.
    fn group(&self, values: &[f32], global: Option<f32>) -> Group {
        let (scale, zero) = self.parameters(values, global);
        let code = |value: &f32| self.code(*value, scale, self.zeros.then_some(zero), global);
        Group { codes: values.iter().map(code).collect(), scale, zero }
    }

    /// Scale, as it is stored, and zero point of a group.
    pub fn parameters(&self, values: &[f32], global: Option<f32>) -> (f32, u8) {
        let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let powers = matches!(self.scale, Dtype::F8_E8M0 | Dtype::U8);
        match self.element {
            Element::E4m3 if powers => (power(largest / floats::E4M3_MAX), 0),
            Element::E4m3 => (safe(self.stored(largest / floats::E4M3_MAX)), 0),
            Element::E2m1 => match (powers, self.global, global) {
                (true, ..) => (shared_power(largest), 0),
                (_, Some(Global::Divides), Some(global)) => (self.stored(largest * global / E2M1_MAX), 0),
                (_, Some(Global::Multiplies), Some(global)) => (self.stored(largest / global / E2M1_MAX), 0),
                _ => (safe(self.stored(largest / E2M1_MAX)), 0),
            },
            Element::Nf4 => (safe(self.stored(largest)), 0),
            Element::Ternary => (safe(self.stored(global.unwrap_or_else(|| ternary_scale(values)))), 0),
            Element::Integer(bits) => {
                let most = ((1usize << bits) - 1) as f32;
                if !self.zeros {
                    return (safe(self.stored(largest / (most / 2.0))), 0);
                }
                let low = values.iter().fold(0f32, |low, value| low.min(*value));
                let high = values.iter().fold(0f32, |high, value| high.max(*value));
                let scale = safe(self.stored((high - low) / most));
                (scale, (-low / scale).round_ties_even().clamp(0.0, most) as u8)
            }
        }
    }

    /// The code nearest to a value, ties to even.
    pub fn code(&self, value: f32, scale: f32, zero: Option<u8>, global: Option<f32>) -> u8 {
        let scaled = value / safe(self.factor(scale, global));
        match self.element {
            Element::E4m3 => floats::to_e4m3(scaled),
            Element::E2m1 => floats::to_e2m1(scaled),
            Element::Nf4 => floats::to_nf4(scaled),
            Element::Ternary => (scaled.round_ties_even().clamp(-1.0, 1.0) + 2.0) as u8,
            Element::Integer(bits) => {
                let zero = zero.map_or((1usize << (bits - 1)) as f32, f32::from);
                (scaled.round_ties_even() + zero).clamp(0.0, ((1usize << bits) - 1) as f32) as u8
            }
        }
    }

    /// The value of a code.
    pub fn value(&self, code: u8, scale: f32, zero: Option<u8>, global: Option<f32>) -> f32 {
        let factor = self.factor(scale, global);
        match self.element {
            Element::E4m3 => floats::e4m3(code) * factor,
            Element::E2m1 => floats::E2M1[usize::from(code)] * factor,
            Element::Nf4 => floats::NF4[usize::from(code)] * factor,
            Element::Ternary => (f32::from(code) - 2.0) * factor,
            Element::Integer(bits) => {
                (f32::from(code) - zero.map_or((1usize << (bits - 1)) as f32, f32::from)) * factor
            }
        }
    }

    /// The values of a matrix, row-major.
    pub fn decode(&self, parted: &Parted) -> Vec<f32> {
        let ((height, width), (_, across)) = (self.sides(parted.dims), self.groups(parted.dims));
        let cols = self.seen(parted.dims).1.max(1);
        let value = |(at, code): (usize, &u8)| {
            let group = at / cols / height * across + at % cols / width;
            self.value(*code, parted.scales[group], parted.zeros.get(group).copied(), parted.global)
        };
        parted.codes.iter().enumerate().map(value).collect()
    }

    /// Bits of a code.
    pub fn bits(&self) -> usize {
        match self.element {
            Element::E4m3 => 8,
            Element::E2m1 | Element::Nf4 => 4,
            Element::Ternary => 2,
            Element::Integer(bits) => bits,
        }
    }

    /// Stored columns of codes, in elements of their dtype.
    pub fn code_columns(&self, cols: usize) -> usize {
        match self.element {
            Element::E4m3 => cols,
            Element::E2m1 | Element::Nf4 => cols / 2,
            Element::Integer(_) | Element::Ternary => (cols * self.bits()).div_ceil(32),
        }
    }

    /// Groups of these rows and columns that come from no single group of a matrix of sides `from`.
    pub fn cut(&self, from: (usize, usize), rows: &[u32], cols: &[u32]) -> usize {
        let ((height, width), (from_height, from_width)) = (self.sides((rows.len(), cols.len())), self.sides(from));
        let mixed = |indices: &[u32], side: usize, of: usize| {
            let one = |group: &&[u32]| group.iter().all(|index| *index as usize / of == group[0] as usize / of);
            let (count, whole) = (indices.chunks(side).count(), indices.chunks(side).filter(one).count());
            (count, whole)
        };
        let ((bands, whole_bands), (across, whole_across)) =
            (mixed(rows, height, from_height), mixed(cols, width, from_width));
        bands * across - whole_bands * whole_across
    }

    /// Rows and columns of a quantized matrix, and how many groups had to be quantized again: a group whose elements
    /// all come from one group keeps their codes, its scale and its zero point.
    pub fn select(&self, from: &Parted, rows: &[u32], cols: &[u32]) -> (Parted, usize) {
        let dims = (rows.len(), cols.len());
        let ((height, width), (bands, across)) = (self.sides(dims), self.groups(dims));
        let ((from_height, from_width), (_, from_across)) = (self.sides(from.dims), self.groups(from.dims));
        // The one group along a side that all of these come from.
        let one = |indices: &[u32], side: usize| {
            let first = *indices.first()? as usize / side;
            indices.iter().all(|index| *index as usize / side == first).then_some(first)
        };
        let mut out = Parted {
            dims,
            codes: rows
                .iter()
                .flat_map(|row| cols.iter().map(move |col| *row as usize * from.dims.1 + *col as usize))
                .map(|at| from.codes[at])
                .collect(),
            scales: vec![0.0; bands * across],
            zeros: if self.zeros { vec![0; bands * across] } else { Vec::new() },
            global: from.global,
        };
        let mut again = 0;
        let columns: Vec<Option<usize>> = cols.chunks(width).map(|cols| one(cols, from_width)).collect();
        for (band, band_rows) in rows.chunks(height).enumerate() {
            let source = one(band_rows, from_height);
            for (index, group_cols) in cols.chunks(width).enumerate() {
                let at = band * across + index;
                if let (Some(row), Some(col)) = (source, columns[index]) {
                    out.scales[at] = from.scales[row * from_across + col];
                    if self.zeros {
                        out.zeros[at] = from.zeros[row * from_across + col];
                    }
                    continue;
                }
                again += 1;
                let value = |row: &u32, col: &u32| {
                    let (row, col) = (*row as usize, *col as usize);
                    let group = row / from_height * from_across + col / from_width;
                    let code = from.codes[row * from.dims.1 + col];
                    self.value(code, from.scales[group], from.zeros.get(group).copied(), from.global)
                };
                let values: Vec<f32> =
                    band_rows.iter().flat_map(|row| group_cols.iter().map(move |col| value(row, col))).collect();
                let made = self.group(&values, from.global);
                for (line, codes) in made.codes.chunks_exact(group_cols.len()).enumerate() {
                    let start = (band * height + line) * dims.1 + index * width;
                    out.codes[start..start + codes.len()].copy_from_slice(codes);
                }
                out.scales[at] = made.scale;
                if self.zeros {
                    out.zeros[at] = made.zero;
                }
            }
        }
        (out, again)
    }

    /// The bytes of codes, scales, and of zero points and the scale of the matrix where there are such.
    pub fn pack(&self, parted: &Parted) -> Vec<Vec<u8>> {
        let (rows, cols) = parted.dims;
        let codes = match self.element {
            Element::E4m3 => parted.codes.clone(),
            Element::E2m1 => {
                parted.codes.chunks(2).map(|pair| pair[0] | pair.get(1).map_or(0, |code| code << 4)).collect()
            }
            Element::Nf4 => {
                parted.codes.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).copied().unwrap_or(0)).collect()
            }
            Element::Integer(_) | Element::Ternary => {
                let bits = self.bits();
                let row_bytes = 4 * (cols * bits).div_ceil(32);
                let mut out = vec![0u8; rows * row_bytes];
                if cols > 0 {
                    let rows = out.par_chunks_exact_mut(row_bytes).zip(parted.codes.par_chunks_exact(cols));
                    rows.for_each(|(out, codes)| to_stream(codes.iter().copied(), bits, out));
                }
                out
            }
        };
        let mut scales = Vec::new();
        match self.scale {
            Dtype::F8_E4M3 => scales.extend(parted.scales.iter().map(|scale| floats::to_e4m3(*scale))),
            // The exponent of a power of two; the least is half the least normal number.
            Dtype::F8_E8M0 | Dtype::U8 => {
                scales.extend(parted.scales.iter().map(|scale| (scale.to_bits() >> 23) as u8))
            }
            dtype => {
                convert::encode(dtype, &parted.scales, &mut scales);
            }
        }
        let mut out = vec![codes, scales];
        if let (Element::Integer(bits), true) = (self.element, self.zeros) {
            let (bands, across) = self.groups(parted.dims);
            let words = (bands * bits).div_ceil(32);
            let mut packed = vec![0u8; 4 * words * across];
            let mut column = vec![0u8; 4 * words];
            for col in 0..across {
                column.fill(0);
                to_stream((0..bands).map(|row| parted.zeros[row * across + col]), bits, &mut column);
                for (word, bytes) in column.chunks_exact(4).enumerate() {
                    let at = 4 * (word * across + col);
                    packed[at..at + 4].copy_from_slice(bytes);
                }
            }
            out.push(packed);
        }
        // That of ternary matrices is what every row has.
        out.extend(parted.global.filter(|_| self.global.is_some()).map(|global| global.to_le_bytes().to_vec()));
        out
    }
}

/// Writes codes of `bits` bits as a little-endian stream into zeros.
fn to_stream(codes: impl Iterator<Item = u8>, bits: usize, out: &mut [u8]) {
    for (index, code) in codes.enumerate() {
        let (byte, shift) = (index * bits / 8, index * bits % 8);
        let [low, high] = (u16::from(code) << shift).to_le_bytes();
        out[byte] |= low;
        if high != 0 {
            out[byte + 1] |= high;
        }
    }
}

/// The scale of a ternary matrix: the mean magnitude (BitNet b1.58, arXiv 2402.17764), or, of one that is ternary
/// already, the magnitude that it has.
fn ternary_scale(values: &[f32]) -> f32 {
    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    if values.iter().all(|value| *value == 0.0 || value.abs() == largest) {
        return largest;
    }
    (values.iter().map(|value| f64::from(value.abs())).sum::<f64>() / values.len().max(1) as f64) as f32
}

/// A scale to divide by: 1 for that of zeros.
fn safe(scale: f32) -> f32 {
    if scale > 0.0 { scale } else { 1.0 }
}

/// The least power of two that is no less than a value; 1 for zero.
fn power(value: f32) -> f32 {
    if value <= 0.0 {
        return 1.0;
    }
    let floor = f32::from_bits(value.to_bits() & 0x7F80_0000);
    if floor == value { value } else { 2.0 * floor }
}

/// The power of two of a group of E2M1 (OCP Microscaling): that of its largest magnitude, rounded up from 1.75 of it
/// on, over that of the largest code; 1 for zero.
fn shared_power(largest: f32) -> f32 {
    if largest <= 0.0 {
        return 1.0;
    }
    let bits = largest.to_bits();
    let up = i32::from(bits & 0x007F_FFFF >= 0x0060_0000);
    let exponent = ((bits >> 23) as i32 - 127 + up - 2).clamp(-126, 127);
    2f64.powi(exponent) as f32
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::formats::matrix::{Codes, Groups, Rows};

    fn schemes() -> Vec<Scheme> {
        let float = |element, group, scale| Scheme { element, group, scale, zeros: false, global: None };
        let global = |global| Scheme { global: Some(global), ..float(Element::E2m1, (1, 16), Dtype::F8_E4M3) };
        let all = usize::MAX;
        vec![
            float(Element::E4m3, (2, 16), Dtype::F32),
            float(Element::E4m3, (1, all), Dtype::BF16),
            float(Element::E4m3, (all, all), Dtype::F32),
            float(Element::E4m3, (2, 16), Dtype::F8_E8M0),
            float(Element::E2m1, (1, 32), Dtype::U8),
            float(Element::Nf4, (1, 64), Dtype::F32),
            global(Global::Divides),
            global(Global::Multiplies),
            float(Element::Integer(4), (1, 32), Dtype::BF16),
            float(Element::Integer(8), (1, all), Dtype::BF16),
            Scheme { zeros: true, ..float(Element::Integer(4), (1, 32), Dtype::BF16) },
        ]
    }

    fn values(rows: usize, cols: usize) -> Vec<f32> {
        let mut state = 7u32;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..rows * cols).map(next).collect()
    }

    fn decoded(scheme: &Scheme, parted: &Parted) -> Vec<f32> {
        scheme.decode(parted)
    }

    #[test]
    fn errors_of_rounding_are_those_of_the_nearest_code() {
        let (rows, cols) = (4, 64);
        let values = values(rows, cols);
        for scheme in schemes() {
            let parted = scheme.encode(&values, (rows, cols));
            let found = decoded(&scheme, &parted);
            // Steps at the largest magnitude: 2 of 6 of E2M1, 32 of 448 of E4M3, one in 15 or 255.
            let step = match scheme.element {
                Element::E4m3 => 32.0 / 448.0,
                Element::E2m1 => 2.0 / 4.0,
                Element::Nf4 => floats::NF4[1] - floats::NF4[0],
                Element::Integer(bits) => 2.0 / ((1 << bits) - 1) as f32,
                Element::Ternary => 1.0,
            };
            for (found, value) in found.iter().zip(&values) {
                // A scale in BF16 is off by up to one in 512, and with it the largest value.
                assert!((found - value).abs() <= 0.55 * step + 4e-3, "{scheme:?}: {value} became {found}");
            }
            // Floats on the grid stay there; the grid of integers moves where a group does not reach its last code.
            let again = scheme.encode(&found, (rows, cols));
            let twice = decoded(&scheme, &again);
            let moved = if matches!(scheme.element, Element::Integer(_)) { 0.55 * step } else { 0.05 * step };
            assert!(found.iter().zip(&twice).all(|(a, b)| (a - b).abs() <= moved), "{scheme:?}");
            let nothing = scheme.encode(&vec![0.0; rows * cols], (rows, cols));
            assert!(decoded(&scheme, &nothing).iter().all(|value| *value == 0.0), "{scheme:?}");
        }
    }

    #[test]
    fn groups_that_come_from_one_group_keep_their_codes() {
        let dims = (6, 64);
        for scheme in schemes().into_iter().filter(|scheme| !scheme.is_flat()) {
            let parted = scheme.encode(&values(dims.0, dims.1), dims);
            let whole = decoded(&scheme, &parted);
            let expect = |rows: &[u32], cols: &[u32]| -> Vec<f32> {
                let at = |row: &u32, col: &u32| whole[*row as usize * dims.1 + *col as usize];
                rows.iter().flat_map(|row| cols.iter().map(move |col| at(row, col))).collect()
            };
            let all: Vec<u32> = (0..64).collect();
            for (rows, cols, exact) in [
                (vec![0, 1, 2, 3, 4, 5], all.clone(), true),
                (vec![2, 3], all.clone(), true),
                // The second half of the columns, and a half of each half.
                (vec![0, 1, 4, 5], (32..64).collect(), true),
                (vec![0, 1], (0..16).chain(32..48).collect(), scheme.group.1 != 32),
                (vec![0, 1], (8..24).collect(), scheme.group.1 != 16),
            ] {
                let (kept, again) = scheme.select(&parted, &rows, &cols);
                assert_eq!(again == 0, exact, "{scheme:?} {rows:?} {cols:?}");
                assert_eq!(again, scheme.cut(dims, &rows, &cols));
                let (found, expected) = (decoded(&scheme, &kept), expect(&rows, &cols));
                assert!(!exact || found == expected, "{scheme:?}");
                let near = |(a, b): (&f32, &f32)| (a - b).abs() < 0.3;
                assert!(found.iter().zip(&expected).all(near), "{scheme:?}");
            }
        }
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        // 5 columns of 4 bits are padded to a word.
        let codes = vec![1u8, 2, 3, 4, 15, 5, 6, 7, 8, 9];
        let scheme = Scheme {
            element: Element::Integer(4),
            group: (1, usize::MAX),
            scale: Dtype::F32,
            zeros: true,
            global: None,
        };
        let parted =
            Parted { dims: (2, 5), codes: codes.clone(), scales: vec![0.5, 2.0], zeros: vec![3, 12], global: None };
        let [packed, scales, zeros] = <[Vec<u8>; 3]>::try_from(scheme.pack(&parted)).unwrap();
        assert_eq!((packed.len(), zeros), (8, vec![0xC3, 0, 0, 0]));
        assert_eq!(scales, [0.5f32.to_le_bytes(), 2f32.to_le_bytes()].concat());
        let stream = Codes::Bits { bytes: Cow::Owned(packed), bits: 4, row_bytes: 4 };
        let levels = (0..256).map(|code| code as f32).collect();
        let matrix = Matrix::scaled((2, 5), stream, levels, Groups::Grid { rows: 1, cols: 5 }, vec![1.0; 2]);
        let found: Vec<u8> = matrix.f32(Rows::range(0..2)).unwrap().iter().map(|value| *value as u8).collect();
        assert_eq!(found, codes);
    }

    #[test]
    fn ternary_matrices_have_three_values_and_stay_what_they_are() {
        let scheme = Scheme {
            element: Element::Ternary,
            group: (1, usize::MAX),
            scale: Dtype::BF16,
            zeros: false,
            global: None,
        };
        let dims = (6, 40);
        let values = values(dims.0, dims.1);
        let parted = scheme.encode(&values, dims);
        let mean = values.iter().map(|value| value.abs()).sum::<f32>() / values.len() as f32;
        let scale = half::bf16::from_f32(mean).to_f32();
        assert!(parted.scales.iter().all(|found| *found == scale), "{:?} {mean}", parted.scales);
        let found = scheme.decode(&parted);
        for (found, value) in found.iter().zip(&values) {
            let expected = (value / scale).round_ties_even().clamp(-1.0, 1.0) * scale;
            assert_eq!(*found, expected, "{value}");
        }
        assert!([-scale, 0.0, scale].iter().all(|level| found.contains(level)));
        let again = scheme.encode(&found, dims);
        assert_eq!(scheme.decode(&again), found);
        let [codes, scales] = <[Vec<u8>; 2]>::try_from(scheme.pack(&again)).unwrap();
        // Two bits per element, rows of whole words, and a BF16 scale per row.
        assert_eq!((codes.len(), scales.len()), (6 * 4 * 3, 6 * 2));
        assert!(scheme.decode(&scheme.encode(&[0.0; 8], (2, 4))).iter().all(|value| *value == 0.0));
    }

    #[test]
    fn powers_of_two_are_those_of_the_specification() {
        assert_eq!([0.0, 1.0, 1.5, 4.0].map(power), [1.0, 1.0, 2.0, 4.0]);
        // 6 is the largest code with the power 1; 7 = 1.75 * 4 goes up.
        assert_eq!([0.0, 6.0, 6.9, 7.0, 8.0, 0.75].map(shared_power), [1.0, 1.0, 1.0, 2.0, 2.0, 0.125]);
    }
}

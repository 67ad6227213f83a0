//! Integers of compressed-tensors.
//!
//! `pack-quantized`: `X.weight_packed` I32 `[rows, ceil(cols * bits / 32)]`, each row a little-endian stream of
//! unsigned codes (the integer plus `2^(bits - 1)`); `X.weight_scale` `[rows, groups]`; `X.weight_shape` = `[rows,
//! cols]`; asymmetric ones have `X.weight_zero_point` I32 `[ceil(rows * bits / 32), groups]`, packed the same way along
//! the rows; `X.weight_g_idx` I32 `[cols]` names the group of every column where they are out of order.
//! `int-quantized`: `X.weight` I8 with `X.weight_scale` `[rows, 1]` or `[1]` and maybe `X.weight_zero_point` I8.

use safetensors::Dtype;

use super::matrix::{Codes, Groups, Matrix, Part, stream};
use super::scheme::{Element, Scheme};
use super::{Codec, Context, Format, Found, Packed, compressed, module};
use crate::Result;
use crate::weights::TensorInfo;

/// `pack-quantized`.
pub(super) struct PackQuantized;

/// `int-quantized`.
pub(super) struct IntQuantized;

struct Packing {
    bits: usize,
    groups: usize,
    /// Columns of a group; `usize::MAX` for whole rows.
    group_size: usize,
    asymmetric: bool,
    indexed: bool,
}

const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

impl Codec for Packing {
    fn open<'a>(&self, dims: (usize, usize), parts: Vec<Part<'a>>) -> Matrix<'a> {
        let (rows, cols) = dims;
        let mut parts = parts.into_iter();
        let mut next = || parts.next().unwrap_or_else(|| unreachable!("as many parts as were found"));
        let (codes, scale) = (next(), next().floats());
        let offset = (1 << (self.bits - 1)) as f32;
        let row_bytes = codes.bytes.len() / rows.max(1);
        let codes = Codes::Bits { bytes: codes.bytes, bits: self.bits, row_bytes };
        let zeros = self.asymmetric.then(|| unpacked_columns(&next().bytes, self.bits, (rows, self.groups)));
        let of = self.indexed.then(|| next().words().collect());
        let groups = match of {
            Some(of) => Groups::Columns { of, count: self.groups },
            None => Groups::Grid { rows: 1, cols: cols.div_ceil(self.groups.max(1)).max(1) },
        };
        // Symmetric codes have their zero in the middle.
        let levels = (0..256).map(|code| code as f32 - if self.asymmetric { 0.0 } else { offset }).collect();
        let zeros = zeros.unwrap_or_default();
        Matrix { zeros, ..Matrix::scaled(dims, codes, levels, groups, scale) }
    }

    fn scheme(&self, scale: Dtype) -> Option<Scheme> {
        let (element, group) = (Element::Integer(self.bits), (1, self.group_size));
        (!self.indexed).then_some(Scheme { element, group, scale, zeros: self.asymmetric, global: None })
    }
}

/// Codes packed along the rows of `[rows, cols]`, row-major.
fn unpacked_columns(bytes: &[u8], bits: usize, (rows, cols): (usize, usize)) -> Vec<f32> {
    let words = bytes.len() / 4 / cols.max(1);
    let mut out = vec![0.0; rows * cols];
    let (mut column, mut codes) = (vec![0u8; 4 * words], vec![0u8; rows]);
    for col in 0..cols {
        for word in 0..words {
            let at = 4 * (word * cols + col);
            column[4 * word..4 * word + 4].copy_from_slice(&bytes[at..at + 4]);
        }
        stream(&column, bits, &mut codes);
        codes.iter().enumerate().for_each(|(row, code)| out[row * cols + col] = f32::from(*code));
    }
    out
}

impl Format for PackQuantized {
    fn find(&self, context: &Context<'_>, main: &TensorInfo) -> Result<Vec<Packed>> {
        let Some(name) = main.name.strip_suffix("_packed").filter(|_| main.dtype == Dtype::I32) else {
            return Ok(Vec::new());
        };
        let [rows, words] = main.shape[..] else { return Err(context.refused(main, "two dimensions")) };
        let Some(scale) = context.get(&format!("{name}_scale")) else {
            return Err(context.lacks(main, &format!("`{name}_scale`")));
        };
        context.typed(scale, &FLOATS)?;
        let groups = match scale.shape[..] {
            [_, groups] => groups,
            _ => 1,
        };
        context.shaped(scale, &[rows, groups], "one scale per row and group")?;
        let shape = context.companion(main, &format!("{name}_shape"), &[2], "rows and columns of the weight")?;
        // Widths of codes that the config has, of which the shape leaves one.
        let mut widths: Vec<usize> = compressed::weights(context.config)
            .filter_map(|weights| weights["num_bits"].as_u64())
            .map(|bits| bits as usize)
            .collect();
        widths.retain(|bits| (1..=8).contains(bits));
        widths.sort_unstable();
        widths.dedup();
        if widths.is_empty() {
            return Err(context.refused(main, "`quantization_config.config_groups` with the number of bits"));
        }
        // Whole words without padding tell the columns, otherwise the stored shape does.
        let whole =
            |bits: &usize| (32 * words).is_multiple_of(*bits) && (32 * words / bits).is_multiple_of(groups.max(1));
        let cols = match widths[..] {
            [bits] if groups > 1 && whole(&bits) => 32 * words / bits,
            _ => {
                let found = numbers(shape.dtype, &(context.read)(shape)?);
                match found[..] {
                    [stored, cols] if stored == rows => cols,
                    _ => return Err(context.refused(shape, &format!("[{rows}, columns]"))),
                }
            }
        };
        let fits = |bits: &&usize| (cols * **bits).div_ceil(32) == words;
        let Some(bits) = widths.iter().find(fits).copied() else {
            let reason = format!("[{rows}, {}] for {cols} columns of {widths:?} bits", (cols * widths[0]).div_ceil(32));
            return Err(context.refused(main, &reason));
        };
        if !cols.is_multiple_of(groups.max(1)) {
            return Err(context.refused(scale, &format!("a number of groups that divides {cols} columns")));
        }
        let mut parts = vec![main.name.clone(), scale.name.clone()];
        let zero = context.get(&format!("{name}_zero_point"));
        if let Some(zero) = zero {
            context.typed(zero, &[Dtype::I32])?;
            context.shaped(zero, &[(rows * bits).div_ceil(32), groups], "zero points packed along the rows")?;
            parts.push(zero.name.clone());
        }
        let index = context.get(&format!("{name}_g_idx"));
        if let Some(index) = index {
            context.typed(index, &[Dtype::I32])?;
            context.shaped(index, &[cols], "one group per column")?;
            parts.push(index.name.clone());
        }
        // A row of one group may be a group of the size that the config has, or a row of any size.
        let sizes =
            compressed::weights(context.config).filter(|weights| weights["num_bits"].as_u64() == Some(bits as u64));
        let mut sizes = sizes.filter_map(|weights| weights["group_size"].as_u64()).map(|size| size as usize);
        let of_config = sizes.find(|size| *size > 0 && cols == groups * size);
        let group_size = of_config.unwrap_or(if groups > 1 { cols / groups } else { usize::MAX });
        let codec = Packing { bits, groups, group_size, asymmetric: zero.is_some(), indexed: index.is_some() };
        let found = Found {
            main,
            name: name.to_string(),
            shape: vec![rows, cols],
            dims: (rows, cols),
            stack: 1,
            first: 0,
            transposed: false,
            parts,
            format: "packed integers",
            codec: Box::new(codec),
        };
        let mut packed = context.packed(found)?;
        packed.bytes += shape.bytes;
        packed.others.push(shape.name.clone());
        Ok(vec![packed])
    }
}

/// Whole numbers of a small tensor; empty for anything else.
fn numbers(dtype: Dtype, bytes: &[u8]) -> Vec<usize> {
    match dtype {
        Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes) as usize).collect(),
        Dtype::I32 => bytes.as_chunks::<4>().0.iter().map(|bytes| i32::from_le_bytes(*bytes) as usize).collect(),
        _ => Vec::new(),
    }
}

struct Bytes {
    rows: usize,
}

impl Codec for Bytes {
    fn open<'a>(&self, dims: (usize, usize), parts: Vec<Part<'a>>) -> Matrix<'a> {
        let mut parts = parts.into_iter();
        let mut next = || parts.next();
        let missing = || unreachable!("codes and scales");
        let (codes, scale) = (next().unwrap_or_else(missing), next().unwrap_or_else(missing).floats());
        let zeros = next().map(|zero| zero.bytes.iter().map(|byte| f32::from(*byte as i8)).collect());
        let groups = Groups::Grid { rows: self.rows, cols: dims.1.max(1) };
        let zeros = zeros.unwrap_or_default();
        Matrix { zeros, ..Matrix::scaled(dims, Codes::Bytes(codes.bytes), signed_levels(), groups, scale) }
    }
}

/// Values of all bytes as signed integers.
pub(super) fn signed_levels() -> Vec<f32> {
    (0..=u8::MAX).map(|code| f32::from(code as i8)).collect()
}

impl Format for IntQuantized {
    fn find(&self, context: &Context<'_>, main: &TensorInfo) -> Result<Vec<Packed>> {
        if main.dtype != Dtype::I8 {
            return Ok(Vec::new());
        }
        let module = module(&main.name);
        let Some(scale) = context.get(&format!("{module}.weight_scale")) else { return Ok(Vec::new()) };
        let [rows, cols] = main.shape[..] else { return Err(context.refused(main, "two dimensions")) };
        context.typed(scale, &FLOATS)?;
        let one = scale.elements() == 1;
        if !one {
            context.shaped(scale, &[rows, 1], "one scale per row")?;
        }
        let mut parts = vec![main.name.clone(), scale.name.clone()];
        if let Some(zero) = context.get(&format!("{module}.weight_zero_point")) {
            context.typed(zero, &[Dtype::I8])?;
            context.shaped(zero, &scale.shape, "one zero point per scale")?;
            parts.push(zero.name.clone());
        }
        let found = Found {
            main,
            name: main.name.clone(),
            shape: main.shape.clone(),
            dims: (rows, cols),
            stack: 1,
            first: 0,
            transposed: false,
            parts,
            format: "8-bit integers",
            codec: Box::new(Bytes { rows: if one { rows.max(1) } else { 1 } }),
        };
        Ok(vec![context.packed(found)?])
    }
}

//! GPTQ (arXiv 2210.17323) as GPTQModel and AutoGPTQ store it.
//!
//! `X.qweight` I32 `[cols * bits / 32, rows]`, packed along the columns; `X.qzeros` I32 `[groups, rows * bits / 32]`;
//! `X.scales` `[groups, rows]`; `X.g_idx` I32 `[cols]`, the group of every column. Version 1 stores zero points less
//! one, taken off whole words with borrow, so that one is added to the words, with carry, before they are unpacked.

use safetensors::Dtype;

use super::matrix::{Codes, Groups, Matrix, Part};
use super::{Codec, Context, Format, Found, Packed};
use crate::Result;
use crate::weights::TensorInfo;

/// The format.
pub(super) struct Gptq;

struct Packing {
    bits: usize,
    groups: usize,
    group_size: usize,
    /// Version 1.
    less_one: bool,
    indexed: bool,
}

impl Codec for Packing {
    fn open<'a>(&self, dims: (usize, usize), parts: Vec<Part<'a>>) -> Matrix<'a> {
        let (rows, cols) = dims;
        let mut parts = parts.into_iter();
        let mut next = || parts.next().unwrap_or_else(|| unreachable!("as many parts as were found"));
        let (codes, zeros, scales) = (next(), next(), next().floats());
        let of: Vec<u32> = match self.indexed {
            true => next().words().collect(),
            false => (0..cols).map(|col| (col / self.group_size) as u32).collect(),
        };
        let ones = if self.less_one { (0..32 / self.bits).map(|at| 1u32 << (at * self.bits)).sum() } else { 0u32 };
        let (per_word, mask) = (32 / self.bits, ((1u64 << self.bits) - 1) as u32);
        let words: Vec<u32> = zeros.words().map(|word| word.wrapping_add(ones)).collect();
        let line = rows / per_word;
        let (mut by_row, mut zero) = (vec![0.0; rows * self.groups], vec![0.0; rows * self.groups]);
        for row in 0..rows {
            for group in 0..self.groups {
                let at = row * self.groups + group;
                by_row[at] = scales[group * rows + row];
                let word = words[group * line + row / per_word];
                zero[at] = (word >> (row % per_word * self.bits) & mask) as f32;
            }
        }
        let levels = (0..256).map(|code| code as f32).collect();
        let codes = Codes::Columns { bytes: codes.bytes, bits: self.bits };
        let groups = Groups::Columns { of, count: self.groups };
        Matrix { zeros: zero, ..Matrix::scaled(dims, codes, levels, groups, by_row) }
    }
}

impl Format for Gptq {
    fn find(&self, context: &Context<'_>, main: &TensorInfo) -> Result<Vec<Packed>> {
        let Some(module) = main.name.strip_suffix(".qweight").filter(|_| main.dtype == Dtype::I32) else {
            return Ok(Vec::new());
        };
        if context.config["quant_method"].as_str() == Some("awq") {
            return Ok(Vec::new());
        }
        let [Some(scales), Some(zeros)] = ["scales", "qzeros"].map(|name| context.get(&format!("{module}.{name}")))
        else {
            return Err(context.lacks(main, &format!("`{module}.scales` and `{module}.qzeros`")));
        };
        let ([lines, rows], [groups, _], [_, words]) = (two(main), two(scales), two(zeros));
        context.shaped(scales, &[groups, rows], "one scale per group and row")?;
        context.typed(scales, &[Dtype::F16, Dtype::BF16, Dtype::F32])?;
        context.typed(zeros, &[Dtype::I32])?;
        let bits = (32 * words).checked_div(rows).unwrap_or(0);
        if ![2, 4, 8].contains(&bits) || !rows.is_multiple_of(32 / bits) || main.shape.len() != 2 {
            let reason = format!(
                "2, 4 or 8 bits ({bits} were found): dequantize it with GPTQModel, or take the original checkpoint"
            );
            return Err(context.refused(main, &reason));
        }
        context.shaped(zeros, &[groups, rows * bits / 32], "zero points packed along the rows")?;
        let less_one = match context.config["checkpoint_format"].as_str().or(context.config["format"].as_str()) {
            None | Some("gptq") => true,
            Some("gptq_v2") => false,
            Some(other) => {
                let reason = format!("`quantization_config.checkpoint_format` `gptq` or `gptq_v2`, not `{other}`");
                return Err(context.refused(main, &reason));
            }
        };
        let cols = lines * 32 / bits;
        let index = context.get(&format!("{module}.g_idx"));
        let mut parts = [main, zeros, scales].map(|info| info.name.clone()).to_vec();
        if let Some(index) = index {
            context.typed(index, &[Dtype::I32])?;
            context.shaped(index, &[cols], "one group per column")?;
            parts.push(index.name.clone());
        }
        // The last group may be short.
        let size = context.config["group_size"].as_i64().filter(|size| *size > 0).map_or(cols, |size| size as usize);
        if index.is_none() && cols.div_ceil(size.max(1)) != groups {
            let reason = format!("{} groups of `quantization_config.group_size` = {size}", cols.div_ceil(size.max(1)));
            return Err(context.refused(scales, &reason));
        }
        let codec = Packing { bits, groups, group_size: size.max(1), less_one, indexed: index.is_some() };
        let found = Found {
            main,
            name: format!("{module}.weight"),
            shape: vec![rows, cols],
            dims: (rows, cols),
            stack: 1,
            first: 0,
            transposed: false,
            parts,
            format: "GPTQ",
            codec: Box::new(codec),
        };
        Ok(vec![context.packed(found)?])
    }
}

/// Both dimensions; zeros for a tensor that has others.
pub(super) fn two(info: &TensorInfo) -> [usize; 2] {
    <[usize; 2]>::try_from(&info.shape[..]).unwrap_or([0, 0])
}

//! AWQ (arXiv 2306.00978), version `gemm`.
//!
//! `X.qweight` I32 `[cols, rows / 8]`, packed along the rows in an order of its own; `X.qzeros` I32 `[groups, rows /
//! 8]` likewise; `X.scales` `[groups, rows]`. Other versions have other layouts.

use safetensors::Dtype;

use super::gptq::two;
use super::matrix::{Codes, EIGHT_ROWS, Groups, Matrix, Part};
use super::{Codec, Context, Format, Found, Packed};
use crate::Result;
use crate::weights::TensorInfo;

/// The format.
pub(super) struct Awq;

struct Packing {
    groups: usize,
}

impl Codec for Packing {
    fn open<'a>(&self, dims: (usize, usize), parts: Vec<Part<'a>>) -> Matrix<'a> {
        let (rows, cols) = dims;
        let [codes, zeros, scales] = <[Part<'a>; 3]>::try_from(parts).unwrap_or_else(|_| unreachable!("three parts"));
        let (words, scales) = (zeros.words().collect::<Vec<u32>>(), scales.floats());
        let (mut by_row, mut zero) = (vec![0.0; rows * self.groups], vec![0.0; rows * self.groups]);
        for row in 0..rows {
            for group in 0..self.groups {
                let at = row * self.groups + group;
                by_row[at] = scales[group * rows + row];
                zero[at] = (words[group * (rows / 8) + row / 8] >> (4 * EIGHT_ROWS[row % 8]) & 0xF) as f32;
            }
        }
        let levels = (0..256).map(|code| code as f32).collect();
        let groups = Groups::Grid { rows: 1, cols: cols / self.groups };
        Matrix { zeros: zero, ..Matrix::scaled(dims, Codes::EightRows(codes.bytes), levels, groups, by_row) }
    }
}

impl Format for Awq {
    fn find(&self, context: &Context<'_>, main: &TensorInfo) -> Result<Vec<Packed>> {
        let Some(module) = main.name.strip_suffix(".qweight").filter(|_| main.dtype == Dtype::I32) else {
            return Ok(Vec::new());
        };
        if context.config["quant_method"].as_str() != Some("awq") {
            return Ok(Vec::new());
        }
        let [Some(scales), Some(zeros)] = ["scales", "qzeros"].map(|name| context.get(&format!("{module}.{name}")))
        else {
            return Err(context.lacks(main, &format!("`{module}.scales` and `{module}.qzeros`")));
        };
        let ([cols, words], [groups, rows]) = (two(main), two(scales));
        context.shaped(main, &[cols, rows / 8], "4 bits per element, eight rows in a word")?;
        context.typed(scales, &[Dtype::F16, Dtype::BF16, Dtype::F32])?;
        context.typed(zeros, &[Dtype::I32])?;
        context.shaped(zeros, &[groups, words], "one zero point per group and row")?;
        if groups == 0 || !cols.is_multiple_of(groups) || rows != 8 * words {
            let reason = format!("a number of groups that divides {cols} columns, and rows in eights");
            return Err(context.refused(scales, &reason));
        }
        let found = Found {
            main,
            name: format!("{module}.weight"),
            shape: vec![rows, cols],
            dims: (rows, cols),
            stack: 1,
            first: 0,
            transposed: false,
            parts: [main, zeros, scales].map(|info| info.name.clone()).to_vec(),
            format: "AWQ",
            codec: Box::new(Packing { groups }),
        };
        Ok(vec![context.packed(found)?])
    }
}

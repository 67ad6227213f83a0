//! MXFP4 (OCP Microscaling 1.0): elements of E2M1, a power of two per 32 of them.
//!
//! gpt-oss: `X_blocks` U8 `[E, rows, cols / 32, 16]` and `X_scales` U8 `[E, rows, cols / 32]` hold the transposes of
//! `X` `[E, cols, rows]`. compressed-tensors: `X.weight_packed` U8 `[rows, cols / 2]`, `X.weight_scale` U8 `[rows, cols
//! / 32]`. DeepSeek-V4: `X.weight` I8 `[rows, cols / 2]`, `X.scale` or `X.weight_scale_inv` F8_E8M0 `[rows, cols /
//! 32]`. Everywhere the low half of a byte is the earlier element.

use safetensors::Dtype;

use super::matrix::{Codes, Groups, Matrix, Part};
use super::scheme::{Element, Scheme};
use super::{Codec, Context, Format, Found, Packed, floats, module};
use crate::Result;
use crate::weights::TensorInfo;

/// The format, under all three names.
pub(super) struct Mxfp4;

/// Elements that share an exponent.
pub(crate) const BLOCK: usize = 32;

struct Blocks;

impl Codec for Blocks {
    fn open<'a>(&self, dims: (usize, usize), parts: Vec<Part<'a>>) -> Matrix<'a> {
        let [codes, scale] = <[Part<'a>; 2]>::try_from(parts).unwrap_or_else(|_| unreachable!("codes and exponents"));
        let codes = Codes::Halves { bytes: codes.bytes, high_first: false };
        Matrix::scaled(dims, codes, floats::e2m1_levels(), Groups::Grid { rows: 1, cols: BLOCK }, scale.floats())
    }

    fn scheme(&self, scale: Dtype) -> Option<Scheme> {
        Some(Scheme { element: Element::E2m1, group: (1, BLOCK), scale, zeros: false, global: None })
    }
}

impl Format for Mxfp4 {
    fn find(&self, context: &Context<'_>, main: &TensorInfo) -> Result<Vec<Packed>> {
        if main.dtype == Dtype::U8
            && let Some(stem) = main.name.strip_suffix("_blocks")
        {
            return fused(context, main, stem);
        }
        let (name, scale) = match (main.dtype, main.name.strip_suffix("_packed")) {
            (Dtype::U8, Some(weight)) if context.get(&format!("{}.weight_global_scale", module(weight))).is_none() => {
                (weight, context.get(&format!("{weight}_scale")))
            }
            (Dtype::I8, None) => {
                let names = [format!("{}_scale_inv", main.name), format!("{}.scale", module(&main.name))];
                let scale = names.iter().find_map(|name| context.get(name));
                (main.name.as_str(), scale.filter(|scale| matches!(scale.dtype, Dtype::F8_E8M0 | Dtype::U8)))
            }
            _ => return Ok(Vec::new()),
        };
        let Some(scale) = scale else { return Ok(Vec::new()) };
        let [rows, half] = main.shape[..] else { return Err(context.refused(main, "two dimensions")) };
        context.typed(scale, &[Dtype::U8, Dtype::F8_E8M0])?;
        context.shaped(scale, &[rows, (2 * half).div_ceil(BLOCK)], "one exponent per 32 elements")?;
        let found = Found {
            main,
            name: name.to_string(),
            shape: vec![rows, 2 * half],
            dims: (rows, 2 * half),
            stack: 1,
            first: 0,
            transposed: false,
            parts: vec![main.name.clone(), scale.name.clone()],
            format: "MXFP4",
            codec: Box::new(Blocks),
        };
        Ok(vec![context.packed(found)?])
    }
}

/// Experts of gpt-oss.
fn fused(context: &Context<'_>, main: &TensorInfo, stem: &str) -> Result<Vec<Packed>> {
    let [stack, rows, blocks, 16] = main.shape[..] else {
        return Err(context.refused(main, "shape [experts, rows, blocks, 16]"));
    };
    let scale = context.companion(main, &format!("{stem}_scales"), &[stack, rows, blocks], "one exponent per block")?;
    context.typed(scale, &[Dtype::U8])?;
    let cols = blocks * BLOCK;
    let found = Found {
        main,
        name: stem.to_string(),
        shape: vec![stack, cols, rows],
        dims: (rows, cols),
        stack,
        first: 0,
        transposed: true,
        parts: vec![main.name.clone(), scale.name.clone()],
        format: "MXFP4",
        codec: Box::new(Blocks),
    };
    Ok(vec![context.packed(found)?])
}

//! MLX: `X.weight` U32 `[.., rows, cols * bits / 32]`, each row a little-endian stream of codes, `X.scales` and
//! `X.biases` `[.., rows, groups]`.
//!
//! `affine`: code times scale plus bias. `mxfp4`: E2M1 with powers of two (U8) and without biases. Experts are stacked
//! under `switch_mlp` and are found here under `experts.N`, as the released model has them. `config.json` says bits and
//! group size, for all weights and for some by their path.

use safetensors::Dtype;
use serde_json::Value;

use super::matrix::{Codes, Groups, Matrix, Part};
use super::{Codec, Context, Format, Found, Packed, floats};
use crate::Result;
use crate::weights::TensorInfo;

/// The format.
pub(super) struct Mlx;

#[derive(Clone, Copy)]
struct Packing {
    bits: usize,
    group: usize,
    affine: bool,
}

impl Codec for Packing {
    fn open<'a>(&self, dims: (usize, usize), parts: Vec<Part<'a>>) -> Matrix<'a> {
        let mut parts = parts.into_iter();
        let mut next = || parts.next().unwrap_or_else(|| unreachable!("as many parts as were found"));
        let (codes, scales) = (next(), next().floats());
        let row_bytes = codes.bytes.len() / dims.0.max(1);
        let codes = Codes::Bits { bytes: codes.bytes, bits: self.bits, row_bytes };
        let groups = Groups::Grid { rows: 1, cols: self.group };
        if !self.affine {
            return Matrix::scaled(dims, codes, floats::e2m1_levels(), groups, scales);
        }
        let levels = (0..256).map(|code| code as f32).collect();
        Matrix { biases: next().floats(), ..Matrix::scaled(dims, codes, levels, groups, scales) }
    }
}

impl Format for Mlx {
    fn find(&self, context: &Context<'_>, main: &TensorInfo) -> Result<Vec<Packed>> {
        let Some(module) = main.name.strip_suffix(".weight").filter(|_| main.dtype == Dtype::U32) else {
            return Ok(Vec::new());
        };
        let Some(scales) = context.get(&format!("{module}.scales")) else { return Ok(Vec::new()) };
        // What the config says of a path goes before what it says of all.
        let own = &context.config[module];
        let whole = context.config;
        let number = |key: &str| own[key].as_u64().or(whole[key].as_u64()).map(|number| number as usize);
        let mode = own["mode"].as_str().or(if own.is_object() { Some("affine") } else { whole["mode"].as_str() });
        let (Some(bits), Some(group)) = (number("bits"), number("group_size")) else {
            return Err(context.refused(main, "`quantization` in config.json, with `bits` and `group_size`"));
        };
        let affine = match mode {
            None | Some("affine") => true,
            Some("mxfp4") if bits == 4 && group == 32 => false,
            Some(other) => {
                let reason =
                    format!("`quantization.mode` `affine` or `mxfp4`, not `{other}`: take the original checkpoint");
                return Err(context.refused(main, &reason));
            }
        };
        let (stack, [rows, words]) = match main.shape[..] {
            [rows, words] => (1, [rows, words]),
            [stack, rows, words] => (stack, [rows, words]),
            _ => return Err(context.refused(main, "two or three dimensions")),
        };
        if !(2..=8).contains(&bits) || group == 0 || !(32 * words).is_multiple_of(bits) {
            return Err(context.refused(main, &format!("2 to 8 bits in rows of {words} words, not {bits}")));
        }
        let cols = 32 * words / bits;
        let leading = &main.shape[..main.shape.len() - 2];
        let shape = [leading, &[rows, cols.div_ceil(group)]].concat();
        context.shaped(scales, &shape, "`quantization.group_size`")?;
        let mut parts = vec![main.name.clone(), scales.name.clone()];
        if affine {
            context.typed(scales, &[Dtype::BF16, Dtype::F16, Dtype::F32])?;
            let biases = context.companion(main, &format!("{module}.biases"), &shape, "`quantization.group_size`")?;
            context.typed(biases, &[Dtype::BF16, Dtype::F16, Dtype::F32])?;
            parts.push(biases.name.clone());
        } else {
            context.typed(scales, &[Dtype::U8])?;
        }
        let codec = Packing { bits, group, affine };
        let found = |name: String, shape: Vec<usize>, first: usize| Found {
            main,
            name,
            shape,
            dims: (rows, cols),
            stack,
            first,
            transposed: false,
            parts: parts.clone(),
            format: "MLX",
            codec: Box::new(codec),
        };
        match module.split_once(".switch_mlp.") {
            Some((block, part)) => {
                let expert = |number: usize| {
                    context.packed(found(format!("{block}.experts.{number}.{part}.weight"), vec![rows, cols], number))
                };
                (0..stack).map(expert).collect()
            }
            None => Ok(vec![context.packed(found(main.name.clone(), [leading, &[rows, cols]].concat(), 0))?]),
        }
    }
}

/// Whether a config is that of MLX, which names no method.
pub(super) fn is_entry(config: &Value) -> bool {
    config["quant_method"].is_null() && config["bits"].is_u64() && config["group_size"].is_u64()
}

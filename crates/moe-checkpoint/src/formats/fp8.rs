//! FP8: elements of E4M3, with a scale per block, per row or per tensor.
//!
//! `X.weight` F8_E4M3 with `X.weight_scale_inv` (DeepSeek, Qwen; a multiplier despite its name), `X.scale`
//! (DeepSeek-V4), `X.qscale_weight` (Mistral) or `X.weight_scale` (compressed-tensors, ModelOpt). Tensors of fused
//! experts `[E, rows, cols]` have `_scale_inv` after their whole name. Scales are F32, F16, BF16, or powers of two
//! (F8_E8M0, U8).

use safetensors::Dtype;

use super::matrix::{Codes, Groups, Matrix, Part};
use super::scheme::{Element, Scheme};
use super::{Codec, Context, Format, Found, Packed, compressed, floats, module};
use crate::Result;
use crate::weights::TensorInfo;

/// The format.
pub(super) struct Fp8;

/// Rows and columns of a block.
struct Blocks {
    rows: usize,
    cols: usize,
}

impl Codec for Blocks {
    fn open<'a>(&self, dims: (usize, usize), parts: Vec<Part<'a>>) -> Matrix<'a> {
        let [codes, scale] = <[Part<'a>; 2]>::try_from(parts).unwrap_or_else(|_| unreachable!("codes and scales"));
        let groups = Groups::Grid { rows: self.rows, cols: self.cols };
        Matrix::scaled(dims, Codes::Bytes(codes.bytes), floats::e4m3_levels(), groups, scale.floats())
    }

    fn scheme(&self, scale: Dtype) -> Option<Scheme> {
        let group = (self.rows, self.cols);
        Some(Scheme { element: Element::E4m3, group, scale, zeros: false, global: None })
    }
}

/// Dtypes of scales.
const SCALES: [Dtype; 5] = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8_E8M0, Dtype::U8];

impl Format for Fp8 {
    fn find(&self, context: &Context<'_>, main: &TensorInfo) -> Result<Vec<Packed>> {
        if main.dtype != Dtype::F8_E4M3 {
            return Ok(Vec::new());
        }
        let module = module(&main.name);
        let names = [
            format!("{}_scale_inv", main.name),
            format!("{module}.scale"),
            format!("{module}.qscale_weight"),
            format!("{module}.weight_scale"),
        ];
        let Some(scale) = names.iter().find_map(|name| context.get(name)) else { return Ok(Vec::new()) };
        let (stack, [rows, cols]) = match main.shape[..] {
            [rows, cols] => (1, [rows, cols]),
            [stack, rows, cols] => (stack, [rows, cols]),
            _ => return Err(context.refused(main, "two or three dimensions")),
        };
        context.typed(scale, &SCALES)?;
        let fields = "`quantization_config.weight_block_size`";
        let stacked = |shape: &[usize]| if main.shape.len() == 3 { [&[stack], shape].concat() } else { shape.to_vec() };
        let block = block(context);
        let grid = |[height, width]: [usize; 2]| stacked(&[rows.div_ceil(height), cols.div_ceil(width)]);
        let [height, width] = match (block, &scale.shape[..]) {
            // Microscaling: a power of two per 32 inputs.
            _ if scale.dtype == Dtype::U8 && scale.shape == grid([1, 32]) => [1, 32],
            (Some(block), shape) if shape == grid(block) => block,
            // One per matrix or one per row, by their shapes.
            (_, shape) if shape.iter().product::<usize>() == stack => [usize::MAX, usize::MAX],
            (_, shape) if shape == stacked(&[rows, 1]) || shape == stacked(&[rows]) => [1, usize::MAX],
            (Some(block), _) => {
                context.shaped(scale, &grid(block), fields)?;
                block
            }
            (None, _) => {
                let reason = format!("{fields}, without which scales of shape {:?} cannot be placed", scale.shape);
                return Err(context.refused(main, &reason));
            }
        };
        let found = Found {
            main,
            name: main.name.clone(),
            shape: main.shape.clone(),
            dims: (rows, cols),
            stack,
            first: 0,
            transposed: false,
            parts: vec![main.name.clone(), scale.name.clone()],
            format: "FP8",
            codec: Box::new(Blocks { rows: height, cols: width }),
        };
        Ok(vec![context.packed(found)?])
    }
}

/// Block sides that the config has.
fn block(context: &Context<'_>) -> Option<[usize; 2]> {
    let sides = |value: &serde_json::Value| {
        let sides: Vec<usize> =
            value.as_array()?.iter().filter_map(|side| side.as_u64()).map(|side| side as usize).collect();
        <[usize; 2]>::try_from(sides).ok().filter(|sides| sides.iter().all(|side| *side > 0))
    };
    let of_groups = || compressed::weights(context.config).find_map(|weights| sides(&weights["block_structure"]));
    sides(&context.config["weight_block_size"]).or_else(of_groups)
}

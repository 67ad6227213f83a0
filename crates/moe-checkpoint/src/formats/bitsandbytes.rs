//! bitsandbytes: NF4 and FP4 (arXiv 2305.14314), int8 (arXiv 2208.07339).
//!
//! 4 bits: `X.weight` holds the codes of the flattened matrix, two per byte, the high half first, in whatever dtype;
//! `.absmax` the scale of every run of 64 elements (F32, or U8 where scales are quantized themselves, with
//! `.nested_absmax`, `.nested_quant_map` and an offset); `.quant_map` F32 `[16]` the values of the codes;
//! `.quant_state.bitsandbytes__nf4` or `__fp4` a JSON text with the shape. 8 bits: `X.weight` I8, `X.SCB` F32 `[rows]`,
//! the largest magnitude of a row.

use safetensors::Dtype;
use serde_json::Value;

use super::integers::signed_levels;
use super::matrix::{Codes, Groups, Matrix, Part};
use super::scheme::{Element, Scheme};
use super::{Codec, Context, Format, Found, Packed, module};
use crate::Result;
use crate::weights::TensorInfo;

/// The format.
pub(super) struct BitsAndBytes;

/// Elements that share a scale in what is written.
pub(crate) const BLOCK: usize = 64;

/// NF4 with an F32 scale per run of so many elements.
pub(crate) fn nf4(length: usize) -> Scheme {
    Scheme { element: Element::Nf4, group: (1, length), scale: Dtype::F32, zeros: false, global: None }
}

/// One over 127, as bitsandbytes has it.
const PER_CODE: f32 = 7.874_016e-3;

/// 4-bit codes in runs of the flattened matrix.
struct Runs {
    length: usize,
    /// Whether codes are those of NF4.
    nf4: bool,
    nested: Option<Nested>,
}

/// Scales that are quantized.
struct Nested {
    length: usize,
    offset: f32,
}

impl Codec for Runs {
    fn open<'a>(&self, dims: (usize, usize), parts: Vec<Part<'a>>) -> Matrix<'a> {
        let mut parts = parts.into_iter();
        let mut next = || parts.next().unwrap_or_else(|| unreachable!("as many parts as were found"));
        let (codes, map, absmax) = (next(), next().floats(), next());
        let scales = match &self.nested {
            None => absmax.floats(),
            Some(nested) => {
                let (outer, values) = (next().floats(), next().floats());
                let scale = |(index, code): (usize, &u8)| {
                    values[usize::from(*code)] * outer[index / nested.length] + nested.offset
                };
                absmax.bytes.iter().enumerate().map(scale).collect()
            }
        };
        let levels = (0..256).map(|code| map[code % 16]).collect();
        let codes = Codes::Halves { bytes: codes.bytes, high_first: true };
        Matrix::scaled(dims, codes, levels, Groups::Runs(self.length), scales)
    }

    fn scheme(&self, scale: Dtype) -> Option<Scheme> {
        // The second stored tensor is the table of values; scales that are quantized themselves are read only.
        let _ = scale;
        (self.nested.is_none() && self.nf4).then(|| nf4(self.length))
    }
}

struct Rows;

impl Codec for Rows {
    fn open<'a>(&self, dims: (usize, usize), parts: Vec<Part<'a>>) -> Matrix<'a> {
        let [codes, scale] = <[Part<'a>; 2]>::try_from(parts).unwrap_or_else(|_| unreachable!("codes and scales"));
        let groups = Groups::Grid { rows: 1, cols: dims.1.max(1) };
        let matrix = Matrix::scaled(dims, Codes::Bytes(codes.bytes), signed_levels(), groups, scale.floats());
        Matrix { factor: PER_CODE, ..matrix }
    }
}

impl Format for BitsAndBytes {
    fn find(&self, context: &Context<'_>, main: &TensorInfo) -> Result<Vec<Packed>> {
        if let Some(absmax) = context.get(&format!("{}.absmax", main.name)) {
            return four_bits(context, main, absmax);
        }
        let module = module(&main.name);
        let Some(scale) = context.get(&format!("{module}.SCB")).filter(|_| main.dtype == Dtype::I8) else {
            return Ok(Vec::new());
        };
        let [rows, cols] = main.shape[..] else { return Err(context.refused(main, "two dimensions")) };
        context.typed(scale, &[Dtype::F32])?;
        context.shaped(scale, &[rows], "one scale per row")?;
        let tiles = context.get(&format!("{module}.weight_format"));
        if let Some(tiles) = tiles
            && (context.read)(tiles)?.iter().any(|byte| *byte != 0)
        {
            return Err(context.refused(tiles, "0, rows: other orders are those of old GPUs; save the model again"));
        }
        let found = Found {
            main,
            name: main.name.clone(),
            shape: main.shape.clone(),
            dims: (rows, cols),
            stack: 1,
            first: 0,
            transposed: false,
            parts: vec![main.name.clone(), scale.name.clone()],
            format: "bitsandbytes int8",
            codec: Box::new(Rows),
        };
        let mut packed = context.packed(found)?;
        packed.bytes += tiles.map_or(0, |info| info.bytes);
        packed.others.extend(tiles.map(|info| info.name.clone()));
        Ok(vec![packed])
    }
}

fn four_bits(context: &Context<'_>, main: &TensorInfo, absmax: &TensorInfo) -> Result<Vec<Packed>> {
    let name = |ending: &str| format!("{}.{ending}", main.name);
    let states = ["nf4", "fp4"].map(|kind| name(&format!("quant_state.bitsandbytes__{kind}")));
    let Some(state) = states.iter().find_map(|name| context.get(name)) else {
        return Err(context.lacks(main, &format!("`{}`", states[0])));
    };
    let json: Value = serde_json::from_slice(&(context.read)(state)?).unwrap_or_default();
    let number = |key: &str| json[key].as_u64().filter(|number| *number > 0).map(|number| number as usize);
    let shape: Vec<usize> =
        json["shape"].as_array().into_iter().flatten().filter_map(Value::as_u64).map(|size| size as usize).collect();
    let ([rows, cols], Some(length)) = (&shape[..], number("blocksize")) else {
        return Err(context.refused(state, "a JSON text with `shape` and `blocksize`"));
    };
    let elements = rows.checked_mul(*cols).unwrap_or(usize::MAX);
    if main.bytes != elements.div_ceil(2) as u64 {
        return Err(context.refused(main, &format!("{} bytes for shape {shape:?}", elements.div_ceil(2))));
    }
    let map = context.companion(main, &name("quant_map"), &[16], "one value per code")?;
    context.typed(map, &[Dtype::F32])?;
    let runs = elements.div_ceil(length);
    context.shaped(absmax, &[runs], "one scale per block of `blocksize` elements")?;
    let mut parts = vec![main.name.clone(), map.name.clone(), absmax.name.clone()];
    let nested = match absmax.dtype {
        Dtype::U8 => {
            let (Some(length), Some(offset)) = (number("nested_blocksize"), json["nested_offset"].as_f64()) else {
                return Err(context.refused(state, "`nested_blocksize` and `nested_offset`"));
            };
            let outer =
                context.companion(main, &name("nested_absmax"), &[runs.div_ceil(length)], "one per block of scales")?;
            let values = context.companion(main, &name("nested_quant_map"), &[256], "one value per code of a scale")?;
            context.typed(outer, &[Dtype::F32])?;
            context.typed(values, &[Dtype::F32])?;
            parts.extend([outer.name.clone(), values.name.clone()]);
            Some(Nested { length, offset: offset as f32 })
        }
        _ => {
            context.typed(absmax, &[Dtype::F32, Dtype::U8])?;
            None
        }
    };
    let found = Found {
        main,
        name: main.name.clone(),
        shape: shape.clone(),
        dims: (*rows, *cols),
        stack: 1,
        first: 0,
        transposed: false,
        parts,
        format: if state.name.ends_with("nf4") { "bitsandbytes NF4" } else { "bitsandbytes FP4" },
        codec: Box::new(Runs { length, nf4: state.name.ends_with("nf4"), nested }),
    };
    let mut packed = context.packed(found)?;
    packed.bytes += state.bytes;
    packed.others.push(state.name.clone());
    Ok(vec![packed])
}

//! NVFP4: elements of E2M1, an E4M3 scale per 16 of them and an F32 scale per matrix.
//!
//! compressed-tensors: `X.weight_packed` U8 `[rows, cols / 2]`, `X.weight_scale` F8_E4M3 `[rows, cols / 16]`,
//! `X.weight_global_scale` F32 `[1]`, a divisor. ModelOpt: `X.weight` U8, `X.weight_scale`, `X.weight_scale_2` F32
//! `[]`, a multiplier.

use safetensors::Dtype;

use super::matrix::{Codes, Groups, Matrix, Part};
use super::scheme::{Element, Global, Scheme};
use super::{Codec, Context, Format, Found, Packed, floats, module};
use crate::Result;
use crate::weights::TensorInfo;

/// The format, under both names.
pub(super) struct Nvfp4;

/// Elements that share an E4M3 scale.
pub(crate) const GROUP: usize = 16;

struct Grouped {
    /// Whether the scale of the matrix divides.
    divides: bool,
}

impl Codec for Grouped {
    fn open<'a>(&self, dims: (usize, usize), parts: Vec<Part<'a>>) -> Matrix<'a> {
        let [codes, scale, global] =
            <[Part<'a>; 3]>::try_from(parts).unwrap_or_else(|_| unreachable!("codes and two scales"));
        let global = global.floats().first().copied().unwrap_or(f32::NAN);
        let scales = scale.floats().into_iter();
        let scales = match self.divides {
            true => scales.map(|scale| scale / global).collect(),
            false => scales.map(|scale| scale * global).collect(),
        };
        let codes = Codes::Halves { bytes: codes.bytes, high_first: false };
        let mut levels = floats::e2m1_levels();
        if !self.divides {
            // The table of ModelOpt has no negative zero.
            levels.iter_mut().filter(|level| **level == 0.0).for_each(|level| *level = 0.0);
        }
        Matrix::scaled(dims, codes, levels, Groups::Grid { rows: 1, cols: GROUP }, scales)
    }

    fn scheme(&self, scale: Dtype) -> Option<Scheme> {
        let global = Some(if self.divides { Global::Divides } else { Global::Multiplies });
        Some(Scheme { element: Element::E2m1, group: (1, GROUP), scale, zeros: false, global })
    }
}

impl Format for Nvfp4 {
    fn find(&self, context: &Context<'_>, main: &TensorInfo) -> Result<Vec<Packed>> {
        if main.dtype != Dtype::U8 {
            return Ok(Vec::new());
        }
        let name = main.name.strip_suffix("_packed").unwrap_or(&main.name);
        let divides = name != main.name;
        let global = match divides {
            true => format!("{name}_global_scale"),
            false => format!("{name}_scale_2"),
        };
        let Some(global) = context.get(&global).filter(|_| module(name) != name) else { return Ok(Vec::new()) };
        let [rows, half] = main.shape[..] else { return Err(context.refused(main, "two dimensions")) };
        context.typed(global, &[Dtype::F32])?;
        if global.elements() != 1 {
            context.shaped(global, &[1], "one scale per matrix")?;
        }
        let shape = [rows, (2 * half).div_ceil(GROUP)];
        let scale = context.companion(main, &format!("{name}_scale"), &shape, "one scale per 16 elements")?;
        context.typed(scale, &[Dtype::F8_E4M3])?;
        let found = Found {
            main,
            name: name.to_string(),
            shape: vec![rows, 2 * half],
            dims: (rows, 2 * half),
            stack: 1,
            first: 0,
            transposed: false,
            parts: vec![main.name.clone(), scale.name.clone(), global.name.clone()],
            format: "NVFP4",
            codec: Box::new(Grouped { divides }),
        };
        Ok(vec![context.packed(found)?])
    }
}

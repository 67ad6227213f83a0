//! Quantized weights: one file per format.
//!
//! A format says which tensors a weight is stored as, whatever lists of modules a config has: a weight with companions
//! (scales, zero points, exponents) is quantized, one without is dense. The config gives what tensors do not show
//! (block sizes, versions), and the two are checked against each other. What is read is a [`Matrix`] of codes and of
//! parameters of groups, whatever the format.

mod awq;
pub(crate) mod bitsandbytes;
pub(crate) mod compressed;
mod config;
pub(crate) mod floats;
mod fp8;
mod gptq;
mod integers;
pub(crate) mod matrix;
mod mlx;
pub(crate) mod mxfp4;
pub(crate) mod nvfp4;
pub(crate) mod scheme;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use safetensors::Dtype;
use serde_json::Value;

pub use config::Quantization;
pub(crate) use config::{READ, quantization};

use crate::experts::Placement;
use crate::shard_layout::TensorSpec;
use crate::weights::TensorInfo;
use crate::{Error, Result};

use matrix::{Matrix, Part, Rows};
use scheme::{Parted, Scheme};

/// A format of quantized weights.
trait Format: Sync {
    /// The weights that `main`, a stored tensor, holds the codes of; none if it is not of this format.
    ///
    /// # Errors
    /// Companions of other shapes or dtypes than the format has, and what the format can be but is not read.
    fn find(&self, context: &Context<'_>, main: &TensorInfo) -> Result<Vec<Packed>>;
}

const FORMATS: [&dyn Format; 9] = [
    &mxfp4::Mxfp4,
    &nvfp4::Nvfp4,
    &integers::PackQuantized,
    &integers::IntQuantized,
    &fp8::Fp8,
    &gptq::Gptq,
    &awq::Awq,
    &bitsandbytes::BitsAndBytes,
    &mlx::Mlx,
];

/// How the stored tensors of one weight become a matrix.
pub(crate) trait Codec: Send + Sync {
    /// The matrix `[rows, cols]` of these stored tensors, in the order of [`Packed::parts`].
    fn open<'a>(&self, dims: (usize, usize), parts: Vec<Part<'a>>) -> Matrix<'a>;

    /// How matrices of this format are made, whose scales are stored in this dtype; `None` for a format that is read
    /// only.
    fn scheme(&self, scale: Dtype) -> Option<Scheme> {
        let _ = scale;
        None
    }
}

/// One quantized weight: the tensor that it is without quantization, and where it is stored.
pub(crate) struct Packed {
    /// Name, dtype (BF16) and shape without quantization.
    pub info: TensorInfo,
    /// Name of the format.
    pub format: &'static str,
    /// Stored tensors that the codec reads, in its order.
    pub parts: Vec<String>,
    /// Stored tensors that go with the weight and say nothing about its values.
    pub others: Vec<String>,
    /// Matrices that every stored tensor holds, along its first dimension; 1 for a tensor per matrix.
    pub stack: usize,
    /// The first of them that belongs to this weight.
    pub first: usize,
    /// Rows and columns of one matrix as it is stored: outputs and inputs.
    pub dims: (usize, usize),
    /// Whether the tensor without quantization holds the transposes.
    pub transposed: bool,
    /// Bytes of all stored tensors of this weight.
    pub bytes: u64,
    /// Dtype of its scales.
    scale: Dtype,
    codec: Box<dyn Codec>,
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packed").field("info", &self.info).field("format", &self.format).finish_non_exhaustive()
    }
}

impl Packed {
    /// Matrices that this weight holds.
    pub fn count(&self) -> usize {
        (self.info.elements() as usize).checked_div(self.dims.0 * self.dims.1).unwrap_or(0)
    }

    /// One of its matrices, from the bytes of the stored tensors.
    pub fn open<'a>(
        &self,
        matrix: usize,
        mut read: impl FnMut(&str, usize, usize) -> Result<Part<'a>>,
    ) -> Result<Matrix<'a>> {
        let number = self.first + matrix;
        let parts = self.parts.iter().map(|name| read(name, number, self.stack)).collect::<Result<Vec<_>>>()?;
        Ok(self.codec.open(self.dims, parts))
    }

    /// How its matrices are made; `None` for a format that is read only.
    pub fn scheme(&self) -> Option<Scheme> {
        self.codec.scheme(self.scale)
    }

    /// Codes and parameters of one of its matrices; `None` for a format that is read only.
    pub fn parted<'a>(
        &self,
        matrix: usize,
        mut read: impl FnMut(&str, usize, usize) -> Result<Part<'a>>,
    ) -> Result<Option<Parted>> {
        let Some(scheme) = self.scheme() else { return Ok(None) };
        let number = self.first + matrix;
        let parts = self.parts.iter().map(|name| read(name, number, self.stack)).collect::<Result<Vec<_>>>()?;
        let scales = parts.get(1).map_or_else(Vec::new, Part::floats);
        let global = scheme.global.and_then(|_| parts.get(2)?.floats().first().copied());
        Ok(Some(Parted::of(&self.codec.open(self.dims, parts), scales, global)))
    }

    /// The matrix and the rows of it that a part of the tensor without quantization is; `None` for a part that is no
    /// set of whole rows.
    pub fn rows(&self, place: &Placement) -> Option<(usize, Rows)> {
        let (rows, cols) = self.dims;
        let one = (rows * cols).max(1);
        let (matrix, offset) = (place.start / one, place.start % one);
        let step = |stride: usize| if place.rows <= 1 { 1 } else { stride };
        if self.transposed {
            let whole = place.cols == cols && (place.col_stride == rows || cols <= 1) && offset < rows.max(1);
            return whole.then(|| (matrix, Rows { first: offset, step: step(place.row_stride), count: place.rows }));
        }
        let whole = place.cols == cols
            && (place.col_stride == 1 || cols <= 1)
            && offset.is_multiple_of(cols.max(1))
            && (place.rows <= 1 || place.row_stride.is_multiple_of(cols.max(1)));
        let first = offset / cols.max(1);
        whole.then(|| (matrix, Rows { first, step: step(place.row_stride / cols.max(1)), count: place.rows }))
    }

    /// The error of values that are no numbers.
    pub fn no_number(&self) -> Error {
        Error::NotANumber { file: self.info.file.to_path_buf(), tensor: self.info.name.clone(), format: self.format }
    }
}

/// What a weight is made of, as a [`Format`] finds it.
struct Found<'a> {
    /// The tensor that holds the codes.
    main: &'a TensorInfo,
    /// Name without quantization.
    name: String,
    /// Shape without quantization.
    shape: Vec<usize>,
    /// Rows and columns of one matrix as stored.
    dims: (usize, usize),
    /// Matrices in every stored tensor.
    stack: usize,
    first: usize,
    transposed: bool,
    parts: Vec<String>,
    format: &'static str,
    codec: Box<dyn Codec>,
}

/// All tensors of a checkpoint, and what its config says of quantization.
pub(crate) struct Context<'a> {
    pub tensors: &'a BTreeMap<String, TensorInfo>,
    /// `quantization_config`, of whatever place; null where there is none.
    pub config: &'a Value,
    /// Reads a whole small tensor: shapes and states that headers do not show.
    pub read: &'a dyn Fn(&TensorInfo) -> Result<Vec<u8>>,
}

/// Endings of tensors that go with a weight and say nothing about its values: scales of activations and of caches.
const BESIDE: [&str; 9] = [
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".activation_scale",
    ".qscale_act",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".kv_scale",
];

/// Endings of tensors that change what a weight means and are not read, with what to do.
const REFUSED: [(&str, &str); 3] = [
    (
        ".pre_quant_scale",
        "inputs are scaled before the product: fold the scales into the weights with NVIDIA ModelOpt, or take the original checkpoint",
    ),
    (".svdquant_lora_a", "SVDQuant keeps a low-rank part beside the weight: take the original checkpoint"),
    (".weight_bitmask", "2:4 sparse weights: decompress them with compressed-tensors, or take the original checkpoint"),
];

impl<'a> Context<'a> {
    /// A companion by its name, if it is there.
    fn get(&self, name: &str) -> Option<&'a TensorInfo> {
        self.tensors.get(name)
    }

    /// A companion that must be there, of this shape.
    fn companion(&self, main: &TensorInfo, name: &str, shape: &[usize], fields: &str) -> Result<&'a TensorInfo> {
        let Some(info) = self.get(name) else {
            return Err(self.lacks(main, &format!("`{name}`")));
        };
        self.shaped(info, shape, fields)?;
        Ok(info)
    }

    fn shaped(&self, info: &TensorInfo, shape: &[usize], fields: &str) -> Result<()> {
        if info.shape == shape {
            return Ok(());
        }
        Err(Error::UnexpectedShape {
            file: info.file.to_path_buf(),
            tensor: info.name.clone(),
            found: info.shape.clone(),
            expected: shape.to_vec(),
            fields: fields.to_string().into(),
        })
    }

    fn typed(&self, info: &TensorInfo, allowed: &[Dtype]) -> Result<()> {
        if allowed.contains(&info.dtype) {
            return Ok(());
        }
        let names: Vec<String> = allowed.iter().map(|dtype| format!("{dtype}")).collect();
        Err(Error::UnsupportedDtype {
            file: info.file.to_path_buf(),
            tensor: info.name.clone(),
            found: info.dtype,
            expected: names.join(", "),
        })
    }

    fn lacks(&self, main: &TensorInfo, what: &str) -> Error {
        quantized_tensor(main, &format!("{what} beside it"))
    }

    /// A refusal that names the tensor.
    fn refused(&self, main: &TensorInfo, reason: &str) -> Error {
        quantized_tensor(main, reason)
    }

    /// The weight of what was found.
    fn packed(&self, found: Found<'_>) -> Result<Packed> {
        let spec = TensorSpec { name: found.name, dtype: Dtype::BF16, shape: found.shape };
        let info = TensorInfo::made(spec, &found.main.file)?;
        let module = module(&info.name);
        let beside = BESIDE.iter().map(|ending| format!("{module}{ending}"));
        let others: Vec<String> = beside.filter(|name| self.tensors.contains_key(name)).collect();
        let size = |name: &String| self.get(name).map_or(0, |info| info.bytes);
        let one = (found.dims.0 * found.dims.1).max(1);
        let count = info.elements() / one as u64;
        let share = |bytes: u64| bytes * count.max(1) / found.stack.max(1) as u64;
        let bytes =
            found.parts.iter().map(|name| share(size(name))).sum::<u64>() + others.iter().map(size).sum::<u64>();
        let scale = found.parts.get(1).and_then(|name| self.get(name)).map_or(Dtype::F32, |info| info.dtype);
        Ok(Packed {
            scale,
            info,
            format: found.format,
            parts: found.parts,
            others,
            stack: found.stack,
            first: found.first,
            dims: found.dims,
            transposed: found.transposed,
            bytes,
            codec: found.codec,
        })
    }
}

/// The name of a module, from the name of its weight.
pub(crate) fn module(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

/// The refusal of a quantized tensor.
pub(crate) fn quantized_tensor(info: &TensorInfo, expected: &str) -> Error {
    Error::QuantisedTensor {
        file: info.file.to_path_buf(),
        tensor: info.name.clone(),
        found: info.dtype,
        expected: expected.to_string(),
    }
}

/// The quantized weights of a checkpoint.
#[derive(Default)]
pub(crate) struct Collected {
    /// By the names that they have without quantization.
    pub weights: BTreeMap<String, Packed>,
    /// Stored tensors that a checkpoint without quantization does not have under the same name.
    pub companions: BTreeSet<String>,
}

/// Finds the quantized weights among the tensors of a checkpoint.
///
/// # Errors
/// What [`Format::find`] refuses, and tensors that change what a weight means in a way that is not read.
pub(crate) fn collect(context: &Context<'_>) -> Result<Collected> {
    let mut out = Collected::default();
    let plain = |info: &TensorInfo| matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::BOOL);
    if context.tensors.values().all(plain) {
        return Ok(out);
    }
    for info in context.tensors.values() {
        for (ending, reason) in REFUSED {
            if info.name.ends_with(ending) {
                return Err(context.refused(info, reason));
            }
        }
        for format in FORMATS {
            let found = format.find(context, info)?;
            if found.is_empty() {
                continue;
            }
            for weight in found {
                let stored = weight.parts.iter().chain(&weight.others).filter(|name| **name != weight.info.name);
                out.companions.extend(stored.cloned());
                out.weights.insert(weight.info.name.clone(), weight);
            }
            break;
        }
    }
    if !out.weights.is_empty() {
        let beside = |name: &&String| BESIDE.iter().any(|ending| name.ends_with(ending));
        out.companions.extend(context.tensors.keys().filter(beside).cloned());
    }
    Ok(out)
}

/// What a config says of quantization, of whatever place: that of the whole, that of the text model, that of MLX.
pub(crate) fn entry(config: &Value) -> &Value {
    let places =
        [&config["quantization_config"], &config["text_config"]["quantization_config"], &config["quantization"]];
    places.into_iter().find(|value| value.as_object().is_some_and(|object| !object.is_empty())).unwrap_or(&Value::Null)
}

/// A range of the bytes of a stored tensor that belongs to one of its `stack` matrices.
pub(crate) fn share(bytes: usize, matrix: usize, stack: usize) -> std::ops::Range<usize> {
    let one = bytes / stack.max(1);
    matrix * one..(matrix + 1) * one
}

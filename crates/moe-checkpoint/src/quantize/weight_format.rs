//! The formats that weights are written in.

use std::fmt;
use std::str::FromStr;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::formats::scheme::{Element, Global, Scheme};
use crate::formats::{bitsandbytes, floats, mxfp4, nvfp4};
use crate::shard_layout::TensorSpec;
use crate::{Error, Result};

/// A format that weights are written in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum WeightFormat {
    /// FP8 (E4M3) with an F32 scale per block, as DeepSeek-V3 and Qwen3 are released: quantization method `fp8`.
    Fp8Blocks {
        /// Rows and columns of a block; 128 x 128 is what engines have kernels for.
        #[serde(default = "block")]
        block: [usize; 2],
    },
    /// FP8 (E4M3) with a BF16 scale per row, activations per token: `FP8_DYNAMIC` of compressed-tensors.
    Fp8Channels,
    /// MXFP4 (OCP Microscaling): 4-bit floats with a power of two per 32. In the layout of gpt-oss for `gpt_oss`, of
    /// compressed-tensors elsewhere.
    Mxfp4,
    /// Integers of 2, 4, 6 or 8 bits with a BF16 scale per group: `pack-quantized` of compressed-tensors (W4A16,
    /// W8A16).
    Int {
        /// Bits of a code: 2, 4, 6 or 8; 4 and 8 are what engines have kernels for.
        bits: usize,
        /// Columns that share a scale; none for whole rows.
        #[serde(default = "group")]
        group_size: Option<usize>,
        /// Whether zero is the middle of the codes, without zero points.
        #[serde(default = "yes")]
        symmetric: bool,
    },
    /// Ternary: -1, 0 or 1 times the mean magnitude of the matrix (BitNet b1.58, arXiv 2402.17764), as `pack-quantized`
    /// integers of 2 bits whose rows all have one BF16 scale. What experts that were trained so
    /// (MoTE, arXiv 2506.14435) are packed in; others lose too much.
    Ternary,
    /// NF4 (QLoRA, arXiv 2305.14314): 4-bit quantiles of a normal distribution with an F32 scale per 64 elements, as
    /// bitsandbytes stores them. Read by engines outside experts alone: what a base of fine-tuning is held in.
    Nf4,
    /// NVFP4: 4-bit floats with an E4M3 scale per 16 and an F32 scale per matrix: `nvfp4-pack-quantized` of
    /// compressed-tensors.
    Nvfp4,
}

fn block() -> [usize; 2] {
    [128, 128]
}

fn group() -> Option<usize> {
    Some(128)
}

fn yes() -> bool {
    true
}

/// Names of formats with their usual parameters.
pub(crate) const NAMES: [&str; 9] =
    ["fp8_blocks", "fp8_channels", "mxfp4", "int4", "int6", "int8", "nvfp4", "nf4", "ternary"];

impl FromStr for WeightFormat {
    type Err = Error;

    /// A name (`fp8_blocks`, `fp8_channels`, `mxfp4`, `int4`, `int6`, `int8`, `nvfp4`, `nf4`,
    /// `ternary`), or the format as JSON.
    fn from_str(text: &str) -> Result<Self> {
        let refused = |reason: String| Error::Quantize { format: text.chars().take(80).collect(), reason };
        let integers = |bits| Self::Int { bits, group_size: group(), symmetric: true };
        let format = match text.trim() {
            "fp8_blocks" => Self::Fp8Blocks { block: block() },
            "fp8_channels" => Self::Fp8Channels,
            "mxfp4" => Self::Mxfp4,
            "int4" => integers(4),
            "int6" => integers(6),
            "int8" => integers(8),
            "nvfp4" => Self::Nvfp4,
            "nf4" => Self::Nf4,
            "ternary" => Self::Ternary,
            json if json.starts_with('{') => serde_json::from_str(json).map_err(|error| refused(error.to_string()))?,
            _ => {
                let names = NAMES.join(", ");
                return Err(refused(format!(
                    "expected one of {names}, or JSON such as {{\"type\": \"int\", \"bits\": 4, \"group_size\": 32}}"
                )));
            }
        };
        format.check().map_err(refused)?;
        Ok(format)
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fp8Blocks { block: [rows, cols] } => write!(f, "FP8 in blocks of {rows} x {cols}"),
            Self::Fp8Channels => f.write_str("FP8 with a scale per row"),
            Self::Mxfp4 => f.write_str("MXFP4"),
            Self::Int { bits, group_size, symmetric } => {
                let kind = if *symmetric { "symmetric" } else { "asymmetric" };
                match group_size {
                    Some(size) => write!(f, "{kind} int{bits} in groups of {size}"),
                    None => write!(f, "{kind} int{bits} with a scale per row"),
                }
            }
            Self::Nvfp4 => f.write_str("NVFP4"),
            Self::Nf4 => f.write_str("NF4"),
            Self::Ternary => f.write_str("ternary"),
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A stored tensor of a weight.
pub(super) enum StoredPart {
    /// By its position in what a scheme packs.
    Made(usize),
    /// The same whatever the weight holds.
    Constant(Vec<u8>),
}

impl WeightFormat {
    /// Why the parameters are none that the format has.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        match self {
            Self::Fp8Blocks { block } if block.contains(&0) => Err(format!("blocks of {block:?} elements")),
            Self::Int { bits, .. } if ![2, 4, 6, 8].contains(bits) => {
                Err(format!("{bits} bits; expected 4 or 8, or 2 or 6, which compressed-tensors reads from 0.20 on"))
            }
            Self::Int { group_size: Some(size), bits, .. } if *size == 0 || !(size * bits).is_multiple_of(32) => {
                Err(format!("groups of {size}; expected whole 32-bit words, a multiple of {}", 32 / gcd(32, *bits)))
            }
            _ => Ok(()),
        }
    }

    /// What to do about sides that do not fit.
    pub(super) fn way_out(&self) -> &'static str {
        match self {
            Self::Fp8Blocks { .. } => "give a `block` that divides both sides, or choose `fp8_channels`",
            Self::Int { .. } => "give a `group_size` that divides the columns, or null for one scale per row",
            _ => "choose a format whose groups divide the columns, such as `fp8_channels`",
        }
    }

    /// The values of a matrix `[rows, cols]` as [`WeightFormat::Ternary`] keeps them, in BF16: every matrix has such a
    /// form.
    pub fn ternary(values: &[f32], cols: usize) -> Vec<f32> {
        let scheme = Self::Ternary.scheme();
        let rows = values.len().checked_div(cols).unwrap_or(0);
        let decoded = scheme.decode(&scheme.encode(values, (rows, cols)));
        decoded.into_iter().map(|value| half::bf16::from_f32(value).to_f32()).collect()
    }

    pub(super) fn scheme(&self) -> Scheme {
        let plain =
            Scheme { element: Element::E4m3, group: (1, usize::MAX), scale: Dtype::BF16, zeros: false, global: None };
        match self {
            Self::Fp8Blocks { block: [rows, cols] } => Scheme { group: (*rows, *cols), scale: Dtype::F32, ..plain },
            Self::Fp8Channels => plain,
            Self::Mxfp4 => Scheme { element: Element::E2m1, group: (1, mxfp4::BLOCK), scale: Dtype::U8, ..plain },
            Self::Int { bits, group_size, symmetric } => Scheme {
                element: Element::Integer(*bits),
                group: (1, group_size.unwrap_or(usize::MAX)),
                zeros: !symmetric,
                ..plain
            },
            Self::Nf4 => bitsandbytes::nf4(bitsandbytes::BLOCK),
            Self::Ternary => Scheme { element: Element::Ternary, ..plain },
            Self::Nvfp4 => Scheme {
                element: Element::E2m1,
                group: (1, nvfp4::GROUP),
                scale: Dtype::F8_E4M3,
                global: Some(Global::Divides),
                ..plain
            },
        }
    }

    /// The stored tensors of a weight; several matrices are those of the fused layout of gpt-oss.
    pub(super) fn stored(
        &self,
        name: &str,
        (rows, cols): (usize, usize),
        stack: usize,
    ) -> Vec<(TensorSpec, StoredPart)> {
        let scheme = self.scheme();
        let (bands, across) = scheme.groups((rows, cols));
        let spec = |ending: &str, dtype, shape| TensorSpec { name: format!("{name}{ending}"), dtype, shape };
        let made = |part| move |spec| (spec, StoredPart::Made(part));
        match self {
            Self::Fp8Blocks { .. } => vec![
                made(0)(spec("", Dtype::F8_E4M3, vec![rows, cols])),
                made(1)(spec("_scale_inv", scheme.scale, vec![bands, across])),
            ],
            Self::Fp8Channels => vec![
                made(0)(spec("", Dtype::F8_E4M3, vec![rows, cols])),
                made(1)(spec("_scale", scheme.scale, vec![rows, 1])),
            ],
            // Names of weights in this layout have no `.weight`.
            Self::Mxfp4 if !name.ends_with(".weight") => vec![
                made(0)(spec("_blocks", Dtype::U8, vec![stack, rows, across, mxfp4::BLOCK / 2])),
                made(1)(spec("_scales", Dtype::U8, vec![stack, rows, across])),
            ],
            Self::Mxfp4 => vec![
                made(0)(spec("_packed", Dtype::U8, vec![rows, cols / 2])),
                made(1)(spec("_scale", Dtype::U8, vec![rows, across])),
            ],
            Self::Ternary => Self::Int { bits: 2, group_size: None, symmetric: true }.stored(name, (rows, cols), stack),
            Self::Int { bits, symmetric, .. } => {
                let mut out = vec![
                    made(0)(spec("_packed", Dtype::I32, vec![rows, (cols * bits).div_ceil(32)])),
                    made(1)(spec("_scale", scheme.scale, vec![rows, across])),
                ];
                if !symmetric {
                    out.push(made(2)(spec("_zero_point", Dtype::I32, vec![(rows * bits).div_ceil(32), across])));
                }
                let shape = [rows as i64, cols as i64].iter().flat_map(|side| side.to_le_bytes()).collect();
                out.push((spec("_shape", Dtype::I64, vec![2]), StoredPart::Constant(shape)));
                out
            }
            Self::Nf4 => {
                let bytes = |floats: &[f32]| floats.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
                let state = serde_json::json!({
                    "quant_type": "nf4", "blocksize": bitsandbytes::BLOCK, "dtype": "bfloat16", "shape": [rows, cols],
                });
                let state = state.to_string().into_bytes();
                vec![
                    made(0)(spec("", Dtype::U8, vec![(rows * cols).div_ceil(2), 1])),
                    made(1)(spec(".absmax", Dtype::F32, vec![across])),
                    (spec(".quant_map", Dtype::F32, vec![16]), StoredPart::Constant(bytes(&floats::NF4))),
                    (spec(".quant_state.bitsandbytes__nf4", Dtype::U8, vec![state.len()]), StoredPart::Constant(state)),
                ]
            }
            Self::Nvfp4 => vec![
                made(0)(spec("_packed", Dtype::U8, vec![rows, cols / 2])),
                made(1)(spec("_scale", Dtype::F8_E4M3, vec![rows, across])),
                made(2)(spec("_global_scale", Dtype::F32, vec![1])),
            ],
        }
    }
}

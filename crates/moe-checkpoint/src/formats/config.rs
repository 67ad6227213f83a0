//! What `config.json` says of quantized weights.

use std::fmt;

use serde_json::Value;

use super::{compressed, mlx};
use crate::family::CONFIG;
use crate::json::Fields;
use crate::{Error, Result};

/// Largest side of a block.
const MAX_SIDE: usize = 1 << 28;

/// How the weights of a checkpoint are quantized, from `quantization_config`. Which weights are is told by their
/// tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Quantization {
    /// FP8 (E4M3) with one scale per block of `rows x cols` elements: `weight_block_size` of quantization method `fp8`.
    Fp8Blocks {
        /// Rows of a block.
        rows: usize,
        /// Columns of a block.
        cols: usize,
    },
    /// FP8 (E4M3) with one scale per tensor: quantization method `fp8` without a block size.
    Fp8Tensors,
    /// Routed experts as 4-bit floats in blocks of 32 with one power of two each (OCP Microscaling), `mxfp4` of
    /// gpt-oss.
    Mxfp4,
    /// Any of the formats of compressed-tensors, as llm-compressor writes them.
    CompressedTensors,
    /// GPTQ: 2, 4 or 8 bits with scales and zero points per group.
    Gptq,
    /// AWQ: 4 bits with scales and zero points per group.
    Awq,
    /// NF4, FP4 or int8 of bitsandbytes.
    BitsAndBytes,
    /// FP8 or NVFP4 as NVIDIA ModelOpt exports them.
    ModelOpt,
    /// Affine codes or MXFP4 of MLX.
    Mlx,
}

impl Quantization {
    /// `quant_method` of such configs.
    pub fn method(self) -> &'static str {
        match self {
            Self::Fp8Blocks { .. } | Self::Fp8Tensors => "fp8",
            Self::Mxfp4 => "mxfp4",
            Self::CompressedTensors => "compressed-tensors",
            Self::Gptq => "gptq",
            Self::Awq => "awq",
            Self::BitsAndBytes => "bitsandbytes",
            Self::ModelOpt => "modelopt",
            Self::Mlx => "mlx",
        }
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fp8Blocks { rows, cols } => write!(f, "FP8 in blocks of {rows} x {cols}"),
            Self::Fp8Tensors => f.write_str("FP8 with a scale per tensor"),
            Self::Mxfp4 => f.write_str("MXFP4"),
            Self::CompressedTensors => f.write_str("compressed-tensors"),
            Self::Gptq => f.write_str("GPTQ"),
            Self::Awq => f.write_str("AWQ"),
            Self::BitsAndBytes => f.write_str("bitsandbytes"),
            Self::ModelOpt => f.write_str("ModelOpt"),
            Self::Mlx => f.write_str("MLX"),
        }
    }
}

/// Quantized weights that are read, for messages.
pub(crate) const READ: &str = ", or quant_method `fp8` (with a `weight_block_size` or one scale per tensor), `mxfp4` of gpt_oss, \
     `compressed-tensors`, `gptq`, `awq`, `bitsandbytes`, `modelopt`, or the `quantization` of MLX; other methods: save the model dequantized by the tool that \
     quantized it, or take the original checkpoint";

/// The quantization that a config names; one that is not read is refused.
pub(crate) fn quantization(config: &Fields<'_>) -> Result<Option<Quantization>> {
    let entry = match config.object("quantization_config")? {
        // What some tools leave behind when they dequantize.
        Some(entry) if entry.keys().next().is_none() => None,
        entry => entry,
    };
    let Some(entry) = entry else {
        let of_mlx = config.value("quantization").is_some_and(mlx::is_entry);
        return Ok(of_mlx.then_some(Quantization::Mlx));
    };
    let raw = config.value("quantization_config").unwrap_or(&Value::Null);
    let method = entry.string("quant_method")?;
    let block = entry.integers("weight_block_size", 1, MAX_SIDE)?;
    let named = |field: &str, value: &str| {
        format!("`quantization_config.{field}` = \"{}\"", value.chars().take(80).collect::<String>())
    };
    let refused = |what: String| Err(Error::Quantized { file: CONFIG.to_string(), method: what, also: READ });
    Ok(Some(match (method, block.as_deref()) {
        (Some("fp8"), Some([rows, cols])) => Quantization::Fp8Blocks { rows: *rows, cols: *cols },
        (Some("fp8"), None) => Quantization::Fp8Tensors,
        (Some("mxfp4"), _) if config.string("model_type")? == Some("gpt_oss") => Quantization::Mxfp4,
        (Some("compressed-tensors"), _) => match compressed::refusal(raw) {
            Some(reason) => return refused(format!("`quantization_config.{}", reason.trim_start_matches('`'))),
            None => Quantization::CompressedTensors,
        },
        (Some("gptq"), _) => Quantization::Gptq,
        (Some("auto-round"), _) if raw["packing_format"] == "auto_round:auto_gptq" => Quantization::Gptq,
        (Some("awq"), _) => match raw["version"].as_str().map(str::to_lowercase).as_deref() {
            None | Some("gemm") => Quantization::Awq,
            Some(version) => return refused(named("version", version)),
        },
        (Some("bitsandbytes"), _) => Quantization::BitsAndBytes,
        (Some("modelopt" | "modelopt_fp4"), _) => match raw["quant_algo"].as_str() {
            Some(algorithm @ ("W4A16_AWQ" | "W4A8_AWQ" | "NVFP4_AWQ" | "NVFP4_SVD")) => {
                return refused(named("quant_algo", algorithm));
            }
            _ => Quantization::ModelOpt,
        },
        (Some(method), _) => return refused(named("quant_method", method)),
        (None, _) if mlx::is_entry(raw) => Quantization::Mlx,
        (None, _) => return refused("`quantization_config`".to_string()),
    }))
}

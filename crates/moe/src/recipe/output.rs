//! Steps that round, measure and write what was made.

use std::path::PathBuf;

use moe_checkpoint::{BasePrecision, QuantizeOptions, QuantizedPart, RouterRounding, Smoothing};
use moe_prune::PrecisionGroup;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Named;
use crate::eval_file::EvalOptions;
use crate::jobs::QuantizeWith;
use crate::{Error, Result};

/// Rounds the weights to few bits, in the files that engines serve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Quantize {
    /// The format: `fp8_blocks`, `fp8_channels`, `int4`, `int8`, `nvfp4`, `mxfp4`, or one with its parameters
    /// (`{"type": "int", "bits": 4, "group_size": 32}`).
    pub format: Named,
    /// `experts`, or `linear` for shared experts, dense blocks and attention as well.
    #[serde(default)]
    #[schemars(with = "Value")]
    pub part: QuantizedPart,
    /// Whether experts are rounded with error feedback (GPTQ), by the second moments of their inputs on the rows of
    /// calibration.
    #[serde(default)]
    pub calibrated: bool,
    /// Factors on the input channels of experts that are folded into what comes before, found on the rows of
    /// calibration: `{"type": "awq"}` or `{"type": "eaquant"}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Value>")]
    pub smooth: Option<Smoothing>,
    /// Routers rounded so that they choose the same experts on the rows of calibration, `{"bits": 8}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Value>")]
    pub routers: Option<RouterRounding>,
    /// Calibrate on rows by which every expert gets at least this share of the tokens that it would get if all got the
    /// same: rows with tokens of starved experts come more than once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance: Option<f64>,
    /// Experts in several formats, chosen by how much each changes what the model predicts on the rows of calibration;
    /// `format` is then that of other weights alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixed: Option<MixedBits>,
}

/// Mixed precision: the formats of experts with which a model of so many bytes diverges least.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MixedBits {
    /// What is chosen from: `int4`, `int6`, `int8`, `fp8`, `mxfp4`, `nvfp4`.
    #[schemars(with = "Vec<String>")]
    pub formats: Vec<BasePrecision>,
    /// Bytes of the whole model, at most.
    pub keep_bytes: u64,
    /// `layer` for one format per layer, or `expert` for one per expert.
    #[serde(default)]
    #[schemars(with = "Value")]
    pub within: PrecisionGroup,
}

impl Quantize {
    /// What the rows of calibration are for.
    pub fn with(&self) -> QuantizeWith {
        let Self { smooth, routers, balance, calibrated, .. } = *self;
        QuantizeWith { smooth, routers, balance, second_order: calibrated }
    }

    /// Whether it reads the rows of calibration.
    pub fn reads_rows(&self) -> bool {
        self.mixed.is_some() || self.with() != QuantizeWith::default()
    }

    /// How weights are rounded.
    ///
    /// # Errors
    /// [`Error::Usage`] for a format that is unknown.
    pub fn options(&self) -> Result<QuantizeOptions> {
        let text = match &self.format {
            Named::Name(name) => name.clone(),
            Named::Parameters(map) => Value::Object(map.clone()).to_string(),
        };
        let format = text.parse().map_err(|error: moe_checkpoint::Error| Error::Usage(error.to_string()))?;
        Ok(QuantizeOptions { format, part: self.part })
    }
}

/// Measures the model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Evaluate {
    /// Files named `NAME_test.jsonl`; by default those of the recipe.
    pub data: Vec<PathBuf>,
    /// How they are measured.
    #[schemars(with = "serde_json::Map<String, Value>")]
    pub options: EvalOptions,
}

/// Writes the model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Write {
    /// Where; by default `model` in the directory of the recipe.
    pub to: Option<PathBuf>,
    /// Most bytes of tensor data per file, such as `5GB`.
    pub shard_size: Option<String>,
}

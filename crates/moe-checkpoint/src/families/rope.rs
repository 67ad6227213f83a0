//! Rotary embedding in the dialects of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).

use crate::Result;
use crate::config::{RopeConfig, RopeScaling};
use crate::json::Fields;

use super::read::MAX_SIZE;

/// `rope_theta` of transformers where a config has none.
const DEFAULT_THETA: f64 = 10_000.0;

/// Reads the rotary embedding. `max_position` is `max_position_embeddings`.
pub(super) fn read(config: &Fields<'_>, max_position: usize) -> Result<RopeConfig> {
    let outer_theta = config.positive_float("rope_theta")?;
    let Some(parameters) = config.object("rope_parameters")? else {
        let scaling = match config.object("rope_scaling")? {
            Some(fields) => read_scaling(&fields, max_position)?,
            None => RopeScaling::Default,
        };
        return Ok(RopeConfig { theta: outer_theta.unwrap_or(DEFAULT_THETA), interleaved: false, scaling });
    };
    let inner_theta = parameters.positive_float("rope_theta")?;
    let scaling = read_scaling(&parameters, max_position)?;
    // Configs written for both dialects are read if they say the same in both.
    if let (Some(inner), Some(outer)) = (inner_theta, outer_theta)
        && inner != outer
    {
        return Err(config.conflict("rope_parameters", "rope_theta"));
    }
    if let Some(legacy) = config.object("rope_scaling")?
        && read_scaling(&legacy, max_position)? != scaling
    {
        return Err(config.conflict("rope_parameters", "rope_scaling"));
    }
    Ok(RopeConfig { theta: inner_theta.or(outer_theta).unwrap_or(DEFAULT_THETA), interleaved: false, scaling })
}

fn read_scaling(fields: &Fields<'_>, max_position: usize) -> Result<RopeScaling> {
    if fields.float("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(fields.invalid("partial_rotary_factor", "1, since rotation of a part of the head is not supported"));
    }
    for key in ["full_attention", "sliding_attention"] {
        if fields.value(key).is_some() {
            return Err(fields.invalid(key, "one rotary embedding for all layers"));
        }
    }
    let key = if fields.value("rope_type").is_some() { "rope_type" } else { "type" };
    match fields.string(key)?.unwrap_or("default") {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear {
            factor: fields.positive_float("factor")?.ok_or_else(|| fields.missing("factor", "a number above 0"))?,
        }),
        "yarn" => read_yarn(fields, max_position),
        _ => Err(fields.invalid(key, "\"default\", \"linear\" or \"yarn\"")),
    }
}

/// Fields and defaults of `_compute_yarn_parameters` in transformers 5.
fn read_yarn(fields: &Fields<'_>, max_position: usize) -> Result<RopeScaling> {
    let original_max_position =
        fields.integer("original_max_position_embeddings", 1, MAX_SIZE)?.unwrap_or(max_position);
    let factor = fields.positive_float("factor")?.unwrap_or(max_position as f64 / original_max_position as f64);
    // Zero counts as absent there.
    let or_default = |value: Option<f64>, default: f64| value.filter(|v| *v != 0.0).unwrap_or(default);
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position,
        beta_fast: or_default(fields.float("beta_fast")?, 32.0),
        beta_slow: or_default(fields.float("beta_slow")?, 1.0),
        attention_factor: fields.float("attention_factor")?,
        mscale: fields.float("mscale")?,
        mscale_all_dim: fields.float("mscale_all_dim")?,
        truncate: fields.bool("truncate")?.unwrap_or(true),
    })
}

//! Rotary embedding in the dialects of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).

use crate::Result;
use crate::config::{RopeConfig, RopeScaling};
use crate::json::Fields;

use super::read::MAX_SIZE;

/// `rope_theta` of transformers where a config has none.
const DEFAULT_THETA: f64 = 10_000.0;

/// What differs between families.
pub(super) struct Dialect {
    /// `max_position_embeddings`.
    pub max_position: usize,
    /// `rope_theta` where a config has none.
    pub theta: f64,
    /// Whether neighboring dimensions are turned together.
    pub interleaved: bool,
    /// Whether LongRoPE with factors of its own on cosine and sine may be used.
    pub longrope: bool,
    /// Whether a part of the head may be rotated; read it with [`rotary_dim`].
    pub partial: bool,
    /// Whether the frequencies may be those of Llama 3 (`llama3`).
    pub llama3: bool,
    /// Width of a head in families whose `dynamic` scaling has a fixed `alpha` that stretches the base.
    pub ntk_alpha: Option<usize>,
}

impl Dialect {
    /// That of most families.
    pub fn new(max_position: usize) -> Self {
        Self {
            max_position,
            theta: DEFAULT_THETA,
            interleaved: false,
            longrope: false,
            partial: false,
            llama3: false,
            ntk_alpha: None,
        }
    }
}

/// Reads the rotary embedding.
pub(super) fn read(config: &Fields<'_>, dialect: &Dialect) -> Result<RopeConfig> {
    let interleaved = dialect.interleaved;
    let outer_theta = config.positive_float("rope_theta")?;
    let Some(parameters) = config.object("rope_parameters")? else {
        let scaling = match config.object("rope_scaling")? {
            Some(fields) => read_scaling(config, &fields, dialect)?,
            None => RopeScaling::Default,
        };
        return Ok(RopeConfig { theta: outer_theta.unwrap_or(dialect.theta), interleaved, scaling });
    };
    let inner_theta = parameters.positive_float("rope_theta")?;
    let scaling = read_scaling(config, &parameters, dialect)?;
    // Configs written for both dialects are read if they say the same in both.
    if let (Some(inner), Some(outer)) = (inner_theta, outer_theta)
        && inner != outer
    {
        return Err(config.conflict("rope_parameters", "rope_theta"));
    }
    if let Some(legacy) = config.object("rope_scaling")?
        && read_scaling(config, &legacy, dialect)? != scaling
    {
        return Err(config.conflict("rope_parameters", "rope_scaling"));
    }
    Ok(RopeConfig { theta: inner_theta.or(outer_theta).unwrap_or(dialect.theta), interleaved, scaling })
}

/// That of one kind of layer, from its own parameters.
pub(super) fn of_layers(config: &Fields<'_>, parameters: &Fields<'_>, dialect: &Dialect) -> Result<RopeConfig> {
    Ok(RopeConfig {
        theta: parameters.positive_float("rope_theta")?.unwrap_or(dialect.theta),
        interleaved: dialect.interleaved,
        scaling: read_scaling(config, parameters, dialect)?,
    })
}

/// Dimensions of a head that are rotated: `partial_rotary_factor`, in `rope_parameters` or beside it, of `head_dim`; or
/// `rotary_dim`.
pub(super) fn rotary_dim(config: &Fields<'_>, head_dim: usize, default: f64) -> Result<usize> {
    let inner = match config.object("rope_parameters")? {
        Some(parameters) => parameters.positive_float("partial_rotary_factor")?,
        None => None,
    };
    let outer = config.positive_float("partial_rotary_factor")?;
    if let (Some(inner), Some(outer)) = (inner, outer)
        && inner != outer
    {
        return Err(config.conflict("rope_parameters", "partial_rotary_factor"));
    }
    let stated = config.integer("rotary_dim", 1, MAX_SIZE)?.filter(|_| inner.or(outer).is_none());
    let rotary = stated.unwrap_or((inner.or(outer).unwrap_or(default) * head_dim as f64) as usize);
    if rotary == 0 || rotary > head_dim || !rotary.is_multiple_of(2) {
        let expected = format!("a fraction of `head_dim` = {head_dim} that gives an even number of dimensions");
        let key = if inner.is_some() { "rope_parameters" } else { "partial_rotary_factor" };
        return Err(config.invalid(key, expected));
    }
    Ok(rotary)
}

/// Factor on the dot products of attention where YaRN has an `mscale_all_dim`: DeepSeek multiplies `1 / sqrt(head_dim)`
/// by the square of `0.1 * mscale_all_dim * ln(factor) + 1`.
pub(super) fn deepseek_scale(rope: &RopeConfig, head_dim: usize) -> Option<f64> {
    let RopeScaling::Yarn { factor, mscale_all_dim: Some(mscale), .. } = rope.scaling else { return None };
    let mscale = if mscale == 0.0 || factor <= 1.0 { return None } else { 0.1 * mscale * factor.ln() + 1.0 };
    Some(mscale * mscale / (head_dim as f64).sqrt())
}

fn read_scaling(config: &Fields<'_>, fields: &Fields<'_>, dialect: &Dialect) -> Result<RopeScaling> {
    if !dialect.partial && fields.float("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(fields.invalid("partial_rotary_factor", "1, since models of this family rotate the whole head"));
    }
    for key in ["full_attention", "sliding_attention"] {
        if fields.value(key).is_some() {
            return Err(fields.invalid(key, "one rotary embedding for all layers"));
        }
    }
    let key = if fields.value("rope_type").is_some() { "rope_type" } else { "type" };
    match fields.string(key)?.unwrap_or("default") {
        // Texts have one position per token, which all sections of a multimodal embedding share.
        "default" | "mrope" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear {
            factor: fields.positive_float("factor")?.ok_or_else(|| fields.missing("factor", "a number above 0"))?,
        }),
        "yarn" => read_yarn(fields, dialect.max_position),
        "llama3" if dialect.llama3 => read_llama3(fields),
        "dynamic" if dialect.ntk_alpha.is_some() => match fields.positive_float("alpha")? {
            Some(alpha) => Ok(RopeScaling::StretchedBase { alpha, dim: dialect.ntk_alpha.unwrap_or(4) }),
            None => Err(fields.missing("alpha", "a number above 0: scaling by the length of a text is not supported")),
        },
        "longrope" if dialect.longrope => read_longrope(config, fields),
        _ if dialect.longrope => Err(fields.invalid(key, "\"default\", \"linear\", \"yarn\" or \"longrope\"")),
        _ if dialect.llama3 => Err(fields.invalid(key, "\"default\", \"linear\", \"yarn\" or \"llama3\"")),
        _ => Err(fields.invalid(key, "\"default\", \"linear\" or \"yarn\"")),
    }
}

fn read_longrope(config: &Fields<'_>, fields: &Fields<'_>) -> Result<RopeScaling> {
    let list = |key: &str| {
        let expected = "a list of numbers above 0, one for two rotated dimensions";
        let found = fields.value(key).ok_or_else(|| fields.missing(key, expected))?;
        let items = found.as_array().into_iter().flatten().map(|item| item.as_f64().filter(|v| *v > 0.0));
        let items: Option<Vec<f64>> = items.collect();
        items.filter(|items| !items.is_empty()).ok_or_else(|| fields.invalid(key, expected))
    };
    let number = |key: &str| fields.positive_float(key)?.ok_or_else(|| fields.missing(key, "a number above 0"));
    let original = match fields.integer("original_max_position_embeddings", 1, MAX_SIZE)? {
        Some(original) => original,
        None => config.required_integer("original_max_position_embeddings", 1, MAX_SIZE)?,
    };
    Ok(RopeScaling::LongRope {
        short_factor: list("short_factor")?,
        long_factor: list("long_factor")?,
        short_mscale: number("short_mscale")?,
        long_mscale: number("long_mscale")?,
        original_max_position: original,
    })
}

/// Fields of `_compute_llama3_parameters` in transformers, which has no defaults for them.
fn read_llama3(fields: &Fields<'_>) -> Result<RopeScaling> {
    let number = |key: &str| fields.positive_float(key)?.ok_or_else(|| fields.missing(key, "a number above 0"));
    let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
    if high <= low {
        return Err(fields.invalid("high_freq_factor", format!("more than `low_freq_factor` = {low}")));
    }
    Ok(RopeScaling::Llama3 {
        factor: number("factor")?,
        low,
        high,
        original_max_position: fields.required_integer("original_max_position_embeddings", 1, MAX_SIZE)?,
    })
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

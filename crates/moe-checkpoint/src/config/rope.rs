//! The rotary position embedding.

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the wavelengths.
    pub theta: f64,
    /// Whether dimensions `2i` and `2i + 1` are turned together; otherwise `i` and `i + rotary_dim / 2`.
    pub interleaved: bool,
    /// How positions past the trained length are handled.
    pub scaling: RopeScaling,
}

/// Scaling of the rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Frequencies are those of the base, unchanged.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// Extension of the context.
        factor: f64,
    },
    /// Frequencies of Llama 3: those whose wavelength is above `original_max_position / low` are divided by `factor`,
    /// those below `original_max_position / high` stay, between them goes a ramp.
    Llama3 {
        /// Extension of the context.
        factor: f64,
        /// Turns over the original context below which frequencies are divided.
        low: f64,
        /// Turns over the original context above which frequencies stay.
        high: f64,
        /// Length of the sequences trained on.
        original_max_position: usize,
    },
    /// The base is `theta * alpha^(dim / (dim - 2))`, whatever the length of a text.
    StretchedBase {
        /// Extension of the context.
        alpha: f64,
        /// Width of a head.
        dim: usize,
    },
    /// The first `pairs` pairs of the head keep their frequencies divided by `factor`, the others do not turn.
    Proportional {
        /// Pairs of dimensions that turn.
        pairs: usize,
        /// Divisor of their frequencies.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071), with the fields of transformers' `rope_parameters`.
    Yarn {
        /// Extension of the context. `max_position_embeddings / original_max_position` if the config has none.
        factor: f64,
        /// Length of the sequences trained on; `max_position_embeddings` if the config does not say.
        original_max_position: usize,
        /// Rotations above which frequencies are kept.
        beta_fast: f64,
        /// Rotations below which frequencies are divided by `factor`.
        beta_slow: f64,
        /// Factor on cosine and sine; `None` means that it follows from `factor`, `mscale` and `mscale_all_dim`.
        attention_factor: Option<f64>,
        /// Numerator scale of the attention factor; counts only together with `mscale_all_dim`.
        mscale: Option<f64>,
        /// Denominator scale of the attention factor.
        mscale_all_dim: Option<f64>,
        /// Whether the bounds of the ramp are rounded to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (arXiv 2402.13753) as phimoe uses it: frequencies divided by one list or the other, cosine and sine
    /// multiplied by one number or the other, by whether the sequence is longer than `original_max_position`.
    LongRope {
        /// Divisors of the frequencies of short sequences, `[rotary_dim / 2]`.
        short_factor: Vec<f64>,
        /// Divisors of the frequencies of long sequences, `[rotary_dim / 2]`.
        long_factor: Vec<f64>,
        /// Factor on cosine and sine of short sequences.
        short_mscale: f64,
        /// Factor on cosine and sine of long sequences.
        long_mscale: f64,
        /// Longest sequence that counts as short.
        original_max_position: usize,
    },
}

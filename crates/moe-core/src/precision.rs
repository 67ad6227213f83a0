//! How products with weights are computed.

use std::{fmt, str::FromStr};

use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::{host, kernels::bf16_dot};

/// How products of activations with the weights of a model are computed. A property of a run: it changes results, in
/// the last digits that a checkpoint in BF16 has anyway, and so it stands in every recipe and record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// As in f32.
    #[default]
    F32,
    /// Activations are rounded once per product to bf16, weights stay as they are stored, and sums are in f32, where
    /// the processor multiplies pairs of bf16 (matrix units, or AVX-512-BF16); `docs/precision.md` has what that is
    /// worth. Routers, norms, attention scores, losses and all statistics are in f32, and so are products with weights
    /// that are not read as BF16 (quantized ones are), and with experts that come through a cache of experts.
    Bf16,
}

impl Precision {
    /// Both of them, the default first.
    pub const ALL: [Self; 2] = [Self::F32, Self::Bf16];

    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// Whether it is the default.
    #[allow(clippy::trivially_copy_pass_by_ref)] // as serde calls it
    pub fn is_f32(&self) -> bool {
        *self == Self::F32
    }

    /// Whether products on `device` can be computed so by this processor.
    pub fn is_available(self, device: &Device) -> bool {
        self == Self::F32 || host::is_host(device) && bf16_dot::available()
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|precision| precision.name() == text);
        found.ok_or_else(|| format!("found `{text}`, expected f32 or bf16"))
    }
}

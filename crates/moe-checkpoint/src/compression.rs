//! Words that every way of making a model smaller shares: how much went, and what became of further layers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::human::{count, size};
use crate::{Error, Result};

/// The fraction of a model that goes: of the units of its routed experts, or of the experts themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// As the budget has it.
    pub asked: f64,
    /// As the plan has it: minimum sizes and multiples may differ.
    pub achieved: f64,
}

/// A number before and after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeforeAfter {
    /// Of the checkpoint that was read.
    pub before: u64,
    /// Of the result.
    pub after: u64,
}

impl BeforeAfter {
    /// Bytes before and after, for people: `6.27 MiB -> 5.14 MiB`.
    pub fn sizes(&self) -> String {
        format!("{} -> {}", size(self.before), size(self.after))
    }

    /// Numbers of parameters, units or tokens before and after, for people: `3,287,680 -> 2,108,032`.
    pub fn counts(&self) -> String {
        format!("{} -> {}", count(self.before), count(self.after))
    }
}

/// A router that selects more experts than a layer has left: each token gets all of them. A config has one number for
/// all layers, so that the smallest layer decides.
///
/// ```
/// use moe_checkpoint::TopKClamp;
///
/// let clamp = TopKClamp::of(3, [5, 2, 4]).unwrap();
/// assert_eq!((clamp.before, clamp.after), (3, 2));
/// assert_eq!(TopKClamp::of(3, [5, 3]), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopKClamp {
    /// Experts that the router selected per token.
    pub before: usize,
    /// Experts that it selects now.
    pub after: usize,
}

impl TopKClamp {
    /// The clamp of `top_k` to the experts left in every layer; `None` where there are enough.
    pub fn of(top_k: usize, left: impl IntoIterator<Item = usize>) -> Option<Self> {
        left.into_iter().min().filter(|least| *least < top_k).map(|after| Self { before: top_k, after })
    }
}

impl fmt::Display for TopKClamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { before, after } = self;
        write!(f, "{after} experts are left per layer: each token gets all of them instead of {before}")
    }
}

/// What becomes of multi-token prediction: layers after the decoder layers that predict further tokens, with experts of
/// their own that no plan covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mtp {
    /// They stay as they are. Refused where the config would give their experts another width or number.
    Keep,
    /// They are left out, and the config says that there are none. Loaders that do not use them read the same model.
    Drop,
    /// Their experts become as wide and as many as those of the decoder, for uniform and fine-grained exports of
    /// pruning plans. No activations exist for them, so that units are ranked by magnitude: the norm of the gate row
    /// times that of the up row times that of the down column, and experts by the sum over their units.
    Prune,
}

impl Mtp {
    /// The name used in recipes and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Drop => "drop",
            Self::Prune => "prune",
        }
    }
}

impl fmt::Display for Mtp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Mtp {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Keep, Self::Drop, Self::Prune].into_iter().find(|choice| choice.name() == text).ok_or_else(|| {
            Error::OutOfRange {
                what: "what becomes of multi-token prediction".to_string(),
                found: format!("`{text}`"),
                expected: "`keep`, `drop` or `prune`".to_string(),
            }
        })
    }
}

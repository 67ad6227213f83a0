//! The forms that a pruned model can have.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::FineGrained;
use crate::{Error, Result};

/// The name of a form, as recipes, reports and command lines have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Export {
    /// [`PruneForm::Uniform`].
    Uniform,
    /// [`PruneForm::Ragged`].
    Ragged,
    /// [`PruneForm::Masked`].
    Masked,
    /// [`PruneForm::FineGrained`].
    FineGrained,
}

impl Export {
    /// The name used in recipes and on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Ragged => "ragged",
            Self::Masked => "masked",
            Self::FineGrained => "fine_grained",
        }
    }

    /// The form of this name; `None` for pieces, which need to know how experts are cut.
    pub fn form(self) -> Option<PruneForm<'static>> {
        match self {
            Self::Uniform => Some(PruneForm::Uniform),
            Self::Ragged => Some(PruneForm::Ragged),
            Self::Masked => Some(PruneForm::Masked),
            Self::FineGrained => None,
        }
    }
}

impl fmt::Display for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Export {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let all = [Self::Uniform, Self::Ragged, Self::Masked, Self::FineGrained];
        all.into_iter().find(|mode| mode.name() == text).ok_or_else(|| Error::InvalidParameter {
            field: "export",
            found: format!("`{text}`"),
            expected: "`uniform`, `ragged`, `masked` or `fine_grained`".into(),
        })
    }
}

/// The form that a pruned model has.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum PruneForm<'a> {
    /// One width for all experts, in the layout that was read: loads in stock runtimes. Refused for plans whose widths
    /// differ.
    Uniform,
    /// A width per expert, in the format of this project; stock runtimes refuse it.
    Ragged,
    /// Shapes as they were, dropped units zeroed: loads in stock runtimes, saves nothing.
    Masked,
    /// Experts as equal pieces, each an expert of its own: loads in stock runtimes. Takes plans whose widths are
    /// multiples of a piece, with as many pieces in every layer. An expert without units goes with its router row.
    FineGrained(FineGrained<'a>),
}

impl PruneForm<'_> {
    /// Its name as recipes and reports have it.
    pub fn export(&self) -> Export {
        match self {
            Self::Uniform => Export::Uniform,
            Self::Ragged => Export::Ragged,
            Self::Masked => Export::Masked,
            Self::FineGrained(_) => Export::FineGrained,
        }
    }

    /// The name used in recipes and on command lines.
    pub fn name(&self) -> &'static str {
        self.export().name()
    }

    /// The error that says why it cannot be.
    pub(super) fn refused(&self, reason: String) -> Error {
        Error::Export { mode: self.name(), reason }
    }
}

impl fmt::Display for PruneForm<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

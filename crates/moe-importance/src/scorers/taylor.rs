//! First-order Taylor importance.

use moe_checkpoint::{ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::unit_means;
use super::{Average, ExpertWeightsSource, Needs, Scorer};
use crate::Result;
use crate::statistics::{ROUTED_TOKENS, TAYLOR_MAGNITUDE, TAYLOR_SUM};

/// How the first-order changes of single tokens become one number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaylorForm {
    /// `mean_t |u_t[j] du_t[j]|`: changes of opposite sign do not cancel.
    #[default]
    Magnitude,
    /// `|mean_t u_t[j] du_t[j]|`: they cancel.
    Sum,
    /// `-mean_t u_t[j] du_t[j]`: the loss that zeroing the unit adds, negative for a unit that does harm.
    LossIncrease,
}

/// First-order Taylor importance of units: `u_t[j] du_t[j]` is, with the sign turned, the first-order change of the
/// loss when the unit is zeroed at token t.
///
/// Sources: Molchanov et al. 2019 (arXiv 1906.10771) for the criterion; LLM-Pruner (arXiv 2305.11627) for language
/// models.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Taylor {
    /// What is averaged; default [`TaylorForm::Magnitude`].
    pub form: TaylorForm,
    /// Over which tokens the mean is taken; default [`Average::AllTokens`].
    pub denominator: Average,
}

impl Taylor {
    /// With these parameters.
    pub fn new(form: TaylorForm, denominator: Average) -> Self {
        Self { form, denominator }
    }
}

impl Scorer for Taylor {
    fn name(&self) -> &str {
        "taylor"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        let sums = match self.form {
            TaylorForm::Magnitude => TAYLOR_MAGNITUDE,
            TaylorForm::Sum | TaylorForm::LossIncrease => TAYLOR_SUM,
        };
        Needs::units([sums, ROUTED_TOKENS]).additive(self.denominator.additive())
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        let average = self.denominator;
        match self.form {
            TaylorForm::Magnitude => unit_means(self, statistics, &TAYLOR_MAGNITUDE, average, |mean| mean),
            TaylorForm::Sum => unit_means(self, statistics, &TAYLOR_SUM, average, f64::abs),
            TaylorForm::LossIncrease => unit_means(self, statistics, &TAYLOR_SUM, average, |mean| -mean),
        }
    }
}

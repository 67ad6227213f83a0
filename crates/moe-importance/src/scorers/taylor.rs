//! First-order Taylor importance.

use moe_checkpoint::{Granularity, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};

use super::table::unit_means;
use super::{Average, ExpertWeightsSource, Scorer};
use crate::collectors::{ROUTED_TOKENS, TAYLOR_MAGNITUDE, TAYLOR_SUM};
use crate::{Result, StatisticId};

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

/// First-order Taylor importance of units: `u_t[j] du_t[j]` is, with the sign turned, the first-order change of the loss when the
/// unit is zeroed at token t.
///
/// Sources: Molchanov et al. 2019 (arXiv 1906.10771) for the criterion; LLM-Pruner (arXiv 2305.11627) for language models.
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
    fn name(&self) -> &'static str {
        "taylor"
    }

    fn recipe(&self) -> String {
        super::config::recipe(*self)
    }

    fn granularity(&self) -> Granularity {
        Granularity::Unit
    }

    fn needs(&self) -> Vec<StatisticId> {
        match self.form {
            TaylorForm::Magnitude => vec![TAYLOR_MAGNITUDE, ROUTED_TOKENS],
            TaylorForm::Sum | TaylorForm::LossIncrease => vec![TAYLOR_SUM, ROUTED_TOKENS],
        }
    }

    fn reads_weights(&self) -> bool {
        false
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

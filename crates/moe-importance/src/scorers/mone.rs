//! MoNE's fusion score.

use moe_checkpoint::{Denominator, Extent, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::{divisor, expert_table};
use super::{ExpertWeightsSource, Needs, Scorer};
use crate::Result;
use crate::statistics::{OUTPUT_MOMENTS, ROUTED_TOKENS, ROUTING_WEIGHT};

/// Spread of the expert's output times its routing score: `|sd_t(f_t)|_2 * (1/T) sum_t g_t`, with the standard
/// deviation of each output element over the tokens routed to the expert, and the routing weight g, 0 where the expert
/// is not selected, averaged over all tokens. An expert whose output hardly varies can be replaced by its mean, which
/// [`OUTPUT_MOMENTS`](crate::statistics::OUTPUT_MOMENTS) holds as well.
///
/// The deviation is that of the population: routed to once, an expert does not vary. The published running variance is
/// an approximation of it; this one is exact.
///
/// Source: arXiv 2507.00390.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Mone {}

impl Mone {
    /// The scorer; it has no parameters.
    pub fn new() -> Self {
        Self {}
    }
}

impl Scorer for Mone {
    fn name(&self) -> &str {
        "mone"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        Needs::experts([OUTPUT_MOMENTS, ROUTING_WEIGHT, ROUTED_TOKENS])
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        let tokens = divisor(self, statistics.tokens(), "tokens")?;
        expert_table(self, statistics, Denominator::AllTokens, |layer, expert| {
            let moments = statistics.vector(OUTPUT_MOMENTS.as_str(), Extent::Moments, layer, expert)?;
            let (n, squares) = (moments[0].max(1.0), &moments[1 + statistics.shape().hidden_size..]);
            let spread = (squares.iter().sum::<f64>() / n).sqrt();
            Ok(spread * statistics.expert(ROUTING_WEIGHT.as_str(), layer)?[expert] / tokens)
        })
    }
}

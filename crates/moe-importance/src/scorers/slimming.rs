//! Scores of units with weights of experts and layers beside them.

use moe_checkpoint::{Granularity, Pool, ScoreTable, Statistics, WholeScores};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::divisor;
use super::units::nested;
use super::{Attribution, ChannelNorms, ExpertWeightsSource, Needs, Scorer, ScorerConfig};
use crate::Result;
use crate::statistics::ATTRIBUTION;

/// The scores of `channels`, with what every expert and every layer weighs as a whole beside them
/// ([`WholeScores`]): the experts by `experts`, a layer by its loss `(1/T) sum_t |m_t|^2 / (|y_t|^2 + 1e-6)`, how much
/// of the residual stream after it its routed experts make. The allocator `coverage` shares a budget out by both.
///
/// The loss of a layer is the sum of the attributions of its experts, unclipped and of first order.
///
/// Source: MoE-Slimming (ICML 2026). Its factor `(1 - alpha)^2` of the loss is the same for all layers and left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Slimming {
    /// A scorer of units; default [`ChannelNorms`].
    pub channels: Box<ScorerConfig>,
    /// A scorer of experts; default [`Attribution`].
    pub experts: Box<ScorerConfig>,
}

impl Default for Slimming {
    fn default() -> Self {
        Self::new(ChannelNorms::new(), Attribution::default())
    }
}

impl Slimming {
    /// With these parameters; [`Scorer::validate`] checks that one scores units and the other experts.
    pub fn new(channels: impl Into<ScorerConfig>, experts: impl Into<ScorerConfig>) -> Self {
        Self { channels: Box::new(channels.into()), experts: Box::new(experts.into()) }
    }
}

impl Scorer for Slimming {
    fn name(&self) -> &str {
        "slimming"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(self.clone())
    }

    fn validate(&self) -> Result<()> {
        nested(self, "channels", &self.channels, Granularity::Unit)?;
        nested(self, "experts", &self.experts, Granularity::Expert)?;
        Ok(())
    }

    fn needs(&self) -> Needs {
        // Parameters that do not build are refused by `validate`, not here.
        let of = |config: &ScorerConfig, none: Needs| config.build().map_or(none, |scorer| scorer.needs());
        let (channels, experts) = (of(&self.channels, Needs::units([])), of(&self.experts, Needs::experts([])));
        let mut statistics = channels.statistics;
        let more = experts.statistics.into_iter().chain([ATTRIBUTION]);
        more.for_each(|id| {
            if !statistics.contains(&id) {
                statistics.push(id);
            }
        });
        let needs = Needs::units(statistics).with_wholes().weights(channels.weights || experts.weights);
        let pool = channels.pool.min(Pool::Layer);
        match channels.additive {
            Some(additive) => needs.within(pool).additive(additive.min(pool)),
            None => needs.within(pool),
        }
    }

    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        let channels = nested(self, "channels", &self.channels, Granularity::Unit)?.score(statistics, weights)?;
        let experts = nested(self, "experts", &self.experts, Granularity::Expert)?.score(statistics, weights)?;
        let (needs, tokens) = (self.needs(), divisor(self, statistics.tokens(), "tokens")?);
        let mut table =
            ScoreTable { scorer: self.recipe().to_string(), pool: needs.pool, additive: needs.additive, ..channels };
        for (layer, experts) in table.layers.iter_mut().zip(experts.layers) {
            let losses = statistics.expert(ATTRIBUTION.as_str(), layer.layer)?;
            layer.whole = Some(WholeScores {
                // A sum of squares but for rounding.
                layer: (losses.iter().sum::<f64>() / tokens).max(0.0) as f32,
                experts: experts.scores.concat(),
            });
        }
        table.validate_for(statistics.shape())?;
        Ok(table)
    }
}

//! Pruning in rounds, scored anew after each.

use moe_checkpoint::{MoeShape, ProtectionMask, ScoreTable};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{PruneRequest, Pruned, Pruner, PrunerConfig};
use crate::plan::LayerKept;
use crate::probe::ModelProbe;
use crate::recipe::tagged;
use crate::{Budget, Error, PrunePlan, Result};

/// Prunes a little, scores what is left, prunes more. What one round drops stays dropped.
///
/// A round of ratio `r_i` is the same as one-shot pruning of that ratio, but for what earlier rounds decided; the last
/// has the ratio of the budget, so that the budget is met as by [`Progressive::pruner`] alone.
///
/// ```
/// use moe_checkpoint::*;
/// use moe_prune::{Budget, Progressive, ProtectionMask, PrunePlan, PrunerConfig, Schedule, Scope, UnitPruner};
///
/// let shape = MoeShape { gateless: false, hidden_size: 4, top_k: 1, layers: vec![MoeLayerShape { layer: 0, widths: vec![2, 2] }] };
/// let table = |scores: Vec<Vec<f32>>| ScoreTable {
///     scorer: "{}".into(),
///     granularity: Granularity::Unit,
///     pool: Pool::Global,
///     additive: None,
///     denominator: Denominator::None,
///     layers: vec![LayerScores { layer: 0, scores, routed: None, whole: None }],
///     provenance: Provenance::new("model", "data", "{}"),
/// };
/// let pruner = PrunerConfig::Unit(UnitPruner::new(Scope::Global));
/// let rounds = Progressive { pruner, rounds: 2, schedule: Schedule::Linear };
/// // Scores the model as the plan leaves it: without the first unit, the second matters more.
/// let score = |plan: &PrunePlan| {
///     Ok(table(match plan.units_kept() {
///         4 => vec![vec![1.0, 2.0], vec![3.0, 4.0]],
///         _ => vec![vec![9.0], vec![3.0, 4.0]],
///     }))
/// };
/// let plan = rounds.run(&shape, "model", Budget::Ratio(0.5), &ProtectionMask::none(), score)?.plan;
/// assert_eq!(plan.kept[0].experts, [vec![1], vec![1]]);
/// # Ok::<(), moe_prune::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progressive {
    /// What prunes in every round.
    pub pruner: PrunerConfig,
    /// Number of rounds.
    pub rounds: usize,
    /// How much goes in which.
    #[serde(default)]
    pub schedule: Schedule,
}

/// How a ratio is reached in `n` rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Every round drops the same fraction of what is left: `1 - (1 - ratio)^(i / n)`.
    #[default]
    Geometric,
    /// Every round drops as much: `ratio * i / n`.
    Linear,
}

impl Schedule {
    /// Ratios dropped after every round; the last is exactly `ratio`.
    pub fn ratios(self, ratio: f64, rounds: usize) -> Vec<f64> {
        let at = |round: usize| match (self, round as f64 / rounds as f64) {
            (_, part) if part >= 1.0 => ratio,
            (Self::Geometric, part) => 1.0 - (1.0 - ratio).powf(part),
            (Self::Linear, part) => ratio * part,
        };
        (1..=rounds).map(at).collect()
    }
}

/// What a round of [`Progressive::run_with`] may need.
pub trait Round {
    /// Scores the model as `plan` leaves it; in the first round that is all of it. The table has the shape of the whole
    /// model, or [`PrunePlan::pruned_shape`].
    ///
    /// # Errors
    /// Whatever keeps it from being scored.
    fn score(&mut self, plan: &PrunePlan) -> Result<ScoreTable>;

    /// The probe of a round, for allocators that ask the model.
    fn probe(&mut self) -> &mut dyn ModelProbe;
}

/// A closure that scores, without a probe.
struct ScoreOnly<F>(F, crate::NoProbe);

impl<F: FnMut(&PrunePlan) -> Result<ScoreTable>> Round for ScoreOnly<F> {
    fn score(&mut self, plan: &PrunePlan) -> Result<ScoreTable> {
        (self.0)(plan)
    }

    fn probe(&mut self) -> &mut dyn ModelProbe {
        &mut self.1
    }
}

impl Progressive {
    /// The rounds with their parameters, as the plan records them.
    pub fn recipe(&self) -> Value {
        tagged("progressive", self)
    }

    /// Runs all rounds on the model of this shape and fingerprint; `score` scores it as a plan leaves it.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for no rounds, those of the pruner, of `score`, and tables of neither shape.
    pub fn run(
        &self,
        shape: &MoeShape,
        model: &str,
        budget: Budget,
        protect: &ProtectionMask,
        score: impl FnMut(&PrunePlan) -> Result<ScoreTable>,
    ) -> Result<Pruned> {
        self.run_with(shape, model, budget, protect, &mut ScoreOnly(score, crate::NoProbe))
    }

    /// The same, with a probe.
    ///
    /// # Errors
    /// As [`Progressive::run`], and those of the probe.
    pub fn run_with(
        &self,
        shape: &MoeShape,
        model: &str,
        budget: Budget,
        protect: &ProtectionMask,
        round: &mut dyn Round,
    ) -> Result<Pruned> {
        if self.rounds == 0 {
            return Err(Error::InvalidParameter { field: "rounds", found: "0".into(), expected: "at least 1".into() });
        }
        shape.validate()?;
        budget.validate(shape)?;
        let units = shape.units().max(1) as f64;
        let ratio = match budget {
            Budget::Ratio(ratio) => ratio,
            _ => (shape.units() - budget.kept_units(shape)) as f64 / units,
        };
        let ratios = self.schedule.ratios(ratio, self.rounds);
        let mut plan = PrunePlan::keep_all(shape, model);
        let needs = self.pruner.needs();
        needs.check_probe(round.probe().answers())?;
        let mut prune = |plan: &PrunePlan, first: bool, budget: Budget, recipe: Value| {
            let table = round.score(plan)?;
            let scores = &if table.validate_for(shape).is_ok() { table } else { plan.expand(&table)? };
            let gone: Option<&[LayerKept]> = (!first).then_some(&plan.kept);
            needs.check_scores(scores)?;
            let request = PruneRequest { scores, shape, budget, protect, gone };
            let allocation = self.pruner.allocate_with(&request, round.probe())?;
            let plan = allocation.plan(recipe, scores, shape)?;
            Ok(Pruned { plan, allocation })
        };
        for (index, ratio) in ratios[..self.rounds - 1].iter().enumerate() {
            plan = prune(&plan, index == 0, Budget::Ratio(*ratio), self.pruner.recipe())?.plan;
        }
        prune(&plan, self.rounds == 1, budget, self.recipe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_end_at_the_ratio() {
        let close = |found: Vec<f64>, expected: &[f64]| {
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
            assert_eq!(found.len(), expected.len());
        };
        close(Schedule::Linear.ratios(0.6, 3), &[0.2, 0.4, 0.6]);
        close(Schedule::Geometric.ratios(0.75, 2), &[0.5, 0.75]);
        // A fifth of what is left in every round, three times.
        close(Schedule::Geometric.ratios(1.0 - 0.8f64.powi(3), 3), &[0.2, 0.36, 0.488]);
    }
}

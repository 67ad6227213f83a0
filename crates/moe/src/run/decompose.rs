//! The step that replaces the matrices of experts by low-rank ones.

use moe_checkpoint::Statistics;
use moe_importance::StatisticId;
use moe_importance::statistics::FISHER_TOKEN;
use moe_merge::CompactModel;

use super::Run;
use super::artifacts::Artifacts;
use super::steps::{Done, json, save};
use crate::Result;
use crate::progress::Unit;
use crate::recipe::Decompose;

/// What is seen of the model, where experts or rows are ranked by it.
pub(super) const SEEN: [StatisticId; 1] = [FISHER_TOKEN];

impl Run<'_> {
    /// Replaces the matrices of experts: the next steps see the products.
    pub(super) fn decompose(&mut self, step: &Decompose) -> Result<Done> {
        let compression = step.compression();
        let data = match compression.needs_scores() {
            true => self.calibration()?.data.hash.clone(),
            false => String::new(),
        };
        let waves = format!("{:?}", self.recipe.data.wave_tokens);
        let of = [json(step)?, self.identity(), data, waves];
        let (dir, reused) = self.artifacts.begin("decompose", &of.each_ref().map(String::as_str))?;
        let to = dir.join("compact");
        if !reused {
            let statistics = match compression.needs_scores() {
                false => None,
                true => {
                    let (model, calibration) = (self.engine_model()?, self.calibration()?);
                    let tokens = calibration.data.tokens() as u64;
                    let bar = self.options.progress.bar("looking at experts", tokens, Unit::Count("tokens"));
                    let observing =
                        calibration.observing(&model, SEEN.to_vec(), self.options.group).store(dir.join("seen"));
                    Some(observing.run(&mut |at| bar.at(at.tokens_done))?)
                }
            };
            let [id] = SEEN;
            let fisher = statistics.as_ref().map(|found: &Statistics| (found, id.as_str()));
            self.on_first(|run| {
                let report = compression.compress(&run.model, &to, fisher, true)?;
                save(&dir.join("report.json"), &report)?;
                Artifacts::finish(&dir)
            })?;
        }
        let compact = CompactModel::open(&to)?;
        let report = *compact.report();
        let share = 100.0 * report.parameters_after as f64 / report.parameters_before.max(1) as f64;
        let ranks = match compression.ranks {
            moe_merge::Ranks::Same => format!("rank {}", step.rank),
            moe_merge::Ranks::Importance => format!("ranks of {} on average, by importance", step.rank),
        };
        let summary = format!(
            "experts of {ranks} and {} of {} rows: {} parameters by {} ({share:.1}%)",
            report.rows_kept, report.rows, report.parameters_before, report.parameters_after
        );
        self.model = compact.on(&self.model, None)?.model().clone();
        self.pruned = None;
        Ok(Done { summary, reused, artifact: Some(dir), ..Done::default() })
    }
}

//! The step that puts zeros into weights.

use moe_checkpoint::Statistics;
use moe_importance::StatisticId;
use moe_importance::statistics::{INPUT_SQUARE_WEIGHTED, UNIT_SQUARE_WEIGHTED};

use super::Run;
use super::artifacts::Artifacts;
use super::steps::{Done, json, save};
use crate::Result;
use crate::progress::Unit;
use crate::recipe::Sparsify;

/// What is seen of the model.
pub(super) const SEEN: [StatisticId; 2] = [INPUT_SQUARE_WEIGHTED, UNIT_SQUARE_WEIGHTED];

impl Run<'_> {
    /// Puts zeros into the weights of experts: the next steps see them.
    pub(super) fn sparsify(&mut self, step: &Sparsify) -> Result<Done> {
        let calibration = self.calibration()?;
        let waves = format!("{:?}", self.recipe.data.wave_tokens);
        let of = [json(step)?, self.identity(), calibration.data.hash.clone(), waves];
        let (dir, reused) = self.artifacts.begin("sparsify", &of.each_ref().map(String::as_str))?;
        let file = dir.join("inputs.safetensors");
        if !reused {
            let model = self.engine_model()?;
            let bar =
                self.options.progress.bar("looking at inputs", calibration.data.tokens() as u64, Unit::Count("tokens"));
            let observing = calibration.observing(&model, SEEN.to_vec(), self.options.group).store(dir.join("seen"));
            let seen = observing.run(&mut |at| bar.at(at.tokens_done))?;
            drop(bar);
            self.on_first(|_| Ok(seen.save(&file)?))?;
        }
        let sparse = step.sparsity.on(&self.model, &Statistics::load(&file)?)?;
        let report = sparse.report();
        if !reused {
            self.on_first(|_| {
                save(&dir.join("report.json"), &report)?;
                Artifacts::finish(&dir)
            })?;
        }
        let share = 100.0 * report.zeros as f64 / report.weights.max(1) as f64;
        let summary = format!("{} of {} weights of experts are zero ({share:.1}%)", report.zeros, report.weights);
        self.model = sparse.model().clone();
        self.pruned = None;
        Ok(Done { summary, reused, artifact: Some(dir), ..Done::default() })
    }
}

//! The step that rounds weights to few bits.

use moe_checkpoint::{InputMoments, Quantized};
use moe_importance::ExpertInputs;

use super::Run;
use super::artifacts::Artifacts;
use super::steps::{Done, json, save};
use crate::Result;
use crate::progress::Unit;
use crate::recipe::Quantize;

impl Run<'_> {
    /// Quantizes the model: the next steps see the rounded weights.
    pub(super) fn quantize(&mut self, step: &Quantize) -> Result<Done> {
        let options = step.options()?;
        let base = self.model.clone();
        let data = match step.calibrated {
            true => self.calibration()?.data.hash.clone(),
            false => String::new(),
        };
        let of = [json(step)?, base.fingerprint(), data, format!("{:?}", self.recipe.data.wave_tokens)];
        let (dir, reused) = self.artifacts.begin("quantize", &of.each_ref().map(String::as_str))?;
        // What does not fit is said before the model is run.
        let mut quantized = Quantized::on(&base, &options)?;
        if step.calibrated {
            let data = self.calibration()?;
            let model = self.engine_model()?;
            let bar = self.options.progress.bar("calibrating", data.data.tokens() as u64, Unit::Count("tokens"));
            let calibration = data.observing(&model, []).collector(Box::new(ExpertInputs::of(&base)));
            let statistics = calibration.store(dir.join("inputs")).run(&mut |at| bar.at(at.tokens_done))?;
            quantized = Quantized::calibrated(&base, &options, &InputMoments::new(statistics))?;
        }
        if !reused {
            save(&dir.join("report.json"), quantized.report())?;
            Artifacts::finish(&dir)?;
        }
        let bytes = quantized.report().bytes;
        let summary = format!(
            "weights rounded{}: {} become {}",
            if step.calibrated { " with error feedback" } else { "" },
            crate::format::size(bytes.before),
            crate::format::size(bytes.after)
        );
        self.model = quantized.model().clone();
        self.pruned = None;
        Ok(Done { summary, reused, artifact: Some(dir), measured: vec![] })
    }
}

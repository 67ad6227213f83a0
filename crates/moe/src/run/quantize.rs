//! The step that rounds weights to few bits.

use super::Run;
use super::artifacts::Artifacts;
use super::steps::{Done, json, save};
use crate::Result;
use crate::jobs::{QuantizeRows, quantize};
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
        let model = match step.calibrated {
            true => Some(self.engine_model()?),
            false => None,
        };
        let store = dir.join("inputs");
        let rows = match &model {
            Some(model) => {
                let calibration = self.calibration()?;
                Some(QuantizeRows { model, data: &calibration.data, waves: calibration.options, store: &store })
            }
            None => None,
        };
        let quantized = quantize(&base, &options, rows, self.options.progress)?;
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

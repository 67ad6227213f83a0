//! The step that rounds weights to few bits.

use moe_checkpoint::Quantized;

use super::Run;
use super::artifacts::Artifacts;
use super::steps::{Done, json, save};
use crate::Result;
use crate::jobs::{QuantizeRows, QuantizedModel, quantize_calibrated, quantize_mixed};
use crate::recipe::Quantize;

impl Run<'_> {
    /// Quantizes the model: the next steps see the rounded weights.
    pub(super) fn quantize(&mut self, step: &Quantize) -> Result<Done> {
        let options = step.options()?;
        let base = self.model.clone();
        let reads = step.reads_rows();
        let data = match reads {
            true => self.calibration()?.data.hash.clone(),
            false => String::new(),
        };
        let of = [json(step)?, base.fingerprint(), data, format!("{:?}", self.recipe.data.wave_tokens)];
        let (dir, reused) = self.artifacts.begin("quantize", &of.each_ref().map(String::as_str))?;
        let model = match reads {
            true => Some(self.engine_model()?),
            false => None,
        };
        let store = dir.join("inputs");
        let rows = match &model {
            Some(model) => {
                let calibration = self.calibration()?;
                let (data, waves, group) = (&calibration.data, calibration.options, self.options.group);
                Some(QuantizeRows { model, data, waves, store: &store, group })
            }
            None => None,
        };
        let progress = self.options.progress;
        let made = match (&step.mixed, rows) {
            (Some(mixed), Some(rows)) => quantize_mixed(&base, &options, mixed, rows, &step.with(), progress)?,
            (_, Some(rows)) => quantize_calibrated(&base, &options, rows, &step.with(), progress)?,
            (_, None) => QuantizedModel::from(Quantized::on(&base, &options)?),
        };
        let QuantizedModel { quantized, allocation, calibration } = made;
        if !reused {
            self.on_first(|_| {
                if let Some(allocation) = &allocation {
                    save(&dir.join("allocation.json"), allocation)?;
                }
                if reads {
                    save(&dir.join("calibration.json"), &calibration)?;
                }
                save(&dir.join("report.json"), quantized.report())?;
                Artifacts::finish(&dir)
            })?;
        }
        let bytes = quantized.report().bytes;
        let summary = format!(
            "weights rounded{}: {} become {}",
            match (&allocation, step.calibrated) {
                (Some(allocation), _) => format!(" to {:.2} bits per weight of experts", allocation.bits),
                (None, true) => " with error feedback".into(),
                (None, false) => String::new(),
            },
            crate::format::size(bytes.before),
            crate::format::size(bytes.after)
        );
        self.model = quantized.model().clone();
        self.pruned = None;
        Ok(Done { summary, reused, artifact: Some(dir), ..Done::default() })
    }
}

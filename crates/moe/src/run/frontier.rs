//! The step that measures what is best at a given size.

use super::Run;
use super::artifacts::Artifacts;
use super::steps::{Done, json, load, save};
use crate::Result;
use crate::jobs::{FrontierOptions, frontier};
use crate::report::FrontierPoint;

/// The file of points in the artifact of the step.
pub(crate) const POINTS: &str = "frontier.json";

impl Run<'_> {
    /// Measures models with fewer bits, experts and units. The model stays as it is.
    pub(super) fn frontier(&mut self, step: &FrontierOptions) -> Result<Done> {
        if self.options.shard.is_some() {
            let summary = "not measured by a run that does a share".into();
            return Ok(Done { summary, ..Done::default() });
        }
        let calibration = self.calibration()?;
        let waves = format!("{:?}", self.recipe.data.wave_tokens);
        let of = [json(step)?, self.identity(), calibration.data.hash.clone(), waves];
        let (dir, reused) = self.artifacts.begin("frontier", &of.each_ref().map(String::as_str))?;
        let file = dir.join(POINTS);
        if !reused {
            let whole = self.engine_model()?;
            save(&file, &frontier(&whole, &calibration.data, calibration.options, step, self.options.progress)?)?;
            Artifacts::finish(&dir)?;
        }
        let points: Vec<FrontierPoint> = load(&file)?;
        let sizes = points.iter().map(|point| point.bytes);
        let summary = format!(
            "{} models from {} to {} measured, {} of them best at their size",
            points.len(),
            crate::format::size(sizes.clone().min().unwrap_or(0)),
            crate::format::size(sizes.max().unwrap_or(0)),
            FrontierPoint::best(&points).len()
        );
        Ok(Done { summary, reused, artifact: Some(dir), ..Done::default() })
    }
}

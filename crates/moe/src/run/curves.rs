//! Distortion curves that are measured once and serve every budget.

use moe_checkpoint::ScoreTable;
use moe_prune::{
    AllocatorConfig, CurveSource, DistortionCurves, ExpertLimits, Limits, ModelProbe, PruneRequest, PrunerConfig,
    RateDistortion,
};

use super::Run;
use super::artifacts::Artifacts;
use super::steps::json;
use crate::Result;
use crate::progress::Unit;

/// The allocator by measured curves that a pruner has, and the limits that it allocates within.
fn measured(pruner: &mut PrunerConfig) -> Option<(&mut RateDistortion, Limits)> {
    let (allocator, limits) = match pruner {
        PrunerConfig::Unit(unit) => (&mut unit.allocator, Limits::Units(unit.limits)),
        PrunerConfig::Expert(expert) => {
            let (groups, min_experts, multiple_of) = (expert.groups, expert.min_experts, expert.multiple_of);
            let limits = ExpertLimits { groups, min_experts, multiple_of, keeps_router: false };
            (&mut expert.allocator, Limits::Experts(limits))
        }
        PrunerConfig::Novice(novice) => {
            (&mut novice.allocator, Limits::Experts(ExpertLimits { keeps_router: true, ..ExpertLimits::default() }))
        }
        _ => return None,
    };
    match allocator {
        AllocatorConfig::RateDistortion(allocator) if matches!(allocator.curves, CurveSource::Measured { .. }) => {
            Some((allocator, limits))
        }
        _ => None,
    }
}

impl Run<'_> {
    /// The pruner with curves from a file where it asks for measured ones: an artifact of its own, which any budget
    /// reads.
    pub(super) fn with_curves(
        &self,
        pruner: &PrunerConfig,
        request: &PruneRequest<'_>,
        scores: &ScoreTable,
        probe: &mut dyn ModelProbe,
    ) -> Result<PrunerConfig> {
        let mut pruner = pruner.clone();
        let Some((allocator, limits)) = measured(&mut pruner) else { return Ok(pruner) };
        let CurveSource::Measured { points, statistic } = allocator.curves else { return Ok(pruner) };
        let within = allocator.within;
        let of = [
            format!("{} {} {}", points, json(&within)?, json(&limits)?),
            format!("{} {}", scores.scorer, json(&scores.provenance)?),
            self.identity(),
            json(&self.protect)?,
            self.calibration()?.data.hash.clone(),
        ];
        let (dir, reused) = self.artifacts.begin("curves", &of.each_ref().map(String::as_str))?;
        let path = dir.join("curves.json");
        if !reused {
            let bar = self.options.progress.bar("measuring curves", 0, Unit::Count("runs"));
            let request = request.with_limits(limits);
            DistortionCurves::measure(&request, within, points, probe, &mut |done, runs| {
                bar.total(runs as u64);
                bar.at(done as u64);
            })?
            .save(&path)?;
            Artifacts::finish(&dir)?;
        }
        allocator.curves = CurveSource::File { path, statistic };
        Ok(pruner)
    }
}

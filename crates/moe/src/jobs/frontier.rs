//! What is best at a given size: fewer experts, fewer units, fewer bits, and all of these at equal bytes.

use moe_checkpoint::{BasePrecision, Checkpoint, WeightFormat};
use moe_core::data::{Dataset, WaveOptions};
use moe_core::{Engine, EngineOptions, Model};
use moe_importance::{ScorerConfig, scorers::Reap};
use moe_prune::{
    Budget, EngineProbe, ExpertPruner, MixedPrecision, PrecisionAllocation, ProbeOptions, PruneForm, Scope, UnitPruner,
    best_allocation,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{prune, score};
use crate::progress::{Progress, Unit};
use crate::report::FrontierPoint;
use crate::{Error, Result};

/// Which models are compared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Frontier")]
pub struct FrontierOptions {
    /// Shares of routed experts, or of the units of every expert, that are pruned, in (0, 1); the whole model is always
    /// there.
    pub ratios: Vec<f64>,
    /// Formats of experts: `int4`, `int6`, `int8`, `fp8`, `mxfp4`, `nvfp4`.
    #[schemars(with = "Vec<String>")]
    pub formats: Vec<BasePrecision>,
    /// Budgets in bytes between the smallest and the largest format of each model, for which layers get formats of
    /// their own, and between the smallest and the largest of all, for which the best of all is taken.
    pub budgets: u64,
}

impl Default for FrontierOptions {
    fn default() -> Self {
        let formats = vec![BasePrecision::Int4, BasePrecision::Int6, BasePrecision::Int8];
        Self { ratios: vec![0.25, 0.5], formats, budgets: 4 }
    }
}

impl FrontierOptions {
    /// Checks everything that can be told before `base` is run.
    ///
    /// # Errors
    /// [`Error::Usage`] for ratios outside (0, 1), no formats, a base that is quantized and one whose experts differ in
    /// width or share weights.
    pub fn check(&self, base: &Checkpoint) -> Result<()> {
        if let Some(ratio) = self.ratios.iter().find(|ratio| !(**ratio > 0.0 && **ratio < 1.0)) {
            return Err(Error::Usage(format!("ratios: found {ratio}, expected shares between 0 and 1")));
        }
        if self.formats.is_empty() {
            return Err(Error::Usage("formats: found none, expected at least one".into()));
        }
        if let Some(format) = base.quantization() {
            let reason = format!("found a model in {format}, expected one that is not quantized: dequantize it first");
            return Err(Error::Usage(format!("a frontier: {reason}")));
        }
        if base.ragged() || base.grouped() {
            let reason = "found experts that differ in width or share weights, expected one width for all";
            return Err(Error::Usage(format!("a frontier: {reason}")));
        }
        Ok(())
    }
}

/// The models between size and quality: the whole one, and ones with experts pruned by REAP (arXiv 2510.13999) and with
/// units pruned by a diagonal Fisher approximation, each in BF16, in every format, and with a format per layer within
/// several budgets; then, at the same budgets for all, whichever of them is predicted to diverge least
/// (`best_allocation`: bits and what is pruned in one knapsack). Every point is measured on the rows: the divergence of
/// next-token distributions from those of the whole model.
///
/// Where units go, widths are multiples of a group of the formats, so that what is pruned may differ from what was
/// asked for: names say what it is, and a ratio that leaves a model which is there already is left out with a line.
///
/// # Errors
/// What [`FrontierOptions::check`] refuses, widths that a format cannot divide; whatever stops a run.
pub fn frontier(
    whole: &Model,
    data: &Dataset,
    waves: WaveOptions,
    options: &FrontierOptions,
    progress: Progress,
) -> Result<Vec<FrontierPoint>> {
    options.check(whole.checkpoint())?;
    let shape = whole.checkpoint().shape();
    let engine = Engine::new(whole, EngineOptions::default());
    let probe = EngineProbe::new(&engine, data.waves(waves), ProbeOptions::default())?;
    let mut models = vec![("whole".to_string(), whole.with_overlays(None, None)?)];
    if !options.ratios.is_empty() {
        let experts = score(whole, data, &Reap::default())?;
        let fisher: ScorerConfig = serde_json::from_value(serde_json::json!({ "type": "fisher" }))
            .map_err(|error| Error::Invalid(error.to_string()))?;
        let units = score(whole, data, &*fisher.build()?)?;
        for ratio in &options.ratios {
            let pruner = ExpertPruner::new().for_routing(&whole.config().routing);
            let without_experts = prune(whole, &experts, &pruner, Budget::Ratio(*ratio), PruneForm::Uniform)?;
            // Widths of whole groups of every format.
            let width = whole.checkpoint().shape().uniform_width().unwrap_or(0);
            let pruner = UnitPruner::new(Scope::Expert).round_to(round_to(width, *ratio));
            let narrower = prune(whole, &units, &pruner, Budget::Ratio(*ratio), PruneForm::Uniform)?;
            for (what, pruned) in [("experts", without_experts), ("units", narrower)] {
                let gone = 1.0 - pruned.checkpoint().shape().units() as f64 / shape.units().max(1) as f64;
                let name = format!("{:.0}% of the {what} pruned", 100.0 * gone);
                if gone == 0.0 || models.iter().any(|(other, _)| *other == name) {
                    progress.say(&format!("{ratio} of the {what}: rounded to whole groups this is there already"));
                    continue;
                }
                models.push((name, pruned));
            }
        }
    }
    let bar = progress.bar("measuring the frontier", models.len() as u64, Unit::Count("models"));
    let (mut points, mut all) = (Vec::new(), Vec::new());
    for (index, (name, model)) in models.iter().enumerate() {
        let checkpoint = model.checkpoint();
        points.push(FrontierPoint {
            of: FrontierPoint::one_format(name),
            what: FrontierPoint::PLAIN.into(),
            bytes: checkpoint.bytes_on_disk(),
            divergence: probe.distortion_of(model)?.mean,
        });
        let formats: Vec<WeightFormat> = options.formats.iter().map(|precision| precision.format(checkpoint)).collect();
        let sensitivities = MixedPrecision::new(formats.clone()).measure(model, &probe, &mut |_, _| ())?;
        let mut sizes = Vec::new();
        for format in &formats {
            let Some(allocation) = sensitivities.uniform(Some(format)) else { continue };
            let (bytes, divergence) = measured(model, &allocation, &probe)?;
            sizes.push(bytes);
            let of = FrontierPoint::one_format(name);
            points.push(FrontierPoint { of, what: format.to_string(), bytes, divergence });
        }
        for budget in budgets(&sizes, options.budgets) {
            let Ok(allocation) = sensitivities.allocate(budget) else { continue };
            let (bytes, divergence) = measured(model, &allocation, &probe)?;
            let what = format!("{:.2} bits, {:.4} predicted", allocation.bits, allocation.predicted);
            points.push(FrontierPoint { of: FrontierPoint::by_layer(name), what, bytes, divergence });
        }
        all.push(sensitivities);
        bar.at(index as u64 + 1);
    }
    let sizes: Vec<u64> =
        points.iter().filter(|point| point.what != FrontierPoint::PLAIN).map(|point| point.bytes).collect();
    for budget in budgets(&sizes, 2 * options.budgets) {
        let Some((index, allocation)) = best_allocation(&all, budget) else { continue };
        let (name, model) = &models[index];
        let (bytes, divergence) = measured(model, &allocation, &probe)?;
        let what = format!("{name}, {:.2} bits, {:.4} predicted", allocation.bits, allocation.predicted);
        points.push(FrontierPoint { of: "chosen within a budget".into(), what, bytes, divergence });
    }
    Ok(points)
}

/// The largest of the usual group sizes that divides a width and is no more than what goes of it; the smallest one that
/// divides it, where less goes.
fn round_to(width: usize, ratio: f64) -> usize {
    let sizes: Vec<usize> = [128, 64, 32].into_iter().filter(|size| width.is_multiple_of(*size)).collect();
    let few = |size: &&usize| **size as f64 <= ratio * width as f64;
    sizes.iter().find(few).or(sizes.last()).copied().unwrap_or(1)
}

/// So many budgets between the least and the most of some sizes.
fn budgets(sizes: &[u64], count: u64) -> Vec<u64> {
    let (Some(least), Some(most)) = (sizes.iter().min(), sizes.iter().max()) else { return Vec::new() };
    (1..=count).map(|step| least + step * (most - least) / (count + 1)).collect()
}

/// Bytes and divergence of a model in these formats.
fn measured(model: &Model, allocation: &PrecisionAllocation, probe: &EngineProbe<'_>) -> Result<(u64, f64)> {
    let quantized = allocation.on(model.checkpoint(), None)?;
    let bytes = quantized.model().bytes_on_disk();
    let model = model.like(quantized.model().clone())?;
    Ok((bytes, probe.distortion_of(&model)?.mean))
}

//! Quantization by rows of calibration: what `moe quantize` and the step `quantize` carry out.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use moe_checkpoint::group::Group;
use moe_checkpoint::{
    Checkpoint, InputMoments, InputRanges, LayerSmoothing, QuantizeOptions, Quantized, RoundedRouter, RouterInputs,
    RouterRounding, Smoothed, Smoothing, Statistics,
};
use moe_core::data::{Dataset, WaveOptions};
use moe_core::{Engine, EngineOptions, Model};
use moe_importance::{BalancedRows, Calibration, Collector, ExpertInputRanges, ExpertInputs, RouterSample, RowUse};
use moe_prune::{EngineProbe, MixedPrecision, PrecisionAllocation, ProbeOptions};
use serde::{Deserialize, Serialize};

use crate::progress::{Progress, Unit};
use crate::recipe::MixedBits;
use crate::{Error, Result};

/// Rows to calibrate on.
#[derive(Clone, Copy, Debug)]
pub struct QuantizeRows<'a> {
    /// The model, to be run.
    pub model: &'a Model,
    /// The rows.
    pub data: &'a Dataset,
    /// How they are grouped.
    pub waves: WaveOptions,
    /// A directory of these passes alone: a run that was killed goes on with the waves it has there.
    pub store: &'a Path,
    /// Who runs the rows together; every rank gets the same.
    pub group: &'a dyn Group,
}

/// What rows of calibration are for. By default nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuantizeWith {
    /// Factors on input channels of experts, folded into what comes before.
    pub smooth: Option<Smoothing>,
    /// Routers rounded so that they choose the same experts.
    pub routers: Option<RouterRounding>,
    /// Rows are repeated until every expert has this share of an even load.
    pub balance: Option<f64>,
    /// Experts are rounded with error feedback (GPTQ).
    pub second_order: bool,
}

/// What calibration found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QuantizeCalibration {
    /// Rows that were used, where they were balanced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance: Option<BalancedRows>,
    /// Factors, layer by layer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub smoothing: Vec<SmoothingSummary>,
    /// Routers, layer by layer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub routers: Vec<RoundedRouter>,
}

/// Factors of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SmoothingSummary {
    /// Decoder layer.
    pub layer: usize,
    /// Channels of the inputs with a factor other than 1, and units of all experts with one.
    pub inputs: usize,
    /// See [`inputs`](Self::inputs).
    pub units: usize,
    /// What rounding changes of outputs with the factors over what it changes without them, on rows that were tried;
    /// where factors were searched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damage: Option<f64>,
    /// Why inputs or units of the layer take no factors.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
}

/// A quantized model, and how it came about.
#[derive(Clone, Debug)]
pub struct QuantizedModel {
    /// The model.
    pub quantized: Quantized,
    /// Which expert has which format, where there are several.
    pub allocation: Option<PrecisionAllocation>,
    /// What calibration found.
    pub calibration: QuantizeCalibration,
}

impl From<Quantized> for QuantizedModel {
    fn from(quantized: Quantized) -> Self {
        Self { quantized, allocation: None, calibration: QuantizeCalibration::default() }
    }
}

impl fmt::Display for QuantizeCalibration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(BalancedRows { rows, starved_before, starved_after, experts }) = &self.balance {
            writeln!(
                f,
                "{} rows of calibration; experts below their share: {starved_before} of {experts}, then \
                 {starved_after}",
                rows.len()
            )?;
        }
        for SmoothingSummary { layer, inputs, units, damage, left_out } in &self.smoothing {
            write!(f, "layer {layer}: factors on {inputs} input channels and {units} units")?;
            if let Some(damage) = damage {
                write!(f, ", damage of rounding times {damage:.3}")?;
            }
            for reason in left_out {
                write!(f, "; {reason}")?;
            }
            writeln!(f)?;
        }
        for RoundedRouter { layer, clip, divergence, unclipped_divergence, overlap } in &self.routers {
            writeln!(
                f,
                "layer {layer}: router clipped at {clip:.3}, divergence {divergence:.2e} ({unclipped_divergence:.2e} \
                 without), {:.2}% of the choices kept",
                100.0 * overlap
            )?;
        }
        Ok(())
    }
}

impl QuantizeWith {
    /// Checks everything that can be told before `base` is run.
    ///
    /// # Errors
    /// [`Error::Usage`] for a share of balance that is not above 0, for balanced rows that nothing is calibrated on,
    /// for routers that cannot be looked at, and for factors that no layer takes; other parameters out of their range.
    pub fn check(&self, base: &Checkpoint) -> Result<()> {
        self.smooth.as_ref().map(Smoothing::check).transpose()?;
        self.routers.as_ref().map(RouterRounding::check).transpose()?;
        if let Some(share) = self.balance.filter(|share| !(share.is_finite() && *share > 0.0)) {
            return Err(Error::Usage(format!("balance: found {share}, expected a share above 0")));
        }
        if self.balance.is_some() && self.passes() == 1 {
            let expected = "error feedback, factors or rounded routers that are calibrated on the rows";
            return Err(Error::Usage(format!("balance: found nothing that balanced rows change; expected {expected}")));
        }
        if self.routers.is_some()
            && let Some(reason) = RouterInputs::refusal(base)
        {
            return Err(Error::Usage(format!("rounding routers: {reason}")));
        }
        let refusals: Vec<[Option<String>; 2]> =
            base.shape().layers.iter().map(|layer| Smoothed::refusals(base, layer.layer)).collect();
        if self.smooth.is_some() && refusals.iter().all(|[inputs, units]| inputs.is_some() && units.is_some()) {
            let mut reasons: Vec<String> = refusals.into_iter().flatten().flatten().collect();
            reasons.sort();
            reasons.dedup();
            return Err(Error::Usage(format!("smoothing: no layer takes factors: {}", reasons.join("; "))));
        }
        Ok(())
    }

    /// Runs over the rows that it takes.
    pub fn passes(&self) -> usize {
        let Self { smooth, routers, balance, second_order } = self;
        [smooth.is_some(), routers.is_some(), balance.is_some(), *second_order].iter().filter(|pass| **pass).count()
    }
}

/// The model with its weights rounded to few bits, by what its experts and routers read on some rows. What does not fit
/// is said before the model is run.
///
/// Every pass sees the model as the one before left it: rows are balanced first, then factors are folded in, routers
/// are rounded, and last the second moments for error feedback are taken.
///
/// # Errors
/// Parameters that do not fit the model; whatever stops a pass.
pub fn quantize_calibrated(
    base: &Arc<Checkpoint>,
    how: &QuantizeOptions,
    rows: QuantizeRows<'_>,
    with: &QuantizeWith,
    progress: Progress,
) -> Result<QuantizedModel> {
    Quantized::on(base, how)?;
    let Prepared { base, moments, calibration } = prepare(base, how, rows, with, progress)?;
    let quantized = match moments {
        Some(moments) => Quantized::calibrated(&base, how, &moments)?,
        None => Quantized::on(&base, how)?,
    };
    Ok(QuantizedModel { calibration, ..QuantizedModel::from(quantized) })
}

/// The model with its experts in several formats, within so many bytes, by their sensitivity on these rows
/// ([`MixedPrecision`]).
///
/// # Errors
/// As [`quantize_calibrated`]; fewer bytes than the smallest formats take.
pub fn quantize_mixed(
    base: &Arc<Checkpoint>,
    how: &QuantizeOptions,
    mixed: &MixedBits,
    rows: QuantizeRows<'_>,
    with: &QuantizeWith,
    progress: Progress,
) -> Result<QuantizedModel> {
    let formats = mixed.formats.iter().map(|precision| precision.format(base)).collect();
    let choice = MixedPrecision { within: mixed.within, ..MixedPrecision::new(formats) };
    let Prepared { base, moments, calibration } = prepare(base, how, rows, with, progress)?;
    let prepared = rows.model.like(base.clone())?;
    let engine = Engine::new(&prepared, EngineOptions::default());
    let probe = EngineProbe::new(&engine, rows.data.waves(rows.waves), ProbeOptions::default())?;
    let bar = progress.bar("measuring precisions", 0, Unit::Count("runs"));
    let sensitivities = choice.measure(&prepared, &probe, &mut |done, runs| {
        bar.total(runs as u64);
        bar.at(done as u64);
    })?;
    drop(bar);
    let allocation = sensitivities.allocate(mixed.keep_bytes)?;
    let quantized = Quantized::mixed(&base, how, &allocation.formats, moments.as_ref())?;
    Ok(QuantizedModel { quantized, allocation: Some(allocation), calibration })
}

/// What is rounded in the end.
struct Prepared {
    base: Arc<Checkpoint>,
    moments: Option<InputMoments>,
    calibration: QuantizeCalibration,
}

fn prepare(
    base: &Arc<Checkpoint>,
    how: &QuantizeOptions,
    rows: QuantizeRows<'_>,
    with: &QuantizeWith,
    progress: Progress,
) -> Result<Prepared> {
    with.check(base)?;
    let mut calibration = QuantizeCalibration::default();
    let balanced = match with.balance {
        Some(share) => {
            let found = RowUse::of(rows.model, &rows.data.waves(rows.waves))?.balanced(share)?;
            let data = rows.data.taken(&found.rows);
            calibration.balance = Some(found);
            Some(data)
        }
        None => None,
    };
    let data = balanced.as_ref().unwrap_or(rows.data);
    let pass = |model: &Model, what: &str, collector: Box<dyn Collector>| -> Result<Statistics> {
        let bar = progress.bar(format!("calibrating, {what}"), data.tokens() as u64, Unit::Count("tokens"));
        let calibration = Calibration::new(model, data, rows.waves).collector(collector).group(rows.group);
        Ok(calibration.store(rows.store.join(what)).run(&mut |at| bar.at(at.tokens_done))?)
    };
    let moments_of = |model: &Model, what: &str| -> Result<InputMoments> {
        let moments = InputMoments::new(pass(model, what, Box::new(ExpertInputs::of(model.checkpoint())))?);
        // With balanced rows experts that nobody was routed to are calibrated on all tokens of their layer.
        Ok(if with.balance.is_some() { moments.with_unseen_experts(model.checkpoint())? } else { moments })
    };
    let mut base = base.clone();
    let mut changed: Option<Model> = None;
    let remade = |base: &Arc<Checkpoint>| rows.model.like(base.clone());
    if let Some(smooth) = &with.smooth {
        let plain = base.dequantized()?;
        let factors: Vec<LayerSmoothing> = match smooth {
            Smoothing::Awq(search) => {
                let found = search.search(&plain, &how.format, &moments_of(rows.model, "magnitudes")?)?;
                calibration.smoothing = found
                    .iter()
                    .map(|layer| {
                        let damage = (layer.damage_before > 0.0).then(|| layer.damage_after / layer.damage_before);
                        SmoothingSummary { damage, ..SmoothingSummary::of(&plain, &layer.factors) }
                    })
                    .collect();
                found.into_iter().map(|layer| layer.factors).collect()
            }
            Smoothing::Eaquant(smoothing) => {
                let collector = Box::new(ExpertInputRanges::of(&base));
                let ranges = InputRanges::new(pass(rows.model, "ranges", collector)?);
                let found = smoothing.factors(&plain, &ranges)?;
                calibration.smoothing = found.iter().map(|layer| SmoothingSummary::of(&plain, layer)).collect();
                found
            }
            _ => return Err(Error::Usage("smooth: a way of smoothing that quantization does not know".into())),
        };
        base = Smoothed::on(&base, &factors)?.model().clone();
        changed = Some(remade(&base)?);
    }
    if let Some(routers) = &with.routers {
        let model = changed.as_ref().unwrap_or(rows.model);
        let inputs = RouterInputs::new(pass(model, "routers", Box::new(RouterSample::of(&base)))?);
        let (rounded, report) = routers.on(&base, &inputs)?;
        base = rounded;
        calibration.routers = report;
        changed = Some(remade(&base)?);
    }
    let moments = match with.second_order {
        true => Some(moments_of(changed.as_ref().unwrap_or(rows.model), "inputs")?),
        false => None,
    };
    Ok(Prepared { base, moments, calibration })
}

impl SmoothingSummary {
    fn of(model: &Checkpoint, factors: &LayerSmoothing) -> Self {
        let [inputs, units] = Smoothed::refusals(model, factors.layer);
        let named = |what: &'static str| move |reason: String| format!("none on {what}: {reason}");
        let left_out = inputs.map(named("inputs")).into_iter().chain(units.map(named("units"))).collect();
        let changed = |factors: &[f32]| factors.iter().filter(|factor| **factor != 1.0).count();
        let units = factors.units.iter().map(|units| changed(units)).sum();
        Self { layer: factors.layer, inputs: changed(&factors.inputs), units, damage: None, left_out }
    }
}

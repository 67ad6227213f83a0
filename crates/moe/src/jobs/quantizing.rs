//! Quantization, with or without calibration: what `moe quantize` and the step `quantize` carry out.

use std::path::Path;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, InputMoments, QuantizeOptions, Quantized};
use moe_core::data::{Dataset, WaveOptions};
use moe_core::{Engine, EngineOptions, Model};
use moe_importance::{Calibration, ExpertInputs};
use moe_prune::{EngineProbe, MixedPrecision, PrecisionAllocation, ProbeOptions};

use crate::Result;
use crate::progress::{Progress, Unit};
use crate::recipe::MixedBits;

/// Rows by which experts are rounded with error feedback (GPTQ).
#[derive(Clone, Copy, Debug)]
pub struct QuantizeRows<'a> {
    /// The model, to be run.
    pub model: &'a Model,
    /// The rows.
    pub data: &'a Dataset,
    /// How they are grouped.
    pub waves: WaveOptions,
    /// A directory of this pass alone: a run that was killed goes on with the waves it has there.
    pub store: &'a Path,
}

/// The model with its weights rounded to few bits: to the nearest number, or with `rows` by the second moments of the
/// inputs of its experts on them. What does not fit is said before the model is run.
///
/// # Errors
/// Parameters that do not fit the model; whatever stops the pass.
pub fn quantize(
    base: &Arc<Checkpoint>,
    how: &QuantizeOptions,
    rows: Option<QuantizeRows<'_>>,
    progress: Progress,
) -> Result<Quantized> {
    let nearest = Quantized::on(base, how)?;
    let Some(rows) = rows else { return Ok(nearest) };
    Ok(Quantized::calibrated(base, how, &moments(base, rows, progress)?)?)
}

/// The model with its experts in several formats, within so many bytes, by their sensitivity on these rows
/// ([`MixedPrecision`]); with `second_order` rounded by the second moments of their inputs.
///
/// # Errors
/// As [`quantize`]; fewer bytes than the smallest formats take.
pub fn quantize_mixed(
    base: &Arc<Checkpoint>,
    how: &QuantizeOptions,
    mixed: &MixedBits,
    rows: QuantizeRows<'_>,
    second_order: bool,
    progress: Progress,
) -> Result<(Quantized, PrecisionAllocation)> {
    let formats = mixed.formats.iter().map(|precision| precision.format(base)).collect();
    let choice = MixedPrecision { within: mixed.within, ..MixedPrecision::new(formats) };
    let engine = Engine::new(rows.model, EngineOptions::default());
    let probe = EngineProbe::new(&engine, rows.data.waves(rows.waves), ProbeOptions::default())?;
    let bar = progress.bar("measuring precisions", 0, Unit::Count("runs"));
    let sensitivities = choice.measure(rows.model, &probe, &mut |done, runs| {
        bar.total(runs as u64);
        bar.at(done as u64);
    })?;
    drop(bar);
    let allocation = sensitivities.allocate(mixed.keep_bytes)?;
    let moments = match second_order {
        true => Some(moments(base, rows, progress)?),
        false => None,
    };
    Ok((Quantized::mixed(base, how, &allocation.formats, moments.as_ref())?, allocation))
}

/// Second moments of the inputs of experts on some rows.
fn moments(base: &Arc<Checkpoint>, rows: QuantizeRows<'_>, progress: Progress) -> Result<InputMoments> {
    let QuantizeRows { model, data, waves, store } = rows;
    let bar = progress.bar("calibrating", data.tokens() as u64, Unit::Count("tokens"));
    let calibration = Calibration::new(model, data, waves).collector(Box::new(ExpertInputs::of(base)));
    let statistics = calibration.store(store).run(&mut |at| bar.at(at.tokens_done))?;
    Ok(InputMoments::new(statistics))
}

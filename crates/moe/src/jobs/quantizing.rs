//! Quantization, with or without calibration: what `moe quantize` and the step `quantize` carry out.

use std::path::Path;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, InputMoments, QuantizeOptions, Quantized};
use moe_core::Model;
use moe_core::data::{Dataset, WaveOptions};
use moe_importance::{Calibration, ExpertInputs};

use crate::Result;
use crate::progress::{Progress, Unit};

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
    let Some(QuantizeRows { model, data, waves, store }) = rows else { return Ok(nearest) };
    let bar = progress.bar("calibrating", data.tokens() as u64, Unit::Count("tokens"));
    let calibration = Calibration::new(model, data, waves).collector(Box::new(ExpertInputs::of(base)));
    let statistics = calibration.store(store).run(&mut |at| bar.at(at.tokens_done))?;
    Ok(Quantized::calibrated(base, how, &InputMoments::new(statistics))?)
}

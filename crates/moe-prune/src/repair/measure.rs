//! How well each layer of a changed model does what the full one's does.

use moe_core::data::Wave;
use moe_core::trace::{Nobody, Observer, Signals};
use moe_core::{Engine, EngineOptions, LayerChange, LayerOutput, LayerVisitor, Model};
use serde::{Deserialize, Serialize};

use super::linear::squares;
use crate::Result;

/// Reconstruction error of one MoE layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerError {
    /// Decoder layer index.
    pub layer: usize,
    /// `sum_t |y'_t - y_t|^2 / sum_t |y_t|^2`, with y what the full model's feed-forward half adds to the residual
    /// stream and y' what the changed model's adds to the same stream.
    pub error: f64,
}

/// Errors of the layers of `student`, each on the residual stream that `teacher` has there, so that errors of earlier
/// layers do not count.
///
/// # Errors
/// Those of [`Engine::run_layerwise`].
pub fn layer_errors(teacher: &Model, student: &Model, waves: &[Wave]) -> Result<Vec<LayerError>> {
    let engine = Engine::new(teacher, EngineOptions::default());
    let student = Engine::new(student, EngineOptions::default());
    let mut visitor = Visitor { student, sums: (0.0, 0.0), errors: Vec::new() };
    engine.run_layerwise(waves, &mut visitor)?;
    Ok(visitor.errors)
}

struct Visitor<'a> {
    student: Engine<'a>,
    sums: (f64, f64),
    errors: Vec<LayerError>,
}

impl Observer for Visitor<'_> {
    fn needs(&self) -> Signals {
        Signals::STREAMS
    }

    fn output(&mut self, output: &LayerOutput<'_>) -> moe_core::Result<()> {
        let found = self.student.feed_forward(output.layer, output.half(), &mut Nobody)?;
        let difference = found - output.output.clone();
        let added = output.output.clone() - output.input.clone();
        self.sums.0 += squares(moe_core::host::HostView::new(&difference).as_slice());
        self.sums.1 += squares(moe_core::host::HostView::new(&added).as_slice());
        Ok(())
    }
}

impl LayerVisitor for Visitor<'_> {
    fn end_layer(&mut self, layer: usize) -> moe_core::Result<LayerChange> {
        let (error, all) = std::mem::take(&mut self.sums);
        self.errors.push(LayerError { layer, error: if all > 0.0 { error / all } else { 0.0 } });
        Ok(LayerChange::default())
    }
}

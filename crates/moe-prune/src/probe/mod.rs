//! Asking a model what a plan would cost, without writing a checkpoint.
//!
//! [`ModelProbe`] is what the model-in-the-loop allocators and pruners see of a model. It needs no tensors of any
//! framework: a test can be a probe. With feature `repair`, `EngineProbe` answers from a real model.

#[cfg(feature = "repair")]
mod engine;
#[cfg(feature = "repair")]
mod overlay;

use moe_checkpoint::MoeShape;
use serde::{Deserialize, Serialize};

#[cfg(feature = "repair")]
pub use engine::{EngineProbe, ProbeOptions};
#[cfg(feature = "repair")]
pub use overlay::PlanOverlay;

use crate::plan::LayerKept;
use crate::{Error, Questions, Result};

/// How far a changed model is from the full one, on the probe's data. Divergences are of next-token distributions, in
/// nats per predicted token: KL(full || changed).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Distortion {
    /// Mean divergence over all predicted tokens.
    pub mean: f64,
    /// Largest mean divergence of one sequence.
    pub worst: f64,
    /// Mean over predicted tokens of `sum_v min(p_full(v), p_changed(v))`: 1 for equal distributions, 1 minus their
    /// total variation distance.
    pub overlap: f64,
}

/// Which number of a [`Distortion`] counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Statistic {
    /// [`Distortion::mean`].
    #[default]
    Mean,
    /// [`Distortion::worst`].
    Worst,
}

impl Distortion {
    /// The number that counts.
    pub fn of(&self, statistic: Statistic) -> f64 {
        match statistic {
            Statistic::Mean => self.mean,
            Statistic::Worst => self.worst,
        }
    }
}

/// Answers questions about a model under changes.
///
/// Everything is deterministic: the same question has the same answer.
pub trait ModelProbe {
    /// Which questions have an answer. Methods that ask another are refused before any work.
    fn answers(&self) -> Questions {
        Questions::ALL
    }

    /// Distortion of the model with only this kept: all MoE layers in order. Experts that are
    /// [`removed`](LayerKept::removed) cannot be routed to; experts without units that are not give nothing.
    ///
    /// # Errors
    /// Whatever keeps the model from running.
    fn distortion(&mut self, kept: &[LayerKept]) -> Result<Distortion>;

    /// Mean divergence with the output of every expert multiplied by a gain `[MoE layer][expert]` on top of its routing
    /// weight (nothing is renormalized), and its gradient with respect to the gains, of that shape. `batch` counts up:
    /// a probe may look at another part of its data for each.
    ///
    /// # Errors
    /// Whatever keeps the model from running.
    fn gain_gradient(&mut self, gains: &[Vec<f32>], batch: usize) -> Result<(f64, Vec<Vec<f32>>)>;

    /// For every candidate set of experts of decoder layer `layer` (ascending): sum over batches of the Frobenius norm
    /// of the difference between the layer's output and its output with these experts' logits at minus infinity. Layers
    /// that [`ModelProbe::settle`] has fixed are as it says, for later layers.
    ///
    /// # Errors
    /// Whatever keeps the model from running.
    fn layer_errors(&mut self, layer: usize, candidates: &[Vec<u32>]) -> Result<Vec<f64>>;

    /// Fixes what decoder layer `layer` has lost, so that questions about the output of later layers see it.
    ///
    /// # Errors
    /// Whatever keeps the model from running.
    fn settle(&mut self, layer: usize, removed: &[u32]) -> Result<()>;
}

/// No model at hand: every question is [`Error::NeedsProbe`].
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProbe;

impl ModelProbe for NoProbe {
    fn answers(&self) -> Questions {
        Questions::NONE
    }

    fn distortion(&mut self, _: &[LayerKept]) -> Result<Distortion> {
        Err(Error::NeedsProbe { what: "the distortion of a plan" })
    }

    fn gain_gradient(&mut self, _: &[Vec<f32>], _: usize) -> Result<(f64, Vec<Vec<f32>>)> {
        Err(Error::NeedsProbe { what: "the gradient of expert gains" })
    }

    fn layer_errors(&mut self, _: usize, _: &[Vec<u32>]) -> Result<Vec<f64>> {
        Err(Error::NeedsProbe { what: "the output error of a layer" })
    }

    fn settle(&mut self, _: usize, _: &[u32]) -> Result<()> {
        Err(Error::NeedsProbe { what: "layers that see what earlier ones lost" })
    }
}

/// Measures a plan where a model is at hand.
pub(crate) fn measured(probe: &mut dyn ModelProbe, kept: &[LayerKept]) -> Result<Option<Distortion>> {
    match probe.answers().distortion {
        true => probe.distortion(kept).map(Some),
        false => Ok(None),
    }
}

/// A plan that keeps everything of this shape, in the form a probe takes.
pub(crate) fn everything(shape: &MoeShape) -> Vec<LayerKept> {
    let all = |width: &usize| (0..*width as u32).collect();
    shape
        .layers
        .iter()
        .map(|layer| LayerKept {
            layer: layer.layer,
            experts: layer.widths.iter().map(all).collect(),
            removed: Vec::new(),
        })
        .collect()
}

//! Sweeps: a wave through the model layer by layer, forward and backward, experts outermost.
//!
//! Per wave, forward: attention per sequence, router for the whole wave, then each expert once for all its tokens.
//! Head: an [`Objective`] and its gradient in pieces of tokens and vocabulary. Backward, from the last to the first MoE
//! layer: what was not kept is computed again by the same kernels on the same shapes, so memory limits never change a
//! bit of the result. See [`crate::memory`].
//!
//! [`Engine::run`] takes one wave through all layers, [`Engine::go_on`] does so with files that a run that was stopped
//! goes on from; [`Engine::run_layerwise`] takes all waves through one layer after the other.

mod backward;
mod dense_router;
mod depth;
mod driver;
mod experts;
mod forward;
mod head;
mod layer_input;
mod layerwise;
mod modulated;
mod prepare;
mod route_trials;
mod routing;
mod unfinished;

use std::path::PathBuf;

pub(crate) use forward::{FfnPass, LayerTape, beside_each_other};
pub use layerwise::{LayerChange, LayerSweep, LayerVisitor};
pub use route_trials::RouteTrial;
pub use unfinished::UnfinishedWave;

use crate::{
    data::Wave,
    error::Result,
    memory::{self, MemoryPlan, WaveSize},
    model::Model,
    objective::{CrossEntropy, Objective},
    trace::{Observer, Signals, WaveInfo},
};

/// How an [`Engine`] works.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Tokens whose logits exist at once. Part of the numerics.
    pub head_tokens: usize,
    /// Where layer inputs go when memory is short; the system's temporary directory by default.
    pub spill_dir: PathBuf,
    /// Compute the loss even if no observer needs gradients or logits.
    pub loss: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { head_tokens: 512, spill_dir: std::env::temp_dir(), loss: false }
    }
}

/// What a sweep over one wave found.
#[derive(Clone, Debug, PartialEq)]
pub struct WaveReport {
    /// Tokens of the wave.
    pub tokens: usize,
    /// Predicted tokens.
    pub loss_tokens: usize,
    /// Sum of the objective over the predicted tokens, in nats, if it was computed.
    pub loss: Option<f64>,
    /// Sum per sequence.
    pub sequence_losses: Option<Vec<f64>>,
}

impl WaveReport {
    fn new(wave: &WaveInfo) -> Self {
        Self { tokens: wave.tokens, loss_tokens: wave.loss_tokens(), loss: None, sequence_losses: None }
    }
}

/// Runs waves through a [`Model`].
#[derive(Debug)]
pub struct Engine<'m> {
    model: &'m Model,
    options: EngineOptions,
}

impl<'m> Engine<'m> {
    /// An engine on `model`.
    pub fn new(model: &'m Model, options: EngineOptions) -> Self {
        Self { model, options }
    }

    /// The model it runs.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// How it works.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// The memory plan of waves of `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory) if the model's `max_memory` cannot hold them.
    pub fn plan(&self, tokens: usize, needs: Signals) -> Result<MemoryPlan> {
        self.plan_with(tokens, needs.backward(), self.needs_head(needs))
    }

    fn plan_with(&self, tokens: usize, gradients: bool, head: bool) -> Result<MemoryPlan> {
        let size = WaveSize {
            tokens,
            gradients,
            head,
            head_tokens: self.options.head_tokens,
            experts_together: memory::experts_together(self.model.device()),
            waiting: 0,
            waiting_keys: 0,
            decoded_per_use: self.model.decodes_per_use(),
            expert_cache: self.model.expert_cache_bytes(),
        };
        memory::plan(self.model.config(), size, memory::limit(self.model.max_memory()))
    }

    fn needs_head(&self, needs: Signals) -> bool {
        needs.backward() || needs.logits || self.options.loss
    }

    /// Runs one wave and shows it to `observer`. The objective, where one is needed, is the next-token cross-entropy.
    ///
    /// # Errors
    /// [`Error::Input`](crate::Error::Input) for an empty wave or token ids outside the vocabulary,
    /// [`Error::Memory`](crate::Error::Memory), [`Error::NotFinite`](crate::Error::NotFinite) for a NaN or infinite
    /// loss, and whatever the observer refuses.
    pub fn run(&self, wave: &Wave, observer: &mut dyn Observer) -> Result<WaveReport> {
        let head = self.needs_head(observer.needs());
        let mut objective = CrossEntropy;
        self.sweep(wave, observer, head.then_some(&mut objective), None)
    }

    /// As [`run`](Self::run), with another objective, which is always computed.
    ///
    /// # Errors
    /// As [`run`](Self::run), and whatever the objective refuses.
    pub fn run_with(
        &self,
        wave: &Wave,
        objective: &mut dyn Objective,
        observer: &mut dyn Observer,
    ) -> Result<WaveReport> {
        self.sweep(wave, observer, Some(objective), None)
    }
}

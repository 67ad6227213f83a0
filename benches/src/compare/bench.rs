//! A model, what it predicts on rows it was not calibrated on, and how far a changed one is from it.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::Tensor;
use moe_core::data::{Sequence, Tokenizer, Wave, WaveOptions, waves};
use moe_core::evaluate::{EvaluateOptions, evaluate};
use moe_core::kernels::loss::Losses;
use moe_core::objective::Objective;
use moe_core::trace::{Nobody, WaveInfo};
use moe_core::{CrossEntropy, Distillation, Engine, EngineOptions, Model, TeacherLogits};

use super::case::rounded;
use super::layers::LayerErrors;
use super::rows::HeldOut;
use crate::Result;

/// Figures by name, `CAPABILITY_FIGURE`: `ppl`, the perplexity; `kl`, the divergence from the full model in nats per
/// predicted token; `exact`, the share of questions answered exactly; `choice`, the share of those whose right answer
/// is the likeliest; `layer`, what single layers get wrong.
pub type Metrics = BTreeMap<String, f64>;

/// What is measured on a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figures {
    /// Perplexity and divergence: one forward sweep.
    Predictions,
    /// Exact match as well: answers are generated.
    All,
}

/// The full model and what every other one is measured on.
pub struct Bench {
    /// The full model.
    pub model: Model,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// What is measured on.
    pub held_out: Vec<HeldOut>,
    /// All sequences of `held_out`.
    waves: Vec<Wave>,
    /// Sequences of each capability among all.
    spans: Vec<Range<usize>>,
    teacher: TeacherLogits,
    /// What single layers are measured on, if they are.
    layers: Option<LayerErrors>,
    /// Figures of the full model.
    pub base: Metrics,
}

impl Bench {
    /// Runs the full model and remembers the `top` most likely next tokens at every predicted position.
    ///
    /// # Errors
    /// Whatever stops the model; `max_memory` that cannot hold a wave.
    pub fn new(
        model: Model,
        tokenizer: Tokenizer,
        held_out: Vec<HeldOut>,
        wave_options: WaveOptions,
        top: usize,
    ) -> Result<Self> {
        let mut spans = Vec::with_capacity(held_out.len());
        let mut all: Vec<Sequence> = Vec::new();
        for rows in &held_out {
            spans.push(all.len()..all.len() + rows.sequences.len());
            all.extend(rows.sequences.iter().cloned());
        }
        let waves = waves(&all, wave_options);
        let teacher = TeacherLogits::record(&Engine::new(&model, EngineOptions::default()), &waves, top)?;
        let base = Metrics::new();
        let mut bench = Self { model, tokenizer, held_out, waves, spans, teacher, layers: None, base };
        bench.base = bench.measure(&bench.model, Figures::All)?;
        Ok(bench)
    }

    /// The same, measuring single layers as well: see `LayerErrors`.
    ///
    /// # Errors
    /// Whatever stops the model.
    pub fn with_layer_errors(mut self) -> Result<Self> {
        self.layers = Some(LayerErrors::record(&self.model, &self.waves)?);
        self.base = self.measure(&self.model, Figures::All)?;
        Ok(self)
    }

    /// Names of the figures.
    pub fn names(&self, figures: Figures) -> Vec<String> {
        let mut names = Vec::new();
        for rows in &self.held_out {
            names.extend(["ppl", "kl"].map(|figure| format!("{}_{figure}", rows.name)));
            if self.layers.is_some() {
                names.push(format!("{}_layer", rows.name));
            }
            if let (Figures::All, Some(answers)) = (figures, rows.answers()) {
                names.push(format!("{}_{answers}", rows.name));
            }
        }
        names
    }

    /// Figures of a model that reads the same tokens.
    ///
    /// # Errors
    /// Whatever stops the model.
    pub fn measure(&self, model: &Model, figures: Figures) -> Result<Metrics> {
        let mut metrics = self.predictions(model)?;
        if let Some(layers) = &self.layers {
            for (rows, error) in self.held_out.iter().zip(layers.of(model, &self.spans)?) {
                metrics.insert(format!("{}_layer", rows.name), rounded(error));
            }
        }
        if figures == Figures::All {
            for rows in &self.held_out {
                let Some(questions) = &rows.questions else { continue };
                let found = evaluate(model, &self.tokenizer, questions, &EvaluateOptions::default())?;
                metrics.insert(found.key(), rounded(found.value()));
            }
        }
        Ok(metrics)
    }

    fn predictions(&self, model: &Model) -> Result<Metrics> {
        let engine = Engine::new(model, EngineOptions::default());
        // per sequence: predicted tokens, cross-entropy, divergence
        let mut sums: Vec<[f64; 3]> = Vec::new();
        for wave in &self.waves {
            let mut compared = Compared { divergence: Distillation::new(&self.teacher), losses: Vec::new() };
            let report = engine.run_with(wave, &mut compared, &mut Nobody)?;
            let mut losses = compared.losses.into_iter();
            let divergences = report.sequence_losses.unwrap_or_default();
            for (sequence, divergence) in wave.sequences.iter().zip(divergences) {
                let tokens = sequence.loss_tokens();
                sums.push([tokens as f64, losses.by_ref().take(tokens).sum(), divergence]);
            }
        }
        let mut metrics = Metrics::new();
        for (rows, span) in self.held_out.iter().zip(&self.spans) {
            let sum = |field: usize| sums[span.clone()].iter().map(|sequence| sequence[field]).sum::<f64>();
            let tokens = sum(0).max(1.0);
            metrics.insert(format!("{}_ppl", rows.name), rounded((sum(1) / tokens).exp()));
            // a divergence is never negative, but its rounding errors are
            metrics.insert(format!("{}_kl", rows.name), rounded((sum(2) / tokens).max(0.0)));
        }
        Ok(metrics)
    }
}

/// The divergence from the full model, and the cross-entropy on the way.
struct Compared<'t> {
    divergence: Distillation<'t>,
    /// Cross-entropy of each predicted token, in order.
    losses: Vec<f64>,
}

impl Objective for Compared<'_> {
    fn begin_wave(&mut self, wave: &WaveInfo) -> moe_core::Result<()> {
        self.divergence.begin_wave(wave)
    }

    fn losses(&mut self, blocks: Vec<Tensor<2>>, targets: &[Option<u32>], gradient: bool) -> moe_core::Result<Losses> {
        let all = CrossEntropy.losses(blocks.clone(), targets, false)?.losses;
        self.losses.extend(all.into_iter().zip(targets).filter_map(|(loss, target)| target.map(|_| loss)));
        self.divergence.losses(blocks, targets, gradient)
    }
}

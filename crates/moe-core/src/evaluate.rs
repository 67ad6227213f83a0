//! Exact match and perplexity.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::{
    data::{EvalRows, EvalSet, Tokenizer, Wave, WaveOptions, extract_answer, waves},
    engine::{Engine, EngineOptions},
    error::{Error, Result},
    generate::{GenerateOptions, Sampling, generate},
    model::Model,
    objective::{Distillation, TeacherLogits},
    trace::Nobody,
};

/// Options of [`evaluate`].
#[derive(Clone, Debug)]
pub struct EvaluateOptions {
    /// New tokens per question, at most.
    pub max_new_tokens: usize,
    /// Tokens per window of a perplexity.
    pub length: usize,
    /// How windows are grouped.
    pub waves: WaveOptions,
}

impl Default for EvaluateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 28, length: 128, waves: WaveOptions::default() }
    }
}

/// Result of one evaluation set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Name of the set.
    pub name: String,
    /// What was measured.
    pub metric: Metric,
    /// Rows evaluated.
    pub rows: usize,
    /// Tokens generated (exact match) or predicted (perplexity).
    pub tokens: usize,
    /// Time taken.
    pub seconds: f64,
}

/// A figure of merit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Fraction of questions answered exactly.
    ExactMatch(f64),
    /// exp of the mean cross-entropy.
    Perplexity(f64),
}

impl Evaluation {
    /// `NAME_exact` or `NAME_ppl`.
    pub fn key(&self) -> String {
        match self.metric {
            Metric::ExactMatch(_) => format!("{}_exact", self.name),
            Metric::Perplexity(_) => format!("{}_ppl", self.name),
        }
    }

    /// The figure.
    pub fn value(&self) -> f64 {
        match self.metric {
            Metric::ExactMatch(x) | Metric::Perplexity(x) => x,
        }
    }
}

/// Evaluates one set: greedy exact match of questions, or perplexity over consecutive windows of the joined texts.
///
/// # Errors
/// Those of [`generate`] and [`Engine::run`].
pub fn evaluate(model: &Model, tokenizer: &Tokenizer, set: &EvalSet, options: &EvaluateOptions) -> Result<Evaluation> {
    let start = Instant::now();
    let (metric, tokens) = match &set.rows {
        EvalRows::Exact(questions) => {
            let prompts: Vec<Vec<u32>> = questions.iter().map(|q| q.ids.clone()).collect();
            let generation = GenerateOptions {
                max_new_tokens: options.max_new_tokens,
                sampling: Sampling::Greedy,
                stop: model.config().eos_token_ids.clone(),
                ..GenerateOptions::default()
            };
            // only the first line of a completion counts
            let ended = |completion: &[u32]| {
                completion.last().is_some_and(|id| tokenizer.decode(&[*id]).is_ok_and(|text| text.contains('\n')))
            };
            let completions = generate(model, &prompts, &generation, ended)?;
            let mut right = 0;
            for (question, completion) in questions.iter().zip(&completions) {
                right += usize::from(extract_answer(&tokenizer.decode(completion)?) == question.answer);
            }
            let tokens = completions.iter().map(Vec::len).sum();
            (Metric::ExactMatch(right as f64 / questions.len().max(1) as f64), tokens)
        }
        EvalRows::Perplexity(text) => {
            let (loss, tokens) = cross_entropy(model, &text.windows(options.length), options.waves)?;
            (Metric::Perplexity((loss / tokens.max(1) as f64).exp()), tokens)
        }
    };
    let seconds = elapsed(start);
    Ok(Evaluation { name: set.name.clone(), metric, rows: set.len(), tokens, seconds })
}

/// Sum of the cross-entropy over the predicted tokens of `sequences`, in nats, and their number.
///
/// # Errors
/// Those of [`Engine::run`].
pub fn cross_entropy(model: &Model, sequences: &[crate::data::Sequence], options: WaveOptions) -> Result<(f64, usize)> {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    let (mut loss, mut tokens) = (0.0, 0);
    for wave in waves(sequences, options) {
        let report = engine.run(&wave, &mut Nobody)?;
        loss += report.loss.unwrap_or(0.0);
        tokens += report.loss_tokens;
    }
    Ok((loss, tokens))
}

/// Divergence KL(teacher || model) per predicted token of `waves`, in nats: 0 for a model that predicts as its teacher does. A teacher that
/// kept only some tokens gives a lower bound, see [`TeacherLogits`].
///
/// # Errors
/// Those of [`Engine::run_with`] and [`Distillation`]; [`Error::Input`] if nothing is predicted.
pub fn divergence<'w>(
    model: &Model,
    teacher: &TeacherLogits,
    waves: impl IntoIterator<Item = &'w Wave>,
) -> Result<f64> {
    let engine = Engine::new(model, EngineOptions::default());
    let (mut sum, mut tokens) = (0.0, 0);
    for wave in waves {
        let report = engine.run_with(wave, &mut Distillation::new(teacher), &mut Nobody)?;
        sum += report.loss.unwrap_or(0.0);
        tokens += report.loss_tokens;
    }
    match tokens {
        0 => Err(Error::input("predicted tokens", 0, "at least one")),
        _ => Ok(sum / tokens as f64),
    }
}

fn elapsed(start: Instant) -> f64 {
    start.elapsed().max(Duration::from_nanos(1)).as_secs_f64()
}

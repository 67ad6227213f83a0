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
    /// New tokens per question, at most. Published answers have up to some hundreds.
    pub max_new_tokens: usize,
    /// Text that ends an answer, besides the end of the sequence; the end of the line, if empty.
    pub stop: Vec<String>,
    /// Tokens per window of a perplexity.
    pub length: usize,
    /// How windows are grouped.
    pub waves: WaveOptions,
}

impl Default for EvaluateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 28, stop: Vec::new(), length: 128, waves: WaveOptions::default() }
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
    /// Fraction of questions whose right choice is the most likely one.
    Choice(f64),
}

impl Evaluation {
    /// `NAME_exact`, `NAME_ppl` or `NAME_choice`.
    pub fn key(&self) -> String {
        match self.metric {
            Metric::Choice(_) => format!("{}_choice", self.name),
            Metric::ExactMatch(_) => format!("{}_exact", self.name),
            Metric::Perplexity(_) => format!("{}_ppl", self.name),
        }
    }

    /// The figure.
    pub fn value(&self) -> f64 {
        match self.metric {
            Metric::ExactMatch(x) | Metric::Perplexity(x) | Metric::Choice(x) => x,
        }
    }
}

/// Evaluates one set: greedy exact match of questions, perplexity over consecutive windows of the joined texts, or the
/// share of questions whose right choice has the largest sum of log-likelihoods of its tokens (`acc` of
/// lm-evaluation-harness).
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
            // By default only the first line of a completion counts.
            let lines = options.stop.is_empty();
            let ended = |completion: &[u32]| match lines {
                true => {
                    completion.last().is_some_and(|id| tokenizer.decode(&[*id]).is_ok_and(|text| text.contains('\n')))
                }
                false => tokenizer.decode(completion).is_ok_and(|text| cut(&text, &options.stop).len() < text.len()),
            };
            let completions = generate(model, &prompts, &generation, ended)?;
            let mut right = 0;
            for (question, completion) in questions.iter().zip(&completions) {
                let text = tokenizer.decode(completion)?;
                // With stops of its own an answer may have many lines; its last one says it.
                let text = match lines {
                    true => text.as_str(),
                    false => cut(&text, &options.stop).trim_end().lines().next_back().unwrap_or_default(),
                };
                right += usize::from(extract_answer(text) == question.answer);
            }
            let tokens = completions.iter().map(Vec::len).sum();
            (Metric::ExactMatch(right as f64 / questions.len().max(1) as f64), tokens)
        }
        EvalRows::Perplexity(text) => {
            let (loss, tokens) = cross_entropy(model, &text.windows(options.length), options.waves)?;
            (Metric::Perplexity((loss / tokens.max(1) as f64).exp()), tokens)
        }
        EvalRows::Choice(questions) => {
            let sequences: Vec<_> = questions.iter().flat_map(|question| question.choices.iter().cloned()).collect();
            let tokens = sequences.iter().map(crate::data::Sequence::loss_tokens).sum();
            let mut losses = sequence_losses(model, &sequences, options.waves)?.into_iter();
            let mut right = 0;
            for question in questions {
                let losses: Vec<f64> = losses.by_ref().take(question.choices.len()).collect();
                let best = (0..losses.len()).min_by(|a, b| losses[*a].total_cmp(&losses[*b]));
                right += usize::from(best == Some(question.right));
            }
            (Metric::Choice(right as f64 / questions.len().max(1) as f64), tokens)
        }
    };
    let seconds = elapsed(start);
    Ok(Evaluation { name: set.name.clone(), metric, rows: set.len(), tokens, seconds })
}

/// A text up to the first of some stops.
fn cut<'t>(text: &'t str, stops: &[String]) -> &'t str {
    let end = stops.iter().filter_map(|stop| text.find(stop.as_str())).min();
    &text[..end.unwrap_or(text.len())]
}

/// Sum of the cross-entropy over the predicted tokens of each of `sequences`, in nats.
///
/// # Errors
/// Those of [`Engine::run`].
pub fn sequence_losses(model: &Model, sequences: &[crate::data::Sequence], options: WaveOptions) -> Result<Vec<f64>> {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    let mut losses = Vec::with_capacity(sequences.len());
    for wave in waves(sequences, options) {
        losses.extend(engine.run(&wave, &mut Nobody)?.sequence_losses.unwrap_or_default());
    }
    Ok(losses)
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

/// Divergence KL(teacher || model) per predicted token of `waves`, in nats: 0 for a model that predicts as its teacher
/// does. A teacher that kept only some tokens gives a lower bound, see [`TeacherLogits`].
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

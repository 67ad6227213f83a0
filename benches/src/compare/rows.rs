//! Rows that are calibrated and measured on.

use std::path::{Path, PathBuf};

use moe_checkpoint::ModelConfig;
use moe_core::data::{ChoiceQuestion, Dataset, DatasetOptions, EvalRows, EvalSet, LossOver, Sequence, Tokenizer};

use crate::{Error, Result};

/// What is drawn from calibration rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draw {
    /// The rows.
    pub file: PathBuf,
    /// Sequences at most.
    pub samples: usize,
    /// Tokens of a sequence at most.
    pub length: usize,
    /// Join rows and cut the whole into windows of `length` tokens.
    pub packing: bool,
}

impl Draw {
    /// The sequences of a draw: rows in a random order of this seed, or the first ones. Which they are does not depend
    /// on what of them counts in the loss.
    ///
    /// # Errors
    /// Those of [`Dataset::load`].
    pub fn load(
        &self,
        seed: Option<u64>,
        loss: LossOver,
        tokenizer: Option<&Tokenizer>,
        config: &ModelConfig,
    ) -> Result<Dataset> {
        let Self { samples, length, packing, .. } = *self;
        let options =
            DatasetOptions { samples: Some(samples), length, packing, seed, loss, ..DatasetOptions::default() };
        Ok(Dataset::load(&self.file, tokenizer, config.vocab_size, &options)?)
    }
}

/// How many rows are measured on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rows that are read.
    pub rows: usize,
    /// Questions that are answered.
    pub answered: usize,
    /// Tokens that are run to predict: as many questions, or windows of text, as make at most this.
    pub tokens: usize,
    /// Tokens of a window.
    pub length: usize,
}

/// Rows of one capability that nothing was calibrated on.
#[derive(Clone, Debug)]
pub struct HeldOut {
    /// Name of the capability: NAME of `NAME_test.jsonl`.
    pub name: String,
    /// What is predicted: windows of text, or questions with their completions, of which only these count.
    pub sequences: Vec<Sequence>,
    /// Questions to answer, or to choose an answer of.
    pub questions: Option<EvalSet>,
}

impl HeldOut {
    /// Reads a file named `NAME_test.jsonl`. Questions are answered only if `generate`.
    ///
    /// # Errors
    /// A file that cannot be read as that; questions without a completion to predict.
    pub fn load(
        path: &Path,
        tokenizer: &Tokenizer,
        config: &ModelConfig,
        limits: Limits,
        generate: bool,
    ) -> Result<Self> {
        let set = EvalSet::load(path, tokenizer, config.vocab_size, Some(limits.rows))?;
        let name = set.name.clone();
        let (mut sequences, questions) = match set.rows {
            EvalRows::Perplexity(text) => (text.windows(limits.length), None),
            EvalRows::Exact(mut questions) => {
                let options = DatasetOptions {
                    samples: Some(limits.rows),
                    length: config.max_position_embeddings.max(Sequence::MIN_LEN),
                    loss: LossOver::Completions,
                    ..DatasetOptions::default()
                };
                let data = Dataset::load(path, Some(tokenizer), config.vocab_size, &options)
                    .map_err(|error| Error::Invalid(format!("{error} (a question needs its \"completion\", too)")))?;
                questions.truncate(limits.answered);
                let set = EvalSet { name: name.clone(), rows: EvalRows::Exact(questions) };
                (data.sequences, generate.then_some(set))
            }
            // What is predicted of a choice is the right one.
            EvalRows::Choice(mut questions) => {
                let right = |question: &ChoiceQuestion| question.choices[question.right].clone();
                let sequences = questions.iter().map(right).collect();
                questions.truncate(limits.answered);
                let set = EvalSet { name: name.clone(), rows: EvalRows::Choice(questions) };
                (sequences, generate.then_some(set))
            }
        };
        let mut tokens = 0;
        let fit = sequences.iter().take_while(|sequence| {
            tokens += sequence.len();
            tokens <= limits.tokens
        });
        let fit = fit.count().max(1);
        sequences.truncate(fit);
        Ok(Self { name, sequences, questions })
    }

    /// What answers are called in figures: `exact` for those that are generated, `choice` for those that are chosen;
    /// none for text.
    pub fn answers(&self) -> Option<&'static str> {
        let questions = self.questions.as_ref()?;
        Some(if matches!(questions.rows, EvalRows::Choice(_)) { "choice" } else { "exact" })
    }

    /// Predicted tokens.
    pub fn predicted(&self) -> usize {
        self.sequences.iter().map(Sequence::loss_tokens).sum()
    }
}

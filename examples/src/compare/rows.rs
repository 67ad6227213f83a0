//! Rows that are calibrated and measured on.

use std::path::{Path, PathBuf};

use moe_checkpoint::ModelConfig;
use moe_core::data::{Dataset, DatasetOptions, EvalRows, EvalSet, LossOver, Sequence, Tokenizer};

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
    /// The sequences of a draw: rows in a random order of this seed, or the first ones. Which they are does not depend on
    /// what of them counts in the loss.
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
        let options = DatasetOptions { samples: Some(samples), length, packing, seed, loss };
        Ok(Dataset::load(&self.file, tokenizer, config.vocab_size, &options)?)
    }
}

/// How many rows are measured on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Questions whose completions are predicted.
    pub predicted: usize,
    /// Questions that are answered.
    pub answered: usize,
    /// Rows of text.
    pub text: usize,
    /// Windows of text at most.
    pub windows: usize,
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
    /// Questions to answer.
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
        let rows = limits.answered.max(limits.text);
        let set = EvalSet::load(path, tokenizer, config.vocab_size, Some(rows))?;
        let name = set.name.clone();
        let (sequences, questions) = match set.rows {
            EvalRows::Perplexity(text) => {
                let mut windows = text.windows(limits.length);
                windows.truncate(limits.windows);
                (windows, None)
            }
            EvalRows::Exact(mut questions) => {
                let options = DatasetOptions {
                    samples: Some(limits.predicted),
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
        };
        Ok(Self { name, sequences, questions })
    }

    /// Predicted tokens.
    pub fn predicted(&self) -> usize {
        self.sequences.iter().map(Sequence::loss_tokens).sum()
    }
}

//! What is measured on a model.

use std::path::{Path, PathBuf};

use moe_checkpoint::ModelConfig;
use moe_checkpoint::group::{Alone, Group};
use moe_core::data::{
    Dataset, DatasetOptions, EvalRows, EvalSet, EvalSetOptions, LossOver, Sequence, Tokenizer, WaveOptions,
};
use moe_core::decode::{Decoding, DecodingReport};
use moe_core::evaluate::{EvaluateOptions, cross_entropy_in_group, evaluate_in_group};
use moe_core::generate::GenerateOptions;
use moe_core::trace::Signals;
use moe_core::{Engine, EngineOptions, Model};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Error, Result};

/// How evaluation files are read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalOptions {
    /// Rows per file, at most.
    pub rows: usize,
    /// Tokens per window of a perplexity over rows of text.
    pub length: usize,
    /// Generate answers for rows that have one, and count exact matches, instead of the perplexity of their
    /// completions.
    pub generate: bool,
    /// New tokens per answer, at most.
    pub max_new_tokens: usize,
    /// Text that ends an answer; the end of the line, if empty.
    pub stop: Vec<String>,
    /// Put prompts into the tokenizer's chat template, as one turn of the user.
    pub chat: bool,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self { rows: 200, length: 128, generate: true, max_new_tokens: 256, stop: Vec::new(), chat: false }
    }
}

/// An evaluation file, tokenized.
#[derive(Clone, Debug)]
pub struct EvalFile {
    /// NAME of `NAME_test.jsonl`.
    pub name: String,
    path: PathBuf,
    rows: Rows,
    options: EvalOptions,
}

#[derive(Clone, Debug)]
enum Rows {
    /// Answers to generate, or text in windows.
    Set(EvalSet),
    /// Completions to predict from their prompts.
    Completions(Dataset),
}

impl EvalFile {
    /// Reads all files. Rows of text are for a perplexity. So are rows with answers, of the completions given their
    /// prompts, unless answers are to be generated.
    ///
    /// # Errors
    /// A file that cannot be read as that, two files of the same name, no tokenizer.
    pub fn load_all(
        paths: &[PathBuf],
        options: &EvalOptions,
        tokenizer: Option<&Tokenizer>,
        config: &ModelConfig,
    ) -> Result<Vec<Self>> {
        let mut files: Vec<Self> = Vec::with_capacity(paths.len());
        for path in paths {
            let Some(tokenizer) = tokenizer else {
                return Err(Error::Invalid(format!(
                    "{}: needs a tokenizer, but the model has no tokenizer.json",
                    path.display()
                )));
            };
            let file = Self::load(path, options, tokenizer, config)?;
            if let Some(other) = files.iter().find(|other| other.name == file.name) {
                let (a, b) = (other.path.display(), path.display());
                return Err(Error::Invalid(format!("{a} and {b}: two evaluation files named {}", file.name)));
            }
            files.push(file);
        }
        Ok(files)
    }

    fn load(path: &Path, eval: &EvalOptions, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<Self> {
        let options = EvalSetOptions { limit: Some(eval.rows), chat: eval.chat };
        let set = EvalSet::load_with(path, tokenizer, config.vocab_size, options)?;
        let name = set.name.clone();
        let rows = match set.rows {
            EvalRows::Exact(_) if !eval.generate => {
                let options = DatasetOptions {
                    samples: Some(eval.rows),
                    length: config.max_position_embeddings.max(Sequence::MIN_LEN),
                    loss: LossOver::Completions,
                    ..DatasetOptions::default()
                };
                let completions =
                    Dataset::load(path, Some(tokenizer), config.vocab_size, &options).map_err(|error| {
                        let hint = "the perplexity of answers needs a \"completion\" in every row; --generate does not";
                        Error::Invalid(format!("{error} ({hint})"))
                    })?;
                Rows::Completions(completions)
            }
            _ => Rows::Set(set),
        };
        Ok(Self { name, path: path.to_path_buf(), rows, options: eval.clone() })
    }

    /// `NAME_exact`, `NAME_ppl` or `NAME_choice`: what [`EvalFile::measure`] gives.
    pub fn key(&self) -> String {
        let metric = match &self.rows {
            Rows::Set(EvalSet { rows: EvalRows::Exact(_), .. }) => "exact",
            Rows::Set(EvalSet { rows: EvalRows::Choice(_), .. }) => "choice",
            _ => "ppl",
        };
        format!("{}_{metric}", self.name)
    }

    /// Whether the metric is a share of right answers, rather than a perplexity.
    pub fn is_exact(&self) -> bool {
        self.prompts().is_some()
    }

    /// Prompts whose answers are generated.
    pub fn prompts(&self) -> Option<Vec<Vec<u32>>> {
        match &self.rows {
            Rows::Set(EvalSet { rows: EvalRows::Exact(questions), .. }) => {
                Some(questions.iter().map(|question| question.ids.clone()).collect())
            }
            _ => None,
        }
    }

    /// What is measured, for people.
    pub fn description(&self) -> String {
        let rows = match &self.rows {
            Rows::Set(set) => set.len(),
            Rows::Completions(data) => data.sequences.len(),
        };
        match &self.rows {
            Rows::Set(EvalSet { rows: EvalRows::Exact(_), .. }) => format!("exact match of {rows} generated answers"),
            Rows::Set(EvalSet { rows: EvalRows::Choice(_), .. }) => {
                format!("share of {rows} questions whose right choice is the most likely")
            }
            Rows::Set(_) => format!("perplexity of {rows} rows of text in windows of {} tokens", self.options.length),
            Rows::Completions(_) => format!("perplexity of {rows} completions given their prompts"),
        }
    }

    /// What a model is run on: prompts of answers, pieces of text, prompts with each of their choices, or prompts with
    /// completions.
    pub fn sequences(&self) -> Vec<Sequence> {
        match &self.rows {
            Rows::Completions(data) => data.sequences.clone(),
            Rows::Set(EvalSet { rows: EvalRows::Perplexity(text), .. }) => text.windows(self.options.length),
            Rows::Set(EvalSet { rows: EvalRows::Exact(questions), .. }) => {
                questions.iter().map(|question| Sequence::new(question.ids.clone())).collect()
            }
            Rows::Set(EvalSet { rows: EvalRows::Choice(questions), .. }) => {
                questions.iter().flat_map(|question| question.choices.iter().cloned()).collect()
            }
        }
    }

    /// The measurement as JSON: equal for equal tokens.
    pub fn recipe(&self) -> Value {
        let mut hasher = blake3::Hasher::new();
        for id in self.sequences().iter().flat_map(|sequence| sequence.ids.iter().chain([&u32::MAX])) {
            hasher.update(&id.to_le_bytes());
        }
        let hash = hasher.finalize().to_hex().to_string();
        json!({ "file": self.path, "key": self.key(), "what": self.description(), "hash": hash })
    }

    /// Tokens that are run or, at most, generated.
    pub fn tokens(&self) -> usize {
        match &self.rows {
            Rows::Completions(data) => data.tokens(),
            Rows::Set(EvalSet { rows: EvalRows::Perplexity(text), .. }) => text.ids.len(),
            Rows::Set(EvalSet { rows: EvalRows::Exact(questions), .. }) => {
                questions.iter().map(|question| question.ids.len() + self.options.max_new_tokens).sum()
            }
            Rows::Set(EvalSet { rows: EvalRows::Choice(questions), .. }) => {
                questions.iter().flat_map(|question| &question.choices).map(Sequence::len).sum()
            }
        }
    }

    /// Checks that the memory limit of `model` can hold the measurement.
    ///
    /// # Errors
    /// [`moe_core::Error::Memory`].
    pub fn check_memory(&self, model: &Model, waves: WaveOptions) -> Result<()> {
        let (sequences, prompts) = match &self.rows {
            Rows::Completions(data) => (data.sequences.clone(), None),
            Rows::Set(EvalSet { rows: EvalRows::Perplexity(text), .. }) => (text.windows(self.options.length), None),
            Rows::Set(EvalSet { rows: EvalRows::Choice(questions), .. }) => {
                (questions.iter().flat_map(|question| question.choices.iter().cloned()).collect(), None)
            }
            Rows::Set(_) => (Vec::new(), self.prompts()),
        };
        let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
        for wave in moe_core::data::waves(&sequences, waves) {
            engine.plan(wave.tokens(), Signals::NONE)?;
        }
        if let Some(prompts) = prompts {
            let max_new_tokens = self.options.max_new_tokens;
            let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
            moe_core::generate::check_memory(model, &prompts, &options)?;
        }
        Ok(())
    }

    /// The figure of merit of a model, and the tokens predicted or generated for it.
    ///
    /// # Errors
    /// Whatever stops the model.
    pub fn measure(&self, model: &Model, tokenizer: &Tokenizer, waves: WaveOptions) -> Result<(f64, usize)> {
        let (value, tokens, _) = self.measure_with(model, tokenizer, waves, &Decoding::default())?;
        Ok((value, tokens))
    }

    /// The same with answers generated by a way of decoding, and what that did.
    ///
    /// # Errors
    /// Whatever stops the models.
    pub fn measure_with(
        &self,
        model: &Model,
        tokenizer: &Tokenizer,
        waves: WaveOptions,
        decoding: &Decoding<'_>,
    ) -> Result<(f64, usize, DecodingReport)> {
        self.measure_in_group(&Alone, model, tokenizer, waves, decoding)
    }

    /// The same with the other ranks of a group, which all get the same: likelihoods are shared out by waves; answers
    /// are generated by every rank.
    ///
    /// # Errors
    /// Whatever stops the models on any rank.
    pub fn measure_in_group(
        &self,
        group: &dyn Group,
        model: &Model,
        tokenizer: &Tokenizer,
        waves: WaveOptions,
        decoding: &Decoding<'_>,
    ) -> Result<(f64, usize, DecodingReport)> {
        match &self.rows {
            Rows::Set(set) => {
                let EvalOptions { length, max_new_tokens, ref stop, .. } = self.options;
                let options = EvaluateOptions { length, waves, max_new_tokens, stop: stop.clone() };
                let (found, report) = evaluate_in_group(group, model, tokenizer, set, &options, decoding)?;
                Ok((found.value(), found.tokens, report))
            }
            Rows::Completions(data) => {
                let (loss, tokens) = cross_entropy_in_group(group, model, &data.sequences, waves)?;
                Ok(((loss / tokens.max(1) as f64).exp(), tokens, DecodingReport::default()))
            }
        }
    }
}

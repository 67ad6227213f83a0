//! All ways of decoding as one tagged value.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Contrastive, Fusion, LogitMix, Speculative};
use crate::{
    Model,
    adaptive::{Ranks, RoutingConfig},
    data::Wave,
    depth::copied,
    error::{Error, Result},
    generate::GenerateOptions,
    router::Combine,
    steering::{Pathways, ReferenceStore, Rewiring},
};

/// How the next token is found from one or several sources, in JSON `{"type": "contrastive", "beta": 0.5}`: see the
/// table in [the module](super).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum DecodingConfig {
    /// The model alone.
    #[default]
    Plain,
    /// A strong model against a weak one.
    Contrastive(Contrastive),
    /// The model against itself under weaker routing.
    SelfContrast(SelfContrast),
    /// Small tuned models steer.
    Fusion(Fusion),
    /// A draft proposes.
    Speculative(Speculative),
    /// Vectors on the router's logits are fitted to every prompt.
    Rewiring(Rewiring),
    /// The routing of a prompt's last token is mixed from that of similar prompts.
    Pathways(PathwaysConfig),
}

/// C3PO with its references: from a file, or found on rows with answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PathwaysConfig {
    /// How routing is mixed.
    pub remix: Pathways,
    /// File of [`ReferenceStore::save`]; without one, references are found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// References in memory.
    #[serde(skip)]
    pub store: Option<Arc<ReferenceStore>>,
}

impl PathwaysConfig {
    /// The references, read if they are in a file.
    fn references(&self) -> Result<Arc<ReferenceStore>> {
        match (&self.store, &self.file) {
            (Some(store), _) => Ok(store.clone()),
            (None, Some(file)) => Ok(Arc::new(ReferenceStore::load(file)?)),
            (None, None) => {
                Err(Error::input("pathways", "no file", "one of references, or rows with answers to find them on"))
            }
        }
    }
}

/// SCMoE: contrasts a model with itself under weaker routing, without another model (arXiv 2405.14507).
///
/// The paper's settings are for two experts per token; where experts are many and small, a set of ranks beyond the
/// model's own is a better weak side than a single expert. Layers run once for both routings as far as these agree, to
/// the same bits ([`DecodingReport::shared`]).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SelfContrast {
    /// The weak routing: by default a single expert, the third best, as SCMoE's example has it.
    pub weak: RoutingConfig,
    /// The scores of both.
    pub scores: Contrastive,
}

impl Default for SelfContrast {
    fn default() -> Self {
        let weak = RoutingConfig::Ranks(Ranks { ranks: vec![2], combine: Combine::Model });
        Self { weak, scores: Contrastive::default() }
    }
}

impl DecodingConfig {
    /// Models that it needs beside the one that is generated with.
    pub fn other_models(&self) -> usize {
        match self {
            Self::Plain | Self::SelfContrast(_) | Self::Rewiring(_) | Self::Pathways(_) => 0,
            Self::Contrastive(_) | Self::Speculative(_) => 1,
            Self::Fusion(fusion) => 2 * fusion.pairs,
        }
    }

    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Plain => Ok(()),
            Self::Contrastive(scores) => scores.validate(),
            Self::SelfContrast(contrast) => contrast.scores.validate(),
            Self::Fusion(fusion) => fusion.validate(),
            Self::Speculative(speculative) => speculative.validate(),
            Self::Rewiring(rewiring) => rewiring.validate(),
            Self::Pathways(_) => Ok(()),
        }
    }

    /// Whether it learns from rows with answers.
    pub fn needs_rows(&self) -> bool {
        matches!(self, Self::Pathways(PathwaysConfig { file: None, store: None, .. }))
    }

    /// The same with what it learns from `waves`: prompts that `model` answers rightly, for pathways.
    ///
    /// # Errors
    /// [`Error::Input`] for rows without answers, or with fewer right ones than a prompt learns from; whatever stops
    /// the model.
    pub fn calibrated(&self, model: &Model, waves: &[Wave]) -> Result<Self> {
        let Self::Pathways(config) = self else { return Ok(self.clone()) };
        if !self.needs_rows() {
            return Ok(self.clone());
        }
        let sequences = waves.iter().flat_map(|wave| &wave.sequences);
        let samples: Vec<(Vec<u32>, Vec<u32>)> = sequences
            .filter_map(|sequence| sequence.prompt_and_answer())
            .map(|(prompt, answer)| (prompt.to_vec(), answer.to_vec()))
            .collect();
        if samples.is_empty() {
            let expected = "at least one, and a loss over completions alone";
            return Err(Error::input("rows with a prompt and an answer", 0, expected));
        }
        let store = ReferenceStore::collect(model, &samples)?;
        config.remix.validate(store.references.len())?;
        Ok(Self::Pathways(PathwaysConfig { store: Some(Arc::new(store)), ..config.clone() }))
    }

    /// Writes what is no JSON of it into a directory, and says where it is there.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] and [`Error::Io`] if it cannot be written.
    pub(crate) fn saved_into(&self, directory: &Path) -> Result<Self> {
        let Self::Pathways(config) = self else { return Ok(self.clone()) };
        let to = directory.join(ReferenceStore::FILE);
        match (&config.store, &config.file) {
            (Some(store), _) => store.save(&to)?,
            (None, Some(from)) => copied(from, &to)?,
            (None, None) => return Ok(self.clone()),
        }
        let file = Some(PathBuf::from(ReferenceStore::FILE));
        Ok(Self::Pathways(PathwaysConfig { file, store: None, ..config.clone() }))
    }

    /// The same with files that are named relative to a directory.
    pub(crate) fn found_in(mut self, directory: &Path) -> Self {
        if let Self::Pathways(PathwaysConfig { file: Some(file), .. }) = &mut self {
            *file = directory.join(&*file);
        }
        self
    }
}

impl FromStr for DecodingConfig {
    type Err = Error;

    /// Reads JSON, or a name for everything as published.
    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        let read = match text.starts_with('{') {
            true => serde_json::from_str(text),
            false => serde_json::from_value(serde_json::json!({ "type": text })),
        };
        read.map_err(|error| Error::input("decoding", format!("`{text}`: {error}"), "a name or JSON with its type"))
    }
}

/// A way of decoding with the models that it needs beside the one that is generated with.
#[derive(Debug, Default)]
pub struct Decoding<'m> {
    config: DecodingConfig,
    others: Vec<&'m Model>,
    /// The model under weaker routing.
    weak: Option<Model>,
    /// References of pathways.
    references: Option<Arc<ReferenceStore>>,
}

impl<'m> Decoding<'m> {
    /// A way of decoding for `model`, with the other models that it needs: the weak one, the draft, or tuned and
    /// untuned ones in turn.
    ///
    /// # Errors
    /// [`Error::Input`] names a parameter out of range, another number of models than it needs, or one with another
    /// vocabulary; those of [`RoutingConfig::on`], and of reading references.
    pub fn new(config: DecodingConfig, model: &Model, others: Vec<&'m Model>) -> Result<Self> {
        config.validate()?;
        if others.len() != config.other_models() {
            let expected = format!("{} beside the one that is generated with", config.other_models());
            return Err(Error::input("models to decode with", others.len(), expected));
        }
        let vocabulary = model.config().vocab_size;
        if let Some(other) = others.iter().find(|other| other.config().vocab_size != vocabulary) {
            let what = format!("vocabulary of {}", other.checkpoint().dir().display());
            let expected = format!("{vocabulary} tokens, those of the model: logits are of the same tokens");
            return Err(Error::input(what, other.config().vocab_size, expected));
        }
        let weak = match &config {
            DecodingConfig::SelfContrast(contrast) => Some(contrast.weak.on(model)?),
            _ => None,
        };
        let references = match &config {
            DecodingConfig::Pathways(pathways) => {
                let store = pathways.references()?;
                pathways.remix.validate(store.references.len())?;
                Some(store)
            }
            _ => None,
        };
        Ok(Self { config, others, weak, references })
    }

    /// Whether the model decodes alone.
    pub fn is_plain(&self) -> bool {
        self.config == DecodingConfig::Plain
    }

    /// Its configuration.
    pub fn config(&self) -> &DecodingConfig {
        &self.config
    }

    /// What makes one row of logits of several; `None` for the model alone and where a draft proposes.
    pub(crate) fn mix(&self) -> Option<&dyn LogitMix> {
        match &self.config {
            DecodingConfig::Plain
            | DecodingConfig::Speculative(_)
            | DecodingConfig::Rewiring(_)
            | DecodingConfig::Pathways(_) => None,
            DecodingConfig::Contrastive(scores) => Some(scores),
            DecodingConfig::SelfContrast(contrast) => Some(&contrast.scores),
            DecodingConfig::Fusion(fusion) => Some(fusion),
        }
    }

    /// Continues every prompt by itself, where each is learned from first.
    pub(crate) fn by_prompt(
        &self,
        model: &Model,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        ended: &mut dyn FnMut(&[u32]) -> bool,
    ) -> Result<Option<Vec<Vec<u32>>>> {
        let found: Vec<Vec<u32>> = match (&self.config, &self.references) {
            (DecodingConfig::Rewiring(rewiring), _) => {
                rewiring.generate(model, prompts, options, ended)?.into_iter().map(|(text, _)| text).collect()
            }
            (DecodingConfig::Pathways(pathways), Some(store)) => {
                let found = pathways.remix.generate(model, prompts, store, options, ended)?;
                found.into_iter().map(|(text, _)| text).collect()
            }
            _ => return Ok(None),
        };
        Ok(Some(found))
    }

    /// Whether its two sources are one model under two routings.
    pub(crate) fn shares_passes(&self) -> bool {
        self.weak.is_some()
    }

    /// How a draft proposes.
    pub(crate) fn speculative(&self) -> Option<&Speculative> {
        match &self.config {
            DecodingConfig::Speculative(speculative) => Some(speculative),
            _ => None,
        }
    }

    /// The models beside the one that is generated with.
    pub(crate) fn others(&self) -> Vec<&Model> {
        self.others.iter().copied().chain(&self.weak).collect()
    }
}

/// What decoding did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecodingReport {
    /// Tokens of all completions.
    pub tokens: usize,
    /// Steps of a sequence in which the model was asked: one for each token, or for several where a draft proposes.
    pub steps: usize,
    /// Tokens that a draft proposed.
    pub proposed: usize,
    /// Of these, tokens that the model accepted.
    pub accepted: usize,
    /// Halves of layers that the weak routing of a model against itself went through, for every sequence and step.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub weak_halves: usize,
    /// Of these, halves that ran once for both.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub shared_halves: usize,
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

impl DecodingReport {
    /// Share of the proposed tokens that were accepted; `None` without any.
    pub fn acceptance(&self) -> Option<f64> {
        (self.proposed > 0).then(|| self.accepted as f64 / self.proposed as f64)
    }

    /// Share of the layers of a model against itself that ran once for both routings; `None` for other ways.
    pub fn shared(&self) -> Option<f64> {
        (self.weak_halves > 0).then(|| self.shared_halves as f64 / self.weak_halves as f64)
    }

    /// Adds what others did.
    pub fn add(&mut self, other: &Self) {
        self.weak_halves += other.weak_halves;
        self.shared_halves += other.shared_halves;
        self.tokens += other.tokens;
        self.steps += other.steps;
        self.proposed += other.proposed;
        self.accepted += other.accepted;
    }
}

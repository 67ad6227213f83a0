//! Tokens that learn to skip the feed-forward half of redundant layers.
//!
//! Source: gamma-MoD, arXiv 2410.13859 and its code. Layers whose attention maps have the least rank (ARank) are
//! retrofitted with a linear score of the half's normed input, one for all of them. In training the share `run` of a
//! sequence's tokens with the highest `r = sigmoid(score)` (their softmax over two logits) goes through the half, whose
//! output is multiplied by r; a cross-entropy teaches r to say of a token alone whether it was among them. Afterwards
//! tokens with a score of 0 or more go through.
//!
//! As Router-Tuning (MindSkip, arXiv 2410.13184) has it, `scaled` may be left out: then the output stays as it is, and
//! the score learns by the gradient that its mask would have.
//!
//! There whole blocks are skipped. Here attention runs for all tokens, so that keys and values are those of the whole
//! model, and positions stay as they are. Nothing is written but scores: [`TokenSkipRouter::layers`] says them as an
//! option of the model, in `run_time.json`.

mod rule;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use moe_core::{
    Model,
    adapters::Depth,
    depth::{DepthConfig, LayerChoice, SkipInput, SkipScore, TokenSkipConfig},
};
use serde::{Deserialize, Serialize};

use crate::{AdapterSet, Artifacts, Error, Installed, Live, Result, Setting, TuningMethod, model_weights::OwnWeights};
use rule::SkipRule;

/// Trains scores by which tokens skip feed-forward halves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenSkipTuning {
    /// The layers that tokens may skip: by default the half of all layers whose attention maps have the least rank.
    pub layers: Option<LayerChoice>,
    /// Share of the tokens of a sequence that run in training, above 0.
    pub run: f64,
    /// Factor of the cross-entropy that teaches scores who was chosen.
    pub coefficient: f64,
    /// Whether what a token gets of the half is multiplied by the sigmoid of its score.
    pub scaled: bool,
    /// Whether all layers have one score.
    pub shared: bool,
    /// What the score begins as for all tokens: at 3, r is 0.95.
    pub bias: f32,
    /// Whether tokens that count in the loss always run in training.
    pub protect_answers: bool,
    /// The model's own weights that are trained as well.
    pub weights: OwnWeights,
}

impl Default for TokenSkipTuning {
    fn default() -> Self {
        Self {
            layers: None,
            run: 0.5,
            coefficient: 0.01,
            scaled: true,
            shared: true,
            bias: 3.0,
            protect_answers: false,
            weights: OwnWeights::default(),
        }
    }
}

/// Scores of the layers that tokens may skip.
#[derive(Debug)]
pub struct TokenSkipRouter {
    rule: Arc<SkipRule>,
}

impl TokenSkipRouter {
    /// Scores of these layers of a model, alike for all tokens.
    ///
    /// # Errors
    /// Those of reading the model; [`Error::Input`] for layers that it does not have.
    pub fn new(model: &Model, method: &TokenSkipTuning, layers: &[usize]) -> Result<Self> {
        let (count, hidden) = (model.config().layers.len(), model.config().hidden_size);
        let mut lives: BTreeMap<String, Arc<Live>> = BTreeMap::new();
        let mut of_layers = BTreeMap::new();
        for &layer in layers {
            if layer >= count {
                return Err(Error::input("layer that tokens may skip", layer, format!("below {count}")));
            }
            let name = if method.shared { NAME.to_string() } else { format!("layers.{layer}.{NAME}") };
            let live = match lives.get(&name) {
                Some(live) => live.clone(),
                None => {
                    let mut values = vec![0.0; hidden + 1];
                    values[hidden] = method.bias;
                    Live::new(name.clone(), [1, hidden + 1], values, model.device())?
                }
            };
            lives.insert(name, live.clone());
            of_layers.insert(layer, (live, SkipInput::of(model, layer)?));
        }
        Ok(Self { rule: Arc::new(SkipRule::new(of_layers, method)) })
    }

    /// Says which tokens of waves always run, by the wave's id.
    pub(crate) fn protect(&self, tokens: BTreeMap<u64, Vec<bool>>) {
        self.rule.protect(tokens);
    }

    /// Puts the scores among what a set trains.
    ///
    /// # Errors
    /// [`Error::Input`] if they are there already.
    pub fn train_in(&self, set: &mut AdapterSet) -> Result<()> {
        let mut inserted = BTreeSet::new();
        for (&layer, (live, _)) in self.rule.layers() {
            if inserted.insert(live.name().to_string()) {
                set.bank_mut().insert(live.clone())?;
            }
            set.reach(Depth::FeedForward(layer));
        }
        set.add_listener(self.rule.clone());
        Ok(())
    }

    /// `model` whose tokens skip by these scores.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model under a path of layers or another rule.
    pub fn applied_to(&self, model: &Model) -> Result<Model> {
        if model.depth_rule().is_some() {
            return Err(Error::Unsupported("tokens that skip layers of which a rule decides already".into()));
        }
        Ok(model.with_depth_rule(self.rule.clone())?)
    }

    /// The scores as an option of the model.
    pub fn layers(&self) -> DepthConfig {
        let scores = self.rule.layers().map(|(layer, (live, _))| {
            let mut weight = live.to_vec();
            let bias = weight.pop().unwrap_or_default();
            SkipScore { layer: *layer, weight, bias, threshold: 0.0, scaled: self.rule.is_scaled() }
        });
        DepthConfig::TokenSkip(TokenSkipConfig { scores: scores.collect(), ..TokenSkipConfig::default() })
    }

    /// Share of the tokens of the wave that ran last that went through the halves.
    pub fn share(&self) -> f64 {
        self.rule.share()
    }
}

const NAME: &str = "token_skip";

impl TokenSkipTuning {
    fn has_weights(&self) -> bool {
        self.weights != OwnWeights::default()
    }

    fn choice(&self, model: &Model) -> LayerChoice {
        let half = model.config().layers.len() / 2;
        self.layers.clone().unwrap_or(LayerChoice::AttentionRank { layers: half.max(1) })
    }

    /// Some layers, as many as will be chosen.
    fn outlined(&self, model: &Model) -> Result<Vec<usize>> {
        let (choice, count) = (self.choice(model), model.config().layers.len());
        match choice.needs_rows() && choice.count() < count {
            true => Ok((0..choice.count()).collect()),
            false => Ok(choice.layers(count, None)?),
        }
    }
}

impl TuningMethod for TokenSkipTuning {
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        if !(self.run > 0.0 && self.run <= 1.0) {
            return Err(Error::input("run", self.run, "a share in (0, 1]"));
        }
        if !(self.coefficient >= 0.0 && self.coefficient.is_finite()) {
            return Err(Error::input("coefficient", self.coefficient, "a finite number of 0 or more"));
        }
        if !self.bias.is_finite() {
            return Err(Error::input("bias", self.bias, "a finite number"));
        }
        let layers = self.outlined(on.model)?;
        if layers.is_empty() {
            return Err(Error::input("layers that tokens may skip", 0, "at least one"));
        }
        TokenSkipRouter::new(on.model, self, &layers)?.applied_to(on.model)?;
        if self.has_weights() { self.weights.check(on) } else { Ok(()) }
    }

    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        let installed = match self.has_weights() {
            true => self.weights.install(on, set)?,
            false => Installed::default(),
        };
        let choice = self.choice(on.model);
        let seen = choice.measure(on.model, on.waves)?;
        let layers = choice.layers(on.model.config().layers.len(), seen.as_deref())?;
        let router = Arc::new(TokenSkipRouter::new(on.model, self, &layers)?);
        if self.protect_answers {
            // a token runs where the next one counts, whose prediction it is
            let counts = |sequence: &moe_core::data::Sequence| -> Vec<bool> {
                (1..=sequence.ids.len()).map(|t| sequence.counts(t)).collect()
            };
            let of = |wave: &moe_core::data::Wave| (wave.id, wave.sequences.iter().flat_map(counts).collect());
            router.protect(on.waves.iter().map(of).collect());
        }
        router.train_in(set)?;
        let model = Some(router.applied_to(on.model)?);
        let artifacts = Artifacts { token_skip: Some(router), ..installed.artifacts.clone() };
        Ok(Installed { model, artifacts, ..installed })
    }

    fn outline(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        if self.has_weights() {
            self.weights.outline(on, set)?;
        }
        TokenSkipRouter::new(on.model, self, &self.outlined(on.model)?)?.train_in(set)?;
        Ok(Installed::default())
    }
}

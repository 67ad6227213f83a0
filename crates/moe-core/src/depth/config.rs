//! All ways to run other layers as one value.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    DepthRule, LayerChoice, LayerPath, LayerRouterTraining, LayerRouters, PathSearch, SkipScore, TokenSkip,
    search::Rounds,
};
use crate::{
    Model,
    data::{Sequence, Wave},
    error::{Error, Result},
    generate::{GenerateOptions, generate},
};

/// Prompts of a step of training of routers of layers.
const ROWS_PER_WAVE: usize = 16;

/// Which layers tokens go through: a path in words, such as `0-3,5,5,6a`, or a rule in JSON,
/// `{"type": "token_skip", "share": 0.2}`.
///
/// | | what | neutral |
/// |---|---|---|
/// | a path | [`LayerPath`]: layers left out, repeated, or run with one of their halves | all layers, once |
/// | `layer_routers` | [`LayerRoutersConfig`]: a router per layer says how often a sequence runs it (Dr.LLM) | routers as they begin |
/// | `token_skip` | [`TokenSkipConfig`]: tokens with a low score pass the feed-forward half | share 0 |
#[allow(clippy::large_enum_variant)] // one for a run
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
#[non_exhaustive]
pub enum DepthConfig {
    /// The same layers for all tokens.
    Path(LayerPath),
    /// Routers of layers.
    LayerRouters(LayerRoutersConfig),
    /// Tokens that skip feed-forward halves.
    TokenSkip(TokenSkipConfig),
}

/// How often the layers are run, by sequence.
type Labels = BTreeMap<u64, Vec<Rounds>>;

/// The rules among them, as they stand in JSON.
#[allow(clippy::large_enum_variant)] // one for a run
#[derive(Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum Rule {
    LayerRouters(LayerRoutersConfig),
    TokenSkip(TokenSkipConfig),
}

/// Dr.LLM's routers, from a file or trained on rows with answers: a tree search finds a short path on which the model
/// answers a row rightly, and the routers learn how often each layer ran on it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerRoutersConfig {
    /// File of [`LayerRouters::save`]; without one, they are trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The search for paths.
    pub search: PathSearch,
    /// The training.
    pub training: LayerRouterTraining,
    /// Routers in memory.
    #[serde(skip)]
    pub routers: Option<Arc<LayerRouters>>,
}

/// Scores of tokens, given or fitted to rows, below which a token skips the feed-forward half of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenSkipConfig {
    /// The scores; fitted where there are none ([`TokenSkip::fit`]).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<SkipScore>,
    /// The layers that scores are fitted for; all with experts by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<LayerChoice>,
    /// Share of tokens that skip each of them, on the rows that they are fitted to.
    pub share: f64,
    /// Weight of the ridge of the fit.
    pub ridge: f64,
}

impl Default for TokenSkipConfig {
    fn default() -> Self {
        Self { scores: Vec::new(), layers: None, share: 0.25, ridge: 1e-3 }
    }
}

impl DepthConfig {
    /// Whether numbers of it are found on calibration rows.
    pub fn needs_rows(&self) -> bool {
        match self {
            Self::Path(_) => false,
            Self::LayerRouters(config) => config.file.is_none() && config.routers.is_none(),
            Self::TokenSkip(config) => config.scores.is_empty(),
        }
    }

    /// Whether these rows need answers.
    pub fn needs_answers(&self) -> bool {
        matches!(self, Self::LayerRouters(_)) && self.needs_rows()
    }

    /// The same with everything found on `waves` that it does not say.
    ///
    /// # Errors
    /// [`Error::Input`] for rows without what is to be learned from them; whatever stops the model.
    pub fn calibrated(&self, model: &Model, waves: &[Wave]) -> Result<Self> {
        if !self.needs_rows() {
            return Ok(self.clone());
        }
        Ok(match self {
            Self::Path(_) => self.clone(),
            Self::TokenSkip(config) => {
                model.check_separable("a rule that decides about layers")?;
                let experts = (0..model.config().layers.len()).filter(|layer| model.config().moe(*layer).is_some());
                let layers: Vec<usize> = match &config.layers {
                    None => experts.collect(),
                    Some(choice) => {
                        let seen = choice.measure(model, waves)?;
                        // What is fitted is what experts add to a stream.
                        let may = |layer| model.config().moe(layer).is_some();
                        choice.layers_among(model.config().layers.len(), seen.as_deref(), may)?
                    }
                };
                let skip = TokenSkip::fit(model, &layers, waves, config.share, config.ridge)?;
                let scores = skip.scores().cloned().collect();
                Self::TokenSkip(TokenSkipConfig { scores, layers: None, ..config.clone() })
            }
            Self::LayerRouters(config) => {
                model.check_separable("a rule that decides about layers")?;
                let (labels, prompts) = config.labels(model, waves)?;
                let (routers, _, _) = LayerRouters::train(model, &prompts, &labels, &config.training, &mut |_| Ok(()))?;
                Self::LayerRouters(LayerRoutersConfig { routers: Some(Arc::new(routers)), ..config.clone() })
            }
        })
    }

    /// The model whose tokens go through these layers.
    ///
    /// # Errors
    /// As [`Model::with_path`] and [`Model::with_depth_rule`]; [`Error::Input`] for what is still to be
    /// [found](Self::calibrated), and a file of another model.
    pub fn on(&self, model: &Model) -> Result<Model> {
        let rule: Arc<dyn DepthRule> = match self {
            Self::Path(path) => return model.with_path(path.clone()),
            Self::LayerRouters(config) => match (&config.routers, &config.file) {
                (Some(routers), _) => routers.clone(),
                (None, Some(file)) => Arc::new(LayerRouters::load(file, model)?),
                (None, None) => return Err(Error::input("layer_routers", "no file", "one, or rows to train them on")),
            },
            Self::TokenSkip(config) if config.scores.is_empty() => {
                return Err(Error::input("token_skip", "no scores", "some, or rows to fit them to"));
            }
            Self::TokenSkip(config) => Arc::new(TokenSkip::new(model, config.scores.clone())?),
        };
        model.with_depth_rule(rule)
    }

    /// Writes what is no JSON of it into a directory, and says where it is there.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] and [`Error::Io`] if it cannot be written.
    pub(crate) fn saved_into(&self, directory: &Path) -> Result<Self> {
        let Self::LayerRouters(config) = self else { return Ok(self.clone()) };
        let to = directory.join(LayerRouters::FILE);
        match (&config.routers, &config.file) {
            (Some(routers), _) => routers.save(&to)?,
            (None, Some(from)) => copied(from, &to)?,
            (None, None) => return Ok(self.clone()),
        }
        let file = Some(PathBuf::from(LayerRouters::FILE));
        Ok(Self::LayerRouters(LayerRoutersConfig { file, routers: None, ..config.clone() }))
    }

    /// The same with files that are named relative to a directory.
    pub(crate) fn found_in(mut self, directory: &Path) -> Self {
        if let Self::LayerRouters(LayerRoutersConfig { file: Some(file), .. }) = &mut self {
            *file = directory.join(&*file);
        }
        self
    }
}

/// Copies a file, unless it is there already.
pub(crate) fn copied(from: &Path, to: &Path) -> Result<()> {
    let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if !same(from, to) {
        std::fs::copy(from, to).map_err(Error::io(from))?;
    }
    Ok(())
}

impl LayerRoutersConfig {
    /// How often every layer runs on the best path found for each row, and the rows' prompts, in waves of a few.
    fn labels(&self, model: &Model, waves: &[Wave]) -> Result<(Labels, Vec<Wave>)> {
        let mut found = Vec::new();
        for sequence in waves.iter().flat_map(|wave| &wave.sequences) {
            let Some((prompt, answer)) = sequence.prompt_and_answer() else {
                let expected = "a prompt and an answer in each, and a loss over completions alone";
                return Err(Error::input("rows to search paths on", "a row without an answer of its own", expected));
            };
            let options = GenerateOptions { max_new_tokens: answer.len(), ..GenerateOptions::default() };
            let path = self.search.search(model.config().layers.len(), |path| {
                let under = model.with_path(path.clone())?;
                let text = generate(&under, &[prompt.to_vec()], &options, |_| false)?.concat();
                Ok(f64::from(u8::from(text == answer)))
            })?;
            found.push((Sequence::new(prompt.to_vec()), path.rounds));
        }
        let (mut labels, mut prompts) = (BTreeMap::new(), Vec::new());
        for (id, rows) in found.chunks(ROWS_PER_WAVE).enumerate() {
            labels.insert(id as u64, rows.iter().map(|(_, rounds)| rounds.clone()).collect());
            let sequences = rows.iter().map(|(prompt, _)| prompt.clone()).collect();
            prompts.push(Wave { id: id as u64, sequences });
        }
        Ok((labels, prompts))
    }
}

impl TryFrom<Value> for DepthConfig {
    type Error = String;

    fn try_from(value: Value) -> std::result::Result<Self, String> {
        match value {
            Value::String(path) => Ok(Self::Path(path.parse().map_err(|error: Error| error.to_string())?)),
            rule => match serde_json::from_value(rule).map_err(|error| error.to_string())? {
                Rule::LayerRouters(config) => Ok(Self::LayerRouters(config)),
                Rule::TokenSkip(config) => Ok(Self::TokenSkip(config)),
            },
        }
    }
}

impl From<DepthConfig> for Value {
    fn from(config: DepthConfig) -> Self {
        let rule = match config {
            DepthConfig::Path(path) => return Self::String(path.to_string()),
            DepthConfig::LayerRouters(config) => Rule::LayerRouters(config),
            DepthConfig::TokenSkip(config) => Rule::TokenSkip(config),
        };
        serde_json::to_value(rule).unwrap_or_default()
    }
}

impl FromStr for DepthConfig {
    type Err = Error;

    /// Reads a path, or JSON of a rule.
    fn from_str(text: &str) -> Result<Self> {
        match text.trim_start().starts_with('{') {
            true => serde_json::from_str(text).map_err(|error| {
                Error::input(
                    "layers",
                    format!("`{text}`: {error}"),
                    "a path such as `0-3,5,5,6a`, or JSON with its type",
                )
            }),
            false => Ok(Self::Path(text.parse()?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_words_and_rules_are_json_both_ways() {
        for text in [r#""0-2,4,4""#, r#"{"type": "token_skip", "share": 0.5}"#, r#"{"type": "layer_routers"}"#] {
            let config: DepthConfig = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::from_value::<DepthConfig>(serde_json::json!(config)).unwrap(), config, "{text}");
            assert_eq!(config.needs_rows(), !matches!(config, DepthConfig::Path(_)));
        }
        assert_eq!("0-2,4,4".parse::<DepthConfig>().unwrap(), serde_json::from_str(r#""0-2,4,4""#).unwrap());
        let wrong = |text: &str| serde_json::from_str::<DepthConfig>(text).unwrap_err().to_string();
        assert!(wrong(r#"{"type": "token_skip", "shares": 1}"#).contains("unknown field `shares`"));
        assert!(wrong(r#"{"type": "skip"}"#).contains("token_skip") && wrong(r#""0-a-b""#).contains("path of layers"));
        // numbers of scores keep their bits
        let score = SkipScore { layer: 1, weight: vec![0.1, -3.7e-5], bias: 1.0 / 3.0, threshold: 0.7, scaled: true };
        let config = DepthConfig::TokenSkip(TokenSkipConfig { scores: vec![score], ..TokenSkipConfig::default() });
        assert_eq!(serde_json::from_str::<DepthConfig>(&serde_json::json!(config).to_string()).unwrap(), config);
    }
}

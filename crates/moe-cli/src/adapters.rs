//! Opening a model with all that belongs to it: saved plans, what stands beside its weights, adapters.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe::recipe::{Data, DataFile, Named};
use moe_checkpoint::Checkpoint;
use moe_core::adaptive::{RoutingConfig, RunTime};
use moe_core::data::{LossOver, Tokenizer, Wave};
use moe_core::decode::{Decoding, DecodingConfig, Speculative};
use moe_core::depth::DepthConfig;
use moe_core::{Model, Precision};
use moe_peft::lora::{Lora, LoraWeights, Maps};
use moe_peft::{AdapterSet, SavedKind, peft_files};

use crate::{Error, Result};

/// Which model is run.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArguments {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Saved plan of pruning or merging to run the model under, without writing it; repeatable: each goes on what the
    /// one before makes
    #[arg(long, value_name = "FILE")]
    pub plan: Vec<PathBuf>,
    /// What fine-tuning saved to run the model with: a LoRA in PEFT's files, each with its whole weight; or one
    /// mixture; repeatable
    #[arg(long, value_name = "DIR")]
    pub adapter: Vec<PathBuf>,
    /// How tokens are routed, instead of what the model says: a rule by its name, as JSON, or in a .json file, such as
    /// '{"type": "top_k", "k": 2}'
    #[arg(long, value_name = "RULE")]
    pub routing: Option<String>,
    /// Rows that thresholds of the routing, scores and routers of layers, and references of decoding are found on,
    /// where these say none; repeatable
    #[arg(long, value_name = "FILE")]
    pub routing_data: Vec<PathBuf>,
    /// Layers that tokens go through, in order: such as 0-3,5,5,6a without layer 4, layer 5 twice, and of layer 6 the
    /// attention alone; or a rule as JSON or in a .json file, such as '{"type": "token_skip", "share": 0.2}'
    #[arg(long, value_name = "LAYERS", value_parser = layers)]
    pub layers: Option<DepthConfig>,
    /// Run LayerNorms as RMSNorms, without the mean of the residual stream
    #[arg(long)]
    pub fold_norms: bool,
    /// Memory to stay within, such as 8GiB; never changes results
    #[arg(long, value_name = "SIZE", value_parser = crate::cli::bytes)]
    pub max_memory: Option<u64>,
    /// flex (CPU), wgpu, vulkan or cuda, as far as compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// f32, or bf16: activations are rounded once per product, where the processor multiplies pairs of bf16
    #[arg(long, default_value = "f32", value_name = "f32|bf16")]
    pub precision: Precision,
}

impl ModelArguments {
    /// The model, under its plans and with its adapters, and how it decodes unless it is asked to otherwise.
    ///
    /// # Errors
    /// Files that cannot be read or are for another model.
    pub fn open(&self) -> Result<Model> {
        Ok(self.open_decoding(None)?.0)
    }

    /// The same with a way of decoding that may learn from rows; the one that stands beside the model, if none is
    /// given.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_decoding(&self, decoding: Option<DecodingConfig>) -> Result<(Model, DecodingConfig)> {
        let asked = decoding.clone();
        let own = decoding.filter(|decoding| decoding.other_models() == 0);
        let model = open(&self.model, &self.plan, &self.adapter, &self.device, self.max_memory)?;
        let model = model.with_precision(self.precision);
        let routing = match &self.routing {
            None => None,
            Some(text) => Some(Named::parse(text).map_err(Error::Usage)?.read::<RoutingConfig>("type", "routing")?),
        };
        let beside = RunTime::beside(&self.model)?;
        let asked_for = RunTime { routing, layers: self.layers.clone(), decoding: own, fold_norms: self.fold_norms };
        let run_time = asked_for.or(beside);
        let run_time = match run_time.needs_rows() {
            true => run_time.calibrated(&model, &self.waves(&model, run_time.needs_answers())?)?,
            false if !self.routing_data.is_empty() => {
                let what = "no threshold, score, router or reference is to be found on rows";
                return Err(Error::Usage(format!("--routing-data: {what}")));
            }
            false => run_time.calibrated(&model, &[])?,
        };
        let other = asked.filter(|decoding| decoding.other_models() > 0);
        let decoding = other.or(run_time.decoding.clone()).unwrap_or_default();
        Ok((run_time.on(&model)?.unwrap_or(model), decoding))
    }

    /// The rows that thresholds and the like are found on.
    fn waves(&self, model: &Model, answers: bool) -> Result<Vec<Wave>> {
        if self.routing_data.is_empty() {
            let what = "--routing, --layers or --decoding: has something to be found, on rows of --routing-data";
            return Err(Error::Usage(what.into()));
        }
        let tokenizer = match self.model.join("tokenizer.json").exists() {
            true => Some(Tokenizer::from_dir(&self.model)?),
            false => None,
        };
        let data = Data {
            calibration: self.routing_data.iter().cloned().map(DataFile::Path).collect(),
            length: model.config().max_position_embeddings.min(2048),
            loss: if answers { LossOver::Completions } else { LossOver::All },
            ..Data::default()
        };
        Ok(moe::run::Calibration::load(&data, None, tokenizer.as_ref(), model.config().vocab_size)?.waves)
    }
}

/// How the next token is found.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct DecodingArguments {
    /// How the next token is found: plain, contrastive, self_contrast, fusion, speculative, rewiring or pathways, by
    /// name, as JSON, or in a .json file
    #[arg(long, value_name = "DECODING", conflicts_with = "draft")]
    pub decoding: Option<String>,
    /// Model that decoding needs beside the one that is generated with: the weak one, the draft, or a tuned one and
    /// its base in turn; repeatable
    #[arg(long = "with", value_name = "DIR", requires = "decoding")]
    pub with: Vec<PathBuf>,
    /// Smaller model that proposes tokens, which the model accepts or replaces: the text is the model's own
    #[arg(long, value_name = "DIR")]
    pub draft: Option<PathBuf>,
    /// Tokens that the draft proposes at a time
    #[arg(long, default_value_t = 4, value_parser = crate::cli::at_least(1), requires = "draft")]
    pub draft_tokens: usize,
}

/// A way of decoding and the models that it needs.
#[derive(Debug, Default)]
pub struct Sources {
    config: DecodingConfig,
    models: Vec<Model>,
    /// Whether the arguments say so.
    asked_for: bool,
}

impl DecodingArguments {
    /// Opens the model that is generated with, and those that decoding needs beside it.
    ///
    /// # Errors
    /// Arguments that say nothing known, models that cannot be opened.
    pub fn sources(&self, model: &ModelArguments) -> Result<(Model, Sources)> {
        let config = match (&self.decoding, &self.draft) {
            (_, Some(_)) => Some(DecodingConfig::Speculative(Speculative { tokens: self.draft_tokens })),
            (Some(text), None) => Some(Named::parse(text).map_err(Error::Usage)?.read("type", "decoding")?),
            (None, None) => None,
        };
        let asked_for = config.is_some();
        let (strong, config) = model.open_decoding(config)?;
        let mut models = Vec::new();
        for directory in self.with.iter().chain(&self.draft) {
            let opened = open(directory, &[], &[], &model.device, model.max_memory)?.with_precision(model.precision);
            let run_time = RunTime::beside(directory)?;
            models.push(run_time.on(&opened)?.unwrap_or(opened));
        }
        Ok((strong, Sources { config, models, asked_for }))
    }
}

impl Sources {
    /// The way of decoding, for a model.
    ///
    /// # Errors
    /// Another number of models than it needs, or one with another vocabulary.
    pub fn decoding(&self, model: &Model) -> Result<Decoding<'_>> {
        Ok(Decoding::new(self.config.clone(), model, self.models.iter().collect())?)
    }

    /// Whether the arguments ask for another way than the model alone.
    pub fn is_asked_for(&self) -> bool {
        self.asked_for && !self.is_plain()
    }

    /// Whether the model decodes alone.
    pub fn is_plain(&self) -> bool {
        self.config == DecodingConfig::Plain
    }
}

/// A path of layers, or a rule as JSON or in a file of JSON.
pub fn layers(text: &str) -> std::result::Result<DepthConfig, String> {
    let from_file = text.trim().ends_with(".json");
    let text = match from_file {
        true => std::fs::read_to_string(text.trim()).map_err(|error| format!("{text}: {error}"))?,
        false => text.to_string(),
    };
    text.parse().map_err(|error: moe_core::Error| error.to_string())
}

/// Opens a model, with what fine-tuning left beside its weights (condensers, null experts), under saved plans, with
/// adapters.
///
/// # Errors
/// Files that cannot be read or are for another model.
pub fn open(
    directory: &Path,
    plans: &[PathBuf],
    adapters: &[PathBuf],
    device: &str,
    max_memory: Option<u64>,
) -> Result<Model> {
    let device = moe_core::device::device(device)?;
    let mut checkpoint = Arc::new(Checkpoint::open(directory)?);
    for plan in plans {
        checkpoint = crate::apply::planned(&checkpoint, plan)?;
    }
    let model = Model::new(checkpoint, &device, max_memory)?;
    let beside = moe_peft::open(directory)
        .ok()
        .filter(|saved| saved.kinds().iter().any(|kind| SavedKind::BESIDE_WEIGHTS.contains(kind)));
    match beside {
        None => model_with(model, adapters),
        Some(saved) if plans.is_empty() && adapters.is_empty() => Ok(saved.onto(&model)?.0),
        Some(saved) => {
            let kinds: Vec<String> = saved.kinds().iter().map(ToString::to_string).collect();
            let (directory, kinds) = (directory.display(), kinds.join(" and "));
            Err(Error::Usage(format!(
                "{directory}: has {kinds} beside its weights, which take neither --plan nor --adapter"
            )))
        }
    }
}

/// The model with what fine-tuning saved: any number of LoRAs, each with its whole weight, or one of another kind; the
/// model itself for none.
///
/// # Errors
/// Files that cannot be read or are for another model, several of which one is no LoRA.
pub fn model_with(model: Model, directories: &[PathBuf]) -> Result<Model> {
    let mut saved = Vec::with_capacity(directories.len());
    for directory in directories {
        saved.push(moe_peft::open(directory)?);
    }
    let lora = |saved: &moe_peft::SavedTuning| saved.kinds() == [SavedKind::Lora];
    match saved.as_slice() {
        [] => return Ok(model),
        [one] if !lora(one) => return Ok(one.onto(&model)?.0),
        several => {
            if let Some(other) = several.iter().position(|saved| !lora(saved)) {
                let path = directories[other].display();
                return Err(Error::Usage(format!("{path}: no LoRA, which alone can be added to others")));
            }
        }
    }
    let mut set = AdapterSet::new();
    let maps = Maps::new(model.checkpoint());
    let mut adapters: Vec<(String, LoraWeights)> = Vec::with_capacity(directories.len());
    for (number, directory) in directories.iter().enumerate() {
        let weights = peft_files::read(directory, &maps, peft_files::ReadOptions::default())?;
        adapters.push((format!("adapter{number}"), weights));
    }
    let adapters: Vec<(&str, LoraWeights)> = adapters.iter().map(|(name, w)| (name.as_str(), w.clone())).collect();
    Lora::install(&mut set, &maps, &adapters, model.device())?;
    Ok(model.with_adapters(Arc::new(set))?)
}

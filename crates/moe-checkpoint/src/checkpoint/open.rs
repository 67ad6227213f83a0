//! How a model is opened: its config understood, its tensors found and verified.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_json::Value;

use super::{Checkpoint, MadeTensor};
use crate::config::ModelConfig;
use crate::family::{Family, dense_family_of, family_of};
use crate::files::Files;
use crate::formats::{self, Packed, Quantization};
use crate::grouped::Grouped;
use crate::identity_tensors;
use crate::index::read_json;
use crate::naming;
use crate::ragged::Ragged;
use crate::record::{Record, Step};
use crate::source::{ModelDescription, ModelSource};
use crate::verify;
use crate::weights::{self, TensorInfo};
use crate::{Error, Result};

impl Checkpoint {
    /// Opens a Hugging Face model directory: `config.json`, `model.safetensors` or `model.safetensors.index.json` with
    /// its shards. Headers are parsed, weights are not read.
    ///
    /// # Errors
    /// Every problem that the config and the headers can show, before any weight is read: see the variants of
    /// [`enum@Error`]. A checkpoint that opens has every tensor its config calls for, with the shape it calls for, as
    /// F32, F16, BF16 or in a quantization that is read, and no tensor in its decoder layers that the config has no
    /// place for.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        Self::open_of(dir.as_ref(), Kind::Moe)
    }

    /// Opens the directory of a dense model, to make experts of it: `llama` (SmolLM and others), `mistral`, `qwen2`,
    /// `qwen3`. It has no routed experts, and [`Checkpoint::open`] refuses it by name.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`], and [`Error::UnknownFamily`] for a model that is not of a dense family.
    pub fn open_dense(dir: impl AsRef<Path>) -> Result<Self> {
        Self::open_of(dir.as_ref(), Kind::Dense)
    }

    fn open_of(dir: &Path, kind: Kind) -> Result<Self> {
        if !dir.is_dir() {
            return Err(Error::NotADirectory { path: dir.to_path_buf() });
        }
        let config_path = dir.join("config.json");
        let raw_config = read_json(&config_path)?;
        let generation_path = dir.join("generation_config.json");
        let raw_generation = generation_path.exists().then(|| read_json(&generation_path)).transpose()?;
        let head = match Head::read(dir, raw_config.clone(), raw_generation.clone(), kind) {
            Err(error) if naming::is_unread_quantization(&error) && weights::are_plain(dir) => {
                // A config that outlived its quantization: what is written from here on does not carry it along.
                tracing::warn!("{error}; the weights are plain, so that the config is read without it");
                Head::read(dir, naming::without_quantization(raw_config), raw_generation, kind)?
            }
            head => head?,
        };
        let steps = Record::load(dir)?.steps;
        let (shards, tensors) = weights::open(dir)?;
        let head = match head.config.quantization {
            Some(quantization) if tensors.values().all(weights::is_plain) => {
                tracing::warn!("{}: the weights are plain, whatever config.json says of {quantization}", dir.display());
                Head::read(dir, naming::without_quantization(head.raw_config), head.raw_generation, kind)?
            }
            _ => head,
        };
        Self::verified(head, tensors, steps, Arc::new(Files { shards }))
    }

    /// The model that `source` makes: verified as [`Checkpoint::open`] verifies a directory, before any weight is made.
    /// Its
    /// [directory](Checkpoint::dir) is that of the base.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`] about config and tensors.
    pub fn from_source(description: ModelDescription, source: Arc<dyn ModelSource>) -> Result<Self> {
        let dir = source.base().map_or_else(PathBuf::new, |base| base.dir.clone());
        Self::from_source_in(dir, description, source)
    }

    /// The same, for a source that has files in `dir`: those that are no weights go with the model.
    pub(crate) fn from_source_in(
        dir: PathBuf,
        description: ModelDescription,
        source: Arc<dyn ModelSource>,
    ) -> Result<Self> {
        let mut steps = source.base().map_or_else(Vec::new, |base| base.steps.clone());
        steps.extend(source.step());
        let ModelDescription { config, generation, tensors } = description;
        // What is made of a dense model is dense as long as its config says so.
        let dense = source.base().is_some_and(|base| base.is_dense()) && dense_family_of(&config).is_ok();
        let kind = if dense { Kind::Dense } else { Kind::Moe };
        let head = Head::read(&dir, config, generation, kind)?;
        let file: Arc<Path> = Arc::from(dir.as_path());
        let mut infos = BTreeMap::new();
        for spec in tensors {
            let info = TensorInfo::made(spec, &file)?;
            if let Some(twice) = infos.insert(info.name.clone(), info) {
                let reason = "the name occurs twice".to_string();
                return Err(Error::InvalidTensorSpec { tensor: twice.name, reason });
            }
        }
        let (infos, source) = identity_tensors::adapted(infos, &head.config, &file, source)?;
        Self::verified(head, infos, steps, source)
    }

    fn verified(
        head: Head,
        tensors: BTreeMap<String, TensorInfo>,
        steps: Vec<Step>,
        source: Arc<dyn ModelSource>,
    ) -> Result<Self> {
        let Head { dir, mut config, raw_config, raw_generation, family, ragged } = head;
        let whole = |info: &TensorInfo| source.bytes(info, 0..info.bytes as usize).map(Cow::into_owned);
        let context = formats::Context { tensors: &tensors, config: formats::entry(&raw_config), read: &whole };
        let formats::Collected { weights: quantized, companions } = formats::collect(&context)?;
        if let (Some(weight), None) = (quantized.values().next(), config.quantization) {
            // Old exports of ModelOpt say so in a file of their own.
            if !dir.join("hf_quant_config.json").is_file() {
                return Err(formats::quantized_tensor(
                    self::stored(weight, &tensors),
                    "`quantization_config` in config.json",
                ));
            }
            config.quantization = Some(Quantization::ModelOpt);
        }
        let plain = plain_tensors(&tensors, &quantized, &companions);
        let family = naming::of(family, &config, &plain);
        let outer = raw_config.get("model_type").and_then(Value::as_str);
        let wrapper = outer.filter(|_| family.text_key().is_some());
        let weights = verify::Weights { dir: &dir, config: &config, family, ragged, tensors: &plain, wrapper };
        let verify::Verified { layouts, unfit } = verify::verify(&weights)?;
        drop(plain);
        let mut made = BTreeMap::new();
        for (layer, layout) in layouts.iter().filter(|(layer, _)| source.makes_experts(**layer)) {
            let Some(moe) = config.moe(*layer) else { continue };
            let widths = moe.stored_widths();
            for tensor in layout.tensors(config.expert_hidden_size(), &widths, moe.biases).into_iter().flatten() {
                let name = family.expert_tensor_name(*layer, tensor.tensor);
                let size = tensors.get(&name).map_or(0, |info| info.dtype.bitsize() / 8);
                let mut start = 0;
                let blocks = tensor.blocks.into_iter().map(|(set, block)| {
                    let dims = block.parts().iter().map(|part| part.dims(config.expert_hidden_size(), widths[set]));
                    let elements: usize = dims.map(|(rows, cols)| rows * cols).sum();
                    let begin = start;
                    start += elements * size;
                    (set, block, begin)
                });
                made.insert(name, MadeTensor { layer: *layer, blocks: blocks.collect() });
            }
        }
        let (shape, roles) = (config.moe_shape(), verify::layer_roles(&config));
        Ok(Self {
            dir,
            config,
            raw_config,
            raw_generation,
            family,
            ragged,
            shape,
            roles,
            source,
            tensors,
            layouts,
            made,
            unfit,
            quantized,
            companions,
            steps,
            fingerprint: OnceLock::new(),
        })
    }
}

/// A config, understood.
struct Head {
    dir: PathBuf,
    config: ModelConfig,
    raw_config: Value,
    raw_generation: Option<Value>,
    family: &'static dyn Family,
    ragged: bool,
}

/// What sort of model a config may be of.
#[derive(Clone, Copy)]
enum Kind {
    /// One with routed experts.
    Moe,
    /// One without.
    Dense,
}

impl Head {
    fn read(dir: &Path, raw_config: Value, raw_generation: Option<Value>, kind: Kind) -> Result<Self> {
        let parse = || -> Result<_> {
            if let Kind::Dense = kind {
                let family = dense_family_of(&raw_config)?;
                return Ok((family, false, family.parse(&raw_config, raw_generation.as_ref())?));
            }
            let original = Grouped::read(&raw_config)?.map(|grouped| grouped.original);
            let original = original.as_ref().unwrap_or(&raw_config);
            let ragged = Ragged::read(original)?;
            let config = ModelConfig::from_json(&raw_config, raw_generation.as_ref())?;
            let family = family_of(ragged.as_ref().map_or(original, |ragged| &ragged.original))?;
            Ok((family, ragged.is_some(), config))
        };
        let (family, ragged, config) = parse().map_err(|error| error.in_dir(dir))?;
        Ok(Self { dir: dir.to_path_buf(), config, raw_config, raw_generation, family, ragged })
    }
}

/// The stored tensor that holds the codes of a quantized weight.
fn stored<'a>(weight: &'a Packed, tensors: &'a BTreeMap<String, TensorInfo>) -> &'a TensorInfo {
    weight.parts.first().and_then(|name| tensors.get(name)).unwrap_or(&weight.info)
}

/// The tensors that a checkpoint has without quantization.
fn plain_tensors<'a>(
    tensors: &'a BTreeMap<String, TensorInfo>,
    quantized: &BTreeMap<String, Packed>,
    companions: &BTreeSet<String>,
) -> Cow<'a, BTreeMap<String, TensorInfo>> {
    if quantized.is_empty() {
        return Cow::Borrowed(tensors);
    }
    let dense = tensors.iter().filter(|(name, _)| !companions.contains(*name));
    let mut plain: BTreeMap<String, TensorInfo> = dense.map(|(name, info)| (name.clone(), info.clone())).collect();
    plain.extend(quantized.iter().map(|(name, weight)| (name.clone(), weight.info.clone())));
    Cow::Owned(plain)
}

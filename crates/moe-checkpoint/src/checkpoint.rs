//! A model: a directory, or what a method makes of one; verified wholly, read lazily.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use safetensors::Dtype;
use serde_json::Value;

use crate::config::{Ffn, ModelConfig};
use crate::convert;
use crate::expert_bytes::{ExpertBytes, RawMatrix};
use crate::expert_weights::ExpertWeights;
use crate::experts::{ExpertBiases, ExpertBlock, ExpertLayout, ExpertPart, ExpertTensor, Placement};
use crate::family::{Family, Role, dense_family_of, family_of};
use crate::files::Files;
use crate::formats::matrix::{Matrix, Part, Rows};
use crate::formats::{self, Packed, Quantization};
use crate::grouped::Grouped;
use crate::index::read_json;
use crate::naming;
use crate::ragged::Ragged;
use crate::record::{Record, Step};
use crate::shape::MoeShape;
use crate::source::{ModelDescription, ModelSource, sliced};
use crate::verify;
use crate::weights::{self, TensorInfo};
use crate::{Error, Result};

/// A model, read-only, shareable between threads: a directory, or what a method makes of one ([`ModelSource`]).
///
/// Weights are memory-mapped (or made) and read when asked for. Reads that convert give the pages they touched back to
/// the system, so that resident memory stays that of the results; [`Checkpoint::bytes`] and
/// [`Checkpoint::expert_bytes`] return views and leave that to [`Checkpoint::release`].
///
/// The files must not be changed in place while they are open.
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    raw_config: Value,
    raw_generation: Option<Value>,
    family: &'static dyn Family,
    ragged: bool,
    shape: MoeShape,
    source: Arc<dyn ModelSource>,
    tensors: BTreeMap<String, TensorInfo>,
    layouts: BTreeMap<usize, ExpertLayout>,
    /// Tensors made of experts that the source makes.
    made: BTreeMap<String, MadeTensor>,
    unfit: Option<String>,
    /// Quantized weights, by the names they have without quantization.
    quantized: BTreeMap<String, Packed>,
    /// Stored tensors that a checkpoint without quantization does not have by that name.
    companions: BTreeSet<String>,
    steps: Vec<Step>,
    fingerprint: OnceLock<String>,
}

/// A tensor of experts that the source makes.
pub(crate) struct MadeTensor {
    pub layer: usize,
    /// Set of weights, content and first byte of every block, in file order.
    pub blocks: Vec<(usize, ExpertBlock, usize)>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = formatter.debug_struct("Checkpoint");
        debug.field("dir", &self.dir).field("model_type", &self.config.model_type).field("ragged", &self.ragged);
        debug.field("steps", &self.steps.len()).field("tensors", &self.tensors.len()).finish_non_exhaustive()
    }
}

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
        let shape = config.moe_shape();
        Ok(Self {
            dir,
            config,
            raw_config,
            raw_generation,
            family,
            ragged,
            shape,
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

    /// The directory, as given to [`Checkpoint::open`]: of what a method makes, that of the model it started from,
    /// which has the tokenizer and the other files that are not weights.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The typed config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// `config.json` as it is, unknown keys included.
    pub fn raw_config(&self) -> &Value {
        &self.raw_config
    }

    /// `generation_config.json` as it is, if there is one.
    pub fn raw_generation_config(&self) -> Option<&Value> {
        self.raw_generation.as_ref()
    }

    /// The family.
    pub fn family(&self) -> &'static dyn Family {
        self.family
    }

    /// The routed-expert shape.
    pub fn shape(&self) -> &MoeShape {
        &self.shape
    }

    /// Whether the experts are of different widths, in the format of `docs/ragged-format.md`.
    pub fn ragged(&self) -> bool {
        self.ragged
    }

    /// Why the model cannot run although its weights can be read, pruned and written: its attention is of a kind that
    /// the config does not describe, or does not fit the sizes that the config gives it.
    pub fn cannot_run(&self) -> Option<String> {
        self.unfit.clone()
    }

    /// Whether the model has no routed experts: what [`Checkpoint::open_dense`] opens, and what was made of it without
    /// adding any.
    pub fn is_dense(&self) -> bool {
        self.shape.layers.is_empty()
    }

    /// Whether experts share sets of weights, in the format of `docs/grouped-format.md`.
    pub fn grouped(&self) -> bool {
        self.config.layers.iter().any(|layer| matches!(&layer.ffn, Ffn::Moe(moe) if moe.sets.is_some()))
    }

    /// How the routed experts of an MoE layer are stored.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`].
    pub fn expert_layout(&self, layer: usize) -> Result<ExpertLayout> {
        self.layouts.get(&layer).copied().ok_or_else(|| self.unknown_layer(layer))
    }

    /// Whether the routed experts of an MoE layer are made part by part, by a [`ModelSource`]; otherwise they lie in
    /// the bytes of tensors.
    pub fn makes_experts(&self, layer: usize) -> bool {
        self.source.makes_experts(layer)
    }

    /// Identifies the model by content, as 64 hex digits: a BLAKE3 hash over `config.json`, names, dtypes and shapes of
    /// all tensors and samples of 4 KiB from the start, the middle and the end of each. It does not depend on how the
    /// weights are spread over files. Of what a method makes it is the digest of its last [step](Checkpoint::steps).
    /// Computed on the first call.
    pub fn fingerprint(&self) -> String {
        self.fingerprint.get_or_init(|| self.source.fingerprint(self)).clone()
    }

    /// Whether this is the model that a plan, scores or statistics name by `fingerprint`: by its own fingerprint or,
    /// for a directory that was written from what a method made, by the digest of the last step.
    pub fn is_model(&self, fingerprint: &str) -> bool {
        self.fingerprint() == fingerprint || self.steps.last().is_some_and(|step| step.digest == fingerprint)
    }

    /// What methods did to make this model of a released one, the first step first; those in the record of its
    /// directory included.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The model that a method made this one from; `None` for a directory.
    pub fn base(&self) -> Option<&Arc<Checkpoint>> {
        self.source.base()
    }

    pub(crate) fn infos(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    pub(crate) fn made(&self, name: &str) -> Option<&MadeTensor> {
        self.made.get(name)
    }

    /// All tensors as they are stored, sorted by name: of a quantized weight those of its codes, scales and so on.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// All tensors as they are without quantization, sorted by name: quantized weights are BF16, under the names of
    /// their family.
    pub fn plain_tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        let dense = |info: &&TensorInfo| !self.companions.contains(&info.name);
        let mut all: Vec<&TensorInfo> = self.tensors.values().filter(dense).collect();
        all.retain(|info| !self.quantized.contains_key(&info.name));
        all.extend(self.quantized.values().map(|weight| &weight.info));
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all.into_iter()
    }

    /// Dtype, shape and place of a tensor that is stored, else of a quantized weight that is stored under other names.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        let quantized = || self.quantized.get(name).map(|weight| &weight.info);
        let missing = || Error::NoSuchTensor { dir: self.dir.clone(), tensor: name.to_string() };
        self.tensors.get(name).or_else(quantized).ok_or_else(missing)
    }

    /// Dtype and shape of a tensor as it is without quantization.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn plain_info(&self, name: &str) -> Result<&TensorInfo> {
        self.quantized.get(name).map_or_else(|| self.info(name), |weight| Ok(&weight.info))
    }

    /// The tensor of a role as it is stored, the embedding for the head of a model with tied embeddings.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`] for a role that the model does not have.
    pub fn role(&self, role: Role) -> Result<&TensorInfo> {
        self.info(&self.family.tensor_name(self.untied(role)))
    }

    /// The tensor of a role as it is without quantization.
    ///
    /// # Errors
    /// As [`Checkpoint::role`].
    pub fn plain_role(&self, role: Role) -> Result<&TensorInfo> {
        self.plain_info(&self.family.tensor_name(self.untied(role)))
    }

    /// Sum of the bytes of all tensors.
    pub fn bytes_on_disk(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.bytes).sum()
    }

    /// Dtype of a part of a routed expert as it is read, without reading it; `None` for a bias that does not exist.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn expert_dtype(&self, layer: usize, expert: usize, part: ExpertPart) -> Result<Option<Dtype>> {
        let (set, biases) = self.stored_set(layer, expert)?;
        if !biases.has(part) {
            return Ok(None);
        }
        let (info, _) = self.place(layer, set, part)?;
        Ok(Some(self.plain_dtype(&info.name)?))
    }

    /// Bytes of the routed experts of an MoE layer as the files hold them.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`].
    pub fn expert_bytes_on_disk(&self, layer: usize) -> Result<u64> {
        let moe = self.config.moe(layer).ok_or_else(|| self.unknown_layer(layer))?;
        let tensors =
            self.expert_layout(layer)?.tensors(self.config.expert_hidden_size(), &moe.stored_widths(), moe.biases);
        let mut bytes = 0;
        for tensor in tensors.into_iter().flatten() {
            let info = self.info(&self.family.expert_tensor_name(layer, tensor.tensor))?;
            bytes += self.quantized.get(&info.name).map_or(info.bytes, |weight| weight.bytes);
        }
        Ok(bytes)
    }

    /// Tensors of multi-token prediction: those of the layers after the decoder layers and those under `mtp.`. They are
    /// carried along, not interpreted.
    pub fn mtp_tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values().filter(|info| self.is_mtp(&info.name))
    }

    /// Whether a tensor is one of [`Checkpoint::mtp_tensors`].
    pub fn is_mtp(&self, name: &str) -> bool {
        name.starts_with("mtp.")
            || name.starts_with("model.mtp_")
            || self.family.layer_of(name).is_some_and(|layer| layer >= self.config.layers.len())
    }

    /// Elements of all tensors; a head that is tied to the embedding counts once, even if the file has both. Factors of
    /// quantized tensors do not count.
    pub fn parameters(&self) -> u64 {
        let tied_head = self.config.tie_word_embeddings.then(|| self.family.tensor_name(Role::LmHead));
        let counted = self.plain_tensors().filter(|tensor| Some(&tensor.name) != tied_head.as_ref());
        counted.map(TensorInfo::elements).sum()
    }

    /// The bytes of a tensor: mapped, without a copy, where a file holds them, and made otherwise. They stay resident
    /// until [`Checkpoint::release`].
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`]; those of the [source](ModelSource).
    pub fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let info = self.info(name)?;
        self.range(info, 0..info.bytes as usize)
    }

    /// A range of the bytes of a tensor, like [`Checkpoint::bytes`].
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::OutOfRange`]; those of the [source](ModelSource).
    pub fn tensor_bytes(&self, name: &str, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let info = self.info(name)?;
        if range.start > range.end || range.end as u64 > info.bytes {
            return Err(Error::OutOfRange {
                what: format!("bytes of tensor `{name}`"),
                found: format!("{range:?}"),
                expected: format!("a range within 0..{}", info.bytes),
            });
        }
        self.range(info, range)
    }

    /// Like [`Checkpoint::tensor_bytes`], of the tensor with its elements as they are read: BF16 for a quantized one.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor_bytes`].
    pub fn plain_bytes(&self, name: &str, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let info = self.info(name)?;
        let Some(weight) = self.quantized.get(&info.name) else { return self.tensor_bytes(name, range) };
        self.decoded_bytes(weight, range)
    }

    /// The values of a quantized weight in f32, each the product of its code and its scale, rounded once: what its
    /// [plain bytes](Checkpoint::plain_bytes) are rounded from. `None` for a tensor that is not quantized.
    ///
    /// # Errors
    /// [`Error::NotANumber`]; those of the [source](ModelSource).
    pub fn dequantized_f32(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(weight) = self.quantized.get(name) else { return Ok(None) };
        let all = 0..weight.info.elements() as usize;
        self.decoded(weight, all, 1, |matrix, rows| matrix.f32(rows)).map(Some)
    }

    /// The least number of [plain bytes](Checkpoint::plain_bytes) of a tensor that are worth asking for at once: a row
    /// of a quantized matrix.
    pub fn plain_grain(&self, name: &str) -> usize {
        match self.quantized.get(name) {
            Some(weight) if weight.transposed => 2 * weight.dims.0 * weight.dims.1,
            Some(weight) => 2 * weight.dims.1,
            None => return self.grain(name),
        }
        .max(1)
    }

    /// The least number of bytes of a tensor that are worth asking for at once; see [`ModelSource::grain`].
    pub fn grain(&self, name: &str) -> usize {
        match self.tensors.get(name) {
            Some(info) if self.made.contains_key(name) => info.bytes as usize,
            Some(info) => self.source.grain(info).clamp(1, (info.bytes as usize).max(1)),
            None if self.quantized.contains_key(name) => self.plain_grain(name),
            None => 1,
        }
    }

    /// Calls `f` with the bytes of a tensor, in order, by slices of about `max_bytes` (at least 1), and gives their
    /// pages back as it goes: a copy of any size within a small resident memory.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], those of the [source](ModelSource), and those of `f`.
    pub fn stream(&self, name: &str, max_bytes: usize, mut f: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let info = self.info(name)?;
        let grain = self.grain(name);
        let step = (max_bytes.max(1) / grain).max(1) * grain;
        let end = info.bytes as usize;
        for start in (0..end).step_by(step) {
            let slice = start..end.min(start.saturating_add(step));
            f(&self.range(info, slice.clone())?)?;
            self.release_range(name, slice);
        }
        Ok(())
    }

    /// Any bytes of a tensor.
    fn range(&self, info: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let Some(made) = self.made.get(&info.name) else {
            return match self.quantized.get(&info.name) {
                Some(weight) if !self.tensors.contains_key(&info.name) => self.decoded_bytes(weight, range),
                _ => self.source.bytes(info, range),
            };
        };
        let mut out = Vec::with_capacity(range.len());
        for (index, (set, block, begin)) in made.blocks.iter().enumerate() {
            let end = made.blocks.get(index + 1).map_or(info.bytes as usize, |next| next.2);
            let wanted = range.start.max(*begin)..range.end.min(end);
            if wanted.is_empty() {
                continue;
            }
            let bytes = self.block(made.layer, *set, *block)?;
            let part = wanted.start - begin..wanted.end - begin;
            if wanted == range {
                return Ok(sliced(bytes, part));
            }
            out.extend_from_slice(&bytes[part]);
        }
        Ok(Cow::Owned(out))
    }

    /// The bytes of one block of an expert that the source makes.
    pub(crate) fn block(&self, layer: usize, set: usize, block: ExpertBlock) -> Result<Cow<'_, [u8]>> {
        if block == ExpertBlock::Part(ExpertPart::Up) && self.expert_layout(layer)? == ExpertLayout::Gateless {
            let [gate, up] = [ExpertPart::Gate, ExpertPart::Up].map(|part| self.set_part(layer, set, part));
            if let (Some(gate), Some(up)) = (gate?, up?)
                && gate.bytes != up.bytes
            {
                return Err(Error::OutOfRange {
                    what: format!("layer {layer}, expert {set}"),
                    found: "a gate that is not the up projection".to_string(),
                    expected: "the same rows, since experts of this model have no gate of their own".to_string(),
                });
            }
        }
        let parts = block.parts().iter().map(|part| {
            let missing = || Error::OutOfRange {
                what: format!("layer {layer}, expert {set}"),
                found: format!("no {part:?}"),
                expected: "every part that its config has".to_string(),
            };
            self.set_part(layer, set, *part)?.ok_or_else(missing)
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        block.assemble(parts).ok_or_else(|| Error::OutOfRange {
            what: format!("layer {layer}, expert {set}"),
            found: "gate and up of different dtypes or shapes".to_string(),
            expected: "the same ones, since one tensor holds both".to_string(),
        })
    }

    /// Whether the weights are quantized. They are read as BF16 then.
    pub fn quantization(&self) -> Option<Quantization> {
        self.config.quantization
    }

    /// Whether a stored tensor only serves a quantized weight of another name (codes, scales, zero points), so that a
    /// checkpoint without quantization does not have it.
    pub fn is_scale(&self, name: &str) -> bool {
        self.companions.contains(name)
    }

    /// Whether the experts of a layer are stored as the transposes of what they are without quantization.
    pub(crate) fn experts_are_transposed(&self, layer: usize) -> bool {
        let place = |part| self.place(layer, 0, part).ok();
        let weight = |part| self.quantized.get(&place(part)?.0.name);
        ExpertPart::ALL.into_iter().filter_map(weight).any(|weight| weight.transposed)
    }

    /// Dtype of a tensor as it is read: BF16 for a quantized one.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn plain_dtype(&self, name: &str) -> Result<Dtype> {
        self.plain_info(name).map(|info| info.dtype)
    }

    /// Like [`Checkpoint::stream`], with the elements of a quantized tensor as BF16.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], and those of `f`.
    pub fn stream_plain(&self, name: &str, max_bytes: usize, mut f: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let Some(weight) = self.quantized.get(name) else { return self.stream(name, max_bytes, f) };
        let grain = self.plain_grain(name);
        let (step, end) = ((max_bytes / grain).max(1) * grain, weight.info.bytes as usize);
        for start in (0..end).step_by(step) {
            let range = start..end.min(start + step);
            f(&self.decoded_bytes(weight, range.clone())?)?;
            self.release_plain(name, range);
        }
        Ok(())
    }

    /// Gives all mapped pages back to the system. Views stay valid: what is read again is paged in again.
    pub fn release(&self) {
        self.source.release_all();
    }

    /// Gives the mapped pages of some bytes of a tensor back to the system. A name that the model does not have holds
    /// no pages.
    pub fn release_range(&self, name: &str, range: Range<usize>) {
        match self.tensors.get(name) {
            Some(info) => self.source.release(info, range),
            None => self.release_decoded(name, range),
        }
    }

    /// The same for a range of [plain bytes](Checkpoint::plain_bytes).
    pub fn release_plain(&self, name: &str, range: Range<usize>) {
        match self.tensors.get(name) {
            Some(info) if !self.quantized.contains_key(name) => self.source.release(info, range),
            _ => self.release_decoded(name, range),
        }
    }

    fn release_decoded(&self, name: &str, range: Range<usize>) {
        if let Some(weight) = self.quantized.get(name) {
            let one = (2 * weight.dims.0 * weight.dims.1).max(1);
            self.release_weight(weight, range.start / one..range.end.div_ceil(one));
        }
    }

    /// Gives the mapped pages of one tensor back to the system.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn release_tensor(&self, name: &str) -> Result<()> {
        let info = self.info(name)?;
        if let Some(made) = self.made.get(name) {
            made.blocks.iter().for_each(|(set, ..)| self.source.release_expert(made.layer, *set));
        } else if let Some(weight) = self.quantized.get(name) {
            self.release_weight(weight, 0..weight.count());
        } else {
            self.source.release(info, 0..info.bytes as usize);
        }
        Ok(())
    }

    /// A whole tensor as f32.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`] for a role that the model does not have.
    pub fn read_f32(&self, role: Role) -> Result<Vec<f32>> {
        let info = self.plain_info(&self.role(role)?.name)?;
        self.read_part(info, 0..info.elements() as usize)
    }

    /// Rows of the first dimension of a tensor as f32.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::OutOfRange`].
    pub fn read_f32_rows(&self, role: Role, rows: Range<usize>) -> Result<Vec<f32>> {
        let info = self.plain_info(&self.role(role)?.name)?;
        let count = info.shape.first().copied().unwrap_or(1);
        if rows.start > rows.end || rows.end > count {
            return Err(Error::OutOfRange {
                what: format!("row range of tensor `{}`", info.name),
                found: format!("{rows:?}"),
                expected: format!("rows within 0..{count}"),
            });
        }
        let row: usize = info.shape.iter().skip(1).product();
        self.read_part(info, rows.start * row..rows.end * row)
    }

    /// Any tensor of F32, F16 or BF16 by its name, as f32.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::UnsupportedDtype`].
    pub fn tensor_f32(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.plain_info(name)?;
        self.read_part(info, 0..info.elements() as usize)
    }

    /// The weights of a routed expert as f32, from whatever layout.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn expert(&self, layer: usize, expert: usize) -> Result<ExpertWeights> {
        let mut weights = ExpertWeights::default();
        self.expert_into(layer, expert, &mut weights)?;
        Ok(weights)
    }

    /// Like [`Checkpoint::expert`], into buffers that are reused.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn expert_into(&self, layer: usize, expert: usize, weights: &mut ExpertWeights) -> Result<()> {
        let (set, biases) = self.stored_set(layer, expert)?;
        if !biases.has(ExpertPart::GateBias) {
            (weights.gate_bias, weights.up_bias) = (None, None);
        }
        if !biases.has(ExpertPart::DownBias) {
            weights.down_bias = None;
        }
        for part in parts(biases) {
            let buffer = weights.buffer(part);
            if !self.source.makes_experts(layer) {
                let (info, place) = self.place(layer, set, part)?;
                if place.is_contiguous() && convert::float_bytes(info.dtype).is_some() {
                    self.read_part_into(info, place.range(), buffer)?;
                    continue;
                }
            }
            let Some(matrix) = self.set_part(layer, set, part)? else { continue };
            buffer.resize(matrix.rows * matrix.cols, 0.0);
            convert::decode(matrix.dtype, &matrix.bytes, buffer, |_| {});
        }
        self.release_set(layer, set);
        weights.hidden = self.config.expert_hidden_size();
        weights.width = weights.gate.len() / weights.hidden;
        Ok(())
    }

    /// The weights of a routed expert in their canonical orientation without a cast, from whatever layout: views of the
    /// file where it holds them so, which stay resident until [`Checkpoint::release_expert`] or
    /// [`Checkpoint::release`], else copies. Quantized weights are BF16.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn expert_bytes(&self, layer: usize, expert: usize) -> Result<ExpertBytes<'_>> {
        let (set, biases) = self.stored_set(layer, expert)?;
        let read = |part: ExpertPart| {
            let missing = || Error::OutOfRange {
                what: format!("layer {layer}, expert {expert}"),
                found: format!("no {part:?}"),
                expected: "every part that its config has".to_string(),
            };
            self.set_part(layer, set, part)?.ok_or_else(missing)
        };
        let bias = |part: ExpertPart| biases.has(part).then(|| read(part)).transpose();
        let gate_up_bias = bias(ExpertPart::GateBias)?.zip(bias(ExpertPart::UpBias)?).map(<[_; 2]>::from);
        let down_bias = bias(ExpertPart::DownBias)?;
        let [gate, up, down] = ExpertPart::ALL;
        Ok(ExpertBytes { gate: read(gate)?, up: read(up)?, down: read(down)?, gate_up_bias, down_bias })
    }

    /// One part of a routed expert, like [`Checkpoint::expert_bytes`]; `None` for a bias that it does not have.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn expert_part(&self, layer: usize, expert: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        let (set, _) = self.stored_set(layer, expert)?;
        self.set_part(layer, set, part)
    }

    /// One part of a set of weights that experts may share, like [`Checkpoint::expert_part`]. Sets are the experts of
    /// the layer, unless the checkpoint is [grouped](Checkpoint::grouped).
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`]; those of the [source](ModelSource).
    pub fn set_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        let moe = self.config.moe(layer).ok_or_else(|| self.unknown_layer(layer))?;
        let count = moe.stored_widths().len();
        if set >= count {
            return Err(Error::UnknownExpert { layer, expert: set, count });
        }
        if !moe.biases.has(part) {
            return Ok(None);
        }
        if self.source.makes_experts(layer) {
            return self.source.expert_part(layer, set, part);
        }
        let (info, place) = self.place(layer, set, part)?;
        self.matrix(info, &place).map(Some)
    }

    /// Gives the mapped pages of a routed expert back to the system.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn release_expert(&self, layer: usize, expert: usize) -> Result<()> {
        let (set, _) = self.stored_set(layer, expert)?;
        self.release_set(layer, set);
        Ok(())
    }

    /// Gives the mapped pages of a set of weights that experts may share back to the system.
    pub fn release_set(&self, layer: usize, set: usize) {
        if self.source.makes_experts(layer) {
            return self.source.release_expert(layer, set);
        }
        let biases = self.config.moe(layer).map_or(ExpertBiases::None, |moe| moe.biases);
        for part in parts(biases) {
            if let Ok((info, place)) = self.place(layer, set, part) {
                self.release_place(info, &place);
            }
        }
    }

    /// The name of a tensor of routed experts in this family.
    pub fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        self.family.expert_tensor_name(layer, tensor)
    }

    /// The set of weights of an expert, and the biases it has.
    fn stored_set(&self, layer: usize, expert: usize) -> Result<(usize, ExpertBiases)> {
        let moe = self.config.moe(layer).ok_or_else(|| self.unknown_layer(layer))?;
        if expert >= moe.num_experts() {
            return Err(Error::UnknownExpert { layer, expert, count: moe.num_experts() });
        }
        Ok((moe.stored(expert), moe.biases))
    }

    /// Where a part of a set of weights is.
    fn place(&self, layer: usize, set: usize, part: ExpertPart) -> Result<(&TensorInfo, Placement)> {
        let moe = self.config.moe(layer).ok_or_else(|| self.unknown_layer(layer))?;
        let layout = self.expert_layout(layer)?;
        let place = layout.place(self.config.expert_hidden_size(), &moe.stored_widths(), set, part);
        Ok((self.info(&self.family.expert_tensor_name(layer, place.tensor))?, place))
    }

    /// A part of an expert, row-major.
    fn matrix(&self, info: &TensorInfo, place: &Placement) -> Result<RawMatrix<'_>> {
        let matrix = |bytes, dtype| RawMatrix { bytes, dtype, rows: place.rows, cols: place.cols };
        if let Some(weight) = self.quantized.get(&info.name) {
            let bytes = match weight.rows(place) {
                Some((number, rows)) => {
                    let bytes = self.opened(weight, number)?.bf16(rows).ok_or_else(|| weight.no_number())?;
                    self.release_weight(weight, number..number + 1);
                    bytes
                }
                None => {
                    let elements = place.range();
                    let bytes = self.decoded_bytes(weight, 2 * elements.start..2 * elements.end)?;
                    convert::gather(&bytes, place, 2)
                }
            };
            return Ok(matrix(Cow::Owned(bytes), Dtype::BF16));
        }
        let bytes = self.range(info, info.byte_range(&place.range()))?;
        let bytes = match place.is_contiguous() {
            true => bytes,
            false => Cow::Owned(convert::gather(&bytes, place, info.dtype.bitsize() / 8)),
        };
        Ok(matrix(bytes, info.dtype))
    }

    fn release_place(&self, info: &TensorInfo, place: &Placement) {
        let elements = place.range();
        match self.quantized.get(&info.name) {
            Some(_) => self.release_plain(&info.name, 2 * elements.start..2 * elements.end),
            None => self.source.release(info, info.byte_range(&elements)),
        }
    }

    /// One of the matrices of a quantized weight. Its bytes are views of the files where these hold them.
    fn opened(&self, weight: &Packed, matrix: usize) -> Result<Matrix<'_>> {
        weight.open(matrix, |name, number, stack| {
            let info = self.info(name)?;
            let bytes = self.source.bytes(info, formats::share(info.bytes as usize, number, stack))?;
            Ok(Part { dtype: info.dtype, bytes })
        })
    }

    /// The quantized weights.
    pub(crate) fn quantized_weights(&self) -> impl Iterator<Item = &Packed> {
        self.quantized.values()
    }

    /// A quantized weight by its name without quantization.
    pub(crate) fn quantized_weight(&self, name: &str) -> Option<&Packed> {
        self.quantized.get(name)
    }

    /// Codes and parameters of a matrix of a quantized weight; `None` for a format that is read only.
    pub(crate) fn parted(&self, name: &str, matrix: usize) -> Result<Option<formats::scheme::Parted>> {
        let Some(weight) = self.quantized.get(name) else { return Ok(None) };
        weight.parted(matrix, |name, number, stack| {
            let info = self.info(name)?;
            let bytes = self.source.bytes(info, formats::share(info.bytes as usize, number, stack))?;
            Ok(Part { dtype: info.dtype, bytes })
        })
    }

    /// Gives the pages of matrices of a quantized weight back.
    fn release_weight(&self, weight: &Packed, matrices: Range<usize>) {
        for info in weight.parts.iter().filter_map(|name| self.tensors.get(name)) {
            let share = |number| formats::share(info.bytes as usize, weight.first + number, weight.stack);
            self.source.release(info, share(matrices.start).start..share(matrices.end).start);
        }
    }

    /// A range of the bytes of a quantized weight as BF16.
    fn decoded_bytes(&self, weight: &Packed, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let elements = range.start / 2..range.end.div_ceil(2);
        let start = 2 * elements.start;
        let bytes = self.decoded(weight, elements, 2, |matrix, rows| matrix.bf16(rows))?;
        Ok(sliced(Cow::Owned(bytes), range.start - start..range.end - start))
    }

    /// A range of the elements of a quantized weight, as it is without quantization, each as `size` of what `decode`
    /// gives.
    fn decoded<T: Copy>(
        &self,
        weight: &Packed,
        elements: Range<usize>,
        size: usize,
        decode: impl Fn(&Matrix<'_>, Rows) -> Option<Vec<T>>,
    ) -> Result<Vec<T>> {
        let (rows, cols) = weight.dims;
        let grain = if weight.transposed { rows * cols } else { cols }.max(1);
        let wanted = elements.start / grain..elements.end.div_ceil(grain);
        let mut out = Vec::with_capacity(wanted.len() * grain * size);
        let failed = || weight.no_number();
        if weight.transposed {
            for number in wanted.clone() {
                let all = decode(&self.opened(weight, number)?, Rows::range(0..rows)).ok_or_else(failed)?;
                for element in 0..rows * cols {
                    let at = element % rows * cols + element / rows;
                    out.extend_from_slice(&all[at * size..(at + 1) * size]);
                }
            }
        } else {
            let mut line = wanted.start;
            while line < wanted.end {
                let (number, first) = (line / rows.max(1), line % rows.max(1));
                let last = rows.min(first + wanted.end - line);
                let matrix = self.opened(weight, number)?;
                out.extend(decode(&matrix, Rows::range(first..last)).ok_or_else(failed)?);
                line += last - first;
            }
        }
        let start = wanted.start * grain;
        out.truncate((elements.end - start) * size);
        out.drain(..(elements.start - start) * size);
        Ok(out)
    }

    fn read_part(&self, info: &TensorInfo, elements: Range<usize>) -> Result<Vec<f32>> {
        let mut out = Vec::new();
        self.read_part_into(info, elements, &mut out)?;
        Ok(out)
    }

    fn read_part_into(&self, info: &TensorInfo, elements: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        if let Some(weight) = self.quantized.get(&info.name) {
            let bytes = self.decoded_bytes(weight, 2 * elements.start..2 * elements.end)?;
            out.resize(elements.len(), 0.0);
            convert::decode(Dtype::BF16, &bytes, out, |_| {});
            self.release_plain(&info.name, 2 * elements.start..2 * elements.end);
            return Ok(());
        }
        if convert::float_bytes(info.dtype).is_none() {
            return Err(Error::UnsupportedDtype {
                file: info.file.to_path_buf(),
                tensor: info.name.clone(),
                found: info.dtype,
                expected: verify::FLOATS.to_string(),
            });
        }
        out.resize(elements.len(), 0.0);
        let range = info.byte_range(&elements);
        let bytes = self.range(info, range.clone())?;
        convert::decode(info.dtype, &bytes, out, |done| {
            self.source.release(info, range.start + done.start..range.start + done.end);
        });
        Ok(())
    }

    fn untied(&self, role: Role) -> Role {
        if role == Role::LmHead && self.config.tie_word_embeddings { Role::Embedding } else { role }
    }

    fn unknown_layer(&self, layer: usize) -> Error {
        Error::UnknownLayer { layer, known: self.shape.layers.iter().map(|l| l.layer).collect() }
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

/// The parts that an expert has.
fn parts(biases: ExpertBiases) -> impl Iterator<Item = ExpertPart> {
    ExpertPart::ALL.into_iter().chain(ExpertPart::BIASES).filter(move |part| biases.has(*part))
}

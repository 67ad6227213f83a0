//! A model directory: opened once, verified wholly, read lazily.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::Value;

use crate::config::ModelConfig;
use crate::convert;
use crate::experts::{ExpertBytes, ExpertLayout, ExpertPart, ExpertTensor, ExpertWeights, RawMatrix};
use crate::family::{Family, Role, family};
use crate::fingerprint;
use crate::index::read_json;
use crate::ragged::Ragged;
use crate::shape::MoeShape;
use crate::shard::Shard;
use crate::verify;
use crate::weights::{self, TensorInfo};
use crate::{Error, Result};

/// A model directory, read-only, shareable between threads.
///
/// Weights are memory-mapped and read when asked for. Reads that convert give the pages they touched back to the system,
/// so that resident memory stays that of the results; [`Checkpoint::bytes`] and [`Checkpoint::expert_bytes`] return views
/// and leave that to [`Checkpoint::release`].
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
    shards: Vec<Shard>,
    tensors: BTreeMap<String, TensorInfo>,
    layouts: BTreeMap<usize, ExpertLayout>,
    fingerprint: OnceLock<String>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = formatter.debug_struct("Checkpoint");
        debug.field("dir", &self.dir).field("model_type", &self.config.model_type).field("ragged", &self.ragged);
        debug.field("shards", &self.shards.len()).field("tensors", &self.tensors.len()).finish()
    }
}

impl Checkpoint {
    /// Opens a Hugging Face model directory: `config.json`, `model.safetensors` or `model.safetensors.index.json` with its
    /// shards. Headers are parsed, weights are not read.
    ///
    /// # Errors
    /// Every problem that the config and the headers can show, before any weight is read: see the variants of
    /// [`enum@Error`]. A checkpoint that opens has every tensor its config calls for, with the shape it calls for, as F32,
    /// F16 or BF16, and no tensor in its decoder layers that the config has no place for.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            return Err(Error::NotADirectory { path: dir.to_path_buf() });
        }
        let config_path = dir.join("config.json");
        let raw_config = read_json(&config_path)?;
        let generation_path = dir.join("generation_config.json");
        let raw_generation = generation_path.exists().then(|| read_json(&generation_path)).transpose()?;
        let parse = || -> Result<_> {
            let ragged = Ragged::read(&raw_config)?.is_some();
            let config = ModelConfig::from_json(&raw_config, raw_generation.as_ref())?;
            Ok((family(&config.model_type)?, ragged, config))
        };
        let (family, ragged, config) = parse().map_err(|error| error.in_dir(dir))?;

        let (shards, tensors) = weights::open(dir)?;
        let layouts = verify::verify(&verify::Weights { dir, config: &config, family, ragged, tensors: &tensors })?;
        let shape = config.moe_shape();
        Ok(Self {
            dir: dir.to_path_buf(),
            config,
            raw_config,
            raw_generation,
            family,
            ragged,
            shape,
            shards,
            tensors,
            layouts,
            fingerprint: OnceLock::new(),
        })
    }

    /// The directory, as given to [`Checkpoint::open`].
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

    /// How the routed experts of an MoE layer are stored.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`].
    pub fn expert_layout(&self, layer: usize) -> Result<ExpertLayout> {
        self.layouts.get(&layer).copied().ok_or_else(|| self.unknown_layer(layer))
    }

    /// Identifies the model by content, as 64 hex digits: a BLAKE3 hash over `config.json`, names, dtypes and shapes of all
    /// tensors and samples of 4 KiB from the start, the middle and the end of each. It does not depend on how the weights
    /// are spread over files. Computed on the first call.
    pub fn fingerprint(&self) -> String {
        self.fingerprint.get_or_init(|| fingerprint::compute(&self.raw_config, &self.shards, &self.tensors)).clone()
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// Dtype, shape and place of a tensor.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| Error::NoSuchTensor { dir: self.dir.clone(), tensor: name.to_string() })
    }

    /// The tensor of a role, the embedding for the head of a model with tied embeddings.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`] for a role that the model does not have.
    pub fn role(&self, role: Role) -> Result<&TensorInfo> {
        self.info(&self.family.tensor_name(self.untied(role)))
    }

    /// Sum of the bytes of all tensors.
    pub fn bytes_on_disk(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.bytes).sum()
    }

    /// Elements of all tensors; a head that is tied to the embedding counts once, even if the file has both.
    pub fn parameters(&self) -> u64 {
        let tied_head = self.config.tie_word_embeddings.then(|| self.family.tensor_name(Role::LmHead));
        let counted = self.tensors.values().filter(|tensor| Some(&tensor.name) != tied_head.as_ref());
        counted.map(TensorInfo::elements).sum()
    }

    /// The bytes of a tensor, mapped; nothing is copied. They stay resident until [`Checkpoint::release`].
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        self.info(name).map(|info| self.view(info))
    }

    /// Calls `f` with the bytes of a tensor, in order, by slices of at most `max_bytes` (at least 1), and gives their pages
    /// back as it goes: a copy of any size within a small resident memory.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], and those of `f`.
    pub fn stream(&self, name: &str, max_bytes: usize, mut f: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let info = self.info(name)?;
        let shard = &self.shards[info.shard()];
        let range = info.range();
        for start in range.clone().step_by(max_bytes.max(1)) {
            let slice = start..range.end.min(start.saturating_add(max_bytes.max(1)));
            f(shard.bytes(slice.clone()))?;
            shard.release(slice);
        }
        Ok(())
    }

    /// Gives all mapped pages back to the system. Views stay valid: what is read again is paged in again.
    pub fn release(&self) {
        self.shards.iter().for_each(Shard::release_all);
    }

    /// Gives the mapped pages of one tensor back to the system.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn release_tensor(&self, name: &str) -> Result<()> {
        let info = self.info(name)?;
        self.shards[info.shard()].release(info.range());
        Ok(())
    }

    /// A whole tensor as f32.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`] for a role that the model does not have.
    pub fn read_f32(&self, role: Role) -> Result<Vec<f32>> {
        let info = self.role(role)?;
        self.read_part(info, 0..info.elements() as usize)
    }

    /// Rows of the first dimension of a tensor as f32.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::OutOfRange`].
    pub fn read_f32_rows(&self, role: Role, rows: Range<usize>) -> Result<Vec<f32>> {
        let info = self.role(role)?;
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
        let info = self.info(name)?;
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
        let located = self.locate(layer, expert)?;
        let buffers = [&mut weights.gate, &mut weights.up, &mut weights.down];
        for ((info, elements), buffer) in located.into_iter().zip(buffers) {
            self.read_part_into(info, elements, buffer)?;
        }
        weights.hidden = self.config.hidden_size;
        weights.width = weights.gate.len() / weights.hidden;
        Ok(())
    }

    /// The weights of a routed expert as the file holds them, mapped, from whatever layout. They stay resident until
    /// [`Checkpoint::release_expert`] or [`Checkpoint::release`].
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn expert_bytes(&self, layer: usize, expert: usize) -> Result<ExpertBytes<'_>> {
        let hidden = self.config.hidden_size;
        let [gate, up, down] = self.locate(layer, expert)?.map(|(info, elements)| {
            let width = elements.len() / hidden;
            let bytes = &self.view(info)[info.byte_range(&elements)];
            RawMatrix { bytes, dtype: info.dtype, rows: width, cols: hidden }
        });
        let down = RawMatrix { rows: hidden, cols: down.rows, ..down };
        Ok(ExpertBytes { gate, up, down })
    }

    /// Gives the mapped pages of a routed expert back to the system.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn release_expert(&self, layer: usize, expert: usize) -> Result<()> {
        for (info, elements) in self.locate(layer, expert)? {
            let bytes = info.byte_range(&elements);
            self.shards[info.shard()].release(info.begin() + bytes.start..info.begin() + bytes.end);
        }
        Ok(())
    }

    /// The name of a tensor of routed experts in this family.
    pub fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        self.family.expert_tensor_name(layer, tensor)
    }

    /// Tensor and elements of gate, up and down of an expert.
    fn locate(&self, layer: usize, expert: usize) -> Result<[(&TensorInfo, Range<usize>); 3]> {
        let moe = self.config.moe(layer).ok_or_else(|| self.unknown_layer(layer))?;
        let layout = self.expert_layout(layer)?;
        if expert >= moe.num_experts() {
            return Err(Error::UnknownExpert { layer, expert, count: moe.num_experts() });
        }
        let find = |part: ExpertPart| {
            let (tensor, elements) = layout.locate(self.config.hidden_size, &moe.widths, expert, part);
            Ok((self.info(&self.family.expert_tensor_name(layer, tensor))?, elements))
        };
        Ok([find(ExpertPart::Gate)?, find(ExpertPart::Up)?, find(ExpertPart::Down)?])
    }

    fn view(&self, info: &TensorInfo) -> &[u8] {
        self.shards[info.shard()].bytes(info.range())
    }

    fn read_part(&self, info: &TensorInfo, elements: Range<usize>) -> Result<Vec<f32>> {
        let mut out = Vec::new();
        self.read_part_into(info, elements, &mut out)?;
        Ok(out)
    }

    fn read_part_into(&self, info: &TensorInfo, elements: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        if convert::float_bytes(info.dtype).is_none() {
            return Err(Error::UnsupportedDtype {
                file: info.file.to_path_buf(),
                tensor: info.name.clone(),
                found: info.dtype,
                expected: verify::FLOATS.to_string(),
            });
        }
        out.resize(elements.len(), 0.0);
        let bytes = info.byte_range(&elements);
        let shard = &self.shards[info.shard()];
        let start = info.begin() + bytes.start;
        convert::decode(info.dtype, &self.view(info)[bytes], out, |done| {
            shard.release(start + done.start..start + done.end)
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

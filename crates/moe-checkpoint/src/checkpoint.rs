//! A model directory: opened once, verified wholly, read lazily.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use safetensors::Dtype;
use serde_json::Value;

use crate::config::{Ffn, ModelConfig};
use crate::convert;
use crate::expert_bytes::{ExpertBytes, ExpertWeights, RawMatrix};
use crate::experts::{ExpertBiases, ExpertLayout, ExpertPart, ExpertTensor, MXFP4_BLOCK, Placement};
use crate::family::{Family, Role, family};
use crate::fingerprint;
use crate::grouped::Grouped;
use crate::index::read_json;
use crate::quantised::{self, Quantisation, SCALE_SUFFIX};
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
    /// Tensors that only serve to dequantise others.
    scales: BTreeSet<String>,
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
    /// F16, BF16 or in a quantisation that is read, and no tensor in its decoder layers that the config has no place for.
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
            let original = Grouped::read(&raw_config)?.map(|grouped| grouped.original);
            let ragged = Ragged::read(original.as_ref().unwrap_or(&raw_config))?.is_some();
            let config = ModelConfig::from_json(&raw_config, raw_generation.as_ref())?;
            Ok((family(&config.model_type)?, ragged, config))
        };
        let (family, ragged, config) = parse().map_err(|error| error.in_dir(dir))?;

        let (shards, tensors) = weights::open(dir)?;
        let verify::Verified { layouts, scales } =
            verify::verify(&verify::Weights { dir, config: &config, family, ragged, tensors: &tensors })?;
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
            scales,
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

    /// Dtype of a part of a routed expert as it is read, without reading it; `None` for a bias that does not exist.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn expert_dtype(&self, layer: usize, expert: usize, part: ExpertPart) -> Result<Option<Dtype>> {
        let (layout, biases) = self.located_layer(layer, expert)?;
        if !biases.has(part) {
            return Ok(None);
        }
        let (info, _) = self.place(layer, expert, part)?;
        let quantised = layout == ExpertLayout::Mxfp4 && ExpertPart::ALL.contains(&part);
        Ok(Some(if quantised { Dtype::BF16 } else { self.plain_dtype(&info.name)? }))
    }

    /// Bytes of the routed experts of an MoE layer as the files hold them.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`].
    pub fn expert_bytes_on_disk(&self, layer: usize) -> Result<u64> {
        let moe = self.config.moe(layer).ok_or_else(|| self.unknown_layer(layer))?;
        let tensors = self.expert_layout(layer)?.tensors(self.config.hidden_size, &moe.stored_widths(), moe.biases);
        let mut bytes = 0;
        for tensor in tensors.into_iter().flatten() {
            let info = self.info(&self.family.expert_tensor_name(layer, tensor.tensor))?;
            bytes += info.bytes + self.scale_of(info).map_or(0, |scale| scale.bytes);
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
    /// quantised tensors do not count.
    pub fn parameters(&self) -> u64 {
        let tied_head = self.config.tie_word_embeddings.then(|| self.family.tensor_name(Role::LmHead));
        let counted = self.tensors.values().filter(|tensor| Some(&tensor.name) != tied_head.as_ref());
        let counted = counted.filter(|tensor| !self.is_scale(&tensor.name));
        let fp4 = |tensor: &TensorInfo| {
            self.config.quantisation == Some(Quantisation::Mxfp4) && tensor.name.ends_with("_blocks")
        };
        counted.map(|tensor| tensor.elements() * if fp4(tensor) { 2 } else { 1 }).sum()
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

    /// Whether the weights are quantised. They are read as BF16 then.
    pub fn quantisation(&self) -> Option<Quantisation> {
        self.config.quantisation
    }

    /// Whether a tensor only holds the factors or exponents of another, quantised one, so that a checkpoint without
    /// quantisation does not have it.
    pub fn is_scale(&self, name: &str) -> bool {
        self.scales.contains(name)
    }

    /// Dtype of a tensor as it is read: BF16 for a quantised one.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn plain_dtype(&self, name: &str) -> Result<Dtype> {
        self.info(name).map(|info| if self.scale_of(info).is_some() { Dtype::BF16 } else { info.dtype })
    }

    /// Like [`Checkpoint::stream`], with the elements of an FP8 tensor as BF16.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], and those of `f`.
    pub fn stream_plain(&self, name: &str, max_bytes: usize, mut f: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let info = self.info(name)?;
        let Some(scale) = self.scale_of(info) else { return self.stream(name, max_bytes, f) };
        let rows = info.shape[0];
        let step = (max_bytes / (2 * info.shape[1]).max(1)).max(1);
        for start in (0..rows).step_by(step) {
            f(&self.dequantise(info, scale, start..rows.min(start + step))?)?;
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
        let biases = self.located_layer(layer, expert)?.1;
        if !biases.has(ExpertPart::GateBias) {
            (weights.gate_bias, weights.up_bias) = (None, None);
        }
        if !biases.has(ExpertPart::DownBias) {
            weights.down_bias = None;
        }
        for part in parts(biases) {
            let (info, place) = self.place(layer, expert, part)?;
            let buffer = weights.buffer(part);
            if place.is_contiguous() && convert::float_bytes(info.dtype).is_some() {
                self.read_part_into(info, place.range(), buffer)?;
            } else {
                let matrix = self.matrix(info, &place)?;
                buffer.resize(place.rows * place.cols, 0.0);
                convert::decode(matrix.dtype, &matrix.bytes, buffer, |_| {});
                self.release_place(info, &place);
            }
        }
        weights.hidden = self.config.hidden_size;
        weights.width = weights.gate.len() / weights.hidden;
        Ok(())
    }

    /// The weights of a routed expert in their canonical orientation without a cast, from whatever layout: views of the file
    /// where it holds them so, which stay resident until [`Checkpoint::release_expert`] or [`Checkpoint::release`], else
    /// copies. Quantised weights are BF16.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn expert_bytes(&self, layer: usize, expert: usize) -> Result<ExpertBytes<'_>> {
        let biases = self.located_layer(layer, expert)?.1;
        let read = |part: ExpertPart| {
            let (info, place) = self.place(layer, expert, part)?;
            self.matrix(info, &place)
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
        if !self.located_layer(layer, expert)?.1.has(part) {
            return Ok(None);
        }
        let (info, place) = self.place(layer, expert, part)?;
        self.matrix(info, &place).map(Some)
    }

    /// Gives the mapped pages of a routed expert back to the system.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`], [`Error::UnknownExpert`].
    pub fn release_expert(&self, layer: usize, expert: usize) -> Result<()> {
        for part in parts(self.located_layer(layer, expert)?.1) {
            let (info, place) = self.place(layer, expert, part)?;
            self.release_place(info, &place);
        }
        Ok(())
    }

    /// The name of a tensor of routed experts in this family.
    pub fn expert_tensor_name(&self, layer: usize, tensor: ExpertTensor) -> String {
        self.family.expert_tensor_name(layer, tensor)
    }

    /// Layout of the layer of an expert, and the biases of its experts.
    fn located_layer(&self, layer: usize, expert: usize) -> Result<(ExpertLayout, ExpertBiases)> {
        let moe = self.config.moe(layer).ok_or_else(|| self.unknown_layer(layer))?;
        if expert >= moe.num_experts() {
            return Err(Error::UnknownExpert { layer, expert, count: moe.num_experts() });
        }
        Ok((self.expert_layout(layer)?, moe.biases))
    }

    /// Where a part of an expert is.
    fn place(&self, layer: usize, expert: usize, part: ExpertPart) -> Result<(&TensorInfo, Placement)> {
        let moe = self.config.moe(layer).ok_or_else(|| self.unknown_layer(layer))?;
        let (layout, _) = self.located_layer(layer, expert)?;
        let place = layout.place(self.config.hidden_size, &moe.stored_widths(), moe.stored(expert), part);
        Ok((self.info(&self.family.expert_tensor_name(layer, place.tensor))?, place))
    }

    /// A part of an expert, row-major.
    fn matrix(&self, info: &TensorInfo, place: &Placement) -> Result<RawMatrix<'_>> {
        let matrix = |bytes, dtype| RawMatrix { bytes, dtype, rows: place.rows, cols: place.cols };
        if matches!(place.tensor, ExpertTensor::GateUpBlocks | ExpertTensor::DownBlocks) {
            return Ok(matrix(Cow::Owned(self.mxfp4(info, place)?), Dtype::BF16));
        }
        if let Some(scale) = self.scale_of(info) {
            return Ok(matrix(Cow::Owned(self.dequantise(info, scale, 0..place.rows)?), Dtype::BF16));
        }
        let bytes = &self.view(info)[info.byte_range(&place.range())];
        let bytes = match place.is_contiguous() {
            true => Cow::Borrowed(bytes),
            false => Cow::Owned(convert::gather(bytes, place, info.dtype.bitsize() / 8)),
        };
        Ok(matrix(bytes, info.dtype))
    }

    fn release_place(&self, info: &TensorInfo, place: &Placement) {
        // Places in FP4 tensors count elements of half a byte.
        let shift = if matches!(place.tensor, ExpertTensor::GateUpBlocks | ExpertTensor::DownBlocks) { 2 } else { 1 };
        let range = place.range();
        let bytes = info.byte_range(&(range.start / shift..range.end / shift));
        self.shards[info.shard()].release(info.begin() + bytes.start..info.begin() + bytes.end);
    }

    /// Rows of MXFP4 experts as BF16.
    fn mxfp4(&self, info: &TensorInfo, place: &Placement) -> Result<Vec<u8>> {
        let scales = self.info(&info.name.replace("_blocks", "_scales"))?;
        let (blocks, exponents) = (self.view(info), self.view(scales));
        let per_row = place.cols / MXFP4_BLOCK;
        Ok(quantised::mxfp4_rows(place.rows, place.cols, |row| {
            let block = (place.start + row * place.row_stride) / MXFP4_BLOCK;
            (&blocks[16 * block..16 * (block + per_row)], &exponents[block..block + per_row])
        }))
    }

    /// The factors of a quantised tensor.
    fn scale_of(&self, info: &TensorInfo) -> Option<&TensorInfo> {
        if info.dtype != Dtype::F8_E4M3 {
            return None;
        }
        self.tensors.get(&format!("{}{SCALE_SUFFIX}", info.name)).filter(|scale| self.scales.contains(&scale.name))
    }

    /// Rows of an FP8 tensor as BF16.
    fn dequantise(&self, info: &TensorInfo, scale: &TensorInfo, rows: Range<usize>) -> Result<Vec<u8>> {
        let Some(Quantisation::Fp8Blocks { rows: block_rows, cols: block_cols }) = self.config.quantisation else {
            return Err(verify::quantised_tensor(info, "`quantization_config` with a `weight_block_size`"));
        };
        let scales = self.read_part(scale, 0..scale.elements() as usize)?;
        let cols = info.shape[1];
        let bytes = &self.view(info)[rows.start * cols..rows.end * cols];
        let out = quantised::fp8_rows(bytes, rows.start, cols, &scales, (block_rows, block_cols));
        let begin = info.begin();
        self.shards[info.shard()].release(begin + rows.start * cols..begin + rows.end * cols);
        Ok(out)
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
        if let Some(scale) = self.scale_of(info) {
            // Whole rows: parts of a row of a quantised matrix are never asked for.
            let cols = info.shape[1].max(1);
            let bytes = self.dequantise(info, scale, elements.start / cols..elements.end / cols)?;
            out.resize(bytes.len() / 2, 0.0);
            convert::decode(Dtype::BF16, &bytes, out, |_| {});
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

/// The parts that an expert has.
fn parts(biases: ExpertBiases) -> impl Iterator<Item = ExpertPart> {
    ExpertPart::ALL.into_iter().chain(ExpertPart::BIASES).filter(move |part| biases.has(*part))
}

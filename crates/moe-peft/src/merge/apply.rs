//! Adapters into the weights of a checkpoint.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
};

use moe_checkpoint::{
    Checkpoint, Dtype, Existing, ExpertBlock, ExpertBytes, ExpertLayout, ExpertPart, OutputDir, RawMatrix, Role,
    ShardedWriter, TensorSpec, WriterOptions, copy_side_files, dequantised_config, encode, write_atomic, write_json,
};
use moe_core::kernels::product::{Matrix, product};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    lora::{ExpertMap, LoraWeights, LowRank, Map, Maps, Naming, magnitudes},
};

/// Name of the file in an output directory that tells what was merged; see [`MergeReport`]. Stock loaders ignore it.
pub const MERGED_FILE: &str = "moe_peft.json";

/// How a merged checkpoint is written.
#[derive(Clone, Copy)]
pub struct MergeOptions<'a> {
    /// Most bytes of tensor data per file; a larger tensor gets its own file.
    pub max_shard_bytes: u64,
    /// What to do about an output that is there already.
    pub existing: Existing,
    /// Told the tensor that was written, and how many of how many bytes there are now; an error stops.
    #[allow(clippy::type_complexity)]
    pub progress: Option<&'a dyn Fn(&str, u64, u64) -> Result<()>>,
}

impl Default for MergeOptions<'_> {
    fn default() -> Self {
        Self { max_shard_bytes: WriterOptions::default().max_shard_bytes, existing: Existing::Refuse, progress: None }
    }
}

impl fmt::Debug for MergeOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MergeOptions")
            .field("max_shard_bytes", &self.max_shard_bytes)
            .field("existing", &self.existing)
            .field("progress", &self.progress.is_some())
            .finish()
    }
}

/// One addition that was merged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AppliedMap {
    /// The adapter.
    pub adapter: String,
    /// Path of the map's module.
    pub module: String,
    /// Tensors of the checkpoint that it went into.
    pub tensors: Vec<String>,
    /// Its rank.
    pub rank: usize,
    /// What it counts, with the adapter's weight.
    pub scale: f64,
}

/// What was merged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeReport {
    /// Version of this crate.
    pub crate_version: String,
    /// Every addition, by adapter and map.
    pub applied: Vec<AppliedMap>,
    /// Tensors that changed.
    pub changed: usize,
    /// Tensors that were copied byte for byte.
    pub copied: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
}

impl fmt::Display for MergeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let adapters: BTreeSet<&str> = self.applied.iter().map(|applied| applied.adapter.as_str()).collect();
        write!(
            f,
            "merged {} additions of {} adapters into {} tensors; {} copied, {} bytes in all",
            self.applied.len(),
            adapters.len(),
            self.changed,
            self.copied,
            self.bytes
        )
    }
}

/// Where the bytes of an output tensor come from.
enum Source {
    Copy,
    /// A matrix of a layer with additions.
    Map(Map),
    /// Blocks of the experts of a layer.
    Experts(usize, Vec<(usize, ExpertBlock)>),
}

struct Merger<'a> {
    maps: Maps<'a>,
    /// Additions and their weights by map.
    additions: BTreeMap<Map, Vec<(&'a LowRank, f64)>>,
}

/// Writes to `to` the checkpoint `from` with each adapter, times its weight, added to its weights: `W + sum w s B A`, and for DoRA
/// `W + w (g (W + s B A) - W)`.
///
/// Tensors are streamed one by one. What no adapter touches is copied byte for byte, so that merging nothing gives the same tensors and
/// config; a quantised checkpoint is written without quantisation. The output appears whole or not at all (`TO.partial` until then) and
/// can be resumed with [`Existing::Resume`].
///
/// # Errors
/// Before anything is written: those of [`LoraWeights::check`], [`Error::Input`] for an output that is the input and weights that are not
/// finite, [`Error::Unsupported`] for adapted experts that share weights. Later: [`Error::Checkpoint`] for the file system, [`Error::Input`]
/// naming a tensor of which a value is not finite any more, and what `progress` returns.
pub fn merge(
    from: &Checkpoint,
    to: &Path,
    adapters: &[(&str, &LoraWeights, f64)],
    options: &MergeOptions<'_>,
) -> Result<MergeReport> {
    let maps = Maps::new(from);
    let mut additions: BTreeMap<Map, Vec<(&LowRank, f64)>> = BTreeMap::new();
    for (name, weights, weight) in adapters {
        weights.check(&maps)?;
        if !weight.is_finite() {
            return Err(Error::input(format!("weight of adapter `{name}`"), weight, "a finite number"));
        }
        for (map, low) in &weights.maps {
            if let Map::Expert { layer, .. } = map
                && from.config().moe(*layer).is_some_and(|moe| moe.sets.is_some())
            {
                return Err(Error::Unsupported(format!("{map}: experts of layer {layer} share sets of weights")));
            }
            additions.entry(*map).or_default().push((low, *weight));
        }
    }
    if matches!((from.dir().canonicalize(), to.canonicalize()), (Ok(a), Ok(b)) if a == b) {
        return Err(Error::input("output", to.display(), "a directory other than the checkpoint's"));
    }
    let merger = Merger { maps, additions };
    let tensors = merger.tensors()?;
    let recipe = format!("merge adapters {} {}", from.fingerprint(), digest(adapters));
    let output = OutputDir::create(to, options.existing)?;
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let bytes = specs.iter().map(bytes_of).sum();
    let writer_options = WriterOptions { max_shard_bytes: options.max_shard_bytes, recipe };
    let mut writer = ShardedWriter::new(output.path(), writer_options, specs)?;
    let mut done = 0;
    for (spec, source) in &tensors {
        if !writer.is_finished(&spec.name)? {
            match source {
                Source::Copy => writer.copy(from, &spec.name)?,
                Source::Map(map) => {
                    let matrix = merger.merged(*map, merger.maps.matrix(*map)?)?;
                    writer.write(&spec.name, &encoded(spec.dtype, &matrix, &spec.name)?)?;
                }
                Source::Experts(layer, blocks) => merger.write_experts(&mut writer, spec, *layer, blocks)?,
            }
        }
        done += bytes_of(spec);
        if let Some(progress) = options.progress {
            progress(&spec.name, done, bytes)?;
        }
    }
    writer.finish()?;
    copy_side_files(from.dir(), output.path())?;
    let config_path = output.path().join("config.json");
    match from.quantisation() {
        Some(_) => write_json(&config_path, &dequantised_config(from.raw_config()))?,
        None => {
            let original = from.dir().join("config.json");
            let bytes = std::fs::read(&original).map_err(|source| Error::Io { path: original.clone(), source })?;
            write_atomic(&config_path, &bytes)?;
        }
    }
    let copied = tensors.iter().filter(|(_, source)| matches!(source, Source::Copy)).count();
    let report = MergeReport {
        crate_version: env!("CARGO_PKG_VERSION").to_string(),
        applied: merger.applied(adapters)?,
        changed: tensors.len() - copied,
        copied,
        bytes,
    };
    let json =
        serde_json::to_vec_pretty(&report).map_err(|error| Error::input("the report", error, "numbers and names"))?;
    write_atomic(output.path().join(MERGED_FILE), &json)?;
    // Config, headers and lengths are checked before the output gets its name.
    Checkpoint::open(output.path())?;
    output.commit()?;
    Ok(report)
}

/// Writes to `to` what the weights kept when `adapter` was begun as a part of them: `W - s B_0 A_0`. To it belongs the adapter that is
/// [written](crate::peft_files::write()) with `on_residual`.
///
/// # Errors
/// [`Error::Input`] for an adapter that took nothing; else those of [`merge`].
pub fn write_residual(
    from: &Checkpoint,
    to: &Path,
    adapter: &LoraWeights,
    options: &MergeOptions<'_>,
) -> Result<MergeReport> {
    let maps: BTreeMap<Map, LowRank> =
        adapter.maps.iter().filter_map(|(map, low)| Some((*map, low.residual()?))).collect();
    if maps.is_empty() {
        let expected = "PiSSA, OLoRA or CorDA, which take a part of the weights";
        return Err(Error::input("init_lora_weights", adapter.config.init_lora_weights, expected));
    }
    let weights = LoraWeights { maps, ..adapter.clone() };
    merge(from, to, &[("residual", &weights, 1.0)], options)
}

impl Merger<'_> {
    fn touches(&self, layer: usize, expert: usize, part: ExpertPart) -> bool {
        let has = |part| self.additions.contains_key(&Map::Expert { layer, expert, part });
        match part {
            ExpertPart::Gate => has(ExpertMap::Gate) || has(ExpertMap::GateUp),
            ExpertPart::Up => has(ExpertMap::Up) || has(ExpertMap::GateUp),
            ExpertPart::Down => has(ExpertMap::Down),
            _ => false,
        }
    }

    /// The tensors of the output and their sources, in the order of the input's names.
    fn tensors(&self) -> Result<Vec<(TensorSpec, Source)>> {
        let from = self.maps.checkpoint();
        let mut by_name: BTreeMap<String, Map> = BTreeMap::new();
        for map in self.additions.keys() {
            if let Map::Layer(layer, role) = map {
                by_name.insert(from.role(Role::Layer(*layer, *role))?.name.clone(), *map);
            }
        }
        // Expert tensors that change, or whose quantised form is not kept.
        let mut expert_tensors: BTreeMap<String, (usize, Vec<(TensorSpec, Source)>)> = BTreeMap::new();
        let mut replaced: BTreeMap<String, usize> = BTreeMap::new();
        for layer in from.shape().layers.iter().map(|layer| layer.layer) {
            let (layout, Some(moe)) = (from.expert_layout(layer)?, from.config().moe(layer)) else { continue };
            let hidden = from.config().hidden_size;
            let widths = moe.stored_widths();
            let listed = |layout: ExpertLayout| layout.tensors(hidden, &widths, moe.biases).unwrap_or_default();
            let written = if layout == ExpertLayout::Mxfp4 { ExpertLayout::Interleaved } else { layout };
            if written != layout {
                for tensor in listed(layout) {
                    replaced.insert(from.expert_tensor_name(layer, tensor.tensor), layer);
                }
            }
            let mut out = Vec::new();
            for tensor in listed(written) {
                let name = from.expert_tensor_name(layer, tensor.tensor);
                let touched = tensor
                    .blocks
                    .iter()
                    .any(|(expert, block)| block.parts().iter().any(|part| self.touches(layer, *expert, *part)));
                if !touched && written == layout {
                    continue;
                }
                let first = tensor.blocks.first().and_then(|(expert, block)| Some((*expert, *block.parts().first()?)));
                let dtype = match first {
                    Some((expert, part)) => from.expert_dtype(layer, expert, part)?,
                    None => None,
                };
                let dtype = dtype.ok_or_else(|| Error::input(format!("tensor `{name}`"), "no part", "experts"))?;
                replaced.insert(name.clone(), layer);
                let spec = TensorSpec { name: name.clone(), dtype, shape: tensor.shape.clone() };
                out.push((spec, Source::Experts(layer, tensor.blocks)));
            }
            for (spec, source) in out {
                expert_tensors.insert(spec.name.clone(), (layer, vec![(spec, source)]));
            }
        }
        let mut tensors = Vec::new();
        for info in from.tensors() {
            if let Some(layer) = replaced.get(&info.name) {
                // in the place of the first tensor of the layer where names differ
                let own: Vec<String> = match expert_tensors.contains_key(&info.name) {
                    true => vec![info.name.clone()],
                    false => expert_tensors.iter().filter(|(_, (l, _))| l == layer).map(|(n, _)| n.clone()).collect(),
                };
                for name in own {
                    tensors.extend(expert_tensors.remove(&name).into_iter().flat_map(|(_, all)| all));
                }
                continue;
            }
            if from.is_scale(&info.name) {
                continue;
            }
            let dtype = from.plain_dtype(&info.name)?;
            let spec = TensorSpec { name: info.name.clone(), dtype, shape: info.shape.clone() };
            let source = by_name.get(&info.name).map_or(Source::Copy, |map| Source::Map(*map));
            tensors.push((spec, source));
        }
        Ok(tensors)
    }

    fn write_experts(
        &self,
        writer: &mut ShardedWriter,
        spec: &TensorSpec,
        layer: usize,
        blocks: &[(usize, ExpertBlock)],
    ) -> Result<()> {
        let from = self.maps.checkpoint();
        for (expert, block) in blocks {
            let mut bytes = from.expert_bytes(layer, *expert)?;
            for part in block.parts() {
                if self.touches(layer, *expert, *part) {
                    self.merge_part(&mut bytes, layer, *expert, *part, &spec.name)?;
                }
            }
            let made = block.bytes(&bytes).ok_or_else(|| {
                Error::input(format!("tensor `{}`", spec.name), "gate and up of two dtypes", "one dtype")
            })?;
            writer.append(&spec.name, &made)?;
            drop(made);
            drop(bytes);
            from.release_expert(layer, *expert)?;
        }
        Ok(())
    }

    /// Puts the merged matrix in the place of one part.
    fn merge_part(
        &self,
        bytes: &mut ExpertBytes<'_>,
        layer: usize,
        expert: usize,
        part: ExpertPart,
        name: &str,
    ) -> Result<()> {
        let (own, slot): (_, &mut RawMatrix<'_>) = match part {
            ExpertPart::Gate => (ExpertMap::Gate, &mut bytes.gate),
            ExpertPart::Up => (ExpertMap::Up, &mut bytes.up),
            _ => (ExpertMap::Down, &mut bytes.down),
        };
        let mut matrix = self.merged(Map::Expert { layer, expert, part: own }, slot.to_f32())?;
        let both = Map::Expert { layer, expert, part: ExpertMap::GateUp };
        if own != ExpertMap::Down && self.additions.contains_key(&both) {
            let whole = self.merged(both, self.maps.matrix(both)?)?;
            let original = self.maps.matrix(Map::Expert { layer, expert, part: own })?;
            let half = whole.len() / 2;
            let rows = if own == ExpertMap::Gate { &whole[..half] } else { &whole[half..] };
            // what both halves get together, on top of what this one gets alone
            let changes = rows.iter().zip(&original);
            matrix
                .iter_mut()
                .zip(changes)
                .filter(|(_, (new, old))| new != old)
                .for_each(|(m, (new, old))| *m += new - old);
            if !self.additions.contains_key(&Map::Expert { layer, expert, part: own }) {
                matrix.copy_from_slice(rows);
            }
        }
        slot.bytes = Cow::Owned(encoded(slot.dtype, &matrix, name)?);
        Ok(())
    }

    /// A weight `[out, in]` with its additions.
    fn merged(&self, map: Map, weight: Vec<f32>) -> Result<Vec<f32>> {
        let Some(additions) = self.additions.get(&map) else { return Ok(weight) };
        let dims = self.maps.dims(map).unwrap_or_default();
        let mut merged = weight.clone();
        for (low, factor) in additions {
            let low = low.plain();
            let delta = match &low.magnitude {
                None => delta(&low, factor * low.scale()),
                Some(m) => {
                    let mut adapted = delta(&low, low.scale());
                    adapted.iter_mut().zip(&weight).for_each(|(d, w)| *d += w);
                    let norms = magnitudes(&weight, &low, dims);
                    let rows = adapted.chunks_exact_mut(dims[1].max(1)).zip(weight.chunks_exact(dims[1].max(1)));
                    for ((row, w), (m, n)) in rows.zip(m.iter().zip(&norms)) {
                        let g = if *n == 0.0 { 1.0 } else { m / n };
                        row.iter_mut().zip(w).for_each(|(d, w)| *d = *factor as f32 * (g * *d - w));
                    }
                    adapted
                }
            };
            // a sum with zero is left as it is, signs of zeros included
            merged.iter_mut().zip(delta).filter(|(_, d)| *d != 0.0).for_each(|(w, d)| *w += d);
        }
        Ok(merged)
    }

    /// Every addition and where it went.
    fn applied(&self, adapters: &[(&str, &LoraWeights, f64)]) -> Result<Vec<AppliedMap>> {
        let from = self.maps.checkpoint();
        let mut applied = Vec::new();
        for (adapter, weights, weight) in adapters {
            for (map, low) in &weights.maps {
                let tensors = match *map {
                    Map::Layer(layer, role) => vec![from.role(Role::Layer(layer, role))?.name.clone()],
                    Map::Expert { layer, expert, part } => {
                        let parts: &[ExpertPart] = match part {
                            ExpertMap::Gate => &[ExpertPart::Gate],
                            ExpertMap::Up => &[ExpertPart::Up],
                            ExpertMap::GateUp => &[ExpertPart::Gate, ExpertPart::Up],
                            ExpertMap::Down => &[ExpertPart::Down],
                        };
                        let layout = match from.expert_layout(layer)? {
                            ExpertLayout::Mxfp4 => ExpertLayout::Interleaved,
                            layout => layout,
                        };
                        let widths = &from.config().moe(layer).map(|moe| moe.widths.clone()).unwrap_or_default();
                        let name = |part: &ExpertPart| {
                            let place = layout.place(from.config().hidden_size, widths, expert, *part);
                            from.expert_tensor_name(layer, place.tensor)
                        };
                        let mut names: Vec<String> = parts.iter().map(name).collect();
                        names.dedup();
                        names
                    }
                };
                applied.push(AppliedMap {
                    adapter: (*adapter).to_string(),
                    module: self.maps.path(*map, Naming::PerExpert),
                    tensors,
                    rank: low.rank,
                    scale: weight * low.scale(),
                });
            }
        }
        Ok(applied)
    }
}

/// `s B A [out, in]`.
fn delta(low: &LowRank, s: f64) -> Vec<f32> {
    let [out, inputs] = low.dims();
    let mut delta = vec![0.0; out * inputs];
    let (a, b) = (Matrix::new(&low.a, low.rank, inputs), Matrix::new(&low.b, out, low.rank));
    product(&mut delta, inputs, 0, false, s as f32, b, a);
    delta
}

fn encoded(dtype: Dtype, values: &[f32], name: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(values.len() * 4);
    if values.iter().any(|value| !value.is_finite()) {
        return Err(Error::input(format!("merged tensor `{name}`"), "a value that is not finite", "finite values"));
    }
    match encode(dtype, values, &mut bytes) {
        true => Ok(bytes),
        false => Err(Error::input(format!("tensor `{name}`"), format!("{dtype:?}"), "F32, F16 or BF16")),
    }
}

fn bytes_of(spec: &TensorSpec) -> u64 {
    spec.shape.iter().map(|size| *size as u64).product::<u64>() * spec.dtype.bitsize() as u64 / 8
}

/// A hash of everything that is merged.
fn digest(adapters: &[(&str, &LoraWeights, f64)]) -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, weights, weight) in adapters {
        hasher.update(name.as_bytes());
        hasher.update(&weight.to_le_bytes());
        for (map, low) in &weights.maps {
            let low = low.plain();
            hasher.update(map.to_string().as_bytes());
            hasher.update(&low.scale().to_le_bytes());
            for values in [&low.a, &low.b].into_iter().chain(&low.magnitude) {
                hasher.update(&(values.len() as u64).to_le_bytes());
                for value in values {
                    hasher.update(&value.to_le_bytes());
                }
            }
        }
    }
    hasher.finalize().to_hex().to_string()
}

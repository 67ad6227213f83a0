//! Writing a model with what was trained folded into its weights, checkpoint to checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use moe_checkpoint::{
    Checkpoint, Dtype, Existing, ExpertBlock, OutputDir, RawMatrix, Role, ShardedWriter, TensorSpec, WriterOptions,
    Written, copy_side_files, encode, write_json,
};
use moe_core::{
    Model,
    adapters::{Adapters, ExpertSite, LinearAdapter, Site},
    host,
    kernels::weight::Weight,
};

use crate::{AdapterSet, Error, Result, trainable_tensors};

/// How the checkpoint is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoldOptions {
    /// Most bytes of tensor data per file; a larger tensor gets its own file.
    pub max_shard_bytes: u64,
    /// What to do about an output that is there.
    pub existing: Existing,
}

impl Default for FoldOptions {
    fn default() -> Self {
        Self { max_shard_bytes: WriterOptions::default().max_shard_bytes, existing: Existing::Refuse }
    }
}

/// What was written.
#[derive(Clone, Debug)]
pub struct FoldReport {
    /// Tensors that have other values than those of the base, and the maps that changed them. For a tensor of many experts, each of
    /// their maps.
    pub changed: BTreeMap<String, Vec<String>>,
    /// Maps with an adapter that is, rounded to the dtype of the tensor, the weight it stands beside.
    pub unchanged: Vec<Site>,
    /// The files.
    pub written: Written,
}

/// What a tensor's new values come from.
enum Source {
    Copy,
    /// Rows of a layer's map from this one on.
    Rows {
        site: Site,
        start: usize,
    },
    Vector(Role),
    Embedding,
    /// Blocks of rows of the head.
    Head,
    Experts {
        layer: usize,
        blocks: Vec<(usize, ExpertBlock)>,
    },
}

/// Writes `model`'s checkpoint with the adapters of `set` folded in: `w` becomes the [matrix](LinearAdapter::matrix) that it is with its
/// adapter. Streamed: memory is that of the largest map. Tensors that nothing changed are copied byte for byte, changed ones keep their
/// dtype; the output appears whole or not at all.
///
/// The values must be [settled](crate::Bank::settle).
///
/// # Errors
/// Before anything is written: [`Error::Unsupported`] for an adapter that depends on its input, for a block adapter, and for a quantised
/// checkpoint; then those of reading and writing.
pub fn fold(model: &Model, set: &AdapterSet, to: &Path, options: &FoldOptions) -> Result<FoldReport> {
    let from = model.checkpoint();
    check(from, set)?;
    let sources = sources(from, set)?;
    let specs: Vec<TensorSpec> = from
        .tensors()
        .map(|info| TensorSpec { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone() })
        .collect();
    let output = OutputDir::create(to, options.existing)?;
    let recipe = format!("fold {} {}", from.fingerprint(), digest(set, from.config().vocab_size));
    let writer_options = WriterOptions { max_shard_bytes: options.max_shard_bytes, recipe };
    let mut job = Job {
        model,
        from,
        set,
        writer: ShardedWriter::new(output.path(), writer_options, specs.clone())?,
        changed: BTreeMap::new(),
        touched: BTreeSet::new(),
    };
    copy_side_files(from.dir(), output.path())?;
    for spec in &specs {
        if job.writer.is_finished(&spec.name)? {
            continue;
        }
        job.write(spec, sources.get(&spec.name).unwrap_or(&Source::Copy))?;
    }
    let Job { writer, changed, touched, .. } = job;
    let written = writer.finish()?;
    write_json(&output.path().join("config.json"), from.raw_config())?;
    output.commit()?;
    from.release();
    let unchanged = set.sites().map(|(site, _)| *site).filter(|site| !touched.contains(site)).collect();
    Ok(FoldReport { changed, unchanged, written })
}

fn check(from: &Checkpoint, set: &AdapterSet) -> Result<()> {
    if let Some(quantisation) = from.quantisation() {
        let what = format!("folding into a checkpoint quantised as {quantisation:?}; write it in bf16 first");
        return Err(Error::Unsupported(what));
    }
    for (site, adapter) in set.sites() {
        if !adapter.is_linear() {
            return Err(Error::Unsupported(format!("folding the adapter of {site}: it depends on its input")));
        }
    }
    match set.first_block() {
        Some(layer) => Err(Error::Unsupported(format!(
            "folding the adapter of the block of layer {layer}: it decides by its input"
        ))),
        None => Ok(()),
    }
}

/// A hash of everything the new values depend on but the checkpoint.
fn digest(set: &AdapterSet, vocabulary: usize) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut add = |name: &str, values: &[f32]| {
        hasher.update(name.as_bytes());
        for value in values {
            hasher.update(&value.to_le_bytes());
        }
    };
    for live in set.bank().iter() {
        add(live.name(), &live.to_vec());
    }
    // what stands in for a weight without being trained
    for (site, adapter) in set.sites().filter(|(_, adapter)| adapter.replaces() && adapter.trained() == 0) {
        let none = Weight::dense(host::from_vec(vec![], [0, 0], &Default::default()));
        add(&site.path(), &adapter.matrix(&none).map(host::into_vec).unwrap_or_default());
    }
    if let Some(embedding) = set.embedding() {
        add("embeddings", &embedding.rows(&(0..vocabulary as u32).collect::<Vec<_>>()));
    }
    hasher.finalize().to_hex().to_string()
}

fn sources(from: &Checkpoint, set: &AdapterSet) -> Result<BTreeMap<String, Source>> {
    let mut sources = BTreeMap::new();
    let mut expert_layers = BTreeSet::new();
    for (site, _) in set.sites() {
        match *site {
            Site::Layer(layer, map) => {
                let mut start = 0;
                for role in trainable_tensors::roles(layer, map) {
                    let info = from.role(role)?;
                    sources.insert(info.name.clone(), Source::Rows { site: *site, start });
                    start += info.shape.first().copied().unwrap_or(0);
                }
            }
            Site::Expert { layer, .. } => {
                expert_layers.insert(layer);
            }
        }
    }
    for layer in expert_layers {
        let Some(moe) = from.config().moe(layer) else { continue };
        let layout = from.expert_layout(layer)?;
        let tensors = layout.tensors(from.shape().hidden_size, &moe.widths, moe.biases);
        for tensor in tensors.into_iter().flatten() {
            let name = from.expert_tensor_name(layer, tensor.tensor);
            sources.insert(name, Source::Experts { layer, blocks: tensor.blocks });
        }
    }
    for place in trainable_tensors::vectors(from) {
        if set.vector(place.role).is_some() {
            sources.insert(from.role(place.role)?.name.clone(), Source::Vector(place.role));
        }
    }
    if set.embedding().is_some() {
        sources.insert(from.role(Role::Embedding)?.name.clone(), Source::Embedding);
    }
    if set.has_head() {
        let name = from.role(Role::LmHead)?.name.clone();
        sources.entry(name).or_insert(Source::Head);
    }
    Ok(sources)
}

struct Job<'a> {
    model: &'a Model,
    from: &'a Checkpoint,
    set: &'a AdapterSet,
    writer: ShardedWriter,
    changed: BTreeMap<String, Vec<String>>,
    touched: BTreeSet<Site>,
}

impl Job<'_> {
    fn write(&mut self, spec: &TensorSpec, source: &Source) -> Result<()> {
        let old = || self.from.tensor_f32(&spec.name);
        let (what, values) = match source {
            Source::Copy => return Ok(self.writer.copy(self.from, &spec.name)?),
            Source::Experts { layer, blocks } => return self.experts(spec, *layer, blocks),
            Source::Rows { site, start } => {
                let Some(adapter) = self.set.linear(*site) else { return Ok(self.writer.copy(self.from, &spec.name)?) };
                let matrix = self.matrix(*site, &*adapter)?;
                let columns = adapter.dims()[1];
                let rows: usize = spec.shape.iter().product::<usize>() / columns.max(1);
                (site.to_string(), matrix[start * columns..(start + rows) * columns].to_vec())
            }
            Source::Vector(role) => {
                let value = self.set.vector(*role).map(|adapter| host::into_vec(adapter.value()));
                (format!("{role:?}"), value.map_or_else(old, Ok)?)
            }
            Source::Embedding => {
                let ids: Vec<u32> = (0..self.from.config().vocab_size as u32).collect();
                ("embeddings".into(), self.set.embedding().map_or_else(old, |adapter| Ok(adapter.rows(&ids)))?)
            }
            Source::Head => {
                let mut values = old()?;
                let columns = self.from.config().hidden_size;
                for rows in self.model.head_rows() {
                    if let Some(adapter) = self.set.head(rows.clone()) {
                        let range = rows.start * columns..rows.end * columns;
                        let part = values[range.clone()].to_vec();
                        let shape = [rows.len(), columns];
                        let base = Weight::dense(host::from_vec(part, shape, self.model.device()));
                        values[range].copy_from_slice(&matrix_of(&*adapter, &base, "the output head")?);
                    }
                }
                ("the output head".into(), values)
            }
        };
        let bytes = encoded(&spec.name, spec.dtype, &values)?;
        let mut before = Vec::with_capacity(bytes.len());
        self.from.stream(&spec.name, 1 << 24, |part| {
            before.extend_from_slice(part);
            Ok(())
        })?;
        if before == bytes {
            return Ok(self.writer.copy(self.from, &spec.name)?);
        }
        if let Source::Rows { site, .. } = source {
            self.touched.insert(*site);
        }
        self.changed.entry(spec.name.clone()).or_default().push(what);
        self.writer.append(&spec.name, &bytes)?;
        Ok(())
    }

    fn matrix(&self, site: Site, adapter: &dyn LinearAdapter) -> Result<Vec<f32>> {
        let base = Weight::dense(host::from_vec(
            trainable_tensors::read(self.from, site)?,
            adapter.dims(),
            self.model.device(),
        ));
        matrix_of(adapter, &base, &site.to_string())
    }

    fn experts(&mut self, spec: &TensorSpec, layer: usize, blocks: &[(usize, ExpertBlock)]) -> Result<()> {
        for (expert, block) in blocks {
            let bytes = self.expert(spec, layer, *expert, *block)?;
            self.writer.append(&spec.name, &bytes)?;
            self.from.release_expert(layer, *expert)?;
        }
        Ok(())
    }

    /// What a block of an expert is now.
    fn expert(&mut self, spec: &TensorSpec, layer: usize, expert: usize, block: ExpertBlock) -> Result<Vec<u8>> {
        let old = self.from.expert_bytes(layer, expert)?;
        let failed = || Error::input(format!("tensor `{}`", spec.name), "gate and up of different dtypes", "one dtype");
        let before = block.bytes(&old).ok_or_else(failed)?;
        let mut new = old.clone();
        let mut maps = Vec::new();
        for map in [ExpertSite::GateUp, ExpertSite::Down] {
            let site = Site::Expert { layer, expert, map };
            let Some(adapter) = self.set.linear(site) else { continue };
            maps.push(site);
            let matrix = self.matrix(site, &*adapter)?;
            match map {
                ExpertSite::GateUp => {
                    let (gate, up) = matrix.split_at(matrix.len() / 2);
                    new.gate = raw(&spec.name, &old.gate, gate)?;
                    new.up = raw(&spec.name, &old.up, up)?;
                }
                ExpertSite::Down => new.down = raw(&spec.name, &old.down, &matrix)?,
            }
        }
        let after = block.bytes(&new).ok_or_else(failed)?;
        if after != before {
            let changed = |site: &Site| match site {
                Site::Expert { map: ExpertSite::GateUp, .. } => !same(&old.gate, &new.gate) || !same(&old.up, &new.up),
                _ => !same(&old.down, &new.down),
            };
            for site in maps.into_iter().filter(changed) {
                let names = self.changed.entry(spec.name.clone()).or_default();
                if !names.contains(&site.to_string()) {
                    names.push(site.to_string());
                }
                self.touched.insert(site);
            }
        }
        Ok(after.into_owned())
    }
}

fn same(a: &RawMatrix<'_>, b: &RawMatrix<'_>) -> bool {
    a.bytes == b.bytes
}

fn matrix_of(adapter: &dyn LinearAdapter, base: &Weight, what: &str) -> Result<Vec<f32>> {
    let matrix = adapter.matrix(base).map(host::into_vec);
    matrix.ok_or_else(|| Error::Unsupported(format!("folding the adapter of {what}: it depends on its input")))
}

fn raw(tensor: &str, like: &RawMatrix<'_>, values: &[f32]) -> Result<RawMatrix<'static>> {
    let bytes = encoded(tensor, like.dtype, values)?;
    Ok(RawMatrix { bytes: bytes.into(), dtype: like.dtype, rows: like.rows, cols: like.cols })
}

fn encoded(tensor: &str, dtype: Dtype, values: &[f32]) -> Result<Vec<u8>> {
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        return Err(Error::input(format!("new values of tensor `{tensor}`"), value, "finite numbers"));
    }
    let mut bytes = Vec::with_capacity(values.len() * dtype.bitsize() / 8);
    if !encode(dtype, values, &mut bytes) {
        return Err(Error::input(format!("dtype of tensor `{tensor}`"), format!("{dtype:?}"), "a plain float"));
    }
    Ok(bytes)
}

//! Adapters into a model.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use moe_checkpoint::human::size;
use moe_checkpoint::{Checkpoint, Existing, WriteOptions, check_output, check_room, write};
use serde::Serialize;

use super::{AdapterInput, some};
use crate::{
    Error, Result,
    codec::{Delta, DeltaBase},
    lora::Maps,
    merge::{AppliedMap, Merged},
};

/// Writes a model with adapters in its weights: first deltas, each on top of the one before, then all low-rank adapters
/// together.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeAdapters {
    /// Directory of the model.
    pub base: PathBuf,
    /// The adapters.
    pub adapters: Vec<AdapterInput>,
    /// Directory of the new model.
    pub out: PathBuf,
    /// What to do about what is there already.
    pub existing: Existing,
}

/// A model that adapters were merged into.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MergedAdapters {
    /// Its directory.
    pub path: PathBuf,
    /// Every low-rank addition, and where it went.
    pub applied: Vec<AppliedMap>,
    /// Deltas, and how many tensors each changed.
    pub deltas: BTreeMap<String, usize>,
    /// Tensors with other values than the base's.
    pub changed: usize,
    /// Maps whose new values are, rounded to the dtype of their tensors, the old ones.
    pub unchanged: Vec<String>,
    /// Bytes of all tensors.
    pub bytes: u64,
}

impl fmt::Display for MergedAdapters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, applied, deltas, changed, unchanged, bytes } = self;
        let mut adapters: BTreeMap<&str, usize> = BTreeMap::new();
        applied.iter().for_each(|map| *adapters.entry(&map.adapter).or_default() += 1);
        for (delta, tensors) in deltas {
            writeln!(f, "{delta}: {tensors} tensors changed by a delta")?;
        }
        for (adapter, additions) in adapters {
            writeln!(f, "{adapter}: {additions} additions merged")?;
        }
        if !unchanged.is_empty() {
            writeln!(f, "{} new values are, rounded, the old ones", unchanged.len())?;
        }
        writeln!(f, "{}: {changed} tensors changed by low-rank adapters, {}", path.display(), size(*bytes))
    }
}

impl MergeAdapters {
    /// Merges all of each adapter, into a directory that is not there yet.
    pub fn new(base: impl Into<PathBuf>, adapters: Vec<AdapterInput>, out: impl Into<PathBuf>) -> Self {
        Self { base: base.into(), adapters, out: out.into(), existing: Existing::Refuse }
    }

    /// The model with all adapters, as [`run`](Self::run) writes it, and what is to be reported of it.
    ///
    /// # Errors
    /// What keeps files from being read or from fitting each other; [`Error::Unsupported`] for what no weights can be,
    /// and for a delta with a weight.
    pub fn model(&self) -> Result<(Arc<Checkpoint>, MergedAdapters)> {
        some(&self.adapters)?;
        let mut model = Arc::new(Checkpoint::open(&self.base)?);
        let mut report = MergedAdapters {
            path: self.out.clone(),
            applied: Vec::new(),
            deltas: BTreeMap::new(),
            changed: 0,
            unchanged: Vec::new(),
            bytes: 0,
        };
        let (deltas, low_rank): (Vec<&AdapterInput>, Vec<&AdapterInput>) =
            self.adapters.iter().partition(|adapter| adapter.path.is_file());
        for AdapterInput { path, weight, .. } in deltas {
            if *weight != 1.0 {
                return Err(Error::Unsupported(format!("{}: a delta times {weight}", path.display())));
            }
            let patched = delta(path)?.on(&model)?;
            report.deltas.insert(path.display().to_string(), patched.tensors().len());
            model = patched.model().clone();
        }
        if low_rank.is_empty() {
            return Ok((model, report));
        }
        let plain = model.dequantized()?;
        let maps = Maps::new(&plain);
        let read = |adapter: &&AdapterInput| Ok((adapter.name(), adapter.read(&maps)?, adapter.weight));
        let read = low_rank.iter().map(read).collect::<Result<Vec<_>>>()?;
        let named: Vec<_> = read.iter().map(|(name, weights, weight)| (name.as_str(), weights, *weight)).collect();
        let merged = Merged::on(&model, &named)?;
        report.applied = merged.applied().to_vec();
        let changes = merged.changes()?;
        (report.changed, report.unchanged) = (changes.changed.len(), changes.unchanged);
        Ok((merged.model().clone(), report))
    }

    /// Does it.
    ///
    /// # Errors
    /// Those of [`model`](Self::model) and of an output that cannot be, before anything is written; then those of
    /// writing.
    pub fn run(&self) -> Result<MergedAdapters> {
        let options = WriteOptions { existing: self.existing, ..WriteOptions::default() };
        check_output(&Arc::new(Checkpoint::open(&self.base)?), &self.out, &options)?;
        let (model, report) = self.model()?;
        check_room(&self.out, model.bytes_on_disk())?;
        let written = write(&model, &self.out, &options)?;
        Ok(MergedAdapters { bytes: written.bytes, ..report })
    }
}

/// A delta of a checkpoint.
fn delta(path: &Path) -> Result<Delta> {
    let delta = Delta::open(path)?;
    match &delta.table().base {
        DeltaBase::Checkpoint { .. } => Ok(delta),
        DeltaBase::Adapter { .. } => Err(Error::Unsupported(format!(
            "{}: the delta of an adapter; make the adapter of it first",
            path.display()
        ))),
    }
}

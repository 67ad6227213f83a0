//! Merged experts in a directory, one file per changed group.

#[cfg(feature = "engine")]
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

#[cfg(feature = "engine")]
use moe_checkpoint::{Checkpoint, write_atomic};
use moe_checkpoint::{Dtype, ExpertPart, ExpertWeights, RawMatrix};
use safetensors::SafeTensors;
#[cfg(feature = "engine")]
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};

use super::computed::MergedExperts;
#[cfg(feature = "engine")]
use super::store::encoded;
use crate::combination::{GroupSink, Merged};
use crate::plan::{LayerPlan, MergePlan};
use crate::router::RouterAddition;
use crate::{Error, Result};

/// File of the plan, written last.
const PLAN_FILE: &str = "plan.json";
/// File that tells what the directory is made from.
const RUN_FILE: &str = "run.json";
/// Version of that file.
const VERSION: u64 = 1;

/// Merged experts that were computed while the model ran, layer by layer, in the dtypes of the checkpoint. A directory with one
/// file per layer and one per changed group; `plan.json` is there when it is complete.
#[derive(Clone, Debug)]
pub struct MergedWeights {
    dir: PathBuf,
    plan: MergePlan,
    digest: String,
}

#[derive(Serialize, Deserialize)]
struct Run {
    version: u64,
    digest: String,
}

/// What became of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub plan: LayerPlan,
    /// The expert that a group is, where it is one as it was.
    pub unchanged: Vec<Option<usize>>,
    /// Group, expert and share of what is added to router rows.
    pub additions: Vec<(usize, usize, f64)>,
}

/// A directory being filled.
#[cfg(feature = "engine")]
pub(crate) struct MergedWriter {
    dir: PathBuf,
    digest: String,
}

#[cfg(feature = "engine")]
impl MergedWriter {
    /// Starts a directory, or goes on with the one that is there, which must be of the same `digest`.
    pub fn create_or_resume(dir: &Path, digest: &str) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let path = dir.join(RUN_FILE);
        if path.exists() {
            let Run { digest: found, .. } = read_json(&path)?;
            if found != digest {
                let reason = format!("it was begun from digest {found}, but this run has {digest}");
                return Err(Error::invalid_plan(reason).in_file(&path));
            }
        } else {
            write_json(&path, &Run { version: VERSION, digest: digest.to_string() })?;
        }
        Ok(Self { dir: dir.to_path_buf(), digest: digest.to_string() })
    }

    /// A layer that an earlier run finished.
    pub fn finished(&self, layer: usize) -> Result<Option<LayerRecord>> {
        let path = layer_path(&self.dir, layer);
        if path.exists() { read_json(&path).map(Some) } else { Ok(None) }
    }

    /// Writes a layer as `combine` gives it.
    pub fn write(
        &self,
        checkpoint: &Checkpoint,
        plan: LayerPlan,
        combine: impl FnOnce(&LayerPlan, GroupSink<'_>) -> Result<Vec<RouterAddition>>,
    ) -> Result<LayerRecord> {
        let layer = plan.layer;
        let mut unchanged = vec![None; plan.groups.len()];
        let additions = combine(&plan, &mut |group, merged| {
            let like = plan.groups[group].dominant as usize;
            match merged {
                Merged::Unchanged(expert) => unchanged[group] = Some(expert),
                Merged::Changed(weights) => {
                    let path = group_path(&self.dir, layer, group);
                    write_expert(&path, checkpoint, (layer, like), &weights)?;
                }
            }
            Ok(())
        })?;
        let additions = additions.iter().map(|a| (a.group, a.expert, a.share)).collect();
        let record = LayerRecord { plan, unchanged, additions };
        write_json(&layer_path(&self.dir, layer), &record)?;
        Ok(record)
    }

    /// Writes the plan of all layers.
    pub fn finish(self, plan: MergePlan) -> Result<MergedWeights> {
        plan.save(self.dir.join(PLAN_FILE))?;
        Ok(MergedWeights { dir: self.dir, plan, digest: self.digest })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl MergedWeights {
    /// Opens a directory that is complete.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::InvalidPlan`], [`Error::Version`], naming the file.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref().to_path_buf();
        let Run { digest, version: found } = read_json(&dir.join(RUN_FILE))?;
        if found != VERSION {
            let path = Some(dir.join(RUN_FILE));
            return Err(Error::Version { path, what: "merged experts", found, supported: VERSION });
        }
        let plan = MergePlan::load(dir.join(PLAN_FILE))?;
        Ok(Self { dir, plan, digest })
    }

    /// The plan.
    pub fn plan(&self) -> &MergePlan {
        &self.plan
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    #[cfg(feature = "engine")]
    pub(crate) fn record(&self, layer: usize) -> Result<LayerRecord> {
        read_json(&layer_path(&self.dir, layer))
    }

    /// What became of a group of a decoder layer.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::InvalidPlan`] for a group that does not exist or a malformed file.
    pub fn expert(&self, layer: usize, group: usize) -> Result<Merged> {
        let record: LayerRecord = read_json(&layer_path(&self.dir, layer))?;
        read_group(&self.dir, &record, group)
    }
}

impl MergedExperts for MergedWeights {
    fn layer(&self, layer: usize, sink: GroupSink<'_>) -> Result<Vec<RouterAddition>> {
        let record: LayerRecord = read_json(&layer_path(&self.dir, layer))?;
        for group in 0..record.unchanged.len() {
            sink(group, read_group(&self.dir, &record, group)?)?;
        }
        Ok(record.additions())
    }

    fn adds_to_router(&self) -> bool {
        use crate::combination::Combination;
        self.plan.recipe.combination.adds_to_router()
    }

    fn digest(&self) -> String {
        self.digest.clone()
    }
}

impl LayerRecord {
    pub fn additions(&self) -> Vec<RouterAddition> {
        self.additions.iter().map(|&(group, expert, share)| RouterAddition { group, expert, share }).collect()
    }
}

pub(crate) fn read_group(dir: &Path, record: &LayerRecord, group: usize) -> Result<Merged> {
    match record.unchanged.get(group) {
        Some(Some(expert)) => Ok(Merged::Unchanged(*expert)),
        Some(None) => Ok(Merged::Changed(Box::new(read_expert(&group_path(dir, record.plan.layer, group))?))),
        None => Err(Error::invalid_plan(format!("layer {} has no group {group}", record.plan.layer))),
    }
}

fn layer_path(dir: &Path, layer: usize) -> PathBuf {
    dir.join(format!("layer-{layer:03}.json"))
}

fn group_path(dir: &Path, layer: usize, group: usize) -> PathBuf {
    dir.join(format!("layer-{layer:03}-group-{group:04}.safetensors"))
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let json = fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&json).map_err(|error| Error::invalid_plan(error.to_string()).in_file(path))
}

#[cfg(feature = "engine")]
fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_vec(value).map_err(|error| Error::invalid_plan(error.to_string()).in_file(path))?;
    Ok(write_atomic(path, &json)?)
}

/// Names of the parts in a group's file.
const PARTS: [(ExpertPart, &str); 6] = [
    (ExpertPart::Gate, "gate"),
    (ExpertPart::Up, "up"),
    (ExpertPart::Down, "down"),
    (ExpertPart::GateBias, "gate_bias"),
    (ExpertPart::UpBias, "up_bias"),
    (ExpertPart::DownBias, "down_bias"),
];

#[cfg(feature = "engine")]
fn write_expert(path: &Path, from: &Checkpoint, like: (usize, usize), weights: &ExpertWeights) -> Result<()> {
    let (bytes, slices) = encoded(from, like, weights, 0)?;
    let malformed = |error: safetensors::SafeTensorError| Error::invalid_plan(error.to_string()).in_file(path);
    let mut views = Vec::with_capacity(slices.len());
    for slice in &slices {
        let name = PARTS.iter().find(|(part, _)| *part == slice.part).map_or("", |(_, name)| name);
        let start = slice.start as usize;
        let data = &bytes[start..start + slice.bytes()];
        views.push((name, TensorView::new(slice.dtype, vec![slice.rows, slice.cols], data).map_err(malformed)?));
    }
    let file = safetensors::serialize(views, None::<HashMap<String, String>>).map_err(malformed)?;
    Ok(write_atomic(path, &file)?)
}

fn read_expert(path: &Path) -> Result<ExpertWeights> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let malformed = |reason: String| Error::invalid_plan(reason).in_file(path);
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| malformed(error.to_string()))?;
    let read = |part: ExpertPart| -> Result<Option<(Vec<f32>, usize, usize)>> {
        let name = PARTS.iter().find(|(found, _)| *found == part).map_or("", |(_, name)| name);
        let Ok(view) = tensors.tensor(name) else { return Ok(None) };
        let ([rows, cols], true) = (view.shape(), matches!(view.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16)) else {
            return Err(malformed(format!("`{name}` is {:?} {:?}", view.dtype(), view.shape())));
        };
        let matrix = RawMatrix { bytes: view.data().into(), dtype: view.dtype(), rows: *rows, cols: *cols };
        Ok(Some((matrix.to_f32(), *rows, *cols)))
    };
    let required = |part: ExpertPart| read(part)?.ok_or_else(|| malformed(format!("it has no {part:?}")));
    let optional = |part: ExpertPart| Ok::<_, Error>(read(part)?.map(|(values, ..)| values));
    let ((gate, width, hidden), (up, ..), (down, ..)) =
        (required(ExpertPart::Gate)?, required(ExpertPart::Up)?, required(ExpertPart::Down)?);
    if up.len() != gate.len() || down.len() != gate.len() {
        return Err(malformed("gate, up and down differ in size".into()));
    }
    Ok(ExpertWeights {
        gate,
        up,
        down,
        gate_bias: optional(ExpertPart::GateBias)?,
        up_bias: optional(ExpertPart::UpBias)?,
        down_bias: optional(ExpertPart::DownBias)?,
        width,
        hidden,
    })
}

//! Merged experts in a directory, one file per changed group.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use moe_checkpoint::{Checkpoint, Dtype, ExpertPart, ExpertWeights, RawMatrix, write_atomic};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};

use super::made::{Made, MadeLayer, encoded};
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

/// Experts that a plan merged, in the dtypes of the checkpoint: of a [plan](MergePlan::compute), or of a model that was
/// merged layer by layer. A directory with one file per layer and one per changed group; `plan.json` is there when it
/// is complete.
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
pub(crate) struct MergedWriter {
    dir: PathBuf,
    digest: String,
}

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

    /// The directory that the first rank of a group has started, for another rank.
    pub fn of_first_rank(dir: &Path, digest: &str) -> Result<Self> {
        let writer = Self { dir: dir.to_path_buf(), digest: digest.to_string() };
        match dir.join(RUN_FILE).exists() {
            true => Self::create_or_resume(dir, digest),
            false => Err(writer.unseen()),
        }
    }

    /// What the first rank of a group has written is not there.
    pub fn unseen(&self) -> Error {
        let reason = "found nothing of the first process, expected a directory that all processes see";
        Error::invalid_plan(reason).in_file(&self.dir)
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

    /// Identifies the run that merged them, as 64 hex digits.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Refuses a plan other than the one that they were merged by, and files that are missing.
    pub(super) fn check(&self, plan: &MergePlan) -> Result<()> {
        if *plan != self.plan {
            let reason = "its experts were merged by another plan than the one to be carried out";
            return Err(Error::invalid_plan(reason).in_file(&self.dir.join(PLAN_FILE)));
        }
        plan.layers.iter().try_for_each(|layer| self.made(layer.layer).map(drop))
    }

    /// What became of a layer, read from the files when it is asked for.
    pub(super) fn made(&self, layer: usize) -> Result<MadeLayer> {
        let record: LayerRecord = read_json(&layer_path(&self.dir, layer))?;
        let group = |(group, unchanged): (usize, &Option<usize>)| match unchanged {
            Some(expert) => Ok(Some(Made::Unchanged(*expert))),
            None => {
                let path = group_path(&self.dir, layer, group);
                fs::metadata(&path).map_err(Error::io(&path))?;
                Ok(Some(Made::File(path)))
            }
        };
        let groups = record.unchanged.iter().enumerate().map(group).collect::<Result<Vec<_>>>()?;
        MadeLayer::of(layer, groups, None, record.additions())
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

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_vec(value).map_err(|error| Error::invalid_plan(error.to_string()).in_file(path))?;
    Ok(write_atomic(path, &json)?)
}

/// The name of a part in a group's file.
pub(super) fn part_name(part: ExpertPart) -> &'static str {
    PARTS.iter().find(|(found, _)| *found == part).map_or("", |(_, name)| name)
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

fn write_expert(path: &Path, from: &Checkpoint, like: (usize, usize), weights: &ExpertWeights) -> Result<()> {
    let (bytes, slices) = encoded(from, like, weights, 0)?;
    let malformed = |error: safetensors::SafeTensorError| Error::invalid_plan(error.to_string()).in_file(path);
    let mut views = Vec::with_capacity(slices.len());
    for slice in &slices {
        let name = part_name(slice.part);
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
        let name = part_name(part);
        let Ok(view) = tensors.tensor(name) else { return Ok(None) };
        let ([rows, cols], true) = (view.shape(), matches!(view.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16)) else {
            return Err(malformed(format!("`{name}` is {:?} {:?}", view.dtype(), view.shape())));
        };
        let matrix = RawMatrix { bytes: view.data().into(), dtype: view.dtype(), rows: *rows, cols: *cols };
        Ok(Some((matrix.to_f32(), *rows, *cols)))
    };
    let required = |part: ExpertPart| read(part)?.ok_or_else(|| malformed(format!("it has no {part}")));
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

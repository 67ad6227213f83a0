//! The state of a training run on disk.
//!
//! `step-000120.safetensors` has values, moments and events after step 120, `step-000120.json` the rest. The JSON file
//! is written last and atomically: a state is there when it is, whenever the process dies. `best-000100.safetensors`
//! has the best values, for as long as a state refers to them.

mod signature;
mod tensors;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moe_checkpoint::{SafetensorsFile, write_atomic};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

pub(super) use signature::signature;
use tensors::{TEMPORARY, Values};

use super::events::{ROW, auxiliary_names};
use super::guard::Guard;
use super::keeper::Figures;
use super::parameters::{Kept, Snapshot};
use super::{OptimizerState, Parameter, Parameters, StateArray, Stop, StoredValues, TaskState, TrainEvent};
use crate::error::{Error, Result};

/// Version of the format.
const VERSION: u64 = 2;

/// Where and when the state of training is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saving {
    /// A directory for this run alone. Created if it is not there.
    pub directory: PathBuf,
    /// Steps between saved states; the end is always saved. `None` saves the end only.
    pub every: Option<usize>,
    /// States that are left; older ones are removed. At least 1.
    pub keep: usize,
    /// Whether to go on with the state that is there, if one is. Otherwise one is an error.
    pub resume: bool,
}

impl Saving {
    /// Every `every` steps into `directory`, the last two kept, going on with what is there.
    pub fn new(directory: impl Into<PathBuf>, every: usize) -> Self {
        Self { directory: directory.into(), every: Some(every), keep: 2, resume: true }
    }

    /// Whether a run could begin there, as far as files show it: to be asked before work that leads up to it.
    ///
    /// # Errors
    /// [`Error::Input`] for numbers out of range, [`Error::State`] for the state of an earlier run that is not to be
    /// gone on with.
    pub fn check(&self) -> Result<()> {
        for (field, count) in [("every", self.every.unwrap_or(1)), ("keep", self.keep)] {
            if count == 0 {
                return Err(Error::input(format!("{field} of saving"), 0, "at least 1"));
            }
        }
        match self.directory.exists() && !self.resume {
            true => match steps_in(&self.directory)?.last() {
                Some(step) => {
                    let found = format!("the state of step {step}");
                    Err(Error::state(&self.directory, "directory", found, "none, or to go on with it"))
                }
                None => Ok(()),
            },
            false => Ok(()),
        }
    }
}

/// A number that is saved as its bits: decimal digits need not bring it back.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Bits(pub f64);

impl Serialize for Bits {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0.to_bits())
    }
}

impl<'de> Deserialize<'de> for Bits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        u64::deserialize(deserializer).map(|bits| Self(f64::from_bits(bits)))
    }
}

/// How far training is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Progress {
    pub step: usize,
    pub tokens: u64,
    pub tokens_run: u64,
    pub seconds: Bits,
    pub figures: Figures,
    pub guard: Guard,
    pub stop: Option<Stop>,
    #[serde(skip)]
    pub events: Vec<TrainEvent>,
}

/// Contents of a JSON file.
#[derive(Serialize, Deserialize)]
struct StateFile {
    version: u64,
    crate_version: String,
    /// Where the next wave is: known from the step, for people to read.
    epoch: usize,
    position: usize,
    /// Bytes of the file of tensors.
    bytes: u64,
    progress: Progress,
    events: usize,
    /// Names of the auxiliary losses of events.
    auxiliary: Vec<String>,
    /// Step of the file of best values.
    best: Option<usize>,
    parameters: BTreeMap<String, ParameterRecord>,
    task: Value,
    task_arrays: BTreeMap<String, Vec<usize>>,
    signature: Value,
}

#[derive(Serialize, Deserialize)]
struct ParameterRecord {
    shape: Vec<usize>,
    groups: usize,
    active: Option<bool>,
    /// Whether its values were not in memory.
    #[serde(default)]
    stored: bool,
    steps: u64,
    arrays: BTreeMap<String, Vec<usize>>,
    scalars: BTreeMap<String, u64>,
}

/// What is saved, besides the parameters.
pub(super) struct Saved {
    pub progress: Progress,
    pub position: (usize, usize),
    pub best: Option<usize>,
    pub task: TaskState,
}

/// Values in the file of a state. Whoever stores values elsewhere takes them out of it before the next state is saved:
/// old files go.
#[derive(Debug)]
struct InState {
    file: Arc<SafetensorsFile>,
    name: String,
    shape: Vec<usize>,
}

impl StoredValues for InState {
    fn read(&self) -> Result<Vec<f32>> {
        tensors::f32(&self.file, &self.name, &self.shape)
    }
}

/// A directory of states, locked by this process or by the first rank of its group.
pub(super) struct StateDir {
    directory: PathBuf,
    keep: usize,
    signature: Value,
    /// Only the one that has it writes.
    lock: Option<File>,
}

impl StateDir {
    /// Opens the directory, and checks the last state that is to be gone on with.
    pub fn open(saving: &Saving, signature: Value) -> Result<Self> {
        saving.check()?;
        let directory = saving.directory.clone();
        fs::create_dir_all(&directory).map_err(Error::io(&directory))?;
        let path = directory.join(".lock");
        let lock = File::create(&path).map_err(Error::io(&path))?;
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            return Err(Error::state(&directory, "directory", "one that another process trains in", "one of its own"));
        }
        // Again, now that no other process can leave one.
        saving.check()?;
        Ok(Self { directory, keep: saving.keep, signature, lock: Some(lock) })
    }

    /// The directory of another rank, which has it open: what that one saves can be read here, and saving here does
    /// nothing.
    pub fn of_first_rank(saving: &Saving, signature: Value) -> Self {
        Self { directory: saving.directory.clone(), keep: saving.keep, signature, lock: None }
    }

    /// The last state.
    pub fn latest(&self) -> Option<PathBuf> {
        Some(self.path(*self.steps().ok()?.last()?, "json"))
    }

    /// Takes the last state, if there is one.
    pub fn load(&self, parameters: &mut Parameters) -> Result<Option<Saved>> {
        let Some(&step) = self.steps()?.last() else { return Ok(None) };
        let path = self.path(step, "json");
        let json = fs::read(&path).map_err(Error::io(&path))?;
        let malformed =
            |error: serde_json::Error| Error::state(&path, "contents", error, "the state of a training run");
        let json: Value = serde_json::from_slice(&json).map_err(malformed)?;
        if json["version"] != VERSION {
            return Err(Error::state(&path, "version", &json["version"], VERSION));
        }
        let file: StateFile = serde_json::from_value(json).map_err(malformed)?;
        signature::check(&path, &file.signature, &self.signature)?;
        if file.crate_version != env!("CARGO_PKG_VERSION") {
            let (found, now) = (&file.crate_version, env!("CARGO_PKG_VERSION"));
            tracing::warn!(
                "{}: begun by version {found}, resumed by {now}; steps may round differently",
                path.display()
            );
        }
        let tensors = self.path(step, "safetensors");
        let bytes = fs::metadata(&tensors).map_err(Error::io(&tensors))?.len();
        if bytes != file.bytes {
            return Err(Error::state(&tensors, "length", format!("{bytes} bytes"), format!("{} bytes", file.bytes)));
        }
        let reader = Arc::new(SafetensorsFile::open(&tensors)?);
        let array = |name: String, shape: &Vec<usize>| -> Result<StateArray> {
            Ok(StateArray { values: tensors::f32(&reader, &name, shape)?, shape: shape.clone() })
        };
        let gone: Vec<String> = parameters.iter().map(|(name, _)| name.to_string()).collect();
        gone.iter().for_each(|name| drop(parameters.remove(name)));
        for (name, record) in &file.parameters {
            let of_file = format!("values/{name}");
            let mut parameter = match record.stored {
                true => {
                    let values = InState { file: reader.clone(), name: of_file, shape: record.shape.clone() };
                    Parameter::stored(Arc::new(values), record.shape.clone()).in_groups(record.groups)?
                }
                false => {
                    let values = array(of_file, &record.shape)?.values;
                    Parameter::restored(values, record.shape.clone(), record.groups)?
                }
            };
            let mut state =
                OptimizerState { steps: record.steps, scalars: record.scalars.clone(), ..OptimizerState::default() };
            for (key, shape) in &record.arrays {
                state.arrays.insert(key.clone(), array(format!("state/{name}/{key}"), shape)?);
            }
            (parameter.state, parameter.active) = (state, record.active);
            parameters.add(name, parameter);
        }
        let mut task = TaskState { json: file.task, ..TaskState::default() };
        for (name, shape) in &file.task_arrays {
            task.arrays.insert(name.clone(), array(format!("task/{name}"), shape)?);
        }
        let mut progress = file.progress;
        let columns = ROW + file.auxiliary.len();
        for row in tensors::f64(&reader, "events", &[file.events, columns])?.chunks(columns) {
            let event = TrainEvent::from_row(row, &file.auxiliary);
            progress
                .events
                .push(event.ok_or_else(|| Error::state(&tensors, "events", format!("{row:?}"), "an event"))?);
        }
        Ok(Some(Saved { progress, position: (file.epoch, file.position), best: file.best, task }))
    }

    /// Saves a state, and removes what is too old.
    pub fn save(&self, saved: &Saved, parameters: &Parameters) -> Result<()> {
        if self.lock.is_none() {
            return Ok(());
        }
        let Saved { progress, position, best, task } = saved;
        let mut tensors = Vec::new();
        let mut records = BTreeMap::new();
        for (name, parameter) in parameters.iter() {
            let (shape, state) = (parameter.shape().to_vec(), parameter.state());
            tensors.push((format!("values/{name}"), shape.clone(), Values::Of(parameter)));
            for (key, array) in &state.arrays {
                tensors.push((format!("state/{name}/{key}"), array.shape.clone(), Values::F32(&array.values)));
            }
            let record = ParameterRecord {
                shape,
                groups: parameter.groups(),
                active: parameter.active,
                stored: parameter.stored.is_some(),
                steps: state.steps,
                arrays: state.arrays.iter().map(|(key, array)| (key.clone(), array.shape.clone())).collect(),
                scalars: state.scalars.clone(),
            };
            records.insert(name.to_string(), record);
        }
        for (name, array) in &task.arrays {
            tensors.push((format!("task/{name}"), array.shape.clone(), Values::F32(&array.values)));
        }
        let auxiliary = auxiliary_names(&progress.events);
        let events: Vec<f64> = progress.events.iter().flat_map(|event| event.to_row(&auxiliary)).collect();
        tensors.push(("events".into(), vec![progress.events.len(), ROW + auxiliary.len()], Values::F64(&events)));
        let bytes = tensors::write(&self.path(progress.step, "safetensors"), &tensors)?;
        let file = StateFile {
            version: VERSION,
            crate_version: env!("CARGO_PKG_VERSION").into(),
            epoch: position.0,
            position: position.1,
            bytes,
            progress: progress.clone(),
            events: progress.events.len(),
            auxiliary,
            best: *best,
            parameters: records,
            task: task.json.clone(),
            task_arrays: task.arrays.iter().map(|(name, array)| (name.clone(), array.shape.clone())).collect(),
            signature: self.signature.clone(),
        };
        let path = self.path(progress.step, "json");
        let json = serde_json::to_vec_pretty(&file).map_err(|error| Error::state(&path, "contents", error, "JSON"))?;
        write_atomic(&path, &json)?;
        self.clean()
    }

    /// Writes the values as the best ones.
    pub fn write_best(&self, step: usize, parameters: &Parameters) -> Result<()> {
        if self.lock.is_none() {
            return Ok(());
        }
        let mut tensors = Vec::new();
        for (name, parameter) in parameters.iter() {
            tensors.push((name.to_string(), parameter.shape().to_vec(), Values::Of(parameter)));
        }
        tensors::write(&self.best(step), &tensors).map(drop)
    }

    /// Values written by [`write_best`](Self::write_best).
    pub fn read_best(&self, step: usize) -> Result<Snapshot> {
        let file = SafetensorsFile::open(self.best(step))?;
        file.tensors().map(|tensor| Ok((tensor.name.clone(), Kept::Values(file.f32(&tensor.name)?)))).collect()
    }

    /// Removes states that are too old, best values that no state that is left refers to, and what killed processes
    /// left.
    fn clean(&self) -> Result<()> {
        let steps = self.steps()?;
        let old = steps.len().saturating_sub(self.keep);
        for step in &steps[..old] {
            // The JSON file first: without it, the other one is nothing.
            remove(&self.path(*step, "json"))?;
            remove(&self.path(*step, "safetensors"))?;
        }
        let mut kept = BTreeSet::new();
        for step in &steps[old..] {
            kept.insert(format!("step-{step:06}.safetensors"));
            let path = self.path(*step, "json");
            let json = fs::read(&path).map_err(Error::io(&path))?;
            let json: Value = serde_json::from_slice(&json)
                .map_err(|error| Error::state(&path, "contents", error, "the state of a training run"))?;
            json["best"].as_u64().map(|best| kept.insert(format!("best-{best:06}.safetensors")));
        }
        for name in self.names()? {
            let ours = name.starts_with("step-") || name.starts_with("best-") || name.starts_with(".step-");
            let left = name.ends_with(TEMPORARY) || (name.ends_with(".safetensors") && !kept.contains(&name));
            if ours && left {
                remove(&self.directory.join(name))?;
            }
        }
        Ok(())
    }

    fn steps(&self) -> Result<Vec<usize>> {
        steps_in(&self.directory)
    }

    fn names(&self) -> Result<Vec<String>> {
        names_in(&self.directory)
    }

    fn path(&self, step: usize, extension: &str) -> PathBuf {
        self.directory.join(format!("step-{step:06}.{extension}"))
    }

    fn best(&self, step: usize) -> PathBuf {
        self.directory.join(format!("best-{step:06}.safetensors"))
    }
}

/// Steps of the states of a directory, ascending.
fn steps_in(directory: &Path) -> Result<Vec<usize>> {
    let step = |name: &String| name.strip_prefix("step-")?.strip_suffix(".json")?.parse().ok();
    let mut steps: Vec<usize> = names_in(directory)?.iter().filter_map(step).collect();
    steps.sort();
    Ok(steps)
}

fn names_in(directory: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(directory).map_err(Error::io(directory))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect::<std::io::Result<_>>().map_err(Error::io(directory))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
}

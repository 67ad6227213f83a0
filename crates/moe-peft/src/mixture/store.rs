//! Mixtures on disk: a config, and all values with the state of routers.

use std::{collections::BTreeMap, collections::HashMap, path::Path};

use burn::tensor::Device;
use moe_checkpoint::{Dtype, write_atomic};
use moe_core::train::Parameters;
use safetensors::{SafeTensors, tensor::TensorView};

use super::{
    MixtureConfig,
    install::{Mixture, Stored},
    linear::Earlier,
};
use crate::{AdapterSet, Error, Result, array_file::malformed, lora::Maps};

/// File of options.
pub const CONFIG_FILE: &str = "mixture_config.json";
/// File of values: names of trained values, `PATH.mixture.selection_bias`, and `PATH.mixture.earlier_A` and
/// `.earlier_B` of earlier tasks.
pub const MODEL_FILE: &str = "mixture.safetensors";

const SELECTION: &str = ".mixture.selection_bias";
const EARLIER_A: &str = ".mixture.earlier_A";
const EARLIER_B: &str = ".mixture.earlier_B";

/// Shape and values.
type Shaped = (Vec<usize>, Vec<f32>);

impl Mixture {
    /// Writes the mixture, with the values of an optimizer where it has them. Otherwise values have to be
    /// [lent](crate::Bank::lend) or settled.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Checkpoint`] for the file system.
    pub fn save(&self, dir: impl AsRef<Path>, parameters: Option<&Parameters>) -> Result<()> {
        let dir = dir.as_ref();
        let mut tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
        for (name, values) in self.all_values(parameters) {
            let shape = self.values.get(&name).map(|live| live.shape().to_vec()).unwrap_or_default();
            tensors.insert(name, (shape, values));
        }
        for (path, router) in &self.routers {
            if self.config.gate.bias_rate().is_some() {
                let bias = router.settled_bias();
                tensors.insert(format!("{path}{SELECTION}"), (vec![bias.len()], bias));
            }
        }
        for (path, Earlier { a, b, rank }) in &self.earlier {
            tensors.insert(format!("{path}{EARLIER_A}"), (vec![*rank, a.len() / rank], a.clone()));
            tensors.insert(format!("{path}{EARLIER_B}"), (vec![b.len() / rank, *rank], b.clone()));
        }
        let file = |what: String, found: String| Error::File {
            path: dir.to_path_buf(),
            what,
            found,
            expected: "values that can be written".into(),
        };
        let bytes: BTreeMap<&String, Vec<u8>> =
            tensors.iter().map(|(name, (_, v))| (name, v.iter().flat_map(|v| v.to_le_bytes()).collect())).collect();
        let mut views = Vec::with_capacity(tensors.len());
        for (name, (shape, _)) in &tensors {
            let view = TensorView::new(Dtype::F32, shape.clone(), &bytes[name]);
            views.push((name.as_str(), view.map_err(|error| file(format!("tensor `{name}`"), error.to_string()))?));
        }
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let values = safetensors::serialize(views, Some(metadata))
            .map_err(|error| file(MODEL_FILE.into(), error.to_string()))?;
        let config =
            serde_json::to_vec_pretty(&self.config).map_err(|error| file(CONFIG_FILE.into(), error.to_string()))?;
        std::fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.to_path_buf(), source })?;
        write_atomic(dir.join(MODEL_FILE), &values)?;
        write_atomic(dir.join(CONFIG_FILE), &config)?;
        Ok(())
    }

    /// Reads a mixture and puts it into `set`.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::File`] for files that are missing, malformed, or not of this model; those of
    /// [`Mixture::install`].
    pub fn load(dir: impl AsRef<Path>, set: &mut AdapterSet, maps: &Maps<'_>, device: &Device) -> Result<Self> {
        let path = dir.as_ref().join(MODEL_FILE);
        let (config, stored) = read_store(dir.as_ref())?;
        let mixture = Self::install_with(&config, set, maps, device, &stored)?;
        let stray = stored.values.keys().find(|name| !mixture.values.contains_key(*name));
        let paths = || stored.selection.keys().chain(stored.earlier.keys());
        let stray = stray.or_else(|| paths().find(|path| !mixture.routers.contains_key(*path)));
        if let Some(stray) = stray {
            return Err(malformed(&path, format!("tensor `{stray}`"), "nothing it belongs to", "one of the model"));
        }
        if let Some(missing) = mixture.values.keys().find(|name| !stored.values.contains_key(*name)) {
            return Err(malformed(&path, format!("tensor `{missing}`"), "none", "one for every part of the mixture"));
        }
        Ok(mixture)
    }
}

/// The options and values of a saved mixture.
///
/// # Errors
/// [`Error::Io`] and [`Error::File`] for files that are missing or malformed.
pub(super) fn read_store(dir: &Path) -> Result<(MixtureConfig, Stored)> {
    let (config_path, path) = (dir.join(CONFIG_FILE), dir.join(MODEL_FILE));
    let read = |path: &Path| std::fs::read(path).map_err(|source| Error::Io { path: path.to_path_buf(), source });
    let error = |path: &Path, what: &str, found: String, expected: &str| Error::File {
        path: path.to_path_buf(),
        what: what.into(),
        found,
        expected: expected.into(),
    };
    let config: MixtureConfig = serde_json::from_slice(&read(&config_path)?)
        .map_err(|e| error(&config_path, "contents", e.to_string(), "the options of a mixture"))?;
    let bytes = read(&path)?;
    let file =
        SafeTensors::deserialize(&bytes).map_err(|e| error(&path, "contents", e.to_string(), "a safetensors file"))?;
    let mut stored = Stored::default();
    let mut halves: BTreeMap<String, [Option<Shaped>; 2]> = BTreeMap::new();
    for (name, view) in file.tensors() {
        if view.dtype() != Dtype::F32 {
            return Err(error(&path, &format!("tensor `{name}`"), view.dtype().to_string(), "F32"));
        }
        let values: Vec<f32> = view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if let Some(path) = name.strip_suffix(SELECTION) {
            stored.selection.insert(path.to_string(), values);
        } else if let Some(path) = name.strip_suffix(EARLIER_A) {
            halves.entry(path.to_string()).or_default()[0] = Some((view.shape().to_vec(), values));
        } else if let Some(path) = name.strip_suffix(EARLIER_B) {
            halves.entry(path.to_string()).or_default()[1] = Some((view.shape().to_vec(), values));
        } else {
            stored.values.insert(name, values);
        }
    }
    for (at, halves) in halves {
        let [Some((shape, a)), Some((_, b))] = halves else {
            return Err(error(&path, &format!("earlier atoms of `{at}`"), "one half".into(), "A and B"));
        };
        stored.earlier.insert(at, Earlier { a, b, rank: shape[0] });
    }
    Ok((config, stored))
}

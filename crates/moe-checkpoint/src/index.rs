//! Which files hold the weights of a model directory. Only files that the index names are ever opened.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::json::{Fields, shown};
use crate::{Error, Result};

/// Weights in one file.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// Index of weights in several files.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// The weight files of a directory.
pub(crate) enum WeightFiles {
    /// One file with everything.
    Single(PathBuf),
    /// Shards, each with the tensors that the index says it holds.
    Sharded { index: PathBuf, shards: BTreeMap<PathBuf, Vec<String>> },
}

impl WeightFiles {
    /// Finds the weights: `model.safetensors`, or else what `model.safetensors.index.json` names, as transformers does.
    pub fn find(dir: &Path) -> Result<Self> {
        let single = dir.join(SINGLE_FILE);
        if single.exists() {
            return Ok(Self::Single(single));
        }
        let index = dir.join(INDEX_FILE);
        if !index.exists() {
            return Err(Error::NoWeights { dir: dir.to_path_buf() });
        }
        let value = read_json(&index)?;
        let shards = parse(dir, &index, &value)?;
        Ok(Self::Sharded { index, shards })
    }
}

/// Reads a JSON file.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(|source| Error::io(path, source))?;
    serde_json::from_slice(&bytes).map_err(|source| Error::InvalidJson { path: path.to_path_buf(), source })
}

fn parse(dir: &Path, index: &Path, value: &Value) -> Result<BTreeMap<PathBuf, Vec<String>>> {
    let file = index.display().to_string();
    let fields = Fields::new(value, &file)?;
    let expected = "an object from tensor names to file names";
    let weight_map = match fields.value("weight_map") {
        Some(Value::Object(map)) if !map.is_empty() => map,
        Some(_) => return Err(fields.invalid("weight_map", expected)),
        None => return Err(fields.missing("weight_map", expected)),
    };
    let mut shards: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in weight_map {
        let Value::String(shard) = shard else {
            let (field, found) = (format!("weight_map.{tensor}"), shown(shard));
            return Err(Error::InvalidField { file, field, found, expected: "a file name".to_string() });
        };
        let relative = Path::new(shard);
        if shard.is_empty() || !relative.components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(Error::ShardOutsideDirectory {
                index: index.to_path_buf(),
                tensor: tensor.clone(),
                shard: shard.clone(),
            });
        }
        shards.entry(dir.join(relative)).or_default().push(tensor.clone());
    }
    for (shard, tensors) in &shards {
        if !shard.is_file() {
            return Err(Error::MissingShard {
                index: index.to_path_buf(),
                shard: shard.clone(),
                tensor: tensors[0].clone(),
            });
        }
    }
    Ok(shards)
}

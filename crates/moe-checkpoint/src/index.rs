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

/// How a file begins that Git checked out in place of a large one.
pub(crate) const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// The weight files of a directory.
pub(crate) enum WeightFiles {
    /// One file with everything.
    Single(PathBuf),
    /// Shards, each with the tensors that the index says it holds.
    Sharded { index: PathBuf, shards: BTreeMap<PathBuf, Vec<String>> },
}

impl WeightFiles {
    /// Finds the weights: what `model.safetensors.index.json` names, or else `model.safetensors`. An index goes before
    /// a single file beside it, which is a leftover then, unless it is the index whose shards are gone.
    pub fn find(dir: &Path) -> Result<Self> {
        let (single, index) = (dir.join(SINGLE_FILE), dir.join(INDEX_FILE));
        if !index.exists() {
            return match single.exists() {
                true => Ok(Self::Single(single)),
                false => Err(Error::NoWeights { dir: dir.to_path_buf(), hint: other_weights(dir) }),
            };
        }
        match parse(dir, &index, &read_json(&index)?) {
            Err(Error::MissingShard { shard, .. }) if single.exists() => {
                tracing::warn!(
                    "{}: not read, since its shard {} does not exist; {} is read instead",
                    index.display(),
                    shard.display(),
                    single.display()
                );
                Ok(Self::Single(single))
            }
            Err(error) => Err(error),
            Ok(shards) => {
                if single.exists() && !shards.contains_key(&single) {
                    tracing::warn!("{}: not read, since {} names other files", single.display(), index.display());
                }
                Ok(Self::Sharded { index, shards })
            }
        }
    }
}

/// Whether the name of a file is of a kind.
type IsKind<'a> = &'a dyn Fn(&str) -> bool;

/// What a directory holds in place of weights that are read, and what can be done about it.
fn other_weights(dir: &Path) -> String {
    let entries = std::fs::read_dir(dir).into_iter().flatten().filter_map(std::result::Result::ok);
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    let first = |is: IsKind<'_>| names.iter().find(|name| is(name));
    let known: [(IsKind<'_>, &str); 6] = [
        (
            &|name| name.starts_with("adapter_model.") || name == "adapter_config.json",
            "the folder holds an adapter (PEFT) and no model: open its base model and give it the adapter, or merge the two",
        ),
        (
            &|name| name.ends_with(".gguf"),
            "GGUF is the format of llama.cpp: take the original checkpoint, in safetensors",
        ),
        (
            &|name| name.starts_with("consolidated"),
            "consolidated files are the vendor's own format: take the files named model-*.safetensors from the same repository, or convert \
             by the script of transformers",
        ),
        (
            &|name| name.ends_with(".npz") || name.starts_with("weights.") && name.ends_with(".safetensors"),
            "these are weights of MLX: take the original checkpoint, or convert them back",
        ),
        (
            &|name| name.starts_with("model-") && name.ends_with(".safetensors"),
            "the shards lack their index, model.safetensors.index.json: copy it from where the model is from",
        ),
        (
            &|name| [".bin", ".pt", ".pth"].iter().any(|end| name.ends_with(end)),
            "pickled weights (.bin) are not read: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR) of transformers writes \
             safetensors",
        ),
    ];
    for (is, advice) in known {
        if let Some(name) = first(is) {
            return format!("; found {name}: {advice}");
        }
    }
    match first(&|name| name.ends_with(".safetensors")) {
        Some(name) => format!("; found {name}, which is not read under that name"),
        None => String::new(),
    }
}

/// Reads a JSON file.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(|source| Error::io(path, source))?;
    if bytes.starts_with(LFS_POINTER) {
        return Err(Error::LfsPointer { path: path.to_path_buf() });
    }
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

//! Bundled checkpoints, and edited copies of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use moe_checkpoint::{Checkpoint, Dtype};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;
use tempfile::TempDir;

/// Directory of a parity fixture, e.g. `tf5/qwen3_moe`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity").join(name)
}

/// Every bundled checkpoint.
pub fn fixtures() -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    for generation in ["tf4", "tf5"] {
        for entry in fs::read_dir(fixture(generation)).unwrap() {
            dirs.push(entry.unwrap().path());
        }
    }
    dirs.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe"));
    dirs.sort();
    assert!(dirs.len() > 10);
    dirs
}

/// A tensor in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A checkpoint in memory, to be edited.
#[derive(Clone)]
pub struct Model {
    pub config: Value,
    pub tensors: BTreeMap<String, Tensor>,
}

impl Model {
    /// Reads a directory with the `safetensors` crate, not with ours.
    pub fn load(dir: &Path) -> Self {
        let config = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        let mut tensors = BTreeMap::new();
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            if !(name.starts_with("model") && name.ends_with(".safetensors")) {
                continue;
            }
            let bytes = fs::read(path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let bytes = view.data().to_vec();
                tensors.insert(name, Tensor { dtype: view.dtype(), shape: view.shape().to_vec(), bytes });
            }
        }
        Self { config, tensors }
    }

    /// Writes `config.json` and one weight file with the `safetensors` crate.
    pub fn save(&self, dir: &Path) {
        fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        fs::write(dir.join("model.safetensors"), self.weights()).unwrap();
    }

    /// The weight file.
    pub fn weights(&self) -> Vec<u8> {
        let views = self.tensors.iter().map(|(name, tensor)| {
            (name.clone(), TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    /// Writes to a temporary directory and opens it.
    pub fn open(&self) -> (TempDir, moe_checkpoint::Result<Checkpoint>) {
        let dir = tempfile::tempdir().unwrap();
        self.save(dir.path());
        let checkpoint = Checkpoint::open(dir.path());
        (dir, checkpoint)
    }

    /// The error message of opening it.
    pub fn refusal(&self) -> String {
        message(self.open().1)
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.get_mut(name).unwrap()
    }

    /// Converts all tensors to another dtype.
    pub fn cast(&mut self, dtype: Dtype) {
        for tensor in self.tensors.values_mut() {
            assert_eq!(tensor.dtype, Dtype::F32);
            let values: Vec<f32> = tensor.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            tensor.bytes.clear();
            assert!(moe_checkpoint::encode(dtype, &values, &mut tensor.bytes));
            tensor.dtype = dtype;
        }
    }

    /// Turns per-expert tensors of all layers into the fused 3-D layout.
    pub fn fuse(&mut self) {
        for (layer, experts) in self.expert_layers() {
            let prefix = format!("model.layers.{layer}.mlp.experts");
            let (mut gate_up, mut down) = (Vec::new(), Vec::new());
            let (mut shape, mut dtype) = (Vec::new(), Dtype::F32);
            for expert in 0..experts {
                let gate = self.tensors.remove(&format!("{prefix}.{expert}.gate_proj.weight")).unwrap();
                gate_up.extend_from_slice(&gate.bytes);
                gate_up.extend(self.tensors.remove(&format!("{prefix}.{expert}.up_proj.weight")).unwrap().bytes);
                down.extend(self.tensors.remove(&format!("{prefix}.{expert}.down_proj.weight")).unwrap().bytes);
                (shape, dtype) = (gate.shape, gate.dtype);
            }
            let (width, hidden) = (shape[0], shape[1]);
            let gate_up = Tensor { dtype, shape: vec![experts, 2 * width, hidden], bytes: gate_up };
            let down = Tensor { dtype, shape: vec![experts, hidden, width], bytes: down };
            self.tensors.insert(format!("{prefix}.gate_up_proj"), gate_up);
            self.tensors.insert(format!("{prefix}.down_proj"), down);
        }
    }

    /// MoE layers and their number of experts, from per-expert names.
    pub fn expert_layers(&self) -> BTreeMap<usize, usize> {
        let mut layers = BTreeMap::new();
        for name in self.tensors.keys() {
            let parts: Vec<_> = name.split('.').collect();
            if let ["model", "layers", layer, "mlp", "experts", _, "gate_proj", "weight"] = parts[..] {
                *layers.entry(layer.parse().unwrap()).or_default() += 1;
            }
        }
        layers
    }
}

/// The message of an error.
pub fn message<T>(result: moe_checkpoint::Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(error) => error.to_string(),
    }
}

/// Fails unless `text` has all of `parts`.
pub fn assert_parts(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

/// Copies the files of a directory.
pub fn copy_dir(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

//! Bundled checkpoints, and helpers of the tests of several crates that read and write them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use moe_checkpoint::{
    Checkpoint, Denominator, Dtype, ExpertTensor, ExpertWeights, Granularity, LayerScores, Pool, Provenance,
    ScoreTable, ShardedWriter, TensorSpec, WriterOptions, copy_side_files,
};

/// The workspace that the tests of any of its packages are in.
fn workspace() -> &'static Path {
    let mut above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    above.find(|dir| dir.join("crates/moe-checkpoint").is_dir()).unwrap()
}

/// A parity checkpoint: `tf4/qwen2_moe`.
pub fn parity(name: &str) -> PathBuf {
    workspace().join("crates/moe-checkpoint/tests/fixtures/parity").join(name)
}

/// A checkpoint of a model that is not run: `qwen3_5_moe`.
pub fn unrun(name: &str) -> PathBuf {
    parity("../unrun").join(name)
}

/// Every bundled checkpoint: whatever is in the fixture directories, and the trained model.
pub fn every_checkpoint() -> Vec<PathBuf> {
    let list = |dir: PathBuf| fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let dirs = [parity("tf4"), parity("tf5"), unrun("")];
    let mut found: Vec<PathBuf> = dirs.into_iter().flat_map(list).chain([tiny_moe()]).collect();
    found.sort();
    found
}

/// The bundled trained model.
pub fn tiny_moe() -> PathBuf {
    workspace().join("examples/assets/tiny-moe")
}

/// Squared norm of every unit's triple: scores that need no run of the model.
pub fn magnitude(checkpoint: &Checkpoint) -> ScoreTable {
    let layers = checkpoint.shape().layers.iter().map(|layer| LayerScores {
        layer: layer.layer,
        scores: (0..layer.num_experts()).map(|e| norms(&checkpoint.expert(layer.layer, e).unwrap())).collect(),
        routed: None,
        whole: None,
    });
    ScoreTable {
        scorer: r#"{"type":"magnitude"}"#.into(),
        granularity: Granularity::Unit,
        pool: Pool::Global,
        additive: Some(Pool::Global),
        denominator: Denominator::None,
        layers: layers.collect(),
        provenance: Provenance::new(checkpoint.fingerprint(), "", "{}"),
    }
}

fn norms(expert: &ExpertWeights) -> Vec<f32> {
    let ExpertWeights { gate, up, down, width, hidden, .. } = expert;
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
    (0..*width)
        .map(|j| {
            square(&mut gate[j * hidden..(j + 1) * hidden].iter().copied())
                + square(&mut up[j * hidden..(j + 1) * hidden].iter().copied())
                + square(&mut (0..*hidden).map(|h| down[h * width + j]))
        })
        .collect()
}

/// The same model with its routed experts in two 3-D tensors per layer.
pub fn fuse(from: &Checkpoint, to: &Path) {
    fs::create_dir_all(to).unwrap();
    copy_side_files(from.dir(), to).unwrap();
    fs::copy(from.dir().join("config.json"), to.join("config.json")).unwrap();
    let shape = from.shape();
    let mut tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for info in from.tensors() {
        let value = (info.dtype, info.shape.clone(), from.bytes(&info.name).unwrap().to_vec());
        tensors.insert(info.name.clone(), value);
    }
    for layer in &shape.layers {
        let (experts, width) = (layer.num_experts(), layer.widths[0]);
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        let mut dtype = Dtype::F32;
        for expert in 0..experts {
            for tensor in [ExpertTensor::Gate(expert), ExpertTensor::Up(expert), ExpertTensor::Down(expert)] {
                let (found, _, bytes) = tensors.remove(&from.expert_tensor_name(layer.layer, tensor)).unwrap();
                dtype = found;
                if matches!(tensor, ExpertTensor::Down(_)) { &mut down } else { &mut gate_up }.extend(bytes);
            }
        }
        let name = |tensor| from.expert_tensor_name(layer.layer, tensor);
        let gate_up_shape = vec![experts, 2 * width, shape.hidden_size];
        tensors.insert(name(ExpertTensor::FusedGateUp), (dtype, gate_up_shape, gate_up));
        tensors.insert(name(ExpertTensor::FusedDown), (dtype, vec![experts, shape.hidden_size, width], down));
    }
    let specs = tensors.iter().map(|(name, (dtype, shape, _))| TensorSpec {
        name: name.clone(),
        dtype: *dtype,
        shape: shape.clone(),
    });
    let mut writer = ShardedWriter::new(to, WriterOptions::default(), specs.collect()).unwrap();
    for (name, (_, _, bytes)) in &tensors {
        writer.write(name, bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// Dtype, shape and bytes of every tensor.
pub fn contents(checkpoint: &Checkpoint) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let tensors = checkpoint.tensors();
    let content = |name: &str| checkpoint.bytes(name).unwrap().to_vec();
    tensors.map(|info| (info.name.clone(), (info.dtype, info.shape.clone(), content(&info.name)))).collect()
}

/// Files of a directory by name.
pub fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    entries
        .filter(|entry| entry.path().is_file())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect()
}

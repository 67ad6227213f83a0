//! Fixtures and helpers of the tests that read and write checkpoints.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

#[path = "../../../moe-checkpoint/tests/common/checkpoints.rs"]
mod checkpoints;

#[allow(unused_imports)]
pub use checkpoints::{contents, every_checkpoint, files, fuse, magnitude, parity, tiny_moe, unrun};
use moe_checkpoint::{Checkpoint, Dtype, WriteOptions, write};
use moe_prune::{Budget, ProtectionMask, PruneOptions, PrunePlan, Pruner, Report, Scope, UnitPruner};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;

/// A magnitude plan.
pub fn plan(checkpoint: &Checkpoint, scope: Scope, ratio: f64) -> PrunePlan {
    let scores = magnitude(checkpoint);
    let pruner = UnitPruner::new(scope);
    pruner.prune(&scores, checkpoint.shape(), Budget::Ratio(ratio), &ProtectionMask::none()).unwrap().plan
}

/// Writes what a plan makes of a checkpoint; see [`write_plan_with`].
pub fn write_plan(
    plan: &PrunePlan,
    model: &Checkpoint,
    to: impl AsRef<Path>,
    options: &PruneOptions<'_>,
) -> moe_prune::Result<Report> {
    write_plan_with(plan, model, to, options, &WriteOptions::default())
}

/// Writes what a plan makes of a checkpoint, which is opened anew for it, and checks that the model reads the same
/// written and unwritten, and that the report counts what was written.
pub fn write_plan_with(
    plan: &PrunePlan,
    model: &Checkpoint,
    to: impl AsRef<Path>,
    options: &PruneOptions<'_>,
    write_options: &WriteOptions<'_>,
) -> moe_prune::Result<Report> {
    let pruned = plan.on(&Arc::new(Checkpoint::open(model.dir())?), options)?;
    let written = write(pruned.model(), &to, write_options)?;
    let reopened = Checkpoint::open(&to)?;
    assert_eq!(contents(&reopened), contents(pruned.model()));
    assert_eq!(reopened.raw_config(), pruned.model().raw_config());
    for layer in &reopened.shape().layers {
        for expert in 0..layer.num_experts() {
            let [a, b] = [&reopened, pruned.model()].map(|model| model.expert(layer.layer, expert).unwrap());
            assert_eq!(a, b, "layer {}, expert {expert}", layer.layer);
        }
    }
    let report = pruned.report();
    assert_eq!((report.bytes.after, report.parameters.after), (written.bytes, written.parameters));
    assert_eq!((report.bytes.after, report.parameters.after), (reopened.bytes_on_disk(), reopened.parameters()));
    for layer in &report.layers {
        assert_eq!(layer.bytes.after, reopened.expert_bytes_on_disk(layer.layer)?);
    }
    Ok(report.clone())
}

/// Tensors of a checkpoint in memory: dtype, shape, bytes.
pub type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Config and tensors of a checkpoint of one file.
pub fn load(dir: &Path) -> (Value, Tensors) {
    let config = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
    let bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter();
    (config, tensors.map(|(n, v)| (n, (v.dtype(), v.shape().to_vec(), v.data().to_vec()))).collect())
}

/// Writes them as one.
pub fn save(dir: &Path, config: &Value, tensors: &Tensors) -> Checkpoint {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let views =
        tensors.iter().map(|(n, (dtype, shape, bytes))| (n, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    Checkpoint::open(dir).unwrap()
}

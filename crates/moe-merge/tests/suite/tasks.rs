//! Several checkpoints of one base in one; compressed experts.

use crate::common;

use std::path::Path;
use std::sync::Arc;

use common::{contents, noise, open, parity, plain, plan, written};
use moe_checkpoint::{Checkpoint, Dtype, ExpertTensor, LayerRole, Role, WriteOptions, encode, write};
use moe_merge::{
    CompactModel, Compression, MergeOptions, OutputForm, Ranks, RowScore, TaskArithmetic, TaskRuleConfig, Ties,
};
use tempfile::tempdir;

/// The base with noise on the gate of one expert per layer, written in place of the original.
fn tuned(base: &Checkpoint, to: &Path, expert: usize, seed: u64) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(base.dir()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
    for layer in &base.shape().layers {
        disturb(base, to, &base.expert_tensor_name(layer.layer, ExpertTensor::Gate(expert)), seed);
    }
}

/// Noise on a tensor of the base in the copy of it in this directory.
fn disturb(base: &Checkpoint, to: &Path, name: &str, seed: u64) {
    let file = to.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let old = base.bytes(name).unwrap().to_vec();
    let values = base.tensor_f32(name).unwrap();
    let moved: Vec<f32> = values.iter().zip(noise(values.len(), seed)).map(|(v, n)| v + 0.1 * n).collect();
    let mut new = Vec::new();
    assert!(encode(Dtype::F32, &moved, &mut new));
    let at = bytes.windows(old.len()).position(|window| window == old).unwrap();
    bytes[at..at + old.len()].copy_from_slice(&new);
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn tasks_are_added_to_the_experts_they_changed() {
    let directory = tempdir().unwrap();
    let base = open(parity("tf4/qwen2_moe"));
    let dirs = [1usize, 2].map(|expert| {
        let dir = directory.path().join(format!("tuned-{expert}"));
        tuned(&base, &dir, expert, expert as u64);
        open(dir)
    });
    let tuned = dirs;
    let sum = TaskRuleConfig::TaskArithmetic(TaskArithmetic { scales: vec![1.0] });
    let run = |rule: &TaskRuleConfig, tuned: &[Arc<Checkpoint>], name: &str| {
        let out = directory.path().join(name);
        write(rule.on(&base, tuned).unwrap().model(), &out, &WriteOptions::default()).unwrap();
        open(out)
    };
    // One task with factor 1 is that model; none of it is the base.
    let one = run(&sum, &tuned[..1], "one");
    for (name, (.., found)) in contents(&one) {
        let values =
            |bytes: &[u8]| -> Vec<f32> { bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect() };
        let expected = values(&tuned[0].bytes(&name).unwrap());
        assert!(values(&found).iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6), "{name}");
    }
    let none = TaskRuleConfig::TaskArithmetic(TaskArithmetic { scales: vec![0.0] });
    assert!(contents(&run(&none, &tuned, "none")) == contents(&base));
    // Disjoint tasks add up, by any rule that does not trim.
    let both = run(&sum, &tuned, "both");
    let ties = run(&TaskRuleConfig::Ties(Ties { density: 1.0, scale: 1.0 }), &tuned, "ties");
    for layer in &base.shape().layers {
        for expert in 0..layer.num_experts() {
            let of = |model: &Checkpoint| model.expert(layer.layer, expert).unwrap();
            let expected = if expert == 2 { of(&tuned[1]) } else { of(&tuned[0]) };
            let (found, elected) = (of(&both), of(&ties));
            assert!(found.gate.iter().zip(&expected.gate).all(|(a, b)| (a - b).abs() < 1e-6));
            assert!(elected.gate.iter().zip(&expected.gate).all(|(a, b)| (a - b).abs() < 1e-6));
            if expert != 1 && expert != 2 {
                assert_eq!(found, of(&base));
            }
        }
    }
    let other = open(parity("tf4/mixtral"));
    let error = sum.on(&base, &[other]).unwrap_err();
    assert!(error.to_string().contains("mixtral"));
}

#[test]
fn what_tasks_have_learnt_outside_the_experts_is_listed_as_left_at_the_base() {
    let directory = tempdir().unwrap();
    let base = open(parity("tf4/qwen2_moe"));
    let dirs = [1usize, 2].map(|expert| {
        let dir = directory.path().join(format!("tuned-{expert}"));
        tuned(&base, &dir, expert, expert as u64);
        dir
    });
    let name = |role| base.family().tensor_name(Role::Layer(0, role));
    let (query, router) = (name(LayerRole::Query), name(LayerRole::Router));
    disturb(&base, &dirs[0], &query, 5);
    disturb(&base, &dirs[1], &query, 6);
    disturb(&base, &dirs[1], &router, 7);
    let merged = TaskRuleConfig::Ties(Ties { density: 1.0, scale: 1.0 }).on(&base, &dirs.map(open)).unwrap();
    let report = merged.report();
    let changed = |kind: &str| report.left.iter().find(|left| left.kind == kind).map(|left| left.changed);
    assert_eq!((changed("attention"), changed("router")), (Some(1), Some(1)), "{report}");
    assert_eq!(report.left.iter().map(|left| left.changed).sum::<usize>(), 2, "{report}");
    // Every tensor outside the routed experts is one of those listed.
    let outside = base.tensors().filter(|info| !info.name.contains(".experts.")).count();
    assert_eq!(report.left.iter().map(|left| left.tensors).sum::<usize>(), outside, "{report}");
    assert_eq!(report.notes().len(), 2);
    assert!(report.to_string().contains("stay that of the base"), "{report}");
    let step = merged.model().steps().last().unwrap();
    assert!(step.summary.contains("though tasks changed attention, router"), "{}", step.summary);
    let left = &step.recipe["report"]["left"];
    assert_eq!(*left, serde_json::json!(report.left), "the record has them, too");
    for tensor in [query, router] {
        assert_eq!(merged.model().bytes(&tensor).unwrap(), base.bytes(&tensor).unwrap(), "{tensor}");
    }
}

fn moe_of(model: &Checkpoint, layer: usize) -> &moe_checkpoint::MoeConfig {
    model.config().moe(layer).unwrap()
}

#[test]
fn a_merged_checkpoint_is_compressed_once_per_set() {
    let directory = tempdir().unwrap();
    let model = open(parity("tf5/qwen2_moe"));
    let merged = directory.path().join("merged");
    written(&plan(&plain(0.5), &model), &model, &merged, &MergeOptions::new(OutputForm::Grouped)).unwrap();
    let merged = open(merged);
    let how = Compression { rank: 4, keep_rows: 0.25, rows: RowScore::Magnitude, ranks: Ranks::Same };
    let out = directory.path().join("compact");
    let report = how.compress(&merged, &out, None, false).unwrap();
    let compact = CompactModel::open(&out).unwrap();
    assert_eq!((compact.report(), compact.compression(), compact.model()), (&report, &how, &*merged.fingerprint()));
    assert_eq!(report.rows_kept, report.rows / 4);
    assert!(report.bytes_after < report.bytes_before && report.parameters_after < report.parameters_before);
    let (mut parameters, mut kept) = (0, 0);
    for layer in &merged.shape().layers {
        let moe = merged.config().moe(layer.layer).unwrap();
        for set in 0..moe.stored_widths().len() {
            let expert = compact.expert(layer.layer, set).unwrap();
            parameters += expert.parameters() as u64;
            kept += [&expert.gate, &expert.up, &expert.down].iter().map(|m| m.kept.len() as u64).sum::<u64>();
            assert_eq!(expert.gate.rank, 4);
        }
    }
    assert_eq!((parameters, kept), (report.parameters_after, report.rows_kept));
    // Everything kept: the expert itself.
    let whole = directory.path().join("whole");
    Compression { keep_rows: 1.0, ..how }.compress(&merged, &whole, None, false).unwrap();
    let whole = CompactModel::open(&whole).unwrap();
    let layer = merged.shape().layers[0].layer;
    let (found, expected) =
        (whole.expert(layer, moe_of(&merged, layer).stored(0)).unwrap().dense(), merged.expert(layer, 0).unwrap());
    assert!(found.gate.iter().zip(&expected.gate).all(|(a, b)| (a - b).abs() < 1e-5));
    let fisher = Compression { rows: RowScore::Fisher, ..how };
    assert!(fisher.compress(&merged, &directory.path().join("y"), None, false).is_err());
}

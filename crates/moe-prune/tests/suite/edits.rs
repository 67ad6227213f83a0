//! Edits carried out on checkpoints: what is written computes what a model edited by hand computes.

use crate::common;
use crate::run;

use std::cell::Cell;
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::{contents, files, fuse, magnitude, parity, plan, write_plan, write_plan_with};
use moe_checkpoint::{
    Checkpoint, Dtype, Existing, ExpertBiases, ExpertTensor, ExpertWeights, LayerRole, Record, Role, WriteOptions,
    encode,
};
use moe_core::ExpertOverlay;
use moe_prune::{
    Budget, EditSource, Edits, EditsFile, ExpertEdit, ExpertPruner, PRUNE_METHOD, ProtectionMask, PruneForm,
    PruneOptions, PrunePlan, PruneRecord, Pruner, Scope, UnitPruner,
};
use run::{difference, logits, overlaid_logits};
use safetensors::tensor::TensorView;
use tempfile::tempdir;

/// Values without a pattern, about as large as weights.
fn values(count: usize, salt: usize) -> Vec<f32> {
    let noise = |i: usize| ((i + 7919 * salt).wrapping_mul(2_654_435_761) >> 8) % 2001;
    (0..count).map(|i| (noise(i) as f32 / 1000.0 - 1.0) * 0.2).collect()
}

/// Edits of some experts and of the router of the last MoE layer.
fn edits(plan: &PrunePlan, biases: bool) -> Edits {
    let hidden = plan.shape.hidden_size;
    let mut edits = Edits::new();
    for kept in &plan.kept {
        for expert in kept.experts_kept() {
            let salt = kept.layer * 100 + expert;
            let down = (expert % 3 != 1).then(|| values(hidden * kept.experts[expert].len(), salt));
            let down_bias = (biases && expert % 2 == 0).then(|| values(hidden, salt + 31));
            edits.set_expert(kept.layer, expert, ExpertEdit { down, down_bias });
        }
    }
    if let Some(last) = plan.kept.last() {
        edits.set_router(last.layer, values(last.experts.len() * hidden, 5));
    }
    edits
}

/// What a plan and edits make of experts, in f32.
struct Edited {
    plan: PrunePlan,
    edits: Edits,
    /// Whether the weights that come in are those of the pruned checkpoint, by their new indices.
    pruned: bool,
}

impl ExpertOverlay for Edited {
    fn apply(&self, layer: usize, expert: usize, full: ExpertWeights) -> moe_core::Result<ExpertWeights> {
        let kept = self.plan.layer(layer).unwrap();
        let expert = if self.pruned { kept.experts_kept()[expert] } else { expert };
        let edit = self.edits.expert(layer, expert).unwrap().unwrap_or_default();
        Ok(ExpertWeights { down: edit.down.unwrap_or(full.down), down_bias: edit.down_bias.or(full.down_bias), ..full })
    }
}

fn apply(plan: &PrunePlan, model: &Checkpoint, out: &Path, form: PruneForm<'_>, edits: Option<&Edits>) -> Checkpoint {
    write_plan(plan, model, out, &PruneOptions { edits: shared(edits), ..PruneOptions::new(form) }).unwrap();
    Checkpoint::open(out).unwrap()
}

fn shared(edits: Option<&Edits>) -> Option<Arc<dyn EditSource>> {
    edits.map(|edits| Arc::new(edits.clone()) as Arc<dyn EditSource>)
}

/// The same checkpoint with other values in some tensors, rounded to their dtype.
fn edit_by_hand(from: &Checkpoint, to: &Path, changes: &[(String, Vec<f32>)]) {
    fs::create_dir_all(to).unwrap();
    fs::copy(from.dir().join("config.json"), to.join("config.json")).unwrap();
    let mut tensors = Vec::new();
    for info in from.tensors() {
        let mut bytes = Vec::new();
        match changes.iter().find(|(name, _)| *name == info.name) {
            Some((_, values)) => assert!(encode(info.dtype, values, &mut bytes)),
            None => bytes.extend_from_slice(&from.bytes(&info.name).unwrap()),
        }
        tensors.push((info, bytes));
    }
    let views = tensors
        .iter()
        .map(|(info, bytes)| (info.name.as_str(), TensorView::new(info.dtype, info.shape.clone(), bytes).unwrap()));
    let file = safetensors::serialize(views.collect::<Vec<_>>(), None::<HashMap<String, String>>).unwrap();
    fs::write(to.join("model.safetensors"), file).unwrap();
}

#[test]
fn an_edited_export_is_the_pruned_one_edited_by_hand() {
    let directory = tempdir().unwrap();
    for name in ["tf5/qwen2_moe", "tf5/qwen2_moe_bf16", "tf5/deepseek_v3", "tf4/phimoe"] {
        let at = |what: &str| directory.path().join(format!("{}-{what}", name.replace('/', "-")));
        let model = Checkpoint::open(parity(name)).unwrap();
        let plan = plan(&model, Scope::Expert, 0.4);
        let edits = edits(&plan, false);
        let pruned = apply(&plan, &model, &at("pruned"), PruneForm::Uniform, None);
        let edited = apply(&plan, &model, &at("edited"), PruneForm::Uniform, Some(&edits));
        let mut changes = Vec::new();
        for ((layer, expert), edit) in edits.experts() {
            changes.push((model.expert_tensor_name(layer, ExpertTensor::Down(expert)), edit.down.clone().unwrap()));
        }
        for (layer, weight) in edits.routers() {
            changes.push((model.family().tensor_name(Role::Layer(layer, LayerRole::Router)), weight.to_vec()));
        }
        edit_by_hand(&pruned, &at("by_hand"), &changes);
        assert_eq!(contents(&edited), contents(&Checkpoint::open(at("by_hand")).unwrap()), "{name}");
        assert_eq!(logits(&at("edited")), logits(&at("by_hand")), "{name}");
        assert_ne!(logits(&at("edited")), logits(&at("pruned")), "{name}");
        // A masked and a ragged export hold the same numbers.
        for mode in [PruneForm::Masked, PruneForm::Ragged] {
            let out = apply(&plan, &model, &at(mode.name()), mode, Some(&edits));
            let found = difference(&logits(out.dir()), &logits(edited.dir()));
            assert!(found < 1e-5, "{name} {mode}: {found}");
        }
        let record = Record::load(edited.dir()).unwrap();
        let applied: PruneRecord = record.recipe(PRUNE_METHOD).unwrap().unwrap();
        assert_eq!(applied.edits, Some(edits.digest()));
    }
}

#[test]
fn biases_of_down_are_part_of_a_ragged_checkpoint() {
    let directory = tempdir().unwrap();
    for name in ["tf5/qwen3_moe", "tf5/qwen2_moe_bf16", "tf4/mixtral", "tf5/ernie4_5_moe"] {
        let at = |what: &str| directory.path().join(format!("{}-{what}", name.replace('/', "-")));
        let model = Checkpoint::open(parity(name)).unwrap();
        let mut scores = magnitude(&model);
        // One expert becomes nothing but its bias, and one nothing at all.
        let layer = scores.layers[1].layer;
        scores.layers[1].scores[0].fill(0.0);
        scores.layers[1].scores[1].fill(0.0);
        let plan = UnitPruner::new(Scope::Layer)
            .prune(&scores, model.shape(), Budget::Ratio(0.6), &ProtectionMask::none())
            .unwrap()
            .plan;
        let mut edits = edits(&plan, true);
        edits.set_expert(layer, 1, ExpertEdit::default());
        // The router stays, so that an overlay is all there is to the model.
        let mut without_router = Edits::new();
        edits.experts().for_each(|((l, e), edit)| without_router.set_expert(l, e, edit.clone()));
        let bias = values(model.shape().hidden_size, 77);
        without_router.set_expert(layer, 0, ExpertEdit { down: None, down_bias: Some(bias.clone()) });
        let edits = without_router;

        apply(&plan, &model, &at("pruned"), PruneForm::Ragged, None);
        let out = apply(&plan, &model, &at("edited"), PruneForm::Ragged, Some(&edits));
        assert_eq!(out.raw_config()["moe_ragged"]["version"], 2);
        assert_eq!(out.config().moe(layer).unwrap().biases, ExpertBiases::Down);
        let novice = out.expert(layer, 0).unwrap();
        assert_eq!((novice.width, novice.gate_bias), (0, None));
        let rounding = if model.expert_dtype(layer, 0, moe_checkpoint::ExpertPart::Down).unwrap() == Some(Dtype::F32) {
            0.0
        } else {
            1.0 / 256.0
        };
        let found = novice.down_bias.unwrap();
        assert!(found.iter().zip(&bias).all(|(a, b)| (a - b).abs() <= rounding * b.abs()));
        assert_eq!(out.expert(layer, 1).unwrap().down_bias, Some(vec![0.0; bias.len()]));
        let by_hand = overlaid_logits(&at("pruned"), Edited { plan: plan.clone(), edits: edits.clone(), pruned: true });
        let found = difference(&logits(out.dir()), &by_hand);
        assert!(found < if rounding > 0.0 { 2e-2 } else { 1e-5 }, "{name}: {found}");
        assert!(difference(&logits(&at("pruned")), &by_hand) > 1e-2, "{name}: the edits change nothing");

        // The ragged checkpoint is pruned further, its biases stay; no stock format has a place for them.
        let keep = PrunePlan::keep_all(out.shape(), out.fingerprint());
        let copy = apply(&keep, &out, &at("copy"), PruneForm::Ragged, None);
        assert_eq!(contents(&copy), contents(&out));
        assert_eq!(copy.raw_config(), out.raw_config());
        let again = common::plan(&out, Scope::Layer, 0.2);
        let twice = apply(&again, &out, &at("twice"), PruneForm::Ragged, None);
        assert_eq!(twice.expert(layer, 0).unwrap().down_bias, out.expert(layer, 0).unwrap().down_bias);
        let refused = |mode, plan: &PrunePlan, from: &Checkpoint, edits: Option<&Edits>| {
            let options = PruneOptions { edits: shared(edits), allow_unaligned: true, ..PruneOptions::new(mode) };
            write_plan(plan, from, at("refused"), &options).unwrap_err().to_string()
        };
        let plan = common::plan(&model, Scope::Expert, 0.4);
        let edits = self::edits(&plan, true);
        for mode in [PruneForm::Uniform, PruneForm::Masked] {
            let text = refused(mode, &plan, &model, Some(&edits));
            assert!(text.contains("export as ragged") && text.contains("expert 0 of layer"), "{text}");
        }
        // One width for all, but the biases are in the way.
        let flat = apply(&plan, &model, &at("flat"), PruneForm::Ragged, Some(&edits));
        let keep = PrunePlan::keep_all(flat.shape(), flat.fingerprint());
        let text = refused(PruneForm::Uniform, &keep, &flat, None);
        assert!(text.contains("have a bias on their output"), "{text}");
    }
}

#[test]
fn experts_with_biases_of_their_own_get_others_in_every_export() {
    let directory = tempdir().unwrap();
    for name in ["tf4/gpt_oss", "tf5/gpt_oss"] {
        let at = |what: &str| directory.path().join(format!("{}-{what}", name.replace('/', "-")));
        let model = Checkpoint::open(parity(name)).unwrap();
        let plan = plan(&model, Scope::Expert, 0.4);
        let mut edits = Edits::new();
        self::edits(&plan, true).experts().for_each(|((l, e), edit)| edits.set_expert(l, e, edit.clone()));
        apply(&plan, &model, &at("pruned"), PruneForm::Uniform, None);
        let expected =
            overlaid_logits(&at("pruned"), Edited { plan: plan.clone(), edits: edits.clone(), pruned: true });
        for mode in [PruneForm::Uniform, PruneForm::Masked, PruneForm::Ragged] {
            let out = apply(&plan, &model, &at(mode.name()), mode, Some(&edits));
            let found = difference(&logits(out.dir()), &expected);
            assert!(found < 1e-5, "{name} {mode}: {found}");
            for ((layer, expert), edit) in edits.experts() {
                let Some(bias) = &edit.down_bias else { continue };
                assert_eq!(out.expert(layer, expert).unwrap().down_bias.as_ref(), Some(bias));
            }
        }
        assert_eq!(Checkpoint::open(at("ragged")).unwrap().raw_config()["moe_ragged"]["version"], 1);
    }
}

#[test]
fn edited_routers_lose_the_rows_of_removed_experts() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(parity("tf5/qwen2_moe")).unwrap();
    let scores = magnitude(&model).to_experts(moe_checkpoint::Reduction::Sum).unwrap();
    let plan =
        ExpertPruner::new().prune(&scores, model.shape(), Budget::Ratio(0.3), &ProtectionMask::none()).unwrap().plan;
    let edits = edits(&plan, false);
    let out = apply(&plan, &model, &directory.path().join("out"), PruneForm::Uniform, Some(&edits));
    let (layer, weight) = edits.routers().next().unwrap();
    let hidden = model.shape().hidden_size;
    let kept = plan.layer(layer).unwrap().experts_kept();
    assert!(kept.len() < model.shape().layers[0].num_experts());
    let expected: Vec<f32> = kept.iter().flat_map(|e| weight[e * hidden..(e + 1) * hidden].to_vec()).collect();
    assert_eq!(out.read_f32(Role::Layer(layer, LayerRole::Router)).unwrap(), expected);
}

#[test]
fn fused_and_per_expert_layouts_take_edits_alike() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(parity("tf5/qwen2_moe_bf16")).unwrap();
    let path = directory.path().join("fused");
    fuse(&model, &path);
    let fused = Checkpoint::open(&path).unwrap();
    let [a, b] = [("a", &model), ("b", &fused)].map(|(letter, from)| {
        let plan = plan(from, Scope::Expert, 0.4);
        apply(&plan, from, &directory.path().join(letter), PruneForm::Uniform, Some(&edits(&plan, false)))
    });
    for layer in &a.shape().layers {
        for expert in 0..layer.num_experts() {
            assert_eq!(a.expert(layer.layer, expert).unwrap(), b.expert(layer.layer, expert).unwrap());
        }
    }
}

#[test]
fn no_edits_change_nothing() {
    let directory = tempdir().unwrap();
    for name in ["tf5/qwen3_moe", "tf5/gpt_oss"] {
        let model = Checkpoint::open(parity(name)).unwrap();
        let keep = PrunePlan::keep_all(model.shape(), model.fingerprint());
        let out = directory.path().join(name.replace('/', "-"));
        let copy = apply(&keep, &model, &out, PruneForm::Uniform, Some(&Edits::new()));
        assert_eq!(contents(&copy), contents(&model));
        assert_eq!(copy.fingerprint(), model.fingerprint());
    }
}

#[test]
fn an_interrupted_export_goes_on_with_the_same_edits_only() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(common::tiny_moe()).unwrap();
    let plan = plan(&model, Scope::Global, 0.5);
    let edits = edits(&plan, true);
    let path = directory.path().join("edits.safetensors");
    edits.save(&path, &plan).unwrap();
    let file = EditsFile::open(&path, &plan).unwrap();
    let with = |edits| PruneOptions { edits, ..PruneOptions::new(PruneForm::Ragged) };
    let options = with(shared(Some(&edits)));
    let sharded = WriteOptions { max_shard_bytes: 300_000, ..Default::default() };
    let through = directory.path().join("through");
    write_plan_with(&plan, &model, &through, &options, &sharded).unwrap();
    let out = directory.path().join("out");
    let calls = Cell::new(0);
    let stop = |progress: &moe_prune::Progress<'_>| {
        calls.set(calls.get() + 1);
        if progress.done > progress.total / 2 { Err("stopped".into()) } else { Ok(()) }
    };
    write_plan_with(&plan, &model, &out, &options, &WriteOptions { progress: Some(&stop), ..sharded }).unwrap_err();
    assert!(calls.get() > 1);
    let resume = WriteOptions { existing: Existing::Resume, ..sharded };
    assert!(write_plan_with(&plan, &model, &out, &with(None), &resume).is_err());
    // From memory or from a file: the digest is that of the values.
    write_plan_with(&plan, &model, &out, &with(Some(Arc::new(file))), &resume).unwrap();
    assert_eq!(files(&out), files(&through));
}

#[test]
fn values_that_do_not_fit_are_named() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(parity("tf5/qwen2_moe_bf16")).unwrap();
    let keep = PrunePlan::keep_all(model.shape(), model.fingerprint());
    let layer = keep.kept[0].layer;
    let width = keep.kept[0].experts[3].len();
    let mut edits = Edits::new();
    let down = vec![f32::MAX; model.shape().hidden_size * width];
    edits.set_expert(layer, 3, ExpertEdit { down: Some(down), down_bias: None });
    let options = PruneOptions { edits: shared(Some(&edits)), ..PruneOptions::new(PruneForm::Uniform) };
    let text = write_plan(&keep, &model, directory.path().join("out"), &options).unwrap_err().to_string();
    assert!(text.contains(&format!("layer {layer}, expert 3")) && text.contains("too large for BF16"), "{text}");
    edits.set_expert(layer, 3, ExpertEdit { down: Some(vec![1.0]), down_bias: None });
    let options = PruneOptions { edits: shared(Some(&edits)), ..PruneOptions::new(PruneForm::Uniform) };
    let text = write_plan(&keep, &model, directory.path().join("other"), &options).unwrap_err().to_string();
    assert!(text.contains("down has 1 values") && !directory.path().join("other.partial").exists(), "{text}");
}

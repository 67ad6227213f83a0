//! Layers of multi-token prediction, pruned like the decoder: one that is a copy of a decoder layer becomes what that
//! becomes under scores of the same kind.

use crate::common;

use std::path::{Path, PathBuf};

use common::{contents, load, parity, save, write_plan};
use moe_checkpoint::{Checkpoint, Reduction, ScoreTable};
use moe_prune::{
    Budget, ExpertPruner, FineGrained, Mtp, ProtectionMask, PruneForm, PruneOptions, PrunePlan, Pruner, Scope,
    UnitPruner,
};
use serde_json::json;
use tempfile::tempdir;

/// A model whose further layer is a copy of a decoder layer, and both their prefixes.
fn with_further_layer(from: &Path, source: &str, prefix: &str, key: &[&str], out: &Path) -> Checkpoint {
    let (mut config, mut tensors) = load(from);
    let copies: Vec<_> = tensors
        .iter()
        .filter(|(name, _)| name.starts_with(source))
        .map(|(name, tensor)| (name.replacen(source, prefix, 1), tensor.clone()))
        .collect();
    assert!(copies.iter().any(|(name, _)| name.contains(".experts.")));
    tensors.extend(copies);
    let mut inner = &mut config;
    for key in key {
        inner = &mut inner[key];
    }
    *inner = json!(1);
    save(out, &config, &tensors)
}

/// Products of the norms of every unit's gate row, up row and down column.
fn products(model: &Checkpoint) -> ScoreTable {
    let mut table = common::magnitude(model);
    for layer in &mut table.layers {
        for (expert, scores) in layer.scores.iter_mut().enumerate() {
            let weights = model.expert(layer.layer, expert).unwrap();
            let norm = |values: Vec<f32>| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            for (unit, score) in scores.iter_mut().enumerate() {
                let row = unit * weights.hidden..(unit + 1) * weights.hidden;
                let column = (0..weights.hidden).map(|h| weights.down[h * weights.width + unit]).collect();
                let product = norm(weights.gate[row.clone()].to_vec()) * norm(weights.up[row].to_vec()) * norm(column);
                *score = product as f32;
            }
        }
    }
    table
}

/// Source directory, decoder layer, further layer, config key.
type Case = (PathBuf, &'static str, &'static str, &'static [&'static str]);

fn cases() -> Vec<Case> {
    let unrun = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/unrun");
    vec![
        (parity("tf5/deepseek_v3"), "model.layers.2.", "model.layers.3.", &["num_nextn_predict_layers"]),
        (parity("tf5/deepseek_v3_fp8"), "model.layers.1.", "model.layers.2.", &["num_nextn_predict_layers"]),
        (parity("tf5/glm4_moe"), "model.layers.2.", "model.layers.3.", &["num_nextn_predict_layers"]),
        (unrun.join("qwen3_5_moe_text"), "model.layers.3.", "mtp.layers.0.", &["mtp_num_hidden_layers"]),
        (
            unrun.join("qwen3_5_moe"),
            "model.language_model.layers.3.",
            "mtp.layers.0.",
            &["text_config", "mtp_num_hidden_layers"],
        ),
    ]
}

/// Checks that the further layer of an export is what the decoder layer became, and returns the export.
fn check(
    model: &Checkpoint,
    plan: &PrunePlan,
    options: &PruneOptions<'_>,
    out: &Path,
    (source, further): (&str, &str),
) {
    let report = write_plan(plan, model, out, options).unwrap();
    let out = Checkpoint::open(out).unwrap();
    assert_eq!(report.bytes.after, out.bytes_on_disk());
    let tensors = contents(&out);
    let mut compared = 0;
    for (name, content) in tensors.range(further.to_string()..) {
        let Some(rest) = name.strip_prefix(further) else { break };
        assert_eq!(content, &tensors[&format!("{source}{rest}")], "{name}");
        compared += 1;
    }
    let before = model.tensors().filter(|info| info.name.starts_with(further) && !model.is_scale(&info.name)).count();
    assert!(compared > 8, "{compared}");
    if out.shape().layers[0].num_experts() == model.shape().layers[0].num_experts() {
        assert_eq!(compared, before);
    }
}

#[test]
fn a_copy_of_a_decoder_layer_becomes_what_that_becomes() {
    let directory = tempdir().unwrap();
    for (number, (from, source, further, key)) in cases().into_iter().enumerate() {
        let at = |what: &str| directory.path().join(format!("{number}-{what}"));
        let model = with_further_layer(&from, source, further, key, &at("model"));
        assert!(model.mtp_tensors().count() > 0);
        let scores = products(&model);
        let (shape, none) = (model.shape(), ProtectionMask::none());
        let options = |mode| PruneOptions { mtp: Some(Mtp::Prune), allow_unaligned: true, ..PruneOptions::new(mode) };
        let names = (source, further);

        let units = UnitPruner::new(Scope::Expert).prune(&scores, shape, Budget::Ratio(0.5), &none).unwrap().plan;
        check(&model, &units, &options(PruneForm::Uniform), &at("units"), names);

        let groups = model.config().routing.groups().map_or(1, |groups| groups.count);
        let experts = scores.to_experts(Reduction::Sum).unwrap();
        let pruner = ExpertPruner::new().groups(groups);
        let experts = pruner.prune(&experts, shape, Budget::Ratio(0.25), &none).unwrap().plan;
        check(&model, &experts, &options(PruneForm::Uniform), &at("experts"), names);

        let how = FineGrained { top_k: Some(2), ..FineGrained::new(2) };
        let ratio = if groups > 1 { 0.1 } else { 0.4 };
        let pieces = how.prune(&scores, &model, ratio).unwrap();
        check(&model, &pieces, &options(PruneForm::FineGrained(how)), &at("pieces"), names);
        // With units of zeros, which the further layer gets, too.
        let padded = PruneOptions { allow_unaligned: false, ..options(PruneForm::FineGrained(how)) };
        check(&model, &pieces, &padded, &at("padded"), names);
    }
}

#[test]
fn what_cannot_be_pruned_alike_is_refused() {
    let directory = tempdir().unwrap();
    let (from, source, further, key) = cases().remove(0);
    let model = with_further_layer(&from, source, further, key, &directory.path().join("model"));
    let plan = common::plan(&model, Scope::Expert, 0.5);
    let refused = |model: &Checkpoint, plan: &PrunePlan, mode| {
        let options = PruneOptions { mtp: Some(Mtp::Prune), ..PruneOptions::new(mode) };
        write_plan(plan, model, directory.path().join("out"), &options).unwrap_err().to_string()
    };
    for mode in [PruneForm::Ragged, PruneForm::Masked] {
        let text = refused(&model, &plan, mode);
        assert!(text.contains("keep them") && text.contains("model.layers.3."), "{text}");
    }
    // Experts of another width, and a name without a layer.
    let (config, mut tensors) = load(model.dir());
    let name = "model.layers.3.mlp.experts.5.up_proj.weight";
    let narrow = tensors.get_mut(name).unwrap();
    narrow.1[0] -= 8;
    let bytes = narrow.2.len() * narrow.1[0] / (narrow.1[0] + 8);
    narrow.2.truncate(bytes);
    let other = save(&directory.path().join("narrow"), &config, &tensors);
    let text = refused(&other, &common::plan(&other, Scope::Expert, 0.5), PruneForm::Uniform);
    assert!(text.contains("`model.layers.3` are not the 8 of width 24"), "{text}");
    let tensor = tensors.remove(name).unwrap();
    tensors.insert("model.mtp_block.0.mlp.experts.5.up_proj.weight".into(), tensor);
    let other = save(&directory.path().join("unnamed"), &config, &tensors);
    let text = refused(&other, &common::plan(&other, Scope::Expert, 0.5), PruneForm::Uniform);
    assert!(text.contains("cannot be told"), "{text}");
    // Fine-grained exports cannot leave such experts as they are.
    let how = FineGrained { top_k: Some(2), ..FineGrained::new(2) };
    let options =
        PruneOptions { mtp: Some(Mtp::Keep), allow_unaligned: true, ..PruneOptions::new(PruneForm::FineGrained(how)) };
    let keep = PrunePlan::keep_all(model.shape(), model.fingerprint());
    let text = write_plan(&keep, &model, directory.path().join("out"), &options).unwrap_err().to_string();
    assert!(text.contains("prune or drop them"), "{text}");
}

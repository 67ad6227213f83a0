//! Pruning quantized checkpoints: they stay quantized, and what is kept keeps its codes.

use crate::common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{contents, write_plan};
use moe_checkpoint::{
    Checkpoint, Dtype, ExpertWeights, KeptQuantization, QuantizeOptions, Quantized, WriteOptions, write,
};
use moe_prune::{PruneForm, PruneOptions, PrunePlan, PrunedPrecision};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/quantized").join(name)
}

fn fixtures() -> Vec<String> {
    let entries = std::fs::read_dir(fixture("")).unwrap().map(|entry| entry.unwrap());
    let folders = entries.filter(|entry| entry.path().is_dir());
    let mut names: Vec<String> = folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names.len(), 37);
    names
}

fn open(name: &str) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(fixture(name)).unwrap())
}

/// A plan without the experts that `goes` names.
fn without(model: &Checkpoint, goes: impl Fn(usize) -> bool) -> PrunePlan {
    let mut plan = PrunePlan::keep_all(model.shape(), model.fingerprint());
    for layer in &mut plan.kept {
        for (expert, units) in layer.experts.iter_mut().enumerate().filter(|(expert, _)| goes(*expert)) {
            units.clear();
            layer.removed.push(expert as u32);
        }
    }
    counted(plan)
}

/// The plan with the ratio that it drops.
fn counted(mut plan: PrunePlan) -> PrunePlan {
    let kept = plan.kept.iter().flat_map(|layer| &layer.experts).map(Vec::len).sum::<usize>();
    plan.ratio.achieved = 1.0 - kept as f64 / plan.shape.units() as f64;
    plan
}

/// A plan with these units of every expert.
fn with_units(model: &Checkpoint, keeps: impl Fn(usize, u32) -> bool) -> PrunePlan {
    let mut plan = PrunePlan::keep_all(model.shape(), model.fingerprint());
    for layer in &mut plan.kept {
        layer.experts.iter_mut().enumerate().for_each(|(expert, units)| units.retain(|unit| keeps(expert, *unit)));
    }
    counted(plan)
}

/// An expert with some of its units.
fn narrowed(expert: &ExpertWeights, units: &[u32]) -> ExpertWeights {
    let (hidden, width) = (expert.hidden, expert.width);
    let rows = |matrix: &[f32]| -> Vec<f32> {
        units.iter().flat_map(|unit| &matrix[*unit as usize * hidden..(*unit as usize + 1) * hidden]).copied().collect()
    };
    let bias = |values: &Option<Vec<f32>>| {
        values.as_ref().map(|values| units.iter().map(|unit| values[*unit as usize]).collect::<Vec<f32>>())
    };
    let down = (0..hidden).flat_map(|row| units.iter().map(move |unit| row * width + *unit as usize));
    ExpertWeights {
        gate: rows(&expert.gate),
        up: rows(&expert.up),
        down: down.map(|at| expert.down[at]).collect(),
        gate_bias: bias(&expert.gate_bias),
        up_bias: bias(&expert.up_bias),
        width: units.len(),
        ..expert.clone()
    }
}

#[test]
fn whole_experts_go_from_every_format_without_a_change_of_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let mut pruned_models = 0;
    for name in fixtures() {
        let model = open(&name);
        let plan = without(&model, |expert| expert % 2 == 0);
        // Groups that are ranked by their two best cannot lose one of two.
        if plan.validate_routing(model.config()).is_err() {
            continue;
        }
        pruned_models += 1;
        let out = dir.path().join(&name);
        let report = write_plan(&plan, &model, &out, &PruneOptions::new(PruneForm::Uniform));
        let report = report.unwrap_or_else(|error| panic!("{name}: {error}"));
        let pruned = Checkpoint::open(&out).unwrap();
        assert_eq!(pruned.quantization(), model.quantization(), "{name}");
        assert!(report.notes.iter().any(|note| note.contains("every code and scale as it was")), "{name}: {report}");
        for layer in &model.shape().layers {
            let left: Vec<usize> = (0..layer.num_experts()).filter(|expert| expert % 2 == 1).collect();
            for (new, old) in left.iter().enumerate() {
                assert_eq!(
                    pruned.expert(layer.layer, new).unwrap(),
                    model.expert(layer.layer, *old).unwrap(),
                    "{name}, expert {old}"
                );
            }
            let (before, after) = [&*model, &pruned].map(|m| m.expert_bytes_on_disk(layer.layer).unwrap()).into();
            // States of bitsandbytes are texts, of which some have a digit more.
            let [after, share] = [after * layer.num_experts() as u64, before * left.len() as u64];
            assert!(after.abs_diff(share) <= if name.starts_with("bnb") { 64 } else { 0 }, "{name}: {after} {share}");
        }
        // Weights outside the experts are the same bytes.
        for info in model.tensors().filter(|info| info.name.contains("self_attn")) {
            assert_eq!(pruned.bytes(&info.name).unwrap(), model.bytes(&info.name).unwrap(), "{name}: {}", info.name);
        }
    }
    assert!(pruned_models > 32, "{pruned_models}");
}

#[test]
fn numbers_of_experts_by_layer_stand_in_what_compressed_tensors_says_of_sparsity() {
    let dir = tempfile::tempdir().unwrap();
    // The fixtures have one layer with experts.
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    let tiny = Arc::new(Checkpoint::open(tiny).unwrap());
    for name in ["nvfp4", "fp8_channels", r#"{"type": "int", "bits": 4, "group_size": 32}"#] {
        let options = QuantizeOptions::new(name.parse().unwrap());
        let base = dir.path().join(format!("{} whole", options.format));
        write(Quantized::on(&tiny, &options).unwrap().model(), &base, &WriteOptions::default()).unwrap();
        let model = Arc::new(Checkpoint::open(base).unwrap());
        let last = model.shape().layers.last().unwrap().layer;
        let mut plan = PrunePlan::keep_all(model.shape(), model.fingerprint());
        let kept = plan.kept.iter_mut().find(|kept| kept.layer == last).unwrap();
        kept.experts[1].clear();
        kept.removed.push(1);
        let plan = counted(plan);
        let out = dir.path().join(format!("{}", options.format));
        let report = write_plan(&plan, &model, &out, &PruneOptions::new(PruneForm::Uniform));
        let report = report.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(report.notes.iter().any(|note| note.contains("every code and scale as it was")), "{name}: {report}");
        let pruned = Arc::new(Checkpoint::open(&out).unwrap());
        assert_eq!(pruned.quantization(), model.quantization(), "{name}");
        let raw = pruned.raw_config();
        assert_eq!(raw["model_type"], model.raw_config()["model_type"], "{name}");
        assert_eq!(raw["num_experts"], model.raw_config()["num_experts"], "{name}");
        let sparsity = &raw["quantization_config"]["moe_sparsity_config"];
        let counts: Vec<usize> = (0..model.config().layers.len())
            .map(|layer| model.shape().layer(layer).unwrap().num_experts() - usize::from(layer == last))
            .collect();
        assert_eq!(*sparsity, serde_json::json!({"method": "prune", "num_experts": counts}), "{name}");
        for layer in &model.shape().layers {
            let left = (0..layer.num_experts()).filter(|expert| layer.layer != last || *expert != 1);
            for (new, old) in left.enumerate() {
                let (found, expected) = (pruned.expert(layer.layer, new), model.expert(layer.layer, old));
                assert_eq!(found.unwrap(), expected.unwrap(), "{name}, layer {}, expert {old}", layer.layer);
            }
        }
        // The same from every other layer: one number for all, which the config says again.
        let mut even = PrunePlan::keep_all(pruned.shape(), pruned.fingerprint());
        for kept in even.kept.iter_mut().filter(|kept| kept.layer != last) {
            kept.experts[0].clear();
            kept.removed.push(0);
        }
        let even = counted(even).on(&pruned, &PruneOptions::new(PruneForm::Uniform)).unwrap();
        let raw = even.model().raw_config();
        assert!(raw["quantization_config"]["moe_sparsity_config"].is_null(), "{name}");
        assert_eq!(raw["num_experts"], model.shape().layers[0].num_experts() - 1, "{name}");
        assert_eq!(even.model().quantization(), model.quantization(), "{name}");
    }
    // Formats that have no place for them say where there is one.
    let options = QuantizeOptions::new(r#"{"type": "fp8_blocks", "block": [32, 32]}"#.parse().unwrap());
    let model = Quantized::on(&tiny, &options).unwrap().model().clone();
    let mut plan = PrunePlan::keep_all(model.shape(), model.fingerprint());
    plan.kept[0].experts[0].clear();
    plan.kept[0].removed.push(0);
    let error = counted(plan).on(&model, &PruneOptions::new(PruneForm::Uniform)).unwrap_err().to_string();
    assert!(error.contains("one number of experts") && error.contains("compressed-tensors"), "{error}");
}

#[test]
fn a_plan_that_keeps_everything_reproduces_every_stored_tensor() {
    for name in fixtures() {
        let model = open(&name);
        let keep = PrunePlan::keep_all(model.shape(), model.fingerprint());
        let same = keep.on(&model, &PruneOptions::new(PruneForm::Uniform)).unwrap();
        assert!(contents(same.model()) == contents(&model), "{name}");
        assert_eq!(same.model().raw_config(), model.raw_config(), "{name}");
    }
}

#[test]
fn units_go_by_whole_groups_without_a_change_and_others_are_rounded_again() {
    let dir = tempfile::tempdir().unwrap();
    // Formats, the units of a group along the columns of down, and whether rows of gate and up form groups, too.
    for (name, group, kept) in [
        ("ct-fp8-channel-qwen3_moe", 8, 24),
        ("fp8-tensor-static-qwen3_moe", 8, 24),
        ("ct-int4-g32-kimi-deepseek_v3", 32, 64),
        ("ct-mxfp4-kimi3-deepseek_v3", 32, 32),
        ("ct-nvfp4-qwen3_moe", 16, 32),
        ("modelopt-nvfp4-qwen3_moe", 16, 32),
        ("fp8-ue8m0-qwen3_moe", 32, 32),
        ("fp8-block-16x32-glm4_moe", 32, 32),
        ("ct-int8-g32-w8a16-qwen3_moe", 32, 32),
        ("mxfp4-gpt_oss", 32, 32),
    ] {
        let model = open(name);
        let width = model.shape().layers[0].widths[0];
        assert_eq!(width % group, 0, "{name}");
        // Whole groups, others of every expert.
        let groups = width / group;
        let whole = with_units(&model, |expert, unit| {
            let shifted = (unit as usize / group + groups - expert % groups) % groups;
            shifted < kept / group
        });
        let options = PruneOptions { allow_unaligned: true, ..PruneOptions::new(PruneForm::Uniform) };
        let out = dir.path().join(name);
        let report = write_plan(&whole, &model, &out, &options).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(report.notes.iter().any(|note| note.contains("every code and scale as it was")), "{name}: {report}");
        let pruned = Checkpoint::open(&out).unwrap();
        assert_eq!(pruned.quantization(), model.quantization(), "{name}");
        for layer in &whole.kept {
            for (expert, units) in layer.experts.iter().enumerate() {
                let expected = narrowed(&model.expert(layer.layer, expert).unwrap(), units);
                assert_eq!(pruned.expert(layer.layer, expert).unwrap(), expected, "{name}, expert {expert}");
            }
        }
        if width == kept || group == 8 {
            continue;
        }
        // The same number of units, from all groups.
        let mixed =
            with_units(&model, |_, unit| (unit as usize * kept / width) != ((unit as usize + 1) * kept / width));
        let report = write_plan(&mixed, &model, dir.path().join(format!("{name}-mixed")), &options).unwrap();
        assert!(report.notes.iter().any(|note| note.contains("rounded again")), "{name}: {report}");
        let mixed_model = Checkpoint::open(dir.path().join(format!("{name}-mixed"))).unwrap();
        for layer in &mixed.kept {
            for (expert, units) in layer.experts.iter().enumerate() {
                let expected = narrowed(&model.expert(layer.layer, expert).unwrap(), units);
                let found = mixed_model.expert(layer.layer, expert).unwrap();
                let norm = |values: &[f32]| values.iter().map(|value| value * value).sum::<f32>().sqrt();
                let apart: Vec<f32> = found.down.iter().zip(&expected.down).map(|(a, b)| a - b).collect();
                assert!(norm(&apart) < 0.2 * norm(&expected.down), "{name}, expert {expert}");
            }
        }
    }
}

#[test]
fn units_that_the_format_cannot_lose_are_an_error_with_the_way_out() {
    let options = PruneOptions { allow_unaligned: true, ..PruneOptions::new(PruneForm::Uniform) };
    for (name, part) in
        [("ct-int4-g32-kimi-deepseek_v3", "no multiple of 32"), ("gptq-v1-sym-qwen3_moe", "prune whole experts")]
    {
        let model = open(name);
        let plan = with_units(&model, |_, unit| unit % 4 != 0);
        let error = plan.on(&model, &options).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("without quantization"), "{error}");
        let plain = PruneOptions { precision: PrunedPrecision::Bf16, ..options.clone() };
        let pruned = plan.on(&model, &plain).unwrap();
        assert_eq!(pruned.model().quantization(), None);
        assert_eq!(
            pruned.model().expert_dtype(plan.kept[0].layer, 0, moe_checkpoint::ExpertPart::Down).unwrap(),
            Some(Dtype::BF16)
        );
    }
    // Forms that no engine reads quantized are BF16, and say so.
    let model = open("ct-nvfp4-qwen3_moe");
    let plan = with_units(&model, |expert, unit| unit as usize >= expert);
    let ragged = plan.on(&model, &PruneOptions::new(PruneForm::Ragged)).unwrap();
    assert_eq!(ragged.model().quantization(), None);
    assert!(ragged.report().notes.iter().any(|note| note.contains("written as BF16")), "{}", ragged.report());
}

/// The rows of the table in docs/quantization.md: fixture, what writes it, how experts and how units go, what merging
/// and tuning write.
fn table() -> Vec<[String; 6]> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/quantization.md");
    let text = std::fs::read_to_string(path).unwrap();
    let rows = text.lines().filter(|line| line.starts_with('|') && line.contains("| `"));
    let cell = |row: &str, at: usize| row.split('|').nth(at).unwrap().trim().trim_matches('`').to_string();
    rows.map(|row| [2, 3, 4, 5, 6, 7].map(|at| cell(row, at))).collect()
}

#[test]
fn the_table_of_formats_says_what_is() {
    let rows = table();
    assert_eq!(rows.len(), 23);
    for [name, written, experts, units, merged, tuned] in &rows {
        let model = open(name);
        // That experts go is a test of its own, and so is merging.
        assert_eq!((experts.as_str(), merged.as_str()), ("kept", "to BF16"), "{name}");
        let plain = model.dequantized().unwrap();
        let trained: BTreeSet<String> =
            model.plain_tensors().map(|info| info.name.clone()).filter(|name| name.contains("experts.")).collect();
        let as_base = KeptQuantization::requantized(&plain, &model, &trained);
        assert_eq!(as_base.is_ok(), tuned == "either", "{name}: {tuned}, {as_base:?}");
        assert!(tuned == "either" || tuned == "to BF16", "{name}: {tuned}");
        assert!(model.quantization().is_some(), "{name}");
        assert_eq!(written.parse::<moe_checkpoint::WeightFormat>().is_ok(), written != "no", "{name}: {written}");
        let width = model.shape().layers[0].widths[0];
        let options = PruneOptions { allow_unaligned: true, ..PruneOptions::new(PruneForm::Uniform) };
        let pruned = |count: usize| {
            let plan = with_units(&model, |_, unit| (unit as usize) < count);
            plan.on(&model, &options).map(|pruned| pruned.model().quantization().is_some())
        };
        // One unit less fits no group; one unit is a group where a row is one.
        let (odd, found) = (pruned(width - 1), units.as_str());
        match found {
            "any" => assert!(odd.unwrap(), "{name}"),
            "by groups" | "no" => assert!(odd.is_err(), "{name}"),
            other => panic!("{name}: {other}"),
        }
        let whole = (1..width).filter(|count| count % 16 == 0).any(|count| pruned(count).is_ok_and(|kept| kept));
        let one_group = (1..width).all(|count| pruned(count).is_err());
        assert!(found != "no" || !whole, "{name}");
        assert!(found != "by groups" || whole || one_group, "{name}");
    }
}

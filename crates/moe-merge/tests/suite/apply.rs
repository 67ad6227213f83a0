//! Plans carried out on every family, in every output form.

use crate::common;

use std::cell::Cell;
use std::sync::Arc;

use common::run::{difference, logits};
use common::{checkpoints, contents, evidence, files, open, options, parity, plain, plain_bytes, plan, written};
use moe_checkpoint::{
    Checkpoint, Error as CheckpointError, Existing, LayerRole, ProtectionMask, RECORD_FILE, Record, Role, WriteOptions,
    write,
};
use moe_merge::{
    Amount, LayerPlan, MergeOptions, MergePlan, MergeRecord, MergeRows, OutputForm, Recipe, RouterConfig, Scope,
};
use tempfile::tempdir;

const FORMS: [OutputForm; 3] = [OutputForm::Stock, OutputForm::Grouped, OutputForm::StockCopies];

#[test]
fn merging_nothing_is_byte_identical() {
    let directory = tempdir().unwrap();
    for (name, model) in checkpoints() {
        let plan = plan(&plain(0.0), &model);
        assert!(plan.is_identity());
        for form in FORMS {
            let out = directory.path().join(format!("{name}-{form}"));
            let report = written(&plan, &model, &out, &options(form, &model)).unwrap();
            let result = Checkpoint::open(&out).unwrap();
            assert_eq!(report.bytes.after, result.bytes_on_disk(), "{name} {form}");
            if plain_bytes(&model) && model.mtp_tensors().next().is_none() {
                assert!(contents(&result) == contents(&model), "{name} {form}");
                let config = |dir| std::fs::read(std::path::Path::join(dir, "config.json")).unwrap();
                assert_eq!(config(&out), config(model.dir()), "{name} {form}");
            }
            for layer in &model.shape().layers {
                for expert in 0..layer.num_experts() {
                    let (found, expected) =
                        (result.expert(layer.layer, expert).unwrap(), model.expert(layer.layer, expert).unwrap());
                    assert_eq!(found, expected, "{name} {form}");
                }
            }
        }
    }
}

#[test]
fn quantized_models_of_every_format_of_the_table_are_merged_into_bf16() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let text = std::fs::read_to_string(root.join("docs/quantization.md")).unwrap();
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with('|') && line.contains("| `")).collect();
    assert_eq!(rows.len(), 23);
    let directory = tempdir().unwrap();
    for row in rows {
        let name = row.split('|').nth(2).unwrap().trim().trim_matches('`');
        let model = open(root.join("crates/moe-checkpoint/tests/fixtures/quantized").join(name));
        let plan = plan(&plain(0.5), &model);
        let out = directory.path().join(name);
        written(&plan, &model, &out, &options(OutputForm::Grouped, &model)).unwrap();
        let merged = Checkpoint::open(&out).unwrap();
        assert_eq!(merged.quantization(), None, "{name}");
        let layer = plan.layers[0].layer;
        let dtype = merged.expert_dtype(layer, 0, moe_checkpoint::ExpertPart::Down).unwrap();
        assert_eq!(dtype, Some(moe_checkpoint::Dtype::BF16), "{name}");
        // Who stays alone keeps the values of its codes.
        for group in plan.layers[0].groups.iter().filter(|group| group.members.len() == 1) {
            let expert = group.members[0] as usize;
            assert_eq!(merged.expert(layer, expert).unwrap(), model.expert(layer, expert).unwrap(), "{name}");
        }
    }
}

#[test]
fn a_grouped_checkpoint_gives_the_logits_of_copies_and_is_smaller() {
    let directory = tempdir().unwrap();
    for (name, model) in checkpoints().into_iter().filter(|(name, _)| !name.contains("qwen3_5")) {
        let plan = plan(&plain(0.5), &model);
        let [grouped, copies] = [OutputForm::Grouped, OutputForm::StockCopies].map(|form| {
            let out = directory.path().join(format!("{name}-{form}"));
            let report = written(&plan, &model, &out, &options(form, &model)).unwrap();
            let bytes = Checkpoint::open(&out).unwrap().bytes_on_disk();
            assert_eq!(bytes, report.bytes.after, "{name} {form}");
            (out, report)
        });
        let smaller = Checkpoint::open(&grouped.0).unwrap();
        assert!(smaller.grouped() && smaller.shape() == model.shape());
        let experts: u64 = grouped.1.layers.iter().map(|layer| layer.bytes.after).sum();
        let full: u64 = copies.1.layers.iter().map(|layer| layer.bytes.after).sum();
        let (groups, all) = (plan.groups() as u64, plan.experts() as u64);
        assert_eq!(experts * all, full * groups, "{name}");
        assert!(copies.1.notes[0].contains("nothing got smaller"));
        assert_eq!(logits(&grouped.0), logits(&copies.0), "{name}");
        // Members share what their group is.
        for (layer, shape) in plan.layers.iter().zip(&model.shape().layers) {
            let copies = Checkpoint::open(&copies.0).unwrap();
            for expert in 0..shape.num_experts() {
                let group = layer.groups.iter().find(|g| g.members.contains(&(expert as u32))).unwrap();
                let of = |checkpoint: &Checkpoint, e: usize| checkpoint.expert(layer.layer, e).unwrap();
                assert_eq!(of(&smaller, expert), of(&copies, group.dominant as usize), "{name}");
                if group.members.len() == 1 {
                    assert_eq!(of(&smaller, expert), of(&model, expert), "{name}");
                }
            }
        }
    }
}

#[test]
fn every_recipe_meets_its_budget_in_every_form_it_allows() {
    let directory = tempdir().unwrap();
    for name in ["tf5/qwen2_moe", "tf5/gpt_oss", "tf5/mixtral"] {
        let model = open(parity(name));
        let (evidence, experts) = (Arc::new(evidence(&model)), model.shape().layers[0].num_experts());
        for recipe in Recipe::names().map(|name| Recipe::named(name).unwrap()) {
            let recipe = recipe.with_amount(Amount::Groups(experts / 2));
            let plan = recipe.plan(&model, &evidence, &ProtectionMask::none()).unwrap();
            assert_eq!(plan.groups(), experts / 2 * plan.layers.len(), "{name} {}", recipe.name);
            let again = MergePlan::from_json(&plan.to_json().unwrap()).unwrap();
            assert_eq!(again, plan);
            for form in FORMS {
                let out = directory.path().join(format!("{}-{}-{form}", name.replace('/', "-"), recipe.name));
                let options = MergeOptions { evidence: Some(evidence.clone()), ..MergeOptions::new(form) };
                let result = written(&plan, &model, &out, &options);
                let uneven = plan.layers.iter().any(|layer| layer.groups.len() != experts / 2);
                let refused = match form {
                    OutputForm::Stock => uneven,
                    OutputForm::StockCopies => !recipe.router.keeps_rows(),
                    _ => !recipe.router.keeps_rows() && experts / 2 < model.shape().top_k,
                };
                match (refused, result) {
                    (true, Err(error)) => assert!(error.to_string().contains(form.name()), "{error}"),
                    (true, Ok(_)) => panic!("{name} {} {form} was written", recipe.name),
                    (false, Err(error)) => panic!("{name} {} {form}: {error}", recipe.name),
                    (false, Ok(report)) => {
                        let result = Checkpoint::open(&out).unwrap();
                        assert_eq!(report.bytes.after, result.bytes_on_disk());
                        assert!((form == OutputForm::StockCopies) != (report.bytes.after < report.bytes.before));
                        assert!(logits(&out).iter().all(|v| v.is_finite()));
                        let applied: MergeRecord = Record::load(&out).unwrap().recipe("merge").unwrap().unwrap();
                        assert_eq!((applied.plan, applied.report), (plan.clone(), report));
                    }
                }
            }
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_an_interrupted_run_goes_on() {
    let directory = tempdir().unwrap();
    let model = open(parity("tf5/qwen2_moe"));
    let evidence = Arc::new(evidence(&model));
    for name in ["m-smoe", "sub-moe", "dern", "mergemoe", "ream"] {
        let recipe = Recipe::named(name).unwrap().with_amount(Amount::Ratio(0.5));
        let plan = recipe.plan(&model, &evidence, &ProtectionMask::none()).unwrap();
        let form = if recipe.router.keeps_rows() { OutputForm::Grouped } else { OutputForm::Stock };
        let base = MergeOptions { evidence: Some(evidence.clone()), ..MergeOptions::new(form) };
        let merged = || plan.on(&model, &base).unwrap().model().clone();
        let small = WriteOptions { max_shard_bytes: 9_000, ..WriteOptions::default() };
        let whole = directory.path().join(format!("{name}-whole"));
        let steps = Cell::new(0);
        let count = |_: &moe_checkpoint::Progress<'_>| {
            steps.set(steps.get() + 1);
            Ok(())
        };
        write(&merged(), &whole, &WriteOptions { progress: Some(&count), ..small }).unwrap();
        let again = directory.path().join(format!("{name}-again"));
        write(&merged(), &again, &small).unwrap();
        assert!(files(&whole) == files(&again), "{name}");
        for stop in [1, steps.get() / 3, 2 * steps.get() / 3, steps.get() - 1] {
            let out = directory.path().join(format!("{name}-{stop}"));
            let at = Cell::new(0);
            let interrupt = |_: &moe_checkpoint::Progress<'_>| {
                at.set(at.get() + 1);
                if at.get() == stop { Err("enough".into()) } else { Ok(()) }
            };
            let error = write(&merged(), &out, &WriteOptions { progress: Some(&interrupt), ..small }).unwrap_err();
            assert!(error.to_string().contains("enough") && !out.exists());
            assert!(write(&merged(), &out, &small).unwrap_err().to_string().contains("partial"));
            write(&merged(), &out, &WriteOptions { existing: Existing::Resume, ..small }).unwrap();
            assert!(files(&whole) == files(&out), "{name} {stop}");
        }
    }
}

#[test]
fn protected_experts_are_never_absorbed() {
    let directory = tempdir().unwrap();
    let model = open(parity("tf5/qwen2_moe"));
    let evidence = Arc::new(evidence(&model));
    let mut protect = ProtectionMask::none();
    // The least used expert of a layer, which everything would absorb.
    let layer = &model.shape().layers[0];
    let usage = &evidence.layers[0].sums["routing.tokens"];
    let least = (0..layer.num_experts()).min_by(|a, b| usage[*a].total_cmp(&usage[*b])).unwrap();
    protect.protect_expert(layer.layer, least);
    let row = |checkpoint: &Checkpoint, at: usize| {
        let rows = checkpoint.read_f32(Role::Layer(layer.layer, LayerRole::Router)).unwrap();
        rows[at * model.shape().hidden_size..][..model.shape().hidden_size].to_vec()
    };
    for recipe in Recipe::names().map(|name| Recipe::named(name).unwrap()) {
        let recipe = recipe.with_amount(Amount::Ratio(0.5));
        let plan = recipe.plan(&model, &evidence, &protect).unwrap();
        assert_eq!(plan.layers[0].protected, [least as u32]);
        let position = plan.layers[0].groups.iter().position(|g| g.members == [least as u32]).unwrap();
        let form = if recipe.router.keeps_rows() { OutputForm::Grouped } else { OutputForm::Stock };
        let out = directory.path().join(&recipe.name);
        let options = MergeOptions { evidence: Some(evidence.clone()), ..MergeOptions::new(form) };
        let report = written(&plan, &model, &out, &options).unwrap();
        assert_eq!(report.layers[0].protected, 1);
        let result = Checkpoint::open(&out).unwrap();
        let at = if form == OutputForm::Grouped { least } else { position };
        assert_eq!(result.expert(layer.layer, at).unwrap(), model.expert(layer.layer, least).unwrap());
        assert_eq!(row(&result, at), row(&model, least), "{}", recipe.name);
    }
}

#[test]
fn merged_router_rows_are_means_and_biases_count() {
    let directory = tempdir().unwrap();
    let model = open(parity("tf5/gpt_oss"));
    let mut recipe = plain(0.5);
    recipe.router = RouterConfig::Merge(MergeRows { count_bias: true });
    let plan = plan(&recipe, &model);
    let out = directory.path().join("merged");
    written(&plan, &model, &out, &MergeOptions::new(OutputForm::Stock)).unwrap();
    let result = Checkpoint::open(&out).unwrap();
    let hidden = model.shape().hidden_size;
    for layer in &plan.layers {
        let read = |checkpoint: &Checkpoint, role| checkpoint.read_f32(Role::Layer(layer.layer, role)).unwrap();
        let (rows, old) = (read(&result, LayerRole::Router), read(&model, LayerRole::Router));
        let (biases, old_biases) = (read(&result, LayerRole::RouterBias), read(&model, LayerRole::RouterBias));
        for (at, group) in layer.groups.iter().enumerate() {
            let mean = |values: &[f32], stride: usize, offset: usize| -> f64 {
                let members = group.members.iter().zip(&group.weights);
                members.map(|(e, w)| f64::from(*w) * f64::from(values[*e as usize * stride + offset])).sum()
            };
            for h in 0..hidden {
                assert!((f64::from(rows[at * hidden + h]) - mean(&old, hidden, h)).abs() < 1e-6);
            }
            let expected = mean(&old_biases, 1, 0) + (group.members.len() as f64).ln();
            assert!((f64::from(biases[at]) - expected).abs() < 1e-5);
        }
    }
}

#[test]
fn what_cannot_be_written_is_refused_before_any_work() {
    let directory = tempdir().unwrap();
    let model = open(parity("tf5/qwen2_moe"));
    let evidence = Arc::new(evidence(&model));
    let message = |plan: &MergePlan, options: &MergeOptions| {
        let message = plan.on(&model, options).unwrap_err().to_string();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "{message}");
        message
    };
    // Numbers of groups that differ.
    let mut recipe = plain(0.5);
    recipe.budget.scope = Scope::Model;
    let mut uneven = plan(&recipe, &model);
    let (first, last) = (uneven.layers[0].groups.len(), uneven.layers.last().unwrap().groups.len());
    if first == last {
        let experts = model.shape().layers[0].num_experts();
        uneven.layers[0] = LayerPlan::keep_all(uneven.layers[0].layer, experts);
        let gone = uneven.experts() - uneven.groups();
        uneven.ratio.achieved = gone as f64 / uneven.experts() as f64;
    }
    assert!(message(&uneven, &MergeOptions::new(OutputForm::Stock)).contains("write `grouped`"));
    // A sample that the recipe fits on.
    let fitted = Recipe::named("mergemoe").unwrap().plan(&model, &evidence, &ProtectionMask::none()).unwrap();
    assert!(message(&fitted, &MergeOptions::new(OutputForm::Grouped)).contains("a sample of the layer's tokens"));
    let mut other = (*evidence).clone();
    other.layers[0].tokens += 1;
    let options = MergeOptions { evidence: Some(Arc::new(other)), ..MergeOptions::new(OutputForm::Grouped) };
    assert!(message(&fitted, &options).contains("digest"));
    // Another model.
    let stranger = open(parity("tf5/mixtral"));
    let error = fitted.on(&stranger, &options).unwrap_err().to_string();
    assert!(error.contains("fingerprint"), "{error}");
    let error = plain(0.5).plan(&stranger, &evidence, &ProtectionMask::none()).unwrap_err().to_string();
    assert!(error.contains("evidence was made for"), "{error}");
    // The checkpoint itself.
    let options = MergeOptions { evidence: Some(evidence.clone()), ..MergeOptions::new(OutputForm::Grouped) };
    let merged = fitted.on(&model, &options).unwrap();
    let error = write(merged.model(), model.dir(), &WriteOptions::default()).unwrap_err();
    assert!(matches!(error, CheckpointError::OutputIsInput { .. }), "{error}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_grouped_checkpoint_is_not_merged_again() {
    let directory = tempdir().unwrap();
    let model = open(parity("tf5/qwen2_moe"));
    let out = directory.path().join("grouped");
    let plan = plan(&plain(0.5), &model);
    written(&plan, &model, &out, &MergeOptions::new(OutputForm::Grouped)).unwrap();
    let grouped = Checkpoint::open(&out).unwrap();
    let error = plain(0.5).plan(&grouped, &evidence(&grouped), &ProtectionMask::none()).unwrap_err().to_string();
    assert!(error.contains("share sets of weights"), "{error}");
    assert!(out.join(RECORD_FILE).exists());
}

#[test]
fn a_stock_export_is_the_merged_experts_behind_the_rows_that_are_left() {
    use moe_core::{ExpertOverlay, Model, RemoveExperts};
    use std::sync::Arc;

    /// Each dominant replaced by what was written for its group.
    struct Written(Checkpoint, MergePlan);
    impl ExpertOverlay for Written {
        fn apply(
            &self,
            layer: usize,
            expert: usize,
            weights: moe_checkpoint::ExpertWeights,
        ) -> moe_core::Result<moe_checkpoint::ExpertWeights> {
            let groups = &self.1.layer(layer).unwrap().groups;
            match groups.iter().position(|group| group.dominant as usize == expert) {
                Some(at) => Ok(self.0.expert(layer, at).unwrap()),
                None => Ok(weights),
            }
        }
    }
    let directory = tempdir().unwrap();
    for name in ["tf5/qwen2_moe", "tf5/qwen3_moe", "tf5/olmoe"] {
        let model = open(parity(name));
        let plan = plan(&plain(0.25), &model);
        let out = directory.path().join(name.replace('/', "-"));
        let report = written(&plan, &model, &out, &MergeOptions::new(OutputForm::Stock)).unwrap();
        assert!(report.notes[0].contains("rows of absorbed experts"));
        let stock = Checkpoint::open(&out).unwrap();
        let removed = plan.layers.iter().fold(RemoveExperts::new(), |removed, layer| {
            removed.remove(layer.layer, layer.removed(model.shape().layers[0].num_experts()))
        });
        let device = moe_core::device::device("flex").unwrap();
        let whole = Model::open(model.dir(), &device, None).unwrap();
        let overlaid = whole.with_overlays(Some(Arc::new(Written(stock, plan))), Some(Arc::new(removed))).unwrap();
        let expected = common::run::logits_of(&overlaid);
        assert!(difference(&logits(&out), &expected) < 1e-5, "{name}");
    }
}

#[test]
fn fewer_experts_than_a_token_gets_are_all_selected() {
    let directory = tempdir().unwrap();
    let model = open(parity("tf5/qwen2_moe"));
    let recipe = Recipe::named("dern").unwrap().with_amount(Amount::Groups(2));
    let plan = plan(&recipe, &model);
    let out = directory.path().join("two");
    let report = written(&plan, &model, &out, &MergeOptions::new(OutputForm::Stock)).unwrap();
    assert!(report.notes[0].contains("all of them instead of 3"), "{:?}", report.notes);
    let result = Checkpoint::open(&out).unwrap();
    assert_eq!((result.shape().top_k, result.shape().layers[0].num_experts()), (2, 2));
    // Rows of the dominants, in order.
    let hidden = model.shape().hidden_size;
    for layer in &plan.layers {
        let rows = |checkpoint: &Checkpoint| checkpoint.read_f32(Role::Layer(layer.layer, LayerRole::Router)).unwrap();
        let expected: Vec<f32> =
            layer.groups.iter().flat_map(|g| rows(&model)[g.dominant as usize * hidden..][..hidden].to_vec()).collect();
        assert_eq!(rows(&result), expected);
    }
    assert!(logits(&out).iter().all(|v| v.is_finite()));
    // A grouped checkpoint keeps the number that a token gets.
    let error = plan.on(&model, &MergeOptions::new(OutputForm::Grouped)).unwrap_err();
    assert!(error.to_string().contains("num_experts_per_tok"), "{error}");
}

//! Pruned models before they are written: what is run is what is written, bit for bit, and plans stack.
#![cfg(feature = "repair")]

use crate::common;
use crate::run;

use std::path::Path;
use std::sync::Arc;

use common::{contents, every_checkpoint, fuse, magnitude, parity, plan, tiny_moe};
use moe_checkpoint::{Checkpoint, Dtype, Mtp, Reduction, TensorSpec, WriteOptions, write};
use moe_core::Model;
use moe_core::device::device;
use moe_prune::{
    Budget, EditSource, Edits, ExpertEdit, ExpertPruner, FineGrained, ProtectionMask, PruneForm, PruneOptions,
    PrunePlan, PrunedPrecision, Pruner, Scope,
};
use run::logits_of;
use tempfile::tempdir;

fn open(dir: impl AsRef<Path>) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(dir).unwrap())
}

fn run(model: &Arc<Checkpoint>) -> Vec<f32> {
    logits_of(&Model::new(model.clone(), &device("flex").unwrap(), None).unwrap())
}

/// Further layers stay where nothing says what they would become.
fn options(form: PruneForm<'_>) -> PruneOptions<'_> {
    let mtp = match form {
        PruneForm::Ragged | PruneForm::Masked => Mtp::Keep,
        _ => Mtp::Drop,
    };
    PruneOptions { mtp: Some(mtp), allow_unaligned: true, ..PruneOptions::new(form) }
}

/// Every bundled checkpoint that is run, one in the fused layout besides.
fn runnable(scratch: &Path) -> Vec<Arc<Checkpoint>> {
    let fused = scratch.join("fused");
    fuse(&open(parity("tf5/qwen2_moe_bf16")), &fused);
    let all = every_checkpoint().into_iter().chain([fused]).map(open);
    all.filter(|model| Model::new(model.clone(), &device("flex").unwrap(), None).is_ok()).collect()
}

fn values(count: usize, salt: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 31 + salt * 7) % 17) as f32 / 50.0 - 0.15).collect()
}

/// Another router in every layer, and other down columns and a bias in every third expert.
fn edits(model: &Checkpoint, plan: &PrunePlan, biases: bool) -> Arc<dyn EditSource> {
    let (mut edits, hidden) = (Edits::new(), plan.shape.hidden_size);
    for kept in &plan.kept {
        for expert in kept.experts_kept().into_iter().step_by(3) {
            let down = values(hidden * kept.experts[expert].len(), expert);
            let down_bias = biases.then(|| values(hidden, expert + 1));
            edits.set_expert(kept.layer, expert, ExpertEdit { down: Some(down), down_bias });
        }
        // Routers read the residual stream, whatever experts read.
        edits.set_router(kept.layer, values(kept.experts.len() * model.config().hidden_size, kept.layer));
    }
    Arc::new(edits)
}

#[test]
fn what_is_run_is_what_is_written_to_the_bit() {
    let directory = tempdir().unwrap();
    let mut compared = 0;
    for model in runnable(directory.path()) {
        let name = model.dir().display().to_string();
        let whole = run(&model);
        let groups = model.config().routing.groups().map_or(1, |groups| groups.count);
        let scores = magnitude(&model);
        // Units that groups of elements do not divide; whole experts go from quantized ones as they are.
        let precision = PrunedPrecision::Bf16;
        let mut cases = vec![
            ("uniform", plan(&model, Scope::Expert, 0.6), PruneOptions { precision, ..options(PruneForm::Uniform) }),
            ("ragged", plan(&model, Scope::Global, 0.5), options(PruneForm::Ragged)),
            ("masked", plan(&model, Scope::Layer, 0.6), options(PruneForm::Masked)),
        ];
        let repaired = plan(&model, Scope::Layer, 0.3);
        if model.config().expert_latent.is_some() {
            // Rows as wide as the latent fit no router.
            let mut narrow = Edits::new();
            let kept = &repaired.kept[0];
            narrow.set_router(kept.layer, values(kept.experts.len() * repaired.shape.hidden_size, 0));
            let narrow = PruneOptions { edits: Some(Arc::new(narrow)), ..options(PruneForm::Ragged) };
            let error = repaired.on(&model, &narrow).unwrap_err().to_string();
            assert!(error.contains("router") && error.contains("16]"), "{error}");
        }
        let edits = edits(&model, &repaired, true);
        cases.push(("repaired", repaired, PruneOptions { edits: Some(edits), ..options(PruneForm::Ragged) }));
        let experts = scores.to_experts(Reduction::Sum).unwrap();
        let pruner = ExpertPruner::new().groups(groups);
        let none = ProtectionMask::none();
        if let Ok(found) = pruner.prune(&experts, model.shape(), Budget::Ratio(0.3), &none)
            && found.plan.validate_routing(model.config()).is_ok()
        {
            cases.push(("experts", found.plan.clone(), options(PruneForm::Uniform)));
            cases.push(("ragged experts", found.plan, options(PruneForm::Ragged)));
        }
        for pieces in [2, 4] {
            let how = FineGrained { ranking: Some(&scores), top_k: Some(2), ..FineGrained::new(pieces) };
            if let Ok(plan) = how.prune(&scores, &model, 0.3) {
                let padded = PruneOptions { allow_unaligned: false, ..options(PruneForm::FineGrained(how)) };
                cases.push(("pieces", plan.clone(), options(PruneForm::FineGrained(how))));
                cases.push(("padded pieces", plan, padded));
            }
        }
        if model.family().shared_follows_width() {
            // a config has no place for another width of the routed experts alone
            cases.retain(|(what, ..)| !["uniform", "pieces", "padded pieces"].contains(what));
        }
        if model.family().attention_has_experts() {
            // nor for pieces of experts of one half alone
            for (what, plan, options) in cases.extract_if(.., |(what, ..)| what.contains("pieces")) {
                let error = plan.on(&model, &options).unwrap_err().to_string();
                assert!(error.contains("num_") && error.contains("attention has as many"), "{what}: {error}");
            }
        }
        for (index, (what, plan, options)) in cases.into_iter().enumerate() {
            let pruned = plan.on(&model, &options).unwrap();
            let unwritten = run(pruned.model());
            // Experts that these few tokens never chose may go without a trace; units of the others may not.
            if !what.ends_with("experts") {
                assert_ne!(unwritten, whole, "{name}, {what}: nothing changes");
            }
            let out = directory.path().join(format!("{compared}-{index}"));
            write(pruned.model(), &out, &WriteOptions::default()).unwrap();
            let written = open(&out);
            assert!(written.is_model(&pruned.model().fingerprint()), "{name}, {what}");
            assert!(run(&written) == unwritten, "{name}, {what}");
            std::fs::remove_dir_all(&out).unwrap();
        }
        compared += 1;
    }
    assert!(compared > 20, "{compared}");
}

#[test]
fn a_plan_that_keeps_everything_changes_no_byte() {
    for dir in every_checkpoint() {
        let model = open(&dir);
        let plain = model.dequantized().unwrap();
        let keep = PrunePlan::keep_all(model.shape(), model.fingerprint());
        for form in [PruneForm::Uniform, PruneForm::Masked] {
            let options = PruneOptions { mtp: Some(Mtp::Keep), ..PruneOptions::new(form) };
            let same = keep.on(&model, &options).unwrap();
            // Quantized experts of one width stay quantized.
            let expected = if form == PruneForm::Uniform { &model } else { &plain };
            assert!(contents(same.model()) == contents(expected), "{} {form}", dir.display());
            assert_eq!(same.model().raw_config(), expected.raw_config(), "{} {form}", dir.display());
        }
    }
}

#[test]
fn plans_stack_without_a_directory_between_them() {
    for dir in [parity("tf5/qwen2_moe_bf16"), parity("tf5/gpt_oss"), parity("tf5/deepseek_v3"), tiny_moe()] {
        let model = open(dir);
        let first = plan(&model, Scope::Layer, 0.3);
        let once = first.on(&model, &options(PruneForm::Ragged)).unwrap();
        let second = plan(once.model(), Scope::Layer, 0.4);
        let twice = second.on(once.model(), &options(PruneForm::Ragged)).unwrap();
        let at_once = first.then(&second).unwrap().on(&model, &options(PruneForm::Ragged)).unwrap();
        assert!(contents(twice.model()) == contents(at_once.model()), "{}", model.dir().display());
        assert_eq!(twice.model().steps().len(), 2);
        assert_eq!(twice.model().steps()[1].base, once.model().fingerprint());
        // A plan for one model is none for another, though both have its directory.
        let wrong = first.on(once.model(), &options(PruneForm::Ragged)).unwrap_err().to_string();
        assert!(wrong.contains("the plan was made for"), "{wrong}");
        // Back to one width: on the ragged model, of zeros, and of it in the stock layout.
        let whole = PrunePlan::keep_all(at_once.model().shape(), at_once.model().fingerprint());
        let masked = whole.on(at_once.model(), &options(PruneForm::Masked)).unwrap();
        assert!(contents(masked.model()) == contents(at_once.model()));
    }
    // A quantized base is one of BF16, whoever takes the factors off.
    for dir in every_checkpoint() {
        let model = open(dir);
        if model.quantization().is_none() {
            continue;
        }
        let plain = model.dequantized().unwrap();
        let plan = plan(&model, Scope::Global, 0.4);
        let [a, b] = [&model, &plain].map(|base| plan.on(base, &options(PruneForm::Ragged)).unwrap());
        assert!(contents(a.model()) == contents(b.model()));
    }
}

#[test]
fn the_same_plan_is_the_same_model_and_another_is_another() {
    let model = open(tiny_moe());
    let scores = magnitude(&model);
    let prints = |plan: &PrunePlan, options: &PruneOptions<'_>| {
        let [a, b] = [(); 2].map(|()| plan.on(&model, options).unwrap().model().fingerprint());
        assert_eq!(a, b);
        a
    };
    let (half, less) = (plan(&model, Scope::Expert, 0.5), plan(&model, Scope::Expert, 0.25));
    let mut found = vec![model.fingerprint()];
    for (plan, form) in [
        (&half, PruneForm::Uniform),
        (&half, PruneForm::Ragged),
        (&half, PruneForm::Masked),
        (&less, PruneForm::Uniform),
        (&half, PruneForm::FineGrained(FineGrained::new(4))),
        (&half, PruneForm::FineGrained(FineGrained { ranking: Some(&scores), ..FineGrained::new(4) })),
    ] {
        found.push(prints(plan, &PruneOptions::new(form)));
    }
    found.push(prints(
        &half,
        &PruneOptions { edits: Some(edits(&model, &half, false)), ..PruneOptions::new(PruneForm::Uniform) },
    ));
    let all = found.len();
    found.sort();
    found.dedup();
    assert_eq!(found.len(), all);
}

#[test]
fn what_a_checkpoint_cannot_become_is_said_before_any_score() {
    let directory = tempdir().unwrap();
    let model = open(parity("tf5/qwen2_moe"));
    for form in [PruneForm::Uniform, PruneForm::Ragged, PruneForm::Masked] {
        PruneOptions::new(form).check(&model).unwrap();
    }
    // The same with a layer that predicts further tokens.
    let names: Vec<TensorSpec> = model
        .tensors()
        .filter_map(|info| {
            let name = info.name.strip_prefix("model.layers.0.").map(|rest| format!("mtp.layers.0.{rest}"))?;
            Some(TensorSpec { name, ..info.spec() })
        })
        .collect();
    assert!(names.iter().all(|spec| spec.dtype == Dtype::F32));
    let predicting = with_tensors(&model, names, &directory.path().join("predicting"));
    let check = |mtp, form| {
        let options = PruneOptions { mtp, ..PruneOptions::new(form) };
        options.check(&predicting).map_err(|error| error.to_string())
    };
    for form in [PruneForm::Uniform, PruneForm::Ragged, PruneForm::FineGrained(FineGrained::new(3))] {
        assert!(check(None, form).unwrap_err().contains("choose whether they are kept, dropped or pruned"));
        check(Some(Mtp::Drop), form).unwrap();
    }
    assert!(check(Some(Mtp::Keep), PruneForm::Uniform).unwrap_err().contains("prune or drop them"));
    check(Some(Mtp::Keep), PruneForm::Ragged).unwrap();
    check(Some(Mtp::Prune), PruneForm::Uniform).unwrap();
    assert!(check(Some(Mtp::Prune), PruneForm::Masked).unwrap_err().contains("keep them"));
    // What the check lets pass works, and what it refuses does not.
    let plan = plan(&predicting, Scope::Expert, 0.5);
    for mtp in [None, Some(Mtp::Keep), Some(Mtp::Drop), Some(Mtp::Prune)] {
        for form in [PruneForm::Uniform, PruneForm::Ragged, PruneForm::Masked] {
            let options = PruneOptions { mtp, ..PruneOptions::new(form) };
            let done = plan.on(&predicting, &options).map(drop).map_err(|error| error.to_string());
            assert_eq!(done, check(mtp, form), "{mtp:?} {form}");
        }
    }
    let refused = |model: &Arc<Checkpoint>, how| {
        PruneOptions::new(PruneForm::FineGrained(how)).check(model).unwrap_err().to_string()
    };
    assert!(refused(&open(parity("tf5/phimoe")), FineGrained::new(2)).contains("sparsemixer"));
    assert!(refused(&model, FineGrained::new(5)).contains("5 equal pieces"));
    assert!(refused(&model, FineGrained { top_k: Some(33), ..FineGrained::new(4) }).contains("33 are selected"));
}

/// A checkpoint and further tensors, copies of those of its first layer.
fn with_tensors(model: &Arc<Checkpoint>, further: Vec<TensorSpec>, to: &Path) -> Arc<Checkpoint> {
    use std::borrow::Cow;

    use moe_checkpoint::{ModelDescription, ModelSource, TensorInfo};

    struct With(Arc<Checkpoint>);
    impl ModelSource for With {
        fn bytes(&self, tensor: &TensorInfo, range: std::ops::Range<usize>) -> moe_checkpoint::Result<Cow<'_, [u8]>> {
            let name = tensor.name.strip_prefix("mtp.layers.").map(|rest| format!("model.layers.{rest}"));
            self.0.tensor_bytes(name.as_ref().unwrap_or(&tensor.name), range)
        }
        fn base(&self) -> Option<&Arc<Checkpoint>> {
            Some(&self.0)
        }
    }
    let mut description = ModelDescription::of(model);
    description.tensors.extend(further);
    let with = Checkpoint::from_source(description, Arc::new(With(model.clone()))).unwrap();
    write(&with, to, &WriteOptions::default()).unwrap();
    open(to)
}

//! Plans carried out on checkpoints: what changes, what must not, and what is refused.

use crate::common;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;

use common::{contents, every_checkpoint, files, fuse, magnitude, parity, plan, tiny_moe, write_plan, write_plan_with};
use moe_checkpoint::{Checkpoint, Existing, ExpertLayout, ExpertWeights, RECORD_FILE, Record, WriteOptions};
use moe_prune::{
    Budget, Error, Export, Mtp, PRUNE_METHOD, ProtectionMask, PruneForm, PruneOptions, PrunePlan, PruneRecord, Pruner,
    Scope, UnitPruner, plan_from_masked,
};
use tempfile::tempdir;

/// Columns of a row-major matrix.
fn columns(matrix: &[f32], width: usize, kept: &[u32]) -> Vec<f32> {
    matrix.chunks_exact(width).flat_map(|row| kept.iter().map(|unit| row[*unit as usize])).collect()
}

/// Rows of a row-major matrix.
fn rows(matrix: &[f32], hidden: usize, kept: &[u32]) -> Vec<f32> {
    kept.iter().flat_map(|unit| matrix[*unit as usize * hidden..][..hidden].iter().copied()).collect()
}

/// `down · (silu(gate · x) * (up · x))` in f64.
fn forward(expert: &ExpertWeights, x: &[f64]) -> Vec<f64> {
    let ExpertWeights { gate, up, down, width, hidden, .. } = expert;
    let dot = |matrix: &[f32], j: usize| -> f64 {
        matrix[j * hidden..(j + 1) * hidden].iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()
    };
    let units: Vec<f64> = (0..*width)
        .map(|j| {
            let g = dot(gate, j);
            g / (1.0 + (-g).exp()) * dot(up, j)
        })
        .collect();
    (0..*hidden).map(|h| (0..*width).map(|j| f64::from(down[h * width + j]) * units[j]).sum()).collect()
}

/// What is read from a quantized checkpoint is what its unquantized copy holds.
fn assert_same_values(copy: &Checkpoint, model: &Checkpoint) {
    assert_eq!(copy.parameters(), model.parameters());
    for layer in &model.shape().layers {
        for expert in 0..layer.num_experts() {
            assert_eq!(copy.expert(layer.layer, expert).unwrap(), model.expert(layer.layer, expert).unwrap());
        }
    }
    let others = model.tensors().filter(|info| !info.name.contains(".experts.") && !model.is_scale(&info.name));
    for info in others {
        assert_eq!(copy.tensor_f32(&info.name).unwrap(), model.tensor_f32(&info.name).unwrap(), "{}", info.name);
    }
}

#[test]
fn keep_all_reproduces_every_tensor() {
    let directory = tempdir().unwrap();
    let mut sources = every_checkpoint();
    let mut families = BTreeSet::new();
    for source in &sources {
        let model = Checkpoint::open(source).unwrap();
        let text = model.family().text_config(model.raw_config());
        families.extend(text["model_type"].as_str().map(str::to_string));
        families.insert(model.config().model_type.clone());
    }
    let missing = moe_checkpoint::families().iter().find(|family| !families.contains(family.model_type()));
    assert!(missing.is_none(), "no fixture of {}", missing.unwrap().model_type());
    for name in ["tf5/qwen2_moe", "tf5/qwen2_moe_bf16", "tf5/qwen2_moe_mixed"] {
        let fused = directory.path().join(format!("fused-{}", name.replace('/', "-")));
        fuse(&Checkpoint::open(parity(name)).unwrap(), &fused);
        sources.push(fused);
    }
    for (number, source) in sources.iter().enumerate() {
        let model = Checkpoint::open(source).unwrap();
        let keep = PrunePlan::keep_all(model.shape(), model.fingerprint());
        let further = model.mtp_tensors().next().map(|_| Mtp::Keep);
        let options = |form| PruneOptions { mtp: further, ..PruneOptions::new(form) };
        for mode in [PruneForm::Uniform, PruneForm::Masked] {
            let out = directory.path().join(format!("{mode}-{number}"));
            let report = write_plan(&keep, &model, &out, &options(mode)).unwrap();
            let copy = Checkpoint::open(&out).unwrap();
            // Quantized experts of one width stay as they are; other forms are BF16.
            if model.quantization().is_some() && mode != PruneForm::Uniform {
                assert_eq!(copy.quantization(), None);
                assert_same_values(&copy, &model);
                continue;
            }
            assert_eq!(contents(&copy), contents(&model), "{} {mode}", source.display());
            assert_eq!(copy.raw_config(), model.raw_config());
            assert_eq!(copy.fingerprint(), model.fingerprint());
            assert_eq!(report.bytes.before, report.bytes.after);
        }
        // Ragged and back.
        let ragged_dir = directory.path().join(format!("ragged-{number}"));
        write_plan(&keep, &model, &ragged_dir, &options(PruneForm::Ragged)).unwrap();
        let ragged = Checkpoint::open(&ragged_dir).unwrap();
        assert!(ragged.ragged());
        let again = PrunePlan::keep_all(ragged.shape(), ragged.fingerprint());
        let back_dir = directory.path().join(format!("back-{number}"));
        write_plan(&again, &ragged, &back_dir, &options(PruneForm::Uniform)).unwrap();
        let back = Checkpoint::open(&back_dir).unwrap();
        if model.quantization().is_some() {
            assert_eq!(back.quantization(), None);
            assert_same_values(&back, &model);
            continue;
        }
        assert_eq!(back.raw_config(), model.raw_config());
        let layer = model.shape().layers[0].layer;
        if model.expert_layout(layer).unwrap() == model.family().stock_layout() {
            assert_eq!(contents(&back), contents(&model), "{}", source.display());
        }
    }
}

#[test]
fn masked_uniform_and_ragged_hold_the_same_numbers() {
    let directory = tempdir().unwrap();
    let out = |name: &str| directory.path().join(name);
    for (number, name) in ["tf5/qwen2_moe", "tf5/qwen2_moe_bf16", "tf5/qwen3_moe_sharded"].iter().enumerate() {
        let model = Checkpoint::open(parity(name)).unwrap();
        let plan = plan(&model, Scope::Expert, 0.5);
        let exports: Vec<Checkpoint> = [PruneForm::Masked, PruneForm::Uniform, PruneForm::Ragged]
            .map(|mode| {
                let out = out(&format!("{mode}-{number}"));
                write_plan(&plan, &model, &out, &PruneOptions::new(mode)).unwrap();
                Checkpoint::open(out).unwrap()
            })
            .into();
        assert_eq!(exports[0].shape(), model.shape());
        assert_eq!(exports[1].shape(), &plan.pruned_shape());
        assert_eq!(exports[2].shape(), &plan.pruned_shape());
        // floor(24 * 0.5) = 12 go; 12 is rounded up to a multiple of 8.
        assert_eq!(exports[1].raw_config()["moe_intermediate_size"], 16);
        for kept in &plan.kept {
            for (expert, kept_units) in kept.experts.iter().enumerate() {
                let full = model.expert(kept.layer, expert).unwrap();
                let [masked, uniform, ragged] =
                    [0, 1, 2].map(|index: usize| exports[index].expert(kept.layer, expert).unwrap());
                assert_eq!(uniform, ragged);
                assert_eq!(uniform.gate, rows(&full.gate, full.hidden, kept_units));
                assert_eq!(uniform.up, rows(&full.up, full.hidden, kept_units));
                assert_eq!(uniform.down, columns(&full.down, full.width, kept_units));
                assert_eq!(rows(&masked.gate, full.hidden, kept_units), uniform.gate);
                assert_eq!(columns(&masked.down, full.width, kept_units), uniform.down);
                let gone: Vec<u32> = (0..full.width as u32).filter(|unit| !kept_units.contains(unit)).collect();
                for zeros in [
                    rows(&masked.gate, full.hidden, &gone),
                    rows(&masked.up, full.hidden, &gone),
                    columns(&masked.down, full.width, &gone),
                ] {
                    assert!(zeros.iter().all(|value| value.to_bits() == 0));
                }
                let x: Vec<f64> = (0..full.hidden).map(|h| ((h * 7 + expert) % 11) as f64 / 5.0 - 1.0).collect();
                for (a, b) in forward(&masked, &x).iter().zip(forward(&uniform, &x)) {
                    assert!((a - b).abs() <= 1e-12 * (1.0 + b.abs()), "{a} {b}");
                }
            }
        }
    }
}

#[test]
fn nothing_but_the_routed_experts_changes() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(tiny_moe()).unwrap();
    let before = contents(&model);
    for (scope, mode) in
        [(Scope::Expert, PruneForm::Uniform), (Scope::Global, PruneForm::Ragged), (Scope::Global, PruneForm::Masked)]
    {
        let out = directory.path().join(mode.name());
        write_plan(&plan(&model, scope, 0.5), &model, &out, &PruneOptions::new(mode)).unwrap();
        let pruned = Checkpoint::open(&out).unwrap();
        let after = contents(&pruned);
        let others = |all: &std::collections::BTreeMap<String, _>| {
            all.keys().filter(|name| !name.contains(".mlp.experts.")).cloned().collect::<Vec<_>>()
        };
        assert_eq!(others(&before), others(&after));
        for name in others(&before) {
            assert_eq!(before[&name], after[&name], "{name}");
        }
        for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            assert_eq!(fs::read(out.join(name)).unwrap(), fs::read(model.dir().join(name)).unwrap());
        }
        assert_eq!(pruned.config().routing, model.config().routing);
    }
}

#[test]
fn fused_and_per_expert_layouts_give_the_same_plan_and_numbers() {
    let directory = tempdir().unwrap();
    for (number, name) in ["tf5/qwen2_moe_bf16", "tf5/qwen2_moe_mixed"].iter().enumerate() {
        let model = Checkpoint::open(parity(name)).unwrap();
        let path = directory.path().join(format!("fused-{number}"));
        fuse(&model, &path);
        let fused = Checkpoint::open(&path).unwrap();
        for scope in [Scope::Expert, Scope::Layer, Scope::Global] {
            assert_eq!(plan(&model, scope, 0.4).kept, plan(&fused, scope, 0.4).kept);
        }
        let options = |mode| PruneOptions { allow_unaligned: true, ..PruneOptions::new(mode) };
        let sharded = WriteOptions { max_shard_bytes: 10_000, ..Default::default() };
        for mode in [PruneForm::Uniform, PruneForm::Masked, PruneForm::Ragged] {
            let [a, b] = [("a", &model), ("b", &fused)].map(|(letter, from)| {
                let out = directory.path().join(format!("{letter}-{mode}-{number}"));
                write_plan_with(&plan(from, Scope::Expert, 0.4), from, &out, &options(mode), &sharded).unwrap();
                Checkpoint::open(out).unwrap()
            });
            for layer in &a.shape().layers {
                let layout = |c: &Checkpoint| c.expert_layout(layer.layer).unwrap();
                if mode != PruneForm::Ragged {
                    assert_eq!((layout(&a), layout(&b)), (ExpertLayout::PerExpert, ExpertLayout::Fused));
                }
                for expert in 0..layer.num_experts() {
                    assert_eq!(a.expert(layer.layer, expert).unwrap(), b.expert(layer.layer, expert).unwrap());
                }
            }
        }
    }
}

#[test]
fn ragged_widths_may_be_zero_and_whole_layers_empty() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(parity("tf5/qwen2_moe_bf16")).unwrap();
    let mut scores = magnitude(&model);
    // The first layer and one expert of the second score lowest.
    scores.layers[0].scores.iter_mut().flatten().for_each(|score| *score = 0.0);
    scores.layers[1].scores[3].fill(0.0);
    let units = model.shape().units();
    let ratio = (8 * 24 + 24) as f64 / units as f64 + 1e-9;
    let plan = UnitPruner::new(Scope::Global)
        .prune(&scores, model.shape(), Budget::Ratio(ratio), &ProtectionMask::none())
        .unwrap()
        .plan;
    let out = directory.path().join("ragged");
    let report = write_plan(&plan, &model, &out, &PruneOptions::new(PruneForm::Ragged)).unwrap();
    assert_eq!((report.layers[0].emptied, report.layers[0].max_width, report.layers[1].emptied), (8, 0, 1));
    let ragged = Checkpoint::open(&out).unwrap();
    assert_eq!(ragged.shape(), &plan.pruned_shape());
    assert_eq!(ragged.expert(0, 2).unwrap().width, 0);
    // Pruned once more, from the ragged checkpoint, and masked there.
    let again = common::plan(&ragged, Scope::Layer, 0.25);
    for mode in [PruneForm::Ragged, PruneForm::Masked] {
        let out = directory.path().join(format!("again-{mode}"));
        write_plan(&again, &ragged, &out, &PruneOptions::new(mode)).unwrap();
        let twice = Checkpoint::open(&out).unwrap();
        let layer = model.shape().layers[1].layer;
        let full = ragged.expert(layer, 1).unwrap();
        let kept = &again.kept[1].experts[1];
        let expert = twice.expert(layer, 1).unwrap();
        let gate = if mode == PruneForm::Masked { rows(&expert.gate, full.hidden, kept) } else { expert.gate };
        assert_eq!(gate, rows(&full.gate, full.hidden, kept));
    }
}

#[test]
fn a_masked_checkpoint_gives_its_plan_back() {
    let directory = tempdir().unwrap();
    for (name, scope) in
        [("tf5/qwen2_moe", Scope::Expert), ("tf5/qwen2_moe_bf16", Scope::Global), ("tf5/qwen3_moe", Scope::Layer)]
    {
        let model = Checkpoint::open(parity(name)).unwrap();
        let plan = plan(&model, scope, 0.5);
        let out = directory.path().join(name.replace('/', "-"));
        write_plan(&plan, &model, &out, &PruneOptions::new(PruneForm::Masked)).unwrap();
        let masked = Checkpoint::open(&out).unwrap();
        let found = plan_from_masked(&masked).unwrap();
        assert_eq!(found.kept, plan.kept);
        assert_eq!(found.model, masked.fingerprint());
        // Structural from masked equals structural from the original.
        let direct = directory.path().join(format!("direct-{}", name.replace('/', "-")));
        let through = directory.path().join(format!("through-{}", name.replace('/', "-")));
        write_plan(&plan, &model, &direct, &PruneOptions::new(PruneForm::Ragged)).unwrap();
        write_plan(&found, &masked, &through, &PruneOptions::new(PruneForm::Ragged)).unwrap();
        assert_eq!(contents(&Checkpoint::open(direct).unwrap()), contents(&Checkpoint::open(through).unwrap()));
    }
}

#[test]
fn what_stock_loaders_would_misread_is_refused() {
    let directory = tempdir().unwrap();
    let out = directory.path().join("out");
    let model = Checkpoint::open(parity("tf5/qwen2_moe")).unwrap();
    let options = PruneOptions::new(PruneForm::Uniform);
    let refused = |plan: &PrunePlan| write_plan(plan, &model, &out, &options).unwrap_err().to_string();
    let message = refused(&plan(&model, Scope::Global, 0.5));
    assert!(message.contains("expert 0 of layer 0 has") && message.contains("expert 1 of layer 0 has"), "{message}");
    let pruner = UnitPruner::new(Scope::Expert).round_to(1);
    let odd =
        pruner.prune(&magnitude(&model), model.shape(), Budget::Ratio(0.5), &ProtectionMask::none()).unwrap().plan;
    assert!(refused(&odd).contains("width 12 is not a multiple of 8"));
    let mut empty = odd.clone();
    empty.kept.iter_mut().flat_map(|layer| &mut layer.experts).for_each(Vec::clear);
    empty.ratio.achieved = 1.0;
    assert!(refused(&empty).contains("any unit"));
    assert!(!out.exists() && !directory.path().join("out.partial").exists());
    write_plan(&odd, &model, &out, &PruneOptions { allow_unaligned: true, ..options }).unwrap();
    assert_eq!(Checkpoint::open(&out).unwrap().shape().uniform_width(), Some(12));
}

#[test]
fn a_plan_belongs_to_one_model() {
    let directory = tempdir().unwrap();
    let out = directory.path().join("out");
    let model = Checkpoint::open(parity("tf5/qwen2_moe")).unwrap();
    let other = Checkpoint::open(parity("tf5/qwen2_moe_linear")).unwrap();
    let plan = plan(&model, Scope::Global, 0.5);
    let error = write_plan(&plan, &other, &out, &PruneOptions::new(PruneForm::Ragged)).unwrap_err();
    assert!(matches!(&error, Error::OtherModel { found, .. } if *found == other.fingerprint()), "{error}");
    let force = WriteOptions { existing: Existing::Force, ..Default::default() };
    let here = write_plan_with(&plan, &model, model.dir(), &PruneOptions::new(PruneForm::Ragged), &force);
    assert!(here.unwrap_err().to_string().contains("checkpoint itself"));
    assert!(!out.exists());
}

#[test]
fn outputs_are_not_overwritten_unless_forced() {
    let directory = tempdir().unwrap();
    let out = directory.path().join("out");
    let model = Checkpoint::open(parity("tf5/qwen2_moe")).unwrap();
    let plan = plan(&model, Scope::Global, 0.5);
    let options = PruneOptions::new(PruneForm::Ragged);
    write_plan(&plan, &model, &out, &options).unwrap();
    let before = files(&out);
    assert!(write_plan(&plan, &model, &out, &options).is_err());
    let existing = |existing| WriteOptions { existing, ..Default::default() };
    assert!(write_plan_with(&plan, &model, &out, &options, &existing(Existing::Resume)).is_err());
    assert_eq!(files(&out), before);
    let masked = PruneOptions::new(PruneForm::Masked);
    write_plan_with(&plan, &model, &out, &masked, &existing(Existing::Force)).unwrap();
    assert!(!Checkpoint::open(&out).unwrap().ragged());
}

#[test]
fn an_interrupted_run_resumes_to_the_same_bytes() {
    let directory = tempdir().unwrap();
    let model = Checkpoint::open(tiny_moe()).unwrap();
    for (mode, scope) in
        [(PruneForm::Uniform, Scope::Expert), (PruneForm::Ragged, Scope::Global), (PruneForm::Masked, Scope::Layer)]
    {
        let plan = plan(&model, scope, 0.5);
        let options = PruneOptions::new(mode);
        let sharded = WriteOptions { max_shard_bytes: 300_000, ..Default::default() };
        let through = directory.path().join(format!("through-{mode}"));
        write_plan_with(&plan, &model, &through, &options, &sharded).unwrap();
        let out = directory.path().join(format!("out-{mode}"));
        let shared = Arc::new(Checkpoint::open(model.dir()).unwrap());
        let total = plan.on(&shared, &options).unwrap().report().bytes.after;
        let mut runs = 0;
        // Every run gets a third of the model further and is stopped then.
        for part in 1..=3u64 {
            let calls = Cell::new(0u32);
            let stop = |progress: &moe_prune::Progress<'_>| {
                calls.set(calls.get() + 1);
                assert_eq!(progress.total, total);
                if progress.done > part * total / 4 { Err("stopped".into()) } else { Ok(()) }
            };
            let stopped = WriteOptions { progress: Some(&stop), existing: Existing::Resume, ..sharded };
            let error = write_plan_with(&plan, &model, &out, &options, &stopped).unwrap_err();
            let Error::Checkpoint(error) = error else { panic!("{error}") };
            let interrupted = |source: &dyn std::error::Error| source.to_string() == "stopped";
            assert!(matches!(&*error, moe_checkpoint::Error::Interrupted(source) if interrupted(&**source)), "{error}");
            assert!(calls.get() > 0 && !out.exists());
            runs += 1;
        }
        assert_eq!(runs, 3);
        let partial = directory.path().join(format!("out-{mode}.partial"));
        assert!(files(&partial).keys().filter(|name| name.ends_with(".safetensors")).count() > 1);
        // Neither a fresh start nor another plan takes what is there.
        assert!(write_plan_with(&plan, &model, &out, &options, &sharded).is_err());
        let resume = WriteOptions { existing: Existing::Resume, ..sharded };
        let other = common::plan(&model, scope, 0.25);
        assert!(write_plan_with(&other, &model, &out, &options, &resume).is_err());
        let first = Cell::new(None);
        let watch = |progress: &moe_prune::Progress<'_>| {
            first.set(first.get().or(Some(progress.done)));
            Ok(())
        };
        let watched = WriteOptions { progress: Some(&watch), ..resume };
        write_plan_with(&plan, &model, &out, &options, &watched).unwrap();
        assert!(first.get().unwrap() > total / 2, "the finished shards were not written again");
        assert!(!partial.exists());
        assert_eq!(files(&out), files(&through));
    }
}

#[test]
fn the_output_tells_what_was_done() {
    let directory = tempdir().unwrap();
    let out = directory.path().join("out");
    let model = Checkpoint::open(tiny_moe()).unwrap();
    let mut plan = plan(&model, Scope::Global, 0.5);
    plan.never_routed.push(moe_prune::ExpertId { layer: 2, expert: 7 });
    let report = write_plan(&plan, &model, &out, &PruneOptions::new(PruneForm::Ragged)).unwrap();
    let applied: PruneRecord = Record::load(&out).unwrap().recipe(PRUNE_METHOD).unwrap().unwrap();
    assert_eq!((applied.export, &applied.report, &applied.plan), (Export::Ragged, &report, &plan));
    let pruned = Checkpoint::open(&out).unwrap();
    assert_eq!(report.bytes.after, pruned.bytes_on_disk());
    assert_eq!(report.parameters.after, pruned.parameters());
    assert_eq!(report.units.after, pruned.shape().units() as u64);
    assert_eq!(report.units.before - report.units.after, 4 * 16 * 96 / 2);
    let text = report.to_string();
    for part in ["50.0000%", "never routed", "(layer 2, expert 7)", "ragged export"] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(text.lines().count(), 1 + 4 + 4);
    let json = fs::read_to_string(out.join(RECORD_FILE)).unwrap();
    fs::write(out.join(RECORD_FILE), json.replacen("\"version\": 1", "\"version\": 9", 1)).unwrap();
    assert!(matches!(Record::load(&out), Err(moe_checkpoint::Error::ArtifactVersion { found: 9, .. })));
}

//! Repairs on the bundled trained model: what they win back after half of the units, or a quarter of the experts, are
//! gone.
//!
//! `cargo test --release --workspace --test repair -- --nocapture` prints the measured divergences.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use moe_checkpoint::group::{Group, Threads};
use moe_checkpoint::{WriteOptions, write};
use moe_core::data::{Dataset, DatasetOptions, Sequence, Tokenizer, Wave, WaveOptions, waves};
use moe_core::evaluate::divergence;
use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, Observer, Signals};
use moe_core::train::{JsonLines, Schedule, TrainEvent, TrainOptions};
use moe_core::{Engine, EngineOptions, Model, TeacherLogits};
use moe_examples::TINY_MOE;
use moe_importance::{Calibration, Scorer};
use moe_prune::repair::{
    LayerRefit, MeanOutput, Refit, Repair, RepairRequest, RouterDistillation, Target, TokenWeight, layer_errors,
};
use moe_prune::{
    Budget, EditSource, Edits, ProtectionMask, PruneForm, PruneOptions, PrunePlan, Pruner, Scope, UnitPruner,
};

fn model() -> Model {
    Model::open(TINY_MOE, &moe_core::device::device("flex").unwrap(), None).unwrap()
}

/// The first rows of arithmetic, facts and prose, taking turns.
fn rows(kind: &str, samples: usize) -> Vec<Sequence> {
    let tokenizer = Tokenizer::from_dir(TINY_MOE).unwrap();
    let sets = ["arithmetic", "facts", "prose"].map(|name| {
        let path = format!("{TINY_MOE}/data/{name}_{kind}.jsonl");
        let options = DatasetOptions { samples: Some(samples), ..Default::default() };
        Dataset::load(path, Some(&tokenizer), tokenizer.vocab_size(), &options).unwrap().sequences
    });
    (0..samples).flat_map(|i| sets.iter().filter_map(move |set| set.get(i).cloned())).collect()
}

fn calibration(samples: usize, tokens: usize) -> Vec<Wave> {
    waves(&rows("calibration", samples), WaveOptions::Tokens(tokens.try_into().unwrap()))
}

/// Rows that nothing is fitted to, under ids of their own.
fn held_out() -> Vec<Wave> {
    let mut waves = waves(&rows("test", 80), WaveOptions::default());
    waves.iter_mut().for_each(|wave| wave.id += 1 << 32);
    waves
}

/// Divergence from the full model on the held-out rows.
fn held_out_divergence(model: &Model) -> f64 {
    static TEACHER: OnceLock<TeacherLogits> = OnceLock::new();
    let full = self::model();
    let record = || TeacherLogits::record(&Engine::new(&full, EngineOptions::default()), &held_out(), 2048).unwrap();
    divergence(model, TEACHER.get_or_init(record), &held_out()).unwrap()
}

/// Keeps half of the units of every expert, by their gradients.
fn half(model: &Model) -> PrunePlan {
    let fisher = moe_importance::scorers::Fisher::default();
    let statistics = Calibration::of_waves(model, &calibration(40, 4096)).scorers([&fisher as &dyn Scorer]);
    let statistics = statistics.run(&mut |_| ()).unwrap();
    let scores = fisher.score(&statistics, model.checkpoint().as_ref()).unwrap();
    let pruner = UnitPruner::new(Scope::Expert);
    pruner.prune(&scores, model.checkpoint().shape(), Budget::Ratio(0.5), &ProtectionMask::none()).unwrap().plan
}

/// Drops every unit of experts 1, 5, 9 and 13 of each layer, and the experts themselves if `removed`.
fn without_experts(model: &Model, removed: bool) -> PrunePlan {
    let mut plan = PrunePlan::keep_all(model.checkpoint().shape(), model.checkpoint().fingerprint());
    for layer in &mut plan.kept {
        for expert in [1, 5, 9, 13] {
            layer.experts[expert].clear();
            if removed {
                layer.removed.push(expert as u32);
            }
        }
    }
    (plan.ratio.asked, plan.ratio.achieved) = (0.25, 0.25);
    plan
}

fn pruned(model: &Model, plan: &PrunePlan) -> Model {
    changed(model, plan, &PruneOptions::new(PruneForm::Ragged))
}

fn repaired(model: &Model, plan: &PrunePlan, edits: &Edits) -> Model {
    changed(model, plan, &with(edits, PruneForm::Ragged))
}

fn with(edits: &Edits, form: PruneForm<'static>) -> PruneOptions<'static> {
    let edits: Arc<dyn EditSource> = Arc::new(edits.clone());
    PruneOptions { edits: Some(edits), ..PruneOptions::new(form) }
}

fn changed(model: &Model, plan: &PrunePlan, options: &PruneOptions<'_>) -> Model {
    let pruned = plan.on(model.checkpoint(), options).unwrap();
    Model::new(pruned.model().clone(), model.device(), None).unwrap()
}

fn errors(full: &Model, changed: &Model) -> Vec<f64> {
    layer_errors(full, changed, &held_out()).unwrap().iter().map(|layer| layer.error).collect()
}

fn show(what: &str, kl: f64, errors: &[f64]) {
    let errors: Vec<String> = errors.iter().map(|error| format!("{error:.3}")).collect();
    println!("{what:<44} KL {kl:.4}  layer errors {}", errors.join(" "));
}

#[test]
fn refits_bring_layers_and_predictions_back() {
    let full = model();
    let (plan, waves) = (half(&full), calibration(150, 4096));
    let student = pruned(&full, &plan);
    let (before, errors_before) = (held_out_divergence(&student), errors(&full, &student));
    show("half of the units of every expert", before, &errors_before);
    assert!(held_out_divergence(&full).abs() < 1e-6);

    let mut told = Vec::new();
    let refit = Refit::default().fit(&full, &plan, &waves, &mut |done, of| told.push((done, of))).unwrap();
    assert_eq!(told, [(1, 4), (2, 4), (3, 4), (4, 4)]);
    let fitted = repaired(&full, &plan, &refit);
    let (kl, after) = (held_out_divergence(&fitted), errors(&full, &fitted));
    show("refit", kl, &after);
    assert!(kl < 0.8 * before, "{kl} of {before}");
    assert!(after.iter().zip(&errors_before).all(|(after, before)| *after < 0.6 * before), "{after:?}");
    assert_eq!(Refit::default().fit(&full, &plan, &waves, &mut |_, _| ()).unwrap(), refit);

    for target in [Target::Same, Target::Layer] {
        let options = LayerRefit { target, ..LayerRefit::default() };
        let layers = options.fit(&full, &student, &waves, &mut |_, _| ()).unwrap();
        assert!(layers.layers.iter().all(|layer| layer.after < 0.7 * layer.before), "{:?}", layers.layers);
        let fitted = repaired(&full, &plan, &layers.edits.clone().of_plan(&plan).unwrap());
        let (kl, after) = (held_out_divergence(&fitted), errors(&full, &fitted));
        show(&format!("layer refit, target {target:?}"), kl, &after);
        assert!(kl < 0.85 * before, "{kl} of {before}");
        assert_eq!(options.fit(&full, &student, &waves, &mut |_, _| ()).unwrap(), layers);
    }

    let mean = MeanOutput::default().fit(&full, &plan, &waves, &mut |_, _| ()).unwrap();
    let compensated = repaired(&full, &plan, &mean);
    let (kl, after) = (held_out_divergence(&compensated), errors(&full, &compensated));
    show("mean output", kl, &after);
    assert!(after.iter().zip(&errors_before).all(|(after, before)| after < before), "{after:?}");

    // the checkpoint that is written predicts as the model that was measured does
    let directory = tempfile::tempdir().unwrap();
    for (edits, form) in [(&refit, PruneForm::Uniform), (&mean, PruneForm::Ragged)] {
        let to = directory.path().join(form.to_string());
        let repaired = changed(&full, &plan, &with(edits, form));
        write(repaired.checkpoint(), &to, &WriteOptions::default()).unwrap();
        let written = held_out_divergence(&Model::open(&to, full.device(), None).unwrap());
        let seen = held_out_divergence(&repaired);
        assert_eq!(written, seen, "{form}");
    }
}

#[test]
fn means_that_are_shared_out_and_gone_on_with_are_those_of_one_run_for_any_plan() {
    let full = model();
    let (plan, waves) = (half(&full), calibration(40, 1024));
    assert!(waves.len() > 2);
    let mean = MeanOutput { by_routing_weight: true, ..MeanOutput::default() };
    let mut told = Vec::new();
    let edits = mean.fit(&full, &plan, &waves, &mut |done, of| told.push((done, of))).unwrap();
    assert_eq!(told.last().map(|(done, of)| done == of), Some(true));
    assert!(told.windows(2).all(|pair| pair[0].0 <= pair[1].0) && told.len() > waves.len());

    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let seen = || Calibration::of_waves(&full, &waves).collector(mean.collector());
    for index in 0..2 {
        seen().shard(index, 2).store(at(&format!("shard{index}"))).run(&mut |_| ()).unwrap();
    }
    let folded = seen().store(at("folded")).absorb([at("shard0"), at("shard1")]).run(&mut |_| ()).unwrap();
    assert_eq!(mean.edits(&folded, full.checkpoint(), &plan).unwrap(), edits);
    // The same statistics serve another plan; and a request goes on with them, running nothing.
    let store = at("folded");
    let request = RepairRequest { store: Some(&store), ..RepairRequest::new(&full, &plan, &waves) };
    let mut told = 0;
    assert_eq!(mean.repair(&request, &mut |_, _| told += 1).unwrap(), edits);
    assert_eq!(told, 1);
    let other = without_experts(&full, false);
    let fitted = mean.fit(&full, &other, &waves, &mut |_, _| ()).unwrap();
    assert_eq!(mean.edits(&folded, full.checkpoint(), &other).unwrap(), fitted);
}

#[test]
fn refits_that_were_stopped_go_on_with_the_layer_they_were_in() {
    let full = model();
    let (plan, waves) = (half(&full), calibration(20, 1024));
    let student = pruned(&full, &plan);
    let directory = tempfile::tempdir().unwrap();
    let refits: [&dyn Repair; 3] =
        [&Refit::default(), &LayerRefit::default(), &LayerRefit { target: Target::Layer, ..LayerRefit::default() }];
    for (number, refit) in refits.into_iter().enumerate() {
        let plain = RepairRequest { pruned: Some(&student), ..RepairRequest::new(&full, &plan, &waves) };
        let whole = refit.repair(&plain, &mut |_, _| ()).unwrap();
        let store = directory.path().join(number.to_string());
        let request = RepairRequest { store: Some(&store), ..plain };
        assert_eq!(refit.repair(&request, &mut |_, _| ()).unwrap(), whole);
        // Of what that run has left, the last two layers go, as if it had been stopped before them.
        let layers = std::fs::read_dir(&store).unwrap().next().unwrap().unwrap().path();
        let file = |layer: usize| layers.join(format!("layer-{layer:04}.safetensors"));
        let first = std::fs::metadata(file(0)).unwrap().modified().unwrap();
        std::fs::remove_file(file(2)).unwrap();
        std::fs::remove_file(file(3)).unwrap();
        assert_eq!(refit.repair(&request, &mut |_, _| ()).unwrap(), whole, "{number}");
        assert_eq!(std::fs::metadata(file(0)).unwrap().modified().unwrap(), first, "not done again");
        assert!(file(3).exists());
        // Other rows are another fit.
        let other = RepairRequest { waves: &waves[..1], ..request };
        assert_ne!(refit.repair(&other, &mut |_, _| ()).unwrap(), whole);
    }
}

#[test]
fn refits_that_are_shared_out_are_those_of_one_run() {
    let full = model();
    let (plan, waves) = (half(&full), calibration(40, 1024));
    let student = pruned(&full, &plan);
    let directory = tempfile::tempdir().unwrap();
    let plain = RepairRequest { pruned: Some(&student), ..RepairRequest::new(&full, &plan, &waves) };
    let repairs: [(&str, &dyn Repair); 2] = [("refit", &Refit::default()), ("mean", &MeanOutput::default())];
    for (name, repair) in repairs {
        let whole = repair.repair(&plain, &mut |_, _| ()).unwrap();
        let stores = [0, 1, 2].map(|index| directory.path().join(format!("{name}{index}")));
        for (index, store) in stores.iter().enumerate() {
            let request = RepairRequest { store: Some(store), shard: Some((index, 3)), ..plain };
            repair.check(&request).unwrap();
            let part = repair.repair(&request, &mut |_, _| ()).unwrap();
            assert_ne!(part, whole, "{name}");
        }
        let store = directory.path().join(name);
        let request = RepairRequest { store: Some(&store), absorb: &stores, ..plain };
        let mut told = 0;
        assert_eq!(repair.repair(&request, &mut |_, _| told += 1).unwrap(), whole, "{name}");
        assert!(told <= 1, "{name}: the model was run again");
        // Without one of the parts, what is missing is done.
        let store = directory.path().join(format!("{name}-two"));
        let request = RepairRequest { store: Some(&store), absorb: &stores[1..], ..plain };
        assert_eq!(repair.repair(&request, &mut |_, _| ()).unwrap(), whole, "{name}");
    }
    let expect = |repair: &dyn Repair, request: RepairRequest<'_>, word: &str| {
        let error = repair.repair(&request, &mut |_, _| ()).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    let (store, other) = (directory.path().join("new"), [directory.path().join("mean")]);
    let kept = RepairRequest { store: Some(&store), ..plain };
    expect(&Refit::default(), RepairRequest { shard: Some((0, 2)), ..plain }, "store is none");
    expect(&Refit::default(), RepairRequest { shard: Some((2, 2)), ..kept }, "2/2");
    expect(&Refit::default(), RepairRequest { absorb: &other, ..kept }, "mean, without layers-");
    expect(&LayerRefit::default(), RepairRequest { shard: Some((0, 2)), ..kept }, "one process");
    expect(&RouterDistillation::default(), RepairRequest { absorb: &other, ..kept }, "one process");
}

#[test]
fn repairs_by_several_ranks_are_those_of_one_process() {
    let full = model();
    let (plan, waves) = (half(&full), calibration(12, 256));
    assert!((4..9).contains(&waves.len()), "{} waves, so that ranks have different numbers of them", waves.len());
    let student = pruned(&full, &plan);
    let directory = tempfile::tempdir().unwrap();
    let one = RepairRequest { pruned: Some(&student), ..RepairRequest::new(&full, &plan, &waves) };
    let train = TrainOptions { waves_per_step: 3, epochs: 1, ..RouterDistillation::default().train };
    let streams = LayerRefit { target: Target::Layer, ..LayerRefit::default() };
    let repairs: [(&str, &(dyn Repair + Sync)); 5] = [
        ("refit", &Refit::default()),
        ("mean", &MeanOutput::default()),
        ("layers", &LayerRefit::default()),
        ("streams", &streams),
        ("routers", &RouterDistillation { train, ..RouterDistillation::default() }),
    ];
    let tokens = || full.work().tokens + student.work().tokens;
    for (name, repair) in repairs {
        let before = tokens();
        let whole = repair.repair(&one, &mut |_, _| ()).unwrap();
        let run = tokens() - before;
        assert!(run > 0, "{name}");
        // More ranks than waves, too: some have nothing to run.
        for ranks in [1, 2, 3, 5, waves.len() + 1] {
            let store = directory.path().join(format!("{name}-{ranks}"));
            for store in [None, Some(store.as_path()), Some(store.as_path())] {
                let before = tokens();
                let all = Threads::run(ranks, |group| {
                    let request = RepairRequest { store, group, ..one };
                    repair.repair(&request, &mut |_, _| ()).unwrap()
                });
                assert!(all.iter().all(|edits| *edits == whole), "{name} by {ranks} ranks, store {store:?}");
                // All together run as many tokens as one process does; the refit by layers runs all of them on each.
                if store.is_none() && name != "refit" {
                    assert_eq!(tokens() - before, run, "{name} by {ranks} ranks");
                }
            }
        }
    }
    let both = Threads::run(2, |group| {
        let request = RepairRequest { store: Some(directory.path()), shard: Some((0, 2)), group, ..one };
        Refit::default().repair(&request, &mut |_, _| ()).unwrap_err().to_string()
    });
    assert!(both.iter().all(|error| error.contains("2 processes")), "{both:?}");
    let failed = Threads::run(3, |group| {
        let waves = if group.rank() == 1 { &[][..] } else { &waves[..] };
        LayerRefit::default().repair(&RepairRequest { waves, group, ..one }, &mut |_, _| ()).unwrap_err().to_string()
    });
    assert!(failed[0].contains("rank 1: ") && failed[2] == failed[0], "{failed:?}");
}

#[test]
fn there_is_nothing_to_repair_where_everything_is_kept() {
    let full = model();
    let all = PrunePlan::keep_all(full.checkpoint().shape(), full.checkpoint().fingerprint());
    let waves = calibration(40, 4096);
    assert!(Refit::default().fit(&full, &all, &waves, &mut |_, _| ()).unwrap().is_empty());
    assert!(MeanOutput::default().fit(&full, &all, &waves, &mut |_, _| ()).unwrap().is_empty());
    let student = pruned(&full, &all);
    let edits = LayerRefit::default().fit(&full, &student, &waves, &mut |_, _| ()).unwrap().edits;
    let mut fitted = 0;
    for ((layer, expert), edit) in edits.experts() {
        let down = full.checkpoint().expert(layer, expert).unwrap().down;
        let worst = edit.down.iter().flatten().zip(&down).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "layer {layer}, expert {expert}: {worst}");
        fitted += 1;
    }
    assert!(fitted > 50, "{fitted} experts fitted");
}

#[test]
fn what_is_left_makes_good_for_experts_that_are_gone() {
    let full = model();
    let waves = calibration(150, 4096);
    let plan = without_experts(&full, true);
    let student = pruned(&full, &plan);
    let (before, errors_before) = (held_out_divergence(&student), errors(&full, &student));
    show("a quarter of the experts removed", before, &errors_before);
    let refit = Refit::default().fit(&full, &plan, &waves, &mut |_, _| ()).unwrap();
    assert!(refit.experts().all(|((_, expert), _)| expert % 4 != 1));
    let fitted = repaired(&full, &plan, &refit);
    show("refit", held_out_divergence(&fitted), &errors(&full, &fitted));
    let layers = LayerRefit::default().fit(&full, &student, &waves, &mut |_, _| ()).unwrap();
    // the student numbers the experts that are left; beside the plan they have the numbers of the full model
    let fitted = repaired(&full, &plan, &layers.edits.clone().of_plan(&plan).unwrap());
    // or the edits are those of the student itself
    let all = PrunePlan::keep_all(student.checkpoint().shape(), student.checkpoint().fingerprint());
    let stacked = held_out_divergence(&repaired(&student, &all, &layers.edits));
    assert_eq!(stacked, held_out_divergence(&fitted));
    let (kl, after) = (held_out_divergence(&fitted), errors(&full, &fitted));
    show("layer refit", kl, &after);
    assert!(kl < 0.8 * before, "{kl} of {before}");
    assert!(after.iter().zip(&errors_before).all(|(after, before)| after < before), "{after:?}");

    // the router goes on choosing them, and gets a constant: nearer to what they gave, which need not show in the
    // divergence
    let plan = without_experts(&full, false);
    let student = pruned(&full, &plan);
    let before = errors(&full, &student);
    show("a quarter of the experts empty", held_out_divergence(&student), &before);
    let novices = MeanOutput { tokens: TokenWeight::Equal, ..MeanOutput::default() };
    let novices = novices.fit(&full, &plan, &waves, &mut |_, _| ()).unwrap();
    let fitted = repaired(&full, &plan, &novices);
    let after = errors(&full, &fitted);
    show("novices", held_out_divergence(&fitted), &after);
    assert!(after.iter().zip(&before).all(|(after, before)| after < before), "{after:?}");

    // the constant is the mean of the expert's outputs
    let mut means = MeanOutputs::default();
    waves.iter().for_each(|w| drop(Engine::new(&full, EngineOptions::default()).run(w, &mut means).unwrap()));
    let mut compared = 0;
    for ((layer, expert), edit) in novices.experts() {
        let (sums, tokens) = &means.0[&(layer, expert)];
        assert!(expert % 4 == 1 && edit.down.is_none());
        for (bias, sum) in edit.down_bias.as_ref().unwrap().iter().zip(sums) {
            assert!((f64::from(*bias) - sum / tokens).abs() < 1e-4 * (1.0 + sum.abs() / tokens), "{layer} {expert}");
            compared += 1;
        }
    }
    assert_eq!(compared, 4 * 4 * 128);
}

/// Sums of the outputs of each expert, and their number.
#[derive(Default)]
struct MeanOutputs(BTreeMap<(usize, usize), (Vec<f64>, f64)>);

impl Observer for MeanOutputs {
    fn needs(&self) -> Signals {
        Signals::OUTPUTS
    }
    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        let output = HostView::new(trace.output.unwrap());
        let hidden = output.as_slice().len() / trace.rows.len();
        let (sums, tokens) = self.0.entry((trace.layer, trace.expert)).or_insert_with(|| (vec![0.0; hidden], 0.0));
        for row in output.as_slice().chunks(hidden) {
            *tokens += 1.0;
            sums.iter_mut().zip(row).for_each(|(sum, y)| *sum += f64::from(*y));
        }
        Ok(())
    }
}

#[test]
fn routers_learn_what_the_experts_have_become() {
    let full = model();
    let plan = half(&full);
    let refit = Refit::default().fit(&full, &plan, &calibration(150, 4096), &mut |_, _| ()).unwrap();
    let student = repaired(&full, &plan, &refit);
    let before = held_out_divergence(&student);
    let waves = calibration(150, 1024);
    let schedule = Schedule { peak: 3e-3, ..Schedule::default() };
    let train = TrainOptions { epochs: 2, evaluate_every: Some(8), schedule, ..TrainOptions::default() };
    let distillation = RouterDistillation { top: 64, train: train.clone() };
    let mut lines = JsonLines(Vec::new());
    let found = distillation.fit(&full, &student, &waves, &[], &mut |event| lines.write(event)).unwrap();
    let events: Vec<TrainEvent> =
        String::from_utf8(lines.0).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps = events.iter().filter(|event| matches!(event, TrainEvent::Step { .. })).count();
    assert_eq!((steps, found.report.steps), (train.steps(waves.len()), steps));
    assert!(found.report.best.unwrap().value < 0.9 * found.report.before.unwrap(), "{:?}", found.report);
    assert!(found.edits.experts().next().is_none() && found.edits.routers().count() == 4);

    let mut both = refit.clone();
    both.extend(found.edits.clone());
    let distilled = held_out_divergence(&repaired(&full, &plan, &both));
    println!("refit {before:.4}, then router distillation {distilled:.4}; on its rows {:?}", found.report);
    assert!(distilled < before, "{distilled} after {before}");

    // three steps are enough to see that runs repeat
    let train = TrainOptions { epochs: 1, ..train };
    let short = RouterDistillation { train, ..distillation };
    let run = || short.fit(&full, &student, &waves[..3], &waves[3..4], &mut |_| Ok(())).unwrap();
    assert_eq!(run(), run());
}

#[test]
fn repairs_of_other_models_and_bad_parameters_are_refused() {
    let full = model();
    let waves = calibration(3, 4096);
    let plan = PrunePlan { model: "another".into(), ..half(&full) };
    let error = Refit::default().fit(&full, &plan, &waves, &mut |_, _| ()).unwrap_err().to_string();
    assert!(error.contains("another"), "{error}");
    let error = MeanOutput::default().fit(&full, &plan, &waves, &mut |_, _| ()).unwrap_err().to_string();
    assert!(error.contains("another"), "{error}");
    let refit = Refit { ridge: 0.0, ..Refit::default() };
    let error = refit.fit(&full, &half(&full), &waves, &mut |_, _| ()).unwrap_err().to_string();
    assert!(error.contains("ridge is 0"), "{error}");
    let sweeps = LayerRefit { sweeps: 0, ..LayerRefit::default() };
    let error = sweeps.fit(&full, &full, &waves, &mut |_, _| ()).unwrap_err().to_string();
    assert!(error.contains("sweeps"), "{error}");
    let top = RouterDistillation { top: 0, ..RouterDistillation::default() };
    let error = top.fit(&full, &full, &waves, &[], &mut |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("top"), "{error}");
}

//! Whole recipes: from their check to what they leave, and back from the files.

use crate::common;
use crate::tuning;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use common::{distance, logits};
use moe_checkpoint::Existing;
use moe_core::{
    Model,
    data::Wave,
    train::{Schedule, TrainEvent},
};
use moe_peft::{
    AdapterSet, FineTune, MethodConfig, Recipe, Result, RunEvent, SavedKind, Setting, Trained, TrainingRun,
    TuningMethod,
    fold::FoldPrecision,
    lora::{Maps, Targets},
    mixture::{Experts, Gate, Mixture, MixtureConfig},
    model_weights::OwnWeights,
    open,
    smt::{BlockBudget, BlockScore, BlockScores, Smt, sum_gradients},
    trainable_tensors,
};
use tuning::{loss, model, options, sweep, waves};

fn recipe(json: &str, steps: usize) -> Recipe {
    let mut recipe: Recipe = serde_json::from_str(json).unwrap();
    recipe.train.schedule = Schedule::constant(1e-2);
    (recipe.train.epochs, recipe.train.max_steps) = (1000, Some(steps));
    recipe
}

struct Rows {
    base: Model,
    waves: Vec<Wave>,
    labels: BTreeMap<u64, Vec<usize>>,
}

impl Rows {
    fn new(name: &str) -> Self {
        let base = model(name);
        Self { waves: waves(&base, 3), labels: BTreeMap::new(), base }
    }

    /// Trains, and gives the auxiliary losses of every step.
    fn train(&self, recipe: &Recipe, directory: &Path) -> Result<(Trained, Vec<BTreeMap<String, f64>>)> {
        let mut auxiliary = Vec::new();
        let trained = self.run(directory, false).train(recipe, &mut |event| {
            if let RunEvent::Train { event: TrainEvent::Step { auxiliary: losses, gradient_norm, .. }, .. } = event {
                assert!(*gradient_norm > 0.0);
                auxiliary.push(losses.clone());
            }
            Ok(())
        })?;
        Ok((trained, auxiliary))
    }

    fn run<'a>(&'a self, directory: &'a Path, resume: bool) -> TrainingRun<'a> {
        let (model, waves, labels) = (&self.base, &self.waves[..], &self.labels);
        TrainingRun { model, waves, labels, directory, save_every: 2, resume, fold: FoldPrecision::Bf16 }
    }
}

const SMALL_MIXTURE: &str = r#""type": "mixture", "r": 2, "experts": 3, "target_modules": ["q_proj", "v_proj"]"#;

#[test]
fn the_first_stage_of_lora_mixer_trains_experts_by_label_and_the_second_its_routers_from_there() {
    let mut rows = Rows::new("qwen2_moe");
    let directory = tempfile::tempdir().unwrap();
    let first =
        recipe(&format!(r#"{{"method": {{{SMALL_MIXTURE}, "gate": {{"type": "label"}}, "train_router": false}}}}"#), 6);
    // without labels nothing would be trained: refused before any work
    let error = rows.train(&first, &directory.path().join("none")).err().unwrap().to_string();
    assert!(
        error.contains("labels for `gate`: label: found none") && error.contains("`labels` of the recipe"),
        "{error}"
    );
    assert!(!directory.path().join("none").exists());
    rows.labels = rows.waves.iter().map(|wave| (wave.id, vec![0, 2])).collect();
    let stage = directory.path().join("first");
    let (trained, _) = rows.train(&first, &stage).unwrap();
    let losses = &trained.cost.losses;
    assert!(losses[5].loss < losses[0].loss - 0.05, "{losses:?}");
    let saved = trained.save(&rows.base, &stage, Existing::Refuse).unwrap();
    let value = |task: &FineTune, name: &str| task.set().bank().get(name).unwrap().to_vec();
    let name = "model.layers.0.self_attn.q_proj.mixture.lora_B";
    // B [out, 3 experts of 2 ranks]: those of labels 0 and 2 moved, the one nobody has did not
    let b = value(&trained.task, name);
    let moved = |expert: usize| b.chunks_exact(6).any(|row| row[2 * expert..2 * expert + 2].iter().any(|v| *v != 0.0));
    assert_eq!([0, 1, 2].map(moved), [true, false, true]);
    rows.labels.values_mut().for_each(|labels| labels[0] = 7);
    let error = rows.train(&first, &stage).err().unwrap().to_string();
    assert!(error.contains("a label: found 7, expected below 3"), "{error}");
    rows.labels.clear();

    // the second stage: routers over those experts, which stay
    let start = saved.adapter.unwrap();
    let with = |more: &str, start: &Path| {
        let start = start.to_str().unwrap();
        recipe(&format!(r#"{{"method": {{{SMALL_MIXTURE}, "start": "{start}", {more}}}}}"#), 6)
    };
    let dense = r#""gate": {"type": "dense"}, "balance": {"type": "specialization", "load": 0.01, "entropy": 0.001}"#;
    let second = with(&format!(r#"{dense}, "train_experts": false"#), &start);
    let stage = directory.path().join("second");
    let (tuned, auxiliary) = rows.train(&second, &stage).unwrap();
    assert!(auxiliary.iter().all(|losses| losses.contains_key("mixture_balance")));
    assert!(tuned.task.set().bank().iter().all(|live| live.name().ends_with(".router")));
    let saved = tuned.save(&rows.base, &stage, Existing::Refuse).unwrap();
    let values = |dir: &Path| {
        let bytes = fs::read(dir.join(moe_peft::mixture::MODEL_FILE)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        file.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())).collect::<BTreeMap<_, _>>()
    };
    let (before, after) = (values(&start), values(saved.adapter.as_ref().unwrap()));
    assert!(before.iter().all(|(name, bytes)| after[name] == *bytes) && after.len() > before.len());

    // experts that are trained on are held near where they began
    let distance_moved = |preservation: f64, name: &str| {
        let more = format!(r#"{dense}, "preservation": {preservation}"#);
        let stage = directory.path().join(name);
        let (tuned, auxiliary) = rows.train(&with(&more, &start), &stage).unwrap();
        let start = &before["model.layers.0.self_attn.q_proj.mixture.lora_A"];
        let now = value(&tuned.task, "model.layers.0.self_attn.q_proj.mixture.lora_A");
        let start = start.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        (start.zip(now).map(|(a, b)| f64::from((a - b) * (a - b))).sum::<f64>(), auxiliary)
    };
    let (free, told) = distance_moved(0.0, "free");
    assert!(free > 0.0 && told.iter().all(|losses| !losses.contains_key("preservation")));
    let (held, told) = distance_moved(100.0, "held");
    assert!(held < 0.5 * free, "{held} {free}");
    assert!(told[0]["preservation"] == 0.0 && told[3]["preservation"] > 0.0, "{told:?}");
    // another shape, and a penalty on nothing
    let wrong = with(dense, &start);
    let MethodConfig::Mixture(mut config) = wrong.method.clone() else { unreachable!() };
    config.r = 4;
    let wrong = Recipe { method: MethodConfig::Mixture(config), ..wrong };
    let error = rows.train(&wrong, &stage).err().unwrap().to_string();
    assert!(error.contains("mixture_config.json") && error.contains("experts, r, targets"), "{error}");
    let nothing = recipe(&format!(r#"{{"method": {{{SMALL_MIXTURE}, "preservation": 1}}}}"#), 1);
    assert!(rows.train(&nothing, &stage).err().unwrap().to_string().contains("preservation: found 1"));
}

#[test]
fn a_mixture_that_no_label_reaches_stops_with_the_reason() {
    let base = model("qwen2_moe");
    let config = MixtureConfig {
        r: 2,
        experts: Experts::Everywhere(2),
        target_modules: Some(Targets::list(["q_proj"])),
        gate: Gate::Label {},
        train_router: false,
        ..MixtureConfig::default()
    };
    let mut set = AdapterSet::new();
    Mixture::install(&config, &mut set, &Maps::new(base.checkpoint()), base.device()).unwrap();
    let mut task = FineTune::new(&base, set.into()).unwrap();
    let mut parameters = task.set().bank().parameters().unwrap();
    let run = moe_core::train::train(&mut task, &mut parameters, &waves(&base, 3), &options(40), &mut |_| Ok(()));
    let error = run.unwrap_err().to_string();
    assert!(error.contains("no gradient reached any of") && error.contains("first 10 steps"), "{error}");
}

#[test]
fn losses_on_routers_count_while_blocks_are_trained_and_a_mixer_without_routers_is_refused() {
    let rows = Rows::new("qwen2_moe");
    let directory = tempfile::tempdir().unwrap();
    let smt =
        r#""type": "smt", "block": 8, "warmup_steps": 2, "attention": {"blocks": 4}, "feed_forward": {"blocks": 6}"#;
    for (warmup, phases) in [("gradients_only", 1), ("full_fine_tuning", 2)] {
        let json = |more: &str| format!(r#"{{"method": {{{smt}, "warmup": "{warmup}"}}{more}}}"#);
        let losses = r#", "router_losses": {"balance": {"coefficient": 0.1}, "z": 0.01}"#;
        let plain = directory.path().join(format!("{warmup}-plain"));
        let with = directory.path().join(format!("{warmup}-losses"));
        let (plain, told) = rows.train(&recipe(&json(""), 5), &plain).unwrap();
        assert!(told.iter().all(BTreeMap::is_empty));
        let (trained, told) = rows.train(&recipe(&json(losses), 5), &with).unwrap();
        assert!(told.iter().all(|losses| losses["router_balance"] > 0.0 && losses["router_z"] > 0.0), "{told:?}");
        assert_eq!((told.len(), trained.cost.phases.len(), trained.cost.losses.len()), (5, phases, 5));
        // they change what is learnt
        let wave = &rows.waves[0];
        assert_ne!(loss(plain.task.model(), wave).to_bits(), loss(trained.task.model(), wave).to_bits());
        let error = rows.train(&recipe(&json(r#", "dense_mixer": true"#), 5), &with).err().unwrap().to_string();
        assert!(error.contains("dense_mixer: found true") && error.contains("no router"), "{error}");
        // blocks begin where they were found again, without another warm-up
        assert_eq!(with.join("blocks.json").exists(), warmup == "gradients_only");
    }
}

#[test]
fn sums_over_blocks_are_those_of_whole_gradients() {
    let base = model("qwen2_moe");
    let data = waves(&base, 3);
    let mut on = Setting::new(&base).with_waves(&data);
    on.waves_per_step = 2;
    for score in [BlockScore::MeanAbs, BlockScore::L2] {
        let blocks = Some(BlockBudget::Blocks(5));
        let smt = Smt { block: 7, score, attention: blocks, feed_forward: blocks, ..Smt::default() };
        let found = sum_gradients(&smt, &on, 2).unwrap();
        // two steps, of waves 0 and 1, then 2 and 0
        let places = trainable_tensors::linear_maps(base.checkpoint());
        let mut expected = BlockScores::new(smt, &places, vec![]).unwrap();
        for step in [[0, 1], [2, 0]] {
            let tokens: usize = step.iter().map(|wave: &usize| data[*wave].loss_tokens()).sum();
            let mut set = AdapterSet::new();
            OwnWeights::full().install(&on, &mut set).unwrap();
            let set = Arc::new(set);
            let adapted = base.with_adapters(set.clone()).unwrap();
            step.iter().for_each(|wave| drop(sweep(&adapted, &data[*wave])));
            for place in &places {
                let gradient = set.bank().get(&place.site.path()).unwrap().gradient();
                let mean: Vec<f32> = gradient.iter().map(|g| g / tokens as f32).collect();
                expected.add(place.site, &mean);
            }
        }
        let largest = expected.arrays().flat_map(|(_, sums)| sums).fold(0.0f32, |most, v| most.max(v.abs()));
        for ((site, found), (_, expected)) in found.arrays().zip(expected.arrays()) {
            assert!(distance(found, expected) < 1e-4 * largest, "{site} {score:?}");
        }
        assert_eq!(found.select().unwrap(), expected.select().unwrap());
    }
}

#[test]
fn everything_that_is_saved_is_opened_as_it_was_at_the_end_of_training() {
    let rows = Rows::new("qwen2_moe");
    let directory = tempfile::tempdir().unwrap();
    let wave = &rows.waves[1];
    let attention = r#""target_modules": ["q_proj", "v_proj"]"#;
    let own = r#""own": {"router": true, "experts": true}"#;
    for (name, method, kind) in [
        ("lora", format!(r#"{{"type": "lora", "r": 2, {attention}}}"#), SavedKind::Lora),
        (
            "dora",
            r#"{"type": "lora", "r": 2, "use_dora": true, "target_modules": ["q_proj", "experts.1.gate_proj", "experts.1.down_proj"]}"#.into(),
            SavedKind::Lora,
        ),
        ("mola", format!(r#"{{"type": "mixture", "r": 2, "experts": [3, 1, 4], {attention}}}"#), SavedKind::Mixture),
        ("mixlora", r#"{"type": "mixture", "r": 2, "experts": 2, "blocks": true}"#.into(), SavedKind::Mixture),
        (
            "compressed",
            format!(r#"{{"type": "compressed_experts", "experts": {{"auxiliary": 1}}, {own}}}"#),
            SavedKind::CompressedExperts,
        ),
        (
            "condensers",
            r#"{"type": "condensers", "options": {"speed": 0.05}, "counts": {"each": 1}, "weights": {"router": true, "shared": true}}"#.into(),
            SavedKind::Condensers,
        ),
    ] {
        let dir = directory.path().join(name);
        let (trained, _) = rows.train(&recipe(&format!(r#"{{"method": {method}}}"#), 4), &dir).unwrap();
        let end = logits(trained.task.model(), wave);
        assert!(distance(&end, &logits(&rows.base, wave)) > 1e-3, "{name} learnt nothing");
        let saved = trained.save(&rows.base, &dir, Existing::Refuse).unwrap();
        let written = |path: &PathBuf| Model::open(path, rows.base.device(), None).unwrap();
        if let Some(path) = &saved.adapter {
            let opened = open(path).unwrap();
            assert_eq!((opened.kinds(), opened.is_checkpoint()), (&[kind][..], false), "{name}");
            let found = logits(&opened.onto(&rows.base).unwrap().0, wave);
            assert!(distance(&found, &end) < 1e-5, "{name}: {}", distance(&found, &end));
        }
        if let Some(path) = &saved.model {
            let model = written(path);
            let found = match open(path) {
                Ok(opened) => {
                    assert_eq!((opened.kinds(), opened.is_checkpoint()), (&[kind][..], true), "{name}");
                    logits(&opened.onto(&model).unwrap().0, wave)
                }
                Err(_) => logits(&model, wave),
            };
            assert!(distance(&found, &end) < 1e-4, "{name}: {}", distance(&found, &end));
        }
        assert_eq!(saved.model.is_some(), kind != SavedKind::Mixture, "{name}");
    }
    let error = open(directory.path()).unwrap_err().to_string();
    assert!(error.contains("no file of fine-tuning") && error.contains("mixture_config.json"), "{error}");
}

#[test]
fn condensers_are_chosen_between_two_phases_that_train_the_same_weights() {
    let rows = Rows::new("qwen2_moe");
    let directory = tempfile::tempdir().unwrap();
    let method = r#"{"type": "condensers", "options": {"speed": 0.05}, "counts": {"each": 2}}"#;
    let (trained, _) = rows.train(&recipe(&format!(r#"{{"method": {method}}}"#), 9), directory.path()).unwrap();
    let steps =
        |phase: &str| fs::read_to_string(directory.path().join(phase)).unwrap().matches("\"event\":\"step\"").count();
    assert_eq!((steps("bias.jsonl"), steps("condensers.jsonl")), (5, 4));
    let condensers = trained.artifacts.condensers.unwrap();
    assert!(condensers.layers().all(|layer| condensers.layer(layer).unwrap().condensers.unwrap().len() == 2));
    let losses = &trained.cost.losses;
    assert_eq!(losses.iter().map(|point| point.step).collect::<Vec<_>>(), (1..=9).collect::<Vec<_>>());
    // the second phase goes on from the first
    assert!(losses[5].loss < losses[0].loss && losses[8].loss < losses[0].loss, "{losses:?}");
    let error =
        rows.train(&recipe(r#"{"method": {"type": "condensers", "counts": {"each": 9}}}"#, 4), directory.path());
    assert!(error.err().unwrap().to_string().contains("condensers of layer 0: found 9"));
}

#[test]
fn an_interrupted_run_goes_on_with_every_step_in_its_metrics_once() {
    let rows = Rows::new("qwen2_moe");
    let directory = tempfile::tempdir().unwrap();
    let dir = |name: &str| directory.path().join(name);
    let recipe = recipe(r#"{"method": {"type": "lora", "r": 2, "target_modules": ["q_proj"]}}"#, 7);
    let (whole, _) = rows.train(&recipe, &dir("whole")).unwrap();
    let killed = rows.run(&dir("cut"), false).train(&recipe, &mut |event| match event {
        RunEvent::Train { event: TrainEvent::Step { step: 5, .. }, .. } => {
            Err(moe_core::Error::observer("killed").into())
        }
        _ => Ok(()),
    });
    assert!(killed.is_err());
    let resumed = rows.run(&dir("cut"), true).train(&recipe, &mut |_| Ok(())).unwrap();
    assert_eq!(resumed.cost.losses, whole.cost.losses);
    let log = fs::read_to_string(dir("cut").join("training.jsonl")).unwrap();
    let steps = log.lines().filter_map(|line| match serde_json::from_str(line).unwrap() {
        TrainEvent::Step { step, .. } => Some(step),
        _ => None,
    });
    assert_eq!(steps.collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7]);
    // as fast as both processes together, not as if one had run all of it in no time
    let seconds = log.lines().rev().find_map(|line| match serde_json::from_str(line).unwrap() {
        TrainEvent::Step { seconds, tokens_run, .. } => Some(tokens_run as f64 / seconds),
        _ => None,
    });
    // The cost is kept in tenths.
    assert!((resumed.cost.tokens_per_second - seconds.unwrap()).abs() < 0.06);
}

#[test]
fn what_can_never_be_trained_is_refused_before_any_work() {
    let rows = Rows::new("qwen3_moe");
    let message = |json: &str| recipe(json, 1).check(&Setting::new(&rows.base)).unwrap_err().to_string();
    let head = message(r#"{"method": {"type": "lora", "target_modules": ["q_proj", "lm_head"]}}"#);
    assert!(head.contains("`lm_head`") && head.contains("output head") && head.contains("\"head\": true"), "{head}");
    let uneven = r#"{"method": {"type": "condensers"}, "router_losses": {"z": -1}}"#;
    assert!(message(uneven).contains("z: found -1"));
    assert!(message(r#"{"method": {"type": "layers", "sampling": {"layers": 99}}}"#).contains("layers: found 99"));
    let few = r#"{"method": {"type": "smt", "attention": {"share": 0.000001}}}"#;
    assert!(
        message(few).contains(r#"attention: found {"share":"#) && message(few).contains("at least one of the model's")
    );
}

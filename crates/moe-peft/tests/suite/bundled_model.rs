//! Whole ways of a person with the bundled model: files in, files out, and what was opened again measured.

use crate::common;
use crate::tuning;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use common::{device, distance, logits};
use moe_checkpoint::{Existing, ProtectionMask, WriteOptions, write};
use moe_core::{
    Model,
    data::{Dataset, DatasetOptions, EvalSet, LossOver, Tokenizer, Wave, WaveOptions},
    evaluate::{EvaluateOptions, Metric, evaluate},
};
use moe_merge::{Amount, EvidenceOptions, MergeOptions, OutputForm, collect_evidence};
use moe_peft::{Recipe, SavedKind, SavedPaths, Trained, TrainingRun, fold::FoldPrecision, open};
use serde_json::{Value, json};

fn bundled() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe")
}

fn opened(path: &Path) -> Model {
    Model::open(path, &device(), None).unwrap()
}

/// Rows of two tasks in turn, with the name of the task in a field; the model has never seen division.
fn rows(directory: &Path) -> PathBuf {
    let lines = |name: &str, file: &str| {
        let text = fs::read_to_string(bundled().join("data").join(file)).unwrap();
        let labelled = text.lines().take(6).map(|line| {
            let mut row: Value = serde_json::from_str(line).unwrap();
            row["task"] = name.into();
            row.to_string()
        });
        labelled.collect::<Vec<_>>()
    };
    let pairs = lines("division", "division_train.jsonl").into_iter().zip(lines("facts", "facts_calibration.jsonl"));
    let path = directory.join("rows.jsonl");
    fs::write(&path, pairs.flat_map(|(a, b)| [a, b]).collect::<Vec<_>>().join("\n")).unwrap();
    path
}

struct Job {
    base: Model,
    waves: Vec<Wave>,
    labels: BTreeMap<u64, Vec<usize>>,
    tokenizer: Tokenizer,
    eval: EvalSet,
}

impl Job {
    fn new(base: Model, rows: &Path, label: Option<&str>) -> Self {
        let (tokenizer, vocab) = (Tokenizer::from_dir(bundled()).unwrap(), base.config().vocab_size);
        let options = DatasetOptions {
            label: label.map(str::to_owned),
            loss: LossOver::Completions,
            end_completions: true,
            ..DatasetOptions::default()
        };
        let data = Dataset::load(rows, Some(&tokenizer), vocab, &options).unwrap();
        let waves = data.waves(WaveOptions::Tokens(std::num::NonZeroUsize::new(96).unwrap()));
        let labels = data.labels_of(&waves);
        let eval = EvalSet::load(bundled().join("data/arithmetic_test.jsonl"), &tokenizer, vocab, Some(4)).unwrap();
        Self { base, waves, labels, tokenizer, eval }
    }

    fn train(&self, method: Value, train: Value, directory: &Path) -> (Trained, SavedPaths) {
        let recipe: Recipe = serde_json::from_value(json!({"method": method, "train": train})).unwrap();
        let (model, waves, labels) = (&self.base, &self.waves[..], &self.labels);
        let run =
            TrainingRun { model, waves, labels, directory, save_every: 50, resume: false, fold: FoldPrecision::Bf16 };
        let trained = run.train(&recipe, &mut |_| Ok(())).unwrap();
        let saved = trained.save(model, directory, Existing::Refuse).unwrap();
        (trained, saved)
    }

    fn measured(&self, model: &Model) -> (Metric, Vec<u64>) {
        let options = EvaluateOptions::default();
        let metric = evaluate(model, &self.tokenizer, &self.eval, &options).unwrap().metric;
        (metric, self.waves.iter().map(|wave| tuning::loss(model, wave).to_bits()).collect())
    }
}

fn fast(steps: usize) -> Value {
    json!({"max_steps": steps, "epochs": 100, "schedule": {"peak": 5e-3}})
}

#[test]
fn experts_of_a_merged_model_are_tuned_without_moving_at_a_learning_rate_of_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let base = opened(&bundled());
    let job = Job::new(base, &rows(dir.path()), None);
    // merge --recipe m-smoe, grouped
    let recipe = moe_merge::Recipe::named("m-smoe").unwrap().with_amount(Amount::Ratio(0.5));
    let options = EvidenceOptions::for_recipe(&recipe, 64);
    let evidence = collect_evidence(&job.base, &job.waves, &options, None, &mut |_| {}).unwrap();
    let plan = recipe.plan(job.base.checkpoint(), &evidence, &ProtectionMask::none()).unwrap();
    let merged = plan.on(job.base.checkpoint(), &MergeOptions::new(OutputForm::Grouped)).unwrap();
    write(merged.model(), dir.path().join("merged"), &WriteOptions::default()).unwrap();
    let grouped = opened(&dir.path().join("merged"));
    assert!(grouped.checkpoint().grouped());

    let job = Job { base: grouped, ..job };
    let experts = json!({
        "type": "lora", "r": 2, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    });
    let nothing = json!({"max_steps": 1, "schedule": {"peak": 1e-12, "warmup": 0}});
    let (trained, saved) = job.train(experts, nothing, &dir.path().join("tuned"));
    let tuned = opened(&saved.model.unwrap());
    for wave in &job.waves {
        assert!(distance(&logits(&tuned, wave), &logits(&job.base, wave)) < 1e-4);
        let (before, after) = (tuning::loss(&job.base, wave), tuning::loss(&tuned, wave));
        assert!((before - after).abs() < 1e-4 * before, "{before} {after}");
    }
    assert_eq!(trained.cost.losses.len(), 1);
    // and the adapter by itself
    let beside = open(saved.adapter.unwrap()).unwrap().onto(&job.base).unwrap().0;
    assert!(distance(&logits(&beside, &job.waves[0]), &logits(&job.base, &job.waves[0])) < 1e-4);
}

#[test]
fn both_stages_of_lora_mixer_run_from_a_field_of_the_rows_to_a_model_that_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job::new(opened(&bundled()), &rows(dir.path()), Some("task"));
    assert!(job.labels.values().flatten().any(|label| *label == 0));
    assert!(job.labels.values().flatten().any(|label| *label == 1));
    let mixture = json!({"type": "mixture", "r": 2, "experts": 2, "target_modules": ["q_proj", "v_proj"]});
    let with = |more: Value| {
        let mut method = mixture.clone();
        more.as_object().unwrap().iter().for_each(|(key, value)| method[key] = value.clone());
        method
    };
    let first = with(json!({"gate": {"type": "label"}, "train_router": false}));
    let (trained, saved) = job.train(first, fast(24), &dir.path().join("experts"));
    let total = |model: &Model| job.waves.iter().map(|wave| tuning::loss(model, wave)).sum::<f64>();
    let (before, after) = (total(&job.base), total(trained.task.model()));
    assert!(after < before, "{before} {after}");
    let experts = saved.adapter.unwrap();
    let opened = |path: &Path| {
        let opened = open(path).unwrap();
        assert_eq!(opened.kinds(), [SavedKind::Mixture]);
        opened.onto(&job.base).unwrap()
    };
    // each row goes to the expert of its task, before and after
    let (again, artifacts) = opened(&experts);
    let labelled = artifacts.mixture.unwrap();
    labelled.set_labels(job.labels.clone());
    assert_eq!(job.measured(&again).1, job.measured(trained.task.model()).1);

    let second = with(json!({
        "gate": {"type": "dense"}, "inference_gate": {"type": "top_k", "k": 1}, "start": experts, "train_experts": false,
        "balance": {"type": "specialization", "load": 0.01, "entropy": 0.001},
    }));
    // the second stage needs no labels
    let plain = Job { labels: BTreeMap::new(), ..job };
    let (trained, saved) = plain.train(second, fast(6), &dir.path().join("router"));
    let again = open(saved.adapter.unwrap()).unwrap().onto(&plain.base).unwrap().0;
    assert_eq!(plain.measured(&again), plain.measured(trained.task.model()));
    assert_ne!(plain.measured(&again).1, plain.measured(&plain.base).1);
}

#[test]
fn what_stands_beside_the_weights_is_opened_and_measures_what_it_measured() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job::new(opened(&bundled()), &rows(dir.path()), None);
    let before = job.measured(&job.base);
    let own = json!({"router": true, "experts": true});
    for (name, kind, method) in [
        (
            "compressed",
            SavedKind::CompressedExperts,
            json!({"type": "compressed_experts", "experts": {"auxiliary": 1}, "own": own}),
        ),
        (
            "condensers",
            SavedKind::Condensers,
            json!({"type": "condensers", "options": {"speed": 0.05}, "counts": {"each": 1}, "weights": own}),
        ),
        (
            "mola",
            SavedKind::Mixture,
            json!({"type": "mixture", "r": 2, "experts": [2, 1, 3, 2], "target_modules": ["q_proj", "o_proj"]}),
        ),
        ("mixlora", SavedKind::Mixture, json!({"type": "mixture", "r": 2, "experts": 3, "blocks": true})),
    ] {
        let (trained, saved) = job.train(method, fast(4), &dir.path().join(name));
        let measured = match trained.as_written(&job.base, None).unwrap() {
            Some(written) => job.measured(&written),
            None => job.measured(trained.task.model()),
        };
        assert_ne!(measured.1, before.1, "{name} learnt nothing");
        let path = saved.adapter.or(saved.model).unwrap();
        let tuning = open(&path).unwrap();
        assert_eq!(tuning.kinds(), [kind], "{name}");
        let checkpoint = tuning.is_checkpoint().then(|| opened(&path));
        let (again, _) = tuning.onto(checkpoint.as_ref().unwrap_or(&job.base)).unwrap();
        assert_eq!(job.measured(&again), measured, "{name}");
        let facts =
            moe_peft::adapter_files::inspect(&path, Some(&checkpoint.map_or(bundled(), |_| path.clone()))).unwrap();
        assert!(facts.kinds == [kind.to_string()] && facts.values > 0 && facts.fits.is_some(), "{name}: {facts}");
    }
}

#[test]
fn a_pasted_config_of_peft_is_a_method() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter_config.json");
    let pasted = json!({
        "alpha_pattern": {}, "auto_mapping": null, "base_model_name_or_path": "x", "bias": "none", "corda_config": null,
        "inference_mode": false, "init_lora_weights": true, "loftq_config": {}, "lora_alpha": 6, "lora_dropout": 0.0,
        "modules_to_save": null, "peft_type": "LORA", "r": 3, "rank_pattern": {}, "revision": null, "qalora_group_size": 16,
        "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "use_dora": false, "some_later_field": null,
    });
    fs::write(&path, pasted.to_string()).unwrap();
    let recipe = Recipe::load(&path).unwrap();
    let base = opened(&bundled());
    let waves = tuning::waves(&base, 1);
    let labels = BTreeMap::new();
    let directory = &dir.path().join("out");
    let run = TrainingRun {
        model: &base,
        waves: &waves,
        labels: &labels,
        directory,
        save_every: 5,
        resume: false,
        fold: FoldPrecision::Bf16,
    };
    let short =
        Recipe { train: moe_core::train::TrainOptions { max_steps: Some(1), ..recipe.train.clone() }, ..recipe };
    let trained = run.train(&short, &mut |_| Ok(())).unwrap();
    let weights = trained.artifacts.lora.unwrap().weights("default").unwrap();
    assert!(weights.maps.len() == 8 && weights.maps.values().all(|low| low.rank == 3 && low.alpha == 6.0));
    // a method alone and a whole recipe are files as well; anything else is named
    fs::write(&path, r#"{"type": "esft", "threshold": 0.3}"#).unwrap();
    assert!(Recipe::load(&path).is_ok());
    fs::write(&path, r#"{"method": {"type": "full"}, "train": {"clip": 2}}"#).unwrap();
    assert_eq!(Recipe::load(&path).unwrap().train.clip, Some(2.0));
    for (text, expected) in [
        (r#"{"peft_type": "IA3"}"#, "peft_type"),
        (r#"{"type": "prayer"}"#, "prayer"),
        ("[1]", "a recipe of fine-tuning"),
    ] {
        fs::write(&path, text).unwrap();
        let error = Recipe::load(&path).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("adapter_config.json"), "{error}");
    }
}

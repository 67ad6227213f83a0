//! Run-time options whose numbers are found on rows: what they become, and that they are saved beside a model.
#![cfg(feature = "flex")]

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use moe_checkpoint::{WriteOptions, write};
use moe_core::{
    Engine, EngineOptions, Model,
    adaptive::RunTime,
    data::{Dataset, DatasetOptions, LossOver, Tokenizer, Wave, WaveOptions},
    decode::Decoding,
    depth::{DepthConfig, LayerChoice, attention_ranks},
    generate::{GenerateOptions, generate, generate_with},
    trace::Nobody,
};

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe")
}

fn model() -> Model {
    Model::open(dir(), &Device::flex(), None).unwrap()
}

fn rows(loss: LossOver) -> Vec<Wave> {
    let tokenizer = Tokenizer::from_dir(dir()).unwrap();
    let options = DatasetOptions { samples: Some(10), length: 64, loss, ..DatasetOptions::default() };
    let data = Dataset::load(dir().join("data/facts_calibration.jsonl"), Some(&tokenizer), 2048, &options).unwrap();
    data.waves(WaveOptions::default())
}

fn run_time(json: &str) -> RunTime {
    serde_json::from_str(json).unwrap()
}

fn loss(model: &Model, wave: &Wave) -> u64 {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    engine.run(wave, &mut Nobody).unwrap().loss.unwrap().to_bits()
}

/// A checkpoint of the model with options beside it.
fn saved(model: &Model, options: &RunTime) -> (tempfile::TempDir, PathBuf) {
    let out = tempfile::tempdir().unwrap();
    let to = out.path().join("model");
    write(model.checkpoint(), &to, &WriteOptions::default()).unwrap();
    options.save_beside(&to).unwrap();
    (out, to)
}

#[test]
fn tokens_skip_by_scores_that_are_fitted_saved_and_opened_again() {
    let (model, rows) = (model(), rows(LossOver::All));
    let none = run_time(r#"{"layers": {"type": "token_skip", "share": 0.0}}"#).calibrated(&model, &rows).unwrap();
    assert_eq!(loss(&none.on(&model).unwrap().unwrap(), &rows[0]), loss(&model, &rows[0]));
    let choice = r#"{"type": "attention_rank", "layers": 2}"#;
    let asked = run_time(&format!(r#"{{"layers": {{"type": "token_skip", "share": 0.3, "layers": {choice}}}}}"#));
    assert!(asked.needs_rows() && !asked.needs_answers() && asked.on(&model).is_err());
    let found = asked.calibrated(&model, &rows).unwrap();
    let Some(DepthConfig::TokenSkip(skip)) = &found.layers else { panic!("{found:?}") };
    let layers: Vec<usize> = skip.scores.iter().map(|score| score.layer).collect();
    let choice: LayerChoice = serde_json::from_str(choice).unwrap();
    let seen = choice.measure(&model, &rows).unwrap();
    assert_eq!(layers, choice.layers(4, seen.as_deref()).unwrap());
    let under = found.on(&model).unwrap().unwrap();
    assert_ne!(loss(&under, &rows[0]), loss(&model, &rows[0]));
    let tokens: usize = rows.iter().map(Wave::tokens).sum();
    // each of two layers of four leaves out three tenths of its tokens
    let whole = 4 * (4 * tokens - 2 * (0.3 * tokens as f64).floor() as usize);
    let fresh = found.on(&self::model()).unwrap().unwrap();
    for wave in &rows {
        loss(&fresh, wave);
    }
    assert!(fresh.expert_rows().abs_diff(whole as u64) <= 8, "{} {whole}", fresh.expert_rows());
    let (_out, to) = saved(&model, &found);
    assert_eq!(loss(&Model::open(&to, &Device::flex(), None).unwrap(), &rows[0]), loss(&under, &rows[0]));
}

#[test]
fn ranks_of_attention_maps_are_between_one_and_the_tokens() {
    let (model, rows) = (model(), rows(LossOver::All));
    let longest = rows[0].sequences.iter().map(|sequence| sequence.ids.len()).max().unwrap() as f64;
    let ranks = attention_ranks(&model, &rows).unwrap();
    assert_eq!(ranks.len(), 4);
    assert!(ranks.iter().all(|rank| (1.0..=longest).contains(&rank.unwrap())), "{ranks:?}");
    assert!(attention_ranks(&model, &[]).unwrap_err().to_string().contains("sequences to measure attention on"));
    // layers that mix tokens in another way have none
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5");
    let hybrid = Model::open(fixtures.join("qwen3_next"), &Device::flex(), None).unwrap();
    let small: Vec<Wave> = vec![Wave { id: 0, sequences: vec![moe_core::data::Sequence::new(vec![3, 9, 27, 40])] }];
    let found = attention_ranks(&hybrid, &small).unwrap();
    assert!(found.iter().any(Option::is_none) && found.iter().any(Option::is_some), "{found:?}");
}

#[test]
fn routers_of_layers_are_trained_on_paths_that_answer_rightly_and_stand_beside_the_model() {
    let model = model();
    let training = r#""training": {"train": {"epochs": 3}}"#;
    let asked =
        run_time(&format!(r#"{{"layers": {{"type": "layer_routers", "search": {{"simulations": 3}}, {training}}}}}"#));
    assert!(asked.needs_answers());
    let error = asked.calibrated(&model, &rows(LossOver::All)).unwrap_err().to_string();
    assert!(error.contains("completions alone"), "{error}");
    let rows = rows(LossOver::Completions);
    let found = asked.calibrated(&model, &rows).unwrap();
    let prompts: Vec<Vec<u32>> =
        rows[0].sequences[..4].iter().map(|s| s.prompt_and_answer().unwrap().0.to_vec()).collect();
    let options = GenerateOptions { max_new_tokens: 6, ..GenerateOptions::default() };
    let text = |model: &Model| generate(model, &prompts, &options, |_| false).unwrap();
    let expected = text(&found.on(&model).unwrap().unwrap());
    let (_out, to) = saved(&model, &found);
    assert!(to.join("layer_routers.safetensors").exists());
    let reopened = Model::open(&to, &Device::flex(), None).unwrap();
    assert!(reopened.depth_rule().is_some());
    assert_eq!(text(&reopened), expected);
    // and from there to another model's directory
    let (_out, again) = saved(&model, &RunTime::beside(&to).unwrap());
    assert_eq!(text(&Model::open(&again, &Device::flex(), None).unwrap()), expected);
    // routers that have learned nothing are the model
    let new = format!(r#"{{"layers": {{"type": "layer_routers", "search": {{"simulations": 0}}, {training}}}}}"#);
    let new = run_time(&new).calibrated(&model, &rows).unwrap();
    assert_eq!(text(&new.on(&model).unwrap().unwrap()), text(&model));
}

#[test]
fn ways_of_decoding_that_learn_from_prompts_are_options_like_others() {
    let model = model();
    let rows = rows(LossOver::Completions);
    let prompts: Vec<Vec<u32>> =
        rows[0].sequences[..3].iter().map(|s| s.prompt_and_answer().unwrap().0.to_vec()).collect();
    let options = GenerateOptions { max_new_tokens: 5, ..GenerateOptions::default() };
    let text = |options_of: &RunTime, model: &Model| {
        let decoding = Decoding::new(options_of.decoding.clone().unwrap(), model, vec![]).unwrap();
        generate_with(model, &prompts, &options, &decoding, |_| false).unwrap()
    };
    let plain = generate(&model, &prompts, &options, |_| false).unwrap();
    let idle = run_time(r#"{"decoding": {"type": "rewiring", "steps": 0}}"#);
    assert!(!idle.needs_rows() && idle.on(&model).unwrap().is_none());
    let (found, report) = text(&idle, &model);
    assert_eq!((&found, report.tokens), (&plain, plain.iter().map(Vec::len).sum()));
    let asked = run_time(r#"{"decoding": {"type": "pathways", "remix": {"neighbors": 2, "layers": 2}}}"#);
    assert!(Decoding::new(asked.decoding.clone().unwrap(), &model, vec![]).is_err());
    let learned = asked.calibrated(&model, &rows).unwrap();
    let (expected, _) = text(&learned, &model);
    let (_out, to) = saved(&model, &learned);
    let beside = RunTime::beside(&to).unwrap();
    assert!(to.join("references.json").exists() && !beside.needs_rows());
    assert_eq!(text(&beside, &Model::open(&to, &Device::flex(), None).unwrap()).0, expected);
    // the prompt's own routing alone
    let own =
        r#"{"decoding": {"type": "pathways", "remix": {"neighbors": 2, "method": {"type": "kernel", "own": [1.0]}}}}"#;
    assert_eq!(text(&run_time(own).calibrated(&model, &rows).unwrap(), &model).0, plain);
    let other = run_time(r#"{"decoding": {"type": "speculative"}}"#).on(&model).unwrap_err().to_string();
    assert!(other.contains("none, in run-time options"), "{other}");
}

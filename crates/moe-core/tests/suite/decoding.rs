//! Decoding from several sources on the bundled model.
#![cfg(feature = "flex")]

use std::{path::PathBuf, sync::Arc};

use burn::tensor::Device;
use moe_core::{
    KeepUnits, Model,
    adaptive::RoutingConfig,
    data::Tokenizer,
    decode::{Decoding, DecodingConfig, DecodingReport},
    generate::{GenerateOptions, Sampling, generate, generate_with},
};

fn dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe")
}

fn model() -> Model {
    Model::open(dir(), &Device::flex(), None).unwrap()
}

fn fixture(name: &str) -> Model {
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5");
    Model::open(fixtures.join(name), &Device::flex(), None).unwrap()
}

/// A smaller model: three quarters of the units of every expert.
fn draft(model: &Model) -> Model {
    let shape = model.checkpoint().shape().clone();
    let mut keep = KeepUnits::new();
    for layer in &shape.layers {
        for (expert, width) in layer.widths.iter().enumerate() {
            keep = keep.keep(layer.layer, expert, (0..(*width * 3 / 4) as u32).collect::<Vec<_>>());
        }
    }
    model.with_overlay(Arc::new(keep)).unwrap()
}

fn prompts() -> Vec<Vec<u32>> {
    let tokenizer = Tokenizer::from_dir(dir()).unwrap();
    [
        "Question: Hana finds 19 plums, then 23 more, and loses 2. How many plums remain?\nAnswer:",
        "The currency of Brunei is the",
        "A",
        "Aruba lies in",
        "Question: Ola finds 9 hats, then 9 more, and loses 3. How many hats remain?\nAnswer:",
    ]
    .map(|prompt| tokenizer.encode(prompt).unwrap())
    .to_vec()
}

fn options(model: &Model) -> GenerateOptions {
    GenerateOptions { max_new_tokens: 14, stop: model.config().eos_token_ids.clone(), ..GenerateOptions::default() }
}

fn decoded(
    model: &Model,
    others: Vec<&Model>,
    json: &str,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
) -> (Vec<Vec<u32>>, DecodingReport) {
    let config: DecodingConfig = json.parse().unwrap();
    let decoding = Decoding::new(config, model, others).unwrap();
    generate_with(model, prompts, options, &decoding, |_| false).unwrap()
}

#[test]
fn neutral_settings_of_every_way_give_the_models_own_text() {
    let model = model();
    let small = draft(&model);
    let expected = generate(&model, &prompts(), &options(&model), |_| false).unwrap();
    let pair = vec![&small, &small];
    for (json, others) in [
        ("plain", vec![]),
        (r#"{"type": "contrastive", "beta": 0.0}"#, vec![&small]),
        (r#"{"type": "contrastive", "beta": 0.5}"#, vec![&model]),
        (r#"{"type": "contrastive", "alpha": 1.0}"#, vec![&small]),
        (r#"{"type": "self_contrast", "weak": {"type": "ranks", "ranks": [0, 1, 2, 3]}}"#, vec![]),
        (r#"{"type": "self_contrast", "scores": {"beta": 0.0}}"#, vec![]),
        ("fusion", pair.clone()),
        (r#"{"type": "fusion", "alpha": 0.0}"#, vec![&model, &small]),
    ] {
        let (found, report) = decoded(&model, others, json, &prompts(), &options(&model));
        assert_eq!(found, expected, "{json}");
        assert_eq!(report.tokens, expected.iter().map(Vec::len).sum::<usize>(), "{json}");
    }
}

#[test]
fn a_draft_changes_no_text_and_the_model_as_its_own_draft_is_always_accepted() {
    for (model, prompts) in [
        (model(), prompts()),
        // keys and values, latents, states of linear attention, of state space layers and of convolutions
        (fixture("qwen3_moe"), vec![vec![5, 9, 3], vec![7; 6], vec![1]]),
        (fixture("deepseek_v3"), vec![vec![5, 9, 3], vec![7; 6], vec![1]]),
        (fixture("qwen3_next"), vec![vec![5, 9, 3], vec![7; 6], vec![1]]),
        (fixture("nemotron_h"), vec![vec![5, 9, 3], vec![7; 6], vec![1]]),
        (fixture("lfm2_moe"), vec![vec![5, 9, 3], vec![7; 6], vec![1]]),
        // keys and values that later layers read
        (fixture("gemma4_text_ple"), vec![vec![5, 9, 3], vec![7; 6], vec![1]]),
    ] {
        let name = model.checkpoint().dir().display().to_string();
        let options = options(&model);
        let expected = generate(&model, &prompts, &options, |_| false).unwrap();
        for tokens in [1, 3, 7] {
            let json = format!(r#"{{"type": "speculative", "tokens": {tokens}}}"#);
            let (found, report) = decoded(&model, vec![&model], &json, &prompts, &options);
            assert_eq!(found, expected, "{name} {tokens}");
            assert_eq!(report.acceptance(), Some(1.0), "{name} {tokens}");
            assert!(report.steps < report.tokens, "{name} {tokens}: {report:?}");
            let small = draft(&model);
            let (found, report) = decoded(&model, vec![&small], &json, &prompts, &options);
            assert_eq!(found, expected, "{name} {tokens}");
            assert!(report.proposed > 0 && report.accepted <= report.proposed);
        }
    }
}

#[test]
fn a_bad_draft_costs_steps_and_nothing_else() {
    let model = model();
    let one = "{\"type\": \"ranks\", \"ranks\": [15]}".parse::<RoutingConfig>().unwrap().on(&model).unwrap();
    let expected = generate(&model, &prompts(), &options(&model), |_| false).unwrap();
    let (found, report) = decoded(&model, vec![&one], "speculative", &prompts(), &options(&model));
    assert_eq!(found, expected);
    assert!(report.acceptance().unwrap() < 0.5, "{report:?}");
}

#[test]
fn batches_and_ends_work_under_every_way() {
    let model = model();
    let small = draft(&model);
    for (json, others) in [
        ("contrastive", vec![&small]),
        ("self_contrast", vec![]),
        ("fusion", vec![&small, &model]),
        ("speculative", vec![&small]),
    ] {
        let config: DecodingConfig = json.parse().unwrap();
        let decoding = Decoding::new(config, &model, others).unwrap();
        let run = |options: &GenerateOptions, most: usize| {
            generate_with(&model, &prompts(), options, &decoding, |completion| completion.len() >= most).unwrap().0
        };
        let together = run(&options(&model), 99);
        let alone = run(&GenerateOptions { batch_tokens: 1, ..options(&model) }, 99);
        assert_eq!(together, alone, "{json}");
        // ended from outside after three tokens
        let cut = run(&options(&model), 3);
        for (cut, whole) in cut.iter().zip(&together) {
            assert_eq!(cut[..], whole[..whole.len().min(3)], "{json}");
        }
        // a token of the text as a stop
        let stop = together[0][2];
        let stopped = run(&GenerateOptions { stop: vec![stop], ..options(&model) }, 99);
        let end = together[0].iter().position(|token| *token == stop).unwrap();
        assert_eq!(stopped[0][..], together[0][..end], "{json}");
    }
}

#[test]
fn samples_are_reproducible_whatever_the_batch() {
    let model = model();
    let small = draft(&model);
    for (json, others) in
        [("contrastive", vec![&small]), ("speculative", vec![&small]), ("fusion", vec![&small, &model])]
    {
        let sampling = Sampling::TopP { temperature: 3.0, top_p: 0.95, seed: 5 };
        let options = GenerateOptions { sampling, ..options(&model) };
        let (a, _) = decoded(&model, others.clone(), json, &prompts(), &options);
        let one = GenerateOptions { batch_tokens: 1, ..options.clone() };
        let (b, _) = decoded(&model, others.clone(), json, &prompts(), &one);
        assert_eq!(a, b, "{json}");
        let sampling = Sampling::TopP { temperature: 3.0, top_p: 0.95, seed: 6 };
        let (c, _) = decoded(&model, others, json, &prompts(), &GenerateOptions { sampling, ..options });
        assert_ne!(a, c, "{json}");
    }
}

#[test]
fn speculative_samples_follow_the_models_distribution() {
    let model = model();
    let small = draft(&model);
    let prompt = prompts()[1].clone();
    let (n, seeds) = (400, 3u64);
    let mut first = [vec![0usize; model.config().vocab_size], vec![0usize; model.config().vocab_size]];
    for seed in 0..seeds {
        let sampling = Sampling::TopP { temperature: 1.5, top_p: 1.0, seed };
        let options = GenerateOptions { max_new_tokens: 2, sampling, ..GenerateOptions::default() };
        let many = vec![prompt.clone(); n];
        let plain = generate(&model, &many, &options, |_| false).unwrap();
        let (drafted, _) = decoded(&model, vec![&small], r#"{"type": "speculative", "tokens": 1}"#, &many, &options);
        for (counts, found) in first.iter_mut().zip([plain, drafted]) {
            found.iter().for_each(|tokens| counts[tokens[0] as usize] += 1);
        }
    }
    let total = (n as u64 * seeds) as f64;
    let distance: f64 =
        (0..first[0].len()).map(|v| (first[0][v] as f64 - first[1][v] as f64).abs() / total).sum::<f64>() / 2.0;
    // two samples of 1200 over a few dozen likely tokens
    assert!(distance < 0.15, "{distance}");
}

#[test]
fn wrong_sources_are_explained() {
    let model = model();
    let other = fixture("qwen3_moe");
    let message = |json: &str, others: Vec<&Model>| match json.parse::<DecodingConfig>() {
        Ok(config) => Decoding::new(config, &model, others).unwrap_err().to_string(),
        Err(error) => error.to_string(),
    };
    assert!(message("speculative", vec![]).contains("found 0, expected 1 beside"));
    assert!(message("plain", vec![&model]).contains("found 1, expected 0 beside"));
    assert!(message("contrastive", vec![&other]).contains("vocabulary of"));
    assert!(message("sampling", vec![]).contains("sampling"));
    assert!(message(r#"{"type": "contrastive", "gamma": 1.0}"#, vec![&model]).contains("gamma"));
    assert!(message(r#"{"type": "fusion", "pairs": 0}"#, vec![]).contains("pairs"));
    assert!(
        message(r#"{"type": "self_contrast", "weak": {"type": "ranks", "ranks": [99]}}"#, vec![]).contains("ranks")
    );
}

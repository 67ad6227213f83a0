//! Generation and evaluation on the bundled trained model, against what transformers generates and measures.
#![cfg(feature = "flex")]

use std::path::PathBuf;

use burn::tensor::Device;
use moe_core::{
    Engine, EngineOptions, Model, Result,
    data::{EvalSet, Sequence, Tokenizer, Wave},
    evaluate::{EvaluateOptions, Metric, evaluate},
    generate::{GenerateOptions, Sampling, generate},
    host::HostView,
    overlay::KeepUnits,
    trace::{Observer, Signals},
};

fn dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe")
}

fn model(max_memory: Option<u64>) -> Model {
    Model::open(dir(), &Device::flex(), max_memory).unwrap()
}

/// Prompts and the tokens transformers 5.23 generates greedily (12 at most, up to the end-of-text token).
const GOLDEN: [(&str, &[u32]); 4] = [
    (
        "Question: Hana finds 19 plums, then 23 more, and loses 2. How many plums remain?\nAnswer:",
        &[221, 17, 25, 446, 221, 18, 19, 338, 221, 20, 18, 608],
    ),
    (
        "Question: Ola finds 9 hats, then 9 more, and loses 3. How many hats remain?\nAnswer:",
        &[221, 25, 446, 221, 25, 338, 221, 17, 24, 608, 221, 17],
    ),
    ("The currency of Brunei is the", &[658, 1768, 14, 199]),
    ("Aruba lies in", &[763, 774, 14, 199]),
];

fn prompts() -> Vec<Vec<u32>> {
    let tokenizer = Tokenizer::from_dir(dir()).unwrap();
    GOLDEN.iter().map(|(prompt, _)| tokenizer.encode(prompt).unwrap()).collect()
}

fn options(model: &Model) -> GenerateOptions {
    GenerateOptions { max_new_tokens: 12, stop: model.config().eos_token_ids.clone(), ..GenerateOptions::default() }
}

#[test]
fn greedy_generation_is_that_of_transformers_whatever_the_batch() {
    let model = model(None);
    let together = generate(&model, &prompts(), &options(&model), |_| false).unwrap();
    let one_by_one = GenerateOptions { batch_tokens: 1, ..options(&model) };
    let alone = generate(&model, &prompts(), &one_by_one, |_| false).unwrap();
    for (i, (_, expected)) in GOLDEN.iter().enumerate() {
        assert_eq!(together[i], *expected);
        assert_eq!(alone[i], *expected);
    }
}

#[test]
fn cached_decoding_sees_what_a_full_pass_sees() {
    struct Logits(Vec<f32>);
    impl Observer for Logits {
        fn needs(&self) -> Signals {
            Signals { logits: true, ..Signals::NONE }
        }
        fn logits(&mut self, _: usize, logits: &HostView, _: usize) -> Result<()> {
            self.0.extend_from_slice(logits.as_slice());
            Ok(())
        }
    }
    let model = model(None);
    let (prompt, expected) = (&prompts()[0], GOLDEN[0].1);
    let ids = [prompt.as_slice(), expected].concat();
    let mut logits = Logits(Vec::new());
    let wave = Wave { id: 0, sequences: vec![Sequence::new(ids)] };
    Engine::new(&model, EngineOptions::default()).run(&wave, &mut logits).unwrap();
    let vocab = model.config().vocab_size;
    for (i, token) in expected.iter().enumerate() {
        let row = &logits.0[(prompt.len() - 1 + i) * vocab..][..vocab];
        let best = (0..vocab).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        assert_eq!(best as u32, *token);
    }
}

#[test]
fn sampling_is_reproducible_and_independent_of_batching() {
    let model = model(None);
    let sampling = Sampling::TopP { temperature: 4.0, top_p: 0.95, seed: 3 };
    let batched = GenerateOptions { sampling, ..options(&model) };
    let single = GenerateOptions { batch_tokens: 1, ..batched.clone() };
    let a = generate(&model, &prompts(), &batched, |_| false).unwrap();
    assert_eq!(a, generate(&model, &prompts(), &single, |_| false).unwrap());
    let other = GenerateOptions { sampling: Sampling::TopP { temperature: 4.0, top_p: 0.95, seed: 4 }, ..batched };
    assert_ne!(a, generate(&model, &prompts(), &other, |_| false).unwrap());
}

#[test]
fn bad_generation_requests_are_explained() {
    let model = model(None);
    let message = |prompts: &[Vec<u32>], options: GenerateOptions| {
        generate(&model, prompts, &options, |_| false).unwrap_err().to_string()
    };
    assert!(message(&[vec![1], vec![]], options(&model)).contains("prompt 1"));
    assert!(message(&[vec![9999]], options(&model)).contains("9999"));
    let sampling = |temperature, top_p| GenerateOptions {
        sampling: Sampling::TopP { temperature, top_p, seed: 0 },
        ..options(&model)
    };
    assert!(message(&prompts(), sampling(0.0, 0.9)).contains("temperature"));
    assert!(message(&prompts(), sampling(1.0, 1.5)).contains("top_p"));
}

#[test]
fn evaluation_counts_as_the_reference_does() {
    let model = model(None);
    let tokenizer = Tokenizer::from_dir(dir()).unwrap();
    let set = |name: &str, limit| {
        let path = dir().join(format!("data/{name}_test.jsonl"));
        EvalSet::load(path, &tokenizer, model.config().vocab_size, Some(limit)).unwrap()
    };
    let result = |name, limit| evaluate(&model, &tokenizer, &set(name, limit), &EvaluateOptions::default()).unwrap();
    assert_eq!(result("arithmetic", 40).metric, Metric::ExactMatch(1.0));
    assert_eq!(result("facts", 200).metric, Metric::ExactMatch(0.995));
    // transformers: 22.8837 over the same 37 windows of the first 200 rows
    let prose = result("prose", 200);
    assert!((prose.value() - 22.8837).abs() < 1e-3, "{prose:?}");
    assert_eq!(prose.key(), "prose_ppl");
}

/// The loss of one wave seen through an overlay.
fn loss(model: &Model) -> f64 {
    struct Loss;
    impl Observer for Loss {
        fn needs(&self) -> Signals {
            Signals::NONE
        }
    }
    let sequences = prompts().into_iter().map(Sequence::new).collect();
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    engine.run(&Wave { id: 0, sequences }, &mut Loss).unwrap().loss.unwrap()
}

#[test]
fn an_overlay_that_permutes_units_changes_nothing_and_one_that_drops_them_does() {
    let base = model(None);
    let width = base.checkpoint().shape().layers[0].widths[0] as u32;
    let all = || -> Vec<(usize, usize)> {
        let shape = base.checkpoint().shape();
        shape.layers.iter().flat_map(|l| (0..l.widths.len()).map(|e| (l.layer, e))).collect()
    };
    let overlay =
        |units: Vec<u32>| all().into_iter().fold(KeepUnits::new(), |overlay, (l, e)| overlay.keep(l, e, units.clone()));
    let permuted = base.with_overlay(std::sync::Arc::new(overlay((0..width).rev().collect()))).unwrap();
    let halved = base.with_overlay(std::sync::Arc::new(overlay((0..width / 2).collect()))).unwrap();
    let empty = base.with_overlay(std::sync::Arc::new(overlay(Vec::new()))).unwrap();
    let full = loss(&base);
    assert!((loss(&permuted) - full).abs() < 1e-3 * full.abs());
    assert!((loss(&halved) - full).abs() > 1e-2 * full.abs());
    assert!(loss(&empty).is_finite());
}

#[test]
fn sequences_of_a_wave_do_not_see_each_other() {
    struct Loss;
    impl Observer for Loss {
        fn needs(&self) -> Signals {
            Signals::NONE
        }
    }
    let base = model(None);
    let engine = Engine::new(&base, EngineOptions { loss: true, ..EngineOptions::default() });
    let sequences: Vec<_> = prompts().into_iter().map(Sequence::new).collect();
    let together = engine.run(&Wave { id: 0, sequences: sequences.clone() }, &mut Loss).unwrap();
    for (sequence, expected) in sequences.into_iter().zip(together.sequence_losses.unwrap()) {
        let alone = engine.run(&Wave { id: 1, sequences: vec![sequence] }, &mut Loss).unwrap().loss.unwrap();
        assert!((alone - expected).abs() < 1e-4 * expected.abs());
    }
}

#[test]
fn bad_waves_are_explained() {
    struct Loss;
    impl Observer for Loss {
        fn needs(&self) -> Signals {
            Signals::NONE
        }
    }
    let base = model(None);
    let engine = Engine::new(&base, EngineOptions::default());
    let message = |sequences| engine.run(&Wave { id: 7, sequences }, &mut Loss).unwrap_err().to_string();
    assert!(message(vec![]).contains("wave 7"));
    assert!(message(vec![Sequence::new(vec![])]).contains("wave 7 sequence 0"));
    assert!(message(vec![Sequence::new(vec![1, 5000])]).contains("5000"));
    let tiny = model(Some(1000));
    let engine = Engine::new(&tiny, EngineOptions::default());
    let wave = Wave { id: 0, sequences: vec![Sequence::new(vec![1, 2])] };
    let message = engine.run(&wave, &mut Loss).unwrap_err().to_string();
    assert!(message.contains("max_memory of 1000 bytes"), "{message}");
}

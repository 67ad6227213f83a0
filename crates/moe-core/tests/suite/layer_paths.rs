//! Models under paths of layers, in sweeps, backward and in generation.
#![cfg(feature = "flex")]

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::tensor::{Device, Tensor};
use moe_core::{
    Engine, EngineOptions, Model, Result,
    data::{Sequence, Wave},
    depth::{DepthRule, LayerPath},
    generate::{GenerateOptions, generate},
    host::HostView,
    trace::{Nobody, Observer, RouterGradients, Signals, WaveInfo},
};

fn fixture(name: &str) -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5").join(name);
    Model::open(dir, &Device::flex(), None).unwrap()
}

fn tiny_moe() -> Model {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    Model::open(dir, &Device::flex(), None).unwrap()
}

fn wave(vocab: usize) -> Wave {
    let sequence = |seed: usize, n: usize| {
        Sequence::new((0..n).map(|i| ((i * i * 7 + i * 3 + seed * 11) % vocab.min(90)) as u32).collect())
    };
    Wave { id: 0, sequences: vec![sequence(1, 13), sequence(2, 9), sequence(5, 6)] }
}

fn losses(model: &Model) -> Vec<f64> {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    engine.run(&wave(model.config().vocab_size), &mut Nobody).unwrap().sequence_losses.unwrap()
}

fn loss(model: &Model) -> f64 {
    losses(model).iter().sum()
}

const FAMILIES: [&str; 6] = ["qwen2_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "nemotron_h", "gemma4_text"];

#[test]
fn all_layers_once_are_the_model_bit_for_bit() {
    for name in FAMILIES {
        let model = fixture(name);
        let path = LayerPath::whole(model.config().layers.len());
        let under = model.with_path(path).unwrap();
        assert_eq!(loss(&under).to_bits(), loss(&model).to_bits(), "{name}");
        #[derive(Debug)]
        struct Once;
        impl DepthRule for Once {}
        let once = model.with_depth_rule(Arc::new(Once)).unwrap();
        assert_eq!(loss(&once).to_bits(), loss(&model).to_bits(), "{name}");
        let prompts = [vec![5, 9, 3], vec![7; 6]];
        let options = GenerateOptions { max_new_tokens: 6, ..GenerateOptions::default() };
        let expected = generate(&model, &prompts, &options, |_| false).unwrap();
        assert_eq!(generate(&under, &prompts, &options, |_| false).unwrap(), expected, "{name}");
        assert_eq!(generate(&once, &prompts, &options, |_| false).unwrap(), expected, "{name}");
    }
}

/// Generates token by token without a cache.
fn uncached(model: &Model, prompt: &[u32], tokens: usize) -> Vec<u32> {
    let one = GenerateOptions { max_new_tokens: 1, ..GenerateOptions::default() };
    let mut ids = prompt.to_vec();
    for _ in 0..tokens {
        let next = generate(model, &[ids.clone()], &one, |_| false).unwrap().concat();
        ids.extend(next);
    }
    ids[prompt.len()..].to_vec()
}

#[test]
fn cached_generation_under_a_path_is_that_of_whole_passes() {
    let model = tiny_moe();
    for path in ["0-3", "0,2,3", "0-1,1-3", "0,1a,2f,3", "3,0,1,1,1,2"] {
        let under = model.with_path(path.parse().unwrap()).unwrap();
        let prompts = [vec![50, 61, 72, 83], vec![99; 3], vec![7]];
        let options = GenerateOptions { max_new_tokens: 5, ..GenerateOptions::default() };
        let together = generate(&under, &prompts, &options, |_| false).unwrap();
        for (prompt, found) in prompts.iter().zip(together) {
            assert_eq!(found, uncached(&under, prompt, 5), "{path}");
        }
    }
}

/// Skips, runs and repeats layers by the length of a sequence, and tokens by a number in their stream.
#[derive(Debug)]
struct ByContent {
    times: bool,
    tokens: bool,
    half: bool,
}

impl DepthRule for ByContent {
    fn times(&self, layer: usize, x: &Tensor<2>, wave: &WaveInfo) -> Result<Option<Vec<u8>>> {
        let view = HostView::new(x);
        let row = |start: usize| &view.as_slice()[start * x.dims()[1]..][..x.dims()[1]];
        // by signs that rounding does not change
        let of = |s: &moe_core::trace::SequenceInfo| {
            let row = row(s.tokens.start);
            u8::from(row[2 * layer] > 0.0) + u8::from(row[2 * layer + 1] > 0.0)
        };
        Ok(self.times.then(|| wave.sequences.iter().map(of).collect()))
    }

    fn factors(&self, _: usize, middle: &Tensor<2>, _: &WaveInfo) -> Result<Option<Vec<f32>>> {
        let view = HostView::new(middle);
        let run = if self.half { 0.5 } else { 1.0 };
        let of = |row: &[f32]| if row[0] > 0.0 { run } else { 0.0 };
        Ok(self.tokens.then(|| view.as_slice().chunks_exact(middle.dims()[1]).map(of).collect()))
    }
}

#[test]
fn decisions_of_a_rule_hold_for_each_sequence_and_token_by_itself() {
    let model = tiny_moe();
    for rule in [
        ByContent { times: true, tokens: false, half: false },
        ByContent { times: false, tokens: true, half: false },
        ByContent { times: true, tokens: true, half: true },
    ] {
        let shown = format!("{rule:?}");
        let under = model.with_depth_rule(Arc::new(rule)).unwrap();
        let together = losses(&under);
        assert_ne!(together, losses(&model), "{shown}");
        // a sequence alone loses what it does among others
        let engine = Engine::new(&under, EngineOptions { loss: true, ..EngineOptions::default() });
        for (sequence, expected) in wave(90).sequences.into_iter().zip(together) {
            let alone = engine.run(&Wave { id: 1, sequences: vec![sequence] }, &mut Nobody).unwrap().loss.unwrap();
            assert!((alone - expected).abs() < 1e-4 * expected, "{shown}: {alone} {expected}");
        }
        let prompts = [vec![50, 61, 72, 83], vec![99; 3], vec![7, 8]];
        let options = GenerateOptions { max_new_tokens: 5, ..GenerateOptions::default() };
        let found = generate(&under, &prompts, &options, |_| false).unwrap();
        let single: Vec<Vec<u32>> = prompts
            .iter()
            .map(|p| generate(&under, std::slice::from_ref(p), &options, |_| false).unwrap().concat())
            .collect();
        assert_eq!(found, single, "{shown}");
        if shown.contains("times: false") {
            for (prompt, found) in prompts.iter().zip(found) {
                assert_eq!(found, uncached(&under, prompt, 5), "{shown}");
            }
        }
    }
}

#[test]
fn a_skipped_half_adds_nothing_and_a_skipped_layer_is_gone() {
    let model = tiny_moe();
    let under = |path: &str| model.with_path(path.parse().unwrap()).unwrap();
    assert_eq!(loss(&under("0a,0f,1-3")).to_bits(), loss(&model).to_bits());
    let gone = loss(&under("0,2-3"));
    assert!((gone - loss(&model)).abs() > 0.1);
    #[derive(Debug)]
    struct Skip(usize);
    impl DepthRule for Skip {
        fn times(&self, layer: usize, _: &Tensor<2>, wave: &WaveInfo) -> Result<Option<Vec<u8>>> {
            Ok((layer == self.0).then(|| vec![0; wave.sequences.len()]))
        }
    }
    assert_eq!(loss(&model.with_depth_rule(Arc::new(Skip(1))).unwrap()).to_bits(), gone.to_bits());
    #[derive(Debug)]
    struct NoExperts(usize);
    impl DepthRule for NoExperts {
        fn factors(&self, layer: usize, middle: &Tensor<2>, _: &WaveInfo) -> Result<Option<Vec<f32>>> {
            Ok((layer == self.0).then(|| vec![0.0; middle.dims()[0]]))
        }
    }
    let no_experts = loss(&model.with_depth_rule(Arc::new(NoExperts(2))).unwrap());
    assert_eq!(no_experts.to_bits(), loss(&under("0-1,2a,3")).to_bits());
}

/// Gradients with respect to gains of the experts of every layer that ran.
#[derive(Default)]
struct Gains(Vec<(usize, Vec<f64>)>);

impl Observer for Gains {
    fn needs(&self) -> Signals {
        Signals::ROUTER_GRADIENTS
    }
    fn router(&mut self, gradients: &RouterGradients<'_>) -> Result<()> {
        self.0.push((gradients.layer, gradients.d_gains.to_vec()));
        Ok(())
    }
}

#[test]
fn gradients_under_a_path_match_difference_quotients() {
    let model = fixture("qwen2_moe");
    let path = if model.config().layers.len() > 2 { "0,1a,2" } else { "0a,1" };
    let under = model.with_path(path.parse().unwrap()).unwrap();
    let wave = wave(model.config().vocab_size);
    let mut found = Gains::default();
    Engine::new(&under, EngineOptions::default()).run(&wave, &mut found).unwrap();
    let mut compared = 0;
    for (layer, gains) in found.0 {
        for expert in 0..gains.len().min(3) {
            let at = |h: f32| {
                let mut values = vec![1.0; gains.len()];
                values[expert] += h;
                let overlay = moe_core::ExpertGains::new().set(layer, values);
                loss(
                    &model
                        .with_overlays(None, Some(Arc::new(overlay)))
                        .unwrap()
                        .with_path(path.parse().unwrap())
                        .unwrap(),
                )
            };
            let slope = |h: f32| (at(h) - at(-h)) / (2.0 * f64::from(h));
            let (numeric, wider) = (slope(4e-3), slope(8e-3));
            // a step that changes which experts later tokens go to says nothing
            if (numeric - wider).abs() < 2e-2 * numeric.abs().max(0.1) {
                let close = (numeric - gains[expert]).abs() < 3e-2 * gains[expert].abs().max(0.1);
                assert!(close, "{layer} {expert}: {numeric} {}", gains[expert]);
                compared += 1;
            }
        }
    }
    assert!(compared > 2, "{compared}");
}

#[test]
fn what_a_path_cannot_do_is_explained() {
    let model = tiny_moe();
    let error = |path: &str| model.with_path(path.parse().unwrap()).unwrap_err().to_string();
    assert!(error("0-9").contains("layer of a path: found 4, expected below 4"));
    let repeated = model.with_path("0,1,1,2,3".parse().unwrap()).unwrap();
    let wave = wave(90);
    let message =
        Engine::new(&repeated, EngineOptions::default()).run(&wave, &mut Gains::default()).unwrap_err().to_string();
    assert!(message.contains("repeats layers"), "{message}");
    let skipped = model.with_path("0,2-3".parse().unwrap()).unwrap();
    let message = Engine::new(&skipped, EngineOptions::default()).layer_sweep(&[wave]).err().unwrap().to_string();
    assert!(message.contains("under a path of layers"), "{message}");
    #[derive(Debug)]
    struct Thrice;
    impl DepthRule for Thrice {
        fn times(&self, _: usize, _: &Tensor<2>, wave: &WaveInfo) -> Result<Option<Vec<u8>>> {
            Ok(Some(vec![3; wave.sequences.len()]))
        }
    }
    let thrice = model.with_depth_rule(Arc::new(Thrice)).unwrap();
    let engine = Engine::new(&thrice, EngineOptions { loss: true, ..EngineOptions::default() });
    let message = engine.run(&self::wave(90), &mut Nobody).unwrap_err().to_string();
    assert!(message.contains("rounds of layer 0"), "{message}");
    assert!(skipped.with_depth_rule(Arc::new(Thrice)).is_err() && thrice.with_path(LayerPath::whole(4)).is_err());
}

#[test]
fn routers_of_layers_learn_the_paths_they_are_shown_and_come_back_from_their_file() {
    use moe_core::depth::{LayerRouterTraining, LayerRouters, PathSearch};
    use moe_core::train::{Schedule, TrainOptions};
    let model = tiny_moe();
    let count = model.config().layers.len();
    let fresh = LayerRouters::new(count, model.config().hidden_size, 0);
    let under = model.with_depth_rule(Arc::new(fresh)).unwrap();
    assert_eq!(loss(&under).to_bits(), loss(&model).to_bits());
    // the first sequence of a wave skips layer 2, the second repeats layer 1
    let waves: Vec<Wave> = (0..3).map(|id| Wave { id, ..wave(90) }).collect();
    let rounds = [vec![1, 1, 0, 1], vec![1, 2, 1, 1], vec![1, 1, 1, 1]];
    let labels = waves.iter().map(|wave| (wave.id, rounds.to_vec())).collect();
    let train = TrainOptions { epochs: 60, schedule: Schedule::constant(3e-3), ..TrainOptions::default() };
    let how = LayerRouterTraining { train, ..LayerRouterTraining::default() };
    let (routers, _, agreement) = LayerRouters::train(&model, &waves, &labels, &how, &mut |_| Ok(())).unwrap();
    assert!(agreement > 0.9, "{agreement}");
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("routers.safetensors");
    routers.save(&file).unwrap();
    let read = LayerRouters::load(&file, &model).unwrap();
    assert_eq!(read, routers);
    assert!(LayerRouters::load(&file, &fixture("qwen2_moe")).unwrap_err().to_string().contains("routers.safetensors"));
    let expected = losses(&model.with_depth_rule(Arc::new(routers)).unwrap());
    for (sequence, (rounds, expected)) in wave(90).sequences.into_iter().zip(rounds.iter().zip(expected)) {
        let under = model.with_path(moe_core::depth::path_of(rounds)).unwrap();
        let engine = Engine::new(&under, EngineOptions { loss: true, ..EngineOptions::default() });
        let alone = engine.run(&Wave { id: 0, sequences: vec![sequence] }, &mut Nobody).unwrap().loss.unwrap();
        assert!((alone - expected).abs() < 1e-3 * expected, "{alone} {expected}");
    }
    // a search over the model itself: the most likely continuation as the answer
    let search = PathSearch { simulations: 6, ..PathSearch::default() };
    let options = GenerateOptions { max_new_tokens: 2, ..GenerateOptions::default() };
    let answer = generate(&model, &[vec![50, 61, 72]], &options, |_| false).unwrap();
    let found = search
        .search(count, |path| {
            let under = model.with_path(path.clone())?;
            Ok(f64::from(u8::from(generate(&under, &[vec![50, 61, 72]], &options, |_| false)? == answer)))
        })
        .unwrap();
    assert_eq!((found.whole, found.reward), (1.0, 1.0));
}

#[test]
fn tokens_that_a_half_would_change_least_skip_it() {
    use moe_core::depth::TokenSkip;
    let model = tiny_moe();
    let waves = [wave(90)];
    let before = loss(&model);
    let none = TokenSkip::fit(&model, &[1, 2], &waves, 0.0, 1e-3).unwrap();
    assert_eq!(loss(&model.with_depth_rule(Arc::new(none)).unwrap()).to_bits(), before.to_bits());
    let half = TokenSkip::fit(&model, &[2], &waves, 0.5, 1e-3).unwrap();
    let under = model.with_depth_rule(Arc::new(half)).unwrap();
    let (rows, after) = (model.expert_rows(), loss(&under));
    assert!(rows > 0 && after != before);
    // in layer 2 half of the tokens, elsewhere all
    let passed = under.work().routed_tokens as f64 / waves[0].tokens() as f64;
    assert!((passed - 3.5).abs() < 0.1, "{passed}");
    // The attention half runs for all of them.
    assert_eq!(under.work().layers_per_token(), 2.0 + passed / 2.0);
    let message = TokenSkip::fit(&model, &[9], &waves, 0.5, 1e-3).unwrap_err().to_string();
    assert!(message.contains("layer to skip in: found 9"), "{message}");
}

//! Changed routing: gradients of gains and of the router, removed and skipped experts, in sweeps and in generation.
#![cfg(feature = "flex")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::tensor::Device;
use moe_checkpoint::{LayerRole, Role};
use moe_core::{
    Engine, EngineOptions, ExpertGains, ExpertOverlay, KeepUnits, Model, RemoveExperts, Result, RoutingOverlay,
    SkipExperts,
    data::{Sequence, Tokenizer, Wave},
    generate::{GenerateOptions, generate},
    host::HostView,
    overlay::SkipCalibration,
    router::Routed,
    trace::{ExpertTrace, LayerTrace, Nobody, Observer, RouterGradients, Signals},
};

fn fixture(name: &str) -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5").join(name);
    Model::open(dir, &Device::flex(), None).unwrap()
}

fn tiny_moe() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe")
}

fn wave(vocab: usize) -> Wave {
    let sequence = |seed: usize, n: usize| {
        Sequence::new((0..n).map(|i| ((i * i * 7 + i * 3 + seed * 11) % vocab.min(90)) as u32).collect())
    };
    Wave { id: 0, sequences: vec![sequence(1, 13), sequence(2, 9)] }
}

fn loss(model: &Model) -> f64 {
    let engine = Engine::new(model, EngineOptions { loss: true, ..EngineOptions::default() });
    engine.run(&wave(model.config().vocab_size), &mut Nobody).unwrap().loss.unwrap()
}

/// Gains and router weights of every layer, at will.
#[derive(Clone, Default)]
struct Routers {
    gains: BTreeMap<usize, Vec<f32>>,
    routers: BTreeMap<usize, Vec<f32>>,
    removed: Option<Vec<u32>>,
    skip: Option<SkipExperts>,
}

impl RoutingOverlay for Routers {
    fn removed(&self, _: usize) -> Option<&[u32]> {
        self.removed.as_deref()
    }
    fn gains(&self, layer: usize) -> Option<Vec<f32>> {
        self.gains.get(&layer).cloned()
    }
    fn router(&self, layer: usize) -> Option<Vec<f32>> {
        self.routers.get(&layer).cloned()
    }
    fn routed(&self, layer: usize, routed: &mut Routed) {
        if let Some(skip) = &self.skip {
            skip.routed(layer, routed);
        }
    }
    fn routed_backward(&self, layer: usize, before: &Routed, after: &Routed, d_weights: &mut [f32]) {
        if let Some(skip) = &self.skip {
            skip.routed_backward(layer, before, after, d_weights);
        }
    }
}

impl Routers {
    fn of(model: &Model) -> Self {
        let moe = |layer: &usize| model.config().moe(*layer).is_some();
        let layers: Vec<usize> = (0..model.config().layers.len()).filter(moe).collect();
        let router = |layer| model.checkpoint().read_f32(Role::Layer(layer, LayerRole::Router)).unwrap();
        let experts = |layer| model.config().moe(layer).unwrap().num_experts();
        Self {
            // some experts are switched off
            gains: layers.iter().map(|&l| (l, (0..experts(l)).map(|e| e as f32 % 3.0 * 0.6).collect())).collect(),
            routers: layers.iter().map(|&l| (l, router(l))).collect(),
            ..Self::default()
        }
    }

    fn loss(&self, model: &Model) -> f64 {
        loss(&model.with_overlays(None, Some(Arc::new(self.clone()))).unwrap())
    }
}

/// Gradients of gains and router weights, by layer.
#[derive(Default)]
struct Gradients {
    gains: BTreeMap<usize, Vec<f64>>,
    routers: BTreeMap<usize, Vec<f64>>,
    order: Vec<usize>,
}

impl Observer for Gradients {
    fn needs(&self) -> Signals {
        Signals::ROUTER_GRADIENTS
    }
    fn expert(&mut self, _: &ExpertTrace<'_>) -> Result<()> {
        panic!("experts were not asked for")
    }
    fn router(&mut self, g: &RouterGradients<'_>) -> Result<()> {
        let [tokens, hidden] = g.input.dims();
        let input = HostView::new(g.input);
        let mut weight = vec![0.0; g.experts * hidden];
        for t in 0..tokens {
            for (e, d) in g.d_logits[t * g.experts..(t + 1) * g.experts].iter().enumerate() {
                for h in 0..hidden {
                    weight[e * hidden + h] += f64::from(*d) * f64::from(input.as_slice()[t * hidden + h]);
                }
            }
        }
        self.gains.insert(g.layer, g.d_gains.to_vec());
        self.routers.insert(g.layer, weight);
        self.order.push(g.layer);
        Ok(())
    }
}

/// Compares the gradients with central differences of the loss. A step that changes which experts a token goes to says
/// nothing.
fn check_gradients(model: &Model, routers: &Routers) {
    let overlaid = model.with_overlays(None, Some(Arc::new(routers.clone()))).unwrap();
    let mut found = Gradients::default();
    let engine = Engine::new(&overlaid, EngineOptions::default());
    engine.run(&wave(model.config().vocab_size), &mut found).unwrap();
    assert!(found.order.is_sorted_by(|a, b| a > b), "from the last layer to the first MoE layer");
    assert_eq!(found.order.len(), routers.routers.len());
    let selected = |routers: &Routers| {
        struct Selected(Vec<u32>);
        impl Observer for Selected {
            fn needs(&self) -> Signals {
                Signals::ROUTING
            }
            fn layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
                self.0.extend(trace.selected.iter().zip(trace.weights).map(|(e, w)| e * 2 + u32::from(*w == 0.0)));
                Ok(())
            }
        }
        let model = model.with_overlays(None, Some(Arc::new(routers.clone()))).unwrap();
        let mut selected = Selected(Vec::new());
        let engine = Engine::new(&model, EngineOptions::default());
        engine.run(&wave(model.config().vocab_size), &mut selected).unwrap();
        selected.0
    };
    let base = selected(routers);
    let (mut compared, mut zero_gains) = (0, 0);
    for (&layer, gains) in &routers.gains {
        for (e, gain) in gains.iter().enumerate() {
            let moved = |h: f32| {
                let mut routers = routers.clone();
                routers.gains.get_mut(&layer).unwrap()[e] += h;
                routers
            };
            let (up, down) = (moved(0.02), moved(-0.02));
            let analytic = found.gains[&layer][e];
            // a gain is 0 on one side of some steps, so that the marks of `selected` differ; experts must not
            let experts = |s: Vec<u32>| s.into_iter().map(|x| x / 2).collect::<Vec<_>>();
            if experts(selected(&up)) != experts(base.clone()) || experts(selected(&down)) != experts(base.clone()) {
                continue;
            }
            let numeric = (up.loss(model) - down.loss(model)) / 0.04;
            assert!(
                (numeric - analytic).abs() < 2e-3 * (1.0 + numeric.abs()),
                "gain {layer} {e}: {numeric} {analytic}"
            );
            compared += 1;
            zero_gains += usize::from(*gain == 0.0 && analytic.abs() > 1e-4);
        }
    }
    assert!(compared >= 4 && zero_gains >= 1, "{compared} gains compared, {zero_gains} of them 0");
    let mut compared = 0;
    for (&layer, weight) in &routers.routers {
        for i in (0..weight.len()).step_by(weight.len() / 12 + 1) {
            let moved = |h: f32| {
                let mut routers = routers.clone();
                routers.routers.get_mut(&layer).unwrap()[i] += h;
                routers
            };
            let (up, down) = (moved(0.01), moved(-0.01));
            if selected(&up) != base || selected(&down) != base {
                continue;
            }
            let numeric = (up.loss(model) - down.loss(model)) / 0.02;
            let analytic = found.routers[&layer][i];
            assert!((numeric - analytic).abs() < 2e-3 * (1.0 + numeric.abs()), "{layer} {i}: {numeric} {analytic}");
            compared += 1;
        }
    }
    assert!(compared >= 6, "{compared} router weights compared");
}

#[test]
fn gradients_of_gains_and_router_match_the_loss_where_weights_are_a_softmax() {
    let model = fixture("qwen2_moe");
    check_gradients(&model, &Routers::of(&model));
}

#[test]
fn gradients_of_gains_and_router_match_the_loss_where_weights_are_sigmoids() {
    let model = fixture("deepseek_v3");
    check_gradients(&model, &Routers::of(&model));
}

#[test]
fn gradients_pass_through_removed_and_skipped_experts() {
    let model = fixture("qwen3_moe");
    let mut routers = Routers::of(&model);
    routers.gains.values_mut().for_each(|gains| gains.iter_mut().enumerate().for_each(|(e, g)| *g = (e % 2) as f32));
    routers.removed = Some(vec![1]);
    routers.skip = Some(SkipExperts::new(routers.routers.keys().map(|&layer| (layer, 0.9)).collect()));
    check_gradients(&model, &routers);
}

#[test]
fn gains_of_one_change_nothing_and_gains_of_zero_are_experts_without_units() {
    let model = fixture("deepseek_v3");
    let moe: Vec<usize> = (0..model.config().layers.len()).filter(|&l| model.config().moe(l).is_some()).collect();
    let experts = model.config().moe(moe[0]).unwrap().num_experts();
    let set = |gain: f32| {
        let gains = moe.iter().fold(ExpertGains::new(), |g, &l| {
            g.set(l, (0..experts).map(|e| if e % 2 == 0 { gain } else { 1.0 }).collect::<Vec<_>>())
        });
        loss(&model.with_overlays(None, Some(Arc::new(gains))).unwrap())
    };
    assert_eq!(set(1.0).to_bits(), loss(&model).to_bits());
    let empty = moe.iter().flat_map(|&l| (0..experts).step_by(2).map(move |e| (l, e)));
    let empty: Arc<dyn ExpertOverlay> =
        Arc::new(empty.fold(KeepUnits::new(), |units, (l, e)| units.keep(l, e, Vec::<u32>::new())));
    assert_eq!(set(0.0).to_bits(), loss(&model.with_overlay(empty).unwrap()).to_bits());
}

#[test]
fn removed_experts_get_no_token_and_no_logit() {
    struct Seen(usize);
    impl Observer for Seen {
        fn needs(&self) -> Signals {
            Signals { units: true, ..Signals::ROUTING }
        }
        fn layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
            assert!(trace.selected.iter().all(|e| ![0, 2].contains(e)));
            for row in trace.logits.chunks(trace.experts) {
                assert!((0..trace.experts).all(|e| (row[e] == f32::NEG_INFINITY) == [0, 2].contains(&e)));
            }
            self.0 += 1;
            Ok(())
        }
        fn expert(&mut self, trace: &ExpertTrace<'_>) -> Result<()> {
            assert!(![0, 2].contains(&trace.expert));
            Ok(())
        }
    }
    let model = fixture("mixtral");
    let layers = model.config().layers.len();
    let removed = (0..layers).fold(RemoveExperts::new(), |removed, layer| removed.remove(layer, [2, 0]));
    let removed = model.with_overlays(None, Some(Arc::new(removed))).unwrap();
    let mut seen = Seen(0);
    Engine::new(&removed, EngineOptions::default()).run(&wave(90), &mut seen).unwrap();
    assert_eq!(seen.0, layers);
    assert_ne!(loss(&removed), loss(&model));
}

#[test]
fn overlays_that_do_not_fit_are_refused() {
    let model = fixture("qwen2_moe");
    let refused = |overlay: Arc<dyn RoutingOverlay>| model.with_overlays(None, Some(overlay)).unwrap_err().to_string();
    let experts = model.config().moe(1).unwrap().num_experts() as u32;
    assert!(refused(Arc::new(RemoveExperts::new().remove(1, [experts]))).contains("in layer 1"));
    assert!(refused(Arc::new(RemoveExperts::new().remove(1, 0..experts))).contains("at least one expert left"));
    assert!(refused(Arc::new(ExpertGains::new().set(0, [1.0]))).contains("1 numbers"));
    let router = Routers { routers: BTreeMap::from([(0, vec![0.0; 3])]), ..Routers::default() };
    assert!(refused(Arc::new(router)).contains("router weights of the routing overlay in layer 0: found 3 numbers"));

    struct Twice;
    impl RoutingOverlay for Twice {
        fn routed(&self, _: usize, routed: &mut Routed) {
            routed.selected.fill(1);
        }
    }
    let twice = model.with_overlays(None, Some(Arc::new(Twice))).unwrap();
    let error = Engine::new(&twice, EngineOptions { loss: true, ..Default::default() }).run(&wave(90), &mut Nobody);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("selected experts of the routing overlay in layer 0") && error.contains("[1, 1"), "{error}");
}

/// Greedy continuations by generation and by whole sweeps over the text so far.
fn check_generation(model: &Model, prompts: &[Vec<u32>]) {
    struct Last(Vec<f32>);
    impl Observer for Last {
        fn needs(&self) -> Signals {
            Signals { logits: true, ..Signals::NONE }
        }
        fn logits(&mut self, _: usize, logits: &HostView, _: usize) -> Result<()> {
            self.0.extend_from_slice(logits.as_slice());
            Ok(())
        }
    }
    let vocab = model.config().vocab_size;
    let options = GenerateOptions { max_new_tokens: 8, ..GenerateOptions::default() };
    for (prompt, completion) in prompts.iter().zip(generate(model, prompts, &options, |_| false).unwrap()) {
        let sequences = vec![Sequence::new([prompt.as_slice(), &completion].concat())];
        let mut logits = Last(Vec::new());
        Engine::new(model, EngineOptions::default()).run(&Wave { id: 0, sequences }, &mut logits).unwrap();
        for (i, &token) in completion.iter().enumerate() {
            let row = &logits.0[(prompt.len() - 1 + i) * vocab..][..vocab];
            let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert!(best - row[token as usize] < 1e-4, "token {i}");
        }
    }
}

fn prompts() -> Vec<Vec<u32>> {
    let tokenizer = Tokenizer::from_dir(tiny_moe()).unwrap();
    ["Question: Ola finds 9 hats, then 9 more, and loses 3. How many hats remain?\nAnswer:", "Aruba lies in"]
        .map(|prompt| tokenizer.encode(prompt).unwrap())
        .to_vec()
}

#[test]
fn generation_honors_removed_experts_gains_and_other_routers() {
    let base = Model::open(tiny_moe(), &Device::flex(), None).unwrap();
    let mut routers = Routers { removed: Some(vec![3, 8, 9]), ..Routers::of(&base) };
    routers.gains.values_mut().for_each(|gains| gains.iter_mut().for_each(|g| *g = 1.0 - 0.2 * *g));
    routers.routers.values_mut().for_each(|weights| weights.iter_mut().for_each(|w| *w *= 0.9));
    let changed = base.with_overlays(None, Some(Arc::new(routers))).unwrap();
    check_generation(&changed, &prompts());
    let options = GenerateOptions { max_new_tokens: 8, ..GenerateOptions::default() };
    let continued = |model: &Model| generate(model, &prompts(), &options, |_| false).unwrap();
    assert_ne!(continued(&changed), continued(&base));
}

#[test]
fn skipped_experts_are_not_computed() {
    let base = Model::open(tiny_moe(), &Device::flex(), None).unwrap();
    let mut calibration = SkipCalibration::new();
    let wave = Wave { id: 0, sequences: prompts().into_iter().map(Sequence::new).collect() };
    Engine::new(&base, EngineOptions::default()).run(&wave, &mut calibration).unwrap();
    let beta = calibration.medians();
    assert_eq!(beta.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3]);
    // of the routing as it was calibrated: half of the tokens skip at least their last expert
    for (&layer, &beta) in &beta {
        assert!(calibration.share_skipped(layer, beta) >= 0.125, "{layer}");
    }
    let skipping = base.with_overlays(None, Some(Arc::new(SkipExperts { beta, renormalize: false }))).unwrap();
    check_generation(&skipping, &prompts());

    let options = GenerateOptions { max_new_tokens: 8, ..GenerateOptions::default() };
    let computed = |model: &Model| {
        let before = model.expert_rows();
        let completions = generate(model, &prompts(), &options, |_| false).unwrap();
        assert!(completions.iter().all(|c| c.len() == 8));
        model.expert_rows() - before
    };
    // every token but the last of each completion passes four layers of four experts
    let tokens: usize = prompts().iter().map(|p| p.len() + 7).sum();
    assert_eq!(computed(&base), tokens as u64 * 16);
    assert!(computed(&skipping) < tokens as u64 * 14, "{} of {}", computed(&skipping), tokens * 16);
}

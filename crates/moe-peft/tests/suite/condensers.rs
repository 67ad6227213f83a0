//! Condenser experts.

use crate::tuning;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use moe_checkpoint::RoutingKind;
use moe_core::{
    Engine, EngineOptions, Model,
    adapters::{ExpertSite, Site},
    data::Wave,
    generate::{GenerateOptions, generate},
    trace::{LayerTrace, Observer, Signals},
};
use moe_peft::{
    AdapterSet, FineTune, Setting, TrainingHooks, TuningMethod,
    condenser::{Center, CondenserCounts, CondenserLayer, CondenserMode, CondenserOptions, Condensers, Starved, gini},
    model_weights::OwnWeights,
};
use tuning::{check_gradient, loss, model, sweep, train, waves};

fn condensers(base: &Model, options: CondenserOptions) -> Arc<Condensers> {
    Arc::new(Condensers::new(base.config(), options).unwrap())
}

/// With a bias that makes the given experts of each layer the lowest.
fn learnt(base: &Model, mode: CondenserMode, low: &[u32]) -> Arc<Condensers> {
    let all = condensers(base, CondenserOptions { mode, ..CondenserOptions::default() });
    let layers = all.layers().map(|layer| {
        let mut learnt = all.layer(layer).unwrap();
        for (e, b) in learnt.bias.iter_mut().enumerate() {
            *b = if low.contains(&(e as u32)) { -0.3 } else { 0.05 * (e % 3) as f32 };
        }
        (layer, learnt)
    });
    all.restore(layers.collect()).unwrap();
    all.select(&CondenserCounts::Each(low.len()), Starved::Lowest).unwrap();
    assert!(all.layers().all(|layer| all.layer(layer).unwrap().condensers.as_deref() == Some(low)));
    all
}

#[test]
fn the_bias_moves_by_the_sign_of_use_once_per_step() {
    let base = model("qwen2_moe");
    let usage = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0];
    let all = condensers(&base, CondenserOptions { speed: 0.5, ..CondenserOptions::default() });
    all.add_usage(0, &usage).unwrap();
    all.step();
    let expected = [0.5, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    assert_eq!(all.layer(0).unwrap().bias, expected);
    assert_eq!(all.layer(0).unwrap().usage, usage);
    // nothing counted, nothing moved
    all.step();
    assert_eq!(all.layer(0).unwrap().bias, expected);
    assert_eq!(all.layer(1).unwrap().bias, [0.0; 8]);
    // two workers of one step: their use together decides
    all.add_usage(0, &[4.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]).unwrap();
    all.add_usage(0, &[0.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]).unwrap();
    all.step();
    assert_eq!(all.layer(0).unwrap().bias[..3], [0.5 + 0.5, -0.5 + 0.5, -0.5]);
    let error = all.add_usage(0, &[1.0]).unwrap_err().to_string();
    assert!(error.contains("layer 0") && error.contains("8 finite"), "{error}");

    let options =
        CondenserOptions { speed: 0.5, center: Center::Median, clip: Some(1.0), ..CondenserOptions::default() };
    let all = condensers(&base, options);
    for _ in 0..4 {
        // the mean is above all but one, the median is not
        all.add_usage(0, &[90.0, 5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0]).unwrap();
        all.step();
    }
    assert_eq!(all.layer(0).unwrap().bias, [1.0, 1.0, 1.0, 1.0, -2.0, -2.0, -2.0, -2.0]);
}

struct Logits(BTreeMap<usize, Vec<f32>>);

impl Observer for Logits {
    fn needs(&self) -> Signals {
        Signals::ROUTING
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        self.0.insert(trace.layer, trace.logits.to_vec());
        Ok(())
    }
}

#[test]
fn use_is_the_softmax_with_the_bias_of_all_experts_counted_once() {
    let base = model("qwen2_moe");
    let wave = &waves(&base, 1)[0];
    let uses = [None, Some(1u64 << 28)].map(|memory| {
        let base = Model::new(base.checkpoint().clone(), base.device(), memory).unwrap();
        let all = condensers(&base, CondenserOptions { speed: 0.25, ..CondenserOptions::default() });
        all.add_usage(1, &[3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]).unwrap();
        all.step();
        let start = all.layer(1).unwrap().usage;
        let mut set = AdapterSet::new();
        OwnWeights::router().install(&Setting::new(&base), &mut set).unwrap();
        all.count_in(&mut set);
        let run = all.applied_to(&base).unwrap().with_adapters(Arc::new(set)).unwrap();
        loss(&run, wave); // is not counted
        sweep(&run, wave);
        let mut logits = Logits(BTreeMap::new());
        Engine::new(&run, EngineOptions::default()).run(wave, &mut logits).unwrap();
        let bias = all.layer(1).unwrap().bias;
        all.step();
        let after = all.layer(1).unwrap();
        let mut expected = [0.0f64; 8];
        for row in logits.0[&1].chunks(8) {
            let biased: Vec<f64> = row.iter().zip(&bias).map(|(z, b)| f64::from(*z) + f64::from(*b)).collect();
            let sum: f64 = biased.iter().map(|z| z.exp()).sum();
            expected.iter_mut().zip(biased).for_each(|(u, z)| *u += z.exp() / sum);
        }
        for e in 0..8 {
            let counted = after.usage[e] - start[e];
            assert!((counted - expected[e]).abs() < 1e-4, "{e}: {counted} {}", expected[e]);
        }
        let tokens: usize = wave.sequences.iter().map(|s| s.ids.len()).sum();
        assert_eq!(after.routed.iter().sum::<u64>(), 3 * tokens as u64);
        after
    });
    // activations kept or computed again
    assert_eq!(uses[0], uses[1]);
}

#[test]
fn without_bias_and_condensers_it_is_the_stock_model() {
    for name in ["qwen2_moe", "qwen3_moe", "deepseek_v2", "mixtral"] {
        let base = model(name);
        let wave = &waves(&base, 1)[0];
        let run = condensers(&base, CondenserOptions::default()).applied_to(&base).unwrap();
        assert_eq!(loss(&base, wave).to_bits(), loss(&run, wave).to_bits(), "{name}");
    }
}

#[test]
fn condensers_are_selected_once_from_a_bias_that_was_learnt() {
    let base = model("qwen2_moe");
    let all = condensers(&base, CondenserOptions::default());
    let error = all.select(&CondenserCounts::Each(1), Starved::Lowest).unwrap_err().to_string();
    assert!(error.contains("bias of layer 0: found all zero"), "{error}");
    let all = learnt(&base, CondenserMode::Additive, &[2, 5]);
    let error = all.select(&CondenserCounts::Each(1), Starved::Lowest).unwrap_err().to_string();
    assert!(error.contains("selected before"), "{error}");
    all.add_usage(0, &[9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]).unwrap();
    all.step();
    assert_eq!(all.layer(0).unwrap().condensers.unwrap(), [2, 5]);
    // in the budget mode one expert at least is chosen: k is 3
    let budget = condensers(&base, CondenserOptions { mode: CondenserMode::Budget, ..CondenserOptions::default() });
    for layer in budget.layers() {
        budget.add_usage(layer, &[3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]).unwrap();
    }
    budget.step();
    let error = budget.select(&CondenserCounts::Each(3), Starved::Lowest).unwrap_err().to_string();
    assert!(error.contains("found 3, expected at most 2"), "{error}");
    budget.select(&CondenserCounts::Each(0), Starved::Lowest).unwrap();
    for (name, reason) in [("deepseek_v3", "sigmoid"), ("phimoe", "each choice")] {
        let error = Condensers::new(model(name).config(), CondenserOptions::default()).unwrap_err().to_string();
        assert!(error.contains(reason), "{name}: {error}");
    }
}

fn softmax(z: &[f64]) -> Vec<f64> {
    let sum: f64 = z.iter().map(|z| z.exp()).sum();
    z.iter().map(|z| z.exp() / sum).collect()
}

#[test]
fn lists_of_experts_by_hand() {
    let logits = [2.0f32, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5];
    for name in ["qwen2_moe", "qwen3_moe"] {
        let base = model(name);
        let normalize = matches!(base.config().routing.kind, RoutingKind::SoftmaxTopK { renormalize: true });
        assert_eq!(normalize, name == "qwen3_moe");
        for (mode, low) in
            [(CondenserMode::Additive, [1, 6]), (CondenserMode::Budget, [1, 6]), (CondenserMode::Additive, [6, 7])]
        {
            let all = learnt(&base, mode, &low);
            let bias = all.layer(0).unwrap().bias;
            let biased: Vec<f64> = logits.iter().zip(&bias).map(|(z, b)| f64::from(*z) + f64::from(*b)).collect();
            let p = softmax(&biased);
            // 0.05 * (e % 3), -0.3 for condensers: 2.0, 1.55 or 1.2, 1.1, 0.5, .. keep their order
            let list: Vec<(u32, f64)> = match (mode, low) {
                (CondenserMode::Additive, [1, _]) => vec![(0, 1.0), (1, 2.0), (2, 1.0), (6, 1.0), (3, 0.0)],
                (CondenserMode::Additive, _) => vec![(0, 1.0), (1, 1.0), (2, 1.0), (6, 1.0), (7, 1.0)],
                (CondenserMode::Budget, _) => vec![(0, 1.0), (1, 1.0), (6, 1.0)],
            };
            let sum: f64 = if normalize { list.iter().map(|(e, m)| m * p[*e as usize]).sum() } else { 1.0 };
            let engine = Engine::new(&base, EngineOptions::default());
            let found = engine.route(0, &logits, Some(&*all.overlay())).unwrap();
            assert_eq!(found.selected, list.iter().map(|(e, _)| *e).collect::<Vec<_>>(), "{name} {mode:?}");
            for ((e, m), w) in list.iter().zip(&found.weights) {
                let expected = m * p[*e as usize] / sum;
                assert!((f64::from(*w) - expected).abs() < 1e-6, "{name} {mode:?} expert {e}: {w} {expected}");
            }
            if normalize {
                assert!((found.weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
            }
        }
    }
}

/// The experts that a token other than the last goes to: nothing is predicted from the last one, and no other token
/// sees it.
#[derive(Default)]
struct Taught(BTreeMap<usize, BTreeSet<usize>>);

impl Observer for Taught {
    fn needs(&self) -> Signals {
        Signals { parameters: true, ..Signals::ROUTING }
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        let slots = trace.selected.len() - trace.top_k;
        let chosen = trace.selected[..slots].iter().zip(trace.weights).filter(|(_, w)| **w != 0.0);
        self.0.insert(trace.layer, chosen.map(|(e, _)| *e as usize).collect());
        Ok(())
    }
}

#[test]
fn every_condenser_learns_from_every_token_and_other_experts_from_theirs() {
    let base = model("qwen2_moe");
    let mut wave = waves(&base, 1).remove(0);
    wave.sequences.truncate(1);
    wave.sequences[0].ids.truncate(3);
    let (tokens, layers) = (3, base.config().layers.len());
    for (mode, runs) in [(CondenserMode::Additive, None), (CondenserMode::Budget, Some(3 * tokens * layers))] {
        let all = learnt(&base, mode, &[2, 5]);
        let mut set = AdapterSet::new();
        OwnWeights { experts: true, ..OwnWeights::default() }.install(&Setting::new(&base), &mut set).unwrap();
        all.count_in(&mut set);
        let set = Arc::new(set);
        let run = all.applied_to(&base).unwrap().with_adapters(set.clone()).unwrap();
        let mut taught = Taught::default();
        Engine::new(&run, EngineOptions::default()).run(&wave, &mut taught).unwrap();
        let rows = run.expert_rows();
        all.step();
        let mut routed = 0;
        for layer in 0..layers {
            let learnt = all.layer(layer).unwrap();
            assert!([2, 5].iter().all(|e| learnt.routed[*e as usize] == tokens as u64));
            assert!(taught.0[&layer].len() < 8 && [2, 5].iter().all(|e| taught.0[&layer].contains(e)));
            routed += learnt.routed.iter().sum::<u64>();
            for expert in 0..8 {
                let site = Site::Expert { layer, expert, map: ExpertSite::Down };
                let gradient = set.bank().get(&site.path()).unwrap().gradient();
                let learns = gradient.iter().any(|g| *g != 0.0);
                assert_eq!(learns, taught.0[&layer].contains(&expert), "{mode:?} {site}");
            }
        }
        // what counts double runs once
        assert_eq!(rows, routed);
        if let Some(runs) = runs {
            assert_eq!(rows, runs as u64);
        }
    }
}

#[test]
fn gradients_through_the_rule_match_difference_quotients() {
    for name in ["qwen2_moe", "qwen3_moe", "deepseek_v2"] {
        let base = model(name);
        let wave = &waves(&base, 1)[0];
        for mode in [CondenserMode::Additive, CondenserMode::Budget] {
            let all = learnt(&base, mode, &[2, 5]);
            let last = base.config().layers.len() - 1;
            let mut set = AdapterSet::new();
            OwnWeights { router: true, norms: true, layers: Some([last - 1, last].into()), ..OwnWeights::default() }
                .install(&Setting::new(&base), &mut set)
                .unwrap();
            let set = Arc::new(set);
            let run = all.applied_to(&base).unwrap().with_adapters(set.clone()).unwrap();
            sweep(&run, wave);
            let gradients: Vec<_> = set.bank().iter().map(|live| (live.name().to_string(), live.gradient())).collect();
            for (parameter, gradient) in &gradients {
                check_gradient(set.bank(), parameter, gradient, || loss(&run, wave));
            }
        }
    }
}

fn state(all: &Condensers) -> Vec<Option<CondenserLayer>> {
    all.layers().map(|layer| all.layer(layer)).collect()
}

#[test]
fn what_was_learnt_is_saved_beside_a_checkpoint_and_in_the_state_of_training() {
    let base = model("qwen3_moe");
    let wave = &waves(&base, 1)[0];
    let dir = tempfile::tempdir().unwrap();
    assert!(Condensers::beside(dir.path(), base.config()).unwrap().is_none());
    let mut all = learnt(&base, CondenserMode::Budget, &[2, 5]);
    all.add_usage(1, &[1.0 / 3.0, 9.0, 1e-20, 1e20, 1.0, 1.0, 1.0, 1.0]).unwrap();
    all.step();
    all.save(dir.path().join(Condensers::FILE)).unwrap();
    let back = Condensers::beside(dir.path(), base.config()).unwrap().unwrap();
    assert_eq!((state(&back), back.options()), (state(&all), all.options()));
    let run = |all: &Condensers| loss(&all.applied_to(&base).unwrap(), wave).to_bits();
    assert_eq!(run(&all), run(&back));
    assert_ne!(run(&all), loss(&base, wave).to_bits());
    let error = Condensers::beside(dir.path(), model("mixtral").config()).unwrap_err().to_string();
    assert!(error.contains(Condensers::FILE) && error.contains("layers.0.bias"), "{error}");
    std::fs::write(dir.path().join("other"), b"{}").unwrap();
    assert!(Condensers::load(dir.path().join("other"), base.config()).is_err());

    let mut fresh = condensers(&base, all.options());
    let saved = TrainingHooks::state_save(&all).unwrap();
    let mut parameters = moe_core::train::Parameters::new();
    fresh.state_load(saved, &AdapterSet::new(), &mut parameters).unwrap();
    assert_eq!(state(&fresh), state(&all));
    all.after_step(1, &AdapterSet::new(), &mut parameters).unwrap();
    assert_eq!(state(&fresh), state(&all)); // nothing was counted
}

#[test]
fn generation_runs_condensers() {
    let base = model("qwen2_moe");
    let run = learnt(&base, CondenserMode::Additive, &[6, 7]).applied_to(&base).unwrap();
    let prompts = vec![vec![1, 2, 3, 4]];
    let options = GenerateOptions { max_new_tokens: 3, ..GenerateOptions::default() };
    generate(&run, &prompts, &options, |_| false).unwrap();
    let stock = base.with_overlays(None, None).unwrap();
    generate(&stock, &prompts, &options, |_| false).unwrap();
    // four to five experts per token instead of three: condensers that were chosen anyway run once
    assert!(run.expert_rows() > stock.expert_rows() * 4 / 3, "{} {}", run.expert_rows(), stock.expert_rows());
}

fn counts(model: &Model, waves: &[Wave]) -> Vec<f64> {
    let calibration = moe_importance::Calibration::of_waves(model, waves);
    let used = moe_peft::esft::Esft::default().scores(calibration).unwrap();
    let layers = 0..model.config().layers.len();
    layers.map(|layer| gini(&used.layer(layer).unwrap().flat())).collect()
}

#[test]
fn the_first_phase_makes_routing_more_uneven_and_the_bias_stays_within_its_steps() {
    let base = model("qwen2_moe");
    let data = waves(&base, 3);
    let all = condensers(&base, CondenserOptions { speed: 0.05, ..CondenserOptions::default() });
    let mut set = AdapterSet::new();
    OwnWeights { shared: true, ..OwnWeights::default() }.install(&Setting::new(&base), &mut set).unwrap();
    all.count_in(&mut set);
    let run = all.applied_to(&base).unwrap();
    let task = FineTune::new(&run, set.into()).unwrap().with_hooks(all.clone());
    let before = counts(&base, &data);
    let steps = 24;
    let (task, mut parameters) = train(task, &base, steps);
    let after = task.with_values(&mut parameters, |model| Ok(counts(model, &data))).unwrap();
    for (layer, (before, after)) in before.iter().zip(&after).enumerate() {
        assert!(after > before, "layer {layer}: {before} {after}");
        let bias = all.layer(layer).unwrap().bias;
        assert!(bias.iter().all(|b| b.abs() <= 0.05 * steps as f32 + 1e-5) && bias.iter().any(|b| *b != 0.0));
    }
}

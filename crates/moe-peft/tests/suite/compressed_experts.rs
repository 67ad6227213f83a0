//! Compressed experts.

use crate::tuning;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use moe_checkpoint::{LayerRole, Role};
use moe_core::{
    Engine, EngineOptions, Model, RoutingOverlay,
    adapters::Adapters,
    generate::{GenerateOptions, generate},
    host,
    router::Routed,
    trace::{LayerTrace, Nobody, Observer, Signals},
};
use moe_peft::{
    AdapterSet, FineTune, Setting, TuningMethod,
    compressed_experts::{CompressedExperts, CompressedLayers},
    model_weights::OwnWeights,
};
use tuning::{check_gradient, loss, model, noise, put, sweep, train, waves};

/// Lets only the first experts of each token run.
struct First(usize);

impl RoutingOverlay for First {
    fn routed(&self, _: usize, routed: &mut Routed) {
        for weights in routed.weights.chunks_exact_mut(routed.top_k) {
            weights[self.0..].fill(0.0);
        }
    }
}

fn attached(base: &Model, auxiliary: usize) -> (Arc<AdapterSet>, CompressedLayers) {
    let mut set = AdapterSet::new();
    let installed = CompressedExperts { auxiliary }.install(&Setting::new(base), &mut set).unwrap();
    let layers = installed.artifacts.compressed.unwrap();
    (Arc::new(set), layers)
}

/// Factors that differ from 1 and from each other.
fn scatter(set: &AdapterSet, size: f32) {
    let lives: Vec<_> = set.bank().iter().filter(|live| live.name().contains("compressed")).cloned().collect();
    for (i, live) in lives.iter().enumerate() {
        let values = noise(live.shape().iter().product(), i).iter().map(|n| 1.0 + size * n).collect();
        put(set.bank(), live.name(), values);
    }
}

#[test]
fn at_first_it_is_the_model_with_the_best_experts_of_each_token() {
    for (name, auxiliary) in [("qwen2_moe", 1), ("qwen3_moe", 2), ("deepseek_v3", 1), ("mixtral", 1), ("gpt_oss", 1)] {
        let base = model(name);
        let wave = &waves(&base, 1)[0];
        let main = base.config().routing.top_k - auxiliary;
        let best = base.with_overlays(None, Some(Arc::new(First(main)))).unwrap();
        let (set, _) = attached(&base, auxiliary);
        let run = base.with_adapters(set.clone()).unwrap();
        assert!((loss(&best, wave) - loss(&run, wave)).abs() < 1e-3, "{name}");
        let tokens: usize = wave.sequences.iter().map(|s| s.ids.len()).sum();
        let layers = (0..base.config().layers.len()).filter(|l| base.config().moe(*l).is_some()).count();
        assert_eq!(run.expert_rows(), (tokens * main * layers) as u64, "{name}");
        scatter(&set, 0.3);
        assert!((loss(&best, wave) - loss(&run, wave)).abs() > 1e-3, "{name}");
    }
}

#[test]
fn no_auxiliary_experts_is_the_stock_model_and_no_main_one_is_refused() {
    let base = model("qwen2_moe");
    let wave = &waves(&base, 1)[0];
    let (set, layers) = attached(&base, 0);
    assert_eq!(loss(&base, wave).to_bits(), loss(&base.with_adapters(set).unwrap(), wave).to_bits());
    assert_eq!(layers.values(), 0);
    let error = CompressedExperts { auxiliary: 3 }
        .install(&Setting::new(&base), &mut AdapterSet::new())
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("auxiliary: found 3, expected below the 3"), "{error}");
}

/// `[out, in]` times a vector.
fn times(matrix: &[f32], x: &[f64]) -> Vec<f64> {
    matrix.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()).collect()
}

#[test]
fn a_layer_by_hand() {
    let base = model("qwen3_moe");
    let (layer, h, width) = (1, 32, 24);
    let (set, _) = attached(&base, 2);
    scatter(&set, 0.5);
    let compressed = set.bank().get("layers.1.compressed_experts").unwrap().to_vec();
    let x = noise(4 * h, 5);
    let engine_model = base.with_adapters(set).unwrap();
    let engine = Engine::new(&engine_model, EngineOptions::default());
    let found = engine.feed_forward(layer, &host::from_vec(x.clone(), [4, h], base.device()), &mut Nobody).unwrap();
    let found = host::into_vec(found);
    let read = |role| base.checkpoint().read_f32(Role::Layer(layer, role)).unwrap();
    let (norm, router) = (read(LayerRole::FfnNorm), read(LayerRole::Router));
    for t in 0..4 {
        let x: Vec<f64> = x[t * h..(t + 1) * h].iter().map(|x| f64::from(*x)).collect();
        let rms = (x.iter().map(|x| x * x).sum::<f64>() / h as f64 + base.config().norm_eps).sqrt();
        let z: Vec<f64> = x.iter().zip(&norm).map(|(x, w)| x / rms * f64::from(*w)).collect();
        let logits = times(&router, &z);
        let mut order: Vec<usize> = (0..8).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        // weights over the best three, of which one runs and two are mixed
        let exp: Vec<f64> = order[..3].iter().map(|e| logits[*e].exp()).collect();
        let p: Vec<f64> = exp.iter().map(|x| x / exp.iter().sum::<f64>()).collect();
        let q = [p[1] / (p[1] + p[2]), p[2] / (p[1] + p[2])];
        let row = 2 * h + width;
        let c: Vec<f64> =
            (0..row).map(|j| (0..2).map(|i| q[i] * f64::from(compressed[order[1 + i] * row + j])).sum()).collect();
        let (c1, c2, c3) = (&c[..h], &c[h..h + width], &c[h + width..]);
        let scaled = |c: &[f64]| z.iter().zip(c).map(|(z, c)| z * c).collect::<Vec<_>>();
        let expert = base.checkpoint().expert(layer, order[0]).unwrap();
        let (gate, up) = (times(&expert.gate, &scaled(c1)), times(&expert.up, &scaled(c3)));
        let units: Vec<f64> = (0..width).map(|j| gate[j] / (1.0 + (-gate[j]).exp()) * up[j] * c2[j]).collect();
        let y = times(&expert.down, &units);
        for j in 0..h {
            let expected = x[j] + p[0] * y[j];
            let found = f64::from(found[t * h + j]);
            assert!((found - expected).abs() < 1e-4, "token {t}: {found} {expected}");
        }
    }
}

#[test]
fn auxiliary_experts_of_equal_weight_may_change_places() {
    let base = model("qwen2_moe");
    let (set, _) = attached(&base, 2);
    scatter(&set, 0.5);
    let layer = set.modulation(0).unwrap();
    assert_eq!(layer.main_experts(), 1);
    let factors = |selected: [u32; 3], weights: [f32; 3]| {
        let routed = Routed { experts: 8, top_k: 3, selected: selected.into(), weights: weights.into() };
        let found = layer.factors(&routed);
        [found.gate, found.units, found.up].map(host::into_vec).concat()
    };
    let of = |e: usize| set.bank().get("layers.0.compressed_experts").unwrap().to_vec()[e * 88..(e + 1) * 88].to_vec();
    assert_eq!(factors([4, 1, 6], [0.5, 0.2, 0.2]), factors([4, 6, 1], [0.5, 0.2, 0.2]));
    assert_ne!(factors([4, 1, 6], [0.5, 0.2, 0.2]), factors([1, 4, 6], [0.5, 0.2, 0.2]));
    // shares of the weights, and equal ones of nothing
    for (weights, q) in [([0.5, 0.3, 0.1], [0.75, 0.25]), ([1.0, 0.0, 0.0], [0.5, 0.5])] {
        let found = factors([4, 1, 6], weights);
        for (j, found) in found.iter().enumerate() {
            let expected = q[0] * of(1)[j] + q[1] * of(6)[j];
            assert!((found - expected).abs() < 1e-6, "{weights:?}: {found} {expected}");
        }
    }
}

#[derive(Default)]
struct Auxiliary(BTreeMap<usize, [Vec<bool>; 2]>, usize);

impl Observer for Auxiliary {
    fn needs(&self) -> Signals {
        Signals { parameters: true, ..Signals::ROUTING }
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        let mut taught = vec![false; trace.experts];
        let mut tokens = trace.selected.chunks_exact(trace.top_k).map(|experts| &experts[self.1..]);
        let last = tokens.next_back().unwrap();
        tokens.flatten().for_each(|e| taught[*e as usize] = true);
        let mut all = taught.clone();
        last.iter().for_each(|e| all[*e as usize] = true);
        self.0.insert(trace.layer, [taught, all]);
        Ok(())
    }
}

#[test]
fn only_experts_that_were_auxiliary_for_some_token_have_gradients() {
    let base = model("qwen2_moe");
    let mut wave = waves(&base, 1).remove(0);
    wave.sequences.truncate(1);
    wave.sequences[0].ids.truncate(4);
    let (set, layers) = attached(&base, 1);
    let run = base.with_adapters(set.clone()).unwrap();
    let mut seen = Auxiliary(BTreeMap::new(), 2);
    Engine::new(&run, EngineOptions::default()).run(&wave, &mut seen).unwrap();
    for (layer, [taught, all]) in seen.0 {
        let gradient = set.bank().get(&format!("layers.{layer}.compressed_experts")).unwrap().gradient();
        let found: Vec<bool> = gradient.chunks(88).map(|row| row.iter().any(|g| *g != 0.0)).collect();
        // nothing is predicted from the last token, and no other token sees it
        assert_eq!(found, taught, "layer {layer}");
        assert_eq!(layers.reached(layer).unwrap(), all);
        assert!(all.iter().any(|seen| !seen));
    }
}

#[test]
fn gradients_match_difference_quotients() {
    // weights of experts read from the file, and trained beside; biases of gate and up, clamped units
    for (name, experts, auxiliary) in
        [("qwen2_moe", false, 2), ("qwen3_moe", true, 1), ("deepseek_v3", false, 2), ("gpt_oss", true, 1)]
    {
        let base = model(name);
        let wave = &waves(&base, 1)[0];
        let last = base.config().layers.len() - 1;
        let mut set = AdapterSet::new();
        OwnWeights { router: true, norms: true, experts, layers: Some([last].into()), ..OwnWeights::default() }
            .install(&Setting::new(&base), &mut set)
            .unwrap();
        CompressedExperts { auxiliary }.install(&Setting::new(&base), &mut set).unwrap();
        let set = Arc::new(set);
        scatter(&set, 0.3);
        let run = base.with_adapters(set.clone()).unwrap();
        sweep(&run, wave);
        let gradients: Vec<_> = set.bank().iter().map(|live| (live.name().to_string(), live.gradient())).collect();
        let long = |gradient: &[f32]| gradient.iter().map(|g| g * g).sum::<f32>() > 1e-6;
        let checked = gradients.iter().filter(|(_, gradient)| long(gradient));
        let names: Mutex<Vec<&str>> = Mutex::default();
        checked.for_each(|(parameter, gradient)| {
            check_gradient(set.bank(), parameter, gradient, || loss(&run, wave));
            names.lock().unwrap().push(parameter);
        });
        let names = names.into_inner().unwrap();
        for part in ["compressed", "router", "norm"].iter().chain(experts.then_some(&"expert")) {
            assert!(names.iter().any(|name| name.contains(part)), "{name}: no gradient of {part} in {names:?}");
        }
    }
}

#[test]
fn the_router_learns_through_the_mixture_alone() {
    // with one main expert and weights that are not normalized, the shares of the others still move
    let base = model("qwen2_moe");
    let (set, _) = attached(&base, 2);
    scatter(&set, 0.4);
    let layer = set.modulation(0).unwrap();
    let routed = |weights: [f32; 3]| Routed { experts: 8, top_k: 3, selected: vec![2, 5, 7], weights: weights.into() };
    let along = noise(88, 9);
    let value = |weights: [f32; 3]| {
        let found = layer.factors(&routed(weights));
        let found = [found.gate, found.units, found.up].map(host::into_vec).concat();
        found.iter().zip(&along).map(|(x, d)| f64::from(*x) * f64::from(*d)).sum::<f64>()
    };
    let part = |from: usize, n: usize| host::from_vec(along[from..from + n].to_vec(), [1, n], base.device());
    let d = moe_core::adapters::Modulation { gate: part(0, 32), units: part(32, 24), up: part(56, 32) };
    let mut found = [0.25, 0.0, 0.0];
    let start = [0.5f32, 0.3, 0.15];
    layer.backward(&routed(start), &d, false, &mut found);
    assert_eq!(found[0], 0.25);
    for i in 1..3 {
        let at = |h: f32| {
            let mut weights = start;
            weights[i] += h;
            value(weights)
        };
        let numeric = (at(1e-3) - at(-1e-3)) / 2e-3;
        assert!((numeric - f64::from(found[i])).abs() < 1e-2 * (1.0 + numeric.abs()), "{i}: {numeric} {}", found[i]);
    }
    // no weight at all: no gradient
    let mut found = [0.0; 3];
    layer.backward(&routed([1.0, 0.0, 0.0]), &d, false, &mut found);
    assert_eq!(found, [0.0; 3]);
}

#[test]
fn files_in_both_layouts_give_the_model_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(CompressedLayers::FILE);
    // narrower and wider than the hidden size
    for (name, shape) in [("qwen2_moe", Some([8, 3, 32])), ("mixtral", None)] {
        let base = model(name);
        let wave = &waves(&base, 1)[0];
        let (set, layers) = attached(&base, 1);
        scatter(&set, 0.3);
        let expected = loss(&base.with_adapters(set.clone()).unwrap(), wave).to_bits();
        layers.save(&path).unwrap();
        let again = || {
            let mut set = AdapterSet::new();
            CompressedLayers::load(&path, &base, &mut set).unwrap();
            loss(&base.with_adapters(Arc::new(set)).unwrap(), wave).to_bits()
        };
        assert_eq!(again(), expected, "{name}");
        let mut bytes = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        if let Some(shape) = shape {
            let view = file.tensor("layers.0.compressed_experts").unwrap();
            assert_eq!(view.shape(), shape);
            // entries of units that the experts do not have do not count
            let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize + 4 * (32 + 24);
            bytes[start..start + 4 * 8].fill(0x47);
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(again(), expected);
        } else {
            assert_eq!(file.tensor("layers.0.compressed_experts.units").unwrap().shape(), [4, 48]);
        }
        let other = model("olmoe");
        assert!(CompressedLayers::load(&path, &other, &mut AdapterSet::new()).is_err() || name == "qwen2_moe");
    }
    let error = CompressedLayers::load(dir.path().join("none"), &model("olmoe"), &mut AdapterSet::new()).unwrap_err();
    assert!(error.to_string().contains("none"));
}

#[test]
fn generation_runs_the_main_experts_only() {
    let base = model("qwen2_moe");
    let (set, _) = attached(&base, 1);
    let run = base.with_adapters(set).unwrap();
    let options = GenerateOptions { max_new_tokens: 3, ..GenerateOptions::default() };
    generate(&run, &[vec![1, 2, 3, 4]], &options, |_| false).unwrap();
    let stock = base.with_overlays(None, None).unwrap();
    generate(&stock, &[vec![1, 2, 3, 4]], &options, |_| false).unwrap();
    assert!(run.expert_rows() > 0 && run.expert_rows() <= stock.expert_rows());
    assert_eq!(run.expert_rows() % 2, 0);
}

#[test]
fn training_factors_beats_the_best_experts_alone() {
    let base = model("qwen2_moe");
    let data = waves(&base, 3);
    let best = base.with_overlays(None, Some(Arc::new(First(1)))).unwrap();
    let plain: f64 = data.iter().map(|wave| loss(&best, wave)).sum();
    let (set, _) = attached(&base, 2);
    let (task, mut parameters) = train(FineTune::new(&base, set).unwrap(), &base, 30);
    let trained: f64 =
        task.with_values(&mut parameters, |model| Ok(data.iter().map(|wave| loss(model, wave)).sum())).unwrap();
    assert!(trained < plain - 0.5, "{plain} {trained}");
}

//! Losses on routers, and router gradients from all experts.

use crate::tuning;

use std::sync::{Arc, RwLock};

use moe_core::{
    Model, RouterTokens, RoutingOverlay, RoutingRule, RuleGradients,
    adapters::{ExpertSite, LayerSite, Site},
    router::Routed,
    train::TrainEvent,
};
use moe_peft::{
    AdapterSet, FineTune, Setting, TuningMethod,
    dense_mixer::DenseMixer,
    model_weights::OwnWeights,
    router_loss::{BalanceForm, BalanceLoss, BalanceScope, RouterLosses},
};
use tuning::{check_gradient, loss, model, options, sweep, waves};

fn last_router(base: &Model) -> (OwnWeights, Site) {
    let last = base.config().layers.len() - 1;
    let weights = OwnWeights { layers: Some([last].into()), ..OwnWeights::router() };
    (weights, Site::Layer(last, LayerSite::Router))
}

#[test]
fn losses_on_routers_reach_them_and_what_is_below_and_change_no_output() {
    for (name, form) in [
        ("qwen2_moe", BalanceForm::Switch),
        ("deepseek_v3", BalanceForm::Normalized),
        ("qwen3_moe", BalanceForm::Switch),
    ] {
        let base = model(name);
        let wave = &waves(&base, 1)[0];
        let balance = Some(BalanceLoss { coefficient: 0.5, form, over: BalanceScope::Layer });
        let losses = RouterLosses { balance, z: Some(0.05), ..RouterLosses::default() };
        let mut set = AdapterSet::new();
        let last = base.config().layers.len() - 1;
        OwnWeights { router: true, norms: true, layers: Some([last].into()), ..OwnWeights::default() }
            .install(&Setting::new(&base), &mut set)
            .unwrap();
        let report = losses.install(&Setting::new(&base), &mut set).unwrap().artifacts.router_losses.unwrap();
        let set = Arc::new(set);
        let adapted = base.with_adapters(set.clone()).unwrap();
        assert!((loss(&base, wave) - loss(&adapted, wave)).abs() < 1e-4);
        assert!(report.take().is_empty(), "{name}: reported where nothing is trained");
        let trained = sweep(&adapted, wave);
        let found = report.take();
        let experts = base.config().routing.top_k as f64;
        for (layer, losses) in &found {
            let scale = if form == BalanceForm::Switch { experts } else { 1.0 };
            assert!(losses.waves == 1 && losses.z > 0.0, "{name} layer {layer}: {losses:?}");
            assert!(losses.balance > 0.4 * scale && losses.balance < 4.0 * scale, "{name} layer {layer}: {losses:?}");
        }
        let names: Vec<String> = set.bank().iter().map(|live| live.name().to_string()).collect();
        let gradients: Vec<Vec<f32>> = set.bank().iter().map(|live| live.gradient()).collect();
        let total = || {
            let run = sweep(&adapted, wave);
            let losses = report.take()[&last];
            run.loss.unwrap() + run.loss_tokens as f64 * (losses.balance + losses.z)
        };
        assert!((total() - trained.loss.unwrap()).abs() > 1.0);
        for (name, gradient) in names.iter().zip(&gradients).filter(|(name, _)| !name.contains("attention")) {
            check_gradient(set.bank(), name, gradient, total);
        }
    }
}

/// A mixture of all experts with the value of the sparse one at the first logits it sees, and the derivative of the
/// dense one there.
#[derive(Debug)]
struct StraightThrough {
    base: Model,
    layer: usize,
    first: RwLock<Option<(Routed, Vec<f64>)>>,
}

impl StraightThrough {
    /// `u` of every token and expert; `chosen` of the first logits.
    fn dense(&self, logits: &[f32], chosen: &Routed, divisors: Option<&[f64]>) -> (Vec<f64>, Vec<f64>) {
        let routing = &self.base.config().routing;
        let sigmoid = matches!(routing.kind, moe_checkpoint::RoutingKind::Sigmoid { .. });
        let normalize = matches!(
            routing.kind,
            moe_checkpoint::RoutingKind::TopKSoftmax
                | moe_checkpoint::RoutingKind::SoftmaxTopK { renormalize: true }
                | moe_checkpoint::RoutingKind::Sigmoid { renormalize: true, .. }
        );
        let (mut all, mut found) = (Vec::new(), Vec::new());
        for (t, row) in logits.chunks_exact(chosen.experts).enumerate() {
            let z: Vec<f64> = row.iter().map(|z| f64::from(*z)).collect();
            let sum: f64 = z.iter().map(|z| z.exp()).sum();
            let p: Vec<f64> =
                z.iter().map(|z| if sigmoid { 1.0 / (1.0 + (-z).exp()) } else { z.exp() / sum }).collect();
            let selected = &chosen.selected[t * chosen.top_k..][..chosen.top_k];
            let divisor = if normalize { selected.iter().map(|&e| p[e as usize]).sum() } else { 1.0 };
            found.push(divisor);
            for (e, p) in p.iter().enumerate() {
                let by = if selected.contains(&(e as u32)) { divisor } else { divisors.map_or(divisor, |d| d[t]) };
                all.push(f64::from(routing.scale) * p / by);
            }
        }
        (all, found)
    }
}

#[derive(Debug, Clone)]
struct Shared(Arc<StraightThrough>);

impl RoutingRule for Shared {
    fn route(&self, tokens: &RouterTokens<'_>) -> moe_core::Result<Routed> {
        let RouterTokens { logits, experts, bias, .. } = *tokens;
        let this = &self.0;
        let mut first = this.first.write().unwrap();
        let (chosen, start) = first.get_or_insert_with(|| {
            let chosen = this.base.router().route(logits, experts, bias);
            let (u, divisors) = this.dense(logits, &chosen, None);
            (chosen, [u, divisors].concat())
        });
        let (start, divisors) = start.split_at(logits.len());
        let (now, _) = this.dense(logits, chosen, Some(divisors));
        let mut weights = Vec::new();
        for t in 0..logits.len() / experts {
            for e in 0..experts {
                let slot = chosen.selected[t * chosen.top_k..][..chosen.top_k].iter().position(|&s| s as usize == e);
                let sparse = slot.map_or(0.0, |slot| f64::from(chosen.weights[t * chosen.top_k + slot]));
                weights.push((sparse + now[t * experts + e] - start[t * experts + e]) as f32);
            }
        }
        let selected = (0..logits.len()).map(|i| (i % experts) as u32).collect();
        Ok(Routed { experts, top_k: experts, selected, weights })
    }

    fn backward(&self, _: &RouterTokens<'_>, _: &Routed, _: &[f32], _: bool) -> moe_core::Result<RuleGradients> {
        unreachable!("only run forward")
    }
}

impl RoutingOverlay for Shared {
    fn rule(&self, layer: usize) -> Option<Arc<dyn RoutingRule>> {
        (layer == self.0.layer).then(|| Arc::new(self.clone()) as _)
    }
}

#[test]
fn the_dense_router_gradient_is_that_of_the_straight_through_output() {
    // plain softmax, normalized softmax, sigmoid with scale and groups
    for name in ["qwen2_moe", "qwen3_moe", "deepseek_v3"] {
        let base = model(name);
        let wave = &waves(&base, 1)[0];
        let (weights, site) = last_router(&base);
        let mut set = AdapterSet::new();
        weights.install(&Setting::new(&base), &mut set).unwrap();
        DenseMixer::default().install(&Setting::new(&base), &mut set).unwrap();
        let set = Arc::new(set);
        sweep(&base.with_adapters(set.clone()).unwrap(), wave);
        let gradient = set.bank().get(&site.path()).unwrap().gradient();
        let through = StraightThrough { base: model(name), layer: site.layer(), first: RwLock::default() };
        let surrogate = base.with_overlays(None, Some(Arc::new(Shared(Arc::new(through))))).unwrap();
        let surrogate = surrogate.with_adapters(set.clone()).unwrap();
        assert!((loss(&surrogate, wave) - loss(&base, wave)).abs() < 1e-3, "{name}: another output");
        check_gradient(set.bank(), &site.path(), &gradient, || loss(&surrogate, wave));
    }
}

#[test]
fn dense_router_gradients_leave_output_and_expert_gradients_and_reach_all_experts() {
    let base = model("qwen2_moe");
    let mut wave = waves(&base, 1).remove(0);
    wave.sequences.truncate(1);
    wave.sequences[0].ids.truncate(3);
    let last = base.config().layers.len() - 1;
    let run = |dense: bool| {
        let mut set = AdapterSet::new();
        OwnWeights { router: true, experts: true, layers: Some([last].into()), ..OwnWeights::default() }
            .install(&Setting::new(&base), &mut set)
            .unwrap();
        if dense {
            DenseMixer::default().install(&Setting::new(&base), &mut set).unwrap();
        }
        let set = Arc::new(set);
        let report = sweep(&base.with_adapters(set.clone()).unwrap(), &wave);
        (report.loss.unwrap().to_bits(), set)
    };
    let ((sparse_loss, sparse), (dense_loss, dense)) = (run(false), run(true));
    assert_eq!(sparse_loss, dense_loss);
    let router = Site::Layer(last, LayerSite::Router).path();
    let experts = base.config().moe(last).unwrap().num_experts();
    let mut never = 0;
    for expert in 0..experts {
        let site = Site::Expert { layer: last, expert, map: ExpertSite::Down }.path();
        let of = |set: &AdapterSet, name: &str| set.bank().get(name).unwrap().gradient();
        assert_eq!(of(&sparse, &site), of(&dense, &site), "{site}");
        if of(&dense, &site).iter().all(|g| *g == 0.0) {
            never += 1;
            let hidden = base.config().hidden_size;
            let row = &of(&dense, &router)[expert * hidden..][..hidden];
            assert!(row.iter().any(|g| *g != 0.0), "expert {expert} was never chosen, and its router learns nothing");
        }
    }
    assert!(never > 0, "every expert is chosen");
    assert_ne!(sparse.bank().get(&router).unwrap().gradient(), dense.bank().get(&router).unwrap().gradient());
}

#[test]
fn routers_that_cannot_or_do_not_learn_are_refused() {
    let base = model("phimoe");
    let mut set = AdapterSet::new();
    OwnWeights::router().install(&Setting::new(&base), &mut set).unwrap();
    let error = DenseMixer::default().install(&Setting::new(&base), &mut set).unwrap_err().to_string();
    assert!(error.contains("SparseMixer"), "{error}");
    let error = DenseMixer::default()
        .install(&Setting::new(&model("qwen2_moe")), &mut AdapterSet::new())
        .unwrap_err()
        .to_string();
    assert!(error.contains("trained routers: found 0"), "{error}");
}

#[test]
fn a_balance_loss_over_the_model_has_its_gradient_through_all_layers_and_is_among_the_metrics() {
    let base = model("qwen2_moe");
    let wave = &waves(&base, 1)[0];
    let balance = Some(BalanceLoss { coefficient: 0.5, form: BalanceForm::Switch, over: BalanceScope::Model });
    let losses = RouterLosses { balance, z: Some(0.01), ..RouterLosses::default() };
    let mut set = AdapterSet::new();
    OwnWeights::router().install(&Setting::new(&base), &mut set).unwrap();
    let report = losses.install(&Setting::new(&base), &mut set).unwrap().artifacts.router_losses.unwrap();
    let set = Arc::new(set);
    let adapted = base.with_adapters(set.clone()).unwrap();
    sweep(&adapted, wave);
    let gradients: Vec<_> = set.bank().iter().map(|live| (live.name().to_string(), live.gradient())).collect();
    report.take();
    let total = || {
        let run = sweep(&adapted, wave);
        let beside: f64 = report.take().values().map(|losses| losses.balance + losses.z).sum();
        run.loss.unwrap() + run.loss_tokens as f64 * beside
    };
    for (name, gradient) in &gradients {
        check_gradient(set.bank(), name, gradient, total);
    }
    // on the training loop
    let mut set = AdapterSet::new();
    OwnWeights::router().install(&Setting::new(&base), &mut set).unwrap();
    losses.install(&Setting::new(&base), &mut set).unwrap();
    let mut task = FineTune::new(&base, set.into()).unwrap();
    let mut parameters = task.set().bank().parameters().unwrap();
    let mut seen = Vec::new();
    let mut tell = |event: &TrainEvent| {
        if let TrainEvent::Step { auxiliary, .. } = event {
            seen.push(auxiliary.clone());
        }
        Ok(())
    };
    moe_core::train::train(&mut task, &mut parameters, &waves(&base, 3), &options(2), &mut tell).unwrap();
    assert_eq!(seen.len(), 2);
    let k = base.config().routing.top_k as f64;
    for losses in seen {
        assert!(losses["router_balance"] > 0.25 * k && losses["router_balance"] < 2.0 * k, "{losses:?}");
        assert!(losses["router_z"] > 0.0 && losses.len() == 2, "{losses:?}");
    }
}

/// What transformers 5.24 computes for a row of the bundled model: `load_balancing_loss_func` over the router logits of
/// all four layers, and over those of each by itself.
#[test]
fn a_balance_loss_over_the_model_is_that_of_transformers_and_over_layers_another() {
    let path = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    let base = Model::open(path, &burn::tensor::Device::flex(), None).unwrap();
    let ids = vec![1683, 1291, 26, 596, 282, 1612, 893, 14, 199];
    let wave = moe_core::data::Wave { id: 0, sequences: vec![moe_core::data::Sequence::new(ids)] };
    let by_layer = [8.022_459, 7.925_519, 6.886_038, 5.422_503];
    let of = |over: BalanceScope| {
        let balance = Some(BalanceLoss { coefficient: 1.0, form: BalanceForm::Switch, over });
        let mut set = AdapterSet::new();
        OwnWeights::router().install(&Setting::new(&base), &mut set).unwrap();
        let losses = RouterLosses { balance, ..RouterLosses::default() };
        let report = losses.install(&Setting::new(&base), &mut set).unwrap().artifacts.router_losses.unwrap();
        sweep(&base.with_adapters(Arc::new(set)).unwrap(), &wave);
        report.take().into_values().map(|losses| losses.balance).collect::<Vec<f64>>()
    };
    let whole: f64 = of(BalanceScope::Model).iter().sum();
    assert!((whole - 4.312_094).abs() < 2e-3, "{whole}");
    let apart = of(BalanceScope::Layer);
    for (found, expected) in apart.iter().zip(by_layer) {
        assert!((found - expected).abs() < 2e-3, "{found} {expected}");
    }
    let sum: f64 = apart.iter().sum();
    assert!((sum - 28.256_519).abs() < 5e-3, "{sum}");
    // Recipes name both, and take that of transformers if they say nothing.
    let scope = |json: &str| serde_json::from_str::<RouterLosses>(json).unwrap().balance.unwrap().over;
    assert_eq!(scope(r#"{"balance": {"coefficient": 0.01}}"#), BalanceScope::Model);
    assert_eq!(scope(r#"{"balance": {"coefficient": 0.01, "over": "layer"}}"#), BalanceScope::Layer);
}

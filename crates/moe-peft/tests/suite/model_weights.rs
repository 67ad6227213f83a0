//! Training the model's own weights.

use crate::tuning;

use std::collections::{BTreeMap, BTreeSet};

use moe_core::{
    adapters::{ExpertSite, LayerSite, Site},
    train::{Saving, TrainEvent, train as run, train_saved},
};
use moe_peft::{
    AdapterSet, FineTune, Setting, TuningMethod,
    esft::{Esft, EsftScore},
    layer_sampling::{LayerSampling, LayerWeights, outliers},
    model_weights::{OwnWeights, SampledLayers},
    smt::{BlockBudget, BlockScore, BlockWatch, Smt},
    trainable_tensors,
};
use tuning::{loss, model, options, train, train_own, waves};

#[test]
fn untrained_own_weights_are_the_model_and_training_lowers_the_loss() {
    for name in ["qwen2_moe", "deepseek_v3", "gpt_oss"] {
        let base = model(name);
        let wave = &waves(&base, 1)[0];
        let mut set = AdapterSet::new();
        OwnWeights::full().install(&Setting::new(&base), &mut set).unwrap();
        let task = FineTune::new(&base, set.into()).unwrap();
        assert!((loss(&base, wave) - loss(task.model(), wave)).abs() < 1e-4, "{name}");
        let (task, mut parameters) = train(task, &base, 6);
        let after = task.with_values(&mut parameters, |model| Ok(loss(model, wave))).unwrap();
        assert!(after < 0.9 * loss(&base, wave), "{name}: {after}");
    }
}

#[test]
fn only_the_experts_of_a_selection_change_and_have_moments() {
    let base = model("qwen2_moe");
    let esft = Esft { score: EsftScore::Token, threshold: 0.3, ..Esft::default() };
    let scores = esft.scores(moe_importance::Calibration::of_waves(&base, &waves(&base, 3))).unwrap();
    let selection = esft.select(&scores).unwrap();
    let chosen: usize = selection.experts.values().map(Vec::len).sum();
    assert!(chosen > 0 && selection.experts.values().all(|experts| experts.len() < 8));
    let (task, mut parameters) = train_own(&base, &selection.weights(), 3);
    assert_eq!(parameters.iter().count(), 2 * chosen);
    assert!(parameters.iter().all(|(_, p)| p.state().steps == 3));
    for layer in 0..base.config().layers.len() {
        for expert in 0..base.config().moe(layer).unwrap().num_experts() {
            let before = base.expert(layer, expert).unwrap().down.to_tensor().to_data();
            let after =
                task.with_values(&mut parameters, |m| Ok(m.expert(layer, expert)?.down.to_tensor().to_data())).unwrap();
            assert_eq!(before != after, selection.experts[&layer].contains(&expert), "layer {layer} expert {expert}");
        }
    }
}

#[test]
fn a_part_that_the_model_lacks_and_a_layer_that_does_not_exist_are_refused() {
    let base = model("qwen3_moe"); // without shared experts
    let message =
        |weights: OwnWeights| weights.install(&Setting::new(&base), &mut AdapterSet::new()).unwrap_err().to_string();
    assert!(message(OwnWeights::shared_gate()).contains("nothing would be trained"));
    let only = BTreeMap::from([(0, BTreeSet::from([99]))]);
    assert!(message(OwnWeights::these_experts(only)).contains("trained expert of layer 0: found 99"));
    let layers = Some(BTreeSet::from([7]));
    assert!(message(OwnWeights { layers, ..OwnWeights::full() }).contains("trained layer: found 7"));
}

#[test]
fn each_part_trains_alone() {
    let base = model("qwen2_moe");
    for (weights, part) in [(OwnWeights::router(), "router"), (OwnWeights::shared_gate(), "shared_expert_gate")] {
        let (_, parameters) = train_own(&base, &weights, 1);
        assert!(parameters.iter().all(|(name, _)| name.ends_with(part)), "{part}");
        assert_eq!(parameters.iter().count(), base.config().layers.len());
    }
}

fn smt() -> Smt {
    Smt {
        block: 8,
        score: BlockScore::AbsMean,
        warmup_steps: 2,
        attention: Some(BlockBudget::Blocks(5)),
        feed_forward: Some(BlockBudget::Blocks(7)),
        ..Smt::default()
    }
}

#[test]
fn blocks_start_where_the_warm_up_ended_and_nothing_else_moves() {
    let base = model("qwen2_moe");
    let smt = smt();
    let mut set = AdapterSet::new();
    smt.warmup_weights().install(&Setting::new(&base), &mut set).unwrap();
    let watch = BlockWatch::new(smt, &base).unwrap();
    let (task, mut warmed) = train(FineTune::new(&base, set.into()).unwrap().with_hooks(watch.clone()), &base, 2);
    // the updates of the warm-up are those of plain full fine-tuning
    let (_, plain) = train_own(&base, &OwnWeights::full(), 2);
    assert!(warmed.iter().zip(plain.iter()).all(|(a, b)| a.0 == b.0 && a.1.values == b.1.values));
    let wave = &waves(&base, 1)[0];
    let at_switch = task.with_values(&mut warmed, |model| Ok(loss(model, wave))).unwrap();

    let selection = watch.scores().select().unwrap();
    assert_eq!(selection.values().map(Vec::len).sum::<usize>(), 12);
    let mut set = AdapterSet::new();
    smt.install_blocks(&base, &selection, Some(warmed.clone()), &mut set).unwrap();
    let task = FineTune::new(&base, set.into()).unwrap();
    assert_eq!(loss(task.model(), wave), at_switch);
    assert_eq!(task.set().bank().values(), 12 * 64);
    let (task, parameters) = train(task, &base, 3);
    assert!(parameters.iter().all(|(_, p)| p.state().bytes() == 8 * p.len() as u64));
    task.set().bank().settle(parameters).unwrap();
    for (site, adapter) in task.set().sites() {
        let start = &warmed.get(&site.path()).unwrap().values;
        let base = moe_core::kernels::weight::Weight::dense(burn_tensor(start.clone(), adapter.dims()));
        let after = moe_core::host::into_vec(adapter.matrix(&base).unwrap());
        let columns = adapter.dims()[1];
        let blocks = selection.get(site).cloned().unwrap_or_default();
        let mut moved = 0;
        for (i, (a, b)) in start.iter().zip(&after).enumerate() {
            let inside = blocks.iter().any(|b| b.rows.contains(&(i / columns)) && b.columns.contains(&(i % columns)));
            assert!(inside || a.to_bits() == b.to_bits(), "{site} value {i}");
            moved += usize::from(a != b);
        }
        assert!(moved * 2 > blocks.iter().map(|block| block.len()).sum::<usize>() || blocks.is_empty(), "{site}");
    }
}

fn burn_tensor(values: Vec<f32>, dims: [usize; 2]) -> burn::tensor::Tensor<2> {
    moe_core::host::from_vec(values, dims, &burn::tensor::Device::flex())
}

#[test]
fn all_blocks_train_as_the_whole_matrices_do() {
    let base = model("qwen2_moe");
    let smt = Smt { block: 7, output: true, ..smt() }; // ragged edges
    let targets: Vec<_> =
        trainable_tensors::linear_maps(base.checkpoint()).into_iter().filter(|p| smt.targets(p.site)).collect();
    let all = |place: &trainable_tensors::Place| {
        let [rows, columns] = place.dims.map(|n| n.div_ceil(7));
        let block = |i| moe_peft::model_weights::Block::of(place.dims, 7, i / columns, i % columns);
        (place.site, (0..rows * columns).map(block).collect())
    };
    let mut set = AdapterSet::new();
    smt.install_blocks(&base, &targets.iter().map(all).collect(), None, &mut set).unwrap();
    let mut losses = [Vec::new(), Vec::new()];
    let weights = OwnWeights { attention: true, experts: true, shared: true, dense: true, ..OwnWeights::default() };
    let mut whole = AdapterSet::new();
    weights.install(&Setting::new(&base), &mut whole).unwrap();
    for (set, losses) in [set, whole].into_iter().zip(&mut losses) {
        let mut task = FineTune::new(&base, set.into()).unwrap();
        let mut parameters = task.set().bank().parameters().unwrap();
        let mut tell = |event: &TrainEvent| {
            if let TrainEvent::Step { loss, .. } = event {
                losses.push(*loss);
            }
            Ok(())
        };
        run(&mut task, &mut parameters, &waves(&base, 3), &options(4), &mut tell).unwrap();
    }
    for (blocks, whole) in losses[0].iter().zip(&losses[1]) {
        assert!((blocks - whole).abs() < 2e-4, "{losses:?}");
    }
    assert!(losses[0][3] < losses[0][0]);
}

#[test]
fn drawn_layers_change_and_the_others_do_not() {
    let base = model("qwen3_moe");
    let sampling = LayerSampling { layers: 1, every: 2, seed: 3, ..LayerSampling::default() };
    let probabilities = sampling.probabilities(&base, &[]).unwrap();
    let mut set = AdapterSet::new();
    OwnWeights::full().install(&Setting::new(&base), &mut set).unwrap();
    let method = SampledLayers::new(sampling.clone(), probabilities.clone());
    let start = |set: AdapterSet| {
        let task = FineTune::new(&base, set.into()).unwrap().with_hooks(method.clone());
        let parameters = task.set().bank().parameters().unwrap();
        (task, parameters)
    };
    let (mut task, mut parameters) = start(set);
    let first = parameters.clone();
    run(&mut task, &mut parameters, &waves(&base, 3), &options(2), &mut |_| Ok(())).unwrap();
    let drawn = sampling.draw(&probabilities, 1);
    for ((name, before), (_, after)) in first.iter().zip(parameters.iter()) {
        let layer: Option<usize> = name.strip_prefix("layers.").map(|n| n.split('.').next().unwrap().parse().unwrap());
        let trains = layer.is_none_or(|layer| drawn.contains(&layer));
        // experts without tokens have no gradient, but AdamW moves nothing without one either
        assert!(trains || before.values == after.values, "{name} changed");
        assert_eq!(after.state().bytes() > 0, trains, "{name}");
        if trains && !name.contains("experts") {
            assert_ne!(before.values, after.values, "{name} did not change");
        }
    }

    // interrupted and resumed, in the middle of a draw
    let dir = tempfile::tempdir().unwrap();
    let straight = {
        let mut set = AdapterSet::new();
        OwnWeights::full().install(&Setting::new(&base), &mut set).unwrap();
        let (mut task, mut parameters) = start(set);
        run(&mut task, &mut parameters, &waves(&base, 3), &options(7), &mut |_| Ok(())).unwrap();
        parameters
    };
    let mut resumed = None;
    for attempt in 0..2 {
        let mut set = AdapterSet::new();
        OwnWeights::full().install(&Setting::new(&base), &mut set).unwrap();
        let (mut task, mut parameters) = start(set);
        let saving = Saving { resume: attempt == 1, ..Saving::new(dir.path().join("state"), 1) };
        let mut stop = |event: &TrainEvent| match event {
            TrainEvent::Step { step: 4, .. } if attempt == 0 => Err(moe_core::Error::observer("stopped")),
            _ => Ok(()),
        };
        let result = train_saved(&mut task, &mut parameters, &waves(&base, 3), &options(7), Some(&saving), &mut stop);
        assert_eq!(result.is_err(), attempt == 0);
        resumed = Some(parameters);
    }
    for ((name, a), (_, b)) in straight.iter().zip(resumed.unwrap().iter()) {
        assert!(a.values.iter().zip(&b.values).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}");
    }
}

#[test]
fn outliers_are_counted_against_the_mean_of_the_layer() {
    let base = model("qwen2_moe");
    let some = outliers(&base, &waves(&base, 1), 2.0).unwrap();
    let few = outliers(&base, &waves(&base, 1), 6.0).unwrap();
    assert!(some.iter().zip(&few).all(|(some, few)| (0.0..0.5).contains(some) && few < some), "{some:?} {few:?}");
    assert!(outliers(&base, &[], 2.0).is_err());
    let weights = LayerWeights::Outliers { times_mean: 2.0 };
    let sampling = LayerSampling { layers: 1, weights, ..LayerSampling::default() };
    let p = sampling.probabilities(&base, &waves(&base, 1)).unwrap();
    assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-12);
}

#[test]
fn sites_have_paths() {
    assert_eq!(Site::Layer(3, LayerSite::SharedGateUp).path(), "layers.3.shared_gate_up");
    assert_eq!(Site::Expert { layer: 0, expert: 7, map: ExpertSite::Down }.path(), "layers.0.experts.7.down");
}

#[test]
fn what_was_trained_is_folded_into_a_checkpoint_in_every_layout() {
    use moe_checkpoint::{WriteOptions, write};
    use moe_peft::fold::Folded;
    let dir = tempfile::tempdir().unwrap();
    for name in ["qwen2_moe", "gpt_oss", "qwen2_moe_bf16", "deepseek_v3"] {
        let base = model(name);
        // nothing trained: byte for byte
        let mut set = AdapterSet::new();
        OwnWeights::full().install(&Setting::new(&base), &mut set).unwrap();
        let same = dir.path().join(format!("{name}-same"));
        let folded = Folded::on(base.checkpoint(), &set).unwrap();
        write(folded.model(), &same, &WriteOptions::default()).unwrap();
        let report = folded.changes().unwrap();
        assert!(report.changed.is_empty() && !report.unchanged.is_empty(), "{name}: {:?}", report.changed);
        let copy = moe_checkpoint::Checkpoint::open(&same).unwrap();
        for info in base.checkpoint().tensors() {
            assert!(copy.bytes(&info.name).unwrap() == base.checkpoint().bytes(&info.name).unwrap(), "{}", info.name);
        }
        // trained: the same loss from disk, to the rounding of the dtype
        let (task, parameters) = train_own(&base, &OwnWeights::full(), 3);
        task.set().bank().settle(parameters).unwrap();
        let out = dir.path().join(name);
        let folded = Folded::on(base.checkpoint(), task.set()).unwrap();
        write(folded.model(), &out, &WriteOptions::default()).unwrap();
        let report = folded.changes().unwrap();
        assert!(report.changed.len() * 10 > base.checkpoint().tensors().count() * 7, "{name}");
        let written = moe_core::Model::open(&out, &burn::tensor::Device::flex(), None).unwrap();
        let wave = &waves(&base, 1)[0];
        let (a, b) = (loss(task.model(), wave), loss(&written, wave));
        let tolerance = if name.ends_with("bf16") { 0.5 } else { 1e-4 };
        assert!((a - b).abs() < tolerance, "{name}: {a} {b}");
        // a second time without leave
        assert!(write(folded.model(), &out, &WriteOptions::default()).is_err());
    }
}

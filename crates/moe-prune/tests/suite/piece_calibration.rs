//! Factors and numbers of pieces per token from calibration data.
#![cfg(feature = "repair")]

use crate::common;
use crate::run;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::{magnitude, parity};
use moe_checkpoint::Checkpoint;
use moe_core::device::device;
use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, LayerTrace, Observer, Signals};
use moe_core::{Engine, EngineOptions, Model};
use moe_prune::{EditSource, Edits, ExpertEdit, FineGrained, PrunePlan, ScaleCalibration, ScaleFit, TrialOptions};
use run::wave;

fn open(name: &str) -> Model {
    Model::new(Arc::new(Checkpoint::open(parity(name)).unwrap()), &device("flex").unwrap(), None).unwrap()
}

fn scales(
    model: &Model,
    plan: &PrunePlan,
    edits: Option<&dyn EditSource>,
    fit: ScaleFit,
    how: &[FineGrained<'_>],
) -> Vec<Vec<Vec<f32>>> {
    let mut sums = ScaleCalibration::new(model.checkpoint(), plan, edits, fit, how).unwrap();
    Engine::new(model, EngineOptions::default()).run(&wave(model.config().vocab_size), &mut sums).unwrap();
    (0..how.len()).map(|candidate| sums.scales(candidate)).collect()
}

#[test]
fn without_drops_every_factor_is_one() {
    for name in [
        "tf4/qwen2_moe",
        "tf5/qwen3_moe",
        "tf5/deepseek_v2_group",
        "tf5/deepseek_v3",
        "tf5/ernie4_5_moe",
        "tf5/gpt_oss",
    ] {
        let model = open(name);
        let plan = PrunePlan::keep_all(model.checkpoint().shape(), model.checkpoint().fingerprint());
        let how = [FineGrained::new(2), FineGrained::new(4)];
        for fit in [ScaleFit::Whole, ScaleFit::Kept] {
            for scales in scales(&model, &plan, None, fit, &how) {
                assert!(scales.iter().flatten().all(|scale| (scale - 1.0).abs() < 1e-4), "{name}: {scales:?}");
            }
        }
    }
}

/// A token that an expert saw: which, its routing weight, the output.
type Seen = (usize, f64, Vec<f64>);

/// Everything that the sums are made of.
#[derive(Default)]
struct Recorder {
    layers: BTreeMap<usize, (usize, Vec<f32>)>,
    /// By layer and expert.
    outputs: BTreeMap<(usize, usize), Vec<Seen>>,
}

impl Observer for Recorder {
    fn needs(&self) -> Signals {
        Signals { routing: true, outputs: true, ..Signals::NONE }
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        self.layers.insert(trace.layer, (trace.experts, trace.logits.to_vec()));
        Ok(())
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        let output = HostView::new(trace.output.unwrap());
        let width = output.as_slice().len() / trace.rows.len();
        let rows = output.as_slice().chunks(width).map(|row| row.iter().map(|v| f64::from(*v)).collect());
        let tokens = trace.rows.iter().zip(trace.routing_weights);
        let all = tokens.zip(rows).map(|((token, weight), row)| (*token as usize, f64::from(*weight), row));
        self.outputs.insert((trace.layer, trace.expert), all.collect());
        Ok(())
    }
}

#[test]
fn factors_are_the_least_squares_of_what_pieces_give() {
    // Softmax, then the best, not divided by their sum; and divided by it.
    for (name, renormalized) in [("tf4/qwen2_moe", false), ("tf5/qwen3_moe", true)] {
        let model = open(name);
        let scores = magnitude(model.checkpoint());
        let how = FineGrained { top_k: Some(5), ..FineGrained::new(2) };
        let plan = how.prune(&scores, model.checkpoint(), 0.4).unwrap();
        let found = scales(&model, &plan, None, ScaleFit::Whole, &[how]).remove(0);
        let mut recorder = Recorder::default();
        Engine::new(&model, EngineOptions::default()).run(&wave(model.config().vocab_size), &mut recorder).unwrap();
        let map = how.map(&plan, model.checkpoint()).unwrap();
        let mut other = 0;
        for (position, layer) in map.layers.iter().enumerate() {
            let (experts, logits) = &recorder.layers[&layer.layer];
            // Routing weight of every expert's pieces together, by token.
            let weights: Vec<Vec<f64>> = logits
                .chunks(*experts)
                .map(|row| {
                    let p: Vec<f64> = layer.pieces.iter().map(|piece| f64::from(row[piece.expert]).exp()).collect();
                    let mut order: Vec<usize> = (0..p.len()).collect();
                    order.sort_by(|a, b| p[*b].total_cmp(&p[*a]).then(a.cmp(b)));
                    order.truncate(5);
                    let sum: f64 = if renormalized { order.iter().map(|i| p[*i]).sum() } else { p.iter().sum() };
                    let mut weights = vec![0.0; *experts];
                    order.iter().for_each(|i| weights[layer.pieces[*i].expert] += p[*i] / sum);
                    weights
                })
                .collect();
            for expert in 0..*experts {
                let (mut over, mut under) = (0.0, 0.0);
                for (token, g, f) in recorder.outputs.get(&(layer.layer, expert)).into_iter().flatten() {
                    let norm: f64 = f.iter().map(|v| v * v).sum();
                    let after = 2.0 * weights[*token][expert] / layer.counts[expert].max(1) as f64;
                    over += g * after * norm;
                    under += after * after * norm;
                }
                let expected = if under > 0.0 { over / under } else { 1.0 };
                let found = f64::from(found[position][expert]);
                assert!((found - expected).abs() < 1e-4 * expected.abs(), "{name}: {found} {expected}");
                other += usize::from((expected - 1.0).abs() > 0.05);
            }
        }
        assert!(other > 5, "{name}: the routing has changed");
    }
}

#[test]
fn kept_units_and_edits_count() {
    let model = open("tf5/qwen3_moe");
    let checkpoint = model.checkpoint();
    let scores = magnitude(checkpoint);
    let how = FineGrained::new(2);
    // With all pieces of every expert there is nothing to make up for, whatever is left of an expert...
    let plan = PrunePlan::keep_all(checkpoint.shape(), checkpoint.fingerprint());
    let mut edits = Edits::new();
    let (layer, hidden) = (checkpoint.shape().layers[1].layer, checkpoint.shape().hidden_size);
    let full = checkpoint.expert(layer, 3).unwrap();
    // ...unless it gives half of what it gave.
    let half = full.down.iter().map(|value| value / 2.0).collect();
    edits.set_expert(layer, 3, ExpertEdit { down: Some(half), down_bias: None });
    let found = scales(&model, &plan, Some(&edits), ScaleFit::Kept, &[how]).remove(0);
    for (position, experts) in found.iter().enumerate() {
        for (expert, scale) in experts.iter().enumerate() {
            let expected = if (position, expert) == (1, 3) { 2.0 } else { 1.0 };
            assert!((scale - expected).abs() < 1e-4, "{scale} {expected}");
        }
    }
    // An edit that leaves the kept units as they are is none.
    let plan = how.prune(&scores, checkpoint, 0.4).unwrap();
    let mut same = Edits::new();
    for kept in &plan.kept {
        for (expert, units) in kept.experts.iter().enumerate() {
            let full = checkpoint.expert(kept.layer, expert).unwrap();
            let column = |row: usize| units.iter().map(move |unit| row * full.width + *unit as usize);
            let down: Vec<f32> = (0..hidden).flat_map(column).map(|at| full.down[at]).collect();
            same.set_expert(kept.layer, expert, ExpertEdit { down: Some(down), down_bias: None });
        }
    }
    let plain = scales(&model, &plan, None, ScaleFit::Kept, &[how]).remove(0);
    let edited = scales(&model, &plan, Some(&same), ScaleFit::Kept, &[how]).remove(0);
    for (a, b) in plain.iter().flatten().zip(edited.iter().flatten()) {
        assert!((a - b).abs() < 1e-4 * a.abs().max(1.0), "{a} {b}");
    }
}

#[test]
fn numbers_of_pieces_per_token_are_tried_in_one_pass() {
    let model = open("tf5/qwen3_moe");
    let checkpoint = model.checkpoint();
    let plan = PrunePlan::keep_all(checkpoint.shape(), checkpoint.fingerprint());
    let waves = [wave(model.config().vocab_size)];
    let options = TrialOptions {
        top_k: &[6, 3, 1],
        fit: Some(ScaleFit::Kept),
        edits: None,
        calibration: &waves,
        comparison: &waves,
        teacher_tokens: 1000,
    };
    let trials = FineGrained::new(2).try_top_k(&model, &plan, &options).unwrap();
    assert_eq!(trials.iter().map(|trial| trial.top_k).collect::<Vec<_>>(), [6, 3, 1]);
    assert!(trials[0].divergence.abs() < 1e-6, "{}", trials[0].divergence);
    assert!(trials[2].divergence > trials[1].divergence && trials[1].divergence > 1e-5);
    assert!(trials.iter().all(|trial| trial.loss.is_finite() && trial.scales.len() == plan.kept.len()));
    // Given factors stay.
    let given: Vec<Vec<f32>> = vec![vec![0.75; 8]; 3];
    let how = FineGrained { scales: Some(&given), ..FineGrained::new(2) };
    let trials = how.try_top_k(&model, &plan, &TrialOptions { fit: None, ..options }).unwrap();
    assert_eq!(trials[1].scales, given);
    assert!(trials[0].divergence > 1e-5);
}

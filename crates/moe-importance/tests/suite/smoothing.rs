//! Factors on the inputs of experts: the same model, and weights that are rounded with less damage.
#![cfg(feature = "flex")]

use std::path::PathBuf;
use std::sync::Arc;

use moe_checkpoint::{
    ActivationAware, Checkpoint, ExpertAware, ExpertPart, InputMoments, InputRanges, LayerSmoothing, QuantizeOptions,
    Quantized, RouterInputs, RouterRounding, Smoothed, Statistics, WeightFormat, WriteOptions, write,
};
use moe_core::data::{Sequence, Wave};
use moe_core::host::HostView;
use moe_core::trace::{LayerTrace, Observer, Signals};
use moe_core::{Engine, EngineOptions, Model, device::device};
use moe_importance::{Calibration, Collector, ExpertInputRanges, ExpertInputs, RouterSample, RowUse};

fn tiny_moe() -> Arc<Checkpoint> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    Arc::new(Checkpoint::open(path).unwrap())
}

fn fixture(name: &str) -> Arc<Checkpoint> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5");
    Arc::new(Checkpoint::open(folder.join(name)).unwrap())
}

fn model(of: &Arc<Checkpoint>) -> Model {
    Model::new(of.clone(), &device("flex").unwrap(), None).unwrap()
}

fn waves(vocabulary: usize) -> Vec<Wave> {
    let ids = |seed: usize| (0..40).map(|i| ((i * 137 + seed * 31 + 3) % vocabulary) as u32).collect();
    (0..2)
        .map(|id| Wave { id: id as u64, sequences: vec![Sequence::new(ids(2 * id)), Sequence::new(ids(2 * id + 1))] })
        .collect()
}

/// Logits, and the experts of every token.
#[derive(Default)]
struct Seen {
    logits: Vec<f32>,
    chosen: Vec<Vec<u32>>,
}

impl Observer for Seen {
    fn needs(&self) -> Signals {
        Signals { routing: true, logits: true, ..Signals::NONE }
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        let tokens = trace.selected.chunks(trace.top_k);
        self.chosen.extend(tokens.map(|experts| {
            let mut experts = experts.to_vec();
            experts.sort_unstable();
            experts
        }));
        Ok(())
    }

    fn logits(&mut self, _: usize, logits: &HostView, _: usize) -> moe_core::Result<()> {
        self.logits.extend_from_slice(logits.as_slice());
        Ok(())
    }
}

fn seen(of: &Arc<Checkpoint>) -> Seen {
    let mut seen = Seen::default();
    let model = model(of);
    let engine = Engine::new(&model, EngineOptions::default());
    for wave in waves(of.config().vocab_size) {
        engine.run(&wave, &mut seen).unwrap();
    }
    seen
}

fn collected(of: &Arc<Checkpoint>, collector: Box<dyn Collector>) -> Statistics {
    let model = model(of);
    Calibration::of_waves(&model, &waves(of.config().vocab_size)).collector(collector).run(&mut |_| ()).unwrap()
}

fn moments(of: &Arc<Checkpoint>) -> InputMoments {
    InputMoments::new(collected(of, Box::new(ExpertInputs::of(of))))
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Factors that differ by channel and unit.
fn some(of: &Checkpoint) -> Vec<LayerSmoothing> {
    let factor = |at: usize| [0.5, 1.0, 3.0, 0.8, 2.0][at % 5];
    let layers = of.shape().layers.iter();
    layers
        .map(|layer| LayerSmoothing {
            layer: layer.layer,
            inputs: (0..of.config().hidden_size).map(factor).collect(),
            units: layer.widths.iter().map(|width| (0..*width).map(|unit| factor(unit + 2)).collect()).collect(),
        })
        .collect()
}

#[test]
fn a_model_with_powers_of_two_folded_in_is_the_same_model() {
    // A shared expert with a gate, one without, several, and none.
    let mut models = vec![tiny_moe()];
    models.extend(["qwen3_moe", "deepseek_v3", "glm4_moe", "olmoe"].map(fixture));
    for base in models {
        let name = base.config().model_type.clone();
        let exact: Vec<LayerSmoothing> = some(&base).into_iter().map(LayerSmoothing::powers_of_two).collect();
        let smoothed = Smoothed::on(&base, &exact).unwrap();
        let (before, after) = (seen(&base), seen(smoothed.model()));
        assert_eq!(before.chosen, after.chosen, "{name}");
        let largest = before.logits.iter().fold(0f32, |most, logit| most.max(logit.abs()));
        assert!(apart(&before.logits, &after.logits) <= 1e-4 * largest.max(1.0), "{name}");
        // Every changed tensor is the old one times powers of two: the router's columns, say.
        let layer = base.shape().layers[0].layer;
        let role = moe_checkpoint::Role::Layer(layer, moe_checkpoint::LayerRole::Router);
        let (old, new) = (base.read_f32(role).unwrap(), smoothed.model().read_f32(role).unwrap());
        let hidden = base.config().hidden_size;
        let times = |at: usize| old[at] * exact[0].inputs[at % hidden];
        assert!((0..old.len()).all(|at| new[at] == times(at)), "{name}");
        assert!(old != new, "{name}");
        let expert = smoothed.model().expert(layer, 1).unwrap();
        let plain = base.expert(layer, 1).unwrap();
        let width = plain.width;
        assert!((0..plain.down.len()).all(|at| expert.down[at] == plain.down[at] * exact[0].units[1][at % width]));
        let up = |at: usize| plain.up[at] * exact[0].inputs[at % hidden] / exact[0].units[1][at / hidden];
        assert!((0..plain.up.len()).all(|at| expert.up[at] == up(at)), "{name}");
    }
}

#[test]
fn every_family_takes_factors_without_a_change_of_its_logits_or_says_why_not() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf5");
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let (mut with_inputs, mut with_units) = (0, 0);
    for name in names {
        let base = fixture(&name);
        let mut layers: Vec<LayerSmoothing> = some(&base).into_iter().map(LayerSmoothing::powers_of_two).collect();
        for layer in &mut layers {
            let [inputs, units] = Smoothed::refusals(&base, layer.layer);
            if let Some(reason) = inputs {
                let error = Smoothed::on(&base, &[LayerSmoothing { units: Vec::new(), ..layer.clone() }]).unwrap_err();
                assert!(error.to_string().contains(&reason), "{name}: {error}");
                layer.inputs.clear();
            }
            if let Some(reason) = units {
                let error = Smoothed::on(&base, &[LayerSmoothing { inputs: Vec::new(), ..layer.clone() }]).unwrap_err();
                assert!(error.to_string().contains(&reason), "{name}: {error}");
                layer.units.clear();
            }
        }
        with_inputs += usize::from(layers.iter().any(|layer| !layer.inputs.is_empty()));
        with_units += usize::from(layers.iter().any(|layer| !layer.units.is_empty()));
        let smoothed = Smoothed::on(&base, &layers).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (before, after) = (seen(&base), seen(smoothed.model()));
        let largest = before.logits.iter().fold(1f32, |most, logit| most.max(logit.abs()));
        let found = apart(&before.logits, &after.logits);
        assert!(found <= 1e-4 * largest, "{name}: {found} of {largest}");
    }
    assert!(with_inputs > 60 && with_units > 60, "{with_inputs} {with_units}");
}

#[test]
fn other_factors_cost_a_rounding_of_each_weight_and_no_more() {
    let base = tiny_moe();
    let smoothed = Smoothed::on(&base, &some(&base)).unwrap();
    let (before, after) = (seen(&base), seen(smoothed.model()));
    // Weights in BF16 have 8 bits. Where that changes a choice of experts, a few logits change more.
    let squares = |logits: &mut dyn Iterator<Item = f32>| logits.map(|logit| f64::from(logit).powi(2)).sum::<f64>();
    let changed = squares(&mut before.logits.iter().zip(&after.logits).map(|(a, b)| a - b));
    let relative = (changed / squares(&mut before.logits.iter().copied())).sqrt();
    assert!(relative < 0.02, "{relative}");
    let same = before.chosen.iter().zip(&after.chosen).filter(|(a, b)| a == b).count();
    assert!(same * 100 > before.chosen.len() * 95, "{same} of {}", before.chosen.len());
    // What is written is what runs.
    let dir = tempfile::tempdir().unwrap();
    write(smoothed.model(), dir.path().join("out"), &WriteOptions::default()).unwrap();
    let written = Arc::new(Checkpoint::open(dir.path().join("out")).unwrap());
    assert_eq!(seen(&written).logits, after.logits);
    assert_eq!(written.steps().len(), 1);
}

#[test]
fn what_takes_no_factors_is_refused_by_name() {
    let of = |base: &Arc<Checkpoint>, change: &dyn Fn(&mut LayerSmoothing)| {
        let mut layers = some(base);
        layers.truncate(1);
        change(&mut layers[0]);
        Smoothed::on(base, &layers).unwrap_err().to_string()
    };
    let base = tiny_moe();
    let error = of(&base, &|layer| layer.inputs.truncate(3));
    assert!(error.contains("layer 0") && error.contains("3 factors for 128"), "{error}");
    let error = of(&base, &|layer| layer.inputs[0] = 0.0);
    assert!(error.contains("above 0"), "{error}");
    let error = of(&base, &|layer| layer.layer = 99);
    assert!(error.contains("no layer with routed experts"), "{error}");
    // Units of gpt-oss are bounded, and cohere's attention reads the norm of its experts.
    let error = of(&fixture("gpt_oss"), &|layer| layer.inputs.clear());
    assert!(error.contains("bounded"), "{error}");
}

#[test]
fn activation_aware_factors_leave_less_damage_than_none() {
    let base = tiny_moe();
    let format = WeightFormat::Int { bits: 4, group_size: Some(32), symmetric: true };
    let moments = moments(&base);
    let found = ActivationAware::default().search(&base, &format, &moments).unwrap();
    assert_eq!(found.len(), 4);
    let (before, after) = found
        .iter()
        .fold((0.0, 0.0), |(before, after), layer| (before + layer.damage_before, after + layer.damage_after));
    assert!(after < before, "{after} of {before}");
    let layers: Vec<LayerSmoothing> = found.into_iter().map(|layer| layer.factors).collect();
    let exact = |factor: &f32| factor.log2().fract() == 0.0;
    assert!(layers.iter().all(|layer| layer.inputs.iter().chain(layer.units.iter().flatten()).all(exact)));
    let smoothed = Smoothed::on(&base, &layers).unwrap();
    let quantized = Quantized::on(smoothed.model(), &QuantizeOptions::new(format)).unwrap();
    assert_eq!(
        quantized.model().bytes_on_disk(),
        Quantized::on(&base, &QuantizeOptions::new(quantized.report().format.clone())).unwrap().model().bytes_on_disk()
    );
    let error = ActivationAware { grid: 0, powers_of_two: true }.search(&base, &WeightFormat::Mxfp4, &moments);
    assert!(error.unwrap_err().to_string().contains("grid"));
}

#[test]
fn one_factor_for_all_experts_is_the_largest_that_any_asks_for() {
    let base = tiny_moe();
    let statistics = collected(&base, Box::new(ExpertInputRanges::of(&base)));
    let largest =
        |expert: usize| statistics.matrix(&InputRanges::statistic(2, expert, ExpertPart::Gate)).unwrap().0.to_vec();
    let unseen = (0..16).filter(|expert| largest(*expert).iter().all(|value| *value == 0.0)).count();
    let smoothing = ExpertAware { powers_of_two: false, ..ExpertAware::default() };
    let by_expert: Vec<Vec<f64>> = (0..16)
        .filter(|expert| largest(*expert).iter().any(|value| *value > 0.0))
        .map(|expert| {
            let weights = base.expert(2, expert).unwrap();
            let column = |at: usize| {
                let values = weights.gate.iter().chain(&weights.up).skip(at).step_by(128);
                values.fold(0f64, |most, value| most.max(f64::from(value.abs())))
            };
            smoothing.expert_factors(&largest(expert), &(0..128).map(column).collect::<Vec<_>>())
        })
        .collect();
    assert!(by_expert.len() + unseen == 16 && by_expert[0] != by_expert[1]);
    let ranges = InputRanges::new(statistics);
    let of_layer = |router: bool| {
        let found = ExpertAware { router, ..smoothing }.factors(&base, &ranges).unwrap();
        assert!(found.iter().all(|layer| {
            layer.inputs.iter().chain(layer.units.iter().flatten()).all(|f| f.is_finite() && *f > 0.0)
        }));
        found[2].inputs.clone()
    };
    let folded = of_layer(false);
    for (channel, factor) in folded.iter().enumerate() {
        let most = by_expert.iter().map(|factors| factors[channel]).fold(0.0, f64::max);
        assert!((f64::from(*factor) - most).abs() < 1e-5 * most, "{channel}: {factor} {most}");
    }
    // The router's weights are smaller than those of experts, so that its own factors are larger.
    assert!(of_layer(true).iter().zip(&folded).all(|(with, without)| with >= without));
    assert!(ExpertAware { alpha: 1.5, ..smoothing }.factors(&base, &ranges).unwrap_err().to_string().contains("alpha"));
}

#[test]
fn routers_are_rounded_on_what_they_read() {
    let base = tiny_moe();
    let statistics = collected(&base, Box::new(RouterSample::of(&base)));
    // Every token of every layer once: 160 of at most 512.
    let (rows, columns) = statistics.matrix(&RouterInputs::statistic(3)).unwrap();
    assert_eq!((rows.len() / columns, columns), (160, 130));
    let inputs = RouterInputs::new(statistics);
    let (model, report) = RouterRounding { bits: 4, further: 0.0 }.on(&base, &inputs).unwrap();
    assert_eq!(report.len(), 4);
    for router in &report {
        assert!(router.divergence <= router.unclipped_divergence && router.overlap > 0.6, "{router:?}");
    }
    let role = moe_checkpoint::Role::Layer(1, moe_checkpoint::LayerRole::Router);
    let row: Vec<f32> = model.read_f32(role).unwrap()[..128].to_vec();
    let mut levels: Vec<u32> = row.iter().map(|value| value.abs().to_bits()).collect();
    levels.sort_unstable();
    levels.dedup();
    assert!(levels.len() <= 9, "{} magnitudes in 4 bits", levels.len());
    let (_, report) = RouterRounding::default().on(&base, &inputs).unwrap();
    assert!(report.iter().all(|router| router.overlap > 0.97), "{report:?}");
    assert!(RouterRounding { bits: 9, further: 0.0 }.on(&base, &inputs).is_err());
}

#[test]
fn rows_that_feed_starved_experts_come_again() {
    let base = tiny_moe();
    let found = RowUse::of(&model(&base), &waves(2048)).unwrap();
    assert_eq!((found.experts.clone(), found.counts.len()), (vec![16; 4], 4));
    assert!(found.counts.iter().all(|row| row.iter().sum::<u32>() == 4 * 4 * 40));
    let balanced = found.balanced(0.5).unwrap();
    assert!(balanced.starved_before > 0 && balanced.starved_after < balanced.starved_before, "{balanced:?}");
    assert!(balanced.rows.len() > 4 && balanced.rows.len() <= 16, "{balanced:?}");
    // Experts that nobody was routed to are calibrated on what all others read.
    let one = Wave { id: 0, sequences: vec![Sequence::new(vec![5, 6])] };
    let few = Calibration::of_waves(&model(&base), &[one])
        .collector(Box::new(ExpertInputs::of(&base)))
        .run(&mut |_| ())
        .unwrap();
    let id = |expert: usize| InputMoments::statistic(0, expert, ExpertPart::Gate);
    let unseen = (0..16).find(|expert| few.matrix(&id(*expert)).unwrap().0.iter().all(|value| *value == 0.0)).unwrap();
    let filled = InputMoments::new(few).with_unseen_experts(&base).unwrap();
    let options = QuantizeOptions::new(WeightFormat::Int { bits: 4, group_size: Some(32), symmetric: true });
    let by_all = Quantized::calibrated(&base, &options, &filled).unwrap();
    let nearest = Quantized::on(&base, &options).unwrap();
    let gate = |of: &Quantized| of.model().expert(0, unseen).unwrap().gate;
    assert!(gate(&by_all) != gate(&nearest));
}

//! What training holds in memory, counted in bytes.

mod common;
mod counting;
mod tuning;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use common::{distance, logits};
use counting::{alone, peak};
use moe_checkpoint::Existing;
use moe_core::{
    Model,
    data::{Sequence, Wave},
    train::{Parameters, Saving, Schedule, TaskState, TrainEvent, TrainOptions, train_saved},
};
use moe_peft::{
    AdapterSet, FineTune, Recipe, Result, RunEvent, Setting, TrainingHooks, TrainingRun, TuningMethod,
    fold::{FoldPrecision, Folded},
    layer_sampling::{LayerSampling, LayerTurns},
    model_weights::OwnWeights,
    smt::{BlockBudget, BlockScore, Smt},
    trainable_tensors,
};
use tuning::{loss, options};

/// The bundled model: large enough that weights count for more than what else a sweep needs.
fn tiny_moe() -> Model {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    Model::open(path, &common::device(), None).unwrap()
}

fn rows() -> Vec<Wave> {
    let ids = |seed: u32| (0..12).map(|i| (i * 137 + seed * 31) % 2048).collect();
    (0..3).map(|id| Wave { id: u64::from(id), sequences: vec![Sequence::new(ids(id))] }).collect()
}

/// Bytes of a sweep in which a norm is trained, from the reading of the weights on: what there is without any method.
fn sweep_bytes(model: &Model, wave: &Wave) -> usize {
    let mut set = AdapterSet::new();
    let norms = OwnWeights { norms: true, layers: Some([0].into()), ..OwnWeights::default() };
    norms.install(&Setting::new(model), &mut set).unwrap();
    let set = Arc::new(set);
    peak(|| tuning::sweep(&model.with_adapters(set).unwrap(), wave)).0
}

/// f32 bytes of the linear maps of each layer.
fn layer_bytes(model: &Model) -> Vec<u64> {
    let mut bytes = vec![0; model.config().layers.len()];
    for place in trainable_tensors::linear_maps(model.checkpoint()) {
        bytes[place.site.layer()] += 4 * (place.dims[0] * place.dims[1]) as u64;
    }
    bytes
}

/// Notes what parameters and adapters hold when gradients are complete.
struct Noting<H>(H, Arc<Mutex<Vec<u64>>>, Arc<AdapterSet>);

impl<H: TrainingHooks> TrainingHooks for Noting<H> {
    fn before_step(&mut self, step: usize, set: &AdapterSet, parameters: &mut Parameters) -> Result<()> {
        self.0.before_step(step, set, parameters)
    }

    fn gradients(&mut self, step: usize, factor: f64, parameters: &mut Parameters) -> Result<BTreeMap<String, f64>> {
        self.1.lock().unwrap().push(parameters.bytes() + self.2.bank().bytes());
        self.0.gradients(step, factor, parameters)
    }

    fn state_save(&self) -> Result<TaskState> {
        self.0.state_save()
    }

    fn state_load(&mut self, state: TaskState, set: &AdapterSet, parameters: &mut Parameters) -> Result<()> {
        self.0.state_load(state, set, parameters)
    }
}

#[test]
fn layers_that_take_turns_are_in_memory_as_f32_only_while_they_train() {
    let _alone = alone();
    let (model, waves) = (tiny_moe(), rows());
    let dir = tempfile::tempdir().unwrap();
    let sampling = LayerSampling { layers: 1, every: 1, drop_state: true, seed: 4, ..LayerSampling::default() };
    let turns = LayerTurns { sampling: sampling.clone(), projection: None };
    let layers = layer_bytes(&model);
    let steps = 6;
    let drawn: Vec<usize> = (1..=steps).map(|step| *sampling.draw(&[0.25; 4], step).first().unwrap()).collect();
    assert!(drawn.iter().collect::<std::collections::BTreeSet<_>>().len() > 2, "{drawn:?}");

    let train = |turns: &LayerTurns| {
        let mut set = AdapterSet::new();
        let mut on = Setting::new(&model).with_waves(&waves);
        on.directory = Some(dir.path());
        let installed = turns.install(&on, &mut set).unwrap();
        let set = Arc::new(set);
        let noted = Arc::new(Mutex::new(Vec::new()));
        let hooks = Noting(installed.hooks.unwrap(), noted.clone(), set.clone());
        let mut task = FineTune::new(&model, set).unwrap().with_hooks(hooks);
        let mut parameters = task.set().bank().parameters().unwrap();
        let options = TrainOptions { schedule: Schedule::constant(1e-3), ..options(steps) };
        moe_core::train::train(&mut task, &mut parameters, &waves, &options, &mut |_| Ok(())).unwrap();
        task.set().bank().settle(parameters).unwrap();
        (task, Arc::try_unwrap(noted).map_or_else(|all| all.lock().unwrap().clone(), |all| all.into_inner().unwrap()))
    };
    let (top, (task, noted)) = peak(|| train(&turns));
    // Embeddings, head, norms and biases always train: values, gradients, and from the first step on two moments.
    let always: u64 = {
        let mut set = AdapterSet::new();
        OwnWeights { embeddings: true, head: true, norms: true, biases: true, ..OwnWeights::default() }
            .install(&Setting::new(&model), &mut set)
            .unwrap();
        set.bank().bytes()
    };
    for (step, (bytes, layer)) in noted.iter().zip(&drawn).enumerate() {
        let most = 4 * (always + layers[*layer]);
        assert!(*bytes <= most, "step {step}: {bytes} bytes, expected at most {most}");
        assert!(*bytes >= always + 2 * layers[*layer], "step {step}: {bytes}");
    }
    // Beside what any sweep needs and what trains there is what is just read or written, and nothing of the other
    // layers.
    let most = sweep_bytes(&model, &waves[0]) as u64 + 4 * (always + layers[0]) + 2 * layers[0];
    assert!((top as u64) < most, "{top} bytes at most, expected {most}");

    // What was learnt in a turn is there in the next and at the end, to the bit: as if nothing had been parked.
    let mut whole = AdapterSet::new();
    OwnWeights::full().install(&Setting::new(&model), &mut whole).unwrap();
    let hooks = moe_peft::model_weights::SampledLayers::new(sampling, vec![0.25; 4]);
    let mut other = FineTune::new(&model, whole.into()).unwrap().with_hooks(hooks);
    let mut parameters = other.set().bank().parameters().unwrap();
    let options = TrainOptions { schedule: Schedule::constant(1e-3), ..options(steps) };
    moe_core::train::train(&mut other, &mut parameters, &waves, &options, &mut |_| Ok(())).unwrap();
    other.set().bank().settle(parameters).unwrap();
    let (found, expected) = (logits(task.model(), &waves[0]), logits(other.model(), &waves[0]));
    assert!(distance(&found, &logits(&model, &waves[0])) > 1e-3);
    // Weights that were not trained run in BF16 here and in f32 there.
    assert!(distance(&found, &expected) < 2e-2, "{}", distance(&found, &expected));
    let (folded, whole) =
        (Folded::on(model.checkpoint(), task.set()).unwrap(), Folded::on(model.checkpoint(), other.set()).unwrap());
    let turned: Vec<usize> = (0..4).filter(|layer| drawn.contains(layer)).collect();
    let changed = folded.changes().unwrap();
    for layer in 0..4 {
        let named = format!(".layers.{layer}.mlp.experts");
        assert_eq!(changed.changed.keys().any(|name| name.contains(&named)), turned.contains(&layer), "{layer}");
    }
    assert_eq!(changed.changed.keys().collect::<Vec<_>>(), whole.changes().unwrap().changed.keys().collect::<Vec<_>>());
    drop((folded, task));
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 0, "parked values stay behind");
}

#[test]
fn turns_go_on_after_an_interruption_with_what_was_parked() {
    let _alone = alone();
    let (model, waves) = (tuning::model("qwen2_moe"), tuning::waves(&tuning::model("qwen2_moe"), 3));
    let recipe = |steps: usize| -> Recipe {
        serde_json::from_value(serde_json::json!({
            "method": {"type": "layers", "sampling": {"layers": 1, "every": 1, "seed": 3}},
            "train": {"max_steps": steps, "epochs": 100, "schedule": {"peak": 1e-2}},
        }))
        .unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    let labels = BTreeMap::new();
    let run = |name: &str, resume: bool, stop: Option<usize>| {
        let directory = &dir.path().join(name);
        let run = TrainingRun {
            model: &model,
            waves: &waves,
            labels: &labels,
            directory,
            save_every: 1,
            resume,
            fold: FoldPrecision::Bf16,
        };
        let trained = run.train(&recipe(7), &mut |event| match event {
            RunEvent::Train { event: TrainEvent::Step { step, .. }, .. } if Some(*step) == stop => {
                Err(moe_core::Error::observer("stopped").into())
            }
            _ => Ok(()),
        });
        trained.map(|trained| {
            let saved = trained.save(&model, directory, Existing::Refuse).unwrap();
            (trained.cost.losses, std::fs::read(saved.model.unwrap().join("model.safetensors")).unwrap())
        })
    };
    let whole = run("whole", false, None).unwrap();
    assert!(run("cut", false, Some(5)).is_err());
    let resumed = run("cut", true, None).unwrap();
    assert_eq!(whole.0, resumed.0);
    assert!(whole.1 == resumed.1, "the resumed run wrote other weights");
    let parked = |name: &str| {
        let entries = std::fs::read_dir(dir.path().join(name)).unwrap();
        entries.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("parked")).count()
    };
    assert_eq!((parked("whole"), parked("cut")), (0, 0));
}

#[test]
fn the_best_values_of_layers_that_take_turns_can_be_kept() {
    let _alone = alone();
    let (model, waves) = (tuning::model("qwen2_moe"), tuning::waves(&tuning::model("qwen2_moe"), 3));
    let dir = tempfile::tempdir().unwrap();
    for saved in [false, true] {
        let mut set = AdapterSet::new();
        let turns = LayerTurns {
            sampling: LayerSampling { layers: 1, every: 1, ..LayerSampling::default() },
            projection: None,
        };
        let installed = turns.install(&Setting::new(&model).with_waves(&waves), &mut set).unwrap();
        let mut task = FineTune::new(&model, set.into())
            .unwrap()
            .with_hooks(installed.hooks.unwrap())
            .with_evaluation(waves[..1].to_vec());
        let mut parameters = task.set().bank().parameters().unwrap();
        let options = TrainOptions {
            // so fast that it soon gets worse
            schedule: Schedule::constant(0.1),
            evaluate_every: Some(1),
            keep: moe_core::train::Keep::Best,
            explosion: None,
            ..options(6)
        };
        let saving = Saving::new(dir.path().join("states"), 1);
        let saving = saved.then_some(&saving);
        let report = train_saved(&mut task, &mut parameters, &waves, &options, saving, &mut |_| Ok(())).unwrap();
        let best = report.best.unwrap();
        assert!(best.step < 6, "{report:?}");
        task.set().bank().settle(parameters).unwrap();
        let found = loss(task.model(), &waves[0]) / waves[0].loss_tokens() as f64;
        assert!((found - best.value).abs() < 1e-6, "{found} {best:?}");
    }
}

#[test]
fn the_warm_up_of_blocks_holds_sums_by_block_and_no_gradient() {
    let _alone = alone();
    let (model, waves) = (tiny_moe(), rows());
    let blocks = Some(BlockBudget::Blocks(8));
    let smt = Smt { block: 32, attention: blocks, feed_forward: blocks, warmup_steps: 3, ..Smt::default() };
    let values: u64 = layer_bytes(&model).iter().sum::<u64>() / 4;
    let without = sweep_bytes(&model, &waves[0]);
    let on = Setting::new(&model).with_waves(&waves);
    let (top, (set, scores)) = peak(|| {
        let scores = moe_peft::smt::sum_gradients(&smt, &on, smt.warmup_steps).unwrap();
        let mut set = AdapterSet::new();
        smt.install(&on, &mut set).unwrap();
        (set, scores)
    });
    let sums: usize = scores.arrays().map(|(_, sums)| 4 * sums.len()).sum();
    let targeted = trainable_tensors::linear_maps(model.checkpoint()).into_iter().filter(|map| smt.targets(map.site));
    let expected: usize = targeted.map(|map| 4 * map.dims.iter().map(|n| n.div_ceil(32)).product::<usize>()).sum();
    assert_eq!(sums, expected);
    // Gradients alone would be 4 bytes per value, full fine-tuning 16; the rest is what is read at a time.
    assert!(((top - without) as u64) < 2 * values, "{top} bytes, {without} without, for {values} values");
    assert_eq!(set.bank().bytes(), 4 * set.bank().values() as u64);
    // The scores that need every value say what they cost.
    let l2 = Smt { score: BlockScore::L2, ..smt };
    let (top, _) = peak(|| moe_peft::smt::sum_gradients(&l2, &on, 1).unwrap());
    assert!((top - without) as u64 > 3 * values, "{top} bytes, {without} without, for {values} values");
}

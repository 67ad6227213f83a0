use std::path::{Path, PathBuf};

use moe_checkpoint::{Dtype, ExpertPart, ExpertTensor, WriteOptions, encode, write};
use moe_core::data::Sequence;
use moe_core::device::device;
use moe_core::host::HostView;

use super::*;
use crate::testing::{Selected, noise};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity/tf4/qwen2_moe")
}

/// The fixture with noise on all its experts.
fn tuned(base: &Checkpoint, dir: &Path, seed: u64) -> Arc<Checkpoint> {
    std::fs::create_dir_all(dir).unwrap();
    for entry in std::fs::read_dir(base.dir()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
    let file = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    for layer in &base.shape().layers {
        for expert in 0..layer.num_experts() {
            for tensor in [ExpertTensor::Gate(expert), ExpertTensor::Up(expert), ExpertTensor::Down(expert)] {
                let name = base.expert_tensor_name(layer.layer, tensor);
                let old = base.bytes(&name).unwrap().to_vec();
                let values = base.tensor_f32(&name).unwrap();
                let shift = noise(values.len(), seed * 1000 + layer.layer as u64 * 100 + expert as u64);
                let moved: Vec<f32> = values.iter().zip(shift).map(|(v, n)| v + 0.3 * n).collect();
                let mut new = Vec::new();
                assert!(encode(Dtype::F32, &moved, &mut new));
                let at = bytes.windows(old.len()).position(|window| window == old).unwrap();
                bytes[at..at + old.len()].copy_from_slice(&new);
            }
        }
    }
    std::fs::write(file, bytes).unwrap();
    Arc::new(Checkpoint::open(dir).unwrap())
}

fn wave(id: u64) -> Wave {
    let ids = (0..24).map(|i| ((i * i * 5 + i * 3 + 17 * id as usize) % 90) as u32).collect();
    Wave { id, sequences: vec![Sequence::new(ids)] }
}

/// The wave that gradients are taken on: hardly a token of it is undecided between two experts.
const TAUGHT: u64 = 4;

struct World {
    _dir: tempfile::TempDir,
    base: Model,
    tuned: Vec<Arc<Checkpoint>>,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let base = Model::open(fixture(), &device("flex").unwrap(), None).unwrap();
    let tuned = (1..3).map(|seed| tuned(base.checkpoint(), &dir.path().join(seed.to_string()), seed)).collect();
    World { _dir: dir, base, tuned }
}

impl World {
    fn coefficients(&self, granularity: Granularity, chunks: usize) -> Coefficients {
        Coefficients::new(self.base.checkpoint(), self.tuned.clone(), granularity, chunks, 0.3)
    }

    fn teacher(&self) -> Teacher {
        let task = Task { tuned: self.tuned[1].clone(), waves: vec![wave(TAUGHT)] };
        ExpertMerging { top: 1000, ..ExpertMerging::default() }.teacher(&self.base, &task).unwrap()
    }
}

#[test]
fn gradients_are_those_of_difference_quotients() {
    const STEP: f64 = 1e-3;
    let world = world();
    let teacher = world.teacher();
    for (granularity, chunks) in [(Granularity::Layer, 1), (Granularity::Layer, 3), (Granularity::Expert, 2)] {
        let coefficients = world.coefficients(granularity, chunks);
        let logit_loss = |coefficients: &Coefficients| {
            let student = coefficients.clone().of(&world.base).unwrap();
            let (engine, mut selected) = (Engine::new(&student, EngineOptions::default()), Selected::default());
            let report = engine.run_with(&wave(TAUGHT), &mut Distillation::new(&teacher.logits), &mut selected);
            (report.unwrap().loss.unwrap(), selected.0)
        };
        let hidden = |coefficients: &Coefficients| {
            let student = coefficients.clone().of(&world.base).unwrap();
            let mut gradients = coefficients.gradients();
            let mut observer = HiddenGradients::new(coefficients, &mut gradients, &teacher.hidden[&TAUGHT], 100.0);
            Engine::new(&student, EngineOptions::default()).run(&wave(TAUGHT), &mut observer).unwrap();
            (observer.loss, gradients)
        };
        let student = coefficients.clone().of(&world.base).unwrap();
        let mut gradients = coefficients.gradients();
        let mut observer = LogitGradients::new(&coefficients, &mut gradients, 1.0);
        let engine = Engine::new(&student, EngineOptions::default());
        engine.run_with(&wave(TAUGHT), &mut Distillation::new(&teacher.logits), &mut observer).unwrap();
        let hidden_gradients = hidden(&coefficients).1;
        let last = world.base.config().layers.len() - 1;
        let tolerance = |gradients: &BTreeMap<String, Vec<f64>>| {
            0.005 * gradients.values().flatten().fold(0.0f64, |largest, g| largest.max(g.abs()))
        };
        let (mut found_smooth, mut all, mut checked) = (0, 0, 0);
        for (name, gradient) in gradients.iter().step_by(if granularity == Granularity::Expert { 9 } else { 2 }) {
            for (at, found) in gradient.iter().enumerate() {
                let moved = |by: f64| coefficients.clone().with_value(name, at / chunks, at % chunks, 0.3 + by);
                let ([above, below], [selected, others]) = {
                    let ((above, selected), (below, others)) = (logit_loss(&moved(STEP)), logit_loss(&moved(-STEP)));
                    ([above, below], [selected, others])
                };
                all += 1;
                // Where a token leaves an expert for another, the loss jumps, and a quotient is that jump over the
                // step.
                if selected != others {
                    continue;
                }
                found_smooth += 1;
                let expected = (above - below) / (2.0 * STEP);
                assert!(
                    (found - expected).abs() < tolerance(&gradients),
                    "{granularity:?} {chunks}, {name} {at}: {found}, expected {expected}"
                );
                // Only the last term of the hidden states depends on the layer before the last, through that layer
                // alone.
                if name.starts_with(&format!("layer.{}.", last - 1)) {
                    let found = hidden_gradients[name][at];
                    let expected = (hidden(&moved(STEP)).0 - hidden(&moved(-STEP)).0) / (2.0 * STEP);
                    let close = (found - expected).abs() < tolerance(&hidden_gradients);
                    assert!(close, "{granularity:?} {chunks}, {name} {at}: {found}, expected {expected}");
                    checked += 1;
                }
            }
        }
        assert!(5 * found_smooth >= 4 * all && checked > 0, "{granularity:?} {chunks}: {found_smooth} of {all}");
    }
}

#[test]
fn a_merged_tensor_is_the_base_and_chunks_of_task_vectors() {
    let world = world();
    let coefficients = world.coefficients(Granularity::Layer, 3).with_value("layer.1.up", 0, 1, 0.9).with_value(
        "layer.1.up",
        1,
        2,
        0.05,
    );
    let layer = world.base.checkpoint().shape().layer(1).unwrap();
    let length = layer.widths[0] * world.base.config().hidden_size;
    let chunk = (length * layer.num_experts()).div_ceil(3);
    for expert in 0..layer.num_experts() {
        let of = |checkpoint: &Checkpoint| checkpoint.expert(1, expert).unwrap().part(ExpertPart::Up).unwrap().to_vec();
        let (base, first, second) = (of(world.base.checkpoint()), of(&world.tuned[0]), of(&world.tuned[1]));
        let found = coefficients.expert(1, expert).unwrap().up;
        for i in 0..length {
            let at = (expert * length + i) / chunk;
            let (a, b) = ([0.3, 0.9, 0.3][at], [0.3, 0.3, 0.05][at]);
            let expected = base[i] + a * (first[i] - base[i]) + b * (second[i] - base[i]);
            assert!((found[i] - expected).abs() < 1e-5, "{expert} {i}");
        }
    }
    let values = coefficients.values();
    assert!(values.values().flatten().all(|c| *c > 0.0 && *c < 1.0));
    // Nearly all of one task, nothing of the other: that model.
    let names: Vec<String> = coefficients.raw().keys().cloned().collect();
    let one = names.iter().fold(world.coefficients(Granularity::Layer, 1), |all, name| {
        all.with_value(name, 0, 0, 1.0 - 1e-7).with_value(name, 1, 0, 1e-7)
    });
    let (found, expected) = (one.expert(2, 1).unwrap(), world.tuned[0].expert(2, 1).unwrap());
    assert!(found.down.iter().zip(&expected.down).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[test]
fn learning_moves_towards_the_tasks_and_writes_what_it_shows() {
    let world = world();
    let mut options = ExpertMerging { top: 1000, gamma: 0.01, ..ExpertMerging::default() };
    options.train.epochs = 12;
    options.train.waves_per_step = 2;
    options.train.schedule.peak = 0.2;
    let tasks: Vec<Task> = world
        .tuned
        .iter()
        .enumerate()
        .map(|(task, tuned)| {
            let waves = (0..2).map(|i| wave(10 * task as u64 + i)).collect();
            Task { tuned: tuned.clone(), waves }
        })
        .collect();
    let (coefficients, report) = options.learn(&world.base, &tasks, &mut |_| Ok(())).unwrap();
    assert!(report.best.unwrap().value < 0.9 * report.before.unwrap(), "{report:?}");
    let again = options.learn(&world.base, &tasks, &mut |_| Ok(())).unwrap();
    assert_eq!(again.0.raw(), coefficients.raw());
    assert!(coefficients.values().values().flatten().all(|c| *c > 0.0 && *c < 1.0));
    let out = world._dir.path().join("merged");
    let merged = coefficients.merged().unwrap();
    write(merged.model(), &out, &WriteOptions::default()).unwrap();
    let written = Model::open(&out, world.base.device(), None).unwrap();
    let logits = |model: &Model| {
        #[derive(Default)]
        struct Logits(Vec<f32>);
        impl Observer for Logits {
            fn needs(&self) -> Signals {
                Signals { logits: true, ..Signals::NONE }
            }
            fn logits(&mut self, _: usize, logits: &HostView, _: usize) -> moe_core::Result<()> {
                self.0.extend_from_slice(logits.as_slice());
                Ok(())
            }
        }
        let mut logits = Logits::default();
        Engine::new(model, EngineOptions::default()).run(&wave(3), &mut logits).unwrap();
        logits.0
    };
    let read = Model::new(merged.model().clone(), world.base.device(), None).unwrap();
    assert_eq!(logits(&written), logits(&read));
    let shown = coefficients.of(&world.base).unwrap();
    let (found, expected) = (logits(&written), logits(&shown));
    assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4));
    // Everything but the experts is the base's.
    let (merged, base) = (written.checkpoint(), world.base.checkpoint());
    for info in base.tensors().filter(|info| !info.name.contains(".experts.")) {
        assert_eq!(merged.bytes(&info.name).unwrap(), base.bytes(&info.name).unwrap(), "{}", info.name);
    }
    let twice = vec![tasks[0].clone(), tasks[0].clone()];
    assert!(options.learn(&world.base, &twice, &mut |_| Ok(())).unwrap_err().to_string().contains("id 0"));
    let wrong = ExpertMerging { start: 1.0, ..options };
    assert!(wrong.learn(&world.base, &tasks, &mut |_| Ok(())).unwrap_err().to_string().contains("(0, 1)"));
}

use moe_checkpoint::ProtectionMask;
use moe_core::data::Sequence;
use moe_core::device::device;
use tempfile::TempDir;

use super::*;
use crate::testing::Selected;
use crate::{Amount, CompactModel, EvidenceOptions, MergeOptions, OutputForm, Recipe, collect_evidence};

fn wave(id: u64) -> Wave {
    let ids = (0..24).map(|i| ((i * i * 5 + i * 3 + 17 * id as usize) % 90) as u32).collect();
    Wave { id, sequences: vec![Sequence::new(ids)] }
}

struct World {
    dir: TempDir,
    full: Model,
    /// Half of its sets, shared by its experts.
    merged: Model,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../moe-checkpoint/tests/fixtures/parity/tf5/qwen2_moe");
    let full = Model::open(fixture, &device("flex").unwrap(), None).unwrap();
    let recipe = Recipe::named("hc-smoe").unwrap().with_amount(Amount::Ratio(0.5));
    let evidence =
        collect_evidence(&full, &[wave(1), wave(2)], &EvidenceOptions::for_recipe(&recipe, 0), None, &mut |_| {})
            .unwrap();
    let plan = recipe.plan(full.checkpoint(), &evidence, &ProtectionMask::none()).unwrap();
    let to = dir.path().join("merged");
    let options = MergeOptions { evidence: Some(Arc::new(evidence)), ..MergeOptions::new(OutputForm::Grouped) };
    let merged = plan.on(full.checkpoint(), &options).unwrap();
    moe_checkpoint::write(merged.model(), &to, &moe_checkpoint::WriteOptions::default()).unwrap();
    let merged = Model::open(&to, full.device(), None).unwrap();
    World { dir, full, merged }
}

fn options() -> CompactTraining {
    let mut options = CompactTraining {
        compression: Compression { rank: 3, keep_rows: 0.25, rows: RowScore::Magnitude, ranks: Ranks::Same },
        ..CompactTraining::default()
    };
    options.train.epochs = 20;
    options.train.evaluate_every = Some(5);
    options.train.schedule.peak = 3e-3;
    options
}

impl World {
    fn run<'a>(&'a self, options: &'a CompactTraining, waves: &'a [Wave]) -> (Run<'a>, Parameters) {
        let mut recorder = Tempered::new(
            TeacherRecorder::new(self.full.config().vocab_size, usize::MAX).unwrap(),
            options.temperature,
        )
        .unwrap();
        for wave in waves {
            Engine::new(&self.full, EngineOptions::default()).run_with(wave, &mut recorder, &mut Nobody).unwrap();
        }
        Run::new(options, &self.merged, recorder.into_inner().finish(), waves).unwrap()
    }
}

#[test]
fn gradients_are_those_of_difference_quotients() {
    let (world, options, waves) = (world(), options(), [wave(4)]);
    let (mut run, mut parameters) = world.run(&options, &waves);
    let found = run.accumulate(&waves[0], &mut parameters).unwrap();
    assert!(found.loss > 0.0);
    let loss = |run: &mut Run<'_>, parameters: &Parameters| {
        run.update(parameters).unwrap();
        let engine = Engine::new(&run.student, EngineOptions::default());
        let mut selected = Selected::default();
        let report = engine.run_with(&waves[0], &mut run.objective().unwrap(), &mut selected).unwrap();
        (report.loss.unwrap(), selected)
    };
    let names: Vec<String> = parameters.iter().map(|(name, _)| name.to_string()).collect();
    let mut checked = [0; 3];
    // Each parameter along its own gradient, where the quotient is the gradient's norm.
    for name in names.iter().step_by(7) {
        let parameter = parameters.get(name).unwrap();
        let (values, gradient) = (parameter.values.clone(), parameter.gradient().to_vec());
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        if norm < 0.05 {
            continue;
        }
        const STEP: f64 = 2e-3;
        let mut at = |by: f64| {
            let into = parameters.get_mut(name).unwrap();
            let moved = values.iter().zip(&gradient).map(|(v, g)| v + (by * f64::from(*g) / norm) as f32);
            into.values = moved.collect();
            loss(&mut run, &parameters)
        };
        let ((above, selected), (below, others)) = (at(STEP), at(-STEP));
        parameters.get_mut(name).unwrap().values = values;
        if selected != others {
            continue;
        }
        let quotient = (above - below) / (2.0 * STEP);
        assert!((quotient - norm).abs() < 0.02 * norm, "{name}: {quotient}, expected {norm}");
        let factor = [LEFT, RIGHT, SPARSE].iter().position(|factor| name.ends_with(factor)).unwrap();
        checked[factor] += 1;
    }
    assert!(checked.iter().all(|checked| *checked > 2), "{checked:?}");
}

#[test]
fn rows_go_as_the_schedule_says_and_by_smoothed_importance() {
    let (world, options, waves) = (world(), options(), [wave(4)]);
    let (mut run, mut parameters) = world.run(&options, &waves);
    run.accumulate(&waves[0], &mut parameters).unwrap();
    let rows: usize = run.experts.iter().flat_map(parts).map(|matrix| matrix.rows).sum();
    let zeros = |parameters: &Parameters, run: &Run<'_>| -> usize {
        let zero = |at: usize, part: usize, cols: usize| {
            let sparse = parameters.get(&name(&run.sets[at], part, SPARSE)).unwrap();
            sparse.values.chunks_exact(cols).filter(|row| row.iter().all(|v| *v == 0.0)).count()
        };
        let parts = |at: usize| parts(&run.experts[at]).into_iter().enumerate();
        (0..run.sets.len()).flat_map(|at| parts(at).map(move |(part, m)| zero(at, part, m.cols))).sum()
    };
    let before = zeros(&parameters, &run);
    run.steps = 100;
    run.gradients(1, 0.5, &mut parameters).unwrap();
    // By hand, of the first matrix.
    let sparse = parameters.get(&name(&run.sets[0], 0, SPARSE)).unwrap();
    let cols = run.experts[0].gate.cols;
    let mean: f64 =
        (0..cols).map(|i| (f64::from(sparse.values[i]) * f64::from(sparse.gradient()[i])).abs()).sum::<f64>();
    let first = run.importance.clone().unwrap();
    assert!((first[0][0] - 0.5 * mean / cols as f64).abs() < 1e-12);
    // Gradients of zero smooth it away by a factor.
    run.after_step(1, &mut parameters).unwrap();
    assert_eq!(zeros(&parameters, &run), before);
    parameters.clear_gradients();
    run.gradients(2, 0.5, &mut parameters).unwrap();
    assert!((run.importance.as_ref().unwrap()[0][0] - 0.85 * first[0][0]).abs() < 1e-12);
    for step in [10, 11, 35, 60, 100] {
        run.after_step(step, &mut parameters).unwrap();
        let keep = options.compression.keep_at(step, 100, 10, 40);
        let kept = (rows as f64 * keep).floor() as usize;
        assert_eq!(rows - zeros(&parameters, &run), kept.min(rows - before), "{step}");
    }
    // The rows that are left are the most important ones.
    let kept = kept_rows(&first, 0.25);
    for (at, set) in run.sets.iter().enumerate() {
        let sparse = parameters.get(&name(set, 2, SPARSE)).unwrap();
        let there = |row: &u32| sparse.values[*row as usize * run.experts[at].down.cols..].iter().any(|v| *v != 0.0);
        assert!(kept[3 * at + 2].iter().all(there));
    }
}

#[test]
fn training_recovers_and_is_stored_as_it_was_evaluated() {
    let (world, options) = (world(), options());
    let (training, evaluation) = ([wave(4), wave(5), wave(6)], [wave(7)]);
    let fit = |to: &str| {
        let to = world.dir.path().join(to);
        let fitted =
            options.fit(&world.full, &world.merged, &training, &evaluation, &to, false, &mut |_| Ok(())).unwrap();
        (fitted, CompactModel::open(&to).unwrap())
    };
    let (fitted, compact) = fit("compact");
    let (before, best) = (fitted.train.before.unwrap(), fitted.train.best.unwrap().value);
    assert!(best < 0.98 * before, "{fitted:?}");
    assert_eq!(fitted.compact.rows_kept, fitted.compact.rows / 4);
    assert!(fitted.compact.bytes_after < fitted.compact.bytes_before);
    let (again, other) = fit("again");
    assert_eq!(again, fitted);
    let last = world.merged.checkpoint().shape().layers.last().unwrap().layer;
    assert_eq!(other.expert(last, 1).unwrap(), compact.expert(last, 1).unwrap());

    // The stored model has the loss that training says it has.
    let (run, _) = world.run(&options, &evaluation);
    let formed = compact.on(world.merged.checkpoint(), Some(moe_checkpoint::Dtype::F32)).unwrap();
    let shown = Model::new(formed.model().clone(), world.merged.device(), None).unwrap();
    let engine = Engine::new(&shown, EngineOptions::default());
    let report = engine.run_with(&evaluation[0], &mut run.objective().unwrap(), &mut Nobody).unwrap();
    let found = report.loss.unwrap() / report.loss_tokens as f64;
    assert!((found - best).abs() < 1e-4, "{found}, expected {best}");
}

#[test]
fn parameters_out_of_range_are_named() {
    let message = |options: CompactTraining| options.validate().unwrap_err().to_string();
    assert!(options().validate().is_ok());
    assert!(message(CompactTraining { warm_up: 0.7, cool_down: 0.4, ..options() }).contains("1 together"));
    assert!(message(CompactTraining { temperature: 0.0, ..options() }).contains("temperature"));
    assert!(message(CompactTraining { task: 0.0, distillation: 0.0, ..options() }).contains("one above 0"));
    let fisher = Compression { rows: RowScore::Fisher, ..options().compression };
    assert!(message(CompactTraining { compression: fisher, ..options() }).contains("importances itself"));
    let unequal = Compression { ranks: Ranks::Importance, ..options().compression };
    assert!(message(CompactTraining { compression: unequal, ..options() }).contains("one rank"));
}

use std::collections::BTreeSet;

use super::*;
use crate::data::Sequence;
use crate::train::{
    Adan, Decay, Explosion, JsonLines, Keep, Lamb, Lion, Optimizer, Parameter, ParameterGroup, Projection, Schedule,
    StateArray, TaskState,
};

/// Each wave pulls `w` towards the value of its first token; the figure is the distance from 3.
#[derive(Default)]
struct Pull {
    w: f32,
    seen: Vec<u64>,
    updates: usize,
    /// Loss of each step, instead of the distance.
    losses: Vec<f64>,
}

impl TrainingTask for Pull {
    fn accumulate(&mut self, wave: &Wave, parameters: &mut Parameters) -> Result<BatchLoss> {
        self.seen.push(wave.id);
        let difference = self.w - wave.sequences[0].ids[0] as f32;
        let tokens = wave.loss_tokens();
        parameters.gradient_mut("w").unwrap()[0] += difference * tokens as f32;
        let loss = self.losses.get(self.seen.len() - 1).copied();
        Ok(BatchLoss { loss: loss.unwrap_or(f64::from(difference * difference) / 2.0) * tokens as f64, tokens })
    }
    fn update(&mut self, parameters: &Parameters) -> Result<()> {
        self.w = parameters.get("w").unwrap().values[0];
        self.updates += 1;
        Ok(())
    }
    fn evaluate(&mut self, _: &mut Parameters) -> Result<f64> {
        Ok(f64::from((self.w - 3.0).abs()))
    }
}

fn waves() -> Vec<Wave> {
    (0..6u64).map(|id| Wave { id, sequences: vec![Sequence::new(vec![3 + (id % 2) as u32 * 2, 0])] }).collect()
}

fn start() -> Parameters {
    let mut parameters = Parameters::new();
    parameters.insert("w", vec![0.0]);
    parameters
}

fn pull(options: &TrainOptions) -> (Pull, Parameters, TrainReport, Vec<TrainEvent>) {
    let (mut task, mut parameters, mut events) = (Pull::default(), start(), Vec::new());
    let mut log = |event: &TrainEvent| {
        events.push(event.clone());
        Ok(())
    };
    let report = train(&mut task, &mut parameters, &waves(), options, &mut log).unwrap();
    (task, parameters, report, events)
}

fn options() -> TrainOptions {
    let schedule = Schedule { peak: 0.5, warmup: 0.0, ..Schedule::default() };
    let evaluate_every = Some(1);
    TrainOptions { epochs: 10, waves_per_step: 4, schedule, evaluate_every, seed: 7, ..TrainOptions::default() }
}

#[test]
fn the_best_parameters_are_kept() {
    let (task, parameters, report, events) = pull(&options());
    assert_eq!((report.steps, report.stop, report.before), (20, Stop::Finished, Some(3.0)));
    // the waves pull towards 4, the figure is best at 3
    let best = report.best.unwrap();
    assert!(best.value < 0.3 && best.value < report.last.unwrap(), "{report:?}");
    assert!((f64::from((task.w - 3.0).abs()) - best.value).abs() < 1e-6);
    assert_eq!(parameters.get("w").unwrap().values, [task.w]);
    let lowest = events.iter().filter_map(|event| match event {
        TrainEvent::Evaluation { value, .. } => Some(*value),
        _ => None,
    });
    assert_eq!(lowest.fold(f64::INFINITY, f64::min), best.value);
    assert_eq!(task.updates, 22);
    assert_eq!(events.last(), Some(&TrainEvent::Stopped { step: 20, stop: Stop::Finished }));

    let (task, parameters, last, _) = pull(&TrainOptions { keep: Keep::Last, ..options() });
    assert_eq!((last.best, last.last), (report.best, report.last));
    assert!((f64::from((task.w - 3.0).abs()) - last.last.unwrap()).abs() < 1e-6);
    let (_, same, never, events) = pull(&TrainOptions { evaluate_every: None, ..options() });
    assert_eq!((never.before, never.last, never.best), (None, None, None));
    assert_eq!((same.get("w"), events.len()), (parameters.get("w"), 21));
}

#[test]
fn epochs_are_shuffled_by_the_seed_and_runs_repeat() {
    let (first, parameters, report, events) = pull(&options());
    let (again, same_parameters, same_report, same_events) = pull(&options());
    assert_eq!((&first.seen, &parameters, &report), (&again.seen, &same_parameters, &same_report));
    assert_eq!(events.len(), same_events.len());
    for epoch in first.seen.chunks(6) {
        assert_eq!(epoch.iter().copied().collect::<BTreeSet<u64>>(), (0..6).collect());
    }
    assert_ne!(first.seen[..6], first.seen[6..12]);
    assert_ne!(first.seen, pull(&TrainOptions { seed: 8, ..options() }).0.seen);
    match events[1].clone() {
        TrainEvent::Step { step, steps, loss, gradient_norm, learning_rate, tokens, tokens_per_second, .. } => {
            let values: f64 = first.seen[..4].iter().map(|id| 3.0 + (id % 2) as f64 * 2.0).sum::<f64>() / 4.0;
            assert_eq!((step, steps, tokens), (1, 20, 4));
            assert!((gradient_norm - values).abs() < 1e-6 && loss > 0.0 && learning_rate <= 0.5);
            assert!(tokens_per_second > 0.0);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn training_stops_early() {
    let (task, _, report, events) = pull(&TrainOptions { patience: Some(3), ..options() });
    let best = report.best.unwrap();
    assert_eq!((report.stop, report.steps), (Stop::Patience, best.step + 3));
    assert!((f64::from((task.w - 3.0).abs()) - best.value).abs() < 1e-6);
    assert_eq!(events.last(), Some(&TrainEvent::Stopped { step: report.steps, stop: Stop::Patience }));
    let (_, _, report, _) = pull(&TrainOptions { max_steps: Some(5), ..options() });
    assert_eq!((report.stop, report.steps), (Stop::Finished, 5));
}

#[test]
fn a_loss_that_is_no_number_or_explodes_stops_with_the_best_values() {
    let run = |losses: Vec<f64>, options: &TrainOptions| {
        let (mut task, mut parameters) = (Pull { losses, ..Pull::default() }, start());
        let error = train(&mut task, &mut parameters, &waves(), options, &mut |_| Ok(())).unwrap_err();
        (error.to_string(), parameters.get("w").unwrap().values[0], task.w)
    };
    // the rate is so low that every step is better than the one before: the last good values are those after step 8
    let options = TrainOptions { waves_per_step: 1, schedule: Schedule::constant(0.01), ..options() };
    let eight = pull(&TrainOptions { max_steps: Some(8), ..options.clone() }).0.w;
    let mut losses = vec![1.0; 9];
    losses[8] = f64::NAN;
    let (message, kept, seen) = run(losses, &options);
    assert!(message.contains("training diverged at step 9: the loss of wave"), "{message}");
    assert!(message.contains("NaN") && message.contains("no state was saved"), "{message}");
    assert_eq!((kept, seen), (eight, eight));

    let explosion = Some(Explosion { factor: 2.0, steps: 3, window: 4 });
    let mut losses = vec![1.0; 12];
    losses[8..].fill(5.0);
    let (message, ..) = run(losses.clone(), &TrainOptions { explosion, ..options.clone() });
    assert!(message.contains("step 11: the loss is 5.0 times its running mean, for 3 steps"), "{message}");
    // two steps are not three
    losses.splice(10.., [1.0; 50]);
    let (mut task, mut parameters) = (Pull { losses, ..Pull::default() }, start());
    train(&mut task, &mut parameters, &waves(), &TrainOptions { explosion, ..options }, &mut |_| Ok(())).unwrap();
}

#[test]
fn bad_options_are_named_before_anything_runs() {
    let mut task = Pull::default();
    let mut message = |options: TrainOptions, waves: &[Wave], mut parameters: Parameters| {
        train(&mut task, &mut parameters, waves, &options, &mut |_| Ok(())).unwrap_err().to_string()
    };
    assert!(message(TrainOptions { epochs: 0, ..options() }, &waves(), start()).contains("epochs"));
    assert!(message(TrainOptions { clip: Some(-1.0), ..options() }, &waves(), start()).contains("clip"));
    assert!(message(TrainOptions { max_steps: Some(0), ..options() }, &waves(), start()).contains("max_steps"));
    let patience = TrainOptions { patience: Some(2), evaluate_every: None, ..options() };
    assert!(message(patience, &waves(), start()).contains("patience"));
    let explosion = Some(Explosion { factor: 1.0, ..Explosion::default() });
    assert!(message(TrainOptions { explosion, ..options() }, &waves(), start()).contains("factor of explosion"));
    let group =
        |pattern: &str, projection| ParameterGroup { pattern: pattern.into(), projection, ..Default::default() };
    let groups = vec![group("v*", None)];
    assert!(message(TrainOptions { groups, ..options() }, &waves(), start()).contains("found v*"));
    let (groups, optimizer) = (vec![group("w", Some(Projection::default()))], Optimizer::Lamb(Lamb::default()));
    assert!(
        message(TrainOptions { groups, optimizer, ..options() }, &waves(), start()).contains("projection of group w")
    );
    assert!(message(options(), &[], start()).contains("training waves"));
    assert!(message(options(), &waves(), Parameters::new()).contains("trainable parameters"));
    assert_eq!(task.updates, 0);
}

#[test]
fn options_are_json() {
    let json = r#"{"optimizer": {"type": "lamb", "weight_decay": 0.01}, "evaluate_every": null, "max_steps": 7,
        "groups": [{"pattern": "*.router", "learning_rate": 0.1, "projection": {"rank": 4}}]}"#;
    let options: TrainOptions = serde_json::from_str(json).unwrap();
    assert_eq!(options.optimizer, Optimizer::Lamb(Lamb { weight_decay: 0.01, ..Lamb::default() }));
    assert_eq!((options.evaluate_every, options.max_steps, options.groups[0].learning_rate), (None, Some(7), 0.1));
    assert_eq!(serde_json::from_str::<TrainOptions>(&serde_json::to_string(&options).unwrap()).unwrap(), options);
    assert!(serde_json::from_str::<TrainOptions>(r#"{"optimizer": {"type": "adamw", "beta3": 0.1}}"#).is_err());
}

/// A task of everything that a state has to bring back: one of two matrices is active at a time, chosen by a generator
/// of its own; a bias moves by rule; after step 5 a parameter goes and another comes; values are lent for every sweep.
#[derive(Default)]
struct Busy {
    generator: u64,
    sums: Vec<f32>,
}

impl Busy {
    fn names(parameters: &Parameters) -> Vec<String> {
        parameters.iter().map(|(name, _)| name.to_string()).filter(|name| name != "bias").collect()
    }

    fn start() -> Parameters {
        let values = |seed: usize| (0..24).map(|i| ((i * 7 + seed) % 11) as f32 / 11.0 - 0.4).collect::<Vec<f32>>();
        let mut parameters = Parameters::new();
        for (seed, name) in ["a", "b", "early"].into_iter().enumerate() {
            let parameter = Parameter::with_shape(values(seed), [2, 4, 3]).unwrap().in_groups(2).unwrap();
            parameters.add(name, parameter);
        }
        parameters.insert("bias", vec![0.0; 3]);
        parameters.set_active("bias", false).unwrap();
        parameters
    }
}

impl TrainingTask for Busy {
    fn before_step(&mut self, step: usize, parameters: &mut Parameters) -> Result<()> {
        self.generator = self.generator.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let first = self.generator >> 63 == 0;
        parameters.set_active("a", first)?;
        parameters.set_active("b", !first)?;
        if step == 4 {
            parameters.drop_state("a")?;
        }
        if step == 6 {
            let early = parameters.remove("early").expect("there until now");
            parameters.insert("late", early.values[..5].to_vec());
        }
        Ok(())
    }

    fn accumulate(&mut self, wave: &Wave, parameters: &mut Parameters) -> Result<BatchLoss> {
        let mut loss = 0.0;
        for name in Self::names(parameters) {
            let values = parameters.lend_values(&name)?;
            if let Some(mut gradient) = parameters.lend_gradient(&name)? {
                for (i, (g, w)) in gradient.iter_mut().zip(&values).enumerate() {
                    let difference = w - ((i + wave.id as usize) % 5) as f32 / 7.0;
                    *g += difference;
                    loss += f64::from(difference).powi(2);
                }
                parameters.return_gradient(&name, gradient)?;
            }
            parameters.return_values(&name, values)?;
        }
        Ok(BatchLoss { loss, tokens: wave.loss_tokens() })
    }

    fn after_step(&mut self, step: usize, parameters: &mut Parameters) -> Result<()> {
        parameters.get_mut("bias").expect("always there").values[step % 3] += 0.1;
        Ok(())
    }

    fn update(&mut self, parameters: &Parameters) -> Result<()> {
        self.sums = parameters.iter().map(|(_, parameter)| parameter.values.iter().sum()).collect();
        Ok(())
    }

    fn evaluate(&mut self, parameters: &mut Parameters) -> Result<f64> {
        let sum: f32 = parameters.iter().filter(|(name, _)| *name != "bias").flat_map(|(_, p)| &p.values).sum();
        Ok(f64::from((sum - 1.0).abs()))
    }

    fn state_save(&self) -> Result<TaskState> {
        let sums = StateArray { shape: vec![self.sums.len()], values: self.sums.clone() };
        let json = serde_json::json!({ "generator": self.generator });
        Ok(TaskState { json, arrays: [("sums".to_string(), sums)].into() })
    }

    fn state_load(&mut self, state: TaskState, _: &mut Parameters) -> Result<()> {
        self.generator = state.json["generator"].as_u64().expect("written above");
        self.sums = state.arrays["sums"].values.clone();
        Ok(())
    }
}

/// Parameters with their states, the task and the events without what depends on time, as one text of exact numbers.
fn everything(task: &Busy, parameters: &Parameters, report: &TrainReport, events: &[TrainEvent]) -> String {
    let events: Vec<TrainEvent> = events
        .iter()
        .map(|event| match event.clone() {
            TrainEvent::Step {
                step, steps, loss, gradient_norm, learning_rate, auxiliary, tokens, tokens_run, ..
            } => TrainEvent::Step {
                step,
                steps,
                loss,
                gradient_norm,
                learning_rate,
                auxiliary,
                tokens,
                tokens_run,
                tokens_per_second: 0.0,
                peak_memory: 0,
                seconds: 0.0,
                eta_seconds: 0.0,
            },
            other => other,
        })
        .collect();
    let of = |(name, p): (&str, &Parameter)| format!("{name} {:?} {:?} {}\n", p.values, p.state(), p.is_active());
    let parameters: String = parameters.iter().map(of).collect();
    format!("{parameters}\n{} {:?}\n{report:?}\n{events:?}", task.generator, task.sums)
}

/// Runs until an event is refused, or to the end.
fn busy(options: &TrainOptions, saving: &Saving, refuse: &dyn Fn(&TrainEvent) -> bool) -> Option<String> {
    let (mut task, mut parameters, mut events) = (Busy::default(), Busy::start(), Vec::new());
    let mut log = |event: &TrainEvent| {
        if refuse(event) {
            return Err(Error::observer("killed"));
        }
        events.push(event.clone());
        Ok(())
    };
    let report = train_saved(&mut task, &mut parameters, &waves(), options, Some(saving), &mut log).ok()?;
    Some(everything(&task, &parameters, &report, &events))
}

fn busy_options(optimizer: Optimizer) -> TrainOptions {
    let projection =
        matches!(optimizer, Optimizer::AdamW(_)).then_some(Projection { rank: 2, gap: 3, ..Default::default() });
    let group = |pattern: &str| ParameterGroup { pattern: pattern.into(), later: true, ..Default::default() };
    let groups = vec![
        ParameterGroup { projection, ..group("a") },
        ParameterGroup { learning_rate: 0.5, weight_decay: false, ..group("late") },
    ];
    let schedule = Schedule { peak: 0.07, decay: Decay::Linear, warmup: 0.2, ..Schedule::default() };
    let explosion = Some(Explosion::default());
    let (evaluate_every, waves_per_step) = (Some(2), 4);
    TrainOptions {
        epochs: 5,
        waves_per_step,
        schedule,
        optimizer,
        groups,
        evaluate_every,
        explosion,
        ..Default::default()
    }
}

#[test]
fn a_run_that_is_cut_off_anywhere_goes_on_bit_by_bit() {
    let optimizers = [
        Optimizer::default(),
        Optimizer::Lamb(Lamb { weight_decay: 0.1, ..Lamb::default() }),
        Optimizer::Lion(Lion::default()),
        Optimizer::Adan(Adan::default()),
    ];
    for optimizer in optimizers {
        let options = busy_options(optimizer);
        let directory = tempfile::tempdir().unwrap();
        let saving = |name: String, every| Saving::new(directory.path().join(name), every);
        let whole = busy(&options, &saving("whole".into(), 2), &|_| false).unwrap();
        let mut unsaved = (Busy::default(), Busy::start());
        train(&mut unsaved.0, &mut unsaved.1, &waves(), &options, &mut |_| Ok(())).unwrap();
        assert!(whole.contains(&format!("bias {:?}", unsaved.1.get("bias").unwrap().values)));
        for step in 1..=10 {
            let kills: [&dyn Fn(&TrainEvent) -> bool; 3] = [
                &|event| matches!(event, TrainEvent::Step { step: s, .. } if *s == step),
                &|event| matches!(event, TrainEvent::Evaluation { step: s, .. } if *s == step),
                &|event| matches!(event, TrainEvent::Saved { step: s } if *s == step),
            ];
            for (kind, kill) in kills.into_iter().enumerate() {
                let saving = saving(format!("{step}-{kind}"), 2);
                let killed = busy(&options, &saving, kill);
                assert_eq!(killed.is_none(), kind == 0 || step % 2 == 0, "step {step}, kind {kind}");
                assert_eq!(
                    busy(&options, &saving, &|_| false).unwrap(),
                    whole,
                    "step {step}, kind {kind}, {optimizer:?}"
                );
                // and once more, though nothing is left to do
                assert_eq!(busy(&options, &saving, &|_| false).unwrap(), whole);
            }
        }
        // killed after every state
        let saving = saving("often".into(), 1);
        for step in 1..=10 {
            let kill = |event: &TrainEvent| matches!(event, TrainEvent::Saved { step: s } if *s == step);
            assert!(busy(&options, &saving, &kill).is_none());
        }
        let last = busy(&options, &saving, &|_| false).unwrap();
        assert_eq!(last.split('\n').next(), whole.split('\n').next());
    }
}

#[test]
fn what_a_killed_process_left_is_no_state() {
    let options = busy_options(Optimizer::default());
    let directory = tempfile::tempdir().unwrap();
    let saving = Saving::new(directory.path(), 2);
    let whole = busy(&options, &Saving::new(directory.path().join("whole"), 2), &|_| false).unwrap();
    assert!(busy(&options, &saving, &|event| matches!(event, TrainEvent::Step { step: 5, .. })).is_none());
    // tensors of step 6 without their JSON file, and half-written files
    for name in ["step-000006.safetensors", "step-000006.safetensors.tmp", ".step-000006.json.77-0.tmp"] {
        std::fs::write(directory.path().join(name), b"half of it").unwrap();
    }
    std::fs::write(directory.path().join("notes.txt"), b"mine").unwrap();
    assert_eq!(busy(&options, &saving, &|_| false).unwrap(), whole);
    let names = |directory: &std::path::Path| -> BTreeSet<String> {
        let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
        entries.filter(|e| e.path().is_file()).map(|e| e.file_name().into_string().unwrap()).collect()
    };
    let mut left = names(directory.path());
    assert!(left.remove("notes.txt") && left.remove(".lock"));
    let best: Vec<String> = left.iter().filter(|name| name.starts_with("best-")).cloned().collect();
    assert!(best.len() <= 2, "{best:?}");
    left.retain(|name| !best.contains(name));
    let expected = ["step-000008", "step-000010"].map(|s| [format!("{s}.json"), format!("{s}.safetensors")]);
    assert_eq!(left, expected.into_iter().flatten().collect());
}

#[test]
fn states_of_other_runs_are_refused_by_name() {
    let options = busy_options(Optimizer::default());
    let directory = tempfile::tempdir().unwrap();
    let saving = Saving::new(directory.path(), 2);
    busy(&options, &saving, &|_| false).unwrap();
    let message = |options: &TrainOptions, saving: &Saving, waves: &[Wave], mut parameters: Parameters| {
        let log = &mut |_: &TrainEvent| Ok(());
        train_saved(&mut Busy::default(), &mut parameters, waves, options, Some(saving), log).unwrap_err().to_string()
    };
    let ours = |options: &TrainOptions| message(options, &saving, &waves(), Busy::start());
    let found = ours(&TrainOptions { seed: 3, ..options.clone() });
    assert!(found.contains("step-000010.json: options.seed: found 0, expected 3"), "{found}");
    let mut rate = options.clone();
    rate.schedule.peak = 0.1;
    assert!(ours(&rate).contains("options.schedule.peak: found 0.07, expected 0.1"));
    let optimizer = Optimizer::Lion(Lion::default());
    let groups = Vec::new();
    assert!(ours(&TrainOptions { optimizer, groups, ..options.clone() }).contains("options.optimizer.type"));
    assert!(message(&options, &saving, &waves()[1..], Busy::start()).contains("data.waves: found 6, expected 5"));
    let mut other = waves();
    other[2].sequences[0].ids[1] = 9;
    assert!(message(&options, &saving, &other, Busy::start()).contains("data.digest"));
    let mut parameters = Busy::start();
    parameters.get_mut("b").unwrap().values[3] += 1.0;
    assert!(message(&options, &saving, &waves(), parameters).contains("parameters.b.start"));
    let mut parameters = Busy::start();
    parameters.insert("c", vec![0.0]);
    assert!(message(&options, &saving, &waves(), parameters).contains("parameters.c: found nothing"));
    let fresh = Saving { resume: false, ..saving.clone() };
    assert!(message(&options, &fresh, &waves(), Busy::start()).contains("found the state of step 10"));
    let never = Saving { every: Some(0), ..saving.clone() };
    assert!(message(&options, &never, &waves(), Busy::start()).contains("every of saving"));

    // files that are cut or changed
    let tensors = directory.path().join("step-000010.safetensors");
    let bytes = std::fs::read(&tensors).unwrap();
    std::fs::write(&tensors, &bytes[..bytes.len() - 1]).unwrap();
    assert!(ours(&options).contains("length: found"));
    let mut changed = bytes.clone();
    changed[9] = b'!';
    std::fs::write(&tensors, changed).unwrap();
    let found = ours(&options);
    assert!(found.contains("step-000010.safetensors") && found.contains("header"), "{found}");
    std::fs::write(&tensors, &bytes).unwrap();
    let json = directory.path().join("step-000010.json");
    let text = std::fs::read_to_string(&json).unwrap();
    std::fs::write(&json, text.replacen("\"version\": 2", "\"version\": 9", 1)).unwrap();
    assert!(ours(&options).contains("version: found 9, expected 2"));
    std::fs::write(&json, "{").unwrap();
    assert!(ours(&options).contains("contents"));
    std::fs::write(&json, text).unwrap();
    busy(&options, &saving, &|_| false).unwrap();
}

#[test]
fn a_run_that_diverges_names_its_last_state_and_goes_on_from_it() {
    let directory = tempfile::tempdir().unwrap();
    let saving = Saving::new(directory.path(), 3);
    let options = TrainOptions { waves_per_step: 1, keep: Keep::Last, ..options() };
    let mut losses = vec![1.0; 8];
    losses[7] = f64::INFINITY;
    let (mut task, mut parameters) = (Pull { losses, ..Pull::default() }, start());
    let log = &mut |_: &TrainEvent| Ok(());
    let error =
        train_saved(&mut task, &mut parameters, &waves(), &options, Some(&saving), log).unwrap_err().to_string();
    assert!(error.contains("step 8") && error.contains("inf") && error.contains("step-000006.json"), "{error}");
    let (mut task, mut parameters) = (Pull::default(), start());
    train_saved(&mut task, &mut parameters, &waves(), &options, Some(&saving), &mut |_| Ok(())).unwrap();
    assert_eq!(parameters.get("w"), pull(&options).1.get("w"));
}

/// Never has a gradient but in the given steps, and reports a loss beside its own.
struct Idle {
    step: usize,
    gradients: Vec<usize>,
}

impl TrainingTask for Idle {
    fn before_step(&mut self, step: usize, _: &mut Parameters) -> Result<()> {
        self.step = step;
        Ok(())
    }
    fn accumulate(&mut self, wave: &Wave, parameters: &mut Parameters) -> Result<BatchLoss> {
        let gradient = if self.gradients.contains(&self.step) { 1.0 } else { 0.0 };
        parameters.gradient_mut("w").unwrap()[0] += gradient;
        Ok(BatchLoss { loss: 1.0, tokens: wave.loss_tokens() })
    }
    fn auxiliary(&mut self) -> std::collections::BTreeMap<String, f64> {
        [("balance".to_string(), self.step as f64 / 3.0)].into()
    }
    fn update(&mut self, _: &Parameters) -> Result<()> {
        Ok(())
    }
    fn evaluate(&mut self, _: &mut Parameters) -> Result<f64> {
        Ok(0.0)
    }
}

#[test]
fn training_without_any_gradient_stops_with_the_reason() {
    let run = |gradients: Vec<usize>, steps: usize| {
        let options = TrainOptions { max_steps: Some(steps), waves_per_step: 1, evaluate_every: None, ..options() };
        let mut task = Idle { step: 0, gradients };
        train(&mut task, &mut start(), &waves(), &options, &mut |_| Ok(())).map_err(|error| error.to_string())
    };
    let error = run(vec![], 40).unwrap_err();
    assert!(error.contains("1 parameters (w, ..) in the first 10 steps"), "{error}");
    assert!(run(vec![], 3).unwrap_err().contains("in the first 3 steps"));
    // experts that no token reaches for a while are no reason
    assert_eq!(run(vec![9], 40).unwrap().steps, 40);
    assert_eq!(run(vec![2], 3).unwrap().steps, 3);
}

#[test]
fn a_log_begun_anew_has_every_step_once_with_its_auxiliary_losses() {
    let directory = tempfile::tempdir().unwrap();
    let (saving, log) = (Saving::new(directory.path().join("state"), 2), directory.path().join("log.jsonl"));
    let options = TrainOptions { max_steps: Some(7), waves_per_step: 1, evaluate_every: None, ..options() };
    let run = |until: usize| {
        let mut lines = JsonLines::create(&log).unwrap();
        let mut tell = |event: &TrainEvent| {
            lines.write(event)?;
            match event {
                TrainEvent::Step { step, .. } if *step == until => Err(Error::observer("killed")),
                _ => Ok(()),
            }
        };
        let mut task = Idle { step: 0, gradients: vec![1] };
        train_saved(&mut task, &mut start(), &waves(), &options, Some(&saving), &mut tell).is_ok()
    };
    assert!(!run(5) && run(99));
    let text = std::fs::read_to_string(&log).unwrap();
    let steps: Vec<(usize, f64, u64)> = text
        .lines()
        .filter_map(|line| match serde_json::from_str(line).unwrap() {
            TrainEvent::Step { step, auxiliary, tokens_run, .. } => Some((step, auxiliary["balance"], tokens_run)),
            _ => None,
        })
        .collect();
    assert_eq!(steps.iter().map(|(step, ..)| *step).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7]);
    // waves of two tokens, one of which is predicted
    assert!(
        steps
            .iter()
            .all(|(step, balance, run)| (balance - *step as f64 / 3.0).abs() < 1e-12 && *run == 2 * *step as u64)
    );
}

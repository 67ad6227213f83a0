//! A process that is killed while it trains, again and again, and goes on each time: it ends where one ends that was
//! left alone.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use moe_core::Result;
use moe_core::data::{Sequence, Wave};
use moe_core::train::{BatchLoss, Parameter, Parameters, Saving, TrainOptions, TrainingTask, train, train_saved};

/// Tells the process that is to be killed where its state is.
const DIRECTORY: &str = "MOE_TRAIN_KILLED_DIRECTORY";

/// Pulls every value towards a number of the wave.
struct Pull {
    pause: Duration,
}

impl TrainingTask for Pull {
    fn accumulate(&mut self, wave: &Wave, parameters: &mut Parameters) -> Result<BatchLoss> {
        std::thread::sleep(self.pause);
        let mut values = parameters.lend_values("w")?;
        let mut loss = 0.0;
        if let Some(gradient) = parameters.gradient_mut("w") {
            for (i, (gradient, value)) in gradient.iter_mut().zip(&mut values).enumerate() {
                let difference = *value - ((i as u64 * 7 + wave.id * 3) % 11) as f32;
                *gradient += difference;
                loss += f64::from(difference).powi(2);
            }
        }
        parameters.return_values("w", values)?;
        Ok(BatchLoss { loss, tokens: wave.loss_tokens() })
    }

    fn update(&mut self, _: &Parameters) -> Result<()> {
        Ok(())
    }

    fn evaluate(&mut self, parameters: &mut Parameters) -> Result<f64> {
        let values = parameters.get("w").map(|parameter| parameter.values.as_slice()).unwrap_or_default();
        Ok(f64::from(values.iter().sum::<f32>()).sin())
    }
}

fn start() -> Parameters {
    let mut parameters = Parameters::new();
    let values = (0..20_000).map(|i| (i % 13) as f32 / 13.0).collect();
    parameters.add("w", Parameter::with_shape(values, [200, 100]).unwrap());
    parameters
}

fn waves() -> Vec<Wave> {
    (0..10).map(|id| Wave { id, sequences: vec![Sequence::new(vec![1, 2, 3])] }).collect()
}

fn options() -> TrainOptions {
    TrainOptions { epochs: 6, evaluate_every: Some(3), ..TrainOptions::default() }
}

fn bytes(parameters: &Parameters) -> Vec<u8> {
    parameters.iter().flat_map(|(_, parameter)| &parameter.values).flat_map(|value| value.to_le_bytes()).collect()
}

/// Trains in the directory of the environment: what the test below starts and kills.
#[test]
#[ignore = "run by the other test"]
fn trains() {
    let directory = PathBuf::from(std::env::var_os(DIRECTORY).expect("set by the other test"));
    let mut parameters = start();
    let saving = Saving::new(directory.join("state"), 1);
    let mut task = Pull { pause: Duration::from_millis(3) };
    train_saved(&mut task, &mut parameters, &waves(), &options(), Some(&saving), &mut |_| Ok(())).unwrap();
    std::fs::write(directory.join("values"), bytes(&parameters)).unwrap();
}

fn process(directory: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "train_killed::trains", "--ignored"]).env(DIRECTORY, directory).stdout(Stdio::null());
    command
}

/// The last step of which a state is there.
fn saved(directory: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(directory.join("state")) else { return 0 };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let step = |name: String| name.strip_prefix("step-")?.strip_suffix(".json")?.parse().ok();
    names.filter_map(step).max().unwrap_or(0)
}

#[test]
fn a_killed_process_goes_on_bit_by_bit() {
    let directory = tempfile::tempdir().unwrap();
    let mut steps = Vec::new();
    for after in [1, 2, 9, 20, 21, 40] {
        let mut child = process(directory.path()).spawn().unwrap();
        let begun = Instant::now();
        while saved(directory.path()) < after && child.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < Duration::from_secs(120), "no state of step {after}");
            std::thread::sleep(Duration::from_micros(300));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        steps.push(saved(directory.path()));
    }
    // it did go on, and was killed on its way
    assert!(steps.is_sorted() && steps[0] < 60, "{steps:?}");
    assert!(process(directory.path()).status().unwrap().success());
    let mut parameters = start();
    let mut task = Pull { pause: Duration::ZERO };
    train(&mut task, &mut parameters, &waves(), &options(), &mut |_| Ok(())).unwrap();
    assert!(std::fs::read(directory.path().join("values")).unwrap() == bytes(&parameters));
}

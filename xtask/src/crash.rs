//! Kills verbs at random times and compares what they leave after going on with what an undisturbed run writes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Instant;

use comfy_table::Table;

use crate::{Result, at, root};

/// What is run.
#[derive(clap::Args)]
pub struct Options {
    /// Verbs to kill; all, if none is named
    #[arg(value_parser = VERBS)]
    verbs: Vec<String>,
    /// Times each verb is begun and killed
    #[arg(long, default_value_t = 20)]
    kills: usize,
    /// Seed of the times at which they are killed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The program, instead of the one that is built for this
    #[arg(long, value_name = "FILE")]
    moe: Option<PathBuf>,
}

/// Verbs that go on with what an interrupted run left.
const VERBS: [&str; 6] = ["score", "prune", "merge", "tune", "quantize", "run"];
/// Files with times, or with paths of their run. Everything else has to be the same to the byte.
const DIFFERS: [&str; 8] = [
    "report.html",
    "report.json",
    "recipe.json",
    "results.json",
    "result.json",
    "table.md",
    "training.json",
    "training.jsonl",
];
/// A folder of the same: the states of a training say how long it took.
const DIFFERS_WITHIN: &str = "training";
/// Times one run is killed at most before it may end.
const MOST_KILLS: u64 = 3;

/// Kills every verb at random times. A run that is killed goes on with `--resume`, and may be killed again.
pub fn run(options: &Options) -> Result<()> {
    let root = root();
    let program = match &options.moe {
        Some(path) => fs::canonicalize(path).map_err(at(path))?,
        None => built(&root)?,
    };
    let dir = root.join("target/crash");
    let mut table = Table::new();
    table.set_header([
        "verb",
        "undisturbed",
        "runs",
        "kills",
        "kills before the first file",
        "files compared",
        "differ",
    ]);
    let mut faults = Vec::new();
    for verb in VERBS.into_iter().filter(|verb| options.verbs.is_empty() || options.verbs.iter().any(|v| v == verb)) {
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).map_err(at(&dir))?;
        let job = Job { program: &program, root: &root, dir: &dir, verb };
        let outcome = job.kill_at_random(options, &mut faults)?;
        table.add_row([
            verb.to_string(),
            format!("{:.2} s", outcome.seconds),
            options.kills.to_string(),
            outcome.kills.to_string(),
            outcome.early.to_string(),
            outcome.files.to_string(),
            outcome.differ.to_string(),
        ]);
        println!("{verb}: {} kills, {} faults", outcome.kills, outcome.differ);
    }
    let _ = fs::remove_dir_all(&dir);
    println!("{table}");
    match faults.is_empty() {
        true => Ok(()),
        false => Err(format!("{} runs did not come to the same bytes:\n{}", faults.len(), faults.join("\n")).into()),
    }
}

/// What came of the kills of one verb.
struct Outcome {
    seconds: f64,
    kills: usize,
    early: usize,
    files: usize,
    differ: usize,
}

struct Job<'a> {
    program: &'a Path,
    root: &'a Path,
    dir: &'a Path,
    verb: &'a str,
}

impl Job<'_> {
    /// The command that writes to `dir/name`.
    fn command(&self, name: &str) -> Result<Command> {
        let asset = |path: &str| self.root.join("examples/assets/tiny-moe").join(path).display().to_string();
        let (model, rows) = (asset(""), asset("data/arithmetic_calibration.jsonl"));
        let out = self.dir.join(name).join("out");
        fs::create_dir_all(self.dir.join(name)).map_err(at(self.dir))?;
        let mut command = Command::new(self.program);
        command.arg(self.verb).stdin(Stdio::null());
        let mut add = |words: &str| {
            command.args(words.split_whitespace());
        };
        match self.verb {
            "score" => add("--scorer fisher --scorer reap --samples 32 --length 64 --wave-tokens 512"),
            "prune" => add(
                "--scorer fisher --ratio 0.5 --form ragged --repair refit --samples 24 --length 48 --wave-tokens 512",
            ),
            "merge" => add("--recipe m-smoe --ratio 0.5 --samples 24 --length 48 --wave-tokens 512 --sample 128"),
            "tune" => {
                add("--method lora --steps 12 --step-tokens 128 --save-every 2 --samples 24 --length 48 --eval-rows 4")
            }
            "quantize" => {
                add(r#"--format {"type":"int","bits":4,"group_size":32} --part linear --samples 16 --length 48"#)
            }
            _ => {
                let steps = serde_json::json!([
                    {"score": {"scorers": ["fisher"]}},
                    {"prune": {"budget": {"ratio": 0.5}, "form": "ragged"}},
                    {"repair": {"type": "layer_refit"}},
                    {"tune": {"method": "lora", "steps": 4, "step_tokens": 128, "save_every": 1}},
                    {"write": {}}
                ]);
                let data = serde_json::json!({"calibration": [rows], "samples": 16, "length": 48, "wave_tokens": 256});
                let recipe = serde_json::json!({"model": model, "out": out, "data": data, "steps": steps});
                let file = self.dir.join(name).join("recipe.json");
                fs::write(&file, recipe.to_string()).map_err(at(&file))?;
                command.arg(file);
                return Ok(command);
            }
        }
        command.args(["--model", &model, "--data", &rows, "--out"]).arg(out);
        Ok(command)
    }

    /// Goes on with what was killed, and names what differs from an undisturbed run. A run that was killed after all
    /// was written has nothing to go on with, and says so.
    fn goes_on(&self, name: &str, whole: &BTreeMap<String, String>) -> Result<Vec<String>> {
        let ended = self.finish(name, true);
        let wrong = different(whole, &sums(&self.dir.join(name).join("out"))?);
        Ok(match ended {
            Err(error) if !wrong.is_empty() => vec![error.to_string(), wrong.join(", ")],
            _ => wrong,
        })
    }

    /// Runs the command to its end.
    fn finish(&self, name: &str, resume: bool) -> Result<()> {
        let mut command = self.command(name)?;
        if resume {
            command.arg("--resume");
        }
        let output = command.output().map_err(at(self.program))?;
        match output.status.success() {
            true => Ok(()),
            false => {
                let error = String::from_utf8_lossy(&output.stderr).trim().to_string();
                Err(format!("{}: {}: {error}", self.verb, output.status).into())
            }
        }
    }

    fn kill_at_random(&self, options: &Options, faults: &mut Vec<String>) -> Result<Outcome> {
        let start = Instant::now();
        self.finish("whole", false)?;
        let took = start.elapsed();
        let whole = sums(&self.dir.join("whole/out"))?;
        self.finish("again", false)?;
        let again = sums(&self.dir.join("again/out"))?;
        if let Some(file) = different(&whole, &again).first() {
            return Err(format!("{}: {file} differs between two undisturbed runs", self.verb).into());
        }
        fs::remove_dir_all(self.dir.join("again")).map_err(at(self.dir))?;
        let mut random = Random(options.seed ^ 0x9e37_79b9_7f4a_7c15);
        let mut outcome = Outcome { seconds: took.as_secs_f64(), kills: 0, early: 0, files: whole.len(), differ: 0 };
        for number in 0..options.kills {
            let name = format!("killed-{number}");
            let times = 1 + random.next() % MOST_KILLS;
            let mut waited = Vec::new();
            for time in 0..times {
                let wait = took.mul_f64(random.part() / (1 + time) as f64);
                let mut command = self.command(&name)?;
                if time > 0 {
                    command.arg("--resume");
                }
                let mut process =
                    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(at(self.program))?;
                sleep(wait);
                // On Unix this is SIGKILL: nothing of the process runs any more.
                process.kill().map_err(at(self.program))?;
                outcome.kills += usize::from(!process.wait().map_err(at(self.program))?.success());
                outcome.early += usize::from(!self.dir.join(&name).join("out").exists());
                waited.push(format!("{:.3} s", wait.as_secs_f64()));
            }
            let wrong = self.goes_on(&name, &whole)?;
            if !wrong.is_empty() {
                outcome.differ += 1;
                let fault = format!("{}, killed after {}: {}", self.verb, waited.join(", then "), wrong.join(", "));
                // At once, since a run over all verbs takes long.
                eprintln!("{fault}");
                faults.push(fault);
            }
            fs::remove_dir_all(self.dir.join(&name)).map_err(at(self.dir))?;
        }
        Ok(outcome)
    }
}

/// Blake3 sums of all files beside and below a path, by what their paths have after it.
pub fn sums(out: &Path) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    let parent = out.parent().unwrap_or(out);
    let mut folders = vec![parent.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(at(&folder))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                folders.extend((name != DIFFERS_WITHIN).then_some(path));
            } else if !DIFFERS.iter().any(|end| name.ends_with(end)) {
                let bytes = fs::read(&path).map_err(at(&path))?;
                let relative = path.strip_prefix(parent).unwrap_or(&path).display().to_string();
                found.insert(relative, blake3::hash(&bytes).to_hex().to_string());
            }
        }
    }
    Ok(found)
}

/// Files that only one side has, or that differ.
pub fn different(expected: &BTreeMap<String, String>, found: &BTreeMap<String, String>) -> Vec<String> {
    let names: BTreeSet<&String> = expected.keys().chain(found.keys()).collect();
    names.into_iter().filter(|name| expected.get(*name) != found.get(*name)).cloned().collect()
}

/// The program, built as the other checks build it.
fn built(root: &Path) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--release", "--package", "moe-cli", "--bin", "moe"])
        .current_dir(root)
        .status()?;
    match status.success() {
        true => Ok(root.join("target/release/moe")),
        false => Err("moe does not build".into()),
    }
}

/// Numbers without a pattern, the same for the same seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    fn part(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_missing_or_other_is_named_and_times_may_differ() {
        let dir = std::env::temp_dir().join(format!("xtask-crash-{}", std::process::id()));
        let write = |name: &str, text: &str| {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for (side, weights) in [("a", "1"), ("b", "2")] {
            write(&format!("{side}/out/model.safetensors"), weights);
            write(&format!("{side}/out/report.html"), side);
            write(&format!("{side}/out/config.json"), "{}");
        }
        write("b/out.plan.json", "{}");
        let [a, b] = ["a", "b"].map(|side| sums(&dir.join(side).join("out")).unwrap());
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(a.len(), 2);
        assert_eq!(different(&a, &b), ["out.plan.json", "out/model.safetensors"]);
        assert!(different(&a, &a).is_empty());
    }

    #[test]
    fn random_parts_are_parts_and_follow_from_the_seed() {
        let draw = |seed| (0..100).map(|_| Random(seed).part()).collect::<Vec<_>>();
        assert_eq!(draw(3), draw(3));
        let mut random = Random(1);
        let parts: Vec<f64> = (0..1000).map(|_| random.part()).collect();
        assert!(parts.iter().all(|part| (0.0..1.0).contains(part)));
        assert!(parts.iter().any(|part| *part < 0.1) && parts.iter().any(|part| *part > 0.9));
    }
}

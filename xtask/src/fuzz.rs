//! Fuzzing on the stable toolchain: libFuzzer, with coverage of the crates of this workspace alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use comfy_table::Table;

use crate::instrument::COVERAGE;
use crate::{Result, at, root};

/// What is run.
#[derive(clap::Args)]
pub struct Options {
    /// Targets to run; all, if none is named. fuzz/src/targets.rs has them
    targets: Vec<String>,
    /// Minutes, shared evenly by the targets; what one leaves over goes to those after it
    #[arg(long, default_value_t = 16.0)]
    minutes: f64,
    /// Executions after which a target ends before its share of the time is over
    #[arg(long, value_name = "N")]
    executions: Option<u64>,
    /// Longest input, in bytes: what is wrong with a file stands in its first kilobytes, and short inputs are fast
    #[arg(long, value_name = "BYTES", default_value_t = 4096)]
    longest: u64,
    /// Processes of each target at a time
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// The fuzzer, instead of the one that is built for this
    #[arg(long, value_name = "FILE")]
    fuzzer: Option<PathBuf>,
}

/// Builds the fuzzer and runs the targets, one after the other.
pub fn run(options: &Options) -> Result<()> {
    let root = root();
    let fuzzer = match &options.fuzzer {
        Some(path) => fs::canonicalize(path).map_err(at(path))?,
        None => build(&root)?,
    };
    let names = targets(&root)?;
    if let Some(unknown) = options.targets.iter().find(|target| !names.contains(target)) {
        return Err(format!("target `{unknown}`: expected one of {}", names.join(", ")).into());
    }
    let chosen: Vec<&String> =
        names.iter().filter(|name| options.targets.is_empty() || options.targets.contains(name)).collect();
    let end = Instant::now() + Duration::from_secs_f64((options.minutes * 60.0).max(1.0));
    let (mut table, mut faults, mut executions) = (Table::new(), Vec::new(), 0);
    table.set_header(["target", "executions", "seconds", "per second", "coverage", "inputs", "faults"]);
    for (number, name) in chosen.iter().enumerate() {
        let share = end.saturating_duration_since(Instant::now()) / (chosen.len() - number) as u32;
        let ran = Fuzzed::run(&fuzzer, &root, name, share, options)?;
        executions += ran.executions;
        let rate = ran.executions as f64 / ran.took.as_secs_f64();
        table.add_row([
            name.to_string(),
            ran.executions.to_string(),
            format!("{:.0}", ran.took.as_secs_f64()),
            format!("{rate:.0}"),
            ran.coverage.to_string(),
            ran.inputs.to_string(),
            ran.faults.len().to_string(),
        ]);
        println!("{name}: {} executions, {rate:.0} per second, {} faults", ran.executions, ran.faults.len());
        faults.extend(ran.faults);
    }
    println!("{table}\n{executions} executions in all");
    match faults.is_empty() {
        true => Ok(()),
        false => {
            let list: Vec<String> = faults.iter().map(|path| path.display().to_string()).collect();
            let how = "MOE_FUZZ_TARGET=TARGET, then the fuzzer with the file as its argument, shows each again";
            Err(format!("{} inputs are neither read nor refused; {how}:\n{}", list.len(), list.join("\n")).into())
        }
    }
}

/// Builds the fuzzer; its path.
fn build(root: &Path) -> Result<PathBuf> {
    let status = COVERAGE
        .cargo(root)?
        .args(["build", "--release", "--package", "moe-fuzz", "--features", "libfuzzer", "--bin", "moe-fuzz"])
        .status()?;
    match status.success() {
        true => Ok(root.join("target/release/moe-fuzz")),
        false => Err("the fuzzer does not build: it needs a C++ compiler".into()),
    }
}

/// Names of the targets, as their file has them.
fn targets(root: &Path) -> Result<Vec<String>> {
    let path = root.join("fuzz/src/targets.rs");
    let text = fs::read_to_string(&path).map_err(at(&path))?;
    let names: Vec<String> =
        text.split("name: \"").skip(1).filter_map(|rest| Some(rest.split_once('"')?.0.into())).collect();
    match names.is_empty() {
        true => Err(format!("{}: no targets, expected `name: \"…\"`", path.display()).into()),
        false => Ok(names),
    }
}

/// What a run of one target came to.
struct Fuzzed {
    executions: u64,
    coverage: u64,
    inputs: usize,
    faults: Vec<PathBuf>,
    took: Duration,
}

impl Fuzzed {
    fn run(fuzzer: &Path, root: &Path, name: &str, share: Duration, options: &Options) -> Result<Self> {
        let dir = root.join("target/fuzz").join(name);
        let (corpus, faults) = (dir.join("corpus"), dir.join("faults"));
        for folder in [&corpus, &faults] {
            fs::create_dir_all(folder).map_err(at(folder))?;
        }
        let log = dir.join("log.txt");
        let file = fs::File::create(&log).map_err(at(&log))?;
        let before = entries(&faults)?;
        let scratch = Scratch::new(name)?;
        let mut command = Command::new(fuzzer);
        command
            .arg(&corpus)
            .arg(format!("-artifact_prefix={}/", faults.display()))
            // A limit of 0 would be none.
            .arg(format!("-max_total_time={}", share.as_secs().max(1)))
            .arg(format!("-max_len={}", options.longest))
            .args(["-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1"])
            .env("MOE_FUZZ_TARGET", name)
            .env("MOE_FUZZ_CORPUS", &corpus)
            .env("MOE_FUZZ_LONGEST", options.longest.to_string())
            .env("TMPDIR", &scratch.0)
            .current_dir(&dir)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        if options.jobs > 1 {
            command.arg(format!("-fork={}", options.jobs));
        }
        if let Some(executions) = options.executions {
            command.arg(format!("-runs={executions}"));
        }
        let start = Instant::now();
        let status = command.status().map_err(at(fuzzer))?;
        let took = start.elapsed();
        let text = String::from_utf8_lossy(&fs::read(&log).map_err(at(&log))?).into_owned();
        let found: Vec<PathBuf> = entries(&faults)?.into_iter().filter(|path| !before.contains(path)).collect();
        if !status.success() && found.is_empty() {
            let last: Vec<&str> = text.lines().rev().take(5).collect();
            return Err(format!("{name}: {status}: {}", last.into_iter().rev().collect::<Vec<_>>().join("\n")).into());
        }
        Ok(Self {
            executions: executed(&text),
            coverage: last_number(&text, "cov:").unwrap_or(0),
            inputs: entries(&corpus)?.len(),
            faults: found,
            took,
        })
    }
}

/// A folder for the files of one run, in memory where the system has such a folder, so that an input costs no disk. It
/// goes with what a fuzzer leaves in it that ends by a signal.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let path = parent.join(format!("moe-fuzz-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(at(&path))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Executions by the fuzzer's last account of them: its statistics at the end or, of several processes, the line that
/// begins with their number.
fn executed(text: &str) -> u64 {
    let lines = || text.lines().filter_map(|line| line.strip_prefix('#'));
    let digits = |line: &str| line.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok());
    last_number(text, "stat::number_of_executed_units:").or_else(|| lines().filter_map(digits).max()).unwrap_or(0)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = fs::read_dir(folder)
        .map_err(at(folder))?
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// The number after the last of these words.
fn last_number(text: &str, word: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once(word)?;
    let digits: String = rest.trim_start().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_from_what_the_fuzzer_prints() {
        let text =
            "#12\tNEW    cov: 310 ft: 411\n#4096\tpulse  cov: 322 ft: 500\nstat::number_of_executed_units: 5000\n";
        assert_eq!(last_number(text, "stat::number_of_executed_units:"), Some(5000));
        assert_eq!(last_number(text, "cov:"), Some(322));
        assert_eq!(executed(text), 5000);
        let several =
            "#12: cov: 3 ft: 4 corp: 1 exec/s 6 oom/timeout/crash: 0/0/1 time: 2s\n#97: cov: 3\n    #0 0x1f in f\n";
        assert_eq!((executed(several), executed("")), (97, 0));
        assert_eq!(last_number("", "cov:"), None);
    }

    #[test]
    fn every_target_has_its_name() {
        let names = targets(&root()).unwrap();
        assert!(names.contains(&"config".to_string()) && names.contains(&"delta".to_string()), "{names:?}");
    }
}

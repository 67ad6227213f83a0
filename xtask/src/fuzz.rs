//! Fuzzing on the stable toolchain: libFuzzer, with coverage of the crates of this workspace alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use comfy_table::Table;

use crate::{Result, at, root};

/// What is run.
#[derive(clap::Args)]
pub struct Options {
    /// Targets to run; all, if none is named. fuzz/src/targets.rs has them
    targets: Vec<String>,
    /// Minutes, shared evenly by the targets
    #[arg(long, default_value_t = 16.0)]
    minutes: f64,
    /// Processes of each target at a time
    #[arg(long, default_value_t = 1)]
    jobs: usize,
}

/// Tells this program that it stands in for the compiler.
const WRAPPER: &str = "MOE_FUZZ_COMPILER";
/// What instruments code for libFuzzer, and checks arithmetic.
const FLAGS: [&str; 9] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "-Coverflow-checks=on",
    "-Cdebug-assertions=on",
    "--cfg=fuzzing",
];

/// Stands in for the compiler, if Cargo called this program for that: the crates of the workspace are compiled with
/// coverage. What they depend on is compiled as ever, so that nothing of it is built twice.
pub fn compiler() -> Option<Result<i32>> {
    std::env::var_os(WRAPPER)?;
    let mut arguments = std::env::args_os().skip(1);
    let compiler = arguments.next()?;
    let arguments: Vec<_> = arguments.collect();
    let says = |first: &str, second: &str| arguments.windows(2).any(|pair| pair[0] == first && pair[1] == second);
    // Scripts and macros run in the compiler, where nothing counts.
    let plain =
        says("--crate-name", "build_script_build") || says("--crate-type", "proc-macro") || !is_build(&arguments);
    let mut command = Command::new(&compiler);
    command.args(&arguments);
    if !plain {
        command.args(FLAGS);
    }
    let status = command.status().map_err(at(Path::new(&compiler)));
    Some(status.map(|status| status.code().unwrap_or(1)).map_err(Into::into))
}

/// Whether something is compiled, and Cargo does not just ask the compiler what it is.
fn is_build(arguments: &[std::ffi::OsString]) -> bool {
    arguments.iter().any(|argument| argument == "--crate-name") && !arguments.iter().any(|argument| argument == "___")
}

/// Builds the fuzzer and runs the targets, one after the other.
pub fn run(options: &Options) -> Result<()> {
    let root = root();
    let fuzzer = build(&root)?;
    let names = targets(&root)?;
    if let Some(unknown) = options.targets.iter().find(|target| !names.contains(target)) {
        return Err(format!("target `{unknown}`: expected one of {}", names.join(", ")).into());
    }
    let chosen: Vec<&String> =
        names.iter().filter(|name| options.targets.is_empty() || options.targets.contains(name)).collect();
    let seconds = (options.minutes * 60.0 / chosen.len().max(1) as f64).ceil().max(1.0) as u64;
    let (mut table, mut faults, mut executions) = (Table::new(), Vec::new(), 0);
    table.set_header(["target", "executions", "per second", "coverage", "inputs", "faults"]);
    for name in chosen {
        let ran = Fuzzed::run(&fuzzer, &root, name, seconds, options.jobs)?;
        executions += ran.executions;
        table.add_row([
            name.clone(),
            ran.executions.to_string(),
            (ran.executions / seconds).to_string(),
            ran.coverage.to_string(),
            ran.inputs.to_string(),
            ran.faults.len().to_string(),
        ]);
        println!("{name}: {} executions, {} faults", ran.executions, ran.faults.len());
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
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--release", "--package", "moe-fuzz", "--features", "libfuzzer", "--bin", "moe-fuzz"])
        .env("RUSTC_WORKSPACE_WRAPPER", std::env::current_exe()?)
        .env(WRAPPER, "1")
        .current_dir(root)
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
}

impl Fuzzed {
    fn run(fuzzer: &Path, root: &Path, name: &str, seconds: u64, jobs: usize) -> Result<Self> {
        let dir = root.join("target/fuzz").join(name);
        let (corpus, faults) = (dir.join("corpus"), dir.join("faults"));
        for folder in [&corpus, &faults] {
            fs::create_dir_all(folder).map_err(at(folder))?;
        }
        let log = dir.join("log.txt");
        let file = fs::File::create(&log).map_err(at(&log))?;
        let before = entries(&faults)?;
        let mut command = Command::new(fuzzer);
        command
            .arg(&corpus)
            .arg(format!("-artifact_prefix={}/", faults.display()))
            .arg(format!("-max_total_time={seconds}"))
            .args([
                "-max_len=65536",
                "-timeout=20",
                "-rss_limit_mb=2048",
                "-print_final_stats=1",
                "-use_value_profile=1",
            ])
            .env("MOE_FUZZ_TARGET", name)
            .env("MOE_FUZZ_CORPUS", &corpus)
            .current_dir(&dir)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        if jobs > 1 {
            command.arg(format!("-fork={jobs}"));
        }
        let status = command.status().map_err(at(fuzzer))?;
        let text = String::from_utf8_lossy(&fs::read(&log).map_err(at(&log))?).into_owned();
        let found: Vec<PathBuf> = entries(&faults)?.into_iter().filter(|path| !before.contains(path)).collect();
        if !status.success() && found.is_empty() {
            let last: Vec<&str> = text.lines().rev().take(5).collect();
            return Err(format!("{name}: {status}: {}", last.into_iter().rev().collect::<Vec<_>>().join("\n")).into());
        }
        Ok(Self {
            executions: last_number(&text, "stat::number_of_executed_units:")
                .or_else(|| last_number(&text, "#"))
                .unwrap_or(0),
            coverage: last_number(&text, "cov:").unwrap_or(0),
            inputs: entries(&corpus)?.len(),
            faults: found,
        })
    }
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
        assert_eq!(last_number(text, "#"), Some(4096));
        assert_eq!(last_number("", "cov:"), None);
    }

    #[test]
    fn every_target_has_its_name() {
        let names = targets(&root()).unwrap();
        assert!(names.contains(&"config".to_string()) && names.contains(&"delta".to_string()), "{names:?}");
    }
}

//! Verbs under `mpirun`: the bytes of one process for any number, after one is killed, and what is said when one fails.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use comfy_table::Table;

use crate::crash::{different, sums};
use crate::{Result, at, root};

/// What is run.
#[derive(clap::Args)]
pub struct Options {
    /// The program with feature `mpi`, instead of the one that is built for this
    #[arg(long, value_name = "FILE")]
    moe: Option<PathBuf>,
    /// Processes that are compared with one
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(2..=16))]
    ranks: u16,
}

/// Seconds that a run may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// Jobs whose output has to be the same for any number of processes.
const JOBS: [(&str, &str); 7] = [
    ("score", "score --scorer fisher --scorer reap --samples 48 --length 64 --wave-tokens 256"),
    ("merge", "merge --recipe m-smoe --ratio 0.5 --samples 24 --length 48 --wave-tokens 256 --sample 128 --work @work"),
    (
        "tune, LoRA",
        "tune --method lora --steps 8 --accumulate 5 --step-tokens 128 --save-every 2 --samples 40 --length 48",
    ),
    (
        "tune, full",
        "tune --method full --steps 4 --accumulate 3 --step-tokens 128 --evaluate-every 2 --samples 40 --length 48",
    ),
    (
        "prune, refitted",
        "prune --scorer fisher --ratio 0.5 --form ragged --repair refit --repair layer_refit --samples 24 --length 48 \
         --wave-tokens 256",
    ),
    (
        "merge layer by layer",
        "merge --recipe ream --ratio 0.5 --samples 24 --length 48 --wave-tokens 256 --sample 128 --work @work",
    ),
    ("tune, ESFT", "tune --method esft-token --steps 4 --accumulate 4 --step-tokens 128 --samples 40 --length 48"),
];

/// Runs it all; a few minutes on two cores.
pub fn run(options: &Options) -> Result<()> {
    let root = root();
    let program = match &options.moe {
        Some(path) => fs::canonicalize(path).map_err(at(path))?,
        None => built(&root)?,
    };
    let dir = root.join("target/mpi");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).map_err(at(&dir))?;
    let site = Site { program, root, dir: dir.clone(), ranks: options.ranks.into() };
    let mut table = Table::new();
    table.set_header(["job", "processes", "files compared", "blake3 of all", "seconds"]);
    let mut faults = Vec::new();
    for (name, command) in JOBS {
        site.same(name, command, &mut table, &mut faults)?;
    }
    site.killed(&mut table, &mut faults)?;
    println!("{table}");
    site.measured()?;
    for (what, found) in site.failures()? {
        println!("{what}: {found}");
    }
    let _ = fs::remove_dir_all(&dir);
    match faults.is_empty() {
        true => Ok(()),
        false => Err(faults.join("\n").into()),
    }
}

/// Where it is run.
struct Site {
    program: PathBuf,
    root: PathBuf,
    dir: PathBuf,
    ranks: usize,
}

impl Site {
    fn asset(&self, path: &str) -> PathBuf {
        self.root.join("examples/assets/tiny-moe").join(path)
    }

    /// Words of a command that writes to `out`, `@` being the folder that it is in.
    fn words(&self, command: &str, out: &Path) -> Vec<String> {
        let beside = out.parent().unwrap_or(out).display().to_string();
        let words = command.split_whitespace();
        let mut words: Vec<String> = words.map(|word| word.replace('@', &format!("{beside}/"))).collect();
        let rows = self.asset("data/arithmetic_calibration.jsonl");
        for (option, value) in [("--model", &self.asset("")), ("--data", &rows), ("--out", &out.to_path_buf())] {
            words.extend([option.to_string(), value.display().to_string()]);
        }
        words
    }

    /// `mpirun` of some groups of processes, each with words of its own; one thread each, whatever their number.
    fn command(&self, groups: &[(usize, Vec<String>)]) -> Command {
        let mut command = Command::new("mpirun");
        command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]);
        for (index, (ranks, words)) in groups.iter().enumerate() {
            command.args((index > 0).then_some(":")).args(["-n", &ranks.to_string()]);
            command.arg(&self.program).args(words);
        }
        command.env("RAYON_NUM_THREADS", "1").env("MOE_LOG", "warn").stdin(Stdio::null());
        command
    }

    fn spawn(&self, groups: &[(usize, Vec<String>)]) -> Result<Child> {
        let log = |name: &str| fs::File::create(self.dir.join(name)).map_err(at(&self.dir));
        let child = self.command(groups).stdout(log("stdout")?).stderr(log("stderr")?).spawn();
        Ok(child.map_err(|error| format!("mpirun: {error}: is Open MPI installed?"))?)
    }

    /// Runs to the end; an error is what stderr says.
    fn finish(&self, mut child: Child) -> Result<Output> {
        let start = Instant::now();
        let status = loop {
            match child.try_wait()? {
                Some(status) => break status,
                None if start.elapsed() > PATIENCE => {
                    child.kill()?;
                    child.wait()?;
                    return Err(format!("a run hangs for {} s", PATIENCE.as_secs()).into());
                }
                None => sleep(Duration::from_millis(20)),
            }
        };
        let [stdout, stderr] = ["stdout", "stderr"].map(|name| fs::read(self.dir.join(name)).unwrap_or_default());
        Ok(Output { status, stdout, stderr })
    }

    fn run(&self, groups: &[(usize, Vec<String>)]) -> Result<()> {
        let output = self.finish(self.spawn(groups)?)?;
        match output.status.success() {
            true => Ok(()),
            false => Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr)).into()),
        }
    }

    fn out(&self, name: &str) -> Result<PathBuf> {
        let folder = self.dir.join(name.replace([' ', ','], "-"));
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        Ok(folder.join("out"))
    }

    /// Runs a job by one process and by several, and compares.
    fn same(&self, name: &str, command: &str, table: &mut Table, faults: &mut Vec<String>) -> Result<()> {
        let mut whole: Option<BTreeMap<String, String>> = None;
        for ranks in [1, 2, self.ranks - 1, self.ranks] {
            if whole.is_some() && ranks == 1 {
                continue;
            }
            let out = self.out(&format!("{name}-{ranks}"))?;
            let start = Instant::now();
            self.run(&[(ranks, self.words(command, &out))]).map_err(|error| format!("{name}, {ranks}: {error}"))?;
            let seconds = start.elapsed().as_secs_f64();
            let found = sums(&out)?;
            table.add_row([
                name.to_string(),
                ranks.to_string(),
                found.len().to_string(),
                digest(&found),
                format!("{seconds:.1}"),
            ]);
            match &whole {
                None => whole = Some(found),
                Some(whole) => {
                    let wrong = different(whole, &found);
                    if !wrong.is_empty() {
                        faults.push(format!("{name}, {ranks} processes: {} differ", wrong.join(", ")));
                    }
                }
            }
        }
        Ok(())
    }

    /// Kills one process of several within a run, and goes on with one process less.
    fn killed(&self, table: &mut Table, faults: &mut Vec<String>) -> Result<()> {
        for (name, command, begun) in [
            ("score", JOBS[0].1, "out/statistics/wave-000000.safetensors"),
            ("tune, LoRA", JOBS[2].1, "out/lora/training/step-000004.json"),
        ] {
            let whole = sums(&self.out(&format!("{name}-1"))?)?;
            let out = self.out(&format!("{name}-killed"))?;
            let mut words = self.words(command, &out);
            let child = self.spawn(&[(self.ranks, words.clone())])?;
            let begun = out.parent().unwrap_or(&out).join(begun);
            let start = Instant::now();
            while !begun.exists() && start.elapsed() < PATIENCE {
                sleep(Duration::from_millis(2));
            }
            let killed = kill_rank(1, &out)?;
            let output = self.finish(child)?;
            if output.status.success() {
                faults.push(format!("{name}: rank 1 was to be killed ({killed}), but the run ended well"));
            }
            words.push("--resume".into());
            let ranks = self.ranks - 1;
            let start = Instant::now();
            self.run(&[(ranks, words)]).map_err(|error| format!("{name}, resumed: {error}"))?;
            let found = sums(&out)?;
            let wrong = different(&whole, &found);
            table.add_row([
                format!("{name}: rank 1 of {} killed, resumed", self.ranks),
                ranks.to_string(),
                found.len().to_string(),
                digest(&found),
                format!("{:.1}", start.elapsed().as_secs_f64()),
            ]);
            if !wrong.is_empty() {
                faults.push(format!("{name}, killed and resumed: {} differ", wrong.join(", ")));
            }
        }
        Ok(())
    }

    /// Evaluation, which leaves no files: the figures that are printed.
    fn measured(&self) -> Result<()> {
        let mut figures = Vec::new();
        for ranks in [1, self.ranks] {
            let model = self.asset("").display().to_string();
            let mut words: Vec<String> =
                ["eval", "--json", "--rows", "24", "--wave-tokens", "256", "--model", &model].map(String::from).into();
            for name in ["arithmetic", "facts", "prose"] {
                words.extend(["--data".into(), self.asset(&format!("data/{name}_test.jsonl")).display().to_string()]);
            }
            let output = self.finish(self.spawn(&[(ranks, words)])?)?;
            let json: serde_json::Value = serde_json::from_slice(&output.stdout)
                .map_err(|error| format!("eval: {error}: {}", String::from_utf8_lossy(&output.stderr)))?;
            let of = |measured: &serde_json::Value| format!("{} {}", measured["key"], measured["value"]);
            figures.push(json["measured"].as_array().into_iter().flatten().map(of).collect::<Vec<_>>().join(", "));
        }
        println!("eval, 1 and {} processes: {}", self.ranks, figures[1]);
        match figures[0] == figures[1] && !figures[0].is_empty() {
            true => Ok(()),
            false => Err(format!("eval: found {}, expected {}", figures[1], figures[0]).into()),
        }
    }

    /// Runs in which one process fails: all have to stop, and say why.
    fn failures(&self) -> Result<Vec<(&'static str, String)>> {
        let others = self.ranks - 1;
        let file = self.dir.join("file");
        fs::write(&file, "no directory").map_err(at(&file))?;
        let mut seen = Vec::new();
        let rows = |words: Vec<String>, rows: &Path| -> Vec<String> {
            let mut words = words;
            if let Some(place) = words.iter().position(|word| word == "--data") {
                words[place + 1] = rows.display().to_string();
            }
            words
        };
        for (what, expected) in [
            ("a rank whose disk cannot be written", "Not a directory"),
            ("a rank without the data file", "No such file"),
            ("a rank with other rows", "data: found"),
        ] {
            let out = self.out(what)?;
            let words = self.words(JOBS[0].1, &out);
            let last = match expected {
                "Not a directory" => self.words(JOBS[0].1, &file.join("out")),
                "No such file" => rows(words.clone(), Path::new("absent.jsonl")),
                _ => rows(words.clone(), &self.asset("data/facts_calibration.jsonl")),
            };
            let output = self.finish(self.spawn(&[(others, words), (1, last)])?)?;
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            let said: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
            let scores = out.join("fisher.safetensors");
            if output.status.success() || scores.exists() || !said.iter().any(|line| line.contains(expected)) {
                return Err(format!("{what}: {}, expected a line with `{expected}`: {stderr}", output.status).into());
            }
            seen.push((what, said.join(" | ")));
        }
        // What is not shared out is refused.
        for (what, command, expected) in [
            ("a verb that is not shared out", "quantize --format int4", "processes, expected one"),
            ("a method that is not shared out", "tune --method loss-free --steps 2", "they share the methods"),
            ("the training of a merge", "merge --recipe mc-smoe --train --ratio 0.5", "--train: found"),
            ("a share of a share", "score --scorer reap --shard 0/2", "--shard"),
        ] {
            let out = self.out(what)?;
            let output = self.finish(self.spawn(&[(self.ranks, self.words(command, &out))])?)?;
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            let said = stderr.lines().find(|line| line.starts_with("error: ") && line.contains(expected));
            match said.filter(|_| !output.status.success()) {
                Some(line) => seen.push((what, line.to_string())),
                None => {
                    let found = format!("{what}: {}, expected a line with `{expected}`: {stderr}", output.status);
                    return Err(found.into());
                }
            }
        }
        Ok(seen)
    }
}

/// Kills the process of this rank that writes to `out`, and gives its id.
fn kill_rank(rank: usize, out: &Path) -> Result<u32> {
    let proc = Path::new("/proc");
    for entry in fs::read_dir(proc).map_err(at(proc))?.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // Processes come and go while this looks.
        let [Ok(environment), Ok(words)] = ["environ", "cmdline"].map(|name| fs::read(entry.path().join(name))) else {
            continue;
        };
        let has = |bytes: &[u8], word: &str| bytes.split(|byte| *byte == 0).any(|found| found == word.as_bytes());
        let ours = has(&words, &out.display().to_string());
        if ours && has(&environment, &format!("OMPI_COMM_WORLD_RANK={rank}")) {
            Command::new("kill").args(["-9", &id.to_string()]).status()?;
            return Ok(id);
        }
    }
    Err(format!("{}: found no process of rank {rank}, expected one at work", out.display()).into())
}

/// One sum of all files and their names, in a few digits.
fn digest(sums: &BTreeMap<String, String>) -> String {
    let mut hasher = blake3::Hasher::new();
    for (name, sum) in sums {
        hasher.update(name.as_bytes()).update(sum.as_bytes());
    }
    hasher.finalize().to_hex()[..16].to_string()
}

fn built(root: &Path) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let words = ["build", "--quiet", "--release", "--package", "moe-cli", "--bin", "moe", "--features", "mpi"];
    match Command::new(cargo).args(words).current_dir(root).status()?.success() {
        true => Ok(root.join("target/release/moe")),
        false => {
            Err("moe does not build with feature `mpi`: are an MPI with its headers and libclang installed?".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_processes_are_parts_of_one_launch() {
        let site = Site { program: "moe".into(), root: "/r".into(), dir: "/d".into(), ranks: 4 };
        let words = site.words("merge --work @work", Path::new("/d/merge/out"));
        assert_eq!(words[..3], ["merge", "--work", "/d/merge/work"]);
        assert_eq!(words[words.len() - 2..], ["--out", "/d/merge/out"]);
        let command = site.command(&[(3, vec!["a".into()]), (1, vec!["b".into()])]);
        let arguments: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        assert_eq!(arguments[4..], ["-n", "3", "moe", "a", ":", "-n", "1", "moe", "b"]);
    }

    #[test]
    fn one_sum_stands_for_all_files() {
        let sums = |of: &str| BTreeMap::from([("a".to_string(), of.to_string())]);
        assert_eq!(digest(&sums("1")), digest(&sums("1")));
        assert_ne!(digest(&sums("1")), digest(&sums("2")));
    }
}

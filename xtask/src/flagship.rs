//! The study of `flagship` on several models, and its tables in the guide.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Result, root, study};

/// The page with its tables.
const PAGE: &str = "docs/flagship.md";
/// Rows of the bundled model, which the small models share.
const ROWS: &str = "examples/assets/tiny-moe/data";
/// A recovery that a model of a hundred million parameters can take on one core.
const SHORT_RECOVERY: &str = r#"{"steps": [{"type": "tune", "step_tokens": 512, "recipe": {
    "method": {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear", "modules_to_save": ["mlp.gate"]},
    "train": {"max_steps": 12, "epochs": 12, "evaluate_every": null, "keep": "last",
              "schedule": {"peak": 0.0005, "warmup": 0.1, "decay": "cosine", "final_share": 0.1}}}}]}"#;

/// What to run, and what to do with it.
#[derive(clap::Args)]
pub struct Options {
    /// Directory for everything
    #[arg(long, value_name = "DIR", default_value = "out/flagship")]
    out: PathBuf,
    /// What `benches/train_small.py --family qwen3_moe` has made
    #[arg(long, value_name = "DIR")]
    qwen3: Option<PathBuf>,
    /// Directory of `cargo xtask smollm`
    #[arg(long, value_name = "DIR")]
    smollm: Option<PathBuf>,
    /// Only the models that are given, without the bundled DeepSeek-V3
    #[arg(long)]
    without_bundled: bool,
    /// An interpreter, which makes rows of simple sums and facts for SmolLM
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// Draws of the calibration rows, instead of three
    #[arg(long, value_name = "N")]
    draws: Option<u32>,
    /// The program `flagship` if it is built already
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Write the tables into docs/flagship.md
    #[arg(long)]
    write: bool,
}

/// A run of the program: the directory of its tables below that of the study, and its flags.
struct Part {
    name: &'static str,
    flags: Vec<String>,
}

impl Part {
    fn new(name: &'static str, model: &Path, domains: &[String], more: &str) -> Self {
        let mut flags = vec!["--name".into(), name.into(), "--model".into(), model.display().to_string()];
        domains.iter().for_each(|domain| flags.extend(["--domain".into(), domain.clone()]));
        flags.extend(more.split_whitespace().map(String::from));
        Self { name, flags }
    }
}

/// The runs that are asked for.
fn parts(options: &Options) -> Result<Vec<Part>> {
    let rows = |name: &str| format!("{name}={ROWS}/{name}_calibration.jsonl,{ROWS}/{name}_test.jsonl");
    let small = ["arithmetic", "prose"].map(rows);
    let mut parts = Vec::new();
    if !options.without_bundled {
        parts.push(Part::new("deepseek", Path::new("examples/assets/tiny-deepseek"), &small, ""));
    }
    if let Some(qwen3) = &options.qwen3 {
        parts.push(Part::new("qwen3", &std::path::absolute(qwen3)?, &small, ""));
    }
    if let Some(smollm) = &options.smollm {
        let smollm = std::path::absolute(smollm)?;
        let model = smollm.join("tuned/own/model");
        let file = |name: &str| smollm.join(name).display().to_string();
        let skill = |name: &str| format!("{}/{name}", file("skills"));
        let python = format!("python={},{}", file("rows/train.jsonl"), file("rows/prose_test.jsonl"));
        let glosses = format!("glosses={ROWS}/prose_calibration.jsonl,{ROWS}/prose_test.jsonl");
        let sizes = "--windows 16 --length 256 --test-tokens 2048 --wave-tokens 2048 --teacher-tokens 512";
        let mut part = Part::new("smollm", &model, &[python, glosses], sizes);
        part.flags.extend(["--recovery".into(), SHORT_RECOVERY.into()]);
        let once = "--recovered-draws 1 --scored 0.5 --scored-draws 1";
        part.flags.extend(once.split(' ').map(String::from));
        parts.push(part);
        // Every skill is measured without what each of them needs.
        let tests = ["sums", "facts", "prose"].map(|name| skill(&format!("{name}_test.jsonl")));
        let domains = ["sums", "facts", "prose"].map(|name| {
            let own = tests.iter().filter(|test| test.ends_with(&format!("/{name}_test.jsonl")));
            let others = tests.iter().filter(|test| !test.ends_with(&format!("/{name}_test.jsonl")));
            let files: Vec<&str> = own.chain(others).map(String::as_str).collect();
            format!("{name}={},{}", skill(&format!("{name}.jsonl")), files.join(","))
        });
        let more = "--knock-out 4,16,64,256,1024 --answered-only --draws 1 --windows 12 --samples 96 --length 256 \
                    --test-tokens 768 --questions 40 --wave-tokens 2048 --teacher-tokens 64";
        parts.push(Part::new("skills", &model, &domains, more));
    }
    match parts.is_empty() {
        true => Err("no model: --qwen3 or --smollm with --without-bundled".into()),
        false => Ok(parts),
    }
}

/// Runs what is missing, model by model, and writes the tables into the page if asked to.
pub fn run(options: &Options) -> Result<()> {
    let out = root().join(&options.out);
    if let Some(smollm) = &options.smollm {
        let skills = std::path::absolute(smollm)?.join("skills");
        if !skills.exists() {
            let mut command = Command::new(&options.python);
            command.arg(root().join("xtask/scripts/smollm.py")).arg("skills").arg(std::path::absolute(smollm)?);
            if !command.status()?.success() {
                return Err("rows of sums and facts were not made".into());
            }
        }
    }
    for part in parts(options)? {
        let mut command = match &options.program {
            Some(program) => Command::new(program),
            None => {
                let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
                command.args(["run", "--release", "--example", "flagship", "--"]);
                command
            }
        };
        let to = out.join(part.name);
        command.arg("--out").arg(&to).args(&part.flags);
        if to.exists() {
            command.arg("--resume");
        }
        // The knock-out has draws of its own.
        if let Some(draws) = options.draws.filter(|_| part.name != "skills") {
            command.args(["--draws", &draws.to_string()]);
        }
        if !command.current_dir(root()).status()?.success() {
            return Err(format!("the study of {} failed; the same command goes on from there", part.name).into());
        }
        if options.write {
            study::write_tables(PAGE, &to.join("tables.md"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn every_model_that_is_given_is_a_run_with_domains_of_its_own() {
        let names = |words: &str| -> Vec<&str> {
            let options = Line::parse_from(["flagship"].into_iter().chain(words.split_whitespace())).options;
            parts(&options).unwrap().iter().map(|part| part.name).collect()
        };
        assert_eq!(names(""), ["deepseek"]);
        assert_eq!(names("--qwen3 a --smollm b"), ["deepseek", "qwen3", "smollm", "skills"]);
        assert_eq!(names("--qwen3 a --without-bundled"), ["qwen3"]);
        let options = Line::parse_from(["flagship", "--smollm", "/b", "--without-bundled"]).options;
        let skills = parts(&options).unwrap().remove(1).flags;
        let of = |names: [&str; 4]| names.map(|name| format!("/b/skills/{name}.jsonl")).join(",");
        let facts = format!("facts={}", of(["facts", "facts_test", "sums_test", "prose_test"]));
        assert!(skills.contains(&facts), "{skills:?}");
        let none = Line::parse_from(["flagship", "--without-bundled"]).options;
        assert!(parts(&none).is_err());
    }

    #[test]
    fn the_page_has_a_place_for_every_table_of_the_models() {
        let page = std::fs::read_to_string(root().join(PAGE)).unwrap();
        let ids = ["deepseek-factor", "qwen3-arithmetic-kl", "smollm-python-recovered", "skills-knock-out-sums"];
        for id in ids {
            assert!(page.contains(&format!("<!-- study:flagship-{id} -->")), "{id}");
        }
    }
}

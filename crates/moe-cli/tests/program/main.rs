//! The program as a person runs it.

mod adapters;
mod adaptive;
mod edges;
mod faults;
mod jobs;
mod looking;
#[cfg(target_os = "linux")]
mod memory;
mod merging;
mod pruning;
mod recipes;
mod scoring;
mod support;
mod upcycling;

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use moe::recipe::{DataFile, Merge, Named, Recipe, Step};
use moe_checkpoint::{Checkpoint, Record};
use moe_cli::TINY_MOE;
use serde_json::{Value, json};
use support::{blake3_of, contents, find, moe, ok, refused, rows, text, words};

/// A recipe on the bundled model, small enough to take a second.
fn small(mut recipe: Recipe, out: &Path) -> Recipe {
    recipe.model = TINY_MOE.into();
    recipe.out = out.to_path_buf();
    recipe.data.calibration = vec![DataFile::Path(rows("arithmetic_calibration").into())];
    (recipe.data.samples, recipe.data.length) = (8, 48);
    recipe.data.wave_tokens = NonZeroUsize::new(128).unwrap();
    for step in &mut recipe.steps {
        match step {
            Step::Tune(tune) => {
                tune.steps = tune.steps.or(Some(2));
                tune.step_tokens = NonZeroUsize::new(128).unwrap();
                if tune.method == Named::Name("smt".into()) {
                    // Blocks as large as published do not fit into this model.
                    tune.method = Named::parse(r#"{"type": "smt", "block": 16, "warmup_steps": 1}"#).unwrap();
                }
                if tune.labels.is_some() {
                    tune.data = vec![DataFile::Path(of_two_tasks(out))];
                }
            }
            // Groups as large as usual do not fit into this model.
            Step::Quantize(quantize) => {
                quantize.format = Named::parse(r#"{"type": "int", "bits": 4, "group_size": 32}"#).unwrap();
            }
            Step::Evolve(evolve) => (evolve.population, evolve.pruning, evolve.merging) = (3, 1, 1),
            Step::Merge(Merge { training: Some(training), .. }) => training.train.max_steps = Some(2),
            _ => {}
        }
    }
    // The second stage of a training has the rows of the first.
    let first = recipe.steps.iter().find_map(|step| match step {
        Step::Tune(tune) if !tune.data.is_empty() => Some(tune.data.clone()),
        _ => None,
    });
    for step in &mut recipe.steps {
        if let (Step::Tune(tune), Some(data)) = (step, &first) {
            tune.data.clone_from(data);
        }
    }
    recipe
}

/// Rows of two tasks, with a field that says which.
fn of_two_tasks(out: &Path) -> PathBuf {
    let path = out.with_extension("tasks.jsonl");
    let mut lines = String::new();
    for number in 0..4 {
        for task in ["arithmetic", "facts"] {
            let text = fs::read_to_string(rows(&format!("{task}_calibration"))).unwrap();
            let mut row: Value = serde_json::from_str(text.lines().nth(number).unwrap()).unwrap();
            row["task"] = json!(task);
            lines += &format!("{row}\n");
        }
    }
    fs::write(&path, lines).unwrap();
    path
}

fn written(recipe: &Recipe, dir: &Path) -> PathBuf {
    let path = dir.join("recipe.json");
    fs::write(&path, serde_json::to_string_pretty(recipe).unwrap()).unwrap();
    path
}

#[test]
fn every_published_recipe_runs_on_the_bundled_model() {
    let dir = tempfile::tempdir().unwrap();
    for name in Recipe::names() {
        let out = dir.path().join(name);
        let recipe = small(Recipe::published(name).unwrap(), &out);
        assert!(!recipe.about.is_empty(), "{name}");
        let file = written(&recipe, dir.path());
        ok(&["run", text(&file), "--check"]);
        assert!(!out.exists(), "{name}: a check does nothing");
        let report: Value = serde_json::from_str(&ok(&["run", text(&file), "--json"])).unwrap();
        assert_eq!(report["steps"].as_array().unwrap().len(), recipe.steps.len(), "{name}");
        let model = out.join("model");
        let smaller = Checkpoint::open(&model).unwrap();
        let base = Checkpoint::open(TINY_MOE).unwrap();
        let shrinks = recipe.steps.iter().any(|step| matches!(step, Step::Prune(_) | Step::Merge(_)));
        assert!(!shrinks || smaller.bytes_on_disk() < base.bytes_on_disk(), "{name}");
        // A mixture changes no weights: it stands beside the model as it was.
        if name == "lora-mixer" {
            assert!(moe_peft::open(out.join("model-adapter")).is_ok());
        } else {
            assert!(!Record::load(&model).unwrap().steps.is_empty(), "{name}");
            assert!(fs::read_to_string(model.join("README.md")).unwrap().contains("What was done"), "{name}");
        }
        assert!(fs::read_to_string(out.join("report.html")).unwrap().contains("<svg"), "{name}");
        // Nothing changed: nothing is done again.
        let again: Value = serde_json::from_str(&ok(&["run", text(&file), "--json", "--resume"])).unwrap();
        for step in again["steps"].as_array().unwrap().iter().filter(|step| step["step"] != "protect") {
            assert_eq!(step["reused"], json!(true), "{name}: {step}");
        }
    }
}

#[test]
fn a_recipe_that_was_killed_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let steps = json!([
        {"score": {"scorers": ["fisher", "reap"]}},
        {"prune": {"budget": {"ratio": 0.5}, "form": "auto"}},
        {"repair": {"type": "layer_refit"}},
        {"tune": {"method": "lora", "steps": 6, "learning_rate": 1e-3, "step_tokens": 128, "save_every": 2}},
        {"evaluate": {"data": [rows("facts_test")], "options": {"rows": 4, "max_new_tokens": 4}}},
        {"write": {}}
    ]);
    let recipe = |out: &Path| {
        let value = json!({"model": TINY_MOE, "out": out, "steps": steps});
        let mut recipe = small(serde_json::from_value(value).unwrap(), out);
        recipe.data.samples = 24;
        recipe
    };
    let whole = dir.path().join("whole");
    let start = std::time::Instant::now();
    ok(&["run", text(&written(&recipe(&whole), dir.path()))]);
    let took = start.elapsed();
    for (number, part) in [0.1, 0.3, 0.5, 0.7, 0.9].into_iter().enumerate() {
        let out = dir.path().join(format!("killed-{number}"));
        let file = written(&recipe(&out), dir.path());
        let mut process = Command::new(env!("CARGO_BIN_EXE_moe"))
            .args(["run", text(&file)])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_secs_f64(took.as_secs_f64() * part));
        let _ = process.kill();
        process.wait().unwrap();
        ok(&["run", text(&file), "--resume"]);
        assert_eq!(contents(&out.join("model")), contents(&whole.join("model")), "killed at {part}");
    }
}

#[test]
fn scores_are_made_once_and_used_at_any_ratio() {
    let dir = tempfile::tempdir().unwrap();
    let scores = dir.path().join("scores");
    let calibration = rows("arithmetic_calibration");
    ok(&[
        "score",
        "--model",
        TINY_MOE,
        "--calibration",
        &calibration,
        "--samples",
        "8",
        "--length",
        "48",
        "--scorer",
        "fisher",
        "--scorer",
        "reap",
        "--super-experts",
        "default",
        "--out",
        text(&scores),
    ]);
    let (fisher, reap) = (scores.join("fisher.safetensors"), scores.join("reap.safetensors"));
    assert!(ok(&["inspect", text(&fisher)]).contains("scores"));
    let mut bytes = Vec::new();
    for ratio in ["0.25", "0.5"] {
        let out = dir.path().join(format!("units-{ratio}"));
        ok(&[
            "prune",
            "--model",
            TINY_MOE,
            "--scores",
            text(&fisher),
            "--ratio",
            ratio,
            "--form",
            "ragged",
            "--out",
            text(&out),
        ]);
        bytes.push(Checkpoint::open(&out).unwrap().bytes_on_disk());
    }
    assert!(bytes[1] < bytes[0]);
    let out = dir.path().join("experts");
    ok(&[
        "prune",
        "--model",
        TINY_MOE,
        "--scores",
        text(&reap),
        "--pruner",
        "expert",
        "--ratio",
        "0.25",
        "--protect",
        text(&scores.join("protect.json")),
        "--out",
        text(&out),
    ]);
    let pruned = Checkpoint::open(&out).unwrap();
    assert!(
        pruned.shape().layers[0].num_experts() < Checkpoint::open(TINY_MOE).unwrap().shape().layers[0].num_experts()
    );
    assert!(ok(&["inspect", text(&out)]).contains("made by            prune"));
    // The saved plan again, in another form, and on a copy of the model with other side files.
    let plan = find(&dir.path().join("experts.steps"), "plan.json");
    assert!(ok(&["inspect", text(&plan)]).contains("plan of pruning"));
    let masked = dir.path().join("masked");
    ok(&["apply", "--model", TINY_MOE, "--plan", text(&plan), "--form", "ragged", "--out", text(&masked)]);
    assert_eq!(Checkpoint::open(&masked).unwrap().shape().units(), pruned.shape().units());
}

#[test]
fn models_are_measured_and_speak() {
    let dir = tempfile::tempdir().unwrap();
    let choices = dir.path().join("places_test.jsonl");
    let facts = fs::read_to_string(rows("facts_test")).unwrap();
    let rows: Vec<Value> = facts.lines().take(20).map(|line| serde_json::from_str(line).unwrap()).collect();
    let answers: Vec<&str> = rows.iter().map(|row| row["answer"].as_str().unwrap()).collect();
    let mut lines = String::new();
    for (number, row) in rows.iter().enumerate() {
        let wrong = answers.iter().find(|answer| **answer != answers[number]).unwrap();
        let question = json!({
            "prompt": row["prompt"], "choices": [format!(" {wrong}"), format!(" {}", answers[number])], "answer": 1
        });
        lines += &format!("{question}\n");
    }
    fs::write(&choices, lines).unwrap();
    let facts_file = format!("{TINY_MOE}/data/facts_test.jsonl");
    let report: Value = serde_json::from_str(&ok(&[
        "eval",
        "--model",
        TINY_MOE,
        "--data",
        text(&choices),
        "--data",
        &facts_file,
        "--rows",
        "20",
        "--max-new-tokens",
        "28",
        "--json",
    ]))
    .unwrap();
    let value = |key: &str| {
        let found = report["measured"].as_array().unwrap().iter().find(|measured| measured["key"] == key);
        found.unwrap()["value"].as_f64().unwrap()
    };
    assert!(value("places_choice") >= 0.95 && value("facts_exact") >= 0.9, "{report}");
    let prompt = rows[0]["prompt"].as_str().unwrap();
    let said = ok(&["generate", "--model", TINY_MOE, "--prompt", prompt, "--max-new-tokens", "8"]);
    assert!(said.contains(answers[0]), "{said}");
}

#[test]
fn what_is_wrong_is_said_in_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for (arguments, code, message) in [
        (&["prune", "--model", TINY_MOE, "--out", "x"][..], 2, "--ratio"),
        (&["run", "no-such-recipe"], 2, "expected a JSON file, or one of fisher-moe"),
        (&["run", "reap-25", "--model", TINY_MOE, "--out", text(&out)], 2, "data.calibration names no file"),
        (&["inspect", "no/such/file"], 1, "no/such/file"),
        (&["prune", "--model", TINY_MOE, "--scorer", "fishing", "--ratio", "0.5", "--out", text(&out)], 2, "fishing"),
        (
            &[
                "prune",
                "--model",
                TINY_MOE,
                "--data",
                "x.jsonl",
                "--ratio",
                "0.5",
                "--repair",
                "refits",
                "--out",
                text(&out),
            ],
            2,
            "refits",
        ),
    ] {
        let (found, error) = refused(arguments);
        assert!(found == code && error.contains(message), "{arguments:?}: {found} {error}");
        assert!(!error.contains("Error {") && !error.contains("panicked"), "{error}");
    }
    assert!(!out.exists());
}

#[cfg(not(feature = "hub"))]
#[test]
fn without_the_hub_its_verbs_say_how_to_get_it() {
    for line in [&["pull", "owner/name"][..], &["push", "out", "owner/name"]] {
        let (code, error) = refused(line);
        assert!(code == 2 && error.contains("--features hub"), "{error}");
        assert!(ok(&[line[0], "--help"]).contains("--features hub"));
    }
}

#[test]
fn the_program_explains_itself() {
    let dir = tempfile::tempdir().unwrap();
    let help = ok(&["--help"]);
    for verb in ["inspect", "score", "prune", "merge", "apply", "tune", "eval", "generate", "trace", "delta", "run"] {
        assert!(help.contains(verb), "{verb}");
        let help = ok(&[verb, "--help"]);
        assert!(help.contains("--") && help.len() > 200, "{verb}: {help}");
    }
    assert!(help.contains("Exit codes: 0 done; 1 stopped by an error") && help.contains("MOE_LOG"));
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = ok(&["completions", shell]);
        assert!(script.contains("--keep-list") || script.contains("keep-list"), "{shell}");
    }
    ok(&["man", "--out", text(dir.path())]);
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let named = listed.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let verbs: Vec<&str> = named.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(verbs.len() > 12, "{verbs:?}");
    for verb in verbs.into_iter().filter(|verb| *verb != "help") {
        assert!(dir.path().join(format!("moe-{verb}.1")).exists(), "{verb}");
    }
}

#[test]
fn a_score_that_was_killed_within_a_wave_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let data = rows("prose_calibration");
    let score = |out: &Path| -> Vec<String> {
        let line = "score --scorer fisher --samples 64 --length 128 --wave-tokens 8192 --model";
        words(line, &[TINY_MOE, "--data", &data, "--out", text(out)]).into_iter().map(String::from).collect()
    };
    let run = |line: &[String]| ok(&line.iter().map(String::as_str).collect::<Vec<_>>());
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    run(&score(&whole));
    let mut process = Command::new(env!("CARGO_BIN_EXE_moe"))
        .args(score(&killed))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // In the backward sweep: the forward sweep and the head are done.
    let unfinished = killed.join("statistics/unfinished-000000");
    let in_progress = || {
        let mut files = fs::read_dir(&unfinished).into_iter().flatten().flatten();
        files.any(|file| file.file_name().to_string_lossy().starts_with("backward-"))
    };
    while !in_progress() {
        assert!(process.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::sleep(Duration::from_millis(1));
    }
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(unfinished.is_dir(), "killed within the wave");
    run(&[score(&killed), vec!["--resume".into()]].concat());
    assert!(!unfinished.exists());
    for file in ["fisher.safetensors", "statistics/wave-000000.safetensors"] {
        assert_eq!(blake3_of(&killed.join(file)), blake3_of(&whole.join(file)), "{file}");
    }
}

#[test]
fn a_chain_is_checked_as_it_will_stand_after_each_step() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let check = |steps: &Value, memory: Option<&str>| {
        let mut value = json!({"model": TINY_MOE, "out": out, "steps": steps});
        if let Some(memory) = memory {
            value["max_memory"] = json!(memory);
        }
        let recipe = small(serde_json::from_value(value).unwrap(), &out);
        let found = moe(&["run", text(&written(&recipe, dir.path())), "--check"]);
        assert!(!out.exists(), "a check does nothing");
        (found.status.success(), String::from_utf8_lossy(&found.stderr).into_owned())
    };
    let refused = |steps: Value, memory: Option<&str>, reasons: &[&str]| {
        let (passed, error) = check(&steps, memory);
        assert!(!passed, "{steps}");
        assert!(reasons.iter().all(|reason| error.contains(reason)), "{steps}: {error}");
    };
    let merge = |form: &str| json!({"merge": {"recipe": "m-smoe", "form": form}});
    let score = json!({"score": {"scorers": ["magnitude"]}});
    let prune = json!({"prune": {"budget": {"ratio": 0.25}, "form": "ragged"}});
    refused(
        json!([merge("grouped"), score, prune, {"repair": {"type": "refit"}}]),
        None,
        &["step 4 (repair)", "share sets of weights"],
    );
    // What scores do not support, and what a form has no place for, whatever the scores are.
    let rates = json!({"prune": {"budget": {"ratio": 0.25}, "form": "ragged",
        "pruner": {"type": "expert", "allocator": {"type": "rate_distortion"}}}});
    refused(json!([{"score": {"scorers": ["esft"]}}, rates]), None, &["step 2 (prune)", "compared within one layer"]);
    let uniform = json!({"prune": {"budget": {"ratio": 0.25}, "form": "uniform",
        "pruner": {"type": "unit", "allocator": {"type": "global"}}}});
    refused(json!([score, uniform]), None, &["step 2 (prune)"]);
    // Memory of every sweep: refits, means, evidence, scores.
    for step in [json!({"repair": {"type": "layer_refit"}}), json!({"repair": {"type": "mean_output"}})] {
        refused(json!([score, prune, step]), Some("100MiB"), &["step 3 (repair)", "max_memory"]);
        let (passed, error) = check(&json!([score, prune, step]), None);
        assert!(passed, "{error}");
    }
    refused(json!([merge("grouped")]), Some("100MiB"), &["step 1 (merge)", "max_memory"]);
    refused(json!([{"score": {"scorers": ["reap"]}}]), Some("100MiB"), &["step 1 (score)", "max_memory"]);
}

//! `finetune_qwen`, from the command line's arguments to its files.

use std::fs;
use std::path::Path;

use clap::Parser;
use moe::Error;
use moe::progress::Progress;
use moe_cli::TINY_MOE;
use moe_cli::finetune::{Arguments, Finished, Results, list, run};
use moe_core::Model;
use moe_core::evaluate::Metric;
use moe_peft::{METHODS, Recipe};

fn arguments(out: &Path, more: &[&str]) -> Arguments {
    let small = ["finetune_qwen", "--eval-rows", "8", "--samples", "64", "--save-every", "2", "--out"];
    Arguments::parse_from(small.iter().chain(&[out.to_str().unwrap()]).chain(more))
}

fn finetune(out: &Path, more: &[&str]) -> Result<Finished, Error> {
    run(arguments(out, more), Progress::hidden())
}

#[test]
fn several_methods_are_trained_measured_and_written() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let finished = finetune(&out, &["--method", "full,smt,owlore", "--steps", "3"]).unwrap();
    let results = &finished.results;
    assert_eq!(results.before.len(), 4);
    assert_eq!(results.data[0], 64);
    for method in &results.methods {
        assert_eq!(method.evaluations.len(), 4, "{}", method.name);
        assert_eq!(method.training.losses.iter().map(|p| p.step).collect::<Vec<_>>(), [1, 2, 3], "{}", method.name);
        let dir = out.join(&method.name);
        assert_eq!(
            serde_json::from_slice::<Recipe>(&fs::read(dir.join("recipe.json")).unwrap()).unwrap(),
            method.recipe
        );
        assert!(fs::read_to_string(dir.join("trainable.txt")).unwrap().contains("routed experts gate_up"));
        let model = Model::open(dir.join("model"), &burn::tensor::Device::flex(), None).unwrap();
        assert_ne!(model.checkpoint().fingerprint(), "");
    }
    let full = &results.methods[0];
    assert!(full.training.losses[2].loss < full.training.losses[0].loss);
    assert_eq!(
        full.training.trained,
        Model::open(TINY_MOE, &burn::tensor::Device::flex(), None).unwrap().checkpoint().parameters()
    );
    let html = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(html.contains("<svg") && html.contains("owlore"));
    let saved: Results = serde_json::from_slice(&fs::read(out.join("results.json")).unwrap()).unwrap();
    assert_eq!(saved.methods.len(), 3);
    // finished methods are taken over, and an output is not written over
    let again = finetune(&out, &["--method", "full,smt,owlore", "--steps", "3", "--resume"]).unwrap();
    assert_eq!(again.results.methods, results.methods);
    assert!(finetune(&out, &["--method", "full", "--steps", "3"]).is_err());
}

#[test]
fn a_recipe_file_is_a_method_of_ones_own() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("mine.json");
    fs::write(&file, r#"{"method": {"type": "own", "router": true, "norms": true}}"#).unwrap();
    let data = Path::new(TINY_MOE).join("data/division_train.jsonl");
    let of_ones_own =
        ["--model", TINY_MOE, "--data", data.to_str().unwrap(), "--recipe", file.to_str().unwrap(), "--steps", "2"];
    let finished = finetune(&directory.path().join("out"), &of_ones_own).unwrap();
    assert!(finished.results.before.is_empty());
    let table = fs::read_to_string(directory.path().join("out/recipe/trainable.txt")).unwrap();
    let trains = |part: &str| {
        let line = table.lines().find(|line| line.starts_with(part)).unwrap();
        line.split_whitespace().last().unwrap() != "0"
    };
    assert!(trains("routers") && trains("norms") && !trains("query") && !trains("routed experts down"));
}

#[test]
fn what_was_pruned_is_trained_again() {
    let directory = tempfile::tempdir().unwrap();
    let finished =
        finetune(directory.path().join("out").as_path(), &["--recover", "--method", "full", "--steps", "4"]).unwrap();
    let results = finished.results;
    assert_eq!((results.before.len(), results.whole.as_ref().map(Vec::len)), (3, Some(3)));
    let perplexity = |evaluations: &[moe_core::evaluate::Evaluation]| match evaluations[2].metric {
        Metric::Perplexity(value) => value,
        Metric::ExactMatch(_) | Metric::Choice(_) => panic!("prose is not answered"),
    };
    let (whole, half) = (perplexity(&results.whole.unwrap()), perplexity(&results.before));
    assert!(whole < half, "{whole} {half}");
    assert_ne!(perplexity(&results.methods[0].evaluations), half);
}

#[test]
fn what_is_wrong_is_said_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let message = |more: &[&str]| finetune(&out, more).unwrap_err().to_string();
    assert!(message(&["--method", "prayer"]).contains("known are full"));
    assert!(message(&["--method", "full", "--learning-rate=-1"]).contains("learning rate: found -1"));
    assert!(
        message(&["--model", TINY_MOE]).contains("--data FILE") || message(&["--model", TINY_MOE]).contains("--method")
    );
    assert!(METHODS.iter().all(|method| list().contains(method.words) && list().contains(method.name)));
    assert!(!out.exists());
}

#[test]
fn rows_that_do_not_fit_are_counted_aloud_and_labels_come_from_their_field() {
    let directory = tempfile::tempdir().unwrap();
    let rows = directory.path().join("rows.jsonl");
    let text = |i: usize| {
        let (prompt, task) =
            if i.is_multiple_of(3) { ("12 / 3 = ".repeat(9), "long") } else { ("12 / 3 = ".to_owned(), "short") };
        format!("{}\n", serde_json::json!({ "prompt": prompt, "completion": "4", "task": task }))
    };
    fs::write(&rows, (0..9).map(text).collect::<String>()).unwrap();
    let out = directory.path().join("out");
    let of_ones_own = |more: &[&str]| {
        let some = ["--model", TINY_MOE, "--data", rows.to_str().unwrap(), "--steps", "2", "--step-tokens", "32"];
        finetune(&out, &[&some[..], more].concat())
    };
    let finished = of_ones_own(&["--method", "lora", "--length", "12"]).unwrap();
    assert_eq!((finished.results.data[0], finished.results.left_out), (6, [3, 3]));
    assert!(
        finished.text.contains("3 rows were left out") && finished.text.contains("\nlast loss:"),
        "{}",
        finished.text
    );
    let error = of_ones_own(&["--method", "lora-mixer-experts", "--force"]).unwrap_err().to_string();
    assert!(error.contains("labels for `gate`: label"), "{error}");
    let labels = ["--method", "lora-mixer-experts", "--labels", "task", "--learning-rate", "0.01", "--force"];
    let finished = of_ones_own(&labels).unwrap();
    assert_eq!(finished.results.methods[0].training.losses.len(), 2);
    let metrics = fs::read_to_string(out.join("lora-mixer-experts/training.jsonl")).unwrap();
    assert!(metrics.contains("\"gradient_norm\":") && !metrics.contains("\"gradient_norm\":0.0,"));
    assert!(moe_peft::open(out.join("lora-mixer-experts/adapter")).is_ok());
}

#[test]
fn training_options_are_flags_and_a_method_may_be_json() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let data = Path::new(TINY_MOE).join("data");
    let (one, two) = (data.join("division_train.jsonl"), data.join("facts_calibration.jsonl"));
    let (one, two) = (format!("{}=3", one.display()), format!("{}=1", two.display()));
    let flags = [
        "--model",
        TINY_MOE,
        "--data",
        &one,
        "--data",
        &two,
        "--recipe",
        r#"{"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}"#,
        "--epochs",
        "1",
        "--learning-rate",
        "0.002",
        "--warmup",
        "0.5",
        "--decay",
        "linear",
        "--accumulate",
        "2",
        "--evaluate-every",
        "2",
        "--patience",
        "3",
        "--step-tokens",
        "128",
    ];
    let finished = finetune(&out, &flags).unwrap();
    let recipe = &finished.results.methods[0].recipe;
    let train = &recipe.train;
    assert_eq!((train.epochs, train.max_steps, train.waves_per_step), (1, None, 2));
    assert_eq!((train.evaluate_every, train.patience), (Some(2), Some(3)));
    assert_eq!((train.schedule.peak, train.schedule.warmup, train.schedule.warmup_steps), (0.002, 0.5, None));
    assert_eq!(serde_json::json!(train.schedule.decay), "linear");
    let method = serde_json::to_value(&recipe.method).unwrap();
    assert!(method["type"] == "lora" && method["r"] == 4, "{method}");
    assert_eq!(finished.results.data[0], 64);
}

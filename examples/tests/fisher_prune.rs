//! The whole path on the bundled model, with few samples and few rows.

use std::borrow::Cow;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{CommandFactory, FromArgMatches, Parser};
use moe::Result;
use moe::progress::Progress;
use moe_checkpoint::{
    Checkpoint, Dtype, ExpertPart, ModelDescription, ModelSource, RawMatrix, ScoreTable, TensorInfo, TensorSpec,
    WriteOptions, grouped_config, write,
};
use moe_cli::fisher_prune::{Arguments, Finished, run};
use moe_examples::TINY_MOE;
use moe_prune::PrunePlan;
use serde_json::Value;

fn data(name: &str) -> PathBuf {
    Path::new(TINY_MOE).join("data").join(name)
}

/// The arguments of a small run to `out`, and more.
fn arguments(out: &Path, more: &[&str]) -> Arguments {
    let calibration = data("arithmetic_calibration.jsonl");
    let small = ["--samples", "12", "--wave-tokens", "100", "--ratio", "0.5", "--eval-rows", "4", "--device", "flex"];
    let paths = ["--model", TINY_MOE, "--calibration", calibration.to_str().unwrap(), "--out", out.to_str().unwrap()];
    let given = ["program"].iter().chain(&paths).chain(&small).chain(more);
    Arguments::command()
        .args_override_self(true)
        .try_get_matches_from(given)
        .and_then(|m| Arguments::from_arg_matches(&m))
        .unwrap()
}

fn go(out: &Path, more: &[&str]) -> Result<Finished> {
    run(arguments(out, more), Progress::hidden())
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn everything_is_written_and_the_json_has_its_shape() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("deep/out");
    let (arithmetic, prose) = (data("arithmetic_test.jsonl"), data("prose_test.jsonl"));
    let evals = ["--eval", arithmetic.to_str().unwrap(), "--eval", prose.to_str().unwrap(), "--eval-length", "32"];
    let more = [&evals[..], &["--controls", "--generate", "--ratio", "0.7", "--json"]].concat();
    let finished = go(&out, &more).unwrap();

    let json = finished.results.to_json();
    assert_eq!(keys(&json), ["model", "base", "methods"]);
    let methods = ["fisher", "activation", "magnitude", "router_score", "random"];
    assert_eq!(keys(&json["methods"]), methods);
    let eval_keys = ["arithmetic_exact", "prose_ppl", "parameters", "bytes", "tokens_per_s", "export_dir"];
    assert_eq!(keys(&json["base"]), eval_keys);
    for method in methods {
        let ratios = &json["methods"][method];
        assert_eq!(keys(ratios), ["0.5", "0.7"]);
        for eval in ratios.as_object().unwrap().values() {
            assert_eq!(keys(eval), eval_keys);
            let checkpoint = Checkpoint::open(eval["export_dir"].as_str().unwrap()).unwrap();
            assert!(checkpoint.ragged());
            assert_eq!(eval["parameters"], checkpoint.parameters());
            assert_eq!(eval["bytes"], checkpoint.bytes_on_disk());
            assert!((0.0..=1.0).contains(&eval["arithmetic_exact"].as_f64().unwrap()));
            assert!(eval["prose_ppl"].as_f64().unwrap() > 1.0 && eval["tokens_per_s"].as_f64().unwrap() > 0.0);
        }
    }
    // 6,144 units of 3 * 128 parameters.
    let (base, half) = (&json["base"]["parameters"], &json["methods"]["fisher"]["0.5"]["parameters"]);
    assert_eq!(base.as_u64().unwrap() - half.as_u64().unwrap(), 3072 * 384);
    let saved = fs::read_to_string(out.join("results.json")).unwrap();
    assert_eq!(saved, serde_json::to_string_pretty(&json).unwrap());

    let scores = ScoreTable::load(out.join("scores.safetensors")).unwrap();
    assert_eq!(
        scores.layers.iter().map(|l| (l.layer, l.scores.len(), l.scores[0].len())).collect::<Vec<_>>(),
        [(0, 16, 96), (1, 16, 96), (2, 16, 96), (3, 16, 96)]
    );
    assert_eq!(PrunePlan::load(out.join("plan.json")).unwrap().units_kept(), 3072);
    let html = fs::read_to_string(out.join("report.html")).unwrap();
    assert_eq!(html.matches("<svg ").count(), 4);
    let links = html.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    assert!(
        !["http:", "https:", "src=", "<script", "<link", "@import", "url("].iter().any(|link| links.contains(link))
    );
    for line in ["fisher", "router_score", "arithmetic_exact: exact match of 4 generated answers"] {
        assert!(finished.text.contains(line), "{}", finished.text);
    }
}

#[test]
fn a_resumed_run_gives_the_same_files() {
    let directory = tempfile::tempdir().unwrap();
    let (whole, resumed) = (directory.path().join("whole"), directory.path().join("resumed"));
    let prose = data("prose_test.jsonl");
    let evals = ["--eval", prose.to_str().unwrap(), "--eval-length", "16"];
    go(&whole, &evals).unwrap();
    go(&resumed, &evals).unwrap();
    // What a run leaves that was killed while it collected.
    for name in ["results.json", "report.html", "measured.json", "plan.json", "scores.safetensors"] {
        fs::remove_file(resumed.join(name)).unwrap();
    }
    fs::remove_dir_all(resumed.join("fisher-0.5")).unwrap();
    let names = fs::read_dir(resumed.join("statistics")).unwrap().map(|entry| entry.unwrap().file_name());
    let waves = names.filter(|name| name.to_string_lossy().starts_with("wave-")).count();
    assert!(waves >= 4);
    for wave in 2..waves {
        fs::remove_file(resumed.join(format!("statistics/wave-{wave:06}.safetensors"))).unwrap();
    }

    let error = go(&resumed, &evals).unwrap_err().to_string();
    assert!(error.contains("exists already") && error.contains("--resume"), "{error}");
    let resume = [&evals[..], &["--resume"]].concat();
    let error = go(&resumed, &[&resume[..], &["--criterion", "abs"]].concat()).unwrap_err().to_string();
    assert!(error.contains("its scorers was") && error.contains("\"abs\""), "{error}");
    assert!(go(&resumed, &resume).unwrap().text.contains(&format!("2 of {waves} waves taken over")));
    for name in ["scores.safetensors", "plan.json", "fisher-0.5/model.safetensors", "fisher-0.5/config.json"] {
        assert!(fs::read(whole.join(name)).unwrap() == fs::read(resumed.join(name)).unwrap(), "{name}");
    }
    let metrics = |out: &Path| -> Value {
        let json: Value = serde_json::from_slice(&fs::read(out.join("results.json")).unwrap()).unwrap();
        json["methods"]["fisher"]["0.5"]["prose_ppl"].clone()
    };
    assert_eq!(metrics(&whole), metrics(&resumed));
    // A finished run can be asked for another ratio; what is there is taken over.
    let more = go(&resumed, &[&resume[..], &["--ratio", "0.25"]].concat()).unwrap();
    assert_eq!(more.results.methods.iter().map(|m| m.ratio).collect::<Vec<_>>(), [0.5, 0.25]);
}

#[test]
fn force_replaces_only_what_this_program_made() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    go(&out, &[]).unwrap();
    fs::write(out.join("mine"), "").unwrap();
    let finished = go(&out, &["--force", "--scope", "expert"]).unwrap();
    assert!(finished.text.contains("nothing was measured"));
    assert!(!out.join("mine").exists() && !directory.path().join("out.replaced").exists());
    assert!(!Checkpoint::open(out.join("fisher-0.5")).unwrap().ragged());

    let foreign = directory.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("thesis.tex"), "").unwrap();
    for flag in ["--force", "--resume"] {
        let error = go(&foreign, &[flag]).unwrap_err().to_string();
        assert!(error.contains("not an output of this program"), "{error}");
    }
    assert!(foreign.join("thesis.tex").exists());
}

#[test]
fn perplexity_of_answers_needs_no_generation() {
    let directory = tempfile::tempdir().unwrap();
    let facts = data("facts_test.jsonl");
    let finished =
        go(&directory.path().join("out"), &["--eval", facts.to_str().unwrap(), "--export", "masked"]).unwrap();
    let json = finished.results.to_json();
    let (base, pruned) = (&json["base"], &json["methods"]["fisher"]["0.5"]);
    assert!(base["facts_ppl"].as_f64().unwrap() < 2.0 && base.get("facts_exact").is_none());
    assert_eq!(base["parameters"], pruned["parameters"]);
    assert_eq!(keys(&json["methods"]), ["fisher"]);
}

#[test]
fn what_is_wrong_is_said_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let file = |name: &str, contents: &str| {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, contents).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let empty = file("empty.jsonl", "");
    let short = file("short.jsonl", "{\"input_ids\": [3]}\n");
    let dense = file("dense/config.json", "{\"model_type\": \"llama\"}");
    let dense = Path::new(&dense).parent().unwrap().to_str().unwrap();
    let answers = file("answers_test.jsonl", "{\"prompt\": \"a\", \"answer\": \"b\"}\n");
    let prose = data("prose_test.jsonl");
    let misnamed = data("prose_calibration.jsonl");
    let (prose, misnamed) = (prose.to_str().unwrap(), misnamed.to_str().unwrap());
    for (more, expected) in [
        (&["--model", "/nowhere"][..], "/nowhere: not a directory"),
        (&["--model", dense], "not a Mixture-of-Experts model"),
        (&["--calibration", "/nowhere.jsonl"], "/nowhere.jsonl: "),
        (&["--calibration", &empty], "the file has no row"),
        (&["--calibration", &short], "no usable row"),
        (&["--calibration", TINY_MOE], "config.json:1: fields"),
        (&["--eval", misnamed], "expected an evaluation file named NAME_test.jsonl"),
        (&["--eval", "/nowhere_test.jsonl"], "/nowhere_test.jsonl: "),
        (&["--eval", prose, "--eval", prose], "two evaluation files named prose"),
        (&["--eval", &answers], "--generate does not"),
        (&["--export", "uniform"], "--export uniform needs --scope expert"),
        (&["--device", "abacus"], "device `abacus`"),
        (&["--max-memory", "1MiB"], "max_memory of 1048576 bytes is too small"),
        (&["--out", TINY_MOE], "the output directory exists already"),
        (&["--out", "/"], "an output directory needs a name"),
        (&["--out", &empty, "--force"], "exists and is not a directory"),
    ] {
        let given = arguments(&out, more);
        let error = run(given, Progress::hidden()).unwrap_err().to_string();
        assert!(error.contains(expected), "{more:?}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
    assert!(!out.exists());

    for (more, expected) in [
        (["--ratio", "1"], "(0, 1)"),
        (["--ratio", "0.5,nan"], "(0, 1)"),
        (["--scope", "galaxy"], "`expert`, `layer` or `global`"),
        (["--export", "zip"], "`ragged`, `masked` or `fine_grained`"),
        (["--criterion", "taste"], "token, sequence or abs"),
        (["--samples", "0"], "at least 1"),
        (["--length", "1"], "at least 2"),
        (["--wave-tokens", "0"], "at least 1"),
        (["--max-memory", "much"], "such as 2GiB"),
    ] {
        let error = Arguments::try_parse_from(["program"].iter().chain(&more)).unwrap_err().to_string();
        assert!(error.contains(expected), "{more:?}: {error}");
    }
    let mut given = arguments(&out, &[]);
    given.calibration = None;
    assert_eq!(run(given, Progress::hidden()).unwrap_err().exit_code(), 2);
}

/// A copy of the bundled model with what `change` says of it, written.
fn changed(to: &Path, change: impl FnOnce(Arc<Checkpoint>) -> Checkpoint) -> String {
    let base = Arc::new(Checkpoint::open(TINY_MOE).unwrap());
    write(&change(base), to, &WriteOptions::default()).unwrap();
    to.display().to_string()
}

/// A model with a tensor of multi-token prediction.
struct Predicting(Arc<Checkpoint>);

impl ModelSource for Predicting {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> moe_checkpoint::Result<Cow<'_, [u8]>> {
        match tensor.name.starts_with("mtp.") {
            true => Ok(Cow::Owned(vec![0; range.len()])),
            false => self.0.tensor_bytes(&tensor.name, range),
        }
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.0)
    }
}

#[test]
fn further_layers_need_a_choice_before_anything_is_scored() {
    let directory = tempfile::tempdir().unwrap();
    let model = changed(&directory.path().join("model"), |base| {
        let mut description = ModelDescription::of(&base);
        let spec = TensorSpec { name: "mtp.fc.weight".into(), dtype: Dtype::BF16, shape: vec![4, 4] };
        description.tensors.push(spec);
        Checkpoint::from_source(description, Arc::new(Predicting(base))).unwrap()
    });
    let out = directory.path().join("out");
    let text = go(&out, &["--model", &model]).unwrap_err().to_string();
    assert!(text.contains("multi-token prediction") && text.contains("choose whether"), "{text}");
    assert!(!out.exists());
    let calibration = data("arithmetic_calibration.jsonl").display().to_string();
    go(&out, &["--model", &model, "--calibration", &calibration, "--mtp", "drop"]).unwrap();
    let pruned = Checkpoint::open(out.join("fisher-0.5")).unwrap();
    assert_eq!((pruned.mtp_tensors().count(), pruned.ragged()), (0, true));
}

#[test]
fn a_model_whose_experts_share_sets_is_scored_and_pruned() {
    let directory = tempfile::tempdir().unwrap();
    // Experts 2i and 2i + 1 share the weights of the first of them.
    let model = changed(&directory.path().join("model"), |base| {
        let layers = base.shape().layers.iter();
        let sets =
            layers.map(|layer| (layer.layer, (0..layer.num_experts() as u32).map(|expert| expert / 2).collect()));
        let config = grouped_config(base.raw_config(), &sets.collect()).unwrap();
        let mut description = ModelDescription { config, ..ModelDescription::of(&base) };
        // Of the experts of every layer, the first eight names stay.
        let of =
            |name: &str| name.split(".experts.").nth(1).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        description.tensors.retain(|spec| of(&spec.name).is_none_or(|expert| expert < 8));
        Checkpoint::from_source(description, Arc::new(Paired(base))).unwrap()
    });
    let out = directory.path().join("out");
    let finished = go(&out, &["--model", &model]).unwrap();
    let dir = finished.results.to_json()["methods"]["fisher"]["0.5"]["export_dir"].as_str().unwrap().to_string();
    let pruned = Checkpoint::open(dir).unwrap();
    assert!(pruned.grouped() && pruned.ragged());
    let stored: usize =
        (0..4).map(|layer| pruned.config().moe(layer).unwrap().stored_widths().iter().sum::<usize>()).sum();
    assert_eq!(stored, 4 * 8 * 96 / 2);
}

/// Every other expert's weights.
struct Paired(Arc<Checkpoint>);

impl ModelSource for Paired {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> moe_checkpoint::Result<Cow<'_, [u8]>> {
        self.0.tensor_bytes(&tensor.name, range)
    }

    fn makes_experts(&self, _: usize) -> bool {
        true
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> moe_checkpoint::Result<Option<RawMatrix<'_>>> {
        self.0.set_part(layer, 2 * set, part)
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.0)
    }
}

//! `moe prune`, flag by flag.

use std::fs;
use std::path::{Path, PathBuf};

use moe_checkpoint::Checkpoint;
use moe_cli::TINY_MOE;
use moe_prune::PrunePlan;
use serde_json::json;

use crate::support::{blake3_of, find, ok, refused, rows, text, words};

/// Scores by fisher and reap.
fn scores(dir: &Path) -> (PathBuf, PathBuf) {
    let (out, data) = (dir.join("scores"), rows("arithmetic_calibration"));
    let files = ["--model", TINY_MOE, "--data", &data, "--out", text(&out)];
    ok(&words("score --scorer fisher --scorer reap --samples 8 --length 48", &files));
    (out.join("fisher.safetensors"), out.join("reap.safetensors"))
}

/// Prunes the bundled model with these flags and gives the plan.
fn plan(dir: &Path, name: &str, flags: &str, more: &[&str]) -> PrunePlan {
    let out = dir.join(name);
    let files = [&["--model", TINY_MOE, "--out", text(&out)][..], more].concat();
    ok(&words(&format!("prune {flags}"), &files));
    PrunePlan::load(find(&dir.join(format!("{name}.steps")), "plan.json")).unwrap()
}

fn counts(plan: &PrunePlan) -> Vec<usize> {
    plan.kept.iter().map(|layer| layer.experts_kept().len()).collect()
}

fn widths(plan: &PrunePlan) -> Vec<usize> {
    plan.kept.iter().flat_map(|layer| layer.experts.iter().map(Vec::len)).collect()
}

#[test]
fn every_budget_is_met() {
    let dir = tempfile::tempdir().unwrap();
    let (fisher, reap) = scores(dir.path());
    let (fisher, reap) = (["--scores", text(&fisher)], ["--scores", text(&reap)]);
    let whole = Checkpoint::open(TINY_MOE).unwrap();
    let experts = whole.shape().layers[0].num_experts();
    let six = plan(dir.path(), "six", "--experts-per-layer 6", &reap);
    assert!(counts(&six).iter().all(|count| *count == 6), "{:?}", counts(&six));
    assert_eq!(Checkpoint::open(dir.path().join("six")).unwrap().shape().layers[0].num_experts(), 6);
    let four = plan(dir.path(), "four", "--ratio 0.3 --multiple-of 4", &reap);
    assert!(counts(&four).iter().all(|count| count % 4 == 0 && *count < experts), "{:?}", counts(&four));
    let bytes = whole.bytes_on_disk() * 3 / 4;
    plan(dir.path(), "bytes", &format!("--keep-bytes {bytes} --form ragged"), &fisher);
    let written = Checkpoint::open(dir.path().join("bytes")).unwrap().bytes_on_disk();
    assert!(written <= bytes && written > bytes * 9 / 10, "{written} of {bytes}");
    let parameters = whole.shape().parameters() / 2;
    let kept = plan(dir.path(), "count", &format!("--keep-parameters {parameters} --form ragged --plan-only"), &fisher);
    assert_eq!(kept.units_kept() as u64, parameters / whole.shape().parameters_per_unit() as u64);
    assert!(!dir.path().join("count").exists(), "only the plan was asked for");
}

#[test]
fn widths_and_allocators_are_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (fisher, _) = scores(dir.path());
    let fisher = ["--scores", text(&fisher)];
    let rounded = plan(
        dir.path(),
        "rounded",
        "--ratio 0.5 --round-to 16 --min-width 16 --allocator layer --form ragged",
        &fisher,
    );
    let found = widths(&rounded);
    assert!(found.iter().all(|width| width % 16 == 0 && *width >= 16), "{found:?}");
    assert_eq!(rounded.recipe["pruner"]["allocator"]["type"], "layer");
    // A unit pruner for stock loaders keeps one width, of eight unless said otherwise.
    let named = plan(dir.path(), "named", "--ratio 0.3 --pruner unit --form uniform", &fisher);
    let width = widths(&named)[0];
    assert!(width.is_multiple_of(8) && widths(&named).iter().all(|found| *found == width), "{:?}", widths(&named));
    let both =
        plan(dir.path(), "both", "--ratio 0.5 --pruner two_level --multiple-of 2 --round-to 4 --form ragged", &fisher);
    assert!(counts(&both).iter().all(|count| count % 2 == 0), "{:?}", counts(&both));
    assert!(widths(&both).iter().all(|width| width % 4 == 0));
    // JSON and a file of JSON are as good as a name.
    let file = dir.path().join("pruner.json");
    fs::write(&file, json!({"type": "wide", "whole": 0.25}).to_string()).unwrap();
    let from_file =
        plan(dir.path(), "file", "--ratio 0.4 --form ragged", &[&fisher[..], &["--pruner", text(&file)]].concat());
    let json = [&fisher[..], &["--pruner", r#"{"type":"wide","whole":0.25}"#]].concat();
    assert_eq!(from_file.kept, plan(dir.path(), "json", "--ratio 0.4 --form ragged", &json).kept);
}

#[test]
fn what_stays_can_be_chosen_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let (_, reap) = scores(dir.path());
    let shape = Checkpoint::open(TINY_MOE).unwrap().shape().clone();
    let keep: Vec<_> =
        shape.layers.iter().flat_map(|l| [0, 1, 2, 5].map(|e| json!({"layer": l.layer, "expert": e}))).collect();
    let list = dir.path().join("keep.json");
    fs::write(&list, json!(keep).to_string()).unwrap();
    let kept = plan(dir.path(), "kept", "", &["--keep-list", text(&list)]);
    assert!(kept.kept.iter().all(|layer| layer.experts_kept() == [0, 1, 2, 5]));
    assert_eq!(Checkpoint::open(dir.path().join("kept")).unwrap().shape().layers[0].num_experts(), 4);
    // The lowest expert by REAP stays where it is protected.
    let lowest = plan(dir.path(), "lowest", "--experts-per-layer 7 --plan-only", &["--scores", text(&reap)]);
    let (layer, expert) = (lowest.kept[0].layer, lowest.kept[0].removed[0]);
    let mask = dir.path().join("mask.json");
    fs::write(&mask, json!([{"layer": layer, "expert": expert}]).to_string()).unwrap();
    let flags = ["--scores", text(&reap), "--protect", text(&mask)];
    let protected = plan(dir.path(), "protected", "--experts-per-layer 7 --plan-only", &flags);
    assert!(!protected.kept[0].removed.contains(&expert));
}

#[test]
fn allocators_ask_the_running_model_where_they_need_it() {
    let dir = tempfile::tempdir().unwrap();
    let (_, reap) = scores(dir.path());
    let data = rows("arithmetic_calibration");
    let given = ["--scores", text(&reap), "--data", &data];
    let small = "--samples 4 --length 32 --form ragged --plan-only --pruner expert --ratio 0.25";
    for allocator in [
        r#"{"type":"rate_distortion","curves":{"measured":{"points":2}},"within":"compete"}"#,
        r#"{"type":"rate_distortion","curves":{"layer_errors":{"points":2}}}"#,
        r#"{"type":"rco","steps":2}"#,
        r#"{"type":"evolution","generations":1,"population":4}"#,
    ] {
        let name = format!("model-{}", allocator.len());
        let flags = [&given[..], &["--allocator", allocator]].concat();
        let made = plan(dir.path(), &name, small, &flags);
        assert!(made.recipe["pruner"]["allocator"]["type"].is_string() && made.units_kept() > 0, "{allocator}");
    }
    let out = dir.path().join("no-data");
    let without = ["--model", TINY_MOE, "--scores", text(&reap), "--allocator", "rco", "--out", text(&out)];
    let (code, error) = refused(&words("prune --pruner expert --ratio 0.25 --form ragged", &without));
    assert!(code == 2 && error.contains("running model"), "{error}");
}

#[test]
fn flags_that_would_do_nothing_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (_, reap) = scores(dir.path());
    let out = dir.path().join("out");
    let given = ["--model", TINY_MOE, "--scores", text(&reap), "--out", text(&out)];
    for (flags, message) in [
        ("--pruner expert --ratio 0.5 --round-to 8", "--round-to"),
        ("--pruner unit --ratio 0.5 --multiple-of 2", "--multiple-of"),
        ("--pruner unit --experts-per-layer 4", "experts_per_layer"),
        ("--experts-per-layer 16", "between 1 and 15"),
        ("--ratio 0.5 --experts-per-layer 4", "--experts-per-layer"),
    ] {
        let (code, error) = refused(&words(&format!("prune {flags}"), &given));
        assert!(code == 2 && error.contains(message), "{flags}: {error}");
    }
    assert!(!out.exists());
}

/// Layers of a refit, and waves of what scores are made of, done by several processes and taken over by one.
#[test]
fn work_that_is_shared_out_gives_the_model_of_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let (fisher, _) = scores(dir.path());
    let data = rows("arithmetic_calibration");
    let out = |name: &str| dir.path().join(name);
    let flags = "prune --ratio 0.5 --repair refit --samples 8 --length 48";
    let prune = |name: &str, more: &[&str]| {
        let (out, scores) = (out(name), text(&fisher).to_string());
        let files = ["--model", TINY_MOE, "--scores", &scores, "--data", &data, "--out", text(&out)];
        ok(&words(flags, &[&files[..], more].concat()))
    };
    prune("whole", &[]);
    let told = prune("one", &["--shard", "0/2"]);
    assert!(told.contains("share 0 of 2") && !out("one").exists(), "{told}");
    prune("two", &["--shard", "1/2"]);
    let taken = ["--absorb", text(&out("one")), "--absorb", text(&out("two"))].map(String::from);
    let taken: Vec<&str> = taken.iter().map(String::as_str).collect();
    prune("together", &taken);
    let digest = |name: &str| blake3_of(&find_file(&out(name), "safetensors"));
    assert_eq!(digest("whole"), digest("together"));

    // A recipe that scores shares the scoring; the run that takes over does the rest.
    let recipe = out("recipe.json");
    let steps = json!([{"score": {"scorers": ["fisher"]}}, {"prune": {"budget": {"ratio": 0.5}}}, {"write": {}}]);
    let of_rows = json!({"calibration": [{"path": data}], "samples": 8, "length": 48, "wave_tokens": 128});
    let whole = json!({"model": TINY_MOE, "data": of_rows, "out": out("r"), "steps": steps});
    fs::write(&recipe, whole.to_string()).unwrap();
    let run = |name: &str, more: &[&str]| {
        let out = out(name);
        ok(&[&["run", text(&recipe), "--out", text(&out)][..], more].concat())
    };
    run("r", &[]);
    run("r0", &["--shard", "0/2"]);
    run("r1", &["--shard", "1/2"]);
    let (r0, r1) = (out("r0"), out("r1"));
    let taken = ["--absorb", text(&r0), "--absorb", text(&r1)];
    run("r2", &taken);
    run("r2", &[&taken[..], &["--resume"]].concat());
    let model = |name: &str| blake3_of(&find_file(&out(name).join("model"), "safetensors"));
    assert_eq!(model("r"), model("r2"));

    // What cannot be shared out is refused before work, and so are parts that are not there.
    let (model, missing) = (["--model", TINY_MOE, "--data", &data], out("nowhere"));
    let more = ["--scores", text(&fisher), "--out", text(&missing)];
    let flags = "prune --ratio 0.5 --repair layer_refit --shard 0/2";
    let (code, error) = refused(&words(flags, &[&model[..], &more].concat()));
    assert!(code == 2 && error.contains("no step whose work can be shared out"), "{code}: {error}");
    let flags = "prune --ratio 0.5 --repair refit --absorb nobody";
    let (_, error) = refused(&words(flags, &[&model[..], &more].concat()));
    assert!(error.contains("nobody.steps: found no steps"), "{error}");
}

/// The first file of a directory that ends like this.
fn find_file(dir: &Path, ending: &str) -> PathBuf {
    let mut files: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().find(|path| path.extension().is_some_and(|found| found == ending)).unwrap()
}

/// What stock loaders read is chosen by what the model says on rows: plain uniform widths are among it, rounded up to a
/// multiple of 8, and the report tells what every form came to.
#[test]
fn the_form_is_the_one_of_the_least_measured_divergence() {
    let dir = tempfile::tempdir().unwrap();
    let (out, recipe) = (dir.path().join("out"), dir.path().join("recipe.json"));
    let value = json!({
        "model": TINY_MOE, "out": out,
        "data": {"calibration": [rows("arithmetic_calibration")], "samples": 24, "length": 48, "wave_tokens": 256},
        "steps": [{"score": {"scorers": ["fisher"]}}, {"prune": {"budget": {"ratio": 0.35}}}, {"write": {}}]
    });
    fs::write(&recipe, value.to_string()).unwrap();
    let report: serde_json::Value = serde_json::from_str(&ok(&["run", text(&recipe), "--json"])).unwrap();
    let summary = report["steps"][1]["summary"].as_str().unwrap().to_string();
    assert!(summary.contains("chosen by divergence in nats: "), "{summary}");
    for form in ["uniform 0.", "fine_grained in 2 pieces 0.", "fine_grained in 4 pieces 0."] {
        assert!(summary.contains(form), "{summary}");
    }
    let form: serde_json::Value = serde_json::from_str(&fs::read_to_string(find(&out, "form.json")).unwrap()).unwrap();
    let tried = form["tried"].as_array().unwrap();
    let divergence = |of: &serde_json::Value| of["divergence"].as_f64().unwrap();
    let least = tried.iter().map(divergence).fold(f64::INFINITY, f64::min);
    assert_eq!(divergence(&form), least, "{form}");
    let uniform = tried.iter().find(|tried| tried["form"] == "uniform").unwrap();
    // 65 % of 96 are 62.4 units.
    assert_eq!(uniform["width"], 64);
    assert!(tried.iter().all(|tried| tried["width"].as_u64().unwrap() % 8 == 0), "{form}");
    // The model that was written is of the form that was chosen.
    let model = Checkpoint::open(out.join("model")).unwrap();
    let width = model.shape().uniform_width().unwrap() as u64;
    assert!(tried.iter().any(|tried| divergence(tried) == least && tried["width"] == width), "{width}: {form}");
}

/// Where groups of experts are ranked by their two best, pieces come in steps of a quarter of this model: three eighths
/// of it would become a half, which is closer to the full model for its size alone.
#[test]
fn a_form_that_keeps_more_than_was_asked_for_is_not_chosen() {
    let dir = tempfile::tempdir().unwrap();
    let (out, data) = (dir.path().join("out"), rows("arithmetic_calibration"));
    let model = Path::new(TINY_MOE).with_file_name("tiny-deepseek");
    let files = ["--model", text(&model), "--data", &data, "--out", text(&out)];
    ok(&words("prune --scorer activation --ratio 0.625 --samples 12 --length 48", &files));
    let form: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(find(&dir.path().join("out.steps"), "form.json")).unwrap()).unwrap();
    assert_eq!(form["form"], "uniform", "{form}");
    for tried in form["tried"].as_array().unwrap().iter().filter(|tried| tried["form"] != "uniform") {
        let reason = tried["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("may keep 1152 units, but it would keep 1536 of 3072"), "{tried}");
    }
}

#[test]
fn the_scorer_that_stays_closest_on_rows_held_back_is_chosen_recorded_and_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let (out, data) = (dir.path().join("out"), rows("arithmetic_calibration"));
    let line = "prune --scorer auto --ratio 0.5 --form uniform --loss answers --samples 24 --length 64 --json";
    let files = ["--model", TINY_MOE, "--data", &data, "--out", text(&out)];
    let summary_of = |more: &[&str]| -> String {
        let report: serde_json::Value = serde_json::from_str(&ok(&words(line, &[&files[..], more].concat()))).unwrap();
        report["steps"].as_array().unwrap().iter().find(|step| step["step"] == "prune").unwrap()["summary"]
            .as_str()
            .unwrap()
            .to_string()
    };
    let summary = summary_of(&[]);
    let steps = dir.path().join("out.steps");
    let choice: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(find(&steps, "scorer.json")).unwrap()).unwrap();
    let tried = choice["tried"].as_array().unwrap();
    let divergence = |of: &serde_json::Value| of["divergence"].as_f64().unwrap();
    let names: Vec<&str> = tried.iter().map(|tried| tried["scorer"].as_str().unwrap()).collect();
    assert_eq!(names, ["fisher", "taylor", "coupled", "heapr"]);
    let best = &tried[choice["best"].as_u64().unwrap() as usize];
    assert_eq!(divergence(best), tried.iter().map(divergence).fold(f64::INFINITY, f64::min), "{choice}");
    assert!(tried.iter().any(|tried| divergence(tried) > divergence(best)), "{choice}");
    let scorer = best["scorer"].as_str().unwrap();
    assert!(summary.starts_with(&format!("scores by {scorer} (chosen by divergence in nats: ")), "{summary}");
    // The plan is that of the chosen scorer on all rows.
    let plan = |dir: &Path| -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(find(dir, "plan.json")).unwrap()).unwrap()
    };
    let named = dir.path().join("named");
    let line = line.replace("--scorer auto", &format!("--scorer {scorer}"));
    ok(&words(&line, &["--model", TINY_MOE, "--data", &data, "--out", text(&named)]));
    assert_eq!(plan(&steps)["kept"], plan(&dir.path().join("named.steps"))["kept"]);
    assert_eq!(summary_of(&["--resume"]), summary);
}

#[test]
fn a_choice_among_scorers_without_scorers_rows_or_units_is_refused_before_work() {
    let dir = tempfile::tempdir().unwrap();
    let (out, data) = (dir.path().join("out"), rows("arithmetic_calibration"));
    let files = ["--model", TINY_MOE, "--data", &data, "--out", text(&out)];
    let (_, error) = refused(&words("prune --scorer auto --pruner expert --ratio 0.5", &files));
    assert!(error.contains("auto chooses among scorers of units"), "{error}");
    let asking = r#"prune --scorer auto --allocator evolution --ratio 0.5 --form ragged"#;
    let (_, error) = refused(&words(asking, &files));
    assert!(error.contains("takes one scorer; name it"), "{error}");
    let recipe = dir.path().join("recipe.json");
    let value = serde_json::json!({
        "model": TINY_MOE, "out": out, "data": {"calibration": [data]},
        "steps": [{"prune": {"scores": "auto", "budget": {"ratio": 0.5}}}]
    });
    fs::write(&recipe, value.to_string()).unwrap();
    let (_, error) = refused(&["run", text(&recipe)]);
    assert!(error.contains("auto chooses among the scorers of earlier scores"), "{error}");
    assert!(!out.exists() && !dir.path().join("out.steps").exists());
}

#[test]
fn scores_of_experts_where_units_go_are_refused_before_anything_is_scored() {
    let dir = tempfile::tempdir().unwrap();
    let (out, data) = (dir.path().join("out"), rows("arithmetic_calibration"));
    for form in ["auto", "uniform", "ragged"] {
        let line = format!("prune --scorer reap --ratio 0.5 --form {form} --samples 8 --length 48");
        let files = ["--model", TINY_MOE, "--data", &data, "--out", text(&out)];
        for more in [&["--check"][..], &[]] {
            let (_, error) = refused(&words(&line, &[&files[..], more].concat()));
            assert!(error.contains("the table scores experts") && !error.contains("one pass"), "{form}: {error}");
        }
        assert!(!out.exists(), "{form}");
    }
}

//! Recipes: the schema, what a check tells, fine-tuning as a step, artifacts that are reused.

use std::fs;

use moe::recipe::{Named, Recipe, Step};
use moe_checkpoint::Checkpoint;
use moe_cli::TINY_MOE;
use serde_json::{Value, json};

use crate::small;
use crate::support::{contents, find, ok, refused, rows, text};

/// What of a value a schema does not allow: the part of JSON Schema that schemas of types are made of.
fn violations(schema: &Value, value: &Value, root: &Value, at: &str, found: &mut Vec<String>) {
    if let Some(path) = schema.get("$ref").and_then(Value::as_str) {
        return violations(root.pointer(&path[1..]).unwrap(), value, root, at, found);
    }
    for all in ["anyOf", "oneOf"] {
        if let Some(options) = schema.get(all).and_then(Value::as_array) {
            let fits = |option: &&Value| {
                let mut wrong = Vec::new();
                violations(option, value, root, at, &mut wrong);
                wrong.is_empty()
            };
            if !options.iter().any(|option| fits(&option)) {
                found.push(format!("{at}: none of {all}: {value}"));
            }
        }
    }
    if schema.get("const").is_some_and(|constant| constant != value) {
        found.push(format!("{at}: {value}"));
    }
    if schema.get("enum").and_then(Value::as_array).is_some_and(|allowed| !allowed.contains(value)) {
        found.push(format!("{at}: {value}"));
    }
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let is = |name: &Value| name == kind || (name == "number" && kind == "integer");
    match schema.get("type") {
        Some(Value::Array(names)) if !names.iter().any(is) => found.push(format!("{at}: {kind}")),
        Some(name @ Value::String(_)) if !is(name) => found.push(format!("{at}: {kind}")),
        _ => {}
    }
    if let Value::Object(fields) = value {
        let properties = schema.get("properties").and_then(Value::as_object);
        for name in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
            if !fields.contains_key(name.as_str().unwrap()) {
                found.push(format!("{at}: lacks {name}"));
            }
        }
        for (name, value) in fields {
            match properties.and_then(|properties| properties.get(name)) {
                Some(schema) => violations(schema, value, root, &format!("{at}/{name}"), found),
                None if schema.get("additionalProperties") == Some(&json!(false)) => {
                    found.push(format!("{at}: {name}"))
                }
                None => {}
            }
        }
    }
    if let (Value::Array(items), Some(schema)) = (value, schema.get("items")) {
        items.iter().enumerate().for_each(|(i, item)| violations(schema, item, root, &format!("{at}/{i}"), found));
    }
}

fn wrong(value: &Value) -> Vec<String> {
    let (schema, mut found) = (Recipe::schema(), Vec::new());
    violations(&schema, value, &schema, "", &mut found);
    found
}

#[test]
fn the_schema_is_shipped_and_every_recipe_is_valid_by_it() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../moe/recipe.schema.json");
    let printed = ok(&["run", "--schema"]);
    assert_eq!(fs::read_to_string(file).unwrap(), printed, "moe run --schema > crates/moe/recipe.schema.json");
    assert_eq!(serde_json::from_str::<Value>(&printed).unwrap(), Recipe::schema());
    for name in Recipe::names() {
        let file = format!("{}/../moe/recipes/{name}.json", env!("CARGO_MANIFEST_DIR"));
        let value: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
        assert_eq!(wrong(&value), Vec::<String>::new(), "{name}");
        assert_eq!(
            wrong(&serde_json::to_value(Recipe::published(name).unwrap()).unwrap()),
            Vec::<String>::new(),
            "{name}"
        );
        assert!(ok(&["run", "list"]).contains(name), "{name}");
    }
    for bad in [
        json!({}),
        json!({"steps": [{"scores": {}}]}),
        json!({"steps": [{"write": {"too": "x"}}]}),
        json!({"steps": [], "sead": 1}),
        json!({"steps": [{"tune": {"data": []}}]}),
    ] {
        assert!(!wrong(&bad).is_empty(), "{bad}");
        assert!(serde_json::from_value::<Recipe>(bad).is_err());
    }
}

#[test]
fn a_check_tells_what_every_step_will_take() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let recipe = small(Recipe::published("reap-lora").unwrap(), &out);
    let file = dir.path().join("recipe.json");
    fs::write(&file, serde_json::to_string(&recipe).unwrap()).unwrap();
    let shown = ok(&["run", text(&file), "--check"]);
    assert!(shown.contains("about, seconds") && shown.contains("nothing was done"), "{shown}");
    let report: Value = serde_json::from_str(&ok(&["run", text(&file), "--check", "--json"])).unwrap();
    let steps = report["steps"].as_array().unwrap();
    let number = |step: usize, key: &str| steps[step][key].as_f64().unwrap();
    let base = Checkpoint::open(TINY_MOE).unwrap();
    assert_eq!(number(0, "parameters") as u64, base.parameters());
    let left = base.parameters() as f64 - 0.25 * base.shape().parameters() as f64;
    assert!((number(1, "parameters") - left).abs() < 2.0, "{report}");
    assert!(number(0, "memory") > 1e6 && number(2, "memory") >= number(0, "memory"), "{report}");
    assert!(number(0, "seconds") > 0.0 && number(2, "seconds") > 0.0, "{report}");
    assert!(!out.exists());
}

#[test]
fn what_was_trained_is_folded_or_stays_an_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, tune: Value| {
        let out = dir.path().join(name);
        let steps = json!([
            {"tune": tune},
            {"evaluate": {"data": [rows("facts_test")], "options": {"rows": 4, "max_new_tokens": 4}}},
            {"write": {}}
        ]);
        let recipe = serde_json::from_value(json!({"model": TINY_MOE, "out": out, "steps": steps})).unwrap();
        let file = dir.path().join("recipe.json");
        fs::write(&file, serde_json::to_string(&small(recipe, &out)).unwrap()).unwrap();
        let report: Value = serde_json::from_str(&ok(&["run", text(&file), "--json"])).unwrap();
        (out, report)
    };
    let base = Checkpoint::open(TINY_MOE).unwrap();
    let (folded, _) = run("folded", json!({"method": "lora", "steps": 2, "learning_rate": 0.01}));
    assert!(!Checkpoint::open(folded.join("model")).unwrap().is_model(&base.fingerprint()));
    assert!(!folded.join("model-adapter").exists());
    let (kept, report) = run("kept", json!({"method": "lora", "steps": 2, "learning_rate": 0.01, "fold": false}));
    assert!(Checkpoint::open(kept.join("model")).unwrap().is_model(&base.fingerprint()));
    assert!(kept.join("model-adapter/adapter_model.safetensors").exists(), "{report}");
    let (mixture, _) = run("mixture", json!({"method": "mola", "steps": 1}));
    assert!(moe_peft::open(mixture.join("model-adapter")).is_ok());
    let (condensers, _) = run("condensers", json!({"method": "condensers", "steps": 2}));
    assert!(condensers.join("model/condensers.safetensors").exists());
    // What stays beside the weights is not lost by what follows.
    let out = dir.path().join("lost");
    let steps =
        json!([{"tune": {"method": "mola"}}, {"score": {"scorers": ["reap"]}}, {"prune": {"budget": {"ratio": 0.5}}}]);
    let recipe = small(serde_json::from_value(json!({"model": TINY_MOE, "out": out, "steps": steps})).unwrap(), &out);
    let file = dir.path().join("lost.json");
    fs::write(&file, serde_json::to_string(&recipe).unwrap()).unwrap();
    let (code, error) = refused(&["run", text(&file)]);
    assert!(code == 2 && error.contains("step 3 (prune)") && error.contains("beside the weights"), "{error}");
    let unfolded = json!([{"tune": {"method": "full", "fold": false}}]);
    let recipe =
        small(serde_json::from_value(json!({"model": TINY_MOE, "out": out, "steps": unfolded})).unwrap(), &out);
    fs::write(&file, serde_json::to_string(&recipe).unwrap()).unwrap();
    assert!(refused(&["run", text(&file)]).1.contains("fold"));
}

#[test]
fn curves_are_measured_once_for_every_budget() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut recipe = small(Recipe::published("rate-distortion").unwrap(), &out);
    let file = dir.path().join("recipe.json");
    let mut runs = Vec::new();
    for ratio in [0.25, 0.5] {
        if let Step::Prune(prune) = &mut recipe.steps[1] {
            prune.budget = Some(moe_prune::Budget::Ratio(ratio));
        }
        recipe.steps.truncate(2);
        fs::write(&file, serde_json::to_string(&recipe).unwrap()).unwrap();
        ok(&["run", text(&file), "--resume"]);
        let curves: Vec<_> = fs::read_dir(out.join("steps"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| text(path).contains("/curves-"))
            .collect();
        assert_eq!(curves.len(), 1);
        runs.push(fs::metadata(curves[0].join("curves.json")).unwrap().modified().unwrap());
        assert!(ok(&["inspect", text(&curves[0].join("curves.json"))]).contains("curves"));
    }
    assert_eq!(runs[0], runs[1]);
    let plan = fs::read_to_string(find(&out, "plan.json")).unwrap();
    assert!(
        plan.contains("\"measured\"") && !plan.contains("curves.json"),
        "a plan follows from curves, not from where they lie"
    );
}

#[test]
fn evidence_is_collected_once_for_every_form() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut recipe = small(Recipe::published("hc-smoe").unwrap(), &out);
    let file = dir.path().join("recipe.json");
    for form in ["grouped", "stock"] {
        if let Step::Merge(merge) = &mut recipe.steps[0] {
            merge.recipe = Named::Name("hc-smoe".into());
            merge.form = serde_json::from_value(json!(form)).unwrap();
        }
        recipe.steps.truncate(1);
        fs::write(&file, serde_json::to_string(&recipe).unwrap()).unwrap();
        ok(&["run", text(&file), "--resume"]);
    }
    let names: Vec<String> =
        fs::read_dir(out.join("steps")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    let count = |kind: &str| names.iter().filter(|name| name.starts_with(kind)).count();
    assert_eq!((count("evidence-"), count("merge-")), (1, 2), "{names:?}");
    assert!(contents(&out.join("steps").join(names.iter().find(|n| n.starts_with("evidence")).unwrap())).len() > 1);
}

#[test]
fn a_frontier_is_measured_once_shown_in_the_report_and_leaves_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let file = dir.path().join("recipe.json");
    let save = |steps: Value| {
        let recipe = serde_json::from_value(json!({"model": TINY_MOE, "out": out, "steps": steps})).unwrap();
        fs::write(&file, serde_json::to_string(&small(recipe, &out)).unwrap()).unwrap();
    };
    let frontier = json!({"frontier": {"ratios": [0.5], "formats": ["int4", "int8"], "budgets": 1}});
    save(json!([frontier, {"write": {}}]));
    let estimate: Value = serde_json::from_str(&ok(&["run", text(&file), "--check", "--json"])).unwrap();
    assert!(estimate["steps"][0]["seconds"].as_f64().unwrap() > 0.0, "{estimate}");
    let report: Value = serde_json::from_str(&ok(&["run", text(&file), "--json"])).unwrap();
    let summary = report["steps"][0]["summary"].as_str().unwrap();
    // Three models in BF16, in two formats and by layer within one budget each, and the best within two.
    assert!(summary.starts_with("14 models from ") && summary.contains("best at their size"), "{summary}");
    let points: Value = serde_json::from_str(&fs::read_to_string(find(&out, "frontier.json")).unwrap()).unwrap();
    assert_eq!(points.as_array().unwrap().len(), 14);
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    for part in ["Divergence by size", "At equal bytes", "50% of the experts pruned", "33% of the units pruned"] {
        assert!(page.contains(part), "{part}");
    }
    let base = Checkpoint::open(TINY_MOE).unwrap();
    assert!(Checkpoint::open(out.join("model")).unwrap().is_model(&base.fingerprint()));
    let again: Value = serde_json::from_str(&ok(&["run", text(&file), "--resume", "--json"])).unwrap();
    assert_eq!(again["steps"][0]["reused"], true, "{again}");
    // What could not be measured is said before anything is run.
    for (steps, part) in [
        (json!([{"frontier": {"ratios": [1.5]}}]), "found 1.5"),
        (json!([{"frontier": {"formats": []}}]), "found none"),
        (json!([{"quantize": {"format": "int8"}}, {"frontier": {}}]), "measure before it"),
        (json!([{"tune": {"method": "mola"}}, {"frontier": {}}]), "would be lost"),
    ] {
        save(steps);
        let (code, error) = refused(&["run", text(&file), "--resume"]);
        assert!(code == 2 && error.contains(part) && error.contains("(frontier)"), "{error}");
    }
}

//! The reports that verbs write for people: one well-formed file each, with every measured number, that asks for
//! nothing from elsewhere.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use moe_cli::TINY_MOE;
use serde_json::Value;

/// Elements of HTML that have no end.
const VOID: [&str; 2] = ["meta", "br"];

fn moe(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_moe")).args(arguments).stdin(Stdio::null()).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn rows(name: &str) -> String {
    format!("{TINY_MOE}/data/{name}.jsonl")
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The report, after everything was checked that holds for all of them.
fn checked(path: &Path, figures: usize) -> String {
    let html = fs::read_to_string(path).unwrap();
    assert!(html.starts_with("<!DOCTYPE html>\n<html lang=\"en\">"), "{}", path.display());
    assert!(html.contains("name=\"viewport\" content=\"width=device-width"), "readable on a phone");
    assert!(html.contains("prefers-color-scheme: dark"), "both color schemes");
    let lower = html.to_lowercase();
    for foreign in ["src=", "href=", "url(", "@import", "<script", "<link", "<iframe", "<img"] {
        assert!(!lower.contains(foreign), "{}: {foreign}", path.display());
    }
    well_formed(&html);
    assert!(html.matches("<svg ").count() >= figures, "{}: fewer than {figures} figures", path.display());
    assert!(!html.contains("NaN"), "{}", path.display());
    html
}

/// Every element that is opened is closed, in order.
fn well_formed(html: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = html.strip_prefix("<!DOCTYPE html>").unwrap();
    while let Some(start) = rest.find('<') {
        let end = start + rest[start..].find('>').expect("a tag that does not end");
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        let name = tag.trim_start_matches('/').split([' ', '\n', '/']).next().unwrap();
        if let Some(closed) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(closed.trim()), "…{}", &rest[..rest.len().min(80)]);
        } else if !tag.ends_with('/') && !tag.starts_with('!') && !VOID.contains(&name) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "never closed: {open:?}");
}

fn has_cell(html: &str, number: &str) {
    assert!(html.contains(&format!(">{number}</td>")), "{number} is not in the report");
}

#[test]
fn scores_are_shown_with_their_tail_and_the_routing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("scores");
    let data = rows("arithmetic_calibration");
    let arguments = ["score", "--model", TINY_MOE, "--data", &data, "--samples", "16", "--out", text(&out)];
    moe(&[&arguments[..], &["--scorer", "fisher", "--scorer", "reap"]].concat());
    let html = checked(&out.join("report.html"), 5);
    assert!(html.contains("Where importance sits: fisher") && html.contains("Where importance sits: reap"));
    assert!(html.contains("<h2>Routing</h2>"));
}

#[test]
fn a_pruning_is_shown_with_all_that_was_measured() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("half");
    let (data, test) = (rows("facts_calibration"), rows("facts_test"));
    let arguments = ["prune", "--model", TINY_MOE, "--data", &data, "--samples", "16", "--eval", &test, "--json"];
    let json = moe(&[&arguments[..], &["--ratio", "0.5", "--form", "ragged", "--out", text(&out)]].concat());
    let report: Value = serde_json::from_str(&json).unwrap();
    let html = checked(&dir.path().join("half.steps/report.html"), 7);
    let mut measured = 0;
    for step in report["steps"].as_array().unwrap() {
        for found in step["measured"].as_array().into_iter().flatten() {
            has_cell(&html, &format!("{:.4}", found["value"].as_f64().unwrap()));
            measured += 1;
        }
        has_cell(&html, &moe::format::count(step["parameters"].as_u64().unwrap()));
    }
    assert_eq!(measured, 2);
    for section in ["What it can do", "Sizes", "Where importance sits: fisher", "Routing", "Units of every expert"] {
        assert!(html.contains(section), "{section}");
    }
}

#[test]
fn a_merge_is_shown_with_its_groups() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("merged");
    let (data, test) = (rows("prose_calibration"), rows("prose_test"));
    let arguments = ["merge", "--model", TINY_MOE, "--data", &data, "--samples", "32", "--recipe", "hc-smoe", "--json"];
    let json = moe(&[&arguments[..], &["--ratio", "0.25", "--test", &test, "--out", text(&out)]].concat());
    let report: Value = serde_json::from_str(&json).unwrap();
    let html = checked(&dir.path().join("merged.report.html"), 6);
    for key in ["before", "after", "divergence"] {
        has_cell(&html, &format!("{:.4}", report["test"][key].as_f64().unwrap()));
    }
    has_cell(&html, &moe::format::size(report["merge"]["bytes"]["after"].as_u64().unwrap()));
    assert!(html.contains("Groups of experts by hc-smoe"));
}

#[test]
fn measurements_and_comparisons_are_shown_where_they_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (evaluated, compared) = (dir.path().join("eval.html"), dir.path().join("compare.html"));
    let test = rows("facts_test");
    let arguments = ["eval", "--model", TINY_MOE, "--data", &test, "--rows", "20", "--json"];
    let json: Value = serde_json::from_str(&moe(&[&arguments[..], &["--report", text(&evaluated)]].concat())).unwrap();
    let html = checked(&evaluated, 1);
    has_cell(&html, &format!("{:.4}", json["measured"][0]["value"].as_f64().unwrap()));
    has_cell(&html, &moe::format::count(json["parameters"].as_u64().unwrap()));

    let arguments = ["compare", TINY_MOE, TINY_MOE, "--data", &test, "--rows", "20", "--json"];
    let json: Value = serde_json::from_str(&moe(&[&arguments[..], &["--report", text(&compared)]].concat())).unwrap();
    let html = checked(&compared, 4);
    for model in json["models"].as_array().unwrap() {
        has_cell(&html, &format!("{:.4}", model["measured"][0]["value"].as_f64().unwrap()));
        has_cell(&html, &format!("{:.4}", model["divergence"].as_f64().unwrap()));
    }
}

#[test]
fn a_training_is_shown_with_its_losses() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tuned");
    let (data, test) = (rows("division_train"), rows("division_test"));
    let arguments =
        ["tune", "--model", TINY_MOE, "--data", &data, "--samples", "40", "--eval", &test, "--eval-rows", "10"];
    moe(&[&arguments[..], &["--method", "lora", "--steps", "12", "--out", text(&out)]].concat());
    let html = checked(&out.join("report.html"), 2);
    assert!(html.contains("<h2>Loss</h2>") && html.contains("loss per predicted token"));
    let results: Value = serde_json::from_str(&fs::read_to_string(out.join("results.json")).unwrap()).unwrap();
    let losses: Vec<f64> = results["methods"][0]["training"]["losses"]
        .as_array()
        .unwrap()
        .iter()
        .map(|point| point["loss"].as_f64().unwrap())
        .collect();
    assert_eq!(losses.len(), 12);
    has_cell(&html, &format!("{:.4}", losses[2..].iter().sum::<f64>() / 10.0));
}

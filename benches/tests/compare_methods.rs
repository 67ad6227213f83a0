//! The quick part of the study, and a comparison on a model given by name.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{CommandFactory, FromArgMatches, Parser};
use moe::Result;
use moe::progress::Progress;
use moe_benches::TINY_MOE;
use moe_benches::compare::catalog::{EXPERTS, GLOBAL};
use moe_benches::compare::{Amount, Arguments, Comparison, Settings, Study, run};
use serde_json::Value;

fn arguments(out: &Path, more: &[&str]) -> Arguments {
    let given = ["program", "--device", "flex", "--out", out.to_str().unwrap()];
    Arguments::command()
        .args_override_self(true)
        .try_get_matches_from(given.iter().chain(more))
        .and_then(|matches| Arguments::from_arg_matches(&matches))
        .unwrap()
}

fn data(name: &str) -> PathBuf {
    Path::new(TINY_MOE).join("data").join(name)
}

#[test]
fn the_quick_study_is_whole_and_its_numbers_make_sense() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("study");
    let study = Study::new(arguments(&out, &["--quick"])).unwrap().run(Progress::hidden()).unwrap();
    let (settings, summary) = (&study.settings, &study.summary);

    // Every configuration has every figure that was asked of it.
    let best = summary.best_scorers(settings.best);
    let jobs = [
        settings.grid(),
        settings.answers(&best),
        settings.repairs(&best),
        settings.stock(),
        settings.allocators(),
        settings.knock_outs(),
    ];
    for job in jobs.iter().flatten() {
        let record = summary.record(&job.case).unwrap_or_else(|| panic!("{} is missing", job.case));
        // Scores that only compare within a layer, or do not add up, are refused over the whole model, and that is all
        // that is.
        if let Some(reason) = &record.refused {
            assert!(
                ["may be compared within", "may be added", "add up"].iter().any(|by| reason.contains(by)),
                "{reason}"
            );
            continue;
        }
        for name in study.lab.bench.names(job.figures) {
            assert!(record.metrics[&name].is_finite(), "{}: {name}", job.case);
        }
    }

    // Equal budgets: as many units for every way to prune, to the unit.
    let units = study.lab.shape().units();
    for record in summary.records.values().filter(|record| record.refused.is_none()) {
        let dropped = record.case.amount.fraction(units) * units as f64;
        assert_eq!(record.units, units - dropped.round() as usize, "{}", record.case);
        assert_eq!(record.layers.iter().sum::<usize>(), record.units);
        assert_eq!(record.routed_parameters, record.units as u64 * 3 * 128);
    }
    let parameters = |method: &str| {
        let case = summary.case("arithmetic", "fisher", method, Amount::ratio(0.5));
        summary.record(&case).unwrap().parameters
    };
    // Eight experts of every layer lose a row of 128 in the router; 32 pieces have one each.
    assert_eq!(parameters(GLOBAL) - parameters(EXPERTS), 4 * 8 * 128);
    assert_eq!(parameters("pieces4") - parameters(GLOBAL), 4 * 16 * 128);

    // The full model answers, scores beat chance, a repair helps, and a larger part of the model is better.
    let kl = |scorer: &str, method: &str, ratio: f64, repair: &str| {
        let case = summary.case("arithmetic", scorer, method, Amount::ratio(ratio)).repaired(repair);
        summary.record(&case).unwrap().metric("arithmetic", "kl").unwrap()
    };
    assert!(summary.base["arithmetic_exact"] > 0.9 && summary.base["arithmetic_kl"] < 1e-6);
    for scorer in ["fisher", "activation"] {
        assert!(kl(scorer, GLOBAL, 0.5, "none") < 0.5 * kl("random", GLOBAL, 0.5, "none"), "{scorer}");
        assert!(kl(scorer, GLOBAL, 0.25, "none") < kl(scorer, GLOBAL, 0.5, "none"), "{scorer}");
    }
    let ranking = summary.ranking();
    assert_eq!(ranking.len(), settings.scorers.len());
    assert!(ranking[0].1 < summary.rank("random").unwrap());
    assert!(kl("fisher", "uniform", 0.5, "refit") < kl("fisher", "uniform", 0.5, "none"));

    // The files.
    let text = run(arguments(&out, &["--quick", "--resume"]), Progress::hidden()).unwrap();
    assert!(text.contains("Uniform against ragged") && text.contains("geometric mean"), "{text}");
    let measured = fs::read_to_string(out.join("measurements.jsonl")).unwrap();
    let csv = fs::read_to_string(out.join("results.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + summary.records.len());
    assert!(csv.starts_with("calibrated,seed,scorer,method,dropped,repair,units,"));
    let json: Value = serde_json::from_slice(&fs::read(out.join("results.json")).unwrap()).unwrap();
    assert_eq!(json["records"].as_array().unwrap().len(), summary.records.len());
    let html = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(html.matches("<svg ").count() >= 7);
    let links = html.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    assert!(!["http:", "https:", "src=", "<script", "<link", "@import"].iter().any(|link| links.contains(link)));
    let tables = fs::read_to_string(out.join("tables.md")).unwrap();
    for id in ["setup", "ranking", "answers-arithmetic", "gap", "stock-arithmetic-0.5", "knock-out-prose", "cost"] {
        assert!(tables.contains(&format!("<!-- study:{id} -->")) && tables.contains(&format!("<!-- /study:{id} -->")));
    }

    // A finished study measures nothing again; one whose journal lost its end measures only that.
    assert_eq!(fs::read_to_string(out.join("measurements.jsonl")).unwrap(), measured);
    let lines: Vec<&str> = measured.lines().collect();
    fs::write(out.join("measurements.jsonl"), format!("{}\n{{\"cal", lines[..lines.len() - 3].join("\n"))).unwrap();
    let again = Study::new(arguments(&out, &["--quick", "--resume"])).unwrap().run(Progress::hidden()).unwrap();
    assert_eq!(fs::read_to_string(out.join("measurements.jsonl")).unwrap().lines().count(), lines.len());
    for (case, record) in &summary.records {
        assert_eq!(again.summary.records[case].metrics, record.metrics, "{case}");
    }
}

#[test]
fn the_page_of_the_guide_has_a_place_for_every_table() {
    let settings = Settings::full();
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/study.md")).unwrap();
    let mut ids: Vec<String> =
        ["setup", "equal-size", "ranking", "repairs", "gap", "allocators", "cost"].map(str::to_owned).into();
    for name in &settings.calibrated {
        ids.extend(["divergence", "answers", "sizes", "knock-out"].map(|kind| format!("{kind}-{name}")));
        ids.extend(settings.stock_ratios.iter().map(|ratio| format!("stock-{name}-{ratio}")));
    }
    ids.extend(settings.stock_ratios.iter().map(|ratio| format!("stock-scorers-{ratio}")));
    let unique: BTreeSet<_> = ids.iter().collect();
    assert_eq!(page.matches("<!-- study:").count(), unique.len());
    for id in &ids {
        assert!(page.contains(&format!("<!-- study:{id} -->")), "{id}");
    }
}

fn compare(out: &Path, more: &[&str]) -> Result<Comparison> {
    let (calibration, eval) = (data("facts_calibration.jsonl"), data("facts_test.jsonl"));
    let files = ["--model", TINY_MOE, "--calibration", calibration.to_str().unwrap(), "--eval", eval.to_str().unwrap()];
    let small = ["--samples", "12", "--eval-rows", "6"];
    Comparison::new(arguments(out, &[&files[..], &small, more].concat()))
}

#[test]
fn a_model_of_ones_own_gets_a_table() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("mine");
    let more = ["--scorer", "fisher", "--scorer", r#"{"type": "man"}"#, "--pruner", "layer", "--pruner", "experts"];
    let more = [&more[..], &["--ratio", "0.25,0.5", "--generate"]].concat();
    let compared = compare(&out, &more).unwrap().run(Progress::hidden()).unwrap();
    assert_eq!(compared.figures, ["facts_ppl", "facts_kl", "facts_exact"]);
    let table = compared.table();
    assert_eq!(table.rows.len(), 1 + 2 * 2 * 2);
    assert_eq!(table.header.len(), table.rows[0].len());
    assert!(table.rows.iter().any(|row| row[..3] == ["fisher", "experts", "25%"]), "{table:?}");
    assert!(compared.to_text().contains("facts_exact"));

    let error = compare(&out, &more).err().unwrap().to_string();
    assert!(error.contains("exists already") && error.contains("--resume"), "{error}");
    let error = compare(&out, &["--resume", "--scorer", "taylor"]).err().unwrap().to_string();
    assert!(error.contains("its scorers was"), "{error}");
    let resumed = compare(&out, &[&more[..], &["--resume"]].concat()).unwrap().run(Progress::hidden()).unwrap();
    assert_eq!(resumed.records, compared.records);
}

#[test]
fn what_is_wrong_is_said_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    for (more, expected) in [
        (&["--scorer", "fishing"][..], "--scorer fishing"),
        (&["--pruner", "scissors"], "--pruner scissors"),
        (&["--device", "abacus"], "device `abacus`"),
        (&["--eval", "/nowhere_test.jsonl"], "/nowhere_test.jsonl"),
    ] {
        let error = compare(&out, more).err().unwrap().to_string();
        assert!(error.contains(expected), "{more:?}: {error}");
    }
    assert!(!out.exists());
    for more in [&["--scorer", "fisher"][..], &["--quick", "--model", TINY_MOE], &["--calibration", "x.jsonl"]] {
        let given = ["program"].iter().chain(more);
        assert!(Arguments::try_parse_from(given).is_err(), "{more:?}");
    }
}

//! The quick part of the study of ways to merge.

use std::collections::BTreeSet;
use std::fs;

use clap::Parser;
use moe::progress::Progress;
use moe_benches::compare::catalog::{EVIDENCE, EXPERTS, TRAINED};
use moe_benches::compare::{Amount, Arguments, Settings, Study, run};
use moe_merge::OutputForm;

#[test]
fn the_quick_study_is_whole_and_its_numbers_make_sense() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("merging");
    let arguments = |more: &[&str]| {
        let given = ["program", "--device", "flex", "--merging", "--quick", "--out", out.to_str().unwrap()];
        Arguments::parse_from(given.iter().chain(more))
    };
    let study = Study::new(arguments(&[])).unwrap().run(Progress::hidden()).unwrap();
    let (settings, summary) = (&study.settings, &study.summary);
    let merging = settings.merging.as_ref().unwrap();
    let jobs = merging.jobs(settings);
    assert_eq!(jobs.len(), summary.records.len());
    for job in &jobs {
        let record = summary.record(&job.case).unwrap_or_else(|| panic!("{} is missing", job.case));
        assert_eq!(record.refused, None, "{}", job.case);
        for name in study.lab.bench.names(job.figures) {
            assert!(record.metrics[&name].is_finite(), "{}: {name}", job.case);
        }
    }
    let case = |scorer: &str, method: &str, ratio: f64| {
        summary.record(&summary.case("arithmetic", scorer, method, Amount::ratio(ratio))).unwrap()
    };

    // Equal bytes: to the parameter where experts stay matrices, and not more where they are compressed.
    let all = study.lab.shape().parameters();
    for (scorer, method) in merging.rows() {
        let found = case(scorer, method, 0.5).routed_parameters;
        let compressed = method.starts_with("mc-smoe");
        assert!(
            if compressed { 0.46 * all as f64 <= found as f64 && 2 * found <= all } else { 2 * found == all },
            "{method}"
        );
    }
    // The full model's layers have no error, and the dominants alone are pruning by their importance.
    assert_eq!(summary.base["arithmetic_layer"], 0.0);
    let (merged, pruned) = (case(EVIDENCE, "dominant-only", 0.5), case("reap", EXPERTS, 0.5));
    for (name, found) in &merged.metrics {
        // One is read back, the other seen through an overlay: sums are rounded in another order.
        let expected = pruned.metrics[name];
        assert!((found - expected).abs() < 1e-5 * (1.0 + expected), "{name}: {found}, expected {expected}");
    }
    let figure =
        |scorer: &str, method: &str, figure: &str| case(scorer, method, 0.5).metric("arithmetic", figure).unwrap();
    for (name, _) in [("kl", ()), ("layer", ())] {
        assert!(figure(EVIDENCE, "mergemoe", name) < 0.5 * figure("random", EXPERTS, name), "{name}");
    }
    // A larger part of the model is better.
    for method in ["m-smoe", "dern", "mergemoe"] {
        let (more, less) = (case(EVIDENCE, method, 0.25), case(EVIDENCE, method, 0.5));
        assert!(more.metric("arithmetic", "layer") < less.metric("arithmetic", "layer"), "{method}");
    }
    assert!(merging.methods.contains(&TRAINED[0]));

    // What is written.
    let full = study.forms[0].bytes.unwrap();
    for form in &study.forms[1..] {
        match (form.form, form.bytes) {
            (OutputForm::StockCopies, Some(bytes)) => assert!(bytes.abs_diff(full) < full / 100, "{form:?}"),
            (_, Some(bytes)) => assert!(bytes < full * 2 / 3, "{form:?}"),
            (form, None) => assert_ne!(form, OutputForm::Grouped),
        }
    }
    let text = run(arguments(&["--resume"]), Progress::hidden()).unwrap();
    assert!(text.contains("Bytes on disk") && text.contains("layer error"), "{text}");
    let csv = fs::read_to_string(out.join("results.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + summary.records.len());
    assert!(csv.lines().next().unwrap().contains("arithmetic_layer"));
    let html = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(html.contains("<svg ") && html.contains("Ways to merge"));
}

#[test]
fn the_page_of_the_guide_has_a_place_for_every_table() {
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/merging.md")).unwrap();
    let mut ids: Vec<String> = ["setup", "merged-equal-size", "merged-forms"].map(str::to_owned).into();
    for name in &Settings::merging().calibrated {
        ids.extend([format!("merged-{name}"), format!("merged-sizes-{name}")]);
    }
    assert_eq!(page.matches("<!-- study:").count(), ids.iter().collect::<BTreeSet<_>>().len());
    for id in &ids {
        assert!(page.contains(&format!("<!-- study:{id} -->")), "{id}");
    }
}

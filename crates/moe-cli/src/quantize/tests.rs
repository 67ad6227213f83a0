//! Quantization from the command line: what is written, what calibration gains, and what is refused.

use super::*;

#[test]
fn calibration_changes_the_codes_and_not_the_layout() {
    let dir = tempfile::tempdir().unwrap();
    let rows = format!("{}/data/facts_calibration.jsonl", crate::TINY_MOE);
    let format = r#"{"type": "int", "bits": 4, "group_size": 32}"#;
    let written = |name: &str, more: &[&str]| {
        let out = dir.path().join(name).display().to_string();
        let plain = ["quantize", "--model", crate::TINY_MOE, "--format", format, "--out", &out];
        run(&Arguments::try_parse_from([&plain[..], more].concat()).unwrap(), Progress::hidden()).unwrap();
        Checkpoint::open(out).unwrap()
    };
    let nearest = written("nearest", &[]);
    let calibrated = written("calibrated", &["--calibration", &rows, "--samples", "8"]);
    assert!(nearest.tensors().map(|info| info.spec()).eq(calibrated.tensors().map(|info| info.spec())));
    let codes = |model: &Checkpoint| {
        let packed = model.tensors().filter(|info| info.name.ends_with("weight_packed"));
        packed.map(|info| model.bytes(&info.name).unwrap().into_owned()).collect::<Vec<_>>()
    };
    assert!(codes(&nearest) != codes(&calibrated));
    assert_eq!(calibrated.steps().len(), 1);
    assert!(calibrated.steps()[0].recipe["calibration"].is_string());
}

#[test]
fn factors_and_rounded_routers_are_written_with_what_was_found() {
    let dir = tempfile::tempdir().unwrap();
    let rows = format!("{}/data/facts_calibration.jsonl", crate::TINY_MOE);
    let format = r#"{"type": "int", "bits": 4, "group_size": 32}"#;
    let with = |name: &str, more: &[&str]| {
        let out = dir.path().join(name).display().to_string();
        let plain = ["quantize", "--model", crate::TINY_MOE, "--format", format, "--nearest", "--out", &out];
        let arguments = Arguments::try_parse_from([&plain[..], more].concat()).unwrap();
        run(&arguments, Progress::hidden())
    };
    let data = ["--calibration", &rows, "--samples", "8"];
    let all = ["--smooth", "awq", "--router-bits", "8", "--balance", "0.5"];
    let report = with("awq", &[&all[..], &data].concat()).unwrap();
    let text = report.to_string();
    assert_eq!((report.calibration.smoothing.len(), report.calibration.routers.len()), (4, 4), "{text}");
    assert!(report.calibration.smoothing.iter().all(|layer| layer.damage.unwrap() <= 1.0), "{text}");
    assert!(report.calibration.smoothing.iter().any(|layer| layer.damage.unwrap() < 0.999), "{text}");
    assert!(report.calibration.routers.iter().all(|router| router.overlap > 0.97), "{text}");
    let balance = report.calibration.balance.as_ref().unwrap();
    assert!(balance.starved_after <= balance.starved_before && balance.rows.len() >= 8, "{text}");
    assert!(text.contains("damage of rounding times") && text.contains("of the choices kept"), "{text}");
    let written = Checkpoint::open(dir.path().join("awq")).unwrap();
    let methods: Vec<&str> = written.steps().iter().map(|step| step.method.as_str()).collect();
    assert_eq!(methods, ["smooth", "round_routers", "quantize"]);
    let report = with("eaquant", &[&["--smooth", "eaquant"][..], &data].concat()).unwrap();
    assert!(report.calibration.smoothing.iter().all(|layer| layer.inputs > 0 && layer.damage.is_none()));
    // Nothing is done in vain.
    for (wrong, part) in [
        (with("a", &["--smooth", "awq"]), "--smooth measures on rows"),
        (with("b", &["--balance", "0.5"]), "--balance measures on rows"),
        (with("c", &data), "nothing for the rows"),
        (with("d", &[&["--balance", "0.5"][..], &data].concat()), "nothing that balanced rows change"),
        (with("e", &[&["--smooth", "awq", "--balance=-1"][..], &data].concat()), "above 0"),
    ] {
        let error = wrong.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn the_frontier_is_a_report_of_models_of_every_size() {
    let dir = tempfile::tempdir().unwrap();
    let rows = format!("{}/data/facts_calibration.jsonl", crate::TINY_MOE);
    let out = dir.path().join("frontier");
    let shown = out.display().to_string();
    let plain = ["quantize", "--model", crate::TINY_MOE, "--frontier", "--mixed", "int4,int8", "--out", &shown];
    let with = |more: &[&str]| Arguments::try_parse_from([&plain[..], more].concat()).unwrap();
    let error = run_frontier(&with(&[]), Progress::hidden()).unwrap_err().to_string();
    assert!(error.contains("--calibration"), "{error}");
    let data = ["--calibration", &rows, "--samples", "4"];
    let error = run_frontier(&with(&[&data[..], &["--ratios", "1.5"]].concat()), Progress::hidden()).unwrap_err();
    assert!(error.to_string().contains("found 1.5"), "{error}");
    let report = run_frontier(&with(&[&data[..], &["--ratios", "0.5"]].concat()), Progress::hidden()).unwrap();
    // Half of 96 units is no whole number of groups of 32.
    assert!(report.points.iter().any(|point| point.of == "33% of the units pruned, one format"), "{report}");
    // The whole model and two pruned ones: BF16, two formats and four budgets each; then the best within eight.
    assert_eq!(report.points.len(), 3 * 7 + 8, "{report}");
    let whole = &report.points[0];
    assert!(whole.what == "BF16" && whole.divergence.abs() < 1e-6, "{report}");
    assert!(report.points[1..].iter().all(|point| point.bytes < whole.bytes && point.divergence.is_finite()));
    // Whatever is chosen within a budget diverges no more than it would with everything pruned and in 4 bits.
    let worst = report.points.iter().map(|point| point.divergence).fold(0.0, f64::max);
    let chosen: Vec<&FrontierPoint> = report.points.iter().filter(|point| point.of.starts_with("chosen")).collect();
    assert!(chosen.iter().all(|point| point.divergence <= worst));
    assert!(chosen.last().unwrap().divergence < chosen[0].divergence, "{report}");
    let html = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(html.contains("Divergence by size") && html.contains("<svg"));
    let saved: Vec<FrontierPoint> = serde_json::from_slice(&std::fs::read(out.join("frontier.json")).unwrap()).unwrap();
    assert_eq!(saved.len(), report.points.len());
    assert!(run_frontier(&with(&data), Progress::hidden()).unwrap_err().to_string().contains("exists"));
}

#[test]
fn several_precisions_share_out_the_bytes_that_there_are() {
    let dir = tempfile::tempdir().unwrap();
    let rows = format!("{}/data/facts_calibration.jsonl", crate::TINY_MOE);
    let out = dir.path().join("mixed").display().to_string();
    let plain = ["quantize", "--model", crate::TINY_MOE, "--mixed", "int4,int8", "--out", &out];
    let with = |more: &[&str]| Arguments::try_parse_from([&plain[..], more].concat());
    assert!(with(&[]).is_err(), "a budget is needed");
    let no_rows = run(&with(&["--keep-bytes", "3800KB"]).unwrap(), Progress::hidden()).unwrap_err();
    assert!(no_rows.to_string().contains("--calibration"), "{no_rows}");
    let arguments = with(&["--keep-bytes", "3800KB", "--calibration", &rows, "--samples", "4"]).unwrap();
    let report = run(&arguments, Progress::hidden()).unwrap();
    let allocation = report.allocation.clone().unwrap();
    assert!(allocation.bytes <= 3_800_000 && allocation.bits > 4.5 && allocation.bits < 8.5, "{report}");
    let written = Checkpoint::open(&out).unwrap();
    assert_eq!(written.bytes_on_disk(), allocation.bytes);
    let groups = written.raw_config()["quantization_config"]["config_groups"].as_object().unwrap().len();
    assert_eq!(groups, 2, "{report}");
}

#[test]
fn the_bundled_model_is_quantized_and_opens_again() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("int4");
    let json = r#"{"type": "int", "bits": 4, "group_size": 32}"#;
    let arguments = |out: &PathBuf, format: &str| {
        let out = out.display().to_string();
        Arguments::try_parse_from(["quantize", "--model", crate::TINY_MOE, "--format", format, "--out", &out])
    };
    let report = run(&arguments(&out, json).unwrap(), Progress::hidden()).unwrap();
    let text = report.to_string();
    assert!(text.contains("int4 in groups of 32") && text.contains("times smaller"), "{text}");
    let written = Checkpoint::open(&out).unwrap();
    assert!(written.quantization().is_some());
    assert_eq!(written.bytes_on_disk(), report.quantized.bytes.after);
    assert!(report.quantized.bytes.after * 2 < report.quantized.bytes.before);
    let again = run(&arguments(&out, json).unwrap(), Progress::hidden()).unwrap_err().to_string();
    assert!(again.contains("exists"), "{again}");
    let wrong = run(&arguments(&dir.path().join("b"), "fp8_blocks").unwrap(), Progress::hidden()).unwrap_err();
    assert!(wrong.to_string().contains("96 rows"), "{wrong}");
    assert!(arguments(&out, "int7").unwrap_err().to_string().contains("fp8_channels"));
}

/// Divergence of a quantized checkpoint from the bundled model on rows that nothing was calibrated on.
fn divergence(of: &std::path::Path) -> f64 {
    let whole = Model::open(crate::TINY_MOE, &moe_core::device::device("flex").unwrap(), None).unwrap();
    let unseen = moe::jobs::rows(&whole, format!("{}/data/facts_test.jsonl", crate::TINY_MOE), 48).unwrap();
    let engine = moe_core::Engine::new(&whole, moe_core::EngineOptions::default());
    let waves = unseen.waves(moe_core::data::WaveOptions::default());
    let probe = moe_prune::EngineProbe::new(&engine, waves, moe_prune::ProbeOptions::default()).unwrap();
    let model = Model::open(of, whole.device(), None).unwrap();
    probe.distortion_of(&model).unwrap().mean
}

#[test]
fn what_is_calibrated_diverges_less_on_rows_it_has_not_seen_and_is_the_same_every_time() {
    let dir = tempfile::tempdir().unwrap();
    let rows = format!("{}/data/facts_calibration.jsonl", crate::TINY_MOE);
    let format = r#"{"type": "int", "bits": 4, "group_size": null}"#;
    let written = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let shown = out.display().to_string();
        let plain = ["quantize", "--model", crate::TINY_MOE, "--format", format, "--out", &shown];
        run(&Arguments::try_parse_from([&plain[..], more].concat()).unwrap(), Progress::hidden()).unwrap();
        out
    };
    let data = ["--calibration", &rows, "--samples", "64"];
    let nearest = divergence(&written("nearest", &[]));
    let kinds: [(&str, &[&str]); 5] = [
        ("feedback", &[]),
        ("awq", &["--smooth", "awq", "--nearest"]),
        ("awq and feedback", &["--smooth", "awq"]),
        ("eaquant", &["--smooth", "eaquant", "--nearest"]),
        ("eaquant and feedback", &["--smooth", "eaquant", "--balance", "0.5", "--router-bits", "8"]),
    ];
    let found: Vec<(&str, f64)> =
        kinds.into_iter().map(|(name, more)| (name, divergence(&written(name, &[more, &data].concat())))).collect();
    println!("nearest {nearest:.5}, {found:.5?}");
    for (name, calibrated) in found.iter().filter(|(name, _)| *name != "eaquant") {
        assert!(*calibrated < nearest, "{name}: {calibrated} against {nearest}");
    }
    let again = written("again", &[&["--smooth", "awq"][..], &data].concat());
    let first = dir.path().join("awq and feedback");
    for file in ["model.safetensors", "config.json"] {
        assert!(std::fs::read(first.join(file)).unwrap() == std::fs::read(again.join(file)).unwrap(), "{file}");
    }
}

#[test]
fn what_calibration_cannot_do_is_said_before_the_model_is_run() {
    let dir = tempfile::tempdir().unwrap();
    let rows = format!("{}/data/facts_calibration.jsonl", crate::TINY_MOE);
    let refused = |more: &[&str]| {
        let out = dir.path().join("out").display().to_string();
        let plain = ["quantize", "--model", crate::TINY_MOE, "--format", "int8", "--calibration", &rows, "--out", &out];
        let error = run(&Arguments::try_parse_from([&plain[..], more].concat()).unwrap(), Progress::hidden());
        assert!(!dir.path().join("out.work").exists());
        error.unwrap_err().to_string()
    };
    for (more, part) in [
        (&["--router-bits", "9"][..], "9 bits; expected 2 to 8"),
        (&["--smooth", r#"{"type": "awq", "grid": 0}"#], "grid of 0"),
        (&["--smooth", r#"{"type": "eaquant", "alpha": 1.5}"#], "`alpha` is 1.5"),
        (&["--balance", "nan"], "above 0"),
    ] {
        let error = refused(more);
        assert!(error.contains(part), "{error}");
    }
}

//! `moe adapter`: adapters of the bundled model, as files.

use std::fs;

use moe_cli::TINY_MOE;
use serde_json::{Value, json};

use crate::support::{moe, ok, refused, rows, text};

#[test]
fn adapters_are_trained_from_a_pasted_config_looked_at_combined_converted_and_merged() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut adapters = Vec::new();
    for (name, targets) in [("attention", json!(["q_proj", "v_proj"])), ("both", json!(["q_proj", "o_proj"]))] {
        let config = path(&format!("{name}.json"));
        let pasted = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": 2, "lora_alpha": 4, "target_modules": targets,
            "target_parameters": ["mlp.experts.down_proj"], "inference_mode": false,
        });
        fs::write(&config, pasted.to_string()).unwrap();
        let (out, data) = (path(&format!("{name}-run")), rows("facts_calibration"));
        ok(&[
            "tune",
            "--model",
            TINY_MOE,
            "--data",
            &data,
            "--method",
            text(&config),
            "--steps",
            "2",
            "--learning-rate",
            "0.01",
            "--samples",
            "8",
            "--out",
            text(&out),
        ]);
        adapters.push(out.join(name).join("adapter"));
    }
    let [first, second] = [&adapters[0], &adapters[1]].map(|adapter| text(adapter).to_string());
    let facts: Value =
        serde_json::from_str(&ok(&["adapter", "inspect", &first, "--model", TINY_MOE, "--json"])).unwrap();
    assert_eq!((&facts["kinds"][0], &facts["lora"]["r"]), (&json!("a LoRA"), &json!(2)));
    assert!(facts["fits"].as_u64().unwrap() > 0);
    let shown = ok(&["adapter", "inspect", &first]);
    assert!(shown.contains("q_proj") && shown.contains("experts"), "{shown}");

    let (combined, converted, merged) = (path("combined"), path("converted"), path("merged"));
    let weighted = format!("{second}=0.5");
    let report: Value = serde_json::from_str(&ok(&[
        "adapter",
        "combine",
        "--model",
        TINY_MOE,
        "--adapter",
        &first,
        "--adapter",
        &weighted,
        "--how",
        "svd",
        "--rank",
        "3",
        "--out",
        text(&combined),
        "--json",
    ]))
    .unwrap();
    assert!(report["additions"].as_u64().unwrap() > 0, "{report}");
    ok(&[
        "adapter",
        "convert",
        "--model",
        TINY_MOE,
        "--adapter",
        text(&combined),
        "--layout",
        "per-expert",
        "--one-alpha",
        "--out",
        text(&converted),
    ]);
    let config: Value = serde_json::from_slice(&fs::read(converted.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["target_parameters"], &config["alpha_pattern"]), (&Value::Null, &json!({})));
    let report: Value = serde_json::from_str(&ok(&[
        "adapter",
        "merge",
        "--model",
        TINY_MOE,
        "--adapter",
        text(&converted),
        "--out",
        text(&merged),
        "--json",
    ]))
    .unwrap();
    assert!(report["changed"].as_u64().unwrap() > 0, "{report}");
    ok(&["inspect", text(&merged)]);

    // what cannot be is said, with exit status 2 for usage and 1 for the rest
    let merge = |adapter: &str, out: &str| {
        refused(&["adapter", "merge", "--model", TINY_MOE, "--adapter", adapter, "--out", out])
    };
    let (code, error) = merge(text(&converted), text(&merged));
    assert!(code == 1 && error.contains("merged"), "{error}");
    let (code, error) = merge(&format!("{first}=half"), text(&path("no")));
    assert!(code == 2 && error.contains("DIR=WEIGHT"), "{error}");
    let (code, error) = refused(&[
        "adapter",
        "combine",
        "--model",
        TINY_MOE,
        "--adapter",
        &first,
        "--how",
        "svd",
        "--out",
        text(&path("no")),
    ]);
    assert!(code == 2 && error.contains("--rank"), "{error}");
    assert!(!path("no").exists());
    for verb in ["merge", "combine", "convert", "inspect"] {
        let help = String::from_utf8(moe(&["adapter", verb, "--help"]).stdout).unwrap();
        assert!(help.contains(&format!("Example: moe adapter {verb}")), "{help}");
    }
}

//! `moe upcycle`, flag by flag.

use std::fs;
use std::path::Path;

use moe_checkpoint::{Checkpoint, LayerRole, Role};
use serde_json::{Value, json};

use crate::support::{ok, text, words};

/// What a refused command says.
fn refused(arguments: &[&str]) -> String {
    crate::support::refused(arguments).1
}

const LLAMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../moe-merge/tests/fixtures/dense/llama");
const QWEN3: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../moe-merge/tests/fixtures/dense/qwen3");

fn upcycle(flags: &str, model: &str, out: &Path) -> String {
    ok(&words(&format!("upcycle {flags}"), &["--model", model, "--out", text(out)]))
}

#[test]
fn parts_of_a_dense_model_are_written_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("parts");
    let report = upcycle("--method split --experts 6 --shared-width 16 --json", LLAMA, &out);
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!((&report["family"], &report["exact"]), (&json!(["llama", "qwen2_moe"]), &json!(true)));
    let written = Checkpoint::open(&out).unwrap();
    let moe = written.config().moe(0).unwrap();
    assert_eq!((moe.num_experts(), moe.widths[0], written.config().routing.top_k), (6, 8, 6));
    assert_eq!(moe.shared.as_ref().unwrap().intermediate_size, 16);
    let again = refused(&words("upcycle --method split --experts 4", &["--model", LLAMA, "--out", text(&out)]));
    assert!(again.contains("exists"), "{again}");
}

#[test]
fn numbers_of_a_method_come_as_json() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let method = r#"{"type": "copy", "noise": 0.1}"#;
    for (out, draw) in [(&first, "1"), (&second, "2")] {
        let files = ["--model", QWEN3, "--out", text(out), "--method", method, "--draw", draw];
        ok(&words("upcycle --experts 4 --top-k 3", &files));
    }
    let up = |out: &Path| Checkpoint::open(out).unwrap().expert(0, 1).unwrap().up;
    assert_ne!(up(&first), up(&second));
    let config = Checkpoint::open(&first).unwrap().raw_config().clone();
    assert_eq!(
        (&config["architectures"][0], &config["num_experts_per_tok"]),
        (&json!("Qwen3MoeForCausalLM"), &json!(3))
    );
    let files = ["--model", QWEN3, "--out", text(&first), "--method", r#"{"type": "copy", "nose": 1}"#];
    assert!(refused(&words("upcycle --experts 4", &files)).contains("nose"));
}

#[test]
fn the_teacher_runs_the_dense_model_on_rows() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, out) = (dir.path().join("rows.jsonl"), dir.path().join("out"));
    let ids = |salt: usize| (0..30).map(|i| (i * i * 7 + salt * 3) % 96).collect::<Vec<usize>>();
    let lines: Vec<String> = (0..4).map(|salt| json!({"input_ids": ids(salt)}).to_string()).collect();
    fs::write(&rows, lines.join("\n")).unwrap();
    let method = r#"{"type": "cluster", "by": "activations"}"#;
    let files = ["--model", LLAMA, "--out", text(&out), "--method", method, "--data", text(&rows)];
    let report = ok(&words("upcycle --experts 4 --top-k 2", &files));
    assert!(report.contains("not that of the dense model"), "{report}");
    let router = Checkpoint::open(&out).unwrap().read_f32(Role::Layer(0, LayerRole::Router)).unwrap();
    assert!(router.iter().any(|value| *value != 0.0));
    let down = |out: &Path| Checkpoint::open(out).unwrap().expert(0, 0).unwrap().down;
    let mean = down(&out);
    ok(&words("upcycle --experts 4 --top-k 2 --scale sum --force", &files));
    assert!(down(&out).iter().zip(&mean).all(|(sum, mean)| sum * 2.0 == *mean));
    assert!(refused(&words("upcycle --experts 4 --scale most", &files)).contains("most"));
    let checked = ok(&words("upcycle --experts 4 --top-k 2 --force --check", &files));
    assert_eq!(checked, "checked: nothing was done\n");
    let without = ["--model", LLAMA, "--out", text(&out), "--method", method];
    assert!(refused(&words("upcycle --experts 4", &without)).contains("--data FILE"));
    let unread = ["--model", LLAMA, "--out", text(&out), "--data", text(&rows)];
    assert!(
        refused(&words("upcycle --method copy --experts 4", &unread)).contains("neither this method nor this router")
    );
}

#[test]
fn every_file_of_rows_is_a_domain() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, factor: usize| {
        let path = dir.path().join(name);
        let ids = |salt: usize| (0..30).map(|i| (i * factor + salt) % 96).collect::<Vec<usize>>();
        let lines: Vec<String> = (0..3).map(|salt| json!({"input_ids": ids(salt)}).to_string()).collect();
        fs::write(&path, lines.join("\n")).unwrap();
        path
    };
    let (code, prose, out) = (file("code.jsonl", 7), file("prose.jsonl", 11), dir.path().join("out"));
    let method = r#"{"type": "domains", "share": 0.75}"#;
    let model = ["--model", LLAMA, "--out", text(&out), "--method", method];
    let files = [&model[..], &["--data", text(&code), "--data", text(&prose)]].concat();
    let report = ok(&words("upcycle --experts 2 --shared-width 16", &files));
    assert!(report.contains("2 experts of width 32 (of 64), 1 per token, shared 16"), "{report}");
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_ne!(checkpoint.expert(0, 0).unwrap().up, checkpoint.expert(0, 1).unwrap().up);
    let third = refused(&words("upcycle --experts 3 --force", &files));
    assert!(third.contains("expected 2, one per domain"), "{third}");
}

#[test]
fn routers_of_several_models_begin_as_what_layers_read_of_prompts() {
    let dir = tempfile::tempdir().unwrap();
    let (dense, prompts) = (dir.path().join("dense"), dir.path().join("prompts.json"));
    fs::create_dir(&dense).unwrap();
    for file in fs::read_dir(LLAMA).unwrap().map(|entry| entry.unwrap().path()) {
        fs::copy(&file, dense.join(file.file_name().unwrap())).unwrap();
    }
    let vocab: serde_json::Map<String, Value> = (0..96).map(|id| (format!("w{id}"), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    });
    fs::write(dense.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let routers = |lists: Value, name: &str| {
        let out = dir.path().join(name);
        fs::write(&prompts, lists.to_string()).unwrap();
        let files = ["--from", text(&dense), "--prompts", text(&prompts), "--method", "models"];
        let files = [&files[..], &["--model", text(&dense), "--out", text(&out)]].concat();
        ok(&words("upcycle --experts 2", &files));
        let written = Checkpoint::open(&out).unwrap();
        let routers = (0..written.config().layers.len()).map(|layer| Role::Layer(layer, LayerRole::Router));
        routers.map(|role| written.read_f32(role).unwrap()).collect::<Vec<_>>()
    };
    let there = routers(json!([["w1 w2 w3", "w4 w5"], ["w60 w70 w80 w90"]]), "there");
    let back = routers(json!([["w60 w70 w80 w90"], ["w1 w2 w3", "w4 w5"]]), "back");
    for (there, back) in there.iter().zip(&back) {
        let ((first, second), (other, one)) = (there.split_at(there.len() / 2), back.split_at(back.len() / 2));
        assert!(first == one && second == other && first != second);
        let length = first.iter().map(|value| value * value).sum::<f32>();
        assert!((length - 1.0).abs() < 1e-2, "{length}");
    }
}

#[test]
fn models_with_experts_and_prompts_without_a_tokenizer_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (out, prompts) = (dir.path().join("out"), dir.path().join("prompts.json"));
    let moe = words("upcycle --method copy --experts 4", &["--model", moe_cli::TINY_MOE, "--out", text(&out)]);
    assert!(refused(&moe).contains("dense ones: llama, mistral, qwen2, qwen3"));
    fs::write(&prompts, json!([["a"], ["b"]]).to_string()).unwrap();
    let files = ["--model", LLAMA, "--from", LLAMA, "--prompts", text(&prompts), "--out", text(&out)];
    let no_tokenizer = refused(&words("upcycle --method models --experts 2", &files));
    assert!(no_tokenizer.contains("no tokenizer.json"), "{no_tokenizer}");
    let three = refused(&words("upcycle --method models --experts 3", &files));
    assert!(three.contains("expected 3 lists of at least one prompt"), "{three}");
    assert!(!out.exists());
}

//! The `trace` program against what transformers computes.

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use moe_cli::trace::{Arguments, trace};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity").join(name)
}

fn arguments(model: PathBuf, tokens: PathBuf, out: PathBuf) -> Arguments {
    let wave_tokens = NonZeroUsize::new(16384).unwrap();
    Arguments {
        model,
        adapter: None,
        tokens,
        rows: Default::default(),
        out,
        max_memory: None,
        grads: true,
        device: "flex".into(),
        wave_tokens,
        json: false,
    }
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let view = file.tensor(name).unwrap_or_else(|_| panic!("no tensor {name}"));
    assert_eq!(view.dtype(), Dtype::F32, "{name}");
    view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Traces a fixture in waves of `wave_tokens` and compares every tensor. The tokens are given as transformers got them,
/// padding included.
fn check(name: &str, wave_tokens: usize) {
    let directory = tempfile::tempdir().unwrap();
    let bytes = fs::read(fixture(name).join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let inputs: Vec<(String, TensorView<'_>)> = ["input_ids", "attention_mask"]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), expected.tensor(name).ok()?)))
        .collect();
    let mask: Option<Vec<u8>> =
        expected.tensor("attention_mask").ok().map(|m| m.data().iter().step_by(8).copied().collect());
    let tokens = directory.path().join("tokens.safetensors");
    safetensors::serialize_to_file(inputs, None, &tokens).unwrap();
    let mut arguments = arguments(fixture(name), tokens, directory.path().join("out.safetensors"));
    arguments.wave_tokens = NonZeroUsize::new(wave_tokens).unwrap();

    let summary = trace(&arguments).unwrap();
    let bytes = fs::read(&arguments.out).unwrap();
    let found = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(summary.tensors, found.len());
    let close = |what: &str, ours: &[f32], theirs: &[f32]| {
        assert_eq!(ours.len(), theirs.len(), "{name} {what}");
        let worst = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= 1e-4, "{name} {what}: differs by {worst}");
    };
    let mut gradients = 0;
    for tensor in found.names() {
        let ours = floats(&found, tensor);
        if let Some(rest) = tensor.strip_prefix("grad.layer.") {
            let [layer, _, expert, part] = rest.split('.').collect::<Vec<_>>()[..] else { panic!("{tensor}") };
            close(tensor, &ours, &expected_gradient(&expected, layer, expert.parse().unwrap(), part, ours.len()));
            gradients += 1;
            continue;
        }
        assert_eq!(found.tensor(tensor).unwrap().shape(), expected.tensor(tensor).unwrap().shape(), "{tensor}");
        let (mut ours, mut theirs) = (ours, floats(&expected, tensor));
        if let Some(mask) = mask.as_ref().filter(|_| tensor != "loss") {
            let width = ours.len() / mask.len();
            for (position, _) in mask.iter().enumerate().filter(|(_, real)| **real == 0) {
                let row = position * width..(position + 1) * width;
                assert!(ours[row.clone()].iter().all(|x| *x == 0.0), "{tensor}: padding is not zero");
                theirs[row.clone()].fill(0.0);
                ours[row].fill(0.0);
            }
        }
        close(tensor, &ours, &theirs);
    }
    assert!(gradients > 0);
    let theirs = expected.names().into_iter().filter(|n| !n.starts_with("grad.") && !n.starts_with("input_ids"));
    assert!(theirs.filter(|n| *n != "attention_mask").all(|n| found.tensor(n).is_ok()));
}

fn expected_gradient(expected: &SafeTensors<'_>, layer: &str, expert: usize, part: &str, len: usize) -> Vec<f32> {
    let prefix = format!("grad.model.layers.{layer}.mlp.experts");
    if expected.tensor(&format!("{prefix}.gate_up_proj")).is_ok() {
        let (name, at) = match part {
            "gate" => ("gate_up_proj", 2 * expert * len),
            "up" => ("gate_up_proj", (2 * expert + 1) * len),
            _ => ("down_proj", expert * len),
        };
        return floats(expected, &format!("{prefix}.{name}"))[at..at + len].to_vec();
    }
    let name = format!("{prefix}.{expert}.{part}_proj.weight");
    // an expert without tokens has no gradient there
    expected.tensor(&name).map_or_else(|_| vec![0.0; len], |_| floats(expected, &name))
}

#[test]
fn padded_rows_agree_with_transformers() {
    check("tf4/qwen2_moe_padded", 16384);
}

#[test]
fn gradients_add_up_over_waves() {
    check("tf5/qwen3_moe", 1);
}

#[test]
fn rows_of_ids_are_padded_at_their_ends() {
    let directory = tempfile::tempdir().unwrap();
    let tokens = directory.path().join("tokens.jsonl");
    fs::write(&tokens, "{\"input_ids\": [5, 6, 7]}\n\n{\"input_ids\": [9]}\n").unwrap();
    let mut arguments = arguments(fixture("tf5/qwen2_moe_mixed"), tokens, directory.path().join("out.safetensors"));
    arguments.grads = false;
    let summary = trace(&arguments).unwrap();
    assert_eq!((summary.tokens, summary.loss_tokens), (4, 2));
    let bytes = fs::read(&arguments.out).unwrap();
    let found = SafeTensors::deserialize(&bytes).unwrap();
    let logits = found.tensor("logits").unwrap();
    assert_eq!(logits.shape()[..2], [2, 3]);
    let zero =
        |row: usize| logits.data().chunks_exact(logits.data().len() / 6).nth(row).unwrap().iter().all(|b| *b == 0);
    assert_eq!([0, 1, 2, 3, 4, 5].map(zero), [false, false, false, false, true, true]);
    assert!(found.names().iter().all(|name| !name.starts_with("grad")));
}

#[test]
fn bad_input_is_refused_with_the_reason() {
    let directory = tempfile::tempdir().unwrap();
    let fail = |file: &str, contents: &[u8], expected: &str| {
        let tokens = directory.path().join(file);
        fs::write(&tokens, contents).unwrap();
        let out = directory.path().join("out.safetensors");
        let error = trace(&arguments(fixture("tf5/qwen3_moe"), tokens, out.clone())).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(!out.exists());
    };
    fail("a.txt", b"", "a.txt: unknown kind of file");
    fail("a.safetensors", b"", "not a safetensors file");
    fail("a.jsonl", b"", "no token to run");
    fail("a.jsonl", b"{\"input_ids\": [1]}", "nothing is predicted");
    fail("a.jsonl", b"{\"input_ids\": [1, 2]}\n{\"ids\": [1]}", "a.jsonl:2: ");
    fail("a.jsonl", b"{\"input_ids\": [1, 97]}", "a.jsonl:1: ");
    let serialized = |name: &str, dtype, shape, data: &[u8]| {
        let view = TensorView::new(dtype, shape, data).unwrap();
        safetensors::serialize([(name, view)], None).unwrap()
    };
    let ids: Vec<u8> = [1i64, 97].iter().flat_map(|id| id.to_le_bytes()).collect();
    fail("b.safetensors", &serialized("ids", Dtype::I64, vec![1, 2], &ids), "no tensor `input_ids`");
    fail("b.safetensors", &serialized("input_ids", Dtype::I64, vec![2], &ids), "shape [2]");
    fail("b.safetensors", &serialized("input_ids", Dtype::F32, vec![1, 4], &ids), "F32");
    fail("b.safetensors", &serialized("input_ids", Dtype::I64, vec![1, 2], &ids), "97 in row 0, column 1");
}

#[test]
fn an_adapter_gives_the_logits_of_peft() {
    let directory = tempfile::tempdir().unwrap();
    let peft = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-peft/tests/fixtures/peft/lora_experts");
    let bytes = fs::read(peft.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let tokens = directory.path().join("tokens.safetensors");
    safetensors::serialize_to_file([("input_ids", expected.tensor("input_ids").unwrap())], None, &tokens).unwrap();
    let out = directory.path().join("out.safetensors");
    let arguments =
        Arguments { adapter: Some(peft), grads: false, ..arguments(fixture("tf5/qwen2_moe"), tokens, out.clone()) };
    let summary = trace(&arguments).unwrap();
    let bytes = fs::read(&out).unwrap();
    let found = floats(&SafeTensors::deserialize(&bytes).unwrap(), "logits");
    let difference = found.iter().zip(floats(&expected, "logits")).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(difference < 1e-4, "{difference}");
    let first = f64::from_le_bytes(expected.tensor("train_losses").unwrap().data()[..8].try_into().unwrap());
    assert!((summary.loss - first).abs() < 1e-4);
    let missing = Arguments { adapter: Some(directory.path().join("none")), ..arguments };
    assert!(trace(&missing).unwrap_err().to_string().contains("adapter_config.json"));
}

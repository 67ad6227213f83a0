//! Opens a directory made of the input: config, index and weights, divided at `\0\xFF\0`. Whatever they hold, opening
//! and reading must return, with a result or an error.

#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use moe_checkpoint::{Checkpoint, ModelConfig, Role};

fn directory() -> &'static PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| tempfile::tempdir().expect("a temporary directory").keep())
}

fuzz_target!(|data: &[u8]| {
    let mut parts = Vec::new();
    let mut rest = data;
    while let Some(at) = rest.windows(3).position(|window| window == [0, 0xFF, 0]).filter(|_| parts.len() < 2) {
        parts.push(&rest[..at]);
        rest = &rest[at + 3..];
    }
    parts.push(rest);
    if let Ok(config) = serde_json::from_slice(parts[0]) {
        let _ = ModelConfig::from_json(&config, Some(&config));
    }
    let Some(weights) = parts.get(2) else { return };
    let dir = directory();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes).expect("a writable directory");
    write("config.json", parts[0]);
    match parts[1] {
        [] => {
            let _ = fs::remove_file(dir.join("model.safetensors.index.json"));
        }
        index => write("model.safetensors.index.json", index),
    }
    write("model.safetensors", weights);
    let Ok(checkpoint) = Checkpoint::open(dir) else { return };
    checkpoint.fingerprint();
    for tensor in checkpoint.tensors() {
        let _ = checkpoint.tensor_f32(&tensor.name);
    }
    let _ = checkpoint.read_f32(Role::LmHead);
    for layer in &checkpoint.shape().layers {
        for expert in 0..layer.num_experts() {
            let _ = checkpoint.expert(layer.layer, expert);
        }
    }
});

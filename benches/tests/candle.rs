//! candle-transformers computes our logits, for checkpoints that transformers wrote and for our exports of them:
//! `cargo xtask clients --candle`.

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::{fixtures, logits};
use moe_benches::TINY_MOE;
use moe_benches::candle::Candle;
use moe_benches::exports::{Kind, export};
use moe_checkpoint::Checkpoint;

const TOLERANCE: f32 = 1e-4;
/// Ids of a text, below every vocabulary here.
const IDS: [u32; 19] = [5, 17, 40, 33, 3, 41, 21, 28, 77, 60, 9, 88, 54, 12, 39, 70, 6, 25, 90];

/// The largest difference of candle's logits from ours, at every position: from all before it at once, and one after
/// the other.
fn difference(directory: &Path) -> f32 {
    let ours = logits(directory, &IDS);
    let vocabulary = ours.len() / IDS.len();
    let mut candle = Candle::open(directory).unwrap();
    let mut largest = 0f32;
    let mut compare = |position: usize, found: &[Vec<f32>]| {
        let expected = &ours[position * vocabulary..(position + 1) * vocabulary];
        for found in found {
            assert_eq!(found.len(), vocabulary);
            let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
            largest = differences.fold(largest, |max, d| if d.is_nan() { f32::INFINITY } else { max.max(d) });
        }
    };
    for position in 0..IDS.len() {
        candle.restart();
        compare(position, &candle.logits(&[&IDS[..=position]]).unwrap());
    }
    candle.restart();
    for (position, id) in IDS.iter().enumerate() {
        // Texts of a batch do not see each other.
        compare(position, &candle.logits(&[&[*id], &[*id]]).unwrap());
    }
    largest
}

#[test]
fn candle_computes_our_logits_for_checkpoints_and_for_their_exports() {
    let scratch = tempfile::tempdir().unwrap();
    let mut worst = 0f32;
    for name in ["qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v2"] {
        let directory = fixtures().join("parity/tf4").join(name);
        let checkpoint = Arc::new(Checkpoint::open(&directory).unwrap());
        let mut directories = vec![("as it is", directory)];
        for kind in Kind::ALL {
            let out = scratch.path().join(name).join(kind.name());
            if export(&checkpoint, kind, &out).unwrap() {
                directories.push((kind.name(), out));
            }
        }
        assert!(directories.len() > 4, "{name}: few exports");
        for (kind, directory) in directories {
            let found = difference(&directory);
            println!("{name}, {kind}: {found:.1e}");
            assert!(found < TOLERANCE, "{name}, {kind}: {found}");
            worst = worst.max(found);
        }
    }
    let tiny = difference(Path::new(TINY_MOE));
    assert!(tiny < TOLERANCE, "the bundled model: {tiny}");
    println!("largest difference {:.1e}", worst.max(tiny));
}

#[test]
fn what_candle_would_leave_aside_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let from = fixtures().join("parity/tf4/qwen2_moe");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(from.join(file), scratch.path().join(file)).unwrap();
    }
    assert!(Candle::open(scratch.path()).is_ok());
    let text = fs::read_to_string(from.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (field, value, word) in [
        ("rope_scaling", serde_json::json!({ "rope_type": "yarn", "factor": 4.0 }), "yarn"),
        ("use_sliding_window", serde_json::json!(true), "sliding_window"),
        ("mlp_only_layers", serde_json::json!([1]), "mlp_only_layers"),
        ("quantization_config", serde_json::json!({ "quant_method": "fp8" }), "quantized"),
        ("model_type", serde_json::json!("olmoe"), "olmoe"),
    ] {
        let mut other = config.clone();
        other[field] = value;
        fs::write(scratch.path().join("config.json"), other.to_string()).unwrap();
        let error = Candle::open(scratch.path()).err().unwrap().to_string();
        assert!(error.contains(word) && error.contains("config.json"), "{error}");
    }
}

//! Exports that transformers has run.

use std::path::{Path, PathBuf};

use moe_checkpoint::RopeScaling;
use moe_core::{
    Error,
    data::{Sequence, Wave},
};
use safetensors::SafeTensors;

use crate::{
    expected::{Expected, assert_close},
    observed::run,
};

/// Pruned checkpoints, run by transformers and left by `xtask/scripts/roundtrip.py` with the logits that it computes:
/// `MOE_EXPORTS=out/roundtrip cargo test --release --workspace --test parity -- --ignored --nocapture`
#[test]
#[ignore = "needs exports that transformers has run"]
fn exports_compute_what_transformers_computes() {
    let root = PathBuf::from(std::env::var("MOE_EXPORTS").expect("MOE_EXPORTS names a directory"));
    // tests run elsewhere than the command
    let root = if root.is_relative() { Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(root) } else { root };
    let list = |dir: &Path| {
        let mut found: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        found.sort();
        found
    };
    let (mut worst, mut compared) = (0.0f32, 0);
    for dir in list(&root).iter().flat_map(|model| list(model)) {
        let name = dir.strip_prefix(&root).unwrap().display().to_string();
        let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
        let expected = Expected(SafeTensors::deserialize(&bytes).unwrap());
        let (ids, shape) = expected.integers("input_ids").unwrap();
        match moe_checkpoint::Checkpoint::open(&dir).unwrap().config().rope.scaling {
            RopeScaling::LongRope { original_max_position, .. } if shape[1] > original_max_position => {
                println!("{name}: transformers keeps the frequencies of short texts (docs/families.md)");
                continue;
            }
            _ => {}
        }
        let sequences =
            ids.chunks(shape[1]).map(|row| Sequence::new(row.iter().map(|id| *id as u32).collect())).collect();
        match run(&dir, &Wave { id: 0, sequences }, None) {
            Ok((found, _)) => {
                worst = worst.max(assert_close(&name, &found.logits, &expected.floats("logits").unwrap()))
            }
            Err(Error::Unsupported(reason)) => {
                println!("{name}: {reason} is not implemented");
                continue;
            }
            Err(error) => panic!("{name}: {error}"),
        }
        compared += 1;
    }
    assert!(compared > 0);
    println!("{compared} exports: logits differ by at most {worst:.1e}");
}

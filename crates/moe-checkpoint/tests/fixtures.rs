//! Every bundled checkpoint opens and reads.

use std::path::{Path, PathBuf};

use moe_checkpoint::{Checkpoint, LayerRole, Role};

fn fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity");
    let mut dirs = Vec::new();
    for generation in ["tf4", "tf5"] {
        for entry in std::fs::read_dir(root.join(generation)).unwrap() {
            dirs.push(entry.unwrap().path());
        }
    }
    dirs.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe"));
    dirs.sort();
    dirs
}

#[test]
fn every_fixture_opens() {
    for dir in fixtures() {
        let checkpoint = Checkpoint::open(&dir).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(checkpoint.fingerprint().len(), 64);
        let moe = &checkpoint.shape().layers[0];
        let expert = checkpoint.expert(moe.layer, moe.widths.len() - 1).unwrap();
        assert_eq!(expert.gate.len(), expert.width * expert.hidden);
        assert!(checkpoint.read_f32(Role::Layer(0, LayerRole::Query)).is_ok());
    }
}

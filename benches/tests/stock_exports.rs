//! Every export of every family, against what stock transformers computes for it.
//!
//! `cargo xtask goldens --python PYTHON` makes the numbers anew.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use moe_benches::exports::{Kind, export, lora, models};
use moe_checkpoint::Checkpoint;
use moe_core::Model;
use moe_core::device::device;
use moe_peft::lora::{Lora, Maps};
use moe_peft::{AdapterSet, peft_files};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use common::{fixtures, logits, logits_of};

const TOLERANCE: f32 = 1e-4;

fn input_ids(golden: &SafeTensors<'_>) -> Vec<u32> {
    let ids = golden.tensor("input_ids").unwrap();
    assert_eq!(ids.dtype(), Dtype::I64);
    ids.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect()
}

/// Largest difference of numbers from those of a golden, which are of the last positions.
fn difference(found: &[f32], expected: &TensorView<'_>) -> f32 {
    let expected: Vec<f32> = expected.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let last = &found[found.len() - expected.len()..];
    let differences = last.iter().zip(expected).map(|(a, b)| (a - b).abs());
    differences.fold(0f32, |max, d| if d.is_nan() { f32::INFINITY } else { max.max(d) })
}

#[test]
fn stock_transformers_computes_the_same() {
    let bytes = fs::read(fixtures().join("stock_exports.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let ids = input_ids(&golden);
    let directory = tempfile::tempdir().unwrap();
    let from = fixtures().join("parity/tf5");
    let (mut compared, mut worst) = (0, 0f32);
    for model in models(&from, &[]).unwrap() {
        let checkpoint = Arc::new(Checkpoint::open(from.join(&model)).unwrap());
        let vocabulary = checkpoint.config().vocab_size;
        for kind in Kind::ALL {
            let out = directory.path().join(&model).join(kind.name());
            let name = format!("{model}/{kind}");
            let Ok(expected) = golden.tensor(&name) else {
                assert!(!export(&checkpoint, kind, &out).unwrap(), "{name} has no golden");
                continue;
            };
            assert!(export(&checkpoint, kind, &out).unwrap(), "{name} has a golden");
            let found = logits(&out, &ids);
            assert_eq!(expected.shape(), [expected.shape()[0], vocabulary], "{name}");
            let difference = difference(&found, &expected);
            assert!(difference < TOLERANCE, "{name}: {difference}");
            worst = worst.max(difference);
            compared += 1;
            if kind == Kind::Pieces {
                // Nothing was dropped: the model itself.
                let original = logits(checkpoint.dir(), &ids);
                let difference = found.iter().zip(&original).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(difference < TOLERANCE, "{name} and the model: {difference}");
            }
        }
    }
    // One tensor is the input; those of adapters are the other test's.
    let adapters = golden.names().iter().filter(|name| name.ends_with("/adapter")).count();
    assert_eq!(compared, golden.len() - 1 - adapters);
    println!("{compared} exports, largest difference {worst:.1e}");
}

/// What PEFT made of the adapter of a model.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Loaded {
    /// What transformers computes with the adapter in the weights, from files with this hash.
    Digest(String),
    /// Nothing, for this reason.
    Refused(String),
}

#[test]
fn adapters_are_the_files_that_peft_loads_and_beside_a_model_they_give_what_they_give_in_its_weights() {
    let bytes = fs::read(fixtures().join("stock_exports.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let ids = input_ids(&golden);
    let loaded = fs::read(fixtures().join("stock_adapters.json")).unwrap();
    let mut loaded: BTreeMap<String, Loaded> = serde_json::from_slice(&loaded).unwrap();
    let guide = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/adapters.md")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let from = fixtures().join("parity/tf5");
    let mut worst = 0f32;
    for name in models(&from, &[]).unwrap() {
        let model = Model::open(from.join(&name), &device("flex").unwrap(), None).unwrap();
        let checkpoint = model.checkpoint();
        if !lora::is_exact(checkpoint) {
            continue;
        }
        let (files, maps) = (directory.path().join(&name), Maps::new(checkpoint));
        lora::files(checkpoint, &name, &files).unwrap();
        let read = peft_files::read(&files, &maps, peft_files::ReadOptions::default()).unwrap();
        let plain = logits_of(&model, &ids);
        for (kind, weights) in [("lora", lora::everywhere(checkpoint)), ("adapter", read)] {
            let expected = golden.tensor(&format!("{name}/{kind}")).unwrap();
            let mut set = AdapterSet::new();
            Lora::install(&mut set, &maps, &[("default", weights)], model.device()).unwrap();
            let beside = logits_of(&model.with_adapters(Arc::new(set)).unwrap(), &ids);
            let found = difference(&beside, &expected);
            assert!(found < TOLERANCE, "{name} with its {kind} beside it: {found}");
            assert!(difference(&plain, &expected) > 10.0 * TOLERANCE, "{name}: the {kind} does nothing");
            worst = worst.max(found);
        }
        match loaded.remove(&name) {
            Some(Loaded::Digest(digest)) => {
                let written = fs::read_to_string(files.join(lora::DIGEST)).unwrap();
                assert_eq!(written, digest, "{name}: other files than PEFT loaded; `cargo xtask goldens`");
            }
            Some(Loaded::Refused(reason)) => {
                let family = &checkpoint.config().model_type;
                assert!(
                    guide.contains(&format!("`{family}`")),
                    "{name}: {reason}, which docs/adapters.md does not say"
                );
            }
            None => panic!("{name}: PEFT was not asked"),
        }
    }
    assert!(loaded.is_empty(), "adapters of no model: {:?}", loaded.keys());
    println!("largest difference {worst:.1e}");
}

/// Checkpoints under a directory, by the `model_type` of their family.
fn by_family(directory: &Path) -> Vec<(String, String)> {
    let names = models(directory, &[]).unwrap().into_iter();
    let family = |name: &String| Checkpoint::open(directory.join(name)).unwrap().config().model_type.clone();
    names.map(|name| (family(&name), name)).collect()
}

#[test]
fn every_family_has_a_fixture_a_row_in_the_table_and_an_export_that_transformers_ran() {
    let bytes = fs::read(fixtures().join("stock_exports.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let exported: Vec<&str> = golden.names().into_iter().filter_map(|name| Some(name.split_once('/')?.0)).collect();
    let (run, unrun) = (by_family(&fixtures().join("parity/tf5")), by_family(&fixtures().join("unrun")));
    let guide = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/families.md")).unwrap();
    let firsts = guide.lines().filter_map(|line| line.strip_prefix("| ")?.split_once(" |").map(|(first, _)| first));
    let rows: Vec<&str> = firsts.flat_map(|first| first.split('`').skip(1).step_by(2)).collect();
    for family in moe_checkpoint::families() {
        let name = family.model_type();
        let mut own = run.iter().filter(|(of, _)| of == name).map(|(_, fixture)| fixture.as_str()).peekable();
        if own.peek().is_some() {
            assert!(own.any(|fixture| exported.contains(&fixture)), "{name} has no golden export");
        } else {
            assert!(unrun.iter().any(|(of, _)| of == name), "{name} has no fixture");
        }
        // Text models inside others are called by the whole.
        let whole = name.strip_suffix("_text").unwrap_or(name);
        let row =
            [name, whole].iter().any(|name| rows.contains(name)) || rows.contains(&format!("{whole}_thinker").as_str());
        assert!(row, "{name} has no row in docs/families.md");
    }
}

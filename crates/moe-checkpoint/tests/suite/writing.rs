//! Writing: byte-identical copies, small shards, interruption, atomicity.

use crate::common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use common::{assert_parts, fixture, fixtures, message};
use moe_checkpoint::{
    Checkpoint, Dtype, Error, Existing, ExpertBiases, OutputDir, ShardedWriter, TensorSpec, WriterOptions,
    copy_side_files, ragged_config, write_json,
};

fn specs(checkpoint: &Checkpoint) -> Vec<TensorSpec> {
    let spec =
        |t: &moe_checkpoint::TensorInfo| TensorSpec { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() };
    checkpoint.tensors().map(spec).collect()
}

fn options(max_shard_bytes: u64) -> WriterOptions {
    WriterOptions { max_shard_bytes, recipe: "copy".to_string() }
}

fn copy(from: &Checkpoint, out: &Path, max_shard_bytes: u64) -> moe_checkpoint::Written {
    let output = OutputDir::create(out, Existing::Refuse).unwrap();
    let mut writer = ShardedWriter::new(output.path(), options(max_shard_bytes), specs(from)).unwrap();
    for tensor in from.tensors() {
        writer.copy(from, &tensor.name).unwrap();
    }
    let written = writer.finish().unwrap();
    copy_side_files(from.dir(), output.path()).unwrap();
    write_json(&output.path().join("config.json"), from.raw_config()).unwrap();
    output.commit().unwrap();
    written
}

fn assert_same(a: &Checkpoint, b: &Checkpoint) {
    assert_eq!(specs(a), specs(b));
    for tensor in a.tensors() {
        assert_eq!(a.bytes(&tensor.name).unwrap(), b.bytes(&tensor.name).unwrap(), "{}", tensor.name);
    }
    assert_eq!(a.raw_config(), b.raw_config());
    assert_eq!(a.fingerprint(), b.fingerprint());
}

#[test]
fn every_fixture_round_trips_byte_for_byte_into_shards_of_any_size() {
    for dir in fixtures() {
        let from = Checkpoint::open(&dir).unwrap();
        if from.tensors().any(|tensor| tensor.dtype == Dtype::F8_E4M3) {
            continue; // copies are BF16
        }
        let size = from.bytes_on_disk();
        // One shard per tensor once only: every shard is synced, which is slow.
        let smallest = if dir.ends_with("tf5/qwen2_moe_mixed") { 1 } else { size / 9 };
        for max_shard_bytes in [u64::MAX, size / 3, smallest] {
            let out = tempfile::tempdir().unwrap();
            let out = out.path().join("copy");
            let written = copy(&from, &out, max_shard_bytes);
            assert_eq!(written.bytes, size);
            let back = Checkpoint::open(&out).unwrap();
            assert_same(&from, &back);
            assert_eq!(out.join("model.safetensors").exists(), max_shard_bytes == u64::MAX);
            for file in &written.files {
                let name = file.file_name().unwrap();
                let data = fs::metadata(out.join(name)).unwrap().len();
                let tensors: Vec<_> = back.tensors().filter(|t| t.file.file_name() == Some(name)).collect();
                let bytes: u64 = tensors.iter().map(|t| t.bytes).sum();
                assert!(bytes <= max_shard_bytes || tensors.len() == 1);
                assert!(data > bytes);
            }
            assert!(!out.join("config.json.tmp").exists());
            assert!(out.join("generation_config.json").exists());
            let hidden: Vec<_> = fs::read_dir(&out)
                .unwrap()
                .map(|e| e.unwrap().file_name())
                .filter(|n| n.to_string_lossy().starts_with('.'))
                .collect();
            assert!(hidden.is_empty(), "{hidden:?}");
        }
    }
}

#[test]
fn the_index_is_that_of_transformers() {
    let from = Checkpoint::open(fixture("tf5/qwen3_moe_sharded")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("copy");
    copy(&from, &out, 60_000);
    let read = |dir: &Path| -> serde_json::Value {
        serde_json::from_slice(&fs::read(dir.join("model.safetensors.index.json")).unwrap()).unwrap()
    };
    let (ours, theirs) = (read(&out), read(from.dir()));
    assert_eq!(ours["metadata"], theirs["metadata"]);
    let names =
        |index: &serde_json::Value| index["weight_map"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&theirs));
}

#[test]
fn an_interrupted_copy_loses_its_current_shard_only() {
    let from = Checkpoint::open(fixture("tf5/qwen3_moe")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("copy");
    let names: Vec<String> = from.tensors().map(|t| t.name.clone()).collect();
    let stop = names.len() / 2;
    {
        let output = OutputDir::create(&out, Existing::Refuse).unwrap();
        let mut writer = ShardedWriter::new(output.path(), options(20_000), specs(&from)).unwrap();
        for name in &names[..stop] {
            writer.copy(&from, name).unwrap();
        }
        writer.append(&names[stop], &from.bytes(&names[stop]).unwrap()[..8]).unwrap();
        // Dropped here, as a killed process would.
    }
    assert!(!out.exists());
    assert!(matches!(OutputDir::create(&out, Existing::Refuse), Err(Error::OutputUnfinished { .. })));

    // Another recipe does not continue it.
    let output = OutputDir::create(&out, Existing::Resume).unwrap();
    let other = WriterOptions { recipe: "other".to_string(), ..options(20_000) };
    assert!(matches!(ShardedWriter::new(output.path(), other, specs(&from)), Err(Error::ResumeMismatch { .. })));
    assert!(matches!(
        ShardedWriter::new(output.path(), options(30_000), specs(&from)),
        Err(Error::ResumeMismatch { .. })
    ));

    // A shard that is too short is not taken for a finished one.
    let first = fs::read_dir(output.path()).unwrap().map(|e| e.unwrap().path());
    let first = first.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).min().unwrap();
    let whole = fs::read(&first).unwrap();
    fs::write(&first, &whole[..whole.len() - 1]).unwrap();

    let mut writer = ShardedWriter::new(output.path(), options(20_000), specs(&from)).unwrap();
    let finished = names.iter().filter(|name| writer.is_finished(name).unwrap()).count();
    assert!(finished > 0 && finished < stop, "{finished} of {stop}");
    assert!(!writer.is_finished(&names[0]).unwrap());
    for name in &names {
        writer.copy(&from, name).unwrap();
    }
    writer.finish().unwrap();
    write_json(&output.path().join("config.json"), from.raw_config()).unwrap();
    assert_eq!(output.commit().unwrap(), out);
    assert_same(&from, &Checkpoint::open(&out).unwrap());
    assert!(!out.with_file_name("copy.partial").exists());
}

#[test]
fn an_earlier_output_survives_until_the_new_one_is_complete() {
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("a/b/out");
    let write = |existing, text: &str| -> moe_checkpoint::Result<()> {
        let output = OutputDir::create(&out, existing)?;
        fs::write(output.path().join("file"), text).unwrap();
        output.commit().map(drop)
    };
    write(Existing::Refuse, "one").unwrap();
    let read = || fs::read_to_string(out.join("file")).unwrap();
    for existing in [Existing::Refuse, Existing::Resume] {
        assert_parts(&message(write(existing, "two")), &["out", "exists"]);
    }
    // Fails before the end: nothing happened to the output.
    let output = OutputDir::create(&out, Existing::Force).unwrap();
    fs::write(output.path().join("junk"), "x").unwrap();
    assert!(matches!(OutputDir::create(&out, Existing::Force), Err(Error::OutputBusy { .. })));
    drop(output);
    assert_eq!(read(), "one");
    write(Existing::Force, "two").unwrap();
    assert_eq!(read(), "two");
    assert!(!out.join("junk").exists());
    assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 1);

    // A process that died between the two renames of a replacement.
    fs::rename(&out, out.with_file_name("out.replaced")).unwrap();
    assert!(matches!(OutputDir::create(&out, Existing::Refuse), Err(Error::OutputExists { .. })));
    assert_eq!(read(), "two");
    assert!(OutputDir::create("/", Existing::Refuse).is_err());
}

#[test]
fn wrong_writes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let spec =
        |name: &str, shape: &[usize]| TensorSpec { name: name.to_string(), dtype: Dtype::F32, shape: shape.to_vec() };
    let specs = vec![spec("a", &[2]), spec("empty", &[0, 3]), spec("b", &[1])];
    let new = || ShardedWriter::new(dir.path(), options(8), specs.clone());
    let mut writer = new().unwrap();
    assert_parts(&message(writer.write("a", &[0; 4])), &["`a`", "4 bytes", "expected 8"]);
    assert_parts(&message(writer.append("a", &[0; 9])), &["`a`", "9 bytes", "expected 8"]);
    assert_parts(&message(writer.append("c", &[0])), &["`c`", "not among"]);
    writer.append("a", &[0; 5]).unwrap();
    assert_parts(&message(writer.finish()), &["`a`", "5 bytes", "expected 8"]);
    // Out of order, and split anywhere.
    let mut writer = new().unwrap();
    writer.write("b", &[9; 4]).unwrap();
    writer.append("a", &[1; 3]).unwrap();
    writer.append("a", &[2; 5]).unwrap();
    let written = writer.finish().unwrap();
    assert_eq!((written.bytes, written.parameters, written.files.len()), (12, 3, 2));
    let bytes = fs::read(&written.files[0]).unwrap();
    assert_eq!(bytes[bytes.len() - 8..], [1, 1, 1, 2, 2, 2, 2, 2]);
    let from = Checkpoint::open(fixture("tf5/qwen3_moe")).unwrap();
    let other = tempfile::tempdir().unwrap();
    let mut writer = ShardedWriter::new(other.path(), options(8), vec![spec("model.norm.weight", &[31])]).unwrap();
    assert_parts(&message(writer.copy(&from, "model.norm.weight")), &["model.norm.weight", "[32]", "[31]"]);
}

/// From any layout to any other by raw bytes: what an export does.
#[test]
fn a_ragged_export_of_whole_experts_reads_back_bit_for_bit() {
    let from = Checkpoint::open(fixture("tf5/qwen2_moe_bf16")).unwrap();
    let hidden = from.config().hidden_size;
    let layout = moe_checkpoint::ExpertLayout::Ragged;
    let mut specs: Vec<TensorSpec> = specs(&from).into_iter().filter(|s| !s.name.contains(".experts.")).collect();
    let outside: Vec<String> = specs.iter().map(|spec| spec.name.clone()).collect();
    let mut widths = BTreeMap::new();
    for layer in &from.shape().layers {
        widths.insert(layer.layer, layer.widths.clone());
        for tensor in layout.tensors(hidden, &layer.widths, ExpertBiases::None).unwrap() {
            let name = from.expert_tensor_name(layer.layer, tensor.tensor);
            specs.push(TensorSpec { name, dtype: Dtype::BF16, shape: tensor.shape });
        }
    }
    let out = tempfile::tempdir().unwrap();
    let mut writer = ShardedWriter::new(out.path(), options(20_000), specs).unwrap();
    outside.iter().for_each(|name| writer.copy(&from, name).unwrap());
    for layer in &from.shape().layers {
        for tensor in layout.tensors(hidden, &layer.widths, ExpertBiases::None).unwrap() {
            let name = from.expert_tensor_name(layer.layer, tensor.tensor);
            for (expert, block) in tensor.blocks {
                let bytes = from.expert_bytes(layer.layer, expert).unwrap();
                writer.append(&name, &block.bytes(&bytes).unwrap()).unwrap();
            }
        }
    }
    writer.finish().unwrap();
    write_json(&out.path().join("config.json"), &ragged_config(from.raw_config(), &widths, &BTreeSet::new()).unwrap())
        .unwrap();
    let back = Checkpoint::open(out.path()).unwrap();
    assert!(back.ragged());
    assert_eq!(back.shape(), from.shape());
    for layer in &from.shape().layers {
        for expert in 0..layer.num_experts() {
            assert_eq!(back.expert(layer.layer, expert).unwrap(), from.expert(layer.layer, expert).unwrap());
        }
    }
}

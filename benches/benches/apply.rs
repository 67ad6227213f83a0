//! Writing a pruned checkpoint, against copying the file: bytes read per second.

use std::{fs, sync::Arc, time::Duration};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use moe_benches::{WIDE_LAYER, write_checkpoint};
use moe_checkpoint::{Checkpoint, WriteOptions, write};
use moe_prune::{PruneForm, PruneOptions, PrunePlan};

fn benches(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let from = dir.path().join("model");
    fs::create_dir(&from).expect("a directory");
    write_checkpoint(&from, WIDE_LAYER);
    let checkpoint = Arc::new(Checkpoint::open(&from).expect("the checkpoint just written"));
    let mut half = PrunePlan::keep_all(checkpoint.shape(), checkpoint.fingerprint());
    for expert in half.kept.iter_mut().flat_map(|layer| &mut layer.experts) {
        expert.retain(|unit| unit % 2 == 0);
    }
    let mut group = c.benchmark_group("apply");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(8))
        .throughput(Throughput::Bytes(checkpoint.bytes_on_disk()));
    for form in [PruneForm::Uniform, PruneForm::Ragged, PruneForm::Masked] {
        group.bench_function(form.to_string(), |b| {
            b.iter_batched(
                || {
                    let out = dir.path().join("out");
                    let _ = fs::remove_dir_all(&out);
                    out
                },
                |out| {
                    let pruned = half.on(&checkpoint, &PruneOptions::new(form)).expect("a plan of this model");
                    write(pruned.model(), &out, &WriteOptions::default()).expect("a written model")
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.bench_function("copy", |b| {
        b.iter_batched(
            || {
                let out = dir.path().join("copy.safetensors");
                let _ = fs::remove_file(&out);
                out
            },
            |out| {
                fs::copy(from.join("model.safetensors"), &out).expect("copy");
                fs::File::open(&out).and_then(|file| file.sync_all()).expect("sync");
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

criterion_group!(apply, benches);
criterion_main!(apply);

//! A collection sweep over a small model: forward only (activations), token Fisher, twelve scorers of its cost, and
//! all Fisher criteria in one pass.

use std::{hint::black_box, time::Duration};

use burn::tensor::Device;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use moe_benches::{SMALL, wave, write_checkpoint};
use moe_core::Model;
use moe_importance::{Calibration, ScorerConfig};

fn benches(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_checkpoint(dir.path(), SMALL);
    let model = Model::open(dir.path(), &Device::flex(), None).expect("the checkpoint just written");
    let wave = wave(8, 256, SMALL.vocab);
    let sets = [
        ("activation", r#"[{"type": "activation"}]"#),
        ("fisher_token", r#"[{"type": "fisher", "criterion": "token"}]"#),
        ("fisher_sequence", r#"[{"type": "fisher", "criterion": "sequence"}]"#),
        ("fisher_abs", r#"[{"type": "fisher", "criterion": "abs"}]"#),
        (
            "twelve",
            r#"[{"type": "fisher"}, {"type": "heapr"}, {"type": "coupled"}, {"type": "taylor"}, {"type": "activation"},
                {"type": "reap"}, {"type": "ean"}, {"type": "man"}, {"type": "frequency"}, {"type": "dern"},
                {"type": "tenp"}, {"type": "mone"}]"#,
        ),
        (
            "all",
            r#"[{"type": "activation"}, {"type": "router_score"}, {"type": "fisher", "criterion": "token"},
                {"type": "fisher", "criterion": "sequence"}, {"type": "fisher", "criterion": "abs"}]"#,
        ),
    ];
    let mut group = c.benchmark_group("sweep");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(5))
        .throughput(Throughput::Elements(wave.tokens() as u64));
    for (name, json) in sets {
        let configs: Vec<ScorerConfig> = serde_json::from_str(json).expect("valid scorers");
        let scorers: Vec<_> = configs.iter().map(|config| config.build().expect("valid scorer")).collect();
        group.bench_function(name, |b| {
            b.iter(|| {
                let calibration = Calibration::of_waves(&model, std::slice::from_ref(&wave));
                let calibration = calibration.scorers(scorers.iter().map(|scorer| &**scorer));
                black_box(calibration.run(&mut |_| ()).expect("a sweep"))
            });
        });
    }
    group.finish();
}

criterion_group!(sweep, benches);
criterion_main!(sweep);

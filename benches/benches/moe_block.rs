//! The feed-forward half of one MoE layer of Qwen1.5-MoE's shape, alone and with a trace of every expert's units.

use std::{hint::black_box, time::Duration};

use burn::tensor::{Device, Distribution, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moe_benches::{WIDE_LAYER, write_checkpoint};
use moe_core::{
    Engine, EngineOptions, Model, Result,
    trace::{ExpertTrace, Observer, Signals},
};

struct Silent;

impl Observer for Silent {
    fn needs(&self) -> Signals {
        Signals::NONE
    }
}

struct Units(f64);

impl Observer for Units {
    fn needs(&self) -> Signals {
        Signals::UNITS | Signals::ROUTING
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> Result<()> {
        let units = trace.units.expect("asked for");
        let mut sums = vec![0.0; units.dims()[1]];
        let weights = vec![1.0; units.dims()[0]];
        moe_core::kernels::reduce::add_weighted_column_magnitudes(units, &weights, &mut sums);
        self.0 += sums.iter().sum::<f64>();
        Ok(())
    }
}

fn benches(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_checkpoint(dir.path(), WIDE_LAYER);
    let device = Device::flex();
    let model = Model::open(dir.path(), &device, None).expect("the checkpoint just written");
    let engine = Engine::new(&model, EngineOptions::default());
    // one wave through the model decides what stays in memory
    engine.run(&moe_benches::wave(1, 64, WIDE_LAYER.vocab), &mut Silent).expect("a sweep");
    let mut group = c.benchmark_group("moe_block");
    group.sample_size(10).measurement_time(Duration::from_secs(5));
    for tokens in [512, 2048] {
        let x = Tensor::<2>::random([tokens, WIDE_LAYER.hidden], Distribution::Normal(0.0, 1.0), &device);
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(BenchmarkId::new("forward", tokens), |b| {
            b.iter(|| black_box(engine.feed_forward(0, &x, &mut Silent).expect("forward")));
        });
        group.bench_function(BenchmarkId::new("forward_and_trace", tokens), |b| {
            b.iter(|| black_box(engine.feed_forward(0, &x, &mut Units(0.0)).expect("forward")));
        });
    }
    group.finish();
}

criterion_group!(moe_block, benches);
criterion_main!(moe_block);

//! Seconds and memory that one layer of random weights takes to align and to merge by DERN, by default in the shape of
//! Qwen1.5-MoE-A2.7B: `cargo run --release --example layer_time -- [EXPERTS] [WIDTH] [HIDDEN] [KEPT] [PAIRS]`. Seconds
//! of all threads together are what a machine that does other work as well takes notice of: over the number of threads
//! they are what it would take without.

use std::sync::OnceLock;
use std::time::Instant;

use moe_checkpoint::{Activation, ExpertWeights};
use moe_merge::{
    AlignmentConfig, AlignmentContext, Combination, ExpertSource, Group, LayerJob, LayerPlan, Merged, Reference,
    Segments, TokenSample,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Experts of random weights, made when they are asked for, as a checkpoint would read them.
struct Random {
    count: usize,
    width: usize,
    hidden: usize,
}

impl ExpertSource for Random {
    fn count(&self) -> usize {
        self.count
    }

    fn expert(&self, expert: usize) -> moe_merge::Result<ExpertWeights> {
        let part = |which: u64| -> Vec<f32> {
            let mut values = vec![0.0f32; self.width * self.hidden];
            values.par_chunks_mut(1 << 16).enumerate().for_each(|(chunk, values)| {
                let mut rng = ChaCha8Rng::seed_from_u64(expert as u64 * 4 + which);
                rng.set_stream(chunk as u64);
                values.iter_mut().for_each(|v| *v = 0.02 * rng.random_range(-1.0..1.0f32));
            });
            values
        };
        let (gate, up, down) = (part(0), part(1), part(2));
        Ok(ExpertWeights { gate, up, down, width: self.width, hidden: self.hidden, ..ExpertWeights::default() })
    }
}

/// What something took.
struct Took {
    wall: Instant,
    threads: f64,
}

impl Took {
    fn start() -> Self {
        Self { wall: Instant::now(), threads: thread_seconds() }
    }

    /// Seconds on the clock, and of all threads.
    fn seconds(&self) -> (f64, f64) {
        (self.wall.elapsed().as_secs_f64(), thread_seconds() - self.threads)
    }
}

/// Seconds that the threads of this process have run; 0 where `/proc` does not say.
fn thread_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name in brackets: state, 10 numbers, then user and system time in hundredths of a second.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Most memory this process has had, in MiB.
fn peak() -> u64 {
    moe_core::memory::process_memory().map_or(0, |memory| memory.peak >> 20)
}

/// Inputs of a layer, without a pattern.
fn sample(tokens: usize, experts: &Random) -> TokenSample {
    let mut rng = ChaCha8Rng::seed_from_u64(99);
    TokenSample {
        inputs: (0..tokens * experts.hidden).map(|_| rng.random_range(-1.0..1.0f32)).collect(),
        logits: vec![0.0; tokens * experts.count],
        selected: (0..tokens).map(|token| (token % experts.count) as u32).collect(),
        weights: vec![1.0; tokens],
        hidden: experts.hidden,
        experts: experts.count,
        top_k: 1,
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments = std::env::args().skip(1).map(|text| text.parse()).collect::<Result<Vec<usize>, _>>()?;
    let number = |at: usize, default: usize| arguments.get(at).copied().unwrap_or(default);
    let experts = Random { count: number(0, 60), width: number(1, 1408), hidden: number(2, 2048) };
    let (kept, pairs) = (number(3, 45), number(4, 5));
    println!(
        "{} experts of {} x {}, {kept} kept, {} threads",
        experts.count,
        experts.width,
        experts.hidden,
        rayon::current_num_threads()
    );

    let sample = sample(2048, &experts);
    let basis = OnceLock::new();
    let (activation, source) = (Activation::Silu, &experts as &dyn ExpertSource);
    let context = AlignmentContext { sample: Some(&sample), activation, layer: 0, experts: source, basis: &basis };
    for name in [r#"{"type": "weights"}"#, r#"{"type": "activations"}"#, r#"{"type": "pca"}"#] {
        let alignment: AlignmentConfig = serde_json::from_str(name)?;
        let reference = experts.expert(0)?;
        let others = (1..=pairs).map(|other| experts.expert(other)).collect::<Result<Vec<_>, _>>()?;
        let took = Took::start();
        for other in &others {
            alignment.order(&reference, other, &context)?;
        }
        let of = |seconds: f64| seconds / pairs.max(1) as f64;
        let (wall, threads) = took.seconds();
        let layer = of(threads) * (experts.count - kept) as f64;
        println!(
            "{name}: {:.2} s a pair, {:.2} s of all threads, {layer:.0} s for the {} of the layer; {} MiB at most",
            of(wall),
            of(threads),
            experts.count - kept,
            peak()
        );
    }

    let group = |e: usize| Group { dominant: e as u32, members: vec![e as u32], weights: vec![1.0] };
    let plan = LayerPlan {
        layer: 0,
        groups: (0..kept).map(group).collect(),
        dissolved: (kept..experts.count).map(|e| e as u32).collect(),
        importance: vec![1.0; experts.count],
        ..LayerPlan::default()
    };
    let job = LayerJob {
        plan: &plan,
        experts: &experts,
        sample: None,
        activation: Activation::Silu,
        alignment: &AlignmentConfig::None,
        basis: &OnceLock::new(),
        reference: Reference::Dominant,
    };
    // Random weights are nowhere alike: everything is moved, which is the most work there can be.
    let segments = Segments { alpha: -1.0, ..Segments::default() };
    let took = Took::start();
    let (mut first, mut changed) = (None, 0);
    segments.combine(&job, &mut |_, merged| {
        first.get_or_insert_with(|| took.seconds().1);
        changed += usize::from(matches!(merged, Merged::Changed(_)));
        Ok(())
    })?;
    let ((wall, threads), first) = (took.seconds(), first.unwrap_or_default());
    println!(
        "DERN: {wall:.0} s, {threads:.0} s of all threads, of which {first:.0} s for reassigning and the first expert; {changed} \
         experts clustered; {} MiB at most",
        peak()
    );
    Ok(())
}

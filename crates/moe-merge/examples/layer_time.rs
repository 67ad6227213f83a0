//! Seconds that one layer of random weights takes to align and to merge by DERN, by default in the shape of Qwen1.5-MoE-A2.7B:
//! `cargo run --release -p moe-merge --example layer_time -- [EXPERTS] [WIDTH] [HIDDEN] [KEPT] [PAIRS]`.

use std::time::Instant;

use moe_checkpoint::{Activation, ExpertWeights};
use moe_merge::{
    AlignmentConfig, AlignmentContext, Combination, ExpertSource, Group, LayerJob, LayerPlan, Merged, Reference,
    Segments,
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

    let context = AlignmentContext { sample: None, activation: Activation::Silu, layer: 0 };
    for name in [r#"{"type": "weights"}"#, r#"{"type": "pca"}"#] {
        let alignment: AlignmentConfig = serde_json::from_str(name)?;
        let reference = experts.expert(0)?;
        let start = Instant::now();
        for other in 1..=pairs {
            alignment.order(&reference, &experts.expert(other)?, &context)?;
        }
        let each = start.elapsed().as_secs_f64() / pairs.max(1) as f64;
        let layer = each * (experts.count - kept) as f64;
        println!("{name}: {each:.2} s a pair, {layer:.0} s for the {} of the layer", experts.count - kept);
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
        reference: Reference::Dominant,
    };
    // Random weights are nowhere alike: everything is moved, which is the most work there can be.
    let segments = Segments { alpha: -1.0, ..Segments::default() };
    let start = Instant::now();
    let (mut first, mut changed) = (None, 0);
    segments.combine(&job, &mut |_, merged| {
        first.get_or_insert_with(|| start.elapsed());
        changed += usize::from(matches!(merged, Merged::Changed(_)));
        Ok(())
    })?;
    let (all, first) = (start.elapsed().as_secs_f64(), first.unwrap_or_default().as_secs_f64());
    println!(
        "DERN: {all:.0} s, of which {first:.0} s for reassigning and the first expert; {changed} experts clustered"
    );
    Ok(())
}

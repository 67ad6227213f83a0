//! What sharing the statistics of a wave costs: bytes and seconds of a round, for a model of any shape, and from that
//! how long a calibration takes on more and more processes.
//!
//! `cargo run --release -p moe-checkpoint --example group_exchange -- LAYERS EXPERTS WIDTH STATISTICS SECONDS WAVES`,
//! with the seconds of a wave, exchanges between four threads; with feature `mpi` under `mpirun`, between its
//! processes.

use std::time::Instant;

use moe_checkpoint::group::{Group, Threads, pack, start, unpack};
use moe_checkpoint::{Fold, MoeLayerShape, MoeShape, Provenance, Result, Statistics, StatisticsSlice};

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let given: Vec<f64> =
        std::env::args().skip(1).map(|number| number.parse()).collect::<std::result::Result<_, _>>()?;
    // Qwen3-30B-A3B, one statistic, and a wave of 16,384 tokens at 100 tokens/s.
    let [layers, experts, width, statistics, seconds, waves] = given[..] else {
        return Err("expected LAYERS EXPERTS WIDTH STATISTICS WAVE_SECONDS WAVES, as in 48 128 768 1 164 16".into());
    };
    let layer = |layer| MoeLayerShape { layer, widths: vec![width as usize; experts as usize] };
    let layers = (0..layers as usize).map(layer).collect();
    let shape = MoeShape { gateless: false, hidden_size: 2048, top_k: 8, layers };
    let group = start()?;
    let [bytes, exchange] = match group.size() {
        1 => Threads::run(4, |group| round(group, &shape, statistics as usize)).remove(0)?,
        _ => round(&*group, &shape, statistics as usize)?,
    };
    if group.rank() > 0 {
        return Ok(());
    }
    println!("{bytes:.0} bytes of a wave leave a rank, {exchange:.3} s for a round of cutting, sending and adding");
    println!("simulated: {waves} waves of {seconds} s, and a round of exchange after each");
    for ranks in [1, 2, 4, 8, 16, 32, 64] {
        let rounds = (waves / f64::from(ranks)).ceil();
        let all = rounds * (seconds + if ranks > 1 { exchange } else { 0.0 });
        println!("{ranks:>3} ranks: {all:>9.1} s, {:>5.1} times as fast as one", waves * seconds / all);
    }
    Ok(())
}

/// One round: bytes that leave this rank, and seconds from whole statistics to the folded slice.
fn round(group: &dyn Group, shape: &MoeShape, statistics: usize) -> Result<[f64; 2]> {
    let provenance = Provenance::new("model", "data", "{}");
    let mut wave = Statistics::new(shape, provenance.clone());
    wave.begin(group.rank() as u64);
    for id in 0..statistics {
        wave.allocate(&format!("sum.{id}"), moe_checkpoint::ArrayKind::Unit, Fold::Sum)?;
    }
    let mut slice = StatisticsSlice::new(shape, provenance.clone());
    group.check(None)?;
    let start = Instant::now();
    let cut = |owner| wave.slice(owner, group.size()).to_message(false);
    let to = (0..group.size()).map(cut).collect::<Result<Vec<_>>>()?;
    let bytes: usize = to.iter().enumerate().filter(|(to, _)| *to != group.rank()).map(|(_, m)| m.len()).sum();
    let received = group.exchange(to.iter().map(|message| pack([message.as_slice()])).collect())?;
    for message in &received {
        for message in unpack(message)? {
            slice.fold(&StatisticsSlice::from_message(shape, provenance.clone(), message)?)?;
        }
    }
    group.check(None)?;
    Ok([bytes as f64, start.elapsed().as_secs_f64()])
}

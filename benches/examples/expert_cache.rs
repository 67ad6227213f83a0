//! Generation with experts that do not all fit: plain streaming, an LRU, and the policies of HOBBIT and EdgeMoE, with
//! and without a second precision and loading ahead, at a quarter of the bytes of the routed experts:
//! `cargo run --release -p moe-benches --example expert_cache -- [MODEL ROWS.jsonl [SHARE]]`.

use std::sync::Arc;
use std::time::Instant;

use moe::jobs::rows;
use moe::table::Table;
use moe_checkpoint::{BasePrecision, Checkpoint, QuantizeOptions, Quantized};
use moe_core::Model;
use moe_core::device::device;
use moe_core::expert_cache::{EvictionPolicy, ExpertCacheOptions, LowPrecision};
use moe_core::generate::{GenerateOptions, generate};

/// Prompts, and new tokens of each.
const PROMPTS: usize = 8;
const TOKENS: usize = 48;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let directory = arguments.first().map_or(moe_cli::TINY_MOE, String::as_str);
    let file = arguments.get(1).cloned().unwrap_or(format!("{directory}/data/prose_calibration.jsonl"));
    let share: f64 = arguments.get(2).map_or(Ok(0.25), |text| text.parse())?;
    let device = device("flex")?;
    let base = Arc::new(Checkpoint::open(directory)?);
    let data = rows(&Model::new(base.clone(), &device, None)?, &file, PROMPTS)?;
    let prompts: Vec<Vec<u32>> = data.sequences.iter().map(|row| row.ids.iter().take(24).copied().collect()).collect();
    let format = BasePrecision::Int4.format(&base);
    let low = Quantized::on(&base, &QuantizeOptions::new(format))?.model().packed_in_memory()?;
    let mut all = 0;
    for layer in &base.shape().layers {
        all += base.expert_bytes_on_disk(layer.layer)?;
    }
    let bytes = (share * all as f64) as u64;
    let lowered = |threshold| Some(LowPrecision { model: low.clone(), threshold });
    let cases = [
        ("plain streaming", 0, EvictionPolicy::Lru, None, false, None),
        ("LRU", bytes, EvictionPolicy::Lru, None, false, None),
        ("priority", bytes, EvictionPolicy::priority(), None, false, None),
        ("distance", bytes, EvictionPolicy::Distance, None, false, None),
        ("priority, ahead", bytes, EvictionPolicy::priority(), None, true, None),
        ("LRU, two precisions", bytes, EvictionPolicy::Lru, lowered(0.6), false, None),
        ("priority, two precisions", bytes, EvictionPolicy::priority(), lowered(0.6), false, None),
        ("priority, two precisions, ahead", bytes, EvictionPolicy::priority(), lowered(0.6), true, None),
        ("priority, three levels, ahead", bytes, EvictionPolicy::priority(), lowered(0.6), true, Some(0.9)),
        ("everything stays", all, EvictionPolicy::Lru, None, false, None),
    ];
    let header =
        ["cache", "hit rate", "read high", "read low", "skipped", "ahead (used)", "MB read", "tokens/s", "same tokens"];
    let mut table = Table::new(header, 1);
    let mut expected: Option<Vec<Vec<u32>>> = None;
    for (name, bytes, policy, low, prefetch, skip) in cases {
        let options = ExpertCacheOptions { bytes, policy, low, prefetch, skip };
        let model = Model::new(base.clone(), &device, None)?.with_expert_cache(options)?;
        let start = Instant::now();
        let how = GenerateOptions { max_new_tokens: TOKENS, ..GenerateOptions::default() };
        let mut found = Vec::new();
        // One sequence at a time, as a device with too little memory has it.
        for prompt in &prompts {
            found.extend(generate(&model, std::slice::from_ref(prompt), &how, |_| false)?);
        }
        let seconds = start.elapsed().as_secs_f64();
        let count: usize = found.iter().map(Vec::len).sum();
        let statistics = model.expert_cache_statistics().unwrap_or_default();
        let expected = expected.get_or_insert_with(|| found.clone());
        let same = found.iter().flatten().zip(expected.iter().flatten()).filter(|(a, b)| a == b).count();
        table.row([
            name.to_string(),
            format!("{:.3}", statistics.hit_rate()),
            statistics.misses[0].to_string(),
            statistics.misses[1].to_string(),
            statistics.skipped.to_string(),
            format!("{} ({})", statistics.prefetched, statistics.prefetched_used),
            format!("{:.1}", statistics.bytes_read as f64 / 1e6),
            format!("{:.1}", count as f64 / seconds),
            format!("{:.3}", same as f64 / count.max(1) as f64),
        ]);
    }
    println!("{}", table.to_text());
    println!("{PROMPTS} prompts, one after the other; {bytes} of {all} bytes of routed experts in memory");
    Ok(())
}

//! Adapters whose values follow from their addresses alone, in the weights and as files.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, Dtype, MatrixId, WriteOptions, write};
use moe_peft::lora::{LoraWeights, LowRank, Maps, Naming};
use moe_peft::merge::Merged;
use moe_peft::peft_files;

use crate::{Error, Result};

/// Name of the directory of the files of an adapter.
pub const FILES: &str = "adapter";
/// Name of the model with that adapter in its weights, in the same directory.
pub const FOLDED: &str = "folded";
const RANK: usize = 2;
const ALPHA: f64 = 4.0;
/// Hash of the files of an adapter, beside them.
pub const DIGEST: &str = "digest";

/// Numbers of at most `bound`, the same on every machine.
fn numbers(count: usize, seed: usize, bound: f32) -> Vec<f32> {
    let number = |i: usize| ((i * 7919 + seed * 104_729 + 31) % 1009) as f32 / 504.0 - 1.0;
    (0..count).map(|i| bound * number(i)).collect()
}

/// An addition of rank 2 to every linear map of the decoder layers: attention, routers, shared, dense and routed
/// experts.
pub fn everywhere(from: &Checkpoint) -> LoraWeights {
    on(from, |_| true)
}

/// The same on attention and routed experts alone, which files of PEFT can address in most families. Modules of
/// attention that are called as PEFT calls matrices of routed experts (the gate of `afmoe`) are left out.
pub fn on_attention_and_experts(from: &Checkpoint) -> LoraWeights {
    let maps = Maps::new(from);
    on(from, |map| match map {
        MatrixId::Expert { .. } => true,
        map => {
            let path = maps.path(*map, Naming::Fused);
            let taken = ["gate_proj", "up_proj", "down_proj"].iter().any(|name| path.ends_with(name));
            !taken && map.site().is_some_and(|(site, _)| site.is_attention())
        }
    })
}

fn on(from: &Checkpoint, chosen: impl Fn(&MatrixId) -> bool) -> LoraWeights {
    let maps = Maps::new(from);
    let low = |(seed, map): (usize, &MatrixId)| {
        let [out, inputs] = maps.dims(*map)?;
        let a = numbers(RANK * inputs, 2 * seed, (inputs as f32).powf(-0.5));
        Some((*map, LowRank::new(a, numbers(out * RANK, 2 * seed + 1, 0.1), RANK, ALPHA)))
    };
    let chosen = maps.all().iter().enumerate().filter(|(_, map)| chosen(map));
    LoraWeights { maps: chosen.filter_map(low).collect(), ..LoraWeights::default() }
}

/// Whether the weights hold sums as they are, so that a model with an adapter beside it is the one that has it in its
/// weights: those of F32 do.
pub fn is_exact(from: &Checkpoint) -> bool {
    from.tensors().all(|info| info.dtype == Dtype::F32)
}

/// Writes a model with an adapter in its weights.
///
/// # Errors
/// Whatever stops it.
pub fn fold(from: &Arc<Checkpoint>, adapter: &LoraWeights, to: &Path) -> Result<()> {
    let merged = Merged::on(from, &[("adapter", adapter, 1.0)])?;
    write(merged.model(), to, &WriteOptions::default())?;
    Ok(())
}

/// Writes the adapter of attention and experts as PEFT does, with a hash of its files beside them; `base` is what the
/// model is called.
///
/// # Errors
/// Whatever stops it.
pub fn files(from: &Checkpoint, base: &str, to: &Path) -> Result<()> {
    let options = peft_files::WriteOptions { base_model: Some(base.into()), ..Default::default() };
    peft_files::write(to, &on_attention_and_experts(from), &Maps::new(from), &options)?;
    let mut hasher = blake3::Hasher::new();
    for name in [peft_files::CONFIG_FILE, peft_files::MODEL_FILE] {
        let path = to.join(name);
        hasher.update(&fs::read(&path).map_err(Error::io(&path))?);
    }
    let digest = to.join(DIGEST);
    fs::write(&digest, hasher.finalize().to_hex().as_str()).map_err(Error::io(&digest))
}

//! A pruner of your own: `cargo run --release --example own_pruner`.
//!
//! This one drops the lowest units of every expert, more of them in deeper layers. The example scores the bundled model
//! by magnitude, which needs no data, and prints the plan. `plan.save(...)` keeps it for the program `moe`.

use moe::checkpoint::{Checkpoint, Granularity, Pool, ProtectionMask, Provenance, Statistics};
use moe::importance::{Scorer, scorers::Magnitude};
use moe::prune::{Allocation, Budget, LayerKept, ModelProbe, Needs, PrunePlan, PruneRequest, Pruner, Result};
use serde_json::{Value, json};

/// Layer `l` of `n` loses `2 (l + 1) / (n + 1)` times the ratio: on average the ratio.
struct Deeper;

impl Pruner for Deeper {
    fn recipe(&self) -> Value {
        json!({ "type": "deeper" })
    }

    fn needs(&self) -> Needs {
        // Units are compared with units of the same expert, and no model is asked.
        Needs::new(Granularity::Unit, Pool::Expert)
    }

    fn allocate_with(&self, request: &PruneRequest<'_>, _: &mut dyn ModelProbe) -> Result<Allocation> {
        let layers = request.shape.layers.len() as f64;
        let ratio = request.budget.ratio(request.shape)?;
        let kept = request.scores.layers.iter().enumerate().map(|(l, layer)| {
            let lost = (ratio * 2.0 * (l + 1) as f64 / (layers + 1.0)).min(1.0);
            let best = |scores: &Vec<f32>| {
                let mut order: Vec<u32> = (0..scores.len() as u32).collect();
                order.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
                order.truncate(scores.len() - (scores.len() as f64 * lost) as usize);
                order.sort_unstable();
                order
            };
            LayerKept::of_units(layer.layer, layer.scores.iter().map(best).collect())
        });
        // Counts what goes, and refuses a plan that drops what is protected.
        request.allocation(self.recipe(), kept.collect())
    }
}

/// The plan for the model in this directory.
pub fn run(model: &str) -> std::result::Result<PrunePlan, Box<dyn std::error::Error>> {
    let checkpoint = Checkpoint::open(model)?;
    let nothing = Statistics::new(checkpoint.shape(), Provenance::new(checkpoint.fingerprint(), "", "{}"));
    let scores = Magnitude::new().score(&nothing, &checkpoint)?;
    Ok(Deeper.prune(&scores, checkpoint.shape(), Budget::Ratio(0.25), &ProtectionMask::none())?.plan)
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let plan = run(moe_examples::TINY_MOE)?;
    for layer in &plan.kept {
        println!("layer {}: {:?} units left", layer.layer, layer.experts.iter().map(Vec::len).collect::<Vec<_>>());
    }
    println!("{:.2}% of the units go, by {}", 100.0 * plan.ratio.achieved, plan.recipe["pruner"]);
    Ok(())
}

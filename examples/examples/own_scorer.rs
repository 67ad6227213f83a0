//! A scorer of your own: `cargo run --release --example own_scorer`.
//!
//! This one asks how often an expert is chosen and how much it then says: the geometric mean of both. The example
//! collects what it needs on rows of the bundled model and prints which experts a pruner takes out.

use moe::checkpoint::{Denominator, Pool, Statistics};
use moe::importance::scorers::{check_needs, table};
use moe::importance::statistics::{OUTPUT_NORM, ROUTED_TOKENS};
use moe::importance::{ExpertWeightsSource, Needs};
use moe::prelude::*;
use serde_json::{Value, json};

/// `sqrt(n * sum |f|)`: `n` tokens chose the expert, `f` are its outputs on them.
struct OftenAndLoud;

impl Scorer for OftenAndLoud {
    fn name(&self) -> &str {
        "often_and_loud"
    }

    fn recipe(&self) -> Value {
        json!({ "type": self.name() })
    }

    fn needs(&self) -> Needs {
        // Norms of outputs grow with depth: comparable within a layer.
        Needs::experts([ROUTED_TOKENS, OUTPUT_NORM]).within(Pool::Layer)
    }

    fn score(&self, statistics: &Statistics, _: &dyn ExpertWeightsSource) -> moe::importance::Result<ScoreTable> {
        check_needs(self, statistics)?;
        table(self, statistics, Denominator::None, |layer, expert, _| {
            let [often, loud] = [ROUTED_TOKENS, OUTPUT_NORM].map(|id| statistics.expert(id.as_str(), layer));
            Ok(vec![(often?[expert] * loud?[expert]).sqrt()])
        })
    }
}

/// The plan for the model in this directory.
pub fn run(model: &str) -> Result<PrunePlan, Box<dyn std::error::Error>> {
    let model = Model::open(model, &device("flex")?, None)?;
    let checkpoint = model.checkpoint();
    let data = rows(&model, checkpoint.dir().join("data/prose_calibration.jsonl"), 16)?;
    let scores = score(&model, &data, &OftenAndLoud)?;
    let pruner = ExpertPruner::new().for_routing(&checkpoint.config().routing);
    Ok(pruner.prune(&scores, checkpoint.shape(), Budget::Ratio(0.25), &ProtectionMask::none())?.plan)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let plan = run(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-moe"))?;
    for layer in &plan.kept {
        println!("layer {}: experts {:?} go", layer.layer, layer.removed);
    }
    println!("{:.2}% of the units go, by {}", 100.0 * plan.ratio.achieved, plan.recipe["scorer"]);
    Ok(())
}

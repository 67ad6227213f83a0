//! Exports every checkpoint under a directory in every way a stock loader reads, scored by weight magnitude: what
//! `xtask/scripts/roundtrip.py` then loads.
//!
//! ```text
//! cargo run --release -p moe-prune --example export_all -- crates/moe-checkpoint/tests/fixtures/parity/tf5 out/roundtrip
//! ```

use std::error::Error;
use std::fs;
use std::path::Path;

use moe_checkpoint::{Checkpoint, Denominator, Granularity, LayerScores, Pool, Provenance, Reduction, ScoreTable};
use moe_prune::{ApplyOptions, Budget, ExpertPruner, Export, Mtp, ProtectionMask, Pruner, Scope, UnitPruner};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [from, to] = &arguments[..] else { return Err("expected: DIRECTORY_OF_CHECKPOINTS OUT".into()) };
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name().into_string().map_err(|_| "a name that is not UTF-8")?;
        let checkpoint = Checkpoint::open(entry.path())?;
        let scores = magnitude(&checkpoint)?;
        let (shape, none) = (checkpoint.shape(), ProtectionMask::none());
        let units = UnitPruner::new(Scope::Expert).prune(&scores, shape, Budget::Ratio(0.5), &none)?.plan;
        let groups = checkpoint.config().routing.groups().map_or(1, |groups| groups.count);
        let experts = ExpertPruner::new().groups(groups);
        let experts = experts.prune(&scores.to_experts(Reduction::Sum)?, shape, Budget::Ratio(0.25), &none)?.plan;
        for (kind, plan, mode) in [
            ("uniform", &units, Export::Uniform),
            ("masked", &units, Export::Masked),
            ("experts", &experts, Export::Uniform),
        ] {
            let options = ApplyOptions { mtp: Some(Mtp::Drop), force: true, ..ApplyOptions::new(mode) };
            plan.apply(&checkpoint, &Path::new(to).join(&name).join(kind), &options)?;
        }
        println!(
            "{name}: {} of {} units, {} experts removed per layer",
            units.units_kept(),
            shape.units(),
            experts.kept[0].removed.len()
        );
    }
    Ok(())
}

/// Squared norm of every unit's gate row, up row and down column.
fn magnitude(checkpoint: &Checkpoint) -> Result<ScoreTable, Box<dyn Error>> {
    let mut layers = Vec::new();
    for layer in &checkpoint.shape().layers {
        let mut scores = Vec::new();
        for expert in 0..layer.num_experts() {
            let weights = checkpoint.expert(layer.layer, expert)?;
            let row = |matrix: &[f32], unit: usize| -> f32 {
                matrix[unit * weights.hidden..(unit + 1) * weights.hidden].iter().map(|value| value * value).sum()
            };
            let column = |unit: usize| -> f32 {
                weights.down.iter().skip(unit).step_by(weights.width).map(|value| value * value).sum()
            };
            let unit = |unit| row(&weights.gate, unit) + row(&weights.up, unit) + column(unit);
            scores.push((0..weights.width).map(unit).collect());
        }
        layers.push(LayerScores { layer: layer.layer, scores, routed: None });
    }
    Ok(ScoreTable {
        scorer: r#"{"type":"magnitude"}"#.into(),
        granularity: Granularity::Unit,
        pool: Pool::Global,
        denominator: Denominator::None,
        layers,
        provenance: Provenance::new(checkpoint.fingerprint(), "", "{}"),
    })
}

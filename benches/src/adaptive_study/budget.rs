//! Layers, experts and bits in one budget.

use moe_checkpoint::BasePrecision;
use moe_core::data::Dataset;
use moe_core::{Engine, EngineOptions, Model};
use moe_importance::scorers::Reap;
use moe_prune::{
    Candidate, EngineProbe, ExpertPruner, MixedPrecision, ProbeOptions, PrunerConfig, Sensitivities, best_allocation,
};

use super::{Draw, shown};
use crate::{Error, Result};

/// What competes for a budget of bytes before experts are rounded.
const CANDIDATES: [&str; 5] = [
    r#"{"type": "whole"}"#,
    r#"{"type": "pruned", "pruner": {"type": "expert"}, "ratio": 0.25}"#,
    r#"{"type": "pruned", "pruner": {"type": "expert"}, "ratio": 0.5}"#,
    r#"{"type": "layers", "choice": {"type": "influence", "layers": 1}}"#,
    r#"{"type": "layers", "choice": {"type": "influence", "layers": 2}}"#,
];

/// Layers, experts and bits in one budget: the divergence that each candidate is predicted to have within so many
/// bytes, in how many draws it is the best.
pub(super) fn table(named: &str, model: &Model, draws: &[Draw]) -> Result<String> {
    let formats = [BasePrecision::Int4, BasePrecision::Int8].map(|precision| precision.format(model.checkpoint()));
    let how = MixedPrecision::new(formats.into());
    // by draw and candidate
    let mut found: Vec<Vec<Sensitivities>> = Vec::new();
    let mut names = Vec::new();
    for draw in draws {
        let engine = Engine::new(model, EngineOptions::default());
        let probe = EngineProbe::new(&engine, draw.waves.clone(), ProbeOptions::default())?;
        let sequences = draw.waves.iter().flat_map(|wave| wave.sequences.clone()).collect();
        let scores = moe::jobs::score(model, &Dataset::from_sequences(sequences), &Reap::default())?;
        let mut of_draw = Vec::new();
        names.clear();
        for json in CANDIDATES {
            let mut candidate: Candidate =
                serde_json::from_str(json).map_err(|error| Error::Invalid(format!("{json}: {error}")))?;
            if let Candidate::Pruned { pruner, .. } = &mut candidate {
                *pruner = PrunerConfig::Expert(ExpertPruner::new().for_routing(&model.config().routing));
            }
            let made = candidate.on(model, Some(&scores), &draw.waves)?;
            let made = Model::new(made, model.device(), model.max_memory())?;
            of_draw.push(how.measure(&made, &probe, &mut |_, _| ())?);
            names.push(candidate.to_string());
        }
        found.push(of_draw);
    }
    let whole = model.checkpoint().bytes_on_disk();
    let mut table =
        format!("<!-- study:adaptive-{named}budget -->\n\n| share of the bytes | {} |\n", names.join(" | "));
    table += &format!("|--:|{}\n", "--:|".repeat(names.len()));
    for share in [0.3, 0.35, 0.4, 0.5, 0.6] {
        let bytes = (share * whole as f64) as u64;
        let cell = |candidate: usize| {
            let fits: Option<Vec<f64>> =
                found.iter().map(|of| of[candidate].allocate(bytes).ok().map(|found| found.predicted)).collect();
            let chosen = |of: &&Vec<Sensitivities>| best_allocation(of, bytes).is_some_and(|(i, _)| i == candidate);
            let best = found.iter().filter(chosen).count();
            match fits {
                Some(values) if best > 0 => format!("{}, best of {best}", shown(values.into_iter())),
                Some(values) => shown(values.into_iter()),
                None => "–".into(),
            }
        };
        let cells: Vec<String> = (0..names.len()).map(cell).collect();
        table += &format!("| {share} | {} |\n", cells.join(" | "));
    }
    Ok(table + &format!("\n<!-- /study:adaptive-{named}budget -->\n\n"))
}

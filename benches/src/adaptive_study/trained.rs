//! What trains beside a model, and what is steered by rows.

use std::collections::BTreeMap;
use std::path::Path;

use moe_core::data::Wave;
use moe_core::steering::RoutingProfile;
use moe_core::{Engine, EngineOptions, Model};
use moe_peft::fold::FoldPrecision;
use moe_peft::{Recipe, Trained, TrainingRun};
use serde_json::{Value, json};

use super::Draw;
use crate::{Error, Result};

/// Steps of a training.
const STEPS: usize = 100;
/// Share of tokens by which facts use an expert more often than all rows do.
const MORE: f64 = 0.1;

/// Trains on the draw's calibration rows, and keeps no files.
pub(super) fn train(model: &Model, draw: &Draw, recipe: &Recipe) -> Result<Trained> {
    let directory = tempfile::tempdir().map_err(Error::io(Path::new("a temporary directory")))?;
    let labels = BTreeMap::new();
    let run = TrainingRun {
        model,
        waves: &draw.waves,
        labels: &labels,
        directory: directory.path(),
        save_every: 1000,
        resume: false,
        fold: FoldPrecision::Bf16,
    };
    Ok(run.train(recipe, &mut |_| Ok(()))?)
}

/// The model as a method leaves it, trained at the rates of the bundled model.
pub(super) fn by(method: &str, model: &Model, draw: &Draw) -> Result<Model> {
    let mut recipe = moe_cli::finetune::named(method, true)?;
    recipe.train.max_steps = Some(STEPS);
    let missing = || Error::Invalid(format!("{method} leaves no model"));
    train(model, draw, &recipe)?.as_written(model, model.max_memory())?.ok_or_else(missing)
}

/// A rule that steers toward the experts of facts.
pub(super) fn steering(model: &Model, draw: &Draw, lambda: f64) -> Result<Value> {
    let profile = |waves: &[Wave]| -> Result<RoutingProfile> {
        let mut seen = RoutingProfile::new();
        let engine = Engine::new(model, EngineOptions::default());
        waves.iter().try_for_each(|wave| engine.run(wave, &mut seen).map(drop))?;
        Ok(seen)
    };
    let at = profile(&draw.facts)?.experts_beyond(&profile(&draw.waves)?, MORE)?;
    Ok(json!({ "routing": { "type": "intervene", "at": at, "mode": { "type": "soft", "lambda": lambda } } }))
}

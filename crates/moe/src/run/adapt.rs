//! The step that changes how a model is run.

use std::sync::Arc;

use moe_checkpoint::{Checkpoint, LayerDrop};
use moe_core::adaptive::RunTime;
use moe_core::depth::{DropRule, Influence, LayerInfluence};
use moe_core::{Engine, EngineOptions, Model};

use super::Run;
use super::artifacts::Artifacts;
use super::steps::{Done, json, load, save};
use crate::recipe::Adapt;
use crate::{Error, Result};

/// Checks what recipe and config show to be wrong; `model` is the one that the step is on, if that is known.
pub(super) fn check(step: &Adapt, model: Option<&Model>, has_rows: bool) -> Result<()> {
    if *step == Adapt::default() {
        return Err(Error::Usage("none of routing, layers and drop".into()));
    }
    if step.layers.is_some() && step.drop.is_some() {
        return Err(Error::Usage("layers and drop: one of them, since dropping numbers the layers anew".into()));
    }
    let routing = step.routing()?;
    let rows =
        routing.as_ref().is_some_and(|rule| rule.needs_rows()) || step.drop.as_ref().is_some_and(DropRule::needs_rows);
    if rows && !has_rows {
        return Err(Error::Usage("data.calibration names no file, on which thresholds or layers are measured".into()));
    }
    let Some(model) = model else { return Ok(()) };
    let count = model.config().layers.len();
    match &step.drop {
        Some(rule @ (DropRule::List { .. } | DropRule::Deepest { .. })) => {
            LayerDrop::new(rule.layers(count, None)?).on(model.checkpoint())?;
        }
        Some(DropRule::Influence { layers } | DropRule::Angular { layers }) if *layers >= count => {
            return Err(Error::Usage(format!("drop: {layers} layers of a model with {count}")));
        }
        _ => {}
    }
    let routing = routing.filter(|rule| !rule.needs_rows());
    RunTime { routing, layers: step.layers.clone() }.on(model)?;
    Ok(())
}

impl Run<'_> {
    /// Changes how the model is run.
    pub(super) fn adapt(&mut self, step: &Adapt) -> Result<Done> {
        let data = self.calibration.as_ref().map_or(String::new(), |data| data.data.hash.clone());
        let of = [json(step)?, self.identity(), data];
        let (dir, reused) = self.artifacts.begin("adapt", &of.each_ref().map(String::as_str))?;
        let (layers_file, run_time_file) = (dir.join("dropped.json"), dir.join("run_time.json"));
        if !reused {
            let model = self.engine_model()?;
            let count = model.config().layers.len();
            let dropped = match &step.drop {
                None => Vec::new(),
                Some(rule) => {
                    let seen = rule.needs_rows().then(|| self.influence(&model)).transpose()?;
                    if let Some(seen) = &seen {
                        save(&dir.join("influence.json"), seen)?;
                    }
                    rule.layers(count, seen.as_deref())?
                }
            };
            let under = match dropped.is_empty() {
                true => model,
                false => Model::new(LayerDrop::new(dropped.clone()).on(&self.model)?, &self.device, self.max_memory)?,
            };
            let run_time = RunTime { routing: step.routing()?, layers: step.layers.clone() };
            let run_time = match run_time.needs_rows() {
                true => run_time.calibrated(&under, &self.calibration()?.waves)?,
                false => run_time,
            };
            run_time.on(&under)?;
            save(&layers_file, &dropped)?;
            save(&run_time_file, &run_time)?;
            Artifacts::finish(&dir)?;
        }
        let dropped: Vec<usize> = load(&layers_file)?;
        let mut run_time: RunTime = load(&run_time_file)?;
        let mut what = Vec::new();
        if !dropped.is_empty() {
            if !self.run_time.is_plain() || self.beside.is_some() {
                return Err(Error::Usage("adapt: layers are dropped before anything stands beside the model".into()));
            }
            self.change(LayerDrop::new(dropped.clone()).on(&self.model)?);
            let listed: Vec<String> = dropped.iter().map(ToString::to_string).collect();
            what.push(format!("layers {} dropped", listed.join(", ")));
        }
        if let Some(routing) = run_time.routing.take_if(|_| self.beside.is_none()) {
            let model = Model::new(self.model.clone(), &self.device, self.max_memory)?;
            match routing.export(&model)? {
                Some(export) => {
                    self.change(export.on(&self.model)?);
                    what.push("routing in the model".into());
                }
                None => run_time.routing = Some(routing),
            }
        }
        if !run_time.is_plain() {
            what.push("run-time options beside the model".into());
            self.run_time = run_time.or(std::mem::take(&mut self.run_time));
        }
        Ok(Done { summary: what.join(", "), reused, artifact: Some(dir), measured: vec![] })
    }

    fn change(&mut self, model: Arc<Checkpoint>) {
        self.model = model;
        self.pruned = None;
    }

    /// What layers change on the rows of calibration.
    fn influence(&self, model: &Model) -> Result<Vec<LayerInfluence>> {
        let mut seen = Influence::new(model.config().layers.len());
        let engine = Engine::new(model, EngineOptions::default());
        for wave in &self.calibration()?.waves {
            engine.run(wave, &mut seen)?;
        }
        Ok(seen.layers()?)
    }
}

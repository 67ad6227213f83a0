//! The step that changes how a model is run.

use std::sync::Arc;

use moe_checkpoint::{Checkpoint, LayerDrop, StreamEdit};
use moe_core::Model;
use moe_core::adaptive::RunTime;

use super::Run;
use super::artifacts::Artifacts;
use super::steps::{Done, json, load, save};
use crate::recipe::{Adapt, Norms};
use crate::{Error, Result};

/// Checks what recipe and config show to be wrong; `model` is the one that the step is on, if that is known.
pub(super) fn check(step: &Adapt, model: Option<&Model>, has_rows: bool) -> Result<()> {
    if *step == Adapt::default() {
        return Err(Error::Usage("none of routing, layers and drop, and neither decoding nor norms".into()));
    }
    if step.layers.is_some() && step.drop.is_some() {
        return Err(Error::Usage("layers and drop: one of them, since dropping numbers the layers anew".into()));
    }
    let run_time = step.run_time()?;
    if step.needs_rows()? && !has_rows {
        let what = "on which thresholds, layers, routers or references are found";
        return Err(Error::Usage(format!("data.calibration names no file, {what}")));
    }
    let Some(model) = model else { return Ok(()) };
    let count = model.config().layers.len();
    if run_time.layers.as_ref().is_some_and(|layers| layers.needs_rows()) {
        model.check_separable("a rule that decides about layers")?;
    }
    if let Some(choice) = &step.drop {
        LayerDrop::check_model(model.checkpoint())?;
        if choice.needs_rows() {
            if choice.count() >= count {
                return Err(Error::Usage(format!("drop: {} layers of a model with {count}", choice.count())));
            }
        } else {
            LayerDrop::new(choice.layers(count, None)?).on(model.checkpoint())?;
        }
    }
    if step.norms == Some(Norms::Scale) {
        StreamEdit::ScaleNorms.on(model.checkpoint())?;
    }
    RunTime {
        routing: run_time.routing.filter(|rule| !rule.needs_rows()),
        layers: run_time.layers.filter(|layers| !layers.needs_rows()),
        ..run_time
    }
    .on(model)?;
    Ok(())
}

impl Run<'_> {
    /// Changes how the model is run.
    pub(super) fn adapt(&mut self, step: &Adapt) -> Result<Done> {
        let data = self.calibration.as_ref().map_or(String::new(), |data| data.data.hash.clone());
        let of = [json(step)?, self.identity(), data];
        let (dir, reused) = self.artifacts.begin("adapt", &of.each_ref().map(String::as_str))?;
        let layers_file = dir.join("dropped.json");
        if !reused {
            let model = self.engine_model()?;
            let count = model.config().layers.len();
            let dropped = match &step.drop {
                None => Vec::new(),
                Some(choice) => {
                    let seen = match choice.needs_rows() {
                        true => choice.measure(&model, &self.calibration()?.waves)?,
                        false => None,
                    };
                    if let Some(seen) = &seen {
                        save(&dir.join("influence.json"), seen)?;
                    }
                    choice.layers(count, seen.as_deref())?
                }
            };
            let under = match dropped.is_empty() {
                true => model,
                false => self.model_of(LayerDrop::new(dropped.clone()).on(&self.model)?)?,
            };
            let run_time = step.run_time()?;
            let run_time = match run_time.needs_rows() {
                true => run_time.calibrated(&under, &self.calibration()?.waves)?,
                false => run_time.calibrated(&under, &[])?,
            };
            run_time.on(&under)?;
            save(&layers_file, &dropped)?;
            run_time.save_beside(&dir)?;
            Artifacts::finish(&dir)?;
        }
        let dropped: Vec<usize> = load(&layers_file)?;
        let mut run_time = RunTime::beside(&dir)?;
        let mut what = Vec::new();
        if !dropped.is_empty() {
            if !self.run_time.is_plain() || self.beside.is_some() {
                return Err(Error::Usage("adapt: layers are dropped before anything stands beside the model".into()));
            }
            self.change(LayerDrop::new(dropped.clone()).on(&self.model)?);
            let listed: Vec<String> = dropped.iter().map(ToString::to_string).collect();
            what.push(format!("layers {} dropped", listed.join(", ")));
        }
        if step.norms == Some(Norms::Scale) {
            self.change(StreamEdit::ScaleNorms.on(&self.model)?);
            what.push("norms scaled by depth".into());
        }
        if let Some(routing) = run_time.routing.take_if(|_| self.beside.is_none()) {
            let model = self.model_of(self.model.clone())?;
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
        Ok(Done { summary: what.join(", "), reused, artifact: Some(dir), ..Done::default() })
    }

    fn change(&mut self, model: Arc<Checkpoint>) {
        self.model = model;
        self.pruned = None;
    }
}

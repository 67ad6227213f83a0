//! The step that merges experts.

use std::path::PathBuf;
use std::sync::Arc;

use moe_checkpoint::Checkpoint;
use moe_merge::{CompactModel, Compression};

use super::Run;
use super::artifacts::Artifacts;
use super::steps::{Done, json, save};
use crate::jobs::{Merging, train_parts};
use crate::recipe::Merge;
use crate::{Error, Result};

impl Run<'_> {
    /// Merges experts.
    pub(super) fn merge(&mut self, step: &Merge) -> Result<Done> {
        let base = self.model.clone();
        let recipe = step.recipe()?;
        let calibration = self.calibration()?;
        let model = self.engine_model()?;
        let merging = Merging {
            model: &model,
            waves: &calibration.waves,
            recipe: &recipe,
            protect: &self.protect,
            form: step.form,
            mtp: step.mtp,
            sample: step.sample,
            at_once: false,
            absorb: &[],
            group: self.options.group,
        };
        let of = [json(step)?, base.fingerprint(), calibration.data.hash.clone(), json(&self.protect)?];
        let (dir, reused) = self.artifacts.begin("merge", &of.each_ref().map(String::as_str))?;
        // Evidence is an artifact of its own, which any recipe, budget and form reads.
        let (evidence, _) = match merging.layer_by_layer() {
            true => (dir.clone(), true),
            false => {
                let digest = merging.evidence_options().digest(&model, &calibration.waves);
                self.artifacts.begin("evidence", &[&digest])?
            }
        };
        let others = self.artifacts.of_others(&evidence, self.options.absorb, self.options.progress);
        let merging = Merging { absorb: &others, ..merging };
        if let Some(shard) = self.options.shard.filter(|_| !reused) {
            merging.share(&evidence, shard, self.options.progress)?;
            return Ok(Done::share(shard, "the evidence", evidence));
        }
        let (to, progress) = (dir.join("merged"), self.options.progress);
        merging.collect(&evidence, &to, progress)?;
        // The first merges, and the others find what it has merged.
        let merged = match self.options.group.rank() {
            0 => Some(merging.merge(&evidence, &to, progress)?),
            _ => None,
        };
        self.options.group.check(None)?;
        let merged = match merged {
            Some(merged) => merged,
            None => merging.merge(&evidence, &to, progress)?,
        };
        if !reused {
            self.on_first(|_| {
                merged.weights.plan().save(dir.join("plan.json"))?;
                Artifacts::finish(&dir)
            })?;
        }
        let mut summary = format!("experts merged by `{}`, form {}", recipe.name, step.form);
        self.model = merged.model.model().clone();
        if step.training.is_some() || recipe.compression.is_some() {
            let compact = CompactModel::open(self.compacted(step, recipe.compression.as_ref(), &base)?)?;
            let trained = if step.training.is_some() { ", trained" } else { "" };
            summary += &format!(", then compressed to rank {} and rows{trained}", compact.compression().rank);
            self.model = compact.on(&self.model, None)?.model().clone();
        }
        self.pruned = None;
        Ok(Done { summary, reused, artifact: Some(dir), ..Done::default() })
    }

    /// The experts of the merged model as low-rank and sparse parts, in closed form or trained towards the model
    /// before.
    fn compacted(&self, step: &Merge, compression: Option<&Compression>, before: &Arc<Checkpoint>) -> Result<PathBuf> {
        let calibration = self.calibration()?;
        let of = [json(&step.training)?, json(&compression)?, self.model.fingerprint(), calibration.data.hash.clone()];
        let (dir, reused) = self.artifacts.begin("compact", &of.each_ref().map(String::as_str))?;
        let to = dir.join("compact");
        if !reused {
            match (&step.training, compression) {
                (Some(training), _) => {
                    let teacher = self.model_of(before.clone())?;
                    let student = self.engine_model()?;
                    let (waves, progress) = (&calibration.waves, self.options.progress);
                    let trained = train_parts(training, &teacher, &student, waves, &to, progress)?;
                    save(&dir.join("training.json"), &trained)?;
                }
                (None, Some(compression)) => drop(compression.compress(&self.model, &to, None, true)?),
                (None, None) => return Err(Error::Usage("merge: nothing says how experts are compressed".into())),
            }
            Artifacts::finish(&dir)?;
        }
        Ok(to)
    }
}

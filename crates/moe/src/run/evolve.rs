//! The step that searches for experts by running the model.

use moe_merge::ExpertMap;

use super::Run;
use super::artifacts::Artifacts;
use super::steps::{Done, json, load, save};
use crate::Result;
use crate::progress::Unit;
use crate::recipe::Evolve;

impl Run<'_> {
    /// Prunes and merges experts by what the model says.
    pub(super) fn evolve(&mut self, step: &Evolve) -> Result<Done> {
        let search = step.search(self.recipe.seed);
        let calibration = self.calibration()?;
        let waves = format!("{:?}", self.recipe.data.wave_tokens);
        let of = [json(&search)?, json(step)?, self.identity(), calibration.data.hash.clone(), waves];
        let (dir, reused) = self.artifacts.begin("evolve", &of.each_ref().map(String::as_str))?;
        let (file, course) = (dir.join("map.json"), dir.join("best.json"));
        if !reused {
            let model = self.engine_model()?;
            let bar = self.options.progress.bar("evolving", 0, Unit::Count("models"));
            let mut tell = |done: usize, of: usize| {
                bar.total(of as u64);
                bar.at(done as u64);
            };
            let found = search.search(&model, &calibration.waves, step.mtp, &mut tell)?;
            found.map.save(&file)?;
            save(&course, &found.best)?;
            Artifacts::finish(&dir)?;
        }
        let best: Vec<f64> = load(&course)?;
        let before: usize = self.model.shape().layers.iter().map(|layer| layer.num_experts()).sum();
        self.model = ExpertMap::load(&file)?.on(&self.model, step.mtp)?;
        self.pruned = None;
        let after: usize = self.model.shape().layers.iter().map(|layer| layer.num_experts()).sum();
        let at = |generation: usize| best.get(generation).copied().unwrap_or(f64::NAN);
        let what = match search.fitness {
            moe_merge::Fitness::Loss => "loss",
            moe_merge::Fitness::Divergence => "divergence",
        };
        let summary = format!(
            "{before} experts to {after}: {what} {:.4} nats at random, {:.4} of the best sets, {:.4} with the others merged in",
            at(0),
            at(search.pruning),
            at(search.pruning + search.merging)
        );
        Ok(Done { summary, reused, artifact: Some(dir), ..Done::default() })
    }
}

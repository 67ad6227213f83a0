//! A run by several processes: what they do together, and what the first does for all.

use moe_checkpoint::write_atomic;

use super::Run;
use super::steps::Done;
use crate::recipe::Step;
use crate::{Error, Result};

impl Run<'_> {
    /// Makes the output directory and leaves the recipe there.
    pub(super) fn begin(&mut self) -> Result<()> {
        let (recipe, options) = (self.recipe, self.options);
        let json = serde_json::to_vec_pretty(recipe).map_err(|error| Error::Invalid(format!("the recipe: {error}")))?;
        options.group.same("recipe", &blake3::hash(&json).to_hex())?;
        options.group.same("model", &self.model.fingerprint())?;
        options.group.same("data", self.calibration.as_ref().map_or("", |data| &data.data.hash))?;
        // All have looked at what is there before anything is made.
        if options.group.rank() == 0 {
            self.artifacts.open(options.resume)?;
        }
        self.on_first(|_| Ok(write_atomic(recipe.out.join("recipe.json"), &json)?))?;
        match recipe.out.join("recipe.json").exists() {
            true => Ok(options.group.check(None)?),
            false => {
                let expected = "found nothing of the first process, expected a directory that all processes see";
                Err(Error::Invalid(format!("{}: {expected}", recipe.out.display())))
            }
        }
    }

    /// Does something on the first rank, and waits for it on the others.
    pub(super) fn on_first(&self, work: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let group = self.options.group;
        group.agree(match group.rank() {
            0 => work(self),
            _ => Ok(()),
        })
    }

    /// Takes a step. What cannot be shared out is done by the first rank; the others wait, and then go through the step
    /// themselves, where they find its artifact.
    pub(super) fn take_together(&mut self, step: &Step) -> Result<Done> {
        let group = self.options.group;
        if group.size() == 1 || self.is_shared(step)? {
            return self.take(step);
        }
        if !matches!(step, Step::Protect(_) | Step::Write(_)) {
            self.options.progress.say(&format!("{}: the first process does it, the others wait", step.name()));
        }
        let done = match group.rank() {
            0 => Some(group.agree(self.take(step))?),
            _ => {
                group.agree(Ok::<(), Error>(()))?;
                None
            }
        };
        let done = match (done, step) {
            (Some(done), _) => done,
            // A model is written once.
            (None, Step::Write(_)) => Done::default(),
            (None, _) => self.take(step)?,
        };
        group.same("model after the step", &self.identity())?;
        Ok(done)
    }

    /// Whether all ranks work on a step.
    fn is_shared(&self, step: &Step) -> Result<bool> {
        Ok(match step {
            Step::Score(_) | Step::Sparsify(_) | Step::Decompose(_) | Step::Quantize(_) | Step::Repair(_) => true,
            Step::Merge(step) => step.training.is_none(),
            Step::Tune(step) => {
                let recipe = step.recipe(self.recipe.seed)?;
                recipe.check_shareable(self.options.group.size()).is_ok()
            }
            Step::Evaluate(_) => self.run_time.decoding.is_none(),
            Step::Protect(_)
            | Step::Prune(_)
            | Step::Evolve(_)
            | Step::Adapt(_)
            | Step::Frontier(_)
            | Step::Write(_) => false,
        })
    }

    fn take(&mut self, step: &Step) -> Result<Done> {
        match step {
            Step::Score(step) => self.score(step),
            Step::Protect(step) => self.protect(step),
            Step::Prune(step) => self.prune(step),
            Step::Merge(step) => self.merge(step),
            Step::Repair(step) => self.repair(step),
            Step::Tune(step) => self.tune(step),
            Step::Quantize(step) => self.quantize(step),
            Step::Sparsify(step) => self.sparsify(step),
            Step::Evolve(step) => self.evolve(step),
            Step::Decompose(step) => self.decompose(step),
            Step::Adapt(step) => self.adapt(step),
            Step::Frontier(step) => self.frontier(step),
            Step::Evaluate(step) => self.evaluate(step),
            Step::Write(step) => self.write(step),
        }
    }
}

//! Figures of evaluations, and the parameters that were best.

use moe_checkpoint::group::Group;
use serde::{Deserialize, Serialize};

use super::parameters::Snapshot;
use super::state::{Bits, StateDir};
use super::{Keep, Parameters, TrainingTask};
use crate::error::{Error, Result};

/// Parameters that were best, by [`TrainingTask::evaluate`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Steps taken before; 0 if nothing was better than the start.
    pub step: usize,
    /// The figure.
    pub value: f64,
}

/// Figures so far, as they are saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Figures {
    pub before: Option<Bits>,
    pub last: Option<Bits>,
    /// Step and figure of the best.
    pub best: Option<(usize, Bits)>,
    /// Evaluations since the best.
    pub since: usize,
    /// Whether parameters have come or gone since the best.
    stale: bool,
}

/// Evaluates, and keeps the best parameters in memory or in a file.
pub(super) struct Keeper {
    pub figures: Figures,
    keep: Keep,
    /// [`Parameters::generation`] that the best one belongs to.
    generation: u64,
    snapshot: Option<Snapshot>,
}

impl Keeper {
    pub fn new(keep: Keep, figures: Figures, parameters: &Parameters) -> Self {
        Self { figures, keep, generation: parameters.generation(), snapshot: None }
    }

    /// Looks whether parameters have come or gone.
    pub fn compare(&mut self, parameters: &Parameters) {
        self.figures.stale |= self.generation != parameters.generation();
    }

    /// Evaluates after `step` steps; the figure and whether it is the best so far. When parameters have come or gone,
    /// what was best before cannot be had any more, and this one is the best.
    pub fn evaluate(
        &mut self,
        group: &dyn Group,
        task: &mut dyn TrainingTask,
        parameters: &mut Parameters,
        step: usize,
        directory: Option<&StateDir>,
    ) -> Result<(f64, bool)> {
        let value = task.evaluate_in(group, parameters)?;
        if !value.is_finite() {
            return Err(Error::input(format!("evaluation after step {step}"), value, "a finite number"));
        }
        parameters.check_returned()?;
        self.compare(parameters);
        let figures = &mut self.figures;
        figures.before.get_or_insert(Bits(value));
        figures.last = Some(Bits(value));
        let best = figures.stale || figures.best.is_none_or(|(_, best)| value < best.0);
        if best {
            (figures.best, figures.since) = (Some((step, Bits(value))), 0);
            (figures.stale, self.generation) = (false, parameters.generation());
            if self.keep == Keep::Best {
                match directory {
                    Some(directory) => directory.write_best(step, parameters)?,
                    None => self.snapshot = Some(parameters.snapshot()),
                }
            }
        } else {
            figures.since += 1;
        }
        Ok((value, best))
    }

    /// Gives the parameters the values to be left with, and tells whether they changed.
    pub fn restore(&mut self, parameters: &mut Parameters, step: usize, directory: Option<&StateDir>) -> Result<bool> {
        self.compare(parameters);
        let usable = self.keep == Keep::Best && !self.figures.stale;
        let Some((best, _)) = self.figures.best.filter(|(best, _)| usable && *best != step) else { return Ok(false) };
        match (self.snapshot.take(), directory) {
            (Some(snapshot), _) => parameters.restore(snapshot),
            (None, Some(directory)) => parameters.restore(directory.read_best(best)?),
            (None, None) => return Ok(false),
        }
        Ok(true)
    }

    pub fn best(&self) -> Option<Best> {
        self.figures.best.map(|(step, value)| Best { step, value: value.0 })
    }

    /// The step whose parameters the state has to keep in a file.
    pub fn kept_step(&self) -> Option<usize> {
        self.figures.best.filter(|_| self.keep == Keep::Best && !self.figures.stale).map(|(step, _)| step)
    }
}

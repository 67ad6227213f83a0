//! What happens in training.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Why training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// All steps were taken.
    Finished,
    /// The figure had not improved for as many evaluations as the patience says.
    Patience,
}

/// What happened in training, for progress bars and logs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum TrainEvent {
    /// A step was taken.
    Step {
        /// Number of the step, from 1.
        step: usize,
        /// Steps in all.
        steps: usize,
        /// Mean loss per predicted token of its waves, before it was taken.
        loss: f64,
        /// Norm of the gradient of that mean, before clipping.
        gradient_norm: f64,
        /// Learning rate.
        learning_rate: f64,
        /// Mean losses per wave that stood beside it, coefficients included, by name. They are not part of `loss`.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        auxiliary: BTreeMap<String, f64>,
        /// Tokens predicted so far.
        tokens: u64,
        /// Tokens run so far: those that are only read, such as prompts, included.
        tokens_run: u64,
        /// Predicted tokens per second of this process, evaluations and saving included.
        tokens_per_second: f64,
        /// Largest resident memory of this process so far, in bytes; 0 where the system does not tell.
        peak_memory: u64,
        /// Time of training so far, that of earlier processes included.
        seconds: f64,
        /// Time to the end, at the speed of this process.
        eta_seconds: f64,
    },
    /// The task was evaluated.
    Evaluation {
        /// Steps taken before it.
        step: usize,
        /// The figure.
        value: f64,
        /// Whether it is the lowest so far.
        best: bool,
    },
    /// The state was saved.
    Saved {
        /// Steps taken before it.
        step: usize,
    },
    /// Training ended.
    Stopped {
        /// Steps taken before it.
        step: usize,
        /// Reason for the end.
        stop: Stop,
    },
}

/// Told what happens. A resumed run first tells again what its state knows to have happened, so that a log begun anew
/// ([`JsonLines::create`]) is complete, and has every step once.
pub type OnEvent<'a> = &'a mut dyn FnMut(&TrainEvent) -> Result<()>;

/// Writes events as lines of JSON.
#[derive(Debug)]
pub struct JsonLines<W>(pub W);

impl JsonLines<BufWriter<File>> {
    /// Begins a file anew. That is right for a resumed run as well: it tells again what happened before, and what an
    /// interrupted process wrote after its last saved state did not happen.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be created.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Ok(Self(BufWriter::new(File::create(path).map_err(Error::io(path))?)))
    }
}

impl<W: Write> JsonLines<W> {
    /// Writes one line.
    ///
    /// # Errors
    /// [`Error::Observer`] if it cannot be written.
    pub fn write(&mut self, event: &TrainEvent) -> Result<()> {
        let line = serde_json::to_string(event).map_err(Error::observer)?;
        writeln!(self.0, "{line}").and_then(|()| self.0.flush()).map_err(Error::observer)
    }
}

/// Numbers of an event in a saved state, without its auxiliary losses.
pub(super) const ROW: usize = 12;

/// The auxiliary losses of some events.
pub(super) fn auxiliary_names(events: &[TrainEvent]) -> Vec<String> {
    let mut names = BTreeSet::new();
    for event in events {
        if let TrainEvent::Step { auxiliary, .. } = event {
            names.extend(auxiliary.keys().cloned());
        }
    }
    names.into_iter().collect()
}

impl TrainEvent {
    /// The event as numbers, which come back bit by bit, as decimal digits need not: [`ROW`] of them, and one for each
    /// of `names`, NaN for a loss that it has not.
    pub(super) fn to_row(&self, names: &[String]) -> Vec<f64> {
        let mut row = vec![0.0; ROW];
        let mut fill = |numbers: &[f64]| row[..numbers.len()].copy_from_slice(numbers);
        match *self {
            Self::Step {
                step,
                steps,
                loss,
                gradient_norm,
                learning_rate,
                tokens,
                tokens_run,
                tokens_per_second,
                peak_memory,
                seconds,
                eta_seconds,
                ..
            } => fill(&[
                0.0,
                step as f64,
                steps as f64,
                loss,
                gradient_norm,
                learning_rate,
                tokens as f64,
                tokens_run as f64,
                tokens_per_second,
                peak_memory as f64,
                seconds,
                eta_seconds,
            ]),
            Self::Evaluation { step, value, best } => fill(&[1.0, step as f64, value, f64::from(u8::from(best))]),
            Self::Saved { step } => fill(&[2.0, step as f64]),
            Self::Stopped { step, stop } => fill(&[3.0, step as f64, f64::from(u8::from(stop == Stop::Patience))]),
        }
        row.extend(names.iter().map(|name| match self {
            Self::Step { auxiliary, .. } => auxiliary.get(name).copied().unwrap_or(f64::NAN),
            _ => f64::NAN,
        }));
        row
    }

    /// The event of a row; `None` for a kind that there is not.
    pub(super) fn from_row(row: &[f64], names: &[String]) -> Option<Self> {
        let (numbers, losses) = row.split_at_checked(ROW)?;
        let &[kind, a, b, c, d, e, f, g, h, i, j, k] = numbers else { return None };
        let step = a as usize;
        Some(match kind as u8 {
            0 => Self::Step {
                step,
                steps: b as usize,
                loss: c,
                gradient_norm: d,
                learning_rate: e,
                auxiliary: names
                    .iter()
                    .cloned()
                    .zip(losses.iter().copied())
                    .filter(|(_, loss)| !loss.is_nan())
                    .collect(),
                tokens: f as u64,
                tokens_run: g as u64,
                tokens_per_second: h,
                peak_memory: i as u64,
                seconds: j,
                eta_seconds: k,
            },
            1 => Self::Evaluation { step, value: b, best: c != 0.0 },
            2 => Self::Saved { step },
            3 => Self::Stopped { step, stop: if b == 0.0 { Stop::Finished } else { Stop::Patience } },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events() -> Vec<TrainEvent> {
        let step = TrainEvent::Step {
            step: 3,
            steps: 4,
            loss: 1.5,
            gradient_norm: 2.0,
            learning_rate: 0.1,
            auxiliary: [("router_balance".to_owned(), 0.1 + 0.2)].into(),
            tokens: 9,
            tokens_run: 12,
            tokens_per_second: 3.0,
            peak_memory: 1 << 40,
            seconds: 3.0,
            eta_seconds: 1.0,
        };
        let stopped = |stop| TrainEvent::Stopped { step: 4, stop };
        let evaluation = TrainEvent::Evaluation { step: 2, value: 0.1 + 0.2, best: true };
        vec![evaluation, step, TrainEvent::Saved { step: 3 }, stopped(Stop::Finished), stopped(Stop::Patience)]
    }

    #[test]
    fn events_are_lines_of_json() {
        let mut lines = JsonLines(Vec::new());
        events().iter().for_each(|event| lines.write(event).unwrap());
        let text = String::from_utf8(lines.0).unwrap();
        let read: Vec<TrainEvent> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(read[1..], events()[1..]);
        assert!(text.starts_with(r#"{"event":"evaluation","step":2"#), "{text}");
    }

    #[test]
    fn rows_bring_events_back() {
        let names = auxiliary_names(&events());
        assert_eq!(names, ["router_balance"]);
        for event in events() {
            assert_eq!(TrainEvent::from_row(&event.to_row(&names), &names), Some(event));
        }
        assert_eq!(TrainEvent::from_row(&[9.0; ROW], &[]), None);
        assert_eq!(TrainEvent::from_row(&[0.0], &[]), None);
    }
}

//! Watching the loss.

use serde::{Deserialize, Serialize};

use super::Explosion;
use crate::train::state::Bits;

/// Running mean of the loss and how long it has been too large.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Guard {
    mean: Bits,
    seen: usize,
    /// Steps in a row with too large a loss.
    pub above: usize,
}

impl Guard {
    /// Takes the loss of a step; the multiple of the running mean that it is, if it is time to stop.
    pub fn see(&mut self, loss: f64, options: &Explosion) -> Option<f64> {
        if self.seen >= options.window && loss > options.factor * self.mean.0 {
            self.above += 1;
            return (self.above >= options.steps).then(|| loss / self.mean.0);
        }
        self.above = 0;
        self.seen += 1;
        // A plain mean at first, then an exponential one.
        let weight = 1.0 / self.seen.min(options.window) as f64;
        self.mean.0 += weight * (loss - self.mean.0);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_loss_that_stays_large_stops() {
        let options = Explosion { factor: 2.0, steps: 2, window: 3 };
        let mut guard = Guard::default();
        // the beginning is not judged
        assert!([1.0, 100.0, 1.0].iter().all(|loss| guard.see(*loss, &options).is_none()));
        let mut guard = Guard::default();
        assert!([1.0, 1.0, 1.0, 2.5, 1.0, 2.5].iter().all(|loss| guard.see(*loss, &options).is_none()));
        assert_eq!(guard.above, 1);
        assert_eq!(guard.see(3.0, &options), Some(3.0));
    }
}

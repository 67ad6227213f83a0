//! Dropout on the input of an adapter, without state: what is dropped follows from where and when.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use moe_core::{adapters::Tokens, trace::WaveInfo};

use crate::SweepListener;

/// When a sweep is: which step of training, which wave. Dropout happens only while [training](Self::train).
///
/// It belongs to the [listeners](crate::AdapterSet::add_listener) of a set, so that the wave is known.
#[derive(Debug)]
pub struct SweepClock {
    seed: u64,
    step: AtomicU64,
    wave: AtomicU64,
    training: AtomicBool,
}

impl SweepClock {
    /// Not training.
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self { seed, step: AtomicU64::new(0), wave: AtomicU64::new(0), training: AtomicBool::new(false) })
    }

    /// The sweeps that follow are those of this step.
    pub fn train(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
        self.training.store(true, Ordering::Relaxed);
    }

    /// The sweeps that follow are no steps: nothing is dropped, and nothing that training moves besides gradients
    /// moves.
    pub fn evaluate(&self) {
        self.training.store(false, Ordering::Relaxed);
    }

    /// Whether sweeps are those of a step.
    pub fn is_training(&self) -> bool {
        self.training.load(Ordering::Relaxed)
    }

    /// A number of this place, step and wave.
    fn key(&self, place: u64) -> u64 {
        let step = self.step.load(Ordering::Relaxed);
        let wave = self.wave.load(Ordering::Relaxed);
        [step, wave, place].iter().fold(mix(self.seed), |key, part| mix(key ^ *part))
    }
}

impl SweepListener for SweepClock {
    fn training(&self, step: Option<usize>) {
        match step {
            Some(step) => self.train(step as u64),
            None => self.evaluate(),
        }
    }

    fn begin_wave(&self, wave: &WaveInfo) {
        self.wave.store(wave.id, Ordering::Relaxed);
    }
}

/// `x -> m x / (1 - p)`, where `m` is 0 with probability `p` and else 1, by seed, step, wave, place, token and column.
/// A backward sweep sees the same `m` as the forward one.
#[derive(Clone, Debug)]
pub(crate) struct Dropout {
    pub rate: f32,
    pub place: u64,
    pub clock: Arc<SweepClock>,
}

impl Dropout {
    /// `x [n, columns]` with some of its elements dropped, and the factors that did it; `None` where nothing is.
    pub fn apply(dropout: Option<&Self>, x: &[f32], n: usize, tokens: Tokens<'_>) -> Option<(Vec<f32>, Vec<f32>)> {
        let factors = dropout?.factors(n, x.len() / n.max(1), tokens)?;
        Some((x.iter().zip(&factors).map(|(x, f)| x * f).collect(), factors))
    }

    /// The factors `[n, columns]` of rows of tokens; `None` where nothing is dropped.
    pub fn factors(&self, n: usize, columns: usize, tokens: Tokens<'_>) -> Option<Vec<f32>> {
        if self.rate <= 0.0 || !self.clock.is_training() {
            return None;
        }
        let key = self.clock.key(self.place);
        let kept = 1.0 / (1.0 - self.rate);
        // of 2^32 values of half a hash
        let threshold = (f64::from(self.rate) * 4_294_967_296.0) as u64;
        let mut factors = Vec::with_capacity(n * columns);
        for row in 0..n {
            let row = mix(key ^ tokens.token(row) as u64);
            let factor = |column: usize| if mix(row ^ column as u64) >> 32 < threshold { 0.0 } else { kept };
            factors.extend((0..columns).map(factor));
        }
        Some(factors)
    }
}

/// One step of the generator SplitMix64.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_follows_from_place_step_and_token_alone() {
        let clock = SweepClock::new(7);
        let dropout = |place| Dropout { rate: 0.25, place, clock: clock.clone() };
        assert!(dropout(0).factors(4, 8, Tokens::WAVE).is_none());
        clock.train(3);
        let all = dropout(0).factors(64, 100, Tokens::WAVE).unwrap();
        let zeros = all.iter().filter(|f| **f == 0.0).count() as f64 / 6400.0;
        assert!((zeros - 0.25).abs() < 0.03 && all.iter().all(|f| *f == 0.0 || (*f - 4.0 / 3.0).abs() < 1e-6));
        // an expert's rows are the wave's
        let some = dropout(0).factors(2, 100, Tokens::Rows(&[5, 40])).unwrap();
        assert_eq!((&some[..100], &some[100..]), (&all[500..600], &all[4000..4100]));
        assert_ne!(dropout(1).factors(64, 100, Tokens::WAVE).unwrap(), all);
        clock.train(4);
        assert_ne!(dropout(0).factors(64, 100, Tokens::WAVE).unwrap(), all);
        clock.train(3);
        assert_eq!(dropout(0).factors(64, 100, Tokens::WAVE).unwrap(), all);
    }
}

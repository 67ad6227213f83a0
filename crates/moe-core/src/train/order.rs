//! The order of the waves.

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

/// Shuffles the waves anew in every epoch, and cuts each epoch into steps.
pub(super) struct Order {
    generator: ChaCha8Rng,
    waves: usize,
    per_step: usize,
    /// Epochs shuffled so far; `order` is that of the last of them.
    epochs: usize,
    order: Vec<usize>,
}

impl Order {
    pub fn new(seed: u64, waves: usize, per_step: usize) -> Self {
        let generator = ChaCha8Rng::seed_from_u64(seed);
        Self { generator, waves, per_step, epochs: 0, order: Vec::new() }
    }

    /// Epoch (from 0) and position in it (in waves) of a step (from 1).
    pub fn position(&self, step: usize) -> (usize, usize) {
        let per_epoch = self.waves.div_ceil(self.per_step);
        ((step - 1) / per_epoch, (step - 1) % per_epoch * self.per_step)
    }

    /// Indices of the waves of a step, which must not be of an earlier epoch than the one asked for last.
    pub fn batch(&mut self, step: usize) -> &[usize] {
        let (epoch, position) = self.position(step);
        while self.epochs <= epoch {
            self.order = (0..self.waves).collect();
            self.order.shuffle(&mut self.generator);
            self.epochs += 1;
        }
        &self.order[position..(position + self.per_step).min(self.waves)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_start_gives_the_same_order() {
        let mut order = Order::new(3, 7, 3);
        let all: Vec<Vec<usize>> = (1..=9).map(|step| order.batch(step).to_vec()).collect();
        for epoch in all.chunks(3) {
            let mut waves = epoch.concat();
            waves.sort();
            assert_eq!((waves, epoch[2].len()), ((0..7).collect(), 1));
        }
        assert_ne!(all[0..3], all[3..6]);
        for start in 1..=9 {
            let mut order = Order::new(3, 7, 3);
            (start..=9).for_each(|step| assert_eq!(order.batch(step), all[step - 1]));
        }
        assert_eq!((order.position(1), order.position(6), order.position(7)), ((0, 0), (1, 6), (2, 0)));
    }
}

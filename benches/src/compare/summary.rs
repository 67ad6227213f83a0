//! Measurements over draws of the calibration rows.

use std::collections::BTreeMap;

use super::bench::{Bench, Metrics};
use super::case::{Amount, Case, Record};
use super::catalog::{GRID, NO_REPAIR};
use super::settings::Settings;

/// A figure over draws.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Mean over the draws.
    pub mean: f64,
    /// Standard deviation (of a sample; 0 for one draw).
    pub deviation: f64,
    /// Smallest value of a draw.
    pub low: f64,
    /// Largest value of a draw.
    pub high: f64,
    /// Number of draws.
    pub draws: usize,
}

impl Spread {
    /// Of some values, if there are any.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        // equal values have their own mean to the bit, and no spread
        let equal = values.iter().all(|value| *value == values[0]);
        let mean = if equal { values[0] } else { values.iter().sum::<f64>() / n as f64 };
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = if n > 1 { (squares / (n - 1) as f64).sqrt() } else { 0.0 };
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Some(Self { mean, deviation, low, high, draws: n })
    }
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Every measurement by configuration.
    pub records: BTreeMap<Case, Record>,
    /// Figures of the full model.
    pub base: Metrics,
    /// Capabilities that were calibrated on.
    pub calibrated: Vec<String>,
    /// Capabilities that were measured, and whether questions were answered.
    pub measured: Vec<(String, bool)>,
    /// Seeds of the draws.
    pub seeds: Vec<u64>,
    half: Amount,
    scorers: Vec<String>,
}

impl Summary {
    /// Of all measurements.
    pub fn new(records: BTreeMap<Case, Record>, settings: &Settings, bench: &Bench) -> Self {
        Self {
            records,
            base: bench.base.clone(),
            calibrated: settings.calibrated.iter().map(|name| (*name).to_owned()).collect(),
            measured: bench.held_out.iter().map(|rows| (rows.name.clone(), rows.questions.is_some())).collect(),
            seeds: settings.seeds.clone(),
            half: Amount::ratio(settings.half),
            scorers: settings.scorers.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    /// The record of a configuration.
    pub fn record(&self, case: &Case) -> Option<&Record> {
        self.records.get(case)
    }

    /// A figure over all draws; the seed of `case` plays no part. None if a draw is missing or refused.
    pub fn spread(&self, case: &Case, capability: &str, figure: &str) -> Option<Spread> {
        let value = |seed: &u64| self.record(&case.with_seed(*seed))?.metric(capability, figure);
        let values = self.seeds.iter().map(value).collect::<Option<Vec<f64>>>()?;
        Spread::of(&values)
    }

    /// A configuration without repair, of the first draw.
    pub fn case(&self, calibrated: &str, scorer: &str, method: &str, amount: Amount) -> Case {
        Case {
            calibrated: calibrated.into(),
            seed: self.seeds[0],
            scorer: scorer.into(),
            method: method.into(),
            amount,
            repair: NO_REPAIR.into(),
        }
    }

    /// The mean over capabilities of the logarithm of the divergence on the capability that was calibrated on, each by
    /// the best of the four ways to prune; at the size at which everything is compared.
    pub fn rank(&self, scorer: &str) -> Option<f64> {
        let logarithm = |calibrated: &String| {
            let divergence = |method: &&str| {
                let case = self.case(calibrated, scorer, method, self.half);
                self.spread(&case, calibrated, "kl").map(|spread| spread.mean)
            };
            let best = GRID.iter().filter_map(divergence).fold(f64::INFINITY, f64::min);
            best.is_finite().then(|| best.max(1e-12).ln())
        };
        let logarithms = self.calibrated.iter().map(logarithm).collect::<Option<Vec<f64>>>()?;
        Spread::of(&logarithms).map(|spread| spread.mean)
    }

    /// Scorers from the best to the worst by [`Summary::rank`]; ties in the order of the catalog.
    pub fn ranking(&self) -> Vec<(String, f64)> {
        let ranked = |name: &String| self.rank(name).map(|rank| (name.clone(), rank));
        let mut ranking: Vec<(String, f64)> = self.scorers.iter().filter_map(ranked).collect();
        ranking.sort_by(|a, b| a.1.total_cmp(&b.1));
        ranking
    }

    /// The first of the ranking.
    pub fn best_scorers(&self, count: usize) -> Vec<String> {
        self.ranking().into_iter().take(count).map(|(name, _)| name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_are_of_samples() {
        let spread = Spread::of(&[1.0, 2.0, 6.0]).unwrap();
        assert_eq!((spread.mean, spread.low, spread.high, spread.draws), (3.0, 1.0, 6.0, 3));
        assert!((spread.deviation - 7.0f64.sqrt()).abs() < 1e-12);
        assert_eq!(Spread::of(&[4.0]).unwrap().deviation, 0.0);
        assert_eq!(Spread::of(&[]), None);
    }
}

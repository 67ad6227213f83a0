//! Rows of calibration by which every expert is seen often enough (balanced calibration of EAQuant, arXiv 2506.13329).

#[cfg(feature = "collect")]
use moe_core::data::Wave;
#[cfg(feature = "collect")]
use moe_core::trace::{LayerTrace, Observer, Signals};
#[cfg(feature = "collect")]
use moe_core::{Engine, EngineOptions, Model};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How many tokens of every row each expert gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowUse {
    /// Experts of every MoE layer.
    pub experts: Vec<usize>,
    /// Tokens by row, then by expert, layer after layer.
    pub counts: Vec<Vec<u32>>,
}

/// Rows so that every expert gets at least a share of what it would get if all got the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BalancedRows {
    /// Rows, each as often as it is used: all of them first, then those that were added.
    pub rows: Vec<usize>,
    /// Experts below the share before.
    pub starved_before: usize,
    /// Experts below it still: no row has tokens of theirs, or there was no room for more rows.
    pub starved_after: usize,
    /// Experts of all layers.
    pub experts: usize,
}

/// Most rows for each that is given.
const MOST: usize = 4;

impl RowUse {
    /// Runs a model over waves and counts.
    ///
    /// # Errors
    /// Those of the engine.
    #[cfg(feature = "collect")]
    pub fn of(model: &Model, waves: &[Wave]) -> Result<Self> {
        let experts: Vec<usize> = model.checkpoint().shape().layers.iter().map(|layer| layer.num_experts()).collect();
        let layers: Vec<usize> = model.checkpoint().shape().layers.iter().map(|layer| layer.layer).collect();
        let engine = Engine::new(model, EngineOptions::default());
        let mut counting = Counting { layers, first: 0, found: Self { experts, counts: Vec::new() } };
        for wave in waves {
            counting.first = counting.found.counts.len();
            let width = counting.found.experts.iter().sum();
            counting.found.counts.extend(wave.sequences.iter().map(|_| vec![0; width]));
            engine.run(wave, &mut counting)?;
        }
        Ok(counting.found)
    }

    /// Adds rows, again and again the one that gives starved experts most, until every expert has `share` of the tokens
    /// that it would have if all experts of its layer got the same, or there are four times as many rows. A row that
    /// was added counts less the next time, so that others come first.
    ///
    /// # Errors
    /// [`Error::InvalidField`] for a share that is not above 0.
    pub fn balanced(&self, share: f64) -> Result<BalancedRows> {
        if !(share.is_finite() && share > 0.0) {
            let reason = format!("found {share}, expected a number above 0");
            return Err(Error::InvalidField { scorer: "balance".into(), field: "share".into(), reason });
        }
        let width: usize = self.experts.iter().sum();
        let mut totals = vec![0u64; width];
        for row in &self.counts {
            totals.iter_mut().zip(row).for_each(|(total, count)| *total += u64::from(*count));
        }
        let mut wanted = Vec::with_capacity(width);
        let mut start = 0;
        for experts in &self.experts {
            let even = totals[start..start + experts].iter().sum::<u64>() as f64 / (*experts).max(1) as f64;
            wanted.extend(std::iter::repeat_n((share * even).ceil() as u64, *experts));
            start += experts;
        }
        let starved = |totals: &[u64]| totals.iter().zip(&wanted).filter(|(total, wanted)| total < wanted).count();
        let starved_before = starved(&totals);
        let mut rows: Vec<usize> = (0..self.counts.len()).collect();
        let mut uses = vec![1u32; self.counts.len()];
        while rows.len() < MOST * self.counts.len() {
            let gain = |row: usize| {
                let lacking = totals.iter().zip(&wanted).map(|(total, wanted)| wanted.saturating_sub(*total));
                let given = self.counts[row].iter().zip(lacking).map(|(count, lacks)| u64::from(*count).min(lacks));
                given.sum::<u64>() as f64 / f64::from(uses[row])
            };
            let gains = (0..self.counts.len()).map(|row| (gain(row), row));
            let best = gains.max_by(|(a, x), (b, y)| a.total_cmp(b).then(y.cmp(x)));
            let Some((_, row)) = best.filter(|(gain, _)| *gain > 0.0) else { break };
            totals.iter_mut().zip(&self.counts[row]).for_each(|(total, count)| *total += u64::from(*count));
            uses[row] += 1;
            rows.push(row);
        }
        Ok(BalancedRows { rows, starved_before, starved_after: starved(&totals), experts: width })
    }
}

#[cfg(feature = "collect")]
struct Counting {
    layers: Vec<usize>,
    /// The first row of the wave.
    first: usize,
    found: RowUse,
}

#[cfg(feature = "collect")]
impl Observer for Counting {
    fn needs(&self) -> Signals {
        Signals::ROUTING
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        let Some(position) = self.layers.iter().position(|layer| *layer == trace.layer) else { return Ok(()) };
        let offset: usize = self.found.experts[..position].iter().sum();
        for (row, sequence) in trace.wave.sequences.iter().enumerate() {
            let chosen = sequence.tokens.start * trace.top_k..sequence.tokens.end * trace.top_k;
            let counts = &mut self.found.counts[self.first + row];
            trace.selected[chosen].iter().for_each(|expert| counts[offset + *expert as usize] += 1);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_starved_experts_come_again_until_these_have_their_share() {
        // The third expert has tokens in the last row alone, the fourth in none.
        let counts = vec![vec![10, 10, 0, 0], vec![12, 8, 0, 0], vec![9, 9, 2, 0]];
        let found = RowUse { experts: vec![4], counts }.balanced(0.5).unwrap();
        // 15 would be even, so that 8 are wanted: the last row three more times.
        assert_eq!(found.rows, [0, 1, 2, 2, 2, 2]);
        assert_eq!((found.starved_before, found.starved_after, found.experts), (2, 1, 4));
        let even = RowUse { experts: vec![2, 2], counts: vec![vec![5, 5, 4, 6]; 3] };
        assert_eq!(even.balanced(0.5).unwrap().rows, [0, 1, 2]);
        assert!(even.balanced(0.0).is_err());
    }

    #[test]
    fn rows_are_no_more_than_four_times_as_many() {
        let counts = vec![vec![1000, 1]; 5];
        let found = RowUse { experts: vec![2], counts }.balanced(1.0).unwrap();
        assert_eq!((found.rows.len(), found.starved_after), (20, 1));
    }
}

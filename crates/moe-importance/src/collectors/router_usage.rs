//! What the router prefers over all experts: mean probabilities, and the bias that they would accumulate.

use moe_checkpoint::{Fold, Statistics};
use moe_core::trace::{LayerTrace, Signals};
use rayon::prelude::*;

use super::Collector;
use crate::Result;
use crate::kernels::softmax::softmax;
use crate::statistics::{
    BIAS_SEQUENCE_MEAN, BIAS_SEQUENCE_MEDIAN, BIAS_WAVE_MEAN, BIAS_WAVE_MEDIAN, ROUTER_PROBABILITY, StatisticId,
    StatisticSpec,
};

pub(super) const PROVIDED: &[StatisticId] =
    &[ROUTER_PROBABILITY, BIAS_WAVE_MEAN, BIAS_WAVE_MEDIAN, BIAS_SEQUENCE_MEAN, BIAS_SEQUENCE_MEDIAN];

/// [`ROUTER_PROBABILITY`] and the statistics named `routing.bias_…`, from the usage `u_e = sum_t p_t[e]` of an expert,
/// the softmax probability over all experts summed over the tokens of a wave or a sequence.
///
/// The bias accumulation of ExpertCondenser (arXiv 2604.23036) raises the bias of experts used more than the mean by a
/// fixed step, lowers that of the others, and adds the bias to the logits of the next batch. Here the bias is *not* fed
/// back: each wave or sequence votes on the unchanged router. That makes votes independent of the order of the data, so
/// that shards can be added.
#[derive(Debug)]
pub struct RouterUsage {
    statistics: Vec<StatisticSpec>,
}

impl RouterUsage {
    /// Of these statistics; others are ignored.
    pub fn new(ids: &[StatisticId]) -> Self {
        let statistics = PROVIDED.iter().filter(|id| ids.contains(id)).cloned().map(StatisticSpec::expert_sum);
        Self { statistics: statistics.collect() }
    }
}

impl Collector for RouterUsage {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        Signals::ROUTING
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn layer(&mut self, trace: &LayerTrace<'_>, into: &mut Statistics) -> Result<()> {
        let experts = trace.experts;
        if experts == 0 {
            return Ok(());
        }
        // One piece per sequence: fixed, so that sums do not depend on the number of threads.
        let usage = |tokens: std::ops::Range<usize>| -> Vec<f64> {
            let (mut sums, mut row) = (vec![0.0; experts], vec![0.0; experts]);
            let logits = &trace.logits[tokens.start * experts..tokens.end * experts];
            for logits in logits.chunks_exact(experts) {
                softmax(logits, &mut row);
                sums.iter_mut().zip(&row).for_each(|(sum, p)| *sum += f64::from(*p));
            }
            sums
        };
        let sequences: Vec<Vec<f64>> =
            trace.wave.sequences.par_iter().map(|sequence| usage(sequence.tokens.clone())).collect();
        let mut wave = vec![0.0; experts];
        for sequence in &sequences {
            wave.iter_mut().zip(sequence).for_each(|(wave, sum)| *wave += sum);
        }
        let wave = [wave];
        for StatisticSpec { id, .. } in &self.statistics {
            let out = into.expert_mut(id.as_str(), Fold::Sum, trace.layer)?;
            match id {
                id if *id == ROUTER_PROBABILITY => out.iter_mut().zip(&wave[0]).for_each(|(out, sum)| *out += sum),
                id if *id == BIAS_WAVE_MEAN => vote(&wave, mean, out),
                id if *id == BIAS_WAVE_MEDIAN => vote(&wave, median, out),
                id if *id == BIAS_SEQUENCE_MEAN => vote(&sequences, mean, out),
                _ => vote(&sequences, median, out),
            }
        }
        Ok(())
    }
}

/// Adds the sign of each usage minus the middle of its sample; 0 for one that is equal.
fn vote(samples: &[Vec<f64>], middle: fn(&[f64]) -> f64, out: &mut [f64]) {
    for usage in samples {
        let middle = middle(usage);
        for (out, usage) in out.iter_mut().zip(usage) {
            *out += f64::from(i8::from(*usage > middle) - i8::from(*usage < middle));
        }
    }
}

fn mean(usage: &[f64]) -> f64 {
    usage.iter().sum::<f64>() / usage.len() as f64
}

/// The mean of the middle two for an even number.
fn median(usage: &[f64]) -> f64 {
    let mut sorted = usage.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn votes_are_signs_around_the_middle() {
        // Means 2 and 1, medians 1.5 and 1.
        let samples = [vec![5.0, 2.0, 1.0, 0.0], vec![1.0, 1.0, 1.0, 1.0]];
        for (middle, expected) in
            [(mean as fn(&[f64]) -> f64, [1.0, 0.0, -1.0, -1.0]), (median, [1.0, 1.0, -1.0, -1.0])]
        {
            let mut out = [0.0; 4];
            vote(&samples, middle, &mut out);
            assert_eq!(out, expected);
        }
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
    }
}

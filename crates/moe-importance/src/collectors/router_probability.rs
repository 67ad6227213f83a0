//! Softmax probabilities of the router over all experts.

use moe_checkpoint::{Fold, Statistics};
use moe_core::kernels::math::exp;
use moe_core::trace::{LayerTrace, Signals};
use rayon::prelude::*;

use super::{Collector, StatisticId, StatisticSpec};
use crate::Result;

/// Per expert, its softmax probability over *all* experts, summed over *all* tokens, routed to it or not.
pub const ROUTER_PROBABILITY: StatisticId = StatisticId::new("routing.probability");

/// Tokens per parallel piece. Fixed, so that sums do not depend on the number of threads.
const TOKENS_PER_PIECE: usize = 512;

/// [`ROUTER_PROBABILITY`], from the logits: what the router prefers, whatever the model makes of it (top-k,
/// renormalisation, sigmoid).
///
/// Source: the expert-drop baseline shipped with HectorHHZ/Less-is-MoE (arXiv 2606.05538).
#[derive(Debug)]
pub struct RouterProbability {
    statistics: [StatisticSpec; 1],
}

impl RouterProbability {
    /// A collector.
    pub fn new() -> Self {
        Self { statistics: [StatisticSpec::expert_sum(ROUTER_PROBABILITY)] }
    }
}

impl Default for RouterProbability {
    fn default() -> Self {
        Self::new()
    }
}

impl Collector for RouterProbability {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        Signals::ROUTING
    }

    fn layer(&mut self, trace: &LayerTrace<'_>, into: &mut Statistics) -> Result<()> {
        let out = into.expert_mut(ROUTER_PROBABILITY.as_str(), Fold::Sum, trace.layer)?;
        let experts = out.len();
        if experts == 0 {
            return Ok(());
        }
        let pieces: Vec<Vec<f64>> =
            trace.logits.par_chunks(TOKENS_PER_PIECE * experts).map(|piece| probabilities(piece, experts)).collect();
        for piece in pieces {
            out.iter_mut().zip(piece).for_each(|(out, sum)| *out += sum);
        }
        Ok(())
    }
}

/// Softmax over rows `[tokens, experts]`, summed over rows `[experts]`.
fn probabilities(logits: &[f32], experts: usize) -> Vec<f64> {
    let mut sums = vec![0.0; experts];
    let mut row = vec![0.0f32; experts];
    for logits in logits.chunks_exact(experts) {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().zip(logits).for_each(|(p, logit)| *p = exp(logit - largest));
        let total: f64 = row.iter().copied().map(f64::from).sum();
        sums.iter_mut().zip(&row).for_each(|(sum, p)| *sum += f64::from(*p) / total);
    }
    sums
}

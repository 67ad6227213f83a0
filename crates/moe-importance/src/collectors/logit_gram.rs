//! Inner products of the experts' router logits.

use moe_checkpoint::{ArrayKind, Extent, Fold, Statistics};
use moe_core::trace::{LayerTrace, Signals};
use multiversion::multiversion;
use rayon::prelude::*;

use super::Collector;
use crate::Result;
use crate::statistics::{LOGIT_GRAM, StatisticSpec};

/// Experts per parallel piece.
const ROWS: usize = 8;
/// Tokens whose sums are f32, before they are carried in f64.
const TOKENS: usize = 32;

/// [`LOGIT_GRAM`]; the logit of an expert that an overlay removed counts as 0. Cosines and distances of the experts'
/// logit columns follow from it, which is what merging groups experts by (arXiv 2604.04356).
#[derive(Debug)]
pub struct LogitGram {
    statistics: [StatisticSpec; 1],
}

impl LogitGram {
    /// A collector.
    pub fn new() -> Self {
        let kind = ArrayKind::Vector(Extent::Experts);
        Self { statistics: [StatisticSpec { id: LOGIT_GRAM, kind, fold: Fold::Sum }] }
    }
}

impl Default for LogitGram {
    fn default() -> Self {
        Self::new()
    }
}

impl Collector for LogitGram {
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
        let mut gram = vec![0.0; experts * experts];
        gram.par_chunks_mut(ROWS * experts).enumerate().for_each(|(piece, rows)| {
            for (i, row) in rows.chunks_exact_mut(experts).enumerate() {
                add_row(trace.logits, piece * ROWS + i, row);
            }
        });
        for (expert, row) in gram.chunks_exact(experts).enumerate() {
            let out = into.vector_mut(LOGIT_GRAM.as_str(), Extent::Experts, Fold::Sum, trace.layer, expert)?;
            out.iter_mut().zip(row).for_each(|(out, sum)| *out += sum);
        }
        Ok(())
    }
}

/// `row[e] += sum_t z_t[expert] z_t[e]`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn add_row(logits: &[f32], expert: usize, row: &mut [f64]) {
    let experts = row.len();
    let mut partial = vec![0.0f32; experts];
    for tokens in logits.chunks(TOKENS * experts) {
        partial.fill(0.0);
        for z in tokens.chunks_exact(experts) {
            let own = if z[expert] == f32::NEG_INFINITY { 0.0 } else { z[expert] };
            partial.iter_mut().zip(z).for_each(|(p, z)| *p += own * if *z == f32::NEG_INFINITY { 0.0 } else { *z });
        }
        row.iter_mut().zip(&partial).for_each(|(out, p)| *out += f64::from(*p));
    }
}

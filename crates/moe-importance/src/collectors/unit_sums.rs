//! Sums over tokens with one value per unit, all that are asked for from one walk over an expert's matrices.

use moe_checkpoint::{Fold, Statistics};
use moe_core::kernels::reduce::row_square_norms;
use moe_core::trace::{ExpertTrace, Signals};

use super::{Collector, gradients, units};
use crate::Result;
use crate::kernels::unit_sums::{Term, UnitMatrices, unit_sums};
use crate::statistics::{
    ACTIVATION_MAGNITUDE, ACTIVATION_SQUARE, ACTIVATION_SQUARE_WEIGHTED, ACTIVATION_WEIGHTED, FISHER_TOKEN,
    GRADIENT_SQUARE, StatisticId, StatisticSpec, TAYLOR_MAGNITUDE, TAYLOR_SQUARE, TAYLOR_SUM,
};

/// All of them, in the order in which [`UnitSums`] forms them.
pub(super) const PROVIDED: &[StatisticId] = &[
    FISHER_TOKEN,
    ACTIVATION_MAGNITUDE,
    ACTIVATION_WEIGHTED,
    ACTIVATION_SQUARE_WEIGHTED,
    ACTIVATION_SQUARE,
    GRADIENT_SQUARE,
    TAYLOR_SUM,
    TAYLOR_MAGNITUDE,
    TAYLOR_SQUARE,
];

/// Any of [`FISHER_TOKEN`], [`ACTIVATION_MAGNITUDE`], [`ACTIVATION_WEIGHTED`], [`ACTIVATION_SQUARE_WEIGHTED`],
/// [`ACTIVATION_SQUARE`], [`GRADIENT_SQUARE`], [`TAYLOR_SUM`], [`TAYLOR_MAGNITUDE`] and [`TAYLOR_SQUARE`].
///
/// Sums over the tokens t routed to the expert, with unit activations `u_t = act(gate x_t) * (up x_t)` (without the
/// routing weight) and their gradients `du_t` (with it). The loss is the summed cross-entropy: every predicted token
/// has weight 1. Asks for gradients only if one of the sums needs them.
#[derive(Debug)]
pub struct UnitSums {
    statistics: Vec<StatisticSpec>,
}

impl UnitSums {
    /// Of these statistics; others are ignored.
    pub fn new(ids: &[StatisticId]) -> Self {
        let statistics = PROVIDED.iter().filter(|id| ids.contains(id)).cloned().map(StatisticSpec::unit_sum);
        Self { statistics: statistics.collect() }
    }

    fn wants(&self, id: &StatisticId) -> bool {
        self.statistics.iter().any(|spec| spec.id == *id)
    }
}

impl Collector for UnitSums {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        let forward = [ACTIVATION_MAGNITUDE, ACTIVATION_WEIGHTED, ACTIVATION_SQUARE_WEIGHTED, ACTIVATION_SQUARE];
        match self.statistics.iter().all(|spec| forward.contains(&spec.id)) {
            true => Signals::UNITS,
            false => Signals::GRADIENTS,
        }
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>, into: &mut Statistics) -> Result<()> {
        let units = units(trace)?;
        let backward = if self.needs().gradients { Some(gradients(trace)?) } else { None };
        let ones = vec![1.0; trace.rows.len()];
        let weights = trace.routing_weights;
        let squares: Vec<f32> = weights.iter().map(|weight| weight * weight).collect();
        let (mut inputs, mut upstream) = (Vec::new(), Vec::new());
        if let Some(backward) = backward.as_ref().filter(|_| self.wants(&FISHER_TOKEN)) {
            inputs = row_square_norms(trace.input);
            upstream = row_square_norms(backward.upstream);
            upstream.iter_mut().zip(&squares).for_each(|(norm, square)| *norm *= square);
        }
        let term = |id: &StatisticId| match id {
            id if *id == FISHER_TOKEN => Term::Fisher(&inputs, &upstream),
            id if *id == ACTIVATION_MAGNITUDE => Term::Magnitude(&ones),
            id if *id == ACTIVATION_WEIGHTED => Term::Magnitude(weights),
            id if *id == ACTIVATION_SQUARE_WEIGHTED => Term::Magnitude(&squares),
            id if *id == ACTIVATION_SQUARE => Term::Square,
            id if *id == GRADIENT_SQUARE => Term::OtherSquare,
            id if *id == TAYLOR_SUM => Term::Product(&ones),
            id if *id == TAYLOR_MAGNITUDE => Term::ProductMagnitude,
            _ => Term::ProductSquare,
        };
        let terms: Vec<Term<'_>> = self.statistics.iter().map(|spec| term(&spec.id)).collect();
        let matrices = UnitMatrices {
            units,
            other: backward.as_ref().map(|backward| backward.units),
            gate_up: backward.as_ref().map(|backward| backward.gate_up),
        };
        for (spec, sums) in self.statistics.iter().zip(unit_sums(matrices, &terms)) {
            let out = into.unit_mut(spec.id.as_str(), Fold::Sum, trace.layer, trace.expert)?;
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        }
        Ok(())
    }
}

//! Statistics of whole expert outputs, all that are asked for from one pass.

use moe_checkpoint::{ArrayKind, Extent, Fold, Statistics};
use moe_core::trace::{ExpertTrace, LayerTrace, Signals};

use super::gates::Gates;
use super::{Collector, outputs};
use crate::kernels::output_rows::{column_moments, output_rows};
use crate::scorers::Gate;
use crate::statistics::{
    OUTPUT_APPLIED, OUTPUT_APPLIED_SQUARE, OUTPUT_FIRST_MAX, OUTPUT_MAX, OUTPUT_MOMENTS, OUTPUT_NORM,
    OUTPUT_RENORMALIZED, OUTPUT_RENORMALIZED_SQUARE, OUTPUT_SOFTMAX, OUTPUT_SOFTMAX_SQUARE, OUTPUT_SQUARE, OUTPUT_TURN,
    StatisticId, StatisticSpec,
};
use crate::{Error, Result};

pub(super) const PROVIDED: &[StatisticId] = &[
    OUTPUT_NORM,
    OUTPUT_SQUARE,
    OUTPUT_APPLIED,
    OUTPUT_APPLIED_SQUARE,
    OUTPUT_RENORMALIZED,
    OUTPUT_RENORMALIZED_SQUARE,
    OUTPUT_SOFTMAX,
    OUTPUT_SOFTMAX_SQUARE,
    OUTPUT_TURN,
    OUTPUT_MAX,
    OUTPUT_FIRST_MAX,
    OUTPUT_MOMENTS,
];

/// Any of the statistics named `output.…`, over the tokens t routed to an expert, with its output `f_t` before the
/// routing weight. One pass yields the norm, largest element and angle of every row, from which all of them but the
/// moments follow; those are one more pass.
#[derive(Debug)]
pub struct OutputSums {
    statistics: Vec<StatisticSpec>,
    gates: Gates,
}

impl OutputSums {
    /// Of these statistics; others are ignored.
    pub fn new(ids: &[StatisticId]) -> Self {
        let spec = |id: &StatisticId| match id {
            id if *id == OUTPUT_MAX || *id == OUTPUT_FIRST_MAX => {
                StatisticSpec { fold: Fold::Max, ..StatisticSpec::expert_sum(id.clone()) }
            }
            id if *id == OUTPUT_MOMENTS => {
                StatisticSpec { id: id.clone(), kind: ArrayKind::Vector(Extent::Moments), fold: Fold::Moments }
            }
            id => StatisticSpec::expert_sum(id.clone()),
        };
        let statistics = PROVIDED.iter().filter(|id| ids.contains(id)).map(spec).collect();
        Self { statistics, gates: Gates::default() }
    }

    fn wants(&self, ids: &[StatisticId]) -> bool {
        self.statistics.iter().any(|spec| ids.contains(&spec.id))
    }

    fn wants_softmax(&self) -> bool {
        self.wants(&[OUTPUT_SOFTMAX, OUTPUT_SOFTMAX_SQUARE])
    }

    fn wants_gates(&self) -> bool {
        self.wants_softmax() || self.wants(&[OUTPUT_RENORMALIZED, OUTPUT_RENORMALIZED_SQUARE])
    }

    /// Gates of the rows of a trace, remembered from the routing of its layer.
    fn gates<'a>(&'a self, trace: &ExpertTrace<'a>, gate: Gate) -> Result<&'a [f32]> {
        if gate == Gate::AsApplied {
            return Ok(trace.routing_weights);
        }
        let rows = self.gates.rows(gate, trace.layer, trace.expert);
        if rows.len() == trace.rows.len() {
            return Ok(rows);
        }
        Err(Error::Trace {
            layer: trace.layer,
            expert: Some(trace.expert),
            field: "rows",
            found: trace.rows.len().to_string(),
            expected: format!("{}, as many as were routed to it", rows.len()),
        })
    }
}

impl Collector for OutputSums {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.statistics
    }

    fn needs(&self) -> Signals {
        if self.wants_gates() { Signals::OUTPUTS | Signals::ROUTING } else { Signals::OUTPUTS }
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn recall(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        self.gates.remember(trace, self.wants_softmax());
        Ok(())
    }

    fn layer(&mut self, trace: &LayerTrace<'_>, _: &mut Statistics) -> Result<()> {
        self.gates.remember(trace, self.wants_softmax());
        Ok(())
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>, into: &mut Statistics) -> Result<()> {
        let outputs = outputs(trace)?; // [n, H]
        let rows = match self.statistics.iter().all(|spec| spec.id == OUTPUT_MOMENTS) {
            true => Vec::new(),
            false => output_rows(outputs, self.wants(&[OUTPUT_TURN]).then_some(trace.input)),
        };
        let norms: Vec<f64> = rows.iter().map(|row| f64::from(row.square).sqrt()).collect();
        let gated = |gate: Gate, power: i32| -> Result<f64> {
            let gates = self.gates(trace, gate)?;
            Ok(norms.iter().zip(gates).map(|(norm, gate)| norm * f64::from(*gate).powi(power)).sum())
        };
        for StatisticSpec { id, fold, .. } in &self.statistics {
            let value = match id {
                id if *id == OUTPUT_NORM => norms.iter().sum(),
                id if *id == OUTPUT_SQUARE => rows.iter().map(|row| f64::from(row.square)).sum(),
                id if *id == OUTPUT_APPLIED => gated(Gate::AsApplied, 1)?,
                id if *id == OUTPUT_APPLIED_SQUARE => gated(Gate::AsApplied, 2)?,
                id if *id == OUTPUT_RENORMALIZED => gated(Gate::Renormalized, 1)?,
                id if *id == OUTPUT_RENORMALIZED_SQUARE => gated(Gate::Renormalized, 2)?,
                id if *id == OUTPUT_SOFTMAX => gated(Gate::Softmax, 1)?,
                id if *id == OUTPUT_SOFTMAX_SQUARE => gated(Gate::Softmax, 2)?,
                id if *id == OUTPUT_TURN => {
                    let turn = |(row, norm): (&crate::kernels::output_rows::Row, &f64)| {
                        let input = f64::from(row.input_square).sqrt();
                        // A zero vector has no direction: the cosine is taken as 0.
                        norm - if input > 0.0 { f64::from(row.dot) / input } else { 0.0 }
                    };
                    let weights = trace.routing_weights.iter().copied().map(f64::from);
                    rows.iter().zip(&norms).map(turn).zip(weights).map(|(turn, weight)| weight * turn).sum()
                }
                id if *id == OUTPUT_MAX => rows.iter().map(|row| f64::from(row.max)).fold(0.0, f64::max),
                id if *id == OUTPUT_FIRST_MAX => {
                    let first = trace.segments.iter().filter_map(|segment| rows.get(segment.rows.start));
                    first.map(|row| f64::from(row.max)).fold(0.0, f64::max)
                }
                _ => {
                    let (mean, squares) = column_moments(outputs);
                    let moments = [vec![trace.rows.len() as f64], mean, squares].concat();
                    let out = into.vector_mut(id.as_str(), Extent::Moments, *fold, trace.layer, trace.expert)?;
                    fold.combine(out, &moments);
                    continue;
                }
            };
            fold.combine(&mut into.expert_mut(id.as_str(), *fold, trace.layer)?[trace.expert..=trace.expert], &[value]);
        }
        Ok(())
    }
}

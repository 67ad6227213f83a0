//! The mean of what was dropped, as a bias.

use std::collections::BTreeMap;

use moe_checkpoint::{Checkpoint, Fold, Statistics};
use moe_core::Model;
use moe_core::data::Wave;
use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, LayerOutput, Signals, WaveInfo};
use moe_importance::collectors::Collector;
use moe_importance::{Calibration, StatisticId, StatisticSpec};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    OnProgress, Repair, RepairNeeds, RepairRequest, TokenWeight, check_plan, check_shares, edits_by, own_weights,
};
use crate::{Edits, ExpertEdit, PrunePlan, Result};

/// Weighted sums of each unit over the tokens of its expert.
const UNITS: StatisticId = StatisticId::new("mean_output.units");
/// Sum of the weights.
const WEIGHT: StatisticId = StatisticId::new("mean_output.weight");

/// Gives each expert a down bias: the mean over its routed tokens of what its dropped units gave, `W_D mean_t(u_D,t)`,
/// added to the bias it has. An expert of which no unit stays becomes a constant vector, the *novice* of MoNE (arXiv
/// 2507.00390). Removed experts get none: the router never picks them.
///
/// An expert without tokens stays as it is. Biases need a format that has them: a ragged export, or gpt-oss. What is
/// seen of the model does not depend on the plan: it is a [`Calibration`], which can be kept, gone on with and shared
/// out ([`MeanOutput::collector`], [`MeanOutput::edits`]), and serves plans of any ratio. Memory: 8 bytes per unit of
/// the model, and `4 T k I` for the units of a wave of T tokens with k experts of I units each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MeanOutput {
    /// Weigh each token by the square of its routing weight, which makes the bias the best constant for the layer's
    /// output, instead of equally as MoNE does.
    pub by_routing_weight: bool,
    /// How much each token counts, besides. MoNE counts them equally.
    pub tokens: TokenWeight,
}

impl MeanOutput {
    /// Runs the full model on `waves` and gives the biases.
    ///
    /// # Errors
    /// [`Error::OtherModel`](crate::Error::OtherModel) and [`Error::InvalidPlan`](crate::Error::InvalidPlan) before
    /// anything is run; then those of [`Calibration::run`].
    pub fn fit(&self, model: &Model, plan: &PrunePlan, waves: &[Wave], on_progress: OnProgress<'_>) -> Result<Edits> {
        self.repair(&RepairRequest::new(model, plan, waves), on_progress)
    }

    /// What is to be seen of the full model, for a [`Calibration`] of it.
    pub fn collector(&self) -> Box<dyn Collector> {
        let specs = [StatisticSpec::unit_sum(UNITS), StatisticSpec::expert_sum(WEIGHT)];
        Box::new(UnitMeans { specs, options: *self, waiting: Vec::new() })
    }

    fn calibration<'a>(&self, request: &RepairRequest<'a>) -> Calibration<'a> {
        let mut calibration = Calibration::of_waves(request.model, request.waves).collector(self.collector());
        calibration = calibration.group(request.group);
        if let Some((index, count)) = request.shard {
            calibration = calibration.shard(index, count);
        }
        let calibration = calibration.absorb(request.absorb.iter().cloned());
        match request.store {
            Some(store) => calibration.store(store),
            None => calibration,
        }
    }

    /// The biases for a plan, from what [`MeanOutput::collector`] has seen.
    ///
    /// # Errors
    /// [`Error::OtherModel`](crate::Error::OtherModel) and [`Error::InvalidPlan`](crate::Error::InvalidPlan);
    /// statistics of something else; weights that cannot be read.
    pub fn edits(&self, statistics: &Statistics, checkpoint: &Checkpoint, plan: &PrunePlan) -> Result<Edits> {
        check_plan(plan, checkpoint)?;
        let places: Vec<(usize, usize)> = plan
            .kept
            .iter()
            .zip(&plan.shape.layers)
            .flat_map(|(kept, layer)| {
                let loses = |e: &usize| kept.experts[*e].len() < layer.widths[*e];
                let stays = |e: &usize| kept.removed.binary_search(&(*e as u32)).is_err();
                (0..layer.num_experts()).filter(loses).filter(stays).map(|e| (kept.layer, e)).collect::<Vec<_>>()
            })
            .collect();
        let biases = places.into_par_iter().map(|(layer, expert)| -> Result<_> {
            let weight = statistics.expert(WEIGHT.as_str(), layer)?[expert];
            if weight <= 0.0 {
                return Ok(None);
            }
            let weights = checkpoint.expert(layer, expert)?;
            let sums = statistics.unit(UNITS.as_str(), layer, expert)?;
            let mut units: Vec<f64> = sums.iter().map(|sum| sum / weight).collect();
            let kept = plan.layer(layer).map(|kept| kept.experts[expert].as_slice()).unwrap_or_default();
            kept.iter().for_each(|&unit| units[unit as usize] = 0.0);
            let bias = (0..weights.hidden).map(|h| {
                let row = &weights.down[h * weights.width..(h + 1) * weights.width];
                let own = weights.down_bias.as_ref().map_or(0.0, |bias| f64::from(bias[h]));
                (own + row.iter().zip(&units).map(|(w, u)| f64::from(*w) * u).sum::<f64>()) as f32
            });
            Ok(Some(((layer, expert), bias.collect::<Vec<f32>>())))
        });
        let biases = moe_checkpoint::collect_in_order(biases)?;
        let mut edits = edits_by(self.recipe());
        for ((layer, expert), bias) in biases.into_iter().flatten() {
            edits.set_expert(layer, expert, ExpertEdit { down: None, down_bias: Some(bias) });
        }
        Ok(edits)
    }
}

impl Repair for MeanOutput {
    fn recipe(&self) -> Value {
        json!({ "repair": "mean_output", "options": self })
    }

    fn needs(&self) -> RepairNeeds {
        RepairNeeds { biases: true, own_weights: true, shares: true, ..RepairNeeds::default() }
    }

    fn check(&self, request: &RepairRequest<'_>) -> Result<()> {
        own_weights(self.needs(), request)?;
        check_shares(self.needs(), request)?;
        Ok(self.calibration(request).check()?)
    }

    fn repair(&self, request: &RepairRequest<'_>, on_progress: OnProgress<'_>) -> Result<Edits> {
        check_shares(self.needs(), request)?;
        check_plan(request.plan, request.model.checkpoint())?;
        let statistics =
            self.calibration(request).run(&mut |at| on_progress(at.tokens_done as usize, at.tokens as usize))?;
        self.edits(&statistics, request.model.checkpoint(), request.plan)
    }
}

/// An expert's tokens of a wave, not yet added.
struct Waiting {
    expert: usize,
    rows: Vec<u32>,
    weights: Vec<f32>,
    units: HostView,
    width: usize,
}

/// Sums of units, each token weighted by what is known of it when the layer is done.
struct UnitMeans {
    specs: [StatisticSpec; 2],
    options: MeanOutput,
    waiting: Vec<Waiting>,
}

impl UnitMeans {
    /// The sums of one expert, and of the weights.
    fn sums(&self, waiting: &Waiting, factors: &[f32]) -> (Vec<f64>, f64) {
        let (mut sums, mut total) = (vec![0.0; waiting.width], 0.0);
        let rows = waiting.units.as_slice().chunks_exact(waiting.width);
        for ((units, g), row) in rows.zip(&waiting.weights).zip(&waiting.rows) {
            let g = if self.options.by_routing_weight { f64::from(*g).powi(2) } else { 1.0 };
            let weight = g * f64::from(factors[*row as usize]).powi(2);
            total += weight;
            sums.iter_mut().zip(units).for_each(|(sum, u)| *sum += weight * f64::from(*u));
        }
        (sums, total)
    }
}

impl Collector for UnitMeans {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.specs
    }

    fn needs(&self) -> Signals {
        Signals::UNITS | Signals::STREAMS
    }

    fn recipe(&self) -> Option<Value> {
        Some(json!({ "mean_output": self.options }))
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn begin_wave(&mut self, _: &WaveInfo) -> moe_importance::Result<()> {
        self.waiting.clear();
        Ok(())
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>, _: &mut Statistics) -> moe_importance::Result<()> {
        let missing = |found: &str, expected: &str| moe_importance::Error::Trace {
            layer: trace.layer,
            expert: Some(trace.expert),
            field: "units",
            found: found.into(),
            expected: expected.into(),
        };
        if trace.backward.is_some() {
            return Err(missing("experts in the backward sweep", "a calibration without gradients"));
        }
        let units = trace.units.ok_or_else(|| missing("nothing", "what was asked for"))?;
        let width = units.dims()[1];
        if width > 0 {
            let (rows, weights) = (trace.rows.to_vec(), trace.routing_weights.to_vec());
            self.waiting.push(Waiting { expert: trace.expert, rows, weights, units: HostView::new(units), width });
        }
        Ok(())
    }

    fn output(&mut self, output: &LayerOutput<'_>, into: &mut Statistics) -> moe_importance::Result<()> {
        let factors = self.options.tokens.factors(output);
        let waiting = std::mem::take(&mut self.waiting);
        let sums: BTreeMap<usize, (Vec<f64>, f64)> =
            waiting.par_iter().map(|waiting| (waiting.expert, self.sums(waiting, &factors))).collect();
        for (expert, (sums, weight)) in sums {
            let units = into.unit_mut(UNITS.as_str(), Fold::Sum, output.layer, expert)?;
            units.iter_mut().zip(sums).for_each(|(unit, sum)| *unit += sum);
            into.expert_mut(WEIGHT.as_str(), Fold::Sum, output.layer)?[expert] += weight;
        }
        Ok(())
    }
}

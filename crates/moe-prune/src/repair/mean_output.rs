//! The mean of what was dropped, as a bias.

use std::collections::BTreeMap;

use moe_core::data::Wave;
use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, Observer, Signals};
use moe_core::{Engine, EngineOptions, LayerChange, LayerOutput, LayerVisitor, Model};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{OnLayer, TokenWeight, check_plan, edits_by};
use crate::{Edits, ExpertEdit, PrunePlan, Result};

/// Gives each expert a down bias: the mean over its routed tokens of what its dropped units gave, `W_D mean_t(u_D,t)`, added to the bias it
/// has. An expert of which no unit stays becomes a constant vector, the *novice* of MoNE (arXiv 2507.00390). Removed experts get none: the
/// router never picks them.
///
/// An expert without tokens stays as it is. Biases need a format that has them: a ragged export, or gpt-oss. Memory: 8 bytes per unit, and `4 T k I` for
/// the units of a wave of T tokens with k experts of I units each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MeanOutput {
    /// Weigh each token by the square of its routing weight, which makes the bias the best constant for the layer's output, instead of
    /// equally as MoNE does.
    pub by_routing_weight: bool,
    /// How much each token counts, besides. MoNE counts them equally.
    pub tokens: TokenWeight,
}

impl MeanOutput {
    /// Runs the full model on `waves` and gives the biases.
    ///
    /// # Errors
    /// [`Error::OtherModel`](crate::Error::OtherModel) and [`Error::InvalidPlan`](crate::Error::InvalidPlan) before anything is run; then
    /// those of [`Engine::run_layerwise`].
    pub fn fit(&self, model: &Model, plan: &PrunePlan, waves: &[Wave], on_layer: OnLayer<'_>) -> Result<Edits> {
        check_plan(plan, model)?;
        let engine = Engine::new(model, EngineOptions::default());
        let mut sums = Sums { plan, options: *self, waiting: Vec::new(), experts: BTreeMap::new(), done: 0, on_layer };
        engine.run_layerwise(waves, &mut sums)?;
        let biases = sums.experts.into_par_iter().filter(|(_, mean)| mean.weight > 0.0).map(
            |((layer, expert), mean)| -> Result<_> {
                let weights = model.checkpoint().expert(layer, expert).map_err(moe_core::Error::from)?;
                let mut units: Vec<f64> = mean.sums.iter().map(|sum| sum / mean.weight).collect();
                let kept = &plan.layer(layer).expect("observed because it is in the plan").experts[expert];
                kept.iter().for_each(|&unit| units[unit as usize] = 0.0);
                let bias = (0..weights.hidden).map(|h| {
                    let row = &weights.down[h * weights.width..(h + 1) * weights.width];
                    let own = weights.down_bias.as_ref().map_or(0.0, |bias| f64::from(bias[h]));
                    (own + row.iter().zip(&units).map(|(w, u)| f64::from(*w) * u).sum::<f64>()) as f32
                });
                Ok(((layer, expert), bias.collect::<Vec<f32>>()))
            },
        );
        let biases = moe_checkpoint::collect_in_order(biases)?;
        let recipe = serde_json::json!({ "repair": "mean_output", "options": self });
        let mut edits = edits_by(recipe);
        for ((layer, expert), bias) in biases {
            edits.set_expert(layer, expert, ExpertEdit { down: None, down_bias: Some(bias) });
        }
        Ok(edits)
    }
}

/// Weighted sums of an expert's units over its tokens.
struct Mean {
    sums: Vec<f64>,
    weight: f64,
}

/// An expert's tokens of a wave, not yet added.
struct Waiting {
    expert: usize,
    rows: Vec<u32>,
    weights: Vec<f32>,
    units: HostView,
    width: usize,
}

struct Sums<'a> {
    plan: &'a PrunePlan,
    options: MeanOutput,
    waiting: Vec<Waiting>,
    experts: BTreeMap<(usize, usize), Mean>,
    done: usize,
    on_layer: OnLayer<'a>,
}

impl Observer for Sums<'_> {
    fn needs(&self) -> Signals {
        Signals::UNITS
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        let units = trace.units.expect("asked for");
        let width = units.dims()[1];
        let kept = self.plan.layer(trace.layer).expect("the plan is of this model");
        let removed = kept.removed.binary_search(&(trace.expert as u32)).is_ok();
        if !removed && width > 0 && kept.experts[trace.expert].len() < width {
            let (rows, weights) = (trace.rows.to_vec(), trace.routing_weights.to_vec());
            self.waiting.push(Waiting { expert: trace.expert, rows, weights, units: HostView::new(units), width });
        }
        Ok(())
    }
}

impl LayerVisitor for Sums<'_> {
    fn output(&mut self, output: &LayerOutput<'_>) -> moe_core::Result<()> {
        let factors = self.options.tokens.factors(output);
        for Waiting { expert, rows, weights, units, width } in std::mem::take(&mut self.waiting) {
            let mean = self
                .experts
                .entry((output.layer, expert))
                .or_insert_with(|| Mean { sums: vec![0.0; width], weight: 0.0 });
            for ((units, g), row) in units.as_slice().chunks_exact(width).zip(weights).zip(rows) {
                let g = if self.options.by_routing_weight { f64::from(g).powi(2) } else { 1.0 };
                let weight = g * f64::from(factors[row as usize]).powi(2);
                mean.weight += weight;
                mean.sums.iter_mut().zip(units).for_each(|(sum, u)| *sum += weight * f64::from(*u));
            }
        }
        Ok(())
    }

    fn end_layer(&mut self, _: usize) -> moe_core::Result<LayerChange> {
        self.done += 1;
        (self.on_layer)(self.done, self.plan.kept.len());
        Ok(LayerChange::default())
    }
}

//! The mean of what was dropped, as a bias.

use std::collections::BTreeMap;

use moe_core::data::Wave;
use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, Observer, Signals};
use moe_core::{Engine, EngineOptions, Model};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{check_plan, edits_by};
use crate::{Edits, ExpertEdit, PrunePlan, Result};

/// Gives each expert a down bias: the mean over its routed tokens of what its dropped units gave, `W_D mean_t(u_D,t)`, added to the bias it
/// has. An expert of which no unit stays becomes a constant vector, the *novice* of MoNE (arXiv 2507.00390). Removed experts get none: the
/// router never picks them.
///
/// An expert without tokens stays as it is. Biases need a format that has them: a ragged export, or gpt-oss. Memory: 8 bytes per unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MeanOutput {
    /// Weigh each token by the square of its routing weight, which makes the bias the best constant for the layer's output, instead of
    /// equally as MoNE does.
    pub by_routing_weight: bool,
}

impl MeanOutput {
    /// Runs the full model on `waves`, in one sweep each, and gives the biases. `on_wave` is told after each: how many are done, and how
    /// many there are.
    ///
    /// # Errors
    /// [`Error::OtherModel`](crate::Error::OtherModel) and [`Error::InvalidPlan`](crate::Error::InvalidPlan) before anything is run; then
    /// those of [`Engine::run`].
    pub fn fit(
        &self,
        model: &Model,
        plan: &PrunePlan,
        waves: &[Wave],
        on_wave: &mut dyn FnMut(usize, usize),
    ) -> Result<Edits> {
        check_plan(plan, model)?;
        let engine = Engine::new(model, EngineOptions::default());
        let mut sums = Sums { plan, by_routing_weight: self.by_routing_weight, experts: BTreeMap::new() };
        for (done, wave) in waves.iter().enumerate() {
            engine.run(wave, &mut sums)?;
            on_wave(done + 1, waves.len());
        }
        let biases = sums
            .experts
            .into_par_iter()
            .filter(|(_, mean)| mean.weight > 0.0)
            .map(|((layer, expert), mean)| {
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
            })
            .collect::<Result<Vec<_>>>()?;
        let recipe = serde_json::json!({ "repair": "mean_output", "by_routing_weight": self.by_routing_weight });
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

struct Sums<'a> {
    plan: &'a PrunePlan,
    by_routing_weight: bool,
    experts: BTreeMap<(usize, usize), Mean>,
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
        if removed || width == 0 || kept.experts[trace.expert].len() == width {
            return Ok(());
        }
        let mean = self
            .experts
            .entry((trace.layer, trace.expert))
            .or_insert_with(|| Mean { sums: vec![0.0; width], weight: 0.0 });
        let view = HostView::new(units);
        for (row, g) in view.as_slice().chunks_exact(width).zip(trace.routing_weights) {
            let weight = if self.by_routing_weight { f64::from(*g).powi(2) } else { 1.0 };
            mean.weight += weight;
            mean.sums.iter_mut().zip(row).for_each(|(sum, u)| *sum += weight * f64::from(*u));
        }
        Ok(())
    }
}

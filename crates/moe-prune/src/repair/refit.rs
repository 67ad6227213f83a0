//! Refit of the kept down columns of every expert, in closed form.

use std::collections::{BTreeMap, BTreeSet};

use faer::Mat;
use faer::linalg::matmul::matmul;
use moe_core::data::Wave;
use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, LayerTrace, Observer, Signals};
use moe_core::{Engine, EngineOptions, LayerChange, LayerOutput, LayerVisitor, Model, RoutingOverlay};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::finished_layers::FinishedLayers;
use super::linear::{Normal, Rows, add_gram, diagonal, to_rows};
use super::messages::shared;
use super::ridge::{RidgeScale, check_ridge};
use super::{OnProgress, Repair, RepairNeeds, RepairRequest, TokenWeight, check_plan, check_shares, edits_by};
use crate::plan::LayerKept;
use crate::{Edits, ExpertEdit, PlanOverlay, PrunePlan, Result};

/// Refits the kept down columns of each expert so that they give what all its columns gave, in the least squares over
/// the tokens that the full model routes to it:
///
/// minimize over W': `sum_t s_t^2 |g_t W u_t - g'_t W' u_K,t|^2 + lambda |W' - W_K|^2`, so `W' (A + lambda I) = C +
/// lambda W_K` with `A = sum s^2 g'^2 u_K u_K^T` and `C = W sum s^2 g g' u u_K^T`; s is the token's
/// [weight](TokenWeight).
///
/// `u` are the unit activations, `u_K` the kept ones, `g` the routing weight in the full model and `g'` that of the
/// plan, which differ where it removes experts. Tokens that come to an expert only because others were removed do not
/// count: it never gave them anything to imitate. After MergeMoE's fit of merged experts (arXiv 2510.14436), here for
/// dropped units.
///
/// An expert that loses no units and whose routing is unchanged stays as it is, and so does one without tokens. Layers
/// do not depend on each other, so that processes can [share](RepairRequest::shard) them. One is done at a time, in
/// memory `8 E I K` bytes for E experts of I units of which K stay, `8 E K K` more where experts were removed, and `4 T
/// k I` for the units of a wave of T tokens with k experts each.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Refit {
    /// `lambda` as a multiple of a mean of A's diagonals. Pulls towards the columns as they were.
    pub ridge: f64,
    /// Over which units that mean is taken.
    pub ridge_scale: RidgeScale,
    /// How much each token counts.
    pub tokens: TokenWeight,
}

impl Default for Refit {
    fn default() -> Self {
        Self { ridge: 0.1, ridge_scale: RidgeScale::Layer, tokens: TokenWeight::Relative }
    }
}

impl Refit {
    /// Runs the full model on `waves` and gives the columns of the plan's experts.
    ///
    /// # Errors
    /// [`Error::OtherModel`](crate::Error::OtherModel), [`Error::InvalidPlan`](crate::Error::InvalidPlan) and
    /// [`Error::InvalidParameter`](crate::Error::InvalidParameter) before anything is run; then those of
    /// [`Engine::run_layerwise`].
    pub fn fit(&self, model: &Model, plan: &PrunePlan, waves: &[Wave], on_layer: OnProgress<'_>) -> Result<Edits> {
        self.repair(&RepairRequest::new(model, plan, waves), on_layer)
    }

    fn fit_in(&self, request: &RepairRequest<'_>, on_layer: OnProgress<'_>) -> Result<Edits> {
        let RepairRequest { model, plan, waves, store, .. } = *request;
        check_ridge(self.ridge)?;
        check_plan(plan, model.checkpoint())?;
        let plain = model.expert_overlay().is_none() && model.routing_overlay().is_none();
        let models = [model.identity()];
        let store = store.filter(|_| plain);
        let finished = FinishedLayers::open(store, &self.recipe(), plan, &models, waves)?;
        for other in request.absorb {
            finished.absorb(other)?;
        }
        let (mut edits, mut todo) = (Edits::new(), BTreeSet::new());
        let own = plan.kept.iter().enumerate().filter(|(position, _)| request.is_own(*position));
        for layer in own.clone().map(|(_, kept)| kept.layer) {
            match finished.load(layer)? {
                Some(found) => edits.extend(found),
                None => drop(todo.insert(layer)),
            }
        }
        let engine = Engine::new(model, EngineOptions::default());
        let mut visitor = Visitor {
            refit: *self,
            engine: &engine,
            plan,
            routing: PlanOverlay::new(plan),
            tables: BTreeMap::new(),
            grams: BTreeMap::new(),
            waiting: Vec::new(),
            finished,
            edits,
            layers: own.count(),
            todo,
            on_layer,
        };
        if !visitor.todo.is_empty() {
            let mut sweep = engine.layer_sweep(waves)?;
            while !visitor.todo.is_empty() && sweep.step(&mut visitor)?.is_some() {}
        }
        let mut edits = shared(request.group, visitor.edits)?;
        edits.recipe = self.recipe();
        Ok(edits)
    }
}

impl Repair for Refit {
    fn recipe(&self) -> Value {
        json!({ "repair": "refit", "options": self })
    }

    fn needs(&self) -> RepairNeeds {
        RepairNeeds { own_weights: true, shares: true, ..RepairNeeds::default() }
    }

    fn repair(&self, request: &RepairRequest<'_>, on_progress: OnProgress<'_>) -> Result<Edits> {
        check_shares(self.needs(), request)?;
        request.group.agree(self.fit_in(request, on_progress))
    }
}

/// Sums over the tokens of one expert.
struct Grams {
    /// `sum s^2 g g' u u_K^T`, `[I, K]`.
    cross: Mat<f64>,
    /// `sum s^2 g'^2 u_K u_K^T`, `[K, K]`, where it is not the rows K of `cross`.
    own: Option<Mat<f64>>,
}

/// An expert's tokens of a wave, not yet added.
struct Waiting {
    expert: usize,
    rows: Vec<u32>,
    units: HostView,
    width: usize,
    /// Routing weights in the full model.
    full: Vec<f32>,
    /// Those in the pruned model, where they differ.
    pruned: Option<Vec<f32>>,
}

struct Visitor<'a> {
    refit: Refit,
    engine: &'a Engine<'a>,
    plan: &'a PrunePlan,
    /// How the plan routes.
    routing: PlanOverlay,
    /// Routing weights `[T, E]` of the pruned model in layers that lose experts, for the wave at hand.
    tables: BTreeMap<usize, Vec<f32>>,
    grams: BTreeMap<usize, Grams>,
    waiting: Vec<Waiting>,
    finished: FinishedLayers,
    edits: Edits,
    /// Layers of this run, and those of them that nobody has fitted yet.
    layers: usize,
    todo: BTreeSet<usize>,
    on_layer: OnProgress<'a>,
}

impl Visitor<'_> {
    fn kept(&self, layer: usize) -> &LayerKept {
        self.plan.layer(layer).expect("the plan is of this model")
    }

    /// Adds the tokens of a wave.
    fn flush(&mut self, output: &LayerOutput<'_>) {
        let factors = self.refit.tokens.factors(output);
        let kept = &self.plan.layer(output.layer).expect("the plan is of this model").experts;
        let waiting: Vec<(Waiting, Grams)> = std::mem::take(&mut self.waiting)
            .into_iter()
            .map(|waiting| {
                let k = kept[waiting.expert].len();
                let grams = self.grams.remove(&waiting.expert).unwrap_or_else(|| Grams {
                    cross: Mat::zeros(waiting.width, k),
                    own: waiting.pruned.is_some().then(|| Mat::zeros(k, k)),
                });
                (waiting, grams)
            })
            .collect();
        let added: Vec<(usize, Grams)> = waiting
            .into_par_iter()
            .map(|(waiting, mut grams)| {
                add(&mut grams, &waiting, &kept[waiting.expert], &factors);
                (waiting.expert, grams)
            })
            .collect();
        self.grams.extend(added);
    }
}

fn add(grams: &mut Grams, waiting: &Waiting, kept: &[u32], factors: &[f32]) {
    let units = Rows { values: waiting.units.as_slice(), columns: waiting.width };
    let token = |t: usize| f64::from(factors[waiting.rows[t] as usize]).powi(2);
    let full = |t: usize| f64::from(waiting.full[t]);
    match (&waiting.pruned, &mut grams.own) {
        (Some(pruned), Some(own)) => {
            let pruned = |t: usize| f64::from(pruned[t]);
            add_gram(&mut grams.cross, units, units, kept, |t| token(t) * full(t) * pruned(t));
            let only: Vec<f32> = (0..units.rows())
                .flat_map(|t| kept.iter().map(move |&u| units.values[t * units.columns + u as usize]))
                .collect();
            let all: Vec<u32> = (0..kept.len() as u32).collect();
            let only = Rows { values: &only, columns: kept.len() };
            add_gram(own, only, only, &all, |t| token(t) * pruned(t).powi(2));
        }
        _ => add_gram(&mut grams.cross, units, units, kept, |t| token(t) * full(t).powi(2)),
    }
}

/// The rows K of `cross`: A where the routing is unchanged.
fn own_rows(cross: &Mat<f64>, kept: &[u32]) -> Mat<f64> {
    Mat::from_fn(kept.len(), kept.len(), |i, j| cross[(kept[i] as usize, j)])
}

/// The sum of A's diagonal and its length.
fn grams_diagonal(grams: &Grams, kept: &[u32]) -> (f64, usize) {
    match &grams.own {
        Some(own) => diagonal(own),
        None => (kept.iter().enumerate().map(|(j, &unit)| grams.cross[(unit as usize, j)]).sum(), kept.len()),
    }
}

/// `W' [H, K]` from the sums and `down [H, I]`; nothing if the sums are zero.
fn solve(grams: Grams, kept: &[u32], down: Rows<'_>, lambda: f64) -> Option<Vec<f32>> {
    let k = kept.len();
    let Grams { cross, own } = grams;
    let normal = Normal::new(own.unwrap_or_else(|| own_rows(&cross, kept)), lambda)?;
    let down = down.to_mat(); // [H, I]
    // C + lambda W_K
    let mut c = Mat::from_fn(down.nrows(), k, |h, j| normal.lambda * down[(h, kept[j] as usize)]);
    matmul(c.as_mut(), faer::Accum::Add, down.as_ref(), cross.as_ref(), 1.0, faer::Par::Seq);
    Some(to_rows(normal.solve(c.as_ref()).as_ref()))
}

impl Observer for Visitor<'_> {
    fn needs(&self) -> Signals {
        Signals { units: true, streams: true, ..Signals::ROUTING }
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        let unchanged = self.routing.removed(trace.layer).is_none() && self.routing.top_k().is_none();
        if unchanged || !self.todo.contains(&trace.layer) {
            return Ok(());
        }
        let routed = self.engine.route(trace.layer, trace.logits, Some(&self.routing))?;
        let mut table = vec![0.0; trace.logits.len()];
        for (slot, (&expert, weight)) in routed.selected.iter().zip(&routed.weights).enumerate() {
            table[slot / routed.top_k * trace.experts + expert as usize] = *weight;
        }
        self.tables.insert(trace.layer, table);
        Ok(())
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        if !self.todo.contains(&trace.layer) {
            return Ok(());
        }
        let layer = self.kept(trace.layer);
        let kept = &layer.experts[trace.expert];
        let units = trace.units.expect("asked for");
        let width = units.dims()[1];
        let table = self.tables.get(&trace.layer);
        if kept.is_empty() || (kept.len() == width && table.is_none()) {
            return Ok(());
        }
        let experts = layer.experts.len();
        let pruned =
            |table: &Vec<f32>| trace.rows.iter().map(|&t| table[t as usize * experts + trace.expert]).collect();
        self.waiting.push(Waiting {
            expert: trace.expert,
            rows: trace.rows.to_vec(),
            units: HostView::new(units),
            width,
            full: trace.routing_weights.to_vec(),
            pruned: table.map(pruned),
        });
        Ok(())
    }

    fn output(&mut self, output: &LayerOutput<'_>) -> moe_core::Result<()> {
        if self.todo.contains(&output.layer) {
            self.flush(output);
        }
        self.tables.clear();
        Ok(())
    }
}

impl LayerVisitor for Visitor<'_> {
    fn end_layer(&mut self, layer: usize) -> moe_core::Result<LayerChange> {
        if !self.todo.remove(&layer) {
            return Ok(LayerChange::default());
        }
        let kept = &self.plan.layer(layer).expect("the plan is of this model").experts;
        let checkpoint = self.engine.model().checkpoint();
        let grams = std::mem::take(&mut self.grams);
        let diagonals: Vec<_> = grams.iter().map(|(&expert, grams)| grams_diagonal(grams, &kept[expert])).collect();
        let lambdas = self.refit.ridge_scale.lambdas(self.refit.ridge, &diagonals);
        let fitted = Vec::from_iter(grams.into_iter().zip(lambdas));
        let fitted = fitted.into_par_iter().map(|((expert, grams), lambda)| -> moe_core::Result<_> {
            let weights = checkpoint.expert(layer, expert)?;
            let down = Rows { values: &weights.down, columns: weights.width };
            Ok((expert, solve(grams, &kept[expert], down, lambda)))
        });
        let fitted = moe_checkpoint::collect_in_order(fitted)?;
        let mut edits = edits_by(Value::Null);
        for (expert, down) in fitted {
            edits.set_expert(layer, expert, ExpertEdit { down, down_bias: None });
        }
        self.finished.save(layer, &edits).map_err(moe_core::Error::observer)?;
        self.edits.extend(edits);
        (self.on_layer)(self.layers - self.todo.len(), self.layers);
        Ok(LayerChange::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        let hash = |i: usize| ((i + 1) * (seed + 7) * 2_654_435_761usize) >> 7;
        (0..n).map(|i| (hash(i) % 2000) as f32 / 1000.0 - 1.0).collect()
    }

    fn sums(units: &[f32], width: usize, kept: &[u32], full: &[f32], pruned: Option<&[f32]>) -> Grams {
        let k = kept.len();
        let mut grams = Grams { cross: Mat::zeros(width, k), own: pruned.map(|_| Mat::zeros(k, k)) };
        let device = moe_core::device::device("default").unwrap();
        let tensor = moe_core::host::from_vec(units.to_vec(), [units.len() / width, width], &device);
        let waiting = Waiting {
            expert: 0,
            rows: (0..full.len() as u32).rev().collect(),
            units: HostView::new(&tensor),
            width,
            full: full.to_vec(),
            pruned: pruned.map(<[f32]>::to_vec),
        };
        add(&mut grams, &waiting, kept, &factors(full.len()));
        grams
    }

    /// By token; token t is row n - 1 - t.
    fn factors(n: usize) -> Vec<f32> {
        (0..n).map(|t| 0.5 + (t % 4) as f32 * 0.3).collect()
    }

    #[test]
    fn keeping_every_unit_changes_nothing() {
        let (n, width, hidden) = (600, 12, 5);
        let (units, down, g) = (values(n * width, 1), values(hidden * width, 2), values(n, 3));
        let all: Vec<u32> = (0..width as u32).collect();
        let found = solve(sums(&units, width, &all, &g, None), &all, Rows { values: &down, columns: width }, 0.01);
        assert!(found.unwrap().iter().zip(&down).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    /// The normal equations hold: the gradient of the objective at W' is zero.
    #[test]
    fn the_solution_is_the_minimum() {
        let (n, width, hidden, ridge) = (300, 8, 3, 0.05);
        let kept = [1u32, 2, 5, 7];
        let (units, down) = (values(n * width, 1), values(hidden * width, 2));
        let (g, g_pruned) = (values(n, 3), values(n, 4));
        for pruned in [None, Some(g_pruned.as_slice())] {
            let down_rows = Rows { values: &down, columns: width };
            let found = sums(&units, width, &kept, &g, pruned);
            let lambda = RidgeScale::Expert.lambdas(ridge, &[grams_diagonal(&found, &kept)])[0];
            let fitted = solve(found, &kept, down_rows, lambda).unwrap();
            let after = pruned.unwrap_or(&g);
            let s = |t: usize| f64::from(factors(n)[n - 1 - t]);
            let u = |t: usize, j: usize| s(t) * f64::from(units[t * width + j]);
            let diagonal: f64 = kept
                .iter()
                .map(|&j| (0..n).map(|t| (f64::from(after[t]) * u(t, j as usize)).powi(2)).sum::<f64>())
                .sum();
            let lambda = ridge * diagonal / 4.0;
            for h in 0..hidden {
                for (j, &unit) in kept.iter().enumerate() {
                    let mut gradient = lambda * f64::from(fitted[h * 4 + j] - down[h * width + unit as usize]);
                    for t in 0..n {
                        let full: f64 = (0..width).map(|i| f64::from(down[h * width + i]) * u(t, i)).sum();
                        let left: f64 = (0..4).map(|i| f64::from(fitted[h * 4 + i]) * u(t, kept[i] as usize)).sum();
                        let error = f64::from(g[t]) * full - f64::from(after[t]) * left;
                        gradient -= error * f64::from(after[t]) * u(t, unit as usize);
                    }
                    assert!(gradient.abs() < 1e-3, "{h} {j}: {gradient}");
                }
            }
        }
    }
}

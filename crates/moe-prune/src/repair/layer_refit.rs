//! Refit of all kept down columns of a layer together, layer after layer.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use faer::Mat;
use moe_checkpoint::ExpertWeights;
use moe_checkpoint::group::{Alone, Group, pack, unpack};
use moe_core::data::Wave;
use moe_core::host::{self, HostView};
use moe_core::trace::{ExpertTrace, Nobody, Observer, Signals, WaveInfo};
use moe_core::{Engine, EngineOptions, ExpertOverlay, LayerChange, LayerOutput, LayerSweep, LayerVisitor, Model};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::finished_layers::FinishedLayers;
use super::linear::{Normal, Rows, add_gram, cross, diagonal, squares, subtract, to_rows};
use super::messages::of_first;
use super::ridge::{RidgeScale, check_ridge};
use super::{OnProgress, Repair, RepairNeeds, RepairRequest, TokenWeight, check_shares, edits_by};
use crate::{Edits, Error, ExpertEdit, PrunePlan, Result};

/// What a layer is fitted to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The residual stream of the full model after the layer, so that what earlier layers got wrong is made good, too.
    Layer,
    /// What the full model's layer makes of the changed model's own stream.
    #[default]
    Same,
}

/// Refits the down matrices of a changed model so that each of its layers gives what the full model's gives:
///
/// minimize over all `W'_e` of a layer together: `sum_t s_t^2 |y_t - sum_e g'_te W'_e u_te|^2 + sum_e lambda_e |W'_e -
/// W_e|^2`, where y is the [`Target`] less everything but the routed experts, u and g' are the changed model's own, and
/// s is the token's [weight](TokenWeight). Changed routing and removed experts are compensated by the experts that are
/// left. By block-coordinate descent on the residual, expert after expert, from the matrices as they are; layer after
/// layer, each on the streams that the refitted layers before it give.
///
/// Works after any pruner: the changed model is a view through overlays or a checkpoint of its own. Memory for one
/// layer, T tokens in all, k experts of K units per token: `4 T (k K + H)` bytes, and `8 E K K` of factors, besides the
/// streams of both models, `8 T H` each, which go to a file where their `max_memory` is short. In a group every rank
/// runs its waves and sends what it has seen of a layer to the first, which fits it, as one process would, for all.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerRefit {
    /// `lambda_e` as a multiple of a mean of diagonals of `sum_t s^2 g'^2 u u^T` over each expert's tokens.
    pub ridge: f64,
    /// Over which units that mean is taken.
    pub ridge_scale: RidgeScale,
    /// Times that every expert of a layer is fitted in turn.
    pub sweeps: usize,
    /// What a layer is fitted to.
    pub target: Target,
    /// How much each token counts, by the changed model's stream.
    pub tokens: TokenWeight,
}

impl Default for LayerRefit {
    fn default() -> Self {
        Self {
            ridge: 0.1,
            ridge_scale: RidgeScale::Layer,
            sweeps: 4,
            target: Target::Same,
            tokens: TokenWeight::Relative,
        }
    }
}

/// Result of a [`LayerRefit`].
#[derive(Clone, Debug, PartialEq)]
pub struct Refitted {
    /// Down matrices, in the indices of the changed model's checkpoint, with the columns that the changed model has.
    pub edits: Edits,
    /// What was achieved.
    pub layers: Vec<LayerFit>,
}

/// How well a layer was fitted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerFit {
    /// Decoder layer index.
    pub layer: usize,
    /// `sum_t s_t^2 |target - stream|^2` after the layer, before it was fitted.
    pub before: f64,
    /// The same afterwards.
    pub after: f64,
}

impl LayerRefit {
    /// Runs both models on `waves` and fits `student` to `teacher`.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for parameters out of range and models that are not of the same layers; those of
    /// [`Engine::run_layerwise`].
    pub fn fit(&self, teacher: &Model, student: &Model, waves: &[Wave], on_layer: OnProgress<'_>) -> Result<Refitted> {
        self.fit_in(&Alone, teacher, student, waves, None, on_layer)
    }

    /// As [`fit`](Self::fit), with finished layers kept in `store`, by the first rank of a group that runs the waves
    /// together. Overlays have no name by which a store could know them again: models under some keep nothing.
    fn fit_in(
        &self,
        group: &dyn Group,
        teacher: &Model,
        student: &Model,
        waves: &[Wave],
        store: Option<&Path>,
        on_layer: OnProgress<'_>,
    ) -> Result<Refitted> {
        check_ridge(self.ridge)?;
        if self.sweeps == 0 {
            return Err(Error::InvalidParameter { field: "sweeps", found: "0".into(), expected: "at least 1".into() });
        }
        if student.config().kept_sums_anywhere() {
            return Err(Error::InvalidParameter {
                field: "student",
                found: format!("`{}`, with norms or a map after the experts", student.config().model_type),
                expected: "a model whose layers are linear in the down projections; refit each expert by itself".into(),
            });
        }
        let shape = |model: &Model| {
            let config = model.config();
            let moe: Vec<usize> = (0..config.layers.len()).filter(|&l| config.moe(l).is_some()).collect();
            (config.hidden_size, config.layers.len(), moe)
        };
        if shape(teacher) != shape(student) {
            return Err(Error::InvalidParameter {
                field: "student (hidden size, layers, MoE layers)",
                found: format!("{:?}", shape(student)),
                expected: format!("the teacher's {:?}", shape(teacher)),
            });
        }
        let (_, _, moe_layers) = shape(student);
        let plain = |model: &Model| model.expert_overlay().is_none() && model.routing_overlay().is_none();
        let store = store.filter(|_| plain(teacher) && plain(student) && group.rank() == 0);
        let models = [teacher, student].map(Model::identity);
        let all = PrunePlan::keep_all(student.checkpoint().shape(), student.checkpoint().fingerprint());
        let finished = FinishedLayers::open(store, &self.recipe(), &all, &models, waves)?;
        let teacher = Engine::new(teacher, EngineOptions::default());
        let student = Engine::new(student, EngineOptions::default());
        let own: Vec<Wave> = waves.iter().skip(group.rank()).step_by(group.size()).cloned().collect();
        let idle = own.is_empty() && !waves.is_empty();
        let mut sweep = match idle {
            true => None,
            false => Some(student.layer_sweep(&own)?),
        };
        let source = match self.target {
            Target::Layer if !idle => Source::Stream(Box::new(teacher.layer_sweep(&own)?)),
            _ => Source::Layer(&teacher),
        };
        let mut visitor = Visitor {
            refit: *self,
            group,
            waves: waves.iter().map(Wave::tokens).collect(),
            source,
            finished,
            layer: Layer::default(),
            fits: Vec::new(),
            edits: Edits::new(),
            done: None,
        };
        for layer in &moe_layers {
            if let Source::Stream(teacher) = &mut visitor.source {
                teacher.step(&mut Unchanged)?;
            }
            match &mut sweep {
                Some(sweep) => drop(sweep.step(&mut visitor)?),
                // Nothing to run, but all ranks go from layer to layer together.
                None => drop(visitor.end_layer(*layer)?),
            }
            on_layer(visitor.fits.len(), moe_layers.len());
        }
        let mut edits = visitor.edits;
        edits.recipe = self.recipe();
        Ok(Refitted { edits, layers: visitor.fits })
    }
}

impl Repair for LayerRefit {
    fn recipe(&self) -> Value {
        json!({ "repair": "layer_refit", "options": self })
    }

    fn needs(&self) -> RepairNeeds {
        RepairNeeds { pruned: true, own_weights: true, ..RepairNeeds::default() }
    }

    fn repair(&self, request: &RepairRequest<'_>, on_progress: OnProgress<'_>) -> Result<Edits> {
        check_shares(self.needs(), request)?;
        let RepairRequest { model, waves, store, group, .. } = *request;
        let fitted = request.pruned().and_then(|pruned| self.fit_in(group, model, pruned, waves, store, on_progress));
        Ok(group.agree(fitted)?.edits)
    }
}

/// Where targets come from.
enum Source<'a> {
    /// The teacher's own sweep, one layer ahead of the student's.
    Stream(Box<LayerSweep<'a>>),
    Layer(&'a Engine<'a>),
}

/// The tokens of one layer.
#[derive(Default)]
struct Layer {
    /// Tokens of the waves before the one at hand.
    offset: usize,
    /// `s (target - stream) / residual factor` of all tokens `[T, H]`.
    residual: Vec<f32>,
    /// Its factor.
    factor: f64,
    experts: Vec<Expert>,
}

impl Layer {
    /// For the first rank of a group.
    fn to_message(&self) -> Vec<u8> {
        let mut parts = vec![self.factor.to_le_bytes().to_vec(), bytemuck::cast_slice(&self.residual).to_vec()];
        for Expert { expert, rows, units, down, width } in &self.experts {
            let numbers = [*expert as u64, *width as u64];
            let of_expert: [&[u8]; 4] = [
                bytemuck::cast_slice(&numbers),
                bytemuck::cast_slice(rows),
                bytemuck::cast_slice(units),
                bytemuck::cast_slice(down),
            ];
            parts.push(pack(of_expert));
        }
        pack(parts.iter().map(Vec::as_slice))
    }

    /// The tokens that the ranks have sent, in the order of all `waves`, whose tokens are counted: of N ranks the first
    /// has the waves 0, N, 2 N, …
    fn of_ranks(messages: &[Vec<u8>], waves: &[usize]) -> Result<Self> {
        let bad = || moe_checkpoint::Error::Group("found tokens of a layer from another rank that are cut off".into());
        let ranks = messages.len();
        let tokens: usize = waves.iter().sum();
        // Of each rank, where its tokens stand among all.
        let mut places = vec![Vec::new(); ranks];
        let mut begin = 0;
        for (wave, tokens) in waves.iter().enumerate() {
            places[wave % ranks].extend(begin..begin + tokens);
            begin += tokens;
        }
        let mut all = Self { offset: tokens, ..Self::default() };
        let mut experts: BTreeMap<usize, Expert> = BTreeMap::new();
        for (message, places) in messages.iter().zip(&places) {
            let parts = unpack(message)?;
            let [factor, residual, of_experts @ ..] = &parts[..] else { return Err(bad().into()) };
            if places.is_empty() {
                continue;
            }
            all.factor = f64::from_le_bytes(factor.as_chunks().0.first().copied().ok_or_else(bad)?);
            let residual: Vec<f32> = bytemuck::pod_collect_to_vec(residual);
            let hidden = residual.len() / places.len();
            all.residual.resize(tokens * hidden, 0.0);
            for (row, place) in residual.chunks_exact(hidden.max(1)).zip(places) {
                all.residual[place * hidden..(place + 1) * hidden].copy_from_slice(row);
            }
            for part in of_experts {
                let [numbers, rows, units, down] = unpack(part)?[..] else { return Err(bad().into()) };
                let [expert, width] = bytemuck::pod_collect_to_vec::<u8, u64>(numbers)[..] else {
                    return Err(bad().into());
                };
                let rows: Vec<u32> = bytemuck::pod_collect_to_vec(rows);
                let rows = rows.iter().map(|row| places.get(*row as usize).map(|place| *place as u32));
                let (expert, width) = (expert as usize, width as usize);
                let into = experts.entry(expert).or_insert_with(|| {
                    let down = bytemuck::pod_collect_to_vec(down);
                    Expert { expert, rows: Vec::new(), units: Vec::new(), down, width }
                });
                into.rows.extend(rows.collect::<Option<Vec<u32>>>().ok_or_else(bad)?);
                into.units.extend(bytemuck::pod_collect_to_vec::<u8, f32>(units));
            }
        }
        all.experts = experts.into_values().map(Expert::in_order).collect();
        Ok(all)
    }
}

/// One expert and all its tokens.
struct Expert {
    expert: usize,
    /// Tokens, over all waves.
    rows: Vec<u32>,
    /// `s` times routing weight times units of each `[n, K]`.
    units: Vec<f32>,
    /// `[H, K]`.
    down: Vec<f32>,
    width: usize,
}

impl Expert {
    /// With its tokens in ascending order.
    fn in_order(self) -> Self {
        let mut order: Vec<usize> = (0..self.rows.len()).collect();
        order.sort_by_key(|at| self.rows[*at]);
        let rows = order.iter().map(|at| self.rows[*at]).collect();
        let units = order.iter().flat_map(|at| &self.units[at * self.width..(at + 1) * self.width]).copied().collect();
        Self { rows, units, ..self }
    }
}

struct Visitor<'a> {
    refit: LayerRefit,
    group: &'a dyn Group,
    /// Tokens of every wave, of which this rank runs every Nth.
    waves: Vec<usize>,
    source: Source<'a>,
    finished: FinishedLayers,
    layer: Layer,
    fits: Vec<LayerFit>,
    edits: Edits,
    /// The layer at hand, and what an earlier run has fitted in it.
    done: Option<(usize, Option<Edits>)>,
}

impl Visitor<'_> {
    /// Whether an earlier run has done this layer. The first rank knows; all ranks ask once in a layer.
    fn is_done(&mut self, layer: usize) -> moe_core::Result<bool> {
        if self.done.as_ref().is_none_or(|(at, _)| *at != layer) {
            let edits = self.finished.load(layer).and_then(|edits| of_first(self.group, edits));
            self.done = Some((layer, edits.map_err(moe_core::Error::observer)?));
        }
        Ok(self.done.as_ref().is_some_and(|(_, edits)| edits.is_some()))
    }

    /// The tokens of all ranks, at the first.
    fn gathered(&self, own: Layer) -> Result<Layer> {
        if self.group.size() == 1 {
            return Ok(own);
        }
        let messages = self.group.gather(0, own.to_message())?;
        match messages.is_empty() {
            true => Ok(Layer::default()),
            false => Layer::of_ranks(&messages, &self.waves),
        }
    }

    /// Fits a layer to what all its tokens show.
    fn fitted(&self, layer: usize, seen: Layer) -> Result<Edits> {
        let Layer { offset, mut residual, factor, experts } = seen;
        let hidden = residual.len() / offset.max(1);
        let before = squares(&residual) * factor * factor;
        let downs = descend(&mut residual, hidden, &experts, self.refit);
        let after = squares(&residual) * factor * factor;
        let mut edits = edits_by(json!({ "before": before.to_bits(), "after": after.to_bits() }));
        for (expert, down) in experts.iter().zip(downs) {
            let Some(down) = down else { continue };
            edits.set_expert(layer, expert.expert, ExpertEdit { down: Some(down), down_bias: None });
        }
        self.finished.save(layer, &edits)?;
        Ok(edits)
    }

    fn fit_layer(&mut self, layer: usize) -> Result<Edits> {
        let seen = std::mem::take(&mut self.layer);
        let seen = self.gathered(seen)?;
        let fitted = match self.group.rank() {
            0 => Some(self.fitted(layer, seen)?),
            _ => None,
        };
        of_first(self.group, fitted)?.ok_or_else(|| Error::invalid_edits("found none of the first rank"))
    }
}

impl Observer for Visitor<'_> {
    fn needs(&self) -> Signals {
        Signals::UNITS | Signals::STREAMS
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        let units = trace.units.expect("asked for");
        let width = units.dims()[1];
        if width == 0 || self.is_done(trace.layer)? {
            return Ok(());
        }
        let experts = &mut self.layer.experts;
        let at = match experts.binary_search_by_key(&trace.expert, |expert| expert.expert) {
            Ok(at) => at,
            Err(at) => {
                let down = host::into_vec(trace.expert_weights.down.to_tensor());
                let (rows, units) = (Vec::new(), Vec::new());
                experts.insert(at, Expert { expert: trace.expert, rows, units, down, width });
                at
            }
        };
        let expert = &mut experts[at];
        expert.rows.extend(trace.rows.iter().map(|t| self.layer.offset as u32 + t));
        let view = HostView::new(units);
        let rows = view.as_slice().chunks_exact(width).zip(trace.routing_weights);
        expert.units.extend(rows.flat_map(|(row, g)| row.iter().map(move |u| g * u)));
        Ok(())
    }

    fn end_wave(&mut self, wave: &WaveInfo) -> moe_core::Result<()> {
        self.layer.offset += wave.tokens;
        Ok(())
    }

    fn output(&mut self, output: &LayerOutput<'_>) -> moe_core::Result<()> {
        if self.is_done(output.layer)? {
            return Ok(());
        }
        let target = match &mut self.source {
            Source::Stream(teacher) => teacher.stream(output.position)?,
            Source::Layer(teacher) => teacher.feed_forward(output.layer, output.half(), &mut Nobody)?,
        };
        let residual = (target - output.output.clone()).mul_scalar(1.0 / output.residual_factor);
        let factors = self.refit.tokens.factors(output);
        let layer = &mut self.layer;
        let (view, hidden) = (HostView::new(&residual), residual.dims()[1]);
        let rows = view.as_slice().chunks_exact(hidden).zip(&factors);
        layer.residual.extend(rows.flat_map(|(row, s)| row.iter().map(move |r| s * r)));
        layer.factor = f64::from(output.residual_factor);
        for expert in &mut layer.experts {
            let first = expert.rows.partition_point(|row| (*row as usize) < layer.offset);
            let units = expert.units[first * expert.width..].chunks_exact_mut(expert.width);
            for (row, units) in expert.rows[first..].iter().zip(units) {
                let factor = factors[*row as usize - layer.offset];
                units.iter_mut().for_each(|u| *u *= factor);
            }
        }
        Ok(())
    }
}

impl LayerVisitor for Visitor<'_> {
    fn end_layer(&mut self, layer: usize) -> moe_core::Result<LayerChange> {
        let edits = match self.is_done(layer)? {
            true => {
                self.layer = Layer::default();
                self.done.as_mut().and_then(|(_, edits)| edits.take())
            }
            false => None,
        };
        let edits = match edits {
            Some(edits) => edits,
            None => self.fit_layer(layer).map_err(moe_core::Error::observer)?,
        };
        let bits = |name: &str| f64::from_bits(edits.recipe[name].as_u64().unwrap_or_default());
        self.fits.push(LayerFit { layer, before: bits("before"), after: bits("after") });
        let downs = edits.experts().filter_map(|((_, expert), edit)| Some((expert, edit.down.clone()?)));
        let fitted = Downs(downs.collect());
        self.edits.extend(edits);
        Ok(LayerChange { experts: Some(Arc::new(fitted)), routing: None })
    }
}

/// Fitted down matrices of one layer, for the layers after it.
#[derive(Default)]
struct Downs(BTreeMap<usize, Vec<f32>>);

impl ExpertOverlay for Downs {
    fn apply(&self, _: usize, expert: usize, mut weights: ExpertWeights) -> moe_core::Result<ExpertWeights> {
        if let Some(down) = self.0.get(&expert) {
            weights.down.clone_from(down);
        }
        Ok(weights)
    }
}

/// The fitted matrices; nothing for experts whose units are all zero. The residual becomes what is left.
fn descend(residual: &mut [f32], hidden: usize, experts: &[Expert], refit: LayerRefit) -> Vec<Option<Vec<f32>>> {
    let grams: Vec<Mat<f64>> = experts
        .par_iter()
        .map(|expert| {
            let units = Rows { values: &expert.units, columns: expert.width };
            let all: Vec<u32> = (0..expert.width as u32).collect();
            let mut gram = Mat::zeros(expert.width, expert.width);
            add_gram(&mut gram, units, units, &all, |_| 1.0);
            gram
        })
        .collect();
    let lambdas = refit.ridge_scale.lambdas(refit.ridge, &grams.iter().map(diagonal).collect::<Vec<_>>());
    let normals: Vec<Option<Normal>> =
        grams.into_par_iter().zip(lambdas).map(|(gram, lambda)| Normal::new(gram, lambda)).collect();
    // how far each matrix has moved: W' - W
    let mut moved: Vec<Mat<f64>> = experts.iter().map(|expert| Mat::zeros(hidden, expert.width)).collect();
    for _ in 0..refit.sweeps {
        for ((expert, normal), moved) in experts.iter().zip(&normals).zip(&mut moved) {
            let Some(normal) = normal else { continue };
            let units = Rows { values: &expert.units, columns: expert.width };
            // step (A + lambda I) = R^T U - lambda (W' - W)
            let mut c = cross(Rows { values: residual, columns: hidden }, &expert.rows, units);
            c -= faer::Scale(normal.lambda) * &*moved;
            let step = normal.solve(c.as_ref());
            subtract(residual, hidden, &expert.rows, units, step.as_ref());
            *moved += step;
        }
    }
    let fitted = experts.par_iter().zip(normals).zip(moved).map(|((expert, normal), moved)| {
        normal?;
        let down = Rows { values: &expert.down, columns: expert.width }.to_mat();
        Some(to_rows((down + moved).as_ref()))
    });
    fitted.collect()
}

/// Lets the teacher pass.
struct Unchanged;

impl Observer for Unchanged {
    fn needs(&self) -> Signals {
        Signals::NONE
    }
}

impl LayerVisitor for Unchanged {
    fn end_layer(&mut self, _: usize) -> moe_core::Result<LayerChange> {
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

    fn expert(index: usize, rows: Vec<u32>, width: usize, hidden: usize) -> Expert {
        let units = values(rows.len() * width, 10 + index);
        Expert { expert: index, rows, units, down: values(hidden * width, 20 + index), width }
    }

    /// Two experts that share tokens find the matrices that made the residual, and stay where there is nothing to make
    /// good.
    #[test]
    fn descent_finds_what_was_taken_away() {
        let (tokens, hidden) = (200u32, 4);
        let experts = [
            expert(0, (0..150).collect(), 3, hidden),
            expert(1, (100..tokens).collect(), 5, hidden),
            Expert { units: vec![0.0; 2], ..expert(2, vec![7], 2, hidden) },
        ];
        let wanted: Vec<Vec<f32>> = (0..2).map(|e| values(hidden * experts[e].width, 40 + e)).collect();
        let mut residual = vec![0.0; tokens as usize * hidden];
        for (expert, wanted) in experts.iter().zip(&wanted) {
            let change = Mat::from_fn(hidden, expert.width, |h, j| {
                f64::from(expert.down[h * expert.width + j]) - f64::from(wanted[h * expert.width + j])
            });
            let units = Rows { values: &expert.units, columns: expert.width };
            subtract(&mut residual, hidden, &expert.rows, units, change.as_ref());
        }
        let (start, refit) = (residual.clone(), LayerRefit { ridge: 1e-9, sweeps: 12, ..LayerRefit::default() });
        let found = descend(&mut residual, hidden, &experts, refit);
        for (found, wanted) in found.iter().zip(&wanted) {
            let found = found.as_ref().unwrap();
            assert!(found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-3), "{found:?} {wanted:?}");
        }
        assert_eq!(found[2], None);
        assert!(squares(&residual) < 1e-6 * squares(&start));

        let mut one = start.clone();
        let again = descend(&mut one, hidden, &experts, LayerRefit { sweeps: 1, ..refit });
        assert!(squares(&one) > squares(&residual) && squares(&one) < squares(&start));
        assert_eq!(again, descend(&mut start.clone(), hidden, &experts, LayerRefit { sweeps: 1, ..refit }));

        let mut none = vec![0.0; tokens as usize * hidden];
        let same = descend(&mut none, hidden, &experts, LayerRefit::default());
        assert_eq!(same[0].as_ref(), Some(&experts[0].down));
    }
}

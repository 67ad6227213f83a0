//! What to do about a routing that is no longer that of the model: the best static factor of every expert, and how many
//! pieces a token goes to.

use std::sync::Arc;

use burn::tensor::Tensor;
use moe_checkpoint::{Checkpoint, LayerRole, Mtp, Role};
use moe_core::data::Wave;
use moe_core::evaluate::divergence;
use moe_core::host::{self, HostView};
use moe_core::router::Router;
use moe_core::trace::{ExpertTrace, LayerTrace, Nobody, Observer, Signals, WaveInfo};
use moe_core::{CrossEntropy, Engine, EngineOptions, Error as CoreError, Model, TeacherLogits};

use super::{FineGrained, PieceMap};
use crate::{EditSource, Error, PruneForm, PruneOptions, PrunePlan, Result};

/// What an expert's factor makes its pieces give.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScaleFit {
    /// What the expert gives, as if its pieces together gave the same: `sum g g' |f|^2 / sum g'^2 |f|^2`.
    #[default]
    Whole,
    /// What the expert gives, by what is left of it: `sum g g' f . f' / sum g'^2 |f'|^2` with `f'` the output of its
    /// kept units (edited ones, if there are edits).
    Kept,
}

/// Watches the model before the export and sums up, over the tokens of every expert, what its best static factor
/// follows from, for several ways to cut at once: the least squares of `g f - s g' f'`, where `g` is the routing weight
/// of the expert, `f` its output, and `g' f'` what its pieces give with a factor of 1. With `n` pieces left, of which
/// some are selected with weights `w`, `g'` is the factor of [`PieceMap`] times the sum of `w` over `n`.
///
/// Tokens that are routed to pieces of an expert, but were not to the expert, do not take part: its output there is
/// unknown.
pub struct ScaleCalibration<'a> {
    plan: &'a PrunePlan,
    edits: Option<&'a dyn EditSource>,
    fit: ScaleFit,
    candidates: Vec<Candidate>,
    /// Of the last layer seen: experts per token, selected experts `[T, k]`.
    selected: (usize, Vec<u32>),
}

struct Candidate {
    map: PieceMap,
    router: Router,
    /// Correction bias of the pieces of every MoE layer.
    biases: Vec<Option<Vec<f32>>>,
    /// Per MoE layer and expert: the numerator and the denominator.
    sums: Vec<Vec<[f64; 2]>>,
    /// Of the last layer seen: `g'` of the selected experts `[T, k]`.
    weights: Vec<f32>,
}

impl<'a> ScaleCalibration<'a> {
    /// Nothing seen yet. One result per way to cut, in the order given.
    ///
    /// # Errors
    /// Those of [`FineGrained::map`], and [`Error::InvalidEdits`].
    pub fn new(
        from: &Checkpoint,
        plan: &'a PrunePlan,
        edits: Option<&'a dyn EditSource>,
        fit: ScaleFit,
        candidates: &[FineGrained<'_>],
    ) -> Result<Self> {
        if let Some(edits) = edits {
            plan.validate_edits(edits)?;
        }
        let candidate = |how: &FineGrained<'_>| {
            let map = how.map(plan, from)?;
            let router = Router::new(&map.routing)?;
            let mut biases = Vec::with_capacity(map.layers.len());
            for layer in &map.layers {
                router.check(layer.pieces.len())?;
                biases.push(match map.routing.correction_bias() {
                    false => None,
                    true => {
                        let bias = from.read_f32(Role::Layer(layer.layer, LayerRole::CorrectionBias))?;
                        let mut bias = layer.expand(&bias);
                        bias.iter_mut().for_each(|value| *value *= map.correction_factor);
                        Some(bias)
                    }
                });
            }
            let sums = map.layers.iter().map(|layer| vec![[0.0; 2]; layer.counts.len()]).collect();
            Ok(Candidate { map, router, biases, sums, weights: Vec::new() })
        };
        let candidates = candidates.iter().map(candidate).collect::<Result<_>>()?;
        Ok(Self { plan, edits, fit, candidates, selected: (0, Vec::new()) })
    }

    /// The factors that [`FineGrained::scales`] takes, `[MoE layer][expert]`, of one way to cut. 1 where no token says
    /// otherwise.
    pub fn scales(&self, candidate: usize) -> Vec<Vec<f32>> {
        let scale = |[over, under]: &[f64; 2]| if *under > 0.0 { (over / under) as f32 } else { 1.0 };
        let sums = &self.candidates[candidate].sums;
        sums.iter().map(|experts| experts.iter().map(scale).collect()).collect()
    }

    /// The one factor for all experts of every layer, from the same sums: `[MoE layer][expert]`.
    pub fn layer_scales(&self, candidate: usize) -> Vec<Vec<f32>> {
        let scale = |experts: &Vec<[f64; 2]>| {
            let (over, under) = experts.iter().fold((0.0, 0.0), |(a, b), [over, under]| (a + over, b + under));
            let scale = if under > 0.0 { (over / under) as f32 } else { 1.0 };
            vec![scale; experts.len()]
        };
        self.candidates[candidate].sums.iter().map(scale).collect()
    }
}

impl Candidate {
    /// Routes a layer to the pieces.
    fn route(&mut self, position: usize, trace: &LayerTrace<'_>) {
        let layer = &self.map.layers[position];
        let pieces = layer.pieces.len();
        let routed = self.router.route(&layer.expand(trace.logits), pieces, self.biases[position].as_deref());
        let mut sums = vec![0.0f32; trace.experts];
        self.weights.clear();
        let tokens = routed.selected.chunks(routed.top_k).zip(routed.weights.chunks(routed.top_k));
        for ((selected, weights), experts) in tokens.zip(trace.selected.chunks(trace.top_k)) {
            sums.fill(0.0);
            for (piece, weight) in selected.iter().zip(weights) {
                sums[layer.pieces[*piece as usize].expert] += weight;
            }
            self.weights.extend(experts.iter().map(|expert| {
                let expert = *expert as usize;
                self.map.factor * sums[expert] / layer.counts[expert].max(1) as f32
            }));
        }
    }
}

impl Observer for ScaleCalibration<'_> {
    fn needs(&self) -> Signals {
        Signals { routing: true, outputs: true, units: self.fit == ScaleFit::Kept, ..Signals::NONE }
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        let position = self.position(trace.layer)?;
        self.selected = (trace.top_k, trace.selected.to_vec());
        self.candidates.iter_mut().for_each(|candidate| candidate.route(position, trace));
        Ok(())
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        let (position, expert) = (self.position(trace.layer)?, trace.expert);
        let (Some(output), rows) = (trace.output, trace.rows.len()) else { return Ok(()) };
        let whole = HostView::new(output);
        let kept = match self.fit {
            ScaleFit::Whole => None,
            ScaleFit::Kept => Some(HostView::new(&self.kept_output(trace).map_err(CoreError::observer)?)),
        };
        let kept = kept.as_ref().unwrap_or(&whole);
        let hidden = whole.as_slice().len() / rows.max(1);
        let (top_k, selected) = &self.selected;
        let values = whole.as_slice().chunks_exact(hidden).zip(kept.as_slice().chunks_exact(hidden));
        for ((row, weight), (f, f_kept)) in trace.rows.iter().zip(trace.routing_weights).zip(values) {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            let (over, under) = (dot(f, f_kept), dot(f_kept, f_kept));
            let slots = *row as usize * top_k..(*row as usize + 1) * top_k;
            let Some(slot) = slots.clone().find(|slot| selected[*slot] as usize == expert) else { continue };
            for candidate in &mut self.candidates {
                let after = f64::from(candidate.weights[slot]);
                let sums = &mut candidate.sums[position][expert];
                sums[0] += f64::from(*weight) * after * over;
                sums[1] += after * after * under;
            }
        }
        Ok(())
    }

    fn end_wave(&mut self, _: &WaveInfo) -> moe_core::Result<()> {
        self.selected = (0, Vec::new());
        Ok(())
    }
}

impl ScaleCalibration<'_> {
    fn position(&self, layer: usize) -> moe_core::Result<usize> {
        self.plan.shape.position(layer).ok_or_else(|| {
            CoreError::observer(Error::invalid_plan(format!("the model has MoE layer {layer}, the plan has not")))
        })
    }

    /// What the kept units of an expert give `[n, H]`.
    fn kept_output(&self, trace: &ExpertTrace<'_>) -> Result<Tensor<2>> {
        let Some(units) = trace.units else {
            return Err(Error::invalid_plan("units were asked for, but not shown"));
        };
        let [rows, width] = units.dims();
        let kept = self.plan.layer(trace.layer).map_or(&[][..], |layer| &layer.experts[trace.expert]);
        let edit = match self.edits {
            Some(edits) => edits.expert(trace.layer, trace.expert)?.unwrap_or_default(),
            None => Default::default(),
        };
        let values = HostView::new(units);
        let device = units.device();
        let output = match edit.down {
            Some(down) => {
                // [n, kept] [kept, H]
                let columns = kept.len();
                let hidden = self.plan.shape.hidden_size;
                let chosen = values.as_slice().chunks_exact(width);
                let chosen = chosen.flat_map(|row| kept.iter().map(|unit| row[*unit as usize])).collect();
                if columns == 0 {
                    Tensor::zeros([rows, hidden], &device)
                } else {
                    let down = host::from_vec(down, [hidden, columns], &device);
                    let output = host::from_vec(chosen, [rows, columns], &device).matmul(down.transpose());
                    match &trace.expert_weights.down_bias {
                        Some(bias) if edit.down_bias.is_none() => output + bias.clone().unsqueeze_dim::<2>(0),
                        _ => output,
                    }
                }
            }
            None => {
                let mut masked = vec![0.0; rows * width];
                for (into, row) in masked.chunks_exact_mut(width).zip(values.as_slice().chunks_exact(width)) {
                    kept.iter().for_each(|unit| into[*unit as usize] = row[*unit as usize]);
                }
                trace.expert_weights.output(&host::from_vec(masked, [rows, width], &device))
            }
        };
        Ok(match edit.down_bias {
            Some(bias) => {
                let len = bias.len();
                output + host::from_vec::<1>(bias, [len], &device).unsqueeze_dim::<2>(0)
            }
            None => output,
        })
    }
}

/// One number of pieces per token, tried.
#[derive(Clone, Debug, PartialEq)]
pub struct Trial {
    /// Pieces per token.
    pub top_k: usize,
    /// Factors, calibrated or given, `[MoE layer][expert]`.
    pub scales: Vec<Vec<f32>>,
    /// Mean cross-entropy per predicted token of the pruned model, in nats.
    pub loss: f64,
    /// Mean divergence of its next-token distributions from those of the model, in nats.
    pub divergence: f64,
}

/// What [`FineGrained::try_top_k`] works on.
#[derive(Clone, Copy)]
pub struct TrialOptions<'a> {
    /// Numbers of pieces per token to try.
    pub top_k: &'a [usize],
    /// What factors make the pieces give; `None` leaves them as they are in [`FineGrained::scales`].
    pub fit: Option<ScaleFit>,
    /// Weights that a repair changed.
    pub edits: Option<&'a Arc<dyn EditSource>>,
    /// Data that factors are calibrated on.
    pub calibration: &'a [Wave],
    /// Data that the pruned models are compared on.
    pub comparison: &'a [Wave],
    /// Likeliest tokens per position that the divergence is of; see [`TeacherLogits`].
    pub teacher_tokens: usize,
}

impl FineGrained<'_> {
    /// Calibrates the factors for several numbers of pieces per token in one pass, then runs each model as it would be
    /// written: what to choose [`FineGrained::top_k`] and [`FineGrained::scales`] by. In the order given.
    ///
    /// # Errors
    /// Those of [`PrunePlan::on`] and of running the models.
    pub fn try_top_k(&self, model: &Model, plan: &PrunePlan, options: &TrialOptions<'_>) -> Result<Vec<Trial>> {
        let from = model.checkpoint();
        let candidates: Vec<FineGrained<'_>> =
            options.top_k.iter().map(|top_k| Self { top_k: Some(*top_k), scales: None, ..*self }).collect();
        let fit = options.fit.unwrap_or_default();
        let mut sums = ScaleCalibration::new(from, plan, options.edits.map(|edits| &**edits), fit, &candidates)?;
        let engine = Engine::new(model, EngineOptions::default());
        for wave in options.calibration.iter().filter(|_| options.fit.is_some()) {
            engine.run(wave, &mut sums)?;
        }
        let teacher = TeacherLogits::record(&engine, options.comparison, options.teacher_tokens)?;
        let mut trials = Vec::with_capacity(candidates.len());
        for (index, candidate) in candidates.iter().enumerate() {
            let scales = match (options.fit, self.scales) {
                (None, Some(given)) => given.to_vec(),
                // Nothing was summed up: all are 1.
                _ => sums.scales(index),
            };
            let how = FineGrained { scales: Some(&scales), ..*candidate };
            // Layers that predict further tokens are not run.
            let export = PruneOptions {
                edits: options.edits.cloned(),
                mtp: Some(Mtp::Drop),
                ..PruneOptions::new(PruneForm::FineGrained(how))
            };
            let pruned = plan.on(from, &export)?;
            let pruned_model = model.like(pruned.model().clone())?;
            let engine = Engine::new(&pruned_model, EngineOptions::default());
            let (mut loss, mut tokens) = (0.0, 0);
            for wave in options.comparison {
                let report = engine.run_with(wave, &mut CrossEntropy, &mut Nobody)?;
                loss += report.loss.unwrap_or(0.0);
                tokens += report.loss_tokens;
            }
            let divergence = divergence(&pruned_model, &teacher, options.comparison)?;
            let (top_k, loss) = (options.top_k[index], loss / tokens.max(1) as f64);
            trials.push(Trial { top_k, scales, loss, divergence });
        }
        Ok(trials)
    }
}

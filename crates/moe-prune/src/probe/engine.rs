//! A probe that runs a model.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::Tensor;
use moe_core::data::Wave;
use moe_core::host::HostView;
use moe_core::kernels::divergence::Distribution;
use moe_core::kernels::loss::Losses;
use moe_core::trace::{Nobody, Observer, RouterGradients, Signals, WaveInfo};
use moe_core::{
    Distillation, Engine, ExpertGains, LayerChange, LayerOutput, LayerSweep, LayerVisitor, Model, Objective,
    RemoveExperts, TeacherLogits,
};
use rayon::prelude::*;

use super::{Distortion, ModelProbe, PlanOverlay};
use crate::plan::LayerKept;
use crate::{Error, Result};

/// How an [`EngineProbe`] works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeOptions {
    /// Tokens of the full model's distribution that are kept per position; the others count as one, which makes
    /// divergences lower bounds and overlaps upper bounds. By default the whole vocabulary; RCO keeps 20.
    pub top: usize,
    /// Waves of one batch of [`ModelProbe::gain_gradient`]; by default all. Batch `i` takes the `i`-th so many, around
    /// and around.
    pub batch_waves: usize,
}

impl Default for ProbeOptions {
    fn default() -> Self {
        Self { top: usize::MAX, batch_waves: usize::MAX }
    }
}

/// Answers from a real model and some waves of data. Changes come as overlays, so that no checkpoint is written.
///
/// A distortion costs a forward sweep of all waves, a gradient a forward and a backward sweep of a batch. The errors of
/// a layer cost the way to that layer once, and its feed-forward half once per candidate; asking for layers in
/// ascending order goes on from layer to layer until something is settled, which starts the way anew.
pub struct EngineProbe<'e> {
    engine: &'e Engine<'e>,
    waves: Vec<Wave>,
    teacher: TeacherLogits,
    options: ProbeOptions,
    settled: BTreeMap<usize, Vec<u32>>,
    sweep: Option<LayerSweep<'e>>,
}

impl std::fmt::Debug for EngineProbe<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { waves, options, settled, .. } = self;
        f.debug_struct("EngineProbe")
            .field("waves", &waves.len())
            .field("options", options)
            .field("settled", settled)
            .finish_non_exhaustive()
    }
}

impl<'e> EngineProbe<'e> {
    /// Runs the full model on the waves and remembers what it predicts: `8 top + 4` bytes per predicted token
    /// ([`TeacherLogits::bytes`]).
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] if nothing is predicted, if a batch has no waves, or for a model that is seen
    /// through overlays already; those of the engine.
    pub fn new(engine: &'e Engine<'e>, waves: Vec<Wave>, options: ProbeOptions) -> Result<Self> {
        let invalid = |field, found: &str, expected: &str| {
            Err(Error::InvalidParameter { field, found: found.into(), expected: expected.into() })
        };
        if waves.iter().map(Wave::loss_tokens).sum::<usize>() == 0 {
            return invalid("waves", "no predicted token", "at least one");
        }
        if options.batch_waves == 0 {
            return invalid("batch_waves", "0", "at least 1");
        }
        if engine.model().expert_overlay().is_some() || engine.model().routing_overlay().is_some() {
            return invalid("model", "one that is seen through overlays", "the full model");
        }
        let teacher = TeacherLogits::record(engine, &waves, options.top)?;
        Ok(Self { engine, waves, teacher, options, settled: BTreeMap::new(), sweep: None })
    }

    /// How far a model is from the full one: any model with its vocabulary, quantized or pruned or both, as it is.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn distortion_of(&self, model: &Model) -> Result<Distortion> {
        let engine = Engine::new(model, self.engine.options().clone());
        let mut comparison = Comparison::new(&self.teacher);
        let (mut sum, mut tokens, mut worst) = (0.0, 0, f64::NEG_INFINITY);
        for wave in &self.waves {
            let report = engine.run_with(wave, &mut comparison, &mut Nobody)?;
            sum += report.loss.unwrap_or(0.0);
            tokens += report.loss_tokens;
            for (sequence, loss) in wave.sequences.iter().zip(report.sequence_losses.unwrap_or_default()) {
                if sequence.loss_tokens() > 0 {
                    worst = worst.max(loss / sequence.loss_tokens() as f64);
                }
            }
        }
        Ok(Distortion { mean: sum / tokens as f64, worst, overlap: comparison.overlap / tokens as f64 })
    }

    /// MoE layers in ascending order.
    fn moe_layers(&self) -> Vec<usize> {
        self.engine.model().checkpoint().shape().layers.iter().map(|layer| layer.layer).collect()
    }

    /// The waves of a batch.
    fn batch(&self, batch: usize) -> &[Wave] {
        let size = self.options.batch_waves.min(self.waves.len());
        let batches = self.waves.len().div_ceil(size);
        let start = batch % batches * size;
        &self.waves[start..(start + size).min(self.waves.len())]
    }
}

impl ModelProbe for EngineProbe<'_> {
    fn distortion(&mut self, kept: &[LayerKept]) -> Result<Distortion> {
        let overlay = PlanOverlay::of_layers(kept, self.engine.model().config().routing.top_k);
        self.distortion_of(&overlay.of(self.engine.model())?)
    }

    fn gain_gradient(&mut self, gains: &[Vec<f32>], batch: usize) -> Result<(f64, Vec<Vec<f32>>)> {
        let layers = self.moe_layers();
        if gains.len() != layers.len() {
            let (found, expected) = (format!("{} layers", gains.len()), format!("{}", layers.len()));
            return Err(Error::InvalidParameter { field: "gains", found, expected });
        }
        let overlay = layers
            .iter()
            .zip(gains)
            .fold(ExpertGains::new(), |overlay, (layer, gains)| overlay.set(*layer, gains.as_slice()));
        let model = self.engine.model().with_overlays(None, Some(Arc::new(overlay)))?;
        let engine = Engine::new(&model, self.engine.options().clone());
        let mut gradients = GainGradients { by_layer: BTreeMap::new() };
        let (mut sum, mut tokens) = (0.0, 0);
        for wave in self.batch(batch) {
            let report = engine.run_with(wave, &mut Distillation::new(&self.teacher), &mut gradients)?;
            sum += report.loss.unwrap_or(0.0);
            tokens += report.loss_tokens;
        }
        // A batch without a predicted token says nothing.
        let tokens = tokens.max(1) as f64;
        let of_layer = |(layer, gains): (&usize, &Vec<f32>)| match gradients.by_layer.get(layer) {
            Some(sums) => sums.iter().map(|sum| (sum / tokens) as f32).collect(),
            None => vec![0.0; gains.len()],
        };
        Ok((sum / tokens, layers.iter().zip(gains).map(of_layer).collect()))
    }

    fn layer_errors(&mut self, layer: usize, candidates: &[Vec<u32>]) -> Result<Vec<f64>> {
        if !self.moe_layers().contains(&layer) {
            let expected = format!("one of the MoE layers {:?}", self.moe_layers());
            return Err(Error::InvalidParameter { field: "layer", found: layer.to_string(), expected });
        }
        let passed = |sweep: &LayerSweep<'_>| sweep.next_moe_layer().is_none_or(|next| next > layer);
        let mut sweep = match self.sweep.take().filter(|sweep| !passed(sweep)) {
            Some(sweep) => sweep,
            None => self.engine.layer_sweep(&self.waves)?,
        };
        let mut visitor = ErrorsOf {
            engine: self.engine,
            layer,
            candidates,
            settled: &self.settled,
            errors: vec![0.0; candidates.len()],
        };
        while sweep.next_moe_layer().is_some_and(|next| next <= layer) {
            sweep.step(&mut visitor)?;
        }
        let errors = visitor.errors;
        self.sweep = Some(sweep);
        Ok(errors)
    }

    fn settle(&mut self, layer: usize, removed: &[u32]) -> Result<()> {
        self.settled.insert(layer, removed.to_vec());
        self.sweep = None;
        Ok(())
    }
}

/// Collects the gradients of gains over waves.
struct GainGradients {
    by_layer: BTreeMap<usize, Vec<f64>>,
}

impl Observer for GainGradients {
    fn needs(&self) -> Signals {
        Signals::ROUTER_GRADIENTS
    }

    fn router(&mut self, gradients: &RouterGradients<'_>) -> moe_core::Result<()> {
        let sums = self.by_layer.entry(gradients.layer).or_insert_with(|| vec![0.0; gradients.experts]);
        sums.iter_mut().zip(gradients.d_gains).for_each(|(sum, d)| *sum += d);
        Ok(())
    }
}

/// Measures candidates at one layer; earlier layers are as settled.
struct ErrorsOf<'a> {
    engine: &'a Engine<'a>,
    layer: usize,
    candidates: &'a [Vec<u32>],
    settled: &'a BTreeMap<usize, Vec<u32>>,
    errors: Vec<f64>,
}

fn without(layer: usize, removed: &[u32]) -> LayerChange {
    let removed = RemoveExperts::new().remove(layer, removed.iter().copied());
    LayerChange { experts: None, routing: Some(Arc::new(removed)) }
}

impl Observer for ErrorsOf<'_> {
    fn needs(&self) -> Signals {
        Signals::STREAMS
    }

    fn output(&mut self, output: &LayerOutput<'_>) -> moe_core::Result<()> {
        if output.layer != self.layer {
            return Ok(());
        }
        let full = HostView::new(output.output);
        for (error, candidate) in self.errors.iter_mut().zip(self.candidates) {
            if candidate.is_empty() {
                continue;
            }
            let change = without(self.layer, candidate);
            let changed = self.engine.feed_forward_changed(self.layer, output.half(), &change, &mut Nobody)?;
            let changed = HostView::new(&changed);
            let squared = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
            *error += full.as_slice().iter().zip(changed.as_slice()).map(squared).sum::<f64>().sqrt();
        }
        Ok(())
    }
}

impl LayerVisitor for ErrorsOf<'_> {
    fn end_layer(&mut self, layer: usize) -> moe_core::Result<LayerChange> {
        let settled = self.settled.get(&layer).filter(|removed| !removed.is_empty());
        Ok(settled.map_or_else(LayerChange::default, |removed| without(layer, removed)))
    }
}

/// The divergence, and the overlap on the way.
struct Comparison<'t> {
    teacher: &'t TeacherLogits,
    divergence: Distillation<'t>,
    wave: u64,
    at: usize,
    overlap: f64,
}

impl<'t> Comparison<'t> {
    fn new(teacher: &'t TeacherLogits) -> Self {
        Self { teacher, divergence: Distillation::new(teacher), wave: 0, at: 0, overlap: 0.0 }
    }
}

impl Objective for Comparison<'_> {
    fn begin_wave(&mut self, wave: &WaveInfo) -> moe_core::Result<()> {
        (self.wave, self.at) = (wave.id, 0);
        self.divergence.begin_wave(wave)
    }

    fn losses(&mut self, blocks: Vec<Tensor<2>>, targets: &[Option<u32>], gradient: bool) -> moe_core::Result<Losses> {
        let predicted = (0..targets.len()).filter(|row| targets[*row].is_some());
        let first = self.at;
        let rows: Vec<(usize, Distribution<'_>)> = predicted
            .enumerate()
            .filter_map(|(place, row)| Some((row, self.teacher.distribution(self.wave, first + place)?)))
            .collect();
        self.at += rows.len();
        let views: Vec<(HostView, usize)> = blocks.iter().map(|b| (HostView::new(b), b.dims()[1])).collect();
        let overlaps: Vec<f64> = rows
            .into_par_iter()
            .map(|(row, teacher)| {
                let piece =
                    |(view, width): &(HostView, usize)| view.as_slice()[row * width..(row + 1) * width].to_vec();
                overlap(views.iter().flat_map(piece).collect(), &teacher)
            })
            .collect();
        self.overlap += overlaps.iter().sum::<f64>();
        self.divergence.losses(blocks, targets, gradient)
    }
}

/// `sum_v min(p_v, q_v)` with `q = softmax(logits)`; tokens that the teacher does not list count as one.
fn overlap(logits: Vec<f32>, teacher: &Distribution<'_>) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut q: Vec<f64> = logits.into_iter().map(|z| f64::from(z - max).exp()).collect();
    let sum: f64 = q.iter().sum();
    let mut shared = 0.0;
    for (place, log_p) in teacher.log_probs.iter().enumerate() {
        let id = teacher.ids.map_or(place, |ids| ids[place] as usize);
        shared += f64::from(*log_p).exp().min(std::mem::take(&mut q[id]) / sum);
    }
    shared + f64::from(teacher.rest).exp().min(q.iter().sum::<f64>() / sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps() {
        let p = [0.5f32, 0.3, 0.2];
        let log_probs: Vec<f32> = p.iter().map(|p| p.ln()).collect();
        let all = Distribution { ids: None, log_probs: &log_probs, rest: f32::NEG_INFINITY };
        assert!((overlap(log_probs.clone(), &all) - 1.0).abs() < 1e-6);
        // q = 1/3 each: 1/3 + 0.3 + 0.2.
        assert!((overlap(vec![7.0; 3], &all) - (1.0 / 3.0 + 0.5)).abs() < 1e-6);
        let (ids, top) = ([1u32], [0.3f32.ln()]);
        let best = Distribution { ids: Some(&ids), log_probs: &top, rest: 0.7f32.ln() };
        assert!((overlap(vec![7.0; 3], &best) - (0.3 + 2.0 / 3.0)).abs() < 1e-6);
    }
}

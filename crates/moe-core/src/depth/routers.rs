//! Routers of layers, trained on paths (Dr.LLM).

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Tensor;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use super::{DepthRule, search::Rounds};
use crate::{
    Engine, EngineOptions, Model,
    data::Wave,
    error::{Error, Result},
    host::HostView,
    trace::{Observer, Signals, WaveInfo},
    train::{
        AdamW, BatchLoss, Decay, OnEvent, Optimizer, Parameters, Schedule, TrainOptions, TrainReport, TrainingTask,
        train,
    },
};

/// Windows that a sequence is cut into, at most; tokens that are over are not looked at.
const WINDOWS: usize = 8;
/// Width between the two linear maps.
const WIDTH: usize = 128;
/// Classes: 0, 1 or 2 rounds.
const CLASSES: usize = 3;

/// A router per layer that says, from what enters the layer, how often a sequence goes through it (Dr.LLM, arXiv
/// 2510.12773): `Linear(H, 128)`, GELU (tanh), `Linear(128, 3)` on the means of up to 8 windows of the sequence, the
/// logits of which are averaged.
///
/// One decision per sequence and layer, from its prompt; sequences of a batch decide for themselves, where the released
/// code takes the decision of the first for all.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerRouters {
    hidden: usize,
    layers: Vec<LayerRouter>,
}

/// `[128, H]`, `[128]`, `[3, 128]`, `[3]`, one after the other.
#[derive(Clone, Debug, PartialEq)]
struct LayerRouter {
    values: Vec<f32>,
}

/// How [`LayerRouters`] are trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerRouterTraining {
    /// Exponent of the focal loss `(1 - p)^gamma log p`.
    pub gamma: f64,
    /// Whether classes are weighted by their effective numbers `(1 - beta) / (1 - beta^n)` with `beta = 1 - 1/N` over
    /// all N labels. The released code has 0.999 whatever the counts are, with which the numbers saturate at 1000 and
    /// nothing is rebalanced.
    pub balance_classes: bool,
    /// Optimizer and schedule: by default AdamW at 1e-3 with a decay of 0.01, 25 epochs along a cosine, as published.
    pub train: TrainOptions,
    /// Seed of what routers begin as.
    pub seed: u64,
}

impl Default for LayerRouterTraining {
    fn default() -> Self {
        let train = TrainOptions {
            epochs: 25,
            schedule: Schedule { peak: 1e-3, warmup: 0.1, decay: Decay::Cosine, ..Schedule::constant(1e-3) },
            optimizer: Optimizer::AdamW(AdamW { weight_decay: 0.01, ..AdamW::default() }),
            evaluate_every: None,
            ..TrainOptions::default()
        };
        Self { gamma: 2.0, balance_classes: true, train, seed: 0 }
    }
}

fn gelu(x: f64) -> (f64, f64) {
    const C: f64 = 0.797_884_560_802_865_4;
    let inner = C * (x + 0.044_715 * x * x * x);
    let t = inner.tanh();
    (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * C * (1.0 + 3.0 * 0.044_715 * x * x))
}

/// Means of the windows of a sequence of rows: `min(8, length)` of equal length.
fn windows(rows: &[f32], hidden: usize) -> Vec<Vec<f64>> {
    let length = rows.len() / hidden;
    let count = WINDOWS.min(length);
    let size = length / count.max(1);
    (0..count)
        .map(|w| {
            let mut mean = vec![0.0; hidden];
            for row in rows[w * size * hidden..(w + 1) * size * hidden].chunks_exact(hidden) {
                mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x) / size as f64);
            }
            mean
        })
        .collect()
}

impl LayerRouter {
    fn len(hidden: usize) -> usize {
        WIDTH * hidden + WIDTH + CLASSES * WIDTH + CLASSES
    }

    fn parts(values: &[f32], hidden: usize) -> (&[f32], &[f32], &[f32], &[f32]) {
        let (w1, rest) = values.split_at(WIDTH * hidden);
        let (b1, rest) = rest.split_at(WIDTH);
        let (w2, b2) = rest.split_at(CLASSES * WIDTH);
        (w1, b1, w2, b2)
    }
}

/// Logits of a window, and what the backward pass needs.
fn window_logits(values: &[f32], x: &[f64]) -> ([f64; CLASSES], Vec<(f64, f64)>) {
    let (w1, b1, w2, b2) = LayerRouter::parts(values, x.len());
    let unit = |i: usize| {
        let sum: f64 = w1[i * x.len()..(i + 1) * x.len()].iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
        gelu(sum + f64::from(b1[i]))
    };
    let units: Vec<(f64, f64)> = (0..WIDTH).map(unit).collect();
    let mut logits = [0.0; CLASSES];
    for (c, logit) in logits.iter_mut().enumerate() {
        let row = &w2[c * WIDTH..(c + 1) * WIDTH];
        *logit = f64::from(b2[c]) + row.iter().zip(&units).map(|(w, (u, _))| f64::from(*w) * u).sum::<f64>();
    }
    (logits, units)
}

fn mean_logits(values: &[f32], windows: &[Vec<f64>]) -> [f64; CLASSES] {
    let mut mean = [0.0; CLASSES];
    for window in windows {
        let (logits, _) = window_logits(values, window);
        mean.iter_mut().zip(logits).for_each(|(sum, z)| *sum += z / windows.len() as f64);
    }
    mean
}

fn softmax(logits: [f64; CLASSES]) -> [f64; CLASSES] {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|z| (z - max).exp()).sum();
    logits.map(|z| (z - max).exp() / sum)
}

impl LayerRouters {
    /// Routers for a model with so many layers that choose one round whatever enters: a bias of 4 on it, and small even
    /// weights.
    pub fn new(layers: usize, hidden: usize, seed: u64) -> Self {
        let router = |layer: usize| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(layer as u64);
            let mut values = vec![0.0; LayerRouter::len(hidden)];
            let mut even = |values: &mut [f32], bound: f32| {
                values.iter_mut().for_each(|v| *v = (random.random::<f32>() * 2.0 - 1.0) * bound);
            };
            even(&mut values[..WIDTH * hidden], (hidden as f32).powf(-0.5));
            let from = WIDTH * hidden + WIDTH;
            even(&mut values[from..from + CLASSES * WIDTH], 0.01);
            let last = values.len() - CLASSES;
            values[last + 1] = 4.0;
            LayerRouter { values }
        };
        Self { hidden, layers: (0..layers).map(router).collect() }
    }

    /// Trains routers on how often every layer ran for each sequence of waves on its best path, by what entered the
    /// layers when all of them ran once. `labels` are the rounds of each sequence by the wave's id. Gives the share of
    /// decisions that agree with their labels, too.
    ///
    /// # Errors
    /// [`Error::Input`] for sequences without labels, or of other layers; those of training.
    pub fn train(
        model: &Model,
        waves: &[Wave],
        labels: &BTreeMap<u64, Vec<Rounds>>,
        how: &LayerRouterTraining,
        on_event: OnEvent<'_>,
    ) -> Result<(Self, TrainReport, f64)> {
        let (count, hidden) = (model.config().layers.len(), model.config().hidden_size);
        let mut seen = Entered { hidden, ..Entered::default() };
        let engine = Engine::new(model, EngineOptions::default());
        for wave in waves {
            let of_wave = labels.get(&wave.id).map_or(&[][..], Vec::as_slice);
            if of_wave.len() != wave.sequences.len() || of_wave.iter().any(|rounds| rounds.len() != count) {
                let expected = format!("{} of {count} layers each", wave.sequences.len());
                return Err(Error::input(format!("paths of wave {}", wave.id), of_wave.len(), expected));
            }
            if let Some(rounds) = of_wave.iter().flatten().find(|rounds| usize::from(**rounds) >= CLASSES) {
                return Err(Error::input(format!("rounds in wave {}", wave.id), rounds, "0, 1 or 2"));
            }
            engine.run(wave, &mut seen)?;
        }
        let mut counts = [0usize; CLASSES];
        labels.values().flatten().flatten().for_each(|rounds| counts[usize::from(*rounds)] += 1);
        let total: usize = counts.iter().sum();
        let weights = match how.balance_classes && total > 1 {
            false => [1.0; CLASSES],
            true => {
                let beta = 1.0 - 1.0 / total as f64;
                let raw = counts.map(|n| if n == 0 { 0.0 } else { (1.0 - beta) / (1.0 - beta.powi(n as i32)) });
                let mean = raw.iter().sum::<f64>() / raw.iter().filter(|w| **w > 0.0).count().max(1) as f64;
                raw.map(|w| w / mean)
            }
        };
        let start = Self::new(count, hidden, how.seed);
        let mut parameters = Parameters::new();
        for (layer, router) in start.layers.iter().enumerate() {
            parameters.insert(name(layer), router.values.clone());
        }
        let mut task = Task { seen: &seen, labels, weights, gamma: how.gamma, hidden };
        let report = train(&mut task, &mut parameters, waves, &how.train, on_event)?;
        let layers = (0..count).map(|layer| {
            let values = parameters.get(&name(layer)).map(|parameter| parameter.values.clone()).unwrap_or_default();
            LayerRouter { values }
        });
        let routers = Self { hidden, layers: layers.collect() };
        let (mut right, mut all) = (0usize, 0usize);
        for (wave, sequences) in labels {
            for (s, rounds) in sequences.iter().enumerate() {
                for (layer, label) in rounds.iter().enumerate() {
                    let Some(windows) = seen.windows.get(&(*wave, layer, s)) else { continue };
                    right += usize::from(routers.rounds(layer, windows) == *label);
                    all += 1;
                }
            }
        }
        Ok((routers, report, right as f64 / all.max(1) as f64))
    }

    /// Name of the file beside a model.
    pub const FILE: &str = "layer_routers.safetensors";

    fn rounds(&self, layer: usize, windows: &[Vec<f64>]) -> u8 {
        let logits = mean_logits(&self.layers[layer].values, windows);
        (0..CLASSES).fold(0, |best, c| if logits[c] > logits[best] { c } else { best }) as u8
    }

    /// Writes them as safetensors: `layers.L.router` f32, with the width of the stream in the metadata.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let bytes: Vec<Vec<u8>> =
            self.layers.iter().map(|router| bytemuck::cast_slice(&router.values).to_vec()).collect();
        let views = bytes.iter().enumerate().map(|(layer, bytes)| {
            let view = TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes);
            view.map(|view| (name(layer), view)).map_err(|error| Error::input("routers of layers", error, "tensors"))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        let metadata = [("layer_routers".to_string(), self.hidden.to_string())].into();
        let file = safetensors::serialize(views, Some(metadata));
        let file = file.map_err(|error| Error::input("routers of layers", error, "tensors"))?;
        Ok(moe_checkpoint::write_atomic(path, &file)?)
    }

    /// Reads what [`save`](Self::save) wrote, for a model.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Input`] names the file that is something else or of another model.
    pub fn load(path: &Path, model: &Model) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let wrong = |found: String| Error::input(path.display().to_string(), found, "routers of the model's layers");
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|error| wrong(error.to_string()))?;
        let hidden = metadata.metadata().as_ref().and_then(|map| map.get("layer_routers")?.parse::<usize>().ok());
        let config = model.config();
        if hidden != Some(config.hidden_size) {
            return Err(wrong(format!("a hidden size of {hidden:?} instead of {}", config.hidden_size)));
        }
        let tensors = SafeTensors::deserialize(&bytes).map_err(|error| wrong(error.to_string()))?;
        if tensors.len() != config.layers.len() {
            return Err(wrong(format!("{} tensors for {} layers", tensors.len(), config.layers.len())));
        }
        let mut layers = Vec::new();
        for layer in 0..config.layers.len() {
            let tensor = tensors.tensor(&name(layer)).map_err(|error| wrong(error.to_string()))?;
            let values: Vec<f32> = tensor.data().chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
            if tensor.dtype() != Dtype::F32 || values.len() != LayerRouter::len(config.hidden_size) {
                return Err(wrong(format!("{} numbers in {:?} for layer {layer}", values.len(), tensor.dtype())));
            }
            layers.push(LayerRouter { values });
        }
        Ok(Self { hidden: config.hidden_size, layers })
    }
}

fn name(layer: usize) -> String {
    format!("layers.{layer}.router")
}

impl DepthRule for LayerRouters {
    fn times(&self, layer: usize, x: &Tensor<2>, wave: &WaveInfo) -> Result<Option<Vec<u8>>> {
        if layer >= self.layers.len() || x.dims()[1] != self.hidden {
            let found = format!("layer {layer} of width {}", x.dims()[1]);
            let expected = format!("one of {} layers of width {}", self.layers.len(), self.hidden);
            return Err(Error::input("routers of layers", found, expected));
        }
        let view = HostView::new(x);
        let decide = |sequence: &crate::trace::SequenceInfo| {
            let rows = &view.as_slice()[sequence.tokens.start * self.hidden..sequence.tokens.end * self.hidden];
            self.rounds(layer, &windows(rows, self.hidden))
        };
        Ok(Some(wave.sequences.iter().map(decide).collect()))
    }
}

/// Windows of what enters every layer, by wave, layer and sequence.
#[derive(Default)]
struct Entered {
    hidden: usize,
    wave: Option<WaveInfo>,
    windows: BTreeMap<(u64, usize, usize), Vec<Vec<f64>>>,
}

impl Observer for Entered {
    fn needs(&self) -> Signals {
        Signals { hidden: true, ..Signals::NONE }
    }

    fn begin_wave(&mut self, wave: &WaveInfo) -> Result<()> {
        self.wave = Some(wave.clone());
        Ok(())
    }

    fn hidden(&mut self, layer: usize, hidden: &Tensor<2>) -> Result<()> {
        let Some(wave) = &self.wave else { return Ok(()) };
        let view = HostView::new(hidden);
        for (s, sequence) in wave.sequences.iter().enumerate() {
            let rows = &view.as_slice()[sequence.tokens.start * self.hidden..sequence.tokens.end * self.hidden];
            self.windows.insert((wave.id, layer, s), windows(rows, self.hidden));
        }
        Ok(())
    }
}

/// Focal loss of the labels; the mean over sequences and layers.
struct Task<'a> {
    seen: &'a Entered,
    labels: &'a BTreeMap<u64, Vec<Rounds>>,
    weights: [f64; CLASSES],
    gamma: f64,
    hidden: usize,
}

/// Focal loss of a label and its gradient at the logits.
fn focal(logits: [f64; CLASSES], label: usize, gamma: f64, weight: f64) -> (f64, [f64; CLASSES]) {
    let p = softmax(logits);
    let own = p[label].max(1e-12);
    let loss = -weight * (1.0 - own).powf(gamma) * own.ln();
    // d loss / d own, times d own / d logit
    let slope = weight * (gamma * (1.0 - own).powf(gamma - 1.0) * own.ln() - (1.0 - own).powf(gamma) / own);
    let mut d = [0.0; CLASSES];
    for (c, d) in d.iter_mut().enumerate() {
        *d = slope * own * (f64::from(u8::from(c == label)) - p[c]);
    }
    (loss, d)
}

impl TrainingTask for Task<'_> {
    fn accumulate(&mut self, wave: &Wave, parameters: &mut Parameters) -> Result<BatchLoss> {
        let mut total = BatchLoss::default();
        for (s, rounds) in self.labels.get(&wave.id).into_iter().flatten().enumerate() {
            for (layer, label) in rounds.iter().enumerate() {
                let Some(windows) = self.seen.windows.get(&(wave.id, layer, s)) else { continue };
                let Some(parameter) = parameters.get_mut(&name(layer)) else { continue };
                let values = parameter.values.clone();
                let (loss, d) = focal(
                    mean_logits(&values, windows),
                    usize::from(*label),
                    self.gamma,
                    self.weights[usize::from(*label)],
                );
                total.loss += loss;
                total.tokens += 1;
                let Some(gradient) = parameter.gradient_mut() else { continue };
                let (_, _, w2, _) = LayerRouter::parts(&values, self.hidden);
                let share = 1.0 / windows.len() as f64;
                let (at_b1, at_w2) = (WIDTH * self.hidden, WIDTH * self.hidden + WIDTH);
                let at_b2 = at_w2 + CLASSES * WIDTH;
                for window in windows {
                    let (_, units) = window_logits(&values, window);
                    for (c, d) in d.iter().enumerate() {
                        gradient[at_b2 + c] += (share * d) as f32;
                        for (i, (u, _)) in units.iter().enumerate() {
                            gradient[at_w2 + c * WIDTH + i] += (share * d * u) as f32;
                        }
                    }
                    for (i, (_, slope)) in units.iter().enumerate() {
                        let through: f64 = (0..CLASSES).map(|c| d[c] * f64::from(w2[c * WIDTH + i])).sum();
                        let through = share * through * slope;
                        gradient[at_b1 + i] += through as f32;
                        let row = &mut gradient[i * self.hidden..(i + 1) * self.hidden];
                        row.iter_mut().zip(window).for_each(|(g, x)| *g += (through * x) as f32);
                    }
                }
            }
        }
        Ok(total)
    }

    fn update(&mut self, _: &Parameters) -> Result<()> {
        Ok(())
    }

    fn evaluate(&mut self, parameters: &mut Parameters) -> Result<f64> {
        let (mut sum, mut count) = (0.0, 0usize);
        for (wave, sequences) in self.labels {
            for (s, rounds) in sequences.iter().enumerate() {
                for (layer, label) in rounds.iter().enumerate() {
                    let windows = self.seen.windows.get(&(*wave, layer, s));
                    let (Some(windows), Some(parameter)) = (windows, parameters.get(&name(layer))) else { continue };
                    let label = usize::from(*label);
                    sum += focal(mean_logits(&parameter.values, windows), label, self.gamma, self.weights[label]).0;
                    count += 1;
                }
            }
        }
        Ok(sum / count.max(1) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_routers_run_every_layer_once_and_windows_are_equal() {
        let routers = LayerRouters::new(3, 5, 1);
        let rows: Vec<f32> = (0..19 * 5).map(|i| (i as f32 * 0.7).sin()).collect();
        let cut = windows(&rows, 5);
        assert_eq!(cut.len(), 8);
        // two tokens each; the last three of 19 are over
        let mean = f64::from(rows[0] + rows[5]) / 2.0;
        assert!((cut[0][0] - mean).abs() < 1e-6);
        assert_eq!(windows(&rows[..15], 5).len(), 3);
        assert!((0..3).all(|layer| routers.rounds(layer, &cut) == 1));
    }

    #[test]
    fn the_gradient_of_the_focal_loss_matches_difference_quotients() {
        for gamma in [0.0, 2.0] {
            for label in 0..3 {
                let z = [0.4, -0.7, 1.1];
                let (_, d) = focal(z, label, gamma, 1.3);
                for c in 0..3 {
                    let at = |h: f64| {
                        let mut z = z;
                        z[c] += h;
                        focal(z, label, gamma, 1.3).0
                    };
                    let numeric = (at(1e-6) - at(-1e-6)) / 2e-6;
                    assert!((numeric - d[c]).abs() < 1e-6, "{gamma} {label} {c}: {numeric} {}", d[c]);
                }
            }
        }
        let (value, slope) = gelu(0.5);
        assert!(
            (value - 0.345_714).abs() < 1e-5 && ((gelu(0.5 + 1e-6).0 - gelu(0.5 - 1e-6).0) / 2e-6 - slope).abs() < 1e-6
        );
    }
}

//! Rewiring: vectors on the logits of the router, fitted to the prompt.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{
    Engine, EngineOptions, Model,
    adaptive::{LogitShift, RunTimeRouting},
    data::{Sequence, Wave},
    error::{Error, Result},
    generate::{GenerateOptions, Sampling, generate},
    trace::{LayerTrace, Observer, RouterGradients, Signals},
};

/// Fits a vector `delta [E]` on the router logits of chosen layers, the same for all tokens, to the context: `steps`
/// steps of descent on its next-token cross-entropy at the prompt, and again after every `every` new tokens on all that
/// is there. Between, tokens are generated with the vectors as they are. They begin at zero for every prompt.
///
/// Keys and values are computed anew after each adaptation. Source: the rewiring paper by its public reviews, which
/// give steps, rate and interval; optimizer, choice of layers and treatment of the cache are documented choices. Where
/// weights are normalized over the chosen experts, the gradient of every other expert is zero, so that vectors weigh
/// the chosen experts anew rather than choose others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rewiring {
    /// Steps of descent at each adaptation; 0 changes nothing.
    pub steps: usize,
    /// Size of a step; 0 changes nothing.
    pub learning_rate: f64,
    /// New tokens between adaptations.
    pub every: usize,
    /// Most length of a layer's gradient.
    pub clip: f64,
    /// The layers that have a vector.
    pub layers: RewiredLayers,
}

/// Layers by how decided they route: `C = -mean log p` of the chosen experts, large where routing is undecided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum RewiredLayers {
    /// All of them.
    #[default]
    All,
    /// The share of layers with the largest C, as the published formula has it.
    Highest {
        /// In (0, 1].
        share: f64,
    },
    /// The share of layers with the smallest C, as the published text has it.
    Lowest {
        /// In (0, 1].
        share: f64,
    },
}

impl Default for Rewiring {
    fn default() -> Self {
        Self { steps: 5, learning_rate: 0.05, every: 128, clip: 1.0, layers: RewiredLayers::All }
    }
}

/// What an adaptation did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RewiringReport {
    /// Mean loss per predicted token of the context before and after each adaptation of the prompt.
    pub losses: Vec<(f64, f64)>,
    /// Sweeps forward and backward.
    pub sweeps: usize,
}

/// A model with vectors on its logits that may be fitted.
pub struct Rewired {
    model: Model,
    shifts: BTreeMap<usize, Arc<LogitShift>>,
}

/// Gradients at the logits, summed over tokens, and how decided layers route.
#[derive(Default)]
struct Seen {
    /// The first layer that has a vector to fit.
    first: usize,
    gradients: BTreeMap<usize, Vec<f64>>,
    undecided: BTreeMap<usize, f64>,
}

impl Observer for Seen {
    fn needs(&self) -> Signals {
        Signals { routing: true, ..Signals::ROUTER_GRADIENTS }
    }

    fn first_layer(&self) -> usize {
        self.first
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        let (mut sum, mut count) = (0.0, 0usize);
        let rows = trace.logits.chunks_exact(trace.experts).zip(trace.selected.chunks_exact(trace.top_k.max(1)));
        for (row, selected) in rows {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let log_sum = f64::from(max) + row.iter().map(|z| f64::from(z - max).exp()).sum::<f64>().ln();
            selected.iter().for_each(|e| sum -= f64::from(row[*e as usize]) - log_sum);
            count += selected.len();
        }
        self.undecided.insert(trace.layer, sum / count.max(1) as f64);
        Ok(())
    }

    fn router(&mut self, gradients: &RouterGradients<'_>) -> Result<()> {
        let mut sum = vec![0.0; gradients.experts];
        for row in gradients.d_logits.chunks_exact(gradients.experts) {
            sum.iter_mut().zip(row).for_each(|(sum, d)| *sum += f64::from(*d));
        }
        self.gradients.insert(gradients.layer, sum);
        Ok(())
    }
}

impl Rewiring {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(self.learning_rate >= 0.0 && self.learning_rate.is_finite()) {
            return Err(Error::input("learning_rate", self.learning_rate, "a finite number of 0 or more"));
        }
        if self.every == 0 {
            return Err(Error::input("every", 0, "at least 1"));
        }
        if self.clip.is_nan() || self.clip <= 0.0 {
            return Err(Error::input("clip", self.clip, "a number above 0"));
        }
        match self.layers {
            RewiredLayers::Highest { share } | RewiredLayers::Lowest { share } if !(share > 0.0 && share <= 1.0) => {
                Err(Error::input("share", share, "a number in (0, 1]"))
            }
            _ => Ok(()),
        }
    }

    /// `model` with vectors of zeros on the logits of its MoE layers.
    ///
    /// # Errors
    /// As [`validate`](Self::validate) and [`Model::routed_by`]; [`Error::Input`] for a model without experts.
    pub fn on(&self, model: &Model) -> Result<Rewired> {
        self.validate()?;
        let mut routing = RunTimeRouting::default();
        let mut shifts = BTreeMap::new();
        let config = model.config();
        for (layer, moe) in (0..config.layers.len()).filter_map(|layer| Some((layer, config.moe(layer)?))) {
            let shift = Arc::new(LogitShift::new(vec![0.0; moe.num_experts()]));
            routing.logits.insert(layer, shift.clone());
            shifts.insert(layer, shift);
        }
        if shifts.is_empty() {
            return Err(Error::input("layers with routed experts", 0, "at least one"));
        }
        Ok(Rewired { model: model.routed_by(Arc::new(routing))?, shifts })
    }

    /// Continues each prompt by itself, with vectors of its own. Under sampling, every stretch of `every` tokens has a
    /// random stream of its own; where nothing is adapted, the text is that of [`generate`].
    ///
    /// # Errors
    /// As [`on`](Self::on) and [`generate`].
    pub fn generate(
        &self,
        model: &Model,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        mut ended: impl FnMut(&[u32]) -> bool,
    ) -> Result<Vec<(Vec<u32>, RewiringReport)>> {
        let rewired = self.on(model)?;
        let idle = self.steps == 0 || self.learning_rate == 0.0;
        let mut all = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            rewired.reset();
            let (mut completion, mut report) = (Vec::new(), RewiringReport::default());
            let mut stretch = 0;
            while completion.len() < options.max_new_tokens {
                let context: Vec<u32> = prompt.iter().chain(&completion).copied().collect();
                if !idle {
                    self.adapt(&rewired, &context, &mut report)?;
                }
                let left = options.max_new_tokens - completion.len();
                let most = if idle { left } else { left.min(self.every) };
                let sampling = match options.sampling {
                    Sampling::TopP { temperature, top_p, seed } => {
                        Sampling::TopP { temperature, top_p, seed: seed.wrapping_add(stretch) }
                    }
                    Sampling::Greedy => Sampling::Greedy,
                };
                let some = GenerateOptions { max_new_tokens: most, sampling, ..options.clone() };
                let mut done = false;
                let new = generate(&rewired.model, &[context], &some, |new| {
                    let whole: Vec<u32> = completion.iter().chain(new).copied().collect();
                    done = ended(&whole);
                    done
                })?
                .concat();
                let short = new.len() < most;
                completion.extend(new);
                stretch += 1;
                if done || short {
                    break;
                }
            }
            all.push((completion, report));
        }
        rewired.reset();
        Ok(all)
    }

    /// Fits the vectors to a context; one of fewer than two tokens says nothing.
    ///
    /// # Errors
    /// Whatever stops the model.
    pub fn adapt(&self, rewired: &Rewired, context: &[u32], report: &mut RewiringReport) -> Result<()> {
        if context.len() < 2 {
            return Ok(());
        }
        let wave = Wave { id: 0, sequences: vec![Sequence::new(context.to_vec())] };
        let engine = Engine::new(&rewired.model, EngineOptions { loss: true, ..EngineOptions::default() });
        let (mut before, mut layers): (_, Option<Vec<usize>>) = (None, None);
        for _ in 0..self.steps {
            let first = layers.iter().flatten().copied().min().unwrap_or(0);
            let mut seen = Seen { first, ..Seen::default() };
            let found = engine.run(&wave, &mut seen)?;
            report.sweeps += 1;
            let tokens = found.loss_tokens.max(1) as f64;
            before.get_or_insert(found.loss.unwrap_or(0.0) / tokens);
            let layers: &Vec<usize> = layers.get_or_insert_with(|| self.chosen(&seen.undecided));
            for layer in layers {
                let (Some(gradient), Some(shift)) = (seen.gradients.get(layer), rewired.shifts.get(layer)) else {
                    continue;
                };
                let length = gradient.iter().map(|g| (g / tokens).powi(2)).sum::<f64>().sqrt();
                let factor = self.learning_rate / tokens * (self.clip / length.max(self.clip));
                let delta = shift.delta();
                shift.set(delta.iter().zip(gradient).map(|(d, g)| (f64::from(*d) - factor * g) as f32).collect());
            }
        }
        let found = engine.run(&wave, &mut crate::trace::Nobody)?;
        report.losses.push((before.unwrap_or(0.0), found.loss.unwrap_or(0.0) / found.loss_tokens.max(1) as f64));
        Ok(())
    }

    fn chosen(&self, undecided: &BTreeMap<usize, f64>) -> Vec<usize> {
        let mut order: Vec<(usize, f64)> = undecided.iter().map(|(layer, c)| (*layer, *c)).collect();
        let share = match self.layers {
            RewiredLayers::All => 1.0,
            RewiredLayers::Highest { share } => {
                order.sort_by(|a, b| b.1.total_cmp(&a.1));
                share
            }
            RewiredLayers::Lowest { share } => {
                order.sort_by(|a, b| a.1.total_cmp(&b.1));
                share
            }
        };
        let count = ((share * order.len() as f64).round() as usize).clamp(1, order.len().max(1));
        order.into_iter().take(count).map(|(layer, _)| layer).collect()
    }
}

impl Rewired {
    /// The model under its vectors.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The vector of every MoE layer.
    pub fn deltas(&self) -> BTreeMap<usize, Vec<f32>> {
        self.shifts.iter().map(|(layer, shift)| (*layer, shift.delta())).collect()
    }

    /// Makes all vectors zero again.
    pub fn reset(&self) {
        for shift in self.shifts.values() {
            shift.set(vec![0.0; shift.delta().len()]);
        }
    }
}

//! Budget search by gradient: which experts stay, over the whole model, by what the model says.

use moe_checkpoint::{Granularity, LayerScores, Pool, ScoreTable};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::global::compete;
use super::{Allocation, AllocationRequest, Allocator, Limits};
use crate::plan::LayerKept;
use crate::probe::{ModelProbe, measured};
use crate::ranking::queues;
use crate::recipe::tagged;
use crate::{Error, Needs, Questions, Result};

/// Differentiable budget search in the manner of RCO (arXiv 2605.00649). Whole experts only; needs a probe.
///
/// Every expert has a logit. A step draws noise, keeps the experts of the highest noisy logits that the budget allows
/// (exactly, over the whole model, floors and groups included), and asks the probe for the divergence of the model so
/// masked and its gradient with respect to the mask, which passes straight through to the logits as if the mask were
/// `sigmoid((logit + noise) / temperature)`. The gradient is projected on the tangent of the budget surface
/// `sum_e c_e sigmoid(logit_e) = B` (normal `c_e p_e (1 - p_e)`), Adam takes a step, a common shift of all logits,
/// found by bisection, returns to the surface, and the momentum is projected again. Routing weights are not
/// renormalized while searching.
///
/// The scores of the request play no part but for [`Rco::prior`]. [`Allocation::predicted`] is the divergence under the
/// final mask, [`Allocation::measured`] that of the model without the experts.
///
/// Chosen here, since the source leaves it open: the noise is logistic (the difference of two Gumbel draws, for keeping
/// and for dropping), antithetic samples come as `noise, -noise`, and the temperature falls geometrically.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rco {
    /// Seed of the noise.
    pub seed: u64,
    /// Number of steps of the search.
    pub steps: usize,
    /// Masks per step: an even number, since half of them have the noise of the other half with the opposite sign.
    pub samples: usize,
    /// Learning rate of Adam.
    pub learning_rate: f64,
    /// Temperature of the first and of the last step.
    pub temperature: [f64; 2],
    /// Standard deviations of its layer that a score puts its expert's first logit above or below 0; 0 starts from
    /// nothing.
    pub prior: f64,
}

impl Default for Rco {
    /// 200 steps of 4 samples, learning rate 0.1, temperature 1 to 0.05, no prior, seed 0.
    fn default() -> Self {
        Self { seed: 0, steps: 200, samples: 4, learning_rate: 0.1, temperature: [1.0, 0.05], prior: 0.0 }
    }
}

impl Rco {
    fn validate(&self, request: &AllocationRequest<'_>, probe: &dyn ModelProbe) -> Result<()> {
        let invalid = |field, found: String, expected: &str| {
            Err(Error::InvalidParameter { field, found, expected: expected.into() })
        };
        if let Limits::Units(_) = request.limits {
            return invalid("allocator", "rco over units".into(), "another one: rco searches over whole experts");
        }
        if self.steps == 0 {
            return invalid("steps", "0".into(), "at least 1");
        }
        if self.samples == 0 || !self.samples.is_multiple_of(2) {
            return invalid("samples", self.samples.to_string(), "an even number of at least 2");
        }
        if !(self.learning_rate.is_finite() && self.learning_rate > 0.0) {
            return invalid("learning_rate", self.learning_rate.to_string(), "a positive number");
        }
        if !self.temperature.iter().all(|t| t.is_finite() && *t > 0.0) {
            return invalid("temperature", format!("{:?}", self.temperature), "two positive numbers");
        }
        if !self.prior.is_finite() {
            return invalid("prior", self.prior.to_string(), "a number");
        }
        request.validate(&self.needs(request.granularity()), probe)
    }

    /// Logits before the first step, expert after expert.
    fn start(&self, scores: &ScoreTable) -> Vec<f64> {
        let of_layer = |layer: &LayerScores| -> Vec<f64> {
            let values: Vec<f64> = layer.scores.iter().map(|score| f64::from(score[0])).collect();
            let count = values.len().max(1) as f64;
            let mean = values.iter().sum::<f64>() / count;
            let deviation = (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt();
            let scale = if deviation > 0.0 { self.prior / deviation } else { 0.0 };
            values.into_iter().map(|value| scale * (value - mean)).collect()
        };
        scores.layers.iter().flat_map(of_layer).collect()
    }
}

impl Allocator for Rco {
    fn recipe(&self) -> Value {
        tagged("rco", self)
    }

    /// Whole experts only, whatever is asked for.
    fn needs(&self, _: Granularity) -> Needs {
        let needs = Needs::new(Granularity::Expert, Pool::Layer);
        needs.asking(Questions { gain_gradient: true, ..Questions::NONE })
    }

    fn allocate_with(&self, request: &AllocationRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        self.validate(request, probe)?;
        let surface = Surface::new(request);
        let mut logits = self.start(request.scores);
        surface.shift(&mut logits);
        let mut adam = Adam::new(logits.len());
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        for step in 0..self.steps {
            let progress = step as f64 / (self.steps.max(2) - 1) as f64;
            let [first, last] = self.temperature;
            let temperature = first * (last / first).powf(progress);
            let mut gradient = vec![0.0; logits.len()];
            for _ in 0..self.samples / 2 {
                // In (0, 1): neither end has a finite logit.
                let mut draw = || (random.random::<f64>() + f64::EPSILON / 2.0).min(1.0 - f64::EPSILON / 2.0);
                let noise: Vec<f64> = (0..logits.len()).map(|_| draw()).map(|u| (u / (1.0 - u)).ln()).collect();
                for sign in [1.0, -1.0] {
                    let noisy: Vec<f64> =
                        logits.iter().zip(&noise).map(|(logit, noise)| logit + sign * noise).collect();
                    let (_, slopes) = probe.gain_gradient(&gains(&mask(request, &noisy)?), step)?;
                    let slopes = slopes.iter().flatten().map(|slope| f64::from(*slope));
                    for ((gradient, slope), noisy) in gradient.iter_mut().zip(slopes).zip(&noisy) {
                        let soft = sigmoid(noisy / temperature);
                        *gradient += slope * soft * (1.0 - soft) / temperature / self.samples as f64;
                    }
                }
            }
            surface.project(&mut gradient, &logits);
            adam.step(&mut logits, &gradient, self.learning_rate);
            surface.shift(&mut logits);
            surface.project(&mut adam.momentum, &logits);
            if logits.iter().any(|logit| !logit.is_finite()) {
                let found = format!("a gradient that is not finite in step {step}");
                let expected = "finite gradients from the probe".into();
                return Err(Error::InvalidParameter { field: "probe", found, expected });
            }
        }
        let table = as_scores(request, &logits);
        let found = AllocationRequest { scores: &table, ..*request };
        let queues = queues(&found)?;
        let (blocks, hits) = compete(&found, &queues)?;
        let asked = request.shape.units() - request.budget.kept_units(request.shape);
        let mut allocation = Allocation::of_blocks(self.recipe(), &found, &queues, &blocks, asked, hits)?;
        for (layer, scores) in allocation.layers.iter_mut().zip(&request.scores.layers) {
            let dropped = layer.kept.iter().zip(&scores.scores).filter(|(kept, _)| kept.is_empty());
            let sum = dropped.map(|(_, score)| f64::from(score[0])).sum();
            layer.predicted = request.scores.adds_up(Pool::Layer).then_some(sum);
        }
        let kept = found.layers(&queues, &blocks);
        allocation.predicted = Some(probe.gain_gradient(&gains(&kept), self.steps)?.0);
        allocation.measured = measured(probe, &kept)?.map(|distortion| distortion.mean);
        allocation.seed = Some(self.seed);
        Ok(allocation)
    }
}

/// The request's table with logits for scores.
fn as_scores(request: &AllocationRequest<'_>, logits: &[f64]) -> ScoreTable {
    let mut table = request.scores.clone();
    (table.pool, table.additive) = (Pool::Global, None);
    let scores = table.layers.iter_mut().flat_map(|layer| &mut layer.scores);
    scores.zip(logits).for_each(|(score, logit)| *score = vec![*logit as f32]);
    table
}

/// The experts of the highest logits that the budget allows.
fn mask(request: &AllocationRequest<'_>, logits: &[f64]) -> Result<Vec<LayerKept>> {
    let table = as_scores(request, logits);
    let request = AllocationRequest { scores: &table, ..*request };
    let queues = queues(&request)?;
    let (blocks, _) = compete(&request, &queues)?;
    Ok(request.layers(&queues, &blocks))
}

fn gains(kept: &[LayerKept]) -> Vec<Vec<f32>> {
    let gain = |kept: &Vec<u32>| if kept.is_empty() { 0.0 } else { 1.0 };
    kept.iter().map(|layer| layer.experts.iter().map(gain).collect()).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The budget as a surface in the space of logits: `sum_e cost_e sigmoid(logit_e) = budget`.
struct Surface {
    /// Units of every expert; 0 for one that is protected or gone, which no logit moves.
    costs: Vec<f64>,
    budget: f64,
}

impl Surface {
    fn new(request: &AllocationRequest<'_>) -> Self {
        let mut costs = Vec::new();
        let mut budget = request.budget.kept_units(request.shape) as f64;
        for (position, layer) in request.shape.layers.iter().enumerate() {
            for (expert, width) in layer.widths.iter().enumerate() {
                let gone = request.gone.is_some_and(|gone| gone[position].experts[expert].is_empty());
                let protected = !gone && request.protect.count(layer.layer, expert, *width) > 0;
                if protected {
                    budget -= *width as f64;
                }
                costs.push(if gone || protected { 0.0 } else { *width as f64 });
            }
        }
        Self { costs, budget }
    }

    /// Moves all logits alike until the expected cost is the budget; not at all where no shift does that.
    fn shift(&self, logits: &mut [f64]) {
        let expected = |shift: f64| -> f64 {
            self.costs.iter().zip(logits.iter()).map(|(cost, logit)| cost * sigmoid(logit + shift)).sum()
        };
        let largest = logits.iter().fold(0.0, |largest: f64, logit| largest.max(logit.abs()));
        let (mut low, mut high) = (-largest - 40.0, largest + 40.0);
        if !(expected(low) < self.budget && self.budget < expected(high)) {
            return;
        }
        for _ in 0..100 {
            let middle = 0.5 * (low + high);
            if expected(middle) < self.budget { low = middle } else { high = middle }
        }
        let shift = 0.5 * (low + high);
        logits.iter_mut().for_each(|logit| *logit += shift);
    }

    /// Takes out of `vector` what points off the surface at `logits`, and what belongs to experts that do not move.
    fn project(&self, vector: &mut [f64], logits: &[f64]) {
        let normal: Vec<f64> = self
            .costs
            .iter()
            .zip(logits)
            .map(|(cost, logit)| cost * sigmoid(*logit) * (1.0 - sigmoid(*logit)))
            .collect();
        let squared: f64 = normal.iter().map(|n| n * n).sum();
        let along: f64 = normal.iter().zip(vector.iter()).map(|(n, v)| n * v).sum();
        let part = if squared > 0.0 { along / squared } else { 0.0 };
        for ((value, normal), cost) in vector.iter_mut().zip(&normal).zip(&self.costs) {
            *value = if *cost > 0.0 { *value - part * normal } else { 0.0 };
        }
    }
}

/// Adam (arXiv 1412.6980) with its usual constants.
struct Adam {
    momentum: Vec<f64>,
    squares: Vec<f64>,
    steps: i32,
}

impl Adam {
    fn new(len: usize) -> Self {
        Self { momentum: vec![0.0; len], squares: vec![0.0; len], steps: 0 }
    }

    fn step(&mut self, values: &mut [f64], gradient: &[f64], rate: f64) {
        const BETA: [f64; 2] = [0.9, 0.999];
        self.steps += 1;
        let [first, second] = BETA.map(|beta| 1.0 - beta.powi(self.steps));
        for (index, value) in values.iter_mut().enumerate() {
            let g = gradient[index];
            self.momentum[index] = BETA[0] * self.momentum[index] + (1.0 - BETA[0]) * g;
            self.squares[index] = BETA[1] * self.squares[index] + (1.0 - BETA[1]) * g * g;
            *value -= rate * (self.momentum[index] / first) / ((self.squares[index] / second).sqrt() + 1e-8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shifts_reach_the_budget_and_projections_stay_on_it() {
        let surface = Surface { costs: vec![1.0, 2.0, 3.0, 0.0], budget: 2.5 };
        let mut logits = vec![0.3, -2.0, 5.0, 9.0];
        surface.shift(&mut logits);
        let cost = |logits: &[f64]| -> f64 {
            surface.costs.iter().zip(logits).map(|(cost, logit)| cost * sigmoid(*logit)).sum()
        };
        assert!((cost(&logits) - 2.5).abs() < 1e-9);
        let mut vector = vec![1.0, -0.5, 2.0, 7.0];
        surface.project(&mut vector, &logits);
        assert_eq!(vector[3], 0.0);
        let moved: Vec<f64> = logits.iter().zip(&vector).map(|(logit, v)| logit + 1e-6 * v).collect();
        assert!((cost(&moved) - 2.5).abs() < 1e-11);
    }
}

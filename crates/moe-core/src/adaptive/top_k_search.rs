//! Experts per token layer by layer, found on rows.

use std::sync::Arc;

use moe_checkpoint::{Choice, knapsack};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{PerLayer, RunTimeRouting, TopK, intervention::normal, per_layer::moe_layers, top_k::check_k};
use crate::{
    Engine, EngineOptions, LayerChange, Model,
    data::Wave,
    error::{Error, Result},
    evaluate::divergence,
    host::{HostView, from_vec},
    objective::TeacherLogits,
    router::Combine,
    trace::{LayerOutput, Nobody, Observer, Signals},
};

/// Tokens whose probabilities are kept of the model itself; the others count as one.
const TEACHER_TOKENS: usize = 256;
/// Rows of normal numbers.
const RANDOM_TOKENS: usize = 512;

/// Finds a number of experts per token for every MoE layer, `experts` on average: layers that hardly miss their last
/// experts give them up for those that do. [`calibrated`](Self::calibrated) on rows it is a [`TopK`].
///
/// What every number costs is measured in one layer at a time, all others as they are; the numbers are then those with
/// the least sum, exactly (a knapsack). That costs of layers add up is an assumption, as in LExI (arXiv 2509.02753),
/// which measures on random inputs and searches by evolution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopKSearch {
    /// Experts per token, mean over the MoE layers, at least 1.
    pub experts: f64,
    /// The most that a layer may have; its own number, if none is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most: Option<usize>,
    /// What a number costs.
    #[serde(default)]
    pub cost: TopKCost,
    /// How weights follow from the scores.
    #[serde(default)]
    pub combine: Combine,
}

/// The layers with their experts, the most experts per token of one, and how many are to be shared out.
struct Options {
    layers: Vec<(usize, usize)>,
    most: usize,
    budget: usize,
}

/// What another number of experts in a layer costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TopKCost {
    /// The divergence of the model's predictions from its own, in nats per predicted token: a run of the rows for every
    /// layer and number.
    #[default]
    Divergence,
    /// The squared error of what the layer's feed-forward half adds to the stream, over the squares of what it adds
    /// now: one run of the rows, in which each layer is run with every number.
    Output,
    /// LExI's: the Frobenius norm of the change of what the half gives for normal numbers, the same for all layers. It
    /// needs no rows. The paper gives them to the experts; here they pass the norm before these, as a stream does.
    Random,
}

impl TopKSearch {
    /// The rule of a layer, for what it asks.
    fn rule(&self, (layer, experts): (usize, usize), k: usize) -> Result<RunTimeRouting> {
        let rule = TopK { k: PerLayer::All(k), combine: self.combine };
        RunTimeRouting::by_layer(vec![(layer, experts, k)], |_, _, k| Ok(rule.rule(k)))
    }

    /// What may be chosen in a model.
    ///
    /// # Errors
    /// Names the field that is out of range.
    fn options(&self, model: &Model) -> Result<Options> {
        let layers = moe_layers(model.config())?;
        model.router().with_combine(self.combine)?;
        let most = self.most.unwrap_or(model.router().top_k());
        for (layer, experts) in &layers {
            check_k(model, *layer, *experts, most)?;
        }
        let budget = (self.experts * layers.len() as f64 + 1e-9).floor();
        if !(self.experts >= 1.0 && self.experts <= most as f64) {
            return Err(Error::input("experts", self.experts, format!("1 to {most}, the most of a layer")));
        }
        Ok(Options { layers, most, budget: budget as usize })
    }

    /// The numbers, found on rows.
    ///
    /// # Errors
    /// [`Error::Input`] for numbers out of range and no rows, and whatever stops the model.
    pub fn calibrated(&self, model: &Model, waves: &[Wave]) -> Result<TopK> {
        let Options { layers, most, budget } = self.options(model)?;
        let costs = match self.cost {
            TopKCost::Divergence => self.divergences(model, waves, &layers, most)?,
            TopKCost::Output => self.output_errors(model, waves, &layers, most)?,
            TopKCost::Random => self.random_errors(model, &layers, most)?,
        };
        let choice = |(at, distortion): (usize, &f64)| Choice { cost: at + 1, distortion: *distortion };
        let groups: Vec<Vec<Choice>> =
            costs.iter().map(|of_layer| of_layer.iter().enumerate().map(choice).collect()).collect();
        let fits = format!("at least {}, one for each layer", layers.len());
        let chosen = knapsack(&groups, budget).ok_or_else(|| Error::input("experts of all layers", budget, fits))?;
        Ok(TopK { k: PerLayer::Each(chosen.into_iter().map(|at| at + 1).collect()), combine: self.combine })
    }

    /// Whether a number leaves the model as it is.
    fn is_own(&self, model: &Model, k: usize) -> bool {
        k == model.router().top_k() && self.combine == Combine::Model
    }

    /// `[layers][k - 1]`.
    fn divergences(
        &self,
        model: &Model,
        waves: &[Wave],
        layers: &[(usize, usize)],
        most: usize,
    ) -> Result<Vec<Vec<f64>>> {
        let engine = Engine::new(model, EngineOptions::default());
        let teacher = TeacherLogits::record(&engine, waves, TEACHER_TOKENS.min(model.config().vocab_size))?;
        let of_layer = |layer: &(usize, usize)| {
            (1..=most)
                .map(|k| match self.is_own(model, k) {
                    true => Ok(0.0),
                    false => divergence(&model.routed_by(Arc::new(self.rule(*layer, k)?))?, &teacher, waves),
                })
                .collect()
        };
        layers.iter().map(of_layer).collect()
    }

    /// `[layers][k - 1]`.
    fn random_errors(&self, model: &Model, layers: &[(usize, usize)], most: usize) -> Result<Vec<Vec<f64>>> {
        let hidden = model.config().hidden_size;
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let values = (0..RANDOM_TOKENS * hidden).map(|_| normal(&mut random) as f32).collect();
        let x = from_vec(values, [RANDOM_TOKENS, hidden], model.device());
        let engine = Engine::new(model, EngineOptions::default());
        let of_layer = |layer: &(usize, usize)| {
            let own = engine.feed_forward(layer.0, &x, &mut Nobody)?;
            let error = |k| {
                if self.is_own(model, k) {
                    return Ok(0.0);
                }
                let change = LayerChange { routing: Some(Arc::new(self.rule(*layer, k)?)), experts: None };
                let other = engine.feed_forward_changed(layer.0, &x, &change, &mut Nobody)?;
                Ok(squares(HostView::new(&other).as_slice(), HostView::new(&own).as_slice()).sqrt())
            };
            (1..=most).map(error).collect()
        };
        layers.iter().map(of_layer).collect()
    }

    /// `[layers][k - 1]`.
    fn output_errors(
        &self,
        model: &Model,
        waves: &[Wave],
        layers: &[(usize, usize)],
        most: usize,
    ) -> Result<Vec<Vec<f64>>> {
        let engine = Engine::new(model, EngineOptions::default());
        let mut changes = Vec::new();
        for layer in layers {
            let mut of_layer = Vec::new();
            for k in 1..=most {
                let routing = (!self.is_own(model, k)).then(|| self.rule(*layer, k)).transpose()?;
                of_layer.push(routing.map(|routing| LayerChange { routing: Some(Arc::new(routing)), experts: None }));
            }
            changes.push(of_layer);
        }
        let sums = vec![(vec![0.0; most], 0.0); layers.len()];
        let mut seen = Outputs { engine: &engine, layers, changes, sums };
        waves.iter().try_for_each(|wave| engine.run(wave, &mut seen).map(drop))?;
        let relative = |(errors, square): (Vec<f64>, f64)| {
            errors.into_iter().map(|error| if square > 0.0 { error / square } else { 0.0 }).collect()
        };
        Ok(seen.sums.into_iter().map(relative).collect())
    }
}

/// Sum of the squared differences.
fn squares(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}

/// Runs every layer that passes with every number of experts.
struct Outputs<'a> {
    engine: &'a Engine<'a>,
    layers: &'a [(usize, usize)],
    changes: Vec<Vec<Option<LayerChange>>>,
    /// Of each layer: the squared errors by number, and the squares of what it adds.
    sums: Vec<(Vec<f64>, f64)>,
}

impl Observer for Outputs<'_> {
    fn needs(&self) -> Signals {
        Signals { streams: true, ..Signals::NONE }
    }

    fn output(&mut self, output: &LayerOutput<'_>) -> Result<()> {
        let Some(at) = self.layers.iter().position(|(layer, _)| *layer == output.layer) else { return Ok(()) };
        let own = HostView::new(output.output);
        let before = HostView::new(output.input);
        self.sums[at].1 += squares(own.as_slice(), before.as_slice());
        for (k, change) in self.changes[at].iter().enumerate() {
            let Some(change) = change else { continue };
            let other = self.engine.feed_forward_changed(output.layer, output.half(), change, &mut Nobody)?;
            self.sums[at].0[k] += squares(HostView::new(&other).as_slice(), own.as_slice());
        }
        Ok(())
    }
}

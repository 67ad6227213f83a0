//! The coefficients of task vectors, and the model they make.

use std::collections::BTreeMap;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, ExpertPart, ExpertWeights, Step};
use moe_core::train::Parameters;
use moe_core::{ExpertOverlay, Model};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::in_place::{self, PartChange};
use crate::tasks::{METHOD, MergedTasks, TaskReport};

/// What one coefficient of a task covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// A projection (gate, up or down) of all experts of a layer.
    #[default]
    Layer,
    /// A projection of one expert.
    Expert,
}

/// A coefficient `sigmoid(raw)` for each task and each chunk of each tensor, over task vectors of the routed experts of
/// a base.
#[derive(Clone)]
pub struct Coefficients {
    base: Arc<Checkpoint>,
    tuned: Vec<Arc<Checkpoint>>,
    granularity: Granularity,
    chunks: usize,
    /// By tensor: `[tasks, chunks]`.
    raw: BTreeMap<String, Vec<f32>>,
}

impl std::fmt::Debug for Coefficients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coefficients").field("tasks", &self.tuned.len()).field("raw", &self.raw).finish_non_exhaustive()
    }
}

pub(super) fn sigmoid(raw: f64) -> f64 {
    1.0 / (1.0 + (-raw).exp())
}

/// Where an expert's matrix lies in the tensor that its coefficients cover.
pub(super) struct Cover {
    pub name: String,
    /// Its first element there.
    pub offset: usize,
    /// Elements of a chunk.
    pub chunk: usize,
}

impl Coefficients {
    pub(super) fn new(
        base: &Arc<Checkpoint>,
        tuned: Vec<Arc<Checkpoint>>,
        granularity: Granularity,
        chunks: usize,
        start: f64,
    ) -> Self {
        let mut coefficients = Self { base: base.clone(), tuned, granularity, chunks, raw: BTreeMap::new() };
        let raw = (start / (1.0 - start)).ln() as f32;
        for layer in &base.shape().layers {
            for expert in 0..layer.num_experts() {
                for which in ExpertPart::ALL {
                    let name = coefficients.name(layer.layer, expert, which);
                    coefficients.raw.insert(name, vec![raw; coefficients.tuned.len() * chunks]);
                }
            }
        }
        coefficients
    }

    /// The base.
    pub fn base(&self) -> &Checkpoint {
        &self.base
    }

    /// Coefficients in (0, 1) by tensor, each `[tasks, chunks]`. Tensors are called `layer.L.PART` or
    /// `layer.L.expert.E.PART`.
    pub fn values(&self) -> BTreeMap<&str, Vec<f64>> {
        let value = |raw: &Vec<f32>| raw.iter().map(|raw| sigmoid(f64::from(*raw))).collect();
        self.raw.iter().map(|(name, raw)| (name.as_str(), value(raw))).collect()
    }

    /// The same with one coefficient, by tensor, task and chunk, changed; for tests and curves. Out of range changes
    /// nothing.
    pub fn with_value(mut self, name: &str, task: usize, chunk: usize, value: f64) -> Self {
        let at = task * self.chunks + chunk;
        if let Some(raw) = self.raw.get_mut(name).and_then(|raw| raw.get_mut(at)) {
            *raw = (value / (1.0 - value)).ln() as f32;
        }
        self
    }

    pub(super) fn raw(&self) -> &BTreeMap<String, Vec<f32>> {
        &self.raw
    }

    pub(super) fn chunks(&self) -> usize {
        self.chunks
    }

    pub(super) fn parameters(&self) -> Parameters {
        let mut parameters = Parameters::new();
        self.raw.iter().for_each(|(name, raw)| parameters.insert(name.clone(), raw.clone()));
        parameters
    }

    pub(super) fn set_raw(&mut self, parameters: &Parameters) {
        for (name, parameter) in parameters.iter() {
            self.raw.insert(name.to_string(), parameter.values.clone());
        }
    }

    /// Zeros for the gradient of every coefficient.
    pub(super) fn gradients(&self) -> BTreeMap<String, Vec<f64>> {
        self.raw.iter().map(|(name, raw)| (name.clone(), vec![0.0; raw.len()])).collect()
    }

    /// Adds gradients of coefficients, as those of what they are the sigmoid of.
    pub(super) fn add_raw_gradients(&self, gradients: &BTreeMap<String, Vec<f64>>, into: &mut Parameters) {
        for (name, gradient) in gradients {
            let Some(parameter) = into.get_mut(name) else { continue };
            let values: Vec<f64> = parameter.values.iter().map(|raw| sigmoid(f64::from(*raw))).collect();
            let Some(sum) = parameter.gradient_mut() else { continue };
            for ((into, gradient), value) in sum.iter_mut().zip(gradient).zip(values) {
                *into += (gradient * value * (1.0 - value)) as f32;
            }
        }
    }

    fn name(&self, layer: usize, expert: usize, which: ExpertPart) -> String {
        let which = match which {
            ExpertPart::Gate => "gate",
            ExpertPart::Up => "up",
            _ => "down",
        };
        match self.granularity {
            Granularity::Layer => format!("layer.{layer}.{which}"),
            Granularity::Expert => format!("layer.{layer}.expert.{expert}.{which}"),
        }
    }

    pub(super) fn cover(&self, layer: usize, expert: usize, which: ExpertPart) -> Cover {
        let hidden = self.base.shape().hidden_size;
        let widths = self.base.shape().layer(layer).map(|layer| layer.widths.as_slice()).unwrap_or_default();
        let (offset, length) = match self.granularity {
            Granularity::Layer => {
                (widths[..expert].iter().sum::<usize>() * hidden, widths.iter().sum::<usize>() * hidden)
            }
            Granularity::Expert => (0, widths[expert] * hidden),
        };
        Cover { name: self.name(layer, expert, which), offset, chunk: length.div_ceil(self.chunks).max(1) }
    }

    /// Task vectors of one matrix, one task after the other.
    pub(super) fn task_vector(&self, task: usize, layer: usize, expert: usize) -> Result<ExpertWeights> {
        let (base, mut tuned) = (self.base.expert(layer, expert)?, self.tuned[task].expert(layer, expert)?);
        for which in ExpertPart::ALL {
            let from = base.part(which).unwrap_or_default();
            if let Some(into) = tuned.part_mut(which) {
                into.iter_mut().zip(from).for_each(|(v, b)| *v -= b);
            }
        }
        Ok(tuned)
    }

    pub(super) fn tasks(&self) -> usize {
        self.tuned.len()
    }

    /// A matrix of an expert of the merged model.
    fn matrix(&self, layer: usize, expert: usize, which: ExpertPart) -> Result<Vec<f32>> {
        let read = |model: &Checkpoint| -> Result<Vec<f32>> {
            let matrix = model.expert_part(layer, expert, which)?.map(|matrix| matrix.to_f32()).unwrap_or_default();
            model.release_expert(layer, expert)?;
            Ok(matrix)
        };
        let own = read(&self.base)?;
        let mut merged = own.clone();
        let Cover { name, offset, chunk } = self.cover(layer, expert, which);
        let Some(raw) = self.raw.get(&name) else { return Ok(merged) };
        for (tuned, raw) in self.tuned.iter().zip(raw.chunks_exact(self.chunks.max(1))) {
            let values: Vec<f32> = raw.iter().map(|raw| sigmoid(f64::from(*raw)) as f32).collect();
            let tuned = read(tuned)?;
            let elements = merged.iter_mut().zip(tuned.iter().zip(&own)).enumerate();
            elements.for_each(|(i, (merged, (tuned, own)))| *merged += values[(offset + i) / chunk] * (tuned - own));
        }
        Ok(merged)
    }

    /// An expert of the merged model.
    ///
    /// # Errors
    /// What keeps weights from being read.
    pub fn expert(&self, layer: usize, expert: usize) -> Result<ExpertWeights> {
        let mut merged = self.base.expert(layer, expert)?;
        for which in ExpertPart::ALL {
            let values = self.matrix(layer, expert, which)?;
            if let Some(into) = merged.part_mut(which) {
                into.copy_from_slice(&values);
            }
        }
        Ok(merged)
    }

    /// The merged model as a model of its own, everything but the matrices of routed experts that of the base.
    ///
    /// # Errors
    /// As [`TaskRuleConfig::on`](crate::TaskRuleConfig::on).
    pub fn merged(&self) -> Result<MergedTasks> {
        let base = self.base.dequantized()?;
        let report = TaskReport::of(&base, &crate::tasks::dequantized(&self.tuned)?)?;
        // Raw numbers are f32, which survive JSON to the bit.
        let recipe = serde_json::json!({
            "rule": {"type": "expert_merging", "granularity": self.granularity, "chunks": self.chunks, "raw": self.raw},
            "report": report,
        });
        let step = Step::new(METHOD, &base, recipe, report.summary("learnt coefficients"));
        let model = in_place::model(&base, self.clone(), None, step)?;
        Ok(MergedTasks::new(model, report))
    }

    /// `base` seen as the merged model while coefficients change.
    ///
    /// # Errors
    /// Those of [`Model::with_overlay`].
    pub fn of(self, base: &Model) -> Result<Model> {
        Ok(base.with_overlay(Arc::new(self))?)
    }
}

impl ExpertOverlay for Coefficients {
    fn apply(&self, layer: usize, expert: usize, _: ExpertWeights) -> moe_core::Result<ExpertWeights> {
        self.expert(layer, expert).map_err(moe_core::Error::observer)
    }
}

impl PartChange for Coefficients {
    fn part(&self, _: &Checkpoint, layer: usize, set: usize, part: ExpertPart) -> Result<Option<Vec<f32>>> {
        match ExpertPart::ALL.contains(&part) {
            // Experts do not share sets, so that a set is an expert.
            true => self.matrix(layer, set, part).map(Some),
            false => Ok(None),
        }
    }
}

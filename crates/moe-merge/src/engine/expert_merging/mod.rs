//! Several fine-tuned checkpoints of one base into one, with coefficients learnt on unlabeled data.

mod coefficients;
mod gradients;

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::Tensor;
use moe_checkpoint::Checkpoint;
use moe_core::data::Wave;
use moe_core::trace::{Observer, Signals};
use moe_core::train::{
    AdamW, BatchLoss, OnEvent, Optimizer, Parameters, TrainOptions, TrainReport, TrainingTask, train,
};
use moe_core::{Distillation, Engine, EngineOptions, Model, TeacherLogits, evaluate};
use serde::{Deserialize, Serialize};

pub use coefficients::{Coefficients, Granularity};

use coefficients::sigmoid;
use gradients::{HiddenGradients, LogitGradients};

use crate::merged::not_grouped;
use crate::tasks::same_experts;
use crate::{Error, Result};

/// How coefficients are learnt.
///
/// Source: Expert Merging and Expert Merging++ (arXiv 2509.25712). `theta_l = theta0_l + sum_k c_{k,l} tau_{k,l}`,
/// `c = sigmoid(raw)`, for the matrices of the routed experts; everything else, biases included, stays that of the
/// base. On each wave of task k, the loss is `beta_k (KL(teacher_k || merged) + lambda mean_l MSE(hidden)) + gamma
/// mean_l sum_k |c_{k,l} - c_0|` per token. What differs from the source: the gradient of the hidden-state term reaches
/// the experts of the layer it is taken after, and no earlier ones; the learning rate follows [`TrainOptions`], without
/// warm restarts; importance decides chunks by a number for all tensors alike, as the source's rule is not published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpertMerging {
    /// Coefficient that everything starts from and is pulled to, in (0, 1).
    pub start: f64,
    /// What one coefficient of a task covers.
    pub granularity: Granularity,
    /// Pieces that a tensor is cut into, each with its coefficient: 1, or more for Expert Merging++.
    pub chunks: usize,
    /// Weight of the hidden-state term, 0 for none.
    pub hidden: f64,
    /// Pull towards the start.
    pub gamma: f64,
    /// Weight of each task, or none for 1 each.
    pub betas: Vec<f64>,
    /// Tokens of a teacher's distribution that are kept.
    pub top: usize,
    /// The training loop.
    pub train: TrainOptions,
}

impl Default for ExpertMerging {
    fn default() -> Self {
        let mut train = TrainOptions { epochs: 1, waves_per_step: 8, clip: Some(1.0), ..TrainOptions::default() };
        train.schedule.peak = 0.5;
        train.optimizer = Optimizer::AdamW(AdamW { weight_decay: 1e-5, ..AdamW::default() });
        Self {
            start: 0.3,
            granularity: Granularity::Layer,
            chunks: 1,
            hidden: 0.1,
            gamma: 0.8,
            betas: Vec::new(),
            top: 256,
            train,
        }
    }
}

/// One fine-tuned model and unlabeled waves of its task. Ids of waves differ between tasks.
#[derive(Clone, Debug)]
pub struct Task {
    /// The fine-tuned checkpoint.
    pub tuned: Arc<Checkpoint>,
    /// Its calibration data.
    pub waves: Vec<Wave>,
}

impl ExpertMerging {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`], [`Error::Engine`] for those of the training loop.
    pub fn validate(&self, tasks: usize) -> Result<()> {
        if !(self.start > 0.0 && self.start < 1.0) {
            return Err(Error::parameter("start", self.start, "a number in (0, 1)"));
        }
        for (field, value) in [("hidden", self.hidden), ("gamma", self.gamma)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::parameter(field, value, "a finite number of 0 or more"));
            }
        }
        if self.chunks == 0 {
            return Err(Error::parameter("chunks", 0, "at least 1"));
        }
        if self.top == 0 {
            return Err(Error::parameter("top", 0, "at least 1"));
        }
        if !self.betas.is_empty() && self.betas.len() != tasks {
            let found = format!("{} numbers", self.betas.len());
            return Err(Error::parameter("betas", found, format!("none, or {tasks}, as many as tasks")));
        }
        Ok(self.train.validate()?)
    }

    /// Learns the coefficients. `base` is run under overlays; memory is that of a backward sweep, of the teachers'
    /// distributions and, with a hidden-state term, of their hidden states on all waves.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`], [`Error::InvalidEvidence`] for a checkpoint of another shape, [`Error::Infeasible`]
    /// for a base whose experts share weights, [`Error::Engine`].
    pub fn learn(&self, base: &Model, tasks: &[Task], on_event: OnEvent<'_>) -> Result<(Coefficients, TrainReport)> {
        self.validate(tasks.len())?;
        not_grouped(base.checkpoint())?;
        let tuned: Vec<Arc<Checkpoint>> = tasks.iter().map(|task| task.tuned.clone()).collect();
        for other in &tuned {
            same_experts(base.checkpoint(), other)?;
        }
        let mut task_of = BTreeMap::new();
        for (index, task) in tasks.iter().enumerate() {
            for wave in &task.waves {
                if task_of.insert(wave.id, index).is_some() {
                    return Err(Error::parameter("waves", format!("two of id {}", wave.id), "one of each id"));
                }
            }
        }
        let coefficients = Coefficients::new(base.checkpoint(), tuned, self.granularity, self.chunks, self.start);
        let waves: Vec<Wave> = tasks.iter().flat_map(|task| task.waves.clone()).collect();
        let teachers = tasks.iter().map(|task| self.teacher(base, task)).collect::<Result<Vec<_>>>()?;
        let mut parameters = coefficients.parameters();
        let mut run = Run {
            options: self,
            base,
            student: coefficients.clone().of(base)?,
            coefficients,
            teachers,
            task_of,
            waves: &waves,
        };
        let report = train(&mut run, &mut parameters, &waves, &self.train, on_event)?;
        Ok((run.coefficients, report))
    }

    fn teacher(&self, base: &Model, task: &Task) -> Result<Teacher> {
        let model = Model::new(task.tuned.clone(), base.device(), base.max_memory())?;
        let engine = Engine::new(&model, EngineOptions::default());
        let logits = TeacherLogits::record(&engine, &task.waves, self.top)?;
        let mut hidden = Hidden::default();
        if self.hidden > 0.0 {
            for wave in &task.waves {
                engine.run(wave, &mut hidden)?;
            }
        }
        Ok(Teacher { logits, hidden: hidden.waves })
    }

    fn beta(&self, task: usize) -> f64 {
        self.betas.get(task).copied().unwrap_or(1.0)
    }
}

/// What a fine-tuned model gives on its waves.
struct Teacher {
    logits: TeacherLogits,
    /// Layer inputs `[T, H]` by wave and layer.
    hidden: BTreeMap<u64, BTreeMap<usize, Tensor<2>>>,
}

/// Keeps the layer inputs of every wave.
#[derive(Default)]
struct Hidden {
    waves: BTreeMap<u64, BTreeMap<usize, Tensor<2>>>,
    wave: u64,
}

impl Observer for Hidden {
    fn needs(&self) -> Signals {
        Signals { hidden: true, ..Signals::NONE }
    }

    fn begin_wave(&mut self, wave: &moe_core::trace::WaveInfo) -> moe_core::Result<()> {
        self.wave = wave.id;
        Ok(())
    }

    fn hidden(&mut self, layer: usize, hidden: &Tensor<2>) -> moe_core::Result<()> {
        self.waves.entry(self.wave).or_default().insert(layer, hidden.clone());
        Ok(())
    }
}

/// Coefficients being learnt.
struct Run<'a> {
    options: &'a ExpertMerging,
    base: &'a Model,
    student: Model,
    coefficients: Coefficients,
    teachers: Vec<Teacher>,
    task_of: BTreeMap<u64, usize>,
    waves: &'a [Wave],
}

impl TrainingTask for Run<'_> {
    fn accumulate(&mut self, wave: &Wave, parameters: &mut Parameters) -> moe_core::Result<BatchLoss> {
        let task = self.task_of.get(&wave.id).copied().unwrap_or_default();
        let (teacher, beta) = (&self.teachers[task], self.options.beta(task));
        let engine = Engine::new(&self.student, EngineOptions::default());
        let mut gradients = self.coefficients.gradients();
        let mut logits = LogitGradients::new(&self.coefficients, &mut gradients, beta);
        let report = engine.run_with(wave, &mut Distillation::new(&teacher.logits), &mut logits)?;
        let mut loss = beta * report.loss.unwrap_or(0.0);
        if let Some(targets) = teacher.hidden.get(&wave.id) {
            let factor = beta * self.options.hidden * report.loss_tokens as f64;
            let mut hidden = HiddenGradients::new(&self.coefficients, &mut gradients, targets, factor);
            engine.run(wave, &mut hidden)?;
            loss += hidden.loss;
        }
        // Per token, as the loss is.
        loss += self.coefficients.pull(self.options, report.loss_tokens as f64, &mut gradients);
        self.coefficients.add_raw_gradients(&gradients, parameters);
        Ok(BatchLoss { loss, tokens: report.loss_tokens })
    }

    fn update(&mut self, parameters: &Parameters) -> moe_core::Result<()> {
        self.coefficients.set_raw(parameters);
        self.student = self.coefficients.clone().of(self.base).map_err(moe_core::Error::observer)?;
        Ok(())
    }

    fn evaluate(&mut self, _: &mut Parameters) -> moe_core::Result<f64> {
        let (mut sum, mut weight) = (0.0, 0.0);
        for (task, teacher) in self.teachers.iter().enumerate() {
            let waves: Vec<&Wave> =
                self.waves.iter().filter(|wave| self.task_of.get(&wave.id) == Some(&task)).collect();
            if !waves.is_empty() {
                sum += self.options.beta(task) * evaluate::divergence(&self.student, &teacher.logits, waves)?;
                weight += self.options.beta(task);
            }
        }
        Ok(if weight > 0.0 { sum / weight } else { 0.0 })
    }
}

impl Coefficients {
    /// The pull towards the start and, times `tokens`, its gradient with respect to the coefficients.
    fn pull(&self, options: &ExpertMerging, tokens: f64, gradients: &mut BTreeMap<String, Vec<f64>>) -> f64 {
        let tensors = gradients.len().max(1) as f64;
        let mut sum = 0.0;
        for (name, gradient) in gradients.iter_mut() {
            let raw = &self.raw()[name];
            // Chunks of a tensor share its weight.
            let share = options.gamma * tokens / tensors / self.chunks() as f64;
            for (gradient, raw) in gradient.iter_mut().zip(raw) {
                let away = sigmoid(f64::from(*raw)) - options.start;
                sum += share * away.abs();
                // Nothing pulls at the start itself.
                *gradient += share * if away.abs() < 1e-7 { 0.0 } else { away.signum() };
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests;

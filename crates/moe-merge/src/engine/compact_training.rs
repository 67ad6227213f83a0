//! Low-rank and sparse parts of merged experts, trained.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use moe_checkpoint::ExpertWeights;
use moe_core::data::Wave;
use moe_core::objective::{Blend, TeacherRecorder, Tempered};
use moe_core::trace::{ExpertTrace, Nobody, Observer, Signals};
use moe_core::train::{
    AdamW, BatchLoss, Decay, OnEvent, Optimizer, Parameters, Schedule, TrainOptions, TrainReport, TrainingTask, train,
};
use moe_core::{CrossEntropy, Distillation, Engine, EngineOptions, ExpertOverlay, Model, Objective, TeacherLogits};
use serde::{Deserialize, Serialize};

use super::gradients::weight_gradients;
use crate::compress::{
    CompactExpert, CompactReport, Compression, LowRankSparse, Ranks, RowScore, Set, kept_rows, store, stored_sets,
};
use crate::linalg::{product_into, view};
use crate::{Error, Result};

/// How the parts of `W = L R + S` are trained while rows of S go.
///
/// Source: MC-SMoE (arXiv 2310.01334), stages 5 and 6. S starts dense. At each step the importance of an element of S
/// is `|s dLoss/ds|`, that of a row its mean, smoothed over steps, `I <- smoothing I + (1 - smoothing) |s g|`; rows of
/// S of all matrices compete, those below [`Compression::keep_at`] are set to zero. The loss is `task * cross-entropy +
/// distillation * KL(teacher || student)` of next-token distributions at a temperature, without a factor of its square.
///
/// What differs from the source: L, R and S of the routed experts are trained and nothing else of the model; importance
/// is taken of S before a step, where its gradient belongs, not after it; the parts that are kept are those that were
/// best on evaluation waves, where at any step only the rows are counted that would be kept in the end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CompactTraining {
    /// Rank, and rows that are left in the end. Before the first step rows are ranked by magnitude.
    pub compression: Compression,
    /// Share of the steps at the start in which S stays dense; the source has 50 steps.
    pub warm_up: f64,
    /// Share of the steps at the end in which no further rows go; the source has 200 steps.
    pub cool_down: f64,
    /// Share of a row's importance that is left after a step.
    pub smoothing: f64,
    /// Weight of the cross-entropy.
    pub task: f64,
    /// Weight of the divergence from the teacher.
    pub distillation: f64,
    /// Its temperature.
    pub temperature: f64,
    /// Tokens of the teacher's distributions that are kept.
    pub top: usize,
    /// The training loop. Rates of 1e-5 to 1e-4 are the source's; ten times that undoes what the parts are.
    pub train: TrainOptions,
}

impl Default for CompactTraining {
    fn default() -> Self {
        let schedule = Schedule { peak: 1e-4, decay: Decay::Linear, final_share: 0.0, ..Schedule::default() };
        let adamw = AdamW { beta1: 0.9, beta2: 0.98, epsilon: 1e-6, weight_decay: 0.01 };
        Self {
            compression: Compression { rank: 32, keep_rows: 0.1, rows: RowScore::Magnitude, ranks: Ranks::Same },
            warm_up: 0.1,
            cool_down: 0.4,
            smoothing: 0.85,
            task: 1.0,
            distillation: 0.2,
            temperature: 2.0,
            top: usize::MAX,
            train: TrainOptions {
                epochs: 10,
                schedule,
                optimizer: Optimizer::AdamW(adamw),
                evaluate_every: Some(50),
                ..TrainOptions::default()
            },
        }
    }
}

/// What came of training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompactTrained {
    /// What compressing did.
    pub compact: CompactReport,
    /// How training went; its figure is the loss per token on the evaluation waves, with the rows that are left in the
    /// end.
    pub train: TrainReport,
}

impl CompactTraining {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`], [`Error::Engine`] for those of the training loop.
    pub fn validate(&self) -> Result<()> {
        self.compression.validate()?;
        if self.compression.rows != RowScore::Magnitude {
            return Err(Error::parameter(
                "compression.rows",
                "`fisher`",
                "`magnitude`: training finds importances itself",
            ));
        }
        if self.compression.ranks != Ranks::Same {
            return Err(Error::parameter("compression.ranks", "`importance`", "`same`: trained parts have one rank"));
        }
        let shares = [("warm_up", self.warm_up), ("cool_down", self.cool_down), ("smoothing", self.smoothing)];
        for (field, value) in shares {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::parameter(field, value, "a number in [0, 1]"));
            }
        }
        if self.warm_up + self.cool_down > 1.0 {
            let found = format!("{} and {}", self.warm_up, self.cool_down);
            return Err(Error::parameter("warm_up and cool_down", found, "shares of the steps, 1 together at most"));
        }
        for (field, value) in [("task", self.task), ("distillation", self.distillation)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::parameter(field, value, "a finite number of 0 or more"));
            }
        }
        if self.task + self.distillation == 0.0 {
            return Err(Error::parameter("task and distillation", 0, "one above 0"));
        }
        if self.top == 0 {
            return Err(Error::parameter("top", 0, "at least 1"));
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(Error::parameter("temperature", self.temperature, "a finite number above 0"));
        }
        if self.train.evaluate_every.is_none() {
            return Err(Error::parameter("train.evaluate_every", "none", "a number: evaluations decide what is kept"));
        }
        Ok(self.train.validate()?)
    }

    /// Splits the experts of `merged`, trains the parts on `training` and writes them to `to`, as
    /// [`Compression::compress`] does. `teacher` is the model before it was merged; ids of waves are different in
    /// `training` and `evaluation`. Without evaluation waves, those of training decide.
    ///
    /// Memory: 16 bytes for each number of L, R and the dense S of all experts, besides a backward sweep and the
    /// teacher's distributions.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`]; [`Error::Engine`] for models that do not read the same tokens and whatever stops
    /// them; an output that exists.
    #[allow(clippy::too_many_arguments)] // two models, two sets of waves, an output
    pub fn fit(
        &self,
        teacher: &Model,
        merged: &Model,
        training: &[Wave],
        evaluation: &[Wave],
        to: &Path,
        force: bool,
        on_event: OnEvent<'_>,
    ) -> Result<CompactTrained> {
        self.validate()?;
        let checkpoint = merged.checkpoint();
        let vocabulary = teacher.config().vocab_size;
        if merged.config().vocab_size != vocabulary {
            let found = format!("{} tokens", merged.config().vocab_size);
            return Err(Error::parameter(
                "vocabulary of the merged model",
                found,
                format!("the teacher's {vocabulary}"),
            ));
        }
        let mut recorder = Tempered::new(TeacherRecorder::new(vocabulary, self.top)?, self.temperature)?;
        let engine = Engine::new(teacher, EngineOptions::default());
        for wave in training.iter().chain(evaluation) {
            engine.run_with(wave, &mut recorder, &mut Nobody)?;
        }
        let evaluation = if evaluation.is_empty() { training } else { evaluation };
        let (mut run, mut parameters) = Run::new(self, merged, recorder.into_inner().finish(), evaluation)?;
        run.steps = self.train.steps(training.len());
        let report = train(&mut run, &mut parameters, training, &self.train, on_event)?;
        let Run { experts, best, .. } = run;
        let kept = best.map(|(_, kept)| kept).unwrap_or_default();
        let rows = experts.iter().flat_map(parts).map(|matrix| matrix.rows as u64).sum();
        let pruned = |at: usize| Ok(pruned(&experts[at], &kept[3 * at..3 * at + 3]));
        let compact = store(&self.compression, checkpoint, to, force, rows, pruned)?;
        Ok(CompactTrained { compact, train: report })
    }
}

const LEFT: &str = "left";
const RIGHT: &str = "right";
const SPARSE: &str = "sparse";

fn name(set: &Set, part: usize, factor: &str) -> String {
    format!("layer.{:03}.set.{:04}.{}.{factor}", set.layer, set.set, ["gate", "up", "down"][part])
}

fn parts(expert: &CompactExpert) -> [&LowRankSparse; 3] {
    [&expert.gate, &expert.up, &expert.down]
}

fn pruned(expert: &CompactExpert, kept: &[Vec<u32>]) -> CompactExpert {
    expert.clone().keep_rows([&kept[0], &kept[1], &kept[2]])
}

/// The model with these experts in the place of its stored sets.
fn shown(base: &Model, sets: &[Set], experts: &[CompactExpert]) -> Result<Model> {
    let mut dense = BTreeMap::new();
    for (set, expert) in sets.iter().zip(experts) {
        let weights = Arc::new(expert.dense());
        dense.extend(set.experts.iter().map(|expert| ((set.layer, *expert), weights.clone())));
    }
    Ok(base.with_overlay(Arc::new(Shown(dense)))?)
}

struct Shown(BTreeMap<(usize, usize), Arc<ExpertWeights>>);

impl ExpertOverlay for Shown {
    fn apply(&self, layer: usize, expert: usize, weights: ExpertWeights) -> moe_core::Result<ExpertWeights> {
        Ok(self.0.get(&(layer, expert)).map_or(weights, |shown| (**shown).clone()))
    }
}

/// Parts being trained.
struct Run<'a> {
    options: &'a CompactTraining,
    base: &'a Model,
    student: Model,
    /// With all rows of S, those that went being zero.
    experts: Vec<CompactExpert>,
    sets: Vec<Set>,
    /// Smoothed importance of the rows of S, three matrices of every set; none before the first step.
    importance: Option<Vec<Vec<f64>>>,
    /// The lowest figure, and the rows it was found with.
    best: Option<(f64, Vec<Vec<u32>>)>,
    teacher: TeacherLogits,
    evaluation: &'a [Wave],
    /// Steps of the training.
    steps: usize,
}

impl<'a> Run<'a> {
    fn new(
        options: &'a CompactTraining,
        base: &'a Model,
        teacher: TeacherLogits,
        evaluation: &'a [Wave],
    ) -> Result<(Self, Parameters)> {
        let (checkpoint, rank) = (base.checkpoint(), options.compression.rank);
        let sets = stored_sets(checkpoint);
        let split = |set: &Set| CompactExpert::split(&checkpoint.expert(set.layer, set.experts[0])?, rank);
        let experts = sets.iter().map(split).collect::<Result<Vec<_>>>()?;
        let mut parameters = Parameters::new();
        for (set, expert) in sets.iter().zip(&experts) {
            for (part, matrix) in parts(expert).into_iter().enumerate() {
                for (factor, values) in [(LEFT, &matrix.left), (RIGHT, &matrix.right), (SPARSE, &matrix.sparse)] {
                    parameters.insert(name(set, part, factor), values.clone());
                }
            }
        }
        let student = shown(base, &sets, &experts)?;
        let (importance, best) = (None, None);
        let run = Self { options, base, student, experts, sets, importance, best, teacher, evaluation, steps: 0 };
        Ok((run, parameters))
    }

    fn objective(&self) -> moe_core::Result<impl Objective + '_> {
        let distillation = Tempered::new(Distillation::new(&self.teacher), self.options.temperature)?;
        Ok(Blend::default().with(self.options.task, CrossEntropy).with(self.options.distillation, distillation))
    }

    /// What rows of S are ranked by.
    fn scores(&self) -> Result<Vec<Vec<f64>>> {
        if let Some(importance) = &self.importance {
            return Ok(importance.clone());
        }
        let mut scores = Vec::with_capacity(3 * self.experts.len());
        for expert in &self.experts {
            scores.extend(expert.row_scores(RowScore::Magnitude, None)?);
        }
        Ok(scores)
    }

    fn figure(&mut self) -> Result<f64> {
        let kept = kept_rows(&self.scores()?, self.options.compression.keep_rows);
        let experts: Vec<CompactExpert> =
            self.experts.iter().zip(kept.chunks_exact(3)).map(|(expert, kept)| pruned(expert, kept)).collect();
        let model = shown(self.base, &self.sets, &experts)?;
        let engine = Engine::new(&model, EngineOptions::default());
        let (mut sum, mut tokens) = (0.0, 0);
        for wave in self.evaluation {
            let report = engine.run_with(wave, &mut self.objective()?, &mut Nobody)?;
            sum += report.loss.unwrap_or(0.0);
            tokens += report.loss_tokens;
        }
        let figure = sum / tokens.max(1) as f64;
        if self.best.as_ref().is_none_or(|(best, _)| figure < *best) {
            self.best = Some((figure, kept));
        }
        Ok(figure)
    }
}

impl TrainingTask for Run<'_> {
    fn accumulate(&mut self, wave: &Wave, parameters: &mut Parameters) -> moe_core::Result<BatchLoss> {
        let mut observer = SetGradients { set_of: BTreeMap::new(), sums: BTreeMap::new() };
        for (at, set) in self.sets.iter().enumerate() {
            observer.set_of.extend(set.experts.iter().map(|expert| ((set.layer, *expert), at)));
        }
        let engine = Engine::new(&self.student, EngineOptions::default());
        let report = engine.run_with(wave, &mut self.objective()?, &mut observer)?;
        for (at, matrices) in observer.sums {
            for (part, (matrix, gradient)) in parts(&self.experts[at]).into_iter().zip(&matrices).enumerate() {
                let LowRankSparse { rows, cols, rank, left, right, .. } = matrix;
                let (rows, cols, rank) = (*rows, *cols, *rank);
                let whole = view(gradient, rows, cols);
                let set = &self.sets[at];
                if let Some(into) = parameters.gradient_mut(&name(set, part, LEFT)) {
                    product_into(into, true, whole, view(right, rank, cols).transpose());
                }
                if let Some(into) = parameters.gradient_mut(&name(set, part, RIGHT)) {
                    product_into(into, true, view(left, rows, rank).transpose(), whole);
                }
                if let Some(into) = parameters.gradient_mut(&name(set, part, SPARSE)) {
                    into.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
                }
            }
        }
        Ok(BatchLoss { loss: report.loss.unwrap_or(0.0), tokens: report.loss_tokens })
    }

    fn gradients(&mut self, _: usize, factor: f64, parameters: &mut Parameters) -> moe_core::Result<()> {
        let smoothing = self.options.smoothing;
        let mut found = Vec::with_capacity(3 * self.sets.len());
        for (set, expert) in self.sets.iter().zip(&self.experts) {
            for (part, matrix) in parts(expert).into_iter().enumerate() {
                let Some(sparse) = parameters.get(&name(set, part, SPARSE)) else { continue };
                let cols = matrix.cols.max(1);
                let rows = sparse.values.chunks_exact(cols);
                let mean = |(s, g): (&[f32], &[f32])| {
                    s.iter().zip(g).map(|(s, g)| (f64::from(*s) * f64::from(*g)).abs()).sum::<f64>() * factor
                        / cols as f64
                };
                found.push(match sparse.gradient() {
                    // No token of the step came to this set.
                    [] => vec![0.0; rows.len()],
                    gradient => rows.zip(gradient.chunks_exact(cols)).map(mean).collect(),
                });
            }
        }
        self.importance = Some(match self.importance.take() {
            None => found,
            Some(mut smoothed) => {
                for (smoothed, found) in smoothed.iter_mut().flatten().zip(found.iter().flatten()) {
                    *smoothed = smoothing * *smoothed + (1.0 - smoothing) * found;
                }
                smoothed
            }
        });
        Ok(())
    }

    fn after_step(&mut self, step: usize, parameters: &mut Parameters) -> moe_core::Result<()> {
        let (options, steps) = (self.options, self.steps);
        let of = |share: f64| (share * steps as f64).round() as usize;
        let keep = options.compression.keep_at(step, steps, of(options.warm_up), of(options.cool_down));
        let Some(importance) = self.importance.as_ref().filter(|_| keep < 1.0) else { return Ok(()) };
        let kept = kept_rows(importance, keep);
        for ((set, expert), kept) in self.sets.iter().zip(&self.experts).zip(kept.chunks_exact(3)) {
            for (part, matrix) in parts(expert).into_iter().enumerate() {
                let Some(sparse) = parameters.get_mut(&name(set, part, SPARSE)) else { continue };
                for (row, values) in sparse.values.chunks_exact_mut(matrix.cols.max(1)).enumerate() {
                    if kept[part].binary_search(&(row as u32)).is_err() {
                        values.fill(0.0);
                    }
                }
            }
        }
        Ok(())
    }

    fn update(&mut self, parameters: &Parameters) -> moe_core::Result<()> {
        for (set, expert) in self.sets.iter().zip(&mut self.experts) {
            for (part, matrix) in [&mut expert.gate, &mut expert.up, &mut expert.down].into_iter().enumerate() {
                let into = [(LEFT, &mut matrix.left), (RIGHT, &mut matrix.right), (SPARSE, &mut matrix.sparse)];
                for (factor, into) in into {
                    if let Some(parameter) = parameters.get(&name(set, part, factor)) {
                        into.clone_from(&parameter.values);
                    }
                }
            }
        }
        self.student = shown(self.base, &self.sets, &self.experts).map_err(moe_core::Error::observer)?;
        Ok(())
    }

    fn evaluate(&mut self, _: &mut Parameters) -> moe_core::Result<f64> {
        self.figure().map_err(moe_core::Error::observer)
    }
}

/// Sums of the gradients of the matrices of each stored set.
struct SetGradients {
    set_of: BTreeMap<(usize, usize), usize>,
    sums: BTreeMap<usize, [Vec<f32>; 3]>,
}

impl Observer for SetGradients {
    fn needs(&self) -> Signals {
        Signals::GRADIENTS
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        let Some(set) = self.set_of.get(&(trace.layer, trace.expert)) else { return Ok(()) };
        let Some(matrices) = weight_gradients(trace) else { return Ok(()) };
        match self.sums.get_mut(set) {
            None => drop(self.sums.insert(*set, matrices)),
            Some(sums) => {
                for (sum, found) in sums.iter_mut().zip(&matrices) {
                    sum.iter_mut().zip(found).for_each(|(sum, g)| *sum += g);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

//! What a recipe will cost, before it is carried out.

use std::time::Instant;

use burn::tensor::{Distribution, Tensor};
use moe_checkpoint::{ModelConfig, MoeShape};
use moe_core::trace::Signals;
use moe_core::{Engine, EngineOptions, Model};
use moe_merge::Amount;
use moe_prune::{Budget, PrunePlan, Pruner, Questions};

use super::{Run, tune};
use crate::Result;
use crate::eval_file::EvalFile;
use crate::recipe::{Form, Prune, Recipe, Repair, Step};

/// What one step takes, roughly, and the model after it.
pub(super) struct Estimate {
    /// Seconds, from the multiplications that the step is made of and the speed of this machine at them.
    pub seconds: f64,
    /// Memory, in bytes: the engine's plan for the largest wave.
    pub memory: u64,
    /// Parameters of the model after the step.
    pub parameters: u64,
    /// Bytes of the model after the step, as it would be written.
    pub bytes: u64,
}

/// Share of the speed at one large product that whole sweeps reach.
const EFFICIENCY: f64 = 0.4;
/// Bytes per second that weights are read at where they do not stay in memory, and written at: an ordinary disk.
const DISK: f64 = 5e8;
/// Multiplications of a backward sweep, relative to those of a forward sweep.
const BACKWARD: f64 = 2.0;
/// Candidates that a search through the running model tries, about.
const TRIALS: f64 = 100.0;

/// The steps, each after those before it.
pub(super) fn of(recipe: &Recipe, run: &Run<'_>) -> Result<Vec<Estimate>> {
    let model = run.engine_model()?;
    let engine = Engine::new(&model, EngineOptions { loss: true, ..EngineOptions::default() });
    let (rate, shape) = (speed(&model) * EFFICIENCY, run.model.shape());
    let whole = (run.model.parameters() as f64, run.model.bytes_on_disk() as f64);
    let routed = shape.parameters() as f64;
    // What is left of the routed experts, as a share, and of the bytes of those.
    let (mut left, mut rounded) = (1.0, 1.0);
    let mut estimates = Vec::with_capacity(recipe.steps.len());
    let tokens = run.calibration.as_ref().map_or(0, |data| data.data.tokens()) as f64;
    let waves = run.calibration.as_ref().map_or(0, |data| data.waves.len()) as f64;
    let largest = run.calibration.iter().flat_map(|data| &data.waves).map(|wave| wave.tokens()).max().unwrap_or(1);
    let memory = |tokens: usize, gradients: bool| -> Result<u64> {
        let needs = if gradients { Signals::GRADIENTS } else { Signals::NONE };
        Ok(engine.plan(tokens, needs)?.expected)
    };
    for step in &recipe.steps {
        let active = active(&whole, routed * left, shape, model.config());
        let forward = |tokens: f64| 2.0 * active * tokens / rate;
        let reading = |waves: f64| waves * whole.1 / DISK * if resident(&model) { 0.0 } else { 1.0 };
        let (mut seconds, mut peak) = (0.0, 0);
        match step {
            Step::Score(score) => {
                let mut backward = false;
                let mut runs = score.super_experts()?.is_some();
                for scorer in score.scorers()? {
                    let ids = scorer.build()?.needs().statistics;
                    runs |= !ids.is_empty();
                    let collectors = moe_importance::collectors::collectors_for(&ids)?;
                    backward |= collectors.iter().any(|collector| collector.needs().backward());
                }
                if runs {
                    seconds = forward(tokens) * if backward { 1.0 + BACKWARD } else { 1.0 } + reading(waves);
                    peak = memory(largest, backward)?;
                }
            }
            Step::Prune(prune) => {
                let asks = match prune.plan.is_none() && prune.keep_list.is_none() {
                    true => prune.pruner(&model.config().routing)?.needs().probe != Questions::NONE,
                    false => false,
                };
                let searches = prune.form == Form::Auto && prune.pruner.is_none() && run.calibration.is_some();
                let chooses = prune.chooses_scorer();
                if asks || searches || chooses {
                    let mut trials = if asks { TRIALS } else { 10.0 * f64::from(u8::from(searches)) };
                    if chooses {
                        // Gradients of what is not held back, then as many sweeps as there may be scorers.
                        trials += 4.0 + BACKWARD;
                    }
                    seconds = trials * forward(tokens) + reading(trials * waves);
                    peak = memory(largest, chooses)?;
                }
                if prune.form != Form::Masked {
                    left *= kept(prune, run)?;
                }
            }
            Step::Merge(merge) => {
                let amount = merge.recipe()?.budget.amount;
                let experts = shape.layers.first().map_or(1, |layer| layer.num_experts()).max(1) as f64;
                left *= match amount {
                    Amount::Ratio(ratio) => 1.0 - ratio,
                    Amount::Groups(groups) => (groups as f64 / experts).min(1.0),
                };
                let steps = merge.training.as_ref().map_or(0, |training| training.train.steps(waves.max(1.0) as usize));
                let per_step = forward(tokens / waves.max(1.0)) * (1.0 + BACKWARD);
                seconds = 2.0 * forward(tokens) + reading(waves) + steps as f64 * per_step;
                peak = memory(largest, steps > 0)?;
            }
            Step::Repair(repair) => {
                let sweeps = match repair {
                    Repair::RouterDistillation(_) => 10.0 * (1.0 + BACKWARD),
                    _ => 3.0,
                };
                seconds = sweeps * forward(tokens) + reading(waves);
                peak = memory(largest, matches!(repair, Repair::RouterDistillation(_)))?;
            }
            Step::Tune(step) => {
                let rows = tune::rows(step, recipe, run.tokenizer.as_ref(), model.config().vocab_size)?;
                let training = step.recipe(recipe.seed)?.train;
                let steps = training.steps(rows.waves.len()) as f64;
                let per_step = rows.data.tokens() as f64 / rows.waves.len().max(1) as f64;
                let per_step = per_step * training.waves_per_step as f64;
                seconds = steps * (1.0 + BACKWARD) * forward(per_step) + reading(steps) + whole.1 / DISK;
                peak = memory(rows.waves.iter().map(|wave| wave.tokens()).max().unwrap_or(1), true)?;
            }
            Step::Evaluate(evaluate) => {
                let paths = if evaluate.data.is_empty() { &recipe.data.eval } else { &evaluate.data };
                let files = EvalFile::load_all(paths, &evaluate.options, run.tokenizer.as_ref(), model.config())?;
                let tokens: usize = files.iter().map(EvalFile::tokens).sum();
                seconds = forward(tokens as f64) + reading(files.len() as f64);
                peak = memory(recipe.data.wave_tokens.get().min(tokens.max(1)), false)?;
            }
            Step::Quantize(quantize) => {
                let report = moe_checkpoint::Quantized::on(&run.model, &quantize.options()?);
                // What does not fit the model as it is now may fit what is left of it: then nothing is known.
                rounded = report.map_or(1.0, |made| {
                    let bytes = made.report().bytes;
                    bytes.after as f64 / bytes.before.max(1) as f64
                });
                if quantize.reads_rows() {
                    let passes = quantize.with().passes() + usize::from(quantize.mixed.is_some());
                    seconds = 2.0 * passes as f64 * forward(tokens) + reading(waves);
                    peak = memory(largest, false)?;
                }
            }
            Step::Sparsify(_) => {
                seconds = forward(tokens) + reading(waves);
                peak = memory(largest, false)?;
            }
            Step::Evolve(step) => {
                let runs = (step.population * (1 + step.pruning + step.merging)) as f64;
                seconds = runs * forward(tokens) + reading(runs * waves);
                peak = memory(largest, false)?;
                let experts = shape.layers.first().map_or(1, |layer| layer.num_experts()).max(1) as f64;
                left *= (step.experts as f64 / experts).min(1.0);
            }
            Step::Decompose(step) => {
                if step.compression().needs_scores() {
                    seconds = forward(tokens) * (1.0 + BACKWARD) + reading(waves);
                    peak = memory(largest, true)?;
                }
            }
            Step::Adapt(adapt) => {
                let rows = adapt.needs_rows()?;
                if rows {
                    seconds = forward(tokens) + reading(waves);
                    peak = memory(largest, false)?;
                }
            }
            Step::Frontier(step) => {
                let models = 1 + 2 * step.ratios.len();
                let each = 1 + step.formats.len() * (shape.layers.len() + 1) + step.budgets as usize;
                let runs = models * each + 2 * step.budgets as usize;
                seconds = runs as f64 * forward(tokens) + reading(runs as f64 * waves);
                peak = memory(largest, true)?;
            }
            Step::Write(_) => {
                let after = rounded * whole.1 * (whole.0 - routed * (1.0 - left)) / whole.0;
                seconds = 2.0 * after / DISK;
                // A piece that is made while the one before is written.
                peak = 2 * (64 << 20);
            }
            Step::Protect(_) => {}
        }
        let parameters = whole.0 - routed * (1.0 - left);
        let bytes = rounded * whole.1 * parameters / whole.0.max(1.0);
        estimates.push(Estimate { seconds, memory: peak, parameters: parameters as u64, bytes: bytes as u64 });
    }
    Ok(estimates)
}

/// The share of the routed experts that a pruning keeps.
fn kept(prune: &Prune, run: &Run<'_>) -> Result<f64> {
    let shape = run.model.shape();
    if let Some(path) = &prune.plan {
        let plan = PrunePlan::load(path)?;
        return Ok(plan.units_kept() as f64 / plan.shape.units().max(1) as f64);
    }
    if let Some(path) = &prune.keep_list {
        let plan = PrunePlan::keep_only(shape, run.model.fingerprint(), &super::check::mask(path)?)?;
        return Ok(plan.units_kept() as f64 / shape.units().max(1) as f64);
    }
    Ok(match prune.budget_on(&run.model)? {
        Some(Budget::Ratio(ratio)) => 1.0 - ratio,
        Some(Budget::KeepParameters(count)) => count as f64 / shape.parameters().max(1) as f64,
        Some(Budget::DropParameters(count)) => 1.0 - count as f64 / shape.parameters().max(1) as f64,
        _ => 1.0,
    })
}

/// Parameters that a token is multiplied with.
fn active(whole: &(f64, f64), routed: f64, shape: &MoeShape, config: &ModelConfig) -> f64 {
    let experts = shape.layers.iter().map(|layer| layer.num_experts()).max().unwrap_or(1).max(1);
    let share = (config.routing.top_k as f64 / experts as f64).min(1.0);
    (whole.0 - shape.parameters() as f64).max(0.0) + routed * share
}

/// Whether the weights stay in memory between waves.
fn resident(model: &Model) -> bool {
    model.max_memory().is_none_or(|limit| limit > 4 * model.checkpoint().parameters())
}

/// Multiplications and additions per second that the device reaches at one large product of matrices.
fn speed(model: &Model) -> f64 {
    const SIZE: usize = 512;
    let random = || Tensor::<2>::random([SIZE, SIZE], Distribution::Default, model.device());
    let (a, b) = (random(), random());
    let product = || a.clone().matmul(b.clone()).sum().into_scalar::<f32>();
    const ROUNDS: usize = 4;
    product();
    let start = Instant::now();
    for _ in 0..ROUNDS {
        product();
    }
    2.0 * (ROUNDS * SIZE.pow(3)) as f64 / start.elapsed().as_secs_f64().max(1e-9)
}

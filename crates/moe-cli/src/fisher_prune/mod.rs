//! Score every unit, prune, write, measure: the whole path, as `fisher_prune_qwen` runs it.

mod arguments;
mod job;
mod measure;
mod prune;
mod report;
mod results;
mod score;

use std::time::Instant;

use moe_core::memory::process_memory;

pub use arguments::{Arguments, DEFAULT_OUT};
pub use job::{Job, Method};
pub use prune::PrunedModel;
pub use results::{Eval, MethodResult, Results};

use crate::Result;
use crate::format::{count, percent, size};
use crate::progress::Progress;

/// A finished run.
#[derive(Debug)]
pub struct Finished {
    /// What was found.
    pub results: Results,
    /// Tables and remarks for a terminal.
    pub text: String,
}

/// Figures of the run itself.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// Calibration tokens per second; none if everything had been collected before.
    scoring_speed: Option<f64>,
    /// Seconds of scoring, writing and measuring.
    seconds: [f64; 3],
    /// Largest resident memory so far, in bytes.
    peak_memory: Option<u64>,
}

/// Runs it all. Everything that can be wrong with the arguments is found before any work is done and anything written.
///
/// # Errors
/// What is wrong, or what stopped the work; `--resume` goes on from there.
pub fn run(arguments: Arguments, progress: Progress) -> Result<Finished> {
    let job = Job::new(arguments)?;
    job.out.open(job.existing, &job.recipe())?;
    let mut seconds = [0.0; 3];
    let mut clock = Instant::now();
    let mut lap = |phase: usize| {
        seconds[phase] = clock.elapsed().as_secs_f64();
        clock = Instant::now();
    };
    let (scored, scoring_speed) = score::score(&job, progress)?;
    lap(0);
    let plans = prune::plans(&job, &scored.tables)?;
    let pruned = prune::write(&job, plans, progress)?;
    lap(1);
    let (base, evals) = measure::measure(&job, &pruned, progress)?;
    lap(2);
    let methods = pruned.iter().zip(evals).map(|(model, eval)| MethodResult {
        method: model.method,
        ratio: model.ratio,
        dropped: model.plan.ratio.achieved,
        eval,
    });
    let model = std::path::absolute(job.arguments.model_dir()).map_err(crate::Error::io(job.arguments.model_dir()))?;
    let results = Results { model, base, methods: methods.collect() };
    let cost = Cost { scoring_speed, seconds, peak_memory: process_memory().map(|memory| memory.peak) };
    report::page(&job, &scored, &pruned, &results, &cost)?.write(job.out.report())?;
    job.out.finish(&results.to_json())?;
    let text = text(&job, &scored, &pruned, &results, &cost);
    Ok(Finished { results, text })
}

/// What is printed.
fn text(job: &Job, scored: &score::Scored, pruned: &[PrunedModel], results: &Results, cost: &Cost) -> String {
    let mut text = String::new();
    let mut line = |words: String| {
        text.push_str(&words);
        text.push('\n');
    };
    line(model_line(job));
    line(calibration_line(job, scored, cost));
    for model in pruned.iter().take(1).filter(|model| !model.plan.never_routed.is_empty()) {
        let n = model.plan.never_routed.len();
        line(format!("{n} experts got no calibration token: their scores say nothing about them"));
    }
    line(results.table(&job.evals).to_text());
    measures(job).into_iter().for_each(&mut line);
    let [scoring, writing, measuring] = cost.seconds.map(|seconds| format!("{seconds:.1} s"));
    let memory = cost.peak_memory.map_or(String::new(), |bytes| format!("; peak memory {}", size(bytes)));
    line(format!("scoring {scoring}, writing {writing}, measuring {measuring}{memory}"));
    line(format!(
        "checkpoints, scores and plan in {}; figures in {}",
        job.out.root().display(),
        job.out.report().display()
    ));
    text
}

/// What each column of the table says.
fn measures(job: &Job) -> Vec<String> {
    let mut lines: Vec<String> =
        job.evals.iter().map(|file| format!("{}: {}", file.key(), file.description())).collect();
    match job.evals.iter().any(moe::eval_file::EvalFile::is_exact) {
        true => lines.push("tokens/s: generated for a batch of prompts, whose processing counts".into()),
        false if !lines.is_empty() => lines.push("tokens/s: read and predicted".into()),
        false => lines.push("nothing was measured: no --eval file".into()),
    }
    lines
}

fn model_line(job: &Job) -> String {
    let checkpoint = job.model.checkpoint();
    let shape = checkpoint.shape();
    let experts: usize = shape.layers.iter().map(|layer| layer.num_experts()).sum();
    let routed = shape.parameters() as f64 / checkpoint.parameters().max(1) as f64;
    format!(
        "{}: {}, {} parameters ({} of them in {} routed experts of {} layers, {} units)",
        job.arguments.model_dir().display(),
        checkpoint.config().model_type,
        count(checkpoint.parameters()),
        percent(routed),
        count(experts as u64),
        shape.layers.len(),
        count(shape.units() as u64)
    )
}

fn calibration_line(job: &Job, scored: &score::Scored, cost: &Cost) -> String {
    let file = job.arguments.calibration.clone().unwrap_or_default();
    let speed = cost.scoring_speed.map_or(String::new(), |speed| format!(", {} tokens/s", count(speed as u64)));
    let dropped = match job.calibration.dropped {
        0 => String::new(),
        n => format!(" ({n} rows had nothing to predict)"),
    };
    let resumed = match scored.collected.waves_resumed {
        0 => String::new(),
        n => format!(", {n} of {} waves taken over", scored.collected.waves),
    };
    format!(
        "scored on {} sequences, {} tokens{dropped} of {}{resumed}{speed}",
        job.calibration.sequences.len(),
        count(job.calibration.tokens() as u64),
        file.display()
    )
}

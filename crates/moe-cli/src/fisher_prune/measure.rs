//! What a checkpoint on disk can do, how large it is and how fast.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

use moe_checkpoint::write_atomic;
use moe_core::Model;
use moe_core::data::WaveOptions;
use moe_core::generate::{GenerateOptions, generate};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::job::Job;
use super::prune::PrunedModel;
use super::results::Eval;
use crate::progress::{Progress, Unit};
use crate::{Error, Result};

/// Prompts of a speed measurement, at most.
const SPEED_PROMPTS: usize = 32;
/// Tokens generated for each.
const SPEED_TOKENS: usize = 16;

/// A measurement that an interrupted run need not repeat.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Measured {
    /// What was measured: model, plan, export, evaluation files.
    of: String,
    eval: Eval,
}

/// Measures the model and every pruned checkpoint: each is opened from disk, as a user would. What an earlier run
/// measured is taken over.
///
/// # Errors
/// Whatever stops a model.
pub fn measure(job: &Job, pruned: &[PrunedModel], progress: Progress) -> Result<(Eval, Vec<Eval>)> {
    let path = job.out.measured();
    let mut known: BTreeMap<String, Measured> = match fs::read(&path) {
        Ok(json) => {
            serde_json::from_slice(&json).map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))?
        }
        Err(_) => BTreeMap::new(),
    };
    let steps = (pruned.len() + 1) * job.evals.len().max(1);
    let bar = progress.bar("measuring", steps as u64, Unit::Count("measurements"));
    let evals: Vec<Value> = job.evals.iter().map(moe::eval_file::EvalFile::recipe).collect();
    let mut one = |name: String, dir: &Path, plan: &str| -> Result<Eval> {
        let mut of = blake3::Hasher::new();
        for part in
            [&job.model.checkpoint().fingerprint(), plan, job.export.name(), &Value::from(evals.clone()).to_string()]
        {
            of.update(part.as_bytes()).update(b"\n");
        }
        let of = of.finalize().to_hex().to_string();
        if let Some(found) = known.get(&name).filter(|found| found.of == of) {
            job.evals.iter().for_each(|_| bar.step());
            return Ok(found.eval.clone());
        }
        let eval = checkpoint(job, &name, dir, &bar)?;
        known.insert(name, Measured { of, eval: eval.clone() });
        let json = serde_json::to_vec_pretty(&known).map_err(|error| Error::Invalid(error.to_string()))?;
        write_atomic(&path, &json)?;
        Ok(eval)
    };
    let base = one("base".into(), &job.arguments.model_dir(), "")?;
    let models =
        pruned.iter().map(|model| one(format!("{}-{}", model.method, model.ratio), &model.dir, &model.plan.to_json()?));
    Ok((base, models.collect::<Result<Vec<_>>>()?))
}

fn checkpoint(job: &Job, name: &str, dir: &Path, bar: &crate::progress::Bar) -> Result<Eval> {
    let model = Model::open(dir, job.model.device(), job.arguments.max_memory)?;
    let waves = WaveOptions::Tokens(job.arguments.wave_tokens);
    let mut eval = Eval {
        metrics: Vec::with_capacity(job.evals.len()),
        parameters: model.checkpoint().parameters(),
        bytes: model.checkpoint().bytes_on_disk(),
        tokens_per_s: None,
        export_dir: std::path::absolute(dir).map_err(Error::io(dir))?,
    };
    let (mut tokens, start) = (0, Instant::now());
    for file in &job.evals {
        let Some(tokenizer) = &job.tokenizer else { break };
        bar.label(format!("{name}: {}", file.name));
        let (value, count) = file.measure(&model, tokenizer, waves)?;
        tokens += count;
        eval.metrics.push((file.key(), value));
        bar.step();
    }
    let seconds = start.elapsed().as_secs_f64();
    eval.tokens_per_s = match job.evals.iter().find_map(moe::eval_file::EvalFile::prompts) {
        Some(prompts) => Some(generation_speed(&model, &prompts)?),
        None if tokens > 0 => Some(tokens as f64 / seconds),
        None => None,
    };
    Ok(eval)
}

/// New tokens per second, best of several runs: the same number of tokens for the same prompts, whatever the model
/// says, because a model that has lost the thread talks longer.
fn generation_speed(model: &Model, prompts: &[Vec<u32>]) -> Result<f64> {
    let prompts = &prompts[..prompts.len().min(SPEED_PROMPTS)];
    let options = GenerateOptions { max_new_tokens: SPEED_TOKENS, ..GenerateOptions::default() };
    let mut best = 0f64;
    // the first run also loads weights that stay; a model that streams them takes long and varies little
    let (mut spent, mut runs) = (0.0, 0);
    while runs < 10 && spent < 0.6 {
        let start = Instant::now();
        let tokens: usize = generate(model, prompts, &options, |_| false)?.iter().map(Vec::len).sum();
        let seconds = start.elapsed().as_secs_f64().max(1e-9);
        best = best.max(tokens as f64 / seconds);
        spent += seconds;
        runs += 1;
    }
    Ok(best)
}

//! One pass over calibration data, score files for any number of scorers, and what it cost.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use moe_checkpoint::{Checkpoint, ExpertId};
use moe_core::Model;
use moe_core::data::{Dataset, DatasetOptions, Tokenizer, WaveOptions};
use moe_core::memory::process_memory;
use moe_importance::{Calibration, Progress as Collected, ScorerConfig, StatisticId, SuperExpertOptions, SuperExperts};
use serde::Serialize;

use crate::progress::{Progress, Unit};
use crate::{Error, Result, cli, format};

/// Scores the routed experts or units of a checkpoint.
#[derive(Clone, Debug, Parser)]
#[command(after_help = scorers_help())]
pub struct Arguments {
    /// Directory of a Hugging Face checkpoint
    #[arg(long)]
    pub model: PathBuf,
    /// Rows to calibrate on: .jsonl or .txt
    #[arg(long)]
    pub calibration: PathBuf,
    /// Scorer as JSON, such as {"type":"fisher","criterion":"abs"}, or just its name; repeatable. See the list below
    #[arg(long = "scorer", required_unless_present_any = ["super_experts", "statistics"], value_parser = scorer)]
    pub scorers: Vec<ScorerConfig>,
    /// Also find super experts, as default, released or reap, or with options as JSON: writes super_experts.json and
    /// protect.json, a protection mask
    #[arg(long, value_name = "OPTIONS", value_parser = super_experts)]
    pub super_experts: Option<SuperExpertOptions>,
    /// Also collect a statistic that no scorer needs, such as routing.logit_gram; repeatable
    #[arg(long = "statistic", value_name = "ID")]
    pub statistics: Vec<String>,
    /// New directory for the score files and the statistics
    #[arg(long)]
    pub out: PathBuf,
    /// Continue an interrupted run in --out
    #[arg(long)]
    pub resume: bool,
    /// Collect only shard I of N, as I/N, and score nothing
    #[arg(long, value_parser = part)]
    pub shard: Option<(usize, usize)>,
    /// Take over the waves of another run of the same job, a shard's --out; repeatable
    #[arg(long)]
    pub absorb: Vec<PathBuf>,
    /// How rows are read
    #[command(flatten)]
    pub rows: cli::RowArguments,
    /// Sequences to use, at most
    #[arg(long, default_value_t = 128, value_parser = cli::at_least(1))]
    pub samples: usize,
    /// Tokens per sequence, at most
    #[arg(long, default_value_t = 2048, value_parser = cli::at_least(2))]
    pub length: usize,
    /// Shuffle rows with this seed; without it, the first rows
    #[arg(long)]
    pub seed: Option<u64>,
    /// Tokens that go through the model together
    #[arg(long, default_value = "16384", value_parser = cli::non_zero)]
    pub wave_tokens: NonZeroUsize,
    /// Memory to stay within, such as 8GiB; never changes results
    #[arg(long, value_parser = cli::bytes)]
    pub max_memory: Option<u64>,
    /// flex (CPU), wgpu, vulkan or cuda, as far as compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// What a run did.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Score files written; none for a shard.
    pub scores: Vec<PathBuf>,
    /// Super experts, if they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub super_experts: Option<Vec<ExpertId>>,
    /// Sequences of the whole data set.
    pub sequences: usize,
    /// Tokens collected in this run.
    pub tokens: u64,
    /// Seconds of collecting.
    pub seconds: f64,
    /// Tokens per second.
    pub tokens_per_s: f64,
    /// Mean cross-entropy per predicted token, in nats, if the scorers needed a loss.
    pub loss: Option<f64>,
    /// Largest resident size of the process, in MiB.
    pub peak_rss_mib: Option<f64>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} tokens in {:.1} s, {:.1} tokens/s", self.tokens, self.seconds, self.tokens_per_s)?;
        if let Some(loss) = self.loss {
            writeln!(f, "loss {loss:.4} nats per token")?;
        }
        if let Some(peak) = self.peak_rss_mib {
            writeln!(f, "peak memory {}", format::size((peak * 1024.0 * 1024.0) as u64))?;
        }
        for ExpertId { layer, expert } in self.super_experts.iter().flatten() {
            writeln!(f, "super expert: layer {layer}, expert {expert}")?;
        }
        self.scores.iter().try_for_each(|path| writeln!(f, "{}", path.display()))
    }
}

/// Checks everything, collects and scores.
///
/// # Errors
/// Whatever is wrong with the arguments or the files they name, and whatever stops the run.
pub fn run(arguments: &Arguments, progress: Progress) -> Result<Report> {
    let device = moe_core::device::device(&arguments.device)?;
    let checkpoint = Arc::new(Checkpoint::open(&arguments.model)?);
    if checkpoint.shape().units() == 0 {
        return Err(Error::Invalid(format!("{}: no routed experts to score", arguments.model.display())));
    }
    if arguments.out.exists() && !arguments.resume {
        return Err(Error::Invalid(format!("{}: exists; --resume continues in it", arguments.out.display())));
    }
    let scorers = arguments.scorers.iter().map(ScorerConfig::build).collect::<moe_importance::Result<Vec<_>>>()?;
    let tokenizer = match arguments.model.join("tokenizer.json").exists() {
        true => Some(Tokenizer::from_dir(&arguments.model)?),
        false => None,
    };
    let options = DatasetOptions {
        samples: Some(arguments.samples),
        length: arguments.length,
        seed: arguments.seed,
        reading: arguments.rows.reading(),
        ..DatasetOptions::default()
    };
    let vocab = checkpoint.config().vocab_size;
    let data = Dataset::load(&arguments.calibration, tokenizer.as_ref(), vocab, &options)?;
    cli::left_out(&arguments.calibration, &data);
    let mut ids: Vec<StatisticId> = scorers.iter().flat_map(|scorer| scorer.needs().statistics).collect();
    ids.extend(arguments.super_experts.map(|options| options.needs()));
    ids.extend(arguments.statistics.iter().cloned().map(StatisticId::from));
    let model = Model::new(checkpoint, &device, arguments.max_memory)?;
    let mut calibration = Calibration::new(&model, &data, WaveOptions::Tokens(arguments.wave_tokens))
        .statistics(ids)
        .store(arguments.out.join("statistics"))
        .absorb(arguments.absorb.iter().map(|other| other.join("statistics")));
    if let Some((index, count)) = arguments.shard {
        calibration = calibration.shard(index, count);
    }

    let bar = progress.bar("collecting", 0, Unit::Count("tokens"));
    let mut last = Collected::default();
    let start = Instant::now();
    let statistics = calibration.run(&mut |at| {
        bar.total(at.tokens);
        bar.at(at.tokens_done);
        last = *at;
    })?;
    let seconds = start.elapsed().as_secs_f64();
    drop(bar);
    let (mut scores, mut super_experts) = (Vec::new(), None);
    if arguments.shard.is_none() {
        for (i, scorer) in scorers.iter().enumerate() {
            let name = scorer.name();
            let repeated = scorers.iter().filter(|other| other.name() == name).count() > 1;
            let file = if repeated { format!("{name}-{i}.safetensors") } else { format!("{name}.safetensors") };
            let path = arguments.out.join(file);
            scorer.score(&statistics, model.checkpoint().as_ref())?.save(&path)?;
            scores.push(path);
        }
        if let Some(options) = arguments.super_experts {
            let found = SuperExperts::find(&statistics, options)?;
            moe_checkpoint::write_json(&arguments.out.join("super_experts.json"), &serde_json::json!(found))?;
            moe_checkpoint::write_json(&arguments.out.join("protect.json"), &serde_json::json!(found.protected()))?;
            super_experts = Some(found.protected());
        }
    }
    let tokens = last.tokens_done - last.tokens_resumed;
    Ok(Report {
        scores,
        super_experts,
        sequences: data.sequences.len(),
        tokens,
        seconds,
        tokens_per_s: tokens as f64 / seconds.max(1e-9),
        loss: last.loss,
        peak_rss_mib: process_memory().map(|memory| memory.peak as f64 / (1 << 20) as f64),
    })
}

/// A scorer by name or as JSON.
fn scorer(text: &str) -> Result<ScorerConfig, String> {
    let json = match text.trim_start().starts_with('{') {
        true => text.to_owned(),
        false => serde_json::json!({ "type": text }).to_string(),
    };
    serde_json::from_str(&json).map_err(|error| error.to_string())
}

/// What scorers there are, a line each.
fn scorers_help() -> String {
    let lines = ScorerConfig::DESCRIPTIONS.iter().map(|(name, what)| format!("  {name:<17}{}", what.trim()));
    format!(
        "Scorers (parameters and formulas: documentation of moe-importance):\n{}",
        lines.collect::<Vec<_>>().join("\n")
    )
}

/// Options of super experts by name or as JSON.
fn super_experts(text: &str) -> Result<SuperExpertOptions, String> {
    match text.trim() {
        "default" => Ok(SuperExpertOptions::default()),
        "released" => Ok(SuperExpertOptions::released()),
        "reap" => Ok(SuperExpertOptions::reap()),
        json if json.starts_with('{') => serde_json::from_str(json).map_err(|error| error.to_string()),
        other => Err(format!("found `{other}`, expected default, released, reap or JSON")),
    }
}

/// `I/N`.
fn part(text: &str) -> Result<(usize, usize), String> {
    let bad = || format!("found `{text}`, expected a shard such as 0/4");
    let (index, count) = text.split_once('/').ok_or_else(bad)?;
    match (index.trim().parse(), count.trim().parse()) {
        (Ok(index), Ok(count)) if index < count => Ok((index, count)),
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scorers_are_named_or_spelt_out() {
        assert_eq!(scorer("magnitude").unwrap().build().unwrap().name(), "magnitude");
        assert!(scorer(r#"{"type":"fisher","criterion":"abs"}"#).is_ok());
        assert!(scorer("fishing").unwrap_err().contains("fishing"));
        for (name, what) in ScorerConfig::DESCRIPTIONS {
            assert_eq!(scorer(name).unwrap().build().unwrap().name(), *name);
            assert!(scorers_help().contains(&format!("  {name} ")) && scorers_help().contains(what.trim()));
        }
    }

    #[test]
    fn protected_super_experts_are_a_mask_of_a_plan() {
        let experts = [ExpertId { layer: 1, expert: 68 }, ExpertId { layer: 2, expert: 92 }];
        let mask: moe_prune::ProtectionMask = serde_json::from_value(serde_json::json!(experts)).unwrap();
        assert!(mask.is_protected(1, 68, 0) && mask.is_protected(2, 92, 5) && !mask.is_protected(1, 92, 0));
        assert_eq!(serde_json::json!(mask), serde_json::json!(experts));
    }

    #[test]
    fn super_experts_are_named_or_spelt_out() {
        assert_eq!(super_experts("reap").unwrap(), SuperExpertOptions::reap());
        assert_eq!(super_experts(r#"{"percentile": 99}"#).unwrap().percentile, 99.0);
        assert!(super_experts("most").unwrap_err().contains("most"));
    }

    #[test]
    fn shards_are_counted_from_zero() {
        assert_eq!(part("1/4"), Ok((1, 4)));
        assert!(part("4/4").is_err() && part("x").is_err());
    }
}

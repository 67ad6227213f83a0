//! One pass over calibration data, score files for any number of scorers, and what it cost.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use moe::expert_ranking::{rank_experts, to_json_lines};
use moe::recipe::Named;
use moe_checkpoint::group::Group;
use moe_checkpoint::{Checkpoint, ExpertId, Statistics, StatisticsStore};
use moe_core::data::Tokenizer;
use moe_core::memory::process_memory;
use moe_core::{Model, Precision};
use moe_importance::{
    Calibration, Progress as Seen, Scorer, ScorerConfig, StatisticId, SuperExpertOptions, SuperExperts,
};
use serde::Serialize;

use crate::progress::{Progress, Unit};
use crate::{Error, Result, cli, format};

/// Scores the routed experts or units of a checkpoint
///
/// Writes a score file per scorer, report.html, and experts.jsonl with the experts of every layer from the best to the
/// worst, for engines that drop experts when they load a model.
#[derive(Clone, Debug, Parser)]
#[command(after_help = scorers_help())]
pub struct Arguments {
    /// Directory of a Hugging Face checkpoint
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// What the model is run on
    #[command(flatten)]
    pub data: cli::DataArguments,
    /// Scorer: a name, JSON such as {"type":"fisher","criterion":"abs"}, or a JSON file; repeatable. See the list below
    #[arg(long = "scorer", value_name = "NAME|JSON|FILE", value_parser = scorer,
        required_unless_present_any = ["super_experts", "collect"])]
    pub scorers: Vec<ScorerConfig>,
    /// Also find super experts, as default, released or reap, or with options as JSON: writes super_experts.json and
    /// protect.json, a protection mask
    #[arg(long, value_name = "OPTIONS", value_parser = super_experts)]
    pub super_experts: Option<SuperExpertOptions>,
    /// Also collect a statistic that no scorer needs, such as routing.logit_gram; repeatable
    #[arg(long = "statistic", id = "collect", value_name = "ID")]
    pub collect: Vec<String>,
    /// Score these statistics, an earlier --out or the folder in it, instead of running the model
    #[arg(long, value_name = "DIR", conflicts_with_all = ["data", "shard", "absorb", "collect"])]
    pub statistics: Option<PathBuf>,
    /// New directory for the score files and the statistics
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Continue an interrupted run in --out
    #[arg(long)]
    pub resume: bool,
    /// How the work is shared with other processes; a share scores nothing
    #[command(flatten)]
    pub share: cli::ShareArguments,
    /// Memory to stay within, such as 8GiB; never changes results
    #[arg(long, value_name = "SIZE", value_parser = cli::bytes)]
    pub max_memory: Option<u64>,
    /// flex (CPU), wgpu, vulkan or cuda, as far as compiled in
    #[arg(long, default_value = "default")]
    pub device: String,
    /// f32, or bf16: activations are rounded once per product, where the processor multiplies pairs of bf16
    #[arg(long, default_value = "f32", value_name = "f32|bf16")]
    pub precision: Precision,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// What a run did.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Score files written; none for a shard.
    pub scores: Vec<PathBuf>,
    /// Experts of every layer from the best to the worst, by every scorer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranking: Option<PathBuf>,
    /// Mask that protects super experts, if they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protect: Option<PathBuf>,
    /// Super experts, if they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub super_experts: Option<Vec<ExpertId>>,
    /// What the scores look like, for people; none for a shard.
    #[serde(rename = "report", skip_serializing_if = "Option::is_none")]
    pub page: Option<PathBuf>,
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
        match self.tokens {
            0 => writeln!(f, "statistics that were there, of {} sequences", self.sequences)?,
            tokens => writeln!(f, "{tokens} tokens in {:.1} s, {:.1} tokens/s", self.seconds, self.tokens_per_s)?,
        }
        if let Some(loss) = self.loss {
            writeln!(f, "loss {loss:.4} nats per token")?;
        }
        if let Some(peak) = self.peak_rss_mib {
            writeln!(f, "peak memory {}", format::size((peak * 1024.0 * 1024.0) as u64))?;
        }
        for ExpertId { layer, expert } in self.super_experts.iter().flatten() {
            writeln!(f, "super expert: layer {layer}, expert {expert}")?;
        }
        let files = self.scores.iter().chain(&self.ranking).chain(&self.protect);
        files.chain(&self.page).try_for_each(|path| writeln!(f, "{}", path.display()))
    }
}

/// Checks everything, collects and scores. The ranks of a group share the waves; the first scores and writes.
///
/// # Errors
/// Whatever is wrong with the arguments or the files they name, and whatever stops the run.
pub fn run(arguments: &Arguments, group: &dyn Group, progress: Progress) -> Result<Report> {
    if group.size() > 1 && arguments.share.shard.is_some() {
        let found = format!("--shard beside {} processes that share the work", group.size());
        return Err(Error::Usage(format!("found {found}, expected one or the other")));
    }
    let device = moe_core::device::device(&arguments.device)?;
    let checkpoint = Arc::new(Checkpoint::open(&arguments.model)?);
    if checkpoint.shape().units() == 0 {
        return Err(Error::Invalid(format!("{}: no routed experts to score", arguments.model.display())));
    }
    if arguments.out.exists() && !arguments.resume {
        return Err(Error::Invalid(format!("{}: exists; --resume continues in it", arguments.out.display())));
    }
    // Nobody makes it while others look whether it is there.
    group.check(None)?;
    let scorers = arguments.scorers.iter().map(ScorerConfig::build).collect::<moe_importance::Result<Vec<_>>>()?;
    let collected = match &arguments.statistics {
        Some(directory) => saved(directory, &checkpoint)?,
        None => {
            let model =
                Model::new(checkpoint.clone(), &device, arguments.max_memory)?.with_precision(arguments.precision);
            collect(arguments, &model, &scorers, group, progress)?
        }
    };
    let Collected { statistics, sequences, tokens, seconds, loss } = collected;
    let (mut scores, mut super_experts, mut rankings) = (Vec::new(), None, Vec::new());
    let (mut protect, mut report) = (None, None);
    let (mut tables, mut named) = (Vec::new(), Vec::new());
    let scores_here = arguments.share.shard.is_none() && group.rank() == 0;
    if scores_here {
        for scorer in &scorers {
            tables.push(scorer.score(&statistics, checkpoint.as_ref())?);
        }
    }
    if group.rank() == 0 {
        std::fs::create_dir_all(&arguments.out).map_err(Error::io(&arguments.out))?;
    }
    for (i, (scorer, table)) in scorers.iter().zip(&tables).enumerate() {
        let repeated = scorers.iter().filter(|other| other.name() == scorer.name()).count() > 1;
        let name = if repeated { format!("{}-{i}", scorer.name()) } else { scorer.name().to_string() };
        let path = arguments.out.join(format!("{name}.safetensors"));
        table.save(&path)?;
        rankings.extend(rank_experts(&name, table)?);
        scores.push(path);
        named.push((name, table));
    }
    if let Some(options) = arguments.super_experts.filter(|_| scores_here) {
        let found = SuperExperts::find(&statistics, options)?;
        moe_checkpoint::write_json(&arguments.out.join("super_experts.json"), &serde_json::json!(found))?;
        let path = arguments.out.join("protect.json");
        moe_checkpoint::write_json(&path, &serde_json::json!(found.protected()))?;
        protect = Some(path);
        super_experts = Some(found.protected());
    }
    if !named.is_empty() {
        let page = crate::pages::of_scores(&arguments.model, tokens, loss, &named)?;
        let path = arguments.out.join("report.html");
        page.write(&path)?;
        report = Some(path);
    }
    let ranking = match rankings.is_empty() {
        true => None,
        false => {
            let path = arguments.out.join("experts.jsonl");
            moe_checkpoint::write_atomic(&path, to_json_lines(&rankings)?.as_bytes())?;
            Some(path)
        }
    };
    Ok(Report {
        scores,
        protect,
        page: report,
        ranking,
        super_experts,
        sequences,
        tokens,
        seconds,
        tokens_per_s: tokens as f64 / seconds.max(1e-9),
        loss,
        peak_rss_mib: process_memory().map(|memory| memory.peak as f64 / (1 << 20) as f64),
    })
}

/// Statistics and what they cost.
struct Collected {
    statistics: Statistics,
    sequences: usize,
    tokens: u64,
    seconds: f64,
    loss: Option<f64>,
}

/// Runs the model for all that is asked of it.
fn collect(
    arguments: &Arguments,
    model: &Model,
    scorers: &[Box<dyn Scorer>],
    group: &dyn Group,
    progress: Progress,
) -> Result<Collected> {
    let tokenizer = match arguments.model.join("tokenizer.json").exists() {
        true => Some(Tokenizer::from_dir(&arguments.model)?),
        false => None,
    };
    let data = arguments.data.load(tokenizer.as_ref(), model.config().vocab_size)?;
    let mut ids: Vec<StatisticId> = scorers.iter().flat_map(|scorer| scorer.needs().statistics).collect();
    ids.extend(arguments.super_experts.map(|options| options.needs()));
    ids.extend(arguments.collect.iter().cloned().map(StatisticId::from));
    let mut calibration = Calibration::new(model, &data, arguments.data.waves())
        .statistics(ids)
        .group(group)
        .store(arguments.out.join("statistics"))
        .absorb(arguments.share.absorb.iter().map(|other| other.join("statistics")));
    if let Some((index, count)) = arguments.share.shard {
        calibration = calibration.shard(index, count);
    }
    let bar = progress.bar("collecting", 0, Unit::Count("tokens"));
    let mut last = Seen::default();
    let start = Instant::now();
    let statistics = calibration.run(&mut |at| {
        bar.total(at.tokens);
        bar.at(at.tokens_done);
        last = *at;
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let tokens = last.tokens_done - last.tokens_resumed;
    Ok(Collected { statistics, sequences: data.sequences.len(), tokens, seconds, loss: last.loss })
}

/// Statistics of this very model that an earlier run left: its output, the folder in it, or one file.
fn saved(path: &Path, checkpoint: &Checkpoint) -> Result<Collected> {
    let inside = path.join("statistics");
    let statistics = match (path.is_file(), StatisticsStore::exists(&inside)) {
        (true, _) => Statistics::load(path)?,
        (_, true) => StatisticsStore::open(inside)?.fold()?,
        _ => StatisticsStore::open(path)?.fold()?,
    };
    let of = &statistics.provenance().model;
    if !checkpoint.is_model(of) {
        let (path, found) = (path.display(), checkpoint.fingerprint());
        let reason = format!("statistics of the model with fingerprint {of}, but --model has {found}");
        return Err(Error::Invalid(format!("{path}: {reason}")));
    }
    let sequences = statistics.sequences() as usize;
    Ok(Collected { statistics, sequences, tokens: 0, seconds: 0.0, loss: None })
}

/// A scorer by name, as JSON or as a JSON file.
fn scorer(text: &str) -> Result<ScorerConfig, String> {
    Named::parse(text)?.read("type", "scorer").map_err(|error| error.to_string())
}

/// What scorers there are, a line each.
fn scorers_help() -> String {
    let lines = ScorerConfig::DESCRIPTIONS.iter().map(|(name, what)| format!("  {name:<17}{}", what.trim()));
    format!(
        "Examples:\n  moe score --model DIR --data rows.jsonl --scorer fisher --scorer reap --out scores\n  \
moe score --model DIR --statistics scores --scorer frequency --out again\n\nScorers (parameters and formulas: documentation of moe-importance):\n{}",
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
}

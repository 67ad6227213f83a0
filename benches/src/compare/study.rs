//! The study: everything on the bundled model.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use moe_core::Model;
use moe_core::data::{Dataset, LossOver, Tokenizer, WaveOptions};
use moe_importance::ScorerConfig;
use moe_merge::collect_evidence;
use serde_json::{Value, json};

use super::arguments::Arguments;
use super::bench::Bench;
use super::case::Journal;
use super::catalog::{self, SCORERS, Scoring};
use super::cost::Costs;
use super::lab::Lab;
use super::merging::{Form, Merging};
use super::rows::{Draw, HeldOut};
use super::runner::{Runner, default_workers};
use super::scored::score;
use super::settings::{CAPABILITIES, Settings};
use super::summary::Summary;
use crate::progress::{Progress, Unit};
use crate::{Error, Result, TINY_MOE};
use moe::out_dir::{Existing, OutDir};

/// A study whose inputs have been checked. Nothing has been written yet.
pub struct Study {
    /// How large it is.
    pub settings: Settings,
    arguments: Arguments,
    out: OutDir,
    existing: Existing,
    model: Model,
    tokenizer: Tokenizer,
    /// By capability and seed: with the loss over all tokens, and over completions where there are any.
    draws: BTreeMap<(String, u64), [Dataset; 2]>,
    /// All calibration rows of each capability.
    rows: BTreeMap<String, Dataset>,
    held_out: Vec<HeldOut>,
    scorers: Vec<(String, ScorerConfig)>,
}

/// A finished study.
pub struct Finished {
    /// How large it was.
    pub settings: Settings,
    /// Everything that was measured.
    pub summary: Summary,
    /// The lab it was measured in.
    pub lab: Lab,
    /// What collecting statistics cost, in the study of ways to prune.
    pub costs: Option<Costs>,
    /// Sizes of what is written, in the study of ways to merge.
    pub forms: Vec<Form>,
    /// How it was made.
    pub recipe: Value,
    /// Where it is.
    pub out: OutDir,
}

impl Study {
    /// Checks the arguments and loads all rows.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn new(arguments: Arguments) -> Result<Self> {
        let mut settings = match (arguments.merging, arguments.quick) {
            (false, false) => Settings::full(),
            (false, true) => Settings::quick(),
            (true, false) => Settings::merging(),
            (true, true) => Settings::quick_merging(),
        };
        if let Some(draws) = arguments.draws {
            settings.seeds = (0..draws.get() as u64).collect();
        }
        Self::with_settings(arguments, settings)
    }

    /// The same of another size.
    ///
    /// # Errors
    /// As [`Study::new`].
    pub fn with_settings(arguments: Arguments, settings: Settings) -> Result<Self> {
        let existing = match (arguments.resume, arguments.force) {
            (true, _) => Existing::Resume,
            (_, true) => Existing::Replace,
            _ => Existing::Refuse,
        };
        let out = OutDir::check(&arguments.out, existing)?;
        let device = moe_core::device::device(&arguments.device)?;
        let model = Model::open(TINY_MOE, &device, arguments.max_memory)?;
        let tokenizer = Tokenizer::from_dir(TINY_MOE)?;
        let data = PathBuf::from(TINY_MOE).join("data");
        let config = model.config();
        let held_out = |name: &&str| {
            HeldOut::load(&data.join(format!("{name}_test.jsonl")), &tokenizer, config, settings.limits, true)
        };
        let held_out = CAPABILITIES.iter().map(held_out).collect::<Result<Vec<_>>>()?;
        let (mut draws, mut rows) = (BTreeMap::new(), BTreeMap::new());
        for (name, seed) in settings.draws() {
            let text = held_out.iter().any(|rows| rows.name == name && rows.questions.is_none());
            let draw = Draw {
                file: data.join(format!("{name}_calibration.jsonl")),
                samples: if text { settings.text_samples } else { settings.samples },
                length: settings.length,
                packing: text,
            };
            let answers = if text { LossOver::All } else { LossOver::Completions };
            let load = |loss| draw.load(Some(seed), loss, Some(&tokenizer), config);
            if !rows.contains_key(name) {
                let all = Draw { samples: settings.repair_samples, ..draw.clone() };
                rows.insert(name.to_owned(), all.load(Some(seed), LossOver::All, Some(&tokenizer), config)?);
            }
            draws.insert((name.to_owned(), seed), [load(LossOver::All)?, load(answers)?]);
        }
        let scorer = |name: &&str| Ok(((*name).to_owned(), catalog::scorer(name)?));
        let scorers = settings.scorers.iter().map(scorer).collect::<Result<Vec<_>>>()?;
        let study = Self { settings, arguments, out, existing, model, tokenizer, draws, rows, held_out, scorers };
        if existing == Existing::Resume {
            study.out.check_resumable(&study.recipe())?;
        }
        Ok(study)
    }

    /// What the study is, for its directory and its report.
    pub fn recipe(&self) -> Value {
        let mut hasher = blake3::Hasher::new();
        for data in self.draws.values().flatten().chain(self.rows.values()) {
            hasher.update(data.hash.as_bytes());
        }
        for rows in &self.held_out {
            let sequences = Dataset::from_sequences(rows.sequences.clone());
            let answered = rows.questions.as_ref().map_or(0, |set| set.len());
            hasher.update(sequences.hash.as_bytes()).update(&(answered as u64).to_le_bytes());
        }
        let scorers: BTreeMap<_, _> = self.scorers.iter().cloned().collect();
        json!({
            "program": "compare_methods",
            "crate_version": env!("CARGO_PKG_VERSION"),
            "model_fingerprint": self.model.checkpoint().fingerprint(),
            "calibration": {
                "hash": hasher.finalize().to_hex().to_string(),
                "wave_tokens": self.arguments.wave_tokens,
            },
            "scorers": scorers,
            "merges": self.settings.merging.as_ref().map(|merging| &merging.methods),
            "quick": self.arguments.quick,
        })
    }

    /// Runs what has not been run yet.
    ///
    /// # Errors
    /// Whatever stops it; `--resume` goes on from there.
    pub fn run(self, progress: Progress) -> Result<Finished> {
        let recipe = self.recipe();
        let Self { settings, arguments, out, existing, model, tokenizer, draws, rows, held_out, scorers } = self;
        out.open(existing, &recipe)?;
        let wave_options = WaveOptions::Tokens(arguments.wave_tokens);
        let bench = Bench::new(model, tokenizer, held_out, wave_options, arguments.teacher_tokens.get())?;
        let bench = if settings.merging.is_some() { bench.with_layer_errors()? } else { bench };
        let evidence = settings.merging.as_ref().map(Merging::evidence).transpose()?;

        let total = 2 * draws.values().map(|[data, _]| data.tokens() as u64).sum::<u64>();
        let bar = progress.bar("collecting", total, Unit::Count("tokens"));
        let (mut scored, mut done) = (BTreeMap::new(), 0);
        for ((name, seed), data) in &draws {
            bar.label(format!("collecting: {name}, draw {seed}"));
            let mut of_loss = |answers: bool| -> Result<_> {
                let data = &data[usize::from(answers)];
                let own = |(name, _): &&(String, ScorerConfig)| {
                    SCORERS.iter().any(|line| line.name == name && line.answers == answers)
                };
                let scoring =
                    |(name, config): &(String, ScorerConfig)| Ok((name.clone(), Scoring::new(config.clone(), *seed)?));
                let scorers = scorers.iter().filter(own).map(scoring).collect::<Result<Vec<_>>>()?;
                let directory = format!("{name}-{seed}{}", if answers { "-answers" } else { "" });
                let directory = out.statistics().join(directory);
                let found = score(&bench.model, data, wave_options, &scorers, &directory, &mut |at| {
                    bar.at(done + at.tokens_done);
                })?;
                done += data.tokens() as u64;
                Ok(found)
            };
            let mut found = of_loss(false)?;
            found.tables.extend(of_loss(true)?.tables);
            found.all = rows.get(name).map_or_else(Vec::new, |data| data.waves(wave_options));
            if let Some(options) = &evidence {
                found.evidence =
                    Some(Arc::new(collect_evidence(&bench.model, &found.waves, options, None, &mut |_| {})?));
            }
            scored.insert((name.clone(), *seed), found);
        }
        drop(bar);
        let lab = Lab::new(bench, scored, &out.root().join("scratch"));
        let mut runner = Runner {
            journal: Journal::open(&out.root().join("measurements.jsonl"))?,
            workers: arguments.workers.map_or_else(default_workers, NonZeroUsize::get),
            lab: &lab,
            progress,
        };
        let summary = |runner: &Runner<'_>| Summary::new(runner.journal.records().clone(), &settings, &lab.bench);
        if let Some(merging) = &settings.merging {
            runner.run("every recipe", merging.jobs(&settings))?;
            let (summary, model) = (summary(&runner), &lab.bench.model);
            let first = lab.scored.values().next().ok_or_else(|| Error::Invalid("no calibration rows".into()))?;
            let forms = Form::measure_or_load(model, merging, settings.half, first, out.root())?;
            return Ok(Finished { settings, summary, lab, costs: None, forms, recipe, out });
        }
        let costs = out.root().join("costs.json");
        let costs = Costs::measure_or_load(&lab.bench.model, &draws, wave_options, &costs, &settings)?;
        runner.run("every scorer, every way", settings.grid())?;
        let best = summary(&runner).best_scorers(settings.best);
        runner.run("answers of the best", settings.answers(&best))?;
        runner.run("repairs of the best", settings.repairs(&best))?;
        runner.run("exports for stock loaders", settings.stock())?;
        runner.run("allocators", settings.allocators())?;
        runner.run("knock-outs", settings.knock_outs())?;
        let summary = summary(&runner);
        Ok(Finished { settings, summary, lab, costs: Some(costs), forms: Vec::new(), recipe, out })
    }
}

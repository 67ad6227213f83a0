//! The study: what is measured, in which order.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use moe_core::Model;
use moe_core::data::{Tokenizer, WaveOptions};
use serde_json::{Value, json};

use super::arguments::Arguments;
use super::bench::{Bench, Figures};
use super::case::{Amount, Case, Journal};
use super::catalogue::{self, CONTROLS, EXPERTS, GLOBAL, GRID, LAYER, MAIN_SCORER, NO_REPAIR, Scoring, UNIFORM};
use super::lab::{Job, Lab};
use super::rows::{Draw, HeldOut, Limits};
use super::scored::score;
use super::summary::Summary;
use crate::fisher_prune::{Existing, OutDir};
use crate::progress::{Progress, Unit};
use crate::{Error, Result, TINY_MOE};

/// Capabilities of the bundled model.
pub const CAPABILITIES: [&str; 3] = ["arithmetic", "facts", "prose"];

/// How large the study is.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Capabilities to calibrate on.
    pub calibrated: Vec<&'static str>,
    /// Draws of the calibration rows.
    pub seeds: Vec<u64>,
    /// Sequences of a draw of questions.
    pub samples: usize,
    /// Windows of a draw of text: fewer than there are rows for, so that draws differ.
    pub text_samples: usize,
    /// Tokens of a window or row.
    pub length: usize,
    /// Fractions that are dropped.
    pub ratios: Vec<f64>,
    /// Fraction at which everything else is compared.
    pub half: f64,
    /// Scorers by name.
    pub scorers: Vec<&'static str>,
    /// Scorers whose answers are counted, besides the controls.
    pub best: usize,
    /// Ways to distribute the budget.
    pub allocators: Vec<&'static str>,
    /// Units that are knocked out.
    pub knock_outs: Vec<u32>,
    /// Rows that are measured on.
    pub limits: Limits,
}

impl Settings {
    /// The whole study.
    pub fn full() -> Self {
        Self {
            calibrated: CAPABILITIES.into(),
            seeds: vec![0, 1, 2],
            samples: 128,
            text_samples: 64,
            length: 128,
            ratios: vec![0.25, 0.375, 0.5, 0.625],
            half: 0.5,
            scorers: catalogue::SCORERS.iter().map(|line| line.name).collect(),
            best: 10,
            allocators: [catalogue::UNIT_ALLOCATORS, catalogue::EXPERT_ALLOCATORS].concat(),
            knock_outs: vec![1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64],
            limits: Limits { predicted: 64, answered: 200, text: 600, windows: 20, length: 128 },
        }
    }

    /// A small part of it, for a look and for tests.
    pub fn quick() -> Self {
        Self {
            calibrated: vec!["arithmetic"],
            seeds: vec![0],
            samples: 24,
            text_samples: 8,
            ratios: vec![0.25, 0.5],
            scorers: vec![MAIN_SCORER, "activation", "magnitude", "random", "frequency", "reap"],
            best: 2,
            allocators: vec!["lamp", "hybrid"],
            knock_outs: vec![1, 8, 64],
            limits: Limits { predicted: 16, answered: 16, text: 100, windows: 4, length: 64 },
            ..Self::full()
        }
    }

    fn case(&self, calibrated: &str, seed: u64, scorer: &str, method: &str, amount: Amount) -> Case {
        Case {
            calibrated: calibrated.into(),
            seed,
            scorer: scorer.into(),
            method: method.into(),
            amount,
            repair: NO_REPAIR.into(),
        }
    }

    /// Every capability with every draw.
    fn draws(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.calibrated.iter().flat_map(|name| self.seeds.iter().map(|seed| (*name, *seed)))
    }

    /// Every scorer with the four ways to prune, at every size.
    pub fn grid(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        for (calibrated, seed) in self.draws() {
            for scorer in &self.scorers {
                for ratio in &self.ratios {
                    for method in GRID {
                        let case = self.case(calibrated, seed, scorer, method, Amount::ratio(*ratio));
                        jobs.push(Job { case, figures: Figures::Predictions });
                    }
                }
            }
        }
        jobs
    }

    /// Answers of the best scorers and the controls.
    pub fn answers(&self, best: &[String]) -> Vec<Job> {
        let mut scorers: Vec<&str> = best.iter().map(String::as_str).collect();
        scorers.extend(CONTROLS.iter().filter(|name| self.scorers.contains(name)));
        scorers.dedup();
        let mut jobs = Vec::new();
        for (calibrated, seed) in self.draws() {
            for scorer in &scorers {
                for method in GRID {
                    let case = self.case(calibrated, seed, scorer, method, Amount::ratio(self.half));
                    jobs.push(Job { case, figures: Figures::All });
                }
            }
        }
        jobs
    }

    /// Ways to distribute the budget, by the scores of one scorer.
    pub fn allocators(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        for (calibrated, seed) in self.draws() {
            for method in [UNIFORM, LAYER, GLOBAL, EXPERTS].iter().chain(&self.allocators) {
                let case = self.case(calibrated, seed, MAIN_SCORER, method, Amount::ratio(self.half));
                jobs.push(Job { case, figures: Figures::All });
            }
        }
        jobs
    }

    /// The highest-scored units taken out. Scores that no rows were needed for do not depend on the capability.
    pub fn knock_outs(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        let mut add = |calibrated: &str, seed, scorer: &str| {
            for count in &self.knock_outs {
                let case = self.case(calibrated, seed, scorer, KNOCK_OUT, Amount::Units(*count));
                jobs.push(Job { case, figures: Figures::All });
            }
        };
        for calibrated in &self.calibrated {
            self.seeds.iter().for_each(|seed| add(calibrated, *seed, MAIN_SCORER));
        }
        let first = self.calibrated[0];
        add(first, self.seeds[0], "magnitude");
        self.seeds.iter().for_each(|seed| add(first, *seed, "random"));
        jobs
    }
}

/// Name of the way to prune that takes out the best.
pub const KNOCK_OUT: &str = "knock_out";

/// A study whose inputs have been checked. Nothing has been written yet.
pub struct Study {
    /// How large it is.
    pub settings: Settings,
    arguments: Arguments,
    out: OutDir,
    existing: Existing,
    model: Model,
    tokenizer: Tokenizer,
    draws: BTreeMap<(String, u64), moe_core::data::Dataset>,
    held_out: Vec<HeldOut>,
    scorers: Vec<(String, moe_importance::ScorerConfig)>,
}

/// A finished study.
pub struct Finished {
    /// How large it was.
    pub settings: Settings,
    /// Everything that was measured.
    pub summary: Summary,
    /// The lab it was measured in.
    pub lab: Lab,
    /// Where it is.
    pub out: OutDir,
}

impl Study {
    /// Checks the arguments and loads all rows.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn new(arguments: Arguments) -> Result<Self> {
        let existing = match (arguments.resume, arguments.force) {
            (true, _) => Existing::Resume,
            (_, true) => Existing::Replace,
            _ => Existing::Refuse,
        };
        let settings = if arguments.quick { Settings::quick() } else { Settings::full() };
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
        let mut draws = BTreeMap::new();
        for (name, seed) in settings.draws() {
            let text = held_out.iter().any(|rows| rows.name == name && rows.questions.is_none());
            let draw = Draw {
                file: data.join(format!("{name}_calibration.jsonl")),
                samples: if text { settings.text_samples } else { settings.samples },
                length: settings.length,
                packing: text,
            };
            draws.insert((name.to_owned(), seed), draw.load(Some(seed), Some(&tokenizer), config)?);
        }
        let scorer = |name: &&str| Ok(((*name).to_owned(), catalogue::scorer(name)?));
        let scorers = settings.scorers.iter().map(scorer).collect::<Result<Vec<_>>>()?;
        let study = Self { settings, arguments, out, existing, model, tokenizer, draws, held_out, scorers };
        if existing == Existing::Resume {
            study.out.check_resumable(&study.recipe())?;
        }
        Ok(study)
    }

    /// What the study is, for its directory and its report.
    pub fn recipe(&self) -> Value {
        let mut hasher = blake3::Hasher::new();
        self.draws.values().for_each(|data| drop(hasher.update(data.hash.as_bytes())));
        for rows in &self.held_out {
            let sequences = moe_core::data::Dataset::from_sequences(rows.sequences.clone());
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
            "quick": self.arguments.quick,
        })
    }

    /// Runs what has not been run yet.
    ///
    /// # Errors
    /// Whatever stops it; `--resume` goes on from there.
    pub fn run(self, progress: Progress) -> Result<Finished> {
        let recipe = self.recipe();
        let Self { settings, arguments, out, existing, model, tokenizer, draws, held_out, scorers } = self;
        out.open(existing, &recipe)?;
        let wave_options = WaveOptions::Tokens(arguments.wave_tokens);
        let bench = Bench::new(model, tokenizer, held_out, wave_options, arguments.teacher_tokens.get())?;

        let total = draws.values().map(|data| data.tokens() as u64).sum();
        let bar = progress.bar("collecting", total, Unit::Count("tokens"));
        let (mut scored, mut done) = (BTreeMap::new(), 0);
        for ((name, seed), data) in &draws {
            bar.label(format!("collecting: {name}, draw {seed}"));
            let scoring = |(name, config): &(String, moe_importance::ScorerConfig)| {
                Ok((name.clone(), Scoring::new(config.clone(), *seed)?))
            };
            let scorers = scorers.iter().map(scoring).collect::<Result<Vec<_>>>()?;
            let directory = out.statistics().join(format!("{name}-{seed}"));
            let found = score(&bench.model, data, wave_options, &scorers, &directory, &mut |at| {
                bar.at(done + at.tokens_done);
            })?;
            done += data.tokens() as u64;
            scored.insert((name.clone(), *seed), found);
        }
        drop(bar);

        let lab = Lab::new(bench, scored);
        let mut runner = Runner {
            journal: Journal::open(&out.root().join("measurements.jsonl"))?,
            workers: arguments.workers.map_or_else(default_workers, NonZeroUsize::get),
            lab: &lab,
            progress,
        };
        runner.run("every scorer, every way", settings.grid())?;
        let summary = |runner: &Runner<'_>| Summary::new(runner.journal.records().clone(), &settings, &lab.bench);
        let best = summary(&runner).best_scorers(settings.best);
        runner.run("answers of the best", settings.answers(&best))?;
        runner.run("allocators", settings.allocators())?;
        runner.run("knock-outs", settings.knock_outs())?;
        let summary = summary(&runner);
        Ok(Finished { settings, summary, lab, out })
    }
}

/// One worker per core.
fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Measures, some configurations at a time, and writes each down as it is done.
pub struct Runner<'a> {
    /// What has been measured.
    pub journal: Journal,
    /// Configurations at a time.
    pub workers: usize,
    /// Builds them.
    pub lab: &'a Lab,
    /// Where progress is shown.
    pub progress: Progress,
}

impl Runner<'_> {
    /// Runs the jobs that the journal does not have.
    ///
    /// # Errors
    /// The first that stops one; what is finished is in the journal.
    pub fn run(&mut self, label: &str, jobs: Vec<Job>) -> Result<()> {
        let missing = |job: &Job| !self.journal.has(&job.case, &self.lab.bench.names(job.figures));
        let jobs: Vec<Job> = jobs.into_iter().filter(missing).collect();
        if jobs.is_empty() {
            return Ok(());
        }
        let bar = self.progress.bar(label, jobs.len() as u64, Unit::Count("configurations"));
        let next = AtomicUsize::new(0);
        let journal = Mutex::new((&mut self.journal, None::<Error>));
        let (lab, workers) = (self.lab, self.workers.clamp(1, jobs.len()));
        let work = || {
            while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                let record = lab.run(job);
                let mut journal = journal.lock().unwrap_or_else(PoisonError::into_inner);
                if journal.1.is_some() {
                    return;
                }
                match record.and_then(|record| journal.0.add(record)) {
                    Ok(()) => bar.step(),
                    Err(error) => {
                        journal.1 = Some(error);
                        return;
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            (1..workers).for_each(|_| drop(scope.spawn(work)));
            work();
        });
        match journal.into_inner().unwrap_or_else(PoisonError::into_inner).1 {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// The bundled data of a capability.
pub fn data(name: &str) -> PathBuf {
    Path::new(TINY_MOE).join("data").join(name)
}

//! A table for a model and data of one's own.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use moe_checkpoint::Checkpoint;
use moe_core::Model;
use moe_core::data::{Dataset, LossOver, Tokenizer, WaveOptions};
use serde_json::{Value, json};

use super::arguments::Arguments;
use super::bench::{Bench, Figures, Metrics};
use super::case::{Amount, Case, Journal, Record};
use super::catalog::{self, EXPERTS, GLOBAL, LAYER, NO_REPAIR, Scoring, UNIFORM};
use super::lab::{Job, Lab};
use super::rows::{Draw, HeldOut, Limits};
use super::runner::Runner;
use super::scored::score;
use crate::format::{count, percent, short};
use crate::progress::{Progress, Unit};
use crate::table::Table;
use crate::{Error, Result};
use moe::out_dir::{Existing, OutDir};

/// Scorers if none are named.
const SCORERS: [&str; 4] = ["fisher", "activation", "reap", "random"];
/// What calibration rows are called: they need no capability of their own.
const CALIBRATION: &str = "calibration";

/// A comparison whose inputs have been checked. Nothing has been written yet.
pub struct Comparison {
    arguments: Arguments,
    out: OutDir,
    existing: Existing,
    model: Model,
    tokenizer: Tokenizer,
    calibration: Dataset,
    held_out: Vec<HeldOut>,
    scorers: Vec<(String, Scoring)>,
    pruners: Vec<String>,
    ratios: Vec<f64>,
}

/// What a comparison found.
pub struct Compared {
    /// Figures of the full model.
    pub base: Metrics,
    /// Names of the figures.
    pub figures: Vec<String>,
    /// Scorer by scorer, pruner by pruner, ratio by ratio.
    pub records: Vec<Record>,
    /// Units and parameters of the full model.
    full: (usize, u64),
    /// How it was made.
    pub recipe: Value,
}

impl Comparison {
    /// Checks the arguments and the files they name.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn new(arguments: Arguments) -> Result<Self> {
        let existing = match (arguments.resume, arguments.force) {
            (true, _) => Existing::Resume,
            (_, true) => Existing::Replace,
            _ => Existing::Refuse,
        };
        let (Some(dir), Some(file)) = (&arguments.model, &arguments.calibration) else {
            return Err(Error::Usage("--model needs --calibration FILE: rows of the domain to keep".into()));
        };
        if arguments.eval.is_empty() {
            return Err(Error::Usage("--model needs --eval FILE: rows to compare on, in NAME_test.jsonl".into()));
        }
        let named = |given: &[String], otherwise: &[&str]| -> Vec<String> {
            let mut names: Vec<String> = match given {
                [] => otherwise.iter().map(|name| (*name).to_owned()).collect(),
                given => given.into(),
            };
            let mut seen = Vec::new();
            names.retain(|name| {
                !seen.contains(name) && {
                    seen.push(name.clone());
                    true
                }
            });
            names
        };
        let seed = arguments.seed.unwrap_or_default();
        let scorer = |name: String| {
            let scoring = Scoring::new(catalog::scorer(&name)?, seed)?;
            Ok((name, scoring))
        };
        let scorers = named(&arguments.scorer, &SCORERS).into_iter().map(scorer).collect::<Result<Vec<_>>>()?;
        let pruners = named(&arguments.pruner, &[GLOBAL, LAYER, UNIFORM, EXPERTS]);
        pruners.iter().try_for_each(|name| catalog::method(name).map(drop))?;
        let ratios = if arguments.ratio.is_empty() { vec![0.5] } else { arguments.ratio.clone() };

        let out = OutDir::check(&arguments.out, existing)?;
        let device = moe_core::device::device(&arguments.device)?;
        let checkpoint = Arc::new(Checkpoint::open(dir)?);
        if checkpoint.shape().units() == 0 {
            let reason = "no routed experts to prune: not a Mixture-of-Experts model";
            return Err(Error::Invalid(format!("{}: {reason}", dir.display())));
        }
        let tokenizer = Tokenizer::from_dir(dir)?;
        let draw = Draw { file: file.clone(), samples: arguments.samples, length: arguments.length, packing: false };
        let calibration = draw.load(arguments.seed, LossOver::All, Some(&tokenizer), checkpoint.config())?;
        let limits = Limits {
            rows: arguments.eval_rows,
            answered: arguments.eval_rows,
            tokens: usize::MAX,
            length: arguments.eval_length,
        };
        let mut held_out: Vec<HeldOut> = Vec::new();
        for path in &arguments.eval {
            let rows = HeldOut::load(path, &tokenizer, checkpoint.config(), limits, arguments.generate)?;
            if held_out.iter().any(|other| other.name == rows.name) {
                return Err(Error::Invalid(format!("{}: two evaluation files named {}", path.display(), rows.name)));
            }
            held_out.push(rows);
        }
        let model = Model::new(checkpoint, &device, arguments.max_memory)?;
        let comparison =
            Self { arguments, out, existing, model, tokenizer, calibration, held_out, scorers, pruners, ratios };
        if existing == Existing::Resume {
            comparison.out.check_resumable(&comparison.recipe())?;
        }
        Ok(comparison)
    }

    /// What the comparison is.
    pub fn recipe(&self) -> Value {
        let scorers: BTreeMap<_, _> = self.scorers.iter().map(|(name, scoring)| (name, &scoring.units)).collect();
        let rows: Vec<Value> = self
            .held_out
            .iter()
            .map(|rows| {
                let hash = Dataset::from_sequences(rows.sequences.clone()).hash;
                json!({ "name": rows.name, "hash": hash, "answered": rows.questions.as_ref().map(|set| set.len()) })
            })
            .collect();
        json!({
            "program": "compare_methods",
            "crate_version": env!("CARGO_PKG_VERSION"),
            "model": self.arguments.model,
            "model_fingerprint": self.model.checkpoint().fingerprint(),
            "calibration": {
                "file": self.arguments.calibration,
                "hash": self.calibration.hash,
                "wave_tokens": self.arguments.wave_tokens,
            },
            "scorers": scorers,
            // what journals depend on, and no other part of a recipe says
            "export": { "eval": rows, "teacher_tokens": self.arguments.teacher_tokens },
            "pruners": self.pruners,
            "ratios": self.ratios,
        })
    }

    /// Scores, prunes and measures.
    ///
    /// # Errors
    /// Whatever stops it; `--resume` goes on from there.
    pub fn run(self, progress: Progress) -> Result<Compared> {
        let recipe = self.recipe();
        let Self { arguments, out, existing, model, tokenizer, calibration, held_out, scorers, pruners, ratios } = self;
        out.open(existing, &recipe)?;
        let wave_options = WaveOptions::Tokens(arguments.wave_tokens);
        let bench = Bench::new(model, tokenizer, held_out, wave_options, arguments.teacher_tokens.get())?;
        let bar = progress.bar("collecting", calibration.tokens() as u64, Unit::Count("tokens"));
        let scored = score(&bench.model, &calibration, wave_options, &scorers, &out.statistics(), &mut |at| {
            bar.at(at.tokens_done);
        })?;
        drop(bar);
        let scored = BTreeMap::from([((CALIBRATION.to_owned(), 0), scored)]);
        let lab = Lab::new(bench, scored, &out.root().join("scratch"));
        let mut jobs = Vec::new();
        for (scorer, _) in &scorers {
            for method in &pruners {
                for ratio in &ratios {
                    let case = Case {
                        calibrated: CALIBRATION.into(),
                        seed: 0,
                        scorer: scorer.clone(),
                        method: method.clone(),
                        amount: Amount::ratio(*ratio),
                        repair: NO_REPAIR.into(),
                    };
                    jobs.push(Job { case, figures: Figures::All });
                }
            }
        }
        let mut runner = Runner {
            journal: Journal::open(&out.root().join("measurements.jsonl"))?,
            // each worker has weights of its own in memory
            workers: arguments.workers.map_or(1, NonZeroUsize::get),
            lab: &lab,
            progress,
        };
        runner.run("comparing", jobs.clone())?;
        let records = jobs.iter().filter_map(|job| runner.journal.records().get(&job.case).cloned()).collect();
        let checkpoint = lab.bench.model.checkpoint();
        let compared = Compared {
            base: lab.bench.base.clone(),
            figures: lab.bench.names(Figures::All),
            records,
            full: (checkpoint.shape().units(), checkpoint.parameters()),
            recipe,
        };
        out.finish(&compared.to_json()?)?;
        Ok(compared)
    }
}

impl Compared {
    /// A row per configuration.
    pub fn table(&self) -> Table {
        let mut header = ["scorer", "pruner", "dropped", "units", "parameters"].map(str::to_owned).to_vec();
        header.extend(self.figures.iter().cloned());
        let mut table = Table::new(header, 2);
        let figures = |metrics: &Metrics, refused: bool| -> Vec<String> {
            let of = |name: &String| match metrics.get(name) {
                _ if refused => "refused".into(),
                Some(value) if name.ends_with("_exact") => format!("{value:.3}"),
                Some(value) => short(*value),
                None => "–".into(),
            };
            self.figures.iter().map(of).collect()
        };
        let (units, parameters) = self.full;
        let mut row = ["(before)".into(), String::new(), "0%".into(), count(units as u64), count(parameters)].to_vec();
        row.extend(figures(&self.base, false));
        table.row(row);
        for record in &self.records {
            let Case { scorer, method, .. } = &record.case;
            let dropped = 1.0 - record.units as f64 / units.max(1) as f64;
            let mut row = vec![scorer.clone(), method.clone(), percent(dropped)];
            row.extend([count(record.units as u64), count(record.parameters)]);
            row.extend(figures(&record.metrics, record.refused.is_some()));
            table.row(row);
        }
        table
    }

    /// The table, and why configurations were refused.
    pub fn to_text(&self) -> String {
        let mut text = format!("{}\n", self.table().to_text());
        for record in &self.records {
            if let Some(reason) = &record.refused {
                text.push_str(&format!("{}, {}: {reason}\n", record.case.scorer, record.case.method));
            }
        }
        text.push_str(
            "ppl: perplexity of what follows; kl: divergence from the full model, nats per predicted token\n",
        );
        text
    }

    /// Everything, for programs.
    ///
    /// # Errors
    /// A number that JSON does not have.
    pub fn to_json(&self) -> Result<Value> {
        let records = serde_json::to_value(&self.records).map_err(|error| Error::Invalid(error.to_string()))?;
        Ok(json!({ "recipe": self.recipe, "base": self.base, "records": records }))
    }
}

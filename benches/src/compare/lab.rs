//! Building and measuring one configuration.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use moe_checkpoint::MoeShape;
use moe_core::data::Wave;

use super::bench::{Bench, Figures, Metrics};
use super::case::{Amount, Case, Record};
use super::catalog::{self, EVIDENCE, Method, RepairRows};
use super::knock_out;
use super::merged;
use super::scored::Scored;
use super::subject::Subject;
use crate::{Error, Result};

/// A configuration and what is to be measured of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The configuration.
    pub case: Case,
    /// What is measured.
    pub figures: Figures,
}

/// Everything that configurations are built from.
pub struct Lab {
    /// The full model and what is measured on.
    pub bench: Bench,
    /// Calibration draws by capability and seed.
    pub scored: BTreeMap<(String, u64), Scored>,
    /// Where exports go that are measured and deleted.
    scratch: PathBuf,
    exports: AtomicUsize,
    /// Figures of plans that were measured before: several scorers may say the same.
    known: Mutex<HashMap<blake3::Hash, Metrics>>,
}

impl Lab {
    /// A lab in which nothing has been measured.
    pub fn new(bench: Bench, scored: BTreeMap<(String, u64), Scored>, scratch: &Path) -> Self {
        Self { bench, scored, scratch: scratch.into(), exports: AtomicUsize::new(0), known: Mutex::default() }
    }

    /// Shape of the full model.
    pub fn shape(&self) -> &MoeShape {
        self.bench.model.checkpoint().shape()
    }

    /// The draw of calibration rows of a configuration.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is none.
    pub fn calibration(&self, case: &Case) -> Result<&Scored> {
        let key = (case.calibrated.clone(), case.seed);
        self.scored.get(&key).ok_or_else(|| Error::Invalid(format!("{case}: no such draw of calibration rows")))
    }

    /// Prunes, repairs and measures.
    ///
    /// # Errors
    /// Whatever stops the model. Scores or budgets that a way to prune refuses are part of the record.
    pub fn run(&self, job: &Job) -> Result<Record> {
        let start = Instant::now();
        let scratch = self.scratch.join(self.exports.fetch_add(1, Ordering::Relaxed).to_string());
        // What a run that was killed has left.
        if scratch.exists() {
            fs::remove_dir_all(&scratch).map_err(Error::io(&scratch))?;
        }
        let nothing = Record::nothing_dropped(&job.case, self.bench.model.checkpoint());
        let mut record = match self.measured(job, &scratch, nothing.clone()) {
            Ok(record) => record,
            Err(error) if refuses(&error) => Record { refused: Some(error.to_string()), ..nothing },
            Err(error) => return Err(error),
        };
        if scratch.exists() {
            fs::remove_dir_all(&scratch).map_err(Error::io(&scratch))?;
        }
        record.seconds = (start.elapsed().as_secs_f64() * 1e3).round() / 1e3;
        Ok(record)
    }

    fn measured(&self, job: &Job, scratch: &Path, record: Record) -> Result<Record> {
        let mut subject = self.subject(&job.case, scratch)?;
        let repair = catalog::repair(&job.case.repair)?;
        let rows = self.repair_rows(&job.case, repair.rows)?;
        repair.steps.iter().try_for_each(|step| subject.repair(step, &rows))?;
        let plan = &subject.plan;
        Ok(Record {
            layers: plan.kept.iter().map(|layer| layer.experts.iter().map(Vec::len).sum()).collect(),
            units: plan.units_kept(),
            routed_parameters: subject.routed_parameters(),
            parameters: subject.parameters()?,
            chosen: subject.chosen.clone(),
            metrics: self.measure(&subject, job)?,
            ..record
        })
    }

    fn repair_rows(&self, case: &Case, rows: RepairRows) -> Result<Cow<'_, [Wave]>> {
        let own = self.calibration(case)?;
        Ok(match rows {
            RepairRows::Draw => Cow::Borrowed(&own.waves),
            RepairRows::All => Cow::Borrowed(&own.all),
            RepairRows::Mixed => {
                let draws = self.scored.iter().filter(|((_, seed), _)| *seed == case.seed);
                let waves = draws.flat_map(|(_, scored)| scored.waves.iter().cloned()).enumerate();
                Cow::Owned(waves.map(|(id, wave)| Wave { id: id as u64, ..wave }).collect())
            }
        })
    }

    fn subject(&self, case: &Case, scratch: &Path) -> Result<Subject<'_>> {
        let (full, scored) = (&self.bench.model, self.calibration(case)?);
        if case.scorer == EVIDENCE {
            let Method::Merge(merge) = catalog::method(&case.method)? else {
                return Err(Error::Invalid(format!("{case}: not a way to merge")));
            };
            return merged::subject(full, &merge, scored, case.amount.fraction(self.shape().units()), scratch);
        }
        let tables =
            scored.tables.get(&case.scorer).ok_or_else(|| Error::Invalid(format!("{case}: no such scorer")))?;
        if let Amount::Units(count) = case.amount {
            return Ok(Subject::planned(full, knock_out::plan(&tables.units, self.shape(), count as usize)?));
        }
        let method = catalog::method(&case.method)?.for_routing(&full.config().routing);
        let (scores, ratio) = (tables.of(method.reads()), case.amount.fraction(self.shape().units()));
        match method {
            Method::Pruner(pruner) => Subject::pruned(full, &pruner, scores, ratio, &scored.waves),
            Method::Pieces(pieces) => Subject::pieces(full, pieces, scores, ratio, &scored.waves),
            Method::Stock => Subject::stock(full, scores, ratio, &scored.waves),
            Method::Merge(_) => Err(Error::Invalid(format!("{case}: merges go by `{EVIDENCE}`, not by scores"))),
        }
    }

    fn measure(&self, subject: &Subject<'_>, job: &Job) -> Result<Metrics> {
        let Some(key) = subject.key()? else { return self.bench.measure(&subject.model()?, job.figures) };
        let names = self.bench.names(job.figures);
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(metrics) = known().get(&key).filter(|metrics| names.iter().all(|name| metrics.contains_key(name))) {
            return Ok(metrics.clone());
        }
        let metrics = self.bench.measure(&subject.model()?, job.figures)?;
        known().insert(key, metrics.clone());
        Ok(metrics)
    }
}

/// Whether an error says that a way to prune or to merge cannot use these scores, or meet this budget on this model.
fn refuses(error: &Error) -> bool {
    let broken = |error: &moe_checkpoint::Error| matches!(error, moe_checkpoint::Error::BrokenRouting { .. });
    match error {
        Error::Prune(error) => matches!(
            error,
            moe_prune::Error::PoolTooNarrow { .. }
                | moe_prune::Error::NotAdditive { .. }
                | moe_prune::Error::Infeasible { .. }
                | moe_prune::Error::InvalidPlan { .. }
                | moe_prune::Error::Export { .. }
        ),
        Error::Merge(moe_merge::Error::Checkpoint(error)) => broken(error),
        Error::Merge(error) => {
            matches!(error, moe_merge::Error::Infeasible { .. } | moe_merge::Error::Incompatible { .. })
        }
        Error::Checkpoint(error) => broken(error),
        _ => false,
    }
}

//! Building and measuring one configuration.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use moe_checkpoint::{LayerRole, MoeShape, Role, ScoreTable};
use moe_core::{KeepUnits, Model, RemoveExperts};
use moe_prune::{Budget, ProtectionMask, PrunePlan, PruneRequest, Pruner};

use super::bench::{Bench, Figures, Metrics};
use super::case::{Amount, Case, Record};
use super::catalogue::{self, NO_REPAIR};
use super::knock_out;
use super::scored::Scored;
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
    /// Figures of plans that were measured before: several scorers may say the same.
    known: Mutex<HashMap<blake3::Hash, Metrics>>,
}

/// A plan, or why there is none.
enum Planned {
    Plan(Box<PrunePlan>),
    Refused(String),
}

impl Lab {
    /// A lab in which nothing has been measured.
    pub fn new(bench: Bench, scored: BTreeMap<(String, u64), Scored>) -> Self {
        Self { bench, scored, known: Mutex::default() }
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
        let case = &job.case;
        let mut record = Record {
            case: case.clone(),
            units: self.shape().units(),
            routed_parameters: self.shape().parameters(),
            parameters: self.bench.model.checkpoint().parameters(),
            layers: Vec::new(),
            metrics: Metrics::new(),
            refused: None,
            seconds: 0.0,
        };
        match self.plan(case)? {
            Planned::Refused(reason) => record.refused = Some(reason),
            Planned::Plan(plan) => {
                record.layers = plan.kept.iter().map(|layer| layer.experts.iter().map(Vec::len).sum()).collect();
                record.units = plan.units_kept();
                record.routed_parameters = plan.pruned_shape().parameters();
                record.parameters = self.parameters(&plan)?;
                record.metrics = self.measure(&plan, job)?;
            }
        }
        record.seconds = (start.elapsed().as_secs_f64() * 1e3).round() / 1e3;
        Ok(record)
    }

    fn plan(&self, case: &Case) -> Result<Planned> {
        let scored = self.calibration(case)?;
        let tables =
            scored.tables.get(&case.scorer).ok_or_else(|| Error::Invalid(format!("{case}: no such scorer")))?;
        if let Amount::Units(count) = case.amount {
            return Ok(Planned::Plan(Box::new(knock_out::plan(&tables.units, self.shape(), count as usize)?)));
        }
        let pruner = catalogue::method(&case.method)?;
        let table: &ScoreTable = tables.of(catalogue::reads(&pruner));
        let budget = Budget::Ratio(case.amount.fraction(self.shape().units()));
        let protect = ProtectionMask::none();
        let request = PruneRequest::new(table, self.shape(), budget, &protect);
        match pruner.prune_with(&request, &mut moe_prune::NoProbe) {
            Ok(pruned) => Ok(Planned::Plan(Box::new(pruned.plan))),
            Err(
                error @ (moe_prune::Error::PoolTooNarrow { .. }
                | moe_prune::Error::Infeasible { .. }
                | moe_prune::Error::NeedsProbe { .. }),
            ) => Ok(Planned::Refused(error.to_string())),
            Err(error) => Err(error.into()),
        }
    }

    fn measure(&self, plan: &PrunePlan, job: &Job) -> Result<Metrics> {
        if job.case.repair != NO_REPAIR {
            return Err(Error::Invalid(format!("{}: no such repair", job.case)));
        }
        let json = serde_json::to_vec(&plan.kept).map_err(|error| Error::Invalid(error.to_string()))?;
        let key = blake3::hash(&json);
        let names = self.bench.names(job.figures);
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(metrics) = known().get(&key).filter(|metrics| names.iter().all(|name| metrics.contains_key(name))) {
            return Ok(metrics.clone());
        }
        let metrics = self.bench.measure(&view(&self.bench.model, plan)?, job.figures)?;
        known().insert(key, metrics.clone());
        Ok(metrics)
    }

    /// Parameters of the checkpoint that a plan leaves.
    fn parameters(&self, plan: &PrunePlan) -> Result<u64> {
        let checkpoint = self.bench.model.checkpoint();
        let (before, after) = (self.shape().parameters(), plan.pruned_shape().parameters());
        let mut rows = 0;
        for kept in plan.kept.iter().filter(|kept| !kept.removed.is_empty()) {
            let router: usize = checkpoint.role(Role::Layer(kept.layer, LayerRole::Router))?.shape.iter().product();
            rows += (router / kept.experts.len() * kept.removed.len()) as u64;
        }
        Ok(checkpoint.parameters() - (before - after) - rows)
    }
}

/// The model as a plan leaves it, without writing a checkpoint.
fn view(model: &Model, plan: &PrunePlan) -> Result<Model> {
    let (mut units, mut removed) = (KeepUnits::new(), RemoveExperts::new());
    for layer in &plan.kept {
        for (expert, kept) in layer.experts.iter().enumerate() {
            units = units.keep(layer.layer, expert, kept.as_slice());
        }
        removed = removed.remove(layer.layer, layer.removed.iter().copied());
    }
    Ok(model.with_overlays(Some(Arc::new(units)), Some(Arc::new(removed)))?)
}

//! Statistics of a draw of calibration rows, collected once for all scorers together, and the scores from them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use moe_checkpoint::{Granularity, Provenance, ScoreTable, StatisticsStore};
use moe_core::data::{Dataset, Wave, WaveOptions};
use moe_core::trace::Observer;
use moe_core::{Engine, EngineOptions, Model};
use moe_importance::{Collection, Scorer, StatisticId, collect};
use moe_merge::Evidence;

use super::catalogue::Scoring;
use crate::Result;

/// Scores of units and of experts by one scorer.
#[derive(Clone, Debug)]
pub struct Tables {
    /// Scores of units.
    pub units: ScoreTable,
    /// Scores of experts.
    pub experts: ScoreTable,
    /// Which of the two the scorer gives by itself.
    pub own: Granularity,
}

impl Tables {
    /// The scores of this granularity.
    pub fn of(&self, granularity: Granularity) -> &ScoreTable {
        match granularity {
            Granularity::Unit => &self.units,
            Granularity::Expert => &self.experts,
        }
    }
}

/// A draw of calibration rows and what every scorer makes of it.
#[derive(Clone, Debug)]
pub struct Scored {
    /// The rows.
    pub waves: Vec<Wave>,
    /// All calibration rows of the capability, if there are more.
    pub all: Vec<Wave>,
    /// Their number.
    pub sequences: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Scores by name of the scorer.
    pub tables: BTreeMap<String, Tables>,
    /// What merges go by, if there are any.
    pub evidence: Option<Arc<Evidence>>,
    /// Seconds of running the model; 0 where everything was there already.
    pub seconds: f64,
}

/// Runs the model over `data`, as far as `directory` does not have its statistics yet, and scores by every scorer.
///
/// # Errors
/// Whatever stops the collection; statistics of other data or other scorers in `directory`.
pub fn score(
    model: &Model,
    data: &Dataset,
    wave_options: WaveOptions,
    scorers: &[(String, Scoring)],
    directory: &Path,
    progress: &mut dyn FnMut(&moe_importance::Progress),
) -> Result<Scored> {
    let build = |(_, scoring): &(String, Scoring)| -> Result<[Box<dyn Scorer>; 2]> {
        Ok([scoring.units.build()?, scoring.experts.build()?])
    };
    let built = scorers.iter().map(build).collect::<Result<Vec<_>>>()?;
    let ids: Vec<StatisticId> = built.iter().flatten().flat_map(|scorer| scorer.needs().statistics).collect();
    let waves = data.waves(wave_options);
    let checkpoint = model.checkpoint();
    let recipe = moe_importance::recipe(&ids, &wave_options)?;
    let provenance = Provenance::new(checkpoint.fingerprint(), data.hash.clone(), recipe);
    let mut collection = Collection::new(checkpoint.shape(), provenance, &ids)?;
    let mut store = StatisticsStore::create_or_resume(directory, checkpoint.shape(), collection.provenance())?;
    let known = store.waves().len();
    let mut engine = Engine::new(model, EngineOptions::default());
    for wave in &waves {
        engine.plan(wave.tokens(), collection.needs())?;
    }
    let start = Instant::now();
    let statistics = collect(&mut engine, &mut collection, &waves, Some(&mut store), progress)?;
    let seconds = if known < waves.len() { start.elapsed().as_secs_f64() } else { 0.0 };
    let mut tables = BTreeMap::new();
    for ((name, scoring), [units, experts]) in scorers.iter().zip(&built) {
        let table = |scorer: &dyn Scorer| scorer.score(&statistics, checkpoint.as_ref());
        let own = scoring.own;
        tables.insert(name.clone(), Tables { units: table(&**units)?, experts: table(&**experts)?, own });
    }
    let (sequences, tokens) = (data.sequences.len(), data.tokens());
    Ok(Scored { all: waves.clone(), waves, sequences, tokens, tables, evidence: None, seconds })
}

//! Statistics of a draw of calibration rows, collected once for all scorers together, and the scores from them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use moe_checkpoint::{Granularity, ScoreTable};
use moe_core::Model;
use moe_core::data::{Dataset, Wave, WaveOptions};
use moe_importance::{Calibration, Scorer};
use moe_merge::Evidence;

use super::catalog::Scoring;
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
    let calibration = Calibration::new(model, data, wave_options)
        .scorers(built.iter().flatten().map(|scorer| &**scorer))
        .store(directory);
    let (waves, checkpoint) = (data.waves(wave_options), model.checkpoint());
    let mut last = moe_importance::Progress::default();
    let start = Instant::now();
    let statistics = calibration.run(&mut |at| {
        last = *at;
        progress(at);
    })?;
    let seconds = if last.waves_resumed < last.waves { start.elapsed().as_secs_f64() } else { 0.0 };
    let mut tables = BTreeMap::new();
    for ((name, scoring), [units, experts]) in scorers.iter().zip(&built) {
        let table = |scorer: &dyn Scorer| scorer.score(&statistics, checkpoint.as_ref());
        let own = scoring.own;
        tables.insert(name.clone(), Tables { units: table(&**units)?, experts: table(&**experts)?, own });
    }
    let (sequences, tokens) = (data.sequences.len(), data.tokens());
    Ok(Scored { all: waves.clone(), waves, sequences, tokens, tables, evidence: None, seconds })
}

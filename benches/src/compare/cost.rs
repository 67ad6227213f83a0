//! What collecting statistics costs: one scorer, ten, all.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use moe_checkpoint::write_atomic;
use moe_core::Model;
use moe_core::data::{Dataset, WaveOptions};
use moe_importance::{Calibration, Scorer};
use serde::{Deserialize, Serialize};

use super::catalog::{self, MAIN_SCORER};
use super::settings::Settings;
use crate::{Error, Result};

/// Ten scorers that read different statistics.
const TEN: [&str; 10] =
    [MAIN_SCORER, "heapr", "coupled", "taylor", "activation", "projection", "reap", "ean_sum", "frequency", "mone"];
/// Runs of each, of which the fastest counts.
const RUNS: usize = 3;

/// What collecting cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// Capability of the rows.
    pub rows: String,
    /// Their tokens.
    pub tokens: usize,
    /// By what was collected.
    pub of: Vec<Cost>,
}

/// Collecting for some scorers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// What they are.
    pub name: String,
    /// Their number.
    pub scorers: usize,
    /// Seconds of one pass.
    pub seconds: f64,
}

impl Costs {
    /// Collects for one scorer that needs no gradients, for one that does, for ten, and for all, without writing
    /// anything; or reads what an earlier run has measured.
    ///
    /// # Errors
    /// Whatever stops the model; a file that is not one.
    pub fn measure_or_load(
        model: &Model,
        draws: &BTreeMap<(String, u64), [Dataset; 2]>,
        wave_options: WaveOptions,
        path: &Path,
        settings: &Settings,
    ) -> Result<Self> {
        let invalid = |error: serde_json::Error| Error::Invalid(format!("{}: {error}", path.display()));
        if path.exists() {
            return serde_json::from_slice(&std::fs::read(path).map_err(Error::io(path))?).map_err(invalid);
        }
        let Some(((rows, _), [data, _])) = draws.first_key_value() else {
            return Err(Error::Invalid("no calibration rows".into()));
        };
        let ten: Vec<&str> = TEN.into();
        let lists = [
            ("activation (no gradients)", vec!["activation"]),
            ("Fisher", vec![MAIN_SCORER]),
            ("ten scorers", ten),
            ("all scorers of the study", settings.scorers.clone()),
        ];
        let mut of = Vec::new();
        for (name, scorers) in lists {
            let seconds = seconds(model, data, wave_options, &scorers)?;
            of.push(Cost { name: name.into(), scorers: scorers.len(), seconds });
        }
        let costs = Self { rows: rows.clone(), tokens: data.tokens(), of };
        write_atomic(path, &serde_json::to_vec_pretty(&costs).map_err(invalid)?)?;
        Ok(costs)
    }
}

fn seconds(model: &Model, data: &Dataset, wave_options: WaveOptions, scorers: &[&str]) -> Result<f64> {
    let build = |name: &&str| -> Result<Box<dyn Scorer>> { Ok(catalog::scorer(name)?.build()?) };
    let scorers = scorers.iter().map(build).collect::<Result<Vec<_>>>()?;
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        let calibration = Calibration::new(model, data, wave_options).scorers(scorers.iter().map(|scorer| &**scorer));
        let start = Instant::now();
        calibration.run(&mut |_| ())?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

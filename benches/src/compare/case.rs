//! What is measured, and the file that remembers what has been.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use moe_checkpoint::Checkpoint;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How much goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Amount {
    /// A fraction of all units, in hundredths of a percent.
    Ratio(u32),
    /// A number of units.
    Units(u32),
}

impl Amount {
    /// A fraction in [0, 1], to four decimals.
    pub fn ratio(ratio: f64) -> Self {
        Self::Ratio((ratio * 1e4).round() as u32)
    }

    /// The fraction of `units` that goes.
    pub fn fraction(self, units: usize) -> f64 {
        match self {
            Self::Ratio(parts) => f64::from(parts) / 1e4,
            Self::Units(count) => f64::from(count) / units.max(1) as f64,
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ratio(parts) => write!(f, "{}", f64::from(*parts) / 1e4),
            Self::Units(count) => write!(f, "{count} units"),
        }
    }
}

impl FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("found `{text}`, expected a fraction such as 0.5, or `8 units`");
        match text.strip_suffix(" units") {
            Some(count) => count.parse().map(Self::Units).map_err(|_| bad()),
            None => text.parse().map(Self::ratio).map_err(|_| bad()),
        }
    }
}

impl From<Amount> for String {
    fn from(amount: Amount) -> Self {
        amount.to_string()
    }
}

impl TryFrom<String> for Amount {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// One configuration: what the model was calibrated on, how it was scored and pruned, how far, and what was repaired.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Case {
    /// Capability of the calibration rows.
    pub calibrated: String,
    /// Draw of the calibration rows.
    pub seed: u64,
    /// Name of the scorer.
    pub scorer: String,
    /// Name of the way to prune.
    pub method: String,
    /// How much goes.
    pub amount: Amount,
    /// Name of the repair.
    pub repair: String,
}

impl Case {
    /// The same with another draw of the calibration rows.
    pub fn with_seed(&self, seed: u64) -> Self {
        Self { seed, ..self.clone() }
    }

    /// The same with a repair.
    pub fn repaired(self, repair: &str) -> Self {
        Self { repair: repair.into(), ..self }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { calibrated, seed, scorer, method, amount, repair } = self;
        write!(f, "{calibrated} {seed}: {scorer}, {method}, {amount}")?;
        if repair == super::catalog::NO_REPAIR { Ok(()) } else { write!(f, ", {repair}") }
    }
}

/// What became of a configuration: a line of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The configuration.
    #[serde(flatten)]
    pub case: Case,
    /// Units of routed experts that are left.
    pub units: usize,
    /// Parameters of routed experts that are left.
    pub routed_parameters: u64,
    /// Parameters of the whole checkpoint.
    pub parameters: u64,
    /// What is kept of each MoE layer, in units.
    pub layers: Vec<usize>,
    /// Figures by name: `CAPABILITY_ppl`, `CAPABILITY_kl`, `CAPABILITY_exact`.
    pub metrics: BTreeMap<String, f64>,
    /// Why there are no figures, where this way to prune refuses these scores or this budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// What was chosen by measuring, where something was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chosen: Option<String>,
    /// Seconds of pruning, repairing and measuring.
    pub seconds: f64,
}

impl Record {
    /// Of a configuration that has not been measured.
    pub(super) fn nothing_dropped(case: &Case, checkpoint: &Checkpoint) -> Self {
        Self {
            case: case.clone(),
            units: checkpoint.shape().units(),
            routed_parameters: checkpoint.shape().parameters(),
            parameters: checkpoint.parameters(),
            layers: checkpoint.shape().layers.iter().map(|layer| layer.units()).collect(),
            metrics: BTreeMap::new(),
            refused: None,
            chosen: None,
            seconds: 0.0,
        }
    }

    /// A figure.
    pub fn metric(&self, capability: &str, figure: &str) -> Option<f64> {
        self.metrics.get(&format!("{capability}_{figure}")).copied()
    }
}

/// Numbers keep seven digits, so that they survive being written and read.
pub(super) fn rounded(value: f64) -> f64 {
    format!("{value:.6e}").parse().unwrap_or(value)
}

/// Finished measurements by configuration, one JSON object per line as they come. A line that was cut off by a kill is
/// dropped.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    records: BTreeMap<Case, Record>,
}

impl Journal {
    /// Opens the file, or starts it.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Invalid`] names a line that is not one, unless it is the unfinished last one.
    pub fn open(path: &Path) -> Result<Self> {
        let mut records = BTreeMap::new();
        let mut whole = 0;
        if path.exists() {
            let mut reader = BufReader::new(File::open(path).map_err(Error::io(path))?);
            let (mut line, mut number) = (String::new(), 0);
            while reader.read_line(&mut line).map_err(Error::io(path))? > 0 {
                number += 1;
                if !line.ends_with('\n') {
                    break;
                }
                let record: Record = serde_json::from_str(&line)
                    .map_err(|error| Error::Invalid(format!("{}, line {number}: {error}", path.display())))?;
                merge(&mut records, record);
                whole += line.len() as u64;
                line.clear();
            }
        }
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(Error::io(path))?;
        file.set_len(whole).map_err(Error::io(path))?;
        Ok(Self { path: path.to_path_buf(), file, records })
    }

    /// Adds a measurement; figures of the same configuration come together.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, record: Record) -> Result<()> {
        let mut line = serde_json::to_string(&record).map_err(|error| Error::Invalid(error.to_string()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(Error::io(&self.path))?;
        merge(&mut self.records, record);
        Ok(())
    }

    /// All measurements by configuration.
    pub fn records(&self) -> &BTreeMap<Case, Record> {
        &self.records
    }

    /// Whether a configuration has every figure of `metrics`, or can have none.
    pub fn has(&self, case: &Case, metrics: &[String]) -> bool {
        self.records.get(case).is_some_and(|record| {
            record.refused.is_some() || metrics.iter().all(|metric| record.metrics.contains_key(metric))
        })
    }
}

fn merge(records: &mut BTreeMap<Case, Record>, mut record: Record) {
    if let Some(known) = records.get(&record.case) {
        record.seconds += known.seconds;
        for (name, value) in &known.metrics {
            record.metrics.entry(name.clone()).or_insert(*value);
        }
    }
    records.insert(record.case.clone(), record);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(seed: u64, metric: &str) -> Record {
        let case = Case {
            calibrated: "a".into(),
            seed,
            scorer: "fisher".into(),
            method: "global".into(),
            amount: Amount::ratio(0.375),
            repair: "none".into(),
        };
        Record {
            case,
            units: 3,
            routed_parameters: 9,
            parameters: 20,
            layers: vec![1, 2],
            metrics: [(metric.to_string(), rounded(1.0 / 3.0))].into(),
            refused: None,
            chosen: None,
            seconds: 0.5,
        }
    }

    #[test]
    fn amounts_survive_text() {
        for amount in [Amount::ratio(0.375), Amount::ratio(0.5), Amount::Units(12)] {
            assert_eq!(amount.to_string().parse::<Amount>(), Ok(amount));
        }
        assert_eq!(Amount::Units(12).fraction(48), 0.25);
        assert!("half".parse::<Amount>().is_err());
    }

    #[test]
    fn a_journal_goes_on_after_a_kill() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("measurements.jsonl");
        let mut journal = Journal::open(&path).unwrap();
        journal.add(record(0, "a_kl")).unwrap();
        journal.add(record(0, "a_exact")).unwrap();
        journal.add(record(1, "a_kl")).unwrap();
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], b"{\"calibrated\": \"a\", \"se"].concat()).unwrap();

        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.records().len(), 2);
        let both = journal.records().values().next().unwrap();
        assert_eq!(both.metrics.len(), 2);
        assert_eq!((both.seconds, both.metric("a", "kl")), (1.0, Some(0.3333333)));
        assert!(journal.has(&record(0, "").case, &["a_kl".into(), "a_exact".into()]));
        assert!(!journal.has(&record(1, "").case, &["a_exact".into()]));
        journal.add(record(2, "a_kl")).unwrap();
        assert_eq!(Journal::open(&path).unwrap().records().len(), 3);

        std::fs::write(&path, "{}\n").unwrap();
        assert!(Journal::open(&path).unwrap_err().to_string().contains("line 1"));
    }
}

//! Rows of a domain.

use std::path::PathBuf;
use std::str::FromStr;

use moe_checkpoint::Checkpoint;
use moe_core::data::{Dataset, LossOver, Tokenizer};

use super::Arguments;
use crate::compare::{Draw, HeldOut, Limits};
use crate::{Error, Result};

/// A domain: rows to calibrate on, and files to measure on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its name in tables and files.
    pub name: String,
    /// Rows to calibrate on.
    pub calibration: PathBuf,
    /// Files named `NAME_test.jsonl`.
    pub tests: Vec<PathBuf>,
}

impl FromStr for Domain {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("found `{text}`, expected NAME=ROWS,TEST[,TEST]");
        let (name, files) = text.split_once('=').ok_or_else(bad)?;
        let mut files = files.split(',').map(PathBuf::from);
        let calibration = files.next().ok_or_else(bad)?;
        let tests: Vec<PathBuf> = files.collect();
        let named = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        match named(name) && !tests.is_empty() {
            true => Ok(Self { name: name.into(), calibration, tests }),
            false => Err(bad()),
        }
    }
}

/// A domain whose rows were read.
pub(super) struct Loaded {
    pub domain: Domain,
    pub held_out: Vec<HeldOut>,
    /// A data set per draw.
    pub draws: Vec<Dataset>,
}

impl Loaded {
    /// Reads all rows.
    ///
    /// # Errors
    /// Files that cannot be read as what they are for; two tests of one name.
    pub fn new(domain: &Domain, arguments: &Arguments, tokenizer: &Tokenizer, checkpoint: &Checkpoint) -> Result<Self> {
        let config = checkpoint.config();
        let limits = Limits {
            rows: usize::MAX,
            answered: arguments.questions,
            tokens: arguments.test_tokens,
            length: arguments.length,
        };
        let mut held_out: Vec<HeldOut> = Vec::new();
        for path in &domain.tests {
            let rows = HeldOut::load(path, tokenizer, config, limits, true)?;
            if held_out.iter().any(|other| other.name == rows.name) {
                return Err(Error::Invalid(format!("{}: two test files named {}", path.display(), rows.name)));
            }
            held_out.push(rows);
        }
        let text = held_out.first().is_some_and(|rows| rows.questions.is_none());
        let draw = Draw {
            file: domain.calibration.clone(),
            samples: if text { arguments.windows } else { arguments.samples },
            length: arguments.length,
            packing: text,
        };
        let loss = if text { LossOver::All } else { LossOver::Completions };
        let draws = (0..arguments.draws as u64).map(|seed| draw.load(Some(seed), loss, Some(tokenizer), config));
        Ok(Self { domain: domain.clone(), held_out, draws: draws.collect::<Result<_>>()? })
    }

    /// What measurements depend on. Further draws change nothing of those that there are.
    pub fn hash(&self, hasher: &mut blake3::Hasher) {
        hasher.update(self.domain.name.as_bytes());
        hasher.update(self.draws[0].hash.as_bytes());
        for rows in &self.held_out {
            let answered = rows.questions.as_ref().map_or(0, |set| set.len());
            let data = Dataset::from_sequences(rows.sequences.clone());
            hasher.update(data.hash.as_bytes()).update(&(answered as u64).to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_a_name_rows_and_tests() {
        let domain: Domain = "facts=a/rows.jsonl,facts_test.jsonl,b/prose_test.jsonl".parse().unwrap();
        assert_eq!((domain.name.as_str(), domain.calibration.to_str()), ("facts", Some("a/rows.jsonl")));
        assert_eq!(domain.tests, ["facts_test.jsonl", "b/prose_test.jsonl"].map(PathBuf::from));
        for bad in ["facts", "facts=rows.jsonl", "=rows.jsonl,a_test.jsonl", "a b=rows.jsonl,a_test.jsonl"] {
            assert!(bad.parse::<Domain>().unwrap_err().contains("expected NAME=ROWS,TEST"), "{bad}");
        }
    }
}

//! Data of several files in stated shares.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::rows::files;
use super::{Dataset, DatasetOptions, Error, Sequence, Tokenizer};

/// A file or folder of rows and its share of a mixture; written `FILE` or `FILE=WEIGHT`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The file or folder.
    pub path: PathBuf,
    /// Its share of the sequences, relative to the other weights; given for every source or for none.
    #[serde(default)]
    pub weight: Option<f64>,
}

impl FromStr for Source {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        // A file may well have an equals sign in its name: only what a number follows is a weight.
        let weighted = text.rsplit_once('=').and_then(|(path, weight)| Some((path, weight.parse::<f64>().ok()?)));
        Ok(match weighted {
            Some((path, weight)) => Self { path: path.into(), weight: Some(weight) },
            None => Self { path: text.into(), weight: None },
        })
    }
}

impl Dataset {
    /// Reads several files. Without weights they are read one after the other, as if they were one. With weights each
    /// gives its share of the sequences, interleaved, so that any first part of the data has the same shares; there are
    /// as many sequences as `samples` asks for, or as many as the file that runs out first allows.
    ///
    /// ```
    /// # fn main() -> moe_data::Result<()> {
    /// # let dir = tempfile::tempdir().unwrap();
    /// # for name in ["a.jsonl", "b.jsonl"] { std::fs::write(dir.path().join(name), "{\"input_ids\": [1, 2]}\n".repeat(9)).unwrap(); }
    /// use moe_data::{Dataset, Source};
    /// # let at = |name: &str| dir.path().join(name).display().to_string();
    /// let sources: Vec<Source> = vec![format!("{}=2", at("a.jsonl")).parse()?, format!("{}=1", at("b.jsonl")).parse()?];
    /// assert_eq!(Dataset::load_sources(&sources, None, 3, &Default::default())?.sequences.len(), 13);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Dataset::load`], for any of the files; weights that are not positive or that only some files have.
    pub fn load_sources(
        sources: &[Source],
        tokenizer: Option<&Tokenizer>,
        vocab_size: usize,
        options: &DatasetOptions,
    ) -> Result<Self, Error> {
        options.check()?;
        let weights: Vec<f64> = sources.iter().filter_map(|source| source.weight).collect();
        let is_weight = |weight: Option<f64>| weight.is_some_and(|weight| weight.is_finite() && weight > 0.0);
        if weights.is_empty() {
            let mut all = Vec::new();
            for source in sources {
                all.extend(files(&source.path)?);
            }
            let path = sources.first().map(|source| source.path.clone()).unwrap_or_default();
            return Self::of_files(&path, all, tokenizer, vocab_size, options);
        }
        if let Some(wrong) = sources.iter().find(|source| !is_weight(source.weight)) {
            let weight = wrong.weight.map_or("none".to_owned(), |weight| weight.to_string());
            return Err(Error::Weight { path: wrong.path.clone(), weight });
        }
        let total: f64 = weights.iter().sum();
        let mut parts = Vec::with_capacity(sources.len());
        for (source, weight) in sources.iter().zip(&weights) {
            let samples = options.samples.map(|samples| (samples as f64 * weight / total).ceil().max(1.0) as usize);
            let options = DatasetOptions { samples, ..options.clone() };
            parts.push(Self::load(&source.path, tokenizer, vocab_size, &options)?);
        }
        let lengths: Vec<usize> = parts.iter().map(|part| part.sequences.len()).collect();
        let counts = shares(&weights, &lengths, options.samples.unwrap_or(usize::MAX));
        let sequences = interleaved(parts.iter().zip(&counts).map(|(part, count)| &part.sequences[..*count]).collect());
        let first_skipped = parts.iter().find_map(|part| part.first_skipped.clone());
        let (dropped, skipped) = parts.iter().fold((0, 0), |sum, part| (sum.0 + part.dropped, sum.1 + part.skipped));
        Ok(Self { dropped, skipped, first_skipped, ..Self::from_sequences(sequences) })
    }
}

/// How many sequences each source gives: at most what it has, `limit` together, and in proportion to the weights but
/// for rounding.
fn shares(weights: &[f64], lengths: &[usize], limit: usize) -> Vec<usize> {
    let total: f64 = weights.iter().sum();
    let allowed = weights.iter().zip(lengths).map(|(weight, length)| *length as f64 * total / weight);
    // A hair more than the quotient, which rounding may have put below a whole number.
    let all = allowed.fold(limit as f64, f64::min) + 1e-9;
    let exact: Vec<f64> = weights.iter().map(|weight| all.floor() * weight / total).collect();
    let mut counts: Vec<usize> =
        exact.iter().zip(lengths).map(|(exact, length)| (exact.floor() as usize).min(*length)).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|a, b| exact[*b].fract().total_cmp(&exact[*a].fract()).then(a.cmp(b)));
    let mut missing = (all.floor() as usize).saturating_sub(counts.iter().sum());
    for i in order {
        if missing > 0 && counts[i] < lengths[i] {
            counts[i] += 1;
            missing -= 1;
        }
    }
    counts
}

/// Each list spread evenly over the whole.
fn interleaved(lists: Vec<&[Sequence]>) -> Vec<Sequence> {
    let mut places: Vec<(f64, usize, usize)> = Vec::new();
    for (list, sequences) in lists.iter().enumerate() {
        places.extend((0..sequences.len()).map(|i| ((i as f64 + 0.5) / sequences.len() as f64, list, i)));
    }
    places.sort_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    places.into_iter().map(|(_, list, i)| lists[list][i].clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_the_weights() {
        assert_eq!(shares(&[1.0, 1.0], &[10, 10], 8), [4, 4]);
        assert_eq!(shares(&[2.0, 1.0], &[100, 100], 128), [85, 43]);
        assert_eq!(shares(&[0.7, 0.3], &[7, 100], usize::MAX), [7, 3]);
        assert_eq!(shares(&[3.0, 1.0], &[2, 9], usize::MAX), [2, 0]);
    }

    #[test]
    fn sources_are_spread_over_the_whole() {
        let list = |id: u32, count: usize| vec![Sequence::new(vec![id, id]); count];
        let (a, b) = (list(1, 4), list(2, 2));
        let order: Vec<u32> = interleaved(vec![&a, &b]).iter().map(|sequence| sequence.ids[0]).collect();
        assert_eq!(order, [1, 2, 1, 1, 2, 1]);
    }

    #[test]
    fn a_weight_follows_the_last_equals_sign() {
        let source = |text: &str| text.parse::<Source>().unwrap();
        assert_eq!(source("a.jsonl=0.5"), Source { path: "a.jsonl".into(), weight: Some(0.5) });
        assert_eq!(source("lr=x.jsonl"), Source { path: "lr=x.jsonl".into(), weight: None });
    }
}

//! Rows to calibrate on, from any number of files.

use moe_checkpoint::group::Group;
use moe_core::Model;
use moe_core::data::{Dataset, DatasetOptions, Source, Tokenizer, Wave, WaveOptions};
use moe_importance::StatisticId;

use crate::recipe::{Data, DataFile};
use crate::{Error, Result};

/// Sequences to calibrate on, in waves.
#[derive(Clone, Debug)]
pub struct Calibration {
    /// The sequences.
    pub data: Dataset,
    /// How they are grouped.
    pub options: WaveOptions,
    /// The same in waves.
    pub waves: Vec<Wave>,
}

impl Calibration {
    /// Reads the files of a recipe: each gives the rows it is asked for, or else its share of the samples by weight.
    ///
    /// # Errors
    /// Files that cannot be read, weights that are no positive numbers, no file.
    pub fn load(data: &Data, seed: Option<u64>, tokenizer: Option<&Tokenizer>, vocab_size: usize) -> Result<Self> {
        let plain = DatasetOptions { seed, ..DatasetOptions::default() };
        Self::load_as(data, &plain, tokenizer, vocab_size)
    }

    /// The same, with what of `as_in` the recipe does not say: seed, ends of completions, labels.
    ///
    /// # Errors
    /// Those of [`Calibration::load`]; labels of several files, whose names would not be the same numbers.
    pub fn load_as(
        data: &Data,
        as_in: &DatasetOptions,
        tokenizer: Option<&Tokenizer>,
        vocab_size: usize,
    ) -> Result<Self> {
        if as_in.label.is_some() && data.calibration.len() > 1 {
            return Err(Error::Usage("labels: rows of several files; expected one file or folder".into()));
        }
        let mut total = 0.0;
        for file in &data.calibration {
            let (_, weight) = file.amount();
            if !(weight > 0.0 && weight.is_finite()) {
                let path = file.path().display();
                return Err(Error::Usage(format!("data.calibration: weight {weight} of {path}: expected above 0")));
            }
            total += weight;
        }
        let options = |samples| DatasetOptions {
            samples: Some(samples),
            length: data.length,
            loss: data.loss,
            reading: data.reading.clone(),
            ..as_in.clone()
        };
        let amounts: Vec<(Option<usize>, f64)> = data.calibration.iter().map(DataFile::amount).collect();
        let data_set = if data.calibration.is_empty() {
            return Err(Error::Usage("data.calibration: names no file".into()));
        } else if amounts.iter().all(|(rows, _)| rows.is_none()) {
            let source = |(file, (_, weight)): (&DataFile, &(_, f64))| Source {
                path: file.path().to_path_buf(),
                weight: (data.calibration.len() > 1).then_some(*weight),
            };
            let sources: Vec<Source> = data.calibration.iter().zip(&amounts).map(source).collect();
            Dataset::load_sources(&sources, tokenizer, vocab_size, &options(data.samples))?
        } else {
            // Some files say how many rows; the others share the samples.
            let mut sets = Vec::with_capacity(amounts.len());
            for (file, (rows, weight)) in data.calibration.iter().zip(&amounts) {
                let share = ((data.samples as f64 * weight / total).round() as usize).max(1);
                sets.push(Dataset::load(file.path(), tokenizer, vocab_size, &options(rows.unwrap_or(share)))?);
            }
            let skipped = sets.iter().map(|set| set.skipped).sum();
            let first_skipped = sets.iter().find_map(|set| set.first_skipped.clone());
            let all = Dataset::from_sequences(sets.into_iter().flat_map(|set| set.sequences).collect());
            Dataset { skipped, first_skipped, ..all }
        };
        if let Some(first) = &data_set.first_skipped {
            tracing::warn!("{} bad rows of data left out, the first of them {first}", data_set.skipped);
        }
        if data.calibration.len() > 1 && data_set.sequences.len() < data.samples {
            let (found, asked) = (data_set.sequences.len(), data.samples);
            tracing::warn!("{found} sequences of data, {asked} were asked for: a file has no more for its share");
        }
        let options = WaveOptions::Tokens(data.wave_tokens);
        let waves = data_set.waves(options);
        Ok(Self { data: data_set, options, waves })
    }

    /// The run of a model over these rows, by the ranks of a group, that observes these statistics.
    pub(super) fn observing<'m>(
        &self,
        model: &'m Model,
        ids: impl IntoIterator<Item = StatisticId>,
        group: &'m dyn Group,
    ) -> moe_importance::Calibration<'m> {
        moe_importance::Calibration::new(model, &self.data, self.options).statistics(ids).group(group)
    }
}

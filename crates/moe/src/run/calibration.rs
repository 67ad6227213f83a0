//! Rows to calibrate on, from any number of files.

use moe_core::data::{Dataset, DatasetOptions, Tokenizer, Wave, WaveOptions};

use crate::recipe::Data;
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
        let mut total = 0.0;
        for file in &data.calibration {
            let (_, weight) = file.amount();
            if !(weight > 0.0 && weight.is_finite()) {
                let path = file.path().display();
                return Err(Error::Usage(format!("data.calibration: weight {weight} of {path}: expected above 0")));
            }
            total += weight;
        }
        let mut sets = Vec::with_capacity(data.calibration.len());
        for file in &data.calibration {
            let (rows, weight) = file.amount();
            let share = ((data.samples as f64 * weight / total).round() as usize).max(1);
            let options = DatasetOptions {
                samples: Some(rows.unwrap_or(share)),
                length: data.length,
                seed,
                loss: data.loss,
                ..DatasetOptions::default()
            };
            sets.push(Dataset::load(file.path(), tokenizer, vocab_size, &options)?);
        }
        let data_set = match <[Dataset; 1]>::try_from(sets) {
            Ok([one]) => one,
            Err(sets) if sets.is_empty() => {
                return Err(Error::Usage("data.calibration: names no file".into()));
            }
            Err(sets) => Dataset::from_sequences(sets.into_iter().flat_map(|set| set.sequences).collect()),
        };
        let options = WaveOptions::Tokens(data.wave_tokens);
        let waves = data_set.waves(options);
        Ok(Self { data: data_set, options, waves })
    }
}

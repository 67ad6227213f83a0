//! Token ids to run, with padding.

use std::fs;
use std::path::Path;

use moe_core::data::{LossOver, Reading, RowEncoder, Rows, Sequence, Tokenizer};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::{Error, Result};

/// Rows of token ids `[B, S]` and which positions are real.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// `[B, S]`, row-major.
    pub ids: Vec<u32>,
    /// `[B, S]`: false for padding, which is not run.
    pub mask: Vec<bool>,
    /// `[B, S]`: whether predicting the token counts in the loss; rows may have masks of their own.
    pub counted: Vec<bool>,
    /// Rows of the batch, B.
    pub rows: usize,
    /// Tokens of every row, S.
    pub length: usize,
}

impl Tokens {
    /// Reads a `.safetensors` file with `input_ids [B, S]` (i64 or i32) and perhaps `attention_mask [B, S]`, or
    /// [`Rows`], which are padded at their ends. `model` is where the tokenizer for rows of text is.
    ///
    /// # Errors
    /// A file that cannot be read, lacks the tensor, or has another shape or dtype; ids outside `0..vocab_size`; no
    /// row.
    pub fn load(path: &Path, reading: &Reading, model: &Path, vocab_size: usize) -> Result<Self> {
        let tokens = match path.extension().and_then(|extension| extension.to_str()) {
            Some("safetensors") => Self::from_safetensors(path, vocab_size)?,
            Some("txt") => {
                return invalid(
                    path,
                    "unknown kind of file; expected a name that ends in .safetensors, or rows such as .jsonl",
                );
            }
            _ => Self::from_rows(path, reading, model, vocab_size)?,
        };
        match tokens.mask.iter().any(|real| *real) {
            true => Ok(tokens),
            false => invalid(path, "no token to run"),
        }
    }

    /// The real tokens of each row that has any, with their positions in `[B, S]` counted row-major.
    pub fn sequences(&self) -> Vec<(Sequence, Vec<usize>)> {
        (0..self.rows)
            .map(|row| {
                let all = row * self.length..(row + 1) * self.length;
                let real: Vec<usize> = all.filter(|position| self.mask[*position]).collect();
                let ids = real.iter().map(|position| self.ids[*position]).collect();
                let loss: Vec<bool> = real.iter().map(|position| self.counted[*position]).collect();
                // Nothing predicts the first token, so that its mask says nothing.
                let loss = loss.iter().skip(1).any(|counts| !counts).then_some(loss);
                (Sequence { ids, loss }, real)
            })
            .filter(|(sequence, _)| !sequence.is_empty())
            .collect()
    }

    fn from_safetensors(path: &Path, vocab_size: usize) -> Result<Self> {
        let bytes = fs::read(path).map_err(Error::io(path))?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|error| Error::Invalid(format!("{}: not a safetensors file: {error}", path.display())))?;
        let Ok(input) = file.tensor("input_ids") else {
            return invalid(path, format!("no tensor `input_ids`; there are {:?}", file.names()));
        };
        let [rows, length] = *input.shape() else {
            return invalid(path, format!("`input_ids` has shape {:?}, expected [rows, length]", input.shape()));
        };
        let raw = integers(path, "input_ids", &input)?;
        let mask = match file.tensor("attention_mask") {
            Err(_) => vec![true; raw.len()],
            Ok(mask) if mask.shape() == input.shape() => {
                integers(path, "attention_mask", &mask)?.into_iter().map(|value| value != 0).collect()
            }
            Ok(mask) => {
                let (found, expected) = (mask.shape(), input.shape());
                return invalid(path, format!("`attention_mask` has shape {found:?}, `input_ids` has {expected:?}"));
            }
        };
        let mut ids = Vec::with_capacity(raw.len());
        for (position, (id, real)) in raw.into_iter().zip(&mask).enumerate() {
            ids.push(match u32::try_from(id) {
                Ok(id) if (id as usize) < vocab_size => id,
                // what stands in padding is nobody's business
                _ if !real => 0,
                _ => {
                    let (row, column) = (position / length, position % length);
                    let reason = format!("`input_ids` has {id} in row {row}, column {column}");
                    return invalid(path, format!("{reason}, expected 0 to {}", vocab_size - 1));
                }
            });
        }
        let counted = vec![true; ids.len()];
        Ok(Self { ids, mask, counted, rows, length })
    }

    fn from_rows(path: &Path, reading: &Reading, model: &Path, vocab_size: usize) -> Result<Self> {
        let rows = Rows::open(path, reading)?.collect::<std::result::Result<Vec<_>, _>>()?;
        let needs_tokenizer = rows.iter().any(|(_, row)| row.needs_tokenizer());
        let tokenizer = needs_tokenizer.then(|| Tokenizer::from_dir(model)).transpose()?;
        let encoder = RowEncoder::new(tokenizer.as_ref(), vocab_size, LossOver::All);
        let sequences = rows
            .iter()
            .map(|(place, row)| encoder.sequence_at(place, row))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let length = sequences.iter().map(Sequence::len).max().unwrap_or(0);
        let mut tokens = Self { ids: Vec::new(), mask: Vec::new(), counted: Vec::new(), rows: sequences.len(), length };
        for sequence in sequences {
            tokens.mask.extend((0..length).map(|position| position < sequence.len()));
            tokens.counted.extend((0..length).map(|position| sequence.counts(position)));
            tokens.ids.extend(sequence.ids);
            tokens.ids.resize(tokens.mask.len(), 0);
        }
        Ok(tokens)
    }
}

fn integers(path: &Path, name: &str, view: &TensorView<'_>) -> Result<Vec<i64>> {
    let bytes = view.data();
    Ok(match view.dtype() {
        Dtype::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
        Dtype::I32 => bytes.as_chunks().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect(),
        Dtype::U8 | Dtype::BOOL => bytes.iter().map(|b| i64::from(*b)).collect(),
        other => return invalid(path, format!("`{name}` is {other}, expected I64 or I32")),
    })
}

fn invalid<T>(path: &Path, reason: impl std::fmt::Display) -> Result<T> {
    Err(Error::Invalid(format!("{}: {reason}", path.display())))
}

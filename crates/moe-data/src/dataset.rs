//! A file of rows as a list of sequences.

use std::path::Path;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::rows::Lines;
use super::waves::{Wave, WaveOptions, waves};
use super::{Error, LossOver, Row, RowEncoder, Sequence, Tokenizer};

/// What to take from a data file. The defaults are those of published calibration runs (128 sequences of at most 2,048 tokens, in the
/// order of the file).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatasetOptions {
    /// Sequences at most; `None` takes all. Rows that are dropped do not count. At least 1.
    pub samples: Option<usize>,
    /// Tokens of a sequence at most; what a row has beyond that is left out (or begins the next sequence when packing). At least 2.
    pub length: usize,
    /// Take rows in a random order with this seed instead of the first ones.
    pub seed: Option<u64>,
    /// Join rows, with an end-of-sequence token between two of them, and cut the whole into sequences of `length` tokens. Attention then
    /// sees across rows.
    pub packing: bool,
    /// Which tokens count in the loss.
    pub loss: LossOver,
}

impl Default for DatasetOptions {
    fn default() -> Self {
        Self { samples: Some(128), length: 2048, seed: None, packing: false, loss: LossOver::All }
    }
}

impl DatasetOptions {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Options`] naming the field, its value and what is allowed.
    pub fn check(&self) -> Result<(), Error> {
        if self.samples == Some(0) {
            return Err(Error::Options { field: "samples", found: 0, expected: "at least 1" });
        }
        if self.length < Sequence::MIN_LEN {
            return Err(Error::Options { field: "length", found: self.length, expected: "at least 2" });
        }
        Ok(())
    }
}

/// Tokenised sequences, each with at least two tokens and at least one that counts in the loss.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// The sequences, in the order they were taken.
    pub sequences: Vec<Sequence>,
    /// Rows (or pieces of text) read and left out: fewer than two tokens, or none that counts in the loss.
    pub dropped: usize,
    /// blake3 over lengths, token ids and loss masks, in hexadecimal: what a statistic's provenance calls its data.
    pub hash: String,
}

impl Dataset {
    /// Reads `.jsonl` rows (see [`Row`]) or a `.txt` file, which is one text cut into consecutive sequences. `vocab_size` is the model's;
    /// the tokenizer may be left out for rows of `"input_ids"`.
    ///
    /// Without a seed the file is read only as far as needed, so a malformed row after the last one taken goes unseen.
    ///
    /// # Errors
    /// Options out of range, a file that cannot be read, a malformed row (file and line are named), a file without a usable row.
    pub fn load(
        path: impl AsRef<Path>,
        tokenizer: Option<&Tokenizer>,
        vocab_size: usize,
        options: &DatasetOptions,
    ) -> Result<Self, Error> {
        let path = path.as_ref();
        options.check()?;
        let encoder = RowEncoder::new(tokenizer, vocab_size, options.loss);
        let collected = match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl" | "ndjson") => from_rows(path, &encoder, options)?,
            Some("txt") => from_text(path, &encoder, options)?,
            _ => return Err(Error::FileKind { path: path.to_owned() }),
        };
        if collected.sequences.is_empty() {
            let path = path.to_owned();
            return Err(match collected.dropped {
                0 => Error::EmptyFile { path },
                dropped => Error::NoUsableRow { path, dropped },
            });
        }
        Ok(Self { dropped: collected.dropped, ..Self::from_sequences(collected.sequences) })
    }

    /// Wraps sequences made elsewhere; those with nothing to predict are dropped and counted.
    pub fn from_sequences(sequences: Vec<Sequence>) -> Self {
        let read = sequences.len();
        let sequences: Vec<_> = sequences.into_iter().filter(is_usable).collect();
        Self { dropped: read - sequences.len(), hash: hash(&sequences), sequences }
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(Sequence::len).sum()
    }

    /// Predicted tokens that count in the loss, over all sequences.
    pub fn loss_tokens(&self) -> usize {
        self.sequences.iter().map(Sequence::loss_tokens).sum()
    }

    /// Tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        self.sequences.iter().map(Sequence::len).max().unwrap_or(0)
    }

    /// The sequences in waves with ids 0, 1, 2, …; [`shard`](super::shard) takes one process's part of them.
    pub fn waves(&self, options: WaveOptions) -> Vec<Wave> {
        waves(&self.sequences, options)
    }
}

fn is_usable(sequence: &Sequence) -> bool {
    sequence.len() >= Sequence::MIN_LEN && sequence.loss_tokens() > 0
}

fn hash(sequences: &[Sequence]) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"moe-core sequences 1\n");
    for sequence in sequences {
        hasher.update(&(sequence.len() as u64).to_le_bytes());
        for id in &sequence.ids {
            hasher.update(&id.to_le_bytes());
        }
        match &sequence.loss {
            None => hasher.update(&[0]),
            Some(mask) => {
                hasher.update(&[1]).update(&(mask.len() as u64).to_le_bytes());
                hasher.update(&mask.iter().map(|counts| u8::from(*counts)).collect::<Vec<_>>())
            }
        };
    }
    hasher.finalize().to_hex().to_string()
}

/// Sequences taken so far, up to a number of them.
struct Collected {
    sequences: Vec<Sequence>,
    dropped: usize,
    samples: usize,
}

impl Collected {
    fn new(options: &DatasetOptions) -> Self {
        Self { sequences: Vec::new(), dropped: 0, samples: options.samples.unwrap_or(usize::MAX) }
    }

    fn is_full(&self) -> bool {
        self.sequences.len() >= self.samples
    }

    fn push(&mut self, sequence: Sequence) {
        match is_usable(&sequence) {
            true => self.sequences.push(sequence),
            false => self.dropped += 1,
        }
    }

    fn shuffle(&mut self, seed: u64) {
        self.sequences.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    }
}

fn from_rows(path: &Path, encoder: &RowEncoder<'_>, options: &DatasetOptions) -> Result<Collected, Error> {
    let lines = Lines::open(path)?;
    match options.seed {
        None => collect_rows(path, lines, encoder, options),
        Some(seed) => {
            let mut lines = lines.collect::<Result<Vec<_>, _>>()?;
            lines.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
            collect_rows(path, lines.into_iter().map(Ok), encoder, options)
        }
    }
}

fn collect_rows(
    path: &Path,
    lines: impl Iterator<Item = Result<(usize, String), Error>>,
    encoder: &RowEncoder<'_>,
    options: &DatasetOptions,
) -> Result<Collected, Error> {
    let mut collected = Collected::new(options);
    let mut packer = match options.packing {
        false => None,
        true => {
            let eos = encoder.tokenizer()?.eos_id().ok_or(Error::NoEos { purpose: "packing rows" })?;
            encoder.check(&[eos])?;
            Some(Packer { eos, length: options.length, rest: Sequence::new(Vec::new()), last: None })
        }
    };
    for line in lines {
        if collected.is_full() {
            return Ok(collected);
        }
        let (number, text) = line?;
        let mut sequence =
            Row::parse(&text).and_then(|row| encoder.sequence(&row)).map_err(|error| error.at(path, number))?;
        match &mut packer {
            None => {
                truncate(&mut sequence, options.length);
                collected.push(sequence);
            }
            Some(_) if sequence.len() < Sequence::MIN_LEN => collected.dropped += 1,
            Some(packer) => packer.add(sequence, &mut collected),
        }
    }
    if let Some(Packer { rest, .. }) = packer
        && !collected.is_full()
        && rest.len() >= Sequence::MIN_LEN
    {
        collected.push(rest);
    }
    Ok(collected)
}

/// A text file in consecutive sequences. With a seed, the sequences are shuffled, since a text has no rows to shuffle.
fn from_text(path: &Path, encoder: &RowEncoder<'_>, options: &DatasetOptions) -> Result<Collected, Error> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let before = &bytes[..error.valid_up_to()];
        let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        Error::Utf8 { valid_up_to: before.len() - line_start }.at(path, line)
    })?;
    let text = text.trim_start_matches('\u{feff}');
    if text.is_empty() {
        return Err(Error::EmptyFile { path: path.to_owned() });
    }
    let whole = encoder.plain(text).map_err(|error| error.at(path, 1))?;
    let mut collected = Collected::new(options);
    for piece in whole.ids.chunks(options.length) {
        collected.push(Sequence::new(piece.to_vec()));
    }
    if let Some(seed) = options.seed {
        collected.shuffle(seed);
    }
    collected.sequences.truncate(collected.samples);
    Ok(collected)
}

fn truncate(sequence: &mut Sequence, length: usize) {
    sequence.ids.truncate(length);
    if let Some(mask) = &mut sequence.loss {
        mask.truncate(length);
    }
}

/// Joins rows and cuts the whole into equal pieces.
struct Packer {
    eos: u32,
    length: usize,
    /// What does not fill a piece yet.
    rest: Sequence,
    /// The last token of the row before.
    last: Option<u32>,
}

impl Packer {
    fn add(&mut self, row: Sequence, into: &mut Collected) {
        let Sequence { ids, loss } = row;
        if self.last.is_some_and(|last| last != self.eos) {
            self.rest.ids.push(self.eos);
            // That a row ends is part of what its completion says.
            self.rest.loss.iter_mut().for_each(|mask| mask.push(true));
        }
        match (&mut self.rest.loss, loss) {
            (Some(mask), Some(more)) => mask.extend(more),
            // All rows of a file have a mask, or none has: only before the first row can they differ.
            (rest, loss) => *rest = loss,
        }
        self.last = ids.last().copied();
        self.rest.ids.extend(ids);
        while self.rest.len() >= self.length && !into.is_full() {
            let tail = self.rest.ids.split_off(self.length);
            let loss_tail = self.rest.loss.as_mut().map(|mask| mask.split_off(self.length));
            into.push(std::mem::replace(&mut self.rest, Sequence { ids: tail, loss: loss_tail }));
        }
    }
}

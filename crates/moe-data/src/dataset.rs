//! A file of rows as a list of sequences.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::rows::{Content, Object, Objects, Place, Reading, Row, content, files, open};
use super::waves::{Wave, WaveOptions, waves};
use super::{Error, LossOver, RowEncoder, Sequence, Tokenizer};

/// What to take from a data file. The defaults are those of published calibration runs (128 sequences of at most 2,048
/// tokens, in the order of the file).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatasetOptions {
    /// Sequences at most; `None` takes all. Rows that are dropped do not count. At least 1.
    pub samples: Option<usize>,
    /// Tokens of a sequence at most; what a row has beyond that is left out (or begins the next sequence when packing).
    /// At least 2.
    pub length: usize,
    /// Take rows in a random order with this seed instead of the first ones.
    pub seed: Option<u64>,
    /// Join rows, with an end-of-sequence token between two of them, and cut the whole into sequences of `length`
    /// tokens. Attention then sees across rows.
    pub packing: bool,
    /// Which tokens count in the loss.
    pub loss: LossOver,
    /// End the completions of rows of plain text with the end-of-sequence token, so that training teaches a model to
    /// stop.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub end_completions: bool,
    /// Field of the rows that has their label: a whole number of 0 or more, or a name. Not with packing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// How rows are read.
    #[serde(skip_serializing_if = "Reading::is_plain")]
    pub reading: Reading,
}

impl Default for DatasetOptions {
    fn default() -> Self {
        Self {
            samples: Some(128),
            length: 2048,
            seed: None,
            packing: false,
            loss: LossOver::All,
            end_completions: false,
            label: None,
            reading: Reading::default(),
        }
    }
}

impl DatasetOptions {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Options`] naming the field, its value and what is allowed; [`Error::UnknownField`].
    pub fn check(&self) -> Result<(), Error> {
        if self.samples == Some(0) {
            return Err(Error::Options { field: "samples", found: 0, expected: "at least 1" });
        }
        if self.length < Sequence::MIN_LEN {
            return Err(Error::Options { field: "length", found: self.length, expected: "at least 2" });
        }
        if self.packing && self.label.is_some() {
            let expected = "rows one by one: packed sequences have no label of their own";
            return Err(Error::Field { field: "label".into(), found: "one, and packing".into(), expected });
        }
        self.reading.check()
    }
}

/// Tokenized sequences, each with at least two tokens and at least one that counts in the loss.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// The sequences, in the order they were taken.
    pub sequences: Vec<Sequence>,
    /// Rows (or pieces of text) read and left out: fewer than two tokens, or none that counts in the loss.
    pub dropped: usize,
    /// Rows left out because they could not be read, where [`Reading::skip_bad_rows`] allows that.
    pub skipped: usize,
    /// Why the first of them could not.
    pub first_skipped: Option<String>,
    /// Rows that lost their end, since they are longer than the limit.
    pub cut: usize,
    /// The label of each sequence, if [`DatasetOptions::label`] asks for it; else empty. Names are numbered in the
    /// order of the alphabet.
    pub labels: Vec<usize>,
    /// The names that labels are the numbers of; empty if rows have numbers.
    pub label_names: Vec<String>,
    /// blake3 over lengths, token ids, loss masks and labels, in hexadecimal: what a statistic's provenance calls its
    /// data.
    pub hash: String,
}

impl Dataset {
    /// Reads rows (see [`Row`] and [`Rows`](super::Rows)) or a `.txt` file, which is one text cut into consecutive
    /// sequences, or a folder of such files. `vocab_size` is the model's; the tokenizer may be left out for rows of
    /// `"input_ids"`.
    ///
    /// Without a seed the file is read only as far as needed, so a malformed row after the last one taken goes unseen.
    ///
    /// # Errors
    /// Options out of range, a file that cannot be read, a malformed row (file and line are named), a file without a
    /// usable row.
    pub fn load(
        path: impl AsRef<Path>,
        tokenizer: Option<&Tokenizer>,
        vocab_size: usize,
        options: &DatasetOptions,
    ) -> Result<Self, Error> {
        let path = path.as_ref();
        options.check()?;
        Self::of_files(path, files(path)?, tokenizer, vocab_size, options)
    }

    /// The rows of files one after the other; `path` is what errors about all of them name.
    pub(super) fn of_files(
        path: &Path,
        files: Vec<PathBuf>,
        tokenizer: Option<&Tokenizer>,
        vocab_size: usize,
        options: &DatasetOptions,
    ) -> Result<Self, Error> {
        let encoder = RowEncoder::new(tokenizer, vocab_size, options.loss).ending_completions(options.end_completions);
        let mut collected = Collected::new(options);
        let items = files.into_iter().map(|file| items(file, &encoder, options));
        match options.seed {
            None => {
                let mut items = items;
                while !collected.is_full() {
                    match items.next() {
                        Some(more) => collected.take(&mut more?, &encoder, options)?,
                        None => break,
                    }
                }
            }
            Some(seed) => {
                let mut all = Vec::new();
                for more in items {
                    all.extend(more?);
                }
                all.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
                collected.take(&mut all.into_iter(), &encoder, options)?;
            }
        }
        collected.finish(path)
    }

    /// Wraps sequences made elsewhere; those with nothing to predict are dropped and counted.
    pub fn from_sequences(sequences: Vec<Sequence>) -> Self {
        let read = sequences.len();
        let sequences: Vec<_> = sequences.into_iter().filter(is_usable).collect();
        let (dropped, hash) = (read - sequences.len(), hash(&sequences, &[]));
        let (labels, label_names) = (Vec::new(), Vec::new());
        Self { sequences, dropped, skipped: 0, first_skipped: None, cut: 0, labels, label_names, hash }
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

    /// The labels of the sequences of `waves`, which are those of [`waves`](Self::waves), by the wave's id; empty
    /// without labels.
    pub fn labels_of(&self, waves: &[Wave]) -> BTreeMap<u64, Vec<usize>> {
        let mut labels = self.labels.iter().copied();
        let of = |wave: &Wave| (wave.id, labels.by_ref().take(wave.sequences.len()).collect());
        if self.labels.is_empty() { BTreeMap::new() } else { waves.iter().map(of).collect() }
    }

    /// The sequences in waves with ids 0, 1, 2, …; [`shard`](super::shard) takes one process's part of them.
    pub fn waves(&self, options: WaveOptions) -> Vec<Wave> {
        waves(&self.sequences, options)
    }

    /// The sequences at these places, each as often as it is named, as a data set of their own. Places beyond the end
    /// are left out.
    #[must_use]
    pub fn taken(&self, places: &[usize]) -> Self {
        let sequences: Vec<Sequence> = places.iter().filter_map(|at| self.sequences.get(*at).cloned()).collect();
        let labels: Vec<usize> = places.iter().filter_map(|at| self.labels.get(*at).copied()).collect();
        let hash = hash(&sequences, &labels);
        Self { sequences, labels, hash, ..self.clone() }
    }
}

fn is_usable(sequence: &Sequence) -> bool {
    sequence.len() >= Sequence::MIN_LEN && sequence.loss_tokens() > 0
}

/// The label of a row as it stands there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Label {
    Number(usize),
    Name(String),
}

impl Label {
    fn of(fields: &Map<String, Value>, field: &str) -> Result<Self, Error> {
        const EXPECTED: &str = "the label of the row: a whole number of 0 or more, or a name";
        let wrong = |found: String| Error::Field { field: field.to_owned(), found, expected: EXPECTED };
        match fields.get(field) {
            Some(Value::String(name)) => Ok(Self::Name(name.clone())),
            Some(Value::Number(number)) => match number.as_u64().and_then(|n| usize::try_from(n).ok()) {
                Some(n) => Ok(Self::Number(n)),
                None => Err(wrong(number.to_string())),
            },
            Some(other) => Err(wrong(other.to_string())),
            None => Err(wrong("nothing".into())),
        }
    }
}

/// Labels as numbers, and the names that they are the numbers of.
fn numbered(labels: Vec<Label>) -> (Vec<usize>, Vec<String>) {
    let name = |label: &Label| match label {
        Label::Name(name) => Some(name.clone()),
        Label::Number(_) => None,
    };
    let names: Vec<String> = labels.iter().filter_map(name).collect::<BTreeSet<_>>().into_iter().collect();
    let number = |label: &Label| match label {
        Label::Number(number) => *number,
        Label::Name(name) => names.binary_search(name).unwrap_or(0),
    };
    (labels.iter().map(number).collect(), names)
}

fn hash(sequences: &[Sequence], labels: &[usize]) -> String {
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
    if !labels.is_empty() {
        hasher.update(b"labels");
    }
    for label in labels {
        hasher.update(&(*label as u64).to_le_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// What a data file gives: a row, or a piece of a text.
enum Item {
    Row(Place, Row, Option<Label>),
    Piece(Sequence),
    /// A piece of a text with nothing to predict.
    Crumb,
}

type Items<'a> = Box<dyn Iterator<Item = Result<Item, Error>> + 'a>;

fn items<'a>(path: PathBuf, encoder: &RowEncoder<'_>, options: &DatasetOptions) -> Result<Items<'a>, Error> {
    if content(&path)? != Content::Text {
        // Bad rows are skipped where they are counted, together with those that cannot be encoded.
        let (reading, label) = (options.reading.clone(), options.label.clone());
        return Ok(Box::new(Objects::open(&path)?.map(move |object| {
            let Object { path, line, fields } = object?;
            let label = label.as_ref().map(|field| Label::of(&fields, field)).transpose();
            let label = label.map_err(|error| error.at(&path, line))?;
            let row = reading.row(fields).map_err(|error| error.at(&path, line))?;
            Ok(Item::Row(Place { path, line }, row, label))
        })));
    }
    let whole = text(&path, encoder)?;
    let pieces: Vec<_> = whole.ids.chunks(options.length).map(|piece| Sequence::new(piece.to_vec())).collect();
    // The last piece may be too short; it takes no part in an order.
    let (whole, short): (Vec<_>, Vec<_>) = pieces.into_iter().partition(is_usable);
    let crumbs = short.into_iter().map(|_| Item::Crumb);
    Ok(Box::new(whole.into_iter().map(Item::Piece).chain(crumbs).map(Ok)))
}

/// A text file as one sequence.
fn text(path: &Path, encoder: &RowEncoder<'_>) -> Result<Sequence, Error> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes).map_err(Error::io(path))?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let before = &bytes[..error.valid_up_to()];
        let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        Error::Utf8 { valid_up_to: before.len() - line_start }.at(path, line)
    })?;
    // As Python reads a text: without a byte order mark, and with line feeds for every end of a line.
    let text = text.trim_start_matches('\u{feff}').replace("\r\n", "\n");
    if text.is_empty() {
        return Err(Error::EmptyFile { path: path.to_owned() });
    }
    encoder.plain(&text).map_err(|error| error.at(path, 1))
}

/// Sequences taken so far, up to a number of them.
struct Collected {
    sequences: Vec<Sequence>,
    /// Of each sequence; empty if nobody asks.
    labels: Vec<Label>,
    dropped: usize,
    cut: usize,
    skipped: usize,
    first_skipped: Option<String>,
    samples: usize,
    packer: Option<Packer>,
}

impl Collected {
    fn new(options: &DatasetOptions) -> Self {
        let samples = options.samples.unwrap_or(usize::MAX);
        Self {
            sequences: Vec::new(),
            labels: Vec::new(),
            dropped: 0,
            cut: 0,
            skipped: 0,
            first_skipped: None,
            samples,
            packer: None,
        }
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

    fn take(
        &mut self,
        items: &mut dyn Iterator<Item = Result<Item, Error>>,
        encoder: &RowEncoder<'_>,
        options: &DatasetOptions,
    ) -> Result<(), Error> {
        if options.packing && self.packer.is_none() {
            let eos = encoder.tokenizer()?.eos_id().ok_or(Error::NoEos { purpose: "packing rows" })?;
            encoder.check(&[eos])?;
            self.packer = Some(Packer { eos, length: options.length, rest: Sequence::new(Vec::new()), last: None });
        }
        while !self.is_full() {
            let Some(item) = items.next() else { break };
            let sequence = item.and_then(|item| match item {
                Item::Row(place, row, label) => {
                    self.check_label(label.as_ref()).map_err(|error| error.at(&place.path, place.line))?;
                    Ok(Some((encoder.sequence_at(&place, &row)?, label)))
                }
                Item::Piece(sequence) => {
                    self.push(sequence);
                    Ok(None)
                }
                Item::Crumb => {
                    self.dropped += 1;
                    Ok(None)
                }
            });
            match sequence {
                Ok(None) => {}
                Ok(Some((sequence, label))) => self.add(sequence, label, options.length),
                Err(error) if options.reading.skip_bad_rows && error.is_of_a_row() => {
                    self.skipped += 1;
                    self.first_skipped.get_or_insert_with(|| error.to_string());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Names and numbers in one file would share numbers by accident.
    fn check_label(&self, label: Option<&Label>) -> Result<(), Error> {
        let kind = std::mem::discriminant::<Label>;
        match self.labels.first().zip(label).filter(|(first, label)| kind(first) != kind(label)) {
            None => Ok(()),
            Some((first, label)) => Err(Error::Field {
                field: "label".into(),
                found: format!("{label:?} after {first:?}"),
                expected: "labels of one kind: numbers, or names",
            }),
        }
    }

    fn add(&mut self, mut sequence: Sequence, label: Option<Label>, length: usize) {
        match self.packer.take() {
            None => {
                self.cut += usize::from(sequence.len() > length);
                let before = self.sequences.len();
                truncate(&mut sequence, length);
                self.push(sequence);
                if self.sequences.len() > before {
                    self.labels.extend(label);
                }
            }
            Some(mut packer) => {
                match sequence.len() < Sequence::MIN_LEN {
                    true => self.dropped += 1,
                    false => packer.add(sequence, self),
                }
                self.packer = Some(packer);
            }
        }
    }

    fn finish(mut self, path: &Path) -> Result<Dataset, Error> {
        if let Some(Packer { rest, .. }) = self.packer.take()
            && !self.is_full()
            && rest.len() >= Sequence::MIN_LEN
        {
            self.push(rest);
        }
        if self.sequences.is_empty() {
            let path = path.to_owned();
            return Err(match (self.dropped, self.first_skipped) {
                (0, None) => Error::EmptyFile { path },
                (0, Some(first)) => Error::OnlyBadRows { path, skipped: self.skipped, first },
                (dropped, _) => Error::NoUsableRow { path, dropped },
            });
        }
        let Self { sequences, dropped, cut, skipped, first_skipped, .. } = self;
        let (labels, label_names) = numbered(self.labels);
        let hash = hash(&sequences, &labels);
        Ok(Dataset { sequences, dropped, skipped, first_skipped, cut, labels, label_names, hash })
    }
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
            (Some(mask), None) => mask.extend(std::iter::repeat_n(true, ids.len())),
            // Of a file of rows with masks and rows without, what came before counts.
            (rest @ None, Some(more)) => {
                *rest = Some(std::iter::repeat_n(true, self.rest.ids.len()).chain(more).collect());
            }
            (None, None) => {}
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

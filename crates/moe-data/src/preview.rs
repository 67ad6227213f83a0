//! The first rows of a file as a model sees them.

use std::fmt::Write;
use std::path::Path;

use super::rows::{Content, Place, Rows, content, files};
use super::{Dataset, DatasetOptions, Error, RowEncoder, Sequence, Tokenizer};

/// The first rows of a data file as tokens, with what counts in the loss.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preview {
    /// The rows, in the order of the file.
    pub rows: Vec<PreviewRow>,
    /// Bad rows left out before the last of them.
    pub skipped: usize,
}

/// One row as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreviewRow {
    /// Where the row is.
    pub place: Place,
    /// What form it has, such as `a row of "messages"`.
    pub form: &'static str,
    /// Its tokens, up to the length asked for.
    pub tokens: Vec<PreviewToken>,
    /// Tokens beyond that.
    pub cut: usize,
}

/// One token of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreviewToken {
    /// The token id.
    pub id: u32,
    /// Its text; `<id>` without a tokenizer.
    pub text: String,
    /// Whether it counts in the loss.
    pub counts: bool,
}

impl Preview {
    /// The first `count` rows of a file or folder, read as [`Dataset::load`] reads them. Rows are taken in order,
    /// whatever seed the options have, and are not packed.
    ///
    /// # Errors
    /// As [`Dataset::load`], as far as the rows shown go.
    pub fn load(
        path: impl AsRef<Path>,
        tokenizer: Option<&Tokenizer>,
        vocab_size: usize,
        options: &DatasetOptions,
        count: usize,
    ) -> Result<Self, Error> {
        let path = path.as_ref();
        options.check()?;
        let encoder = RowEncoder::new(tokenizer, vocab_size, options.loss).ending_completions(options.end_completions);
        let mut rows = Vec::new();
        let row = |place: Place, form: &'static str, sequence: &Sequence| {
            let shown = sequence.len().min(options.length);
            let tokens = (0..shown).map(|t| PreviewToken {
                id: sequence.ids[t],
                text: tokenizer.map_or_else(
                    || format!("<{}>", sequence.ids[t]),
                    |tokenizer| tokenizer.token_text(sequence.ids[t]),
                ),
                counts: sequence.counts(t),
            });
            PreviewRow { place, form, tokens: tokens.collect(), cut: sequence.len() - shown }
        };
        if let [file] = files(path)?.as_slice()
            && content(file)? == Content::Text
        {
            let options = DatasetOptions { samples: Some(count.max(1)), seed: None, ..options.clone() };
            let pieces = Dataset::load(file, tokenizer, vocab_size, &options)?.sequences;
            let place = || Place { path: file.clone(), line: 1 };
            rows.extend(pieces.iter().map(|piece| row(place(), "a piece of plain text", piece)));
            return Ok(Self { rows, skipped: 0 });
        }
        let mut read = Rows::open(path, &options.reading)?;
        while rows.len() < count {
            let Some(next) = read.next() else { break };
            let (place, found) = next?;
            match encoder.sequence_at(&place, &found) {
                Ok(sequence) => rows.push(row(place, found.form(), &sequence)),
                Err(error) => read.leave_out(error)?,
            }
        }
        match rows.is_empty() && count > 0 {
            true => Err(Error::EmptyFile { path: path.to_owned() }),
            false => Ok(Self { rows, skipped: read.skipped().0 }),
        }
    }

    /// The preview to print: what counts in the loss is green where `color` is understood, and in ⟦brackets⟧ where it
    /// is not.
    pub fn to_text(&self, color: bool) -> String {
        let (open, close) = if color { ("\u{1b}[32m", "\u{1b}[0m") } else { ("⟦", "⟧") };
        let mut out = String::new();
        for row in &self.rows {
            let counted = row.tokens.iter().filter(|token| token.counts).count();
            let Place { path, line } = &row.place;
            let (path, form, length) = (path.display(), row.form, row.tokens.len());
            // Writing to a string cannot fail.
            let _ = write!(out, "{path}:{line}: {form}, {length} tokens, {counted} count in the loss");
            let _ = if row.cut > 0 { writeln!(out, ", {} more are cut off", row.cut) } else { writeln!(out) };
            let mut inside = false;
            for token in &row.tokens {
                if token.counts != inside {
                    out.push_str(if inside { close } else { open });
                    inside = token.counts;
                }
                out.push_str(&token.text);
            }
            if inside {
                out.push_str(close);
            }
            out.push_str("\n\n");
        }
        if self.skipped > 0 {
            let _ = writeln!(out, "{} bad rows skipped", self.skipped);
        }
        out
    }
}

//! Evaluation files: rows to answer, or text to predict.

use std::path::Path;

use super::encode::{LossOver, RowEncoder};
use super::rows::{Lines, object, string};
use super::{Error, Sequence, Tokenizer};

/// Rows of one `NAME_test.jsonl` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalSet {
    /// NAME.
    pub name: String,
    /// What is measured on them.
    pub rows: EvalRows,
}

/// What an evaluation file asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EvalRows {
    /// Rows with `"prompt"` and `"answer"`: the share of greedy completions from which
    /// [`extract_answer`](super::extract_answer) gives exactly the answer.
    Exact(Vec<Question>),
    /// Rows with `"text"`: perplexity.
    Perplexity(EvalText),
}

/// A prompt and the answer expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The prompt.
    pub prompt: String,
    /// Its token ids.
    pub ids: Vec<u32>,
    /// The answer.
    pub answer: String,
}

/// Rows of text as one stream of tokens, each row followed by the end-of-sequence token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalText {
    /// Token ids of the stream.
    pub ids: Vec<u32>,
    /// Number of rows in it.
    pub rows: usize,
}

impl EvalText {
    /// The stream in consecutive windows of `length` tokens; perplexity is over the `length - 1` tokens predicted in each. What is left at
    /// the end, a last full window included, is not measured, which is how the usual reference loop
    /// `for i in range(0, len(ids) - length, length)` counts. A stream too short for any window is one window by itself.
    pub fn windows(&self, length: usize) -> Vec<Sequence> {
        let length = length.max(Sequence::MIN_LEN);
        let end = self.ids.len().saturating_sub(length);
        let windows: Vec<_> =
            (0..end).step_by(length).map(|start| Sequence::new(self.ids[start..start + length].to_vec())).collect();
        match windows.is_empty() && self.ids.len() >= Sequence::MIN_LEN {
            true => vec![Sequence::new(self.ids.clone())],
            false => windows,
        }
    }
}

impl EvalSet {
    /// Reads the first `limit` rows (all, if `None`) of a file named `NAME_test.jsonl`. A row with `"answer"` needs a `"prompt"`; every
    /// other row needs a `"text"`.
    ///
    /// # Errors
    /// Another file name, a file that cannot be read or has no row, a malformed row, rows of both kinds, an id outside the model's
    /// vocabulary, text rows without an end-of-sequence token, nothing to predict from in a prompt or in all of the text.
    pub fn load(
        path: impl AsRef<Path>,
        tokenizer: &Tokenizer,
        vocab_size: usize,
        limit: Option<usize>,
    ) -> Result<Self, Error> {
        let path = path.as_ref();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_suffix("_test.jsonl"))
            .filter(|name| !name.is_empty())
            .ok_or_else(|| Error::EvalName { path: path.to_owned() })?
            .to_owned();
        let encoder = RowEncoder::new(Some(tokenizer), vocab_size, LossOver::All);
        let mut rows: Option<EvalRows> = None;
        for line in Lines::open(path)?.take(limit.unwrap_or(usize::MAX)) {
            let (number, line) = line?;
            add(&mut rows, &line, &encoder, tokenizer).map_err(|error| error.at(path, number))?;
        }
        match rows {
            None => Err(Error::EmptyFile { path: path.to_owned() }),
            Some(EvalRows::Perplexity(text)) if text.ids.len() < Sequence::MIN_LEN => {
                Err(Error::NoUsableRow { path: path.to_owned(), dropped: text.rows })
            }
            Some(rows) => Ok(Self { name, rows }),
        }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        match &self.rows {
            EvalRows::Exact(questions) => questions.len(),
            EvalRows::Perplexity(text) => text.rows,
        }
    }

    /// Whether there is no row; never so for a set that was loaded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn add(rows: &mut Option<EvalRows>, line: &str, encoder: &RowEncoder<'_>, tokenizer: &Tokenizer) -> Result<(), Error> {
    const EXPECTED: &str = r#""prompt" and "answer"; "text""#;
    let mut fields = object(line)?;
    let found: Vec<String> = fields.keys().cloned().collect();
    let mut take = |field: &'static str| fields.remove(field).map(|value| string(field, value)).transpose();
    let missing = || Error::MissingFields { found: found.clone(), expected: EXPECTED };
    if let Some(answer) = take("answer")? {
        let prompt = take("prompt")?.ok_or_else(missing)?;
        let ids = encoder.plain(&prompt)?.ids;
        if ids.is_empty() {
            let expected = "text of at least one token";
            return Err(Error::Field { field: "prompt".into(), found: "no token".into(), expected });
        }
        let question = Question { prompt, ids, answer };
        match rows.get_or_insert_with(|| EvalRows::Exact(Vec::new())) {
            EvalRows::Exact(questions) => questions.push(question),
            EvalRows::Perplexity(_) => return Err(Error::MixedEval { found: "answer", expected: "text" }),
        }
    } else {
        let text = take("text")?.ok_or_else(missing)?;
        let eos = tokenizer.eos_id().ok_or(Error::NoEos { purpose: "perplexity over rows of text" })?;
        let mut ids = encoder.plain(&text)?.ids;
        ids.push(eos);
        encoder.check(&ids)?;
        match rows.get_or_insert_with(|| EvalRows::Perplexity(EvalText { ids: Vec::new(), rows: 0 })) {
            EvalRows::Perplexity(text) => {
                text.ids.extend(ids);
                text.rows += 1;
            }
            EvalRows::Exact(_) => return Err(Error::MixedEval { found: "text", expected: "answer" }),
        }
    }
    Ok(())
}

//! Evaluation files: rows to answer, or text to predict.

use std::path::Path;

use serde_json::{Map, Value};

use super::encode::{LossOver, RowEncoder};
use super::rows::{Object, Objects, string};
use super::{Conversation, Error, Sequence, Tokenizer};

/// Rows of one `NAME_test.jsonl` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalSet {
    /// NAME of the file `NAME_test.jsonl`.
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
    /// Rows with `"prompt"`, `"choices"` and `"answer"`: the share of rows whose right choice is the most likely one
    /// after the prompt.
    Choice(Vec<ChoiceQuestion>),
}

/// A prompt, what may follow it, and which of that is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChoiceQuestion {
    /// The prompt with each of the choices; tokens of the choice alone count.
    pub choices: Vec<Sequence>,
    /// Bytes of the choices, which likelihoods may be divided by.
    pub bytes: Vec<usize>,
    /// Position of the right one.
    pub right: usize,
}

/// How an evaluation file is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EvalSetOptions {
    /// Rows at most; all, if `None`.
    pub limit: Option<usize>,
    /// Put prompts into the tokenizer's chat template, as one turn of the user.
    pub chat: bool,
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
    /// The stream in consecutive windows of `length` tokens; perplexity is over the `length - 1` tokens predicted in
    /// each. What is left at the end, a last full window included, is not measured, which is how the usual reference
    /// loop `for i in range(0, len(ids) - length, length)` counts. A stream too short for any window is one window by
    /// itself.
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
    /// Reads the first `limit` rows (all, if `None`) of a file named `NAME_test.jsonl`, as [`EvalSet::load_with`] does.
    ///
    /// # Errors
    /// Those of [`EvalSet::load_with`].
    pub fn load(
        path: impl AsRef<Path>,
        tokenizer: &Tokenizer,
        vocab_size: usize,
        limit: Option<usize>,
    ) -> Result<Self, Error> {
        Self::load_with(path, tokenizer, vocab_size, EvalSetOptions { limit, chat: false })
    }

    /// Reads a file named `NAME_test.jsonl`. A row with `"answer"` needs a `"prompt"`, and is a multiple choice if it
    /// has `"choices"`, of which the answer is one or the position of one from 0; every other row needs a `"text"`.
    ///
    /// # Errors
    /// Another file name, a file that cannot be read or has no row, a malformed row, rows of both kinds, an id outside
    /// the model's vocabulary, text rows without an end-of-sequence token, nothing to predict from in a prompt or in
    /// all of the text.
    pub fn load_with(
        path: impl AsRef<Path>,
        tokenizer: &Tokenizer,
        vocab_size: usize,
        options: EvalSetOptions,
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
        for object in Objects::open(path)?.take(options.limit.unwrap_or(usize::MAX)) {
            let Object { path, line, fields } = object?;
            add(&mut rows, fields, &encoder, (tokenizer, options.chat)).map_err(|error| error.at(&path, line))?;
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
            EvalRows::Choice(questions) => questions.len(),
        }
    }

    /// Whether there is no row; never so for a set that was loaded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn add(
    rows: &mut Option<EvalRows>,
    mut fields: Map<String, Value>,
    encoder: &RowEncoder<'_>,
    (tokenizer, chat): (&Tokenizer, bool),
) -> Result<(), Error> {
    const EXPECTED: &str = r#""prompt" and "answer"; "prompt", "choices" and "answer"; "text""#;
    let choices = fields.remove("choices");
    if let Some(choices) = choices {
        let question = choice(&choices, fields, encoder, (tokenizer, chat))?;
        return match rows.get_or_insert_with(|| EvalRows::Choice(Vec::new())) {
            EvalRows::Choice(questions) => {
                questions.push(question);
                Ok(())
            }
            EvalRows::Exact(_) => Err(Error::MixedEval { found: "choices", expected: "answer" }),
            EvalRows::Perplexity(_) => Err(Error::MixedEval { found: "choices", expected: "text" }),
        };
    }
    let found: Vec<String> = fields.keys().cloned().collect();
    let mut take = |field: &'static str| fields.remove(field).map(|value| string(field, value)).transpose();
    let missing = || Error::MissingFields { found: found.clone(), expected: EXPECTED };
    if let Some(answer) = take("answer")? {
        let prompt = take("prompt")?.ok_or_else(missing)?;
        let (shown, special) = shown(&prompt, (tokenizer, chat))?;
        let ids = encoder.prompt(&shown, special)?;
        if ids.is_empty() {
            let expected = "text of at least one token";
            return Err(Error::Field { field: "prompt".into(), found: "no token".into(), expected });
        }
        let question = Question { prompt, ids, answer };
        match rows.get_or_insert_with(|| EvalRows::Exact(Vec::new())) {
            EvalRows::Exact(questions) => questions.push(question),
            EvalRows::Perplexity(_) => return Err(Error::MixedEval { found: "answer", expected: "text" }),
            EvalRows::Choice(_) => return Err(Error::MixedEval { found: "answer", expected: "choices" }),
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
            EvalRows::Choice(_) => return Err(Error::MixedEval { found: "text", expected: "choices" }),
        }
    }
    Ok(())
}

/// A prompt as the model sees it, and whether the tokenizer adds its special tokens, which a template has written
/// already.
fn shown(prompt: &str, (tokenizer, chat): (&Tokenizer, bool)) -> Result<(String, bool), Error> {
    if !chat {
        return Ok((prompt.to_string(), true));
    }
    let messages = [serde_json::json!({ "role": "user", "content": prompt })];
    Ok((tokenizer.render_chat(Conversation::new(&messages), true)?, false))
}

fn choice(
    choices: &Value,
    mut fields: Map<String, Value>,
    encoder: &RowEncoder<'_>,
    (tokenizer, chat): (&Tokenizer, bool),
) -> Result<ChoiceQuestion, Error> {
    let found: Vec<String> = fields.keys().cloned().collect();
    let missing = || Error::MissingFields { found, expected: r#""prompt", "choices" and "answer""# };
    let wrong = |field: &str, found: &Value, expected: &'static str| Error::Field {
        field: field.into(),
        found: found.to_string(),
        expected,
    };
    let texts: Option<Vec<&str>> = choices.as_array().map(|list| list.iter().filter_map(Value::as_str).collect());
    let texts = match texts {
        Some(texts) if texts.len() >= 2 && choices.as_array().is_some_and(|list| list.len() == texts.len()) => texts,
        _ => return Err(wrong("choices", choices, "a list of at least two texts")),
    };
    let (Some(prompt), Some(answer)) = (fields.remove("prompt"), fields.remove("answer")) else {
        return Err(missing());
    };
    let right = match &answer {
        Value::String(text) => texts.iter().position(|choice| choice == text),
        number => number.as_u64().map(|number| number as usize).filter(|number| *number < texts.len()),
    };
    let right = right.ok_or_else(|| wrong("answer", &answer, "one of the choices, or its position from 0"))?;
    let (shown, special) = shown(&string("prompt", prompt)?, (tokenizer, chat))?;
    let sequences = texts.iter().map(|text| encoder.continuation(&shown, text, special));
    let sequences = sequences.collect::<Result<Vec<_>, _>>()?;
    if let Some(empty) = sequences.iter().position(|sequence| sequence.loss_tokens() == 0) {
        return Err(wrong("choices", &choices[empty], "text of which a token is its own"));
    }
    Ok(ChoiceQuestion { choices: sequences, bytes: texts.iter().map(|text| text.len()).collect(), right })
}

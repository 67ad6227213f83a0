//! Rows of a data file: what they hold, before anything is tokenised.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::{Map, Value};

use super::Error;

/// The forms of a row, as error messages list them.
pub(super) const FORMS: &str = r#""text"; "prompt" and "completion"; "messages"; "input_ids""#;

/// One row of a JSONL file.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Row {
    /// `{"text"}`.
    Text(String),
    /// `{"prompt", "completion"}`: one text, the completion directly after the prompt.
    Completion {
        /// What is given.
        prompt: String,
        /// What is to be predicted.
        completion: String,
    },
    /// `{"messages"}`, and `"tools"` if there are any: rendered by the tokenizer's chat template.
    Messages {
        /// Objects with `"role"` and usually `"content"`.
        messages: Vec<Value>,
        /// The row's `"tools"`, handed to the template as they are.
        tools: Option<Value>,
    },
    /// `{"input_ids"}`.
    Ids(Vec<u32>),
}

impl Row {
    /// Reads one line of a JSONL file. A field that is null counts as absent; fields of no form are ignored.
    ///
    /// # Errors
    /// Not JSON, not an object, no form or two forms of a row at once, a field of the wrong type, an id that is not a u32.
    pub fn parse(line: &str) -> Result<Self, Error> {
        let mut row = object(line)?;
        let (text, messages, ids) = (row.remove("text"), row.remove("messages"), row.remove("input_ids"));
        let is_pair = row.contains_key("prompt") && row.contains_key("completion");
        let pair = if is_pair { row.remove("prompt").zip(row.remove("completion")) } else { None };
        let forms = [
            (text.is_some(), "\"text\""),
            (pair.is_some(), "\"prompt\" and \"completion\""),
            (messages.is_some(), "\"messages\""),
            (ids.is_some(), "\"input_ids\""),
        ];
        let mut present = forms.iter().filter(|(is_present, _)| *is_present).map(|(_, name)| *name);
        if let (Some(first), Some(second)) = (present.next(), present.next()) {
            return Err(Error::Ambiguous { first, second });
        }
        if let Some(text) = text {
            return Ok(Self::Text(string("text", text)?));
        }
        if let Some((prompt, completion)) = pair {
            return Ok(Self::Completion {
                prompt: string("prompt", prompt)?,
                completion: string("completion", completion)?,
            });
        }
        if let Some(messages) = messages {
            return Ok(Self::Messages { messages: chat("messages", messages)?, tools: row.remove("tools") });
        }
        if let Some(ids) = ids {
            return Ok(Self::Ids(token_ids("input_ids", ids)?));
        }
        Err(Error::MissingFields { found: row.keys().cloned().collect(), expected: FORMS })
    }

    /// The form of the row, for messages.
    pub fn form(&self) -> &'static str {
        match self {
            Self::Text(_) => "a row of \"text\"",
            Self::Completion { .. } => "a row of \"prompt\" and \"completion\"",
            Self::Messages { .. } => "a row of \"messages\"",
            Self::Ids(_) => "a row of \"input_ids\"",
        }
    }
}

/// The object on a line, without its null fields.
pub(super) fn object(line: &str) -> Result<Map<String, Value>, Error> {
    match serde_json::from_str(line)? {
        Value::Object(mut map) => {
            map.retain(|_, value| !value.is_null());
            Ok(map)
        }
        other => Err(Error::NotAnObject { found: kind(&other) }),
    }
}

/// The string in a field.
pub(super) fn string(field: &str, value: Value) -> Result<String, Error> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(mismatch(field.into(), &other, "a string")),
    }
}

fn chat(field: &str, value: Value) -> Result<Vec<Value>, Error> {
    const EXPECTED: &str = "an object with a string \"role\"";
    let Value::Array(messages) = value else {
        return Err(mismatch(field.into(), &value, "an array of objects with \"role\" and \"content\""));
    };
    if messages.is_empty() {
        return Err(Error::Field {
            field: field.into(),
            found: "an empty array".into(),
            expected: "at least one message",
        });
    }
    for (i, message) in messages.iter().enumerate() {
        match message.get("role") {
            Some(Value::String(_)) => {}
            Some(role) => return Err(mismatch(format!("{field}[{i}].role"), role, "a string")),
            None => return Err(mismatch(format!("{field}[{i}]"), message, EXPECTED)),
        }
    }
    Ok(messages)
}

fn token_ids(field: &str, value: Value) -> Result<Vec<u32>, Error> {
    let Value::Array(ids) = value else {
        return Err(mismatch(field.into(), &value, "an array of token ids"));
    };
    ids.iter()
        .enumerate()
        .map(|(i, id)| {
            id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| Error::Field {
                field: format!("{field}[{i}]"),
                found: if id.is_number() { id.to_string() } else { kind(id).into() },
                expected: "a token id: an integer from 0 to 4294967295",
            })
        })
        .collect()
}

fn mismatch(field: String, found: &Value, expected: &'static str) -> Error {
    let found = match found {
        Value::Object(map) => format!("an object with fields {:?}", map.keys().collect::<Vec<_>>()),
        other => kind(other).to_owned(),
    };
    Error::Field { field, found, expected }
}

pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Lines of a file with their numbers from 1, without blank lines and without a byte order mark. Read one at a time, so that the first
/// rows of a large file cost no more than themselves.
pub(super) struct Lines<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    line: usize,
}

impl<'a> Lines<'a> {
    pub(super) fn open(path: &'a Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io(path))?;
        Ok(Self { path, reader: BufReader::new(file), line: 0 })
    }
}

impl Iterator for Lines<'_> {
    type Item = Result<(usize, String), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let mut bytes = Vec::new();
            match self.reader.read_until(b'\n', &mut bytes) {
                Ok(0) => return None,
                Ok(_) => self.line += 1,
                Err(source) => return Some(Err(Error::Io { path: self.path.to_owned(), source })),
            }
            let text = match String::from_utf8(bytes) {
                Ok(text) => text,
                Err(error) => {
                    let valid_up_to = error.utf8_error().valid_up_to();
                    return Some(Err(Error::Utf8 { valid_up_to }.at(self.path, self.line)));
                }
            };
            let text = text.trim_start_matches('\u{feff}').trim();
            if !text.is_empty() {
                return Some(Ok((self.line, text.to_owned())));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read() {
        assert_eq!(Row::parse(r#"{"text": "a", "id": 3}"#).unwrap(), Row::Text("a".into()));
        assert_eq!(
            Row::parse(r#"{"prompt": "a", "completion": " b", "answer": "b", "text": null}"#).unwrap(),
            Row::Completion { prompt: "a".into(), completion: " b".into() }
        );
        assert_eq!(Row::parse(r#"{"input_ids": [1, 0]}"#).unwrap(), Row::Ids(vec![1, 0]));
        // A lone prompt beside messages is a label that published chat data carries.
        let row =
            Row::parse(r#"{"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "tools": [1]}"#).unwrap();
        let Row::Messages { messages, tools } = row else { panic!("{row:?}") };
        assert_eq!((messages.len(), tools), (1, Some(serde_json::json!([1]))));
    }

    #[test]
    fn every_malformed_row_is_explained() {
        for (line, message) in [
            ("{\"text\": ", "not valid JSON: EOF while parsing a value at line 1 column 9"),
            (
                "[1]",
                r#"found an array, expected a JSON object with one of "text"; "prompt" and "completion"; "messages"; "input_ids""#,
            ),
            (
                r#"{"prompt": "a", "x": 1}"#,
                r#"fields ["prompt", "x"], expected one of "text"; "prompt" and "completion"; "messages"; "input_ids""#,
            ),
            (
                r#"{"completion": "a"}"#,
                r#"fields ["completion"], expected one of "text"; "prompt" and "completion"; "messages"; "input_ids""#,
            ),
            (
                r#"{"text": "a", "prompt": "a", "completion": "b"}"#,
                r#"the row could be read as "text" or as "prompt" and "completion": keep the fields of one of them"#,
            ),
            (r#"{"text": 3}"#, r#"field "text": found a number, expected a string"#),
            (r#"{"prompt": [], "completion": "b"}"#, r#"field "prompt": found an array, expected a string"#),
            (r#"{"prompt": "", "completion": false}"#, r#"field "completion": found a boolean, expected a string"#),
            (r#"{"messages": []}"#, r#"field "messages": found an empty array, expected at least one message"#),
            (
                r#"{"messages": "hi"}"#,
                r#"field "messages": found a string, expected an array of objects with "role" and "content""#,
            ),
            (
                r#"{"messages": [{"from": "user"}]}"#,
                r#"field "messages[0]": found an object with fields ["from"], expected an object with a string "role""#,
            ),
            (r#"{"messages": [{"role": 1}]}"#, r#"field "messages[0].role": found a number, expected a string"#),
            (r#"{"input_ids": 7}"#, r#"field "input_ids": found a number, expected an array of token ids"#),
            (
                r#"{"input_ids": [1, -2]}"#,
                r#"field "input_ids[1]": found -2, expected a token id: an integer from 0 to 4294967295"#,
            ),
            (
                r#"{"input_ids": ["a"]}"#,
                r#"field "input_ids[0]": found a string, expected a token id: an integer from 0 to 4294967295"#,
            ),
        ] {
            assert_eq!(Row::parse(line).unwrap_err().to_string(), message, "{line}");
        }
    }

    #[test]
    fn lines_are_numbered_as_an_editor_numbers_them() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"\xef\xbb\xbfa\r\n\n  \nb\n\xff\n").unwrap();
        let lines: Vec<_> = Lines::open(file.path()).unwrap().collect();
        assert_eq!(lines[0].as_ref().unwrap(), &(1, "a".to_owned()));
        assert_eq!(lines[1].as_ref().unwrap(), &(4, "b".to_owned()));
        let error = lines[2].as_ref().unwrap_err().to_string();
        assert!(error.ends_with(":5: not valid UTF-8 after byte 0 of the line"), "{error}");
    }
}

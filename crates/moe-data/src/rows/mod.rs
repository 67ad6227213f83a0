//! Rows of a data file: what they hold, before anything is tokenized.

pub(crate) mod chat;
mod fields;
mod json;
#[cfg(feature = "parquet")]
mod parquet;
mod reader;

use serde_json::{Map, Value};

use crate::Error;
pub use chat::Chat;
pub(crate) use fields::{kind, string};
pub(crate) use reader::{Content, Object, Objects, content, files, open};
pub use reader::{Place, Reading, Rows};

/// The forms of a row, as error messages list them.
pub(crate) const FORMS: &str =
    r#""text"; "prompt" and "completion"; "messages" or "conversations"; "instruction" and "output"; "input_ids""#;

/// Fields a row may have, which other columns can be mapped to.
pub(crate) const FIELDS: [&str; 17] = [
    "text",
    "prompt",
    "completion",
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "tools",
    "chat_template_kwargs",
    "input_ids",
    "labels",
    "attention_mask",
    "completion_mask",
    "assistant_masks",
];

/// One row of a data file.
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
    /// `{"messages"}` or `{"conversations"}`, or `{"prompt", "completion"}` of messages: rendered by the tokenizer's
    /// chat template.
    Messages(Chat),
    /// `{"instruction", "output"}`, and perhaps `"input"` and `"system"` (Alpaca): a chat where the tokenizer has a
    /// template for one, else the text Alpaca was trained on.
    Instruction {
        /// What stands before the conversation.
        system: Option<String>,
        /// What is asked.
        instruction: String,
        /// What it is asked about; empty if there is nothing.
        input: String,
        /// What is to be predicted.
        output: String,
        /// Earlier questions with their answers.
        history: Vec<(String, String)>,
    },
    /// `{"input_ids"}`.
    Ids(Vec<u32>),
    /// `{"input_ids"}` with `"labels"` (-100 where a token does not count), `"completion_mask"` or `"assistant_masks"`.
    Masked {
        /// Token ids.
        ids: Vec<u32>,
        /// Which of them count in the loss.
        loss: Vec<bool>,
    },
}

impl Row {
    /// Reads a row written as one JSON object. A field that is null counts as absent; fields of no form are ignored.
    ///
    /// # Errors
    /// Not JSON, not an object, no form or two forms of a row at once, a field of the wrong type, an id that is not a
    /// u32.
    pub fn parse(text: &str) -> Result<Self, Error> {
        Self::from_fields(fields::object(text)?)
    }

    /// Reads a row from its fields, none of them null.
    pub(crate) fn from_fields(mut row: Map<String, Value>) -> Result<Self, Error> {
        let has = |name: &str| row.contains_key(name);
        let forms = [
            (has("text"), "\"text\""),
            (has("prompt") && has("completion"), "\"prompt\" and \"completion\""),
            (has("messages"), "\"messages\""),
            (has("conversations"), "\"conversations\""),
            (has("instruction") && has("output"), "\"instruction\" and \"output\""),
            (has("input_ids"), "\"input_ids\""),
        ];
        let mut present = forms.iter().filter(|(is_present, _)| *is_present).map(|(_, name)| *name);
        let (first, second) = (present.next(), present.next());
        if let (Some(first), Some(second)) = (first, second) {
            return Err(Error::Ambiguous { first, second });
        }
        let mut take = |name: &str| row.remove(name);
        let mut text = |name: &str| take(name).map(|value| string(name, value)).transpose();
        match first {
            Some("\"text\"") => Ok(Self::Text(text("text")?.unwrap_or_default())),
            Some("\"prompt\" and \"completion\"") => match (row.get("prompt"), row.get("completion")) {
                (Some(Value::Array(_)), Some(Value::Array(_))) => Chat::of_halves(row).map(Self::Messages),
                (Some(Value::Array(_)), Some(_)) | (Some(_), Some(Value::Array(_))) => {
                    let is_list = |name| row.get(name).is_some_and(Value::is_array);
                    let (field, found) =
                        if is_list("prompt") { ("completion", "prompt") } else { ("prompt", "completion") };
                    Err(fields::mismatch(
                        field.into(),
                        &row[field],
                        match found {
                            "prompt" => "a list of messages, as \"prompt\" is one",
                            _ => "a list of messages, as \"completion\" is one",
                        },
                    ))
                }
                _ => {
                    let mut text = |name: &str| string(name, row.remove(name).unwrap_or_default());
                    Ok(Self::Completion { prompt: text("prompt")?, completion: text("completion")? })
                }
            },
            Some("\"messages\"") => Chat::of_list("messages", row).map(Self::Messages),
            Some("\"conversations\"") => Chat::of_list("conversations", row).map(Self::Messages),
            Some("\"input_ids\"") => fields::tokens(row),
            Some(_) => Ok(Self::Instruction {
                system: text("system")?.filter(|system| !system.is_empty()),
                instruction: text("instruction")?.unwrap_or_default(),
                input: text("input")?.unwrap_or_default(),
                output: text("output")?.unwrap_or_default(),
                history: take("history").map_or(Ok(Vec::new()), fields::pairs)?,
            }),
            None => Err(Error::MissingFields { found: row.keys().cloned().collect(), expected: FORMS }),
        }
    }

    /// The form of the row, for messages.
    pub fn form(&self) -> &'static str {
        match self {
            Self::Text(_) => "a row of \"text\"",
            Self::Completion { .. } => "a row of \"prompt\" and \"completion\"",
            Self::Messages(_) => "a row of \"messages\"",
            Self::Instruction { .. } => "a row of \"instruction\" and \"output\"",
            Self::Ids(_) => "a row of \"input_ids\"",
            Self::Masked { .. } => "a row of \"input_ids\" with a mask",
        }
    }

    /// Whether the row is text, which a tokenizer has to read.
    pub fn needs_tokenizer(&self) -> bool {
        !matches!(self, Self::Ids(_) | Self::Masked { .. })
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
        let Row::Messages(chat) = row else { panic!("{row:?}") };
        assert_eq!((chat.messages.len(), chat.tools), (1, Some(serde_json::json!([1]))));
    }

    #[test]
    fn every_malformed_row_is_explained() {
        for (line, message) in [
            ("{\"text\": ", "not valid JSON: EOF while parsing a value at line 1 column 9"),
            (
                "[1]",
                r#"found an array, expected a JSON object with one of "text"; "prompt" and "completion"; "messages" or "conversations"; "instruction" and "output"; "input_ids""#,
            ),
            (
                r#"{"prompt": "a", "x": 1}"#,
                r#"fields ["prompt", "x"], expected one of "text"; "prompt" and "completion"; "messages" or "conversations"; "instruction" and "output"; "input_ids""#,
            ),
            (
                r#"{"completion": "a"}"#,
                r#"fields ["completion"], expected one of "text"; "prompt" and "completion"; "messages" or "conversations"; "instruction" and "output"; "input_ids""#,
            ),
            (
                r#"{"text": "a", "prompt": "a", "completion": "b"}"#,
                r#"the row could be read as "text" or as "prompt" and "completion": keep the fields of one of them, or choose by a field (--field NAME=COLUMN, such as --field text=text)"#,
            ),
            (r#"{"text": 3}"#, r#"field "text": found a number, expected a string"#),
            (
                r#"{"prompt": [], "completion": "b"}"#,
                r#"field "completion": found a string, expected a list of messages, as "prompt" is one"#,
            ),
            (r#"{"prompt": "", "completion": false}"#, r#"field "completion": found a boolean, expected a string"#),
            (r#"{"messages": []}"#, r#"field "messages": found an empty array, expected at least one message"#),
            (
                r#"{"messages": "hi"}"#,
                r#"field "messages": found a string, expected an array of objects with "role" and "content""#,
            ),
            (
                r#"{"messages": [{"from": "user"}]}"#,
                r#"field "messages[0]": found an object with fields ["from"], expected an object with strings "from" and "value""#,
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
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        std::fs::write(&path, b"\xef\xbb\xbf{\"text\": \"a\"}\r\n\n  \n{\"text\": \"b\"}\n\xff\n{\"text\": \"c\"}")
            .unwrap();
        let mut rows = Rows::open(&path, &Reading::default()).unwrap();
        let place = |line| Place { path: path.clone(), line };
        assert_eq!(rows.next().unwrap().unwrap(), (place(1), Row::Text("a".into())));
        assert_eq!(rows.next().unwrap().unwrap(), (place(4), Row::Text("b".into())));
        let error = rows.next().unwrap().unwrap_err().to_string();
        assert!(error.ends_with(":5: not valid UTF-8 after byte 0 of the line"), "{error}");
        assert_eq!(rows.next().unwrap().unwrap().0, place(6));
        assert!(rows.next().is_none());
    }
}

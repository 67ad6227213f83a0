//! Chats as data sets write them.

use serde_json::{Map, Value, json};

use super::fields::mismatch;
use super::string;
use crate::Error;
use crate::template::Conversation;

/// A chat of a data file, with the roles and fields that chat templates read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chat {
    /// Objects with `"role"` and usually `"content"`.
    pub messages: Vec<Value>,
    /// The row's `"tools"`: an array, handed to the template as it is.
    pub tools: Option<Value>,
    /// The row's `"chat_template_kwargs"`: further names of the template, such as `enable_thinking`.
    pub arguments: Option<Map<String, Value>>,
    /// The first message that can be part of a completion: 0, or where the `"completion"` begins.
    pub completion: usize,
}

impl Chat {
    /// A chat of messages and nothing else.
    pub fn new(messages: Vec<Value>) -> Self {
        Self { messages, ..Self::default() }
    }

    /// `{"messages"}` or `{"conversations"}`: of `role` and `content`, or of `from` and `value` as ShareGPT has it.
    pub(super) fn of_list(field: &'static str, mut row: Map<String, Value>) -> Result<Self, Error> {
        let list = messages(field, row.remove(field).unwrap_or_default())?;
        Self::with(list, 0, row)
    }

    /// `{"prompt", "completion"}` of messages.
    pub(super) fn of_halves(mut row: Map<String, Value>) -> Result<Self, Error> {
        let mut list = messages("prompt", row.remove("prompt").unwrap_or_default())?;
        let completion = list.len();
        list.extend(messages("completion", row.remove("completion").unwrap_or_default())?);
        Self::with(list, completion, row)
    }

    fn with(mut messages: Vec<Value>, mut completion: usize, mut row: Map<String, Value>) -> Result<Self, Error> {
        if let Some(system) = row.remove("system") {
            let system = string("system", system)?;
            if !system.is_empty() && messages[0].get("role").and_then(Value::as_str) != Some("system") {
                messages.insert(0, json!({"role": "system", "content": system}));
                completion += usize::from(completion > 0);
            }
        }
        let tools = match row.remove("tools") {
            None => None,
            Some(tools @ Value::Array(_)) => Some(tools),
            // Templates would print a string as one more layer of JSON.
            Some(other) => {
                return Err(mismatch(
                    "tools".into(),
                    &other,
                    "an array of JSON schemas (a string of JSON has to be parsed first)",
                ));
            }
        };
        let arguments = match row.remove("chat_template_kwargs") {
            None => None,
            Some(Value::Object(map)) => Some(map),
            Some(other) => return Err(mismatch("chat_template_kwargs".into(), &other, "an object")),
        };
        let chat = Self { messages, tools, arguments, completion };
        chat.silenced()?;
        Ok(chat)
    }

    /// The chat as a template reads it.
    pub fn conversation(&self) -> Conversation<'_> {
        let tools = self.tools.as_ref().filter(|tools| !tools.as_array().is_some_and(Vec::is_empty));
        Conversation { messages: &self.messages, tools, arguments: self.arguments.as_ref() }
    }

    /// Indices of the assistant's messages that are not to count in a loss: `"weight": 0`, `"loss": false`, `"train":
    /// false` or `"masked": true`.
    ///
    /// # Errors
    /// Such a field of another type, a weight that is neither 0 nor 1, or a message of somebody else that is to be
    /// learned.
    pub fn silenced(&self) -> Result<Vec<usize>, Error> {
        let mut silenced = Vec::new();
        for (i, message) in self.messages.iter().enumerate() {
            let is_assistant = crate::template::is_assistant(message);
            let mut counts = true;
            for (name, on) in [("weight", true), ("loss", true), ("train", true), ("training", true), ("masked", false)]
            {
                let field = || format!("messages[{i}].{name}");
                let flag = match message.get(name) {
                    None | Some(Value::Null) => continue,
                    Some(Value::Bool(flag)) => *flag,
                    Some(Value::Number(number)) if number.as_f64() == Some(0.0) => false,
                    Some(Value::Number(number)) if number.as_f64() == Some(1.0) => true,
                    Some(Value::Number(number)) => {
                        return Err(Error::Field {
                            field: field(),
                            found: number.to_string(),
                            expected: "0 or 1: a turn counts or does not",
                        });
                    }
                    Some(other) => return Err(mismatch(field(), other, "a boolean, 0 or 1")),
                };
                if flag == on && !is_assistant && matches!(name, "loss" | "train" | "training") {
                    return Err(Error::Field {
                        field: field(),
                        found: format!("{flag} in a message that is not the assistant's"),
                        expected: "a loss over the assistant's messages only",
                    });
                }
                counts &= flag == on;
            }
            if is_assistant && !counts {
                silenced.push(i);
            }
        }
        Ok(silenced)
    }
}

/// Messages in the words of chat templates.
fn messages(field: &str, value: Value) -> Result<Vec<Value>, Error> {
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
    messages.into_iter().enumerate().map(|(i, message)| one(message, &format!("{field}[{i}]"))).collect()
}

fn one(message: Value, field: &str) -> Result<Value, Error> {
    match (message.get("role"), message.get("from")) {
        (Some(Value::String(_)), _) => Ok(message),
        (Some(role), _) if !role.is_null() => Err(mismatch(format!("{field}.role"), role, "a string")),
        (_, Some(Value::String(from))) => match message.get("value") {
            Some(Value::String(text)) => named(from, text, &message, field),
            Some(other) => Err(mismatch(format!("{field}.value"), other, "a string")),
            None => Err(mismatch(field.into(), &message, "an object with strings \"from\" and \"value\"")),
        },
        _ => Err(mismatch(field.into(), &message, "an object with a string \"role\", or with \"from\" and \"value\"")),
    }
}

/// A message by ShareGPT's names of who speaks. Its other fields stay.
fn named(from: &str, text: &str, message: &Value, field: &str) -> Result<Value, Error> {
    let role = match from.to_ascii_lowercase().as_str() {
        "human" | "user" => "user",
        "gpt" | "assistant" | "chatgpt" | "model" | "bing" | "bard" | "bot" | "function_call" => "assistant",
        "system" => "system",
        "tool" | "observation" | "tool_response" | "function_response" => "tool",
        _ => {
            return Err(Error::Field {
                field: format!("{field}.from"),
                found: format!("{from:?}"),
                expected: "\"human\", \"gpt\", \"system\", \"tool\" or another usual name of them",
            });
        }
    };
    let mut fields = Map::new();
    fields.insert("role".into(), role.into());
    let call = || serde_json::from_str::<Value>(text).ok().filter(|call| call.get("name").is_some());
    match (from == "function_call").then(call).flatten() {
        Some(call) => {
            fields.insert("content".into(), "".into());
            let calls = vec![json!({"type": "function", "function": call})];
            fields.insert("tool_calls".into(), calls.into());
        }
        None => {
            fields.insert("content".into(), text.into());
        }
    }
    for (name, value) in message.as_object().into_iter().flatten() {
        if !matches!(name.as_str(), "from" | "value" | "role" | "content") {
            fields.insert(name.clone(), value.clone());
        }
    }
    Ok(Value::Object(fields))
}

//! Chat templates, rendered as transformers renders them.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Output, State, Value, context};
use serde_json::Map;

use super::Error;
use super::chat_filters::{from_json, python_text, strftime, tojson};

/// Messages of a chat and the tools it may call.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// Objects with `"role"` and usually `"content"`.
    pub messages: &'a [serde_json::Value],
    /// JSON schemas of tools, handed to the template as they are.
    pub tools: Option<&'a serde_json::Value>,
}

impl<'a> Conversation<'a> {
    /// A conversation without tools.
    pub fn new(messages: &'a [serde_json::Value]) -> Self {
        Self { messages, tools: None }
    }

    fn first(self, count: usize) -> Self {
        Self { messages: &self.messages[..count], ..self }
    }
}

/// A Jinja chat template with the settings of transformers: block tags take their line with them, Python's string methods work, and
/// `raise_exception`, `strftime_now` and an unescaped `tojson` exist.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Value,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are the names it may use beside the messages: `bos_token`, `eos_token`, ….
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] for a syntax error, with its line.
    pub fn new(source: String, special_tokens: Map<String, serde_json::Value>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(template_error)?;
        environment.set_syntax(syntax);
        // So that an error names the variable that is missing, in release builds too.
        environment.set_debug(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(format);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
            strftime(&format, now)
        });
        environment.add_template_owned(NAME, without_generation_tags(&source)).map_err(template_error)?;
        Ok(Self { environment, special_tokens: from_json(&serde_json::Value::Object(special_tokens)) })
    }

    /// Fixes what `strftime_now` takes for now, in seconds since 1970 (UTC), so that a template that prints the date gives the same text
    /// on every day. Without it the clock is asked, and read as UTC.
    pub fn at_time(mut self, seconds: u64) -> Self {
        self.environment.add_function("strftime_now", move |format: String| strftime(&format, seconds));
        self
    }

    /// Renders a conversation; `add_generation_prompt` also opens the assistant's next turn.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] if the template fails, or refuses the conversation by `raise_exception`.
    pub fn render(&self, conversation: Conversation<'_>, add_generation_prompt: bool) -> Result<String, Error> {
        let messages: Vec<Value> = conversation.messages.iter().map(message).collect();
        let context = context! {
            messages => messages,
            tools => conversation.tools.map_or(Value::from(()), from_json),
            documents => Value::from(()),
            add_generation_prompt => add_generation_prompt,
            ..self.special_tokens.clone()
        };
        let template = self.environment.get_template(NAME).map_err(template_error)?;
        template.render(context).map_err(template_error)
    }

    /// Renders a conversation without a generation prompt, and finds the byte ranges of it that the assistant wrote.
    ///
    /// A turn begins where the rendering of the messages before it, with a generation prompt, stops agreeing with the whole. It ends where
    /// the rendering that stops after the turn ends. Templates that drop the reasoning of earlier turns render a turn longer when it is
    /// the last one; then it ends where the messages between it and the next turn begin, rendered with the turn left out.
    ///
    /// # Errors
    /// As [`render`](Self::render), and if those renderings do not fit into the whole: then the template gives no way to tell who wrote
    /// what.
    pub fn render_turns(&self, conversation: Conversation<'_>) -> Result<(String, Vec<(usize, usize)>), Error> {
        let whole = self.render(conversation, false)?;
        let messages = conversation.messages;
        let turns: Vec<usize> = (0..messages.len()).filter(|&i| is_assistant(&messages[i])).collect();
        let mut spans = Vec::with_capacity(turns.len());
        for (n, &i) in turns.iter().enumerate() {
            let unclear = |why: &str| Error::ChatTemplate {
                message: format!("cannot tell which tokens of \"messages[{i}]\" the assistant wrote: {why}"),
            };
            let (before, opened) =
                match (self.render(conversation.first(i), false), self.render(conversation.first(i), true)) {
                    (Ok(before), Ok(opened)) => (before, opened),
                    // Templates may refuse an empty conversation; then nothing stands before the first turn.
                    _ if i == 0 => Default::default(),
                    (Err(error), _) | (_, Err(error)) => return Err(error),
                };
            let start = common_prefix(&opened, &whole);
            if start < before.len() {
                return Err(unclear("the messages before it are rendered differently when they stand alone"));
            }
            let alone = self.render(conversation.first(i + 1), false)?;
            let end = if whole.starts_with(&alone) && alone.len() >= start {
                alone.len()
            } else {
                let next = turns.get(n + 1).copied().unwrap_or(messages.len());
                self.end_by_what_follows(conversation, &before, i, next)?
                    .filter(|&end| (start..=whole.len()).contains(&end) && whole.is_char_boundary(end))
                    .ok_or_else(|| unclear("the turn is rendered differently when it is the last one"))?
            };
            spans.push((start, end));
        }
        Ok((whole, spans))
    }

    /// Where turn `i` ends in the rendering of the messages before `next`, if leaving it out leaves the rest as it is.
    fn end_by_what_follows(
        &self,
        conversation: Conversation<'_>,
        before: &str,
        i: usize,
        next: usize,
    ) -> Result<Option<usize>, Error> {
        let with_turn = self.render(conversation.first(next), false)?;
        let others = [&conversation.messages[..i], &conversation.messages[i + 1..next]].concat();
        // A template that insists on alternating turns refuses this one: no end is found this way.
        let Ok(without_turn) = self.render(Conversation { messages: &others, ..conversation }, false) else {
            return Ok(None);
        };
        let after = without_turn.strip_prefix(before).and_then(|after| with_turn.strip_suffix(after));
        Ok(after.map(str::len))
    }
}

fn is_assistant(message: &serde_json::Value) -> bool {
    message.get("role").and_then(|role| role.as_str()) == Some("assistant")
}

/// A message for the template, without its null fields: transformers drops them, because tables of messages fill absent fields by null.
fn message(message: &serde_json::Value) -> Value {
    match message {
        serde_json::Value::Object(fields) => {
            let fields = fields.iter().filter(|(_, value)| !value.is_null());
            Value::from_pairs(fields.map(|(name, value)| (name.as_str(), from_json(value))))
        }
        other => from_json(other),
    }
}

/// Bytes two texts have in common at their beginning, whole characters only.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(x, y)| x == y).map(|(x, _)| x.len_utf8()).sum()
}

/// transformers marks the assistant's text by `{% generation %}` … `{% endgeneration %}`, which only mean something to its own mask:
/// they become a condition that always holds, with the same handling of white space.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        let Some(close) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(close + 2);
        let inner = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        match inner {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Prints booleans and none as Python does.
fn format(out: &mut Output, state: &mut State, value: &Value) -> Result<(), minijinja::Error> {
    match python_text(value) {
        Some(text) => out.write_str(text).map_err(minijinja::Error::from),
        None => minijinja::escape_formatter(out, state, value),
    }
}

fn template_error(error: minijinja::Error) -> Error {
    let line = error.line().map_or(String::new(), |line| format!(" (line {line} of the template)"));
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    Error::ChatTemplate { message: format!("{what}{line}") }
}

//! Chat templates, rendered as transformers renders them.

mod dates;
mod filters;
mod json;
mod methods;
pub(crate) mod python;
mod source;
mod turns;

pub(crate) use turns::is_assistant;

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::merge_maps;
use minijinja::{Environment, ErrorKind, Output, State, Value, context};
use serde_json::Map;

use crate::Error;
use dates::strftime;
use json::from_json;

/// Messages of a chat and what a template may be told beside them.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// Objects with `"role"` and usually `"content"`.
    pub messages: &'a [serde_json::Value],
    /// JSON schemas of tools, handed to the template as they are.
    pub tools: Option<&'a serde_json::Value>,
    /// Further names of the template, such as `enable_thinking`.
    pub arguments: Option<&'a Map<String, serde_json::Value>>,
}

impl<'a> Conversation<'a> {
    /// A conversation without tools.
    pub fn new(messages: &'a [serde_json::Value]) -> Self {
        Self { messages, tools: None, arguments: None }
    }

    /// The conversation as it stood after `count` messages.
    fn first(self, count: usize) -> Self {
        Self { messages: &self.messages[..count], ..self }
    }
}

/// A Jinja chat template with the settings of transformers: block tags take their line with them, values print as
/// Python prints them, the methods of Python's strings, lists and dictionaries work, and `raise_exception`,
/// `strftime_now` and an unescaped `tojson` exist.
///
/// Integers beyond 64 bits are read as floats, and a macro has neither `varargs` nor `kwargs`. What a template uses
/// that the engine does not know is an error that names it.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Value,
    /// Whether the template marks what the assistant writes, by `{% generation %}`.
    marks_generation: bool,
}

const NAME: &str = "chat_template";
/// What a rendering may cost, in instructions and in 64 bytes of text: a second, and a gigabyte. A template comes with
/// a model, whoever has made it, and may run in circles.
const FUEL: u64 = 20_000_000;

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
        environment.set_fuel(Some(FUEL));
        environment.set_formatter(format);
        filters::install(&mut environment);
        environment.add_function("strftime_now", |format: String| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
            strftime(&format, now)
        });
        let source::Prepared { source, marks_generation } = source::prepare(&source);
        environment.add_template_owned(NAME, source).map_err(template_error)?;
        let special_tokens = from_json(&serde_json::Value::Object(special_tokens));
        Ok(Self { environment, special_tokens, marks_generation })
    }

    /// Fixes what `strftime_now` takes for now, in seconds since 1970 (UTC), so that a template that prints the date
    /// gives the same text on every day. Without it the clock is asked, and read as UTC.
    pub fn at_time(mut self, seconds: u64) -> Self {
        self.environment.add_function("strftime_now", move |format: String| strftime(&format, seconds));
        self
    }

    /// Renders a conversation; `add_generation_prompt` also opens the assistant's next turn.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] if the template fails, refuses the conversation by `raise_exception`, or would run for
    /// long or take gigabytes.
    pub fn render(&self, conversation: Conversation<'_>, add_generation_prompt: bool) -> Result<String, Error> {
        let text = self.render_marked(conversation, add_generation_prompt)?;
        Ok(if self.marks_generation { turns::unmarked(&text).0 } else { text })
    }

    /// As [`render`](Self::render), with the marks of `{% generation %}` left in.
    fn render_marked(&self, conversation: Conversation<'_>, add_generation_prompt: bool) -> Result<String, Error> {
        let messages: Vec<Value> = conversation.messages.iter().map(message).collect();
        let arguments = conversation.arguments.into_iter().flatten();
        let arguments = Value::from_pairs(arguments.map(|(name, value)| (name.as_str(), from_json(value))));
        let context = context! {
            messages => messages,
            tools => conversation.tools.map_or(Value::from(()), from_json),
            documents => Value::from(()),
            add_generation_prompt => add_generation_prompt,
            ..merge_maps([arguments, self.special_tokens.clone()])
        };
        let template = self.environment.get_template(NAME).map_err(template_error)?;
        template.render(context).map_err(template_error)
    }
}

/// Names of a message's reasoning; transformers reads any of them and hands the template the first two.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A message for the template as transformers hands it over: without its null fields, because tables of messages fill
/// absent fields by null; with its reasoning under the names templates read; and with the arguments of tool calls as
/// objects, which data sets often hold as strings of JSON.
fn message(message: &serde_json::Value) -> Value {
    let serde_json::Value::Object(fields) = message else { return from_json(message) };
    let mut fields: Map<String, serde_json::Value> = fields
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if let Some(reasoning) = REASONING.iter().find_map(|name| fields.get(*name)).cloned() {
        fields.entry("thinking").or_insert_with(|| reasoning.clone());
        fields.insert(REASONING[0].to_owned(), reasoning);
    }
    let calls = fields.get_mut("tool_calls").and_then(|calls| calls.as_array_mut()).into_iter().flatten();
    for call in calls {
        parse_arguments(call);
        if let Some(function) = call.get_mut("function") {
            parse_arguments(function);
        }
    }
    if let Some(call) = fields.get_mut("function_call") {
        parse_arguments(call);
    }
    from_json(&serde_json::Value::Object(fields))
}

fn parse_arguments(call: &mut serde_json::Value) {
    let Some(arguments) = call.get_mut("arguments") else { return };
    let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Map<String, serde_json::Value>>(text).ok());
    if let Some(parsed) = parsed {
        *arguments = serde_json::Value::Object(parsed);
    }
}

/// Prints values as Python does.
fn format(out: &mut Output, state: &mut State, value: &Value) -> Result<(), minijinja::Error> {
    match value.as_str() {
        Some(_) => minijinja::escape_formatter(out, state, value),
        None => out.write_str(&python::text(state, value)?).map_err(minijinja::Error::from),
    }
}

fn template_error(error: minijinja::Error) -> Error {
    let line = error.line().map_or(String::new(), |line| format!(" (line {line} of the template)"));
    let what = match error.kind() {
        ErrorKind::OutOfFuel => format!("it costs more than {FUEL} instructions, or as many times 64 bytes of text"),
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    Error::ChatTemplate { message: format!("{what}{line}") }
}

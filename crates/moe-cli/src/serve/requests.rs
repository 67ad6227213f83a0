//! What clients ask for, checked before it waits in the queue.

use moe_core::data::{Conversation, Tokenizer};
use moe_core::generate::{Sampling, SequenceOptions};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// Alternatives of a token that a client may ask for.
const MOST_LIKELIEST: usize = 20;
/// Completions of a prompt that a client may ask for.
const MOST_CHOICES: usize = 128;
/// New tokens of a completion whose request says no number, as in OpenAI's interface.
const COMPLETION_TOKENS: usize = 16;

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq)]
pub struct Refused {
    /// Status of HTTP.
    pub status: u16,
    /// Kind of the error, as OpenAI's interface names them.
    pub kind: &'static str,
    /// What is wrong: found and expected.
    pub message: String,
}

impl Refused {
    /// A request that is wrong.
    pub fn wrong(message: impl ToString) -> Self {
        Self { status: 400, kind: "invalid_request_error", message: message.to_string() }
    }

    /// The reply's body.
    pub fn body(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind, "param": null, "code": null } })
    }
}

/// What the server knows that requests are checked against.
pub struct Served {
    /// Name of the model.
    pub name: String,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Tokens that end a completion.
    pub stop: Vec<u32>,
    /// Positions of the model; 0 where it says none.
    pub positions: usize,
    /// New tokens of a chat whose request says no number.
    pub max_new_tokens: usize,
}

/// One completion that is asked for.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Tokens of the prompt.
    pub prompt: Vec<u32>,
    /// What is made of it.
    pub options: SequenceOptions,
    /// Texts that end it.
    pub stop: Vec<String>,
    /// Text that goes before the completion.
    pub echo: Option<String>,
}

/// What is asked for, whichever way.
#[derive(Clone, Debug)]
pub struct Job {
    /// Completions, in the order of their index.
    pub choices: Vec<Choice>,
    /// Whether tokens are sent as they are made.
    pub stream: bool,
    /// Whether a stream ends with the numbers of tokens.
    pub include_usage: bool,
    /// Whether log-probabilities are told.
    pub logprobs: bool,
    /// Whether this is a chat.
    pub chat: bool,
}

/// One or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    Several(Vec<Vec<u32>>),
}

/// What both interfaces have. Fields of what is not done here are read, so that clients that send them with the value
/// that does nothing are answered, and refused with any other.
#[derive(Clone, Debug, Deserialize)]
struct Common {
    model: Option<String>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    n: Option<usize>,
    #[serde(default)]
    stream: bool,
    stream_options: Option<Map<String, Value>>,
    stop: Option<OneOrMore>,
    seed: Option<u64>,
}

/// Fields of OpenAI's interface that change nothing about a completion.
const WITHOUT_EFFECT: [&str; 4] = ["user", "metadata", "store", "service_tier"];
/// Fields that are not done here, with the value that does nothing.
fn neutral(field: &str) -> Option<&'static [Value]> {
    use std::sync::LazyLock;
    static NONE: LazyLock<[Value; 1]> = LazyLock::new(|| [Value::Null]);
    static ZERO: LazyLock<[Value; 3]> = LazyLock::new(|| [Value::Null, json!(0), json!(0.0)]);
    static ONE: LazyLock<[Value; 2]> = LazyLock::new(|| [Value::Null, json!(1)]);
    static EMPTY: LazyLock<[Value; 3]> = LazyLock::new(|| [Value::Null, json!({}), json!([])]);
    static TEXT: LazyLock<[Value; 2]> = LazyLock::new(|| [Value::Null, json!({ "type": "text" })]);
    match field {
        "presence_penalty" | "frequency_penalty" => Some(&ZERO[..]),
        "best_of" => Some(&ONE[..]),
        "logit_bias" | "tools" => Some(&EMPTY[..]),
        "response_format" => Some(&TEXT[..]),
        "suffix" | "tool_choice" | "functions" | "function_call" => Some(&NONE[..]),
        _ => None,
    }
}

/// Takes the fields of a request that are known, and refuses the others.
fn known(body: &[u8], more: &[&str]) -> Result<(Common, Map<String, Value>), Refused> {
    let value: Value = serde_json::from_slice(body).map_err(|error| Refused::wrong(format!("no JSON: {error}")))?;
    let Value::Object(mut fields) = value else { return Err(Refused::wrong("expected a JSON object")) };
    let common = [
        "model",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "n",
        "stream",
        "stream_options",
        "stop",
        "seed",
    ];
    for (field, value) in &fields {
        let field = field.as_str();
        if common.contains(&field) || more.contains(&field) || WITHOUT_EFFECT.contains(&field) {
            continue;
        }
        match neutral(field) {
            Some(allowed) if allowed.contains(value) => {}
            Some(allowed) => {
                return Err(Refused::wrong(format!(
                    "`{field}`: found {value}, which is not done here; {} would do",
                    allowed[0]
                )));
            }
            None => return Err(Refused::wrong(format!("`{field}`: unknown"))),
        }
    }
    let own = more.iter().filter_map(|field| Some((field.to_string(), fields.remove(*field)?))).collect();
    // Null is a field that is not there.
    fields.retain(|_, value| !value.is_null());
    Ok((read(Value::Object(fields))?, own))
}

fn read<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, Refused> {
    serde_json::from_value(value).map_err(Refused::wrong)
}

/// A field of its own type; none where it is not there or null.
fn field<T: serde::de::DeserializeOwned>(fields: &mut Map<String, Value>, name: &str) -> Result<Option<T>, Refused> {
    match fields.remove(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match serde_json::from_value(value.clone()) {
            Ok(value) => Ok(Some(value)),
            Err(error) => Err(Refused::wrong(format!("`{name}`: found {value}: {error}"))),
        },
    }
}

impl Common {
    fn check(&self, served: &Served) -> Result<(), Refused> {
        if let Some(model) = self.model.as_ref().filter(|model| **model != served.name) {
            let message = format!("`model`: found `{model}`, expected `{}`", served.name);
            return Err(Refused { status: 404, kind: "invalid_request_error", message });
        }
        if self.n.is_some_and(|n| n == 0 || n > MOST_CHOICES) {
            return Err(Refused::wrong(format!("`n`: expected a number from 1 to {MOST_CHOICES}")));
        }
        if self.stop().iter().any(String::is_empty) {
            return Err(Refused::wrong("`stop`: found an empty text, which would end every completion"));
        }
        Ok(())
    }

    fn stop(&self) -> Vec<String> {
        match &self.stop {
            None => Vec::new(),
            Some(OneOrMore::One(text)) => vec![text.clone()],
            Some(OneOrMore::More(texts)) => texts.clone(),
        }
    }

    /// How the tokens of completion `index` are chosen, from a seed for all.
    fn sampling(&self, index: usize, seed: u64) -> Sampling {
        match self.temperature.unwrap_or(1.0) {
            0.0 => Sampling::Greedy,
            temperature => {
                Sampling::TopP { temperature, top_p: self.top_p.unwrap_or(1.0), seed: seed.wrapping_add(index as u64) }
            }
        }
    }

    fn include_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.get("include_usage")) == Some(&Value::Bool(true))
    }
}

/// A seed for a request that names none.
fn any_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}

/// What `/v1/completions` is asked for.
///
/// # Errors
/// [`Refused`] names the field, what was found and what was expected.
pub fn completions(body: &[u8], served: &Served) -> Result<Job, Refused> {
    let (common, mut own) = known(body, &["prompt", "logprobs", "echo"])?;
    common.check(served)?;
    let echo = field(&mut own, "echo")?.unwrap_or(false);
    let logprobs: Option<usize> = field(&mut own, "logprobs")?;
    if logprobs.is_some_and(|top| top > MOST_LIKELIEST) {
        return Err(Refused::wrong(format!("`logprobs`: expected {MOST_LIKELIEST} at most")));
    }
    let prompt = field(&mut own, "prompt")?.ok_or_else(|| Refused::wrong("`prompt` is missing"))?;
    let encode = |text: &String| served.tokenizer.encode(text).map_err(Refused::wrong);
    let prompts: Vec<Vec<u32>> = match &prompt {
        Prompt::Text(text) => vec![encode(text)?],
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::Tokens(ids) => vec![ids.clone()],
        Prompt::Several(several) => several.clone(),
    };
    let texts: Vec<Option<String>> = match prompt {
        _ if !echo => vec![None; prompts.len()],
        Prompt::Text(text) => vec![Some(text)],
        Prompt::Texts(texts) => texts.into_iter().map(Some).collect(),
        _ => prompts.iter().map(|ids| Some(served.tokenizer.decode(ids).unwrap_or_default())).collect(),
    };
    let max_new_tokens = common.max_tokens.or(common.max_completion_tokens).unwrap_or(COMPLETION_TOKENS);
    if max_new_tokens == 0 && !echo {
        return Err(Refused::wrong("`max_tokens`: found 0, expected at least 1 without `echo`"));
    }
    let (seed, n) = (common.seed.unwrap_or_else(any_seed), common.n.unwrap_or(1));
    let mut choices = Vec::with_capacity(prompts.len() * n);
    for (prompt, text) in prompts.into_iter().zip(texts) {
        for _ in 0..n {
            choices.push(Choice {
                prompt: prompt.clone(),
                options: SequenceOptions {
                    max_new_tokens,
                    sampling: common.sampling(choices.len(), seed),
                    stop: served.stop.clone(),
                    scores: logprobs,
                    score_prompt: echo && logprobs.is_some(),
                },
                stop: common.stop(),
                echo: text.clone(),
            });
        }
    }
    if choices.is_empty() {
        return Err(Refused::wrong("`prompt`: found none, expected at least one"));
    }
    let include_usage = common.include_usage();
    Ok(Job { choices, stream: common.stream, include_usage, logprobs: logprobs.is_some(), chat: false })
}

/// What `/v1/chat/completions` is asked for.
///
/// # Errors
/// [`Refused`] names the field, what was found and what was expected.
pub fn chat(body: &[u8], served: &Served) -> Result<Job, Refused> {
    let (common, mut own) = known(body, &["messages", "logprobs", "top_logprobs"])?;
    common.check(served)?;
    let mut messages: Vec<Value> =
        field(&mut own, "messages")?.ok_or_else(|| Refused::wrong("`messages` is missing"))?;
    messages.iter_mut().enumerate().try_for_each(|(at, message)| plain(at, message))?;
    let logprobs = field(&mut own, "logprobs")?.unwrap_or(false);
    let top: Option<usize> = field(&mut own, "top_logprobs")?;
    if top.is_some() && !logprobs {
        return Err(Refused::wrong("`top_logprobs`: needs `logprobs`: true"));
    }
    if top.is_some_and(|top| top > MOST_LIKELIEST) {
        return Err(Refused::wrong(format!("`top_logprobs`: expected {MOST_LIKELIEST} at most")));
    }
    let rendered = served.tokenizer.render_chat(Conversation::new(&messages), true).map_err(Refused::wrong)?;
    let prompt = served.tokenizer.encode_rendered(&rendered).map_err(Refused::wrong)?;
    let room = match served.positions {
        0 => served.max_new_tokens,
        positions => served.max_new_tokens.min(positions.saturating_sub(prompt.len())).max(1),
    };
    let max_new_tokens = common.max_completion_tokens.or(common.max_tokens).unwrap_or(room);
    if max_new_tokens == 0 {
        return Err(Refused::wrong("`max_tokens`: found 0, expected at least 1"));
    }
    let seed = common.seed.unwrap_or_else(any_seed);
    let choice = |index| Choice {
        prompt: prompt.clone(),
        options: SequenceOptions {
            max_new_tokens,
            sampling: common.sampling(index, seed),
            stop: served.stop.clone(),
            scores: logprobs.then_some(top.unwrap_or(0)),
            score_prompt: false,
        },
        stop: common.stop(),
        echo: None,
    };
    let choices = (0..common.n.unwrap_or(1)).map(choice).collect();
    Ok(Job { choices, stream: common.stream, include_usage: common.include_usage(), logprobs, chat: true })
}

/// Makes one text of content that comes in parts.
fn plain(at: usize, message: &mut Value) -> Result<(), Refused> {
    let Some(Value::Array(parts)) = message.get("content") else { return Ok(()) };
    let text = |part: &Value| match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text.to_string()),
        (kind, _) => {
            let kind = kind.unwrap_or("none");
            Err(Refused::wrong(format!("`messages[{at}].content`: found a part of type {kind}, expected text")))
        }
    };
    let text = parts.iter().map(text).collect::<Result<String, _>>()?;
    message["content"] = Value::String(text);
    Ok(())
}

#[cfg(test)]
mod tests {
    use moe_core::data::ChatTemplate;

    use super::*;

    fn served() -> Served {
        let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";
        let template = ChatTemplate::new(template.into(), Map::new()).unwrap();
        let tokenizer = Tokenizer::from_dir(crate::TINY_MOE).unwrap().with_chat_template(template);
        let stop = tokenizer.eos_ids().to_vec();
        Served { name: "tiny".into(), tokenizer, stop, positions: 512, max_new_tokens: 100 }
    }

    fn of(body: Value) -> Result<Job, Refused> {
        completions(body.to_string().as_bytes(), &served())
    }

    #[test]
    fn prompts_are_texts_or_tokens_one_or_several() {
        let text = of(json!({"prompt": "Hello world"})).unwrap();
        let ids = text.choices[0].prompt.clone();
        assert_eq!((text.choices.len(), text.choices[0].options.max_new_tokens), (1, COMPLETION_TOKENS));
        assert_eq!(of(json!({"prompt": ids})).unwrap().choices[0].prompt, ids);
        let several = of(json!({"prompt": [ids, [5]], "n": 2, "echo": true, "logprobs": 3, "temperature": 0})).unwrap();
        assert_eq!(several.choices.len(), 4);
        let options = &several.choices[3].options;
        assert_eq!((options.sampling, options.scores, options.score_prompt), (Sampling::Greedy, Some(3), true));
        assert_eq!(several.choices[0].echo.as_deref(), Some("Hello world"));
        assert_eq!(of(json!({"prompt": ["a", "b"]})).unwrap().choices.len(), 2);
    }

    #[test]
    fn what_would_have_no_effect_is_refused_by_name() {
        for (body, word) in [
            (json!({"prompt": "a", "presence_penalty": 0.5}), "presence_penalty"),
            (json!({"prompt": "a", "best_of": 3}), "best_of"),
            (json!({"prompt": "a", "suffix": "b"}), "suffix"),
            (json!({"prompt": "a", "temprature": 0}), "temprature"),
            (json!({"prompt": "a", "model": "large"}), "expected `tiny`"),
            (json!({"prompt": "a", "stop": ""}), "stop"),
            (json!({"prompt": "a", "n": 0}), "`n`"),
            (json!({"prompt": "a", "max_tokens": 0}), "max_tokens"),
            (json!({"prompt": "a", "logprobs": 99}), "logprobs"),
            (json!({"prompt": {}}), "prompt"),
            (json!({}), "`prompt` is missing"),
        ] {
            let refused = of(body.clone()).unwrap_err();
            assert!(refused.message.contains(word), "{body}: {refused:?}");
        }
        of(json!({"prompt": "a", "presence_penalty": 0, "logit_bias": null, "user": "me", "stop": null})).unwrap();
        assert_eq!(completions(b"[", &served()).unwrap_err().status, 400);
    }

    #[test]
    fn sampling_has_a_seed_for_each_choice() {
        let job = of(json!({"prompt": "a", "n": 2, "seed": 7, "temperature": 0.5, "top_p": 0.9})).unwrap();
        let seeds: Vec<Sampling> = job.choices.iter().map(|choice| choice.options.sampling).collect();
        let expected = |seed| Sampling::TopP { temperature: 0.5, top_p: 0.9, seed };
        assert_eq!(seeds, [expected(7), expected(8)]);
    }

    #[test]
    fn a_chat_goes_through_the_template_and_content_may_come_in_parts() {
        let ask = |content: Value| {
            let body = json!({"messages": [{"role": "user", "content": content}], "max_completion_tokens": 5});
            chat(body.to_string().as_bytes(), &served())
        };
        let whole = ask(json!("Hello there")).unwrap();
        let expected = served().tokenizer.encode("user: Hello there\nassistant:").unwrap();
        assert_eq!(whole.choices[0].prompt, expected);
        let parts = ask(json!([{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}])).unwrap();
        assert_eq!(parts.choices[0].prompt, expected);
        assert_eq!(whole.choices[0].options.max_new_tokens, 5);
        let image = ask(json!([{"type": "image_url", "image_url": {}}])).unwrap_err();
        assert!(image.message.contains("image_url"), "{image:?}");
    }
}

//! What clients are told, as OpenAI's interface has it.

use serde_json::{Map, Value, json};

use super::requests::{Job, Refused};
use super::worker::{Event, Told};

/// What all parts of a reply say.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Identifies the reply.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Name of the model.
    pub model: String,
    /// Whether this is a chat.
    pub chat: bool,
    /// Whether log-probabilities are told.
    pub logprobs: bool,
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
}

/// A completion so far.
#[derive(Clone, Debug, Default)]
struct Whole {
    text: String,
    tokens: Vec<Told>,
    ended: Option<bool>,
    new: usize,
}

impl Reply {
    /// Of a job for this model.
    pub fn new(job: &Job, model: &str, number: u64) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
        let kind = if job.chat { "chatcmpl" } else { "cmpl" };
        // Several completions of one prompt have one prompt; the worker reads it for each.
        let prompt_tokens = job.choices.iter().map(|choice| choice.prompt.len()).sum();
        Self {
            id: format!("{kind}-{now:x}-{number}"),
            created: now,
            model: model.to_string(),
            chat: job.chat,
            logprobs: job.logprobs,
            prompt_tokens,
        }
    }

    fn with(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        let Self { id, created, model, .. } = self;
        let all = json!({ "id": id, "object": object, "created": created, "model": model, "choices": choices });
        all.as_object().cloned().unwrap_or_default()
    }

    fn usage(&self, new: usize) -> Value {
        let prompt = self.prompt_tokens;
        json!({ "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new })
    }

    /// The object of a part of a streamed reply.
    fn chunk_object(&self) -> &'static str {
        if self.chat { "chat.completion.chunk" } else { "text_completion" }
    }

    /// Log-probabilities of tokens, the first of which begins at this character.
    fn logprobs(&self, tokens: &[Told], offset: usize) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        if self.chat {
            let bytes = |text: &str| json!(text.as_bytes());
            let content = tokens.iter().map(|token| {
                let alternatives = token.likeliest.iter();
                let top: Vec<Value> = alternatives
                    .map(|(text, value)| json!({ "token": text, "logprob": value, "bytes": bytes(text) }))
                    .collect();
                json!({ "token": token.text, "logprob": token.log_probability, "bytes": bytes(&token.text), "top_logprobs": top })
            });
            return json!({ "content": content.collect::<Vec<_>>() });
        }
        let mut at = offset;
        let offsets = tokens.iter().map(|token| {
            let start = at;
            at += token.text.chars().count();
            start
        });
        let offsets: Vec<usize> = offsets.collect();
        let top = tokens.iter().map(|token| {
            let value = token.log_probability?;
            // The best of tokens that read alike, and the token itself, as in OpenAI's interface.
            let mut all = Map::new();
            let own = std::iter::once((&token.text, value));
            for (text, value) in token.likeliest.iter().map(|(text, value)| (text, *value)).chain(own) {
                all.entry(text.clone()).or_insert_with(|| json!(value));
            }
            Some(Value::Object(all))
        });
        json!({
            "tokens": tokens.iter().map(|token| &token.text).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|token| token.log_probability).collect::<Vec<_>>(),
            "top_logprobs": top.collect::<Vec<_>>(),
            "text_offset": offsets,
        })
    }
}

/// A reply that is sent when it is complete.
#[derive(Debug)]
pub struct Gathered {
    reply: Reply,
    choices: Vec<Whole>,
}

impl Gathered {
    /// Nothing yet.
    pub fn new(reply: Reply, choices: usize) -> Self {
        Self { reply, choices: vec![Whole::default(); choices] }
    }

    /// Takes an event. True when all is complete.
    ///
    /// # Errors
    /// What became of a completion that cannot be made.
    pub fn take(&mut self, index: usize, event: Event) -> Result<bool, Refused> {
        let whole = &mut self.choices[index];
        match event {
            Event::Made { text, tokens } => {
                whole.text.push_str(&text);
                whole.tokens.extend(tokens);
            }
            Event::Ended { stopped, tokens } => (whole.ended, whole.new) = (Some(stopped), tokens),
            Event::Failed(refused) => return Err(refused),
        }
        Ok(self.choices.iter().all(|whole| whole.ended.is_some()))
    }

    /// The reply's body.
    pub fn body(&self) -> Value {
        let reply = &self.reply;
        let choice = |(index, whole): (usize, &Whole)| {
            let reason = reason(whole.ended == Some(true));
            let logprobs = reply.logprobs(&whole.tokens, 0);
            match reply.chat {
                true => {
                    let message = json!({ "role": "assistant", "content": whole.text });
                    json!({ "index": index, "message": message, "logprobs": logprobs, "finish_reason": reason })
                }
                false => json!({ "index": index, "text": whole.text, "logprobs": logprobs, "finish_reason": reason }),
            }
        };
        let object = if reply.chat { "chat.completion" } else { "text_completion" };
        let mut body = reply.with(object, self.choices.iter().enumerate().map(choice).collect());
        body.insert("usage".into(), reply.usage(self.choices.iter().map(|whole| whole.new).sum()));
        Value::Object(body)
    }
}

/// A reply that is sent as it is made.
#[derive(Debug)]
pub struct Streamed {
    reply: Reply,
    include_usage: bool,
    /// Of each completion: whether it has begun and ended, its new tokens, characters of the tokens that were told.
    choices: Vec<(bool, bool, usize, usize)>,
}

impl Streamed {
    /// Nothing yet.
    pub fn new(reply: Reply, choices: usize, include_usage: bool) -> Self {
        Self { reply, include_usage, choices: vec![(false, false, 0, 0); choices] }
    }

    /// The parts to send of an event, and whether they are the last ones.
    pub fn take(&mut self, index: usize, event: Event) -> (Vec<Value>, bool) {
        let (begun, ended, new, characters) = &mut self.choices[index];
        let role = !std::mem::replace(begun, true);
        let (text, tokens, reason) = match event {
            Event::Made { text, tokens } => (text, tokens, Value::Null),
            Event::Ended { stopped, tokens } => {
                (*ended, *new) = (true, tokens);
                (String::new(), Vec::new(), Value::from(reason(stopped)))
            }
            Event::Failed(refused) => return (vec![refused.body()], true),
        };
        let offset = *characters;
        *characters += tokens.iter().map(|token| token.text.chars().count()).sum::<usize>();
        let reply = &self.reply;
        let logprobs = reply.logprobs(&tokens, offset);
        let choice = match reply.chat {
            true => {
                let mut delta = Map::new();
                if role {
                    delta.insert("role".into(), "assistant".into());
                }
                if reason.is_null() {
                    delta.insert("content".into(), text.into());
                }
                json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason })
            }
            false => json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": reason }),
        };
        let mut parts = vec![Value::Object(reply.with(reply.chunk_object(), vec![choice]))];
        let last = self.choices.iter().all(|(_, ended, ..)| *ended);
        if last && self.include_usage {
            let mut body = reply.with(reply.chunk_object(), Vec::new());
            body.insert("usage".into(), reply.usage(self.choices.iter().map(|(_, _, new, _)| new).sum()));
            parts.push(Value::Object(body));
        }
        (parts, last)
    }
}

fn reason(stopped: bool) -> &'static str {
    if stopped { "stop" } else { "length" }
}

//! Text to token ids and back.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::Error;
use super::template::{ChatTemplate, Conversation};

/// A Hugging Face tokenizer: `tokenizer.json`, and beside it what is needed to read chats and to know where a text ends.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    eos: Option<u32>,
    eos_ids: Vec<u32>,
    chat: Option<ChatTemplate>,
}

/// Token ids of one text with the bytes of the text that each stands for.
pub(super) struct Encoded {
    pub ids: Vec<u32>,
    /// Byte range of the text; empty for a token the tokenizer added and for one that holds only trimmed white space.
    pub spans: Vec<(usize, usize)>,
}

impl Tokenizer {
    /// Reads a model directory: `tokenizer.json`, and where present `tokenizer_config.json` and `special_tokens_map.json` (special tokens,
    /// chat template), `chat_template.jinja` (goes before the one in the configuration) and `generation_config.json` (further
    /// end-of-sequence ids).
    ///
    /// Truncation and padding that `tokenizer.json` may ask for are switched off: how long a sequence may be is for the data options to say.
    ///
    /// # Errors
    /// A missing or malformed `tokenizer.json`, another file that is there but malformed, or an end-of-sequence token outside the vocabulary.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self, Error> {
        let dir = dir.as_ref();
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let malformed = |path: &Path, message: String| Error::Tokenizer { path: path.to_owned(), message };
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|error| malformed(&path, format!("not a tokenizer of the tokenizers library: {error}")))?;
        inner.with_padding(None).with_truncation(None).map_err(|error| malformed(&path, error.to_string()))?;

        let config_path = dir.join("tokenizer_config.json");
        let config = read_object(&config_path)?.unwrap_or_default();
        let special_path = dir.join("special_tokens_map.json");
        let mut special_tokens = special_tokens(&read_object(&special_path)?.unwrap_or_default(), &special_path)?;
        special_tokens.extend(self::special_tokens(&config, &config_path)?);

        let eos = match special_tokens.get("eos_token").and_then(Value::as_str) {
            None => None,
            Some(token) => Some(inner.token_to_id(token).ok_or_else(|| {
                malformed(
                    &config_path,
                    format!("\"eos_token\" is {token:?}, which is not in the vocabulary of tokenizer.json"),
                )
            })?),
        };
        let mut eos_ids: Vec<u32> = eos.into_iter().collect();
        let generation_path = dir.join("generation_config.json");
        if let Some(ids) = read_object(&generation_path)?.as_ref().and_then(|generation| generation.get("eos_token_id"))
        {
            let list = match ids {
                Value::Null => &[],
                Value::Array(list) => list.as_slice(),
                one => std::slice::from_ref(one),
            };
            for id in list {
                let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
                    malformed(
                        &generation_path,
                        format!("\"eos_token_id\": found {id}, expected a token id or a list of them"),
                    )
                })?;
                if !eos_ids.contains(&id) {
                    eos_ids.push(id);
                }
            }
        }
        let chat = match template_source(dir, &config, &config_path)? {
            None => None,
            Some((path, source)) => {
                Some(ChatTemplate::new(source, special_tokens).map_err(|error| malformed(&path, error.to_string()))?)
            }
        };
        Ok(Self { inner, eos, eos_ids, chat })
    }

    /// Token ids of a text. Special tokens are added only if the tokenizer's post-processor adds them.
    ///
    /// # Errors
    /// [`Error::Tokenize`] if the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        Ok(self.encode_spans(text, true)?.ids)
    }

    /// Token ids of a text that a chat template rendered, which has its special tokens already.
    ///
    /// # Errors
    /// [`Error::Tokenize`] if the tokenizer refuses the text.
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, Error> {
        Ok(self.encode_spans(text, false)?.ids)
    }

    /// As [`encode`](Self::encode), with byte ranges. A rendered chat already holds its special tokens: `special` is false for it.
    pub(super) fn encode_spans(&self, text: &str, special: bool) -> Result<Encoded, Error> {
        let encoding =
            self.inner.encode(text, special).map_err(|error| Error::Tokenize { message: error.to_string() })?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), spans: encoding.get_offsets().to_vec() })
    }

    /// Text of token ids, without special tokens.
    ///
    /// # Errors
    /// [`Error::Tokenize`] if the decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        self.inner.decode(ids, true).map_err(|error| Error::Tokenize { message: error.to_string() })
    }

    /// The token that ends a sequence: `eos_token` of the tokenizer's configuration.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// Every token that ends a generation: [`eos_id`](Self::eos_id) first, then those of `generation_config.json`.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// One more than the largest token id, added tokens included. Models often have more embeddings than that.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1)
    }

    /// The text of a chat by the tokenizer's template; `add_generation_prompt` also opens the assistant's next turn.
    ///
    /// # Errors
    /// No template, or a template that fails on this conversation.
    pub fn render_chat(&self, conversation: Conversation<'_>, add_generation_prompt: bool) -> Result<String, Error> {
        self.chat()?.render(conversation, add_generation_prompt)
    }

    /// The chat template.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`].
    pub fn chat(&self) -> Result<&ChatTemplate, Error> {
        self.chat.as_ref().ok_or(Error::NoChatTemplate)
    }

    /// Replaces the chat template, or gives one to a tokenizer that has none.
    pub fn with_chat_template(mut self, template: ChatTemplate) -> Self {
        self.chat = Some(template);
        self
    }
}

/// Reads a JSON object from a file that need not be there.
fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, Error> {
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    match super::rows::object(&text) {
        Ok(map) => Ok(Some(map)),
        Err(Error::NotAnObject { found }) => {
            Err(Error::Tokenizer { path: path.to_owned(), message: format!("found {found}, expected a JSON object") })
        }
        Err(error) => Err(Error::Tokenizer { path: path.to_owned(), message: error.to_string() }),
    }
}

/// The fields `*_token` of a tokenizer's configuration, written as a string or as an object with `"content"`.
fn special_tokens(config: &Map<String, Value>, path: &Path) -> Result<Map<String, Value>, Error> {
    let mut tokens = Map::new();
    for name in ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"] {
        let Some(value) = config.get(name) else { continue };
        let Some(token) = value.as_str().or_else(|| value.get("content").and_then(Value::as_str)) else {
            let message = format!("{name:?}: found {value}, expected a string or an object with a string \"content\"");
            return Err(Error::Tokenizer { path: path.to_owned(), message });
        };
        tokens.insert(name.to_owned(), token.into());
    }
    Ok(tokens)
}

/// The source of the chat template and the file it is from.
fn template_source(
    dir: &Path,
    config: &Map<String, Value>,
    config_path: &Path,
) -> Result<Option<(PathBuf, String)>, Error> {
    let file = dir.join("chat_template.jinja");
    if file.exists() {
        let source = std::fs::read_to_string(&file).map_err(Error::io(&file))?;
        return Ok(Some((file, source)));
    }
    let malformed = |message: String| Error::Tokenizer { path: config_path.to_owned(), message };
    let source = match config.get("chat_template") {
        None => return Ok(None),
        Some(Value::String(source)) => source.as_str(),
        // Several named templates: the one named "default" is what a plain conversation uses.
        Some(Value::Array(list)) => list
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template").and_then(Value::as_str))
            .ok_or_else(|| malformed("\"chat_template\" is a list without a template named \"default\"".into()))?,
        Some(other) => {
            return Err(malformed(format!(
                "\"chat_template\": found {other}, expected a string or a list of named templates"
            )));
        }
    };
    Ok(Some((config_path.to_owned(), source.to_owned())))
}

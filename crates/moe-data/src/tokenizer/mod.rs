//! Text to token ids and back.

mod files;
mod special;

use std::path::Path;

use serde_json::Value;

use crate::Error;
use crate::template::{ChatTemplate, Conversation};
use files::{malformed, read_object, template_sources, tokenizer_json};
use special::Declared;

/// A Hugging Face tokenizer: `tokenizer.json`, and beside it what is needed to read chats and to know where a text
/// ends.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    eos: Option<u32>,
    eos_ids: Vec<u32>,
    chat: Option<ChatTemplate>,
    /// The template of conversations with tools, where it is another one.
    tool_use: Option<ChatTemplate>,
}

/// Token ids of one text with the bytes of the text that each stands for.
pub(crate) struct Encoded {
    pub ids: Vec<u32>,
    /// Byte range of the text; empty for a token the tokenizer added and for one that holds only trimmed white space.
    pub spans: Vec<(usize, usize)>,
}

impl Tokenizer {
    /// Reads a model directory: `tokenizer.json`, and where present what `AutoTokenizer` of transformers reads beside
    /// it: `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` (special and added tokens, which
    /// get the ids that transformers gives them), `chat_template.jinja` and `additional_chat_templates/` (they go
    /// before the templates in the configuration) and `generation_config.json` (further end-of-sequence ids).
    /// Conversations with tools use the template named `tool_use`, if there is one.
    ///
    /// Truncation and padding that `tokenizer.json` may ask for are switched off: how long a sequence may be is for the
    /// data options to say.
    ///
    /// # Errors
    /// A missing `tokenizer.json` (with the way to make one from the vocabulary that is there) or a malformed one,
    /// another file that is there but malformed, or an end-of-sequence token that no file lists.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self, Error> {
        let dir = dir.as_ref();
        let (path, bytes) = tokenizer_json(dir)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|error| malformed(&path, format!("not a tokenizer of the tokenizers library: {error}")))?;
        inner.with_padding(None).with_truncation(None).map_err(|error| malformed(&path, error.to_string()))?;

        let config_path = dir.join("tokenizer_config.json");
        let config = read_object(&config_path)?.unwrap_or_default();
        let declared = Declared::read(dir, &config, &config_path)?;
        if let Some(token) = declared.content("eos_token").filter(|token| !declared.knows(token, &inner)) {
            // transformers would invent an id that the model has never seen.
            let message = format!("\"eos_token\" is {token:?}, which is not in the vocabulary of tokenizer.json");
            return Err(malformed(&config_path, message));
        }
        declared.add_to(&mut inner).map_err(|error| malformed(&config_path, error.to_string()))?;
        let splits = config.get("split_special_tokens").and_then(Value::as_bool).unwrap_or(false);
        inner.set_encode_special_tokens(splits);

        let eos = declared.content("eos_token").and_then(|token| inner.token_to_id(token));
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
        let (mut chat, mut tool_use) = (None, None);
        for (name, path, source) in template_sources(dir, &config, &config_path)? {
            // Templates of other names are for callers who know of them.
            let place = match name.as_str() {
                "default" => &mut chat,
                "tool_use" => &mut tool_use,
                _ => continue,
            };
            let template = ChatTemplate::new(source, declared.names());
            *place = Some(template.map_err(|error| malformed(&path, error.to_string()))?);
        }
        Ok(Self { inner, eos, eos_ids, chat, tool_use })
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

    /// As [`encode`](Self::encode), with byte ranges. A rendered chat already holds its special tokens: `special` is
    /// false for it.
    pub(crate) fn encode_spans(&self, text: &str, special: bool) -> Result<Encoded, Error> {
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
        self.chat(conversation.tools.is_some())?.render(conversation, add_generation_prompt)
    }

    /// The chat template of a conversation: the one named `tool_use` for one `with_tools`, if there is such a template.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`].
    pub fn chat(&self, with_tools: bool) -> Result<&ChatTemplate, Error> {
        self.tool_use.as_ref().filter(|_| with_tools).or(self.chat.as_ref()).ok_or(Error::NoChatTemplate)
    }

    /// Whether there is a template for conversations without tools.
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_some()
    }

    /// Replaces the chat templates by one, or gives one to a tokenizer that has none.
    pub fn with_chat_template(mut self, template: ChatTemplate) -> Self {
        self.chat = Some(template);
        self.tool_use = None;
        self
    }

    /// The text of one token for a person to read: special tokens are written out, and bytes that are no character by
    /// themselves are `�`.
    pub fn token_text(&self, id: u32) -> String {
        let piece = self.inner.decode(&[id], false).unwrap_or_default();
        if piece.is_empty() { self.inner.id_to_token(id).unwrap_or_else(|| format!("<{id}>")) } else { piece }
    }
}

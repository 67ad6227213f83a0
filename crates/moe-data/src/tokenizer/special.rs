//! The special and added tokens a tokenizer's files declare, as `AutoTokenizer` of transformers puts them together.
//!
//! `tokenizer.json` alone is not enough: fine-tuned and older checkpoints name tokens in `tokenizer_config.json`
//! (`added_tokens_decoder`, `extra_special_tokens`, `additional_special_tokens`, `bos_token` and its like), in
//! `special_tokens_map.json` or in `added_tokens.json`, and a text with such a token has other ids without them.

use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::files::{malformed, read_object};
use crate::Error;

/// Names every tokenizer may have, in the order in which transformers gives ids to tokens that have none.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What the files beside `tokenizer.json` say of tokens.
pub(super) struct Declared {
    /// By name: those of [`NAMED`] first, then the model's own (`image_token`, …).
    pub named: Vec<(String, AddedToken)>,
    /// Special tokens without a name.
    extra: Vec<AddedToken>,
    /// Tokens with the ids they had when they were saved.
    saved: Vec<(u64, AddedToken)>,
}

impl Declared {
    /// Reads `tokenizer_config.json` (given as `config`), `special_tokens_map.json` and `added_tokens.json` of a
    /// directory. As in transformers, the latter two count only where the first has no `"added_tokens_decoder"`, and
    /// then go before it.
    pub fn read(dir: &Path, config: &Map<String, Value>, config_path: &Path) -> Result<Self, Error> {
        let mut fields: Vec<(String, Value, &Path)> =
            config.iter().map(|(name, value)| (name.clone(), value.clone(), config_path)).collect();
        let (map_path, added_path) = (dir.join("special_tokens_map.json"), dir.join("added_tokens.json"));
        let is_legacy = !config.contains_key("added_tokens_decoder");
        // Malformed files are reported even where they do not count.
        let map = read_object(&map_path)?.unwrap_or_default();
        let added = read_object(&added_path)?.unwrap_or_default();
        if is_legacy {
            for (name, value) in map {
                fields.retain(|(other, ..)| *other != name);
                fields.push((name, value, &map_path));
            }
        }
        let find = |name: &str| {
            fields
                .iter()
                .find(|(other, value, _)| other == name && !value.is_null())
                .map(|(_, value, path)| (value, *path))
        };

        let mut named = Vec::new();
        let own = fields.iter().map(|(name, ..)| name.as_str()).filter(|name| {
            name.ends_with("_token")
                && !NAMED.contains(name)
                && find(name).is_some_and(|(value, _)| !value.is_boolean())
        });
        for name in NAMED.into_iter().chain(own) {
            if let Some((value, path)) = find(name) {
                named.push((name.to_owned(), token(value, name, path)?));
            }
        }
        let mut extra = Vec::new();
        let is_empty =
            |value: &Value| value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty);
        let list = find("extra_special_tokens").filter(|(value, _)| !is_empty(value));
        let list = list
            .map(|found| ("extra_special_tokens", found))
            .or_else(|| Some(("additional_special_tokens", find("additional_special_tokens")?)));
        if let Some((name, (value, path))) = list {
            match value {
                Value::Array(items) => {
                    for (i, item) in items.iter().enumerate() {
                        extra.push(token(item, &format!("{name}[{i}]"), path)?);
                    }
                }
                Value::Object(map) => {
                    for (key, item) in map {
                        named.push((key.clone(), token(item, key, path)?));
                    }
                }
                other => {
                    return Err(malformed(
                        path,
                        format!("{name:?}: found {other}, expected a list or an object of tokens"),
                    ));
                }
            }
        }

        let mut saved = Vec::new();
        if is_legacy {
            for (content, id) in &added {
                let id = id
                    .as_u64()
                    .ok_or_else(|| malformed(&added_path, format!("{content:?}: found {id}, expected a token id")))?;
                let special = named.iter().map(|(_, token)| token).chain(&extra).any(|token| token.content == *content);
                saved.push((id, AddedToken::from(content.clone(), special).normalized(!special)));
            }
        } else {
            let (value, path) = (&config["added_tokens_decoder"], config_path);
            let Value::Object(entries) = value else {
                return Err(malformed(
                    path,
                    format!("\"added_tokens_decoder\": found {value}, expected an object of tokens by id"),
                ));
            };
            for (id, entry) in entries {
                let name = format!("added_tokens_decoder.{id}");
                let id = id.parse().map_err(|_| malformed(path, format!("{name:?}: the name is not a token id")))?;
                saved.push((id, flags(entry, &name, path)?));
            }
        }
        saved.sort_by_key(|(id, _)| *id);
        // A named token is the one saved, with its flags.
        for (_, token) in named.iter_mut() {
            if let Some((_, same)) = saved.iter().find(|(_, saved)| saved.content == token.content) {
                *token = same.clone();
            }
        }
        Ok(Self { named, extra, saved })
    }

    /// Adds what `tokenizer.json` lacks. A token takes the id of the vocabulary's entry of the same text, or the next
    /// free one.
    pub fn add_to(&self, tokenizer: &mut tokenizers::Tokenizer) -> Result<(), tokenizers::Error> {
        let is_new = |token: &AddedToken, tokenizer: &tokenizers::Tokenizer| {
            !tokenizer.get_added_tokens_decoder().values().any(|other| other.content == token.content)
        };
        let mut new: Vec<AddedToken> = Vec::new();
        let saved = self.saved.iter().map(|(_, token)| token);
        for token in saved.chain(self.named.iter().map(|(_, token)| token)).chain(&self.extra) {
            if is_new(token, tokenizer) && !new.iter().any(|other| other.content == token.content) {
                let is_named = self.named.iter().any(|(_, named)| named.content == token.content);
                new.push(AddedToken { special: token.special || is_named, ..token.clone() });
            }
        }
        tokenizer.add_tokens(new)?;
        // What has a name is special, whatever it was saved as.
        let special: Vec<AddedToken> = self.named.iter().map(|(_, token)| token).chain(&self.extra).cloned().collect();
        tokenizer.add_special_tokens(special)?;
        Ok(())
    }

    /// The text of a named token.
    pub fn content(&self, name: &str) -> Option<&str> {
        self.named.iter().find(|(other, _)| other == name).map(|(_, token)| token.content.as_str())
    }

    /// Whether a token is known by more than its name: listed in the files, or in the tokenizer itself.
    pub fn knows(&self, content: &str, tokenizer: &tokenizers::Tokenizer) -> bool {
        let mut listed = self.saved.iter().map(|(_, token)| token).chain(&self.extra);
        listed.any(|token| token.content == content) || tokenizer.token_to_id(content).is_some()
    }

    /// Named tokens as a chat template reads them.
    pub fn names(&self) -> Map<String, Value> {
        self.named.iter().map(|(name, token)| (name.clone(), token.content.as_str().into())).collect()
    }
}

/// A special token, written as a string or as an object.
fn token(value: &Value, name: &str, path: &Path) -> Result<AddedToken, Error> {
    match value {
        Value::String(content) => Ok(AddedToken::from(content.clone(), true)),
        Value::Object(_) => flags(value, name, path).map(|token| AddedToken { special: true, ..token }),
        other => Err(malformed(
            path,
            format!("{name:?}: found {other}, expected a string or an object with a string \"content\""),
        )),
    }
}

/// A token written as an object of its content and flags.
fn flags(value: &Value, name: &str, path: &Path) -> Result<AddedToken, Error> {
    let Some(content) = value.get("content").and_then(Value::as_str) else {
        let message = format!("{name:?}: found {value}, expected a string or an object with a string \"content\"");
        return Err(malformed(path, message));
    };
    let flag = |field: &str, default: bool| match value.get(field) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => Err(malformed(path, format!("\"{name}.{field}\": found {other}, expected true or false"))),
    };
    let special = flag("special", false)?;
    Ok(AddedToken {
        content: content.to_owned(),
        single_word: flag("single_word", false)?,
        lstrip: flag("lstrip", false)?,
        rstrip: flag("rstrip", false)?,
        normalized: flag("normalized", !special)?,
        special,
    })
}

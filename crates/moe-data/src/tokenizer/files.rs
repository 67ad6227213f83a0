//! The files of a tokenizer.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::Error;

pub(super) fn malformed(path: &Path, message: impl Into<String>) -> Error {
    Error::Tokenizer { path: path.to_owned(), message: message.into() }
}

/// Reads a JSON object from a file that need not be there.
pub(super) fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, Error> {
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    match serde_json::from_str(text.trim_start_matches('\u{feff}')) {
        Ok(Value::Object(map)) => Ok(Some(map)),
        Ok(other) => Err(malformed(path, format!("found {}, expected a JSON object", crate::rows::kind(&other)))),
        Err(error) => Err(malformed(path, Error::Json(error).to_string())),
    }
}

/// The bytes of `tokenizer.json`.
pub(super) fn tokenizer_json(dir: &Path) -> Result<(PathBuf, Vec<u8>), Error> {
    let path = dir.join("tokenizer.json");
    match std::fs::read(&path) {
        Ok(bytes) => Ok((path, bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && dir.is_dir() => {
            Err(Error::NoTokenizerFile { found: other_vocabularies(dir), dir: dir.to_owned(), path })
        }
        Err(error) => Err(Error::io(&path)(error)),
    }
}

/// Files in a directory that hold the vocabulary of a tokenizer in another format.
fn other_vocabularies(dir: &Path) -> Vec<String> {
    const NAMES: [&str; 6] =
        ["vocab.json", "merges.txt", "vocab.txt", "tekken.json", "tokenizer.model", "spiece.model"];
    let entries = std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| NAMES.contains(&name.as_str()) || name.ends_with(".tiktoken") || name.ends_with(".model"))
        .collect();
    names.sort();
    names
}

/// Sources of chat templates by name and the file each is from. Files of their own go before the configuration, as in
/// transformers: `chat_template.jinja` is the one named "default", `additional_chat_templates/NAME.jinja` has its name.
pub(super) fn template_sources(
    dir: &Path,
    config: &Map<String, Value>,
    config_path: &Path,
) -> Result<Vec<(String, PathBuf, String)>, Error> {
    let mut sources = Vec::new();
    let mut read = |name: &str, file: PathBuf| {
        let source = std::fs::read_to_string(&file).map_err(Error::io(&file))?;
        sources.push((name.to_owned(), file, source));
        Ok::<_, Error>(())
    };
    let file = dir.join("chat_template.jinja");
    if file.exists() {
        read("default", file)?;
    }
    let folder = dir.join("additional_chat_templates");
    let mut more: Vec<PathBuf> =
        std::fs::read_dir(&folder).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path()).collect();
    more.sort();
    for file in more.into_iter().filter(|file| file.extension().is_some_and(|extension| extension == "jinja")) {
        if let Some(name) = file.file_stem().and_then(|name| name.to_str()).map(str::to_owned) {
            read(&name, file)?;
        }
    }
    if !sources.is_empty() {
        return Ok(sources);
    }
    let wrong = |message: String| malformed(config_path, message);
    let mut add = |name: &str, source: &str| sources.push((name.to_owned(), config_path.to_owned(), source.to_owned()));
    match config.get("chat_template") {
        None | Some(Value::Null) => {}
        Some(Value::String(source)) => add("default", source),
        Some(Value::Array(list)) => {
            for entry in list {
                let field = |name: &str| entry.get(name).and_then(Value::as_str);
                let (Some(name), Some(source)) = (field("name"), field("template")) else {
                    let message =
                        format!("\"chat_template\": found {entry}, expected an object with \"name\" and \"template\"");
                    return Err(wrong(message));
                };
                add(name, source);
            }
            if !sources.iter().any(|(name, ..)| name == "default") {
                return Err(wrong("\"chat_template\" is a list without a template named \"default\"".into()));
            }
        }
        Some(Value::Object(map)) => {
            for (name, source) in map {
                match source.as_str() {
                    Some(source) => add(name, source),
                    None => return Err(wrong(format!("\"chat_template.{name}\": found {source}, expected a string"))),
                }
            }
        }
        Some(other) => {
            return Err(wrong(format!(
                "\"chat_template\": found {other}, expected a string or a list of named templates"
            )));
        }
    }
    Ok(sources)
}

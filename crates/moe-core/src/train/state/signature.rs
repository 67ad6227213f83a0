//! What a state belongs to.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::data::Wave;
use crate::error::{Error, Result};
use crate::train::{Parameters, TrainOptions};

/// Options, data and parameters at the start, as JSON.
pub(in crate::train) fn signature(options: &TrainOptions, waves: &[Wave], parameters: &Parameters) -> Result<Value> {
    let mut data = blake3::Hasher::new();
    for wave in waves {
        data.update(&wave.id.to_le_bytes()).update(&(wave.sequences.len() as u64).to_le_bytes());
        for sequence in &wave.sequences {
            data.update(&(sequence.ids.len() as u64).to_le_bytes()).update(bytemuck::cast_slice(&sequence.ids));
            let marked: Vec<u8> = (0..sequence.ids.len()).map(|t| u8::from(sequence.counts(t))).collect();
            data.update(&marked);
        }
    }
    let tokens: usize = waves.iter().map(Wave::tokens).sum();
    let data = json!({ "waves": waves.len(), "tokens": tokens, "digest": data.finalize().to_hex().to_string() });
    let mut by_name = Map::new();
    for (name, parameter) in parameters.iter() {
        let digest = blake3::hash(bytemuck::cast_slice(&parameter.read()?)).to_hex().to_string();
        let (shape, groups) = (parameter.shape(), parameter.groups());
        by_name.insert(name.into(), json!({ "shape": shape, "groups": groups, "start": digest }));
    }
    let options =
        serde_json::to_value(options).map_err(|error| Error::Unsupported(format!("these options: {error}")))?;
    let signature = json!({ "options": options, "data": data, "parameters": by_name });
    // As it will be read: some numbers differ in the last bit from what they were written from.
    serde_json::from_str(&signature.to_string()).map_err(|error| Error::Unsupported(format!("these options: {error}")))
}

/// # Errors
/// [`Error::State`] names the first field that differs.
pub(super) fn check(path: &Path, found: &Value, expected: &Value) -> Result<()> {
    match difference("", found, expected) {
        Some((field, found, expected)) => Err(Error::state(path, field, found, expected)),
        None => Ok(()),
    }
}

fn difference(field: &str, found: &Value, expected: &Value) -> Option<(String, String, String)> {
    let (Value::Object(a), Value::Object(b)) = (found, expected) else {
        return (found != expected).then(|| (field.to_string(), found.to_string(), expected.to_string()));
    };
    let below = |key: &str| if field.is_empty() { key.to_string() } else { format!("{field}.{key}") };
    let absent = |value: Option<&Value>| value.map_or("nothing".to_string(), Value::to_string);
    for key in b.keys().chain(a.keys().filter(|key| !b.contains_key(*key))) {
        match (a.get(key), b.get(key)) {
            (Some(a), Some(b)) => match difference(&below(key), a, b) {
                Some(difference) => return Some(difference),
                None => continue,
            },
            (a, b) => return Some((below(key), absent(a), absent(b))),
        }
    }
    None
}

//! Fields of a row.

use super::*;

/// The object in a text, without its null fields.
pub(crate) fn object(text: &str) -> Result<Map<String, Value>, Error> {
    of_value(serde_json::from_str(text)?)
}

/// The fields of an object, without the null ones.
pub(crate) fn of_value(value: Value) -> Result<Map<String, Value>, Error> {
    match value {
        Value::Object(mut map) => {
            map.retain(|_, value| !value.is_null());
            Ok(map)
        }
        other => Err(Error::NotAnObject { found: kind(&other) }),
    }
}

/// The string in a field.
pub(crate) fn string(field: &str, value: Value) -> Result<String, Error> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(mismatch(field.into(), &other, "a string")),
    }
}

/// Pairs of texts: earlier questions and answers.
pub(super) fn pairs(value: Value) -> Result<Vec<(String, String)>, Error> {
    const EXPECTED: &str = "a list of pairs of strings";
    let Value::Array(items) = value else { return Err(mismatch("history".into(), &value, EXPECTED)) };
    let pair = |(i, item): (usize, Value)| match item.as_array().map(Vec::as_slice) {
        Some([Value::String(question), Value::String(answer)]) => Ok((question.clone(), answer.clone())),
        _ => Err(mismatch(format!("history[{i}]"), &item, EXPECTED)),
    };
    items.into_iter().enumerate().map(pair).collect()
}

/// Token ids with what says which of them are there and count.
pub(super) fn tokens(mut row: Map<String, Value>) -> Result<Row, Error> {
    let ids = token_ids("input_ids", row.remove("input_ids").unwrap_or_default())?;
    let mut loss: Option<Vec<bool>> = None;
    if let Some(labels) = row.remove("labels") {
        let labels = integers("labels", &labels, ids.len())?;
        for (i, (label, id)) in labels.iter().zip(&ids).enumerate() {
            if *label != -100 && *label != i64::from(*id) {
                return Err(Error::Field {
                    field: format!("labels[{i}]"),
                    found: label.to_string(),
                    expected: "-100 or the token id at the same place of \"input_ids\"",
                });
            }
        }
        loss = Some(labels.iter().map(|label| *label != -100).collect());
    }
    for name in ["completion_mask", "assistant_masks"] {
        let Some(value) = row.remove(name) else { continue };
        let mask = mask(name, &value, ids.len())?;
        loss = Some(match loss {
            None => mask,
            Some(loss) => loss.iter().zip(mask).map(|(a, b)| *a && b).collect(),
        });
    }
    let real = match row.remove("attention_mask") {
        None => 0..ids.len(),
        Some(value) => {
            let mask = mask("attention_mask", &value, ids.len())?;
            let start = mask.iter().position(|real| *real).unwrap_or(mask.len());
            let end = mask.iter().rposition(|real| *real).map_or(start, |last| last + 1);
            // Padding stands at the ends; a hole would put its neighbors beside each other.
            if let Some(hole) = mask[start..end].iter().position(|real| !real) {
                return Err(Error::Field {
                    field: format!("attention_mask[{}]", start + hole),
                    found: "0".into(),
                    expected: "1 between the first and the last token: only padding at the ends can be left out",
                });
            }
            start..end
        }
    };
    let ids = ids[real.clone()].to_vec();
    Ok(match loss {
        None => Row::Ids(ids),
        Some(loss) => Row::Masked { ids, loss: loss[real].to_vec() },
    })
}

fn token_ids(field: &str, value: Value) -> Result<Vec<u32>, Error> {
    let Value::Array(ids) = value else {
        return Err(mismatch(field.into(), &value, "an array of token ids"));
    };
    ids.iter()
        .enumerate()
        .map(|(i, id)| {
            id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| Error::Field {
                field: format!("{field}[{i}]"),
                found: if id.is_number() { id.to_string() } else { kind(id).into() },
                expected: "a token id: an integer from 0 to 4294967295",
            })
        })
        .collect()
}

fn integers(field: &str, value: &Value, length: usize) -> Result<Vec<i64>, Error> {
    const EXPECTED: &str = "as many integers as \"input_ids\" has";
    let items = value.as_array().ok_or_else(|| mismatch(field.into(), value, EXPECTED))?;
    if items.len() != length {
        return Err(Error::Field { field: field.into(), found: items.len().to_string(), expected: EXPECTED });
    }
    let integer = |(i, item): (usize, &Value)| match item {
        Value::Bool(flag) => Ok(i64::from(*flag)),
        other => other.as_i64().ok_or_else(|| mismatch(format!("{field}[{i}]"), other, "an integer")),
    };
    items.iter().enumerate().map(integer).collect()
}

fn mask(field: &str, value: &Value, length: usize) -> Result<Vec<bool>, Error> {
    let flag = |(i, value): (usize, i64)| match value {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Error::Field { field: format!("{field}[{i}]"), found: other.to_string(), expected: "0 or 1" }),
    };
    integers(field, value, length)?.into_iter().enumerate().map(flag).collect()
}

pub(crate) fn mismatch(field: String, found: &Value, expected: &'static str) -> Error {
    let found = match found {
        Value::Object(map) => format!("an object with fields {:?}", map.keys().collect::<Vec<_>>()),
        other => kind(other).to_owned(),
    };
    Error::Field { field, found, expected }
}

pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

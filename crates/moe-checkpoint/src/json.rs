//! Typed reads of JSON fields with errors that name file, field, value and expectation.

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Longest piece of a value that an error message repeats.
const SHOWN: usize = 80;

/// A JSON value for an error message: shortened, since it comes from a file of any size.
pub(crate) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// A JSON object being read. An absent field and `null` are the same, as they are for transformers.
#[derive(Clone)]
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    file: &'a str,
    prefix: String,
}

impl<'a> Fields<'a> {
    /// Reads `value`, which must be an object; `file` is for error messages.
    pub fn new(value: &'a Value, file: &'a str) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { map, file, prefix: String::new() }),
            other => Err(Error::InvalidField {
                file: file.to_string(),
                field: "(the whole file)".to_string(),
                found: shown(other),
                expected: "a JSON object".to_string(),
            }),
        }
    }

    /// The value of a field, unless it is absent or `null`.
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Names of all fields.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// An error about a field that holds something else than `expected`.
    pub fn invalid(&self, key: &str, expected: impl Into<String>) -> Error {
        let found = self.map.get(key).map_or_else(|| "absent".to_string(), shown);
        Error::InvalidField { file: self.file.to_string(), field: self.path(key), found, expected: expected.into() }
    }

    /// An error about a field that is absent.
    pub fn missing(&self, key: &str, expected: impl Into<String>) -> Error {
        Error::MissingField { file: self.file.to_string(), field: self.path(key), expected: expected.into() }
    }

    /// An error about two fields that differ.
    pub fn conflict(&self, first: &str, second: &str) -> Error {
        let field = |key: &str| {
            let value = self.map.get(key).map_or_else(|| "absent".to_string(), shown);
            format!("`{}` = {value}", self.path(key))
        };
        Error::ConflictingFields { file: self.file.to_string(), first: field(first), second: field(second) }
    }

    /// A nested object.
    pub fn object(&self, key: &str) -> Result<Option<Fields<'a>>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Fields { map, file: self.file, prefix: format!("{}.", self.path(key)) }))
            }
            Some(_) => Err(self.invalid(key, "an object")),
        }
    }

    /// A list.
    pub fn list(&self, key: &str) -> Result<Option<&'a [Value]>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(_) => Err(self.invalid(key, "a list")),
        }
    }

    /// A string.
    pub fn string(&self, key: &str) -> Result<Option<&'a str>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.invalid(key, "a string")),
        }
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.invalid(key, "true or false")),
        }
    }

    /// A finite number.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|v| v.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(self.invalid(key, "a finite number")),
            },
        }
    }

    /// A finite number above zero.
    pub fn positive_float(&self, key: &str) -> Result<Option<f64>> {
        match self.float(key)? {
            Some(number) if number <= 0.0 => Err(self.invalid(key, "a number above 0")),
            number => Ok(number),
        }
    }

    /// An integer within `min..=max`.
    pub fn integer(&self, key: &str, min: usize, max: usize) -> Result<Option<usize>> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => match integer_in(value, min, max) {
                Some(number) => Ok(Some(number)),
                None => Err(self.invalid(key, format!("an integer from {min} to {max}"))),
            },
        }
    }

    /// An integer within `min..=max` that must be there.
    pub fn required_integer(&self, key: &str, min: usize, max: usize) -> Result<usize> {
        self.integer(key, min, max)?.ok_or_else(|| self.missing(key, format!("an integer from {min} to {max}")))
    }

    /// A list of integers within `min..=max`.
    pub fn integers(&self, key: &str, min: usize, max: usize) -> Result<Option<Vec<usize>>> {
        let Some(items) = self.list(key)? else { return Ok(None) };
        let read = |item: &Value| {
            integer_in(item, min, max)
                .ok_or_else(|| self.invalid(key, format!("a list of integers from {min} to {max}")))
        };
        items.iter().map(read).collect::<Result<Vec<_>>>().map(Some)
    }

    fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }
}

/// `value` as an integer within `min..=max`. Python writes some integers as `4.0`.
pub(crate) fn integer_in(value: &Value, min: usize, max: usize) -> Option<usize> {
    let number = match value.as_u64() {
        Some(number) => usize::try_from(number).ok()?,
        // Up to 2^53 every integer is exact in f64, so that the cast is.
        None => value.as_f64().filter(|v| v.fract() == 0.0 && (0.0..9.007_199_254_740_992e15).contains(v))? as usize,
    };
    (min..=max).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn errors_name_the_nested_field_and_its_value() {
        let value = json!({"rope": {"factor": "four"}, "n": 2.0, "none": null, "big": 1e300});
        let fields = Fields::new(&value, "config.json").unwrap();
        let message = fields.object("rope").unwrap().unwrap().float("factor").unwrap_err().to_string();
        assert_eq!(message, "config.json: field `rope.factor` is \"four\"; expected a finite number");
        assert_eq!(fields.integer("n", 1, 9).unwrap(), Some(2));
        assert_eq!(fields.integer("none", 1, 9).unwrap(), None);
        assert!(fields.integer("big", 1, usize::MAX).is_err());
        assert!(fields.required_integer("gone", 1, 9).unwrap_err().to_string().contains("`gone` is missing"));
        assert!(Fields::new(&json!([1]), "x.json").is_err());
    }

    #[test]
    fn long_values_are_shortened() {
        assert!(shown(&json!("é".repeat(1000))).chars().count() <= SHOWN + 1);
    }
}

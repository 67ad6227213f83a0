//! JSON as `json.dumps` writes it, and JSON values for a template.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::python;

/// A JSON value for a template, fields in their order.
pub(super) fn from_json(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(flag) => Value::from(*flag),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (None, Some(integer)) => Value::from(integer),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(from_json).collect::<Vec<_>>().into(),
        serde_json::Value::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(name, value)| (name.as_str(), from_json(value))))
        }
    }
}

/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`: the filter that transformers installs,
/// which unlike Jinja's own leaves `<`, `>`, `&` and `'` as they are.
pub(super) fn tojson(state: &State, value: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let mut given = positional.0.into_iter();
    let mut argument = |name: &str| -> Result<Option<Value>, Error> {
        let value = match given.next() {
            Some(value) => Some(value),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ensure_ascii = argument("ensure_ascii")?.is_some_and(|flag| flag.is_true());
    let indent = match argument("indent")? {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => {
                let width = usize::try_from(indent)?;
                python::pay(state, width)?;
                " ".repeat(width)
            }
        }),
    };
    let (between, after_key) = match argument("separators")? {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some(pair) => {
            let pair: Vec<Value> = pair.try_iter()?.collect();
            match pair.as_slice() {
                [between, after_key] => (python::text(state, between)?, python::text(state, after_key)?),
                _ => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators are two strings")),
            }
        }
    };
    let sort_keys = argument("sort_keys")?.is_some_and(|flag| flag.is_true());
    if given.next().is_some() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    kwargs.assert_all_used()?;
    let mut out = String::new();
    let pay = |bytes| python::pay(state, bytes);
    Style { pay: &pay, ensure_ascii, indent, between, after_key, sort_keys }.write(value, 0, &mut out)?;
    Ok(out)
}

struct Style<'a> {
    /// Pays for so many bytes before they are written.
    pay: &'a dyn Fn(usize) -> Result<(), Error>,
    ensure_ascii: bool,
    /// What a level of nesting is indented by.
    indent: Option<String>,
    between: String,
    after_key: String,
    sort_keys: bool,
}

impl Style<'_> {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        (self.pay)(value.as_str().map_or(0, str::len))?;
        match value.kind() {
            ValueKind::String => self.quote(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.group('[', ']', items.len(), depth, out, |i, out| self.write(&items[i], depth + 1, out))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort_by_cached_key(|key| key.as_str().map_or_else(|| key.to_string(), str::to_owned));
                }
                self.group('{', '}', keys.len(), depth, out, |i, out| {
                    match keys[i].as_str() {
                        Some(key) => self.quote(key, out),
                        None => self.quote(&scalar(&keys[i])?, out),
                    }
                    out.push_str(&self.after_key);
                    self.write(&value.get_item(&keys[i])?, depth + 1, out)
                })?;
            }
            _ => out.push_str(&scalar(value)?),
        }
        Ok(())
    }

    fn group(
        &self,
        open: char,
        close: char,
        len: usize,
        depth: usize,
        out: &mut String,
        mut item: impl FnMut(usize, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let new_line = |depth: usize, out: &mut String| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(indent.as_str(), depth));
            }
        };
        let indent = self.indent.as_ref().map_or(0, String::len).saturating_mul(depth + 1);
        let around = indent.saturating_add(self.between.len() + self.after_key.len());
        (self.pay)(around.saturating_mul(len))?;
        out.push(open);
        for i in 0..len {
            if i > 0 {
                out.push_str(&self.between);
            }
            new_line(depth + 1, out);
            item(i, out)?;
        }
        if len > 0 {
            new_line(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn quote(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// A value that is no string, list or object; also how such a value is written as a key.
fn scalar(value: &Value) -> Result<String, Error> {
    Ok(match value.kind() {
        ValueKind::None => "null".to_owned(),
        ValueKind::Bool => (if value.is_true() { "true" } else { "false" }).to_owned(),
        ValueKind::Number => match python::as_float(value) {
            None => value.to_string(),
            Some(number) if number.is_nan() => "NaN".to_owned(),
            Some(f64::INFINITY) => "Infinity".to_owned(),
            Some(f64::NEG_INFINITY) => "-Infinity".to_owned(),
            Some(number) => python::float(number),
        },
        kind => {
            let message = format!("tojson: a value of kind {kind} is not JSON serializable");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_pythons() {
        let value =
            from_json(&serde_json::json!({"b": [1, 2.5, true, null], "a": "<é'\"\\\n\u{1}>", "c": {}, "d": []}));
        let environment = minijinja::Environment::new();
        let dump = |kwargs: &[(&str, Value)]| {
            tojson(
                &environment.empty_state(),
                &value,
                Rest(Vec::new()),
                kwargs.iter().map(|(k, v)| (*k, v.clone())).collect(),
            )
            .unwrap()
        };
        assert_eq!(dump(&[]), r#"{"b": [1, 2.5, true, null], "a": "<é'\"\\\n\u0001>", "c": {}, "d": []}"#);
        assert_eq!(
            dump(&[("indent", Value::from(2)), ("sort_keys", Value::from(true))]),
            "{\n  \"a\": \"<é'\\\"\\\\\\n\\u0001>\",\n  \"b\": [\n    1,\n    2.5,\n    true,\n    null\n  ],\n  \"c\": {},\n  \"d\": []\n}"
        );
    }
}

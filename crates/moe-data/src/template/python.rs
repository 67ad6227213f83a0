//! Values as Python prints them: `str`, `repr`, `%` and what else turns a value into text.

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};

/// `repr` of a float: the shortest digits that read back as the same number, with an exponent below 1e-4 and from 1e16
/// on.
pub(super) fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    if x.is_infinite() {
        return (if x > 0.0 { "inf" } else { "-inf" }).to_owned();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = x.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// The float in a value that is one, and no integer or boolean.
pub(super) fn as_float(value: &Value) -> Option<f64> {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    is_float.then(|| f64::try_from(value.clone()).ok()).flatten()
}

/// Pays for text of so many bytes out of what a rendering may cost, before it is made. The engine by itself charges for
/// what a filter returns, when the memory is taken.
pub(super) fn pay(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel(1 + bytes as u64 / 64)
}

/// `str(value)`; nothing for an undefined value, as Jinja has it.
pub(super) fn text(state: &State, value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => {
            pay(state, text.len())?;
            Ok(text.to_owned())
        }
        None => repr(state, value),
    }
}

/// `repr(value)`.
pub(super) fn repr(state: &State, value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    write_repr(state, value, &mut out)?;
    Ok(out)
}

fn write_repr(state: &State, value: &Value, out: &mut String) -> Result<(), Error> {
    // Every value, since lists that hold one list twice are longer than the memory they take.
    pay(state, value.as_str().map_or(0, str::len))?;
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => match as_float(value) {
            Some(number) => out.push_str(&float(number)),
            None => out.push_str(&value.to_string()),
        },
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            let mut count = 0;
            for item in value.try_iter()? {
                if count > 0 {
                    out.push_str(", ");
                }
                write_repr(state, &item, out)?;
                count += 1;
            }
            if value.is_tuple() && count == 1 {
                out.push(',');
            }
            out.push(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write_repr(state, &key, out)?;
                out.push_str(": ");
                write_repr(state, &value.get_item(&key)?, out)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// A string literal as Python writes it: in single quotes unless only double quotes spare escapes.
fn quote(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == mark => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => match u32::from(c) {
                code @ ..=0xff => out.push_str(&format!("\\x{code:02x}")),
                code @ ..=0xffff => out.push_str(&format!("\\u{code:04x}")),
                code => out.push_str(&format!("\\U{code:08x}")),
            },
        }
    }
    out.push(mark);
}

/// What `str.isprintable` allows: no control, format, private or separator characters except the space.
fn is_printable(c: char) -> bool {
    let format = matches!(c, '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
        | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0001}'..='\u{e007f}');
    let private = matches!(c, '\u{e000}'..='\u{f8ff}' | '\u{f0000}'..='\u{10ffff}');
    c == ' ' || !(c.is_control() || c.is_whitespace() || format || private)
}

/// What `str.strip` removes: Unicode white space and the four separators U+001C to U+001F.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `pattern % values`: each conversion by itself, so that `%s` and `%r` print as Python prints.
pub(super) fn printf(state: &State, pattern: &str, values: &Value) -> Result<String, Error> {
    let positional: Vec<Value> = match values.is_tuple() {
        true => values.try_iter()?.collect(),
        false => vec![values.clone()],
    };
    let wrong =
        |what: &str| Error::new(ErrorKind::InvalidOperation, format!("{what} for the format string {pattern:?}"));
    let mut given = positional.into_iter();
    let mut named = false;
    let mut out = String::new();
    let mut rest = pattern;
    while let Some(percent) = rest.find('%') {
        out.push_str(&rest[..percent]);
        rest = &rest[percent + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            out.push('%');
            rest = after;
            continue;
        }
        let name = match rest.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            Some((name, after)) => {
                rest = after;
                Some(name)
            }
            None => None,
        };
        let end = rest
            .find(|c: char| c.is_ascii_alphabetic() && !"hlL".contains(c))
            .ok_or_else(|| wrong("a conversion is missing"))?;
        let (flags, conversion) = (&rest[..end], &rest[end..end + 1]);
        rest = &rest[end + 1..];
        let value = match name {
            Some(name) => {
                named = true;
                values.get_item(&Value::from(name))?
            }
            None => given.next().ok_or_else(|| wrong("not enough arguments"))?,
        };
        let (conversion, value) = match conversion {
            "s" => ("s", Value::from(text(state, &value)?)),
            "r" | "a" => ("s", Value::from(repr(state, &value)?)),
            "d" | "i" | "u" => ("d", truncated(value)),
            other => (other, value),
        };
        pay(state, widest(flags))?;
        out.push_str(&format(FormatStyle::Printf, &format!("%{flags}{conversion}"), &[value])?);
    }
    out.push_str(rest);
    if !named && values.is_tuple() && given.next().is_some() {
        return Err(wrong("not all arguments converted"));
    }
    Ok(out)
}

/// The largest number in the flags of a conversion: its width or precision.
fn widest(flags: &str) -> usize {
    let numbers = flags.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    numbers.map(|digits| digits.parse().unwrap_or(usize::MAX)).max().unwrap_or(0)
}

/// `%d` of a float drops what follows the point.
fn truncated(value: Value) -> Value {
    match as_float(&value) {
        Some(number) if number.abs() < 9e18 => Value::from(number as i64),
        _ => value,
    }
}

/// `pattern.format(values)`: replacement fields without a format of their own print as Python prints, the others by the
/// engine.
pub(super) fn str_format(state: &State, pattern: &str, values: &[Value]) -> Result<String, Error> {
    let (positional, named) = match values.split_last() {
        Some((last, first)) if last.is_kwargs() => (first, Some(last)),
        _ => (values, None),
    };
    let mut out = String::new();
    let mut automatic = 0;
    let mut rest = pattern;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..at + 1];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            out.push_str(brace);
            rest = after;
            continue;
        }
        let Some((field, after)) = rest.split_once('}').filter(|_| brace == "{") else {
            let message = format!("a single {brace:?} in the format string {pattern:?}");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        };
        rest = after;
        let (head, spec) = field.split_once(':').map_or((field, None), |(head, spec)| (head, Some(spec)));
        let (name, conversion) = head.split_once('!').map_or((head, None), |(name, kind)| (name, Some(kind)));
        let missing =
            || Error::new(ErrorKind::MissingArgument, format!("{{{field}}} of the format string {pattern:?}"));
        let value = if name.is_empty() {
            automatic += 1;
            positional.get(automatic - 1).cloned().ok_or_else(missing)?
        } else if let Ok(index) = name.parse::<usize>() {
            positional.get(index).cloned().ok_or_else(missing)?
        } else {
            let mut parts = name.split('.');
            let mut value = named.ok_or_else(missing)?.get_item(&Value::from(parts.next().unwrap_or_default()))?;
            for part in parts {
                value = value.get_attr(part)?;
            }
            if value.is_undefined() {
                return Err(missing());
            }
            value
        };
        let value = match conversion {
            Some("r" | "a") => Value::from(repr(state, &value)?),
            Some(_) => Value::from(text(state, &value)?),
            None => value,
        };
        match spec {
            None | Some("") => out.push_str(&text(state, &value)?),
            Some(spec) => {
                pay(state, widest(spec))?;
                out.push_str(&format(FormatStyle::StrFormat, &format!("{{:{spec}}}"), &[value])?);
            }
        }
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_have_pythons_digits() {
        for (number, text) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1 + 0.2, "0.30000000000000004"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (1e-4, "0.0001"),
            (1.234e-5, "1.234e-05"),
            (5e-324, "5e-324"),
            (f64::NEG_INFINITY, "-inf"),
            (f64::NAN, "nan"),
        ] {
            assert_eq!(float(number), text);
        }
    }
}

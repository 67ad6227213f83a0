//! Filters, tests and functions whose answer differs between Jinja in Python and the template engine.

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::source::{CONCAT, GENERATION, PERCENT};
use super::{json, methods, python, turns};

/// Adds them to an environment.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(methods::call);
    environment.add_filter("tojson", json::tojson);
    environment.add_filter("string", python::text);
    environment.add_filter("join", join);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("replace", replace);
    environment.add_filter("format", format);
    environment.add_filter("int", int);
    environment
        .add_filter("float", |value: &Value, default: Option<f64>| number(value).unwrap_or(default.unwrap_or(0.0)));
    environment.add_filter("center", |state: &State, value: &Value, width: Option<i64>| {
        methods::pad(state, &python::text(state, value)?, width.unwrap_or(80), " ", "center")
    });
    environment.add_filter("wordcount", |value: &str| {
        value.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty()).count()
    });
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    // It breaks lines where Python's does not.
    environment.remove_filter("pprint");
    environment.add_test("sequence", |value: &Value| {
        value.is_undefined() || matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    environment.add_test("iterable", |value: &Value| {
        value.is_undefined()
            || matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Iterable)
    });
    environment.add_function("dict", dict);
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.0));
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function(CONCAT, concat);
    environment.add_function(PERCENT, percent);
    environment.add_filter(GENERATION, turns::marked);
}

/// `a ~ b ~ …`.
fn concat(state: &State, values: Rest<Value>) -> Result<String, Error> {
    values.iter().map(|value| python::text(state, value)).collect()
}

/// `a % b`, of numbers or of a string and its arguments.
fn percent(state: &State, left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(pattern) = left.as_str() {
        return python::printf(state, pattern, right).map(Value::from);
    }
    let by_zero = || Error::new(ErrorKind::InvalidOperation, "modulo by zero");
    if left.is_integer() && right.is_integer() {
        let (left, right) = (i128::try_from(left.clone())?, i128::try_from(right.clone())?);
        let remainder = left.checked_rem(right).ok_or_else(by_zero)?;
        return Ok(Value::from(if remainder != 0 && (remainder < 0) != (right < 0) {
            remainder + right
        } else {
            remainder
        }));
    }
    let (left, right) = (f64::try_from(left.clone())?, f64::try_from(right.clone())?);
    if right == 0.0 {
        return Err(by_zero());
    }
    let remainder = left % right;
    Ok(Value::from(if remainder != 0.0 && (remainder < 0.0) != (right < 0.0) { remainder + right } else { remainder }))
}

fn format(state: &State, pattern: &str, values: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let named: Vec<(String, Value)> =
        named.args().map(|name| Ok((name.to_owned(), named.get(name)?))).collect::<Result<_, Error>>()?;
    match named.is_empty() {
        true => python::printf(state, pattern, &Value::from(Tuple::from(values.0))),
        false => python::printf(state, pattern, &Value::from_pairs(named)),
    }
}

/// What `float(value)` reads.
fn number(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some(text) => text.trim().replace('_', "").parse().ok(),
        None => f64::try_from(value.clone()).ok(),
    }
}

/// `int(value, base)`, or what `int(float(value))` gives, or the default.
fn int(value: &Value, default: Option<Value>, base: Option<u32>, kwargs: Kwargs) -> Result<Value, Error> {
    let default = default.or(kwargs.get("default")?).unwrap_or_else(|| Value::from(0));
    let base = base.or(kwargs.get("base")?).unwrap_or(10);
    kwargs.assert_all_used()?;
    if value.is_integer() {
        return Ok(value.clone());
    }
    let read = value.as_str().and_then(|text| {
        let text = text.trim().replace('_', "").to_ascii_lowercase();
        let (sign, digits) = text.split_at(usize::from(text.starts_with(['-', '+'])));
        let prefix = match base {
            16 => "0x",
            8 => "0o",
            2 => "0b",
            _ => "",
        };
        let digits = digits.strip_prefix(prefix).unwrap_or(digits);
        (2..=36).contains(&base).then(|| i64::from_str_radix(&format!("{sign}{digits}"), base).ok()).flatten()
    });
    let truncated = || number(value).filter(|number| number.abs() < 9e18).map(|number| number as i64);
    Ok(read.or_else(truncated).map_or(default, Value::from))
}

fn join(
    state: &State,
    items: &Value,
    separator: Option<&Value>,
    attribute: Option<&str>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let separator = match separator {
        Some(separator) => python::text(state, separator)?,
        None => kwargs.get::<Option<&Value>>("d")?.map_or(Ok(String::new()), |value| python::text(state, value))?,
    };
    let attribute = match attribute {
        Some(attribute) => Some(attribute),
        None => kwargs.get::<Option<&str>>("attribute")?,
    };
    kwargs.assert_all_used()?;
    if items.is_undefined() {
        return Ok(String::new());
    }
    let item_text = |mut item: Value| {
        for part in attribute.into_iter().flat_map(|path| path.split('.')) {
            item = match part.parse::<usize>() {
                Ok(index) => item.get_item_by_index(index)?,
                Err(_) => item.get_attr(part)?,
            };
        }
        // With what stands behind it.
        python::pay(state, separator.len())?;
        python::text(state, &item)
    };
    Ok(items.try_iter()?.map(item_text).collect::<Result<Vec<_>, Error>>()?.join(&separator))
}

fn length(value: &Value) -> Result<usize, Error> {
    match value.len() {
        Some(length) => Ok(length),
        None if value.is_undefined() => Ok(0),
        None if value.kind() == ValueKind::Iterable => Ok(value.try_iter()?.count()),
        None => Err(Error::new(ErrorKind::InvalidOperation, format!("a value of kind {} has no length", value.kind()))),
    }
}

fn replace(state: &State, value: &Value, old: &str, new: &str, count: Option<i64>) -> Result<String, Error> {
    let text = python::text(state, value)?;
    let count = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    python::pay(state, text.matches(old).take(count).count().saturating_mul(new.len()))?;
    Ok(text.replacen(old, new, count))
}

fn escape(state: &State, value: &Value) -> Result<String, Error> {
    let text = python::text(state, value)?;
    Ok(text
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('\'', "&#39;")
        .replace('"', "&#34;"))
}

/// `dict(…)`: of a dictionary or of pairs, and of named values.
fn dict(arguments: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let mut pairs: Vec<(Value, Value)> = Vec::new();
    let mut set = |key: Value, value: Value| match pairs.iter_mut().find(|(other, _)| *other == key) {
        Some(pair) => pair.1 = value,
        None => pairs.push((key, value)),
    };
    for argument in arguments.iter() {
        let is_map = argument.kind() == ValueKind::Map;
        for item in argument.try_iter()? {
            match is_map {
                true => set(item.clone(), argument.get_item(&item)?),
                false => set(item.get_item_by_index(0)?, item.get_item_by_index(1)?),
            }
        }
    }
    for name in named.args() {
        set(Value::from(name), named.get(name)?);
    }
    Ok(Value::from_pairs(pairs))
}

//! Methods of Python's strings, lists and dictionaries that the engine does not know.

use minijinja::value::{Kwargs, Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::python::{is_space, pay, str_format, text};

/// Answers a call of a method of a Python type; what is not here is left to the engine's own set.
pub(super) fn call(state: &mut State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let known = match value.kind() {
        ValueKind::String => on_string(state, value.as_str().unwrap_or_default(), method, arguments)?,
        ValueKind::Seq | ValueKind::Iterable => on_list(value, method, arguments)?,
        ValueKind::Map if method == "copy" => Some(value.clone()),
        _ => None,
    };
    match known {
        Some(result) => Ok(result),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments),
    }
}

/// Arguments by position or name, in the order of `names`; one that is absent or `none` is `None`.
fn bind<const N: usize>(arguments: &[Value], names: [&str; N]) -> Result<[Option<Value>; N], Error> {
    let (positional, kwargs) = match arguments.split_last() {
        Some((last, first)) if last.is_kwargs() => (first, Kwargs::try_from(last.clone())?),
        _ => (arguments, std::iter::empty::<(&str, Value)>().collect()),
    };
    if positional.len() > N {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let mut bound = [const { None }; N];
    for (i, name) in names.into_iter().enumerate() {
        let value = match positional.get(i) {
            Some(value) => Some(value.clone()),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        bound[i] = value.filter(|value| !value.is_none());
    }
    kwargs.assert_all_used()?;
    Ok(bound)
}

fn string(value: Option<Value>, name: &str) -> Result<String, Error> {
    let value = value.ok_or_else(|| Error::new(ErrorKind::MissingArgument, name.to_owned()))?;
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(Error::new(ErrorKind::InvalidOperation, format!("{name} must be a string, not {}", value.kind()))),
    }
}

fn integer(value: Option<Value>) -> Result<Option<i64>, Error> {
    value.map(i64::try_from).transpose()
}

fn missing(what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("{what} not found"))
}

fn on_string(state: &State, s: &str, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    let none = || bind(arguments, []).map(|[]| ());
    Ok(Some(match method {
        "format" => Value::from(str_format(state, s, arguments)?),
        "join" => {
            let [items] = bind(arguments, ["iterable"])?;
            let items = items.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
            let item_text = |item| {
                // With what stands behind it.
                pay(state, s.len())?;
                text(state, &item)
            };
            Value::from(items.try_iter()?.map(item_text).collect::<Result<Vec<String>, Error>>()?.join(s))
        }
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = bind(arguments, ["chars"])?;
            let chars = chars.map(|chars| string(Some(chars), "chars")).transpose()?;
            let cut = |c: char| chars.as_ref().map_or_else(|| is_space(c), |chars| chars.contains(c));
            Value::from(match method {
                "strip" => s.trim_matches(cut),
                "lstrip" => s.trim_start_matches(cut),
                _ => s.trim_end_matches(cut),
            })
        }
        "split" | "rsplit" => {
            let [sep, limit] = bind(arguments, ["sep", "maxsplit"])?;
            let sep = sep.map(|sep| string(Some(sep), "sep")).transpose()?;
            let limit = integer(limit)?.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
            list(split(s, sep.as_deref(), limit, method == "rsplit")?)
        }
        "splitlines" => {
            let [keepends] = bind(arguments, ["keepends"])?;
            list(splitlines(s, keepends.is_some_and(|keep| keep.is_true())))
        }
        "partition" | "rpartition" => {
            let [sep] = bind(arguments, ["sep"])?;
            let sep = string(sep, "sep")?;
            let parts = match (method, s.split_once(&sep), s.rsplit_once(&sep)) {
                ("partition", Some((before, after)), _) | ("rpartition", _, Some((before, after))) => {
                    [before, &sep, after]
                }
                ("partition", ..) => [s, "", ""],
                _ => ["", "", s],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "removeprefix" => {
            let [prefix] = bind(arguments, ["prefix"])?;
            Value::from(s.strip_prefix(string(prefix, "prefix")?.as_str()).unwrap_or(s))
        }
        "removesuffix" => {
            let [suffix] = bind(arguments, ["suffix"])?;
            Value::from(s.strip_suffix(string(suffix, "suffix")?.as_str()).unwrap_or(s))
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let [sub, start, end] = bind(arguments, ["sub", "start", "end"])?;
            let sub = string(sub, "sub")?;
            let (offset, part) = slice(s, integer(start)?, integer(end)?);
            if method == "count" {
                let count = if sub.is_empty() { part.chars().count() + 1 } else { part.matches(&sub).count() };
                return Ok(Some(Value::from(count)));
            }
            let found = if method.starts_with('r') { part.rfind(&sub) } else { part.find(&sub) };
            match found {
                Some(at) => Value::from(offset + part[..at].chars().count()),
                None if method.ends_with("find") => Value::from(-1),
                None => return Err(missing("substring")),
            }
        }
        "startswith" | "endswith" => {
            let [affix, start, end] = bind(arguments, ["affix", "start", "end"])?;
            let affix = affix.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
            let (_, part) = slice(s, integer(start)?, integer(end)?);
            let affixes = match affix.as_str() {
                Some(one) => vec![one.to_owned()],
                None => affix.try_iter()?.map(|one| string(Some(one), "affix")).collect::<Result<_, _>>()?,
            };
            Value::from(affixes.iter().any(|one| match method {
                "startswith" => part.starts_with(one.as_str()),
                _ => part.ends_with(one.as_str()),
            }))
        }
        "center" | "ljust" | "rjust" => {
            let [width, fill] = bind(arguments, ["width", "fillchar"])?;
            let fill = fill.map_or(Ok(" ".to_owned()), |fill| string(Some(fill), "fillchar"))?;
            Value::from(pad(state, s, integer(width)?.unwrap_or(0), &fill, method)?)
        }
        "zfill" => {
            let [width] = bind(arguments, ["width"])?;
            let (sign, digits) = s.split_at(usize::from(s.starts_with(['-', '+'])));
            let width = integer(width)?.unwrap_or(0).saturating_sub(sign.len() as i64);
            Value::from(format!("{sign}{}", pad(state, digits, width, "0", "rjust")?))
        }
        "expandtabs" => {
            let [size] = bind(arguments, ["tabsize"])?;
            let size = integer(size)?.unwrap_or(8).max(0) as usize;
            pay(state, s.matches('\t').count().saturating_mul(size))?;
            Value::from(expandtabs(s, size))
        }
        "title" => none().map(|()| Value::from(title(s)))?,
        "swapcase" => none().map(|()| {
            let swap = |c: char| -> String {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            Value::from(s.chars().map(swap).collect::<String>())
        })?,
        "casefold" => none().map(|()| Value::from(s.to_lowercase().replace('ß', "ss")))?,
        "istitle" => none().map(|()| Value::from(s.chars().any(char::is_alphabetic) && title(s) == s))?,
        "isdecimal" => none().map(|()| Value::from(!s.is_empty() && s.chars().all(is_decimal)))?,
        "isdigit" => none().map(|()| Value::from(!s.is_empty() && s.chars().all(is_digit)))?,
        "isidentifier" => none().map(|()| {
            let starts = s.chars().next().is_some_and(|c| c == '_' || c.is_alphabetic());
            Value::from(starts && s.chars().all(|c| c == '_' || c.is_alphanumeric()))
        })?,
        _ => return Ok(None),
    }))
}

fn on_list(value: &Value, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "index" => {
            let [item] = bind(arguments, ["value"])?;
            let item = item.unwrap_or_default();
            let at = value.try_iter()?.position(|other| other == item);
            Value::from(at.ok_or_else(|| missing("value"))?)
        }
        "copy" => value.try_iter()?.collect(),
        _ => return Ok(None),
    }))
}

fn list(parts: Vec<&str>) -> Value {
    parts.into_iter().map(Value::from).collect()
}

/// `s[start:end]` and how many characters stand before it.
fn slice(s: &str, start: Option<i64>, end: Option<i64>) -> (usize, &str) {
    let length = s.chars().count() as i64;
    let place = |at: i64| (if at < 0 { at + length } else { at }).clamp(0, length) as usize;
    let (start, end) = (place(start.unwrap_or(0)), place(end.unwrap_or(length)));
    let byte = |at: usize| s.char_indices().nth(at).map_or(s.len(), |(byte, _)| byte);
    (start, if start < end { &s[byte(start)..byte(end)] } else { "" })
}

/// `str.split` and, from the right, `str.rsplit`.
fn split<'a>(s: &'a str, sep: Option<&str>, limit: usize, from_right: bool) -> Result<Vec<&'a str>, Error> {
    if sep == Some("") {
        return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
    }
    let mut parts = Vec::new();
    let mut rest = match sep {
        Some(_) => s,
        None if from_right => s.trim_end_matches(is_space),
        None => s.trim_start_matches(is_space),
    };
    loop {
        let cut = match (sep, from_right) {
            _ if parts.len() >= limit => None,
            (Some(sep), false) => rest.split_once(sep),
            (Some(sep), true) => rest.rsplit_once(sep).map(|(before, after)| (after, before)),
            (None, false) => rest.split_once(is_space).map(|(one, rest)| (one, rest.trim_start_matches(is_space))),
            (None, true) => rest.rsplit_once(is_space).map(|(rest, one)| (one, rest.trim_end_matches(is_space))),
        };
        match cut {
            Some((part, remaining)) => {
                parts.push(part);
                rest = remaining;
            }
            None => {
                // White space never leaves an empty part, and what a limit leaves over keeps its other end.
                if sep.is_some() || !rest.is_empty() {
                    parts.push(rest);
                }
                break;
            }
        }
    }
    if from_right {
        parts.reverse();
    }
    Ok(parts)
}

/// `str.splitlines`: at every character Python takes for the end of a line.
fn splitlines(s: &str, keep_ends: bool) -> Vec<&str> {
    let ends = |c: char| {
        matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let mut lines = Vec::new();
    let mut rest = s;
    while let Some(at) = rest.find(ends) {
        let width =
            if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(1, char::len_utf8) };
        lines.push(&rest[..if keep_ends { at + width } else { at }]);
        rest = &rest[at + width..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// `s` filled up to `width` characters, by the method's name.
pub(super) fn pad(state: &State, s: &str, width: i64, fill: &str, method: &str) -> Result<String, Error> {
    let missing = width.saturating_sub(s.chars().count() as i64).max(0);
    pay(state, (missing as usize).saturating_mul(fill.len()))?;
    // str.center puts the odd character to the left when the width is odd.
    let left = match method {
        "ljust" => 0,
        "rjust" => missing,
        _ => missing / 2 + (missing & width & 1),
    };
    Ok(format!("{}{s}{}", fill.repeat(left as usize), fill.repeat((missing - left) as usize)))
}

fn expandtabs(s: &str, size: usize) -> String {
    let (mut out, mut column) = (String::new(), 0);
    for c in s.chars() {
        match c {
            '\t' => {
                let width = if size == 0 { 0 } else { size - column % size };
                out.extend(std::iter::repeat_n(' ', width));
                column += width;
            }
            c => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    out
}

/// `str.title`: a capital after everything that is no letter, an apostrophe included.
fn title(s: &str) -> String {
    let mut out = String::new();
    let mut inside = false;
    for c in s.chars() {
        match inside {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        inside = c.is_alphabetic();
    }
    out
}

/// Decimal digits of any script (category Nd).
fn is_decimal(c: char) -> bool {
    const ZEROS: [u32; 36] = [
        0x30, 0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66, 0xde6, 0xe50, 0xed0,
        0xf20, 0x1040, 0x1090, 0x17e0, 0x1810, 0x1946, 0x19d0, 0x1a80, 0x1a90, 0x1b50, 0x1bb0, 0x1c40, 0x1c50, 0xa620,
        0xa8d0, 0xa900, 0xa9d0, 0xa9f0, 0xaa50, 0xff10,
    ];
    ZEROS.iter().any(|zero| (*zero..*zero + 10).contains(&u32::from(c)))
}

/// Decimal digits, and those that are raised, lowered or circled.
fn is_digit(c: char) -> bool {
    is_decimal(c)
        || matches!(c, '²' | '³' | '¹' | '\u{2070}' | '\u{2074}'..='\u{2079}' | '\u{2080}'..='\u{2089}' | '\u{2460}'..='\u{2468}')
}

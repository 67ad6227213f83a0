//! The source of a template, with what the engine reads otherwise than Jinja in Python written in words it reads alike.
//!
//! `a ~ b` and `a % b` become calls, because the engine joins values by its own text of them and knows no `%` of
//! strings. The tags `{% generation %}`, by which transformers marks what the assistant writes, become a filter block
//! that marks its text.

/// The function `a ~ b` becomes.
pub(super) const CONCAT: &str = "__concat";
/// The function `a % b` becomes.
pub(super) const PERCENT: &str = "__percent";
/// The filter `{% generation %}` becomes.
pub(super) const GENERATION: &str = "__generation";

/// A template in the engine's words, line by line where it was.
pub(super) struct Prepared {
    pub source: String,
    /// Whether the template marks what the assistant writes.
    pub marks_generation: bool,
}

/// Rewrites a template; text, comments and raw blocks stay as they are.
pub(super) fn prepare(source: &str) -> Prepared {
    // Jinja reads every end of a line as a line feed.
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut marks_generation = false;
    let mut rest = source.as_str();
    while let Some(open) = ["{{", "{%", "{#"].iter().filter_map(|open| rest.find(open)).min() {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        let end = match &tag[..2] {
            "{#" => tag.find("#}").map(|at| at + 2),
            "{%" => tag_end(tag, "%}"),
            _ => tag_end(tag, "}}"),
        };
        let Some(end) = end else {
            out.push_str(tag);
            rest = "";
            break;
        };
        let (tag, after) = tag.split_at(end);
        rest = after;
        if tag.starts_with("{#") {
            out.push_str(tag);
            continue;
        }
        let inner = &tag[2..tag.len() - 2];
        let (left, inner) = inner.split_at(usize::from(inner.starts_with(['-', '+'])));
        let (inner, right) = inner.split_at(inner.len() - usize::from(inner.ends_with(['-', '+'])));
        let is_block = tag.starts_with("{%");
        let rewritten = match inner.trim() {
            "generation" if is_block => {
                marks_generation = true;
                inner.replace("generation", &format!("filter {GENERATION}"))
            }
            "endgeneration" if is_block => inner.replace("endgeneration", "endfilter"),
            _ => expression(&tokens(inner), is_block),
        };
        out.extend([&tag[..2], left, &rewritten, right, &tag[tag.len() - 2..]]);
        if is_block && inner.trim() == "raw" {
            let end = end_of_raw(rest);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
        }
    }
    out.push_str(rest);
    Prepared { source: out, marks_generation }
}

/// Length of a tag up to and with `close`, which in a string does not count.
fn tag_end(tag: &str, close: &str) -> Option<usize> {
    let bytes = tag.as_bytes();
    let (mut at, mut quote, mut braces) = (2, None, 0usize);
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(mark), byte) if byte == mark => quote = None,
            (Some(_), _) => {}
            (None, mark @ (b'"' | b'\'')) => quote = Some(mark),
            // A dictionary may end right before the tag does.
            (None, b'{') => braces += 1,
            (None, b'}') if braces > 0 => braces -= 1,
            (None, _) if bytes[at..].starts_with(close.as_bytes()) => return Some(at + 2),
            (None, _) => {}
        }
        at += 1;
    }
    None
}

/// Where the tag that ends a raw block begins.
fn end_of_raw(rest: &str) -> usize {
    let mut from = 0;
    while let Some(open) = rest[from..].find("{%") {
        let at = from + open;
        let inner = rest[at + 2..].trim_start_matches(['-', '+']).trim_start();
        if inner.starts_with("endraw") {
            return at;
        }
        from = at + 2;
    }
    rest.len()
}

/// A piece of an expression: a word, number, string, operator or white space, or what stands in brackets.
enum Token<'a> {
    Space(&'a str),
    Word(&'a str),
    Operator(&'a str),
    Group(&'a str, Vec<Token<'a>>, &'a str),
}

fn tokens(source: &str) -> Vec<Token<'_>> {
    let mut rest = source;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let before = rest.len();
        group(&mut rest, &mut found);
        if rest.len() == before {
            // A bracket that nothing opened: the engine reports it.
            found.push(Token::Word(&rest[..1]));
            rest = &rest[1..];
        }
    }
    found
}

/// Reads pieces up to the end or to a closing bracket, which is left.
fn group<'a>(rest: &mut &'a str, found: &mut Vec<Token<'a>>) {
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let length = match first {
            ')' | ']' | '}' => return,
            '(' | '[' | '{' => {
                let open = &rest[..1];
                *rest = &rest[1..];
                let mut inner = Vec::new();
                group(rest, &mut inner);
                let close = &rest[..rest.len().min(1)];
                *rest = &rest[close.len()..];
                found.push(Token::Group(open, inner, close));
                continue;
            }
            '"' | '\'' => string_length(rest, first),
            c if c.is_whitespace() => rest.find(|c: char| !c.is_whitespace()).unwrap_or(rest.len()),
            '0'..='9' => number_length(rest),
            c if is_word(c) => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
            c => ["**", "//", "==", "!=", "<=", ">="]
                .iter()
                .find(|two| rest.starts_with(**two))
                .map_or(c.len_utf8(), |two| two.len()),
        };
        let (piece, after) = rest.split_at(length);
        *rest = after;
        found.push(match first {
            c if c.is_whitespace() => Token::Space(piece),
            c if is_word(c) || matches!(c, '"' | '\'') => Token::Word(piece),
            _ => Token::Operator(piece),
        });
    }
}

fn string_length(rest: &str, mark: char) -> usize {
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            c if c == mark => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// A number with its point and exponent: the sign of an exponent is no operator.
fn number_length(rest: &str) -> usize {
    let bytes = rest.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let exponent = at > 0
            && matches!(bytes[at], b'-' | b'+')
            && matches!(bytes[at - 1], b'e' | b'E')
            && !rest.starts_with("0x");
        let point = bytes[at] == b'.' && bytes.get(at + 1).is_some_and(u8::is_ascii_digit);
        if !(bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_' || exponent || point) {
            break;
        }
        at += 1;
    }
    at
}

/// An expression with its `~` and `%` as calls. Jinja binds `+` and `-` loosest, then `~`, then `*`, `/`, `//` and `%`.
fn expression(tokens: &[Token<'_>], is_block: bool) -> String {
    let mut out = String::new();
    let mut start = 0;
    let mut first_word = is_block;
    let mut previous: Option<&Token<'_>> = None;
    for (i, token) in tokens.iter().enumerate() {
        let separates = match token {
            Token::Space(_) | Token::Group(..) => false,
            // The name of a statement; `not` belongs to the test after `is`.
            Token::Word(word) => {
                let name = std::mem::take(&mut first_word);
                name || (matches!(*word, "and" | "or" | "in" | "if" | "else" | "recursive")
                    || (*word == "not" && !matches!(previous, Some(Token::Word("is")))))
            }
            Token::Operator(operator) => match *operator {
                "+" | "-" => is_operand(previous),
                "==" | "!=" | "<" | ">" | "<=" | ">=" | "," | ":" | "=" => true,
                _ => false,
            },
        };
        if separates {
            out.push_str(&concatenation(&tokens[start..i]));
            out.push_str(&verbatim(token));
            start = i + 1;
        }
        if !matches!(token, Token::Space(_)) {
            previous = Some(token);
        }
    }
    out.push_str(&concatenation(&tokens[start..]));
    out
}

fn concatenation(tokens: &[Token<'_>]) -> String {
    let parts: Vec<&[Token<'_>]> = tokens.split(|token| matches!(token, Token::Operator("~"))).collect();
    match parts.as_slice() {
        [one] => product(one),
        parts => {
            let parts: Vec<String> = parts.iter().map(|part| product(part)).collect();
            padded(CONCAT, &parts)
        }
    }
}

fn product(tokens: &[Token<'_>]) -> String {
    let is_factor = |token: &Token<'_>| matches!(token, Token::Operator("*" | "/" | "//" | "%"));
    let mut out = String::new();
    let mut start = 0;
    let mut operator: Option<&str> = None;
    for end in (0..tokens.len()).filter(|i| is_factor(&tokens[*i])).chain([tokens.len()]) {
        let operand: String = tokens[start..end].iter().map(verbatim).collect();
        out = match operator {
            None => operand,
            Some("%") => padded(PERCENT, &[out, operand]),
            Some(operator) => out + operator + &operand,
        };
        operator = match tokens.get(end) {
            Some(Token::Operator(operator)) => Some(operator),
            _ => None,
        };
        start = end + 1;
    }
    out
}

/// A call, with the white space around its arguments kept, since it separates words and holds line breaks.
fn padded(function: &str, arguments: &[String]) -> String {
    format!(" {function}({})", arguments.join(","))
}

fn verbatim(token: &Token<'_>) -> String {
    match token {
        Token::Word(text) if text.starts_with(['"', '\'']) && text.contains("\\U") => with_long_escapes(text),
        Token::Space(text) | Token::Word(text) | Token::Operator(text) => (*text).to_owned(),
        Token::Group(open, inner, close) => format!("{open}{}{close}", expression(inner, false)),
    }
}

/// A string with `\UXXXXXXXX` written as the character it stands for, which the engine does not read.
fn with_long_escapes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let escape = &rest[at..];
        let digits = escape.strip_prefix("\\U").and_then(|after| after.get(..8));
        let code = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()).and_then(char::from_u32);
        // A character of ASCII has an escape of its own wherever it needs one.
        match code.filter(|code| !code.is_ascii()) {
            Some(code) => {
                out.push(code);
                rest = &escape[10..];
            }
            None => {
                let length = 1 + escape[1..].chars().next().map_or(0, char::len_utf8);
                out.push_str(&escape[..length]);
                rest = &escape[length..];
            }
        }
    }
    out + rest
}

/// Whether a `-` after it is a difference and no sign.
fn is_operand(token: Option<&Token<'_>>) -> bool {
    match token {
        Some(Token::Group(..)) => true,
        Some(Token::Word(word)) => {
            !matches!(*word, "and" | "or" | "not" | "in" | "if" | "elif" | "else" | "is" | "set" | "print" | "for")
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_become_calls_by_their_precedence() {
        for (source, expected) in [
            ("{{ a ~ b }}", "{{  __concat( a , b ) }}"),
            ("{{ a+b ~ c*d %e }}", "{{ a+ __concat(b , __percent( c*d ,e )) }}"),
            ("{{ f(x ~ 1)[i % 2] }}", "{{ f( __concat(x , 1))[ __percent(i , 2)] }}"),
            ("{% if a % 2 == 0 and b is not none %}", "{% if __percent( a , 2 )== 0 and b is not none %}"),
            ("{%- set x = {'a': y ~ z}.a -%}", "{%- set x = {'a': __concat( y , z)}.a -%}"),
            ("{{ '~ %' ~ -1 }}{# a ~ b #}a ~ b", "{{  __concat( '~ %' , -1 ) }}{# a ~ b #}a ~ b"),
            ("{% raw %}{{ a ~ b }}{% endraw %}{{ {'a': {}}}}", "{% raw %}{{ a ~ b }}{% endraw %}{{ {'a': {}}}}"),
            ("{{ 1e-3 ~ '}}' }}", "{{  __concat( 1e-3 , '}}' ) }}"),
        ] {
            let found = prepare(source).source;
            // White space between pieces is free.
            let plain = |text: &str| text.replace(' ', "");
            assert_eq!(plain(&found), plain(expected), "{source}: {found}");
        }
    }

    #[test]
    fn the_assistants_marks_are_seen_outside_strings_only() {
        let marked = prepare("{%- generation -%}x{%+ endgeneration %}");
        assert_eq!(marked.source, "{%- filter __generation -%}x{%+ endfilter %}");
        assert!(marked.marks_generation);
        let quoted = prepare("{{ '{% generation %}' }}");
        assert_eq!((quoted.source.as_str(), quoted.marks_generation), ("{{ '{% generation %}' }}", false));
    }
}

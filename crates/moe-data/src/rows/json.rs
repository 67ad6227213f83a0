//! JSON values of a file one at a time: one a line, an array of them, or written over several lines.

use std::io::BufRead;

use serde::de::IgnoredAny;

use crate::Error;

/// A value's text and the line it begins on, from 1; or why there is none, and where.
pub(super) type Found = Result<(usize, String), (usize, Error)>;

/// Reads values of a JSON file. The file is read only as far as values are asked for.
pub(super) struct JsonValues<R> {
    reader: R,
    line: usize,
    layout: Layout,
    /// A line that was read while looking for the end of the value before it.
    ahead: Option<(usize, String)>,
}

enum Layout {
    /// Nothing was read yet.
    Unknown,
    /// A value a line, or over several lines where `pretty`.
    Lines { pretty: bool },
    /// The elements of one array.
    Array,
    /// The array has ended.
    Ended,
}

impl<R: BufRead> JsonValues<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader, line: 0, layout: Layout::Unknown, ahead: None }
    }

    /// The next line that is not blank, without a byte order mark and the white space around it, and whether it is
    /// indented.
    fn line(&mut self) -> Result<Option<(usize, String)>, (usize, Error)> {
        if let Some(ahead) = self.ahead.take() {
            return Ok(Some(ahead));
        }
        loop {
            let mut bytes = Vec::new();
            let read = self.reader.read_until(b'\n', &mut bytes);
            if read.map_err(|error| (0, Error::Unreadable(error)))? == 0 {
                return Ok(None);
            }
            self.line += 1;
            let text = String::from_utf8(bytes)
                .map_err(|error| (self.line, Error::Utf8 { valid_up_to: error.utf8_error().valid_up_to() }))?;
            let text = if self.line == 1 { text.trim_start_matches('\u{feff}') } else { &text };
            if !text.trim().is_empty() {
                return Ok(Some((self.line, text.trim_end().to_owned())));
            }
        }
    }

    /// The text of a value that begins with `text` on line `number`: more lines as long as it is unfinished. A line
    /// that is an object by itself and is not indented is the next value, so that one broken line costs no more than
    /// itself.
    fn gather(&mut self, number: usize, mut text: String) -> Found {
        loop {
            match serde_json::from_str::<IgnoredAny>(&text) {
                Err(error) if error.is_eof() => {}
                _ => return Ok((number, text)),
            }
            match self.line()? {
                None => return Ok((number, text)),
                Some((next, line)) => {
                    if line.starts_with('{') && serde_json::from_str::<IgnoredAny>(&line).is_ok() {
                        self.ahead = Some((next, line));
                        return Ok((number, text));
                    }
                    text.push('\n');
                    text.push_str(&line);
                    // The same unfinished value is parsed again and again: only at what may be its end.
                    while !matches!(text.as_bytes().last(), Some(b'}' | b']')) {
                        match self.line()? {
                            None => return Ok((number, text)),
                            Some((_, line)) => {
                                text.push('\n');
                                text.push_str(&line);
                            }
                        }
                    }
                }
            }
        }
    }

    /// The next element of an array.
    fn element(&mut self) -> Option<Found> {
        let mut text: Vec<u8> = Vec::new();
        let (mut start, mut depth, mut quoted, mut escaped) = (self.line, 0usize, false, false);
        loop {
            let byte = match self.byte() {
                Err(error) => return Some(Err((0, Error::Unreadable(error)))),
                Ok(None) => {
                    self.layout = Layout::Ended;
                    let ended = serde_json::from_str::<IgnoredAny>("[");
                    return ended.err().map(|error| Err((start.max(1), Error::Json(error))));
                }
                Ok(Some(byte)) => byte,
            };
            if quoted {
                quoted = escaped || byte != b'"';
                escaped = byte == b'\\' && !escaped;
            } else {
                match byte {
                    b'"' => quoted = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' if depth > 0 => depth -= 1,
                    b',' | b']' if depth == 0 => {
                        let is_blank = text.iter().all(u8::is_ascii_whitespace);
                        if byte == b']' {
                            self.layout = Layout::Ended;
                            if is_blank {
                                return None;
                            }
                        }
                        return Some(match String::from_utf8(text) {
                            Ok(text) => Ok((start, text.trim().to_owned())),
                            Err(error) => Err((start, Error::Utf8 { valid_up_to: error.utf8_error().valid_up_to() })),
                        });
                    }
                    _ => {}
                }
            }
            if text.iter().all(u8::is_ascii_whitespace) {
                start = self.line;
            }
            text.push(byte);
        }
    }

    fn byte(&mut self) -> std::io::Result<Option<u8>> {
        let first = loop {
            match self.reader.fill_buf() {
                Ok(buffer) => break buffer.first().copied(),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        if let Some(byte) = first {
            self.reader.consume(1);
            self.line += usize::from(byte == b'\n');
        }
        Ok(first)
    }

    /// Looks at the beginning of the file without taking more than a byte order mark and blanks.
    fn begins_with_array(&mut self) -> std::io::Result<bool> {
        loop {
            let buffer = self.reader.fill_buf()?;
            let Some(&first) = buffer.first() else { return Ok(false) };
            if self.line == 0 && buffer.starts_with("\u{feff}".as_bytes()) {
                self.reader.consume(3);
                continue;
            }
            if !first.is_ascii_whitespace() {
                return Ok(first == b'[');
            }
            self.byte()?;
        }
    }
}

impl<R: BufRead> Iterator for JsonValues<R> {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        if let Layout::Unknown = self.layout {
            match self.begins_with_array() {
                Err(error) => {
                    self.layout = Layout::Ended;
                    return Some(Err((0, Error::Unreadable(error))));
                }
                Ok(true) => {
                    self.reader.consume(1);
                    self.line += 1;
                    self.layout = Layout::Array;
                }
                Ok(false) => self.layout = Layout::Lines { pretty: true },
            }
        }
        match self.layout {
            Layout::Array => self.element(),
            Layout::Lines { pretty } => {
                let (number, text) = match self.line() {
                    Ok(None) => return None,
                    Ok(Some(found)) => found,
                    Err(error) => return Some(Err(error)),
                };
                let found = if pretty { self.gather(number, text) } else { Ok((number, text)) };
                if let Ok((_, text)) = &found {
                    // Where the first value is one line, every value is.
                    self.layout = Layout::Lines { pretty: pretty && text.contains('\n') };
                }
                Some(found.map(|(number, text)| (number, text.trim().to_owned())))
            }
            Layout::Unknown | Layout::Ended => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(text: &str) -> Vec<(usize, String)> {
        JsonValues::new(text.as_bytes())
            .map(|found| found.unwrap_or_else(|(line, error)| (line, format!("! {error}"))))
            .collect()
    }

    fn pairs(expected: &[(usize, &str)]) -> Vec<(usize, String)> {
        expected.iter().map(|(line, text)| (*line, (*text).to_owned())).collect()
    }

    #[test]
    fn the_same_rows_are_found_however_they_are_laid_out() {
        let expected = pairs(&[(1, r#"{"a":1}"#), (2, r#"{"b":"],["}"#)]);
        for text in [
            "{\"a\":1}\n{\"b\":\"],[\"}\n",
            "\u{feff}{\"a\":1}\r\n{\"b\":\"],[\"}\r\n",
            "[{\"a\":1},\n{\"b\":\"],[\"}]",
            "\u{feff}[{\"a\":1}\r\n,{\"b\":\"],[\"}\r\n]\r\n",
            "{\"a\":1}\n  {\"b\":\"],[\"}",
        ] {
            assert_eq!(values(text), expected, "{text:?}");
        }
        assert_eq!(values("{\"a\":1}\n\n \n{\"b\":2}"), pairs(&[(1, r#"{"a":1}"#), (4, r#"{"b":2}"#)]));
        assert_eq!(
            values("\n{\n  \"a\": [\n    {\"b\": 1}\n  ]\n}\n{\n\"c\": 2}\n{\"d\": 3}\n"),
            pairs(&[(2, "{\n  \"a\": [\n    {\"b\": 1}\n  ]\n}"), (7, "{\n\"c\": 2}"), (9, "{\"d\": 3}")])
        );
        assert_eq!(
            values("\n [\n  {\n \"a\": \"\\\"]\"\n },\n  [1, 2], 3\n]\n"),
            pairs(&[(3, "{\n \"a\": \"\\\"]\"\n }"), (6, "[1, 2]"), (6, "3")])
        );
        assert_eq!(values(""), []);
        assert_eq!(values(" \n"), []);
        assert_eq!(values("[]"), []);
    }

    #[test]
    fn a_broken_line_costs_no_more_than_itself() {
        let rows = "{\"a\":1}\n{\"b\": \n{oops}\n{\"c\":3}";
        assert_eq!(values(rows), pairs(&[(1, "{\"a\":1}"), (2, "{\"b\":"), (3, "{oops}"), (4, "{\"c\":3}")]));
        // Even where the first line is the broken one.
        assert_eq!(
            values("{\"b\": \n{\"c\":3}\n{\"d\":4}"),
            pairs(&[(1, "{\"b\":"), (2, "{\"c\":3}"), (3, "{\"d\":4}")])
        );
        let broken = values("[{\"a\":1},\n{\"b\":");
        assert_eq!(broken[0], (1, "{\"a\":1}".to_owned()));
        assert_eq!(broken[1], (2, "! not valid JSON: EOF while parsing a list at line 1 column 1".to_owned()));
        let bytes: Vec<_> = JsonValues::new(&b"\xef\xbb\xbf{}\n\xff\n{}"[..]).map(|found| found.is_ok()).collect();
        assert_eq!(bytes, [true, false, true]);
    }
}

//! Lines of comments that run off the screen, as lines that do not.

/// The text of a source file with every comment of words within `columns`: what does not fit goes to the beginning of
/// the next line, where that belongs to the same paragraph. Code in documentation, tables and addresses stay as they
/// are.
pub fn wrapped(text: &str, columns: usize) -> String {
    let mut waiting: Vec<String> = text.split('\n').rev().map(str::to_owned).collect();
    let mut lines = Vec::with_capacity(waiting.len());
    let mut in_code = false;
    while let Some(line) = waiting.pop() {
        let Some(comment) = Comment::of(&line) else {
            // An empty line of a comment ends no code.
            in_code &= matches!(line.trim(), "///" | "//!");
            lines.push(line);
            continue;
        };
        if comment.body.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        let stays = in_code || comment.is_table() || line.chars().count() <= columns;
        let Some((first, rest)) = (if stays { None } else { comment.split(columns) }) else {
            lines.push(line);
            continue;
        };
        let indent = " ".repeat(comment.indent());
        let joined = match waiting.last().and_then(|next| Comment::of(next)) {
            Some(next) if next.continues(&comment) => {
                let text = next.body.trim_start().to_owned();
                waiting.pop();
                format!("{rest} {text}")
            }
            _ => rest,
        };
        waiting.push(format!("{}{indent}{joined}", comment.prefix));
        lines.push(first);
    }
    lines.join("\n")
}

/// A line that is nothing but a comment.
struct Comment<'a> {
    /// Indentation, marker and the space after it.
    prefix: &'a str,
    /// The rest, which may begin with spaces of its own.
    body: &'a str,
}

impl<'a> Comment<'a> {
    fn of(line: &'a str) -> Option<Self> {
        let start = line.len() - line.trim_start().len();
        let marker = ["//!", "///", "//"].into_iter().find(|marker| line[start..].starts_with(marker))?;
        let end = start + marker.len() + 1;
        let spaced = line[start + marker.len()..].starts_with(' ');
        spaced.then(|| Self { prefix: &line[..end], body: &line[end..] })
    }

    fn is_table(&self) -> bool {
        self.body.trim_start().starts_with('|')
    }

    /// Columns before the text of the lines that follow in the same paragraph or item of a list.
    fn indent(&self) -> usize {
        let spaces = self.body.len() - self.body.trim_start().len();
        spaces + item(self.body.trim_start())
    }

    /// Whether this line goes on with the paragraph of the one before it.
    fn continues(&self, before: &Comment<'_>) -> bool {
        let text = self.body.trim_start();
        let spaces = self.body.len() - text.len();
        let link = text.starts_with('[') && !text.starts_with("[`");
        let begins = item(text) > 0 || text.starts_with(['|', '#']) || text.starts_with("```") || link;
        self.prefix == before.prefix && !text.is_empty() && !begins && spaces == before.indent()
    }

    /// The line within `columns`, and what is left of the text.
    fn split(&self, columns: usize) -> Option<(String, String)> {
        let indent = self.indent();
        let (head, text) = self.body.split_at(indent);
        let words: Vec<&str> = text.split(' ').collect();
        let mut width = self.prefix.chars().count() + head.chars().count();
        let mut fits = 0;
        for (number, word) in words.iter().enumerate() {
            width += word.chars().count() + usize::from(number > 0);
            if width > columns {
                break;
            }
            fits = number + 1;
        }
        // A line that begins like an item of a list would be one.
        while fits > 1 && words.get(fits).is_some_and(|word| item(&format!("{word} ")) > 0 || word.starts_with('#')) {
            fits -= 1;
        }
        let whole = fits == 0 || fits == words.len();
        (!whole).then(|| (format!("{}{head}{}", self.prefix, words[..fits].join(" ")), words[fits..].join(" ")))
    }
}

/// Columns of the mark of an item of a list; 0 for other text.
fn item(text: &str) -> usize {
    if ["- ", "* ", "+ "].iter().any(|mark| text.starts_with(mark)) {
        return 2;
    }
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    if digits > 0 && text[digits..].starts_with(". ") { digits + 2 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_begins_the_next_line() {
        let text = "    /// one two three four five\n    /// six\n    ///\n    /// seven\nlet one_two_three_four_five_six = 1;";
        let expected = "    /// one two three\n    /// four five six\n    ///\n    /// seven\nlet one_two_three_four_five_six = 1;";
        assert_eq!(wrapped(text, 22), expected);
    }

    #[test]
    fn items_of_lists_keep_their_indentation() {
        let text = "//! - one two three four five six\n//! - seven\n//! 1. one two three four five six";
        let expected =
            "//! - one two three\n//!   four five six\n//! - seven\n//! 1. one two three\n//!    four five six";
        assert_eq!(wrapped(text, 20), expected);
    }

    #[test]
    fn code_tables_and_addresses_stay() {
        let text = "/// ```\n/// use a;\n///\n/// let a = one(two, three, four);\n/// ```\n/// | one | two | three | four |\n// https://a.b/cccccccccccccccccccccc";
        assert_eq!(wrapped(text, 20), text);
    }
}

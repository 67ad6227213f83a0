//! How text reads: no documentation of one word, no line that runs off the screen, and no message that shows a person
//! a value as Rust's debugging does.

mod wrap;

use std::fs;
use std::path::Path;

use crate::book::files_below;
use crate::{Result, at, root};

/// Columns of a line of comment or of a page, at most.
const COLUMNS: usize = 120;
/// Folders whose files are read.
const FOLDERS: [&str; 5] = ["crates", "examples", "benches", "xtask", "docs"];
/// Names of folders that hold no text of ours.
const NOT_OURS: [&str; 2] = ["fixtures", "target"];

/// Names by which values go that have words for people: enums, errors, settings. Lists of numbers have none.
const WITH_WORDS: [&str; 24] = [
    "biases",
    "budget",
    "coding",
    "compression",
    "denominator",
    "error",
    "fold",
    "format",
    "granularity",
    "kind",
    "layout",
    "map",
    "matrix",
    "method",
    "norm",
    "other",
    "part",
    "pool",
    "role",
    "routing",
    "scope",
    "self",
    "site",
    "up",
];

/// Lists every documentation comment of one word, every line of comment or page that is too long, and every message of
/// a crate that shows a value with words as debugging does; with `write`, wraps the comments first.
pub fn run(write: bool) -> Result<()> {
    let root = root();
    let mut files = vec![root.join("README.md")];
    for folder in FOLDERS {
        files_below(&root.join(folder), "rs", &mut files)?;
        files_below(&root.join(folder), "md", &mut files)?;
    }
    files.retain(|file| !file.components().any(|part| NOT_OURS.iter().any(|name| part.as_os_str() == *name)));
    let mut faults = Vec::new();
    for file in &files {
        let mut text = fs::read_to_string(file).map_err(at(file))?;
        if write && file.extension().is_some_and(|extension| extension == "rs") {
            let wrapped = wrap::wrapped(&text, COLUMNS);
            if wrapped != text {
                fs::write(file, &wrapped).map_err(at(file))?;
                text = wrapped;
            }
        }
        faults.extend(faults_of(file.strip_prefix(&root).unwrap_or(file), &text));
    }
    match faults.is_empty() {
        true => println!("{} files of sentences within {COLUMNS} columns", files.len()),
        false => {
            let advice = "`cargo xtask prose --write` wraps comments";
            return Err(format!("{} lines to mend; {advice}\n  {}", faults.len(), faults.join("\n  ")).into());
        }
    }
    Ok(())
}

fn faults_of(file: &Path, text: &str) -> Vec<String> {
    let is_page = file.extension().is_some_and(|extension| extension == "md");
    let (mut in_code, mut after_documentation) = (false, false);
    let mut in_library = is_library(file);
    let mut faults = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let trimmed = line.trim_start();
        in_library &= line != "#[cfg(test)]";
        if in_library && let Some(name) = shown_as_debugged(trimmed) {
            faults.push(format!("{}:{}: `{name}` is shown as debugging shows it", file.display(), number + 1));
        }
        let fence = if is_page { trimmed } else { words_of_comment(trimmed).unwrap_or_default() };
        if fence.starts_with("```") {
            in_code = !in_code;
        }
        // A row of a table cannot be wrapped, and code is what it is.
        let wraps = !in_code && if is_page { !trimmed.starts_with('|') } else { is_comment(trimmed) };
        let columns = line.chars().count();
        if wraps && columns > COLUMNS {
            faults.push(format!("{}:{}: {columns} columns, at most {COLUMNS}", file.display(), number + 1));
        }
        // The last word of a sentence may stand alone in its line.
        if !is_page && !after_documentation && is_one_word(trimmed) {
            faults.push(format!("{}:{}: `{trimmed}` is no sentence", file.display(), number + 1));
        }
        after_documentation = trimmed.starts_with("///");
    }
    faults
}

/// Whether a file is part of a crate that people use, rather than of its tests.
fn is_library(file: &Path) -> bool {
    let parts: Vec<_> = file.iter().filter_map(|part| part.to_str()).collect();
    matches!(parts[..], ["crates", _, "src", ..]) && !parts.iter().any(|part| *part == "tests" || *part == "tests.rs")
}

/// What a line formats with `:?` that has words of its own. What stops a program that has a bug may show anything.
fn shown_as_debugged(line: &str) -> Option<&str> {
    if line.starts_with("//") || ["assert", "panic!", "unreachable!", ".expect("].iter().any(|word| line.contains(word))
    {
        return None;
    }
    let inline = line.match_indices(":?}").filter_map(|(end, _)| {
        let name = &line[line[..end].rfind('{')? + 1..end];
        WITH_WORDS.contains(&name).then_some(name)
    });
    let positional = line.split_once("{:?}").into_iter().flat_map(|(_, rest)| {
        rest.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.')).filter_map(|argument| {
            let (of, field) = argument.rsplit_once('.')?;
            (!of.is_empty() && WITH_WORDS.contains(&field)).then_some(field)
        })
    });
    inline.chain(positional).next()
}

/// Whether a line is a comment of words, rather than a row of a table in one or an address.
fn is_comment(line: &str) -> bool {
    words_of_comment(line).is_some_and(|text| !text.starts_with('|') && text.contains(' '))
}

/// What a line of comment says.
fn words_of_comment(line: &str) -> Option<&str> {
    line.strip_prefix("//").map(|text| text.trim_start_matches(['/', '!']).trim_start())
}

/// Whether a line documents something by a single word.
fn is_one_word(line: &str) -> bool {
    let text = line.strip_prefix("/// ").and_then(|text| text.strip_suffix('.'));
    text.is_some_and(|word| !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || c == '_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(name: &str, text: &str) -> Vec<String> {
        faults_of(Path::new(name), text)
    }

    #[test]
    fn a_single_word_is_no_documentation() {
        assert_eq!(
            faults("a.rs", "    /// Which.\n    which: u8,\n    /// Which of them.\n"),
            ["a.rs:1: `/// Which.` is no sentence"]
        );
        assert!(faults("a.rs", "// Which.\n/// `name`.\n").is_empty());
    }

    #[test]
    fn messages_show_words_and_no_debugging() {
        let of = |line: &str| faults("crates/moe/src/a.rs", line).len();
        assert_eq!(of("refuse(format!(\"{part:?} of expert {expert}\"))"), 1);
        assert_eq!(of("format!(\"found {:?}\", self.granularity)"), 1);
        assert_eq!(of("format!(\"{part} of shape {:?}, {layers:?}\", info.shape)"), 0);
        assert_eq!(
            of("unreachable!(\"{other:?}\")\n// {part:?}\n#[cfg(test)]\nmod tests { format!(\"{part:?}\") }"),
            0
        );
        assert_eq!(faults("crates/moe/tests/a.rs", "format!(\"{part:?}\")").len(), 0);
    }

    #[test]
    fn long_lines_of_text_are_faults_and_long_rows_and_code_are_not() {
        let long = "word ".repeat(30);
        assert_eq!(faults("a.rs", &format!("//! {long}\n")).len(), 1);
        assert_eq!(faults("a.md", &format!("{long}\n")).len(), 1);
        assert!(faults("a.rs", &format!("let a = \"{long}\";\n//! | {long} |\n")).is_empty());
        assert!(faults("a.md", &format!("| {long} |\n```\n{long}\n```\n")).is_empty());
        assert_eq!(faults("a.rs", &format!("/// ```\n/// {long}\n/// ```\n/// {long}\n")).len(), 1);
    }
}

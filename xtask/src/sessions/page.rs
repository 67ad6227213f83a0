//! A page with sessions in a terminal: blocks of `console`, in which a line that begins with `$ ` is a command, with
//! the lines that its `\` or its quotes go on in, and what follows is what it prints.

use std::fmt;

/// A page.
pub struct Page {
    parts: Vec<Part>,
}

/// A part of a page.
enum Part {
    /// Lines that stay, each with its end.
    Text(String),
    /// A command and what it prints.
    Command(Session),
}

/// A command and what it prints.
pub struct Session {
    /// The command, perhaps of several lines.
    pub command: String,
    /// What it prints, with the end of its last line.
    pub printed: String,
}

impl Page {
    /// Reads a page.
    ///
    /// # Errors
    /// A block of `console` that does not end, or that has lines before its first command.
    pub fn read(text: &str) -> Result<Self, String> {
        let mut parts: Vec<Part> = Vec::new();
        let mut inside = false;
        let mut lines = text.split_inclusive('\n');
        while let Some(line) = lines.next() {
            let bare = line.trim_end();
            if inside && let Some(first) = bare.strip_prefix("$ ") {
                let mut command = first.to_string();
                while goes_on(&command) {
                    let more = lines.next().ok_or_else(|| format!("`{first}` does not end"))?;
                    command = format!("{command}\n{}", more.trim_end());
                }
                parts.push(Part::Command(Session { command, printed: String::new() }));
                continue;
            }
            let fence = bare.starts_with("```");
            inside = if fence { !inside && bare == "```console" } else { inside };
            match parts.last_mut() {
                Some(Part::Command(session)) if !fence => session.printed.push_str(line),
                _ if inside && !fence => return Err(format!("`{bare}`: expected a command, `$ …`, first")),
                Some(Part::Text(text)) => text.push_str(line),
                _ => parts.push(Part::Text(line.to_string())),
            }
        }
        match inside {
            true => Err("a block of console does not end".into()),
            false => Ok(Self { parts }),
        }
    }

    /// The commands, in order.
    pub fn commands_mut(&mut self) -> impl Iterator<Item = &mut Session> {
        self.parts.iter_mut().filter_map(|part| match part {
            Part::Command(session) => Some(session),
            Part::Text(_) => None,
        })
    }
}

impl fmt::Display for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in &self.parts {
            match part {
                Part::Text(text) => f.write_str(text)?,
                Part::Command(Session { command, printed }) => write!(f, "$ {command}\n{printed}")?,
            }
        }
        Ok(())
    }
}

/// Whether a shell would wait for another line.
fn goes_on(command: &str) -> bool {
    command.ends_with('\\') || command.matches('\'').count() % 2 == 1
}

/// Whether two outputs say the same apart from numbers, digests, and the space that numbers take.
pub fn alike(first: &str, second: &str) -> bool {
    masked(first) == masked(second)
}

/// Text without its numbers: times, sizes, digests and figures differ from machine to machine.
fn masked(text: &str) -> String {
    let is_digest = |word: &str| word.len() >= 16 && word.chars().all(|c| c.is_ascii_hexdigit());
    let mut masked = String::new();
    for line in text.lines() {
        let mut words = String::new();
        for word in line.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
            match word {
                _ if is_digest(word) || word.chars().any(|c| c.is_ascii_digit()) => {}
                "B" | "KiB" | "MiB" | "GiB" | "e" | "s" | "min" | "h" => {}
                _ => words = words + word + " ",
            }
        }
        masked = masked + words.trim_end() + "\n";
    }
    masked
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# One\n\n```console\n$ moe inspect \\\n    tiny-moe\n3 MiB\n\n$ echo '{\n  \"a\": 1}'\n{\n$ true\n```\n\n\
                        ```text\n$ no command\n```\n";

    #[test]
    fn commands_and_what_they_print_are_found_and_everything_else_stays() {
        let mut page = Page::read(PAGE).unwrap();
        assert_eq!(page.to_string(), PAGE);
        let found: Vec<(String, String)> =
            page.commands_mut().map(|found| (found.command.clone(), found.printed.clone())).collect();
        assert_eq!(found[0], ("moe inspect \\\n    tiny-moe".into(), "3 MiB\n\n".into()));
        assert_eq!(found[1], ("echo '{\n  \"a\": 1}'".into(), "{\n".into()));
        assert_eq!((found[2].0.as_str(), found.len()), ("true", 3));
        page.commands_mut().for_each(|session| session.printed = "x\n".into());
        assert!(page.to_string().contains("tiny-moe\nx\n$ echo") && page.to_string().contains("$ no command"));
        assert!(Page::read("```console\nls\n```\n").is_err_and(|error| error.contains("ls")));
        assert!(Page::read("```console\n$ ls\n").is_err());
    }

    #[test]
    fn outputs_are_alike_that_differ_in_numbers_alone() {
        assert!(alike("took 1.5 s  6.27 MiB\n│ a ┆ 12 │\n", "took 12.25 s 900 KiB\n│ a  ┆ 7  │\n"));
        assert!(alike("prune-0123456789abcdef/x\n", "prune-fedcba9876543210/x\n"));
        assert!(!alike("16 experts\n", "16 layers\n") && !alike("a\n", "a\nb\n"));
    }
}

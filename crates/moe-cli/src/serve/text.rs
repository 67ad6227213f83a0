//! Text as its tokens come: whole characters only, and nothing of what ends it.

use moe_core::data::Tokenizer;

/// What of a completion can be shown so far.
#[derive(Clone, Debug, Default)]
pub struct Text {
    /// Texts that end it, none of them empty.
    stop: Vec<String>,
    tokens: Vec<u32>,
    /// Tokens before this one matter no more to how the next ones read.
    from: usize,
    /// Tokens whose characters are in `text`.
    read: usize,
    text: String,
    /// Bytes of `text` that were shown.
    shown: usize,
}

impl Text {
    /// A text that ends before any of these.
    pub fn new(stop: Vec<String>) -> Self {
        Self { stop, ..Self::default() }
    }

    /// Adds a token: what can be shown now, and whether the text has ended.
    pub fn push(&mut self, token: u32, tokenizer: &Tokenizer) -> (String, bool) {
        self.tokens.push(token);
        let now = tokenizer.decode(&self.tokens[self.from..]).unwrap_or_default();
        // A character may need the next token; it is shown with it.
        if now.ends_with('\u{fffd}') {
            return (String::new(), false);
        }
        let before = tokenizer.decode(&self.tokens[self.from..self.read]).unwrap_or_default();
        let new = now.get(before.len()..).unwrap_or_default().to_string();
        (self.from, self.read) = (self.read, self.tokens.len());
        self.add(&new)
    }

    /// What was held back, when no more tokens come.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        if self.read < self.tokens.len() {
            let before = tokenizer.decode(&self.tokens[self.from..self.read]).unwrap_or_default();
            let now = tokenizer.decode(&self.tokens[self.from..]).unwrap_or_default();
            self.text.push_str(now.get(before.len()..).unwrap_or_default());
            self.read = self.tokens.len();
        }
        let rest = self.text[self.shown..].to_string();
        self.shown = self.text.len();
        rest
    }

    fn add(&mut self, new: &str) -> (String, bool) {
        self.text.push_str(new);
        let waiting = &self.text[self.shown..];
        if let Some(end) = self.stop.iter().filter_map(|stop| waiting.find(stop.as_str())).min() {
            let last = waiting[..end].to_string();
            self.text.truncate(self.shown + end);
            self.shown = self.text.len();
            return (last, true);
        }
        // The end of what there is may be the beginning of what ends it.
        let held = self.stop.iter().map(|stop| overlap(waiting, stop)).max().unwrap_or(0);
        let shown = waiting[..waiting.len() - held].to_string();
        self.shown += shown.len();
        (shown, false)
    }
}

/// Bytes of the longest end of `text` that `stop` begins with.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest).rev().find(|n| stop.is_char_boundary(*n) && text.ends_with(&stop[..*n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown of pieces of text, and whether it ended.
    fn shown(stop: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut text = Text::new(stop.iter().map(ToString::to_string).collect());
        let mut all = Vec::new();
        for piece in pieces {
            let (new, ended) = text.add(piece);
            all.push(new);
            if ended {
                return (all, true);
            }
        }
        all.push(text.text[text.shown..].to_string());
        (all, false)
    }

    #[test]
    fn nothing_of_a_stop_is_shown_even_if_it_comes_in_pieces() {
        assert_eq!(shown(&["\n\n"], &["a\n", "\nb"]), (vec!["a".into(), String::new()], true));
        assert_eq!(shown(&["END"], &["xE", "N", "yEND"]), (vec!["x".into(), String::new(), "ENy".into()], true));
        assert_eq!(shown(&["END", "N"], &["xE", "N"]), (vec!["x".into(), "E".into()], true));
        assert_eq!(shown(&["é!"], &["aé", "?"]), (vec!["a".into(), "é?".into(), String::new()], false));
    }

    #[test]
    fn what_was_held_back_is_shown_in_the_end() {
        assert_eq!(shown(&["END"], &["xEN"]), (vec!["x".into(), "EN".into()], false));
        assert_eq!(shown(&[], &["a", "b"]), (vec!["a".into(), "b".into(), String::new()], false));
    }

    #[test]
    fn tokens_of_parts_of_characters_are_shown_when_they_are_whole() {
        let tokenizer = Tokenizer::from_dir(crate::TINY_MOE).unwrap();
        for text in ["Question: 3 plums — naïve 日本 🙂.", "plain"] {
            let mut streamed = Text::default();
            let ids = tokenizer.encode(text).unwrap();
            let mut all: String = ids.iter().map(|id| streamed.push(*id, &tokenizer).0).collect();
            all += &streamed.finish(&tokenizer);
            assert_eq!(all, tokenizer.decode(&ids).unwrap());
        }
    }
}

//! Which part of a rendered chat the assistant wrote.

use serde_json::Value;

use super::{ChatTemplate, Conversation, REASONING};
use crate::Error;

/// What `{% generation %}` puts around its text. Private characters of Unicode, which no text has.
const OPEN: char = '\u{f8f0}';
const CLOSE: char = '\u{f8f1}';
/// What a message's words are marked with to find them in the text of a chat.
const MARK: char = '\u{f8f2}';

/// The filter behind `{% generation %}`.
pub(super) fn marked(text: &str) -> String {
    format!("{OPEN}{text}{CLOSE}")
}

/// A text without its marks, and the byte ranges of it that stood between them.
pub(super) fn unmarked(text: &str) -> (String, Vec<(usize, usize)>) {
    let (mut plain, mut spans, mut depth, mut start) = (String::with_capacity(text.len()), Vec::new(), 0usize, 0);
    for c in text.chars() {
        match c {
            OPEN => {
                start = if depth == 0 { plain.len() } else { start };
                depth += 1;
            }
            CLOSE => {
                depth = depth.saturating_sub(1);
                if depth == 0 && plain.len() > start {
                    spans.push((start, plain.len()));
                }
            }
            c => plain.push(c),
        }
    }
    (plain, spans)
}

impl ChatTemplate {
    /// Renders a conversation without a generation prompt, and finds the byte ranges of it that the assistant wrote.
    ///
    /// A template that says so itself, by `{% generation %}`, is taken at its word. Otherwise a turn begins where the
    /// rendering of the messages before it, with a generation prompt, stops agreeing with the whole. It ends where the
    /// rendering that stops after the turn ends. Templates that drop the reasoning of earlier turns render a turn
    /// longer when it is the last one; then it ends where the messages between it and the next turn begin, rendered
    /// with the turn left out. Where these renderings do not fit into the whole, the turn's words are changed to see
    /// where they stand: the turn begins after the heading that a generation prompt has too, and ends after what
    /// follows the words when the turn is the last one. A turn the template leaves out has no range.
    ///
    /// # Errors
    /// As [`render`](Self::render), and if all this gives no way to tell who wrote what.
    pub fn render_turns(&self, conversation: Conversation<'_>) -> Result<(String, Vec<(usize, usize)>), Error> {
        self.render_chosen(conversation, &|_| true)
    }

    /// As [`render_turns`](Self::render_turns), of those turns only whose message has an index that is `chosen`.
    pub(crate) fn render_chosen(
        &self,
        conversation: Conversation<'_>,
        chosen: &dyn Fn(usize) -> bool,
    ) -> Result<(String, Vec<(usize, usize)>), Error> {
        let messages = conversation.messages;
        let turns: Vec<usize> = (0..messages.len()).filter(|&i| is_assistant(&messages[i])).collect();
        if self.marks_generation {
            let (whole, spans) = unmarked(&self.render_marked(conversation, false)?);
            if turns.iter().all(|&i| chosen(i)) {
                return Ok((whole, spans));
            }
            if spans.len() == turns.len() {
                let spans = turns.iter().zip(spans).filter(|(i, _)| chosen(**i)).map(|(_, span)| span).collect();
                return Ok((whole, spans));
            }
        }
        let whole = self.render(conversation, false)?;
        let mut spans = Vec::with_capacity(turns.len());
        let mut last_end = 0;
        for (n, &i) in turns.iter().enumerate() {
            let next = turns.get(n + 1).copied().unwrap_or(messages.len());
            let span = match self.by_prefix(conversation, &whole, i, next) {
                Ok(span) if span.0 >= last_end => Some(span),
                found => self.by_words(conversation, &whole, i, last_end).map_err(|why| {
                    let why = found.err().unwrap_or(why);
                    Error::ChatTemplate {
                        message: format!(
                            "cannot tell which tokens of \"messages[{i}]\" the assistant wrote: {why}; a loss over every token \
                             (--loss-over-prompts) needs no such marks"
                        ),
                    }
                })?,
            };
            if let Some((start, end)) = span {
                last_end = end;
                if chosen(i) {
                    spans.push((start, end));
                }
            }
        }
        Ok((whole, spans))
    }

    /// The range of turn `i` by what is rendered before and up to it, or why it cannot be found so. The turn after it
    /// is at `next`.
    fn by_prefix(
        &self,
        conversation: Conversation<'_>,
        whole: &str,
        i: usize,
        next: usize,
    ) -> Result<(usize, usize), String> {
        let reason = |error: Error| error.to_string();
        let (before, opened) =
            match (self.render(conversation.first(i), false), self.render(conversation.first(i), true)) {
                (Ok(before), Ok(opened)) => (before, opened),
                // Templates may refuse an empty conversation; then nothing stands before the first turn.
                _ if i == 0 => Default::default(),
                (Err(error), _) | (_, Err(error)) => return Err(reason(error)),
            };
        if !whole.starts_with(&before) {
            return Err("the messages before it are rendered differently when they stand alone".into());
        }
        let start = before.len() + meeting(opened.strip_prefix(&before).unwrap_or_default(), &whole[before.len()..]);
        let alone = self.render(conversation.first(i + 1), false).map_err(reason)?;
        if whole.starts_with(&alone) && alone.len() >= start {
            return Ok((start, alone.len()));
        }
        self.end_by_what_follows(conversation, &before, i, next)
            .map_err(reason)?
            .filter(|&end| (start..=whole.len()).contains(&end) && whole.is_char_boundary(end))
            .map(|end| (start, end))
            .ok_or_else(|| "the turn is rendered differently when it is the last one".into())
    }

    /// Where turn `i` ends in the rendering of the messages before `next`, if leaving it out leaves the rest as it is.
    fn end_by_what_follows(
        &self,
        conversation: Conversation<'_>,
        before: &str,
        i: usize,
        next: usize,
    ) -> Result<Option<usize>, Error> {
        let with_turn = self.render(conversation.first(next), false)?;
        let others = [&conversation.messages[..i], &conversation.messages[i + 1..next]].concat();
        // A template that insists on alternating turns refuses this one: no end is found this way.
        let Ok(without_turn) = self.render(Conversation { messages: &others, ..conversation }, false) else {
            return Ok(None);
        };
        let after = without_turn.strip_prefix(before).and_then(|after| with_turn.strip_suffix(after));
        Ok(after.map(str::len))
    }

    /// The range of turn `i` by where its own words stand in the whole, at or after byte `from`: `None` if the template
    /// leaves it out.
    fn by_words(
        &self,
        conversation: Conversation<'_>,
        whole: &str,
        i: usize,
        from: usize,
    ) -> Result<Option<(usize, usize)>, String> {
        let Some((words_start, words_end)) = self.words(conversation, whole, i)? else { return Ok(None) };
        if words_start < from {
            return Err("its words stand before the end of an earlier turn".into());
        }
        let start = self.heading_end(conversation, whole, i, from, words_start);
        let closing = match i + 1 == conversation.messages.len() {
            true => whole[words_end..].to_owned(),
            false => self.closing(conversation, i).unwrap_or_default(),
        };
        Ok(Some((start, words_end + meeting(&closing, &whole[words_end..]))))
    }

    /// Where the words of message `i` stand in a rendering of the conversation: what changes when they are marked.
    fn words(&self, conversation: Conversation<'_>, whole: &str, i: usize) -> Result<Option<(usize, usize)>, String> {
        let mut messages = conversation.messages.to_vec();
        let marks = mark_words(&mut messages[i]);
        let changed = self
            .render(Conversation { messages: &messages, ..conversation }, false)
            .map_err(|error| error.to_string())?;
        if changed == whole {
            return Ok(None);
        }
        if changed.matches(MARK).count() > marks {
            return Err("the template writes the turn more than once".into());
        }
        let start = common_prefix(&changed, whole);
        let after: usize = changed[start..]
            .chars()
            .rev()
            .zip(whole[start..].chars().rev())
            .take_while(|(x, y)| x == y)
            .map(|(x, _)| x.len_utf8())
            .sum();
        Ok(Some((start, whole.len() - after)))
    }

    /// Where the heading of turn `i` ends: the longest beginning of the generation prompt that stands between `from`
    /// and its words. Of a prompt that also opens a block of reasoning, the heading is the beginning.
    fn heading_end(&self, conversation: Conversation<'_>, whole: &str, i: usize, from: usize, words: usize) -> usize {
        let prompts = [i, conversation.messages.len()].into_iter().filter_map(|count| {
            let closed = self.render(conversation.first(count), false).ok()?;
            let opened = self.render(conversation.first(count), true).ok()?;
            opened.strip_prefix(&closed).map(str::to_owned)
        });
        for prompt in prompts.filter(|prompt| !prompt.trim().is_empty()) {
            let ends = prompt.char_indices().filter(|(_, c)| ENDS.contains(c)).map(|(at, c)| at + c.len_utf8());
            for length in ends.chain([prompt.len()]).collect::<Vec<_>>().into_iter().rev() {
                // Less than half of it may stand anywhere.
                if 2 * length < prompt.trim_end().len() {
                    break;
                }
                if let Some(at) = whole[from..words].rfind(&prompt[..length]) {
                    return from + at + length;
                }
            }
        }
        words
    }

    /// What follows the words of turn `i` when it is the last one, or what follows those of the last turn.
    fn closing(&self, conversation: Conversation<'_>, i: usize) -> Option<String> {
        let tail = |last: usize| {
            let cut = conversation.first(last + 1);
            let text = self.render(cut, false).ok()?;
            let (_, end) = self.words(cut, &text, last).ok()??;
            Some(text[end..].to_owned())
        };
        tail(i).or_else(|| tail(conversation.messages.iter().rposition(is_assistant)?))
    }
}

pub(crate) fn is_assistant(message: &Value) -> bool {
    message.get("role").and_then(Value::as_str) == Some("assistant")
}

/// Bytes two texts have in common at their beginning, whole characters only.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(x, y)| x == y).map(|(x, _)| x.len_utf8()).sum()
}

/// What ends a piece of a template's own text: a tag, a line, a name.
const ENDS: [char; 4] = ['>', ']', ':', '\n'];

/// How far `text` goes along with what is `expected` of it: all of it, or up to the last end of a piece, since two tags
/// may well begin alike.
fn meeting(expected: &str, text: &str) -> usize {
    let common = common_prefix(expected, text);
    match common == expected.len() {
        true => common,
        false => expected[..common].rfind(ENDS).map_or(0, |at| at + 1),
    }
}

/// Puts marks around a message's words, and says how many. Reasoning that is part of the content gets its own, since
/// templates cut it off.
fn mark_words(message: &mut Value) -> usize {
    let mut marks = 0;
    let mut mark = |text: &mut Value| {
        let Value::String(words) = text else { return };
        let (reasoning, answer) = match words.rsplit_once("</think>") {
            Some((reasoning, answer)) => (format!("{MARK}{reasoning}</think>"), answer),
            None => (String::new(), words.as_str()),
        };
        let space = answer.len() - answer.trim_start().len();
        let changed = format!("{reasoning}{}{MARK}{}{MARK}", &answer[..space], &answer[space..]);
        marks += changed.matches(MARK).count();
        *words = changed;
    };
    let Value::Object(fields) = message else { return 0 };
    if let Some(reasoning) =
        REASONING.iter().find_map(|name| fields.get(*name).filter(|value| value.is_string()).cloned())
    {
        // All three names are one text.
        let mut reasoning = reasoning;
        mark(&mut reasoning);
        for name in REASONING {
            if fields.contains_key(name) {
                fields.insert(name.to_owned(), reasoning.clone());
            }
        }
    }
    match fields.get_mut("content") {
        Some(Value::Array(parts)) => parts.iter_mut().filter_map(|part| part.get_mut("text")).for_each(&mut mark),
        Some(content) => mark(content),
        None => {}
    }
    for call in fields.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        let call = if call.get("function").is_some() { &mut call["function"] } else { call };
        if let Some(name) = call.get_mut("name") {
            mark(name);
        }
        match call.get_mut("arguments") {
            Some(Value::Object(arguments)) => {
                arguments.insert(MARK.to_string(), Value::from(MARK.to_string()));
            }
            Some(arguments) => mark(arguments),
            None => {}
        }
    }
    // A template may write the name of an argument and its value.
    marks + 2 * fields.get("tool_calls").and_then(Value::as_array).map_or(0, Vec::len)
}

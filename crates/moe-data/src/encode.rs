//! One row to one sequence.

use serde::{Deserialize, Serialize};

use super::{Chat, Error, Place, Row, Sequence, Tokenizer};

/// Which tokens count in the loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossOver {
    /// Every predicted token, prompts included.
    #[default]
    All,
    /// Tokens of the completion of `{"prompt", "completion"}` rows, of the output of `{"instruction", "output"}` rows,
    /// of the assistant's turns of `{"messages"}` rows with what ends them, and those a mask of `{"input_ids"}` rows
    /// names. A token that begins in the prompt and reaches into the completion does not count.
    Completions,
}

/// What turns rows into token ids: a tokenizer, unless every row has ids already, and the vocabulary they must be in.
#[derive(Clone, Copy)]
pub struct RowEncoder<'a> {
    tokenizer: Option<&'a Tokenizer>,
    vocab_size: usize,
    loss: LossOver,
    end_completions: bool,
}

impl<'a> RowEncoder<'a> {
    /// An encoder for a model of `vocab_size` embeddings.
    pub fn new(tokenizer: Option<&'a Tokenizer>, vocab_size: usize, loss: LossOver) -> Self {
        Self { tokenizer, vocab_size, loss, end_completions: false }
    }

    /// Whether the completion of a row of plain text ends with the end-of-sequence token, so that a model learns to
    /// stop. A chat template ends its turns itself.
    pub fn ending_completions(mut self, yes: bool) -> Self {
        self.end_completions = yes;
        self
    }

    /// The whole row as one sequence, not truncated.
    ///
    /// # Errors
    /// No tokenizer or chat template where one is needed, a text or conversation it refuses, an id outside the
    /// vocabulary, or a loss over completions asked of a row that has none.
    pub fn sequence(&self, row: &Row) -> Result<Sequence, Error> {
        let sequence = match (row, self.loss) {
            (Row::Text(_) | Row::Ids(_), LossOver::Completions) => {
                return Err(Error::NoCompletion { found: row.form() });
            }
            (Row::Ids(ids), LossOver::All) => Sequence::new(ids.clone()),
            // The mask is the row's own word on what counts, prompts or not.
            (Row::Masked { ids, loss }, _) => Sequence { ids: ids.clone(), loss: Some(loss.clone()) },
            (Row::Text(text), LossOver::All) => self.text(text, None, true)?,
            (Row::Completion { prompt, completion }, _) => self.completion(prompt, completion)?,
            (Row::Messages(chat), _) => self.chat(chat)?,
            (Row::Instruction { system, instruction, input, output, history }, _) => {
                let question = if input.is_empty() { instruction.clone() } else { format!("{instruction}\n{input}") };
                match self.tokenizer()?.has_chat_template() {
                    true => {
                        let turn = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
                        let mut messages: Vec<_> = system.iter().map(|system| turn("system", system)).collect();
                        for (question, answer) in history {
                            messages.extend([turn("user", question), turn("assistant", answer)]);
                        }
                        messages.extend([turn("user", &question), turn("assistant", output)]);
                        self.chat(&Chat { completion: messages.len() - 1, ..Chat::new(messages) })?
                    }
                    false if system.is_some() || !history.is_empty() => return Err(Error::NoChatTemplate),
                    false => self.completion(&alpaca_prompt(instruction, input), output)?,
                }
            }
        };
        self.check(&sequence.ids)?;
        Ok(sequence)
    }

    /// As [`sequence`](Self::sequence), with the row's place in errors.
    ///
    /// # Errors
    /// Those of [`sequence`](Self::sequence), in an [`Error::Row`].
    pub fn sequence_at(&self, place: &Place, row: &Row) -> Result<Sequence, Error> {
        self.sequence(row).map_err(|error| error.at(&place.path, place.line))
    }

    /// A prompt and its completion as one text.
    fn completion(&self, prompt: &str, completion: &str) -> Result<Sequence, Error> {
        let span = (prompt.len(), prompt.len() + completion.len());
        let spans = (self.loss == LossOver::Completions).then_some(vec![span]);
        let mut sequence = self.text(&format!("{prompt}{completion}"), spans, true)?;
        if self.end_completions {
            let eos = self.tokenizer()?.eos_id().ok_or(Error::NoEos { purpose: "ending completions" })?;
            if sequence.ids.last() != Some(&eos) {
                sequence.ids.push(eos);
                sequence.loss.iter_mut().for_each(|mask| mask.push(true));
            }
        }
        Ok(sequence)
    }

    /// A chat by the tokenizer's template.
    fn chat(&self, chat: &Chat) -> Result<Sequence, Error> {
        let conversation = chat.conversation();
        let template = self.tokenizer()?.chat(conversation.tools.is_some())?;
        let silenced = chat.silenced()?;
        // The template has written the special tokens already; a second beginning-of-sequence token is a common
        // mistake.
        match self.loss {
            LossOver::Completions => {
                let counts = |i: usize| i >= chat.completion && !silenced.contains(&i);
                let (text, spans) = template.render_chosen(conversation, &counts)?;
                self.text(&text, Some(spans), false)
            }
            LossOver::All if silenced.is_empty() => self.text(&template.render(conversation, false)?, None, false),
            LossOver::All => {
                let (text, spans) = template.render_chosen(conversation, &|i| silenced.contains(&i))?;
                let mut sequence = self.text(&text, Some(spans), false)?;
                sequence.loss.iter_mut().flatten().for_each(|counts| *counts = !*counts);
                Ok(sequence)
            }
        }
    }

    /// Ids of plain text, every token of which counts.
    pub(super) fn plain(&self, text: &str) -> Result<Sequence, Error> {
        if self.loss == LossOver::Completions {
            return Err(Error::NoCompletion { found: "plain text" });
        }
        let sequence = self.text(text, None, true)?;
        self.check(&sequence.ids)?;
        Ok(sequence)
    }

    /// Ids of a prompt, with the tokenizer's special tokens if `special`.
    pub(super) fn prompt(&self, text: &str, special: bool) -> Result<Vec<u32>, Error> {
        let ids = self.text(text, None, special)?.ids;
        self.check(&ids)?;
        Ok(ids)
    }

    /// A prompt and what follows it, whose tokens alone count.
    pub(super) fn continuation(&self, prompt: &str, text: &str, special: bool) -> Result<Sequence, Error> {
        let span = (prompt.len(), prompt.len() + text.len());
        let sequence = self.text(&format!("{prompt}{text}"), Some(vec![span]), special)?;
        self.check(&sequence.ids)?;
        Ok(sequence)
    }

    pub(super) fn tokenizer(&self) -> Result<&'a Tokenizer, Error> {
        self.tokenizer.ok_or(Error::NoTokenizer)
    }

    fn text(&self, text: &str, counted: Option<Vec<(usize, usize)>>, special: bool) -> Result<Sequence, Error> {
        let encoded = self.tokenizer()?.encode_spans(text, special)?;
        let loss = counted.map(|counted| mask(&encoded.spans, &counted));
        Ok(Sequence { ids: encoded.ids, loss })
    }

    pub(super) fn check(&self, ids: &[u32]) -> Result<(), Error> {
        match ids.iter().position(|id| *id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(position) => Err(Error::TokenId { id: ids[position].into(), position, vocab_size: self.vocab_size }),
        }
    }
}

/// The text that Alpaca's models were trained on, up to the answer.
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    const TASK: &str = "Below is an instruction that describes a task";
    match input.is_empty() {
        true => format!(
            "{TASK}. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        ),
        false => format!(
            "{TASK}, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        ),
    }
}

/// Which tokens lie in one of the ascending `counted` byte ranges. A token of no bytes (added by the tokenizer, or
/// white space that it trimmed away) follows the token before it when its place does not decide: the end of a sequence
/// belongs to the completion it ends, the beginning to nobody.
fn mask(spans: &[(usize, usize)], counted: &[(usize, usize)]) -> Vec<bool> {
    let mut previous = false;
    spans
        .iter()
        .map(|&(start, end)| {
            let inside = counted.iter().any(|&(from, to)| from <= start && end > from && end <= to);
            previous = if start == end { inside || previous } else { inside };
            previous
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_count_by_the_bytes_they_stand_for() {
        // prompt "ab ", completion "cd": a token over the boundary, inside, at the end, and one of no bytes at each
        // end.
        let spans = [(0, 0), (0, 2), (2, 4), (3, 4), (4, 5), (0, 0)];
        assert_eq!(mask(&spans, &[(3, 5)]), [false, false, false, true, true, true]);
        // Two turns: what follows a turn does not count.
        assert_eq!(mask(&[(0, 1), (1, 2), (2, 3), (3, 4)], &[(1, 2), (3, 4)]), [false, true, false, true]);
        // White space of which nothing is left, at the end of the prompt and at the start of the completion.
        assert_eq!(mask(&[(0, 2), (3, 3), (3, 5)], &[(3, 5)]), [false, false, true]);
        assert_eq!(mask(&[(0, 2), (4, 4), (4, 5)], &[(2, 5)]), [false, true, true]);
    }
}

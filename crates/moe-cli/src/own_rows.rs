//! Rows of a model's own: prompts of data with what the model makes of them, to calibrate on.

use std::path::Path;

use moe::recipe::Data;
use moe::run::Calibration;
use moe_checkpoint::write_atomic;
use moe_core::Model;
use moe_core::data::{LossOver, Sequence, Tokenizer};
use moe_core::decode::Decoding;
use moe_core::generate::generate_with;
use serde_json::json;

use crate::generate::Arguments;
use crate::{Error, Result, cli};

/// Continues the prompts of the rows that `arguments` name and writes a row of tokens for each to a file; what to tell.
///
/// A model that is compressed by what it does on texts of others sees tokens that it would never choose. On what it
/// says itself, statistics are of what it is used for: the self-generated calibration of the literature.
///
/// # Errors
/// Rows that cannot be read; none with a prompt; whatever stops the model.
pub fn write(
    arguments: &Arguments,
    tokenizer: &Tokenizer,
    model: &Model,
    decoding: &Decoding<'_>,
    to: &Path,
) -> Result<String> {
    if to.exists() {
        return Err(Error::Invalid(format!("{}: exists; choose another file", to.display())));
    }
    let data = Data {
        calibration: cli::data_files(&arguments.rows),
        samples: arguments.samples,
        loss: LossOver::Completions,
        // Prompts are cut here, so that answers of any length leave them whole.
        length: usize::MAX >> 1,
        ..Data::default()
    };
    let seed = arguments.temperature.map(|_| arguments.seed);
    let rows = Calibration::load(&data, seed, Some(tokenizer), model.config().vocab_size)?.data;
    let prompts: Vec<Vec<u32>> = rows
        .sequences
        .iter()
        .map(|row| prompt(row, arguments.text_tokens, arguments.prompt_tokens))
        .filter(|prompt| !prompt.is_empty())
        .collect();
    if prompts.is_empty() {
        return Err(Error::Invalid("--rows: no row has anything before its answer, so nothing to continue".into()));
    }
    let ended = |completion: &[u32]| match tokenizer.decode(completion) {
        Ok(text) => arguments.stop.iter().any(|stop| text.contains(stop.as_str())),
        Err(_) => false,
    };
    let options = arguments.options(tokenizer, model);
    let (completions, _) = generate_with(model, &prompts, &options, decoding, ended)?;
    let (mut lines, mut rows, mut tokens) = (String::new(), 0, 0);
    for (prompt, completion) in prompts.iter().zip(&completions).filter(|(_, completion)| !completion.is_empty()) {
        let ids = [&prompt[..], completion].concat();
        let labels: Vec<i64> = prompt.iter().map(|_| -100).chain(completion.iter().map(|id| i64::from(*id))).collect();
        lines += &format!("{}\n", json!({ "input_ids": ids, "labels": labels }));
        rows += 1;
        tokens += ids.len();
    }
    if rows == 0 {
        return Err(Error::Invalid("the model ends every prompt at once: nothing to calibrate on".into()));
    }
    write_atomic(to, lines.as_bytes())?;
    let silent = prompts.len() - rows;
    let left_out =
        if silent > 0 { format!(", {silent} prompts left out that the model ends at once") } else { String::new() };
    Ok(format!("{rows} rows of {tokens} tokens in {}{left_out}\n", to.display()))
}

/// What stands before the first token that counts, or the first tokens of a row of which all count; at most the last
/// `most`.
fn prompt(row: &Sequence, text_tokens: usize, most: usize) -> Vec<u32> {
    let end = match &row.loss {
        None => text_tokens.min(row.len()),
        Some(_) => (0..row.len()).find(|position| row.counts(*position)).unwrap_or(row.len()),
    };
    row.ids[end.saturating_sub(most)..end].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_ends_where_an_answer_begins_and_that_of_a_text_after_some_tokens() {
        let text = Sequence::new((0..50).collect());
        assert_eq!(prompt(&text, 3, 100), [0, 1, 2]);
        let loss = Some(vec![false, false, false, true, true]);
        let answered = Sequence { ids: vec![7, 8, 9, 1, 2], loss };
        assert_eq!(prompt(&answered, 1, 100), [7, 8, 9]);
        assert_eq!(prompt(&answered, 1, 2), [8, 9]);
    }
}

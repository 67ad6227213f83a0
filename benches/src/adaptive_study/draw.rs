//! Rows of one draw.

use std::path::Path;

use moe::eval_file::{EvalFile, EvalOptions};
use moe_core::Model;
use moe_core::data::{LossOver, Tokenizer, Wave};

use super::Arguments;
use crate::{Error, Result};

/// What is measured.
const SETS: [&str; 3] = ["arithmetic", "facts", "prose"];
/// Rows of text without answers.
const PROSE: &str = "prose_test.jsonl";

/// Some lines of a file, beginning anew where it ends.
fn lines(from: &Path, to: &Path, first: usize, count: usize) -> Result<()> {
    let text = std::fs::read_to_string(from).map_err(Error::io(from))?;
    let all: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    if all.is_empty() {
        return Err(Error::Invalid(format!("{}: no rows", from.display())));
    }
    let some: Vec<&str> = (0..count.min(all.len())).map(|i| all[(first + i) % all.len()]).collect();
    std::fs::write(to, some.join("\n") + "\n").map_err(Error::io(to))
}

/// What a draw measures on, and what thresholds are found on.
pub(super) struct Draw {
    pub files: Vec<EvalFile>,
    pub waves: Vec<Wave>,
    /// Rows of facts and sums with their answers, which references are found on.
    pub answers: Vec<Wave>,
    /// Rows of facts among those that thresholds are found on.
    pub facts: Vec<Wave>,
    /// Rows that nothing is found or trained on; of facts and sums, answers count.
    pub held_out: Vec<Wave>,
}

impl Draw {
    pub fn new(number: usize, arguments: &Arguments, model: &Model, tokenizer: &Tokenizer, dir: &Path) -> Result<Self> {
        let data = arguments.data();
        let (mut paths, mut rows) = (Vec::new(), Vec::new());
        for set in SETS {
            let path = dir.join(format!("{set}_test.jsonl"));
            lines(&data.join(format!("{set}_test.jsonl")), &path, number * arguments.rows, arguments.rows)?;
            paths.push(path);
            let path = dir.join(format!("{set}_calibration.jsonl"));
            lines(&data.join(format!("{set}_calibration.jsonl")), &path, number * 40, 40)?;
            rows.push(moe::recipe::DataFile::Path(path));
        }
        let options = EvalOptions { rows: arguments.rows, max_new_tokens: 28, ..EvalOptions::default() };
        let files = EvalFile::load_all(&paths, &options, Some(tokenizer), model.config())?;
        let load = |calibration, loss| {
            let data = moe::recipe::Data { calibration, length: 128, loss, ..moe::recipe::Data::default() };
            moe::run::Calibration::load(&data, None, Some(tokenizer), model.config().vocab_size)
        };
        let (prose, sums): (Vec<_>, Vec<_>) =
            paths.iter().cloned().map(moe::recipe::DataFile::Path).partition(|file| file.path().ends_with(PROSE));
        let mut held_out = load(sums, LossOver::Completions)?.waves;
        held_out.extend(load(prose, LossOver::All)?.waves);
        let of_facts = rows.iter().filter(|file| file.path().ends_with("facts_calibration.jsonl")).cloned().collect();
        let facts = load(of_facts, LossOver::All)?.waves;
        let answered = rows.iter().filter(|file| !file.path().ends_with("prose_calibration.jsonl")).cloned().collect();
        let answers = load(answered, LossOver::Completions)?.waves;
        Ok(Self { files, waves: load(rows, LossOver::All)?.waves, answers, facts, held_out })
    }
}

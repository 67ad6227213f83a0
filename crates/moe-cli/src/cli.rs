//! What the command lines of all programs share: values of options, errors, output.

use std::io::{ErrorKind, IsTerminal, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind as ClapError;
use moe::recipe::{Data, DataFile, DataRows};
use moe::run::Calibration;
use moe_checkpoint::Checkpoint;
use moe_core::data::{Dataset, LossOver, Reading, Source, Tokenizer, WaveOptions};
use tracing_subscriber::EnvFilter;

use crate::{Error, Result};

/// What the exit codes of programs mean.
pub const EXIT_CODES: &str = "Exit codes: 0 done; 1 stopped by an error, which stderr says in a line; 2 wrong usage: options or values \
that do not go together. What is not 0 has written no output directory under its final name.";

/// Columns of tables whose cells are sentences.
pub const COLUMNS: u16 = 120;

/// Runs a program: parses its arguments, logs warnings to stderr, prints what `main` returns to stdout, and turns an
/// error into one line on stderr and an exit code: 2 for usage, 1 for anything else. `MOE_LOG` changes what is logged,
/// as `info` or `moe_core=debug,warn` do.
pub fn run<A: Parser>(main: impl FnOnce(A) -> Result<String>) -> ExitCode {
    run_logging(|_| 0, main)
}

/// [`run`] for a program whose arguments say how much is logged beyond warnings: 1 what happens, 2 all there is.
pub fn run_logging<A: Parser>(verbosity: impl FnOnce(&A) -> u8, main: impl FnOnce(A) -> Result<String>) -> ExitCode {
    let arguments = match A::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if matches!(error.kind(), ClapError::DisplayHelp | ClapError::DisplayVersion) => error.exit(),
        Err(error) => {
            eprintln!("{}", one_line(&error.to_string()));
            return ExitCode::from(2);
        }
    };
    let filter = match log_filter(std::env::var("MOE_LOG").ok().as_deref(), verbosity(&arguments)) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(error.exit_code());
        }
    };
    // Colors are for people who look, not for files and pipes.
    let colors = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colors);
    log.without_time().init();
    match main(arguments).and_then(|text| print(&text)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ Error::Elsewhere) => ExitCode::from(error.exit_code()),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// What is logged: what `MOE_LOG` says, else warnings and as much more as `--verbose` was given.
fn log_filter(variable: Option<&str>, verbosity: u8) -> Result<EnvFilter> {
    let level = match verbosity {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let directives = variable.filter(|text| !text.trim().is_empty() && verbosity == 0).unwrap_or(level);
    EnvFilter::try_new(directives).map_err(|error| {
        Error::Usage(format!(
            "MOE_LOG: found `{directives}` ({error}), expected a level such as info, or moe_core=debug"
        ))
    })
}

/// Makes the allocator fast for a program without a memory limit; one that has a limit keeps to it instead: memory that
/// is kept for the next allocation counts too.
pub fn allocator(max_memory: Option<u64>) {
    if max_memory.is_none() {
        moe_core::memory::keep_freed_memory();
    }
}

/// What a verb prints of its report: text, or one JSON object.
///
/// # Errors
/// A report that is no JSON.
pub fn shown(report: &(impl serde::Serialize + std::fmt::Display), json: bool) -> Result<String> {
    match json {
        true => serde_json::to_string(report)
            .map(|json| format!("{json}\n"))
            .map_err(|error| Error::Invalid(format!("the report: {error}"))),
        false => Ok(report.to_string()),
    }
}

/// Prints to stdout. A reader that has gone away, as `head` does, is no error.
fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Error::io("stdout")(error)),
        _ => Ok(()),
    }
}

/// A usage error without the usage: its lines as one.
fn one_line(message: &str) -> String {
    let kept = message.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with("Usage:"));
    kept.map(|line| line.trim_end_matches('.')).collect::<Vec<_>>().join("; ").replace(":;", ":")
}

/// How the rows of a data file are read.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct RowArguments {
    /// Read a field of rows from another column, as in --field prompt=question; repeatable. Chooses the form of rows
    /// that have two
    #[arg(long = "field", value_name = "NAME=COLUMN", value_parser = field)]
    pub fields: Vec<(String, String)>,
    /// Leave out rows that cannot be read, and count them
    #[arg(long)]
    pub skip_bad_rows: bool,
}

impl RowArguments {
    /// As the data crate takes it.
    pub fn reading(&self) -> Reading {
        Reading { fields: self.fields.iter().cloned().collect(), skip_bad_rows: self.skip_bad_rows }
    }
}

/// How work is shared with other processes: each does its part, and the last takes over the others.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ShareArguments {
    /// Do only shard I of N, as I/N from 0, of the work that can be shared out, and end there: of what scores are made
    /// of and of the evidence of merges every Nth wave, of refits every Nth layer
    #[arg(long, value_name = "I/N", value_parser = part)]
    pub shard: Option<(usize, usize)>,
    /// Take over the part of another run of the same job, its --out (of moe merge, its --work); repeatable
    #[arg(long, value_name = "DIR")]
    pub absorb: Vec<PathBuf>,
}

/// `I/N`.
fn part(text: &str) -> Result<(usize, usize), String> {
    let bad = || format!("found `{text}`, expected a shard such as 0/4");
    let (index, count) = text.split_once('/').ok_or_else(bad)?;
    match (index.trim().parse(), count.trim().parse()) {
        (Ok(index), Ok(count)) if index < count => Ok((index, count)),
        _ => Err(bad()),
    }
}

/// A field and its column.
fn field(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, column)) if !name.is_empty() && !column.is_empty() => Ok((name.into(), column.into())),
        _ => Err("expected NAME=COLUMN".into()),
    }
}

/// Rows to work on, from any number of files.
#[derive(Clone, Debug, clap::Args)]
pub struct DataArguments {
    /// Rows to run the model on: .jsonl, .json, .jsonl.gz, .parquet, .txt or a folder; repeatable. Several share the
    /// samples evenly, or by weights, as in a.jsonl=2
    #[arg(long, visible_alias = "calibration", value_name = "FILE[=WEIGHT]")]
    pub data: Vec<Source>,
    /// Which tokens count in the loss: all of a row, or those of its answer alone
    #[arg(long, value_name = "all|answers", default_value = "all", value_parser = loss)]
    pub loss: LossOver,
    /// How rows are read
    #[command(flatten)]
    pub rows: RowArguments,
    /// Sequences to use, at most, over all files
    #[arg(long, default_value_t = 128, value_parser = at_least(1))]
    pub samples: usize,
    /// Tokens per sequence, at most
    #[arg(long, default_value_t = 2048, value_parser = at_least(2))]
    pub length: usize,
    /// Shuffle rows with this seed; without it, the first rows
    #[arg(long)]
    pub seed: Option<u64>,
    /// Tokens that go through the model together
    #[arg(long, default_value = "16384", value_parser = non_zero)]
    pub wave_tokens: NonZeroUsize,
}

impl DataArguments {
    /// As recipes have it, with files to measure on.
    pub fn to_recipe(&self, eval: &[std::path::PathBuf]) -> Data {
        Data {
            calibration: data_files(&self.data),
            eval: eval.to_vec(),
            samples: self.samples,
            length: self.length,
            wave_tokens: self.wave_tokens,
            loss: self.loss,
            reading: self.rows.reading(),
        }
    }

    /// Reads the files, and says aloud what is left out.
    ///
    /// # Errors
    /// [`Error::Usage`] for none; files that cannot be read.
    pub fn load(&self, tokenizer: Option<&Tokenizer>, vocab_size: usize) -> Result<Dataset> {
        if self.data.is_empty() {
            return Err(Error::Usage("--data FILE: rows to run the model on".into()));
        }
        Ok(Calibration::load(&self.to_recipe(&[]), self.seed, tokenizer, vocab_size)?.data)
    }

    /// How sequences are grouped.
    pub fn waves(&self) -> WaveOptions {
        WaveOptions::Tokens(self.wave_tokens)
    }
}

/// Files of rows as recipes have them.
pub fn data_files(sources: &[Source]) -> Vec<DataFile> {
    let file = |source: &Source| match source.weight {
        None => DataFile::Path(source.path.clone()),
        Some(weight) => DataFile::Rows(DataRows { path: source.path.clone(), rows: None, weight }),
    };
    sources.iter().map(file).collect()
}

/// Which tokens count in a loss.
///
/// # Errors
/// A message with the choices there are.
pub fn loss(text: &str) -> Result<LossOver, String> {
    match text {
        "all" => Ok(LossOver::All),
        "answers" => Ok(LossOver::Completions),
        other => Err(format!("found `{other}`, expected all or answers")),
    }
}

/// Says aloud which rows of a data set are not in it.
pub fn left_out(path: &std::path::Path, data: &Dataset) {
    let path = path.display();
    if let Some(first) = &data.first_skipped {
        tracing::warn!("{path}: {} bad rows skipped, the first of them {first}", data.skipped);
    }
}

/// A number of bytes, as [`moe::format::parse_size`] reads it.
///
/// # Errors
/// A message that says what a size looks like.
pub fn bytes(text: &str) -> Result<u64, String> {
    moe::format::parse_size(text)
}

/// A fraction in (0, 1), both ends excluded.
///
/// # Errors
/// A message that says so.
pub fn ratio(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(ratio) if ratio > 0.0 && ratio < 1.0 => Ok(ratio),
        _ => Err(format!("found `{text}`, expected a number in (0, 1), both ends excluded")),
    }
}

/// A count of at least `minimum`.
///
/// # Errors
/// A message that says so.
pub fn at_least(minimum: usize) -> impl Fn(&str) -> Result<usize, String> + Clone {
    move |text| match text.trim().parse::<usize>() {
        Ok(count) if count >= minimum => Ok(count),
        _ => Err(format!("found `{text}`, expected a whole number of at least {minimum}")),
    }
}

/// A count above 0.
///
/// # Errors
/// A message that says so.
pub fn non_zero(text: &str) -> Result<NonZeroUsize, String> {
    at_least(1)(text).map(|count| NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN))
}

/// Removes a working folder. It loses its name first, so that a run which goes on after a kill finds all of it or none.
pub(crate) fn remove_work(dir: &Path) -> crate::Result<()> {
    end_removal(dir)?;
    if dir.exists() {
        std::fs::rename(dir, removed(dir)).map_err(crate::Error::io(dir))?;
    }
    end_removal(dir)
}

/// Removes what is left of a working folder that a killed process was removing.
pub(crate) fn end_removal(dir: &Path) -> crate::Result<()> {
    let removed = removed(dir);
    match removed.exists() {
        true => std::fs::remove_dir_all(&removed).map_err(crate::Error::io(&removed)),
        false => Ok(()),
    }
}

fn removed(dir: &Path) -> PathBuf {
    dir.with_added_extension("removed")
}

/// Whether a finished directory holds this very model: what a killed run had named before it was done.
pub(crate) fn is_written(model: &Checkpoint, to: &Path) -> bool {
    Checkpoint::open(to).is_ok_and(|written| written.is_model(&model.fingerprint()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_and_decimal_units() {
        for (text, expected) in [
            ("7", 7),
            ("2GiB", 2 << 30),
            ("2 g", 2 << 30),
            ("500MB", 500_000_000),
            ("0.5KiB", 512),
            ("3tb", 3_000_000_000_000),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for bad in ["", "GiB", "0", "-1", "1x", "1.2.3", "1e99999", "inf", "99999999999TiB"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_log_is_what_the_variable_or_the_flag_says() {
        let shown = |variable, verbosity| log_filter(variable, verbosity).unwrap().to_string();
        assert_eq!(
            [shown(None, 0), shown(None, 1), shown(Some("moe_core=debug"), 0)],
            ["warn", "info", "moe_core=debug"]
        );
        assert_eq!([shown(Some("error"), 2), shown(Some(" "), 0)], ["debug", "warn"]);
        assert!(log_filter(Some("moe_core=loud"), 0).unwrap_err().to_string().contains("MOE_LOG"));
    }

    #[test]
    fn losses_are_over_all_or_over_answers() {
        assert_eq!((loss("all"), loss("answers")), (Ok(LossOver::All), Ok(LossOver::Completions)));
        assert!(loss("prompts").unwrap_err().contains("all or answers"));
    }

    #[test]
    fn ratios_exclude_both_ends() {
        assert_eq!(ratio("0.5"), Ok(0.5));
        for bad in ["0", "1", "1.5", "-0.1", "NaN", "half", ""] {
            assert!(ratio(bad).unwrap_err().contains("(0, 1)"), "{bad}");
        }
    }

    #[test]
    fn usage_errors_become_one_line() {
        let message = "error: invalid value '2'\n\nUsage: x [OPTIONS]\n\nFor more information, try '--help'.\n";
        assert_eq!(one_line(message), "error: invalid value '2'; For more information, try '--help'");
    }

    #[test]
    fn shards_are_counted_from_zero() {
        assert_eq!(part("1/4"), Ok((1, 4)));
        assert!(part("4/4").is_err() && part("x").is_err());
    }
}

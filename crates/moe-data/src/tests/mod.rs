//! Rows, chats and data sets with the tokenizer of the bundled checkpoint.

mod chats;
mod datasets;
mod errors;
mod evals;
mod expressions;
#[cfg(feature = "parquet")]
mod parquet;
mod rows;
mod tokenizer;
mod tokens;

use std::path::PathBuf;

use tempfile::TempDir;

use super::{Dataset, DatasetOptions, Error, Tokenizer};

const VOCAB_SIZE: usize = 2048;

fn bundled() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/assets/tiny-moe"))
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir(bundled()).unwrap()
}

/// A directory with one file in it.
fn file(name: &str, content: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    (dir, path)
}

fn load(name: &str, content: impl AsRef<[u8]>, options: &DatasetOptions) -> Result<Dataset, Error> {
    let (_dir, path) = file(name, content);
    Dataset::load(path, Some(&tokenizer()), VOCAB_SIZE, options)
}

/// An error's message with the temporary directory taken out.
fn message<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    let text = result.unwrap_err().to_string();
    let from = std::env::temp_dir().to_string_lossy().into_owned();
    match text.strip_prefix(&from).and_then(|rest| rest.trim_start_matches('/').split_once('/')) {
        Some((_, rest)) => rest.to_owned(),
        None => text,
    }
}

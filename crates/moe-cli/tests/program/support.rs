//! What the tests of the program share.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use moe_cli::TINY_MOE;

pub fn moe(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moe")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

pub fn ok(arguments: &[&str]) -> String {
    let output = moe(arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

pub fn refused(arguments: &[&str]) -> (i32, String) {
    let output = moe(arguments);
    assert!(!output.status.success(), "{arguments:?}");
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

pub fn rows(name: &str) -> String {
    format!("{TINY_MOE}/data/{name}.jsonl")
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Everything that says what a directory of a model is, by name.
pub fn contents(dir: &Path) -> Vec<(String, String)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .map(|path| (text(&path).to_string(), blake3_of(&path)))
        .map(|(path, digest)| (path.rsplit('/').next().unwrap().to_string(), digest))
        .collect();
    files.sort();
    files
}

pub fn blake3_of(path: &Path) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&fs::read(path).unwrap());
    hasher.finalize().to_hex().to_string()
}

/// The file of this name in the artifact of a step.
pub fn find(dir: &Path, name: &str) -> PathBuf {
    let mut entries = fs::read_dir(dir.join("steps")).unwrap().map(|entry| entry.unwrap().path().join(name));
    entries.find(|path| path.exists()).unwrap()
}

/// Arguments, the first of them separated by spaces.
pub fn words<'a>(line: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    line.split_whitespace().chain(more.iter().copied()).collect()
}

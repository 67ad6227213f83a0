//! Everything that the crates read from files of others, as functions of bytes: whatever the bytes are, they are read
//! or refused with an error. A panic, an overflow, a hang or memory without bound is a fault.
//!
//! `cargo xtask fuzz` runs them under libFuzzer, with the fixtures of the repository as corpora; the test of this crate
//! runs them on those files and on some that were changed at random.
//!
//! What does not depend on the input is made once, and inputs are files in memory that are written over: a target that
//! is slow is hardly fuzzed.

mod made;
mod scratch;
mod targets;

use std::path::{Path, PathBuf};

pub use targets::TARGETS;

/// One kind of file.
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Reads it.
    pub run: fn(&[u8]),
    /// Files of the repository that are of this kind: parts of their paths.
    pub corpus: &'static [&'static str],
    /// Texts beside these files.
    pub seeds: &'static [&'static str],
    /// Files that are written for it.
    pub made: fn() -> Vec<Vec<u8>>,
}

/// Files larger than this are no seeds: what is wrong with a file stands in its first kilobytes.
pub const LARGEST: u64 = 64 * 1024;

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_owned)
}

impl Target {
    /// The inputs to begin with, each once.
    ///
    /// # Errors
    /// Folders or files that cannot be read.
    pub fn inputs(&self) -> std::io::Result<Vec<Vec<u8>>> {
        let mut files = Vec::new();
        for folder in ["crates", "examples"] {
            find(&root().join(folder), &mut |path| {
                let text = path.to_string_lossy();
                if self.corpus.iter().any(|part| text.contains(part)) {
                    files.push(path.to_owned());
                }
            })?;
        }
        files.sort();
        let mut inputs: Vec<Vec<u8>> = self.seeds.iter().map(|seed| seed.as_bytes().to_vec()).collect();
        for file in files {
            if file.metadata()?.len() <= LARGEST {
                inputs.push(std::fs::read(file)?);
            }
        }
        inputs.extend((self.made)());
        inputs.sort();
        inputs.dedup();
        Ok(inputs)
    }
}

/// All files below a folder, but for what is built.
fn find(folder: &Path, see: &mut impl FnMut(&Path)) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true if path.file_name().is_some_and(|name| name == "target") => {}
            true => find(&path, see)?,
            false => see(&path),
        }
    }
    Ok(())
}

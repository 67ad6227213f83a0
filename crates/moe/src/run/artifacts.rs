//! Artifacts of steps, named by everything they follow from.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use moe_core::Precision;

use crate::progress::Progress;
use crate::{Error, Result};

/// What a finished artifact has.
const DONE: &str = "done.json";

/// The artifacts of a run: `OUT/steps/NAME-DIGEST`.
pub(crate) struct Artifacts {
    out: PathBuf,
    /// How the model is run, which every artifact follows from.
    precision: Precision,
    /// Holds the lock of the directory while it lives.
    _lock: Option<File>,
}

impl Artifacts {
    pub fn new(out: &Path, precision: Precision) -> Self {
        Self { out: out.to_path_buf(), precision, _lock: None }
    }

    /// Checks that the directory may be used.
    ///
    /// # Errors
    /// [`Error::Invalid`] for one that exists, unless a run goes on in it.
    pub fn check(&self, resume: bool) -> Result<()> {
        match self.out.exists() && !resume {
            true => Err(Error::Invalid(format!(
                "{}: exists; resume to go on in it with what has not changed",
                self.out.display()
            ))),
            false => Ok(()),
        }
    }

    /// Makes the directory, and locks it against other processes.
    pub fn open(&mut self, resume: bool) -> Result<()> {
        self.check(resume)?;
        let steps = self.out.join("steps");
        fs::create_dir_all(&steps).map_err(Error::io(&steps))?;
        self._lock = Some(moe_checkpoint::lock_directory(&steps)?);
        Ok(())
    }

    /// The directory of an artifact, and whether it is finished. An unfinished one is there, perhaps with what an
    /// earlier run left.
    pub fn begin(&self, name: &str, of: &[&str]) -> Result<(PathBuf, bool)> {
        let precision = (!self.precision.is_f32()).then(|| self.precision.name());
        let of: Vec<&str> = of.iter().copied().chain(precision).collect();
        let dir = self.out.join("steps").join(format!("{name}-{}", &digest(&of)[..16]));
        let finished = dir.join(DONE).exists();
        if !finished {
            fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        }
        Ok((dir, finished))
    }

    /// The same artifact in the output directories of other runs. Those that do not have it are told.
    pub fn of_others(&self, dir: &Path, others: &[PathBuf], progress: Progress) -> Vec<PathBuf> {
        let name = dir.strip_prefix(&self.out).unwrap_or(dir);
        let (found, missing): (Vec<_>, Vec<_>) = others.iter().partition(|other| other.join(name).exists());
        for other in missing {
            progress.say(&format!("{}: nothing to take over, no {}", other.display(), name.display()));
        }
        found.into_iter().map(|other| other.join(name)).collect()
    }

    /// Says that an artifact is whole.
    pub fn finish(dir: &Path) -> Result<()> {
        Ok(moe_checkpoint::write_json(&dir.join(DONE), &serde_json::json!({ "version": 1 }))?)
    }
}

/// A hash of what an artifact follows from.
pub(crate) fn digest(of: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in of {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_runs_in_one_directory_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let mut first = Artifacts::new(&out, Precision::default());
        first.open(false).unwrap();
        let busy = Artifacts::new(&out, Precision::default()).open(true).unwrap_err().to_string();
        assert!(busy.contains("another process is writing"), "{busy}");
        drop(first);
        Artifacts::new(&out, Precision::default()).open(true).unwrap();
    }
}

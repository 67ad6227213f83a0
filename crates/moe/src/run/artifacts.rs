//! Artifacts of steps, named by everything they follow from.

use std::fs;
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
}

impl Artifacts {
    pub fn new(out: &Path, precision: Precision) -> Self {
        Self { out: out.to_path_buf(), precision }
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

    /// Makes the directory.
    pub fn open(&self, resume: bool) -> Result<()> {
        self.check(resume)?;
        let steps = self.out.join("steps");
        fs::create_dir_all(&steps).map_err(Error::io(&steps))
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

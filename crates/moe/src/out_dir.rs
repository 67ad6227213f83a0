//! The output directory of a run, and what to do if it is there already.

use std::fs;
use std::path::{Path, PathBuf};

use moe_checkpoint::write_atomic;
use serde_json::Value;

use crate::{Error, Result};

/// Tells that a directory belongs to this program; holds the recipe of the run.
const RECIPE: &str = "recipe.json";
/// Written last: tells that a run is complete.
const RESULTS: &str = "results.json";

/// What to do about an output directory that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// An error.
    Refuse,
    /// Go on with it.
    Resume,
    /// Begin anew. A complete output is kept as `OUT.replaced` until the new one is complete.
    Replace,
}

/// Paths of everything a run writes.
#[derive(Clone, Debug)]
pub struct OutDir {
    root: PathBuf,
}

impl OutDir {
    /// Checks that a run may write to `root`. Changes nothing.
    ///
    /// # Errors
    /// A directory that exists although `existing` refuses it, or that is not an output of this program.
    pub fn check(root: &Path, existing: Existing) -> Result<Self> {
        let root = std::path::absolute(root).map_err(Error::io(root))?;
        let path = root.display();
        if root.file_name().is_none() {
            return Err(Error::Invalid(format!("{path}: an output directory needs a name")));
        }
        if root.symlink_metadata().is_ok() {
            if !root.is_dir() {
                return Err(Error::Invalid(format!("{path}: exists and is not a directory; choose another --out")));
            }
            if existing == Existing::Refuse {
                let advice = "choose another --out, --resume to go on with it, or --force to replace it";
                return Err(Error::Invalid(format!("{path}: the output directory exists already; {advice}")));
            }
            let mut entries = fs::read_dir(&root).map_err(Error::io(&root))?;
            let begun = |entry: &std::io::Result<fs::DirEntry>| entry.as_ref().is_ok_and(is_unfinished_recipe);
            if !root.join(RECIPE).is_file() && !entries.all(|entry| begun(&entry)) {
                let reason = format!("not an output of this program (it has no {RECIPE}), so it is left as it is");
                return Err(Error::Invalid(format!("{path}: {reason}; choose another --out")));
            }
        }
        Ok(Self { root })
    }

    /// Checks that what is there was made by the recipe of this run. Ratios and evaluation files may differ: nothing
    /// that is kept depends on them.
    ///
    /// # Errors
    /// The first part of the recipe that differs.
    pub fn check_resumable(&self, recipe: &Value) -> Result<()> {
        let path = self.root.join(RECIPE);
        if !path.is_file() {
            return Ok(());
        }
        let json = fs::read(&path).map_err(Error::io(&path))?;
        let earlier: Value = serde_json::from_slice(&json)
            .map_err(|error| Error::Invalid(format!("{}: not a recipe: {error}", path.display())))?;
        let parts =
            ["/model_fingerprint", "/calibration/hash", "/calibration/wave_tokens", "/scorers", "/scope", "/export"];
        for part in parts {
            let (was, is) =
                (earlier.pointer(part).unwrap_or(&Value::Null), recipe.pointer(part).unwrap_or(&Value::Null));
            if was != is {
                let what = part.trim_start_matches('/').replace(['/', '_'], " ");
                return Err(Error::Invalid(format!(
                    "{}: --resume goes on with the same run, but its {what} was {was} and is {is} now; repeat its arguments, \
                     choose another --out, or --force",
                    path.display()
                )));
            }
        }
        Ok(())
    }

    /// Makes the directory and writes the recipe into it.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Checkpoint`].
    pub fn open(&self, existing: Existing, recipe: &Value) -> Result<()> {
        if existing == Existing::Replace && self.root.exists() {
            if self.root.join(RESULTS).is_file() {
                let replaced = self.replaced();
                remove(&replaced)?;
                fs::rename(&self.root, &replaced).map_err(Error::io(&self.root))?;
            } else {
                remove(&self.root)?;
            }
        }
        fs::create_dir_all(&self.root).map_err(Error::io(&self.root))?;
        self.write_json(RECIPE, recipe)
    }

    /// Writes the results, last of all, and drops the output that was replaced.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Checkpoint`].
    pub fn finish(&self, results: &Value) -> Result<()> {
        self.write_json(RESULTS, results)?;
        match self.replaced().join(RECIPE).is_file() {
            true => remove(&self.replaced()),
            false => Ok(()),
        }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Statistics, a file per wave.
    pub fn statistics(&self) -> PathBuf {
        self.root.join("statistics")
    }

    /// Scores of Fisher.
    pub fn scores(&self) -> PathBuf {
        self.root.join("scores.safetensors")
    }

    /// Plan of Fisher for the first ratio; every checkpoint also holds its own.
    pub fn plan(&self) -> PathBuf {
        self.root.join("plan.json")
    }

    /// A pruned checkpoint.
    pub fn checkpoint(&self, method: &str, ratio: f64) -> PathBuf {
        self.root.join(format!("{method}-{ratio}"))
    }

    /// What has been measured so far.
    pub fn measured(&self) -> PathBuf {
        self.root.join("measured.json")
    }

    /// The report for people.
    pub fn report(&self) -> PathBuf {
        self.root.join("report.html")
    }

    /// A figure of the report as a file of its own, for light or for dark ground.
    pub fn figure(&self, name: &str, ground: &str) -> PathBuf {
        self.root.join(format!("{name}-{ground}.svg"))
    }

    /// The results for programs.
    pub fn results(&self) -> PathBuf {
        self.root.join(RESULTS)
    }

    fn replaced(&self) -> PathBuf {
        let mut name = self.root.file_name().unwrap_or_default().to_owned();
        name.push(".replaced");
        self.root.with_file_name(name)
    }

    fn write_json(&self, name: &str, value: &Value) -> Result<()> {
        let json = serde_json::to_vec_pretty(value).map_err(|error| Error::Invalid(error.to_string()))?;
        Ok(write_atomic(self.root.join(name), &json)?)
    }
}

/// Whether this is what a process leaves that is killed as it writes the recipe, the first thing there is.
fn is_unfinished_recipe(entry: &fs::DirEntry) -> bool {
    let name = entry.file_name();
    let rest = name.to_str().and_then(|name| name.strip_prefix('.')?.strip_prefix(RECIPE));
    rest.is_some_and(|rest| rest.starts_with('.') && rest.ends_with(".tmp"))
}

/// Removes an output with its recipe last, so that what is left of it by a process that is killed meanwhile is still
/// known as one.
fn remove(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(path).map_err(Error::io(path))? {
        let entry = entry.map_err(Error::io(path))?;
        let inside = entry.path();
        let removed = match entry.file_type().map_err(Error::io(&inside))?.is_dir() {
            true => fs::remove_dir_all(&inside),
            false if entry.file_name() == RECIPE => Ok(()),
            false => fs::remove_file(&inside),
        };
        removed.map_err(Error::io(&inside))?;
    }
    fs::remove_dir_all(path).map_err(Error::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_was_killed_as_it_wrote_its_recipe_is_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("out");
        fs::create_dir(&root).unwrap();
        for left in [".recipe.json.tmp", ".recipe.json.412-0.tmp"] {
            fs::write(root.join(left), b"{").unwrap();
            for existing in [Existing::Resume, Existing::Replace] {
                OutDir::check(&root, existing).unwrap();
            }
        }
        OutDir::check(&root, Existing::Refuse).unwrap_err();
        let out = OutDir::check(&root, Existing::Resume).unwrap();
        out.open(Existing::Resume, &Value::Null).unwrap();
        assert!(root.join(RECIPE).is_file());
        fs::remove_file(root.join(RECIPE)).unwrap();
        for foreign in ["recipe.json.tmp", ".results.json.tmp", "notes.txt"] {
            fs::write(root.join(foreign), b"").unwrap();
            let error = OutDir::check(&root, Existing::Resume).unwrap_err().to_string();
            assert!(error.contains("not an output of this program"), "{foreign}: {error}");
            fs::remove_file(root.join(foreign)).unwrap();
        }
    }

    #[test]
    fn an_output_is_replaced_whatever_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("out");
        let out = OutDir::check(&root, Existing::Refuse).unwrap();
        out.open(Existing::Refuse, &Value::Null).unwrap();
        fs::create_dir(root.join("model")).unwrap();
        fs::write(root.join("model/weights"), b"").unwrap();
        fs::write(root.join("log"), b"").unwrap();
        out.open(Existing::Replace, &Value::Bool(true)).unwrap();
        let names: Vec<_> = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [RECIPE]);
        assert_eq!(fs::read_to_string(root.join(RECIPE)).unwrap(), "true");
    }
}

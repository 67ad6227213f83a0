//! Output directories that appear whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use crate::artifact_file::TEMPORARY_SUFFIX;
use crate::writer::{RESUME_FILE, sync_dir};
use crate::{Error, Result};

/// File whose lock tells that a process is writing.
const LOCK_FILE: &str = ".moe-lock";

/// What to do about what is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Existing {
    /// A finished or an unfinished output is an error.
    #[default]
    Refuse,
    /// An unfinished output is continued; a finished one is an error.
    Resume,
    /// An unfinished output is thrown away; a finished one is replaced when the new one is complete.
    Force,
}

/// A directory `OUT` being written as `OUT.partial`, renamed when it is complete.
///
/// Dropped without [`OutputDir::commit`], it leaves `OUT.partial` to be resumed, and `OUT` as it was.
#[derive(Debug)]
pub struct OutputDir {
    out: PathBuf,
    partial: PathBuf,
    force: bool,
    /// Holds the lock while it lives.
    _lock: File,
}

impl OutputDir {
    /// Prepares `OUT.partial` and locks it against other processes. Parents are created.
    ///
    /// # Errors
    /// [`Error::OutputExists`], [`Error::OutputUnfinished`], [`Error::OutputBusy`], [`Error::Io`].
    pub fn create(out: impl AsRef<Path>, existing: Existing) -> Result<Self> {
        let out = out.as_ref().to_path_buf();
        let (partial, replaced) = (suffixed(&out, ".partial")?, suffixed(&out, ".replaced")?);
        let io = |path: &Path| {
            let path = path.to_path_buf();
            move |source| Error::Io { path, source }
        };
        // A process that died between the two renames of a replacement left the earlier output under this name.
        if !exists(&out) && exists(&replaced) {
            fs::rename(&replaced, &out).map_err(io(&replaced))?;
        }
        Self::check(&out, existing)?;
        let unfinished = exists(&partial);
        fs::create_dir_all(&partial).map_err(io(&partial))?;
        let lock = lock_directory(&partial)?;
        if unfinished && existing == Existing::Force {
            clear(&partial)?;
        }
        Ok(Self { out, partial, force: existing == Existing::Force, _lock: lock })
    }

    /// Whether [`OutputDir::create`] would find something in its way.
    ///
    /// # Errors
    /// [`Error::OutputExists`], [`Error::OutputUnfinished`].
    pub fn check(out: &Path, existing: Existing) -> Result<()> {
        let partial = suffixed(out, ".partial")?;
        if exists(out) && existing != Existing::Force {
            return Err(Error::OutputExists { path: out.to_path_buf() });
        }
        match exists(&partial) && existing == Existing::Refuse {
            true => Err(Error::OutputUnfinished { path: partial }),
            false => Ok(()),
        }
    }

    /// Where to write: `OUT.partial`.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Where the output will be: `OUT`.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Names the directory `OUT`. An earlier `OUT` is removed after that. Temporary files are left out.
    ///
    /// # Errors
    /// [`Error::OutputExists`] if `OUT` appeared meanwhile and replacing was not asked for, [`Error::Io`].
    pub fn commit(self) -> Result<PathBuf> {
        let Self { out, partial, force, _lock } = self;
        if exists(&out) && !force {
            return Err(Error::OutputExists { path: out });
        }
        for entry in entries(&partial)? {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name == RESUME_FILE || name == LOCK_FILE || name.ends_with(TEMPORARY_SUFFIX) {
                remove(&entry.path())?;
            }
        }
        sync_dir(&partial);
        let replaced = suffixed(&out, ".replaced")?;
        if exists(&out) {
            if exists(&replaced) {
                remove(&replaced)?;
            }
            fs::rename(&out, &replaced).map_err(|source| Error::io(&out, source))?;
        }
        fs::rename(&partial, &out).map_err(|source| Error::io(&partial, source))?;
        if let Some(parent) = out.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync_dir(parent);
        }
        if exists(&replaced) {
            remove(&replaced)?;
        }
        Ok(out)
    }
}

/// `path` with `suffix` after its last component.
fn suffixed(path: &Path, suffix: &str) -> Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| {
        let message = "an output directory needs a name";
        Error::io(path, std::io::Error::new(std::io::ErrorKind::InvalidInput, message))
    })?;
    let mut name = OsString::from(name);
    name.push(suffix);
    Ok(path.with_file_name(name))
}

/// Whether something is there, a dangling link included.
fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Locks a directory against other processes for as long as the file that is returned lives. Where a file system has no
/// locks, nothing but the protection is lost.
///
/// # Errors
/// [`Error::OutputBusy`] if another process has it, [`Error::Io`].
pub fn lock_directory(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK_FILE);
    let file = File::create(&path).map_err(|source| Error::io(&path, source))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::OutputBusy { path: dir.to_path_buf() }),
        Err(TryLockError::Error(error)) => {
            tracing::debug!(path = %path.display(), %error, "not locked");
            Ok(file)
        }
    }
}

fn entries(dir: &Path) -> Result<Vec<fs::DirEntry>> {
    let list = fs::read_dir(dir).and_then(Iterator::collect);
    list.map_err(|source| Error::io(dir, source))
}

/// Removes everything but the lock, which is held.
fn clear(dir: &Path) -> Result<()> {
    for entry in entries(dir)? {
        if entry.file_name() != LOCK_FILE {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    let is_dir = path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
    let removed = if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(|source| Error::io(path, source))
}

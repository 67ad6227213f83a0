//! One memory-mapped safetensors file.

use std::fs::{self, File, Metadata};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::header::{self, HeaderTensor};
use crate::{Error, Result};

/// Linux maps cached bytes around every page that is touched: 64 KiB, and since 6.18 the whole folio, up to this many.
#[cfg(unix)]
const FAULT_AROUND: usize = 2 << 20;

/// What Linux reads at least of a range that it is told will be needed; of a longer one it drops the rest.
#[cfg(unix)]
const READ_AHEAD: usize = 128 << 10;

/// A mapped file whose header has been checked against its length.
pub(crate) struct Shard {
    path: PathBuf,
    /// What the path named when it was mapped.
    identity: Option<(u64, u64)>,
    map: Mmap,
}

/// The file that a path names, whatever it holds.
#[cfg(unix)]
fn identity(metadata: &Metadata) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    Some((metadata.dev(), metadata.ino()))
}

/// Elsewhere a mapped file cannot be shortened.
#[cfg(not(unix))]
fn identity(_: &Metadata) -> Option<(u64, u64)> {
    None
}

impl Shard {
    /// Maps the file and reads its header; the data is not touched.
    pub fn open(path: &Path) -> Result<(Self, Vec<HeaderTensor>)> {
        let io = |source| Error::io(path, source);
        let file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if metadata.is_dir() {
            return Err(io(std::io::Error::from(std::io::ErrorKind::IsADirectory)));
        }
        let length = metadata.len();
        if length < header::LENGTH_BYTES as u64 {
            return Err(Error::NoHeader { path: path.to_path_buf(), found: length });
        }
        // SAFETY: the map is read-only. Our own writers replace files by rename, which leaves maps valid. A file that
        // somebody else shortens while it is open is found out by `bytes`, unless it happens during a read itself.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let tensors = header::parse(path, &map)?;
        let shard = Self { path: path.to_path_buf(), identity: identity(&metadata), map };
        shard.release_all();
        Ok((shard, tensors))
    }

    /// Bytes of the file; the range comes from its header, which was checked.
    ///
    /// # Errors
    /// [`Error::Shortened`] if the file has become shorter: reading what is gone would end the process.
    pub fn bytes(&self, range: Range<usize>) -> Result<&[u8]> {
        // The file is asked about by its path, since thousands of shards must not stay open. One that has another file
        // in its place, or none, is whole as it is mapped.
        let expected = self.map.len() as u64;
        match fs::metadata(&self.path) {
            Ok(now) if now.len() < expected && self.identity.is_some() && identity(&now) == self.identity => {
                Err(Error::Shortened { path: self.path.clone(), found: now.len(), expected })
            }
            _ => Ok(&self.map[range]),
        }
    }

    /// Gives the pages of a range back to the system, so that they no longer count as resident.
    ///
    /// The range is widened to what the kernel may have mapped around it. Dropping the page of a neighbor costs that
    /// neighbor a fault on its next read and nothing else.
    #[cfg(unix)]
    pub fn release(&self, range: Range<usize>) {
        let start = range.start.saturating_sub(FAULT_AROUND);
        let end = range.end.saturating_add(FAULT_AROUND).min(self.map.len());
        if start >= end {
            return;
        }
        let advice = memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: `DontNeed` on a read-only map of a file drops cached page table entries; a later read, through a
        // slice that is alive now or not, faults the same bytes in from the file again.
        let advised = unsafe { self.map.unchecked_advise_range(advice, start, end - start) };
        if let Err(error) = advised {
            // Only the resident size is worse for it.
            tracing::debug!(path = %self.path.display(), %error, "pages were not released");
        }
    }

    /// Elsewhere the system takes pages back when it needs them.
    #[cfg(not(unix))]
    pub fn release(&self, _range: Range<usize>) {}

    /// Gives all pages of the file back.
    pub fn release_all(&self) {
        self.release(0..self.map.len());
    }

    /// Has a range read into the system's cache of files.
    #[cfg(unix)]
    pub fn read_ahead(&self, range: Range<usize>) {
        for start in range.clone().step_by(READ_AHEAD) {
            let piece = READ_AHEAD.min(range.end - start);
            if let Err(error) = self.map.advise_range(memmap2::Advice::WillNeed, start, piece) {
                // Only speed depends on it.
                tracing::debug!(path = %self.path.display(), %error, "the file was not read ahead");
                return;
            }
        }
    }

    /// Elsewhere it is read when it is needed.
    #[cfg(not(unix))]
    pub fn read_ahead(&self, _range: Range<usize>) {}

    /// Switches read-ahead off (for samples all over the file) or back on.
    pub fn set_random(&self, random: bool) {
        // Only speed depends on it.
        #[cfg(unix)]
        let _ = self.map.advise(if random { memmap2::Advice::Random } else { memmap2::Advice::Normal });
        #[cfg(not(unix))]
        let _ = random;
    }
}

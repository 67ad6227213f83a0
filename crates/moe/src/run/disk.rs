//! The room on disk that all steps of a recipe need together.

use std::collections::BTreeMap;
use std::path::Path;

use moe_checkpoint::check_space;

use crate::Result;

/// What will be written where.
#[derive(Debug, Default)]
pub(super) struct Disk {
    /// Number of each file system, and bytes.
    needs: BTreeMap<u64, u64>,
}

impl Disk {
    /// `bytes` more below `directory`, which need not exist yet.
    ///
    /// # Errors
    /// [`moe_checkpoint::Error::NoSpace`] if the file system has no room for them besides all that was added before.
    pub fn add(&mut self, directory: &Path, bytes: u64) -> Result<()> {
        let existing = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
        let needed = self.needs.entry(device_of(existing)).or_default();
        *needed = needed.saturating_add(bytes);
        Ok(check_space(existing, *needed)?)
    }
}

#[cfg(unix)]
fn device_of(path: &Path) -> u64 {
    path.metadata().map_or(0, |metadata| std::os::unix::fs::MetadataExt::dev(&metadata))
}

#[cfg(not(unix))]
fn device_of(_path: &Path) -> u64 {
    0
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn what_fits_alone_and_not_together_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let Err(moe_checkpoint::Error::NoSpace { free, .. }) = check_space(dir.path(), u64::MAX) else {
            panic!("there is room for everything");
        };
        let mut disk = Disk::default();
        disk.add(&dir.path().join("statistics"), free / 5 * 3).unwrap();
        let error = disk.add(&dir.path().join("model"), free / 5 * 3).unwrap_err();
        let Error::Checkpoint(moe_checkpoint::Error::NoSpace { needed, .. }) = error else { panic!("{error}") };
        assert_eq!(needed, free / 5 * 3 * 2);
    }
}

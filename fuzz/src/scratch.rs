//! Files in memory for what is read by its path.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

thread_local! {
    static DIR: TempDir = {
        // In memory where the system has such a folder: an input costs no disk.
        let shared = Path::new("/dev/shm");
        let made = if shared.is_dir() { TempDir::new_in(shared) } else { TempDir::new() };
        made.unwrap_or_else(|error| panic!("a folder for the inputs: {error}"))
    };
}

/// A file of this name with these bytes, in a folder of this thread. The same name is the same file.
pub fn file(name: &str, data: &[u8]) -> PathBuf {
    DIR.with(|dir| {
        let path = dir.path().join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).unwrap_or_else(|error| panic!("{}: {error}", parent.display()));
        }
        // A mapped file that is cut short would be a signal, so that it is replaced.
        let _ = fs::remove_file(&path);
        fs::write(&path, data).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        path
    })
}

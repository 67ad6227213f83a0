//! Files for what is read by its path.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Seek, Write};
use std::path::PathBuf;

use tempfile::TempDir;

thread_local! {
    /// Where the system keeps temporary files, which `cargo xtask fuzz` takes for memory.
    static DIR: TempDir = TempDir::new().unwrap_or_else(|error| panic!("a folder for the inputs: {error}"));
    static FILES: RefCell<HashMap<&'static str, (PathBuf, File)>> = RefCell::default();
}

/// A place of this name in a folder of this thread, for a file that something else writes.
pub fn place(name: &str) -> PathBuf {
    let path = DIR.with(|dir| dir.path().join(name));
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).unwrap_or_else(|error| panic!("{}: {error}", parent.display()));
    }
    path
}

/// A file of this name with these bytes, in a folder of this thread. The same name is the same file, which stays open
/// and is written over, since making one anew costs more than most inputs: nobody may have it mapped any more, nor put
/// another in its place.
pub fn file(name: &'static str, data: &[u8]) -> PathBuf {
    FILES.with_borrow_mut(|files| {
        let (path, file) = files.entry(name).or_insert_with(|| {
            let path = place(name);
            let file = File::create(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            (path, file)
        });
        let written = file.rewind().and_then(|()| file.write_all(data)).and_then(|()| file.set_len(data.len() as u64));
        written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        path.clone()
    })
}

/// A file of this name that is written once in this thread.
pub fn once(name: &'static str, data: impl FnOnce() -> Vec<u8>) {
    if !FILES.with_borrow(|files| files.contains_key(name)) {
        file(name, &data());
    }
}

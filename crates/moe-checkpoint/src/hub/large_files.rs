//! Files of many gigabytes, fetched in pieces into the cache of the Hub, so that a fetch that broke off goes on within
//! the file.
//!
//! What there is of a file lies beside its place in the cache, under the name that the Hub gives to its content (its
//! ETag). Content that has changed meanwhile has another name, so that pieces of two are never put together.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use hf_hub::HFRepositorySync;
use hf_hub::repository::{RepoTreeEntry, RepoTypeModel};
use sha2::{Digest, Sha256};

use super::HubProgress;

/// Files that are fetched side by side.
const TOGETHER: usize = 4;
/// Ends the name of a file that is not complete.
const INCOMPLETE: &str = ".moe-incomplete";

/// Where large files come from and go to.
pub(super) struct LargeFiles<'a> {
    pub repository: &'a HFRepositorySync<RepoTypeModel>,
    /// The folder of contents in the cache of this repository.
    pub blobs: PathBuf,
    pub revision: Option<String>,
    /// Bytes that are asked for at a time; smaller files are none of ours.
    pub piece: u64,
    pub tell: &'a (dyn Fn(HubProgress) + Sync),
}

impl LargeFiles<'_> {
    /// Fetches what of the large weights is not in the cache.
    pub fn fetch(&self) -> Result<(), String> {
        let tree = self.repository.list_tree().maybe_revision(self.revision.clone()).recursive(true).send();
        let mut large = Vec::new();
        for entry in tree.map_err(|error| error.to_string())? {
            if let RepoTreeEntry::File { path, size, .. } = entry
                && path.ends_with(".safetensors")
                && size > self.piece
            {
                large.push((path, size));
            }
        }
        if large.is_empty() {
            return Ok(());
        }
        (self.tell)(HubProgress::Started { files: large.len(), bytes: large.iter().map(|(_, size)| size).sum() });
        std::fs::create_dir_all(&self.blobs).map_err(|error| format!("{}: {error}", self.blobs.display()))?;
        let (waiting, taken, failed) = (Mutex::new(large.iter()), Mutex::new(BTreeSet::new()), Mutex::new(None));
        std::thread::scope(|scope| {
            for _ in 0..TOGETHER.min(large.len()) {
                scope.spawn(|| {
                    while lock(&failed).is_none() {
                        let Some((path, _)) = lock(&waiting).next() else { return };
                        if let Err(error) = self.file(path, &taken) {
                            lock(&failed).get_or_insert(error);
                        }
                    }
                });
            }
        });
        lock(&failed).take().map_or(Ok(()), Err)
    }

    /// Fetches what is missing of one file, unless its content is taken already.
    fn file(&self, path: &str, taken: &Mutex<BTreeSet<String>>) -> Result<(), String> {
        let said = |error: hf_hub::HFError| format!("{path}: {error}");
        let found = self.repository.get_file_metadata().filepath(path).maybe_revision(self.revision.as_deref()).send();
        let found = found.map_err(said)?;
        let (etag, size) = (found.etag, found.file_size);
        if etag.is_empty() || !etag.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
            return Err(format!("{path}: its ETag `{etag}` is no name of a content"));
        }
        let blob = self.blobs.join(&etag);
        if !lock(taken).insert(etag.clone()) || blob.exists() {
            return Ok(());
        }
        let incomplete = self.blobs.join(format!("{etag}{INCOMPLETE}"));
        let at = |error: std::io::Error| format!("{}: {error}", incomplete.display());
        let mut file = OpenOptions::new().create(true).append(true).open(&incomplete).map_err(at)?;
        // Another process may be at the same file; it is waited for, and has then finished or gone.
        file.lock().map_err(at)?;
        if blob.exists() {
            return Ok(());
        }
        let begun = file.metadata().map_err(at)?.len();
        let mut done = if begun > size { 0 } else { begun };
        file.set_len(done).map_err(at)?;
        while done < size {
            (self.tell)(HubProgress::File { name: path.to_string(), done, total: size });
            let end = (done + self.piece).min(size);
            // The commit, not the branch: all pieces are of one content.
            let piece = self.repository.download_file_to_bytes().filename(path).revision(found.commit_hash.as_str());
            let bytes = piece.range(done..end).send().map_err(said)?;
            if bytes.len() as u64 != end - done {
                let found = bytes.len();
                return Err(format!("{path}: asked for bytes {done} to {end}, and the Hub sent {found} bytes"));
            }
            file.write_all(&bytes).map_err(at)?;
            done = end;
        }
        file.sync_all().map_err(at)?;
        if begun > 0 && etag.len() == 64 {
            // Large files are named by the SHA-256 of their content.
            let digest = sha256(&incomplete).map_err(at)?;
            if digest != etag {
                std::fs::remove_file(&incomplete).map_err(at)?;
                return Err(format!(
                    "{path}: what was there of it and what was fetched have the digest {digest}, expected {etag}; it is \
                     fetched anew the next time"
                ));
            }
        }
        std::fs::rename(&incomplete, &blob).map_err(at)?;
        (self.tell)(HubProgress::File { name: path.to_string(), done: size, total: size });
        Ok(())
    }
}

fn lock<T>(of: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    of.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let (mut file, mut digest, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => digest.update(&buffer[..read]),
        }
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

//! Fetching a model from the Hugging Face Hub. Only with feature `hub`, and only when called.

use std::path::PathBuf;
use std::sync::Arc;

use hf_hub::HFClientSync;
use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};

use crate::{Error, Result};

/// What of a repository is fetched: what [`Checkpoint::open`](crate::Checkpoint::open) and exports read.
const PATTERNS: [&str; 9] =
    ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "LICENSE*", "README*"];

/// How far a download is.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum HubProgress {
    /// It begins.
    Started {
        /// Files to fetch.
        files: usize,
        /// Their bytes.
        bytes: u64,
    },
    /// Bytes of one file.
    File {
        /// Its name.
        name: String,
        /// Bytes so far.
        done: u64,
        /// Its bytes; 0 where that is not known.
        total: u64,
    },
    /// Bytes of all files in transfer, where the Hub does not tell them apart.
    Together {
        /// Bytes so far.
        done: u64,
        /// Their bytes.
        total: u64,
    },
    /// It is complete.
    Finished,
}

/// Where a model is fetched from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HubOptions {
    /// Branch, tag or commit; the main branch if absent.
    pub revision: Option<String>,
    /// Only what the local cache has: no network.
    pub offline: bool,
}

/// The directory of a model: `model` itself if it is one, else the model with this id (`owner/name`), fetched into the local
/// cache of the Hub unless it is there. Nothing of the network is touched for a directory.
///
/// `progress` is called from the threads that download.
///
/// # Errors
/// [`Error::Hub`] with the id and what the Hub or the network said; an id that is no `owner/name`.
pub fn fetch(
    model: &str,
    options: &HubOptions,
    progress: impl Fn(HubProgress) + Send + Sync + 'static,
) -> Result<PathBuf> {
    let path = PathBuf::from(model);
    if path.is_dir() {
        return Ok(path);
    }
    let failed = |reason: String| Error::Hub { model: model.to_string(), reason };
    let (owner, name) = match model.split_once('/') {
        Some((owner, name)) if !owner.is_empty() && !name.is_empty() && !name.contains('/') => (owner, name),
        _ => return Err(failed("neither a directory nor a model id `owner/name`".to_string())),
    };
    let client = HFClientSync::new().map_err(|error| failed(error.to_string()))?;
    let repository = client.model(owner, name);
    let download = repository
        .snapshot_download()
        .maybe_revision(options.revision.clone())
        .allow_patterns(PATTERNS.map(String::from).to_vec())
        .local_files_only(options.offline)
        .progress(Arc::new(Handler(progress)));
    download.send().map_err(|error| failed(error.to_string()))
}

struct Handler<F>(F);

impl<F: Fn(HubProgress) + Send + Sync> ProgressHandler for Handler<F> {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        match event {
            DownloadEvent::Start { total_files, total_bytes } => {
                self.0(HubProgress::Started { files: *total_files, bytes: *total_bytes });
            }
            DownloadEvent::Progress { files } => {
                for file in files {
                    let (name, done, total) = (file.filename.clone(), file.bytes_completed, file.total_bytes);
                    self.0(HubProgress::File { name, done, total });
                }
            }
            DownloadEvent::AggregateProgress { bytes_completed, total_bytes, .. } => {
                self.0(HubProgress::Together { done: *bytes_completed, total: *total_bytes });
            }
            DownloadEvent::Complete => self.0(HubProgress::Finished),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_needs_no_network_and_a_bad_id_is_named() {
        let dir = env!("CARGO_MANIFEST_DIR");
        assert_eq!(fetch(dir, &HubOptions::default(), |_| {}).unwrap(), PathBuf::from(dir));
        for id in ["nowhere", "a/b/c", "/b", "a/"] {
            let text = fetch(id, &HubOptions::default(), |_| {}).unwrap_err().to_string();
            assert!(text.contains(id) && text.contains("owner/name"), "{text}");
        }
    }
}

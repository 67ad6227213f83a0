//! Fetching a model from the Hugging Face Hub, and publishing one there. Only with feature `hub`, and only when called.
//!
//! The Hub is the one at `HF_ENDPOINT`, the token that of `HF_TOKEN` or of `huggingface-cli login`, the cache that of
//! `HF_HOME` or `HF_HUB_CACHE`, unless options say otherwise.

mod large_files;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler, UploadEvent};
use hf_hub::repository::{RepoTreeEntry, RepoTypeModel};
use hf_hub::{HFClient, HFClientSync};

use crate::{Checkpoint, Error, Result};
use large_files::LargeFiles;

/// What of a repository is fetched: what [`Checkpoint::open`](crate::Checkpoint::open) and exports read.
const PATTERNS: [&str; 9] =
    ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "LICENSE*", "README*"];

/// Bytes of a shard that are asked for at a time.
const PIECE: u64 = 64 << 20;

/// What of a directory is published: the same, and nothing of a run that was interrupted.
const PUBLISHED: [&str; 1] = ["*"];
/// Files that stay at home.
const UNPUBLISHED: [&str; 4] = ["*.partial", "*.lock", ".*", ".*/*"];

/// How far a download or an upload is.
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
    /// All bytes are there; the Hub makes a commit of them.
    Committing,
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
    /// Bytes of a shard that are asked for at a time, and lost at most when a fetch breaks off; 64 MiB if absent.
    pub piece_bytes: Option<std::num::NonZeroU64>,
    /// Which Hub, and who asks.
    pub access: HubAccess,
}

/// Which Hub is asked, and who asks. What is absent comes from the environment, as all tools of the Hub have it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct HubAccess {
    /// Address of the Hub; `HF_ENDPOINT`, or <https://huggingface.co>.
    pub endpoint: Option<String>,
    /// Token, for models that are not public and for publishing; `HF_TOKEN`, or that of `huggingface-cli login`.
    pub token: Option<String>,
    /// Directory of the cache; `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    pub cache: Option<PathBuf>,
}

/// Never shows the token.
impl std::fmt::Debug for HubAccess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = self.token.as_ref().map(|_| "…");
        f.debug_struct("HubAccess")
            .field("endpoint", &self.endpoint)
            .field("token", &token)
            .field("cache", &self.cache)
            .finish()
    }
}

impl HubAccess {
    /// The client, and its cache.
    fn client(&self) -> hf_hub::HFResult<(HFClientSync, PathBuf)> {
        let mut builder = HFClient::builder();
        if let Some(endpoint) = &self.endpoint {
            builder = builder.endpoint(endpoint);
        }
        if let Some(token) = &self.token {
            builder = builder.token(token);
        }
        if let Some(cache) = &self.cache {
            builder = builder.cache_dir(cache);
        }
        let client = builder.build()?;
        let cache = client.cache_dir().to_path_buf();
        Ok((HFClientSync::from_inner(client)?, cache))
    }
}

/// How a model is published.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PushOptions {
    /// Branch that gets the commit; the main branch if absent.
    pub revision: Option<String>,
    /// What the commit says; what was done to the model, if absent.
    pub message: Option<String>,
    /// Whether a new repository can be seen by its owner alone. An existing one stays as it is.
    pub private: bool,
    /// Which Hub, and who asks.
    pub access: HubAccess,
}

/// Owner and name of a model id.
fn parts(model: &str) -> Result<(&str, &str)> {
    match model.split_once('/') {
        Some((owner, name)) if !owner.is_empty() && !name.is_empty() && !name.contains('/') => Ok((owner, name)),
        _ => Err(Error::Hub {
            model: model.to_string(),
            reason: "neither a directory nor a model id `owner/name`".into(),
        }),
    }
}

/// The directory of a model: `model` itself if it is one, else the model with this id (`owner/name`), fetched into the
/// local cache of the Hub unless it is there. Nothing of the network is touched for a directory. Files that an
/// interrupted download has finished are not fetched again, and of a shard that it had begun only what is missing, as
/// long as the Hub has the same content (its ETag) under that name.
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
    let (owner, name) = parts(model)?;
    let (client, cache) = options.access.client().map_err(|error| failed(error.to_string()))?;
    let repository = client.model(owner, name);
    let progress = Arc::new(progress);
    if !options.offline {
        let blobs = cache.join(format!("models--{owner}--{name}")).join("blobs");
        let (revision, piece) = (options.revision.clone(), options.piece_bytes.map_or(PIECE, u64::from));
        let large = LargeFiles { repository: &repository, blobs, revision, piece, tell: &*progress };
        large.fetch().map_err(failed)?;
    }
    let download = repository
        .snapshot_download()
        .maybe_revision(options.revision.clone())
        .allow_patterns(PATTERNS.map(String::from).to_vec())
        .local_files_only(options.offline)
        .progress(Arc::new(Handler(progress)));
    let snapshot = download.send().map_err(|error| failed(error.to_string()))?;
    if options.offline {
        return Ok(snapshot);
    }
    // The client leaves out a file that the Hub lists and does not have; a model without one of its files is no model.
    let commit = snapshot.file_name().and_then(|name| name.to_str()).map(String::from);
    let listed = repository.list_tree().maybe_revision(commit).recursive(true).send();
    for entry in listed.map_err(|error| failed(error.to_string()))? {
        if let RepoTreeEntry::File { path, .. } = entry
            && path.ends_with(".safetensors")
            && !snapshot.join(&path).exists()
        {
            return Err(failed(format!("{path}: listed, but the Hub does not have it")));
        }
    }
    Ok(snapshot)
}

/// Publishes a directory of a model, its card included, as one commit to the repository with this id (`owner/name`),
/// which is made unless it exists. The address of the commit.
///
/// `progress` is called from the threads that upload.
///
/// # Errors
/// Whatever keeps the directory from being a checkpoint, before anything is sent; [`Error::Hub`] with the id and what
/// the Hub or the network said.
pub fn push(
    directory: &Path,
    model: &str,
    options: &PushOptions,
    progress: impl Fn(HubProgress) + Send + Sync + 'static,
) -> Result<String> {
    let failed = |reason: String| Error::Hub { model: model.to_string(), reason };
    let (owner, name) = parts(model)?;
    let checkpoint = Checkpoint::open(directory)?;
    let message = options.message.clone().unwrap_or_else(|| match checkpoint.steps().last() {
        Some(step) => format!("{}: {}", step.method, step.summary),
        None => "Upload model".to_string(),
    });
    let (client, _) = options.access.client().map_err(|error| failed(error.to_string()))?;
    let made =
        client.create_repository().repo_id(model).repo_type(RepoTypeModel).private(options.private).exist_ok(true);
    made.send().map_err(|error| failed(error.to_string()))?;
    let repository = client.model(owner, name);
    let upload = repository
        .upload_folder()
        .folder_path(directory.to_path_buf())
        .maybe_revision(options.revision.clone())
        .commit_message(message)
        .allow_patterns(PUBLISHED.map(String::from).to_vec())
        .ignore_patterns(UNPUBLISHED.map(String::from).to_vec())
        .progress(Arc::new(Handler(Arc::new(progress))));
    let commit = upload.send().map_err(|error| failed(error.to_string()))?;
    Ok(commit.commit_url.or(commit.commit_oid).unwrap_or_else(|| format!("{model}: committed")))
}

struct Handler<F>(Arc<F>);

impl<F: Fn(HubProgress) + Send + Sync> ProgressHandler for Handler<F> {
    fn on_progress(&self, event: &ProgressEvent) {
        let event = match event {
            ProgressEvent::Download(event) => event,
            ProgressEvent::Upload(event) => return self.on_upload(event),
        };
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

impl<F: Fn(HubProgress)> Handler<F> {
    fn on_upload(&self, event: &UploadEvent) {
        match event {
            UploadEvent::Start { total_files, total_bytes } => {
                self.0(HubProgress::Started { files: *total_files, bytes: *total_bytes });
            }
            UploadEvent::Progress { bytes_completed, total_bytes, .. } => {
                self.0(HubProgress::Together { done: *bytes_completed, total: *total_bytes });
            }
            UploadEvent::Committing => self.0(HubProgress::Committing),
            UploadEvent::Complete => self.0(HubProgress::Finished),
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

//! Models by their id on the Hugging Face Hub.

use std::path::PathBuf;

use clap::Parser;

use crate::Result;
use crate::progress::Progress;

/// Which Hub is asked, and who asks.
#[derive(Clone, Debug, clap::Args)]
pub struct AccessArguments {
    /// Address of the Hub [default: HF_ENDPOINT, or `https://huggingface.co`]
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// File with the token, for models that are not public and for publishing [default: HF_TOKEN, or what
    /// huggingface-cli login left]
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

/// Fetches a model by its id into the cache of the Hub and prints its directory there; an interrupted fetch goes on
/// with what it lacks, within a file, too
#[derive(Clone, Debug, Parser)]
#[command(
    after_help = "Example: moe inspect $(moe pull Qwen/Qwen1.5-MoE-A2.7B)\n\nNeeds a program built with the feature hub: \
cargo install --path crates/moe-cli --features hub"
)]
pub struct PullArguments {
    /// The id, as owner/name
    pub model: String,
    /// Branch, tag or commit [default: the main branch]
    #[arg(long)]
    pub revision: Option<String>,
    /// Directory of the cache [default: HF_HUB_CACHE, or hub in HF_HOME]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// Only what the cache has: no network
    #[arg(long)]
    pub offline: bool,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
    /// Which Hub, and who asks
    #[command(flatten)]
    pub access: AccessArguments,
}

/// Publishes a model directory with its card as one commit; makes the repository unless it exists
#[derive(Clone, Debug, Parser)]
#[command(
    after_help = "Example: moe push out/pruned me/Qwen1.5-MoE-half --private\n\nNeeds a program built with the feature hub: \
cargo install --path crates/moe-cli --features hub"
)]
pub struct PushArguments {
    /// Model directory
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// The id, as owner/name
    pub model: String,
    /// Branch that gets the commit [default: the main branch]
    #[arg(long)]
    pub revision: Option<String>,
    /// What the commit says [default: what was done to the model last]
    #[arg(long, value_name = "TEXT")]
    pub message: Option<String>,
    /// A new repository can be seen by its owner alone
    #[arg(long)]
    pub private: bool,
    /// One JSON object on stdout
    #[arg(long)]
    pub json: bool,
    /// Which Hub, and who asks
    #[command(flatten)]
    pub access: AccessArguments,
}

/// Fetches; the directory, to be printed.
///
/// # Errors
/// What the Hub or the network says; a program without the feature `hub`.
#[cfg(feature = "hub")]
pub fn pull(arguments: &PullArguments, progress: Progress) -> Result<String> {
    let access = arguments.access.access(arguments.cache.clone())?;
    let (revision, offline) = (arguments.revision.clone(), arguments.offline);
    let options = moe_checkpoint::hub::HubOptions { revision, offline, access, ..Default::default() };
    let directory = moe_checkpoint::hub::fetch(&arguments.model, &options, shown(progress, "fetching"))?;
    Ok(match arguments.json {
        true => format!("{}\n", serde_json::json!({ "model": arguments.model, "directory": directory })),
        false => format!("{}\n", directory.display()),
    })
}

/// Publishes; the address of the commit, to be printed.
///
/// # Errors
/// A directory that is no model, what the Hub or the network says; a program without the feature `hub`.
#[cfg(feature = "hub")]
pub fn push(arguments: &PushArguments, progress: Progress) -> Result<String> {
    let options = moe_checkpoint::hub::PushOptions {
        revision: arguments.revision.clone(),
        message: arguments.message.clone(),
        private: arguments.private,
        access: arguments.access.access(None)?,
    };
    let model = &arguments.model;
    let commit = moe_checkpoint::hub::push(&arguments.directory, model, &options, shown(progress, "publishing"))?;
    Ok(match arguments.json {
        true => format!("{}\n", serde_json::json!({ "model": model, "commit": commit })),
        false => format!("{commit}\n"),
    })
}

#[cfg(feature = "hub")]
impl AccessArguments {
    fn access(&self, cache: Option<PathBuf>) -> Result<moe_checkpoint::hub::HubAccess> {
        let token = match &self.token_file {
            Some(path) => Some(std::fs::read_to_string(path).map_err(crate::Error::io(path))?.trim().to_string()),
            None => None,
        };
        Ok(moe_checkpoint::hub::HubAccess { endpoint: self.endpoint.clone(), token, cache })
    }
}

/// Shows how far a transfer is. Files report by themselves, so that their bytes are added up here.
#[cfg(feature = "hub")]
fn shown(progress: Progress, what: &'static str) -> impl Fn(moe_checkpoint::hub::HubProgress) + Send + Sync + 'static {
    use std::collections::BTreeMap;
    use std::sync::{Mutex, PoisonError};

    use moe_checkpoint::hub::HubProgress;

    let bar = progress.bar(what, 0, crate::progress::Unit::Bytes);
    let files: Mutex<BTreeMap<String, u64>> = Mutex::default();
    move |at| match at {
        HubProgress::Started { bytes, .. } => bar.total(bytes),
        HubProgress::File { name, done, .. } => {
            let mut files = files.lock().unwrap_or_else(PoisonError::into_inner);
            files.insert(name, done);
            bar.at(files.values().sum());
        }
        HubProgress::Together { done, total } => {
            bar.total(total);
            bar.at(done);
        }
        HubProgress::Committing => bar.label("committing"),
        _ => {}
    }
}

/// What a program without the feature says.
#[cfg(not(feature = "hub"))]
fn without_hub() -> crate::Error {
    crate::Error::Usage(
        "this program was built without the feature hub: cargo install --path crates/moe-cli --features hub".into(),
    )
}

/// Fetches; the directory, to be printed.
///
/// # Errors
/// That this program has no feature `hub`.
#[cfg(not(feature = "hub"))]
pub fn pull(_: &PullArguments, _: Progress) -> Result<String> {
    Err(without_hub())
}

/// Publishes; the address of the commit, to be printed.
///
/// # Errors
/// That this program has no feature `hub`.
#[cfg(not(feature = "hub"))]
pub fn push(_: &PushArguments, _: Progress) -> Result<String> {
    Err(without_hub())
}

//! A model behind the HTTP interface that clients of OpenAI's speak, so that evaluation harnesses and chat programs can
//! judge any checkpoint that these crates run.
//!
//! Connections are taken by `axum`; one thread owns the model and continues all sequences together, a token each per
//! step. Requests wait in a queue of fixed length, and what nobody waits for any more is dropped between two tokens.

#[cfg(feature = "serve")]
mod http;
#[cfg(feature = "serve")]
mod replies;
#[cfg(feature = "serve")]
mod requests;
#[cfg(feature = "serve")]
mod text;
#[cfg(feature = "serve")]
mod worker;

use std::net::SocketAddr;

use clap::Parser;

use crate::progress::Progress;
use crate::{Result, cli};

/// Answers requests over HTTP as OpenAI's interface has them: /v1/completions with logprobs and echo,
/// /v1/chat/completions, both streamed or whole, and /v1/models
///
/// There is no authentication: only programs on this machine are answered, unless --listen says otherwise. An interrupt
/// or SIGTERM ends the server when the requests under way are answered; a second one at once.
#[derive(Clone, Debug, Parser)]
#[command(
    after_help = "Example: moe serve --model out/pruned --listen 127.0.0.1:8000\n\nNeeds a program built with the feature serve: \
cargo install --path crates/moe-cli --features serve"
)]
pub struct Arguments {
    /// What answers
    #[command(flatten)]
    pub model: crate::adapters::ModelArguments,
    /// Address and port; port 0 takes a free one. The address is printed when requests are taken
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8000")]
    pub listen: SocketAddr,
    /// What the model is called in requests [default: the name of its directory]
    #[arg(long)]
    pub name: Option<String>,
    /// Sequences that are continued together, at most
    #[arg(long, default_value_t = 16, value_parser = cli::at_least(1))]
    pub batch: usize,
    /// Requests that wait beyond those, at most; further ones are refused with status 429
    #[arg(long, default_value_t = 128, value_parser = cli::at_least(1))]
    pub queue: usize,
    /// New tokens of a chat whose request says no number, at most
    #[arg(long, default_value_t = 512, value_parser = cli::at_least(1))]
    pub max_new_tokens: usize,
    /// Seconds that requests under way have when the server is to end
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub grace: u64,
}

/// Serves until a signal ends it.
///
/// # Errors
/// A model or tokenizer that cannot be opened, an address that cannot be listened on; a program without the feature
/// `serve`.
#[cfg(feature = "serve")]
pub fn run(arguments: &Arguments, progress: Progress) -> Result<()> {
    http::run(arguments, progress)
}

/// Serves until a signal ends it.
///
/// # Errors
/// That this program has no feature `serve`.
#[cfg(not(feature = "serve"))]
pub fn run(_: &Arguments, _: Progress) -> Result<()> {
    Err(crate::Error::Usage(
        "this program was built without the feature serve: cargo install --path crates/moe-cli --features serve".into(),
    ))
}

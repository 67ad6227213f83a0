//! Mixture-of-Experts decoder models on [Burn](burn), run wave by wave and layer by layer.
//!
//! What this crate owns: the decoder of every supported family, routing ([`router`]), expert compute ([`experts`],
//! [`kernels`]), the [`engine`] with its forward and backward sweeps under a memory limit ([`memory`]), what a sweep
//! shows to observers ([`trace`]), generation and evaluation, on tokens made by [`data`]. It knows nothing of scores
//! and plans.
//!
//! Weights stay in the checkpoint in their stored dtype; they are converted to f32 when used, and what stays in memory
//! is decided by a limit that never changes results. Experts see only the tokens routed to them.
//!
//! ```no_run
//! use moe_core::data::{Dataset, DatasetOptions, Tokenizer, WaveOptions};
//! use moe_core::{Engine, EngineOptions, Model, device::device};
//!
//! let model = Model::open("models/Qwen1.5-MoE-A2.7B", &device("default")?, Some(8 << 30))?;
//! let tokenizer = Tokenizer::from_dir(model.checkpoint().dir())?;
//! let vocabulary = model.config().vocab_size;
//! let data = Dataset::load("rows.jsonl", Some(&tokenizer), vocabulary, &DatasetOptions::default())?;
//! let engine = Engine::new(&model, EngineOptions { loss: true, ..EngineOptions::default() });
//! for wave in data.waves(WaveOptions::default()) {
//!     let report = engine.run(&wave, &mut moe_core::trace::Nobody)?;
//!     println!("wave {}: {:?} nats in all, over {} tokens", wave.id, report.loss, report.loss_tokens);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | what you want of a model | where |
//! |---|---|
//! | run it over rows, forward or forward and backward | [`Engine`], [`trace`] for what an observer sees |
//! | run it changed, without writing it | [`overlay`], [`adapters`] |
//! | run it with fewer or other experts per token | [`adaptive`] |
//! | leave layers out, repeat them, drop them | [`depth`] |
//! | steer its routing by data or by the prompt | [`steering`] |
//! | decode from several models at once | [`decode`] |
//! | continue prompts | [`generate`] |
//! | perplexity, exact answers, choices, divergence from another model | [`evaluate`], [`TeacherLogits`] |
//! | train it, or something beside its weights | [`train`] with a [`TrainingTask`](train::TrainingTask) |
//! | know which experts a token goes to, and with which weights | [`router`] |
//!
//! # Features
#![doc = document_features::document_features!()]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod adapters;
pub mod adaptive;
pub mod decode;
pub mod depth;
pub mod device;
pub mod engine;
pub mod error;
pub mod evaluate;
pub mod expert_cache;
pub mod experts;
pub mod generate;
pub mod host;
pub mod kernels;
pub mod layers;
pub mod memory;
pub mod model;
pub mod objective;
pub mod overlay;
mod precision;
pub mod router;
pub mod steering;
mod store;
pub mod trace;
pub mod train;
mod wave_files;

pub use engine::{
    Engine, EngineOptions, LayerChange, LayerSweep, LayerVisitor, RouteTrial, UnfinishedWave, WaveReport,
};
pub use error::{Error, Result};
pub use model::{Model, Work};
/// Rows, chat templates, tokenizers, data sets and waves: the crate `moe-data`, which knows nothing of Burn.
pub use moe_data as data;
#[cfg(feature = "nn")]
pub use moe_nn as nn;
pub use objective::{CrossEntropy, Distillation, Objective, TeacherLogits};
pub use overlay::{
    ExpertGains, ExpertOverlay, KeepUnits, LogitTransform, RemoveExperts, RouterTokens, RoutingOverlay, RoutingRule,
    RuleGradients, SkipExperts,
};
pub use precision::Precision;
pub use trace::{HalfInput, LayerOutput};

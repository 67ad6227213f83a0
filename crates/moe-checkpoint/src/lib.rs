//! Mixture-of-Experts checkpoints on disk.
//!
//! This crate owns everything that is kept in files, and knows the tensors of no framework:
//!
//! - [`Checkpoint`] opens a Hugging Face model directory: it verifies config, index, headers and lengths before any
//!   weight is read, then reads lazily from a memory map. [`ModelConfig`] is the typed view of `config.json`; the JSON
//!   itself is kept, so that unknown keys survive an edit.
//! - [`Family`] says how the config of a model family reads and what its tensors are called.
//! - Routed experts have one canonical form, [`ExpertWeights`], whatever their [`ExpertLayout`] on disk.
//! - [`ShardedWriter`] and [`OutputDir`] write checkpoints as streams, atomically and resumably.
//! - Feature `hub` adds `hub::fetch`: a model id in place of a directory.
//! - [`Statistics`], [`ScoreTable`] and [`MoeShape`] are the artifacts that scoring and pruning exchange.
//! - [`group`]: processes that do one job together, as MPI starts them with feature `mpi`.
//! - The words that the other crates share: [`ExpertId`] and [`Site`] address experts and matrices, [`ProtectionMask`]
//!   says what stays, [`Ratio`], [`BeforeAfter`], [`Mtp`] and [`Progress`] what happens to a checkpoint.
//!
//! ```no_run
//! use moe_checkpoint::{Checkpoint, Role};
//!
//! let checkpoint = Checkpoint::open("models/Qwen1.5-MoE-A2.7B")?;
//! println!("{} parameters in {} bytes", checkpoint.parameters(), checkpoint.bytes_on_disk());
//! let expert = checkpoint.expert(0, 3)?; // gate and up [I, H], down [H, I], as f32
//! let rows = checkpoint.read_f32_rows(Role::LmHead, 0..1024)?; // [1024, H]
//! # Ok::<(), moe_checkpoint::Error>(())
//! ```
//!
//! # Features
#![doc = document_features::document_features!()]
#![deny(missing_docs)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod artifact_file;
mod checkpoint;
mod compression;
mod config;
mod convert;
mod dequantized;
mod error;
mod expert_bytes;
mod expert_id;
mod expert_table;
mod expert_weights;
mod experts;
mod families;
mod family;
mod files;
mod fingerprint;
mod flat_ragged;
mod formats;
pub mod group;
mod grouped;
mod header;
#[cfg(feature = "hub")]
pub mod hub;
pub mod human;
mod identity_tensors;
mod index;
mod json;
mod knapsack;
mod layer_drop;
mod model_card;
mod mtp;
mod naming;
mod output_dir;
mod parallel;
pub mod products;
mod protection;
mod provenance;
mod quantize;
mod ragged;
mod record;
mod routing_export;
mod safetensors_file;
mod score_conversion;
mod score_sum;
mod scores;
mod shape;
mod shard;
mod shard_layout;
mod shared_fold;
mod side_files;
mod site;
mod source;
mod statistics;
mod statistics_array;
mod statistics_part;
mod statistics_slice;
mod statistics_store;
mod stored_expert;
mod stream_edit;
mod verify;
mod weights;
mod write;
mod writer;

pub use artifact_file::{AtomicFile, write_atomic, write_renamed, write_safetensors};
pub use checkpoint::Checkpoint;
pub use compression::{BeforeAfter, Mtp, Ratio, TopKClamp};
pub use config::{
    Activation, AttentionConfig, AttentionKind, ChannelDelta, CompressedAttention, CompressedIndexer, DeltaNet, Ffn,
    GroupScore, Groups, HalfFactors, HeadMixture, HyperConnections, KeyCompression, KeySelection, LatentAttention,
    LayerConfig, LayerInputs, LightningAttention, LocalAttention, Mamba, Mixer, ModelConfig, MoeConfig, Multipliers,
    NormKind, NormPlacement, NormedResidual, OutputGate, QkNorm, QueryGrowth, RopeConfig, RopeScaling, Routing,
    RoutingKind, SharedExpert,
};
pub use convert::{decode_f32, encode};
pub use error::{Error, Result};
pub use expert_bytes::{ExpertBytes, RawMatrix};
pub use expert_id::ExpertId;
pub use expert_table::ExpertTable;
pub use expert_weights::ExpertWeights;
pub use experts::{ExpertBiases, ExpertBlock, ExpertLayout, ExpertPart, ExpertTensor, ExpertTensorLayout, Placement};
pub use family::{Family, LayerRole, Role, families, family, family_of};
pub use flat_ragged::{is_flat_ragged, open_flat_ragged, write_flat_ragged};
pub use formats::Quantization;
pub use grouped::{grouped_config, regrouped_config, ungrouped_config};
pub use knapsack::{Choice, knapsack};
pub use layer_drop::LayerDrop;
pub use output_dir::{Existing, OutputDir, lock_directory};
pub use parallel::collect_in_order;
pub use protection::{Protected, ProtectionMask};
pub use provenance::Provenance;
pub use quantize::{
    ActivationAware, BasePrecision, ExpertAware, ExpertFormat, ExpertFormats, InputMoments, InputRanges,
    KeptQuantization, LayerSmoothing, MatrixOrigin, QUANTIZE_METHOD, QuantizeOptions, QuantizeReport, Quantized,
    QuantizedPart, RoundedRouter, RouterInputs, RouterRounding, Smoothed, SmoothedLayer, Smoothing, WeightFormat,
    expert_bytes,
};
pub use ragged::{UniformShape, dequantized_config, ragged_config, uniform_config, uniform_shape_config};
pub use record::{RECORD_FILE, Record, Step};
pub use routing_export::RoutingExport;
pub use safetensors::Dtype;
pub use safetensors_file::SafetensorsFile;
pub use score_conversion::Reduction;
pub use scores::{Denominator, Granularity, LayerScores, Pool, ScoreTable, WholeScores};
pub use shape::{MoeLayerShape, MoeShape};
pub use shard_layout::TensorSpec;
pub use shared_fold::SharedFold;
pub use side_files::copy_side_files;
pub use site::{ExpertMatrix, ExpertSite, LayerSite, MatrixId, Site};
pub use source::{ModelDescription, ModelSource, sliced};
pub use statistics::{Counts, Statistics};
pub use statistics_array::{ArrayKind, Extent, Fold};
pub use statistics_slice::StatisticsSlice;
pub use statistics_store::StatisticsStore;
pub use stored_expert::StoredExpert;
pub use stream_edit::StreamEdit;
pub use weights::TensorInfo;
pub use write::{OnProgress, Progress, WriteOptions, WriteReport, check_output, check_room, check_space, write};
pub use writer::{ShardedWriter, WriterOptions, Written, write_json};

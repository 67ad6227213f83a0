//! Mixture-of-Experts modules for [Burn](https://burn.dev).
//!
//! A layer is a [`Router`], which says where tokens go, and
//! [`ExpertNetworks`], which see them sorted by expert: [`MoeLayer`] joins any of both, with a
//! shared expert, a capacity and losses if wanted. Everything is a `Module` with a `Config`, runs on every backend, and
//! trains by Burn's autodiff.
//!
//! ```
//! use burn::module::Module;
//! use burn::tensor::{Device, Distribution, Tensor};
//! use moe_nn::{LossWeights, MoeConfig, SharedExpertConfig};
//!
//! let device = Device::default().autodiff();
//! let layer = MoeConfig::new(16, 8, 16)
//!     .with_top_k(4)
//!     .with_shared(Some(SharedExpertConfig::new(16, 32)))
//!     .with_losses(LossWeights { balance: 0.01, z: 0.001, ..LossWeights::default() })
//!     .init(&device);
//! let output = layer.forward(Tensor::<3>::random([2, 7, 16], Distribution::Default, &device));
//! let loss = output.hidden.square().mean() + output.losses.total().unwrap();
//! let gradients = loss.backward();
//! assert!(layer.router.gate.weight.val().grad(&gradients).is_some());
//! ```
//!
//! The products of experts are one operation with a derivative of its own ([`grouped_product`]), since cutting tensors
//! into experts inside Burn's graph costs a copy of the whole tensor per expert in the backward pass.
//!
//! # Features
#![doc = document_features::document_features!()]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod architectures;
pub mod assignment;
pub mod dispatch;
pub mod experts;
pub mod grouped;
mod layer;
pub mod losses;
mod record;
pub mod router;
mod routing;
mod smoothed_scale;
mod soft;
pub mod transformer;

pub use assignment::{Assignment, Segments};
pub use dispatch::dispatch;
pub use experts::*;
pub use grouped::{grouped_outer, grouped_product};
pub use layer::{Capacity, MoeConfig, MoeLayer, MoeOutput, SwigluMoe, padding_of};
pub use losses::{LossWeights, RouterLosses};
pub use record::RoutingRecord;
pub use router::*;
pub use routing::{Combine, RouteContext, Routing, Score};
pub use soft::{SoftMoe, SoftMoeConfig};
pub use transformer::*;

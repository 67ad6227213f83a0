//! Parameter-efficient fine-tuning of Mixture-of-Experts models.
//!
//! What is trained is either a part of the model's own weights or an adapter beside a frozen weight. Both reach every linear map of the
//! model, routed experts included, through [`moe_core::adapters`], and are trained by [`moe_core::train`].

#![deny(missing_docs)]

pub mod codec;
mod error;

pub use error::{Error, Result};

//! Parameter-efficient fine-tuning of Mixture-of-Experts models.
//!
//! What is trained is either a part of the model's own weights or an adapter beside a frozen weight. Both reach every linear map of the
//! model, routed experts included, through [`moe_core::adapters`], and are trained by [`moe_core::train`]. What makes adapters puts them
//! into an [`AdapterSet`]; the values they train are in its [`Bank`].

#![deny(missing_docs)]

pub mod codec;
mod error;
pub mod esft;
pub mod fold;
mod live;
pub mod own;
pub mod places;
pub mod probe;
pub mod report;
pub mod sampling;
mod set;
pub mod smt;
mod task;

pub use error::{Error, Result};
pub use live::{Bank, Live};
pub use set::{AdapterSet, SweepListener};
pub use task::{FineTune, Method, Plain, Target};

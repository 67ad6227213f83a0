//! Importance of experts and of FFN units in Mixture-of-Experts models: one collection pass, many scorers.
//!
//! Importance is found in two steps that know nothing of each other:
//!
//! 1. [`collectors`] watch a model run and add to named [`Statistics`](moe_checkpoint::Statistics). A [`Collection`]
//!    runs the collectors that a list of scorers needs, each once, however many scorers share it; [`collect()`] drives
//!    it wave by wave, saves every finished wave, and goes on where an interrupted run stopped.
//! 2. [`scorers`] turn statistics and expert weights into a [`ScoreTable`](moe_checkpoint::ScoreTable). They are pure:
//!    they never run the model, and a user can try ten of them on one statistics file.
//!
//! What is done with scores (budgets, plans, surgery) is the business of other crates. Reductions of unit scores to
//! experts and back are methods of [`ScoreTable`](moe_checkpoint::ScoreTable).
//!
//! ```
//! use moe_importance::{Scorer, ScorerConfig};
//!
//! let config: ScorerConfig = serde_json::from_str(r#"{"scorer": "fisher", "criterion": "token"}"#)?;
//! let scorer = config.build()?;
//! assert_eq!(scorer.needs()[0].as_str(), "fisher.token");
//!
//! let error = serde_json::from_str::<ScorerConfig>(r#"{"scorer": "fisher", "criterion": "tokens"}"#).unwrap_err();
//! assert!(error.to_string().contains("field `criterion`: unknown variant `tokens`"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Adding a method
//! A collector is a file in `collectors/` and a line in [`collectors::registry`]; a scorer is a file in `scorers/` and
//! a variant of [`ScorerConfig`]. Collectors of other crates go into a [`Collection`] by
//! [`Collection::with_collectors`].
#![deny(missing_docs)]

pub mod collect;
pub mod collectors;
pub mod error;
mod kernels;
pub mod scorers;
pub mod super_experts;

pub use collect::{Progress, WaveRunner, collect, recipe};
pub use collectors::{Collection, Collector, StatisticId, StatisticSpec};
pub use error::{Error, Result};
pub use scorers::{ExpertWeightsSource, NoWeights, Scorer, ScorerConfig};
pub use super_experts::{SuperExpertOptions, SuperExperts};

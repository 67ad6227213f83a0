//! Importance of experts and of FFN units in Mixture-of-Experts models: one collection pass, many scorers.
//!
//! Importance is found in two steps that know nothing of each other:
//!
//! 1. [`collectors`] watch a model run and add to named [`Statistics`](moe_checkpoint::Statistics). A [`Collection`]
//!    runs the collectors that a list of scorers needs, each once, however many scorers share it; a [`Calibration`]
//!    drives it wave by wave, saves every finished wave, and goes on where an interrupted run stopped. Other crates
//!    observe with collectors of their own, in the same way.
//! 2. [`scorers`] turn statistics and expert weights into a [`ScoreTable`](moe_checkpoint::ScoreTable). They are pure:
//!    they never run the model, and a user can try ten of them on one statistics file.
//!
//! What is done with scores (budgets, plans, surgery) is the business of other crates. Any scorer feeds any pruner:
//! [`ScorerConfig::into_experts`] reduces units to experts, [`ScorerConfig::into_units`] makes units of experts with a
//! tie-breaker, and both are scorers of their own in recipes (`experts`, `units`). [`SuperExperts`] finds the experts
//! that nothing should touch.
//!
//! ```
//! use moe_importance::{Scorer, ScorerConfig};
//!
//! let config: ScorerConfig = serde_json::from_str(r#"{"type": "fisher", "criterion": "token"}"#)?;
//! let scorer = config.build()?;
//! assert_eq!(scorer.needs().statistics[0].as_str(), "fisher.token");
//!
//! let error = serde_json::from_str::<ScorerConfig>(r#"{"type": "fisher", "criterion": "tokens"}"#).unwrap_err();
//! assert!(error.to_string().contains("field `criterion`: unknown variant `tokens`"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Scorers
//! Tokens t are those routed to the expert, T all tokens, n the routed ones. Unit activations u and outputs f are
//! before the routing weight g; gradients du and d have it. w is a unit's down column. *Cost* is what a pass over the
//! data must compute: **none** (no data), **routing** (forward, experts unobserved), **units** or **outputs**
//! (forward), **gradients** (forward and backward); shared by all scorers that need it.
//!
//! | scorer | of | formula | statistics | cost | source |
//! |---|---|---|---|---|---|
//! | `fisher` `token` | units | `(1/T) sum (dg^2 + dv^2) \|x\|^2 + u^2 \|d\|^2` | `fisher.token` | gradients | arXiv 2606.05538 |
//! | `fisher` `sequence` | units | mean over sequences of squared gradients of 3H weights | `fisher.sequence` | gradients, Gram matrices | arXiv 2606.05538 |
//! | `fisher` `abs` | units | mean over sequences and 3H weights of absolute gradients | `fisher.abs` | weight gradients | HectorHHZ/Less-is-MoE |
//! | `fisher` `abs`, `parts` | units | the same over the gate, up or down weights alone | `fisher.abs_…` | weight gradients | HectorHHZ/Less-is-MoE |
//! | `heapr` | units | `mean(u^2) mean((d.w)^2)` | `activation.square`, `gradient.square` | gradients | arXiv 2509.22299 |
//! | `coupled` | units | `mean((u du)^2)` | `taylor.square` | gradients | exact form of `heapr` |
//! | `taylor` | units | `mean \|u du\|`, `\|mean u du\|` or `-mean u du` | `taylor.magnitude`, `taylor.sum` | gradients | arXiv 1906.10771 |
//! | `activation` | units | `mean(g^p \|u\|) \|w\|`, p = 0, 1, 2 | `activation.magnitude…` | units | baseline of arXiv 2606.05538 |
//! | `projection` | units | `mean(u <w, f> / \|f\|)`, also times g | `projection.…` | outputs and one product more | arXiv 2606.09885 |
//! | `channel_norms` | units | `(\|u\| + \|up\| + \|gate\|) / 3`, norms over routed tokens | `activation.square`, `gate.square`, `up.square` | units and one product more | MoE-Slimming, ICML 2026 |
//! | `slimming` | units | a scorer of units, with weights of experts and layers for the allocator `coverage` | its own, `attribution.sum` | its own, outputs | MoE-Slimming, ICML 2026 |
//! | `magnitude` | units | norm of the unit's 3H weights | – | none | baseline of arXiv 2606.05538 |
//! | `router_score` | units | router probability or weight, then a unit scorer | `routing.probability`, `routing.weight` | routing | baseline of arXiv 2606.05538 |
//! | `random` | units | seeded noise | – | none | control |
//! | `frequency` | experts | `n / T` | `routing.tokens` | routing | control |
//! | `routing_weight` | experts | sum or mean of g: as applied, renormalized, softmax | `routing.weight`, `routing.renormalized`, `routing.softmax` | routing | arXiv 2510.13999 |
//! | `seer` | experts | hard or soft count per token | `routing.tokens`, `routing.weight` | routing | arXiv 2404.05089 |
//! | `dern` | experts | `(1/T) sum g`, renormalized over the top-k | `routing.renormalized` | routing | arXiv 2509.10377 |
//! | `esft` | experts | share in the layer's selections, or mean gate before the scaling factor | `routing.tokens`, `routing.gate` | routing | arXiv 2407.01906 |
//! | `bias` | experts | step times sum of signs of usage minus its mean or median | `routing.bias_…` | routing | arXiv 2604.23036 |
//! | `ean` | experts | sum or mean of `\|f\|` | `output.norm` | outputs | arXiv 2510.13999 |
//! | `man` | experts | mean of `\|f\|` or `\|f\|^2` over routed tokens | `output.norm`, `output.square` | outputs | arXiv 2606.15716 |
//! | `reap` | experts | mean or sum of `g^p \|f\|`, p = 1, 2, three gates | `output.norm_…` | outputs | arXiv 2510.13999, 2604.04356 |
//! | `tenp` | experts | `(1/T) sum g \|f\| (1 - cos(x, f))` | `output.turn` | outputs | arXiv 2606.09885 |
//! | `attribution` | experts | `(1/T) sum 2 a (1 - a) <m, o> / (\|y\|^2 + 1e-6)`, o = g f, m their sum, y the stream; second order | `attribution.…` | outputs | MoE-Slimming, ICML 2026 |
//! | `coalition` | experts | Shapley value `(1/T) sum <m, o> / \|m\|^2` | `coalition.share` | outputs | arXiv 2606.09886 |
//! | `mone` | experts | `\|sd(f)\| (1/T) sum g` | `output.moments` | outputs | arXiv 2507.00390 |
//! | `aimer` | experts | `1 - mean \|w\| / sqrt(mean w^2)` over all weights | – | none | arXiv 2603.18492 |
//! | `expert_magnitude` | experts | norm of all weights | – | none | baseline of arXiv 2606.05538 |
//! | `router_taylor` | experts | gradient of the router row: norm of row times gradient, mean absolute, squared | `router_gradient.…` | gradients | HectorHHZ/Less-is-MoE |
//! | `experts` | experts | sum, mean, max or mean of the top n of a unit scorer | its own | its own | |
//! | `units` | units | an expert scorer, then a unit scorer: as tie-breaker or factor | both | both | |
//!
//! Scores say over which pool they may be compared and added ([`Needs`]); a pruner refuses what they do not support.
//! Scores of units, estimates of the loss and shares of the traffic are comparable over the model; norms of outputs
//! (`ean`, `man`, `reap`, `tenp`, `attribution`, `coalition`, `channel_norms`), `esft`, `bias` and `aimer` within a
//! layer. Amounts are additive: losses, norms of weights, sums over all tokens. Shares, ranks, ratios and means over an
//! expert's own tokens are not.
//!
//! # Features
//! Without features the crate has no Burn: scorers and statistics files are all that is needed to score. `collect` adds
//! the collectors, which watch a model of moe-core; `flex` (the default, on the CPU), `wgpu`, `vulkan` and `cuda` imply
//! it.
//!
#![doc = document_features::document_features!()]
//!
//! Statistics kept for merging: `output.moments` (mean output), `routing.logit_gram` (inner products of logit columns),
//! `output.max` (super experts). Kept for zeros in weights: `input.square_weighted` and `unit.square_weighted`.
//!
//! # Adding a method
//! A program's own scorer implements [`Scorer`]. In this crate a collector is a file in `collectors/` and a line in
//! [`collectors::registry`]; a scorer is a file in `scorers/` and a line in `scorers/config.rs`. Sums over units or
//! outputs of an expert join the fused passes of [`collectors::UnitSums`] and [`collectors::OutputSums`] rather than
//! walk the same matrices again. Collectors of other crates go into a [`Collection`] by
//! [`Collection::with_collectors`].
#![deny(missing_docs)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod balance;
#[cfg(feature = "collect")]
pub mod calibration;
#[cfg(feature = "collect")]
pub mod collect;
#[cfg(feature = "collect")]
pub mod collectors;
pub mod error;
#[cfg(feature = "collect")]
mod finished_waves;
#[cfg(feature = "collect")]
mod kernels;
#[cfg(feature = "collect")]
mod progress;
pub mod scorers;
pub mod statistics;
pub mod super_experts;

pub use balance::{BalancedRows, RowUse};
#[cfg(feature = "collect")]
pub use calibration::{Calibration, recipe};
#[cfg(feature = "collect")]
pub use collect::{WaveRunner, collect};
#[cfg(feature = "collect")]
pub use collectors::{Collection, Collector, ExpertInputRanges, ExpertInputs, RouterSample};
pub use error::{Error, Result};
#[cfg(feature = "collect")]
pub use progress::Progress;
pub use scorers::{ExpertWeightsSource, Needs, NoWeights, Scorer, ScorerConfig};
pub use statistics::{StatisticId, StatisticSpec};
pub use super_experts::{SuperExpertOptions, SuperExperts};

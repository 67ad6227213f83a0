//! Decoding from several sources: models that each keep their own caches, and what makes one next token of their
//! logits.
//!
//! A [`Decoding`] is a [`DecodingConfig`] with the models it needs beside the one that is generated with.
//! [`generate_with`](crate::generate::generate_with) and [`evaluate_with`](crate::evaluate::evaluate_with) take it;
//! greedy choice, sampling, stops and batches work under all of them.
//!
//! | `type` | other sources | what | from |
//! |---|---|---|---|
//! | `plain` | none | the model alone | |
//! | `contrastive` | a weaker model | [`Contrastive`]: the weaker model's preferences are taken out | arXiv 2210.15097, 2309.09117 |
//! | `self_contrast` | none | [`SelfContrast`]: the same under the model's own weaker routing | SCMoE, arXiv 2405.14507 |
//! | `fusion` | pairs of a tuned and an untuned model | [`Fusion`]: what tuning changed is added, as much as the step asks for | arXiv 2406.15480 |
//! | `speculative` | a draft | [`Speculative`]: the draft proposes, the model accepts: what the model alone would give | arXiv 2211.17192 |
//! | `rewiring` | none | [`Rewiring`](crate::steering::Rewiring): vectors on the router's logits, fitted to every prompt | |
//! | `pathways` | none | [`Pathways`](crate::steering::Pathways): routing mixed from that of similar prompts | C3PO, arXiv 2504.07964 |

mod cache;
mod config;
mod contrastive;
mod decoder;
mod fusion;
mod mix;
mod sampling;
mod shared_pass;
mod speculative;

pub use config::{Decoding, DecodingConfig, DecodingReport, PathwaysConfig, SelfContrast};
pub use contrastive::{Contrast, Contrastive};
pub(crate) use decoder::{Decoder, Wanted, part_of};
pub use fusion::Fusion;
pub use mix::LogitMix;
pub use sampling::Sampling;
pub(crate) use shared_pass::SharedPass;
pub use speculative::Speculative;
pub(crate) use speculative::speculate;

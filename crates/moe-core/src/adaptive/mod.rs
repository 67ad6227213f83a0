//! What a trained model does at run time without other weights: how many experts a token goes to, and which.
//!
//! A [`RoutingConfig`] is one rule by its name and parameters, in JSON `{"type": "top_k", "k": 2}`. It becomes an
//! overlay on a model ([`RoutingConfig::on`]) that sweeps, generation and evaluation honor alike. Every rule has a
//! neutral setting, in which the model is the one without it, bit for bit.
//!
//! | `type` | what | neutral | from |
//! |---|---|---|---|
//! | `top_k` | [`TopK`]: fewer or more experts per token | the model's k | |
//! | `top_k_search` | [`TopKSearch`]: experts per token layer by layer, found on rows | the model's k on average | LExI, arXiv 2509.02753 |
//! | `ranks` | [`Ranks`]: the experts at these places of a token's order | the first k places | SCMoE, arXiv 2405.14507 |
//! | `top_p` | [`TopP`]: as few experts as hold a share of the mass | share 1 of the model's own experts | arXiv 2403.07652 and its code |
//! | `skip` | [`Skip`]: experts that weigh little beside the best | `beta` 0 | NAEE, arXiv 2402.14800 |
//! | `threshold` | [`Threshold`]: experts below a logit go, as if null experts took their places | `nulls` 0 | ours, from AdaMoE (arXiv 2406.13233) |
//! | `capacity` | [`Capacity`]: experts take so many tokens of a group and drop the rest | a factor that drops none | Switch (2101.03961), GShard (2006.16668), ST-MoE, Megatron |
//! | `expert_choice` | [`ExpertChoice`]: experts choose tokens | none | arXiv 2202.09368 |
//! | `forced` | [`Forced`]: experts by the label of a sequence | no label | Contrastive MoE |
//! | `bias` | [`SelectionBias`]: added to the scores for the choice, not for the weights | zeros | arXiv 2408.15664 |
//! | `shift` | [`Shift`]: added to the logits | zeros | Rewiring |
//! | `intervene` | [`Intervention`]: steers toward experts, or bans them | `lambda` 0, no experts | multilingual routing |
//! | `random` | [`RandomRouter`]: frozen random routers | none | SMoE-Dropout, arXiv 2303.01610 |
//!
//! A rule that a stock config or a stock tensor can hold is [exported](RoutingConfig::export); the others are saved
//! beside the model as `run_time.json` ([`RunTime::save_beside`]), with which [`Model::open`](crate::Model::open) runs
//! it.

mod capacity;
mod config;
mod expert_choice;
mod forced;
mod intervention;
mod members;
mod overlay;
mod per_layer;
mod random_router;
mod ranks;
mod run_time;
mod sampled;
mod selection_bias;
mod shift;
mod skip;
#[cfg(test)]
mod tests;
mod threshold;
mod top_k;
mod top_k_search;
mod top_p;

pub use capacity::{Capacity, CapacityFormula, CapacityGroup, DropPolicy};
pub use config::RoutingConfig;
pub use expert_choice::ExpertChoice;
pub use forced::{Forced, ForcedWeights};
pub use intervention::{Intervention, LayerExperts, Steering};
pub use overlay::RunTimeRouting;
pub use per_layer::PerLayer;
pub use random_router::RandomRouter;
pub use ranks::Ranks;
pub use run_time::RunTime;
pub use sampled::SampledRoutes;
pub use selection_bias::SelectionBias;
pub use shift::{LogitShift, Shift};
pub use skip::Skip;
pub use threshold::Threshold;
pub use top_k::TopK;
pub use top_k_search::{TopKCost, TopKSearch};
pub use top_p::{Mass, TopP, TopPCalibration};

//! Which layers tokens go through: fixed paths, layers that are dropped, and decisions while a model runs.
//!
//! A [`LayerPath`] leaves layers out, repeats them, or runs one of their halves ([`Model::with_path`]). A [`DepthRule`]
//! decides while the model runs, for every sequence how often it goes through a layer, for every token whether it
//! passes the feed-forward half ([`Model::with_depth_rule`]); a [`DepthConfig`] is either of these in JSON.
//! [`Influence`] says which layers change least, [`attention_ranks`] in which tokens attend alike, and a
//! [`LayerChoice`] chooses some of them; `moe_checkpoint::LayerDrop` writes the model without them, which stock loaders
//! read.
//!
//! [`Model::with_path`]: crate::Model::with_path
//! [`Model::with_depth_rule`]: crate::Model::with_depth_rule

mod attention_rank;
mod choice;
mod config;
mod influence;
mod path;
mod routers;
mod rule;
mod search;
mod token_skip;

pub use attention_rank::attention_ranks;
pub use choice::LayerChoice;
pub(crate) use config::copied;
pub use config::{DepthConfig, LayerRoutersConfig, TokenSkipConfig};
pub use influence::{Influence, LayerInfluence};
pub use path::{LayerPath, PathStep};
pub use routers::{LayerRouterTraining, LayerRouters};
pub use rule::DepthRule;
pub use search::{FoundPath, PathSearch, Rounds, path_of};
pub use token_skip::{SkipInput, SkipScore, TokenSkip};

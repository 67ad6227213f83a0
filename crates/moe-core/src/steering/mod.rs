//! Routing that is steered by data: by what experts a task uses, by the prompt itself, or by what worked for similar
//! prompts. The weights of the model never change.
//!
//! * [`RoutingProfile`] counts which experts domains or languages use, finds those of a task, and says in which layers
//!   two domains are routed alike: an [`Intervention`](crate::adaptive::Intervention) steers toward them.
//! * [`Rewiring`] fits a vector on the logits of every layer to the prompt, and again while it generates.
//! * [`Pathways`] mixes the routing of a prompt's last token from that of similar prompts that were answered rightly
//!   (C3PO), by kernel regression or by descent on the loss of those prompts.

mod pathways;
mod profile;
mod rewiring;
mod row_override;

pub use pathways::{Pathways, PathwaysMethod, Reference, ReferenceStore, Remixed};
pub use profile::RoutingProfile;
pub use rewiring::{Rewired, RewiredLayers, Rewiring, RewiringReport};
pub use row_override::RowOverride;

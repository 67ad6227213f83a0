//! DenseMixer: router gradients from all experts (code yaof20/DenseMixer; there is no full paper).
//!
//! With top-k routing a router learns only from the experts it chose. Here the output stays the sparse one, bit for
//! bit, while the router gets the gradient of the mixture of all experts: `v_e = <d loss / d y, E_e(x)>` for every
//! expert e, and from them the gradient of the logits as
//! [`Router::dense_backward`](moe_core::router::Router::dense_backward) defines it. Weights of experts get the sparse
//! gradient, and what experts read gets it from those that ran; through the router, what it reads gets the router's.
//!
//! The other experts run in the backward sweep only, in blocks of tokens, so that no `[tokens, experts, hidden]`
//! exists. A model is run as before.

use moe_core::adapters::{LayerSite, Site};
use serde::{Deserialize, Serialize};

use crate::{AdapterSet, Error, Installed, Result, Setting, TuningMethod};

/// Router gradients from all experts, in every MoE layer whose router is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DenseMixer {}

/// Has the routers that are trained in the set learn from all experts. To be installed after what trains them.
impl TuningMethod for DenseMixer {
    /// # Errors
    /// [`Error::Core`] for a routing rule without such a gradient.
    fn check(&self, on: &Setting<'_>) -> Result<()> {
        Ok(on.model.router().check_dense()?)
    }

    /// # Errors
    /// [`Error::Input`] if no router is trained; [`Error::Core`] for a routing rule without such a gradient.
    fn install(&self, on: &Setting<'_>, set: &mut AdapterSet) -> Result<Installed> {
        self.check(on)?;
        let router = |(site, _): (&Site, _)| match site {
            Site::Layer(layer, LayerSite::Router) => Some(*layer),
            _ => None,
        };
        let layers: Vec<usize> = set.sites().filter_map(router).collect();
        if layers.is_empty() {
            return Err(Error::input("trained routers", 0, "at least one, for router gradients from all experts"));
        }
        layers.into_iter().for_each(|layer| set.set_dense_router(layer));
        Ok(Installed::default())
    }
}

//! The model with adapters.

use std::sync::Arc;

use burn::tensor::Tensor;
use moe_checkpoint::Role;

use super::Model;
use crate::{
    adapters::{Adapters, ExpertSite, LayerSite, LinearAdapter, Site},
    error::{Error, Result},
    experts::ExpertTensors,
    host::HostView,
    kernels::weight::Weight,
    precision::Precision,
};

impl Model {
    /// The same checkpoint, seen through the overlays of this model, with `adapters`, and with a cache of its own.
    /// Experts that an overlay changes are adapted as changed.
    ///
    /// # Errors
    /// As [`new`](Self::new). Adapters that do not fit the map they are for are found when it is first loaded.
    pub fn with_adapters(&self, adapters: Arc<dyn Adapters>) -> Result<Self> {
        let mut model = self.like(self.checkpoint.clone())?;
        (model.experts, model.routing) = (self.experts.clone(), self.routing.clone());
        (model.path, model.depth, model.centered) = (self.path.clone(), self.depth.clone(), self.centered);
        model.adapters = Some(adapters);
        model.decoded_per_use = self.decoded_per_use;
        Ok(model)
    }

    /// Its adapters.
    pub fn adapters(&self) -> Option<&Arc<dyn Adapters>> {
        self.adapters.as_ref()
    }

    /// A weight of this shape with its adapter, if it has one. One that is replaced is not read.
    pub(super) fn adapted(
        &self,
        what: &str,
        dims: [usize; 2],
        adapter: Option<Arc<dyn LinearAdapter>>,
        load: impl FnOnce() -> Result<Weight>,
    ) -> Result<Weight> {
        let Some(adapter) = adapter else { return load() };
        if adapter.dims() != dims {
            let found = format!("{:?}", adapter.dims());
            return Err(Error::input(format!("shape of the adapter of {what}"), found, format!("{dims:?}")));
        }
        let base = if adapter.replaces() { Weight::absent(dims) } else { load()? };
        Ok(base.adapted(adapter))
    }

    /// The adapter of a linear map of a layer.
    pub(super) fn layer_adapter(&self, layer: usize, site: LayerSite) -> Option<Arc<dyn LinearAdapter>> {
        self.adapters.as_ref()?.linear(Site::Layer(layer, site))
    }

    /// A weight of a layer with its adapter.
    pub(super) fn site_weight(
        &self,
        layer: usize,
        site: LayerSite,
        roles: &[Role],
        dims: [usize; 2],
    ) -> Result<Weight> {
        let adapter = self.layer_adapter(layer, site);
        let what = || Site::Layer(layer, site).to_string();
        if site == LayerSite::LatentKvUp && adapter.as_ref().is_some_and(|adapter| !adapter.is_linear()) {
            let expected = "one that is a matrix, since generation moves this map to the other side of products";
            return Err(Error::input(format!("adapter of {}", what()), "one that depends on its input", expected));
        }
        // A choice of experts is no place to round at: two that are close would change places.
        let precision = if site == LayerSite::Router { Precision::F32 } else { self.precision };
        self.adapted(&what(), dims, adapter, || self.weight(roles, dims, precision))
    }

    /// An expert with its adapters.
    pub(super) fn adapted_expert(
        &self,
        layer: usize,
        expert: usize,
        load: impl FnOnce() -> Result<ExpertTensors>,
    ) -> Result<ExpertTensors> {
        let Some(adapters) = &self.adapters else { return load() };
        let site = |map| Site::Expert { layer, expert, map };
        let (gate_up, down) = (adapters.linear(site(ExpertSite::GateUp)), adapters.linear(site(ExpertSite::Down)));
        let mut expert = load()?;
        let add = |weight: &mut Weight, map, adapter| -> Result<()> {
            let what = site(map).to_string();
            let on = |base: Weight| self.adapted(&what, base.dims(), adapter, || Ok(base));
            // An adapter of what is both gate and up is on the one matrix that both are.
            *weight = match weight.once() {
                Some(once) => on(once.clone())?.twice(),
                None => on(weight.clone())?,
            };
            Ok(())
        };
        add(&mut expert.gate_up, ExpertSite::GateUp, gate_up)?;
        add(&mut expert.down, ExpertSite::Down, down)?;
        Ok(expert)
    }

    /// Adds the gradient `d [T, H]` at the embeddings of `ids` to that of what is trained of them.
    pub(crate) fn embedding_backward(&self, ids: &[u32], d: &Tensor<2>) {
        if let Some(adapter) = self.adapters.as_ref().and_then(|adapters| adapters.embedding()) {
            let factor = self.config().multipliers.embedding as f32;
            let d = crate::layers::scaled(d.clone(), factor);
            adapter.add_gradient(ids, HostView::new(&d).as_slice());
        }
    }
}

//! RMoE: routers that know what the layers before them said.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Tensor};

use crate::dispatch::dispatch;
use crate::experts::{ExpertNetworks, GatedExperts, GatedExpertsConfig};
use crate::router::{GruCell, GruCellConfig, RecurrentRouter, RecurrentRouterConfig};
use crate::routing::Routing;

/// Configuration of [`RmoeStack`].
#[derive(Config, Debug)]
pub struct RmoeStackConfig {
    /// The number of layers.
    pub layers: usize,
    /// The router of each layer.
    pub router: RecurrentRouterConfig,
    /// Intermediate size of one expert.
    pub d_ff: usize,
}

/// The layers of experts of an RMoE (arXiv 2408.06793), without what stands between them: a [`RecurrentRouter`] and
/// experts per layer, and the one [`GruCell`] that carries a token's state from layer to layer.
#[derive(Module, Debug)]
pub struct RmoeStack {
    /// The routers.
    pub routers: Vec<RecurrentRouter>,
    /// The experts of each layer.
    pub experts: Vec<GatedExperts>,
    /// The cell of all layers.
    pub cell: GruCell,
}

impl RmoeStackConfig {
    /// Makes the layers.
    ///
    /// # Panics
    ///
    /// As [`RecurrentRouterConfig::init`].
    pub fn init(&self, device: &Device) -> RmoeStack {
        let experts = GatedExpertsConfig::new(self.router.d_model, self.d_ff, self.router.num_experts);
        RmoeStack {
            routers: (0..self.layers).map(|_| self.router.init(device)).collect(),
            experts: (0..self.layers).map(|_| experts.init(device)).collect(),
            cell: GruCellConfig::new(self.router.d_router).init(device),
        }
    }
}

impl RmoeStack {
    /// Runs one layer on `[tokens, hidden]` with the state that the layer before left, none in the first: output,
    /// routing and the state for the next layer.
    ///
    /// # Panics
    ///
    /// If there is no such layer.
    pub fn forward(&self, layer: usize, x: Tensor<2>, state: Option<Tensor<2>>) -> (Tensor<2>, Routing, Tensor<2>) {
        let (routing, state) = self.routers[layer].route(x.clone(), state, &self.cell);
        let output = dispatch(x, &routing, |rows, segments| self.experts[layer].forward(rows, segments));
        (output, routing, state)
    }
}

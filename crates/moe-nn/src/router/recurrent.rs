//! Routers of neighboring layers that know of each other.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::activation::{sigmoid, tanh};
use burn::tensor::{Device, Tensor};

use super::{check_top_k, gate, top_of_rows};
use crate::routing::{Combine, Routing, Score, host, logits};

/// Configuration of a [`GruCell`].
#[derive(Config, Debug)]
pub struct GruCellConfig {
    /// The width of input and state.
    pub width: usize,
}

/// One step of a gated recurrent unit, which all layers of an RMoE share.
#[derive(Module, Debug)]
pub struct GruCell {
    /// Input to reset, update and new, `width -> 3 width`.
    pub input: Linear,
    /// State to reset, update and new, `width -> 3 width`.
    pub state: Linear,
}

impl GruCellConfig {
    /// Makes the cell.
    pub fn init(&self, device: &Device) -> GruCell {
        let linear = || LinearConfig::new(self.width, 3 * self.width).init(device);
        GruCell { input: linear(), state: linear() }
    }
}

impl GruCell {
    /// The next state, `[tokens, width]`: `s = sigma(W_s u + U_s h)`, `q = sigma(W_q u + U_q h)`,
    /// `n = tanh(W_n u + s * (U_n h))`, `h' = (1 - q) * n + q * h`.
    pub fn forward(&self, u: Tensor<2>, h: Tensor<2>) -> Tensor<2> {
        let parts = |x: Tensor<2>| -> [Tensor<2>; 3] {
            let [rows, wide] = x.dims();
            let x = x.reshape([rows, 3, wide / 3]);
            [0, 1, 2].map(|part| x.clone().narrow(1, part, 1).reshape([rows, wide / 3]))
        };
        let [reset_u, update_u, new_u] = parts(self.input.forward(u));
        let [reset_h, update_h, new_h] = parts(self.state.forward(h.clone()));
        let reset = sigmoid(reset_u + reset_h);
        let update = sigmoid(update_u + update_h);
        let new = tanh(new_u + reset * new_h);
        new.clone() + update * (h - new)
    }
}

/// Configuration of a [`RecurrentRouter`].
#[derive(Config, Debug)]
pub struct RecurrentRouterConfig {
    /// Hidden size.
    pub d_model: usize,
    /// The number of experts.
    pub num_experts: usize,
    /// Experts per token.
    #[config(default = 2)]
    pub top_k: usize,
    /// The width of the state.
    #[config(default = 128)]
    pub d_router: usize,
}

/// The layer-wise recurrent router of RMoE (arXiv 2408.06793): a projection per layer, one [`GruCell`] for all layers,
/// whose state goes from layer to layer and not from token to token, and a gate per layer.
///
/// It is no [`Router`](super::Router), since it takes and gives a state.
#[derive(Module, Debug)]
pub struct RecurrentRouter {
    /// Hidden to `d_router`.
    pub project: Linear,
    /// `d_router` to experts.
    pub gate: Linear,
    top_k: usize,
}

impl RecurrentRouterConfig {
    /// Makes the router of one layer.
    ///
    /// # Panics
    ///
    /// If a token takes more experts than there are.
    pub fn init(&self, device: &Device) -> RecurrentRouter {
        check_top_k(self.top_k, self.num_experts);
        RecurrentRouter {
            project: LinearConfig::new(self.d_model, self.d_router).with_bias(false).init(device),
            gate: gate(self.d_router, self.num_experts, false, device),
            top_k: self.top_k,
        }
    }
}

impl RecurrentRouter {
    /// The number of experts.
    pub fn num_experts(&self) -> usize {
        self.gate.weight.dims()[1]
    }

    /// Routes `[tokens, hidden]` with the state that the layer before left, none in the first layer; the second value
    /// is the state for the next layer, `[tokens, d_router]`, with its gradient attached.
    pub fn route(&self, x: Tensor<2>, state: Option<Tensor<2>>, cell: &GruCell) -> (Routing, Tensor<2>) {
        let u = logits(x, &self.project);
        let before = state.unwrap_or_else(|| u.zeros_like());
        let state = cell.forward(u, before);
        let logits = logits(state.clone(), &self.gate);
        let scores = Score::Softmax.of(logits.clone());
        let assignment = top_of_rows(&host(&logits), self.num_experts(), self.top_k);
        let weights = Combine::Renormalize.weights(&logits, &scores, &assignment);
        (Routing { logits, scores, assignment, weights, num_experts: self.num_experts() }, state)
    }
}

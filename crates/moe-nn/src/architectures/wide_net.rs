//! WideNet: one layer of experts at every depth.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Tensor};

use crate::layer::{MoeConfig, SwigluMoe};
use crate::losses;
use crate::routing::{RouteContext, Routing};
use crate::transformer::{Attention, AttentionConfig};

/// Configuration of [`WideNet`].
#[derive(Config, Debug)]
pub struct WideNetConfig {
    /// Hidden size.
    pub d_model: usize,
    /// How often the block runs.
    pub depth: usize,
    /// Its attention.
    pub attention: AttentionConfig,
    /// Its experts.
    pub moe: MoeConfig,
}

/// WideNet (arXiv 2107.11817): attention, router and experts are those of one block at every depth; norms alone are
/// private, and send a token to other experts at other depths. The block is held once, so that its gradient is the sum
/// over depths.
#[derive(Module, Debug)]
pub struct WideNet {
    /// The attention of all depths.
    pub attention: Attention,
    /// The experts of all depths.
    pub moe: SwigluMoe,
    /// The norm before the attention of each depth.
    pub attention_norms: Vec<RmsNorm>,
    /// The norm before the experts of each depth.
    pub ffn_norms: Vec<RmsNorm>,
}

impl WideNetConfig {
    /// Makes the network.
    ///
    /// # Panics
    ///
    /// As its parts.
    pub fn init(&self, device: &Device) -> WideNet {
        let norms = || (0..self.depth).map(|_| RmsNormConfig::new(self.d_model).init(device)).collect();
        WideNet {
            attention: self.attention.init(self.d_model, device),
            moe: MoeConfig { d_model: self.d_model, ..self.moe.clone() }.init(device),
            attention_norms: norms(),
            ffn_norms: norms(),
        }
    }
}

impl WideNet {
    /// `[batch, tokens, hidden] -> [batch, tokens, hidden]`, with the sum of the routers' losses and the routing of
    /// each depth.
    pub fn forward(&self, x: Tensor<3>) -> (Tensor<3>, Option<Tensor<1>>, Vec<Routing>) {
        let (mut x, mut loss, mut routings) = (x, None, Vec::new());
        for (attention, ffn) in self.attention_norms.iter().zip(&self.ffn_norms) {
            x = x.clone() + self.attention.forward(attention.forward(x));
            let context = RouteContext { causal: true, ..RouteContext::default() };
            let output = self.moe.forward_in(ffn.forward(x.clone()), &context);
            x = x + output.hidden;
            loss = losses::add(loss, output.losses.total());
            routings.push(output.routing);
        }
        (x, loss, routings)
    }
}

//! DeepSeekMoE: many thin experts, and some that every token runs through.

use burn::config::Config;
use burn::tensor::Device;

use crate::experts::SharedExpertConfig;
use crate::layer::{MoeConfig, SwigluMoe};
use crate::losses::LossWeights;
use crate::router::TopKRouterConfig;
use crate::routing::Combine;

/// DeepSeekMoE (arXiv 2401.06066): of `num_experts` experts of width `d_ff` with `top_k` per token, each is cut into
/// `segments`, `shared` of the pieces are for all tokens, and a token chooses `segments * top_k - shared` of the
/// others. The active size stays; weights are not renormalized. Balance it by `expert_balance` or `device_balance`.
#[derive(Config, Debug)]
pub struct DeepSeekMoeConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Intermediate size of an expert before it is cut.
    pub d_ff: usize,
    /// Experts before they are cut.
    pub num_experts: usize,
    /// Experts per token before they are cut.
    pub top_k: usize,
    /// Pieces of one expert.
    #[config(default = 4)]
    pub segments: usize,
    /// Pieces that every token runs through.
    #[config(default = 1)]
    pub shared: usize,
    /// The coefficients of the losses.
    #[config(default = "LossWeights::default()")]
    pub losses: LossWeights,
}

impl DeepSeekMoeConfig {
    /// The layer's configuration.
    ///
    /// # Panics
    ///
    /// If pieces do not divide the width, or all pieces per token are shared.
    pub fn layer(&self) -> MoeConfig {
        let Self { d_model, d_ff, num_experts, top_k, segments, shared, losses } = *self;
        assert!(segments > 0 && d_ff.is_multiple_of(segments), "{segments} pieces do not divide a width of {d_ff}");
        assert!(shared < segments * top_k, "{shared} of {} pieces per token are shared", segments * top_k);
        let width = d_ff / segments;
        let routed = segments * num_experts - shared;
        let router = TopKRouterConfig::new(d_model, routed).with_combine(Combine::Raw);
        MoeConfig::new(d_model, width, routed)
            .with_top_k(segments * top_k - shared)
            .with_router(Some(router))
            .with_shared((shared > 0).then(|| SharedExpertConfig::new(d_model, shared * width)))
            .with_losses(losses)
    }

    /// Makes the layer.
    ///
    /// # Panics
    ///
    /// As [`DeepSeekMoeConfig::layer`].
    pub fn init(&self, device: &Device) -> SwigluMoe {
        self.layer().init(device)
    }
}

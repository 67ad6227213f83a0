//! LayerNorm scaling: norms of deep layers give less.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Tensor};

/// Configuration of [`ScaledNorm`].
#[derive(Config, Debug)]
pub struct ScaledNormConfig {
    /// Hidden size.
    pub d_model: usize,
    /// The block, from 1.
    pub block: usize,
    /// Epsilon of the norm.
    #[config(default = 1e-6)]
    pub epsilon: f64,
}

/// The output of a norm times `1 / sqrt(block)`, for both norms of a block and not for the last norm (the curse of
/// depth, arXiv 2502.05795): the variance of outputs no longer grows exponentially with depth. For training from the
/// start; not together with initialization scaled by depth.
#[derive(Module, Debug)]
pub struct ScaledNorm {
    /// The norm.
    pub norm: RmsNorm,
    scale: f64,
}

impl ScaledNormConfig {
    /// Makes the norm.
    ///
    /// # Panics
    ///
    /// If the block is 0.
    pub fn init(&self, device: &Device) -> ScaledNorm {
        assert!(self.block > 0, "blocks count from 1");
        let norm = RmsNormConfig::new(self.d_model).with_epsilon(self.epsilon).init(device);
        ScaledNorm { norm, scale: (self.block as f64).powf(-0.5) }
    }
}

impl ScaledNorm {
    /// `[..., hidden] -> [..., hidden]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.norm.forward(x) * self.scale
    }

    /// The plain norm of the same function, its weights times the scale.
    pub fn folded(self) -> RmsNorm {
        let scale = self.scale;
        RmsNorm { gamma: self.norm.gamma.map(|gamma| gamma * scale), ..self.norm }
    }
}

//! Experts whose weights are -1, 0 or 1 times one scale.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};

use super::{ExpertNetworks, GatedExperts, GatedExpertsConfig};
use crate::assignment::Segments;

/// Configuration of [`TernaryExperts`].
#[derive(Config, Debug)]
pub struct TernaryExpertsConfig {
    /// The experts in full precision that training keeps.
    pub experts: GatedExpertsConfig,
}

/// Gated experts that compute with ternary weights, `W~ = s * clamp(round(W / s), -1, 1)` with `s` the mean absolute
/// value of each expert's matrix, as MoTE (arXiv 2506.14435) and BitNet b1.58 (arXiv 2402.17764) have them.
///
/// Training keeps weights in full precision; the gradient of `W~` goes to `W` as it is (straight through).
#[derive(Module, Debug)]
pub struct TernaryExperts {
    /// The weights that are trained.
    pub experts: GatedExperts,
}

impl TernaryExpertsConfig {
    /// Makes the experts.
    ///
    /// # Panics
    ///
    /// As [`GatedExpertsConfig::init`].
    pub fn init(&self, device: &Device) -> TernaryExperts {
        TernaryExperts { experts: self.experts.init(device) }
    }
}

/// The ternary weights of `[experts, in, out]`, with the gradient of the identity.
pub fn ternary(weights: Tensor<3>) -> Tensor<3> {
    let fixed = weights.clone().detach();
    let scale = fixed.clone().abs().mean_dims(&[1, 2]).clamp_min(1e-8); // [experts, 1, 1]
    let rounded = (fixed.clone() / scale.clone()).round().clamp(-1.0, 1.0) * scale;
    weights + (rounded - fixed)
}

impl ExpertNetworks for TernaryExperts {
    fn num_experts(&self) -> usize {
        self.experts.num_experts()
    }

    fn forward(&self, rows: Tensor<2>, segments: &Segments) -> Tensor<2> {
        let ternary = |weights: &Param<Tensor<3>>| ternary(weights.val());
        let (gate, up, down) = (&self.experts.gate, &self.experts.up, &self.experts.down);
        self.experts.forward_with(rows, [ternary(gate), ternary(up), ternary(down)], segments)
    }
}

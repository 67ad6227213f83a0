//! Depth that is decided while a model runs.

use std::fmt::Debug;

use burn::tensor::Tensor;

use crate::{error::Result, trace::WaveInfo};

/// Decides, layer by layer, how often sequences go through a layer and which tokens pass its feed-forward half.
///
/// Both decisions are causal in generation: how often a sequence goes through a layer is decided once, from its prompt,
/// and holds for all that follows; a token's own decision is taken when it is fed. Where the feed-forward half is
/// skipped, attention still runs, so that caches are those of the whole model.
pub trait DepthRule: Debug + Send + Sync {
    /// How many times (0, 1 or 2) each sequence of `wave` goes through `layer`, given what enters it `[T, H]`; `None`
    /// for once, all of them. In a second round a layer has keys and values of its own.
    ///
    /// # Errors
    /// Whatever makes it impossible.
    fn times(&self, layer: usize, x: &Tensor<2>, wave: &WaveInfo) -> Result<Option<Vec<u8>>> {
        let _ = (layer, x, wave);
        Ok(None)
    }

    /// Factor of each token on what the feed-forward half of `layer` adds to the stream, given what enters that half
    /// `[T, H]`: 0 skips it, 1 leaves it as it is. `None` for 1, all of them.
    ///
    /// # Errors
    /// Whatever makes it impossible.
    fn factors(&self, layer: usize, middle: &Tensor<2>, wave: &WaveInfo) -> Result<Option<Vec<f32>>> {
        let _ = (layer, middle, wave);
        Ok(None)
    }

    /// Whether it decides by [`factors`](Self::factors) alone: [`times`](Self::times) is always `None`. Only such a
    /// rule can be gone back through, since every sequence passes every layer once.
    fn is_by_token(&self) -> bool {
        false
    }

    /// Given the gradient at each token's factor `[T]`, that at what enters the half `[T, H]`, if factors depend on it.
    /// Adds up the gradients of what the rule has to train if `parameters` are wanted, those of losses of its own
    /// included, which are multiplied by [`WaveInfo::loss_tokens`]. Asked where [`factors`](Self::factors) gave some.
    ///
    /// # Errors
    /// Whatever makes it impossible.
    fn factors_backward(
        &self,
        layer: usize,
        middle: &Tensor<2>,
        wave: &WaveInfo,
        d_factors: &[f32],
        parameters: bool,
    ) -> Result<Option<Tensor<2>>> {
        let _ = (layer, middle, wave, d_factors, parameters);
        Ok(None)
    }
}

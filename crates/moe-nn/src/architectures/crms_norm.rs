//! A root-mean-square norm of vectors without mean, one coordinate less.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{LayerNorm, Linear};
use burn::tensor::Tensor;

/// Configuration of [`CrmsNorm`].
#[derive(Config, Debug)]
pub struct CrmsNormConfig {
    /// Hidden size D of the model whose streams have no mean; vectors have D - 1 coordinates.
    pub d_model: usize,
    /// Epsilon of the norm.
    #[config(default = 1e-5)]
    pub epsilon: f64,
}

/// The norm of a stream without mean that leaves out its last coordinate, minus the sum of the others (CRMSNorm, arXiv
/// 2305.14858): `x / sqrt((sum x_i^2 + (sum x_i)^2) / D + eps)`, D counting the one left out.
///
/// A model with layer norms becomes one with these, exactly: what writes to the stream loses its mean and its last row
/// ([`writer`](Self::writer)), what reads a norm takes the norm's weights into its own and subtracts its last column
/// from the others ([`reader`](Self::reader)). The norm has no weights then.
#[derive(Module, Debug)]
pub struct CrmsNorm {
    d_model: usize,
    epsilon: f64,
}

impl CrmsNormConfig {
    /// Makes the norm.
    ///
    /// # Panics
    ///
    /// If the hidden size is below 2: nothing would be left.
    pub fn init(&self) -> CrmsNorm {
        assert!(self.d_model > 1, "a stream of {} coordinates has no last one to leave out", self.d_model);
        CrmsNorm { d_model: self.d_model, epsilon: self.epsilon }
    }
}

impl CrmsNorm {
    /// `[..., D - 1] -> [..., D - 1]`.
    pub fn forward<const R: usize>(&self, x: Tensor<R>) -> Tensor<R> {
        let last = x.clone().sum_dim(R - 1);
        let squares = x.clone().square().sum_dim(R - 1) + last.square();
        x / (squares / self.d_model as f64 + self.epsilon).sqrt()
    }

    /// A map into the stream, `[in, D]` with a bias or without, as one that writes D - 1 coordinates without mean. An
    /// embedding is such a map without bias.
    pub fn writer(map: &Linear) -> Linear {
        Linear {
            weight: Param::from_tensor(centered(map.weight.val())),
            bias: map.bias.as_ref().map(|bias| Param::from_tensor(centered(bias.val()))),
        }
    }

    /// A map that reads a layer norm, `[D, out]`, as one that reads this norm, `[D - 1, out]`, the norm's weight and
    /// bias in it.
    pub fn reader(norm: &LayerNorm, map: &Linear) -> Linear {
        let [d, out] = map.weight.dims();
        let weight = map.weight.val() * norm.gamma.val().reshape([d, 1]);
        let last = weight.clone().narrow(0, d - 1, 1);
        let beta = norm.beta.as_ref().map(|beta| beta.val().reshape([1, d]).matmul(map.weight.val()).reshape([out]));
        let bias = match (map.bias.as_ref().map(Param::val), beta) {
            (Some(bias), Some(beta)) => Some(bias + beta),
            (bias, beta) => bias.or(beta),
        };
        Linear { weight: Param::from_tensor(weight.narrow(0, 0, d - 1) - last), bias: bias.map(Param::from_tensor) }
    }
}

/// Without the mean over the last dimension, and without its last place.
fn centered<const R: usize>(x: Tensor<R>) -> Tensor<R> {
    let d = x.dims()[R - 1];
    let mean = x.clone().mean_dim(R - 1);
    (x - mean).narrow(R - 1, 0, d - 1)
}

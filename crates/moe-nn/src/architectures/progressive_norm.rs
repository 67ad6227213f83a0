//! SLAB: a norm that becomes a linear map while a model is trained.

use burn::config::Config;
use burn::module::{Flag, Module, Param};
use burn::nn::{BatchNorm, BatchNormConfig, Initializer, LayerNorm, LayerNormConfig, Linear};
use burn::tensor::{Device, Tensor};

/// Configuration of [`ProgressiveNorm`].
#[derive(Config, Debug)]
pub struct ProgressiveNormConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Epsilon of both norms.
    #[config(default = 1e-5)]
    pub epsilon: f64,
}

/// PRepBN of SLAB (arXiv 2405.11582): `lambda LayerNorm(x) + (1 - lambda) (BatchNorm(x) + eta x)`, with `lambda` going
/// from 1 to 0 over training, and eta learned. In evaluation the second part alone counts, as published; it is affine,
/// so that [`fold`](Self::fold) puts it into the linear map that follows.
#[derive(Module, Debug)]
pub struct ProgressiveNorm {
    /// What training begins with.
    pub layer: LayerNorm,
    /// What is left in the end; its statistics are of all tokens of a batch.
    pub batch: BatchNorm,
    /// The share of the input itself beside the batch norm, `[1]`.
    pub eta: Param<Tensor<1>>,
    /// Whether norms are mixed. [`Module::valid`] turns it off.
    pub training: Param<Flag>,
    lambda: f64,
}

impl ProgressiveNormConfig {
    /// Makes the norm, at the beginning of its way.
    pub fn init(&self, device: &Device) -> ProgressiveNorm {
        ProgressiveNorm {
            layer: LayerNormConfig::new(self.d_model).with_epsilon(self.epsilon).init(device),
            batch: BatchNormConfig::new(self.d_model).with_epsilon(self.epsilon).init(device),
            eta: Initializer::Ones.init([1], device),
            training: Param::from_bool(true),
            lambda: 1.0,
        }
    }
}

impl ProgressiveNorm {
    /// This norm at a place of its way, from 0 to 1: `lambda = 1 - progress`.
    pub fn at(mut self, progress: f64) -> Self {
        self.lambda = 1.0 - progress.clamp(0.0, 1.0);
        self
    }

    /// The share of the layer norm in training.
    pub fn lambda(&self) -> f64 {
        self.lambda
    }

    /// `[tokens, hidden] -> [tokens, hidden]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let training = self.training.val().is_enabled() && x.device().is_autodiff();
        // The batch norm sees every batch from the first step on, so that its statistics are there in the end.
        let batch = self.batch.forward(x.clone()) + x.clone() * self.eta.val().unsqueeze();
        match training {
            true => self.layer.forward(x) * self.lambda + batch * (1.0 - self.lambda),
            false => batch,
        }
    }

    /// The scale and shift `[hidden]` that this norm is in evaluation.
    pub fn affine(&self) -> (Tensor<1>, Tensor<1>) {
        let (mean, variance) = (self.batch.running_mean.value_sync(), self.batch.running_var.value_sync());
        let scale = self.batch.gamma.val() / (variance + self.batch.epsilon).sqrt();
        let shift = self.batch.beta.val() - mean * scale.clone();
        (scale + self.eta.val(), shift)
    }

    /// The linear map that is this norm, as in evaluation, and then `next`: without a cost of its own.
    pub fn fold(&self, next: &Linear) -> Linear {
        let (scale, shift) = self.affine();
        folded(scale, shift, next)
    }
}

/// `next(scale * x + shift)` as one linear map.
pub(super) fn folded(scale: Tensor<1>, shift: Tensor<1>, next: &Linear) -> Linear {
    let weight = next.weight.val(); // [in, out]
    let shifted = shift.unsqueeze::<2>().matmul(weight.clone()).squeeze_dim::<1>(0);
    let bias = match &next.bias {
        Some(bias) => bias.val() + shifted,
        None => shifted,
    };
    Linear {
        weight: Param::from_tensor((weight * scale.unsqueeze_dim::<2>(1)).detach()),
        bias: Some(Param::from_tensor(bias.detach())),
    }
}

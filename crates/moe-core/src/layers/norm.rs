//! The norm in front of a block.

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::{
    adapters::VectorAdapter,
    host::HostView,
    kernels::{
        layer_norm::{layer_norm, layer_norm_backward},
        norm::{rms_norm, rms_norm_backward},
        reduce::column_sums,
    },
};

/// A norm over the rows of `x [n, d]`.
#[derive(Clone, Debug)]
pub struct Norm {
    /// `[d]`.
    pub weight: Tensor<1>,
    /// `[d]` of a LayerNorm; an RMSNorm has none.
    pub bias: Option<Tensor<1>>,
    /// Added to the mean square or variance.
    pub eps: f32,
    /// Added to the weight as it is stored: 1 in families that store it less one, else 0.
    pub offset: f32,
    /// Whether every row that a LayerNorm reads has mean zero already, so that it is an RMSNorm with a bias.
    pub centered: bool,
    /// What stands in for the weight and is trained.
    pub weight_adapter: Option<Arc<dyn VectorAdapter>>,
    /// What stands in for the bias and is trained.
    pub bias_adapter: Option<Arc<dyn VectorAdapter>>,
}

impl Norm {
    /// A frozen norm.
    pub fn new(weight: Tensor<1>, bias: Option<Tensor<1>>, eps: f32) -> Self {
        Self { weight, bias, eps, offset: 0.0, centered: false, weight_adapter: None, bias_adapter: None }
    }

    /// `norm(x)`.
    pub fn forward(&self, x: &Tensor<2>) -> Tensor<2> {
        let weight = self.current_weight();
        match &self.bias {
            None => rms_norm(x, &weight, self.eps),
            Some(bias) => {
                let trained = self.bias_adapter.as_ref().map(|adapter| adapter.value());
                let bias = trained.as_ref().unwrap_or(bias);
                match self.centered {
                    true => rms_norm(x, &weight, self.eps) + bias.clone().unsqueeze::<2>(),
                    false => layer_norm(x, &weight, bias, self.eps),
                }
            }
        }
    }

    /// Gradient with respect to `x`, given that of the result; with `parameters`, also those of what is trained.
    pub fn backward(&self, x: &Tensor<2>, dy: &Tensor<2>, parameters: bool) -> Tensor<2> {
        let weight = self.current_weight();
        if parameters {
            if let Some(adapter) = &self.weight_adapter {
                adapter.add_gradient(&self.weight_gradient(x, dy));
            }
            if let Some(adapter) = self.bias_adapter.as_ref().filter(|_| self.bias.is_some()) {
                adapter.add_gradient(&column_sums(dy));
            }
        }
        match &self.bias {
            None => rms_norm_backward(x, &weight, self.eps, dy),
            Some(_) => layer_norm_backward(x, &weight, self.eps, dy),
        }
    }

    /// Whether something of it is trained.
    pub(crate) fn is_trained(&self) -> bool {
        self.weight_adapter.is_some() || self.bias_adapter.is_some()
    }

    fn current_weight(&self) -> Tensor<1> {
        let stored = self.weight_adapter.as_ref().map_or_else(|| self.weight.clone(), |adapter| adapter.value());
        if self.offset == 0.0 { stored } else { stored.add_scalar(self.offset) }
    }

    /// Sum over the rows of `dy` times the normalized `x`.
    fn weight_gradient(&self, x: &Tensor<2>, dy: &Tensor<2>) -> Vec<f32> {
        let d = x.dims()[1];
        let (x, dy) = (HostView::new(x), HostView::new(dy));
        let mut sum = vec![0.0f64; d];
        for (x, dy) in x.as_slice().chunks_exact(d).zip(dy.as_slice().chunks_exact(d)) {
            let mean = match self.bias {
                None => 0.0,
                Some(_) => x.iter().map(|v| f64::from(*v)).sum::<f64>() / d as f64,
            };
            let variance = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / d as f64;
            let scale = 1.0 / (variance + f64::from(self.eps)).sqrt();
            for ((sum, x), dy) in sum.iter_mut().zip(x).zip(dy) {
                *sum += f64::from(*dy) * (f64::from(*x) - mean) * scale;
            }
        }
        sum.into_iter().map(|v| v as f32).collect()
    }
}

//! Expert weights on a device.

use burn::tensor::{Device, Tensor};
use moe_checkpoint::ExpertWeights;

use crate::{
    adapters::{Tokens, Wanted},
    host::{self, HostView},
    kernels::{
        math,
        swiglu::{GatedActivation, SwigluGradients, swiglu, swiglu_backward},
        weight::Weight,
    },
};

/// One gated feed-forward block `f(x) = down unit(gate x, up x)` on a device: a routed expert, a shared expert or a
/// dense layer. Gate and up are stacked so that both are one matrix product.
#[derive(Clone, Debug)]
pub struct ExpertTensors {
    /// Gate rows, then up rows: `[2I, H]`.
    pub gate_up: Weight,
    /// Biases of the gate rows, then of the up rows `[2I]`.
    pub gate_up_bias: Option<Tensor<1>>,
    /// `[H, I]`.
    pub down: Weight,
    /// `[H]`.
    pub down_bias: Option<Tensor<1>>,
    /// How gate and up become a unit.
    pub activation: GatedActivation,
}

impl ExpertTensors {
    /// Moves canonical host weights to `device`, as f32, with SiLU.
    pub fn new(weights: ExpertWeights, device: &Device) -> Self {
        let ExpertWeights { mut gate, up, down, gate_bias, up_bias, down_bias, width, hidden } = weights;
        gate.extend_from_slice(&up);
        let gate_up_bias = gate_bias.zip(up_bias).map(|(gate, up)| [gate, up].concat());
        let vector = |values: Vec<f32>| {
            let len = values.len();
            host::from_vec(values, [len], device)
        };
        Self {
            gate_up: Weight::dense(host::from_vec(gate, [2 * width, hidden], device)),
            gate_up_bias: gate_up_bias.map(vector),
            down: Weight::dense(host::from_vec(down, [hidden, width], device)),
            down_bias: down_bias.map(vector),
            activation: GatedActivation::Silu,
        }
    }

    /// The same of an expert without a gate of its own, whose gate is its up projection: held once where both are the
    /// same.
    pub fn gateless(weights: ExpertWeights, device: &Device) -> Self {
        if weights.gate != weights.up || weights.up_bias.is_some() {
            return Self::new(weights, device);
        }
        let ExpertWeights { up, down, down_bias, width, hidden, .. } = weights;
        Self {
            gate_up: Weight::dense(host::from_vec(up, [width, hidden], device)).twice(),
            gate_up_bias: None,
            down: Weight::dense(host::from_vec(down, [hidden, width], device)),
            down_bias: down_bias.map(|bias| host::from_vec(bias, [hidden], device)),
            activation: GatedActivation::Silu,
        }
    }

    /// The same with another activation.
    pub fn with_activation(self, activation: GatedActivation) -> Self {
        Self { activation, ..self }
    }

    /// Number of units, I. May be 0.
    pub fn width(&self) -> usize {
        self.down.dims()[1]
    }

    /// Whether the output is zero for every input.
    pub fn is_zero(&self) -> bool {
        self.width() == 0 && self.down_bias.is_none()
    }

    /// Gate and up `[n, 2I]` of `x [n, H]`.
    pub fn pre_activations(&self, x: &Tensor<2>) -> Tensor<2> {
        self.pre_activations_for(x, Tokens::WAVE)
    }

    /// The same of some tokens of a wave.
    pub fn pre_activations_for(&self, x: &Tensor<2>, tokens: Tokens<'_>) -> Tensor<2> {
        self.gate_up.forward_for(x, self.gate_up_bias.as_ref(), tokens)
    }

    /// Units `[n, I]` of gate and up.
    pub fn units(&self, gate_up: &Tensor<2>) -> Tensor<2> {
        swiglu(gate_up, self.activation)
    }

    /// `f(x) [n, H]` of the units.
    pub fn output(&self, units: &Tensor<2>) -> Tensor<2> {
        self.output_for(units, Tokens::WAVE)
    }

    /// The same of some tokens of a wave.
    pub fn output_for(&self, units: &Tensor<2>, tokens: Tokens<'_>) -> Tensor<2> {
        self.down.forward_for(units, self.down_bias.as_ref(), tokens)
    }

    /// Backward of `row_weights[t] * f(x[t])` down to the pre-activations, from `upstream [n, H]`, the gradient at the
    /// *weighted* output.
    pub fn backward(
        &self,
        gate_up: &Tensor<2>,
        upstream: &Tensor<2>,
        row_weights: Option<&[f32]>,
        want_d_units: bool,
    ) -> SwigluGradients {
        self.backward_for(gate_up, upstream, row_weights, Tokens::WAVE, want_d_units, false)
    }

    /// The same for some tokens of a wave. With `parameters`, adds up the gradients of what is trained beside the down
    /// projection.
    pub fn backward_for(
        &self,
        gate_up: &Tensor<2>,
        upstream: &Tensor<2>,
        row_weights: Option<&[f32]>,
        tokens: Tokens<'_>,
        want_d_units: bool,
        parameters: bool,
    ) -> SwigluGradients {
        self.backward_scaled(gate_up, None, upstream, row_weights, tokens, want_d_units, parameters).0
    }

    /// The same of a block whose units are multiplied by `factors [n, I]` before the down projection, and the gradient
    /// at the factors, row weight included. The units of the result are those before the factors.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward_scaled(
        &self,
        gate_up: &Tensor<2>,
        factors: Option<&Tensor<2>>,
        upstream: &Tensor<2>,
        row_weights: Option<&[f32]>,
        tokens: Tokens<'_>,
        want_d_units: bool,
        parameters: bool,
    ) -> (SwigluGradients, Option<Tensor<2>>) {
        let wanted = Wanted { input: true, parameters };
        let linear = self.down.adapter().is_none_or(|adapter| adapter.is_linear());
        let scaled = |units: Tensor<2>| match factors {
            Some(factors) => units * factors.clone(),
            None => units,
        };
        let (mut gradients, d_factors) = if linear {
            // dW = (w dy)^T u = dy^T (w u): so the gradient at the units stays without the weight
            let weighted = || weighted_rows(scaled(self.units(gate_up)), row_weights);
            let du = self.down.gradient(weighted, upstream, tokens, wanted).expect("wanted"); // [n, I]
            let d_factors = factors.map(|_| weighted_rows(du.clone() * self.units(gate_up), row_weights));
            (swiglu_backward(gate_up, self.activation, scaled(du), row_weights, want_d_units), d_factors)
        } else {
            let units = scaled(self.units(gate_up));
            let output = self.down.forward_for(&units, None, tokens);
            let dy = weighted_rows(upstream.clone(), row_weights);
            let du = self.down.gradient(|| units, &dy, tokens, wanted).expect("wanted");
            let d_factors = factors.map(|_| du.clone() * self.units(gate_up));
            let mut gradients = swiglu_backward(gate_up, self.activation, scaled(du), None, want_d_units);
            gradients.d_row_weights = row_products(upstream, &output);
            (gradients, d_factors)
        };
        if let Some(bias) = &self.down_bias {
            // the weight of a row multiplies the bias, too
            let (bias, upstream) = (HostView::new(bias), HostView::new(upstream));
            let rows = upstream.as_slice().chunks_exact(bias.as_slice().len());
            for (d, row) in gradients.d_row_weights.iter_mut().zip(rows) {
                *d += math::dot(row, bias.as_slice());
            }
        }
        (gradients, d_factors)
    }
}

/// `a[t] . b[t]` of each row.
pub(crate) fn row_products(a: &Tensor<2>, b: &Tensor<2>) -> Vec<f32> {
    let columns = a.dims()[1].max(1);
    let (a, b) = (HostView::new(a), HostView::new(b));
    a.as_slice().chunks_exact(columns).zip(b.as_slice().chunks_exact(columns)).map(|(a, b)| math::dot(a, b)).collect()
}

/// `weights[t] * x[t]`.
pub(crate) fn weighted_rows(x: Tensor<2>, weights: Option<&[f32]>) -> Tensor<2> {
    match weights {
        Some(weights) => {
            let device = x.device();
            x * host::from_vec(weights.to_vec(), [weights.len(), 1], &device)
        }
        None => x,
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::{device, pattern};

    #[test]
    fn the_gradient_of_a_row_weight_is_the_product_of_upstream_and_output() {
        let values = |shape, seed| host::into_vec(pattern(shape, seed));
        let weights = |bias: bool| ExpertWeights {
            gate: values([3, 4], 1),
            up: values([3, 4], 2),
            down: values([4, 3], 3),
            gate_bias: bias.then(|| values([1, 3], 4)),
            up_bias: bias.then(|| values([1, 3], 5)),
            down_bias: bias.then(|| values([1, 4], 6)),
            width: 3,
            hidden: 4,
        };
        for bias in [false, true] {
            let expert = ExpertTensors::new(weights(bias), &device())
                .with_activation(GatedActivation::ClampedSilu { alpha: 1.7, limit: 0.8 });
            let (x, upstream) = (pattern([5, 4], 7), pattern([5, 4], 8));
            let gate_up = expert.pre_activations(&x);
            let output = expert.output(&expert.units(&gate_up));
            let found = expert.backward(&gate_up, &upstream, Some(&[0.3; 5]), false).d_row_weights;
            let expected = host::into_vec((output * upstream).sum_dim(1));
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?} {expected:?}");
        }
    }

    #[test]
    fn an_expert_without_units_still_has_its_bias() {
        let mut weights = ExpertWeights { hidden: 2, ..ExpertWeights::default() };
        assert!(ExpertTensors::new(weights.clone(), &device()).is_zero());
        (weights.gate_bias, weights.up_bias) = (Some(vec![]), Some(vec![]));
        weights.down_bias = Some(vec![1.0, -2.0]);
        let expert = ExpertTensors::new(weights, &device());
        assert!(!expert.is_zero());
        let output = expert.output(&expert.units(&expert.pre_activations(&pattern([2, 2], 1))));
        assert_eq!(host::into_vec(output), [1.0, -2.0, 1.0, -2.0]);
    }
}

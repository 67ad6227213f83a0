//! What a layer makes of an input of its own, beside the residual stream.

use burn::tensor::Tensor;

use super::{Norm, scaled};
use crate::{
    adapters::{Tokens, Wanted},
    kernels::{
        rows::RowAccumulator,
        swiglu::{GatedActivation, swiglu, swiglu_backward},
        weight::Weight,
    },
};

/// The end of a layer that has an input of its own (per-layer embeddings, as in Gemma 3n and Gemma 4):
/// `scale * (x + norm(output (act(gate x) * p)))` with `p = (norm(projection e / sqrt(H)) + row) / sqrt(2)`, where `e`
/// is the embedding of the token and `row` that of the token in the table of the layers' inputs.
#[derive(Clone, Debug)]
pub struct LayerInput {
    /// From the embedding, this layer's rows `[P, H]`.
    pub projection: Weight,
    /// Norm of what that gives `[P]`.
    pub projection_norm: Norm,
    /// Gate on the input `[P, H]`.
    pub gate: Weight,
    /// To the residual stream `[H, P]`.
    pub output: Weight,
    /// Norm of what that gives `[H]`.
    pub output_norm: Norm,
    /// Activation of the gate.
    pub activation: GatedActivation,
    /// Factor on the output of the layer.
    pub scale: f32,
}

impl LayerInput {
    /// What the norm of the projection reads `[T, P]`, of the embeddings `[T, H]`.
    fn projected(&self, embedded: &Tensor<2>) -> Tensor<2> {
        scaled(self.projection.forward(embedded, None), self.projection_factor())
    }

    fn projection_factor(&self) -> f32 {
        (self.projection.dims()[1] as f32).powf(-0.5)
    }

    /// The input of the layer `[T, P]` from the embeddings `[T, H]` of the tokens and their rows `[T, P]` of the table.
    pub fn input(&self, embedded: &Tensor<2>, rows: &Tensor<2>) -> Tensor<2> {
        let mut sum = RowAccumulator::from_tensor(self.projection_norm.forward(&self.projected(embedded)));
        sum.add(rows);
        scaled(sum.into_tensor(), std::f32::consts::FRAC_1_SQRT_2)
    }

    /// The gradient at the embeddings `[T, H]` from that at the input `[T, P]`.
    pub(crate) fn embedding_gradient(&self, embedded: &Tensor<2>, d_input: Tensor<2>) -> Tensor<2> {
        let d_normed = scaled(d_input, std::f32::consts::FRAC_1_SQRT_2);
        let d_projected = self.projection_norm.backward(&self.projected(embedded), &d_normed, false);
        self.projection.backward(&scaled(d_projected, self.projection_factor()))
    }

    /// The output of the layer `[T, H]`, from the residual stream `x [T, H]` and the input `[T, P]`.
    pub fn forward(&self, x: &Tensor<2>, input: &Tensor<2>) -> Tensor<2> {
        let units = swiglu(&self.gated(x, input), self.activation);
        let mut out = RowAccumulator::from_tensor(self.output_norm.forward(&self.output.forward(&units, None)));
        out.add(x);
        scaled(out.into_tensor(), self.scale)
    }

    /// Gate and input beside each other `[T, 2 P]`.
    fn gated(&self, x: &Tensor<2>, input: &Tensor<2>) -> Tensor<2> {
        Tensor::cat(vec![self.gate.forward(x, None), input.clone()], 1)
    }

    /// Gradients at the residual stream and at the input, from that of the layer's output; with `parameters`, also
    /// those of what is trained.
    pub(crate) fn backward(&self, x: &Tensor<2>, input: &Tensor<2>, dy: Tensor<2>, parameters: bool) -> [Tensor<2>; 2] {
        let around = scaled(dy, self.scale);
        let gated = self.gated(x, input);
        let units = swiglu(&gated, self.activation);
        let d_output = self.output_norm.backward(&self.output.forward(&units, None), &around, parameters);
        let wanted = Wanted { input: true, parameters };
        let d_units = self.output.gradient(|| units, &d_output, Tokens::WAVE, wanted).expect("wanted");
        let d_gated = swiglu_backward(&gated, self.activation, d_units, None, false).d_gate_up;
        let width = input.dims()[1];
        let (d_gate, d_input) = (d_gated.clone().narrow(1, 0, width), d_gated.narrow(1, width, width));
        let mut dx = RowAccumulator::from_tensor(around);
        dx.add(&self.gate.gradient(|| x.clone(), &d_gate, Tokens::WAVE, wanted).expect("wanted"));
        [dx.into_tensor(), d_input]
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::{
        super::tests::{HIDDEN, TOKENS, check_quotients, norm, weight},
        *,
    };
    use crate::kernels::testing::pattern;

    #[test]
    fn an_input_of_a_layer_has_the_gradients_of_difference_quotients() {
        let block = LayerInput {
            projection: weight([3, HIDDEN], 1),
            projection_norm: norm(3, 2, false),
            gate: weight([3, HIDDEN], 3),
            output: weight([HIDDEN, 3], 4),
            output_norm: norm(HIDDEN, 5, false),
            activation: GatedActivation::GeluTanh,
            scale: 0.8,
        };
        let (x, dy) = (pattern([TOKENS, HIDDEN], 20), pattern([TOKENS, HIDDEN], 21));
        let (embedded, rows) = (pattern([TOKENS, HIDDEN], 22), pattern([TOKENS, 3], 23));
        let input = block.input(&embedded, &rows);
        let [dx, d_input] = block.backward(&x, &input, dy.clone(), false);
        check_quotients(&x, &dy, dx, |x| block.forward(x, &input));
        check_quotients(&input, &dy, d_input.clone(), |input| block.forward(&x, input));
        let d_embedded = block.embedding_gradient(&embedded, d_input);
        check_quotients(&embedded, &dy, d_embedded, |embedded| block.forward(&x, &block.input(embedded, &rows)));
    }
}

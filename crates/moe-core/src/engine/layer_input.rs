//! Inputs that layers have of their own, and the end of a layer that reads one.

use burn::tensor::Tensor;

use super::{Engine, backward::Backward};
use crate::{
    error::Result,
    kernels::rows::RowAccumulator,
    layers::{FfnLayer, LayerInput},
};

impl Engine<'_> {
    /// The output of layer `layer` on tokens `ids`, from that of its feed-forward half: with what the layer makes of an
    /// input of its own, where it has one.
    pub(crate) fn with_layer_input(&self, layer: usize, x: Tensor<2>, ids: &[u32]) -> Result<Tensor<2>> {
        let Some(block) = self.model.layer_input(layer)? else { return Ok(x) };
        let (_, input) = self.input_of(layer, &block, ids)?;
        let output = block.forward(&x, &input);
        self.model.check_reads()?;
        Ok(output)
    }

    /// The embeddings of tokens, and the input of a layer.
    fn input_of(&self, layer: usize, block: &LayerInput, ids: &[u32]) -> Result<(Tensor<2>, Tensor<2>)> {
        let inputs = self.model.config().layer_inputs.expect("a layer has an input where the model has them");
        let embedded = self.model.embed(ids)?;
        let input = block.input(&embedded, &self.model.layer_input_rows(layer, inputs, ids)?);
        Ok((embedded, input))
    }

    /// The gradient at what the feed-forward half of a layer gives, from that at the output of the layer; `middle` is
    /// what the half reads, `sums` what it left on the tape.
    pub(super) fn layer_input_backward(
        &self,
        sweep: &Backward<'_>,
        layer: usize,
        ffn: &FfnLayer,
        middle: &Tensor<2>,
        sums: &[Tensor<2>],
        dy: Tensor<2>,
    ) -> Result<Tensor<2>> {
        let Some(block) = self.model.layer_input(layer)? else { return Ok(dy) };
        let (embedded, input) = self.input_of(layer, &block, &sweep.prepared.ids)?;
        let parameters = sweep.needs.parameters;
        let [dx, d_input] = block.backward(&ffn.output_again(middle, sums), &input, dy, parameters);
        let embeddings = self.model.adapters().is_some_and(|adapters| adapters.embedding().is_some());
        if parameters && embeddings {
            let through = block.embedding_gradient(&embedded, d_input);
            let mut sum = sweep.d_embedded.borrow_mut();
            match &mut *sum {
                Some(sum) => sum.add(&through),
                None => *sum = Some(RowAccumulator::from_tensor(through)),
            }
        }
        self.model.check_reads()?;
        Ok(dx)
    }
}

//! Inputs of the layers' own, read from the checkpoint.

use burn::tensor::Tensor;
use moe_checkpoint::{LayerInputs, LayerRole, Role};

use super::{Model, gated_activation};
use crate::{adapters::LayerSite, error::Result, host, layers::LayerInput};

impl Model {
    /// What layer `layer` makes of an input of its own, where the layers of the model have such inputs.
    pub(crate) fn layer_input(&self, layer: usize) -> Result<Option<LayerInput>> {
        let Some(LayerInputs { width, .. }) = self.config().layer_inputs else { return Ok(None) };
        if let Some(found) = &self.lock().layer_inputs[layer] {
            return Ok(Some(found.clone()));
        }
        let (h, eps) = (self.config().hidden_size, self.config().norm_eps);
        let role = |r| Role::Layer(layer, r);
        let [gate, output] = [LayerRole::LayerInputGate, LayerRole::LayerInputOutput].map(|r| [role(r)]);
        let rows = layer * width..(layer + 1) * width;
        let loaded = LayerInput {
            projection: self.row_weight(Role::LayerInputProjection, rows, [width, h])?,
            projection_norm: self.rms_norm(Role::LayerInputNorm, width, eps)?,
            gate: self.site_weight(layer, LayerSite::LayerInputGate, &gate, [width, h])?,
            output: self.site_weight(layer, LayerSite::LayerInputOutput, &output, [h, width])?,
            output_norm: self.rms_norm(role(LayerRole::LayerInputOutputNorm), h, eps)?,
            activation: gated_activation(self.config().hidden_act)?,
            scale: self.layer_scale(layer)?,
        };
        let mut cache = self.lock();
        if layer < cache.residency.layers {
            cache.layer_inputs[layer] = Some(loaded.clone());
        }
        Ok(Some(loaded))
    }

    /// Rows `[T, P]` of tokens in the table of the layers' inputs, the columns of layer `layer`.
    pub(crate) fn layer_input_rows(&self, layer: usize, inputs: LayerInputs, ids: &[u32]) -> Result<Tensor<2>> {
        let width = inputs.width;
        let mut values = Vec::with_capacity(ids.len() * width);
        for &id in ids {
            let columns = layer * width..(layer + 1) * width;
            values.extend(self.checkpoint.read_f32_columns(Role::LayerInputEmbedding, id as usize, columns)?);
        }
        let factor = (width as f32).sqrt();
        values.iter_mut().for_each(|value| *value *= factor);
        Ok(host::from_vec(values, [ids.len(), width], &self.device))
    }
}

//! Where the experts of a layer are read from: the decoder, or a layer that predicts further tokens.

use std::borrow::Cow;

use moe_checkpoint::{
    Checkpoint, Dtype, ExpertBytes, ExpertLayout, ExpertPart, ExpertTensor, ExpertTensorLayout, LayerRole, RawMatrix,
    Role,
};

use super::TargetLayer;
use super::stream::whole;
use crate::Result;

/// What precedes the number of a layer in the names of its tensors.
const LAYERS: &str = ".layers.";

/// A layer with routed experts that is none of the decoder's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FurtherLayer {
    /// What the names of its tensors start with, e.g. `mtp.layers.0.`.
    pub prefix: String,
    /// How its experts are stored; per expert or fused.
    pub layout: ExpertLayout,
    /// Width of every expert.
    pub widths: Vec<usize>,
}

/// What precedes the part of a name that says what a tensor of a layer is: `model.layers.3.` of `model.layers.3.mlp.gate.weight`.
pub(super) fn layer_prefix(name: &str) -> Option<&str> {
    let start = name.find(LAYERS)? + LAYERS.len();
    let digits = name[start..].find('.').filter(|digits| *digits > 0)?;
    name[start..start + digits].bytes().all(|byte| byte.is_ascii_digit()).then(|| &name[..=start + digits])
}

impl FurtherLayer {
    /// The name that a tensor of decoder layer 0 has in this layer.
    fn renamed(&self, name: &str) -> String {
        format!("{}{}", self.prefix, name.strip_prefix(layer_prefix(name).unwrap_or_default()).unwrap_or(name))
    }

    /// Name of a tensor of its experts.
    pub fn expert_tensor_name(&self, from: &Checkpoint, tensor: ExpertTensor) -> String {
        self.renamed(&from.expert_tensor_name(0, tensor))
    }

    /// One expert, without a cast.
    ///
    /// # Errors
    /// [`Error::Checkpoint`](crate::Error::Checkpoint) for a tensor that cannot be read.
    pub fn expert<'a>(&self, from: &'a Checkpoint, expert: usize) -> Result<ExpertBytes<'a>> {
        let read = |part: ExpertPart| -> Result<RawMatrix<'a>> {
            let place = self.layout.place(from.shape().hidden_size, &self.widths, expert, part);
            let name = self.expert_tensor_name(from, place.tensor);
            let dtype = from.plain_dtype(&name)?;
            let size = dtype.bitsize() / 8;
            let range = place.range().start * size..place.range().end * size;
            let bytes = match dtype == from.info(&name)?.dtype {
                true => from.tensor_bytes(&name, range)?,
                false => Cow::Owned(whole(from, &name)?[range].to_vec()),
            };
            Ok(RawMatrix { bytes, dtype, rows: place.rows, cols: place.cols })
        };
        let [gate, up, down] = ExpertPart::ALL;
        Ok(ExpertBytes { gate: read(gate)?, up: read(up)?, down: read(down)?, gate_up_bias: None, down_bias: None })
    }
}

impl TargetLayer<'_> {
    /// What it is called in messages.
    pub fn label(&self) -> String {
        match &self.further {
            Some(further) => format!("layer `{}`", further.prefix.trim_end_matches('.')),
            None => format!("layer {}", self.layer),
        }
    }

    /// Width of every expert before.
    pub fn widths_before<'a>(&'a self, from: &'a Checkpoint) -> &'a [usize] {
        match &self.further {
            Some(further) => &further.widths,
            None => from.shape().layer(self.layer).map_or(&[], |layer| &layer.widths),
        }
    }

    /// Name of a tensor of its experts.
    pub fn expert_tensor_name(&self, from: &Checkpoint, tensor: ExpertTensor) -> String {
        match &self.further {
            Some(further) => further.expert_tensor_name(from, tensor),
            None => from.expert_tensor_name(self.layer, tensor),
        }
    }

    /// Name of another tensor of it.
    pub fn tensor_name(&self, from: &Checkpoint, role: LayerRole) -> String {
        match &self.further {
            Some(further) => further.renamed(&from.family().tensor_name(Role::Layer(0, role))),
            None => from.family().tensor_name(Role::Layer(self.layer, role)),
        }
    }

    /// The tensors that hold its experts before.
    pub fn tensors_before(&self, from: &Checkpoint) -> Result<Vec<ExpertTensorLayout>> {
        let layout = match &self.further {
            Some(further) => further.layout,
            None => from.expert_layout(self.layer)?,
        };
        let biases = match &self.further {
            Some(_) => self.biases,
            None => from.config().moe(self.layer).map_or(self.biases, |moe| moe.biases),
        };
        Ok(layout.tensors(from.shape().hidden_size, self.widths_before(from), biases).unwrap_or_default())
    }

    /// Dtype of a part of an expert as it is read.
    pub fn expert_dtype(&self, from: &Checkpoint, expert: usize, part: ExpertPart) -> Result<Option<Dtype>> {
        let Some(further) = &self.further else { return Ok(from.expert_dtype(self.layer, expert, part)?) };
        if ExpertPart::BIASES.contains(&part) {
            return Ok(None);
        }
        let place = further.layout.place(from.shape().hidden_size, &further.widths, expert, part);
        Ok(Some(from.plain_dtype(&further.expert_tensor_name(from, place.tensor))?))
    }

    /// One expert as the checkpoint has it.
    pub fn expert_bytes<'a>(&self, from: &'a Checkpoint, expert: usize) -> Result<ExpertBytes<'a>> {
        match &self.further {
            Some(further) => further.expert(from, expert),
            None => Ok(from.expert_bytes(self.layer, expert)?),
        }
    }

    /// Gives the pages of an expert back to the system.
    pub fn release_expert(&self, from: &Checkpoint, expert: usize) -> Result<()> {
        let Some(further) = &self.further else { return Ok(from.release_expert(self.layer, expert)?) };
        for part in ExpertPart::ALL {
            let place = further.layout.place(from.shape().hidden_size, &further.widths, expert, part);
            from.release_tensor(&further.expert_tensor_name(from, place.tensor))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_layers_are_told_apart() {
        assert_eq!(layer_prefix("model.layers.61.mlp.experts.0.up_proj.weight"), Some("model.layers.61."));
        assert_eq!(layer_prefix("mtp.layers.0.mlp.gate.weight"), Some("mtp.layers.0."));
        assert_eq!(layer_prefix("model.language_model.layers.7.x"), Some("model.language_model.layers.7."));
        assert_eq!(layer_prefix("model.mtp_block.0.mlp.gate.weight"), None);
        assert_eq!(layer_prefix("model.layers.x.y"), None);
    }
}

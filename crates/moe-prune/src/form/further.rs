//! Where the experts of a layer are read from: the decoder, or a layer that predicts further tokens.

use moe_checkpoint::{
    Checkpoint, Dtype, ExpertLayout, ExpertPart, ExpertTensor, ExpertTensorLayout, LayerRole, RawMatrix, Role,
};

use super::target::{TargetLayer, TargetSet};
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

/// What precedes the part of a name that says what a tensor of a layer is: `model.layers.3.` of
/// `model.layers.3.mlp.gate.weight`.
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

    /// One part of an expert, without a cast.
    ///
    /// # Errors
    /// Those of reading the tensor.
    pub fn part<'a>(
        &self,
        from: &'a Checkpoint,
        expert: usize,
        part: ExpertPart,
    ) -> moe_checkpoint::Result<RawMatrix<'a>> {
        let place = self.layout.place(from.shape().hidden_size, &self.widths, expert, part);
        let name = self.expert_tensor_name(from, place.tensor);
        let dtype = from.info(&name)?.dtype;
        let bytes = from.tensor_bytes(&name, bytes_of(place.range(), dtype))?;
        Ok(RawMatrix { bytes, dtype, rows: place.rows, cols: place.cols })
    }

    /// Gives the pages of an expert back to the system.
    pub fn release(&self, from: &Checkpoint, expert: usize) {
        for part in ExpertPart::ALL {
            let place = self.layout.place(from.shape().hidden_size, &self.widths, expert, part);
            let name = self.expert_tensor_name(from, place.tensor);
            if let Ok(info) = from.info(&name) {
                from.release_range(&name, bytes_of(place.range(), info.dtype));
            }
        }
    }
}

/// Bytes of a range of elements.
fn bytes_of(elements: std::ops::Range<usize>, dtype: Dtype) -> std::ops::Range<usize> {
    let size = dtype.bitsize() / 8;
    elements.start * size..elements.end * size
}

impl TargetLayer {
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
        let hidden = from.shape().hidden_size;
        let tensors = match (&self.further, from.config().moe(self.layer)) {
            (Some(further), _) => further.layout.tensors(hidden, &further.widths, self.biases),
            (None, Some(moe)) => from.expert_layout(self.layer)?.tensors(hidden, &moe.stored_widths(), moe.biases),
            (None, None) => None,
        };
        Ok(tensors.unwrap_or_default())
    }

    /// Dtype of a part of a set of weights as it is read; that of the projection before it for a bias that a repair
    /// adds.
    pub fn dtype(&self, from: &Checkpoint, set: &TargetSet, part: ExpertPart) -> Result<Option<Dtype>> {
        if let Some(further) = &self.further {
            if ExpertPart::BIASES.contains(&part) {
                return Ok(None);
            }
            let place = further.layout.place(from.shape().hidden_size, &further.widths, set.source, part);
            return Ok(Some(from.info(&further.expert_tensor_name(from, place.tensor))?.dtype));
        }
        match from.expert_dtype(self.layer, set.expert, part)? {
            None if part == ExpertPart::DownBias => Ok(from.expert_dtype(self.layer, set.expert, ExpertPart::Down)?),
            found => Ok(found),
        }
    }

    /// One part of a set of weights as the checkpoint has it.
    pub fn part<'a>(
        &self,
        from: &'a Checkpoint,
        set: &TargetSet,
        part: ExpertPart,
    ) -> moe_checkpoint::Result<Option<RawMatrix<'a>>> {
        match &self.further {
            Some(further) => further.part(from, set.source, part).map(Some),
            None => from.set_part(self.layer, set.source, part),
        }
    }

    /// Gives the pages of a set of weights back to the system.
    pub fn release(&self, from: &Checkpoint, set: &TargetSet) {
        match &self.further {
            Some(further) => further.release(from, set.source),
            None => from.release_set(self.layer, set.source),
        }
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

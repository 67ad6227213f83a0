//! A quantized model in plain floats.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use crate::config::Ffn;
use crate::expert_bytes::RawMatrix;
use crate::experts::{ExpertLayout, ExpertPart};
use crate::ragged::dequantized_config;
use crate::shard_layout::TensorSpec;
use crate::source::{ModelDescription, ModelSource};
use crate::weights::TensorInfo;
use crate::{Checkpoint, Result};

/// The values of a quantized base as BF16, in the layout of its family, without factors and exponents. It is the same model:
/// its fingerprint is that of the base.
struct Dequantized {
    base: Arc<Checkpoint>,
    /// Layers whose experts need another layout than they are stored in.
    layers: BTreeSet<usize>,
}

impl Checkpoint {
    /// The same model without quantization: what every method that changes weights starts from. The model itself where nothing
    /// is quantized.
    ///
    /// # Errors
    /// Those of [`Checkpoint::from_source`].
    pub fn dequantized(self: &Arc<Self>) -> Result<Arc<Self>> {
        if self.quantization().is_none() {
            return Ok(self.clone());
        }
        let mut layers = BTreeSet::new();
        let mut replaced = BTreeSet::new();
        let mut tensors = Vec::new();
        for (layer, config) in self.config().layers.iter().enumerate() {
            let Ffn::Moe(moe) = &config.ffn else { continue };
            let layout = self.expert_layout(layer)?;
            if layout != ExpertLayout::Mxfp4 {
                continue;
            }
            layers.insert(layer);
            let (hidden, widths) = (self.config().hidden_size, moe.stored_widths());
            let listed = |layout: ExpertLayout| layout.tensors(hidden, &widths, moe.biases).into_iter().flatten();
            replaced.extend(listed(layout).map(|tensor| self.expert_tensor_name(layer, tensor.tensor)));
            for tensor in listed(self.family().stock_layout()) {
                let part = tensor.blocks.first().and_then(|(_, block)| block.parts().first().copied());
                let dtype = part.map(|part| self.expert_dtype(layer, 0, part)).transpose()?.flatten();
                tensors.push(TensorSpec {
                    name: self.expert_tensor_name(layer, tensor.tensor),
                    dtype: dtype.unwrap_or(crate::Dtype::BF16),
                    shape: tensor.shape,
                });
            }
        }
        for info in self.tensors().filter(|info| !self.is_scale(&info.name) && !replaced.contains(&info.name)) {
            tensors.push(TensorSpec { dtype: self.plain_dtype(&info.name)?, ..info.spec() });
        }
        let description =
            ModelDescription { config: dequantized_config(self.raw_config()), tensors, ..ModelDescription::of(self) };
        let source = Dequantized { base: self.clone(), layers };
        Checkpoint::from_source(description, Arc::new(source)).map(Arc::new)
    }
}

impl ModelSource for Dequantized {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        self.base.plain_bytes(&tensor.name, range)
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        match self.base.info(&tensor.name) {
            // Whole rows are decoded.
            Ok(info) if info.dtype != tensor.dtype => 2 * info.shape.last().copied().unwrap_or(1).max(1),
            _ => self.base.grain(&tensor.name),
        }
    }

    fn makes_experts(&self, layer: usize) -> bool {
        self.layers.contains(&layer)
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        self.base.set_part(layer, set, part)
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        if self.base.info(&tensor.name).is_ok_and(|info| info.dtype == tensor.dtype) {
            self.base.release_range(&tensor.name, range);
        } else {
            let _ = self.base.release_tensor(&tensor.name);
        }
    }

    fn release_expert(&self, layer: usize, set: usize) {
        self.base.release_set(layer, set);
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.base)
    }
}

//! A quantized model in plain floats.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use crate::config::{Ffn, ModelConfig};
use crate::expert_bytes::RawMatrix;
use crate::experts::ExpertPart;
use crate::ragged::{dequantized_config, ragged_config};
use crate::source::{ModelDescription, ModelSource};
use crate::weights::TensorInfo;
use crate::{Checkpoint, Result};

/// The values of a quantized base as BF16, in the layout of its family, without factors and exponents. It is the same
/// model: its fingerprint is that of the base.
struct Dequantized {
    base: Arc<Checkpoint>,
    /// Layers whose experts need another layout than they are stored in.
    layers: BTreeSet<usize>,
}

impl Checkpoint {
    /// The same model without quantization: what every method that changes weights starts from. The model itself where
    /// nothing is quantized.
    ///
    /// # Errors
    /// Those of [`Checkpoint::from_source`].
    pub fn dequantized(self: &Arc<Self>) -> Result<Arc<Self>> {
        if self.quantization().is_none() {
            return Ok(self.clone());
        }
        // Transposes are made expert by expert.
        let moe = self.config().layers.iter().enumerate().filter(|(_, layer)| matches!(layer.ffn, Ffn::Moe(_)));
        let layers = moe.map(|(layer, _)| layer).filter(|layer| self.experts_are_transposed(*layer)).collect();
        let tensors = self.plain_tensors().map(TensorInfo::spec).collect();
        let mut config = dequantized_config(self.raw_config());
        if ModelConfig::from_json(&config, None)?.moe_shape() != *self.shape() && !self.ragged() && !self.grouped() {
            // Numbers of experts that differ by layer stand in what was said of quantization.
            let widths = self.shape().layers.iter().map(|layer| (layer.layer, layer.widths.clone())).collect();
            config = ragged_config(&config, &widths, &BTreeSet::new())?;
        }
        let description = ModelDescription { config, tensors, ..ModelDescription::of(self) };
        let source = Dequantized { base: self.clone(), layers };
        Checkpoint::from_source(description, Arc::new(source)).map(Arc::new)
    }
}

impl ModelSource for Dequantized {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        self.base.plain_bytes(&tensor.name, range)
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        self.base.plain_grain(&tensor.name)
    }

    fn makes_experts(&self, layer: usize) -> bool {
        self.layers.contains(&layer)
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        self.base.set_part(layer, set, part)
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        self.base.release_plain(&tensor.name, range);
    }

    fn release_expert(&self, layer: usize, set: usize) {
        self.base.release_set(layer, set);
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.base)
    }
}

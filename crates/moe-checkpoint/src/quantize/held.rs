//! A quantized model whose weights stay in memory as they are stored.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::expert_bytes::RawMatrix;
use crate::experts::ExpertPart;
use crate::parallel::collect_in_order;
use crate::source::{ModelDescription, ModelSource};
use crate::weights::TensorInfo;
use crate::{Checkpoint, Result};

/// The stored tensors of the quantized weights of a base, as far as they are made and not read from a file.
struct Held {
    base: Arc<Checkpoint>,
    bytes: BTreeMap<String, Vec<u8>>,
}

impl Checkpoint {
    /// The same model with the stored tensors of its quantized weights in memory: codes, scales and zero points are
    /// made once, and matrices are decoded from them whenever they are read. What lies in files is not copied, since
    /// the system holds and drops it by itself. The model itself where nothing is quantized.
    ///
    /// # Errors
    /// Those of reading the weights.
    pub fn packed_in_memory(self: &Arc<Self>) -> Result<Arc<Self>> {
        if self.quantization().is_none() {
            return Ok(self.clone());
        }
        let names: Vec<&String> = self.quantized_weights().flat_map(|weight| &weight.parts).collect();
        let read = |name: &&String| -> Result<Option<(String, Vec<u8>)>> {
            let bytes = match self.bytes(name)? {
                Cow::Owned(bytes) => Some(bytes),
                Cow::Borrowed(_) => None,
            };
            self.release_tensor(name)?;
            Ok(bytes.map(|bytes| ((*name).clone(), bytes)))
        };
        let bytes: BTreeMap<_, _> = collect_in_order(names.par_iter().map(read))?.into_iter().flatten().collect();
        self.release();
        if bytes.is_empty() {
            return Ok(self.clone());
        }
        let held = Held { base: self.clone(), bytes };
        Checkpoint::from_source(ModelDescription::of(self), Arc::new(held)).map(Arc::new)
    }

    /// Bytes of the stored tensors of the quantized weights: what a packed model takes in memory, whether it is
    /// [held](Checkpoint::packed_in_memory) or in files that are mapped.
    pub fn packed_bytes(&self) -> u64 {
        self.quantized_weights().map(|weight| weight.bytes).sum()
    }
}

impl ModelSource for Held {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        match self.bytes.get(&tensor.name) {
            Some(bytes) => Ok(Cow::Borrowed(&bytes[range])),
            None => self.base.tensor_bytes(&tensor.name, range),
        }
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        if self.bytes.contains_key(&tensor.name) { 1 } else { self.base.grain(&tensor.name) }
    }

    fn makes_experts(&self, layer: usize) -> bool {
        self.base.makes_experts(layer)
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        self.base.set_part(layer, set, part)
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        if !self.bytes.contains_key(&tensor.name) {
            self.base.release_range(&tensor.name, range);
        }
    }

    fn release_expert(&self, layer: usize, set: usize) {
        self.base.release_set(layer, set);
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.base)
    }
}

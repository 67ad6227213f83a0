//! The tensors of a model with factors, made when they are read.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::{LayerSmoothing, columns};
use crate::expert_bytes::RawMatrix;
use crate::experts::ExpertPart;
use crate::record::Step;
use crate::source::{ModelSource, sliced};
use crate::weights::TensorInfo;
use crate::{Checkpoint, Result, convert};

/// What becomes of a tensor outside the experts.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// These values.
    Values(Vec<f32>),
    /// Its columns multiplied with these factors.
    Columns(Vec<f32>),
}

/// A model with other values in some tensors, and with factors in its experts.
pub(crate) struct SmoothedSource {
    from: Arc<Checkpoint>,
    changes: BTreeMap<String, Change>,
    experts: BTreeMap<usize, LayerSmoothing>,
    step: Step,
}

impl SmoothedSource {
    pub fn new(
        from: Arc<Checkpoint>,
        changes: BTreeMap<String, Change>,
        experts: BTreeMap<usize, LayerSmoothing>,
        step: Step,
    ) -> Self {
        Self { from, changes, experts, step }
    }
}

impl ModelSource for SmoothedSource {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let values = match self.changes.get(&tensor.name) {
            None => return self.from.tensor_bytes(&tensor.name, range),
            Some(Change::Values(values)) => Cow::Borrowed(values),
            Some(Change::Columns(factors)) => {
                let mut values = self.from.tensor_f32(&tensor.name)?;
                columns(&mut values, factors);
                Cow::Owned(values)
            }
        };
        let mut bytes = Vec::with_capacity(tensor.bytes as usize);
        convert::encode(tensor.dtype, &values, &mut bytes);
        Ok(sliced(Cow::Owned(bytes), range))
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        match self.changes.contains_key(&tensor.name) {
            true => tensor.bytes as usize,
            false => self.from.grain(&tensor.name),
        }
    }

    fn makes_experts(&self, layer: usize) -> bool {
        self.experts.contains_key(&layer)
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        let Some(raw) = self.from.set_part(layer, set, part)? else { return Ok(None) };
        let Some(smoothing) = self.experts.get(&layer) else { return Ok(Some(raw)) };
        let mut values = raw.to_f32();
        smoothing.apply(set, part, &mut values);
        let mut bytes = Vec::with_capacity(raw.bytes.len());
        convert::encode(raw.dtype, &values, &mut bytes);
        Ok(Some(RawMatrix { bytes: Cow::Owned(bytes), dtype: raw.dtype, rows: raw.rows, cols: raw.cols }))
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        match self.changes.contains_key(&tensor.name) {
            // What cannot be given back stays until everything is.
            true => drop(self.from.release_tensor(&tensor.name)),
            false => self.from.release_range(&tensor.name, range),
        }
    }

    fn release_expert(&self, layer: usize, set: usize) {
        self.from.release_set(layer, set);
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.from)
    }

    fn step(&self) -> Option<Step> {
        Some(self.step.clone())
    }
}

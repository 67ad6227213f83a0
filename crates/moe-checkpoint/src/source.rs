//! Where the weights of a checkpoint come from: files, or what a method makes of another checkpoint.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use serde_json::Value;

use crate::expert_bytes::RawMatrix;
use crate::experts::ExpertPart;
use crate::record::Step;
use crate::weights::TensorInfo;
use crate::{Checkpoint, Error, Result};

/// What gives a [`Checkpoint`] its weights.
///
/// The files of a model directory are the first source. Every method that changes a model is another: a plan on a
/// checkpoint, merged experts, folded adapters, an applied delta, a dequantization. It takes a base, says what the new
/// config and tensors are, and makes bytes when they are asked for. [`Checkpoint::from_source`] verifies config and
/// tensors as if they had been read from a directory, so that whatever reads a checkpoint (the engine, a scorer,
/// another method, [`write`](crate::write())) reads the outcome of a method too, and sources stack without an
/// intermediate directory.
///
/// A source gives the same bytes however often and from however many threads it is asked.
///
/// ```
/// use std::{borrow::Cow, ops::Range, sync::Arc};
/// use moe_checkpoint::{Checkpoint, ExpertPart, ModelSource, RawMatrix, Result, Step, TensorInfo};
///
/// /// The model with the experts of every layer in reverse order, router rows left as they are: a model of its own.
/// struct Reversed(Arc<Checkpoint>);
///
/// impl ModelSource for Reversed {
///     fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
///         self.0.tensor_bytes(&tensor.name, range)
///     }
///     fn makes_experts(&self, _layer: usize) -> bool {
///         true
///     }
///     fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
///         let last = self.0.config().moe(layer).map_or(0, |moe| moe.num_experts() - 1);
///         self.0.expert_part(layer, last - set, part)
///     }
///     fn base(&self) -> Option<&Arc<Checkpoint>> {
///         Some(&self.0)
///     }
///     fn step(&self) -> Option<Step> {
///         Some(Step::new("reverse", &self.0, serde_json::json!({}), "experts in reverse order"))
///     }
/// }
/// ```
pub trait ModelSource: Send + Sync {
    /// Bytes of a tensor as a file holds them, by their range within the tensor. Not asked for tensors of experts that
    /// the source [makes](ModelSource::makes_experts).
    ///
    /// # Errors
    /// Those of reading a base, and [`Error::Method`] for what a method cannot make.
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>>;

    /// The least number of bytes of a tensor that are worth asking for at once, such as 1 where they are copied and a
    /// row where rows are computed. Whoever streams a tensor asks for multiples of it. By default all bytes: a tensor
    /// is made as a whole.
    fn grain(&self, tensor: &TensorInfo) -> usize {
        tensor.bytes as usize
    }

    /// Whether the routed experts of this MoE layer come from [`ModelSource::expert_part`], and their tensors are made
    /// of them; otherwise experts are found in the bytes of the tensors.
    fn makes_experts(&self, layer: usize) -> bool {
        let _ = layer;
        false
    }

    /// One part of a routed expert in canonical orientation, in the dtype of the tensor that holds it. `set` counts
    /// sets of weights, which are the experts unless these share sets. `None` for a part the expert lacks.
    ///
    /// # Errors
    /// As [`ModelSource::bytes`].
    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        let _ = (layer, set, part);
        Ok(None)
    }

    /// Gives what a range of a tensor holds in memory back to the system, where that means something.
    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        let _ = (tensor, range);
    }

    /// The same for an expert that the source makes.
    fn release_expert(&self, layer: usize, set: usize) {
        let _ = (layer, set);
    }

    /// The same for everything. By default that of the base.
    fn release_all(&self) {
        if let Some(base) = self.base() {
            base.release();
        }
    }

    /// Has what files hold of a decoder layer read before it is asked for, and may wait for the disk meanwhile. By
    /// default that of the base.
    fn read_ahead(&self, model: &Checkpoint, layer: usize) {
        let _ = model;
        if let Some(base) = self.base() {
            base.read_ahead(layer);
        }
    }

    /// The model that this one is made from; `None` for files.
    fn base(&self) -> Option<&Arc<Checkpoint>> {
        None
    }

    /// What the method did to the base; `None` for files, and for what changes the form of a model alone.
    fn step(&self) -> Option<Step> {
        None
    }

    /// Identifies the model by content, as 64 hex digits. By default the digest of the [step](ModelSource::step), or
    /// that of the base where there is none.
    fn fingerprint(&self, model: &Checkpoint) -> String {
        let _ = model;
        match (self.step(), self.base()) {
            (Some(step), _) => step.digest,
            (None, Some(base)) => base.fingerprint(),
            (None, None) => String::new(),
        }
    }
}

/// What a model is, apart from its weights: how [`Checkpoint::from_source`] is told.
#[derive(Clone, Debug)]
pub struct ModelDescription {
    /// `config.json`.
    pub config: Value,
    /// `generation_config.json`, if there is one.
    pub generation: Option<Value>,
    /// All tensors, in any order.
    pub tensors: Vec<crate::TensorSpec>,
}

impl ModelDescription {
    /// The description of a model as it is, to be changed.
    pub fn of(model: &Checkpoint) -> Self {
        Self {
            config: model.raw_config().clone(),
            generation: model.raw_generation_config().cloned(),
            tensors: model.tensors().map(TensorInfo::spec).collect(),
        }
    }
}

/// A range of bytes of a tensor that were made as a whole.
pub fn sliced(bytes: Cow<'_, [u8]>, range: Range<usize>) -> Cow<'_, [u8]> {
    match bytes {
        Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[range]),
        Cow::Owned(bytes) if range == (0..bytes.len()) => Cow::Owned(bytes),
        Cow::Owned(bytes) => Cow::Owned(bytes[range].to_vec()),
    }
}

impl Error {
    /// The error of a method that makes weights.
    pub fn method(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Method { source: Box::new(error) }
    }
}

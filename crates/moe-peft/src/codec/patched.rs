//! A delta added to what it was taken from.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, ModelDescription, ModelSource, Step, TensorInfo, decode_f32, sliced};
use serde_json::json;

use super::decode::{Decoder, Mark, Piece};
use super::file::{Delta, DeltaBase, DeltaCoding, DeltaTensor};
use super::source::{CHUNK, elements};
use crate::rewrite::encoded;
use crate::{Error, Result};

/// Name of the method in the record of a model.
pub const DELTA: &str = "delta";
/// Bytes of a payload that are read at a time where it is not read from end to end.
const BUFFER: usize = 1 << 16;

/// A base with a delta added: what fine-tuning made of it, as far as the delta has it.
///
/// Everything reads the [model](Patched::model) as it reads a directory. Sums are made piece by piece when they are
/// asked for, and rounded to the dtype of the base; tensors that the delta does not have are those of the base, byte
/// for byte.
pub struct Patched {
    model: Arc<Checkpoint>,
    tensors: Vec<String>,
}

impl fmt::Debug for Patched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Patched").field("model", &self.model).field("tensors", &self.tensors.len()).finish()
    }
}

impl Patched {
    /// The model with the delta.
    pub fn model(&self) -> &Arc<Checkpoint> {
        &self.model
    }

    /// The tensors that the delta has something to add to, or replaces, by name. All others are those of the base.
    pub fn tensors(&self) -> &[String] {
        &self.tensors
    }
}

impl Delta {
    /// Adds the delta to `base`. Its payload is read once, to find where the pieces of each tensor begin.
    ///
    /// # Errors
    /// [`Error::File`] for a delta of another base or of an adapter, of other tensors, and with a damaged payload.
    /// Later, of reading the model: those of reading the file, and [`moe_checkpoint::Error::Method`] for sums that are
    /// not finite or too large for their dtype, naming the tensor.
    pub fn on(&self, base: &Arc<Checkpoint>) -> Result<Patched> {
        match &self.table().base {
            DeltaBase::Checkpoint { fingerprint } if base.is_model(fingerprint) => {}
            DeltaBase::Checkpoint { fingerprint } => {
                let expected = format!("{} of {}", base.fingerprint(), base.dir().display());
                return Err(self.wrong("fingerprint of the base", fingerprint, expected));
            }
            DeltaBase::Adapter { .. } => return Err(self.wrong("base", "an adapter", "a checkpoint")),
        }
        let base = base.dequantized()?;
        for tensor in &self.table().tensors {
            let found = &base.info(&tensor.name)?.shape;
            if *found != tensor.shape {
                return Err(self.wrong(&tensor.name, format!("{:?}", tensor.shape), format!("{found:?}")));
            }
        }
        let places = self.places()?;
        let mut description = ModelDescription::of(&base);
        if self.table().coding == DeltaCoding::Changed {
            for spec in &mut description.tensors {
                if let Some(Place { tensor, .. }) = places.get(&spec.name) {
                    spec.dtype = tensor.dtype;
                }
            }
        }
        let tensors: Vec<String> = places.keys().cloned().collect();
        let recipe = json!({"payload": self.table().payload_digest, "coding": self.table().coding, "tensors": tensors});
        let summary = format!("what fine-tuning changed, from a delta of {} tensors", tensors.len());
        let step = Step::new(DELTA, &base, recipe, summary);
        let source = Source { base, delta: self.clone(), places, step };
        Ok(Patched { model: Arc::new(Checkpoint::from_source(description, Arc::new(source))?), tensors })
    }

    /// Where in the payload each tensor is.
    fn places(&self) -> Result<BTreeMap<String, Place>> {
        let mut places = BTreeMap::new();
        let (mut decoder, mut byte) = (Decoder::new(self)?, 0);
        for tensor in &self.table().tensors {
            let count = elements(&tensor.spec());
            let start = match self.table().dense_bytes(tensor) {
                Some(size) => {
                    byte += count * size as u64;
                    Start::Byte { first: byte - count * size as u64, size }
                }
                None => {
                    let mut marks = Vec::new();
                    for start in (0..count).step_by(CHUNK) {
                        marks.push(decoder.mark());
                        decoder.piece(tensor, (count - start).min(CHUNK as u64) as usize)?;
                    }
                    Start::Chunks(marks)
                }
            };
            places.insert(tensor.name.clone(), Place { tensor: tensor.clone(), start });
        }
        decoder.finish()?;
        Ok(places)
    }
}

/// A tensor in a payload.
struct Place {
    tensor: DeltaTensor,
    start: Start,
}

/// Where the elements of a tensor begin.
enum Start {
    /// In a dense coding: the first byte, and the bytes of an element.
    Byte { first: u64, size: usize },
    /// Every [`CHUNK`] elements.
    Chunks(Vec<Mark>),
}

struct Source {
    base: Arc<Checkpoint>,
    delta: Delta,
    places: BTreeMap<String, Place>,
    step: Step,
}

impl Source {
    fn read(&self, info: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        let Some(place) = self.places.get(&info.name) else {
            return Ok(self.base.tensor_bytes(&info.name, range)?);
        };
        let size = info.dtype.bitsize() / 8;
        let wanted = range.start / size..range.end.div_ceil(size);
        let mut bytes = Vec::with_capacity(wanted.len() * size);
        for chunk in (wanted.start / CHUNK * CHUNK..wanted.end).step_by(CHUNK) {
            let whole = chunk..(chunk + CHUNK).min(info.elements() as usize);
            let part = whole.start.max(wanted.start)..whole.end.min(wanted.end);
            bytes.extend(self.chunk(info, place, whole, part)?);
        }
        let start = range.start - wanted.start * size;
        Ok(sliced(Cow::Owned(bytes), start..start + range.len()))
    }

    /// The bytes of the elements `part` of a chunk `whole`.
    fn chunk(&self, info: &TensorInfo, place: &Place, whole: Range<usize>, part: Range<usize>) -> Result<Vec<u8>> {
        let tensor = &place.tensor;
        let (mark, decoded) = match &place.start {
            Start::Byte { first, size } => (Mark::dense(first + (part.start * size) as u64), part.clone()),
            Start::Chunks(marks) => (marks[whole.start / CHUNK], whole),
        };
        let piece = Decoder::at(&self.delta, mark, BUFFER)?.piece(tensor, decoded.len())?;
        let tau = match piece {
            Piece::Bytes(bytes) => return Ok(bytes),
            Piece::Values(tau) => tau,
        };
        let stored = self.base.info(&info.name)?.dtype;
        let size = stored.bitsize() / 8;
        let old = self.base.tensor_bytes(&info.name, part.start * size..part.end * size)?;
        let mut values = Vec::with_capacity(part.len());
        decode_f32(stored, &old, &mut values);
        values.iter_mut().zip(&tau[part.start - decoded.start..]).for_each(|(value, tau)| *value += tau);
        encoded(&info.name, info.dtype, &values)
    }
}

impl ModelSource for Source {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> moe_checkpoint::Result<Cow<'_, [u8]>> {
        self.read(tensor, range).map_err(Error::reading)
    }

    fn grain(&self, tensor: &TensorInfo) -> usize {
        match self.places.contains_key(&tensor.name) {
            true => CHUNK * tensor.dtype.bitsize() / 8,
            false => self.base.grain(&tensor.name),
        }
    }

    fn release(&self, tensor: &TensorInfo, range: Range<usize>) {
        match self.places.contains_key(&tensor.name) {
            // The base may have another dtype, and then other ranges.
            true => drop(self.base.release_tensor(&tensor.name)),
            false => self.base.release_range(&tensor.name, range),
        }
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.base)
    }

    fn step(&self) -> Option<Step> {
        Some(self.step.clone())
    }
}

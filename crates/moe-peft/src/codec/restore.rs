//! What a delta holds, tensor by tensor, and the adapter that it was made from.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use moe_checkpoint::{Existing, OutputDir, check_room, encode, write_atomic, write_json};
use safetensors::tensor::TensorView;

use super::decode::{Decoder, Piece};
use super::file::{Delta, DeltaBase, DeltaCoding, DeltaTensor};
use super::source::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, elements};
use crate::Result;

impl Delta {
    /// Writes the adapter that the delta was made from, as far as the delta has it, to the directory `to`, which
    /// appears whole or not at all; the file of its weights. Memory is that of the adapter.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File) for a delta of a checkpoint, and an adapter that the disk has no room for,
    /// both before anything is decoded; those of the file system.
    pub fn restore_adapter(&self, to: &Path, existing: Existing) -> Result<PathBuf> {
        let DeltaBase::Adapter { start, config } = &self.table().base else {
            return Err(self.wrong("base", "a checkpoint", "an adapter"));
        };
        OutputDir::check(to, existing)?;
        // A sparse delta of a few bytes may speak of any number of zeros.
        let bytes = |tensor: &DeltaTensor| elements(&tensor.spec()) * tensor.dtype.bitsize() as u64 / 8;
        check_room(to, self.table().tensors.iter().map(bytes).sum())?;
        let mut tensors: Vec<(&DeltaTensor, Vec<u8>)> = Vec::new();
        let mut decoder = Decoder::new(self)?;
        for tensor in &self.table().tensors {
            let mut whole = Vec::new();
            decoder.tensor(tensor, &mut |piece| {
                match piece {
                    Piece::Bytes(bytes) => whole.extend(bytes),
                    Piece::Values(tau) => {
                        let values: Vec<f32> = tau.iter().map(|tau| tau + start).collect();
                        encode(tensor.dtype, &values, &mut whole);
                    }
                }
                Ok(())
            })?;
            tensors.push((tensor, whole));
        }
        decoder.finish()?;
        let malformed = |error: safetensors::SafeTensorError| self.wrong("tensors", error, "values of their shapes");
        let mut views = Vec::with_capacity(tensors.len());
        for (tensor, bytes) in &tensors {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), bytes).map_err(malformed)?;
            views.push((tensor.name.as_str(), view));
        }
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let file = safetensors::serialize(views, Some(metadata)).map_err(malformed)?;
        let output = OutputDir::create(to, existing)?;
        write_atomic(output.path().join(ADAPTER_WEIGHTS), &file)?;
        write_json(&output.path().join(ADAPTER_CONFIG), config)?;
        Ok(output.commit()?.join(ADAPTER_WEIGHTS))
    }

    /// The task vector as the delta has it, tensor by tensor, in pieces, for codings of differences.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File) for a delta of whole tensors.
    pub fn stream(&self, mut f: impl FnMut(&DeltaTensor, &[f32]) -> Result<()>) -> Result<()> {
        if self.table().coding == DeltaCoding::Changed {
            return Err(self.wrong("coding", "whole tensors", "differences"));
        }
        let mut decoder = Decoder::new(self)?;
        for tensor in &self.table().tensors {
            decoder.tensor(tensor, &mut |piece| match piece {
                Piece::Values(tau) => f(tensor, &tau),
                Piece::Bytes(_) => Ok(()),
            })?;
        }
        decoder.finish()
    }
}

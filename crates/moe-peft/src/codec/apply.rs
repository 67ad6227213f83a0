//! Adding a delta to what it was taken from.

use std::fs;
use std::io::Read;
use std::path::Path;

use moe_checkpoint::{
    Checkpoint, Existing, OutputDir, ShardedWriter, TensorSpec, WriterOptions, Written, copy_side_files, decode_f32,
    encode, write_atomic, write_json,
};

use super::file::{Delta, DeltaBase, DeltaCoding, DeltaTensor, io};
use super::golomb::BitReader;
use super::source::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHUNK, elements};
use crate::Result;

/// How the output of a delta is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaOptions {
    /// Most bytes of tensor data per file of a checkpoint; a larger tensor gets its own file.
    pub max_shard_bytes: u64,
    /// What to do about an output that is there.
    pub existing: Existing,
}

impl Default for DeltaOptions {
    fn default() -> Self {
        Self { max_shard_bytes: WriterOptions::default().max_shard_bytes, existing: Existing::default() }
    }
}

impl Delta {
    /// Writes `base` with the delta added as the checkpoint `to`, as a stream: memory is that of one piece of a tensor. The output appears whole or not
    /// at all. Sums are rounded to the dtype of the base; tensors that the delta does not have are copied byte for byte.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File) for a delta of another base or of an adapter, before anything is written; those of the writer.
    pub fn apply(&self, base: &Checkpoint, to: &Path, options: &DeltaOptions) -> Result<Written> {
        match &self.table().base {
            DeltaBase::Checkpoint { fingerprint } if *fingerprint == base.fingerprint() => {}
            DeltaBase::Checkpoint { fingerprint } => {
                let expected = format!("{} of {}", base.fingerprint(), base.dir().display());
                return Err(self.wrong("fingerprint of the base", fingerprint, expected));
            }
            DeltaBase::Adapter { .. } => return Err(self.wrong("base", "an adapter", "a checkpoint")),
        }
        for tensor in &self.table().tensors {
            let found = &base.info(&tensor.name)?.shape;
            if *found != tensor.shape {
                return Err(self.wrong(&tensor.name, format!("{:?}", tensor.shape), format!("{found:?}")));
            }
        }
        let replaced = self.table().coding == DeltaCoding::Changed;
        let mut specs = Vec::new();
        for info in base.tensors() {
            let ours = self.tensor(&info.name).filter(|_| replaced);
            let dtype = ours.map_or(info.dtype, |tensor| tensor.dtype);
            specs.push(TensorSpec { name: info.name.clone(), dtype, shape: info.shape.clone() });
        }
        let output = OutputDir::create(to, options.existing)?;
        let (max_shard_bytes, recipe) = (options.max_shard_bytes, self.recipe(&base.fingerprint()));
        let mut writer = ShardedWriter::new(output.path(), WriterOptions { max_shard_bytes, recipe }, specs.clone())?;
        let mut payload = self.decoder()?;
        for spec in &specs {
            let Some(tensor) = self.tensor(&spec.name) else {
                writer.copy(base, &spec.name)?;
                continue;
            };
            let info = base.info(&spec.name)?;
            let bytes = base.bytes(&spec.name)?;
            let mut pieces = bytes.chunks(CHUNK * info.dtype.bitsize() / 8);
            payload.tensor(tensor, &mut |piece| match piece {
                Piece::Bytes(bytes) => Ok(writer.append(&spec.name, bytes)?),
                Piece::Values(tau) => {
                    let (mut values, mut out) = (Vec::new(), Vec::new());
                    decode_f32(info.dtype, pieces.next().unwrap_or_default(), &mut values);
                    add(&mut values, tau);
                    encode(spec.dtype, &values, &mut out);
                    Ok(writer.append(&spec.name, &out)?)
                }
            })?;
            base.release_tensor(&spec.name)?;
        }
        payload.finish()?;
        let written = writer.finish()?;
        copy_side_files(base.dir(), output.path())?;
        let config = base.dir().join("config.json");
        let bytes = fs::read(&config).map_err(io(&config))?;
        write_atomic(output.path().join("config.json"), &bytes)?;
        Checkpoint::open(output.path())?;
        output.commit()?;
        Ok(written)
    }

    /// Writes the adapter that the delta was made from, as far as the delta has it, to the directory `to`, which appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File) for a delta of a checkpoint, before anything is written; those of the writer.
    pub fn restore_adapter(&self, to: &Path, existing: Existing) -> Result<Written> {
        let DeltaBase::Adapter { start, config } = &self.table().base else {
            return Err(self.wrong("base", "a checkpoint", "an adapter"));
        };
        let specs: Vec<TensorSpec> = self.table().tensors.iter().map(DeltaTensor::spec).collect();
        let output = OutputDir::create(to, existing)?;
        let options = WriterOptions { max_shard_bytes: u64::MAX, recipe: self.recipe("adapter") };
        let mut writer = ShardedWriter::new(output.path(), options, specs)?;
        let mut payload = self.decoder()?;
        for tensor in &self.table().tensors {
            payload.tensor(tensor, &mut |piece| match piece {
                Piece::Bytes(bytes) => Ok(writer.append(&tensor.name, bytes)?),
                Piece::Values(tau) => {
                    let mut out = Vec::new();
                    let values: Vec<f32> = tau.iter().map(|tau| tau + start).collect();
                    encode(tensor.dtype, &values, &mut out);
                    Ok(writer.append(&tensor.name, &out)?)
                }
            })?;
        }
        payload.finish()?;
        let written = writer.finish()?;
        for file in &written.files {
            fs::rename(file, output.path().join(ADAPTER_WEIGHTS)).map_err(io(file))?;
        }
        write_json(&output.path().join(ADAPTER_CONFIG), config)?;
        let out = output.commit()?;
        Ok(Written { files: vec![out.join(ADAPTER_WEIGHTS)], ..written })
    }

    /// The task vector as the delta has it, tensor by tensor, in pieces, for codings of differences.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File) for a delta of whole tensors.
    pub fn stream(&self, mut f: impl FnMut(&DeltaTensor, &[f32]) -> Result<()>) -> Result<()> {
        if self.table().coding == DeltaCoding::Changed {
            return Err(self.wrong("coding", "whole tensors", "differences"));
        }
        let mut payload = self.decoder()?;
        for tensor in &self.table().tensors {
            payload.tensor(tensor, &mut |piece| match piece {
                Piece::Values(tau) => f(tensor, tau),
                Piece::Bytes(_) => Ok(()),
            })?;
        }
        payload.finish()
    }

    fn tensor(&self, name: &str) -> Option<&DeltaTensor> {
        let tensors = &self.table().tensors;
        tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok().map(|index| &tensors[index])
    }

    fn recipe(&self, base: &str) -> String {
        format!("delta {} {base}", self.table().payload_digest)
    }

    fn decoder(&self) -> Result<Decoder<'_, impl Read + use<>>> {
        let input = BitReader::new(self.payload()?);
        let (kept, rice) = match self.table().coding {
            DeltaCoding::Ternary { kept, rice, .. } | DeltaCoding::Sparse { kept, rice, .. } => (kept, rice),
            _ => (0, 0),
        };
        let elements = self.table().elements();
        let mut decoder = Decoder { delta: self, input, kept, rice, position: 0, next: None, elements };
        decoder.advance()?;
        Ok(decoder)
    }
}

fn add(values: &mut [f32], tau: &[f32]) {
    values.iter_mut().zip(tau).for_each(|(value, tau)| *value += tau);
}

/// What a tensor becomes, piece by piece.
enum Piece<'a> {
    /// Bytes of the tensor.
    Bytes(&'a [u8]),
    /// What is added to its elements; at most [`CHUNK`] of them.
    Values(&'a [f32]),
}

/// Reads a payload tensor by tensor.
struct Decoder<'a, R> {
    delta: &'a Delta,
    input: BitReader<R>,
    /// Positions that were not read yet.
    kept: u64,
    rice: u32,
    /// First element of the next tensor.
    position: u64,
    /// The next kept position and its value.
    next: Option<(u64, f32)>,
    elements: u64,
}

impl<R: Read> Decoder<'_, R> {
    /// Gives the next tensor, which must be the next of the table.
    fn tensor(&mut self, tensor: &DeltaTensor, give: &mut dyn FnMut(Piece<'_>) -> Result<()>) -> Result<()> {
        let size = elements(&tensor.spec());
        let mut left = size;
        while left > 0 {
            let count = left.min(CHUNK as u64) as usize;
            match self.delta.table().dense_bytes(tensor) {
                Some(bytes) => {
                    let bytes = self.dense(count * bytes)?;
                    match self.delta.table().coding {
                        DeltaCoding::Difference { dtype } => {
                            let mut tau = Vec::new();
                            decode_f32(dtype, &bytes, &mut tau);
                            give(Piece::Values(&tau))?;
                        }
                        _ => give(Piece::Bytes(&bytes))?,
                    }
                }
                None => {
                    let mut tau = vec![0.0; count];
                    while let Some((at, value)) = self.next.filter(|(at, _)| *at < self.position + count as u64) {
                        tau[(at - self.position) as usize] = value;
                        self.advance()?;
                    }
                    give(Piece::Values(&tau))?;
                }
            }
            self.position += count as u64;
            left -= count as u64;
        }
        Ok(())
    }

    /// Reads the next kept position.
    fn advance(&mut self) -> Result<()> {
        if self.kept == 0 {
            self.next = None;
            return Ok(());
        }
        self.kept -= 1;
        let from = self.next.map_or(0, |(at, _)| at + 1);
        let damaged = |delta: &Delta| delta.wrong("payload", format!("a damaged code after element {from}"), "a code");
        let gap = self.input.gap(self.rice, self.elements - from).map_err(|_| damaged(self.delta))?;
        let mut bits = |count| self.input.bits(count).map_err(|_| damaged(self.delta));
        let value = match self.delta.table().coding {
            DeltaCoding::Sparse { dtype, .. } => {
                let count = dtype.bitsize();
                let bytes = bits(count as u32)?.to_le_bytes();
                let mut value = Vec::new();
                decode_f32(dtype, &bytes[..count / 8], &mut value);
                value[0]
            }
            DeltaCoding::Ternary { scale, .. } => {
                let scale = f32::from_bits(scale);
                if bits(1)? == 1 { -scale } else { scale }
            }
            _ => 0.0,
        };
        self.next = Some((from + gap, value));
        Ok(())
    }

    fn dense(&mut self, count: usize) -> Result<Vec<u8>> {
        let bytes = (0..count).map(|_| self.input.bits(8).map(|bits| bits as u8));
        let bytes: std::result::Result<Vec<u8>, _> = bytes.collect();
        bytes.map_err(|_| self.delta.wrong("payload", "its end", format!("{count} bytes more")))
    }

    /// Checks that everything was used.
    fn finish(self) -> Result<()> {
        match self.kept + u64::from(self.next.is_some()) {
            0 => Ok(()),
            left => Err(self.delta.wrong("positions", format!("{left} past the last tensor"), "none")),
        }
    }
}

//! Reading the payload of a delta, from its beginning or from a place that was marked.

use std::fs::File;
use std::io::{BufReader, Take};

use moe_checkpoint::decode_f32;

use super::file::{Delta, DeltaCoding, DeltaTensor};
use super::golomb::BitReader;
use super::source::{CHUNK, elements};
use crate::Result;

/// What some elements of a tensor become.
pub(super) enum Piece {
    /// These bytes.
    Bytes(Vec<u8>),
    /// What they are and these numbers.
    Values(Vec<f32>),
}

/// A place in a payload from which decoding can go on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    /// Bits of the payload before the next code.
    bits: u64,
    /// Positions after the next one.
    kept: u64,
    /// The next element.
    position: u64,
    /// The next kept position and its value.
    next: Option<(u64, f32)>,
}

impl Mark {
    /// A byte in the payload of a dense coding.
    pub fn dense(byte: u64) -> Self {
        Self { bits: 8 * byte, kept: 0, position: 0, next: None }
    }
}

/// Reads a payload tensor by tensor.
pub(super) struct Decoder<'a> {
    delta: &'a Delta,
    input: BitReader<BufReader<Take<File>>>,
    /// Bits before the first that `input` has.
    skipped: u64,
    /// Positions that were not read yet.
    kept: u64,
    rice: u32,
    /// The next element, counted over all tensors.
    position: u64,
    /// The next kept position and its value.
    next: Option<(u64, f32)>,
    elements: u64,
}

impl<'a> Decoder<'a> {
    /// At the beginning.
    pub fn new(delta: &'a Delta) -> Result<Self> {
        let kept = match delta.table().coding {
            DeltaCoding::Ternary { kept, .. } | DeltaCoding::Sparse { kept, .. } => kept,
            _ => 0,
        };
        let mut decoder = Self::at(delta, Mark { bits: 0, kept, position: 0, next: None }, 1 << 20)?;
        decoder.advance()?;
        Ok(decoder)
    }

    /// At a mark, with a buffer of so many bytes.
    pub fn at(delta: &'a Delta, mark: Mark, buffer: usize) -> Result<Self> {
        let rice = match delta.table().coding {
            DeltaCoding::Ternary { rice, .. } | DeltaCoding::Sparse { rice, .. } => rice,
            _ => 0,
        };
        let input = BitReader::new(delta.payload(mark.bits / 8, buffer)?);
        let (elements, skipped) = (delta.table().elements(), mark.bits / 8 * 8);
        let Mark { kept, position, next, .. } = mark;
        let mut decoder = Self { delta, input, skipped, kept, rice, position, next, elements };
        decoder.skip((mark.bits % 8) as u32)?;
        Ok(decoder)
    }

    fn skip(&mut self, bits: u32) -> Result<()> {
        self.input.bits(bits).map(drop).map_err(|_| self.delta.wrong("payload", "its end", format!("{bits} bits more")))
    }

    /// Where it is.
    pub fn mark(&self) -> Mark {
        let Self { kept, position, next, .. } = *self;
        Mark { bits: self.skipped + self.input.position(), kept, position, next }
    }

    /// Gives the next tensor, which must be the next of the table, by pieces of at most [`CHUNK`] elements.
    pub fn tensor(&mut self, tensor: &DeltaTensor, give: &mut dyn FnMut(Piece) -> Result<()>) -> Result<()> {
        let mut left = elements(&tensor.spec());
        while left > 0 {
            let count = left.min(CHUNK as u64) as usize;
            give(self.piece(tensor, count)?)?;
            left -= count as u64;
        }
        Ok(())
    }

    /// The next `count` elements, all of `tensor`.
    pub fn piece(&mut self, tensor: &DeltaTensor, count: usize) -> Result<Piece> {
        let end = self.position + count as u64;
        let piece = match self.delta.table().dense_bytes(tensor) {
            Some(size) => {
                let mut bytes = vec![0; count * size];
                let missing = |_| self.delta.wrong("payload", "its end", format!("{} bytes more", count * size));
                self.input.bytes(&mut bytes).map_err(missing)?;
                match self.delta.table().coding {
                    DeltaCoding::Difference { dtype } => {
                        let mut tau = Vec::new();
                        decode_f32(dtype, &bytes, &mut tau);
                        Piece::Values(tau)
                    }
                    _ => Piece::Bytes(bytes),
                }
            }
            None => {
                let mut tau = vec![0.0; count];
                while let Some((at, value)) = self.next.filter(|(at, _)| *at < end) {
                    tau[(at - self.position) as usize] = value;
                    self.advance()?;
                }
                Piece::Values(tau)
            }
        };
        self.position = end;
        Ok(piece)
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

    /// Checks that everything was used.
    pub fn finish(self) -> Result<()> {
        match self.kept + u64::from(self.next.is_some()) {
            0 => Ok(()),
            left => Err(self.delta.wrong("positions", format!("{left} past the last tensor"), "none")),
        }
    }
}

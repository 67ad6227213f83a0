//! Golomb-Rice coding of sparse signs.
//!
//! A kept position is the gap to the one before it (its index for the first), as quotient by `2^b` in unary (ones, then
//! a zero) and remainder in b bits, then a payload of its own: one sign bit, or the bits of a value. Bits fill bytes
//! from the top; the last byte ends in zeros.

use std::io::{Read, Write};

/// Bits written to a stream.
pub(crate) struct BitWriter<W> {
    out: W,
    buffer: u64,
    filled: u32,
    bytes: u64,
}

impl<W: Write> BitWriter<W> {
    pub fn new(out: W) -> Self {
        Self { out, buffer: 0, filled: 0, bytes: 0 }
    }

    /// The low `count` bits of `bits`, at most 32.
    pub fn bits(&mut self, bits: u32, count: u32) -> std::io::Result<()> {
        let mask = (1u64 << count) - 1;
        self.buffer = (self.buffer << count) | (u64::from(bits) & mask);
        self.filled += count;
        while self.filled >= 8 {
            self.filled -= 8;
            self.out.write_all(&[(self.buffer >> self.filled) as u8])?;
            self.bytes += 1;
        }
        Ok(())
    }

    /// A gap with Rice parameter `b`.
    pub fn gap(&mut self, gap: u64, b: u32) -> std::io::Result<()> {
        let mut quotient = gap >> b;
        while quotient >= 32 {
            self.bits(u32::MAX, 32)?;
            quotient -= 32;
        }
        self.bits(((1u64 << (quotient + 1)) - 2) as u32, quotient as u32 + 1)?;
        self.bits((gap & ((1 << b) - 1)) as u32, b)
    }

    /// Fills the last byte; the stream and its bytes.
    pub fn finish(mut self) -> std::io::Result<(W, u64)> {
        if self.filled > 0 {
            self.bits(0, 8 - self.filled)?;
        }
        self.out.flush()?;
        Ok((self.out, self.bytes))
    }
}

/// Bits read from a stream.
pub(crate) struct BitReader<R> {
    input: R,
    buffer: u64,
    filled: u32,
    bytes: u64,
}

/// The stream ended, or holds a gap past the end of what it describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BitError {
    End,
    Gap,
}

impl<R: Read> BitReader<R> {
    pub fn new(input: R) -> Self {
        Self { input, buffer: 0, filled: 0, bytes: 0 }
    }

    /// The next `count` bits, at most 32.
    pub fn bits(&mut self, count: u32) -> Result<u32, BitError> {
        while self.filled < count {
            let mut byte = [0];
            self.input.read_exact(&mut byte).map_err(|_| BitError::End)?;
            self.buffer = (self.buffer << 8) | u64::from(byte[0]);
            self.filled += 8;
            self.bytes += 1;
        }
        self.filled -= count;
        Ok(((self.buffer >> self.filled) & ((1u64 << count) - 1)) as u32)
    }

    /// Bits that were read.
    pub fn position(&self) -> u64 {
        8 * self.bytes - u64::from(self.filled)
    }

    /// The next bytes, as many as `bytes` has; what is left of a byte of which bits were read is skipped.
    pub fn bytes(&mut self, bytes: &mut [u8]) -> Result<(), BitError> {
        self.filled = 0;
        self.input.read_exact(bytes).map_err(|_| BitError::End)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// A gap below `limit`.
    pub fn gap(&mut self, b: u32, limit: u64) -> Result<u64, BitError> {
        let mut quotient = 0;
        while self.bits(1)? == 1 {
            quotient += 1;
            if quotient > limit >> b {
                return Err(BitError::Gap);
            }
        }
        let gap = (quotient << b) | u64::from(self.bits(b)?);
        if gap < limit { Ok(gap) } else { Err(BitError::Gap) }
    }
}

/// Rice parameter for a share q of kept positions: `1 + floor(log2(ln(phi - 1) / ln(1 - q)))` with the golden ratio
/// phi, and at least 0.
///
/// Source: sparse ternary compression (arXiv 1903.02891), for Bernoulli positions.
pub fn rice_parameter(q: f64) -> u32 {
    if q <= 0.0 {
        return 0;
    }
    let golden = (1.0 + 5f64.sqrt()) / 2.0;
    let b = 1.0 + ((golden - 1.0).ln() / (-q).ln_1p()).log2().floor();
    // Also for q = 1, where the logarithm is that of 0.
    b.clamp(0.0, 30.0) as u32
}

/// Expected bits per kept position: `b + 1 / (1 - (1 - q)^(2^b))`, without its sign.
pub fn expected_bits(q: f64, b: u32) -> f64 {
    f64::from(b) + 1.0 / (1.0 - (1.0 - q).powf(2f64.powi(b as i32)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected bits per parameter with a sign bit: `[q, b, bits]`.
    #[test]
    fn the_table_of_the_formula() {
        for (q, b, bits) in [(0.05, 4, 0.339), (0.10, 3, 0.576), (0.20, 2, 0.939), (0.30, 1, 1.188), (0.50, 0, 1.5)] {
            assert_eq!(rice_parameter(q), b, "{q}");
            let found = q * (expected_bits(q, b) + 1.0);
            assert!((found - bits).abs() < 1e-3, "{q}: {found}");
        }
        assert_eq!((rice_parameter(0.0), rice_parameter(1.0), rice_parameter(1e-12)), (0, 0, 30));
    }

    #[test]
    fn bits_come_back_and_garbage_is_an_error() {
        let gaps = [0u64, 1, 31, 32, 33, 100, 7, 4096];
        for b in [0, 1, 4, 13] {
            let mut writer = BitWriter::new(Vec::new());
            for gap in gaps {
                writer.gap(gap, b).unwrap();
                writer.bits((gap % 2) as u32, 1).unwrap();
            }
            let (bytes, count) = writer.finish().unwrap();
            assert_eq!(bytes.len() as u64, count);
            let mut reader = BitReader::new(bytes.as_slice());
            for gap in gaps {
                assert_eq!((reader.gap(b, 5000), reader.bits(1)), (Ok(gap), Ok((gap % 2) as u32)));
            }
            let mut reader = BitReader::new(bytes.as_slice());
            let error = (0..9).find_map(|_| reader.gap(b, 50).and_then(|_| reader.bits(1)).err());
            assert!(error.is_some());
        }
        assert_eq!(BitReader::new([0xFFu8; 100].as_slice()).gap(2, 64), Err(BitError::Gap));
        assert_eq!(BitReader::new([0xFFu8; 2].as_slice()).gap(0, 1 << 40), Err(BitError::End));
    }
}

//! The weights of one routed expert as raw elements, in their canonical orientation.

use std::borrow::Cow;

use safetensors::Dtype;

use crate::convert;
use crate::experts::ExpertPart;

/// One matrix of an expert: row-major little-endian elements without alignment. A view of the file where the file holds
/// it so, else a copy.
#[derive(Clone, Debug)]
pub struct RawMatrix<'a> {
    /// The elements.
    pub bytes: Cow<'a, [u8]>,
    /// Their dtype: F32, F16 or BF16.
    pub dtype: Dtype,
    /// Rows of the part.
    pub rows: usize,
    /// Columns; 1 for a bias.
    pub cols: usize,
}

impl RawMatrix<'_> {
    /// Bytes of one element.
    pub fn element_bytes(&self) -> usize {
        self.dtype.bitsize() / 8
    }

    /// The elements as f32; exact.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        convert::decode(self.dtype, &self.bytes, &mut values, |_| {});
        values
    }

    /// Bytes of one row, `None` if there is no such row.
    pub fn row(&self, row: usize) -> Option<&[u8]> {
        let length = self.cols * self.element_bytes();
        (row < self.rows).then(|| &self.bytes[row * length..(row + 1) * length])
    }
}

/// The matrices of one routed expert in their canonical orientation, whatever the layout of the file.
#[derive(Clone, Debug)]
pub struct ExpertBytes<'a> {
    /// Gate projection `[I, H]`.
    pub gate: RawMatrix<'a>,
    /// Up projection `[I, H]`.
    pub up: RawMatrix<'a>,
    /// Down projection `[H, I]`.
    pub down: RawMatrix<'a>,
    /// Biases of gate `[I, 1]` and up `[I, 1]`, if the experts have them.
    pub gate_up_bias: Option<[RawMatrix<'a>; 2]>,
    /// Bias of down `[H, 1]`, if the experts have one.
    pub down_bias: Option<RawMatrix<'a>>,
}

impl<'a> ExpertBytes<'a> {
    /// One part; `None` for a bias that does not exist.
    pub fn part(&self, part: ExpertPart) -> Option<&RawMatrix<'a>> {
        let bias = |index: usize| self.gate_up_bias.as_ref().map(|biases| &biases[index]);
        match part {
            ExpertPart::Gate => Some(&self.gate),
            ExpertPart::Up => Some(&self.up),
            ExpertPart::Down => Some(&self.down),
            ExpertPart::GateBias => bias(0),
            ExpertPart::UpBias => bias(1),
            ExpertPart::DownBias => self.down_bias.as_ref(),
        }
    }

    /// All parts.
    pub fn parts(&self) -> impl Iterator<Item = &RawMatrix<'a>> {
        let matrices = [&self.gate, &self.up, &self.down].into_iter();
        matrices.chain(self.gate_up_bias.iter().flatten()).chain(&self.down_bias)
    }
}

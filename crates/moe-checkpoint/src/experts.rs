//! Routed experts: how files store them and the one canonical form in memory.

use std::ops::Range;

use safetensors::Dtype;

/// Which tensor of a layer's routed experts, in one of the layouts. `E` experts of width `I` (or `I_e`), hidden size `H`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ExpertTensor {
    /// Gate projection of one expert `[I, H]`.
    Gate(usize),
    /// Up projection of one expert `[I, H]`.
    Up(usize),
    /// Down projection of one expert `[H, I]`.
    Down(usize),
    /// Gate and up of all experts `[E, 2I, H]`: per expert its gate rows, then its up rows.
    FusedGateUp,
    /// Down of all experts `[E, H, I]`.
    FusedDown,
    /// Gate and up of all experts `[sum 2 I_e, H]`: per expert its gate rows, then its up rows.
    RaggedGateUp,
    /// Down of all experts, flat `[H * sum I_e]`: per expert its `[H, I_e]` block.
    RaggedDown,
}

/// One of the three matrices of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ExpertPart {
    /// `[I, H]`, goes through the activation.
    Gate,
    /// `[I, H]`, multiplied with the activated gate.
    Up,
    /// `[H, I]`, back to the residual stream.
    Down,
}

impl ExpertPart {
    /// The three parts, in the order in which this crate lists them.
    pub const ALL: [ExpertPart; 3] = [ExpertPart::Gate, ExpertPart::Up, ExpertPart::Down];
}

/// How the routed experts of one layer are stored. Every layout holds each part of each expert as one row-major block, so
/// that raw bytes can be taken from any of them and written to any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ExpertLayout {
    /// Three 2-D tensors per expert.
    PerExpert,
    /// Two 3-D tensors per layer; all widths are equal.
    Fused,
    /// Two tensors per layer with experts of any width (`docs/ragged-format.md`).
    Ragged,
}

/// One tensor of a layer's routed experts: its shape, and the blocks it is made of in file order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertTensorLayout {
    /// Which tensor; [`Family::expert_tensor_name`](crate::Family::expert_tensor_name) names it.
    pub tensor: ExpertTensor,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Expert and part of every block. A block has `I_e * H` elements.
    pub blocks: Vec<(usize, ExpertPart)>,
}

impl ExpertLayout {
    /// The tensors of a layer with experts of these widths, or `None` where the layout cannot hold them: unequal widths
    /// in [`ExpertLayout::Fused`], or sizes that cannot be counted.
    pub fn tensors(self, hidden_size: usize, widths: &[usize]) -> Option<Vec<ExpertTensorLayout>> {
        let experts = widths.len();
        let gate_up = || (0..experts).flat_map(|e| [(e, ExpertPart::Gate), (e, ExpertPart::Up)]).collect();
        let down = || (0..experts).map(|e| (e, ExpertPart::Down)).collect();
        let tensor = |tensor, shape, blocks| ExpertTensorLayout { tensor, shape, blocks };
        Some(match self {
            Self::PerExpert => {
                let parts = widths.iter().enumerate().flat_map(|(e, width)| {
                    [
                        tensor(ExpertTensor::Gate(e), vec![*width, hidden_size], vec![(e, ExpertPart::Gate)]),
                        tensor(ExpertTensor::Up(e), vec![*width, hidden_size], vec![(e, ExpertPart::Up)]),
                        tensor(ExpertTensor::Down(e), vec![hidden_size, *width], vec![(e, ExpertPart::Down)]),
                    ]
                });
                parts.collect()
            }
            Self::Fused => {
                let width = *widths.first()?;
                if widths.iter().any(|other| *other != width) {
                    return None;
                }
                let gate_up_rows = width.checked_mul(2)?;
                vec![
                    tensor(ExpertTensor::FusedGateUp, vec![experts, gate_up_rows, hidden_size], gate_up()),
                    tensor(ExpertTensor::FusedDown, vec![experts, hidden_size, width], down()),
                ]
            }
            Self::Ragged => {
                let units = widths.iter().try_fold(0usize, |sum, width| sum.checked_add(*width))?;
                let (rows, flat) = (units.checked_mul(2)?, units.checked_mul(hidden_size)?);
                vec![
                    tensor(ExpertTensor::RaggedGateUp, vec![rows, hidden_size], gate_up()),
                    tensor(ExpertTensor::RaggedDown, vec![flat], down()),
                ]
            }
        })
    }

    /// Where one part of one expert is: its tensor, and its elements within that tensor. Sizes must be those of a layer
    /// that exists in memory or in a file.
    pub fn locate(
        self,
        hidden_size: usize,
        widths: &[usize],
        expert: usize,
        part: ExpertPart,
    ) -> (ExpertTensor, Range<usize>) {
        let block = widths[expert] * hidden_size;
        let before = || widths[..expert].iter().sum::<usize>() * hidden_size;
        let (single, fused, ragged) = match part {
            ExpertPart::Gate => (ExpertTensor::Gate(expert), ExpertTensor::FusedGateUp, ExpertTensor::RaggedGateUp),
            ExpertPart::Up => (ExpertTensor::Up(expert), ExpertTensor::FusedGateUp, ExpertTensor::RaggedGateUp),
            ExpertPart::Down => (ExpertTensor::Down(expert), ExpertTensor::FusedDown, ExpertTensor::RaggedDown),
        };
        let start = || match part {
            ExpertPart::Gate => 2 * before(),
            ExpertPart::Up => 2 * before() + block,
            ExpertPart::Down => before(),
        };
        match self {
            Self::PerExpert => (single, 0..block),
            Self::Fused => (fused, start()..start() + block),
            Self::Ragged => (ragged, start()..start() + block),
        }
    }
}

/// The weights of one routed expert: `down · (silu(gate · x) * (up · x))`. All matrices are row-major.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertWeights {
    /// Gate projection `[width, hidden]`.
    pub gate: Vec<f32>,
    /// Up projection `[width, hidden]`.
    pub up: Vec<f32>,
    /// Down projection `[hidden, width]`.
    pub down: Vec<f32>,
    /// Bias of the gate projection `[width]`; the three biases are all there or none.
    pub gate_bias: Option<Vec<f32>>,
    /// Bias of the up projection `[width]`.
    pub up_bias: Option<Vec<f32>>,
    /// Bias of the down projection `[hidden]`.
    pub down_bias: Option<Vec<f32>>,
    /// Intermediate width `I`: the number of units.
    pub width: usize,
    /// Hidden size `H`.
    pub hidden: usize,
}

/// One matrix of an expert as the file holds it: row-major little-endian elements without alignment.
#[derive(Clone, Copy, Debug)]
pub struct RawMatrix<'a> {
    /// The elements.
    pub bytes: &'a [u8],
    /// Their dtype: F32, F16 or BF16.
    pub dtype: Dtype,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

impl<'a> RawMatrix<'a> {
    /// Bytes of one element.
    pub fn element_bytes(&self) -> usize {
        self.dtype.bitsize() / 8
    }

    /// Bytes of one row, `None` if there is no such row.
    pub fn row(&self, row: usize) -> Option<&'a [u8]> {
        let length = self.cols * self.element_bytes();
        (row < self.rows).then(|| &self.bytes[row * length..(row + 1) * length])
    }
}

/// The matrices of one routed expert as the file holds them, whatever its layout.
#[derive(Clone, Copy, Debug)]
pub struct ExpertBytes<'a> {
    /// Gate projection `[I, H]`.
    pub gate: RawMatrix<'a>,
    /// Up projection `[I, H]`.
    pub up: RawMatrix<'a>,
    /// Down projection `[H, I]`.
    pub down: RawMatrix<'a>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_tile_every_tensor_and_locate_finds_them() {
        let hidden = 3;
        for (layout, widths) in [
            (ExpertLayout::PerExpert, vec![2, 0, 5]),
            (ExpertLayout::Fused, vec![4, 4]),
            (ExpertLayout::Ragged, vec![2, 0, 5, 1]),
        ] {
            for tensor in layout.tensors(hidden, &widths).unwrap() {
                let mut end = 0;
                for (expert, part) in &tensor.blocks {
                    let (found, range) = layout.locate(hidden, &widths, *expert, *part);
                    assert_eq!((found, range.start), (tensor.tensor, end));
                    end = range.end;
                }
                assert_eq!(end, tensor.shape.iter().product::<usize>());
            }
        }
        assert_eq!(ExpertLayout::Fused.tensors(hidden, &[2, 3]), None);
        assert_eq!(ExpertLayout::Ragged.tensors(usize::MAX, &[2, 3]), None);
    }
}

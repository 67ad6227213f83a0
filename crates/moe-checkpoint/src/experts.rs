//! Routed experts: how files store them.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use crate::expert_bytes::{ExpertBytes, RawMatrix};
use crate::human::variant;

/// Which tensor of a layer's routed experts, in one of the layouts. `E` experts of width `I` (or `I_e`), hidden size
/// `H`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ExpertTensor {
    /// Gate projection of one expert `[I, H]`.
    Gate(usize),
    /// Up projection of one expert `[I, H]`.
    Up(usize),
    /// Down projection of one expert `[H, I]`.
    Down(usize),
    /// Gate of all experts `[E, I, H]` in [`ExpertLayout::Stacked`].
    StackedGate,
    /// Up of all experts `[E, I, H]` in [`ExpertLayout::Stacked`].
    StackedUp,
    /// Gate and up of all experts: `[E, 2I, H]` in [`ExpertLayout::Fused`], `[E, H, 2I]` in
    /// [`ExpertLayout::Interleaved`] and [`ExpertLayout::Transposed`].
    FusedGateUp,
    /// Down of all experts: `[E, H, I]` in [`ExpertLayout::Fused`] and [`ExpertLayout::Stacked`], `[E, I, H]` in
    /// [`ExpertLayout::Interleaved`] and [`ExpertLayout::Transposed`].
    FusedDown,
    /// Biases of gate and up of all experts, alternating `[E, 2I]`.
    FusedGateUpBias,
    /// Biases of down of all experts `[E, H]`.
    FusedDownBias,
    /// Gate and up of all experts `[sum 2 I_e, H]`: per expert its gate rows, then its up rows.
    RaggedGateUp,
    /// Down of all experts, flat `[H * sum I_e]`: per expert its `[H, I_e]` block.
    RaggedDown,
    /// Biases of gate and up of all experts `[sum 2 I_e]`: per expert those of gate, then those of up.
    RaggedGateUpBias,
    /// Biases of down of all experts `[E, H]`.
    RaggedDownBias,
}

/// One of the matrices of an expert, or one of its biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ExpertPart {
    /// `[I, H]`, goes through the activation.
    Gate,
    /// `[I, H]`, multiplied with the activated gate.
    Up,
    /// `[H, I]`, back to the residual stream.
    Down,
    /// `[I]`, added to the gate.
    GateBias,
    /// `[I]`, added to up.
    UpBias,
    /// `[H]`, added to the output.
    DownBias,
}

impl fmt::Display for ExpertPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&variant(self))
    }
}

impl ExpertPart {
    /// The three matrices, in the order in which this crate lists them.
    pub const ALL: [ExpertPart; 3] = [ExpertPart::Gate, ExpertPart::Up, ExpertPart::Down];
    /// The three biases of experts that have them.
    pub const BIASES: [ExpertPart; 3] = [ExpertPart::GateBias, ExpertPart::UpBias, ExpertPart::DownBias];

    /// Rows and columns, in an expert of this width; a bias is one column.
    pub fn dims(self, hidden_size: usize, width: usize) -> (usize, usize) {
        match self {
            Self::Gate | Self::Up => (width, hidden_size),
            Self::Down => (hidden_size, width),
            Self::GateBias | Self::UpBias => (width, 1),
            Self::DownBias => (hidden_size, 1),
        }
    }
}

/// Which biases routed experts have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ExpertBiases {
    /// No matrix has a bias.
    #[default]
    None,
    /// One on the output: what a repair adds in a ragged checkpoint.
    Down,
    /// Gate, up and down have one: gpt-oss.
    All,
}

impl ExpertBiases {
    /// Whether there is this bias; true for parts that are none.
    pub fn has(self, part: ExpertPart) -> bool {
        match part {
            ExpertPart::Gate | ExpertPart::Up | ExpertPart::Down => true,
            ExpertPart::GateBias | ExpertPart::UpBias => self == Self::All,
            ExpertPart::DownBias => self != Self::None,
        }
    }

    /// Parameters that the biases of one expert of this width have.
    pub fn parameters(self, hidden_size: usize, width: usize) -> usize {
        ExpertPart::BIASES.into_iter().filter(|part| self.has(*part)).map(|part| part.dims(hidden_size, width).0).sum()
    }
}

/// What a contiguous run of one expert's elements in a tensor holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ExpertBlock {
    /// One part, row-major.
    Part(ExpertPart),
    /// `[H, 2I]`: column `2j` is gate row `j`, column `2j + 1` is up row `j`.
    GateUpColumns,
    /// `[H, 2I]`: column `j` is gate row `j`, column `I + j` is up row `j`.
    GateUpHalves,
    /// `[I, H]`: the transpose of down.
    DownColumns,
    /// `[2I]`: biases of gate and up, alternating.
    GateUpBias,
}

impl ExpertBlock {
    /// The parts it holds.
    pub fn parts(self) -> &'static [ExpertPart] {
        match self {
            Self::Part(ExpertPart::Gate) => &[ExpertPart::Gate],
            Self::Part(ExpertPart::Up) => &[ExpertPart::Up],
            Self::Part(ExpertPart::Down) | Self::DownColumns => &[ExpertPart::Down],
            Self::Part(ExpertPart::GateBias) => &[ExpertPart::GateBias],
            Self::Part(ExpertPart::UpBias) => &[ExpertPart::UpBias],
            Self::Part(ExpertPart::DownBias) => &[ExpertPart::DownBias],
            Self::GateUpColumns | Self::GateUpHalves => &[ExpertPart::Gate, ExpertPart::Up],
            Self::GateUpBias => &[ExpertPart::GateBias, ExpertPart::UpBias],
        }
    }

    /// The bytes of this block, made from the canonical parts of an expert; `None` if a part is missing or parts that
    /// share the block differ in dtype.
    pub fn bytes<'a>(self, expert: &'a ExpertBytes<'_>) -> Option<Cow<'a, [u8]>> {
        let view = |matrix: &'a RawMatrix<'_>| RawMatrix { bytes: Cow::Borrowed(&*matrix.bytes), ..*matrix };
        let parts = self.parts().iter().map(|part| expert.part(*part).map(view));
        self.assemble(parts.collect::<Option<Vec<_>>>()?)
    }

    /// The bytes of this block, made from its [parts](ExpertBlock::parts); `None` if they are not as many, or differ in
    /// dtype or shape.
    pub fn assemble(self, parts: Vec<RawMatrix<'_>>) -> Option<Cow<'_, [u8]>> {
        match (self, <[_; 1]>::try_from(parts)) {
            (Self::Part(_), Ok([matrix])) => Some(matrix.bytes),
            (Self::DownColumns, Ok([down])) => {
                Some(Cow::Owned(interleave(&[&down.bytes], down.rows, down.cols, down.element_bytes())))
            }
            (Self::GateUpHalves, Err(parts)) => {
                let [gate, up] = <[_; 2]>::try_from(parts).ok()?;
                let same = (gate.dtype, gate.rows, gate.cols) == (up.dtype, up.rows, up.cols);
                // The rows of gate, then those of up, are one matrix.
                let both = || [&*gate.bytes, &*up.bytes].concat();
                same.then(|| Cow::Owned(interleave(&[&both()], 2 * gate.rows, gate.cols, gate.element_bytes())))
            }
            (Self::GateUpColumns | Self::GateUpBias, Err(parts)) => {
                let [gate, up] = <[_; 2]>::try_from(parts).ok()?;
                let same = (gate.dtype, gate.rows, gate.cols) == (up.dtype, up.rows, up.cols);
                same.then(|| {
                    Cow::Owned(interleave(&[&gate.bytes, &up.bytes], gate.rows, gate.cols, gate.element_bytes()))
                })
            }
            _ => None,
        }
    }
}

/// The transpose of matrices `[rows, cols]` of elements of `size` bytes, their rows alternating: `[cols, n * rows]`.
fn interleave(matrices: &[&[u8]], rows: usize, cols: usize, size: usize) -> Vec<u8> {
    let count = matrices.len();
    let mut out = vec![0; count * rows * cols * size];
    for (which, matrix) in matrices.iter().enumerate() {
        for (index, element) in matrix.chunks_exact(size).enumerate() {
            let (row, col) = (index / cols.max(1), index % cols.max(1));
            let start = (col * rows * count + row * count + which) * size;
            out[start..start + size].copy_from_slice(element);
        }
    }
    out
}

/// How the routed experts of one layer are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ExpertLayout {
    /// Three 2-D tensors per expert.
    PerExpert,
    /// Two 2-D tensors per expert, up and down: experts without a gate
    /// ([`MoeConfig::gateless`](crate::MoeConfig::gateless)).
    Gateless,
    /// Two 3-D tensors per layer; all widths are equal.
    Fused,
    /// Three 3-D tensors per layer, gate, up and down; all widths are equal: Step-3.5 and Step-3.7.
    Stacked,
    /// Two 3-D tensors per layer, transposed, the columns of gate before those of up: Qwen3-VL and Llama 4 as released.
    /// All widths are equal.
    Transposed,
    /// Two 3-D tensors per layer, transposed, gate and up alternating, and two tensors of biases: gpt-oss. All widths
    /// are equal.
    Interleaved,
    /// Two tensors per layer with experts of any width, and one or two of biases if the experts have them
    /// (`docs/ragged-format.md`).
    Ragged,
}

impl fmt::Display for ExpertLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&variant(self))
    }
}

/// One tensor of a layer's routed experts: its shape, and the blocks it is made of in file order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertTensorLayout {
    /// Which tensor; [`Family::expert_tensor_name`](crate::Family::expert_tensor_name) names it.
    pub tensor: ExpertTensor,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Expert and content of every block.
    pub blocks: Vec<(usize, ExpertBlock)>,
}

/// Where one part of one expert is within a tensor: element `(row, col)` is at `start + row * row_stride + col *
/// col_stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The tensor.
    pub tensor: ExpertTensor,
    /// Its element `(0, 0)`.
    pub start: usize,
    /// Rows of the part.
    pub rows: usize,
    /// Columns of the part.
    pub cols: usize,
    /// Elements from row to row.
    pub row_stride: usize,
    /// Elements from column to column.
    pub col_stride: usize,
}

impl Placement {
    /// Whether the part is one row-major run.
    pub fn is_contiguous(&self) -> bool {
        (self.col_stride == 1 || self.cols <= 1) && (self.row_stride == self.cols || self.rows <= 1)
    }

    /// The elements from the first to the last one of the part.
    pub fn range(&self) -> Range<usize> {
        if self.rows == 0 || self.cols == 0 {
            return self.start..self.start;
        }
        self.start..self.start + (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride + 1
    }
}

impl ExpertLayout {
    /// The tensors that tell this layout by their names.
    pub(crate) fn signature(self) -> &'static [ExpertTensor] {
        match self {
            Self::PerExpert => &[ExpertTensor::Gate(0), ExpertTensor::Up(0), ExpertTensor::Down(0)],
            Self::Gateless => &[ExpertTensor::Up(0), ExpertTensor::Down(0)],
            Self::Fused | Self::Transposed | Self::Interleaved => &[ExpertTensor::FusedGateUp, ExpertTensor::FusedDown],
            Self::Stacked => &[ExpertTensor::StackedGate, ExpertTensor::StackedUp, ExpertTensor::FusedDown],
            Self::Ragged => &[ExpertTensor::RaggedGateUp, ExpertTensor::RaggedDown],
        }
    }

    /// The tensors of a layer with experts of these widths, or `None` where the layout cannot hold them: unequal widths
    /// in a layout of one width, other biases than the layout has, or sizes that cannot be counted.
    pub fn tensors(
        self,
        hidden_size: usize,
        widths: &[usize],
        biases: ExpertBiases,
    ) -> Option<Vec<ExpertTensorLayout>> {
        use ExpertPart::{Down, DownBias, Gate, GateBias, Up, UpBias};
        let experts = widths.len();
        let each = |blocks: &[ExpertBlock]| {
            (0..experts).flat_map(|expert| blocks.iter().map(move |block| (expert, *block))).collect::<Vec<_>>()
        };
        let part = |part| ExpertBlock::Part(part);
        let tensor = |tensor, shape, blocks| ExpertTensorLayout { tensor, shape, blocks };
        let uniform = || widths.first().copied().filter(|width| widths.iter().all(|other| other == width));
        match self {
            Self::PerExpert | Self::Gateless | Self::Fused | Self::Stacked | Self::Transposed
                if biases != ExpertBiases::None =>
            {
                None
            }
            Self::Interleaved if biases != ExpertBiases::All => None,
            Self::PerExpert => {
                let parts = widths.iter().enumerate().flat_map(|(e, width)| {
                    [
                        tensor(ExpertTensor::Gate(e), vec![*width, hidden_size], vec![(e, part(Gate))]),
                        tensor(ExpertTensor::Up(e), vec![*width, hidden_size], vec![(e, part(Up))]),
                        tensor(ExpertTensor::Down(e), vec![hidden_size, *width], vec![(e, part(Down))]),
                    ]
                });
                Some(parts.collect())
            }
            Self::Gateless => {
                let parts = widths.iter().enumerate().flat_map(|(e, width)| {
                    [
                        tensor(ExpertTensor::Up(e), vec![*width, hidden_size], vec![(e, part(Up))]),
                        tensor(ExpertTensor::Down(e), vec![hidden_size, *width], vec![(e, part(Down))]),
                    ]
                });
                Some(parts.collect())
            }
            Self::Fused => {
                let width = uniform()?;
                Some(vec![
                    tensor(
                        ExpertTensor::FusedGateUp,
                        vec![experts, width.checked_mul(2)?, hidden_size],
                        each(&[part(Gate), part(Up)]),
                    ),
                    tensor(ExpertTensor::FusedDown, vec![experts, hidden_size, width], each(&[part(Down)])),
                ])
            }
            Self::Stacked => {
                let width = uniform()?;
                let stack = |which, one| tensor(which, vec![experts, width, hidden_size], each(&[part(one)]));
                Some(vec![
                    stack(ExpertTensor::StackedGate, Gate),
                    stack(ExpertTensor::StackedUp, Up),
                    tensor(ExpertTensor::FusedDown, vec![experts, hidden_size, width], each(&[part(Down)])),
                ])
            }
            Self::Transposed => {
                let width = uniform()?;
                let both = width.checked_mul(2)?;
                Some(vec![
                    tensor(
                        ExpertTensor::FusedGateUp,
                        vec![experts, hidden_size, both],
                        each(&[ExpertBlock::GateUpHalves]),
                    ),
                    tensor(
                        ExpertTensor::FusedDown,
                        vec![experts, width, hidden_size],
                        each(&[ExpertBlock::DownColumns]),
                    ),
                ])
            }
            Self::Interleaved => {
                let width = uniform()?;
                let both = width.checked_mul(2)?;
                Some(vec![
                    tensor(
                        ExpertTensor::FusedGateUp,
                        vec![experts, hidden_size, both],
                        each(&[ExpertBlock::GateUpColumns]),
                    ),
                    tensor(ExpertTensor::FusedGateUpBias, vec![experts, both], each(&[ExpertBlock::GateUpBias])),
                    tensor(
                        ExpertTensor::FusedDown,
                        vec![experts, width, hidden_size],
                        each(&[ExpertBlock::DownColumns]),
                    ),
                    tensor(ExpertTensor::FusedDownBias, vec![experts, hidden_size], each(&[part(DownBias)])),
                ])
            }
            Self::Ragged => {
                let units = widths.iter().try_fold(0usize, |sum, width| sum.checked_add(*width))?;
                let (rows, flat) = (units.checked_mul(2)?, units.checked_mul(hidden_size)?);
                let mut tensors = vec![
                    tensor(ExpertTensor::RaggedGateUp, vec![rows, hidden_size], each(&[part(Gate), part(Up)])),
                    tensor(ExpertTensor::RaggedDown, vec![flat], each(&[part(Down)])),
                ];
                if biases.has(GateBias) {
                    tensors.push(tensor(
                        ExpertTensor::RaggedGateUpBias,
                        vec![rows],
                        each(&[part(GateBias), part(UpBias)]),
                    ));
                }
                if biases.has(DownBias) {
                    tensors.push(tensor(
                        ExpertTensor::RaggedDownBias,
                        vec![experts, hidden_size],
                        each(&[part(DownBias)]),
                    ));
                }
                Some(tensors)
            }
        }
    }

    /// Where one part of one expert is. Sizes must be those of a layer that exists in memory or in a file.
    pub fn place(self, hidden_size: usize, widths: &[usize], expert: usize, part: ExpertPart) -> Placement {
        use ExpertPart::{Down, DownBias, Gate, GateBias, Up, UpBias};
        let width = widths[expert];
        let before = widths[..expert].iter().sum::<usize>();
        let (rows, cols) = part.dims(hidden_size, width);
        let dense = |tensor, start| Placement { tensor, start, rows, cols, row_stride: cols, col_stride: 1 };
        let strided =
            |tensor, start, row_stride, col_stride| Placement { tensor, start, rows, cols, row_stride, col_stride };
        match (self, part) {
            (Self::PerExpert, Gate) => dense(ExpertTensor::Gate(expert), 0),
            (Self::PerExpert, Up) => dense(ExpertTensor::Up(expert), 0),
            (Self::PerExpert, _) => dense(ExpertTensor::Down(expert), 0),

            (Self::Gateless, Gate | Up) => dense(ExpertTensor::Up(expert), 0),
            (Self::Gateless, _) => dense(ExpertTensor::Down(expert), 0),

            (Self::Fused, Gate) => dense(ExpertTensor::FusedGateUp, 2 * before * hidden_size),
            (Self::Fused, Up) => dense(ExpertTensor::FusedGateUp, (2 * before + width) * hidden_size),
            (Self::Fused, _) => dense(ExpertTensor::FusedDown, before * hidden_size),

            (Self::Stacked, Gate) => dense(ExpertTensor::StackedGate, before * hidden_size),
            (Self::Stacked, Up) => dense(ExpertTensor::StackedUp, before * hidden_size),
            (Self::Stacked, _) => dense(ExpertTensor::FusedDown, before * hidden_size),

            (Self::Transposed, Gate) => strided(ExpertTensor::FusedGateUp, 2 * before * hidden_size, 1, 2 * width),
            (Self::Transposed, Up) => {
                strided(ExpertTensor::FusedGateUp, 2 * before * hidden_size + width, 1, 2 * width)
            }
            (Self::Transposed, _) => strided(ExpertTensor::FusedDown, before * hidden_size, 1, hidden_size),

            (Self::Interleaved, Gate) => strided(ExpertTensor::FusedGateUp, 2 * before * hidden_size, 2, 2 * width),
            (Self::Interleaved, Up) => strided(ExpertTensor::FusedGateUp, 2 * before * hidden_size + 1, 2, 2 * width),
            (Self::Interleaved, Down) => strided(ExpertTensor::FusedDown, before * hidden_size, 1, hidden_size),
            (Self::Interleaved, GateBias) => strided(ExpertTensor::FusedGateUpBias, 2 * before, 2, 1),
            (Self::Interleaved, UpBias) => strided(ExpertTensor::FusedGateUpBias, 2 * before + 1, 2, 1),
            (Self::Interleaved, DownBias) => dense(ExpertTensor::FusedDownBias, expert * hidden_size),

            (Self::Ragged, Gate) => dense(ExpertTensor::RaggedGateUp, 2 * before * hidden_size),
            (Self::Ragged, Up) => dense(ExpertTensor::RaggedGateUp, (2 * before + width) * hidden_size),
            (Self::Ragged, Down) => dense(ExpertTensor::RaggedDown, before * hidden_size),
            (Self::Ragged, GateBias) => dense(ExpertTensor::RaggedGateUpBias, 2 * before),
            (Self::Ragged, UpBias) => dense(ExpertTensor::RaggedGateUpBias, 2 * before + width),
            (Self::Ragged, DownBias) => dense(ExpertTensor::RaggedDownBias, expert * hidden_size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_tile_every_tensor_and_placements_cover_them() {
        let hidden = 3;
        for (layout, widths, biases) in [
            (ExpertLayout::PerExpert, vec![2, 0, 5], ExpertBiases::None),
            (ExpertLayout::Fused, vec![4, 4], ExpertBiases::None),
            (ExpertLayout::Stacked, vec![4, 4], ExpertBiases::None),
            (ExpertLayout::Transposed, vec![4, 4], ExpertBiases::None),
            (ExpertLayout::Interleaved, vec![4, 4], ExpertBiases::All),
            (ExpertLayout::Ragged, vec![2, 0, 5, 1], ExpertBiases::None),
            (ExpertLayout::Ragged, vec![2, 0, 5, 1], ExpertBiases::Down),
            (ExpertLayout::Ragged, vec![0, 0], ExpertBiases::Down),
            (ExpertLayout::Ragged, vec![2, 0, 5, 1], ExpertBiases::All),
        ] {
            for tensor in layout.tensors(hidden, &widths, biases).unwrap() {
                let elements = tensor.shape.iter().product::<usize>();
                let mut seen = vec![0; elements];
                let mut end = 0;
                for (expert, block) in &tensor.blocks {
                    let start = end;
                    for part in block.parts() {
                        let place = layout.place(hidden, &widths, *expert, *part);
                        assert_eq!((place.rows, place.cols), part.dims(hidden, widths[*expert]));
                        assert_eq!(place.tensor, tensor.tensor);
                        assert!(place.range().end <= elements);
                        for row in 0..place.rows {
                            for col in 0..place.cols {
                                let at = place.start + row * place.row_stride + col * place.col_stride;
                                assert!(at >= start);
                                seen[at] += 1;
                                end = end.max(at + 1);
                            }
                        }
                    }
                }
                assert_eq!(seen, vec![1; elements], "{layout:?} {:?}", tensor.tensor);
            }
        }
        assert_eq!(ExpertLayout::Fused.tensors(hidden, &[1, 2], ExpertBiases::None), None);
        for (layout, biases) in [
            (ExpertLayout::Fused, ExpertBiases::All),
            (ExpertLayout::Transposed, ExpertBiases::All),
            (ExpertLayout::PerExpert, ExpertBiases::Down),
            (ExpertLayout::Interleaved, ExpertBiases::None),
            (ExpertLayout::Interleaved, ExpertBiases::Down),
        ] {
            assert_eq!(layout.tensors(hidden, &[2, 2], biases), None);
        }
        assert_eq!(ExpertLayout::Ragged.tensors(hidden, &[usize::MAX, 2], ExpertBiases::None), None);
    }
}

//! A few blocks of a weight that are trained (SMT, arXiv 2405.15525).

use std::{ops::Range, sync::Arc};

use burn::tensor::Tensor;
use moe_core::{
    adapters::{LinearAdapter, Tokens, Wanted},
    host::{self, HostView},
    kernels::{outer::add_block_product, rows::RowAccumulator, weight::Weight},
};

use crate::{Error, Live, Result, parameter_bank::add_values};

/// A weight `[out, in]` of which some blocks are trained and the rest is frozen.
///
/// The live block P stands for the block W of the base: `y = x w^T + sum over blocks of x[:, columns] (P - W)^T`, which
/// is the base to the bit as long as P is W; `dP = dy[:, rows]^T x[:, columns]`. The base stays in its stored form, and
/// of the input only the columns of trained blocks take part in gradients.
#[derive(Debug)]
pub struct OwnBlocks {
    dims: [usize; 2],
    blocks: Vec<Block>,
    /// The frozen values of the blocks, one after the other.
    start: Vec<f32>,
    live: Arc<Live>,
    base: Option<Weight>,
}

/// Rows and columns of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Rows of the weight.
    pub rows: Range<usize>,
    /// Columns of the weight.
    pub columns: Range<usize>,
}

impl Block {
    /// Block `(row, column)` of a matrix cut into blocks of `size`; smaller at the edges.
    pub fn of(dims: [usize; 2], size: usize, row: usize, column: usize) -> Self {
        let part = |index: usize, end: usize| (index * size).min(end)..((index + 1) * size).min(end);
        Self { rows: part(row, dims[0]), columns: part(column, dims[1]) }
    }

    /// Its number of values.
    pub fn len(&self) -> usize {
        self.rows.len() * self.columns.len()
    }

    /// Whether it has no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its values in a matrix with so many columns.
    pub fn cut(&self, matrix: &[f32], columns: usize) -> Vec<f32> {
        let row = |i: usize| &matrix[i * columns + self.columns.start..i * columns + self.columns.end];
        self.rows.clone().flat_map(row).copied().collect()
    }
}

impl OwnBlocks {
    /// Trains `blocks` of a weight whose values are `matrix [out, in]`, under `name`. `base` is used instead of the
    /// checkpoint's weight, if given.
    ///
    /// # Errors
    /// [`Error::Input`] for blocks outside the matrix, or none.
    pub fn new(
        name: &str,
        dims: [usize; 2],
        blocks: Vec<Block>,
        matrix: &[f32],
        base: Option<Weight>,
        device: &burn::tensor::Device,
    ) -> Result<Self> {
        let outside = |b: &&Block| b.rows.end > dims[0] || b.columns.end > dims[1] || b.is_empty();
        if let Some(block) = blocks.iter().find(outside) {
            return Err(Error::input(format!("block of {name}"), format!("{block:?}"), format!("one inside {dims:?}")));
        }
        if blocks.is_empty() || matrix.len() != dims[0] * dims[1] {
            let found = format!("{} blocks, {} values", blocks.len(), matrix.len());
            return Err(Error::input(name, found, format!("at least one block, {dims:?} values")));
        }
        let start: Vec<f32> = blocks.iter().flat_map(|block| block.cut(matrix, dims[1])).collect();
        let live = Live::new(name, [1, start.len()], start.clone(), device)?;
        Ok(Self { dims, blocks, start, live, base })
    }

    /// The trained values: the blocks one after the other, row-major.
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }

    /// The blocks.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Each block with its place among the values.
    fn ranges(&self) -> impl Iterator<Item = (&Block, Range<usize>)> {
        let mut start = 0;
        self.blocks.iter().map(move |block| {
            start += block.len();
            (block, start - block.len()..start)
        })
    }

    /// Adds the blocks' part of the product with `x` to `sum`.
    fn add(&self, sum: Tensor<2>, x: &Tensor<2>, transposed: bool) -> Tensor<2> {
        let values = self.live.value();
        let view = HostView::new(&values);
        let values = view.as_slice();
        if values == self.start {
            return sum;
        }
        let mut sum = RowAccumulator::from_tensor(sum);
        let mut change = Vec::new();
        for (block, range) in self.ranges() {
            change.clear();
            change.extend(values[range.clone()].iter().zip(&self.start[range]).map(|(p, w)| p - w));
            add_block_product(&mut sum, x, &change, block.rows.clone(), block.columns.clone(), transposed);
        }
        sum.into_tensor()
    }

    fn base<'a>(&'a self, base: &'a Weight) -> &'a Weight {
        self.base.as_ref().unwrap_or(base)
    }
}

impl LinearAdapter for OwnBlocks {
    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn replaces(&self) -> bool {
        self.base.is_some()
    }

    fn trained(&self) -> usize {
        self.start.len()
    }

    fn forward(&self, base: &Weight, x: &Tensor<2>, tokens: Tokens<'_>) -> Tensor<2> {
        self.add(self.base(base).forward_for(x, None, tokens), x, false)
    }

    fn backward(
        &self,
        base: &Weight,
        x: &Tensor<2>,
        dy: &Tensor<2>,
        _: Tokens<'_>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        if wanted.parameters && self.live.is_trained() {
            self.live.add_gradient(|gradient| {
                for (block, range) in self.ranges() {
                    let (rows, columns) = (block.rows.clone(), block.columns.clone());
                    moe_core::kernels::outer::add_transposed_product(dy, rows, x, columns, 1.0, &mut gradient[range]);
                }
            });
        }
        wanted.input.then(|| self.add(self.base(base).backward(dy), dy, true))
    }

    fn matrix(&self, base: &Weight) -> Option<Tensor<2>> {
        let base = self.base(base).to_tensor();
        let (device, mut matrix) = (base.device(), host::into_vec(base));
        let values = self.live.to_vec();
        for (block, range) in self.ranges() {
            let rows = block.rows.clone().zip(values[range].chunks_exact(block.columns.len()));
            for (row, values) in rows {
                let start = row * self.dims[1];
                matrix[start + block.columns.start..start + block.columns.end].copy_from_slice(values);
            }
        }
        Some(host::from_vec(matrix, self.dims, &device))
    }

    fn digest(&self, add: &mut dyn FnMut(&[u8])) {
        if let Some(base) = &self.base {
            add_values(HostView::new(&base.to_tensor()).as_slice(), add);
        }
        for Block { rows, columns } in &self.blocks {
            for end in [rows.start, rows.end, columns.start, columns.end] {
                add(&(end as u64).to_le_bytes());
            }
        }
        self.live.digest(add);
    }
}

//! Products of rows with one matrix per expert: the operation that Burn lacks, with its derivative.
//!
//! Cutting stacked weights or sorted tokens into experts with `slice` costs, in Burn's backward pass, zeros of the
//! whole input *per expert*: for 128 experts of 768 × 2048, a hundred gigabytes per matrix. Here the cuts are made
//! outside the graph, and the backward pass allocates one gradient of the rows and one of the matrices.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{Shape, Slice, Tensor};

/// Grouped products of a backend. Rows `offsets[e]..offsets[e + 1]` belong to expert e.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    Cube: cfg(any(feature = "wgpu", feature = "vulkan", feature = "cuda")),
    Autodiff,
)]
pub trait GroupedOps: Backend {
    /// `out[i] = rows[i] · matrices[e(i)]`: `[rows, in] x [experts, in, out] -> [rows, out]`.
    fn grouped_product(rows: FloatTensor<Self>, matrices: FloatTensor<Self>, offsets: Vec<usize>) -> FloatTensor<Self> {
        let parts =
            occupied(&offsets).map(|expert| product_of_one::<Self>(&rows, &matrices, &offsets, expert)).collect();
        Self::float_cat(parts, 0)
    }

    /// `out[e] = sum_i left[i]^T right[i]` over the rows of e: `[rows, in] x [rows, out] -> [experts, in, out]`; zeros
    /// where an expert has no row.
    fn grouped_outer(left: FloatTensor<Self>, right: FloatTensor<Self>, offsets: Vec<usize>) -> FloatTensor<Self> {
        let experts = offsets.len() - 1;
        Self::float_cat((0..experts).map(|expert| outer_of_one::<Self>(&left, &right, &offsets, expert)).collect(), 0)
    }
}

/// The experts that have rows.
fn occupied(offsets: &[usize]) -> impl Iterator<Item = usize> + '_ {
    (0..offsets.len() - 1).filter(|&expert| offsets[expert] < offsets[expert + 1])
}

fn rows_of<B: Backend>(tensor: &FloatTensor<B>, from: usize, to: usize) -> FloatTensor<B> {
    let mut slices: Vec<Slice> = tensor.shape().iter().map(|&size| Slice::from(0..size)).collect();
    slices[0] = Slice::from(from..to);
    B::float_slice(tensor.clone(), &slices)
}

// Batches of one, since a strided matrix keeps its strides in a batch, where a reshape would copy it.
fn product_of_one<B: Backend>(
    rows: &FloatTensor<B>,
    matrices: &FloatTensor<B>,
    offsets: &[usize],
    expert: usize,
) -> FloatTensor<B> {
    let (from, to) = (offsets[expert], offsets[expert + 1]);
    let part = rows_of::<B>(rows, from, to);
    let width = part.shape()[1];
    let part = B::float_reshape(part, Shape::from([1, to - from, width]));
    let product = B::float_matmul(part, rows_of::<B>(matrices, expert, expert + 1));
    let width = product.shape()[2];
    B::float_reshape(product, Shape::from([to - from, width]))
}

fn outer_of_one<B: Backend>(
    left: &FloatTensor<B>,
    right: &FloatTensor<B>,
    offsets: &[usize],
    expert: usize,
) -> FloatTensor<B> {
    let (from, to) = (offsets[expert], offsets[expert + 1]);
    let shape = Shape::from([1, left.shape()[1], right.shape()[1]]);
    if from == to {
        return B::float_zeros(shape, &left.device(), left.dtype().into());
    }
    let left = B::float_swap_dims(rows_of::<B>(left, from, to), 0, 1);
    B::float_reshape(B::float_matmul(left, rows_of::<B>(right, from, to)), shape)
}

/// Experts side by side, since one expert's few rows do not occupy all threads.
#[cfg(feature = "flex")]
impl GroupedOps for burn::backend::Flex {
    fn grouped_product(rows: FloatTensor<Self>, matrices: FloatTensor<Self>, offsets: Vec<usize>) -> FloatTensor<Self> {
        use rayon::prelude::*;
        let experts: Vec<usize> = occupied(&offsets).collect();
        let parts =
            experts.par_iter().map(|&expert| product_of_one::<Self>(&rows, &matrices, &offsets, expert)).collect();
        Self::float_cat(parts, 0)
    }

    fn grouped_outer(left: FloatTensor<Self>, right: FloatTensor<Self>, offsets: Vec<usize>) -> FloatTensor<Self> {
        use rayon::prelude::*;
        let experts = 0..offsets.len() - 1;
        let parts =
            experts.into_par_iter().map(|expert| outer_of_one::<Self>(&left, &right, &offsets, expert)).collect();
        Self::float_cat(parts, 0)
    }
}

#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "cuda"))]
impl GroupedOps for burn::backend::Cube {}

impl<B: GroupedOps, C: CheckpointStrategy> GroupedOps for Autodiff<B, C> {
    fn grouped_product(rows: FloatTensor<Self>, matrices: FloatTensor<Self>, offsets: Vec<usize>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Product;

        impl<B: GroupedOps> Backward<B, 2> for Product {
            type State = (FloatTensor<B>, FloatTensor<B>, Vec<usize>);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let [to_rows, to_matrices] = ops.parents;
                let grad = grads.consume::<B>(&ops.node);
                let (rows, matrices, offsets) = ops.state;
                if let Some(node) = to_rows {
                    let transposed = B::float_swap_dims(matrices, 1, 2);
                    grads.register::<B>(node.id, B::grouped_product(grad.clone(), transposed, offsets.clone()));
                }
                if let Some(node) = to_matrices {
                    grads.register::<B>(node.id, B::grouped_outer(rows, grad, offsets));
                }
            }
        }

        match Product.prepare::<C>([rows.node(), matrices.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (rows, matrices) = (rows.into_primitive(), matrices.into_primitive());
                let output = B::grouped_product(rows.clone(), matrices.clone(), offsets.clone());
                prep.finish((rows, matrices, offsets), output)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::grouped_product(rows.into_primitive(), matrices.into_primitive(), offsets))
            }
        }
    }

    fn grouped_outer(left: FloatTensor<Self>, right: FloatTensor<Self>, offsets: Vec<usize>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Outer;

        impl<B: GroupedOps> Backward<B, 2> for Outer {
            type State = (FloatTensor<B>, FloatTensor<B>, Vec<usize>);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let [to_left, to_right] = ops.parents;
                let grad = grads.consume::<B>(&ops.node);
                let (left, right, offsets) = ops.state;
                if let Some(node) = to_left {
                    let transposed = B::float_swap_dims(grad.clone(), 1, 2);
                    grads.register::<B>(node.id, B::grouped_product(right, transposed, offsets.clone()));
                }
                if let Some(node) = to_right {
                    grads.register::<B>(node.id, B::grouped_product(left, grad, offsets));
                }
            }
        }

        match Outer.prepare::<C>([left.node(), right.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (left, right) = (left.into_primitive(), right.into_primitive());
                let output = B::grouped_outer(left.clone(), right.clone(), offsets.clone());
                prep.finish((left, right, offsets), output)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::grouped_outer(left.into_primitive(), right.into_primitive(), offsets))
            }
        }
    }
}

fn check_offsets(name: &str, rows: usize, offsets: &[usize]) {
    let ends = (offsets.first(), offsets.last());
    assert!(
        ends == (Some(&0), Some(&rows)) && offsets.is_sorted(),
        "{name}: offsets must rise from 0 to the {rows} rows, found {offsets:?}"
    );
}

/// The product of every row with the matrix of its expert: `[rows, in] x [experts, in, out] -> [rows, out]`.
///
/// Rows are sorted by expert: `offsets`, of length experts + 1, rises from 0 to the number of rows, and rows
/// `offsets[e]..offsets[e + 1]` are those of expert e. Differentiable in both arguments.
///
/// # Panics
///
/// If there is no row, or offsets, rows and matrices do not fit together.
pub fn grouped_product(rows: Tensor<2>, matrices: Tensor<3>, offsets: &[usize]) -> Tensor<2> {
    let ([count, width], [experts, input, _]) = (rows.dims(), matrices.dims());
    assert!(count > 0, "grouped_product: there is no row");
    assert_eq!(width, input, "grouped_product: rows are {width} wide, matrices take {input}");
    assert_eq!(offsets.len(), experts + 1, "grouped_product: {experts} matrices, offsets of {}", offsets.len());
    check_offsets("grouped_product", count, offsets);
    let product =
        <Dispatch as GroupedOps>::grouped_product(rows.into_dispatch(), matrices.into_dispatch(), offsets.to_vec());
    Tensor::from_dispatch(product)
}

/// For every expert the sum of `left^T right` over its rows: `[rows, in] x [rows, out] -> [experts, in, out]`, zeros
/// for an expert without rows. Differentiable in both arguments.
///
/// # Panics
///
/// If offsets and rows do not fit together.
pub fn grouped_outer(left: Tensor<2>, right: Tensor<2>, offsets: &[usize]) -> Tensor<3> {
    let ([rows, _], [other, _]) = (left.dims(), right.dims());
    assert_eq!(rows, other, "grouped_outer: {rows} rows on the left, {other} on the right");
    check_offsets("grouped_outer", rows, offsets);
    let outer = <Dispatch as GroupedOps>::grouped_outer(left.into_dispatch(), right.into_dispatch(), offsets.to_vec());
    Tensor::from_dispatch(outer)
}

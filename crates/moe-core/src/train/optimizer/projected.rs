//! AdamW in the space of a gradient's first singular vectors.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};
use rayon::prelude::*;

use super::{AdamW, adamw::MOMENTS};
use crate::error::{Error, Result};
use crate::train::{Parameter, Projection, StateArray, parameters::PIECE};

/// Name of the singular vectors in an [`OptimizerState`](crate::train::OptimizerState): `[matrices, smaller dimension,
/// rank]`.
const BASIS: &str = "basis";

/// Sizes of the matrices of a parameter.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    cols: usize,
    rank: usize,
}

impl Sizes {
    /// Whether vectors of the row space are multiplied from the right.
    fn right(self) -> bool {
        self.rows >= self.cols
    }

    fn matrix(self) -> usize {
        self.rows * self.cols
    }

    /// Length of a singular vector.
    fn side(self) -> usize {
        self.rows.min(self.cols)
    }

    /// Shape of a projected matrix.
    fn projected(self) -> [usize; 2] {
        if self.right() { [self.rows, self.rank] } else { [self.rank, self.cols] }
    }
}

pub(super) fn step(
    adamw: &AdamW,
    projection: &Projection,
    name: &str,
    parameter: &mut Parameter,
    rate: f64,
    scale: f32,
) -> Result<()> {
    let &[.., rows, cols] = parameter.shape() else { return Ok(()) };
    let sizes = Sizes { rows, cols, rank: projection.rank.min(rows).min(cols) };
    if sizes.matrix() == 0 {
        return Ok(());
    }
    let matrices = parameter.len() / sizes.matrix();
    let fresh = !parameter.state.arrays.contains_key(BASIS);
    if fresh || parameter.state.steps.is_multiple_of(projection.gap) {
        let previous = parameter.state.arrays.remove(BASIS);
        let mut values = vec![0.0; matrices * sizes.side() * sizes.rank];
        for (index, gradient) in parameter.gradient.chunks(sizes.matrix()).enumerate() {
            let range = index * sizes.side() * sizes.rank..(index + 1) * sizes.side() * sizes.rank;
            let earlier = previous.as_ref().and_then(|array| array.values.get(range.clone()));
            singular_vectors(gradient, sizes, earlier, &mut values[range]).map_err(|reason| {
                Error::input(format!("singular vectors of the gradient of {name}"), reason, "some")
            })?;
        }
        let shape = vec![matrices, sizes.side(), sizes.rank];
        parameter.state.arrays.insert(BASIS.into(), StateArray { shape, values });
        if projection.reset_moments {
            MOMENTS.iter().for_each(|moment| drop(parameter.state.arrays.remove(*moment)));
        }
    }
    let basis = parameter.state.arrays[BASIS].values.clone();
    let vectors = |index: usize| {
        let length = sizes.side() * sizes.rank;
        MatRef::from_row_major_slice(&basis[index * length..(index + 1) * length], sizes.side(), sizes.rank)
    };
    let [small_rows, small_cols] = sizes.projected();
    let mut small = vec![0.0; matrices * small_rows * small_cols];
    for (index, small) in small.chunks_mut(small_rows * small_cols).enumerate() {
        let gradient = &parameter.gradient[index * sizes.matrix()..(index + 1) * sizes.matrix()];
        let gradient = MatRef::from_row_major_slice(gradient, rows, cols);
        match sizes.right() {
            true => product(small, gradient, vectors(index)),
            false => product(small, vectors(index).transpose(), gradient),
        }
    }
    adamw.direction(&mut small, &mut parameter.state, &[matrices, small_rows, small_cols], scale);
    for (index, small) in small.chunks(small_rows * small_cols).enumerate() {
        let gradient = &mut parameter.gradient[index * sizes.matrix()..(index + 1) * sizes.matrix()];
        let small = MatRef::from_row_major_slice(small, small_rows, small_cols);
        match sizes.right() {
            true => product(gradient, small, vectors(index).transpose()),
            false => product(gradient, vectors(index), small),
        }
    }
    let (size, keep) = ((rate * projection.scale) as f32, (1.0 - rate * adamw.weight_decay) as f32);
    let pieces = parameter.values.par_chunks_mut(PIECE).zip(parameter.gradient.par_chunks_mut(PIECE));
    pieces.for_each(|(values, direction)| {
        for (w, d) in values.iter_mut().zip(direction) {
            *w = *w * keep - size * *d;
            *d = 0.0;
        }
    });
    Ok(())
}

/// The first right singular vectors of `gradient` if it has at least as many rows as columns, else the first left ones,
/// as columns of `out`: eigenvectors of the smaller Gram matrix in f64. A vector points the way of the one it replaces,
/// or has its largest entry above 0.
fn singular_vectors(
    gradient: &[f32],
    sizes: Sizes,
    earlier: Option<&[f32]>,
    out: &mut [f32],
) -> std::result::Result<(), String> {
    let matrix = MatRef::from_row_major_slice(gradient, sizes.rows, sizes.cols);
    let wide = Mat::from_fn(sizes.rows, sizes.cols, |i, j| f64::from(matrix[(i, j)]));
    let mut gram = Mat::<f64>::zeros(sizes.side(), sizes.side());
    let (left, right) = match sizes.right() {
        true => (wide.transpose(), wide.as_ref()),
        false => (wide.as_ref(), wide.transpose()),
    };
    matmul(gram.as_mut(), Accum::Replace, left, right, 1.0, Par::Seq);
    let eigen = gram.self_adjoint_eigen(Side::Lower).map_err(|error| moe_checkpoint::human::variant(&error))?;
    let vectors = eigen.U();
    for k in 0..sizes.rank {
        // eigenvalues ascend
        let column = vectors.col(sizes.side() - 1 - k);
        let entry = |i: usize| column[i];
        let agreement: f64 = match earlier {
            Some(earlier) => (0..sizes.side()).map(|i| entry(i) * f64::from(earlier[i * sizes.rank + k])).sum(),
            None => 0.0,
        };
        let largest = (0..sizes.side()).map(entry).fold(0.0, |a: f64, b| if b.abs() > a.abs() { b } else { a });
        let sign = if (if agreement == 0.0 { largest } else { agreement }) < 0.0 { -1.0 } else { 1.0 };
        (0..sizes.side()).for_each(|i| out[i * sizes.rank + k] = (sign * entry(i)) as f32);
    }
    Ok(())
}

/// `out = a b`, row-major, in blocks of rows so that the result does not depend on the number of threads.
fn product(out: &mut [f32], a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
    const ROWS: usize = 64;
    let n = b.ncols();
    out.par_chunks_mut(ROWS * n).enumerate().for_each(|(block, out)| {
        let rows = out.len() / n;
        let into = MatMut::from_row_major_slice_mut(out, rows, n);
        matmul(into, Accum::Replace, a.subrows(block * ROWS, rows), b, 1.0, Par::Seq);
    });
}

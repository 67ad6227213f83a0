//! Row sums of squared weight gradients from Gram matrices of tokens.

use std::ops::Range;

use burn::tensor::Tensor;
use moe_core::host;

use super::weight_gradient::ExpertOperands;

/// Whether Gram matrices of m tokens take more multiplications than the weight gradients they stand for.
///
/// Gram: two m × m matrices of dot products over H, and their products with the `[m, 2I]` and `[m, I]` unit sides.
/// Direct: three `[I, H]` products over m rows.
pub(crate) fn costs_more(m: usize, hidden: usize, width: usize) -> bool {
    m * (2 * hidden + 3 * width) > 3 * width * hidden
}

/// For each of `segments`, rows of one sequence and a scale: adds `scale *` the summed squared gradients of each unit's
/// 3H weights, formed from those rows alone, to `out [I]`. Segments are added in order.
pub(crate) fn add_gram_sums(operands: &ExpertOperands<'_>, segments: &[(Range<usize>, f64)], out: &mut [f64]) {
    if segments.is_empty() || out.is_empty() {
        return;
    }
    #[cfg(feature = "flex")]
    if let Some(host) = &operands.host {
        return on_host::add_gram_sums(operands, host, segments, out);
    }
    add_gram_sums_on_device(operands, segments, out);
}

/// The body for any device.
fn add_gram_sums_on_device(operands: &ExpertOperands<'_>, segments: &[(Range<usize>, f64)], out: &mut [f64]) {
    let width = operands.width();
    let mut total: Option<Tensor<2>> = None;
    for (rows, scale) in segments {
        let [input, gate_up, units, upstream] = operands.rows(rows);
        let sums = |side: Tensor<2>, shared: Tensor<2>| {
            let gram = shared.clone().matmul(shared.transpose()); // [m, m]
            (side.clone() * gram.matmul(side)).sum_dim(0) // [1, 2I] or [1, I]
        };
        let gate_up = sums(gate_up, input).reshape([2, width]).sum_dim(0); // [1, I]
        // Rounding can leave a tiny negative number where a sum of squares is 0.
        let sum = (gate_up + sums(units, upstream)).clamp_min(0.0).mul_scalar(*scale as f32);
        total = Some(match total {
            Some(total) => total + sum,
            None => sum,
        });
    }
    for (out, sum) in out.iter_mut().zip(total.map(host::into_vec).unwrap_or_default()) {
        *out += f64::from(sum);
    }
}

#[cfg(feature = "flex")]
mod on_host {
    use std::cell::RefCell;
    use std::ops::Range;

    use gemm::Parallelism;
    use rayon::prelude::*;

    use crate::kernels::weight_gradient::{ExpertOperands, HostOperands};

    /// Segments whose sums are held at a time: bounds memory when sequences are short and many.
    const SEGMENTS_AT_A_TIME: usize = 64;

    #[derive(Default)]
    struct Scratch {
        /// `[m, m]`
        gram: Vec<f32>,
        /// `[m, 2I]`
        product: Vec<f32>,
        /// `[m, H]`
        weighted: Vec<f32>,
    }

    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::default();
    }

    pub(super) fn add_gram_sums(
        operands: &ExpertOperands<'_>,
        host: &HostOperands,
        segments: &[(Range<usize>, f64)],
        out: &mut [f64],
    ) {
        let width = operands.width();
        // Few segments: threads share each product. Many: threads share the segments.
        let parallelism = match segments.len() < rayon::current_num_threads() {
            true => Parallelism::Rayon(0),
            false => Parallelism::None,
        };
        let mut sums = vec![0.0; width * segments.len().min(SEGMENTS_AT_A_TIME)];
        for segments in segments.chunks(SEGMENTS_AT_A_TIME) {
            let sums = &mut sums[..width * segments.len()];
            sums.par_chunks_exact_mut(width).zip(segments).for_each(|(sums, (rows, scale))| {
                // Taken, not borrowed: a thread that waits for the others inside a product may begin another segment.
                let mut scratch = SCRATCH.take();
                segment(operands, host, rows.clone(), *scale, &mut scratch, parallelism, sums);
                SCRATCH.set(scratch);
            });
            for sums in sums.chunks_exact(width) {
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
            }
        }
    }

    /// `sums[j] = scale * sum of squares` of one segment.
    fn segment(
        operands: &ExpertOperands<'_>,
        host: &HostOperands,
        rows: Range<usize>,
        scale: f64,
        scratch: &mut Scratch,
        parallelism: Parallelism,
        sums: &mut [f64],
    ) {
        let (m, hidden, width) = (rows.len(), operands.hidden(), operands.width());
        let cut = |columns: usize| rows.start * columns..rows.end * columns;
        let Scratch { gram, product, weighted } = scratch;
        sums.fill(0.0);

        let input = &host.input.as_slice()[cut(hidden)];
        let gate_up = &host.gate_up.as_slice()[cut(2 * width)];
        square_sums(gate_up, input, [m, 2 * width, hidden], gram, product, parallelism, |j, sum| {
            sums[j % width] += sum
        });

        let upstream = &host.upstream.as_slice()[cut(hidden)];
        weighted.clear();
        for (row, weight) in upstream.chunks_exact(hidden.max(1)).zip(&operands.routing_weights[rows.clone()]) {
            weighted.extend(row.iter().map(|d| d * weight));
        }
        let units = &host.units.as_slice()[cut(width)];
        square_sums(units, weighted, [m, width, hidden], gram, product, parallelism, |j, sum| sums[j] += sum);

        // Rounding can leave a tiny negative number where a sum of squares is 0.
        sums.iter_mut().for_each(|sum| *sum = scale * sum.max(0.0));
    }

    /// Calls `add(j, sum_{t,t'} side[t,j] side[t',j] (shared[t] . shared[t']))` for `side [m, columns]`, `shared [m,
    /// hidden]`, possibly in parts.
    fn square_sums(
        side: &[f32],
        shared: &[f32],
        [m, columns, hidden]: [usize; 3],
        gram: &mut Vec<f32>,
        product: &mut Vec<f32>,
        parallelism: Parallelism,
        mut add: impl FnMut(usize, f64),
    ) {
        matmul([m, m, hidden], shared, [hidden, 1], shared, [1, hidden], gram, parallelism); // [m, m]
        matmul([m, columns, m], gram, [m, 1], side, [columns, 1], product, parallelism); // [m, columns]
        for (side, product) in side.chunks_exact(columns).zip(product.chunks_exact(columns)) {
            for (j, (a, b)) in side.iter().zip(product).enumerate() {
                add(j, f64::from(*a) * f64::from(*b));
            }
        }
    }

    /// `out [m, n] = a [m, k] b [k, n]`, `out` row-major; strides of a and b are (row, column).
    fn matmul(
        [m, n, k]: [usize; 3],
        a: &[f32],
        a_strides: [usize; 2],
        b: &[f32],
        b_strides: [usize; 2],
        out: &mut Vec<f32>,
        parallelism: Parallelism,
    ) {
        let last =
            |rows: usize, columns: usize, strides: [usize; 2]| (rows - 1) * strides[0] + (columns - 1) * strides[1];
        out.resize(m * n, 0.0);
        if m == 0 || n == 0 {
            return;
        }
        if k == 0 {
            return out.fill(0.0);
        }
        assert!(
            last(m, k, a_strides) < a.len() && last(k, n, b_strides) < b.len(),
            "operands are as large as their shapes say"
        );
        // SAFETY: `out` has m * n elements, and the assertion above bounds every element that a and b are read at.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                out.as_mut_ptr(),
                1,
                n as isize,
                false,
                a.as_ptr(),
                a_strides[1] as isize,
                a_strides[0] as isize,
                b.as_ptr(),
                b_strides[1] as isize,
                b_strides[0] as isize,
                0.0,
                1.0,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::super::tests::{assert_close, for_every_size};
    use super::super::weight_gradient::{Entry, add_row_sums};
    use super::*;

    #[test]
    fn both_bodies_are_sums_of_squared_gradients() {
        for_every_size(|operands, segments| {
            let mut sums = [(); 3].map(|()| vec![1.0; operands.width()]);
            add_gram_sums(operands, segments, &mut sums[0]);
            add_gram_sums_on_device(operands, segments, &mut sums[1]);
            add_row_sums(Entry::Square, operands, segments, &mut sums[2]);
            assert_close(&sums[0], &sums[2]);
            assert_close(&sums[1], &sums[2]);
        });
    }

    #[test]
    fn many_rows_make_gram_matrices_the_dearer_form() {
        // m (2H + 3I) against 3IH: 8 * 68 = 544 and 9 * 68 = 612 against 576.
        assert!(!costs_more(8, 16, 12) && costs_more(9, 16, 12));
    }
}

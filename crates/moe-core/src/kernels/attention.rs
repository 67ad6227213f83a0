//! Causal softmax attention with grouped key/value heads and an optional sliding window, forward and backward.
//!
//! The scores of one block of queries and one head are the largest temporary; nothing of size tokens x tokens exists.
//! The same kernel serves both sweeps of the engine, so that a recomputed layer has the bits of the first run.

use std::ops::Range;

use burn::tensor::{Tensor, activation};

use crate::host;

/// Heads and scale of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, D.
    pub head_dim: usize,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Keys a query sees, itself included; `None` for all earlier ones.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// First key visible to the query at absolute position `position`.
    fn first_key(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }
}

/// Attention of independent sequences: `q [T, heads * D]`, `k`, `v [T, kv_heads * D]` -> `[T, heads * D]`. `sequences` are
/// disjoint row ranges; tokens see earlier tokens of their own sequence only.
pub fn attention(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    sequences: &[Range<usize>],
    shape: &AttentionShape,
) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if host::is_host(&q.device()) {
        return cpu::forward(q, k, v, sequences, shape);
    }
    let outputs = sequences.iter().map(|s| device::forward(&rows(q, s), &rows(k, s), &rows(v, s), shape)).collect();
    Tensor::cat(outputs, 0)
}

/// Attention of the last `q.dims()[0]` tokens of one sequence over its cached keys and values `[keys, kv_heads * D]`.
pub fn attention_cached(q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>, shape: &AttentionShape) -> Tensor<2> {
    device::forward(q, k, v, shape)
}

/// Gradients of [`attention`] with respect to `q`, `k` and `v`, given the gradient of its output.
pub fn attention_backward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    sequences: &[Range<usize>],
    shape: &AttentionShape,
    d_out: &Tensor<2>,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    #[cfg(feature = "flex")]
    if host::is_host(&q.device()) {
        return cpu::backward(q, k, v, sequences, shape, d_out);
    }
    let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
    for s in sequences {
        let (q, k, v) = device::backward(&rows(q, s), &rows(k, s), &rows(v, s), shape, &rows(d_out, s));
        dq.push(q);
        dk.push(k);
        dv.push(v);
    }
    (Tensor::cat(dq, 0), Tensor::cat(dk, 0), Tensor::cat(dv, 0))
}

fn rows(x: &Tensor<2>, range: &Range<usize>) -> Tensor<2> {
    x.clone().narrow(0, range.start, range.len())
}

/// Burn tensor operations, one sequence at a time, chunked over queries.
mod device {
    use super::*;

    /// Scores held at once, in elements.
    const CHUNK_ELEMENTS: usize = 16 << 20;

    fn split(x: &Tensor<2>, heads: usize) -> Tensor<3> {
        let [n, columns] = x.dims();
        x.clone().reshape([n, heads, columns / heads]).swap_dims(0, 1) // [heads, n, D]
    }

    fn merge(x: Tensor<3>) -> Tensor<2> {
        let [heads, n, d] = x.dims();
        x.swap_dims(0, 1).reshape([n, heads * d])
    }

    /// `[kv_heads, n, D]` -> `[heads, n, D]`, each repeated for its group.
    fn spread(x: Tensor<3>, groups: usize) -> Tensor<3> {
        let [kv, n, d] = x.dims();
        x.reshape([kv, 1, n, d]).repeat_dim(1, groups).reshape([kv * groups, n, d])
    }

    /// Sums groups: `[heads, n, D]` -> `[kv_heads, n, D]`.
    fn gather(x: Tensor<3>, groups: usize) -> Tensor<3> {
        let [heads, n, d] = x.dims();
        x.reshape([heads / groups, groups, n, d]).sum_dim(1).reshape([heads / groups, n, d])
    }

    fn chunks(q: &Tensor<2>, keys: usize, shape: &AttentionShape) -> impl Iterator<Item = Range<usize>> {
        let queries = q.dims()[0];
        let step = (CHUNK_ELEMENTS / (shape.heads * keys).max(1)).max(1);
        (0..queries).step_by(step).map(move |start| start..(start + step).min(queries))
    }

    /// Attention weights of some queries, `[heads, queries, keys]`.
    fn weights(q: Tensor<3>, k: &Tensor<3>, first_position: usize, shape: &AttentionShape) -> Tensor<3> {
        let (queries, keys) = (q.dims()[1], k.dims()[1]);
        let mut mask = vec![f32::MIN / 2.0; queries * keys];
        for i in 0..queries {
            let position = first_position + i;
            mask[i * keys + shape.first_key(position)..=i * keys + position].fill(0.0);
        }
        let mask = host::from_vec(mask, [1, queries, keys], &q.device());
        let scores = q.matmul(k.clone().swap_dims(1, 2)).mul_scalar(shape.scale) + mask;
        activation::softmax(scores, 2)
    }

    pub fn forward(q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>, shape: &AttentionShape) -> Tensor<2> {
        let groups = shape.heads / shape.kv_heads;
        let (queries, keys) = (q.dims()[0], k.dims()[0]);
        let (k, v) = (spread(split(k, shape.kv_heads), groups), spread(split(v, shape.kv_heads), groups));
        let outputs = chunks(q, keys, shape)
            .map(|chunk| {
                let first = keys - queries + chunk.start;
                merge(weights(split(&rows(q, &chunk), shape.heads), &k, first, shape).matmul(v.clone()))
            })
            .collect();
        Tensor::cat(outputs, 0)
    }

    pub fn backward(
        q: &Tensor<2>,
        k: &Tensor<2>,
        v: &Tensor<2>,
        shape: &AttentionShape,
        d_out: &Tensor<2>,
    ) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
        let groups = shape.heads / shape.kv_heads;
        let keys = k.dims()[0];
        let (k, v) = (spread(split(k, shape.kv_heads), groups), spread(split(v, shape.kv_heads), groups));
        let (mut dq, mut dk, mut dv) = (Vec::new(), k.zeros_like(), v.zeros_like());
        for chunk in chunks(q, keys, shape) {
            let first = keys - q.dims()[0] + chunk.start;
            let (q, d_out) = (split(&rows(q, &chunk), shape.heads), split(&rows(d_out, &chunk), shape.heads));
            let p = weights(q.clone(), &k, first, shape); // [heads, chunk, keys]
            dv = dv + p.clone().swap_dims(1, 2).matmul(d_out.clone());
            let dp = d_out.matmul(v.clone().swap_dims(1, 2));
            let inner = (p.clone() * dp.clone()).sum_dim(2); // [heads, chunk, 1]
            let ds = (p * (dp - inner)).mul_scalar(shape.scale);
            dk = dk + ds.clone().swap_dims(1, 2).matmul(q);
            dq.push(merge(ds.matmul(k.clone())));
        }
        (Tensor::cat(dq, 0), merge(gather(dk, groups)), merge(gather(dv, groups)))
    }
}

/// Host memory: one task per sequence, head and query block, matrix products by the `gemm` crate on strided slices.
#[cfg(feature = "flex")]
pub(crate) mod cpu {
    use std::cell::RefCell;

    use multiversion::multiversion;
    use rayon::prelude::*;

    use super::*;
    use crate::{
        host::HostView,
        kernels::{math, zeros},
    };

    thread_local! {
        static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }

    fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
        SCRATCH.with_borrow_mut(|scratch| {
            if scratch.len() < len {
                scratch.resize(len, 0.0);
            }
            f(&mut scratch[..len])
        })
    }

    /// Queries per task: keeps the scores of a block in the second-level cache.
    fn query_block(keys: usize) -> usize {
        if keys <= 1024 { 128 } else { 64 }
    }

    /// A strided matrix in memory that outlives the task.
    #[derive(Clone, Copy)]
    struct Matrix {
        data: *mut f32,
        row_stride: isize,
        column_stride: isize,
    }

    // SAFETY: tasks read shared matrices and write disjoint blocks of the others, see the call sites.
    unsafe impl Send for Matrix {}
    unsafe impl Sync for Matrix {}

    impl Matrix {
        /// Head `head` of rows starting at `row` in a `[n, columns]` buffer.
        fn head(data: *const f32, columns: usize, row: usize, head: usize, head_dim: usize) -> Self {
            let offset = row * columns + head * head_dim;
            Self { data: data.wrapping_add(offset).cast_mut(), row_stride: columns as isize, column_stride: 1 }
        }

        fn block(data: &mut [f32], columns: usize) -> Self {
            Self { data: data.as_mut_ptr(), row_stride: columns as isize, column_stride: 1 }
        }

        fn skip_rows(self, rows: usize) -> Self {
            Self { data: self.data.wrapping_offset(rows as isize * self.row_stride), ..self }
        }

        fn t(self) -> Self {
            Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
        }
    }

    /// `out = factor * a b`, or `out += factor * a b` with `add`; shapes `[m, k] [k, n]`.
    ///
    /// SAFETY: all three matrices must be in bounds, `out` not aliased.
    unsafe fn multiply(out: Matrix, a: Matrix, b: Matrix, [m, k, n]: [usize; 3], factor: f32, add: bool) {
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                out.data,
                out.column_stride,
                out.row_stride,
                add,
                a.data,
                a.column_stride,
                a.row_stride,
                b.data,
                b.column_stride,
                b.row_stride,
                1.0f32,
                factor,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }

    /// Queries `queries` (absolute positions) against keys `keys`.
    struct Block {
        queries: Range<usize>,
        keys: Range<usize>,
    }

    fn blocks(first_query: usize, keys: usize, shape: &AttentionShape) -> Vec<Block> {
        let step = query_block(keys);
        (first_query..keys)
            .step_by(step)
            .map(|start| {
                let end = (start + step).min(keys);
                Block { queries: start..end, keys: shape.first_key(start)..end }
            })
            .collect()
    }

    /// Scores -> attention weights, in place; invisible keys become 0.
    fn softmax_block(scores: &mut [f32], block: &Block, shape: &AttentionShape) {
        let width = block.keys.len();
        for (row, position) in scores.chunks_exact_mut(width).zip(block.queries.clone()) {
            let visible = shape.first_key(position) - block.keys.start..position + 1 - block.keys.start;
            softmax_row(row, visible.start, visible.end);
        }
    }

    #[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
    fn softmax_row(row: &mut [f32], start: usize, end: usize) {
        row[..start].fill(0.0);
        row[end..].fill(0.0);
        let row = &mut row[start..end];
        let mut lanes = [f32::NEG_INFINITY; 16];
        let (chunks, tail) = row.as_chunks::<16>();
        for chunk in chunks {
            for i in 0..16 {
                lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
            }
        }
        let max = lanes.iter().chain(tail).copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sums = [0.0f32; 16];
        let (chunks, tail) = row.as_chunks_mut::<16>();
        for chunk in chunks {
            for i in 0..16 {
                chunk[i] = math::exp(chunk[i] - max);
                sums[i] += chunk[i];
            }
        }
        let mut sum: f32 = sums.iter().sum();
        for x in tail {
            *x = math::exp(*x - max);
            sum += *x;
        }
        let inverse = 1.0 / sum;
        for x in row {
            *x *= inverse;
        }
    }

    /// `dp -> ds = p * (dp - sum(p * dp)) * scale`, row by row.
    fn softmax_backward_block(p: &[f32], dp: &mut [f32], width: usize, scale: f32) {
        for (p, dp) in p.chunks_exact(width).zip(dp.chunks_exact_mut(width)) {
            softmax_backward_row(p, dp, scale);
        }
    }

    #[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
    fn softmax_backward_row(p: &[f32], dp: &mut [f32], scale: f32) {
        let inner = math::dot_inline(p, dp);
        for (dp, p) in dp.iter_mut().zip(p) {
            *dp = p * (*dp - inner) * scale;
        }
    }

    /// One sequence of a batch of cached sequences: its new queries and all its keys and values.
    pub struct Cached<'a> {
        /// Rows of `q` and of the output.
        pub queries: Range<usize>,
        /// `[keys, kv_heads * D]`.
        pub keys: &'a [f32],
        /// `[keys, kv_heads * D]`.
        pub values: &'a [f32],
    }

    pub fn forward(
        q: &Tensor<2>,
        k: &Tensor<2>,
        v: &Tensor<2>,
        sequences: &[Range<usize>],
        shape: &AttentionShape,
    ) -> Tensor<2> {
        let kv_columns = shape.kv_heads * shape.head_dim;
        let (ks, vs) = (HostView::new(k), HostView::new(v));
        let (ks, vs) = (ks.as_slice(), vs.as_slice());
        let spans: Vec<Cached<'_>> = sequences
            .iter()
            .map(|s| Cached {
                queries: s.clone(),
                keys: &ks[s.start * kv_columns..s.end * kv_columns],
                values: &vs[s.start * kv_columns..s.end * kv_columns],
            })
            .collect();
        forward_spans(q, &spans, shape)
    }

    /// Attention of the last `queries.len()` positions of each span.
    pub fn forward_spans(q: &Tensor<2>, spans: &[Cached<'_>], shape: &AttentionShape) -> Tensor<2> {
        let d = shape.head_dim;
        let (columns, kv_columns) = (shape.heads * d, shape.kv_heads * d);
        let groups = shape.heads / shape.kv_heads;
        let n = q.dims()[0];
        let view = HostView::new(q);
        let qs = view.as_slice();
        let mut out = zeros(n * columns);
        let target = Matrix::block(&mut out, columns);
        let source = Matrix { data: qs.as_ptr().cast_mut(), row_stride: columns as isize, column_stride: 1 };
        let tasks: Vec<(&Cached<'_>, Block)> = spans
            .iter()
            .flat_map(|span| {
                let keys = span.keys.len() / kv_columns;
                blocks(keys - span.queries.len(), keys, shape).into_iter().map(move |block| (span, block))
            })
            .collect();
        tasks.par_iter().for_each(|(span, block)| {
            let keys = span.keys.len() / kv_columns;
            // row of `q` of the block's first query
            let row = span.queries.start + block.queries.start - (keys - span.queries.len());
            let (m, width) = (block.queries.len(), block.keys.len());
            let (target, source) = (target, source);
            with_scratch(m * width, |scores| {
                for head in 0..shape.heads {
                    let kv = head / groups;
                    let q = Matrix::head(source.data, columns, row, head, d);
                    let o = Matrix::head(target.data, columns, row, head, d);
                    let k = Matrix::head(span.keys.as_ptr(), kv_columns, block.keys.start, kv, d);
                    let v = Matrix::head(span.values.as_ptr(), kv_columns, block.keys.start, kv, d);
                    // SAFETY: rows and heads are inside their buffers; each task writes its own rows of `out`.
                    unsafe {
                        let s = Matrix::block(scores, width);
                        multiply(s, q, k.t(), [m, d, width], shape.scale, false);
                        softmax_block(scores, block, shape);
                        multiply(o, Matrix::block(scores, width), v, [m, width, d], 1.0, false);
                    }
                }
            });
        });
        host::from_vec(out, [n, columns], &q.device())
    }

    pub fn backward(
        q: &Tensor<2>,
        k: &Tensor<2>,
        v: &Tensor<2>,
        sequences: &[Range<usize>],
        shape: &AttentionShape,
        d_out: &Tensor<2>,
    ) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
        let d = shape.head_dim;
        let (columns, kv_columns) = (shape.heads * d, shape.kv_heads * d);
        let groups = shape.heads / shape.kv_heads;
        let (n, device) = (q.dims()[0], q.device());
        let views = [HostView::new(q), HostView::new(k), HostView::new(v), HostView::new(d_out)];
        let [qs, ks, vs, dos] = [0, 1, 2, 3].map(|i| Matrix {
            data: views[i].as_slice().as_ptr().cast_mut(),
            row_stride: 0,
            column_stride: 1,
        });
        let (mut dq, mut dk, mut dv) = (zeros(n * columns), zeros(n * kv_columns), zeros(n * kv_columns));
        let (dqs, dks, dvs) =
            (Matrix::block(&mut dq, columns), Matrix::block(&mut dk, kv_columns), Matrix::block(&mut dv, kv_columns));
        let tasks: Vec<(&Range<usize>, usize)> =
            sequences.iter().flat_map(|s| (0..shape.kv_heads).map(move |kv| (s, kv))).collect();
        tasks.par_iter().for_each(|&(sequence, kv)| {
            let start = sequence.start;
            let ([qs, ks, vs, dos], dqs, dks, dvs) = ([qs, ks, vs, dos], dqs, dks, dvs);
            let (k, v) =
                (Matrix::head(ks.data, kv_columns, start, kv, d), Matrix::head(vs.data, kv_columns, start, kv, d));
            let (dk, dv) =
                (Matrix::head(dks.data, kv_columns, start, kv, d), Matrix::head(dvs.data, kv_columns, start, kv, d));
            let blocks = blocks(0, sequence.len(), shape);
            let largest = blocks.iter().map(|b| b.queries.len() * b.keys.len()).max().unwrap_or(0);
            with_scratch(2 * largest, |scratch| {
                for head in kv * groups..(kv + 1) * groups {
                    for block in &blocks {
                        let (m, width) = (block.queries.len(), block.keys.len());
                        let (p, rest) = scratch.split_at_mut(m * width);
                        let ds = &mut rest[..m * width];
                        let row = start + block.queries.start;
                        let q = Matrix::head(qs.data, columns, row, head, d);
                        let d_out = Matrix::head(dos.data, columns, row, head, d);
                        let dq = Matrix::head(dqs.data, columns, row, head, d);
                        let (k, v) = (k.skip_rows(block.keys.start), v.skip_rows(block.keys.start));
                        let (dk, dv) = (dk.skip_rows(block.keys.start), dv.skip_rows(block.keys.start));
                        // SAFETY: rows and heads are inside their buffers; a task owns the rows of its sequence in the
                        // columns of its key/value head (dk, dv) and of that head's query heads (dq).
                        unsafe {
                            multiply(Matrix::block(p, width), q, k.t(), [m, d, width], shape.scale, false);
                            softmax_block(p, block, shape);
                            multiply(dv, Matrix::block(p, width).t(), d_out, [width, m, d], 1.0, true);
                            multiply(Matrix::block(ds, width), d_out, v.t(), [m, d, width], 1.0, false);
                            softmax_backward_block(p, ds, width, shape.scale);
                            multiply(dq, Matrix::block(ds, width), k, [m, width, d], 1.0, false);
                            multiply(dk, Matrix::block(ds, width).t(), q, [width, m, d], 1.0, true);
                        }
                    }
                }
            });
        });
        (
            host::from_vec(dq, [n, columns], &device),
            host::from_vec(dk, [n, kv_columns], &device),
            host::from_vec(dv, [n, kv_columns], &device),
        )
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, pattern};

    #[test]
    fn host_and_device_bodies_agree() {
        for (window, lengths) in [(None, vec![5, 1, 300]), (Some(3), vec![7, 150]), (Some(1), vec![4])] {
            let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 6, scale: 0.4, window };
            let n = lengths.iter().sum();
            let mut start = 0;
            let sequences: Vec<_> = lengths
                .iter()
                .map(|l| {
                    start += l;
                    start - l..start
                })
                .collect();
            let (q, k, v, d) = (pattern([n, 24], 1), pattern([n, 12], 2), pattern([n, 12], 3), pattern([n, 24], 4));
            let host = attention(&q, &k, &v, &sequences, &shape);
            let device: Vec<_> =
                sequences.iter().map(|s| device::forward(&rows(&q, s), &rows(&k, s), &rows(&v, s), &shape)).collect();
            assert_close(&host, &Tensor::cat(device, 0), 1e-5);
            let (dq, dk, dv) = attention_backward(&q, &k, &v, &sequences, &shape, &d);
            let parts: Vec<_> = sequences
                .iter()
                .map(|s| device::backward(&rows(&q, s), &rows(&k, s), &rows(&v, s), &shape, &rows(&d, s)))
                .collect();
            assert_close(&dq, &Tensor::cat(parts.iter().map(|p| p.0.clone()).collect(), 0), 1e-5);
            assert_close(&dk, &Tensor::cat(parts.iter().map(|p| p.1.clone()).collect(), 0), 2e-5);
            assert_close(&dv, &Tensor::cat(parts.iter().map(|p| p.2.clone()).collect(), 0), 2e-5);
        }
    }

    #[test]
    fn cached_queries_see_what_full_attention_sees() {
        let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 4, scale: 0.5, window: Some(4) };
        let (q, k, v) = (pattern([9, 8], 1), pattern([9, 4], 2), pattern([9, 4], 3));
        let full = attention(&q, &k, &v, std::slice::from_ref(&(0..9)), &shape);
        let last = rows(&q, &(7..9));
        assert_close(&attention_cached(&last, &k, &v, &shape), &rows(&full, &(7..9)), 1e-6);
        let (ks, vs) = (host::HostView::new(&k), host::HostView::new(&v));
        let span = cpu::Cached { queries: 0..2, keys: ks.as_slice(), values: vs.as_slice() };
        assert_close(&cpu::forward_spans(&last, &[span], &shape), &rows(&full, &(7..9)), 1e-6);
    }

    #[test]
    fn gradient_matches_a_difference_quotient() {
        let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 2, scale: 0.7, window: None };
        let (q, k, v, d) = (pattern([3, 4], 1), pattern([3, 2], 2), pattern([3, 2], 3), pattern([3, 4], 4));
        let (dq, dk, dv) = attention_backward(&q, &k, &v, std::slice::from_ref(&(0..3)), &shape, &d);
        let loss = |q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>| -> f64 {
            host::into_vec(attention(q, k, v, std::slice::from_ref(&(0..3)), &shape) * d.clone())
                .iter()
                .map(|x| *x as f64)
                .sum()
        };
        let moved = |x: &Tensor<2>, i: usize, h: f32| {
            let mut values = host::HostView::new(x).as_slice().to_vec();
            values[i] += h;
            host::from_vec(values, x.dims(), &x.device())
        };
        let h = 1e-2;
        for i in 0..12 {
            let numeric = (loss(&moved(&q, i, h), &k, &v) - loss(&moved(&q, i, -h), &k, &v)) / (2.0 * h as f64);
            assert!((numeric - host::HostView::new(&dq).as_slice()[i] as f64).abs() < 1e-3);
        }
        for i in 0..6 {
            let numeric = (loss(&q, &moved(&k, i, h), &v) - loss(&q, &moved(&k, i, -h), &v)) / (2.0 * h as f64);
            assert!((numeric - host::HostView::new(&dk).as_slice()[i] as f64).abs() < 1e-3);
            let numeric = (loss(&q, &k, &moved(&v, i, h)) - loss(&q, &k, &moved(&v, i, -h))) / (2.0 * h as f64);
            assert!((numeric - host::HostView::new(&dv).as_slice()[i] as f64).abs() < 1e-3);
        }
    }
}

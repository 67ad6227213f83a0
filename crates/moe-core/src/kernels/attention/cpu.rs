//! Host memory: one task per sequence, head and query block, matrix products by the `gemm` crate on strided slices.

use std::{cell::RefCell, ops::Range};

use burn::tensor::Tensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::{AttentionShape, Selection};
use crate::{
    host::{self, HostView},
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

/// Scores of query head `head` -> attention weights, in place; invisible keys become 0. `first` is the row of the
/// first query in what the selection is of.
fn softmax_block(
    scores: &mut [f32],
    block: &Block,
    head: usize,
    shape: &AttentionShape,
    first: usize,
    selection: Option<&Selection>,
) {
    let sink = shape.sinks.as_ref().map(|sinks| sinks[head]);
    let width = block.keys.len();
    let mut chosen = Vec::new();
    for (i, (row, position)) in scores.chunks_exact_mut(width).zip(block.queries.clone()).enumerate() {
        if let Some(keys) = selection.and_then(|selection| selection.keys(first + i)) {
            let places = || keys.iter().filter_map(|key| (*key as usize).checked_sub(block.keys.start));
            chosen.clear();
            chosen.extend(places().map(|place| row[place]));
            let end = chosen.len();
            softmax_row(&mut chosen, 0, end, sink);
            row.fill(0.0);
            places().zip(&chosen).for_each(|(place, weight)| row[place] = *weight);
            continue;
        }
        let visible = shape.first_key(position) - block.keys.start..position + 1 - block.keys.start;
        softmax_row(row, visible.start, visible.end, sink);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn softmax_row(row: &mut [f32], start: usize, end: usize, sink: Option<f32>) {
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
    let max = lanes.iter().chain(tail).copied().fold(sink.unwrap_or(f32::NEG_INFINITY), f32::max);
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
    if let Some(sink) = sink {
        sum += math::exp(sink - max);
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
    /// `[keys, kv_heads * D_v]`.
    pub values: &'a [f32],
}

pub fn forward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    sequences: &[Range<usize>],
    shape: &AttentionShape,
    selection: Option<&Selection>,
) -> Tensor<2> {
    let (k_columns, v_columns) = (shape.kv_heads * shape.head_dim, shape.kv_heads * shape.value_dim);
    let (ks, vs) = (HostView::new(k), HostView::new(v));
    let (ks, vs) = (ks.as_slice(), vs.as_slice());
    let spans: Vec<Cached<'_>> = sequences
        .iter()
        .map(|s| Cached {
            queries: s.clone(),
            keys: &ks[s.start * k_columns..s.end * k_columns],
            values: &vs[s.start * v_columns..s.end * v_columns],
        })
        .collect();
    forward_spans(q, &spans, shape, selection)
}

/// Attention of the last `queries.len()` positions of each span; the selection is of the rows of `q`.
pub fn forward_spans(
    q: &Tensor<2>,
    spans: &[Cached<'_>],
    shape: &AttentionShape,
    selection: Option<&Selection>,
) -> Tensor<2> {
    let (d, d_v) = (shape.head_dim, shape.value_dim);
    let (q_columns, k_columns) = (shape.heads * d, shape.kv_heads * d);
    let (o_columns, v_columns) = (shape.heads * d_v, shape.kv_heads * d_v);
    let groups = shape.heads / shape.kv_heads;
    let n = q.dims()[0];
    let view = HostView::new(q);
    let qs = view.as_slice();
    let mut out = zeros(n * o_columns);
    let target = Matrix::block(&mut out, o_columns);
    let source = Matrix { data: qs.as_ptr().cast_mut(), row_stride: q_columns as isize, column_stride: 1 };
    let tasks: Vec<(&Cached<'_>, Block)> = spans
        .iter()
        .flat_map(|span| {
            let keys = span.keys.len() / k_columns;
            blocks(keys - span.queries.len(), keys, shape).into_iter().map(move |block| (span, block))
        })
        .collect();
    tasks.par_iter().for_each(|(span, block)| {
        let keys = span.keys.len() / k_columns;
        // row of `q` of the block's first query
        let row = span.queries.start + block.queries.start - (keys - span.queries.len());
        let (m, width) = (block.queries.len(), block.keys.len());
        let (target, source) = (target, source);
        with_scratch(m * width, |scores| {
            for head in 0..shape.heads {
                let kv = head / groups;
                let q = Matrix::head(source.data, q_columns, row, head, d);
                let o = Matrix::head(target.data, o_columns, row, head, d_v);
                let k = Matrix::head(span.keys.as_ptr(), k_columns, block.keys.start, kv, d);
                let v = Matrix::head(span.values.as_ptr(), v_columns, block.keys.start, kv, d_v);
                // SAFETY: rows and heads are inside their buffers; each task writes its own rows of `out`.
                unsafe {
                    let s = Matrix::block(scores, width);
                    multiply(s, q, k.t(), [m, d, width], shape.scale, false);
                    softmax_block(scores, block, head, shape, row, selection);
                    multiply(o, Matrix::block(scores, width), v, [m, width, d_v], 1.0, false);
                }
            }
        });
    });
    host::from_vec(out, [n, o_columns], &q.device())
}

pub fn backward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    sequences: &[Range<usize>],
    shape: &AttentionShape,
    selection: Option<&Selection>,
    d_out: &Tensor<2>,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let (d, d_v) = (shape.head_dim, shape.value_dim);
    let (q_columns, k_columns) = (shape.heads * d, shape.kv_heads * d);
    let (o_columns, v_columns) = (shape.heads * d_v, shape.kv_heads * d_v);
    let groups = shape.heads / shape.kv_heads;
    let (n, device) = (q.dims()[0], q.device());
    let views = [HostView::new(q), HostView::new(k), HostView::new(v), HostView::new(d_out)];
    let [qs, ks, vs, dos] =
        [0, 1, 2, 3].map(|i| Matrix { data: views[i].as_slice().as_ptr().cast_mut(), row_stride: 0, column_stride: 1 });
    let (mut dq, mut dk, mut dv) = (zeros(n * q_columns), zeros(n * k_columns), zeros(n * v_columns));
    let (dqs, dks, dvs) =
        (Matrix::block(&mut dq, q_columns), Matrix::block(&mut dk, k_columns), Matrix::block(&mut dv, v_columns));
    let tasks: Vec<(&Range<usize>, usize)> =
        sequences.iter().flat_map(|s| (0..shape.kv_heads).map(move |kv| (s, kv))).collect();
    tasks.par_iter().for_each(|&(sequence, kv)| {
        let start = sequence.start;
        let ([qs, ks, vs, dos], dqs, dks, dvs) = ([qs, ks, vs, dos], dqs, dks, dvs);
        let (k, v) = (Matrix::head(ks.data, k_columns, start, kv, d), Matrix::head(vs.data, v_columns, start, kv, d_v));
        let (dk, dv) =
            (Matrix::head(dks.data, k_columns, start, kv, d), Matrix::head(dvs.data, v_columns, start, kv, d_v));
        let blocks = blocks(0, sequence.len(), shape);
        let largest = blocks.iter().map(|b| b.queries.len() * b.keys.len()).max().unwrap_or(0);
        with_scratch(2 * largest, |scratch| {
            for head in kv * groups..(kv + 1) * groups {
                for block in &blocks {
                    let (m, width) = (block.queries.len(), block.keys.len());
                    let (p, rest) = scratch.split_at_mut(m * width);
                    let ds = &mut rest[..m * width];
                    let row = start + block.queries.start;
                    let q = Matrix::head(qs.data, q_columns, row, head, d);
                    let d_out = Matrix::head(dos.data, o_columns, row, head, d_v);
                    let dq = Matrix::head(dqs.data, q_columns, row, head, d);
                    let (k, v) = (k.skip_rows(block.keys.start), v.skip_rows(block.keys.start));
                    let (dk, dv) = (dk.skip_rows(block.keys.start), dv.skip_rows(block.keys.start));
                    // SAFETY: rows and heads are inside their buffers; a task owns the rows of its sequence in the
                    // columns of its key/value head (dk, dv) and of that head's query heads (dq).
                    unsafe {
                        multiply(Matrix::block(p, width), q, k.t(), [m, d, width], shape.scale, false);
                        softmax_block(p, block, head, shape, row, selection);
                        multiply(dv, Matrix::block(p, width).t(), d_out, [width, m, d_v], 1.0, true);
                        multiply(Matrix::block(ds, width), d_out, v.t(), [m, d_v, width], 1.0, false);
                        softmax_backward_block(p, ds, width, shape.scale);
                        multiply(dq, Matrix::block(ds, width), k, [m, width, d], 1.0, false);
                        multiply(dk, Matrix::block(ds, width).t(), q, [width, m, d], 1.0, true);
                    }
                }
            }
        });
    });
    (
        host::from_vec(dq, [n, q_columns], &device),
        host::from_vec(dk, [n, k_columns], &device),
        host::from_vec(dv, [n, v_columns], &device),
    )
}

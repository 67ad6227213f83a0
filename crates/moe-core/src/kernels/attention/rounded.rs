//! Host memory, products rounded to bf16: one task per sequence and key/value head, whose keys and values are rounded
//! once for all queries. Scores, softmax and sums are in f32.

use std::{cell::RefCell, ops::Range};

use rayon::prelude::*;

use super::{
    AttentionShape, Selection,
    cpu::{Block, Cached, Heads, Matrix, blocks, softmax_backward_block, softmax_block},
};
use crate::{
    kernels::rounded::{Left, Right, available, multiply},
    precision::Precision,
};

/// Queries of a sequence from which on it pays to round its keys and values.
const QUERIES: usize = 16;
/// Products with parts of what was rounded begin at multiples of this.
const ALIGNED: usize = 32;

/// Whether the attention of so many queries of a sequence is rounded.
pub fn suits(shape: &AttentionShape, queries: usize) -> bool {
    shape.precision == Precision::Bf16 && queries >= QUERIES && available()
}

/// What a task rounds and sums, kept for the next of its thread.
#[derive(Default)]
struct Scratch {
    /// Keys and values of a head as columns and as rows.
    keys: [Right; 2],
    values: [Right; 2],
    rows: Left,
    weights: Right,
    scores: [Vec<f32>; 2],
    transposed: Vec<f32>,
    /// Gradients of keys and values, a row for every dimension.
    gradients: [Vec<f32>; 2],
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The block with keys from a multiple of 32 on; the first of them are invisible.
fn aligned(block: Block) -> Block {
    Block { keys: block.keys.start / ALIGNED * ALIGNED..block.keys.end, ..block }
}

fn largest(blocks: &[Block]) -> usize {
    blocks.iter().map(|block| block.queries.len() * block.keys.len()).max().unwrap_or(0)
}

fn grown(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Attention of spans that [suit](suits) into their rows of `out`.
pub fn forward(
    q: Heads<'_>,
    spans: &[&Cached<'_>],
    shape: &AttentionShape,
    selection: Option<&Selection>,
    out: Matrix,
) {
    let (d, d_v, groups) = (shape.head_dim, shape.value_dim, shape.heads / shape.kv_heads);
    let tasks: Vec<(&Cached<'_>, usize)> =
        spans.iter().flat_map(|span| (0..shape.kv_heads).map(move |kv| (*span, kv))).collect();
    tasks.par_iter().for_each(|&(span, kv)| {
        let out = out;
        let (k, v) = (Heads::new(span.keys, shape.kv_heads, d), Heads::new(span.values, shape.kv_heads, d_v));
        let keys = span.keys.len() / (shape.kv_heads * d);
        let first_query = keys - span.queries.len();
        let blocks: Vec<Block> = blocks(first_query, keys, shape).into_iter().map(aligned).collect();
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { keys: [key_columns, _], values: [value_rows, _], rows, scores: [scores, _], .. } = scratch;
            key_columns.take_columns(keys, d, |i| k.row(i, kv));
            value_rows.take_rows(keys, d_v, |i| v.row(i, kv));
            let scores = grown(scores, largest(&blocks));
            for head in kv * groups..(kv + 1) * groups {
                for block in &blocks {
                    let (m, width) = (block.queries.len(), block.keys.len());
                    let row = span.queries.start + block.queries.start - first_query;
                    rows.take(m, d, |i| q.row(row + i, head));
                    let scores = &mut scores[..m * width];
                    weights(rows, key_columns, scores, block, shape);
                    softmax_block(scores, block, head, shape, row, selection);
                    rows.take(m, width, |i| &scores[i * width..(i + 1) * width]);
                    // SAFETY: a task owns the rows of its span in the columns of its heads.
                    unsafe {
                        let (to, stride) = out.rows_of_head(row, head, d_v);
                        multiply(rows, value_rows, block.keys.start, 0..d_v, false, to, stride);
                    }
                }
            }
        });
    });
}

/// Scores of a block before softmax.
fn weights(queries: &Left, keys: &Right, scores: &mut [f32], block: &Block, shape: &AttentionShape) {
    let width = block.keys.len();
    assert_eq!(scores.len(), block.queries.len() * width);
    // SAFETY: `scores` has a row of as many keys for every query.
    unsafe { multiply(queries, keys, 0, block.keys.clone(), false, scores.as_mut_ptr(), width) };
    scores.iter_mut().for_each(|score| *score *= shape.scale);
}

/// Gradients of attention with respect to queries, keys and values, into the rows of one sequence, whose values are
/// zero before.
pub fn backward(
    [q, k, v, d_out]: [Heads<'_>; 4],
    sequence: &Range<usize>,
    kv: usize,
    shape: &AttentionShape,
    selection: Option<&Selection>,
    [dq, dk, dv]: [Matrix; 3],
) {
    let (d, d_v, groups) = (shape.head_dim, shape.value_dim, shape.heads / shape.kv_heads);
    let (start, keys) = (sequence.start, sequence.len());
    let blocks: Vec<Block> = blocks(0, keys, shape).into_iter().map(aligned).collect();
    SCRATCH.with_borrow_mut(|scratch| {
        let Scratch { keys: [key_columns, key_rows], values: [_, value_columns], rows, .. } = scratch;
        let Scratch { weights: right, scores: [p, ds], transposed, gradients: [sum_k, sum_v], .. } = scratch;
        key_columns.take_columns(keys, d, |i| k.row(start + i, kv));
        key_rows.take_rows(keys, d, |i| k.row(start + i, kv));
        value_columns.take_columns(keys, d_v, |i| v.row(start + i, kv));
        let (p, ds) = (grown(p, largest(&blocks)), grown(ds, largest(&blocks)));
        let (sum_k, sum_v) = (grown(sum_k, d * keys), grown(sum_v, d_v * keys));
        sum_k.fill(0.0);
        sum_v.fill(0.0);
        for head in kv * groups..(kv + 1) * groups {
            for block in &blocks {
                let (m, width, first) = (block.queries.len(), block.keys.len(), block.keys.start);
                let row = start + block.queries.start;
                let (p, ds) = (&mut p[..m * width], &mut ds[..m * width]);
                // SAFETY: `ds` has a row of keys for every query, the sums a row of keys for every dimension; a task
                // owns the rows of its sequence in the columns of its heads.
                unsafe {
                    rows.take(m, d, |i| q.row(row + i, head));
                    weights(rows, key_columns, p, block, shape);
                    softmax_block(p, block, head, shape, row, selection);
                    right.take_rows(m, width, |i| &p[i * width..(i + 1) * width]);
                    transposed_rows(rows, transposed, m, d_v, |i| d_out.row(row + i, head));
                    multiply(rows, right, 0, 0..width, true, sum_v.as_mut_ptr().add(first), keys);
                    rows.take(m, d_v, |i| d_out.row(row + i, head));
                    multiply(rows, value_columns, 0, block.keys.clone(), false, ds.as_mut_ptr(), width);
                    softmax_backward_block(p, ds, width, shape.scale);
                    rows.take(m, width, |i| &ds[i * width..(i + 1) * width]);
                    let (to, stride) = dq.rows_of_head(row, head, d);
                    multiply(rows, key_rows, first, 0..d, false, to, stride);
                    right.take_rows(m, width, |i| &ds[i * width..(i + 1) * width]);
                    transposed_rows(rows, transposed, m, d, |i| q.row(row + i, head));
                    multiply(rows, right, 0, 0..width, true, sum_k.as_mut_ptr().add(first), keys);
                }
            }
        }
        for (sums, target, width) in [(&*sum_k, dk, d), (&*sum_v, dv, d_v)] {
            for key in 0..keys {
                // SAFETY: a task owns the rows of its sequence in the columns of its head.
                let to = unsafe {
                    let (to, _) = target.rows_of_head(start + key, kv, width);
                    std::slice::from_raw_parts_mut(to, width)
                };
                to.iter_mut().zip(sums[key..].iter().step_by(keys)).for_each(|(to, sum)| *to = *sum);
            }
        }
    });
}

/// Takes the transpose of `rows` rows of `columns` values.
fn transposed_rows<'a>(
    left: &mut Left,
    buffer: &mut Vec<f32>,
    rows: usize,
    columns: usize,
    row: impl Fn(usize) -> &'a [f32],
) {
    let buffer = grown(buffer, rows * columns);
    for i in 0..rows {
        buffer[i..].iter_mut().step_by(rows).zip(row(i)).for_each(|(to, x)| *to = *x);
    }
    left.take(columns, rows, |i| &buffer[i * rows..(i + 1) * rows]);
}

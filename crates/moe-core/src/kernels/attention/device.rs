//! Burn tensor operations, one sequence at a time, chunked over queries.

use std::ops::Range;

use burn::tensor::{Tensor, activation};

use super::{AttentionShape, Selection, rows};
use crate::host;

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
fn weights(
    q: Tensor<3>,
    k: &Tensor<3>,
    first_position: usize,
    shape: &AttentionShape,
    (first_row, selection): (usize, Option<&Selection>),
) -> Tensor<3> {
    let (queries, keys) = (q.dims()[1], k.dims()[1]);
    let mut mask = vec![f32::MIN / 2.0; queries * keys];
    for i in 0..queries {
        let position = first_position + i;
        if let Some(chosen) = selection.and_then(|selection| selection.keys(first_row + i)) {
            chosen.iter().for_each(|key| mask[i * keys + *key as usize] = 0.0);
            continue;
        }
        mask[i * keys + shape.first_key(position)..=i * keys + position].fill(0.0);
    }
    let mask = host::from_vec(mask, [1, queries, keys], &q.device());
    let scores = q.matmul(k.clone().swap_dims(1, 2)).mul_scalar(shape.scale) + mask;
    match &shape.sinks {
        None => activation::softmax(scores, 2),
        Some(sinks) => {
            let sinks = host::from_vec(sinks.to_vec(), [shape.heads, 1, 1], &scores.device());
            let scores = Tensor::cat(vec![scores, sinks.repeat_dim(1, queries)], 2); // [heads, queries, keys + 1]
            activation::softmax(scores, 2).narrow(2, 0, keys)
        }
    }
}

pub fn forward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    shape: &AttentionShape,
    selection: Option<&Selection>,
) -> Tensor<2> {
    let groups = shape.heads / shape.kv_heads;
    let (queries, keys) = (q.dims()[0], k.dims()[0]);
    let (k, v) = (spread(split(k, shape.kv_heads), groups), spread(split(v, shape.kv_heads), groups));
    let outputs = chunks(q, keys, shape)
        .map(|chunk| {
            let first = keys - queries + chunk.start;
            let of = (chunk.start, selection);
            merge(weights(split(&rows(q, &chunk), shape.heads), &k, first, shape, of).matmul(v.clone()))
        })
        .collect();
    Tensor::cat(outputs, 0)
}

pub fn backward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    shape: &AttentionShape,
    selection: Option<&Selection>,
    d_out: &Tensor<2>,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let groups = shape.heads / shape.kv_heads;
    let keys = k.dims()[0];
    let (k, v) = (spread(split(k, shape.kv_heads), groups), spread(split(v, shape.kv_heads), groups));
    let (mut dq, mut dk, mut dv) = (Vec::new(), k.zeros_like(), v.zeros_like());
    for chunk in chunks(q, keys, shape) {
        let first = keys - q.dims()[0] + chunk.start;
        let (q, d_out) = (split(&rows(q, &chunk), shape.heads), split(&rows(d_out, &chunk), shape.heads));
        let p = weights(q.clone(), &k, first, shape, (chunk.start, selection)); // [heads, chunk, keys]
        dv = dv + p.clone().swap_dims(1, 2).matmul(d_out.clone());
        let dp = d_out.matmul(v.clone().swap_dims(1, 2));
        let inner = (p.clone() * dp.clone()).sum_dim(2); // [heads, chunk, 1]
        let ds = (p * (dp - inner)).mul_scalar(shape.scale);
        dk = dk + ds.clone().swap_dims(1, 2).matmul(q);
        dq.push(merge(ds.matmul(k.clone())));
    }
    (Tensor::cat(dq, 0), merge(gather(dk, groups)), merge(gather(dv, groups)))
}

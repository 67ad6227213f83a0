//! Queries, keys and values of delta rules: rows of all three go through a short causal convolution and SiLU, then
//! queries and keys are divided by their length.

use std::ops::Range;

use crate::kernels::{
    convolution::{causal_convolution, causal_convolution_backward},
    math,
};

/// Added to the square of the length of queries and keys.
const LENGTH_EPS: f32 = 1e-6;

/// Columns of the rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeadColumns {
    /// Of queries, and of keys.
    pub keys: usize,
    /// Of values.
    pub values: usize,
    /// Width of a query or key head, D_k.
    pub key_dim: usize,
}

impl HeadColumns {
    /// Of all three.
    pub fn all(&self) -> usize {
        2 * self.keys + self.values
    }

    /// Factor on queries.
    fn query_scale(&self) -> f32 {
        (self.key_dim as f32).powf(-0.5)
    }
}

/// Queries, keys and values as the rule has them.
pub(super) struct ConvolvedHeads {
    /// `[T, C]` after the convolution, before SiLU.
    convolved: Vec<f32>,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

impl ConvolvedHeads {
    /// Of rows `given [T, C]`; `history` as [`causal_convolution`] has it.
    pub fn new(
        given: &[f32],
        taps: &[f32],
        columns: &HeadColumns,
        sequences: &[Range<usize>],
        history: Option<&[Vec<f32>]>,
    ) -> Self {
        let (keys, all) = (columns.keys, columns.all());
        let convolved = causal_convolution(given, taps, all, sequences, history);
        let tokens = convolved.len() / all;
        let part = |from: usize, to: usize| -> Vec<f32> {
            let rows = (0..tokens).flat_map(|t| convolved[t * all + from..t * all + to].iter());
            rows.map(|x| math::silu(*x)).collect()
        };
        let (mut q, mut k, v) = (part(0, keys), part(keys, 2 * keys), part(2 * keys, all));
        let scale = columns.query_scale();
        for head in q.chunks_exact_mut(columns.key_dim) {
            let factor = scale * inverse_length(head);
            head.iter_mut().for_each(|x| *x *= factor);
        }
        for head in k.chunks_exact_mut(columns.key_dim) {
            let factor = inverse_length(head);
            head.iter_mut().for_each(|x| *x *= factor);
        }
        Self { convolved, q, k, v }
    }

    /// From gradients of queries, keys and values to that of the rows that were given.
    pub fn backward(
        &self,
        [dq, dk, dv]: [&[f32]; 3],
        taps: &[f32],
        columns: &HeadColumns,
        sequences: &[Range<usize>],
    ) -> Vec<f32> {
        let HeadColumns { keys, values, key_dim: width } = *columns;
        let all = columns.all();
        let mut d = vec![0.0; self.convolved.len()];
        for (t, (d, convolved)) in d.chunks_exact_mut(all).zip(self.convolved.chunks_exact(all)).enumerate() {
            for (part, (given, scale)) in [(dq, columns.query_scale()), (dk, 1.0)].into_iter().enumerate() {
                for head in 0..keys / width {
                    let at = part * keys + head * width;
                    let x: Vec<f32> = convolved[at..at + width].iter().map(|x| math::silu(*x)).collect();
                    let given = &given[t * keys + head * width..][..width];
                    let inverse = inverse_length(&x);
                    let along = inverse.powi(3) * math::dot(&x, given);
                    for ((d, x), given) in d[at..at + width].iter_mut().zip(&x).zip(given) {
                        *d = scale * (given * inverse - x * along);
                    }
                }
            }
            d[2 * keys..].copy_from_slice(&dv[t * values..(t + 1) * values]);
            d.iter_mut().zip(convolved).for_each(|(d, x)| *d *= math::silu_derivative(*x, math::sigmoid(*x)));
        }
        causal_convolution_backward(&d, taps, all, sequences)
    }
}

/// `1 / sqrt(x . x + eps)`.
fn inverse_length(x: &[f32]) -> f32 {
    1.0 / (math::dot(x, x) + LENGTH_EPS).sqrt()
}

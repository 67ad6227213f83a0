//! The gated delta rule, forward and backward, in chunks of tokens: with one decay per head as in gated DeltaNet (arXiv
//! 2412.06464), or one per channel as in Kimi delta attention (arXiv 2510.26692, section 3).
//!
//! Per head, with keys and queries of width `D_k`, values of width `D_v` and a state `S [D_k, D_v]`:
//! `S_t = diag(e^{g_t}) S_{t-1} + k_t u_t^T` with `u_t = beta_t (v_t - (diag(e^{g_t}) S_{t-1})^T k_t)`, and
//! `o_t = S_t^T q_t`. `g_t` is a vector of width `D_k`, or one number for all channels.
//!
//! Within a chunk that begins with the state `S`, with `G` the sums of `g` from its beginning and `*` by channel, the
//! `u` solve the triangular system `(I + L) U = diag(beta) (V - (K * e^G) S)` with
//! `L_ij = beta_i k_i . (e^{G_i - G_j} * k_j)` for `j < i`. Then `O = (Q * e^G) S + M U` with
//! `M_ij = q_i . (e^{G_i - G_j} * k_j)` for `j <= i`, and the state after the chunk is
//! `diag(e^{G_last}) S + (K * e^{G_last - G})^T U`. No exponent is positive. Memory grows with the tokens, not with
//! their square: the backward pass keeps the state at the beginning of every chunk of one head and computes the rest
//! again.
//!
//! A recurrence over tokens has no form in tensor operations that would pay; on other devices than the CPU it runs on
//! the host as well.

mod decay;
#[cfg(test)]
mod tests;

use std::ops::Range;

use super::{
    math,
    recurrence::{chunks, each_head, gather, of_each_token, run_heads, scatter},
    small_products::{add_product, add_scaled, add_transposed_product, product_nt, subtract_rows},
};
use decay::{ChannelDecay, ChunkDecay, HeadDecay};

/// What has a decay of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecayPer {
    /// Every value head.
    Head,
    /// Every channel of the keys of every value head.
    Channel,
}

/// Heads of a delta rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaShape {
    /// Heads of queries and keys; divides `value_heads`. Value head h reads key head `h / (value_heads / key_heads)`.
    pub key_heads: usize,
    /// Heads of values, decays and betas.
    pub value_heads: usize,
    /// Width of a query or key head, D_k.
    pub key_dim: usize,
    /// Width of a value head, D_v.
    pub value_dim: usize,
    /// What has a decay of its own.
    pub decay: DecayPer,
}

impl DeltaShape {
    /// Elements of the states of all heads.
    pub fn state_len(&self) -> usize {
        self.value_heads * self.key_dim * self.value_dim
    }

    /// Decays of a token.
    pub fn decays(&self) -> usize {
        self.value_heads * if self.decay == DecayPer::Channel { self.key_dim } else { 1 }
    }
}

/// What the rule is given, row-major, for T tokens.
#[derive(Clone, Copy, Debug)]
pub struct DeltaInput<'a> {
    /// Queries `[T, key_heads * D_k]`, with their norm and scale.
    pub q: &'a [f32],
    /// Keys `[T, key_heads * D_k]`, with their norm.
    pub k: &'a [f32],
    /// Values `[T, value_heads * D_v]`.
    pub v: &'a [f32],
    /// Logarithms of the decay `[T, value_heads]` or `[T, value_heads * D_k]`, at most 0.
    pub g: &'a [f32],
    /// How much of a value is written `[T, value_heads]`.
    pub beta: &'a [f32],
}

/// Gradients of [`DeltaInput`], in the same shapes.
#[derive(Clone, Debug, Default)]
pub struct DeltaGradients {
    /// Of the queries.
    pub q: Vec<f32>,
    /// Of the keys.
    pub k: Vec<f32>,
    /// Of the values.
    pub v: Vec<f32>,
    /// Of the logarithms of the decay.
    pub g: Vec<f32>,
    /// Of the betas.
    pub beta: Vec<f32>,
}

/// One head of one sequence, rows side by side.
struct Head {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    g: Vec<f32>,
    beta: Vec<f32>,
    dk: usize,
    dv: usize,
}

impl Head {
    fn new<D: ChunkDecay>(input: &DeltaInput<'_>, rows: &Range<usize>, head: usize, shape: &DeltaShape) -> Self {
        let key_head = head / (shape.value_heads / shape.key_heads);
        Self {
            q: gather(input.q, rows, shape.key_heads, key_head, shape.key_dim),
            k: gather(input.k, rows, shape.key_heads, key_head, shape.key_dim),
            v: gather(input.v, rows, shape.value_heads, head, shape.value_dim),
            g: gather(input.g, rows, shape.value_heads, head, D::width(shape.key_dim)),
            beta: gather(input.beta, rows, shape.value_heads, head, 1),
            dk: shape.key_dim,
            dv: shape.value_dim,
        }
    }

    fn chunk<D: ChunkDecay>(&self, rows: &Range<usize>) -> Chunk<'_, D> {
        let (keys, width) = (rows.start * self.dk..rows.end * self.dk, D::width(self.dk));
        Chunk {
            q: &self.q[keys.clone()],
            k: &self.k[keys],
            v: &self.v[rows.start * self.dv..rows.end * self.dv],
            decay: D::new(&self.g[rows.start * width..rows.end * width], self.dk),
            beta: &self.beta[rows.clone()],
            dk: self.dk,
            dv: self.dv,
        }
    }
}

/// Tokens of one head that are computed together.
struct Chunk<'a, D> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    decay: D,
    beta: &'a [f32],
    dk: usize,
    dv: usize,
}

/// What a chunk computes on the way to its output.
struct Middle {
    /// `k_i . (e^{G_i - G_j} * k_j)`, on and below the diagonal.
    kk: Vec<f32>,
    /// M, the same of queries with keys.
    mixed: Vec<f32>,
    /// `K * e^G`.
    k_start: Vec<f32>,
    /// `Q * e^G`.
    q_start: Vec<f32>,
    /// `(K * e^G) S`.
    ks: Vec<f32>,
    /// `(Q * e^G) S`.
    qs: Vec<f32>,
    /// The matrix U of a chunk.
    u: Vec<f32>,
}

/// Where the gradients of a chunk go; all zero before.
struct ChunkGradients<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    g: &'a mut [f32],
    beta: &'a mut [f32],
}

impl<D: ChunkDecay> Chunk<'_, D> {
    fn len(&self) -> usize {
        self.beta.len()
    }

    fn middle(&self, state: &[f32]) -> Middle {
        let (n, dk, dv) = (self.len(), self.dk, self.dv);
        let (kk, mixed) = (self.decay.products(self.k, self.k), self.decay.products(self.q, self.k));
        let (k_start, q_start) = (self.decay.since_start(self.k), self.decay.since_start(self.q));
        let (mut ks, mut qs) = (vec![0.0; n * dv], vec![0.0; n * dv]);
        add_product(&k_start, state, dk, &mut ks, dv);
        add_product(&q_start, state, dk, &mut qs, dv);
        let mut u = vec![0.0; n * dv];
        for i in 0..n {
            let (before, rest) = u.split_at_mut(i * dv);
            let (row, beta) = (&mut rest[..dv], self.beta[i]);
            for ((u, v), ks) in row.iter_mut().zip(&self.v[i * dv..]).zip(&ks[i * dv..]) {
                *u = beta * (v - ks);
            }
            let factors: Vec<f32> = kk[i * n..i * n + i].iter().map(|kk| beta * kk).collect();
            subtract_rows(&factors, before, row);
        }
        Middle { kk, mixed, k_start, q_start, ks, qs, u }
    }

    /// Output of the chunk, and the state after it in place of the one before it.
    fn forward(&self, state: &mut [f32], out: &mut [f32]) {
        let Middle { mixed, qs, u, .. } = self.middle(state);
        out.copy_from_slice(&qs);
        add_product(&mixed, &u, self.len(), out, self.dv);
        self.advance(state, &u);
    }

    /// The state after the chunk in place of the one before it.
    fn advance(&self, state: &mut [f32], u: &[f32]) {
        self.decay.fade(state, self.dv);
        add_transposed_product(&self.decay.to_the_end(self.k), u, self.dk, state, self.dv);
    }

    /// Gradients of the chunk from that of its output and, in `d_state`, that of the state after it, which becomes that
    /// of the state before. Those of the logarithms are of the tokens.
    fn backward(&self, state: &[f32], d_out: &[f32], d_state: &mut [f32], all: &mut ChunkGradients<'_>) {
        let (n, dk, dv) = (self.len(), self.dk, self.dv);
        let Middle { kk, mixed, k_start, q_start, ks, u, .. } = self.middle(state);

        // The state after the chunk.
        let k_end = self.decay.to_the_end(self.k);
        let (mut du, mut d_k_end) = (vec![0.0; n * dv], vec![0.0; n * dk]);
        add_product(&k_end, d_state, dk, &mut du, dv);
        product_nt(&u, d_state, dv, &mut d_k_end);
        add_scaled(&self.decay.to_the_end(&d_k_end), 1.0, all.k);
        self.decay.add_products(&d_k_end, &k_end, -1.0, all.g);
        self.decay.fade(d_state, dv);
        let mut last: Vec<f32> =
            (0..dk).map(|c| math::dot(&state[c * dv..(c + 1) * dv], &d_state[c * dv..][..dv])).collect();
        for (d, k) in d_k_end.chunks_exact(dk).zip(k_end.chunks_exact(dk)) {
            last.iter_mut().zip(d).zip(k).for_each(|((last, d), k)| *last += d * k);
        }
        self.decay.add_to_last(&last, all.g);

        // The output: M U and the state before.
        add_transposed_product(&mixed, d_out, n, &mut du, dv);
        let mut d_mixed = vec![0.0; n * n];
        product_nt(d_out, &u, dv, &mut d_mixed);
        d_mixed.chunks_exact_mut(n).enumerate().for_each(|(i, row)| row[i + 1..].fill(0.0));
        self.decay.products_backward(self.q, self.k, &mixed, &d_mixed, [&mut *all.q, &mut *all.k, &mut *all.g]);
        self.start_backward(state, d_out, &q_start, all.q, all.g);

        // The triangular system, from its last row up: du becomes the gradient of its right side.
        for i in (0..n).rev() {
            let solved = du[i * dv..(i + 1) * dv].to_vec();
            for j in 0..i {
                add_scaled(&solved, -self.beta[i] * kk[i * n + j], &mut du[j * dv..(j + 1) * dv]);
            }
        }
        let (mut d_kk, mut d_ks) = (vec![0.0; n * n], vec![0.0; n * dv]);
        for i in 0..n {
            let (beta, rows) = (self.beta[i], i * dv..(i + 1) * dv);
            let dr = &du[rows.clone()];
            for j in 0..i {
                let d = -math::dot(dr, &u[j * dv..(j + 1) * dv]);
                all.beta[i] += d * kk[i * n + j];
                d_kk[i * n + j] = d * beta;
            }
            let written = self.v[rows.clone()].iter().zip(&ks[rows.clone()]).map(|(v, ks)| v - ks);
            all.beta[i] += dr.iter().zip(written).map(|(dr, written)| dr * written).sum::<f32>();
            add_scaled(dr, beta, &mut all.v[rows.clone()]);
            add_scaled(dr, -beta, &mut d_ks[rows]);
        }
        let mut own = vec![0.0; n * dk];
        self.decay.products_backward(self.k, self.k, &kk, &d_kk, [&mut own, &mut *all.k, &mut *all.g]);
        add_scaled(&own, 1.0, all.k);
        self.start_backward(state, &d_ks, &k_start, all.k, all.g);

        // The state before.
        add_transposed_product(&q_start, d_out, dk, d_state, dv);
        add_transposed_product(&k_start, &d_ks, dk, d_state, dv);
        of_each_token(all.g, D::width(dk));
    }

    /// Adds gradients through `start = x * e^G` from that of `start S`.
    fn start_backward(&self, state: &[f32], d: &[f32], start: &[f32], d_x: &mut [f32], d_sums: &mut [f32]) {
        let mut d_start = vec![0.0; start.len()];
        product_nt(d, state, self.dv, &mut d_start);
        self.decay.add_products(&d_start, start, 1.0, d_sums);
        add_scaled(&self.decay.since_start(&d_start), 1.0, d_x);
    }
}

/// Output `[T, value_heads * D_v]` of independent sequences, disjoint row ranges that begin with the states in
/// `states`, one `[value_heads, D_k, D_v]` per sequence; those hold the states after the sequences then.
pub fn delta_rule(
    input: &DeltaInput<'_>,
    sequences: &[Range<usize>],
    shape: &DeltaShape,
    states: &mut [Vec<f32>],
) -> Vec<f32> {
    match shape.decay {
        DecayPer::Head => forward::<HeadDecay>(input, sequences, shape, states),
        DecayPer::Channel => forward::<ChannelDecay>(input, sequences, shape, states),
    }
}

fn forward<D: ChunkDecay>(
    input: &DeltaInput<'_>,
    sequences: &[Range<usize>],
    shape: &DeltaShape,
    states: &mut [Vec<f32>],
) -> Vec<f32> {
    let sizes = [shape.value_heads, shape.value_dim];
    run_heads(sequences, sizes, states, vec![0.0; input.v.len()], |rows, head, state| {
        let data = Head::new::<D>(input, rows, head, shape);
        let mut out = vec![0.0; data.v.len()];
        for rows in chunks(data.beta.len()) {
            data.chunk::<D>(&rows).forward(state, &mut out[rows.start * data.dv..rows.end * data.dv]);
        }
        out
    })
}

/// Gradients of [`delta_rule`] from zero states, given the gradient `d_out` of its output.
pub fn delta_rule_backward(
    input: &DeltaInput<'_>,
    sequences: &[Range<usize>],
    shape: &DeltaShape,
    d_out: &[f32],
) -> DeltaGradients {
    match shape.decay {
        DecayPer::Head => backward::<HeadDecay>(input, sequences, shape, d_out),
        DecayPer::Channel => backward::<ChannelDecay>(input, sequences, shape, d_out),
    }
}

fn backward<D: ChunkDecay>(
    input: &DeltaInput<'_>,
    sequences: &[Range<usize>],
    shape: &DeltaShape,
    d_out: &[f32],
) -> DeltaGradients {
    let mut all = DeltaGradients {
        q: vec![0.0; input.q.len()],
        k: vec![0.0; input.k.len()],
        v: vec![0.0; input.v.len()],
        g: vec![0.0; input.g.len()],
        beta: vec![0.0; input.beta.len()],
    };
    let run = |rows: &Range<usize>, head: usize| {
        let d_out = gather(d_out, rows, shape.value_heads, head, shape.value_dim);
        head_backward::<D>(&Head::new::<D>(input, rows, head, shape), &d_out)
    };
    each_head(sequences, shape.value_heads, run, |rows, head, found| {
        let key_head = head / (shape.value_heads / shape.key_heads);
        scatter(&found.q, rows, shape.key_heads, key_head, shape.key_dim, &mut all.q);
        scatter(&found.k, rows, shape.key_heads, key_head, shape.key_dim, &mut all.k);
        scatter(&found.v, rows, shape.value_heads, head, shape.value_dim, &mut all.v);
        scatter(&found.g, rows, shape.value_heads, head, D::width(shape.key_dim), &mut all.g);
        scatter(&found.beta, rows, shape.value_heads, head, 1, &mut all.beta);
    });
    all
}

fn head_backward<D: ChunkDecay>(head: &Head, d_out: &[f32]) -> DeltaGradients {
    let (dk, dv, tokens, width) = (head.dk, head.dv, head.beta.len(), D::width(head.dk));
    let mut state = vec![0.0; dk * dv];
    let mut states = Vec::new();
    for rows in chunks(tokens) {
        states.push(state.clone());
        let chunk = head.chunk::<D>(&rows);
        let u = chunk.middle(&state).u;
        chunk.advance(&mut state, &u);
    }
    let mut all = DeltaGradients {
        q: vec![0.0; tokens * dk],
        k: vec![0.0; tokens * dk],
        v: vec![0.0; tokens * dv],
        g: vec![0.0; tokens * width],
        beta: vec![0.0; tokens],
    };
    let mut d_state = vec![0.0; dk * dv];
    for (rows, state) in chunks(tokens).rev().zip(states.into_iter().rev()) {
        let of = |width: usize| rows.start * width..rows.end * width;
        let mut gradients = ChunkGradients {
            q: &mut all.q[of(dk)],
            k: &mut all.k[of(dk)],
            v: &mut all.v[of(dv)],
            g: &mut all.g[of(width)],
            beta: &mut all.beta[rows.clone()],
        };
        head.chunk::<D>(&rows).backward(&state, &d_out[of(dv)], &mut d_state, &mut gradients);
    }
    all
}

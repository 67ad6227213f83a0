//! The delta rule with a decay per channel, Kimi delta attention (arXiv 2510.26692, section 3), forward and backward,
//! in chunks of tokens.
//!
//! Per head, with keys and queries of width `D_k`, values of width `D_v` and a state `S [D_k, D_v]`:
//! `S_t = diag(e^{g_t}) S_{t-1} + k_t u_t^T` with `u_t = beta_t (v_t - (diag(e^{g_t}) S_{t-1})^T k_t)`, and
//! `o_t = S_t^T q_t`. `g_t` is a vector of width `D_k`.
//!
//! Within a chunk that begins with the state `S`, with `G` the sums of `g` from its beginning and `*` by channel, the
//! `u` solve `(I + L) U = diag(beta) (V - (K * e^G) S)` with `L_ij = beta_i k_i . (e^{G_i - G_j} * k_j)` for `j < i`.
//! Then `O = (Q * e^G) S + M U` with `M_ij = q_i . (e^{G_i - G_j} * k_j)` for `j <= i`, and the state after the chunk
//! is `diag(e^{G_last}) S + (K * e^{G_last - G})^T U`.
//!
//! `e^{G_i - G_j}` is no product of something of i and something of j that would not overflow. Between blocks of
//! `BLOCK` tokens it is one of two numbers of at most 1, with the sum at the later block's beginning in the middle;
//! within a block it is computed as it stands.

use std::ops::Range;

use super::{
    math,
    recurrence::{chunks, each_head, gather, of_each_token, run_heads, scatter},
    small_products::{add_product, add_scaled, add_transposed_product, product_nt, subtract_rows},
};

/// Tokens between which decays are computed one by one.
const BLOCK: usize = 16;

/// Heads of the rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelDeltaShape {
    /// Number of heads.
    pub heads: usize,
    /// Width of a query or key head, D_k.
    pub key_dim: usize,
    /// Width of a value head, D_v.
    pub value_dim: usize,
}

impl ChannelDeltaShape {
    /// Elements of the states of all heads.
    pub fn state_len(&self) -> usize {
        self.heads * self.key_dim * self.value_dim
    }
}

/// What the rule is given, row-major, for T tokens.
#[derive(Clone, Copy, Debug)]
pub struct ChannelDeltaInput<'a> {
    /// Queries `[T, heads * D_k]`, with their norm and scale.
    pub q: &'a [f32],
    /// Keys `[T, heads * D_k]`, with their norm.
    pub k: &'a [f32],
    /// Values `[T, heads * D_v]`.
    pub v: &'a [f32],
    /// Logarithms of the decay `[T, heads * D_k]`, at most 0.
    pub g: &'a [f32],
    /// How much of a value is written `[T, heads]`.
    pub beta: &'a [f32],
}

/// Gradients of [`ChannelDeltaInput`], in the same shapes.
#[derive(Clone, Debug, Default)]
pub struct ChannelDeltaGradients {
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

impl ChannelDeltaGradients {
    fn zeros(tokens: usize, heads: usize, shape: &ChannelDeltaShape) -> Self {
        let zeros = |width: usize| vec![0.0; tokens * heads * width];
        let (keys, values) = (shape.key_dim, shape.value_dim);
        Self { q: zeros(keys), k: zeros(keys), v: zeros(values), g: zeros(keys), beta: zeros(1) }
    }
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
    fn new(input: &ChannelDeltaInput<'_>, rows: &Range<usize>, head: usize, shape: &ChannelDeltaShape) -> Self {
        let of = |x: &[f32], width| gather(x, rows, shape.heads, head, width);
        Self {
            q: of(input.q, shape.key_dim),
            k: of(input.k, shape.key_dim),
            v: of(input.v, shape.value_dim),
            g: of(input.g, shape.key_dim),
            beta: of(input.beta, 1),
            dk: shape.key_dim,
            dv: shape.value_dim,
        }
    }

    fn chunk(&self, rows: &Range<usize>) -> Chunk<'_> {
        let keys = rows.start * self.dk..rows.end * self.dk;
        let mut sums = self.g[keys.clone()].to_vec();
        for start in (self.dk..sums.len()).step_by(self.dk) {
            let (before, row) = sums.split_at_mut(start);
            add_scaled(&before[start - self.dk..], 1.0, &mut row[..self.dk]);
        }
        Chunk {
            q: &self.q[keys.clone()],
            k: &self.k[keys],
            v: &self.v[rows.start * self.dv..rows.end * self.dv],
            beta: &self.beta[rows.clone()],
            sums,
            dk: self.dk,
            dv: self.dv,
        }
    }
}

/// Tokens of one head that are computed together.
struct Chunk<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    beta: &'a [f32],
    /// Sums of the logarithms of the decay from the first token on, G `[n, D_k]`.
    sums: Vec<f32>,
    dk: usize,
    dv: usize,
}

/// What a chunk computes on the way to its output.
struct Middle {
    /// `k_i . (e^{G_i - G_j} * k_j)`, on and below the diagonal.
    kk: Vec<f32>,
    /// The same of queries with keys.
    mixed: Vec<f32>,
    /// `K * e^G`.
    k_start: Vec<f32>,
    /// `Q * e^G`.
    q_start: Vec<f32>,
    /// `(K * e^G) S`.
    ks: Vec<f32>,
    /// `(Q * e^G) S`.
    qs: Vec<f32>,
    /// The matrix U.
    u: Vec<f32>,
}

/// `a e^b` element by element.
fn times_exp(a: &[f32], b: impl Iterator<Item = f32>) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a * math::exp(b)).collect()
}

/// `out += a * b` element by element.
fn add_products(a: &[f32], b: &[f32], sign: f32, out: &mut [f32]) {
    out.iter_mut().zip(a).zip(b).for_each(|((out, a), b)| *out += sign * a * b);
}

impl Chunk<'_> {
    fn len(&self) -> usize {
        self.beta.len()
    }

    fn row(&self, i: usize) -> Range<usize> {
        i * self.dk..(i + 1) * self.dk
    }

    /// Rows times `e^G`.
    fn decayed_since_start(&self, x: &[f32]) -> Vec<f32> {
        times_exp(x, self.sums.iter().copied())
    }

    /// Keys times `e^{G_last - G}`.
    fn keys_to_the_end(&self) -> Vec<f32> {
        let last = self.sums[self.row(self.len() - 1)].iter().cycle();
        times_exp(self.k, last.zip(&self.sums).map(|(last, sum)| last - sum))
    }

    /// Rows `block` of `a` times `e^{G - G_start}`, and the keys before the block times `e^{G_start - G}`, `G_start`
    /// the sum at the block's first token.
    fn around(&self, a: &[f32], block: &Range<usize>) -> [Vec<f32>; 2] {
        let (first, own) = (block.start * self.dk, block.start * self.dk..block.end * self.dk);
        let start = &self.sums[self.row(block.start)];
        let left =
            times_exp(&a[own.clone()], self.sums[own].iter().zip(start.iter().cycle()).map(|(sum, start)| sum - start));
        let right = times_exp(
            &self.k[..first],
            self.sums[..first].iter().zip(start.iter().cycle()).map(|(sum, start)| start - sum),
        );
        [left, right]
    }

    /// `a_i . (e^{G_i - G_j} * k_j)` for `j <= i`, and 0 above the diagonal.
    fn products(&self, a: &[f32]) -> Vec<f32> {
        let n = self.len();
        let mut out = vec![0.0; n * n];
        for start in (0..n).step_by(BLOCK) {
            let block = start..(start + BLOCK).min(n);
            if start > 0 {
                let [left, right] = self.around(a, &block);
                let mut products = vec![0.0; block.len() * start];
                product_nt(&left, &right, self.dk, &mut products);
                for (i, row) in block.clone().zip(products.chunks_exact(start)) {
                    out[i * n..i * n + start].copy_from_slice(row);
                }
            }
            for i in block {
                for j in start..=i {
                    let ([a, k], [to, from]) = ([&a[self.row(i)], &self.k[self.row(j)]], [i, j].map(|i| self.row(i)));
                    let fades = self.sums[to].iter().zip(&self.sums[from]);
                    out[i * n + j] =
                        a.iter().zip(k).zip(fades).map(|((a, k), (to, from))| a * k * math::exp(to - from)).sum();
                }
            }
        }
        out
    }

    /// Adds gradients at `a`, at the keys and at the sums to `d_a`, `d_k` and `d_sums`, from those at
    /// [`products`](Self::products), 0 above the diagonal.
    fn products_backward(&self, a: &[f32], d: &[f32], d_a: &mut [f32], d_k: &mut [f32], d_sums: &mut [f32]) {
        let (n, dk) = (self.len(), self.dk);
        let (mut own_a, mut own_k) = (vec![0.0; n * dk], vec![0.0; n * dk]);
        for start in (0..n).step_by(BLOCK) {
            let block = start..(start + BLOCK).min(n);
            if start > 0 {
                let [left, right] = self.around(a, &block);
                let d_block: Vec<f32> = block.clone().flat_map(|i| d[i * n..i * n + start].iter().copied()).collect();
                let (mut d_left, mut d_right) = (vec![0.0; left.len()], vec![0.0; right.len()]);
                add_product(&d_block, &right, start, &mut d_left, dk);
                add_transposed_product(&d_block, &left, start, &mut d_right, dk);
                let begin = &self.sums[self.row(start)];
                let own = start * dk..block.end * dk;
                let faded = self.sums[own.clone()].iter().zip(begin.iter().cycle()).map(|(sum, begin)| sum - begin);
                add_scaled(&times_exp(&d_left, faded), 1.0, &mut own_a[own]);
                let faded = self.sums[..start * dk].iter().zip(begin.iter().cycle()).map(|(sum, begin)| begin - sum);
                add_scaled(&times_exp(&d_right, faded), 1.0, &mut own_k[..start * dk]);
            }
            for i in block {
                for j in start..=i {
                    let d = d[i * n + j];
                    if d == 0.0 {
                        continue;
                    }
                    for (at, from) in self.row(i).zip(self.row(j)) {
                        let faded = d * math::exp(self.sums[at] - self.sums[from]);
                        own_a[at] += faded * self.k[from];
                        own_k[from] += faded * a[at];
                    }
                }
            }
        }
        add_products(a, &own_a, 1.0, d_sums);
        add_products(self.k, &own_k, -1.0, d_sums);
        add_scaled(&own_a, 1.0, d_a);
        add_scaled(&own_k, 1.0, d_k);
    }

    fn middle(&self, state: &[f32]) -> Middle {
        let (n, dk, dv) = (self.len(), self.dk, self.dv);
        let (kk, mixed) = (self.products(self.k), self.products(self.q));
        let (k_start, q_start) = (self.decayed_since_start(self.k), self.decayed_since_start(self.q));
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
        self.fade(state);
        add_transposed_product(&self.keys_to_the_end(), u, self.dk, state, self.dv);
    }

    /// Rows of a state times `e^{G_last}`.
    fn fade(&self, state: &mut [f32]) {
        let last = &self.sums[self.row(self.len() - 1)];
        for (row, sum) in state.chunks_exact_mut(self.dv).zip(last) {
            let fade = math::exp(*sum);
            row.iter_mut().for_each(|s| *s *= fade);
        }
    }

    /// Gradients of the chunk from that of its output and, in `d_state`, that of the state after it, which becomes that
    /// of the state before. Those of the logarithms are of the tokens.
    fn backward(&self, state: &[f32], d_out: &[f32], d_state: &mut [f32]) -> ChannelDeltaGradients {
        let (n, dk, dv) = (self.len(), self.dk, self.dv);
        let shape = ChannelDeltaShape { heads: 1, key_dim: dk, value_dim: dv };
        let mut all = ChannelDeltaGradients::zeros(n, 1, &shape);
        let Middle { kk, mixed, k_start, q_start, ks, u, .. } = self.middle(state);
        let last = self.row(n - 1);

        // The state after the chunk.
        let k_end = self.keys_to_the_end();
        let (mut du, mut d_k_end) = (vec![0.0; n * dv], vec![0.0; n * dk]);
        add_product(&k_end, d_state, dk, &mut du, dv);
        product_nt(&u, d_state, dv, &mut d_k_end);
        let ends = self.sums[last.clone()].iter().cycle().zip(&self.sums).map(|(last, sum)| last - sum);
        add_scaled(&times_exp(&d_k_end, ends), 1.0, &mut all.k);
        add_products(&d_k_end, &k_end, -1.0, &mut all.g);
        let (d_last, fades) = (last.clone(), &self.sums[last]);
        for (c, (at, sum)) in d_last.zip(fades).enumerate() {
            let row = c * dv..(c + 1) * dv;
            let moved: f32 = (0..n).map(|j| d_k_end[j * dk + c] * k_end[j * dk + c]).sum();
            all.g[at] += moved + math::exp(*sum) * math::dot(&state[row.clone()], &d_state[row]);
        }

        // The output: M U and the state before.
        add_transposed_product(&mixed, d_out, n, &mut du, dv);
        let mut d_mixed = vec![0.0; n * n];
        product_nt(d_out, &u, dv, &mut d_mixed);
        d_mixed.chunks_exact_mut(n).enumerate().for_each(|(i, row)| row[i + 1..].fill(0.0));
        self.products_backward(self.q, &d_mixed, &mut all.q, &mut all.k, &mut all.g);
        self.start_backward(state, d_out, &q_start, &mut all.q, &mut all.g);

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
        self.products_backward(self.k, &d_kk, &mut own, &mut all.k, &mut all.g);
        add_scaled(&own, 1.0, &mut all.k);
        self.start_backward(state, &d_ks, &k_start, &mut all.k, &mut all.g);

        // The state before.
        self.fade(d_state);
        add_transposed_product(&q_start, d_out, dk, d_state, dv);
        add_transposed_product(&k_start, &d_ks, dk, d_state, dv);
        of_each_token(&mut all.g, dk);
        all
    }

    /// Adds gradients through `start = x * e^G` from that of `start S`.
    fn start_backward(&self, state: &[f32], d: &[f32], start: &[f32], d_x: &mut [f32], d_sums: &mut [f32]) {
        let mut d_start = vec![0.0; start.len()];
        product_nt(d, state, self.dv, &mut d_start);
        add_products(&d_start, start, 1.0, d_sums);
        add_scaled(&self.decayed_since_start(&d_start), 1.0, d_x);
    }
}

/// Output `[T, heads * D_v]` of independent sequences, disjoint row ranges that begin with the states in `states`, one
/// `[heads, D_k, D_v]` per sequence; those hold the states after the sequences then.
pub fn channel_delta_rule(
    input: &ChannelDeltaInput<'_>,
    sequences: &[Range<usize>],
    shape: &ChannelDeltaShape,
    states: &mut [Vec<f32>],
) -> Vec<f32> {
    let sizes = [shape.heads, shape.value_dim];
    run_heads(sequences, sizes, states, vec![0.0; input.v.len()], |rows, head, state| {
        let data = Head::new(input, rows, head, shape);
        let mut out = vec![0.0; data.v.len()];
        for rows in chunks(data.beta.len()) {
            data.chunk(&rows).forward(state, &mut out[rows.start * data.dv..rows.end * data.dv]);
        }
        out
    })
}

/// Gradients of [`channel_delta_rule`] from zero states, given the gradient `d_out` of its output.
pub fn channel_delta_rule_backward(
    input: &ChannelDeltaInput<'_>,
    sequences: &[Range<usize>],
    shape: &ChannelDeltaShape,
    d_out: &[f32],
) -> ChannelDeltaGradients {
    let (heads, keys, values) = (shape.heads, shape.key_dim, shape.value_dim);
    let mut all = ChannelDeltaGradients::zeros(input.beta.len() / heads.max(1), heads, shape);
    let run = |rows: &Range<usize>, head: usize| {
        let d_out = gather(d_out, rows, heads, head, values);
        head_backward(&Head::new(input, rows, head, shape), &d_out)
    };
    each_head(sequences, heads, run, |rows, head, found| {
        scatter(&found.q, rows, heads, head, keys, &mut all.q);
        scatter(&found.k, rows, heads, head, keys, &mut all.k);
        scatter(&found.v, rows, heads, head, values, &mut all.v);
        scatter(&found.g, rows, heads, head, keys, &mut all.g);
        scatter(&found.beta, rows, heads, head, 1, &mut all.beta);
    });
    all
}

fn head_backward(head: &Head, d_out: &[f32]) -> ChannelDeltaGradients {
    let (dk, dv, tokens) = (head.dk, head.dv, head.beta.len());
    let mut state = vec![0.0; dk * dv];
    let mut states = Vec::new();
    for rows in chunks(tokens) {
        states.push(state.clone());
        let chunk = head.chunk(&rows);
        let u = chunk.middle(&state).u;
        chunk.advance(&mut state, &u);
    }
    let mut all = ChannelDeltaGradients::zeros(tokens, 1, &ChannelDeltaShape { heads: 1, key_dim: dk, value_dim: dv });
    let mut d_state = vec![0.0; dk * dv];
    for (rows, state) in chunks(tokens).rev().zip(states.into_iter().rev()) {
        let (keys, values) = (rows.start * dk..rows.end * dk, rows.start * dv..rows.end * dv);
        let found = head.chunk(&rows).backward(&state, &d_out[values.clone()], &mut d_state);
        all.q[keys.clone()].copy_from_slice(&found.q);
        all.k[keys.clone()].copy_from_slice(&found.k);
        all.v[values].copy_from_slice(&found.v);
        all.g[keys].copy_from_slice(&found.g);
        all.beta[rows].copy_from_slice(&found.beta);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::recurrence::{
        CHUNK,
        testing::{check_gradients, values},
    };
    use super::*;

    const SHAPE: ChannelDeltaShape = ChannelDeltaShape { heads: 2, key_dim: 3, value_dim: 5 };

    /// Queries, keys, values, decays and betas of so many tokens; decays up to 3 per token, so that products of those
    /// of a chunk are far below what a number can hold the inverse of.
    fn case(tokens: usize) -> [Vec<f32>; 5] {
        let decays = values(tokens * 6, 4).into_iter().map(|x| -1.5 * (x + 1.0)).collect();
        let betas = values(tokens * 2, 5).into_iter().map(|x| 0.5 + 0.4 * x).collect();
        let keys = values(tokens * 6, 2).into_iter().map(|x| 0.6 * x).collect();
        [values(tokens * 6, 1), keys, values(tokens * 10, 3), decays, betas]
    }

    fn input([q, k, v, g, beta]: &[Vec<f32>; 5]) -> ChannelDeltaInput<'_> {
        ChannelDeltaInput { q, k, v, g, beta }
    }

    /// The recurrence as it is written, token by token.
    fn recurrence([q, k, v, g, beta]: &[Vec<f32>; 5], sequences: &[Range<usize>]) -> Vec<f32> {
        let (dk, dv) = (SHAPE.key_dim, SHAPE.value_dim);
        let mut out = vec![0.0; v.len()];
        for rows in sequences {
            for head in 0..SHAPE.heads {
                let mut state = vec![0.0f64; dk * dv];
                for t in rows.clone() {
                    let at = t * SHAPE.heads + head;
                    let key = |x: &[f32], i: usize| f64::from(x[at * dk + i]);
                    (0..dk).for_each(|i| (0..dv).for_each(|j| state[i * dv + j] *= key(g, i).exp()));
                    for j in 0..dv {
                        let known: f64 = (0..dk).map(|i| state[i * dv + j] * key(k, i)).sum();
                        let u = f64::from(beta[at]) * (f64::from(v[at * dv + j]) - known);
                        (0..dk).for_each(|i| state[i * dv + j] += key(k, i) * u);
                        out[at * dv + j] = (0..dk).map(|i| state[i * dv + j] * key(q, i)).sum::<f64>() as f32;
                    }
                }
            }
        }
        out
    }

    #[test]
    fn chunks_compute_the_recurrence_sequences_are_apart_and_a_text_may_be_fed_in_pieces() {
        let tokens = 2 * CHUNK + 9;
        let case = case(tokens);
        let sequences = [0..3, 3..CHUNK + 3, CHUNK + 3..tokens];
        for sequences in [&sequences[..], std::slice::from_ref(&(0..tokens))] {
            let mut states = vec![vec![0.0; SHAPE.state_len()]; sequences.len()];
            let found = channel_delta_rule(&input(&case), sequences, &SHAPE, &mut states);
            for (found, expected) in found.iter().zip(&recurrence(&case, sequences)) {
                assert!((found - expected).abs() < 1e-5, "{found} and {expected}");
            }
        }
        let whole = recurrence(&case, std::slice::from_ref(&(0..tokens)));
        let (mut states, mut start) = (vec![vec![0.0; SHAPE.state_len()]], 0);
        for end in [7, 8, 9, CHUNK + 1, tokens] {
            let all = channel_delta_rule(&input(&case), std::slice::from_ref(&(start..end)), &SHAPE, &mut states);
            for (found, expected) in all[start * 10..end * 10].iter().zip(&whole[start * 10..]) {
                assert!((found - expected).abs() < 1e-5, "{found} and {expected}");
            }
            start = end;
        }
    }

    #[test]
    fn gradients_are_those_of_difference_quotients() {
        let tokens = CHUNK + 6;
        let mut case = case(tokens);
        case[3].iter_mut().for_each(|g| *g *= 0.2);
        let sequences = [0..5, 5..tokens];
        let d_out = values(tokens * 10, 9);
        let found = channel_delta_rule_backward(&input(&case), &sequences, &SHAPE, &d_out);
        let parts = [&found.q[..], &found.k, &found.v, &found.g, &found.beta];
        check_gradients(&case, parts, &d_out, |case| recurrence(case, &sequences));
    }
}

//! The gated delta rule (arXiv 2412.06464), forward and backward, in chunks of tokens.
//!
//! Per head, with keys and queries of width `D_k`, values of width `D_v` and a state `S [D_k, D_v]`:
//! `S_t = e^{g_t} S_{t-1} + k_t u_t^T` with `u_t = beta_t (v_t - e^{g_t} S_{t-1}^T k_t)`, and `o_t = S_t^T q_t`.
//!
//! Within a chunk that begins with the state `S`, with `G` the sums of `g` from its beginning, the `u` solve the
//! triangular system `(I + L) U = diag(beta) (V - diag(e^G) K S)`, `L_ij = beta_i e^{G_i - G_j} k_i . k_j` for `j < i`.
//! Then `O = diag(e^G) Q S + M U` with `M_ij = e^{G_i - G_j} q_i . k_j` for `j <= i`, and the state after the chunk is
//! `e^{G_last} S + K^T diag(e^{G_last - G}) U`. No exponent is positive. Memory grows with the tokens, not with their
//! square: the backward pass keeps the state at the beginning of every chunk of one head and computes the rest again.
//!
//! A recurrence over tokens has no form in tensor operations that would pay; on other devices than the CPU it runs on
//! the host as well.

use std::ops::Range;

use super::{
    math,
    recurrence::{Decays, chunks, each_head, gather, of_each_token, run_heads, scatter},
    small_products::{add_product, add_scaled, add_transposed_product, product_nt, subtract_rows},
};

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
}

impl DeltaShape {
    /// Elements of the states of all heads.
    pub fn state_len(&self) -> usize {
        self.value_heads * self.key_dim * self.value_dim
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
    /// Logarithms of the decay `[T, value_heads]`, at most 0.
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
    fn new(input: &DeltaInput<'_>, rows: &Range<usize>, head: usize, shape: &DeltaShape) -> Self {
        let key_head = head / (shape.value_heads / shape.key_heads);
        Self {
            q: gather(input.q, rows, shape.key_heads, key_head, shape.key_dim),
            k: gather(input.k, rows, shape.key_heads, key_head, shape.key_dim),
            v: gather(input.v, rows, shape.value_heads, head, shape.value_dim),
            g: gather(input.g, rows, shape.value_heads, head, 1),
            beta: gather(input.beta, rows, shape.value_heads, head, 1),
            dk: shape.key_dim,
            dv: shape.value_dim,
        }
    }

    fn chunk(&self, rows: &Range<usize>) -> Chunk<'_> {
        let keys = rows.start * self.dk..rows.end * self.dk;
        Chunk {
            q: &self.q[keys.clone()],
            k: &self.k[keys],
            v: &self.v[rows.start * self.dv..rows.end * self.dv],
            decays: Decays::new(self.g[rows.clone()].iter().copied()),
            beta: &self.beta[rows.clone()],
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
    decays: Decays,
    beta: &'a [f32],
    dk: usize,
    dv: usize,
}

/// What a chunk computes on the way to its output.
struct Middle {
    /// `k_i . k_j`.
    kk: Vec<f32>,
    /// L, below the diagonal.
    lower: Vec<f32>,
    /// M, on and below the diagonal.
    mixed: Vec<f32>,
    /// `K S`.
    ks: Vec<f32>,
    /// `Q S`.
    qs: Vec<f32>,
    /// The matrix U of a chunk.
    u: Vec<f32>,
}

impl Chunk<'_> {
    fn len(&self) -> usize {
        self.beta.len()
    }

    fn middle(&self, state: &[f32]) -> Middle {
        let (n, dk, dv) = (self.len(), self.dk, self.dv);
        let (mut kk, mut lower) = (vec![0.0; n * n], vec![0.0; n * n]);
        product_nt(self.k, self.k, dk, &mut kk);
        let mixed = self.decays.products(self.q, self.k, dk);
        for i in 0..n {
            for j in 0..i {
                lower[i * n + j] = self.beta[i] * self.decays.between(i, j) * kk[i * n + j];
            }
        }
        let (mut ks, mut qs) = (vec![0.0; n * dv], vec![0.0; n * dv]);
        add_product(self.k, state, dk, &mut ks, dv);
        add_product(self.q, state, dk, &mut qs, dv);
        let mut u = vec![0.0; n * dv];
        for i in 0..n {
            let (before, rest) = u.split_at_mut(i * dv);
            let row = &mut rest[..dv];
            let (beta, fade) = (self.beta[i], self.decays.since_start(i));
            for ((u, v), ks) in row.iter_mut().zip(&self.v[i * dv..]).zip(&ks[i * dv..]) {
                *u = beta * (v - fade * ks);
            }
            subtract_rows(&lower[i * n..i * n + i], before, row);
        }
        Middle { kk, lower, mixed, ks, qs, u }
    }

    /// Output of the chunk, and the state after it in place of the one before it.
    fn forward(&self, state: &mut [f32], out: &mut [f32]) {
        let (n, dv) = (self.len(), self.dv);
        let Middle { mixed, qs, u, .. } = self.middle(state);
        for i in 0..n {
            let fade = self.decays.since_start(i);
            out[i * dv..(i + 1) * dv].iter_mut().zip(&qs[i * dv..]).for_each(|(out, qs)| *out = fade * qs);
        }
        add_product(&mixed, &u, n, out, dv);
        self.advance(state, &u);
    }

    /// The state after the chunk in place of the one before it.
    fn advance(&self, state: &mut [f32], u: &[f32]) {
        let last = self.len() - 1;
        let fade = self.decays.since_start(last);
        state.iter_mut().for_each(|s| *s *= fade);
        add_transposed_product(self.k, &self.decays.to_the_end(u, self.dv), self.dk, state, self.dv);
    }

    /// Gradients of the chunk from that of its output and, in `d_state`, that of the state after it, which becomes that
    /// of the state before.
    fn backward(&self, state: &[f32], d_out: &[f32], d_state: &mut [f32], gradients: &mut ChunkGradients<'_>) {
        let (n, dk, dv) = (self.len(), self.dk, self.dv);
        let last = n - 1;
        let Middle { kk, lower, mixed, ks, qs, u } = self.middle(state);
        let mut d_decay = vec![0.0f32; n];

        // The state after the chunk.
        let mut k_ds = vec![0.0; n * dv];
        add_product(self.k, d_state, dk, &mut k_ds, dv);
        let mut u_ds = vec![0.0; n * dk];
        product_nt(&u, d_state, dv, &mut u_ds);
        let mut du = self.decays.to_the_end(&k_ds, dv);
        for j in 0..n {
            let fade = self.decays.between(last, j);
            let moved = fade * math::dot(&self.k[j * dk..(j + 1) * dk], &u_ds[j * dk..(j + 1) * dk]);
            d_decay[last] += moved;
            d_decay[j] -= moved;
            add_scaled(&u_ds[j * dk..(j + 1) * dk], fade, &mut gradients.k[j * dk..(j + 1) * dk]);
        }
        d_decay[last] += self.decays.since_start(last) * math::dot(state, d_state);

        // The output: M U and the state before.
        add_transposed_product(&mixed, d_out, n, &mut du, dv);
        let mut d_qk = vec![0.0; n * n];
        product_nt(d_out, &u, dv, &mut d_qk);
        let mut d_kk = vec![0.0; n * n];
        let mut scaled_out = d_out.to_vec();
        for i in 0..n {
            for j in 0..n {
                let d = d_qk[i * n + j];
                if j > i {
                    d_qk[i * n + j] = 0.0;
                    continue;
                }
                let moved = d * mixed[i * n + j];
                d_decay[i] += moved;
                d_decay[j] -= moved;
                d_qk[i * n + j] = d * self.decays.between(i, j);
            }
            let fade = self.decays.since_start(i);
            d_decay[i] += fade * math::dot(&d_out[i * dv..(i + 1) * dv], &qs[i * dv..(i + 1) * dv]);
            scaled_out[i * dv..(i + 1) * dv].iter_mut().for_each(|d| *d *= fade);
        }
        let mut through_state = vec![0.0; n * dk];
        product_nt(&scaled_out, state, dv, &mut through_state);
        add_scaled(&through_state, 1.0, gradients.q);
        add_product(&d_qk, self.k, n, gradients.q, dk);
        add_transposed_product(&d_qk, self.q, n, gradients.k, dk);

        // The triangular system, from its last row up: du becomes the gradient of its right side.
        for i in (0..n).rev() {
            let solved = du[i * dv..(i + 1) * dv].to_vec();
            for j in 0..i {
                add_scaled(&solved, -lower[i * n + j], &mut du[j * dv..(j + 1) * dv]);
            }
        }
        let mut scaled_written = vec![0.0; n * dv];
        for i in 0..n {
            let (beta, fade) = (self.beta[i], self.decays.since_start(i));
            let (dr, rows) = (&du[i * dv..(i + 1) * dv], i * dv..(i + 1) * dv);
            for j in 0..i {
                let d = -math::dot(dr, &u[j * dv..(j + 1) * dv]);
                let (moved, faded) = (d * lower[i * n + j], self.decays.between(i, j));
                d_decay[i] += moved;
                d_decay[j] -= moved;
                gradients.beta[i] += d * faded * kk[i * n + j];
                d_kk[i * n + j] = d * beta * faded;
            }
            let mut along = 0.0;
            for (((dr, v), ks), (dv, written)) in dr
                .iter()
                .zip(&self.v[rows.clone()])
                .zip(&ks[rows.clone()])
                .zip(gradients.v[rows.clone()].iter_mut().zip(&mut scaled_written[rows]))
            {
                gradients.beta[i] += dr * (v - fade * ks);
                *dv = beta * dr;
                along += *dv * ks;
                *written = -fade * *dv;
            }
            d_decay[i] -= fade * along;
        }
        through_state.fill(0.0);
        product_nt(&scaled_written, state, dv, &mut through_state);
        add_scaled(&through_state, 1.0, gradients.k);
        add_product(&d_kk, self.k, n, gradients.k, dk);
        add_transposed_product(&d_kk, self.k, n, gradients.k, dk);

        let fade = self.decays.since_start(last);
        d_state.iter_mut().for_each(|d| *d *= fade);
        add_transposed_product(self.q, &scaled_out, dk, d_state, dv);
        add_transposed_product(self.k, &scaled_written, dk, d_state, dv);

        of_each_token(&mut d_decay, 1);
        gradients.g.copy_from_slice(&d_decay);
    }
}

/// Where the gradients of a chunk go; all zero before.
struct ChunkGradients<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    g: &'a mut [f32],
    beta: &'a mut [f32],
}

/// Output `[T, value_heads * D_v]` of independent sequences, disjoint row ranges that begin with the states in
/// `states`, one `[value_heads, D_k, D_v]` per sequence; those hold the states after the sequences then.
pub fn delta_rule(
    input: &DeltaInput<'_>,
    sequences: &[Range<usize>],
    shape: &DeltaShape,
    states: &mut [Vec<f32>],
) -> Vec<f32> {
    let sizes = [shape.value_heads, shape.value_dim];
    run_heads(sequences, sizes, states, vec![0.0; input.v.len()], |rows, head, state| {
        let data = Head::new(input, rows, head, shape);
        let mut out = vec![0.0; data.v.len()];
        for rows in chunks(data.g.len()) {
            data.chunk(&rows).forward(state, &mut out[rows.start * data.dv..rows.end * data.dv]);
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
    let mut all = DeltaGradients {
        q: vec![0.0; input.q.len()],
        k: vec![0.0; input.k.len()],
        v: vec![0.0; input.v.len()],
        g: vec![0.0; input.g.len()],
        beta: vec![0.0; input.beta.len()],
    };
    let run = |rows: &Range<usize>, head: usize| {
        let d_out = gather(d_out, rows, shape.value_heads, head, shape.value_dim);
        head_backward(&Head::new(input, rows, head, shape), &d_out)
    };
    each_head(sequences, shape.value_heads, run, |rows, head, found| {
        let key_head = head / (shape.value_heads / shape.key_heads);
        scatter(&found.q, rows, shape.key_heads, key_head, shape.key_dim, &mut all.q);
        scatter(&found.k, rows, shape.key_heads, key_head, shape.key_dim, &mut all.k);
        scatter(&found.v, rows, shape.value_heads, head, shape.value_dim, &mut all.v);
        scatter(&found.g, rows, shape.value_heads, head, 1, &mut all.g);
        scatter(&found.beta, rows, shape.value_heads, head, 1, &mut all.beta);
    });
    all
}

fn head_backward(head: &Head, d_out: &[f32]) -> DeltaGradients {
    let (dk, dv, tokens) = (head.dk, head.dv, head.g.len());
    let mut states = vec![vec![0.0; dk * dv]];
    for rows in chunks(tokens) {
        let (chunk, mut state) = (head.chunk(&rows), states[states.len() - 1].clone());
        let u = chunk.middle(&state).u;
        chunk.advance(&mut state, &u);
        states.push(state);
    }
    states.pop();
    let mut all = DeltaGradients {
        q: vec![0.0; tokens * dk],
        k: vec![0.0; tokens * dk],
        v: vec![0.0; tokens * dv],
        g: vec![0.0; tokens],
        beta: vec![0.0; tokens],
    };
    let mut d_state = vec![0.0; dk * dv];
    for (rows, state) in chunks(tokens).rev().zip(states.into_iter().rev()) {
        let (keys, values) = (rows.start * dk..rows.end * dk, rows.start * dv..rows.end * dv);
        let mut gradients = ChunkGradients {
            q: &mut all.q[keys.clone()],
            k: &mut all.k[keys],
            v: &mut all.v[values.clone()],
            g: &mut all.g[rows.clone()],
            beta: &mut all.beta[rows.clone()],
        };
        head.chunk(&rows).backward(&state, &d_out[values], &mut d_state, &mut gradients);
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

    const SHAPE: DeltaShape = DeltaShape { key_heads: 2, value_heads: 4, key_dim: 3, value_dim: 5 };

    /// Queries, keys, values, decays and betas of so many tokens.
    fn case(tokens: usize) -> [Vec<f32>; 5] {
        let decays = values(tokens * 4, 4).into_iter().map(|x| -0.2 * (x + 1.0)).collect();
        let betas = values(tokens * 4, 5).into_iter().map(|x| 0.5 + 0.4 * x).collect();
        let keys = values(tokens * 6, 2).into_iter().map(|x| 0.6 * x).collect();
        [values(tokens * 6, 1), keys, values(tokens * 20, 3), decays, betas]
    }

    fn input([q, k, v, g, beta]: &[Vec<f32>; 5]) -> DeltaInput<'_> {
        DeltaInput { q, k, v, g, beta }
    }

    fn run(case: &[Vec<f32>; 5], sequences: &[Range<usize>]) -> Vec<f32> {
        let mut states = vec![vec![0.0; SHAPE.state_len()]; sequences.len()];
        delta_rule(&input(case), sequences, &SHAPE, &mut states)
    }

    /// The recurrence as it is written, token by token.
    fn recurrence(case: &[Vec<f32>; 5], sequences: &[Range<usize>]) -> Vec<f32> {
        let [q, k, v, g, beta] = case;
        let (dk, dv) = (SHAPE.key_dim, SHAPE.value_dim);
        let mut out = vec![0.0; v.len()];
        for rows in sequences {
            for head in 0..SHAPE.value_heads {
                let mut state = vec![0.0f64; dk * dv];
                for t in rows.clone() {
                    let key = |x: &[f32], i: usize| f64::from(x[(t * SHAPE.key_heads + head / 2) * dk + i]);
                    let at = t * SHAPE.value_heads + head;
                    state.iter_mut().for_each(|s| *s *= f64::from(g[at]).exp());
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
    fn chunks_compute_the_recurrence_and_sequences_are_apart() {
        let tokens = 2 * CHUNK + 9;
        let case = case(tokens);
        let sequences = [0..3, 3..CHUNK + 3, CHUNK + 3..tokens];
        for sequences in [&sequences[..], std::slice::from_ref(&(0..tokens))] {
            let (found, expected) = (run(&case, sequences), recurrence(&case, sequences));
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() < 1e-5, "{found} and {expected}");
            }
        }
    }

    #[test]
    fn a_text_may_be_fed_in_pieces() {
        let tokens = CHUNK + 20;
        let case = case(tokens);
        let whole = run(&case, std::slice::from_ref(&(0..tokens)));
        let mut states = vec![vec![0.0; SHAPE.state_len()]];
        let mut start = 0;
        for end in [7, 8, 9, CHUNK + 1, tokens] {
            let all = delta_rule(&input(&case), std::slice::from_ref(&(start..end)), &SHAPE, &mut states);
            for (found, expected) in all[start * 20..end * 20].iter().zip(&whole[start * 20..]) {
                assert!((found - expected).abs() < 1e-5, "{found} and {expected}");
            }
            start = end;
        }
    }

    #[test]
    fn gradients_are_those_of_difference_quotients() {
        let tokens = CHUNK + 6;
        let case = case(tokens);
        let sequences = [0..5, 5..tokens];
        let d_out = values(tokens * 20, 9);
        let found = delta_rule_backward(&input(&case), &sequences, &SHAPE, &d_out);
        let parts = [&found.q[..], &found.k, &found.v, &found.g, &found.beta];
        check_gradients(&case, parts, &d_out, |case| recurrence(case, &sequences));
    }
}

//! The state space recurrence of Mamba2 (arXiv 2405.21060), forward and backward, in chunks of tokens.
//!
//! Per head, with inputs `x_t [P]`, `b_t, c_t [N]` of its group, a step `d_t > 0` and a rate `a < 0`, the state `S [P,
//! N]` and the output are `S_t = e^{a d_t} S_{t-1} + d_t x_t b_t^T` and `y_t = S_t c_t`.
//!
//! Within a chunk that begins with the state `S`, with `G` the sums of `a d` from its beginning and `u_t = d_t x_t`:
//! `Y = M U + diag(e^G) C S^T` with `M_ij = e^{G_i - G_j} c_i . b_j` for `j <= i`, and the state after the chunk is
//! `e^{G_last} S + U^T diag(e^{G_last - G}) B`. No exponent is positive. Memory grows with the tokens, not with their
//! square: the backward pass keeps the state at the beginning of every chunk of one head and computes the rest again.

use std::ops::Range;

use super::{
    math,
    recurrence::{Decays, chunks, each_head, gather, of_each_token, run_heads, scatter},
    small_products::{add_product, add_scaled, add_transposed_product, product_nt},
};

/// Heads of a state space layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SsdShape {
    /// Number of heads.
    pub heads: usize,
    /// Width of a head, P.
    pub head_dim: usize,
    /// Groups of heads that share `b` and `c`; divides `heads`.
    pub groups: usize,
    /// Width of `b` and `c`, N.
    pub state: usize,
}

impl SsdShape {
    /// Elements of the states of all heads.
    pub fn state_len(&self) -> usize {
        self.heads * self.head_dim * self.state
    }

    /// Columns of `x`, and of `b` or `c`.
    pub fn widths(&self) -> [usize; 2] {
        [self.heads * self.head_dim, self.groups * self.state]
    }
}

/// What the recurrence is given, row-major, for T tokens.
#[derive(Clone, Copy, Debug)]
pub struct SsdInput<'a> {
    /// `[T, heads * P]`.
    pub x: &'a [f32],
    /// `[T, groups * N]`.
    pub b: &'a [f32],
    /// `[T, groups * N]`.
    pub c: &'a [f32],
    /// Steps `[T, heads]`, above 0.
    pub steps: &'a [f32],
    /// Rates `[heads]`, below 0.
    pub rates: &'a [f32],
}

/// Gradients of [`SsdInput`] but for the rates, in the same shapes.
#[derive(Clone, Debug, Default)]
pub struct SsdGradients {
    /// Of `x`.
    pub x: Vec<f32>,
    /// Of `b`.
    pub b: Vec<f32>,
    /// Of `c`.
    pub c: Vec<f32>,
    /// Of the steps.
    pub steps: Vec<f32>,
}

/// One head of one sequence, rows side by side.
struct Head {
    x: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    steps: Vec<f32>,
    rate: f32,
    p: usize,
    n: usize,
}

/// Tokens of one head that are computed together.
struct Chunk<'a> {
    b: &'a [f32],
    c: &'a [f32],
    /// Inputs times steps.
    u: Vec<f32>,
    decays: Decays,
    p: usize,
    n: usize,
}

impl Head {
    fn new(input: &SsdInput<'_>, rows: &Range<usize>, head: usize, shape: &SsdShape) -> Self {
        let group = head / (shape.heads / shape.groups);
        Self {
            x: gather(input.x, rows, shape.heads, head, shape.head_dim),
            b: gather(input.b, rows, shape.groups, group, shape.state),
            c: gather(input.c, rows, shape.groups, group, shape.state),
            steps: gather(input.steps, rows, shape.heads, head, 1),
            rate: input.rates[head],
            p: shape.head_dim,
            n: shape.state,
        }
    }

    fn chunk(&self, rows: &Range<usize>) -> Chunk<'_> {
        let (p, n) = (self.p, self.n);
        let steps = &self.steps[rows.clone()];
        let x = self.x[rows.start * p..rows.end * p].chunks_exact(p).zip(steps);
        Chunk {
            b: &self.b[rows.start * n..rows.end * n],
            c: &self.c[rows.start * n..rows.end * n],
            u: x.flat_map(|(row, step)| row.iter().map(move |x| x * step)).collect(),
            decays: Decays::new(steps.iter().map(|step| self.rate * step)),
            p,
            n,
        }
    }
}

impl Chunk<'_> {
    fn len(&self) -> usize {
        self.decays.len()
    }

    /// M, on and below the diagonal.
    fn mixed(&self) -> Vec<f32> {
        self.decays.products(self.c, self.b, self.n)
    }

    /// `C S^T`.
    fn of_state(&self, state: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; self.len() * self.p];
        product_nt(self.c, state, self.n, &mut out);
        out
    }

    /// The state after the chunk in place of the one before it.
    fn advance(&self, state: &mut [f32]) {
        let fade = self.decays.since_start(self.len() - 1);
        state.iter_mut().for_each(|s| *s *= fade);
        add_transposed_product(&self.u, &self.decays.to_the_end(self.b, self.n), self.p, state, self.n);
    }

    /// Output of the chunk, and the state after it in place of the one before it.
    fn forward(&self, state: &mut [f32], out: &mut [f32]) {
        let (len, p) = (self.len(), self.p);
        for (i, (out, row)) in out.chunks_exact_mut(p).zip(self.of_state(state).chunks_exact(p)).enumerate() {
            let fade = self.decays.since_start(i);
            out.iter_mut().zip(row).for_each(|(out, x)| *out = fade * x);
        }
        add_product(&self.mixed(), &self.u, len, out, p);
        self.advance(state);
    }

    /// Gradients of `u`, `b`, `c` and the logarithms of the decay of every token, from that of the output and, in
    /// `d_state`, that of the state after the chunk, which becomes that of the state before.
    fn backward(&self, state: &[f32], d_out: &[f32], d_state: &mut [f32]) -> [Vec<f32>; 4] {
        let (len, p, n) = (self.len(), self.p, self.n);
        let last = len - 1;
        let mixed = self.mixed();
        let mut d_decay = vec![0.0f32; len];

        // The state after the chunk.
        let mut b_ds = vec![0.0; len * p];
        product_nt(self.b, d_state, n, &mut b_ds);
        let mut du = self.decays.to_the_end(&b_ds, p);
        let mut u_ds = vec![0.0; len * n];
        add_product(&self.u, d_state, p, &mut u_ds, n);
        let mut db = self.decays.to_the_end(&u_ds, n);
        for j in 0..len {
            let moved = math::dot(&self.b[j * n..(j + 1) * n], &db[j * n..(j + 1) * n]);
            d_decay[last] += moved;
            d_decay[j] -= moved;
        }
        d_decay[last] += self.decays.since_start(last) * math::dot(state, d_state);

        // The output: M U and the state before.
        add_transposed_product(&mixed, d_out, len, &mut du, p);
        let mut d_cb = vec![0.0; len * len];
        product_nt(d_out, &self.u, p, &mut d_cb);
        let before = self.of_state(state);
        let mut scaled_out = d_out.to_vec();
        for i in 0..len {
            for j in 0..len {
                if j > i {
                    d_cb[i * len + j] = 0.0;
                    continue;
                }
                let moved = d_cb[i * len + j] * mixed[i * len + j];
                d_decay[i] += moved;
                d_decay[j] -= moved;
                d_cb[i * len + j] *= self.decays.between(i, j);
            }
            let (fade, row) = (self.decays.since_start(i), i * p..(i + 1) * p);
            d_decay[i] += fade * math::dot(&d_out[row.clone()], &before[row.clone()]);
            scaled_out[row].iter_mut().for_each(|d| *d *= fade);
        }
        let mut dc = vec![0.0; len * n];
        add_product(&scaled_out, state, p, &mut dc, n);
        add_product(&d_cb, self.b, len, &mut dc, n);
        add_transposed_product(&d_cb, self.c, len, &mut db, n);

        let fade = self.decays.since_start(last);
        d_state.iter_mut().for_each(|d| *d *= fade);
        add_transposed_product(&scaled_out, self.c, p, d_state, n);

        of_each_token(&mut d_decay, 1);
        [du, db, dc, d_decay]
    }
}

/// Output `[T, heads * P]` of independent sequences, disjoint row ranges that begin with the states in `states`, one
/// `[heads, P, N]` per sequence; those hold the states after the sequences then.
pub fn state_space(
    input: &SsdInput<'_>,
    sequences: &[Range<usize>],
    shape: &SsdShape,
    states: &mut [Vec<f32>],
) -> Vec<f32> {
    let sizes = [shape.heads, shape.head_dim];
    run_heads(sequences, sizes, states, super::zeros(input.x.len()), |rows, head, state| {
        let data = Head::new(input, rows, head, shape);
        let mut out = vec![0.0; data.x.len()];
        for rows in chunks(data.steps.len()) {
            data.chunk(&rows).forward(state, &mut out[rows.start * data.p..rows.end * data.p]);
        }
        out
    })
}

/// Gradients of [`state_space`] from zero states, given the gradient `d_out` of its output.
pub fn state_space_backward(
    input: &SsdInput<'_>,
    sequences: &[Range<usize>],
    shape: &SsdShape,
    d_out: &[f32],
) -> SsdGradients {
    let mut all = SsdGradients {
        x: vec![0.0; input.x.len()],
        b: vec![0.0; input.b.len()],
        c: vec![0.0; input.c.len()],
        steps: vec![0.0; input.steps.len()],
    };
    let run = |rows: &Range<usize>, head: usize| {
        let d_out = gather(d_out, rows, shape.heads, head, shape.head_dim);
        head_backward(&Head::new(input, rows, head, shape), &d_out)
    };
    each_head(sequences, shape.heads, run, |rows, head, found| {
        let group = head / (shape.heads / shape.groups);
        scatter(&found.x, rows, shape.heads, head, shape.head_dim, &mut all.x);
        scatter(&found.b, rows, shape.groups, group, shape.state, &mut all.b);
        scatter(&found.c, rows, shape.groups, group, shape.state, &mut all.c);
        scatter(&found.steps, rows, shape.heads, head, 1, &mut all.steps);
    });
    all
}

fn head_backward(head: &Head, d_out: &[f32]) -> SsdGradients {
    let (p, n) = (head.p, head.n);
    let mut state = vec![0.0; p * n];
    let mut states = Vec::new();
    for rows in chunks(head.steps.len()) {
        states.push(state.clone());
        head.chunk(&rows).advance(&mut state);
    }
    let mut all = SsdGradients {
        x: vec![0.0; head.x.len()],
        b: vec![0.0; head.b.len()],
        c: vec![0.0; head.c.len()],
        steps: vec![0.0; head.steps.len()],
    };
    let mut d_state = vec![0.0; p * n];
    for (rows, state) in chunks(head.steps.len()).rev().zip(states.into_iter().rev()) {
        let d_out = &d_out[rows.start * p..rows.end * p];
        let [du, db, dc, d_decay] = head.chunk(&rows).backward(&state, d_out, &mut d_state);
        all.b[rows.start * n..rows.end * n].copy_from_slice(&db);
        all.c[rows.start * n..rows.end * n].copy_from_slice(&dc);
        for (i, t) in rows.clone().enumerate() {
            let (x, du) = (&head.x[t * p..(t + 1) * p], &du[i * p..(i + 1) * p]);
            all.steps[t] = math::dot(x, du) + head.rate * d_decay[i];
            add_scaled(du, head.steps[t], &mut all.x[t * p..(t + 1) * p]);
        }
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

    const SHAPE: SsdShape = SsdShape { heads: 4, head_dim: 5, groups: 2, state: 3 };

    const RATES: [f32; 4] = [-0.1, -0.5, -1.5, -0.02];

    /// `x`, `b`, `c` and steps of so many tokens.
    fn case(tokens: usize) -> [Vec<f32>; 4] {
        let steps = values(tokens * 4, 4).into_iter().map(|x| 0.5 + 0.4 * x).collect();
        [values(tokens * 20, 1), values(tokens * 6, 2), values(tokens * 6, 3), steps]
    }

    fn input([x, b, c, steps]: &[Vec<f32>; 4]) -> SsdInput<'_> {
        SsdInput { x, b, c, steps, rates: &RATES }
    }

    /// The recurrence as it is written, token by token.
    fn recurrence(case: &[Vec<f32>; 4], sequences: &[Range<usize>]) -> Vec<f32> {
        let [x, b, c, steps] = case;
        let (p, n) = (SHAPE.head_dim, SHAPE.state);
        let mut out = vec![0.0; x.len()];
        for rows in sequences {
            for head in 0..SHAPE.heads {
                let mut state = vec![0.0f64; p * n];
                for t in rows.clone() {
                    let at = t * SHAPE.heads + head;
                    let of_group = |x: &[f32], i: usize| f64::from(x[(t * SHAPE.groups + head / 2) * n + i]);
                    let step = f64::from(steps[at]);
                    for i in 0..p {
                        let mut y = 0.0;
                        for j in 0..n {
                            let s = &mut state[i * n + j];
                            *s = *s * (f64::from(RATES[head]) * step).exp()
                                + step * f64::from(x[at * p + i]) * of_group(b, j);
                            y += *s * of_group(c, j);
                        }
                        out[at * p + i] = y as f32;
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
            let found = state_space(&input(&case), sequences, &SHAPE, &mut states);
            for (found, expected) in found.iter().zip(&recurrence(&case, sequences)) {
                assert!((found - expected).abs() < 1e-4, "{found} and {expected}");
            }
        }
        let whole = recurrence(&case, std::slice::from_ref(&(0..tokens)));
        let (mut states, mut start) = (vec![vec![0.0; SHAPE.state_len()]], 0);
        for end in [7, 8, 9, CHUNK + 1, tokens] {
            let all = state_space(&input(&case), std::slice::from_ref(&(start..end)), &SHAPE, &mut states);
            for (found, expected) in all[start * 20..end * 20].iter().zip(&whole[start * 20..]) {
                assert!((found - expected).abs() < 1e-4, "{found} and {expected}");
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
        let found = state_space_backward(&input(&case), &sequences, &SHAPE, &d_out);
        let parts = [&found.x[..], &found.b, &found.c, &found.steps];
        check_gradients(&case, parts, &d_out, |case| recurrence(case, &sequences));
    }
}

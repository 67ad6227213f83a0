use super::super::recurrence::{
    CHUNK,
    testing::{check_gradients, values},
};
use super::*;

const BY_HEAD: DeltaShape =
    DeltaShape { key_heads: 2, value_heads: 4, key_dim: 3, value_dim: 5, decay: DecayPer::Head };
const BY_CHANNEL: DeltaShape =
    DeltaShape { key_heads: 2, value_heads: 2, key_dim: 3, value_dim: 5, decay: DecayPer::Channel };
/// Decays of channels of value heads that share keys.
const SHARED: DeltaShape = DeltaShape { decay: DecayPer::Channel, ..BY_HEAD };

/// Queries, keys, values, decays and betas of so many tokens; decays of channels up to 3 per token, so that products of
/// those of a chunk are far below what a number can hold the inverse of.
fn case(tokens: usize, shape: &DeltaShape) -> [Vec<f32>; 5] {
    let rate = if shape.decay == DecayPer::Head { 0.2 } else { 1.5 };
    let keys = tokens * shape.key_heads * shape.key_dim;
    let decays = values(tokens * shape.decays(), 4).into_iter().map(|x| -rate * (x + 1.0)).collect();
    let betas = values(tokens * shape.value_heads, 5).into_iter().map(|x| 0.5 + 0.4 * x).collect();
    let small = values(keys, 2).into_iter().map(|x| 0.6 * x).collect();
    [values(keys, 1), small, values(tokens * columns(shape), 3), decays, betas]
}

/// Columns of values.
fn columns(shape: &DeltaShape) -> usize {
    shape.value_heads * shape.value_dim
}

fn input([q, k, v, g, beta]: &[Vec<f32>; 5]) -> DeltaInput<'_> {
    DeltaInput { q, k, v, g, beta }
}

fn run(case: &[Vec<f32>; 5], sequences: &[Range<usize>], shape: &DeltaShape) -> Vec<f32> {
    let mut states = vec![vec![0.0; shape.state_len()]; sequences.len()];
    delta_rule(&input(case), sequences, shape, &mut states)
}

/// The recurrence as it is written, token by token.
fn recurrence(case: &[Vec<f32>; 5], sequences: &[Range<usize>], shape: &DeltaShape) -> Vec<f32> {
    let [q, k, v, g, beta] = case;
    let (dk, dv) = (shape.key_dim, shape.value_dim);
    let mut out = vec![0.0; v.len()];
    for rows in sequences {
        for head in 0..shape.value_heads {
            let key_head = head / (shape.value_heads / shape.key_heads);
            let mut state = vec![0.0f64; dk * dv];
            for t in rows.clone() {
                let key = |x: &[f32], i: usize| f64::from(x[(t * shape.key_heads + key_head) * dk + i]);
                let at = t * shape.value_heads + head;
                let decay = |i: usize| match shape.decay {
                    DecayPer::Head => f64::from(g[at]).exp(),
                    DecayPer::Channel => f64::from(g[at * dk + i]).exp(),
                };
                (0..dk).for_each(|i| (0..dv).for_each(|j| state[i * dv + j] *= decay(i)));
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
    for shape in [BY_HEAD, BY_CHANNEL, SHARED] {
        let case = case(tokens, &shape);
        let sequences = [0..3, 3..CHUNK + 3, CHUNK + 3..tokens];
        for sequences in [&sequences[..], std::slice::from_ref(&(0..tokens))] {
            let (found, expected) = (run(&case, sequences, &shape), recurrence(&case, sequences, &shape));
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() < 1e-5, "{found} and {expected}");
            }
        }
    }
}

#[test]
fn a_text_may_be_fed_in_pieces() {
    for (shape, tokens) in [(BY_HEAD, CHUNK + 20), (BY_CHANNEL, 2 * CHUNK + 9), (SHARED, CHUNK + 20)] {
        let case = case(tokens, &shape);
        let whole = recurrence(&case, std::slice::from_ref(&(0..tokens)), &shape);
        let mut states = vec![vec![0.0; shape.state_len()]];
        let (mut start, columns) = (0, columns(&shape));
        for end in [7, 8, 9, CHUNK + 1, tokens] {
            let all = delta_rule(&input(&case), std::slice::from_ref(&(start..end)), &shape, &mut states);
            for (found, expected) in all[start * columns..end * columns].iter().zip(&whole[start * columns..]) {
                assert!((found - expected).abs() < 1e-5, "{found} and {expected}");
            }
            start = end;
        }
    }
}

#[test]
fn gradients_are_those_of_difference_quotients() {
    let tokens = CHUNK + 6;
    for shape in [BY_HEAD, BY_CHANNEL, SHARED] {
        let mut case = case(tokens, &shape);
        if shape.decay == DecayPer::Channel {
            case[3].iter_mut().for_each(|g| *g *= 0.2);
        }
        let sequences = [0..5, 5..tokens];
        let d_out = values(tokens * columns(&shape), 9);
        let found = delta_rule_backward(&input(&case), &sequences, &shape, &d_out);
        let parts = [&found.q[..], &found.k, &found.v, &found.g, &found.beta];
        check_gradients(&case, parts, &d_out, |case| recurrence(case, &sequences, &shape));
    }
}

/// One decay for all channels of a head is the same rule as as many equal ones.
#[test]
fn equal_decays_of_channels_are_that_of_the_head() {
    let tokens = CHUNK + 30;
    let by_head = case(tokens, &BY_HEAD);
    let mut by_channel = by_head.clone();
    by_channel[3] = by_head[3].iter().flat_map(|g| [*g; 3]).collect();
    let sequences = [0..10, 10..tokens];
    let (a, b) = (run(&by_head, &sequences, &BY_HEAD), run(&by_channel, &sequences, &SHARED));
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5));
    let d_out = values(tokens * columns(&BY_HEAD), 9);
    let a = delta_rule_backward(&input(&by_head), &sequences, &BY_HEAD, &d_out);
    let b = delta_rule_backward(&input(&by_channel), &sequences, &SHARED, &d_out);
    for (a, b) in [(&a.q, &b.q), (&a.k, &b.k), (&a.v, &b.v), (&a.beta, &b.beta)] {
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4 * (1.0 + a.abs())));
    }
    for (a, b) in a.g.iter().zip(b.g.chunks_exact(3)) {
        assert!((a - b.iter().sum::<f32>()).abs() < 1e-4 * (1.0 + a.abs()));
    }
}

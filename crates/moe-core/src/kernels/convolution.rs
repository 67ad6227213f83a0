//! The short causal convolution of every channel by itself that linear attention has in front, forward and backward.

use std::ops::Range;

use multiversion::multiversion;

use super::{for_rows_mut, zeros};

/// `y[t, c] = sum over j of taps[j, c] x[t - (K - 1) + j, c]` for `x [T, C]` and `taps [K, C]`, per sequence. Before
/// the first token of a sequence are its last `K - 1` rows in `history`, `[K - 1, C]` for each sequence, or zeros.
pub fn causal_convolution(
    x: &[f32],
    taps: &[f32],
    channels: usize,
    sequences: &[Range<usize>],
    history: Option<&[Vec<f32>]>,
) -> Vec<f32> {
    let kernel = taps.len() / channels;
    let mut out = zeros(x.len());
    for (s, rows) in sequences.iter().enumerate() {
        let history = history.map(|all| &all[s][..]);
        for_rows_mut(&mut out[rows.start * channels..rows.end * channels], channels, |t, y| {
            for j in 0..kernel {
                let tap = &taps[j * channels..(j + 1) * channels];
                // row t - (K - 1) + j of the sequence, or of what was before it
                match (t + j).checked_sub(kernel - 1) {
                    Some(row) => add_products(tap, &x[(rows.start + row) * channels..][..channels], y),
                    None => {
                        if let Some(history) = history {
                            add_products(tap, &history[(t + j) * channels..][..channels], y);
                        }
                    }
                }
            }
        });
    }
    out
}

/// Gradient of [`causal_convolution`] with respect to `x`, given `dy [T, C]`.
pub fn causal_convolution_backward(dy: &[f32], taps: &[f32], channels: usize, sequences: &[Range<usize>]) -> Vec<f32> {
    let kernel = taps.len() / channels;
    let mut out = zeros(dy.len());
    for rows in sequences {
        for_rows_mut(&mut out[rows.start * channels..rows.end * channels], channels, |t, dx| {
            for j in 0..kernel {
                let later = rows.start + t + (kernel - 1 - j);
                if later < rows.end {
                    add_products(&taps[j * channels..(j + 1) * channels], &dy[later * channels..][..channels], dx);
                }
            }
        });
    }
    out
}

/// The last `K - 1` rows after `x [n, C]` was appended to `history [K - 1, C]`.
pub fn advance_history(history: &mut Vec<f32>, x: &[f32]) {
    let len = history.len();
    history.extend_from_slice(x);
    history.drain(..history.len() - len);
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn add_products(a: &[f32], b: &[f32], out: &mut [f32]) {
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        *out += a * b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_back_within_its_sequence_only_and_its_gradient_is_its_transpose() {
        let (channels, taps) = (2, vec![0.5, -1.0, 2.0, 0.25, 1.0, 3.0]); // K = 3
        let x: Vec<f32> = (0..12).map(|i| i as f32 - 4.0).collect();
        let sequences = [0..4, 4..6];
        let y = causal_convolution(&x, &taps, channels, &sequences, None);
        assert_eq!(y[..2], [1.0 * x[0], 3.0 * x[1]]);
        assert_eq!(y[6], 0.5 * x[2] + 2.0 * x[4] + x[6]);
        assert_eq!(y[8], x[8], "a sequence does not see the one before it");
        let dy: Vec<f32> = (0..12).map(|i| (i * i % 7) as f32 - 3.0).collect();
        let dx = causal_convolution_backward(&dy, &taps, channels, &sequences);
        let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        assert!((product(&y, &dy) - product(&x, &dx)).abs() < 1e-3);
    }

    #[test]
    fn history_continues_a_sequence() {
        let (channels, taps) = (1, vec![0.5, 2.0, 1.0]);
        let x = [1.0, -2.0, 3.0, 4.0, -5.0];
        let whole = causal_convolution(&x, &taps, channels, std::slice::from_ref(&(0..5)), None);
        let mut history = vec![vec![0.0; 2]];
        let mut pieces = Vec::new();
        for piece in [&x[..1], &x[1..4], &x[4..]] {
            let rows = 0..piece.len();
            pieces.extend(causal_convolution(piece, &taps, channels, std::slice::from_ref(&rows), Some(&history)));
            advance_history(&mut history[0], piece);
        }
        assert_eq!(pieces, whole);
        assert_eq!(history[0], [4.0, -5.0]);
    }
}

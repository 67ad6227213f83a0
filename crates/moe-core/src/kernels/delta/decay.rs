//! How the state of a delta rule fades within a chunk of tokens: by head, or by channel of the keys.
//!
//! `G` are the sums of the logarithms of the decays from the chunk's beginning on, and `*` is by channel.

use std::ops::Range;

use super::super::{
    math,
    recurrence::Decays,
    small_products::{add_product, add_scaled, add_transposed_product, product_nt},
};

/// Tokens between which decays of channels are computed one by one.
const BLOCK: usize = 16;

/// The decays of a chunk of `n` tokens of one head, whose keys are `D_k` wide.
pub(super) trait ChunkDecay {
    /// Logarithms per token, 1 or `D_k`.
    fn width(dk: usize) -> usize;

    /// From the logarithms of the decays of every token, at most 0, `[n, width]`.
    fn new(g: &[f32], dk: usize) -> Self;

    /// Rows `[n, D_k]` times `e^G`.
    fn since_start(&self, x: &[f32]) -> Vec<f32>;

    /// Rows `[n, D_k]` times `e^{G_last - G}`.
    fn to_the_end(&self, x: &[f32]) -> Vec<f32>;

    /// A state `[D_k, dv]` times `e^{G_last}`.
    fn fade(&self, state: &mut [f32], dv: usize);

    /// `a_i . (e^{G_i - G_j} * k_j)` for `j <= i`, and 0 above the diagonal.
    fn products(&self, a: &[f32], k: &[f32]) -> Vec<f32>;

    /// Adds gradients at `a`, at the keys and at the sums to `into`, from those at [`products`](Self::products), which
    /// are 0 above the diagonal.
    fn products_backward(&self, a: &[f32], k: &[f32], products: &[f32], d: &[f32], into: [&mut [f32]; 3]);

    /// Adds `sign * a * b` of rows `[n, D_k]`, summed over channels that share a decay, to gradients at the sums.
    fn add_products(&self, a: &[f32], b: &[f32], sign: f32, d_sums: &mut [f32]);

    /// Adds numbers of the channels to the gradient at the sums of the last token.
    fn add_to_last(&self, channels: &[f32], d_sums: &mut [f32]);
}

/// One decay for all channels of a head.
pub(super) struct HeadDecay {
    decays: Decays,
    dk: usize,
}

impl ChunkDecay for HeadDecay {
    fn width(_: usize) -> usize {
        1
    }

    fn new(g: &[f32], dk: usize) -> Self {
        Self { decays: Decays::new(g.iter().copied()), dk }
    }

    fn since_start(&self, x: &[f32]) -> Vec<f32> {
        let mut out = x.to_vec();
        for (i, row) in out.chunks_exact_mut(self.dk).enumerate() {
            let fade = self.decays.since_start(i);
            row.iter_mut().for_each(|x| *x *= fade);
        }
        out
    }

    fn to_the_end(&self, x: &[f32]) -> Vec<f32> {
        self.decays.to_the_end(x, self.dk)
    }

    fn fade(&self, state: &mut [f32], _: usize) {
        let fade = self.decays.since_start(self.decays.len() - 1);
        state.iter_mut().for_each(|s| *s *= fade);
    }

    fn products(&self, a: &[f32], k: &[f32]) -> Vec<f32> {
        self.decays.products(a, k, self.dk)
    }

    fn products_backward(&self, a: &[f32], k: &[f32], products: &[f32], d: &[f32], into: [&mut [f32]; 3]) {
        let n = self.decays.len();
        let [d_a, d_k, d_sums] = into;
        let mut faded = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                let at = i * n + j;
                let moved = d[at] * products[at];
                d_sums[i] += moved;
                d_sums[j] -= moved;
                faded[at] = d[at] * self.decays.between(i, j);
            }
        }
        add_product(&faded, k, n, d_a, self.dk);
        add_transposed_product(&faded, a, n, d_k, self.dk);
    }

    fn add_products(&self, a: &[f32], b: &[f32], sign: f32, d_sums: &mut [f32]) {
        for ((d, a), b) in d_sums.iter_mut().zip(a.chunks_exact(self.dk)).zip(b.chunks_exact(self.dk)) {
            *d += sign * math::dot(a, b);
        }
    }

    fn add_to_last(&self, channels: &[f32], d_sums: &mut [f32]) {
        d_sums[self.decays.len() - 1] += channels.iter().sum::<f32>();
    }
}

/// A decay per channel.
///
/// `e^{G_i - G_j}` is no product of something of i and something of j that would not overflow. Between blocks of
/// `BLOCK` tokens it is one of two numbers of at most 1, with the sum at the later block's beginning in the middle;
/// within a block it is computed as it stands.
pub(super) struct ChannelDecay {
    /// G `[n, D_k]`.
    sums: Vec<f32>,
    dk: usize,
}

/// `a e^b` element by element.
fn times_exp(a: &[f32], b: impl Iterator<Item = f32>) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a * math::exp(b)).collect()
}

/// `out += sign * a * b` element by element.
fn add_elements(a: &[f32], b: &[f32], sign: f32, out: &mut [f32]) {
    out.iter_mut().zip(a).zip(b).for_each(|((out, a), b)| *out += sign * a * b);
}

impl ChannelDecay {
    fn len(&self) -> usize {
        self.sums.len() / self.dk
    }

    fn row(&self, i: usize) -> Range<usize> {
        i * self.dk..(i + 1) * self.dk
    }

    /// Rows `block` of `a` times `e^{G - G_start}`, and the keys before the block times `e^{G_start - G}`, `G_start`
    /// the sum at the block's first token.
    fn around(&self, a: &[f32], k: &[f32], block: &Range<usize>) -> [Vec<f32>; 2] {
        let (first, own) = (block.start * self.dk, block.start * self.dk..block.end * self.dk);
        let start = &self.sums[self.row(block.start)];
        let since = self.sums[own.clone()].iter().zip(start.iter().cycle()).map(|(sum, start)| sum - start);
        let until = self.sums[..first].iter().zip(start.iter().cycle()).map(|(sum, start)| start - sum);
        [times_exp(&a[own], since), times_exp(&k[..first], until)]
    }
}

impl ChunkDecay for ChannelDecay {
    fn width(dk: usize) -> usize {
        dk
    }

    fn new(g: &[f32], dk: usize) -> Self {
        let mut sums = g.to_vec();
        for start in (dk..sums.len()).step_by(dk) {
            let (before, row) = sums.split_at_mut(start);
            add_scaled(&before[start - dk..], 1.0, &mut row[..dk]);
        }
        Self { sums, dk }
    }

    fn since_start(&self, x: &[f32]) -> Vec<f32> {
        times_exp(x, self.sums.iter().copied())
    }

    fn to_the_end(&self, x: &[f32]) -> Vec<f32> {
        let last = self.sums[self.row(self.len() - 1)].iter().cycle();
        times_exp(x, last.zip(&self.sums).map(|(last, sum)| last - sum))
    }

    fn fade(&self, state: &mut [f32], dv: usize) {
        let last = &self.sums[self.row(self.len() - 1)];
        for (row, sum) in state.chunks_exact_mut(dv).zip(last) {
            let fade = math::exp(*sum);
            row.iter_mut().for_each(|s| *s *= fade);
        }
    }

    fn products(&self, a: &[f32], k: &[f32]) -> Vec<f32> {
        let n = self.len();
        let mut out = vec![0.0; n * n];
        for start in (0..n).step_by(BLOCK) {
            let block = start..(start + BLOCK).min(n);
            if start > 0 {
                let [left, right] = self.around(a, k, &block);
                let mut products = vec![0.0; block.len() * start];
                product_nt(&left, &right, self.dk, &mut products);
                for (i, row) in block.clone().zip(products.chunks_exact(start)) {
                    out[i * n..i * n + start].copy_from_slice(row);
                }
            }
            for i in block {
                for j in start..=i {
                    let ([a, k], [to, from]) = ([&a[self.row(i)], &k[self.row(j)]], [i, j].map(|i| self.row(i)));
                    let fades = self.sums[to].iter().zip(&self.sums[from]);
                    out[i * n + j] =
                        a.iter().zip(k).zip(fades).map(|((a, k), (to, from))| a * k * math::exp(to - from)).sum();
                }
            }
        }
        out
    }

    fn products_backward(&self, a: &[f32], k: &[f32], _: &[f32], d: &[f32], into: [&mut [f32]; 3]) {
        let (n, dk) = (self.len(), self.dk);
        let [d_a, d_k, d_sums] = into;
        let (mut own_a, mut own_k) = (vec![0.0; n * dk], vec![0.0; n * dk]);
        for start in (0..n).step_by(BLOCK) {
            let block = start..(start + BLOCK).min(n);
            if start > 0 {
                let [left, right] = self.around(a, k, &block);
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
                        own_a[at] += faded * k[from];
                        own_k[from] += faded * a[at];
                    }
                }
            }
        }
        add_elements(a, &own_a, 1.0, d_sums);
        add_elements(k, &own_k, -1.0, d_sums);
        add_scaled(&own_a, 1.0, d_a);
        add_scaled(&own_k, 1.0, d_k);
    }

    fn add_products(&self, a: &[f32], b: &[f32], sign: f32, d_sums: &mut [f32]) {
        add_elements(a, b, sign, d_sums);
    }

    fn add_to_last(&self, channels: &[f32], d_sums: &mut [f32]) {
        let last = self.row(self.len() - 1);
        add_scaled(channels, 1.0, &mut d_sums[last]);
    }
}

//! Attention of queries to a window of keys and to compressed keys of all tokens before, which are values, too; and the
//! compression: a mean of the keys of a group of tokens, weighted column by column (DeepSeek-V4).
//!
//! On the host, whatever the device: a query sees few keys, and which is a matter of its position. The keys that a
//! query sees are gathered, so that all its heads are one product of small matrices.

use std::{ops::Range, sync::Arc};

use rayon::prelude::*;

use super::{
    attention::Selection,
    math,
    small_products::{add_product, add_transposed_product, product_nt},
    zeros,
};

/// What an attention layer is, apart from its projections.
#[derive(Clone, Debug, PartialEq)]
pub struct CompressedShape {
    /// Query heads.
    pub heads: usize,
    /// Width of a query head and of the one head of keys, D.
    pub head_dim: usize,
    /// Tokens whose keys a query sees, itself included.
    pub window: usize,
    /// Tokens of a compressed key.
    pub rate: usize,
    /// One score per query head that takes part in the softmax without having a value `[heads]`.
    pub sinks: Arc<[f32]>,
}

/// Queries of one sequence and what they see.
#[derive(Clone, Debug)]
pub struct Seen<'a> {
    /// Rows of the queries.
    pub queries: Range<usize>,
    /// Position of the first one.
    pub start: usize,
    /// Keys `[.., D]` from position `first` on, up to that of the last query.
    pub keys: &'a [f32],
    /// Position of the first key.
    pub first: usize,
    /// Compressed keys `[.., D]`.
    pub entries: &'a [f32],
}

/// The keys that a query sees.
#[derive(Default)]
struct Scratch {
    rows: Vec<f32>,
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    d_rows: Vec<f32>,
}

impl CompressedShape {
    /// Compressed keys that a query at a position may see.
    pub fn ready(&self, position: usize) -> usize {
        (position + 1) / self.rate.max(1)
    }

    /// Positions of the window of a query.
    fn window(&self, position: usize) -> Range<usize> {
        (position + 1).saturating_sub(self.window)..position + 1
    }

    /// The compressed keys that the query in `row` sees.
    fn seen<'s>(&self, seen: &Seen<'_>, row: usize, chosen: Option<&'s Selection>) -> Entries<'s> {
        let all = seen.entries.len() / self.head_dim;
        match chosen.and_then(|chosen| chosen.keys(row)) {
            Some(keys) => Entries::Some(keys),
            None => Entries::First(self.ready(seen.start + row - seen.queries.start).min(all)),
        }
    }

    /// Gathers what the query in `row` sees and computes the shares of every key in every head `[heads, keys]`.
    fn shares(&self, q: &[f32], seen: &Seen<'_>, row: usize, chosen: Option<&Selection>, scratch: &mut Scratch) {
        let d = self.head_dim;
        let Scratch { rows, scores, .. } = scratch;
        let window = self.window(seen.start + row - seen.queries.start);
        rows.clear();
        rows.extend_from_slice(&seen.keys[(window.start - seen.first) * d..(window.end - seen.first) * d]);
        self.seen(seen, row, chosen).for_each(|e| rows.extend_from_slice(&seen.entries[e * d..(e + 1) * d]));
        let keys = rows.len() / d;
        scores.clear();
        scores.resize(self.heads * keys, 0.0);
        product_nt(q, rows, d, scores);
        let scale = (d as f32).powf(-0.5);
        for (scores, sink) in scores.chunks_exact_mut(keys).zip(&*self.sinks) {
            scores.iter_mut().for_each(|score| *score *= scale);
            let max = scores.iter().copied().fold(*sink, f32::max);
            scores.iter_mut().for_each(|score| *score = math::exp(*score - max));
            let sum = math::exp(sink - max) + scores.iter().sum::<f32>();
            scores.iter_mut().for_each(|score| *score /= sum);
        }
    }
}

/// Compressed keys that a query sees.
enum Entries<'s> {
    First(usize),
    Some(&'s [u32]),
}

impl Entries<'_> {
    fn for_each(&self, mut f: impl FnMut(usize)) {
        match self {
            Self::First(count) => (0..*count).for_each(f),
            Self::Some(entries) => entries.iter().for_each(|entry| f(*entry as usize)),
        }
    }
}

/// Outputs of the heads `[n, heads * D]` of queries `q` of the same shape. A query sees the chosen compressed keys, or
/// all that are ready where none are listed.
pub fn attend(q: &[f32], seen: &[Seen<'_>], shape: &CompressedShape, chosen: Option<&Selection>) -> Vec<f32> {
    let columns = shape.heads * shape.head_dim;
    let mut out = zeros(q.len());
    let of_row: Vec<usize> =
        seen.iter().enumerate().flat_map(|(i, seen)| seen.queries.clone().map(move |_| i)).collect();
    out.par_chunks_mut(columns).zip(q.par_chunks(columns)).enumerate().for_each_init(
        Scratch::default,
        |scratch, (row, (out, q))| {
            shape.shares(q, &seen[of_row[row]], row, chosen, scratch);
            let keys = scratch.rows.len() / shape.head_dim;
            add_product(&scratch.scores, &scratch.rows, keys, out, shape.head_dim);
        },
    );
    out
}

/// Queries whose gradients at keys are added up together.
const BLOCK: usize = 32;
/// Blocks that run side by side. Part of the order of sums, so no number of threads.
const SIDE_BY_SIDE: usize = 8;

/// Gradients of [`attend`] on whole sequences: at the queries, at the keys (a row for each query row) and at the
/// compressed keys of every sequence.
pub fn attend_backward(
    q: &[f32],
    seen: &[Seen<'_>],
    shape: &CompressedShape,
    chosen: Option<&Selection>,
    d_out: &[f32],
) -> (Vec<f32>, Vec<f32>, Vec<Vec<f32>>) {
    let (d, columns) = (shape.head_dim, shape.heads * shape.head_dim);
    let mut dq = zeros(q.len());
    let mut d_keys = zeros(q.len() / columns * d);
    let mut all_entries = Vec::with_capacity(seen.len());
    let scale = (d as f32).powf(-0.5);
    for seen in seen {
        let rows = seen.queries.clone();
        let mut d_entries = zeros(seen.entries.len());
        let sequence = &mut dq[rows.start * columns..rows.end * columns];
        for (group, dq) in sequence.chunks_mut(SIDE_BY_SIDE * BLOCK * columns).enumerate() {
            let block = |(block, dq): (usize, &mut [f32])| {
                let first = rows.start + (group * SIDE_BY_SIDE + block) * BLOCK;
                let low = shape.window(first - rows.start).start;
                let last = first + dq.len() / columns;
                let mut d_window = zeros((last - rows.start - low) * d);
                let mut d_entries = zeros(shape.ready(last - 1 - rows.start).min(seen.entries.len() / d) * d);
                let mut scratch = Scratch::default();
                for (i, dq) in dq.chunks_exact_mut(columns).enumerate() {
                    let row = first + i;
                    let of = row * columns..(row + 1) * columns;
                    let (q, d_out) = (&q[of.clone()], &d_out[of]);
                    shape.shares(q, seen, row, chosen, &mut scratch);
                    let Scratch { rows: gathered, scores, d_scores, d_rows } = &mut scratch;
                    let keys = gathered.len() / d;
                    d_scores.clear();
                    d_scores.resize(shape.heads * keys, 0.0);
                    product_nt(d_out, gathered, d, d_scores);
                    for (d_scores, shares) in d_scores.chunks_exact_mut(keys).zip(scores.chunks_exact(keys)) {
                        let along = math::dot(d_scores, shares);
                        d_scores.iter_mut().zip(shares).for_each(|(d, share)| *d = share * (*d - along) * scale);
                    }
                    add_product(d_scores, gathered, keys, dq, d);
                    d_rows.clear();
                    d_rows.resize(keys * d, 0.0);
                    add_transposed_product(scores, d_out, keys, d_rows, d);
                    add_transposed_product(d_scores, q, keys, d_rows, d);
                    let window = shape.window(row - rows.start);
                    let (of_window, of_entries) = d_rows.split_at(window.len() * d);
                    let into = &mut d_window[(window.start - low) * d..(window.end - low) * d];
                    into.iter_mut().zip(of_window).for_each(|(sum, x)| *sum += x);
                    let mut of_entries = of_entries.chunks_exact(d);
                    shape.seen(seen, row, chosen).for_each(|entry| {
                        let of = of_entries.next().unwrap_or_default();
                        d_entries[entry * d..(entry + 1) * d].iter_mut().zip(of).for_each(|(sum, x)| *sum += x);
                    });
                }
                (low, d_window, d_entries)
            };
            let blocks: Vec<_> = dq.par_chunks_mut(BLOCK * columns).enumerate().map(block).collect();
            for (low, d_window, of_entries) in blocks {
                let into = &mut d_keys[(rows.start + low) * d..];
                into.iter_mut().zip(d_window).for_each(|(sum, x)| *sum += x);
                d_entries.iter_mut().zip(of_entries).for_each(|(sum, x)| *sum += x);
            }
        }
        all_entries.push(d_entries);
    }
    (dq, d_keys, all_entries)
}

/// Which keys make a compressed one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolShape {
    /// Tokens of a group.
    pub rate: usize,
    /// Width of a key, D.
    pub width: usize,
    /// Whether tokens have two keys, `[for the group after | for their own]`.
    pub overlapping: bool,
}

impl PoolShape {
    /// Columns of the keys of a token.
    pub fn columns(&self) -> usize {
        if self.overlapping { 2 * self.width } else { self.width }
    }

    /// Calls `f` with the token, the place in its group and the first column of every key in group `group`.
    fn for_slots(&self, group: usize, mut f: impl FnMut(usize, usize, usize)) {
        if self.overlapping && group > 0 {
            (0..self.rate).for_each(|place| f((group - 1) * self.rate + place, place, 0));
        }
        let own = if self.overlapping { self.width } else { 0 };
        (0..self.rate).for_each(|place| f(group * self.rate + place, place, own));
    }

    /// Shares of the keys of a group in each column, slot after slot `[slots, D]`.
    fn shares(&self, gate: &[f32], bias: &[f32], group: usize) -> Vec<f32> {
        let (columns, width) = (self.columns(), self.width);
        let mut shares = Vec::new();
        self.for_slots(group, |token, place, first| {
            let (gate, bias) = (&gate[token * columns + first..][..width], &bias[place * columns + first..][..width]);
            shares.extend(gate.iter().zip(bias).map(|(gate, bias)| gate + bias));
        });
        let mut max = vec![f32::NEG_INFINITY; width];
        for slot in shares.chunks_exact(width) {
            max.iter_mut().zip(slot).for_each(|(max, x)| *max = max.max(*x));
        }
        let mut sum = vec![0.0; width];
        for slot in shares.chunks_exact_mut(width) {
            for ((x, max), sum) in slot.iter_mut().zip(&max).zip(&mut sum) {
                *x = math::exp(*x - max);
                *sum += *x;
            }
        }
        for slot in shares.chunks_exact_mut(width) {
            slot.iter_mut().zip(&sum).for_each(|(x, sum)| *x /= sum);
        }
        shares
    }
}

/// Means `[groups - skipped, D]` of the keys of the whole groups of consecutive tokens with keys and gates `[n,
/// columns]` and `bias [rate, columns]`. The first `skipped` groups are there for the ones after them.
pub fn pool(keys: &[f32], gate: &[f32], bias: &[f32], shape: &PoolShape, skipped: usize) -> Vec<f32> {
    let (columns, width) = (shape.columns(), shape.width);
    let groups = keys.len() / columns / shape.rate;
    let mut out = zeros(groups.saturating_sub(skipped) * width);
    out.par_chunks_mut(width).enumerate().for_each(|(i, out)| {
        let shares = shape.shares(gate, bias, i + skipped);
        let mut shares = shares.chunks_exact(width);
        shape.for_slots(i + skipped, |token, _, first| {
            let key = &keys[token * columns + first..][..width];
            for ((out, key), share) in out.iter_mut().zip(key).zip(shares.next().unwrap_or_default()) {
                *out += share * key;
            }
        });
    });
    out
}

/// Gradients at keys and gates of [`pool`] over a whole sequence, from that at the means.
pub fn pool_backward(keys: &[f32], gate: &[f32], bias: &[f32], shape: &PoolShape, d: &[f32]) -> [Vec<f32>; 2] {
    let (columns, width) = (shape.columns(), shape.width);
    let (mut d_keys, mut d_gate) = (zeros(keys.len()), zeros(gate.len()));
    for (group, d) in d.chunks_exact(width).enumerate() {
        let shares = shape.shares(gate, bias, group);
        let mut along = vec![0.0; width];
        let mut slots = shares.chunks_exact(width);
        shape.for_slots(group, |token, _, first| {
            let (key, share) = (&keys[token * columns + first..][..width], slots.next().unwrap_or_default());
            for ((along, (key, share)), d) in along.iter_mut().zip(key.iter().zip(share)).zip(d) {
                *along += key * share * d;
            }
        });
        let mut slots = shares.chunks_exact(width);
        shape.for_slots(group, |token, _, first| {
            let (at, share) = (token * columns + first, slots.next().unwrap_or_default());
            for (column, share) in share.iter().enumerate() {
                d_keys[at + column] = share * d[column];
                d_gate[at + column] = share * (keys[at + column] * d[column] - along[column]);
            }
        });
    }
    [d_keys, d_gate]
}

/// The compressed keys with the largest `sum over heads of w_h relu(q_h . k)` that each query sees; none are listed for
/// a query that has no more than `most` of them. Of equal ones the earlier come first. `q [n, heads * D]`, `weights [n,
/// heads]`; entries are those of the indexer.
pub fn choose(q: &[f32], weights: &[f32], seen: &[Seen<'_>], shape: &CompressedShape, most: usize) -> Selection {
    let (d, columns) = (shape.head_dim, shape.heads * shape.head_dim);
    let of = |seen: &Seen<'_>, row: usize| -> Vec<u32> {
        let ready = shape.ready(seen.start + row - seen.queries.start).min(seen.entries.len() / d);
        if ready <= most {
            return Vec::new();
        }
        let mut products = vec![0.0; shape.heads * ready];
        product_nt(&q[row * columns..(row + 1) * columns], &seen.entries[..ready * d], d, &mut products);
        let mut scores = vec![0.0f32; ready];
        for (products, weight) in products.chunks_exact(ready).zip(&weights[row * shape.heads..]) {
            scores.iter_mut().zip(products).for_each(|(score, x)| *score += weight * x.max(0.0));
        }
        let mut order: Vec<u32> = (0..ready as u32).collect();
        let by_score = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
        order.select_nth_unstable_by(most - 1, by_score);
        order.truncate(most);
        order.sort_unstable();
        order
    };
    let rows: Vec<(&Seen<'_>, usize)> =
        seen.iter().flat_map(|seen| seen.queries.clone().map(move |row| (seen, row))).collect();
    Selection::new(rows.into_par_iter().map(|(seen, row)| of(seen, row)).collect::<Vec<_>>())
}

//! Scores of keys by an indexer, and the best keys of every query (DeepSeek Sparse Attention, arXiv 2512.02556).

use std::ops::Range;

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::attention::Selection;
use crate::host::HostView;

/// Products of queries and keys held at once, in elements.
const PRODUCTS: usize = 4 << 20;

/// Sizes of an indexer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexerShape {
    /// Its heads.
    pub heads: usize,
    /// Width of its queries and keys, D.
    pub head_dim: usize,
    /// Most keys that a query sees.
    pub keys: usize,
}

/// The keys of every query: of those up to it the `keys` with the largest `sum_h w_h relu(q_h . k)`, lower positions
/// first among equals. `q [n, heads * D]`, `w [n, heads]`. Each span is rows of these, the last positions of a
/// sequence, and the keys of the whole sequence `[length, D]`, or nothing for a sequence in which all queries see all.
///
/// Memory is that of four million numbers and of the positions chosen, whatever the length.
pub fn select(
    q: &Tensor<2>,
    w: &Tensor<2>,
    spans: &[(Range<usize>, Option<Tensor<2>>)],
    shape: IndexerShape,
) -> Selection {
    let IndexerShape { heads, head_dim, keys: top } = shape;
    let weights = HostView::new(w);
    let weights = weights.as_slice();
    let mut chosen: Vec<Vec<u32>> = vec![Vec::new(); q.dims()[0]];
    for (rows, keys) in spans {
        let Some(keys) = keys else { continue };
        let length = keys.dims()[0];
        let before = length - rows.len();
        // Queries before this one see all keys up to them.
        let mut next = top.saturating_sub(before).min(rows.len());
        while next < rows.len() {
            let count = (PRODUCTS / (heads * length)).clamp(1, rows.len() - next);
            let visible = before + next + count;
            let queries = q.clone().narrow(0, rows.start + next, count).reshape([count * heads, head_dim]);
            let products = queries.matmul(keys.clone().narrow(0, 0, visible).transpose()); // [count * heads, visible]
            let products = HostView::new(&products);
            let products = products.as_slice();
            let best: Vec<Vec<u32>> = (0..count)
                .into_par_iter()
                .map(|i| {
                    let row = rows.start + next + i;
                    let mut scores = vec![0.0f32; before + next + i + 1];
                    for head in 0..heads {
                        let weight = weights[row * heads + head];
                        let products = &products[(i * heads + head) * visible..];
                        scores.iter_mut().zip(products).for_each(|(score, p)| *score += weight * p.max(0.0));
                    }
                    best(&scores, top)
                })
                .collect();
            for (i, best) in best.into_iter().enumerate() {
                chosen[rows.start + next + i] = best;
            }
            next += count;
        }
    }
    Selection::new(chosen)
}

/// The places of the `count` largest, ascending; none if there are no more.
fn best(scores: &[f32], count: usize) -> Vec<u32> {
    if scores.len() <= count {
        return Vec::new();
    }
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.select_nth_unstable_by(count - 1, |a, b| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b)));
    order.truncate(count);
    order.sort_unstable();
    order
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::pattern;

    #[test]
    fn the_best_keys_are_the_largest_sums_and_ties_go_to_earlier_ones() {
        assert_eq!(best(&[1.0, 3.0, 2.0, 3.0], 2), [1, 3]);
        assert_eq!(best(&[0.0, 0.0, 5.0, 0.0], 2), [0, 2]);
        assert!(best(&[1.0, 2.0], 2).is_empty());
        let shape = IndexerShape { heads: 3, head_dim: 4, keys: 5 };
        let (q, w, k) = (pattern([9, 12], 1), pattern([9, 3], 2), pattern([9, 4], 3));
        let whole = select(&q, &w, &[(0..9, Some(k.clone()))], shape);
        let value = |t: &Tensor<2>, i: usize| HostView::new(t).as_slice()[i];
        for row in 0..9 {
            let score = |key: usize| {
                let head = |h: usize| {
                    let dot: f32 = (0..4).map(|d| value(&q, row * 12 + h * 4 + d) * value(&k, key * 4 + d)).sum();
                    value(&w, row * 3 + h) * dot.max(0.0)
                };
                (0..3).map(head).sum::<f32>()
            };
            let mut order: Vec<usize> = (0..=row).collect();
            order.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
            order.truncate(5);
            order.sort_unstable();
            let expected: Vec<u32> = order.into_iter().map(|key| key as u32).collect();
            assert_eq!(whole.keys(row).map(<[u32]>::to_vec), (row >= 5).then_some(expected), "query {row}");
        }
        // The last queries alone, as in generation.
        let (q, w) = (q.narrow(0, 7, 2), w.narrow(0, 7, 2));
        let last = select(&q, &w, &[(0..2, Some(k))], shape);
        assert_eq!((last.keys(0), last.keys(1)), (whole.keys(7), whole.keys(8)));
    }
}

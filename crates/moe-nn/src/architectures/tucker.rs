//! Retrieval by scores that are products of two sides (UltraMem's Tucker-decomposed query-key retrieval).

use crate::router::top;

/// Most rows, and most columns, that candidates are made of.
const MOST: usize = 128;

/// Scores `s C t` of pairs of keys, with `[cores, rank, rank]` and the `[2, rank]` vectors that rank the keys of a
/// side.
pub(super) struct Tucker<'a> {
    pub rank: usize,
    pub side: usize,
    pub cores: &'a [f32],
    pub sides: &'a [f32],
}

impl Tucker<'_> {
    /// The `k` slots (row * side + column) with the highest sums over cores among the best rows times the best columns;
    /// the lower slot among equals. `rows` and `columns` are the components of the keys, `[rank][side]`.
    pub fn best(&self, rows: &[&[f32]], columns: &[&[f32]], k: usize) -> Vec<u32> {
        // Enough of either side that their pairs are at least k.
        let few = k.min(self.side).min(MOST.max(k.div_ceil(self.side)));
        let side = |components: &[&[f32]], vector: &[f32]| {
            let rank = |key: usize| components.iter().zip(vector).map(|(of, weight)| of[key] * weight).sum::<f32>();
            top(&(0..self.side).map(rank).collect::<Vec<f32>>(), few)
        };
        let (u, v) = self.sides.split_at(self.rank);
        let best_columns = side(columns, v);
        let mut candidates: Vec<u32> = Vec::with_capacity(few * few);
        for row in side(rows, u) {
            candidates.extend(best_columns.iter().map(|column| row * self.side as u32 + column));
        }
        candidates.sort_unstable();
        let score = |slot: &u32| self.score(rows, columns, *slot as usize);
        let scores: Vec<f32> = candidates.iter().map(score).collect();
        top(&scores, k).into_iter().map(|place| candidates[place as usize]).collect()
    }

    /// The sum of a slot's scores over all cores.
    pub fn score(&self, rows: &[&[f32]], columns: &[&[f32]], slot: usize) -> f32 {
        let (row, column, rank) = (slot / self.side, slot % self.side, self.rank);
        let of_core = |core: &[f32]| {
            let cell = |i: usize| rows[i / rank][row] * core[i] * columns[i % rank][column];
            (0..rank * rank).map(cell).sum::<f32>()
        };
        self.cores.chunks_exact(rank * rank).map(of_core).sum()
    }
}

/// The leading left and right singular vectors, one after the other, of a square matrix (row-major), with the common
/// sign that is nearest to `last` in the sum of differences, or whose sum is not negative where `last` is zero.
pub(super) fn leading_pair(matrix: &[f64], last: &[f64]) -> Vec<f64> {
    let rank = last.len() / 2;
    let times = |vector: &[f64], transposed: bool| -> Vec<f64> {
        let cell = |i: usize, j: usize| if transposed { matrix[j * rank + i] } else { matrix[i * rank + j] };
        (0..rank).map(|i| (0..rank).map(|j| cell(i, j) * vector[j]).sum()).collect()
    };
    let unit = |vector: Vec<f64>| -> Vec<f64> {
        let length = vector.iter().map(|value| value * value).sum::<f64>().sqrt();
        if length > 0.0 { vector.into_iter().map(|value| value / length).collect() } else { vector }
    };
    // The longest row of the matrix is not orthogonal to the leading right vector, unless the matrix is zero.
    let length = |i: &usize| matrix[i * rank..(i + 1) * rank].iter().map(|value| value * value).sum::<f64>();
    let longest = (0..rank).max_by(|a, b| length(a).total_cmp(&length(b))).unwrap_or(0);
    let mut right = unit(matrix[longest * rank..(longest + 1) * rank].to_vec());
    for _ in 0..1000 {
        let next = unit(times(&times(&right, false), true));
        let moved: f64 = next.iter().zip(&right).map(|(a, b)| (a - b).abs()).sum();
        right = next;
        if moved < 1e-12 {
            break;
        }
    }
    let mut pair = unit(times(&right, false));
    pair.extend(right);
    let distance = |sign: f64| pair.iter().zip(last).map(|(value, last)| (sign * value - last).abs()).sum::<f64>();
    let turned = match last.iter().all(|value| *value == 0.0) {
        true => pair.iter().sum::<f64>() < 0.0,
        false => distance(-1.0) < distance(1.0),
    };
    if turned { pair.into_iter().map(|value| -value).collect() } else { pair }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(seed: usize) -> f32 {
        ((seed * 7919 + 104_729) % 2003) as f32 / 1001.0 - 1.0
    }

    fn numbers(seed: usize, count: usize) -> Vec<f32> {
        (0..count).map(|i| number(seed * 1009 + i * 31)).collect()
    }

    #[test]
    fn the_best_slots_are_those_of_a_search_of_all_candidates() {
        let (side, k) = (12, 5);
        for seed in 0..40 {
            let parts: Vec<Vec<f32>> = (0..4).map(|i| numbers(seed * 4 + i, side)).collect();
            let (rows, columns) = ([&parts[0][..], &parts[1]], [&parts[2][..], &parts[3]]);
            let cores: Vec<f32> = numbers(seed + 500, 8).iter().map(|value| value.abs()).collect();
            let sum: Vec<f64> = (0..4).map(|i| f64::from(cores[i] + cores[i + 4])).collect();
            let sides: Vec<f32> = leading_pair(&sum, &[0.0; 4]).into_iter().map(|value| value as f32).collect();
            let tucker = Tucker { rank: 2, side, cores: &cores, sides: &sides };
            let ranked = |components: &[&[f32]; 2], vector: &[f32]| -> Vec<u32> {
                let all: Vec<f32> =
                    (0..side).map(|key| components[0][key] * vector[0] + components[1][key] * vector[1]).collect();
                top(&all, k)
            };
            let (good_rows, good_columns) = (ranked(&rows, &sides[..2]), ranked(&columns, &sides[2..]));
            let open =
                |slot: u32| good_rows.contains(&(slot / side as u32)) && good_columns.contains(&(slot % side as u32));
            let all: Vec<f32> = (0..(side * side) as u32)
                .map(|slot| if open(slot) { tucker.score(&rows, &columns, slot as usize) } else { f32::NEG_INFINITY })
                .collect();
            assert_eq!(tucker.best(&rows, &columns, k), top(&all, k), "seed {seed}");
        }
    }

    #[test]
    fn sums_of_product_keys_are_a_special_case() {
        // s = [s1, 1], t = [1, s2] and C = I give s1 + s2.
        let (side, k) = (9, 4);
        let (s1, s2, ones) = (numbers(1, side), numbers(2, side), vec![1.0; side]);
        let (rows, columns) = ([&s1[..], &ones], [&ones[..], &s2]);
        let cores = [1.0, 0.0, 0.0, 1.0];
        // The sides are ranked by what differs between their keys.
        let tucker = Tucker { rank: 2, side, cores: &cores, sides: &[1.0, 0.0, 0.0, 1.0] };
        let sums: Vec<f32> = s1.iter().flat_map(|row| s2.iter().map(move |column| row + column)).collect();
        assert_eq!(tucker.best(&rows, &columns, k), top(&sums, k));
    }

    #[test]
    fn singular_vectors_are_found_and_keep_their_sign() {
        let (u, v) = ([0.6, 0.8], [0.8, -0.6]);
        let matrix: Vec<f64> =
            (0..4).map(|i| 3.0 * u[i / 2] * v[i % 2] + 0.5 * [-0.8, 0.6][i / 2] * [0.6, 0.8][i % 2]).collect();
        let pair = leading_pair(&matrix, &[0.0; 4]);
        for (found, expected) in pair.iter().zip([0.6, 0.8, 0.8, -0.6]) {
            assert!((found - expected).abs() < 1e-9, "{pair:?}");
        }
        let turned: Vec<f64> = pair.iter().map(|value| -value).collect();
        let mut last = turned.clone();
        let mut matrix = matrix;
        for step in 0..100 {
            matrix.iter_mut().enumerate().for_each(|(i, value)| *value += 0.01 * f64::from(number(step * 4 + i)));
            let next = leading_pair(&matrix, &last);
            let moved: f64 = next.iter().zip(&last).map(|(a, b)| (a - b).abs()).sum();
            assert!(moved < 0.2, "step {step}: {last:?} to {next:?}");
            last = next;
        }
        // The other sign proposes the slots whose both scores are negative.
        let (rows, columns) = (numbers(3, 8), numbers(4, 8));
        let best =
            |sides: [f32; 2]| Tucker { rank: 1, side: 8, cores: &[1.0], sides: &sides }.best(&[&rows], &[&columns], 2);
        assert_ne!(best([1.0, 1.0]), best([-1.0, -1.0]));
    }
}

//! k-means on inner products.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::context::Gram;

/// Most rounds of a run.
const ROUNDS: usize = 100;

/// What a center is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Center {
    /// The mean; distance is squared Euclidean.
    Mean,
    /// The direction of the mean of unit vectors; distance is 1 - cosine.
    Direction,
}

/// k-means++ with restarts on points given by their inner products; labels `[n]` of the run with the smallest cost, all
/// of `clusters` used. Ties and random choices go by the order of the points.
pub(super) fn kmeans(gram: &Gram, clusters: usize, center: Center, seed: u64, restarts: usize) -> Vec<usize> {
    let normalized;
    let gram = match center {
        Center::Mean => gram,
        Center::Direction => {
            normalized = gram.normalized();
            &normalized
        }
    };
    let mut best: Option<(f64, Vec<usize>)> = None;
    for run in 0..restarts.max(1) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(run as u64);
        let labels = lloyd(gram, clusters, center, plus_plus(gram, clusters, &mut rng));
        let cost = cost(gram, clusters, center, &labels);
        if best.as_ref().is_none_or(|(least, _)| cost < *least) {
            best = Some((cost, labels));
        }
    }
    best.map(|(_, labels)| labels).unwrap_or_default()
}

/// Seeds: the first at random, each next with probability proportional to its squared distance from the nearest one so
/// far.
fn plus_plus(gram: &Gram, clusters: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let n = gram.count;
    let mut seeds = vec![rng.random_range(0..n)];
    let mut nearest: Vec<f64> = (0..n).map(|i| gram.distance(i, seeds[0]).powi(2)).collect();
    while seeds.len() < clusters.min(n) {
        let total: f64 = (0..n).filter(|i| !seeds.contains(i)).map(|i| nearest[i]).sum();
        let mut left = rng.random_range(0.0..1.0) * total;
        let mut chosen = None;
        for i in (0..n).filter(|i| !seeds.contains(i)) {
            // The last one left takes what rounding leaves over.
            chosen = Some(i);
            left -= nearest[i];
            if left < 0.0 {
                break;
            }
        }
        let Some(seed) = chosen else { break };
        seeds.push(seed);
        nearest.iter_mut().enumerate().for_each(|(i, d)| *d = d.min(gram.distance(i, seed).powi(2)));
    }
    seeds
}

/// Squared distance of every point from every center `[n, clusters]`; infinite from one without points.
fn distances(gram: &Gram, clusters: usize, center: Center, labels: &[usize]) -> Vec<f64> {
    let n = gram.count;
    let mut sums = vec![0.0; n * clusters];
    let mut sizes = vec![0.0f64; clusters];
    for (j, label) in labels.iter().enumerate() {
        sizes[*label] += 1.0;
        (0..n).for_each(|i| sums[i * clusters + label] += gram.at(i, j));
    }
    let mut squares = vec![0.0; clusters];
    labels.iter().enumerate().for_each(|(i, label)| squares[*label] += sums[i * clusters + label]);
    let distance = |i: usize, c: usize| match (sizes[c], center) {
        (0.0, _) => f64::INFINITY,
        (size, Center::Mean) => {
            (gram.at(i, i) - 2.0 * sums[i * clusters + c] / size + squares[c] / (size * size)).max(0.0)
        }
        (_, Center::Direction) if squares[c] > 0.0 => 1.0 - sums[i * clusters + c] / squares[c].sqrt(),
        (_, Center::Direction) => 1.0,
    };
    (0..n * clusters).map(|k| distance(k / clusters, k % clusters)).collect()
}

fn lloyd(gram: &Gram, clusters: usize, center: Center, seeds: Vec<usize>) -> Vec<usize> {
    let n = gram.count;
    let nearest_seed = |i: usize| {
        let mut best = 0;
        (1..seeds.len()).for_each(|c| {
            if gram.distance(i, seeds[c]) < gram.distance(i, seeds[best]) {
                best = c;
            }
        });
        seeds.iter().position(|seed| *seed == i).unwrap_or(best)
    };
    let mut labels: Vec<usize> = (0..n).map(nearest_seed).collect();
    for _ in 0..ROUNDS {
        let distances = distances(gram, clusters, center, &labels);
        let mut next: Vec<usize> = (0..n)
            .map(|i| {
                let row = &distances[i * clusters..(i + 1) * clusters];
                // A point moves for a strictly better center only, so that the loop ends.
                let mut best = labels[i];
                (0..clusters).for_each(|c| {
                    if row[c] < row[best] {
                        best = c;
                    }
                });
                best
            })
            .collect();
        fill_empty(&mut next, clusters, &distances);
        if next == labels {
            break;
        }
        labels = next;
    }
    labels
}

/// Gives every cluster without points the point that is farthest from its own center, out of a cluster of several.
fn fill_empty(labels: &mut [usize], clusters: usize, distances: &[f64]) {
    for empty in 0..clusters {
        if labels.contains(&empty) {
            continue;
        }
        let size = |labels: &[usize], label: usize| labels.iter().filter(|l| **l == label).count();
        let own = |i: usize| distances[i * clusters + labels[i]];
        let candidates = (0..labels.len()).filter(|i| size(labels, labels[*i]) > 1);
        let farthest = candidates.max_by(|a, b| own(*a).total_cmp(&own(*b)).then(b.cmp(a)));
        if let Some(point) = farthest {
            labels[point] = empty;
        }
    }
}

fn cost(gram: &Gram, clusters: usize, center: Center, labels: &[usize]) -> f64 {
    let distances = distances(gram, clusters, center, labels);
    labels.iter().enumerate().map(|(i, label)| distances[i * clusters + label]).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_far_apart_are_found_and_all_are_used() {
        let points: Vec<f64> = [0.0, 0.1, 0.2, 10.0, 10.1, 50.0].iter().flat_map(|x| [*x, 1.0]).collect();
        let gram = Gram::of_vectors(&points, 6);
        for seed in 0..20 {
            let labels = kmeans(&gram, 3, Center::Mean, seed, 4);
            assert!(labels[0] == labels[1] && labels[1] == labels[2] && labels[3] == labels[4], "{labels:?}");
            assert!(labels[0] != labels[3] && labels[5] != labels[0] && labels[5] != labels[3]);
            assert_eq!(labels, kmeans(&gram, 3, Center::Mean, seed, 4));
        }
        // As many clusters as points, some of which coincide.
        let same = Gram::of_vectors(&[1.0, 1.0, 1.0, 2.0], 4);
        let mut labels = kmeans(&same, 4, Center::Mean, 1, 1);
        labels.sort_unstable();
        assert_eq!(labels, [0, 1, 2, 3]);
    }

    #[test]
    fn directions_ignore_lengths() {
        let points = [1.0, 0.0, 100.0, 1.0, 0.0, 2.0, 0.1, 30.0];
        let labels = kmeans(&Gram::of_vectors(&points, 4), 2, Center::Direction, 3, 4);
        assert!(labels[0] == labels[1] && labels[2] == labels[3] && labels[0] != labels[2], "{labels:?}");
    }
}

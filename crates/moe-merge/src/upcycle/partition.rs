//! Which units of a dense network go where.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::linalg::{normalize_rows, row_products};

/// Rounds of balanced k-means.
const ROUNDS: usize = 10;

/// The units of a network, and where they go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Partition {
    /// Units that every token runs through.
    pub shared: Vec<u32>,
    /// Units of each part, equally many. Parts of domains overlap, others do not.
    pub parts: Vec<Vec<u32>>,
}

impl Partition {
    /// The first `shared` units, and the others in order.
    pub fn contiguous(width: usize, shared: usize, parts: usize) -> Self {
        let size = (width - shared) / parts;
        let part = |part: usize| ((shared + part * size) as u32..(shared + (part + 1) * size) as u32).collect();
        Self { shared: (0..shared as u32).collect(), parts: (0..parts).map(part).collect() }
    }

    /// For each domain the `width` units that are most active on it, by `activity[domain][unit]`, beside `shared` units
    /// that all domains have: those whose rank is best in the domain where it is worst. With as many shared units as
    /// all domains' most active ones have in common, that is Read-ME's intersection of masks.
    pub fn of_domains(activity: &[Vec<f64>], shared: usize, width: usize) -> Self {
        let units = activity.first().map_or(0, Vec::len);
        let order = |of: &Vec<f64>| -> Vec<u32> {
            let mut order: Vec<u32> = (0..units as u32).collect();
            order.sort_by(|a, b| of[*b as usize].total_cmp(&of[*a as usize]).then(a.cmp(b)));
            order
        };
        let orders: Vec<Vec<u32>> = activity.iter().map(order).collect();
        let mut worst = vec![0; units];
        for order in &orders {
            order.iter().enumerate().for_each(|(rank, unit)| worst[*unit as usize] = rank.max(worst[*unit as usize]));
        }
        let mut common: Vec<u32> = (0..units as u32).collect();
        common.sort_by_key(|unit| (worst[*unit as usize], *unit));
        common.truncate(shared);
        common.sort_unstable();
        let part = |order: &Vec<u32>| {
            let own = order.iter().copied().filter(|unit| common.binary_search(unit).is_err());
            let mut own: Vec<u32> = own.take(width).collect();
            own.sort_unstable();
            own
        };
        let parts = orders.iter().map(part).collect();
        Self { shared: common, parts }
    }

    /// Parts of units whose features `[width, columns]` have near directions. `activity` ranks units for the shared
    /// part, highest first; without it the first units are shared.
    pub fn clustered(
        mut features: Vec<f32>,
        columns: usize,
        activity: Option<&[f64]>,
        (shared, parts): (usize, usize),
        seed: u64,
    ) -> Self {
        normalize_rows(&mut features, columns);
        let width = features.len() / columns;
        let mut order: Vec<u32> = (0..width as u32).collect();
        if let Some(activity) = activity {
            order.sort_by(|a, b| activity[*b as usize].total_cmp(&activity[*a as usize]).then(a.cmp(b)));
        }
        let (mut common, mut units) = (order[..shared].to_vec(), order[shared..].to_vec());
        common.sort_unstable();
        units.sort_unstable();
        let rows = |units: &[u32]| -> Vec<f32> {
            let row = |unit: &u32| &features[*unit as usize * columns..(*unit as usize + 1) * columns];
            units.iter().flat_map(row).copied().collect()
        };
        let labels = balanced(&rows(&units), columns, parts, seed);
        let part = |part: usize| (0..units.len()).filter(|i| labels[*i] == part).map(|i| units[i]).collect();
        Self { shared: common, parts: (0..parts).map(part).collect() }
    }
}

/// Labels `[n]` of clusters of equal sizes of rows of unit length: k-means whose assignments go by descending cosine as
/// long as a cluster has room.
fn balanced(rows: &[f32], columns: usize, clusters: usize, seed: u64) -> Vec<usize> {
    let n = rows.len() / columns;
    let size = n / clusters;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let row = |i: usize| &rows[i * columns..(i + 1) * columns];
    // Seeds far from each other: each next one is the row least like those before.
    let mut centers = row(random.random_range(0..n)).to_vec();
    let mut nearest = vec![f32::NEG_INFINITY; n];
    while centers.len() < clusters * columns {
        let last = &centers[centers.len() - columns..];
        let likeness = row_products(rows, last, columns);
        nearest.iter_mut().zip(likeness).for_each(|(nearest, now)| *nearest = nearest.max(now));
        let farthest = (0..n).min_by(|a, b| nearest[*a].total_cmp(&nearest[*b])).unwrap_or(0);
        centers.extend_from_slice(row(farthest));
    }
    let mut labels = vec![0; n];
    for _ in 0..ROUNDS {
        let likeness = row_products(rows, &centers, columns); // [n, clusters]
        let mut order: Vec<usize> = (0..n * clusters).collect();
        order.sort_by(|a, b| likeness[*b].total_cmp(&likeness[*a]).then(a.cmp(b)));
        let (mut found, mut room) = (vec![usize::MAX; n], vec![size; clusters]);
        for pair in order {
            let (i, cluster) = (pair / clusters, pair % clusters);
            if found[i] == usize::MAX && room[cluster] > 0 {
                (found[i], room[cluster]) = (cluster, room[cluster] - 1);
            }
        }
        let settled = found == labels;
        labels = found;
        if settled {
            break;
        }
        centers.fill(0.0);
        for (i, label) in labels.iter().enumerate() {
            let center = &mut centers[label * columns..(label + 1) * columns];
            center.iter_mut().zip(row(i)).for_each(|(center, value)| *center += value);
        }
        normalize_rows(&mut centers, columns);
    }
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planted_clusters_are_found_and_all_parts_are_of_one_size() {
        // Unit i points to axis i % 3.
        let features: Vec<f32> =
            (0..24).flat_map(|i| (0..3).map(move |c| if i % 3 == c { 1.0 } else { 0.05 })).collect();
        let found = Partition::clustered(features, 3, None, (0, 3), 7);
        for part in &found.parts {
            assert_eq!(part.len(), 8);
            assert!(part.iter().all(|unit| unit % 3 == part[0] % 3), "{part:?}");
        }
    }

    #[test]
    fn domains_share_what_all_of_them_use_and_overlap_where_two_do() {
        // Unit 0 is used most by both; 1 and 2 by both or one of them, 3 by the first, 4 by the second, 5 by none.
        let activity = [vec![9.0, 8.0, 7.0, 6.0, 0.1, 0.0], vec![9.0, 8.0, 0.2, 0.1, 7.0, 0.0]];
        let found = Partition::of_domains(&activity, 1, 3);
        assert_eq!((found.shared, found.parts), (vec![0], vec![vec![1, 2, 3], vec![1, 2, 4]]));
        // Masks of three units have units 0 and 1 in common.
        let found = Partition::of_domains(&activity, 2, 1);
        assert_eq!((found.shared, found.parts), (vec![0, 1], vec![vec![2], vec![4]]));
    }

    #[test]
    fn the_most_active_units_are_shared() {
        let activity: Vec<f64> = (0..8).map(|i| f64::from((i * 5) % 8)).collect();
        let features = (0..16).map(|i| i as f32 + 1.0).collect();
        let found = Partition::clustered(features, 2, Some(&activity), (2, 3), 0);
        assert_eq!(found.shared, [3, 6]); // activities 7 and 6
        let mut all: Vec<u32> = found.parts.concat();
        all.extend(&found.shared);
        all.sort_unstable();
        assert_eq!(all, (0..8).collect::<Vec<u32>>());
    }
}

//! Ranks of experts.

use serde::{Deserialize, Serialize};

/// How the rank of a [`Compression`](super::Compression) is shared out over the stored sets of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ranks {
    /// All have it.
    #[default]
    Same,
    /// It is the mean: ranks are in proportion to the importance of the experts, the sum of the Fisher scores of their
    /// units, at least 1 and at most what a matrix can have. The intra-expert decomposition of MoE-I² (arXiv
    /// 2411.01016).
    Importance,
}

/// Ranks in proportion to `importance`, between 1 and `most` each, that sum to `mean` times their number as far as
/// these bounds allow; what is left over of whole numbers goes to the largest rests, the earlier first.
pub(super) fn shared_out(importance: &[f64], most: &[usize], mean: usize) -> Vec<usize> {
    let most: Vec<usize> = most.iter().map(|most| (*most).max(1)).collect();
    let total = (mean * importance.len()).clamp(importance.len(), most.iter().sum());
    let any = importance.iter().any(|weight| *weight > 0.0);
    let weight = |at: usize| if any { importance[at].max(0.0) } else { 1.0 };
    let at = |level: f64| (0..most.len()).map(move |i| (i, level));
    let share = |(i, level): (usize, f64)| (weight(i) * level).clamp(1.0, most[i] as f64);
    // What weighs nothing has a rank of 1, whatever is left.
    let reachable: f64 = (0..most.len()).map(|i| if weight(i) > 0.0 { most[i] as f64 } else { 1.0 }).sum();
    let wanted = (total as f64).min(reachable);
    let (mut below, mut above) = (0.0, 1.0);
    while at(above).map(share).sum::<f64>() < wanted && above < f64::MAX / 4.0 {
        above *= 2.0;
    }
    for _ in 0..200 {
        let middle = 0.5 * (below + above);
        if at(middle).map(share).sum::<f64>() < wanted { below = middle } else { above = middle }
    }
    let shares: Vec<f64> = at(above).map(share).collect();
    // An epsilon keeps 3.9999999 from becoming 3.
    let mut ranks: Vec<usize> = shares.iter().map(|share| (share + 1e-9).floor() as usize).collect();
    let mut order: Vec<usize> = (0..ranks.len()).filter(|i| ranks[*i] < most[*i] && weight(*i) > 0.0).collect();
    let rest = |i: &usize| shares[*i] - ranks[*i] as f64;
    order.sort_by(|a, b| rest(b).total_cmp(&rest(a)).then(a.cmp(b)));
    let missing = (wanted.round() as usize).saturating_sub(ranks.iter().sum());
    order.into_iter().take(missing).for_each(|i| ranks[i] += 1);
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_in_proportion_to_importance_between_one_and_what_there_is() {
        assert_eq!(shared_out(&[1.0, 2.0, 3.0], &[100; 3], 4), [2, 4, 6]);
        // The largest rest gets what whole numbers leave over.
        assert_eq!(shared_out(&[1.0, 1.0, 1.5], &[100; 3], 3), [3, 2, 4]);
        // One is at its bound, so that the others share the rest.
        assert_eq!(shared_out(&[1.0, 1.0, 8.0], &[100, 100, 6], 5), [5, 4, 6]);
        assert_eq!(shared_out(&[0.0, 1.0], &[8, 8], 4), [1, 7]);
        assert_eq!(shared_out(&[0.0, 0.0], &[8, 8], 4), [4, 4], "nothing is known: alike");
        assert_eq!(shared_out(&[1e-30, 1e-30], &[8, 8], 3), [3, 3]);
        assert_eq!(shared_out(&[1.0, 5.0], &[2, 2], 9), [2, 2], "no more than there is");
        assert_eq!(shared_out(&[], &[], 9), Vec::<usize>::new());
    }
}

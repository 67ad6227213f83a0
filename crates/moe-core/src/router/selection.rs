//! Which experts a token goes to: the largest scores, possibly of some groups of experts only.

/// Whole groups of consecutive experts are selected first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GroupLimit {
    /// Groups of equal size.
    pub count: usize,
    /// Groups that experts are selected from.
    pub top: usize,
    /// What a group is ranked by.
    pub rank: GroupRank,
}

/// What a group of experts is ranked by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GroupRank {
    /// Its largest score (DeepSeek-V2, arXiv 2405.04434 section 2.2.2).
    Largest,
    /// The sum of its two largest scores (DeepSeek-V3, arXiv 2412.19437 section 2.1.2).
    TwoLargest,
}

/// The `selected.len()` largest of `scores`, best first, and their values. The lower index wins a tie.
pub(super) fn largest(scores: &[f32], selected: &mut [u32], values: &mut [f32]) {
    // insertion into a short sorted list; strict comparison keeps the lower index on a tie
    let mut found = 0;
    for (e, &score) in scores.iter().enumerate() {
        let mut at = found;
        while at > 0 && score > values[at - 1] {
            at -= 1;
        }
        if at >= selected.len() {
            continue;
        }
        found = (found + 1).min(selected.len());
        for i in (at + 1..found).rev() {
            selected[i] = selected[i - 1];
            values[i] = values[i - 1];
        }
        selected[at] = e as u32;
        values[at] = score;
    }
}

impl GroupLimit {
    /// Lowers the scores of experts outside the best groups to minus infinity.
    pub(super) fn apply(&self, scores: &mut [f32]) {
        let size = scores.len() / self.count.max(1);
        if self.top >= self.count || size == 0 {
            return;
        }
        let ranks: Vec<f32> = scores.chunks_exact(size).map(|group| self.rank.of(group)).collect();
        for (g, group) in scores.chunks_exact_mut(size).enumerate() {
            // the lower group wins a tie
            let before = ranks.iter().enumerate().filter(|&(other, r)| *r > ranks[g] || (*r == ranks[g] && other < g));
            if before.count() >= self.top {
                group.fill(f32::NEG_INFINITY);
            }
        }
    }
}

impl GroupRank {
    fn of(self, group: &[f32]) -> f32 {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &score in group {
            if score > first {
                (first, second) = (score, first);
            } else if score > second {
                second = score;
            }
        }
        match self {
            Self::TwoLargest if group.len() > 1 => first + second,
            _ => first,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_largest_and_breaks_ties_by_index() {
        let (mut selected, mut values) = ([0; 3], [0.0; 3]);
        largest(&[0.0, 2.0, 3.0, 2.0, 2.0], &mut selected, &mut values);
        assert_eq!((selected, values), ([2, 1, 3], [3.0, 2.0, 2.0]));
    }

    #[test]
    fn groups_are_ranked_by_their_best_or_their_two_best() {
        let scores = [0.9, 0.0, 0.6, 0.5, 0.1, 0.2];
        let masked = |rank, top| {
            let mut scores = scores;
            GroupLimit { count: 3, top, rank }.apply(&mut scores);
            scores.map(f32::is_finite)
        };
        assert_eq!(masked(GroupRank::Largest, 1), [true, true, false, false, false, false]);
        assert_eq!(masked(GroupRank::TwoLargest, 1), [false, false, true, true, false, false]);
        assert_eq!(masked(GroupRank::TwoLargest, 2), [true, true, true, true, false, false]);
        assert_eq!(masked(GroupRank::Largest, 3), [true; 6]);
    }
}

//! Choosing one option of every group within a budget.

/// One option of a group: what it costs and the distortion it leaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Cost, in whole units of the budget.
    pub cost: usize,
    /// Distortion; not NaN.
    pub distortion: f64,
}

/// The choice of one option per group with the least sum of distortions whose costs sum to no more than `budget`; among
/// equal sums the one that spends most: a dynamic program over whole units, exact where distortions of groups add.
/// `None` if even the cheapest options cost more.
///
/// `f_l[b] = min over options of group l of f_{l-1}[b - cost] + distortion`, in `groups * budget * options` steps. Ties
/// go to the earlier option of the later group.
///
/// ```
/// use moe_checkpoint::{Choice, knapsack};
///
/// let option = |(cost, distortion)| Choice { cost, distortion };
/// let groups = [[(2, 0.0), (1, 5.0), (0, 8.0)], [(2, 0.0), (1, 1.0), (0, 9.0)]].map(|group| group.map(option).to_vec());
/// assert_eq!(knapsack(&groups, 3), Some(vec![0, 1]));
/// assert_eq!(knapsack(&groups, 2), Some(vec![1, 1]));
/// ```
pub fn knapsack(groups: &[Vec<Choice>], budget: usize) -> Option<Vec<usize>> {
    const NONE: u32 = u32::MAX;
    // Nothing beyond what all groups can cost together is ever reached.
    let most: usize = groups.iter().map(|group| group.iter().map(|choice| choice.cost).max().unwrap_or(0)).sum();
    let budget = budget.min(most);
    let mut least = vec![f64::INFINITY; budget + 1];
    least[0] = 0.0;
    let mut chosen: Vec<Vec<u32>> = Vec::with_capacity(groups.len());
    for group in groups {
        let mut next = vec![f64::INFINITY; budget + 1];
        let mut choice_of = vec![NONE; budget + 1];
        for (index, choice) in group.iter().enumerate() {
            for spent in choice.cost..=budget {
                let total = least[spent - choice.cost] + choice.distortion;
                // The first of unreachable sums stays unreachable: infinity is not below infinity.
                if total < next[spent] {
                    next[spent] = total;
                    choice_of[spent] = index as u32;
                }
            }
        }
        least = next;
        chosen.push(choice_of);
    }
    // Of equal ones, the first is the one that spends most.
    let least_of = |best: usize, spent: usize| if least[spent] < least[best] { spent } else { best };
    let mut spent = (0..=budget).rev().reduce(least_of).filter(|spent| least[*spent] < f64::INFINITY)?;
    let mut choices = vec![0; groups.len()];
    for (group, choice_of) in chosen.iter().enumerate().rev() {
        let index = choice_of[spent] as usize;
        choices[group] = index;
        spent -= groups[group][index].cost;
    }
    Some(choices)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The best of all combinations: least distortion, then most spent.
    fn brute_force(groups: &[Vec<Choice>], budget: usize) -> Option<(usize, f64)> {
        let mut best: Option<(usize, f64)> = None;
        let mut index = vec![0; groups.len()];
        loop {
            let picked = || index.iter().zip(groups).map(|(i, group)| group[*i]);
            let (cost, distortion) =
                (picked().map(|c| c.cost).sum::<usize>(), picked().map(|c| c.distortion).sum::<f64>());
            if cost <= budget && best.is_none_or(|(c, d)| distortion < d || (distortion == d && cost > c)) {
                best = Some((cost, distortion));
            }
            let mut group = 0;
            loop {
                if group == groups.len() {
                    return best;
                }
                index[group] += 1;
                if index[group] < groups[group].len() {
                    break;
                }
                index[group] = 0;
                group += 1;
            }
        }
    }

    proptest! {
        #[test]
        fn equals_brute_force_on_four_groups_of_six(
            options in prop::collection::vec(prop::collection::vec((0usize..7, 0u8..20), 6), 4),
            budget in 0usize..26,
        ) {
            let groups: Vec<Vec<Choice>> = options
                .iter()
                .map(|g| g.iter().map(|(cost, d)| Choice { cost: *cost, distortion: f64::from(*d) }).collect())
                .collect();
            let found = knapsack(&groups, budget).map(|choices| {
                let picked = || choices.iter().zip(&groups).map(|(i, group)| group[*i]);
                (picked().map(|c| c.cost).sum::<usize>(), picked().map(|c| c.distortion).sum::<f64>())
            });
            prop_assert_eq!(found, brute_force(&groups, budget));
        }
    }

    #[test]
    fn less_is_spent_where_that_distorts_less() {
        let group = |options: [(usize, f64); 2]| options.map(|(cost, distortion)| Choice { cost, distortion }).to_vec();
        let groups = [group([(0, 10.0), (2, 0.0)]), group([(0, 5.0), (3, 4.9)])];
        // 0 + 5 for a cost of 2, not 10 + 4.9 for a cost of 3.
        assert_eq!(knapsack(&groups, 3), Some(vec![1, 0]));
        assert_eq!(knapsack(&groups, 5), Some(vec![1, 1]));
        // Of equal distortions, the dearer.
        let equal = [group([(0, 1.0), (2, 1.0)])];
        assert_eq!(knapsack(&equal, 2), Some(vec![1]));
    }

    #[test]
    fn nothing_fits() {
        assert_eq!(knapsack(&[vec![Choice { cost: 2, distortion: 0.0 }]], 1), None);
        assert_eq!(knapsack(&[], 5), Some(vec![]));
    }
}

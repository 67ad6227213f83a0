//! How many groups each layer gets.

use serde::{Deserialize, Serialize};

use crate::importance::ranked;
use crate::{Error, Result};

/// How many groups of experts are left.
///
/// ```
/// use moe_merge::{Amount, GroupBudget, Scope};
///
/// let budget: GroupBudget = serde_json::from_str(r#"{"amount": {"ratio": 0.25}, "scope": "layer"}"#).unwrap();
/// assert_eq!(budget, GroupBudget::new(Amount::Ratio(0.25), Scope::Layer));
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupBudget {
    /// How many.
    pub amount: Amount,
    /// What the budget is shared over.
    #[serde(default)]
    pub scope: Scope,
    /// Decoder layers that stay as they are; they do not count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<usize>,
}

/// Groups per layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Amount {
    /// Fraction of the experts that go, in [0, 1): a layer of E experts has `E - floor(E * ratio)` groups.
    Ratio(f64),
    /// Groups per layer, on average over the scope.
    Groups(usize),
}

/// What a budget is shared over. Within a scope, experts of all its layers compete by their importance as a share of
/// their layer's; every layer keeps its most important expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// As many groups in each layer.
    #[default]
    Layer,
    /// Pairs of neighboring MoE layers share (Sub-MoE); a last layer without a partner stands alone.
    Pair,
    /// All layers share (M-SMoE).
    Model,
}

/// A layer as a budget sees it.
#[derive(Clone, Debug)]
pub(crate) struct LayerShare {
    pub layer: usize,
    /// Importance `[E]`.
    pub importance: Vec<f64>,
    /// Experts that keep a group of their own `[E]`.
    pub protected: Vec<bool>,
}

impl GroupBudget {
    /// A budget that excludes no layer.
    pub fn new(amount: Amount, scope: Scope) -> Self {
        Self { amount, scope, exclude: Vec::new() }
    }

    /// Checks the amount by itself.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a ratio outside [0, 1) or no groups.
    pub fn validate(&self) -> Result<()> {
        match self.amount {
            Amount::Ratio(ratio) if !(0.0..1.0).contains(&ratio) => {
                Err(Error::parameter("budget.amount.ratio", ratio, "a number in [0, 1)"))
            }
            Amount::Groups(0) => Err(Error::parameter("budget.amount.groups", 0, "at least 1")),
            _ => Ok(()),
        }
    }

    /// Groups of a layer of `experts` experts, before any sharing.
    pub(crate) fn of_layer(&self, experts: usize) -> usize {
        match self.amount {
            Amount::Ratio(ratio) => experts - ((experts as f64 * ratio).floor() as usize).min(experts),
            Amount::Groups(groups) => groups.min(experts),
        }
    }

    /// Groups of every layer. Their sum is exactly that of [`GroupBudget::of_layer`].
    ///
    /// With [`Scope::Model`] this is M-SMoE's rule (arXiv 2310.01334, as its code has it): usage of all layers in one
    /// list, the most used expert of each layer first of all, the largest win. Its threshold loses ties; here ties go
    /// to the lower layer, then the lower expert, so that the budget is met to the expert.
    ///
    /// # Errors
    /// [`Error::Infeasible`] where protected experts, or one group per layer, take more than there is.
    pub(crate) fn counts(&self, layers: &[LayerShare]) -> Result<Vec<usize>> {
        self.validate()?;
        if let Some(layer) = self.exclude.iter().find(|layer| !layers.iter().any(|share| share.layer == **layer)) {
            let known: Vec<usize> = layers.iter().map(|share| share.layer).collect();
            return Err(Error::parameter("budget.exclude", layer, format!("one of the MoE layers {known:?}")));
        }
        let mut counts: Vec<usize> = layers.iter().map(|share| share.importance.len()).collect();
        let merged: Vec<usize> = (0..layers.len()).filter(|at| !self.exclude.contains(&layers[*at].layer)).collect();
        let pool = match self.scope {
            Scope::Layer => 1,
            Scope::Pair => 2,
            Scope::Model => merged.len().max(1),
        };
        for pool in merged.chunks(pool) {
            let total: usize = pool.iter().map(|at| self.of_layer(counts[*at])).sum();
            for (at, count) in pool.iter().zip(share(pool, layers, total)?) {
                counts[*at] = count;
            }
        }
        Ok(counts)
    }
}

/// Distributes `total` groups over the layers at these positions.
fn share(pool: &[usize], layers: &[LayerShare], total: usize) -> Result<Vec<usize>> {
    // (first of all, share of the layer, position in the pool, expert)
    let mut experts: Vec<(bool, f64, usize, usize)> = Vec::new();
    for (position, at) in pool.iter().enumerate() {
        let LayerShare { importance, protected, .. } = &layers[*at];
        let sum: f64 = importance.iter().sum();
        // One that may absorb others: protected experts do not.
        let first = ranked(importance).into_iter().find(|expert| !protected[*expert]);
        for (expert, value) in importance.iter().enumerate() {
            let share = if sum > 0.0 { value / sum } else { 0.0 };
            experts.push((protected[expert] || Some(expert) == first, share, position, expert));
        }
    }
    let needed = experts.iter().filter(|expert| expert.0).count();
    if needed > total {
        let numbers: Vec<usize> = pool.iter().map(|at| layers[*at].layer).collect();
        let reason =
            format!("the budget leaves {total} groups, but one group per layer and protected experts take {needed}");
        return Err(Error::infeasible(format!("layers {numbers:?}"), reason));
    }
    experts.sort_by(|a, b| b.0.cmp(&a.0).then(b.1.total_cmp(&a.1)).then(a.2.cmp(&b.2)).then(a.3.cmp(&b.3)));
    let mut counts = vec![0; pool.len()];
    experts.iter().take(total).for_each(|expert| counts[expert.2] += 1);
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(layer: usize, importance: &[f64]) -> LayerShare {
        LayerShare { layer, importance: importance.to_vec(), protected: vec![false; importance.len()] }
    }

    fn budget(amount: Amount, scope: Scope) -> GroupBudget {
        GroupBudget::new(amount, scope)
    }

    #[test]
    fn a_global_budget_goes_to_the_most_used_experts_of_the_model() {
        // Shares 0.7 0.1 0.1 0.1, 0.4 0.3 0.2 0.1, 0.25 each.
        let layers = [layer(0, &[7.0, 1.0, 1.0, 1.0]), layer(2, &[4.0, 3.0, 2.0, 1.0]), layer(3, &[1.0; 4])];
        let counts = |groups| budget(Amount::Groups(groups), Scope::Model).counts(&layers).unwrap();
        // Three survivors, then 0.3, then 0.25 three times: two of them.
        assert_eq!(counts(2), [1, 2, 3]);
        // Ties of 0.1 go to the lower layer.
        assert_eq!(counts(3), [2, 3, 4]);
        assert_eq!(counts(1), [1, 1, 1]);
        assert_eq!(counts(4), [4, 4, 4]);
        assert_eq!(budget(Amount::Groups(2), Scope::Layer).counts(&layers).unwrap(), [2, 2, 2]);
        // The first two share four, the last stands alone.
        assert_eq!(budget(Amount::Groups(2), Scope::Pair).counts(&layers).unwrap(), [1, 3, 2]);
        let excluded = GroupBudget { exclude: vec![0], ..budget(Amount::Groups(2), Scope::Model) };
        assert_eq!(excluded.counts(&layers).unwrap(), [4, 2, 2]);
        let unknown = GroupBudget { exclude: vec![1], ..budget(Amount::Groups(2), Scope::Model) };
        assert!(unknown.counts(&layers).unwrap_err().to_string().contains("[0, 2, 3]"));
    }

    #[test]
    fn the_total_is_exact_for_any_ratio() {
        let layers: Vec<LayerShare> =
            (0..5).map(|l| layer(l, &(0..7).map(|e| ((e * 5 + l * 3) % 6) as f64).collect::<Vec<_>>())).collect();
        for ratio in [0.0, 0.1, 0.25, 0.375, 0.5, 0.8] {
            for scope in [Scope::Layer, Scope::Pair, Scope::Model] {
                let budget = budget(Amount::Ratio(ratio), scope);
                let counts = budget.counts(&layers).unwrap();
                assert_eq!(counts.iter().sum::<usize>(), 5 * budget.of_layer(7), "{ratio} {scope:?}");
                assert!(counts.iter().all(|count| (1..=7).contains(count)));
            }
        }
        assert_eq!(budget(Amount::Ratio(0.375), Scope::Layer).of_layer(8), 5);
    }

    #[test]
    fn protected_experts_come_first_and_may_take_too_much() {
        let mut layers = [layer(0, &[0.9, 0.1, 0.0]), layer(1, &[0.5, 0.4, 0.1])];
        layers[0].protected = vec![false, true, true];
        let counts = |groups| budget(Amount::Groups(groups), Scope::Model).counts(&layers);
        assert_eq!(counts(2).unwrap(), [3, 1]);
        let message = counts(1).unwrap_err().to_string();
        assert!(message.contains("2 groups") && message.contains("take 4"), "{message}");
        for bad in [Amount::Ratio(1.0), Amount::Ratio(f64::NAN), Amount::Groups(0)] {
            assert!(budget(bad, Scope::Layer).counts(&layers).is_err());
        }
    }
}

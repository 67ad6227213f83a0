//! Routing of tokens to other numbers of experts than the model's, weighed as the model weighs them.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Routed, Router, Rule, Score, largest_logit, softmax_sum};
use crate::{
    error::{Error, Result},
    kernels::math,
};

/// How the weights of the experts of a token follow from their scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combine {
    /// As the model does it.
    #[default]
    Model,
    /// The scores over all experts as they are.
    Raw,
    /// The scores divided by the sum of those of the token's experts.
    Renorm,
}

impl Router {
    /// Experts per token, k.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// The same rule with `top_k` experts per token.
    pub fn with_top_k(&self, top_k: usize) -> Self {
        Self { top_k, ..self.clone() }
    }

    /// The same selection with weights that follow from the scores in this way.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for SparseMixer, whose weights are no shares of one distribution.
    pub fn with_combine(&self, combine: Combine) -> Result<Self> {
        let mut router = self.clone();
        match (&mut router.rule, combine) {
            (_, Combine::Model) => {}
            (Rule::Scores { renormalize, .. }, combine) => *renormalize = combine == Combine::Renorm,
            (Rule::Sparsemixer { .. }, _) => {
                let what =
                    "raw or renormalized weights with SparseMixer routing: every choice has a softmax of its own";
                return Err(Error::Unsupported(what.into()));
            }
        }
        Ok(router)
    }

    /// Whether the weights of a token's experts are divided by their sum.
    pub fn renormalizes(&self) -> bool {
        matches!(self.rule, Rule::Scores { renormalize: true, .. })
    }

    /// Experts that a token can go to at most, of `experts`: those of the groups that are selected.
    pub fn reachable(&self, experts: usize) -> usize {
        match self.rule {
            Rule::Scores { groups: Some(groups), .. } => experts / groups.count.max(1) * groups.top.min(groups.count),
            _ => experts,
        }
    }

    /// Share of every expert in the scores of a token with these logits `[E]`: their softmax; scores of each by itself
    /// divided by their sum.
    pub fn shares(&self, logits: &[f32], shares: &mut Vec<f64>) {
        shares.clear();
        match self.rule {
            Rule::Scores { score: score @ (Score::Sigmoid | Score::SqrtSoftplus), .. } => {
                shares.extend(logits.iter().map(|z| f64::from(score.of(*z))));
                let sum: f64 = shares.iter().sum();
                shares.iter_mut().for_each(|p| *p /= sum.max(f64::MIN_POSITIVE));
            }
            _ => {
                let max = largest_logit(logits);
                let sum = f64::from(softmax_sum(logits, max));
                shares.extend(logits.iter().map(|z| f64::from(math::exp(*z - max)) / sum));
            }
        }
    }

    /// Scores of every expert for a token with these logits `[E]`, before anything selects, scales or divides them:
    /// their softmax, or the score of each by itself.
    pub fn scores(&self, logits: &[f32]) -> Vec<f32> {
        match self.rule {
            Rule::Scores { score: score @ (Score::Sigmoid | Score::SqrtSoftplus), .. } => {
                logits.iter().map(|z| score.of(*z)).collect()
            }
            _ => {
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = logits.iter().map(|z| (z - max).exp()).sum();
                logits.iter().map(|z| (z - max).exp() / sum).collect()
            }
        }
    }

    /// Logits that have these [scores](Self::scores), of one softmax or of each by itself.
    pub fn logits_of(&self, scores: &[f64]) -> Vec<f32> {
        let logit = |p: &f64| match self.rule {
            Rule::Scores { score: Score::Sigmoid, .. } => (p.max(1e-30) / (1.0 - p).max(1e-12)).ln() as f32,
            // z with ln(1 + e^z) = p^2; for large ones nearly p^2 itself
            Rule::Scores { score: Score::SqrtSoftplus, .. } if *p > 5.0 => (p * p) as f32,
            Rule::Scores { score: Score::SqrtSoftplus, .. } => (p * p).exp_m1().max(1e-30).ln() as f32,
            _ => p.max(1e-30).ln() as f32,
        };
        scores.iter().map(logit).collect()
    }

    /// Gives the slots `[T, k]` that are `member`s the weights that the rule gives to these experts of a token alone,
    /// and the others 0. Where all are members, that is what [`route`](Self::route) gives, bit for bit.
    pub fn weigh_members(&self, logits: &[f32], routed: &mut Routed, member: impl Fn(usize) -> bool + Sync) {
        let (experts, k) = (routed.experts, routed.top_k);
        if k == 0 {
            return;
        }
        let tokens =
            routed.weights.par_chunks_mut(k).zip(routed.selected.par_chunks(k)).zip(logits.par_chunks(experts));
        tokens.enumerate().with_min_len(64).for_each_init(
            || (Vec::new(), Vec::new()),
            |(chosen, found), (t, ((weights, selected), logits))| {
                let is = |slot: &usize| member(t * k + slot);
                chosen.clear();
                chosen.extend((0..k).filter(is).map(|slot| selected[slot]));
                found.clear();
                found.resize(chosen.len(), 0.0);
                if !chosen.is_empty() {
                    self.weigh(logits, chosen, found);
                }
                weights.fill(0.0);
                (0..k).filter(is).zip(found.iter()).for_each(|(slot, weight)| weights[slot] = *weight);
            },
        );
    }

    /// Gradient with respect to the logits of what [`weigh_members`](Self::weigh_members) gave: members are the slots
    /// with a weight.
    pub fn members_backward(&self, logits: &[f32], routed: &Routed, d_weights: &[f32]) -> Vec<f32> {
        let (experts, k) = (routed.experts, routed.top_k);
        let mut out = crate::kernels::zeros(logits.len());
        if k == 0 {
            return out;
        }
        let tokens = out.par_chunks_mut(experts).zip(logits.par_chunks(experts)).enumerate();
        tokens.with_min_len(64).for_each_init(
            || (Vec::new(), Vec::new(), Vec::new()),
            |(selected, weights, d), (t, (out, logits))| {
                selected.clear();
                weights.clear();
                d.clear();
                for slot in (t * k..(t + 1) * k).filter(|slot| routed.weights[*slot] != 0.0) {
                    selected.push(routed.selected[slot]);
                    weights.push(routed.weights[slot]);
                    d.push(d_weights[slot]);
                }
                if !selected.is_empty() {
                    self.token_backward(logits, selected, weights, d, out);
                }
            },
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use moe_checkpoint::{Routing, RoutingKind};

    use super::*;

    fn routers() -> Vec<Router> {
        let sigmoid = RoutingKind::Sigmoid { renormalize: true, correction_bias: false, groups: None };
        [
            RoutingKind::SoftmaxTopK { renormalize: false },
            RoutingKind::SoftmaxTopK { renormalize: true },
            RoutingKind::TopKSoftmax,
            sigmoid,
            RoutingKind::SqrtSoftplus,
            RoutingKind::Sparsemixer { jitter_eps: 0.01 },
        ]
        .map(|kind| Router::new(&Routing::new(2, kind)).unwrap())
        .to_vec()
    }

    fn logits() -> Vec<f32> {
        (0..40).map(|i| ((i * 37 % 23) as f32 - 11.0) * 0.21).collect()
    }

    #[test]
    fn logits_of_scores_have_these_scores() {
        let logits = [1.5f32, -2.0, 0.25, 3.0, 0.0, -0.5];
        for router in routers() {
            let scores = router.scores(&logits);
            let wanted: Vec<f64> = scores.iter().map(|p| f64::from(*p)).collect();
            let again = router.scores(&router.logits_of(&wanted));
            let far = again.iter().zip(&scores).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(far < 1e-6, "{again:?} {scores:?}");
        }
    }

    #[test]
    fn all_members_have_the_weights_of_the_rule_bit_for_bit() {
        for router in routers() {
            let routed = router.route(&logits(), 5, None);
            let mut again = Routed { weights: vec![9.0; routed.weights.len()], ..routed.clone() };
            router.weigh_members(&logits(), &mut again, |_| true);
            assert_eq!(again, routed);
            let d: Vec<f32> = (0..routed.weights.len()).map(|i| (i % 7) as f32 - 3.0).collect();
            assert_eq!(router.members_backward(&logits(), &routed, &d), router.backward(&logits(), &routed, &d));
        }
    }

    #[test]
    fn fewer_members_have_the_weights_of_fewer_experts_per_token() {
        for router in routers() {
            let mut some = router.with_top_k(4).route(&logits(), 5, None);
            router.weigh_members(&logits(), &mut some, |slot| slot % 4 < 2);
            let two = router.route(&logits(), 5, None);
            for (some, two) in some.weights.chunks(4).zip(two.weights.chunks(2)) {
                assert_eq!((&some[..2], &some[2..]), (two, &[0.0, 0.0][..]));
            }
        }
    }

    #[test]
    fn weights_are_combined_as_asked_for() {
        let sums = |router: &Router| -> Vec<f32> {
            router.route(&logits(), 5, None).weights.chunks(2).map(|w| w.iter().sum()).collect()
        };
        for router in &routers()[..5] {
            let renormalized = sums(&router.with_combine(Combine::Renorm).unwrap());
            assert!(renormalized.iter().all(|sum| (sum - 1.0).abs() < 1e-6), "{renormalized:?}");
        }
        let raw = routers()[1].with_combine(Combine::Raw).unwrap();
        assert_eq!(raw.route(&logits(), 5, None), routers()[0].route(&logits(), 5, None));
        assert!(routers()[5].with_combine(Combine::Raw).unwrap_err().to_string().contains("SparseMixer"));
        let mut shares = Vec::new();
        routers()[3].shares(&logits()[..5], &mut shares);
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }
}

//! How routed experts are selected and weighted.

use crate::{Error, Result};

/// How routed experts are selected and weighted.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// Experts per token.
    pub top_k: usize,
    /// From router logits to selected experts and weights.
    pub kind: RoutingKind,
    /// Factor on all weights.
    pub scale: f32,
    /// Whether a bias `[E]` is added to the router logits.
    pub bias: bool,
    /// Added to the sum that weights of [`RoutingKind::Sigmoid`] are divided by.
    pub norm_eps: f64,
    /// Whether weights multiply what an expert reads instead of what it gives.
    pub on_inputs: bool,
    /// Whether the router reads the residual stream through a norm of its own, whose weight is `H^-0.5` times what is
    /// stored.
    pub own_norm: bool,
    /// Whether the weight of every expert is multiplied by a factor of its own `[E]` at the end.
    pub expert_scales: bool,
}

impl Routing {
    /// What DeepSeek-V3 adds to the sum that weights are divided by, and most models since.
    pub const NORM_EPS: f64 = 1e-20;

    /// Routing to `top_k` experts per token, without a factor and without a bias.
    pub fn new(top_k: usize, kind: RoutingKind) -> Self {
        Self {
            top_k,
            kind,
            scale: 1.0,
            bias: false,
            norm_eps: Self::NORM_EPS,
            on_inputs: false,
            own_norm: false,
            expert_scales: false,
        }
    }

    /// Whether a learnt bias `[E]` takes part in the selection of experts, but not in their weights.
    pub fn correction_bias(&self) -> bool {
        match self.kind {
            RoutingKind::Sigmoid { correction_bias, .. } => correction_bias,
            RoutingKind::SoftmaxCorrected { .. } | RoutingKind::SqrtSoftplus => true,
            _ => false,
        }
    }

    /// Groups that experts are selected from, if there are any.
    pub fn groups(&self) -> Option<Groups> {
        match self.kind {
            RoutingKind::Sigmoid { groups, .. } => groups,
            RoutingKind::SoftmaxGroupTopK { groups } => Some(groups),
            _ => None,
        }
    }

    /// Checks that routing by groups still works with these of the `experts` of a layer, and their rows: as many left
    /// in every group, and enough of them in the selected groups. Routing without groups works with any.
    ///
    /// # Errors
    /// [`Error::BrokenRouting`] names the layer.
    pub fn check_kept(&self, layer: usize, experts: usize, kept: &[usize]) -> Result<()> {
        let Some(groups) = self.groups() else { return Ok(()) };
        let size = (experts / groups.count).max(1);
        let mut left = vec![0; groups.count];
        for expert in kept {
            left[(expert / size).min(groups.count - 1)] += 1;
        }
        let (first, top_k) = (left[0], self.top_k);
        let broken = |reason: String| Err(Error::BrokenRouting { layer, reason });
        if kept.len() < top_k {
            return broken(format!("{} experts are left, but the router selects {top_k}", kept.len()));
        }
        if left.iter().any(|count| *count != first) {
            return broken(format!(
                "its {} groups of experts would be left with {left:?}; routing by groups needs as many in each",
                groups.count
            ));
        }
        if groups.score == GroupScore::TopTwoSum && first < 2 {
            return broken(format!(
                "{first} expert of every group would be left, but groups are ranked by their two best"
            ));
        }
        if groups.top * first < top_k {
            return broken(format!("{} selected groups of {first} experts cannot give {top_k} per token", groups.top));
        }
        Ok(())
    }
}

/// From router logits to selected experts and their weights. [`Routing::scale`] multiplies the weights at the end.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RoutingKind {
    /// Softmax over all experts, then the `top_k` largest.
    SoftmaxTopK {
        /// Whether the selected weights are divided by their sum.
        renormalize: bool,
    },
    /// The `top_k` largest logits, then softmax over those.
    TopKSoftmax,
    /// Softmax over all experts, groups selected by [`Groups`], then the `top_k` largest within them (others count as
    /// 0). Weights are not divided by their sum. DeepSeek-V2's `group_limited_greedy`.
    SoftmaxGroupTopK {
        /// Groups that experts are selected from.
        groups: Groups,
    },
    /// Softmax over all experts; the `top_k` largest of softmax plus correction bias are selected; their softmax values
    /// are divided by `max(sum, norm_min)`, if there is a `norm_min`. Ernie 4.5, and LongCat-Flash without.
    SoftmaxCorrected {
        /// Smallest divisor; `None` where weights are not divided by their sum.
        norm_min: Option<f64>,
    },
    /// Sigmoid of every logit; selection by sigmoid plus correction bias, if there is one, within the selected groups,
    /// if there are any (experts of other groups are never selected).
    Sigmoid {
        /// Whether the selected weights are divided by their sum plus [`Routing::norm_eps`].
        renormalize: bool,
        /// Whether a learnt bias is added for the selection (not for the weights).
        correction_bias: bool,
        /// Whether whole groups of experts are selected first.
        groups: Option<Groups>,
    },
    /// `sqrt(ln(1 + e^z))` of every logit; selection by that plus a correction bias; the selected ones divided by their
    /// sum plus [`Routing::norm_eps`]. DeepSeek-V4.
    SqrtSoftplus,
    /// Two experts, one after the other (arXiv 2409.12136, at inference): the expert of the largest logit `m` first,
    /// weighted by the softmax over the experts with `(m - s) / max(|s|, m) <= 2 * jitter_eps`; then the same with that
    /// expert taken out of the maximum and the softmax.
    Sparsemixer {
        /// Half the relative distance from the maximum within which logits take part in the softmax.
        jitter_eps: f64,
    },
}

/// Group-limited selection: neighboring experts form `count` groups of equal size, of which the best `top` take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Groups of equal size.
    pub count: usize,
    /// Groups that experts are selected from.
    pub top: usize,
    /// What a group is ranked by.
    pub score: GroupScore,
}

/// What a group of experts is ranked by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupScore {
    /// Its largest value.
    Max,
    /// The sum of its two largest values.
    TopTwoSum,
}

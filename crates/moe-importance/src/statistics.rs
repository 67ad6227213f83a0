//! Named statistics: what collectors add to and scorers read.

use std::borrow::Cow;
use std::fmt;

use moe_checkpoint::{ArrayKind, Fold};
use serde::{Deserialize, Serialize};

/// Name of a statistic, such as `fisher.token`: the key under which collectors add and scorers read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StatisticId(Cow<'static, str>);

impl StatisticId {
    /// A fixed name.
    pub const fn new(name: &'static str) -> Self {
        Self(Cow::Borrowed(name))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for StatisticId {
    fn from(name: String) -> Self {
        Self(Cow::Owned(name))
    }
}

impl fmt::Display for StatisticId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A statistic that a collector adds to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatisticSpec {
    /// Its name.
    pub id: StatisticId,
    /// A value per unit, a value per expert or a vector per expert.
    pub kind: ArrayKind,
    /// How two waves become one.
    pub fold: Fold,
}

impl StatisticSpec {
    /// A sum with one value per unit.
    pub const fn unit_sum(id: StatisticId) -> Self {
        Self { id, kind: ArrayKind::Unit, fold: Fold::Sum }
    }

    /// A sum with one value per expert.
    pub const fn expert_sum(id: StatisticId) -> Self {
        Self { id, kind: ArrayKind::Expert, fold: Fold::Sum }
    }
}

/// Per expert, `sum_t <m_t, o_t> / (|y_t|^2 + 1e-6)`: what the expert adds to the residual stream, `o_t = g_t f_t`,
/// along what all routed experts of the token add, `m_t`, relative to the stream `y_t` after the layer.
pub const ATTRIBUTION: StatisticId = StatisticId::new("attribution.sum");
/// As [`ATTRIBUTION`], every coordinate of `m_t * o_t / (|y_t|^2 + 1e-6)` clipped within a wave to plus and minus the
/// 99% quantile of its size over the expert's tokens, where these are more than two.
pub const ATTRIBUTION_CLIPPED: StatisticId = StatisticId::new("attribution.clipped");
/// Per expert, `sum_t |o_t|^2 / (|y_t|^2 + 1e-6)`, as [`ATTRIBUTION`] has it.
pub const ATTRIBUTION_SQUARE: StatisticId = StatisticId::new("attribution.square");
/// Per expert, `sum_t <m_t, o_t> / |m_t|^2`, as [`ATTRIBUTION`] has it: its Shapley value in the game that a token's
/// experts play for the squared norm of what they add together, as a share.
pub const COALITION: StatisticId = StatisticId::new("coalition.share");
/// Per unit, the mean absolute gradient of its 3H weights, summed over sequences.
pub const FISHER_ABS: StatisticId = StatisticId::new("fisher.abs");
/// Per unit, the mean absolute gradient of its gate row, summed over sequences.
pub const FISHER_ABS_GATE: StatisticId = StatisticId::new("fisher.abs_gate");
/// Per unit, the mean absolute gradient of its up row, summed over sequences.
pub const FISHER_ABS_UP: StatisticId = StatisticId::new("fisher.abs_up");
/// Per unit, the mean absolute gradient of its down column, summed over sequences.
pub const FISHER_ABS_DOWN: StatisticId = StatisticId::new("fisher.abs_down");
/// Per unit, the squared gradients of its 3H weights, summed over sequences.
pub const FISHER_SEQUENCE: StatisticId = StatisticId::new("fisher.sequence");
/// `sum_t z_t[e] z_t[e']` of the router logits of all tokens, a matrix `[E, E]` per layer, as one vector of
/// [`Extent::Experts`](moe_checkpoint::Extent::Experts) per expert.
pub const LOGIT_GRAM: StatisticId = StatisticId::new("routing.logit_gram");
/// `sum_t g_t^2 x_t[h]^2` of the expert's input x, with the routing weight g as the model applies it: a vector of
/// [`Extent::Hidden`](moe_checkpoint::Extent::Hidden) per expert.
pub const INPUT_SQUARE_WEIGHTED: StatisticId = StatisticId::new("input.square_weighted");
/// `sum_t g_t^2 u_t[j]^2` with the routing weight g as the model applies it.
pub const UNIT_SQUARE_WEIGHTED: StatisticId = StatisticId::new("unit.square_weighted");
/// `sum_t |f_t|`.
pub const OUTPUT_NORM: StatisticId = StatisticId::new("output.norm");
/// `sum_t |f_t|^2`.
pub const OUTPUT_SQUARE: StatisticId = StatisticId::new("output.square");
/// `sum_t g_t |f_t|` with [`Gate::AsApplied`](crate::scorers::Gate::AsApplied).
pub const OUTPUT_APPLIED: StatisticId = StatisticId::new("output.norm_applied");
/// `sum_t g_t^2 |f_t|` with [`Gate::AsApplied`](crate::scorers::Gate::AsApplied).
pub const OUTPUT_APPLIED_SQUARE: StatisticId = StatisticId::new("output.norm_applied_square");
/// `sum_t g_t |f_t|` with [`Gate::Renormalized`](crate::scorers::Gate::Renormalized).
pub const OUTPUT_RENORMALIZED: StatisticId = StatisticId::new("output.norm_renormalized");
/// `sum_t g_t^2 |f_t|` with [`Gate::Renormalized`](crate::scorers::Gate::Renormalized).
pub const OUTPUT_RENORMALIZED_SQUARE: StatisticId = StatisticId::new("output.norm_renormalized_square");
/// `sum_t g_t |f_t|` with [`Gate::Softmax`](crate::scorers::Gate::Softmax).
pub const OUTPUT_SOFTMAX: StatisticId = StatisticId::new("output.norm_softmax");
/// `sum_t g_t^2 |f_t|` with [`Gate::Softmax`](crate::scorers::Gate::Softmax).
pub const OUTPUT_SOFTMAX_SQUARE: StatisticId = StatisticId::new("output.norm_softmax_square");
/// `sum_t g_t |f_t| (1 - cos(x_t, f_t))` with [`Gate::AsApplied`](crate::scorers::Gate::AsApplied) and the expert's
/// input x.
pub const OUTPUT_TURN: StatisticId = StatisticId::new("output.turn");
/// `max_t max_h |f_t[h]|`, folded by the larger one.
pub const OUTPUT_MAX: StatisticId = StatisticId::new("output.max");
/// `max |f_t[h]|` over the first routed token of each sequence only.
pub const OUTPUT_FIRST_MAX: StatisticId = StatisticId::new("output.first_max");
/// Count, mean `[H]` and summed squared deviations `[H]` of f, a vector of
/// [`Extent::Moments`](moe_checkpoint::Extent::Moments) per expert.
pub const OUTPUT_MOMENTS: StatisticId = StatisticId::new("output.moments");
/// `sum_t <c_tj, f_t> / |f_t|`.
pub const PROJECTION: StatisticId = StatisticId::new("projection.sum");
/// `sum_t g_t <c_tj, f_t> / |f_t|` with the routing weight g as the model applies it.
pub const PROJECTION_WEIGHTED: StatisticId = StatisticId::new("projection.weighted");
/// Per expert, the mean absolute gradient of its router row, summed over sequences.
pub const ROUTER_GRADIENT_ABS: StatisticId = StatisticId::new("router_gradient.abs");
/// Per expert, the summed squared gradients of its router row, summed over sequences.
pub const ROUTER_GRADIENT_SQUARE: StatisticId = StatisticId::new("router_gradient.square");
/// Per expert, the squared gradients of its router row `[H]`, summed over sequences.
pub const ROUTER_GRADIENT_SQUARES: StatisticId = StatisticId::new("router_gradient.squares");
/// Per expert, its softmax probability over *all* experts, summed over *all* tokens, routed to it or not: what the
/// router prefers, whatever the model makes of it (top-k, renormalization, sigmoid).
///
/// Source: the expert-drop baseline shipped with HectorHHZ/Less-is-MoE (arXiv 2606.05538).
pub const ROUTER_PROBABILITY: StatisticId = StatisticId::new("routing.probability");
/// Per expert, the sum over waves of the sign of its usage minus the mean usage of the layer's experts.
pub const BIAS_WAVE_MEAN: StatisticId = StatisticId::new("routing.bias_wave_mean");
/// As [`BIAS_WAVE_MEAN`], around the median usage.
pub const BIAS_WAVE_MEDIAN: StatisticId = StatisticId::new("routing.bias_wave_median");
/// As [`BIAS_WAVE_MEAN`], one sign per sequence.
pub const BIAS_SEQUENCE_MEAN: StatisticId = StatisticId::new("routing.bias_sequence_mean");
/// As [`BIAS_SEQUENCE_MEAN`], around the median usage.
pub const BIAS_SEQUENCE_MEDIAN: StatisticId = StatisticId::new("routing.bias_sequence_median");
/// Per expert, the number of tokens routed to it.
pub const ROUTED_TOKENS: StatisticId = StatisticId::new("routing.tokens");
/// Per expert, the sum of the routing weights, as the model applies them, over the tokens routed to it.
pub const ROUTING_WEIGHT: StatisticId = StatisticId::new("routing.weight");
/// Per expert, the sum of the routing weights over the tokens routed to it, before the factor that all weights of a
/// model carry (`routed_scaling_factor`).
pub const ROUTING_GATE: StatisticId = StatisticId::new("routing.gate");
/// Per expert, the sum of [`Gate::Renormalized`](crate::scorers::Gate::Renormalized) over the tokens routed to it.
pub const ROUTING_RENORMALIZED: StatisticId = StatisticId::new("routing.renormalized");
/// Per expert, the sum of [`Gate::Softmax`](crate::scorers::Gate::Softmax) over the tokens routed to it.
pub const ROUTING_SOFTMAX: StatisticId = StatisticId::new("routing.softmax");
/// Squared gradients of every token's contribution to a unit's 3H weights, one sample per token, exact:
///
/// `sum_t (dg_t[j]^2 + dv_t[j]^2) * |x_t|^2 + u_t[j]^2 * |d_t|^2`
///
/// with input `x_t`, gradients `dg_t`, `dv_t` at the gate and up pre-activations and `d_t` at the expert's output
/// (routing weight included). The gradient of one token with respect to a weight matrix is an outer product, so its
/// squares are products of squares and no weight gradient is formed.
///
/// Source: the squared-gradient criterion of "Less is MoE", arXiv 2606.05538, per token.
pub const FISHER_TOKEN: StatisticId = StatisticId::new("fisher.token");
/// `sum_t |u_t[j]|`.
pub const ACTIVATION_MAGNITUDE: StatisticId = StatisticId::new("activation.magnitude");
/// `sum_t g_t |u_t[j]|` with the routing weight g as the model applies it.
pub const ACTIVATION_WEIGHTED: StatisticId = StatisticId::new("activation.magnitude_weighted");
/// `sum_t g_t^2 |u_t[j]|`.
pub const ACTIVATION_SQUARE_WEIGHTED: StatisticId = StatisticId::new("activation.magnitude_square_weighted");
/// `sum_t u_t[j]^2`.
pub const ACTIVATION_SQUARE: StatisticId = StatisticId::new("activation.square");
/// `sum_t v_t[j]^2` of the gate pre-activation v of the unit.
pub const GATE_SQUARE: StatisticId = StatisticId::new("gate.square");
/// `sum_t v_t[j]^2` of the up pre-activation v of the unit.
pub const UP_SQUARE: StatisticId = StatisticId::new("up.square");
/// `sum_t du_t[j]^2`.
pub const GRADIENT_SQUARE: StatisticId = StatisticId::new("gradient.square");
/// `sum_t u_t[j] du_t[j]`.
pub const TAYLOR_SUM: StatisticId = StatisticId::new("taylor.sum");
/// `sum_t |u_t[j] du_t[j]|`.
pub const TAYLOR_MAGNITUDE: StatisticId = StatisticId::new("taylor.magnitude");
/// `sum_t (u_t[j] du_t[j])^2`.
pub const TAYLOR_SQUARE: StatisticId = StatisticId::new("taylor.square");

//! The feed-forward part of a decoder layer.

use std::borrow::Cow;

use crate::experts::ExpertBiases;

/// Activation of a gated FFN: how gate `g` and up `u` become a unit's value.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Activation {
    /// `silu(g) * u` with `silu(x) = x * sigmoid(x)`.
    Silu,
    /// `gelu(g) * u` with `gelu(x) = x * Phi(x)`, `Phi` the standard normal distribution (arXiv 1606.08415).
    Gelu,
    /// `gelu(g) * u` with the approximation `gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))`.
    GeluTanh,
    /// `relu(g) * u`.
    Relu,
    /// `min(silu(g), limit) * clamp(u, -limit, limit)`.
    BoundedSilu {
        /// The bound.
        limit: f64,
    },
    /// `silu(min(g, limit)) * clamp(u, -limit, limit)`, as in DeepSeek-V4.
    LimitedSilu {
        /// Bound of gate and up.
        limit: f64,
    },
    /// `g' * sigmoid(alpha * g') * (u' + 1)` with `g' = min(g, limit)` and `u' = clamp(u, -limit, limit)`, as in
    /// gpt-oss. A unit whose gate and up are zero still gives zero.
    ClampedSwiglu {
        /// Slope inside the sigmoid.
        alpha: f64,
        /// Bound of gate and up.
        limit: f64,
    },
}

impl Activation {
    /// The same with bounds, where there are some.
    pub fn bounded(self, limit: Option<f64>) -> Self {
        limit.map_or(self, |limit| Self::BoundedSilu { limit })
    }
}

/// Feed-forward part of a decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Ffn {
    /// One gated FFN for all tokens.
    Dense {
        /// Its width.
        intermediate_size: usize,
        /// Whether it has no gate; see [`MoeConfig::gateless`].
        gateless: bool,
    },
    /// Routed experts.
    Moe(MoeConfig),
    /// Nothing: the layer only looks at other tokens.
    None,
}

/// MoE block of a decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Intermediate width of every routed expert, `[E]`. Widths differ in a ragged checkpoint only.
    pub widths: Vec<usize>,
    /// Biases of every routed expert.
    pub biases: ExpertBiases,
    /// Whether experts have no gate of their own: files hold up and down alone, and the up projection is the gate, too.
    /// With [`Activation::Relu`] that is ReLU², `relu(u) u`. A unit is its up row and its down column; whatever asks
    /// for its gate row gets its up row.
    pub gateless: bool,
    /// The stored set of weights of every routed expert, `[E]`, in a grouped checkpoint: experts of one set share
    /// weights. Otherwise every expert has its own.
    pub sets: Option<Vec<u32>>,
    /// Expert that every token goes through.
    pub shared: Option<SharedExpert>,
    /// Bound of the units' factors; see [`Activation::BoundedSilu`].
    pub limit: Option<f64>,
    /// Whether a bias is added to the sum of what the experts give.
    pub output_bias: bool,
    /// Identity experts: the last rows of the router, which come after those of the routed experts. A token that goes
    /// to one gets back what it gave, times the routing weight. They have no weights and are no routed experts: nothing
    /// counts, prunes or merges them.
    pub identities: usize,
    /// Whether a table says which experts every token of the vocabulary goes to ([`LayerRole::ExpertTable`]), instead
    /// of its scores, which give the weights alone.
    ///
    /// [`LayerRole::ExpertTable`]: crate::LayerRole::ExpertTable
    pub by_table: bool,
    /// Whether what routed and identity experts give joins the residual stream at the end of the next layer instead of
    /// this one (a shortcut around the next layer), so that this layer gives on what its shared expert gives alone.
    pub shortcut: bool,
}

impl MoeConfig {
    /// Number of routed experts, `E`.
    pub fn num_experts(&self) -> usize {
        self.widths.len()
    }

    /// Rows of the router: one per routed expert, then one per identity expert.
    pub fn router_rows(&self) -> usize {
        self.num_experts() + self.identities
    }

    /// The stored set of weights of an expert; the expert itself outside grouped checkpoints.
    pub fn stored(&self, expert: usize) -> usize {
        self.sets.as_ref().and_then(|sets| sets.get(expert)).map_or(expert, |set| *set as usize)
    }

    /// Width of every stored set of weights: of every expert, or of fewer where experts share.
    pub fn stored_widths(&self) -> Cow<'_, [usize]> {
        let Some(sets) = &self.sets else { return Cow::Borrowed(&self.widths) };
        let mut widths = vec![0; sets.iter().max().map_or(0, |set| *set as usize + 1)];
        sets.iter().zip(&self.widths).for_each(|(set, width)| widths[*set as usize] = *width);
        Cow::Owned(widths)
    }
}

/// Expert that every token goes through. Families with several shared experts store them as one.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedExpert {
    /// Its width; that of all shared experts together where there are several.
    pub intermediate_size: usize,
    /// Whether its output is multiplied by `sigmoid(x · gate)`.
    pub gated: bool,
    /// Whether one matrix holds its gate and its up projection, the rows of gate first.
    pub packed: bool,
    /// Whether it is a block beside the experts, with norms of its own: `norm(shared(norm(x))) +
    /// norm(experts(norm(x)))`.
    pub apart: bool,
    /// Whether it has no gate; see [`MoeConfig::gateless`].
    pub gateless: bool,
    /// Whether its output and that of the routed experts together are averaged instead of added.
    pub averaged: bool,
    /// Bound of its units' factors; see [`Activation::BoundedSilu`].
    pub limit: Option<f64>,
}

impl SharedExpert {
    /// One of this width, without extras.
    pub fn new(intermediate_size: usize) -> Self {
        Self {
            intermediate_size,
            gated: false,
            packed: false,
            apart: false,
            gateless: false,
            averaged: false,
            limit: None,
        }
    }
}

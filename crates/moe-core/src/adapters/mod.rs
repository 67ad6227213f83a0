//! What is put in place of, or beside, the weights of a model, and what of it is trained.
//!
//! [`Adapters`] gives, for each [`Site`] of a model, a [`LinearAdapter`]: a low-rank addition, a mixture of them, a
//! weight that is trained itself. Sweeps, generation and evaluation run through them alike. In the backward sweep, if
//! an observer asks for [`Signals::parameters`](crate::trace::Signals::parameters), every adapter adds up the gradients
//! of its own parameters; the base weights it stands beside stay frozen in their stored form. Base weights nobody
//! adapts cost nothing more than in a plain sweep.
//!
//! Adapters are shared between threads: experts are computed side by side, but one adapter is never called twice at a
//! time, and always in the same order, so that sums of gradients are the same bits in every run.

mod routing;

use std::{fmt::Debug, ops::Range, sync::Arc};

use burn::tensor::Tensor;
use moe_checkpoint::Role;
pub use moe_checkpoint::{ExpertSite, LayerSite, Site};

pub use routing::{ExpertModulation, Modulation, RouterAdapter};

use crate::{experts::ExpertTensors, kernels::weight::Weight, trace::WaveInfo};

/// Which tokens of a wave the rows of a matrix are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tokens<'a> {
    /// All of them, or a run of them that begins at this one, in order. In generation, a batch of tokens counted
    /// from 0.
    From(usize),
    /// These, ascending.
    Rows(&'a [u32]),
}

impl Tokens<'_> {
    /// All tokens of a wave.
    pub const WAVE: Self = Self::From(0);

    /// The token of row `row`.
    pub fn token(&self, row: usize) -> usize {
        match self {
            Self::From(first) => first + row,
            Self::Rows(rows) => rows[row] as usize,
        }
    }
}

/// What is wanted of a backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The gradient with respect to the input.
    pub input: bool,
    /// The gradients of what is trained, added up where it is.
    pub parameters: bool,
}

/// A linear map `y = x w^T` with something beside or instead of `w [out, in]`.
pub trait LinearAdapter: Debug + Send + Sync {
    /// `[out, in]`.
    fn dims(&self) -> [usize; 2];

    /// Whether the weight of the checkpoint is not used, so that it need not be read.
    fn replaces(&self) -> bool {
        false
    }

    /// Whether `f(c x) = c f(x)` for every row: nothing in it depends on the input. It may then be given the rows of
    /// its input times something, and the gradient of its output without it.
    fn is_linear(&self) -> bool {
        true
    }

    /// Number of values it trains, for tables.
    fn trained(&self) -> usize {
        0
    }

    /// `y [n, out]` of `x [n, in]`, without the bias.
    fn forward(&self, base: &Weight, x: &Tensor<2>, tokens: Tokens<'_>) -> Tensor<2>;

    /// Given `dy [n, out]`, the gradient with respect to `x` if it is wanted. Adds up the gradients of its parameters
    /// if they are.
    fn backward(
        &self,
        base: &Weight,
        x: &Tensor<2>,
        dy: &Tensor<2>,
        tokens: Tokens<'_>,
        wanted: Wanted,
    ) -> Option<Tensor<2>>;

    /// The matrix `[out, in]` that this map is; `None` if it is none, since it depends on the input.
    fn matrix(&self, base: &Weight) -> Option<Tensor<2>>;

    /// Hands everything that the [matrix](Self::matrix) follows from, besides the base, to a hash: trained and frozen
    /// values, scales, the rows that they are for. Nothing where there is no matrix.
    fn digest(&self, add: &mut dyn FnMut(&[u8]));
}

/// A vector of the model that is trained: the weight of a norm, a bias.
pub trait VectorAdapter: Debug + Send + Sync {
    /// Number of values it trains, for tables.
    fn trained(&self) -> usize {
        0
    }

    /// What stands in for the checkpoint's vector, as long as it.
    fn value(&self) -> Tensor<1>;

    /// Adds to its gradient.
    fn add_gradient(&self, gradient: &[f32]);
}

/// Embeddings that are trained.
pub trait EmbeddingAdapter: Debug + Send + Sync {
    /// Whether the rows of the checkpoint are not used, so that they need not be read.
    fn replaces(&self) -> bool {
        false
    }

    /// Rows `[ids.len(), H]`, without the model's factor on them, from those of the checkpoint; empty if they are
    /// [replaced](Self::replaces). `ids` are below the vocabulary size.
    fn rows(&self, ids: &[u32], base: &[f32]) -> Vec<f32>;

    /// Adds to the gradients of rows: row i of `gradient [ids.len(), H]` to that of `ids[i]`, which may repeat.
    fn add_gradient(&self, ids: &[u32], gradient: &[f32]);
}

/// A feed-forward block with something beside or instead of its weights as a whole: for what decides once for gate, up
/// and down.
pub trait BlockAdapter: Debug + Send + Sync {
    /// `f(x) [n, H]` of `x [n, H]`, without the factor of a gate or router.
    fn forward(&self, base: &ExpertTensors, x: &Tensor<2>, tokens: Tokens<'_>) -> Tensor<2>;

    /// Given `dy [n, H]`, the gradient with respect to `x` if it is wanted. Adds up the gradients of its parameters if
    /// they are.
    fn backward(
        &self,
        base: &ExpertTensors,
        x: &Tensor<2>,
        dy: &Tensor<2>,
        tokens: Tokens<'_>,
        wanted: Wanted,
    ) -> Option<Tensor<2>>;
}

/// How deep a backward sweep has to go. Deeper is smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Depth {
    /// To the embeddings.
    Embedding,
    /// Into the attention half of this decoder layer.
    Attention(usize),
    /// Into the feed-forward half of this decoder layer.
    FeedForward(usize),
    /// Not below the output head.
    Head,
}

impl Depth {
    /// What the gradient of a linear map needs.
    pub fn of(site: Site) -> Self {
        match site.is_attention() {
            true => Self::Attention(site.layer()),
            false => Self::FeedForward(site.layer()),
        }
    }

    /// For ordering by place in the model.
    fn rank(self) -> (usize, usize) {
        match self {
            Self::Embedding => (0, 0),
            Self::Attention(layer) => (layer + 1, 0),
            Self::FeedForward(layer) => (layer + 1, 1),
            Self::Head => (usize::MAX, 0),
        }
    }

    /// The deeper of both.
    pub fn deeper(self, other: Self) -> Self {
        if other.rank() < self.rank() { other } else { self }
    }

    /// Whether the sweep has to enter the feed-forward half of `layer`.
    pub(crate) fn reaches_feed_forward(self, layer: usize) -> bool {
        self.rank() <= Self::FeedForward(layer).rank()
    }

    /// Whether the sweep has to enter the attention half of `layer`.
    pub(crate) fn reaches_attention(self, layer: usize) -> bool {
        self.rank() <= Self::Attention(layer).rank()
    }

    /// Whether the sweep has to enter what is before the attention half of `layer`.
    pub(crate) fn reaches_below(self, layer: usize) -> bool {
        self.rank() < Self::Attention(layer).rank()
    }

    /// Whether the gradient at the input of the feed-forward half of `layer` is needed.
    pub(crate) fn reaches_below_feed_forward(self, layer: usize) -> bool {
        self.rank() < Self::FeedForward(layer).rank()
    }
}

/// All adapters of a model. Every method but [`depth`](Self::depth) has a default without any.
pub trait Adapters: Debug + Send + Sync {
    /// The adapter of a linear map. Asked when weights are loaded, which may be often: the same adapter each time.
    fn linear(&self, site: Site) -> Option<Arc<dyn LinearAdapter>> {
        let _ = site;
        None
    }

    /// The adapter of rows `rows` of the output head, `[rows.len(), H]`. Blocks are the same in every sweep.
    fn head(&self, rows: Range<usize>) -> Option<Arc<dyn LinearAdapter>> {
        let _ = rows;
        None
    }

    /// The adapter of a vector: a norm's weight or bias, the bias of a linear map.
    fn vector(&self, role: Role) -> Option<Arc<dyn VectorAdapter>> {
        let _ = role;
        None
    }

    /// The adapter of the dense block or the shared expert of a decoder layer as a whole. The adapters of its linear
    /// maps are not used then.
    fn block(&self, layer: usize) -> Option<Arc<dyn BlockAdapter>> {
        let _ = layer;
        None
    }

    /// The adapter of the embeddings.
    fn embedding(&self) -> Option<Arc<dyn EmbeddingAdapter>> {
        None
    }

    /// What watches the routing of an MoE layer in training, in the order in which their gradients are added.
    fn router(&self, layer: usize) -> Vec<Arc<dyn RouterAdapter>> {
        let _ = layer;
        Vec::new()
    }

    /// Whether the gradient of an MoE layer's router comes from all of its experts instead of the chosen ones:
    /// DenseMixer's straight-through estimate, see [`Router::dense_backward`](crate::router::Router::dense_backward).
    /// The forward pass stays as it is.
    fn dense_router(&self, layer: usize) -> bool {
        let _ = layer;
        false
    }

    /// What modulates the experts of an MoE layer.
    fn modulation(&self, layer: usize) -> Option<Arc<dyn ExpertModulation>> {
        let _ = layer;
        None
    }

    /// How deep in the model something is trained. May change between sweeps, not during one.
    fn depth(&self) -> Depth;

    /// A sweep over a wave begins.
    fn begin_wave(&self, wave: &WaveInfo) {
        let _ = wave;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_is_ordered_by_place() {
        let order = [Depth::Embedding, Depth::Attention(0), Depth::FeedForward(0), Depth::Attention(1), Depth::Head];
        for (i, a) in order.iter().enumerate() {
            for (j, b) in order.iter().enumerate() {
                assert_eq!(a.deeper(*b), order[i.min(j)]);
            }
        }
        let depth = Depth::FeedForward(1);
        assert!(depth.reaches_feed_forward(1) && depth.reaches_feed_forward(2) && !depth.reaches_feed_forward(0));
        assert!(!depth.reaches_attention(1) && depth.reaches_attention(2) && !depth.reaches_below_feed_forward(1));
        assert!(Depth::Embedding.reaches_below(0) && !Depth::Attention(0).reaches_below(0));
        assert!(!Depth::Head.reaches_feed_forward(3));
    }

    #[test]
    fn rows_are_tokens() {
        assert_eq!(Tokens::From(3).token(2), 5);
        assert_eq!(Tokens::Rows(&[1, 4, 9]).token(2), 9);
    }
}

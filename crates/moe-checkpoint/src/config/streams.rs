//! Several residual streams.

/// Several residual streams of width `H` in place of one (manifold-constrained hyper-connections, arXiv 2512.24880).
///
/// The embedding is the first value of all `n` streams. A half of a layer reads a weighted sum of them, and each stream
/// becomes a mixture of all plus a multiple of what the half gives. Weights, mixture and multiples follow from the
/// streams `x [n H]`, divided by their root mean square, through one linear map with `(2 + n) n` rows, three scales
/// and a bias: `sigmoid(..) + eps` the weights, `2 sigmoid(..)` the multiples, and for the mixture the softmax of its
/// rows plus `eps`, whose columns and rows are divided by their sums in turn (Sinkhorn-Knopp) so that it is nearly
/// doubly stochastic. What the head reads is a weighted sum, too, by a map of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct HyperConnections {
    /// Number of streams, `n`.
    pub count: usize,
    /// How often columns are divided by their sums; rows are once less.
    pub iterations: usize,
    /// Added to weights, to the softmax and to every sum.
    pub eps: f64,
}

impl HyperConnections {
    /// Rows of the map of a half of a layer.
    pub fn rows(&self) -> usize {
        (2 + self.count) * self.count
    }
}

//! What a scorer reads and what its scores are good for.

use moe_checkpoint::{Granularity, Pool};

use crate::StatisticId;

/// What a scorer declares about itself before anything is run: what it reads, and what the users of its scores may do
/// with them. The [`ScoreTable`](moe_checkpoint::ScoreTable) that it makes says the same.
///
/// ```
/// use moe_checkpoint::{Granularity, Pool};
/// use moe_importance::Needs;
/// use moe_importance::statistics::OUTPUT_NORM;
///
/// let needs = Needs::experts([OUTPUT_NORM]).within(Pool::Layer).additive(Pool::Layer);
/// assert_eq!((needs.granularity, needs.pool), (Granularity::Expert, Pool::Layer));
/// assert!(!needs.weights);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Needs {
    /// Whether it scores units or experts.
    pub granularity: Granularity,
    /// The widest pool over which its scores may be compared.
    pub pool: Pool,
    /// The widest pool over which its scores may be added, so that the sum stands for the items together; none for
    /// shares, ranks, ratios and the like.
    pub additive: Option<Pool>,
    /// Statistics it reads; none for a scorer that needs no data.
    pub statistics: Vec<StatisticId>,
    /// Whether it weighs layers and experts as wholes beside the scores of their units
    /// ([`WholeScores`](moe_checkpoint::WholeScores)).
    pub wholes: bool,
    /// Whether it reads weights of experts or routers. If not, [`NoWeights`](crate::NoWeights) will do.
    pub weights: bool,
}

impl Needs {
    /// Scores of units from these statistics, comparable over the model, not additive, without weights.
    pub fn units(statistics: impl IntoIterator<Item = StatisticId>) -> Self {
        Self::of(Granularity::Unit, statistics)
    }

    /// As [`Needs::units`], of experts.
    pub fn experts(statistics: impl IntoIterator<Item = StatisticId>) -> Self {
        Self::of(Granularity::Expert, statistics)
    }

    fn of(granularity: Granularity, statistics: impl IntoIterator<Item = StatisticId>) -> Self {
        let statistics = Vec::from_iter(statistics);
        Self { granularity, pool: Pool::Global, additive: None, statistics, wholes: false, weights: false }
    }

    /// Comparable within this pool only.
    #[must_use]
    pub fn within(mut self, pool: Pool) -> Self {
        self.pool = pool;
        self.additive = self.additive.map(|additive| additive.min(pool));
        self
    }

    /// Additive within this pool, as far as the scores may be compared. One score per expert has nothing to be added to
    /// within its expert.
    #[must_use]
    pub fn additive(mut self, pool: Pool) -> Self {
        let pool = pool.min(self.pool);
        self.additive = (self.granularity == Granularity::Unit || pool > Pool::Expert).then_some(pool);
        self
    }

    /// With weights of layers and experts as wholes beside the scores.
    #[must_use]
    pub fn with_wholes(mut self) -> Self {
        self.wholes = true;
        self
    }

    /// Whether weights are read.
    #[must_use]
    pub fn weights(mut self, weights: bool) -> Self {
        self.weights = weights;
        self
    }
}

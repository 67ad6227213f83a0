//! What an allocator works on.

use moe_checkpoint::{Granularity, GroupScore, MoeLayerShape, MoeShape, Pool, ProtectionMask, Routing, ScoreTable};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Allocation;
use crate::plan::LayerKept;
use crate::probe::ModelProbe;
use crate::ranking::Queue;
use crate::{Budget, Error, Needs, PruneRequest, Result};

/// What widths an allocation may give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WidthLimits {
    /// Every width is a multiple of this.
    pub round_to: usize,
    /// No expert becomes narrower than this (one that was narrower keeps its width, if that is a multiple).
    pub min_width: usize,
    /// Refuse rather than miss the budget by the rounding.
    pub exact: bool,
}

impl Default for WidthLimits {
    /// Any width, 0 included.
    fn default() -> Self {
        Self { round_to: 1, min_width: 0, exact: false }
    }
}

/// How many experts an allocation may leave in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpertLimits {
    /// Groups of neighboring experts that lose as many each; 1 unless the router selects groups first
    /// ([`Routing::groups`]).
    pub groups: usize,
    /// No layer keeps fewer. It never keeps fewer than the router selects either, unless the budget leaves fewer to all
    /// layers alike: then each token gets all that are left ([`TopKClamp`](moe_checkpoint::TopKClamp)).
    pub min_experts: usize,
    /// Every layer keeps a multiple of this many, for experts that are spread over as many devices. What is left of a
    /// number that is no multiple goes whatever the budget.
    pub multiple_of: usize,
    /// Dropped experts keep their rows of the router, so that it may select as many as ever: a layer may lose all.
    pub keeps_router: bool,
}

impl Default for ExpertLimits {
    /// No groups, no minimum, any number.
    fn default() -> Self {
        Self { groups: 1, min_experts: 0, multiple_of: 1, keeps_router: false }
    }
}

impl ExpertLimits {
    /// Numbers of experts of a layer are multiples of this: of the groups, too.
    pub(crate) fn multiple(&self) -> usize {
        let (mut a, mut b) = (self.groups.max(1), self.multiple_of.max(1));
        let product = a * b;
        while b > 0 {
            (a, b) = (b, a % b);
        }
        product / a
    }

    /// The limits under which this routing still works: as many experts left in every group, two where groups are
    /// ranked by their two best, and enough in the groups that are selected.
    ///
    /// ```
    /// use moe_checkpoint::{GroupScore, Groups, Routing, RoutingKind};
    /// use moe_prune::ExpertLimits;
    ///
    /// let groups = Groups { count: 4, top: 2, score: GroupScore::Max };
    /// let kind = RoutingKind::SoftmaxGroupTopK { groups };
    /// let limits = ExpertLimits::for_routing(&Routing::new(3, kind));
    /// assert_eq!((limits.groups, limits.min_experts), (4, 8)); // two of each, so that two groups hold three
    /// ```
    pub fn for_routing(routing: &Routing) -> Self {
        let Some(groups) = routing.groups() else { return Self::default() };
        let per_group = routing.top_k.div_ceil(groups.top.max(1)).max(match groups.score {
            GroupScore::TopTwoSum => 2,
            _ => 1,
        });
        Self { groups: groups.count, min_experts: per_group * groups.count, ..Self::default() }
    }
}

/// What goes, and what of it has to stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limits {
    /// Units inside experts; the scores are of units.
    Units(WidthLimits),
    /// Whole experts; the scores are of experts.
    Experts(ExpertLimits),
}

/// What an allocator works on.
#[derive(Clone, Copy, Debug)]
pub struct AllocationRequest<'a> {
    /// Scores of units or of experts, as [`AllocationRequest::limits`] has it.
    pub scores: &'a ScoreTable,
    /// Shape of the model.
    pub shape: &'a MoeShape,
    /// How much is kept.
    pub budget: Budget,
    /// What is kept whatever it scores.
    pub protect: &'a ProtectionMask,
    /// What goes.
    pub limits: Limits,
    /// What an earlier round left, all layers in order: the rest is gone already, whatever it scores now, and counts as
    /// dropped. See [`Progressive`](crate::Progressive).
    pub gone: Option<&'a [LayerKept]>,
}

impl AllocationRequest<'_> {
    /// What goes: units or whole experts.
    pub fn granularity(&self) -> Granularity {
        match self.limits {
            Limits::Units(_) => Granularity::Unit,
            Limits::Experts(_) => Granularity::Expert,
        }
    }

    /// Checks everything that does not depend on how an allocator works, and what it needs.
    ///
    /// # Errors
    /// Scores or a probe that do not give what is needed; a parameter outside its range, a table that is not of this
    /// model or has NaN; protected units that do not exist.
    pub fn validate(&self, needs: &Needs, probe: &dyn ModelProbe) -> Result<()> {
        needs.check_probe(probe.answers())?;
        self.shape.validate()?;
        self.scores.validate_for(self.shape)?;
        needs.check_scores(self.scores)?;
        let expected = Needs::new(self.granularity(), Pool::Expert);
        Needs { pool: Pool::Expert, ..expected }.check_scores(self.scores)?;
        self.validate_limits()?;
        self.budget.validate(self.shape)?;
        self.protect.validate(self.shape)?;
        let sizes = |gone: &[LayerKept]| gone.iter().map(|l| (l.layer, l.experts.len())).collect::<Vec<_>>();
        if let Some(gone) = self.gone.map(sizes) {
            let expected: Vec<_> = self.shape.layers.iter().map(|l| (l.layer, l.num_experts())).collect();
            if gone != expected {
                return Err(Error::invalid_plan(format!(
                    "what an earlier round left is of (layer, experts) {gone:?}, but the model has {expected:?}"
                )));
            }
        }
        Ok(())
    }

    fn validate_limits(&self) -> Result<()> {
        let invalid = |field, found: String, expected: String| Err(Error::InvalidParameter { field, found, expected });
        match self.limits {
            Limits::Units(limits) if limits.round_to == 0 => invalid("round_to", "0".into(), "at least 1".into()),
            Limits::Units(_) => Ok(()),
            Limits::Experts(ExpertLimits { multiple_of: 0, .. }) => {
                invalid("multiple_of", "0".into(), "at least 1".into())
            }
            Limits::Experts(ExpertLimits { groups, .. }) => {
                for layer in &self.shape.layers {
                    let (number, experts) = (layer.layer, layer.num_experts());
                    if groups == 0 || experts % groups != 0 {
                        let expected = format!("a divisor of the {experts} experts of layer {number}");
                        return invalid("groups", groups.to_string(), expected);
                    }
                    if let Some(expert) = layer.widths.iter().position(|width| *width == 0) {
                        let found = format!("an expert without units (layer {number}, expert {expert})");
                        return invalid("shape", found, "experts with units".into());
                    }
                }
                Ok(())
            }
        }
    }

    /// Experts of a layer that have to stay for the router: as many as it selects, or as many as the budget leaves to
    /// the layer if all drop alike. Routing by groups is not clamped.
    pub(crate) fn selected(&self, layer: &MoeLayerShape, limits: ExpertLimits) -> usize {
        let (top_k, experts) = (self.shape.top_k, layer.num_experts());
        if limits.groups > 1 {
            return top_k;
        }
        let (kept, units) = (self.budget.kept_units(self.shape) as u128, self.shape.units().max(1) as u128);
        let even = self.budget.kept_of_pool(experts).unwrap_or((experts as u128 * kept / units) as usize);
        top_k.min(even.max(1))
    }

    /// The allocation that keeps this, for an allocator with this recipe; see [`PruneRequest::allocation`].
    ///
    /// # Errors
    /// As [`PruneRequest::allocation`].
    pub fn allocation(&self, allocator: Value, kept: Vec<LayerKept>) -> Result<Allocation> {
        let Self { scores, shape, budget, protect, gone, .. } = *self;
        PruneRequest { scores, shape, budget, protect, gone }.allocation(allocator, kept)
    }

    /// What stays with these numbers of kept blocks `[MoE layer][queue]`.
    pub(crate) fn layers(&self, queues: &[Vec<Queue>], blocks: &[Vec<usize>]) -> Vec<LayerKept> {
        let layers = queues.iter().zip(blocks).zip(&self.shape.layers);
        let of_layer = |((queues, blocks), shape): ((&Vec<Queue>, &Vec<usize>), &MoeLayerShape)| {
            let layer = shape.layer;
            let Limits::Experts(limits) = self.limits else {
                let experts = queues.iter().zip(blocks).map(|(queue, blocks)| queue.kept(*blocks)).collect();
                return LayerKept { layer, experts, removed: Vec::new() };
            };
            let mut experts = vec![Vec::new(); shape.num_experts()];
            for expert in queues.iter().zip(blocks).flat_map(|(queue, blocks)| queue.kept(*blocks)) {
                experts[expert as usize] = (0..shape.widths[expert as usize] as u32).collect();
            }
            let emptied = |(expert, kept): (usize, &Vec<u32>)| kept.is_empty().then_some(expert as u32);
            let removed =
                if limits.keeps_router { vec![] } else { experts.iter().enumerate().filter_map(emptied).collect() };
            LayerKept { layer, experts, removed }
        };
        layers.map(of_layer).collect()
    }
}

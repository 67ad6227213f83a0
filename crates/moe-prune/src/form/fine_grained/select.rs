//! Choosing the pieces that stay.

use moe_checkpoint::{Checkpoint, Granularity, MoeLayerShape, Pool, Ratio, ScoreTable};
use serde_json::json;

use super::{FineGrained, refuse_sharing, refused, splits_groups};
use crate::plan::{LayerKept, PLAN_VERSION, PrunePlan};
use crate::{Budget, Error, Result};

impl FineGrained<'_> {
    /// Checks everything that does not depend on scores, for a plan of [`FineGrained::prune`] with this ratio.
    ///
    /// # Errors
    /// [`Error::Export`] as for [`FineGrained::map`]; [`Error::InvalidParameter`] for a ratio outside (0, 1).
    pub fn check(&self, from: &Checkpoint, ratio: f64) -> Result<()> {
        refuse_sharing(from)?;
        Budget::Ratio(ratio).validate(from.shape())?;
        self.map(&PrunePlan::keep_all(from.shape(), ""), from)?;
        let routing = &from.config().routing;
        let mut first: Option<(usize, usize)> = None;
        for layer in &from.shape().layers {
            let per_group = self.per_group(layer, from, ratio)?;
            if splits_groups(&routing.kind) {
                self.check_split(per_group).map_err(|reason| refused(format!("layer {}: {reason}", layer.layer)))?;
            }
            let total = per_group * routing.groups().map_or(1, |groups| groups.count);
            let (first, pieces) = *first.get_or_insert((layer.layer, total));
            if pieces != total {
                return Err(refused(format!(
                    "layer {first} would keep {pieces} pieces and layer {} would keep {total}; stock loaders read one number \
                     for all layers",
                    layer.layer
                )));
            }
            self.routing(routing, total)?;
        }
        Ok(())
    }

    /// Pieces that every group of a layer keeps at this ratio.
    fn per_group(&self, layer: &MoeLayerShape, from: &Checkpoint, ratio: f64) -> Result<usize> {
        let routing = &from.config().routing;
        let groups = routing.groups().map_or(1, |groups| groups.count);
        // A multiple of this many pieces per group.
        let step = if splits_groups(&routing.kind) { self.pieces } else { 1 };
        let experts = layer.num_experts();
        if !experts.is_multiple_of(groups) {
            return Err(refused(format!("layer {}: {experts} experts do not form {groups} groups", layer.layer)));
        }
        let units = layer.units() - (layer.units() as f64 * ratio).floor() as usize;
        Ok(units.div_ceil(self.width(from)? * groups).next_multiple_of(step))
    }

    /// The plan that keeps the highest-scored pieces of every layer, as many in each: the units of an expert, ranked,
    /// are cut into blocks of the width of a piece, and blocks compete by the sum of their scores (ties: lower expert).
    /// Where the router selects groups of experts first, they compete within their group, and every group keeps as
    /// many.
    ///
    /// The number of units that the ratio leaves in a layer is rounded up to what can be formed.
    ///
    /// # Errors
    /// [`Error::Export`] as for [`FineGrained::map`]; [`Error::InvalidParameter`] for a ratio outside (0, 1);
    /// [`Error::NeedsUnitScores`], [`Error::PoolTooNarrow`] and [`Error::Checkpoint`] for scores that do not fit.
    pub fn prune(&self, scores: &ScoreTable, from: &Checkpoint, ratio: f64) -> Result<PrunePlan> {
        let (shape, width) = (from.shape(), self.width(from)?);
        Budget::Ratio(ratio).validate(shape)?;
        scores.validate_for(shape)?;
        if scores.granularity != Granularity::Unit {
            return Err(Error::NeedsUnitScores);
        }
        if !scores.pool.supports(Pool::Layer) {
            return Err(Error::PoolTooNarrow { wanted: Pool::Layer, supported: scores.pool });
        }
        let groups = from.config().routing.groups().map_or(1, |groups| groups.count);
        let mut kept = Vec::with_capacity(shape.layers.len());
        for (layer, scores) in shape.layers.iter().zip(&scores.layers) {
            let pieces = self.per_group(layer, from, ratio)?;
            let experts = best_blocks(&scores.scores, width, groups, pieces);
            kept.push(LayerKept { layer: layer.layer, experts, removed: Vec::new() });
        }
        let parsed = |text: &str| serde_json::from_str(text).unwrap_or_else(|_| json!(text));
        let mut plan = PrunePlan {
            version: PLAN_VERSION,
            model: scores.provenance.model.clone(),
            shape: shape.clone(),
            ratio: Ratio { asked: ratio, achieved: 0.0 },
            recipe: json!({
                "pruner": { "type": "pieces", "pieces": self.pieces },
                "budget": Budget::Ratio(ratio),
                "scorer": parsed(&scores.scorer),
                "calibration": { "data": scores.provenance.data, "recipe": parsed(&scores.provenance.recipe) },
            }),
            never_routed: scores.never_routed(),
            kept,
            notes: Vec::new(),
        };
        let units = shape.units();
        plan.ratio.achieved = (units - plan.units_kept()) as f64 / units.max(1) as f64;
        plan.validate(shape)?;
        self.map(&plan, from)?;
        Ok(plan)
    }
}

/// Units of every expert, ascending, in the blocks of `width` units that score highest, `blocks` in each of the groups
/// that the experts form in order: the units of an expert, ranked, are cut into blocks, which compete by their sums.
pub(in crate::form) fn best_blocks(scores: &[Vec<f32>], width: usize, groups: usize, blocks: usize) -> Vec<Vec<u32>> {
    let rank = |scores: &Vec<f32>| {
        let mut order: Vec<u32> = (0..scores.len() as u32).collect();
        // Stable, so that equal scores stay in the order of their ids.
        order.sort_by(|a, b| compare(scores[*b as usize].into(), scores[*a as usize].into()));
        order
    };
    let ranked: Vec<Vec<u32>> = scores.iter().map(rank).collect();
    let mut counts = vec![0; scores.len()];
    let size = (scores.len() / groups.max(1)).max(1);
    for group in 0..groups {
        let mut sums: Vec<(f64, usize)> = Vec::new();
        for expert in group * size..(group + 1) * size {
            let sum = |block: &[u32]| block.iter().map(|unit| f64::from(scores[expert][*unit as usize])).sum();
            sums.extend(ranked[expert].chunks(width).map(|block| (sum(block), expert)));
        }
        // Stable: of equal sums the lower expert comes first. Sums of an expert descend, so that what is taken of it is
        // a head of its ranking.
        sums.sort_by(|a, b| compare(b.0, a.0));
        sums.iter().take(blocks).for_each(|(_, expert)| counts[*expert] += 1);
    }
    let kept = ranked.into_iter().zip(counts).map(|(mut order, count)| {
        order.truncate(count * width);
        order.sort_unstable();
        order
    });
    kept.collect()
}

/// Order of finite numbers, in which 0.0 and -0.0 are equal.
fn compare(a: f64, b: f64) -> std::cmp::Ordering {
    a.partial_cmp(&b).unwrap_or(std::cmp::Ordering::Equal)
}

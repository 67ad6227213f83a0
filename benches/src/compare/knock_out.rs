//! Taking out the highest-scored units.

use moe_checkpoint::{MoeShape, ScoreTable};
use moe_prune::{PrunePlan, Ratio};
use serde_json::json;

use crate::Result;

/// The plan that drops the `count` highest-scored units of the model (ties: lower layer, expert, unit).
///
/// # Errors
/// A table that is not one of units of this shape.
pub fn plan(scores: &ScoreTable, shape: &MoeShape, count: usize) -> Result<PrunePlan> {
    scores.validate_for(shape)?;
    let mut units: Vec<(f32, usize, usize, usize)> = Vec::with_capacity(shape.units());
    for (position, layer) in scores.layers.iter().enumerate() {
        for (expert, values) in layer.scores.iter().enumerate() {
            units.extend(values.iter().enumerate().map(|(unit, score)| (*score, position, expert, unit)));
        }
    }
    // Stable, so that ties stay in the order of layers, experts and units.
    units.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut plan = PrunePlan::keep_all(shape, &scores.provenance.model);
    for (_, position, expert, unit) in units.iter().take(count) {
        plan.kept[*position].experts[*expert].retain(|kept| *kept as usize != *unit);
    }
    let dropped = count.min(units.len()) as f64 / units.len().max(1) as f64;
    plan.ratio = Ratio { asked: dropped, achieved: dropped };
    plan.recipe = json!({ "pruner": { "type": "knock_out", "units": count }, "scorer": scores.scorer });
    plan.validate(shape)?;
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use moe_checkpoint::{Denominator, Granularity, LayerScores, MoeLayerShape, Pool, Provenance};

    use super::*;

    #[test]
    fn the_best_units_go() {
        let shape = MoeShape {
            gateless: false,
            hidden_size: 4,
            top_k: 1,
            layers: vec![MoeLayerShape { layer: 0, widths: vec![2, 2] }, MoeLayerShape { layer: 3, widths: vec![2] }],
        };
        let layer = |layer, scores: &[&[f32]]| LayerScores {
            layer,
            scores: scores.iter().map(|expert| expert.to_vec()).collect(),
            routed: None,
            whole: None,
        };
        let scores = ScoreTable {
            scorer: "{}".into(),
            granularity: Granularity::Unit,
            pool: Pool::Global,
            additive: Some(Pool::Global),
            denominator: Denominator::None,
            layers: vec![layer(0, &[&[0.5, 4.0], &[2.0, 0.1]]), layer(3, &[&[2.0, 3.0]])],
            provenance: Provenance::new("m", "d", "{}"),
        };
        let kept = |count| -> Vec<Vec<Vec<u32>>> {
            plan(&scores, &shape, count).unwrap().kept.into_iter().map(|layer| layer.experts).collect()
        };
        assert_eq!(kept(2), [vec![vec![0], vec![0, 1]], vec![vec![0]]]);
        // The tie at 2 goes to the lower layer.
        assert_eq!(kept(3), [vec![vec![0], vec![1]], vec![vec![0]]]);
    }
}

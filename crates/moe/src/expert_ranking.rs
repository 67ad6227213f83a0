//! Experts of every layer from the best to the worst, for engines that drop experts when they load a model.

use std::fmt::Write;

use moe_checkpoint::{Granularity, Pool, Reduction, ScoreTable};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The experts of one layer, best first: keeping the first `n` is pruning to `n` experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertRanking {
    /// What scored them.
    pub scorer: String,
    /// Decoder layer index.
    pub layer: usize,
    /// Expert indices `[experts]`, the highest score first. Of equal scores the higher index stands first, as pruners
    /// drop the lower one.
    pub experts: Vec<usize>,
    /// Their scores, in the same order `[experts]`.
    pub scores: Vec<f32>,
}

/// Ranks the experts of every MoE layer by a table, in which `scorer` is what it is called. Scores of units become
/// scores of experts by their sum, or by their mean where they may not be added.
///
/// # Errors
/// [`Error::Checkpoint`] for a table that is not valid.
pub fn rank_experts(scorer: &str, table: &ScoreTable) -> Result<Vec<ExpertRanking>> {
    let reduction = if table.adds_up(Pool::Expert) { Reduction::Sum } else { Reduction::Mean };
    let table = match table.granularity {
        Granularity::Expert => table.clone(),
        Granularity::Unit => table.to_experts(reduction)?,
    };
    let of_layer = |layer: &moe_checkpoint::LayerScores| {
        let score = |expert: usize| layer.scores[expert].first().copied().unwrap_or_default();
        let mut experts: Vec<usize> = (0..layer.scores.len()).collect();
        experts.sort_by(|a, b| score(*b).total_cmp(&score(*a)).then(b.cmp(a)));
        let scores = experts.iter().map(|expert| score(*expert)).collect();
        ExpertRanking { scorer: scorer.to_string(), layer: layer.layer, experts, scores }
    };
    Ok(table.layers.iter().map(of_layer).collect())
}

/// Rankings as JSON lines, one per layer.
///
/// # Errors
/// [`Error::Invalid`] for scores that are no numbers of JSON.
pub fn to_json_lines(rankings: &[ExpertRanking]) -> Result<String> {
    let mut lines = String::new();
    for ranking in rankings {
        let json = serde_json::to_string(ranking).map_err(|error| Error::Invalid(format!("a ranking: {error}")))?;
        // Writing to a string cannot fail.
        let _ = writeln!(lines, "{json}");
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use moe_checkpoint::{Denominator, LayerScores, Provenance};

    use super::*;

    #[test]
    fn experts_are_ranked_as_pruners_drop_them() {
        let scores = vec![vec![0.25, 0.25], vec![1.0, 0.0], vec![0.0, 0.5], vec![2.0, 0.0]];
        let mut table = ScoreTable {
            scorer: "{}".into(),
            granularity: Granularity::Unit,
            pool: Pool::Global,
            additive: Some(Pool::Global),
            denominator: Denominator::None,
            layers: vec![LayerScores { layer: 3, scores, routed: None, whole: None }],
            provenance: Provenance::new("model", "data", "{}"),
        };
        let found = rank_experts("fisher", &table).unwrap();
        assert_eq!((found[0].layer, found[0].experts.as_slice()), (3, &[3, 1, 2, 0][..]));
        assert_eq!(found[0].scores, [2.0, 1.0, 0.5, 0.5]);
        table.additive = None;
        assert_eq!(rank_experts("fisher", &table).unwrap()[0].scores, [1.0, 0.5, 0.25, 0.25]);
        let line = to_json_lines(&found).unwrap();
        assert_eq!(serde_json::from_str::<ExpertRanking>(line.trim()).unwrap(), found[0]);
    }
}

//! Experts of attention: where a config has one number for them and for those of the feed-forward halves, a uniform
//! export has as many of both.

use std::collections::BTreeMap;

use moe_checkpoint::{Checkpoint, LayerRole, Mixer, Role};

use crate::Result;

/// The tensors of a mixture of attention heads that have a block for every expert.
pub(super) const STACKS: [LayerRole; 3] = [LayerRole::HeadRouter, LayerRole::HeadQueries, LayerRole::HeadOutputs];

/// The experts of attention that stay, `count` in every layer that has more: those with the largest products of the
/// norms of both their projections, earlier ones first among equals. What a head gives is proportional to its output
/// projection; statistics of routed experts say nothing of it.
///
/// # Errors
/// Weights that cannot be read.
pub(super) fn kept(from: &Checkpoint, count: usize) -> Result<BTreeMap<usize, Vec<usize>>> {
    let mut kept = BTreeMap::new();
    for (layer, config) in from.config().layers.iter().enumerate() {
        let Mixer::HeadMixture(mixture) = &config.mixer else { continue };
        if mixture.experts <= count {
            continue;
        }
        let norm = |role, expert: usize| -> Result<f64> {
            let values = from.read_f32_rows(Role::Layer(layer, role), expert..expert + 1)?;
            Ok(values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt())
        };
        let mut scores = Vec::with_capacity(mixture.experts);
        for expert in 0..mixture.experts {
            scores.push((norm(LayerRole::HeadQueries, expert)? * norm(LayerRole::HeadOutputs, expert)?, expert));
        }
        scores.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut best: Vec<usize> = scores.into_iter().take(count).map(|(_, expert)| expert).collect();
        best.sort_unstable();
        kept.insert(layer, best);
    }
    Ok(kept)
}

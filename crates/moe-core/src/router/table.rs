//! Routing by a table of the vocabulary: scores weigh experts that they did not choose.

use moe_checkpoint::ExpertTable;
use rayon::prelude::*;

use super::{Routed, Router};

impl Router {
    /// Routes the tokens `ids` by `table`, weighed by the logits `[T, E]` as [`route`](Self::route) weighs what it
    /// selects. Tokens of an expert that is `removed` (ascending) go where [`ExpertTable::row_without`] sends them.
    pub fn route_by(
        &self,
        table: &ExpertTable,
        ids: &[u32],
        logits: &[f32],
        experts: usize,
        removed: &[u32],
    ) -> Routed {
        let left: Vec<u32> = (0..experts as u32).filter(|expert| removed.binary_search(expert).is_err()).collect();
        let top_k = self.top_k.min(table.top_k()).min(left.len());
        let (mut selected, mut weights) = (vec![0u32; ids.len() * top_k], vec![0.0f32; ids.len() * top_k]);
        if top_k > 0 {
            let slots = selected.par_chunks_mut(top_k).zip(weights.par_chunks_mut(top_k));
            slots.zip(logits.par_chunks(experts)).zip(ids).with_min_len(64).for_each(
                |(((selected, weights), logits), id)| {
                    match removed.is_empty() {
                        true => selected.copy_from_slice(&table.row(*id as usize)[..top_k]),
                        false => selected.copy_from_slice(&table.row_without(*id as usize, &left, top_k)),
                    }
                    self.weigh(logits, selected, weights);
                },
            );
        }
        Routed { experts, top_k, selected, weights }
    }
}

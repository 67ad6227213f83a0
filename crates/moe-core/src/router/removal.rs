//! Routing without some of the experts, as if their rows of the router were gone.

use super::{GroupRank, Routed, Router, Rule};
use crate::error::{Error, Result};

/// Experts that are left, in order.
struct Left {
    experts: usize,
    left: Vec<u32>,
}

impl Left {
    fn new(experts: usize, removed: &[u32]) -> Self {
        let left = (0..experts as u32).filter(|e| removed.binary_search(e).is_err()).collect();
        Self { experts, left }
    }

    /// Columns of a row-major `[n, E]` that are left.
    fn columns(&self, values: &[f32]) -> Vec<f32> {
        let rows = values.chunks_exact(self.experts);
        rows.flat_map(|row| self.left.iter().map(move |&e| row[e as usize])).collect()
    }
}

impl Router {
    /// As [`route`](Self::route), with the experts `removed` (ascending) left out. Everything of the result is in the
    /// indices of all `experts`.
    pub fn route_without(&self, logits: &[f32], experts: usize, bias: Option<&[f32]>, removed: &[u32]) -> Routed {
        if removed.is_empty() {
            return self.route(logits, experts, bias);
        }
        let left = Left::new(experts, removed);
        let bias = bias.map(|bias| left.columns(bias));
        let mut routed = self.route(&left.columns(logits), left.left.len(), bias.as_deref());
        routed.selected.iter_mut().for_each(|e| *e = left.left[*e as usize]);
        Routed { experts, ..routed }
    }

    /// As [`backward`](Self::backward), for the result of [`route_without`](Self::route_without); 0 for removed
    /// experts.
    pub fn backward_without(&self, logits: &[f32], routed: &Routed, d_weights: &[f32], removed: &[u32]) -> Vec<f32> {
        if removed.is_empty() {
            return self.backward(logits, routed, d_weights);
        }
        let left = Left::new(routed.experts, removed);
        let mut position = vec![0u32; routed.experts];
        left.left.iter().enumerate().for_each(|(i, &e)| position[e as usize] = i as u32);
        let compact = Routed {
            experts: left.left.len(),
            selected: routed.selected.iter().map(|&e| position[e as usize]).collect(),
            ..routed.clone()
        };
        let d_left = self.backward(&left.columns(logits), &compact, d_weights);
        let mut d_logits = crate::kernels::zeros(logits.len());
        for (all, some) in d_logits.chunks_exact_mut(routed.experts).zip(d_left.chunks_exact(left.left.len().max(1))) {
            left.left.iter().zip(some).for_each(|(&e, d)| all[e as usize] = *d);
        }
        d_logits
    }

    /// Whether the rule can route among `experts` experts without the `removed` ones.
    ///
    /// # Errors
    /// [`Error::Input`] if groups of experts do not lose as many each, or those that are selected hold too few.
    pub fn check_without(&self, experts: usize, removed: &[u32]) -> Result<()> {
        self.check(experts)?;
        let Rule::Scores { groups: Some(groups), .. } = self.rule else { return Ok(()) };
        let size = experts / groups.count;
        let mut left = vec![size; groups.count];
        removed.iter().for_each(|&e| left[e as usize / size] -= 1);
        if left.iter().any(|count| *count != left[0]) {
            return Err(Error::input("experts left in the groups of a layer", format!("{left:?}"), "as many in each"));
        }
        if groups.rank == GroupRank::TwoLargest && left[0] < 2 {
            let expected = "at least two, since groups are ranked by their two best";
            return Err(Error::input("experts left in every group of a layer", left[0], expected));
        }
        self.check(experts - removed.len())
    }
}

//! The routing of one token per sequence, replaced.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{
    adaptive::RunTimeRouting,
    error::{Error, Result},
    overlay::{LogitTransform, RouterTokens, RuleGradients},
};

/// Logits `[E]` by layer that stand in for those of one token of every sequence; everything else is routed by the
/// model. Nothing is replaced until [`set`](Self::set) says so.
#[derive(Debug, Default)]
pub struct RowOverride {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    position: usize,
    rows: BTreeMap<usize, Vec<f32>>,
    /// Passes through the model in which it counts.
    passes: usize,
}

impl RowOverride {
    /// Replaces nothing.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// In the next `passes` passes, replaces the logits of the token at `position` of every sequence that has one.
    /// Generation passes a prompt once, and then one token at a time.
    pub fn set(&self, position: usize, rows: BTreeMap<usize, Vec<f32>>, passes: usize) {
        *self.lock() = State { position, rows, passes };
    }

    /// Replaces nothing any more.
    pub fn reset(&self) {
        *self.lock() = State::default();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As a change of routing in these layers.
    pub fn routing(self: &Arc<Self>, layers: &[usize]) -> RunTimeRouting {
        let change = |layer: &usize| (*layer, self.clone() as Arc<dyn LogitTransform>);
        RunTimeRouting { logits: layers.iter().map(change).collect(), ..RunTimeRouting::default() }
    }

    /// The token of every sequence that is replaced.
    fn replaced(state: &State, tokens: &RouterTokens<'_>) -> Vec<usize> {
        let at = |s: &crate::trace::SequenceInfo| s.tokens.start + state.position;
        tokens.wave.sequences.iter().filter(|s| s.tokens.len() > state.position).map(at).collect()
    }
}

impl LogitTransform for RowOverride {
    fn forward(&self, tokens: &RouterTokens<'_>) -> Result<Vec<f32>> {
        let mut state = self.lock();
        let mut out = tokens.logits.to_vec();
        let Some(row) = state.rows.get(&tokens.layer).filter(|_| state.passes > 0) else { return Ok(out) };
        if row.len() != tokens.experts {
            let expected = tokens.experts;
            return Err(Error::input(
                format!("logits in place of those of layer {}", tokens.layer),
                row.len(),
                expected,
            ));
        }
        for t in Self::replaced(&state, tokens) {
            out[t * tokens.experts..(t + 1) * tokens.experts].copy_from_slice(row);
        }
        if state.rows.keys().next_back() == Some(&tokens.layer) {
            state.passes -= 1;
        }
        Ok(out)
    }

    fn backward(&self, tokens: &RouterTokens<'_>, d_logits: &[f32], _: bool) -> Result<RuleGradients> {
        let state = self.lock();
        let mut out = d_logits.to_vec();
        if state.rows.contains_key(&tokens.layer) {
            for t in Self::replaced(&state, tokens) {
                out[t * tokens.experts..(t + 1) * tokens.experts].fill(0.0);
            }
        }
        Ok(out.into())
    }
}

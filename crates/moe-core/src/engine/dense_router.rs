//! What every expert would have given every token, for router gradients from all experts.

use burn::tensor::Tensor;

use super::{Engine, routing::LayerRouting};
use crate::{
    adapters::Tokens,
    error::{Error, Result},
    experts::row_products,
    kernels::rows::gather_rows,
    layers::DENSE_ROWS,
};

impl Engine<'_> {
    /// `<dy[t], E_e(z[t])>` of every token and expert `[T, E]`. Those of the chosen experts are `d_weights [T, k]`; the
    /// others run here, on so many tokens at a time.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a rule, or a change of routing, without a gradient from all experts.
    pub(super) fn expert_values(
        &self,
        layer: usize,
        z: &Tensor<2>,
        dy: &Tensor<2>,
        routing: &LayerRouting,
        d_weights: &[f32],
    ) -> Result<Vec<f32>> {
        self.model.router().check_dense()?;
        let rule = &self.model.config().routing;
        if rule.on_inputs || rule.expert_scales {
            let what =
                if rule.on_inputs { "weights multiply what experts read" } else { "experts have factors of their own" };
            return Err(Error::Unsupported(format!("router gradients from all experts where {what}")));
        }
        let removed = self.model.routing_overlay().is_some_and(|overlay| overlay.removed(layer).is_some());
        if removed || !routing.is_own() {
            let what = "router gradients from all experts in layer";
            return Err(Error::Unsupported(format!("{what} {layer}, whose routing an overlay changes")));
        }
        let routed = &routing.applied;
        let (experts, k) = (routed.experts, routed.top_k.max(1));
        let tokens = z.dims()[0];
        let mut values = crate::kernels::zeros(tokens * experts);
        for (slot, (&e, d)) in routed.selected.iter().zip(d_weights).enumerate() {
            values[slot / k * experts + e as usize] = *d;
        }
        let others = |e: usize| -> Vec<u32> {
            let chosen = routed.selected.chunks_exact(k);
            (0u32..).zip(chosen).filter(|(_, chosen)| !chosen.contains(&(e as u32))).map(|(t, _)| t).collect()
        };
        let run = |e: usize| {
            let rows = others(e);
            let weights = self.model.expert(layer, e)?;
            if rows.is_empty() || weights.is_zero() {
                return Ok(None);
            }
            let mut found = Vec::with_capacity(rows.len());
            for rows in rows.chunks(DENSE_ROWS) {
                let tokens = Tokens::Rows(rows);
                let gate_up = weights.pre_activations_for(&gather_rows(z, rows), tokens);
                let output = weights.output_for(&weights.units(&gate_up), tokens);
                found.extend(row_products(&gather_rows(dy, rows), &output));
            }
            Ok(Some((rows, found)))
        };
        self.for_experts(experts, run, |e, (rows, found)| {
            rows.iter().zip(found).for_each(|(&t, value)| values[t as usize * experts + e] = value);
            Ok(())
        })?;
        Ok(values)
    }
}

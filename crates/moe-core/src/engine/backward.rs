//! The backward sweep: from the loss gradient at the last layer's output down to the first MoE layer.

use std::sync::Mutex;

use burn::tensor::Tensor;

use super::{
    Engine,
    experts::{ExpertBackwardRun, Wanted, lock, segments},
    forward::LayerTape,
    prepare::Prepared,
    routing::visible_logits,
};
use crate::{
    error::Result,
    host::{self, HostView},
    kernels::rows::RowAccumulator,
    store::HiddenStore,
    trace::{ExpertGradients, ExpertTrace, Observer, RouterGradients, Signals},
};

/// Slots of the hidden store: the input of a layer and of its feed-forward half.
pub(super) fn input_slot(layer: usize) -> usize {
    2 * layer
}

pub(super) fn middle_slot(layer: usize) -> usize {
    2 * layer + 1
}

/// What the forward sweep left, and where the backward sweep stops.
pub(super) struct Backward<'a> {
    pub prepared: &'a Prepared,
    pub store: HiddenStore,
    pub tapes: Vec<LayerTape>,
    /// The first MoE layer; below it nobody asks for gradients.
    pub first_moe: usize,
    pub needs: Signals,
}

impl Engine<'_> {
    pub(super) fn backward(
        &self,
        mut sweep: Backward<'_>,
        mut dy: Tensor<2>,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        for layer in (sweep.first_moe..self.model.config().layers.len()).rev() {
            let mut tape = std::mem::take(&mut sweep.tapes[layer]);
            let attention = tape.attention.take();
            let middle = sweep.store.take(middle_slot(layer))?;
            let Some(d_middle) = self.ffn_backward(&sweep, layer, &middle, dy, tape, observer)? else { return Ok(()) };
            drop(middle);
            let x = sweep.store.take(input_slot(layer))?;
            let weights = self.model.attention(layer)?;
            let (table, spans) = (&sweep.prepared.table, &sweep.prepared.spans);
            let tape = attention.unwrap_or_else(|| weights.project(&x, table));
            dy = weights.backward(&x, &tape, spans, table, d_middle);
        }
        Ok(())
    }

    /// Gradient at the input of the feed-forward half, unless it is the last one asked for.
    fn ffn_backward(
        &self,
        sweep: &Backward<'_>,
        layer: usize,
        middle: &Tensor<2>,
        dy: Tensor<2>,
        tape: LayerTape,
        observer: &mut dyn Observer,
    ) -> Result<Option<Tensor<2>>> {
        let needs = sweep.needs;
        let wave = &sweep.prepared.info;
        let want_input = layer > sweep.first_moe;
        let ffn = self.model.ffn(layer)?;
        let z = ffn.normed(middle);
        let d_blocks = ffn.block_gradient(&dy);
        let [tokens, hidden] = z.dims();
        let mut dz = want_input.then(|| RowAccumulator::zeros(tokens, hidden, self.model.device()));
        if let (Some(routing), Some(router)) = (&tape.routing, &ffn.router) {
            let routed = &routing.applied;
            let mut d_weights = vec![0.0f32; routed.weights.len()];
            let dispatch = routing.dispatch(true);
            let kept = tape.experts.into_iter().map(Mutex::new).collect::<Vec<_>>();
            let wanted = Wanted { input: want_input, units: needs.gradients, output: needs.gradients && needs.outputs };
            let run = |e: usize| {
                let kept = kept.get(e).and_then(|kept| lock(kept).take());
                self.expert_backward(layer, e, &z, &d_blocks, kept, &dispatch, wanted)
            };
            self.for_experts(routed.experts, run, |e, run: ExpertBackwardRun| {
                let tokens = dispatch.expert(e);
                let ExpertBackwardRun { weights, input, upstream, gradients, output, d_input } = run;
                if let Some(units) = &gradients.d_units {
                    observer.expert(&ExpertTrace {
                        layer,
                        expert: e,
                        rows: tokens.rows,
                        routing_weights: tokens.weights,
                        segments: &segments(tokens.rows, wave),
                        input: &input,
                        units: Some(&gradients.units),
                        output: output.as_ref(),
                        backward: Some(ExpertGradients { upstream: &upstream, units, gate_up: &gradients.d_gate_up }),
                        expert_weights: &weights,
                    })?;
                }
                if let (Some(dz), Some(d_input)) = (&mut dz, d_input) {
                    dz.add_rows(tokens.rows, None, &d_input);
                }
                for (&slot, d) in tokens.slots.iter().zip(gradients.d_row_weights) {
                    d_weights[slot as usize] = d;
                }
                Ok(())
            })?;
            if dz.is_some() || needs.router_gradients {
                let overlay = self.model.routing_overlay().map(|overlay| &**overlay);
                let logits = HostView::new(&router.linear.forward(&z));
                let logits = logits.as_slice();
                let gradients = routing.backward(self.model.router(), layer, logits, &d_weights, overlay);
                if needs.router_gradients {
                    let removed = overlay.and_then(|overlay| overlay.removed(layer)).unwrap_or_default();
                    observer.router(&RouterGradients {
                        layer,
                        wave,
                        experts: routed.experts,
                        top_k: routed.top_k,
                        input: &z,
                        logits: &visible_logits(logits, routed.experts, removed),
                        selected: &routed.selected,
                        weights: &routed.weights,
                        d_weights: &d_weights,
                        d_logits: &gradients.logits,
                        d_gains: &gradients.gains,
                    })?;
                }
                if let Some(dz) = &mut dz {
                    let shape = [tokens, routed.experts];
                    let d_logits = host::from_vec(gradients.logits, shape, self.model.device());
                    dz.add(&router.linear.backward(&d_logits));
                }
            }
        }
        let Some(mut dz) = dz else { return Ok(None) };
        if let Some(dense) = &ffn.dense {
            dense.backward(&z, &d_blocks, tape.dense, &mut dz);
        }
        Ok(Some(ffn.input_gradient(middle, dz, &dy)))
    }
}

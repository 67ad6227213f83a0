//! The backward sweep: from the loss gradient at the last layer's output down to the first MoE layer, or to what is
//! trained.

use std::{cell::RefCell, sync::Mutex};

use burn::tensor::Tensor;

use super::{
    Engine, UnfinishedWave,
    experts::{ExpertBackwardRun, ExpertWanted, lock, segments},
    forward::{LayerTape, beside_each_other},
    prepare::Prepared,
    routing::{LayerRouting, first_columns, visible_logits},
};
use crate::{
    adapters::{Depth, Wanted},
    depth::PathStep,
    error::{Error, Result},
    experts::row_products,
    host::{self, HostView},
    kernels::rows::RowAccumulator,
    layers::{BlockGradients, RouterLayer, scaled, sum_of},
    store::HiddenStore,
    trace::{ExpertGradients, ExpertTrace, Observer, RouterGradients, Signals, SweepPart},
};

/// Slots of the hidden store for every layer: its input, what its feed-forward half reads, and up to two sums that
/// norms or a map come after.
pub(super) const SLOTS: usize = 4;

pub(super) fn input_slot(layer: usize) -> usize {
    SLOTS * layer
}

pub(super) fn middle_slot(layer: usize) -> usize {
    SLOTS * layer + 1
}

pub(super) fn sum_slots(layer: usize) -> std::ops::Range<usize> {
    SLOTS * layer + 2..SLOTS * (layer + 1)
}

/// What the forward sweep left, and where the backward sweep stops.
pub(super) struct Backward<'a> {
    pub prepared: &'a Prepared,
    pub store: HiddenStore,
    pub tapes: Vec<LayerTape>,
    /// Below it nobody asks for gradients.
    pub depth: Depth,
    pub needs: Signals,
    /// Steps of the model's path that are left.
    pub from: usize,
    /// The gradient at the embeddings through inputs of the layers' own, where embeddings are trained.
    pub d_embedded: RefCell<Option<RowAccumulator>>,
}

/// `a + b`.
pub(super) fn added(a: Tensor<2>, b: &Tensor<2>) -> Tensor<2> {
    let mut sum = RowAccumulator::from_tensor(a);
    sum.add(b);
    sum.into_tensor()
}

impl Engine<'_> {
    pub(super) fn backward(
        &self,
        mut sweep: Backward<'_>,
        mut dy: Tensor<2>,
        observer: &mut dyn Observer,
        mut unfinished: Option<&mut UnfinishedWave>,
    ) -> Result<()> {
        let steps = self.model.path().steps();
        for at in (0..sweep.from).rev() {
            if !sweep.depth.reaches_feed_forward(at) {
                return Ok(());
            }
            if let Some(next) = at.checked_sub(1).filter(|next| sweep.depth.reaches_feed_forward(*next)) {
                self.model.read_ahead(steps[next].layer);
            }
            let dx = self.step_backward(&mut sweep, at, dy, observer)?;
            observer.done(SweepPart::Backward(steps[at].layer))?;
            let Some(dx) = dx else { return Ok(()) };
            if let Some(unfinished) = &mut unfinished {
                unfinished.backward_done(at, &dx)?;
            }
            dy = dx;
        }
        let mut dy = self.model.over_streams(&dy);
        if let Some(through) = sweep.d_embedded.take() {
            dy = added(dy, &through.into_tensor());
        }
        self.model.embedding_backward(&sweep.prepared.ids, &dy);
        Ok(())
    }

    /// Gradient at the input of a step of the path, unless the sweep ends in it.
    fn step_backward(
        &self,
        sweep: &mut Backward<'_>,
        at: usize,
        dy: Tensor<2>,
        observer: &mut dyn Observer,
    ) -> Result<Option<Tensor<2>>> {
        let PathStep { layer, attention, feed_forward } = self.model.path().steps()[at];
        let mut tape = std::mem::take(&mut sweep.tapes[at]);
        let mixer = tape.mixer.take();
        // What the experts of the layer before give joins the stream here, and reaches the layer beside it.
        let beside_layer = self.model.config().ends_shortcut(layer).then(|| dy.clone());
        let read = sweep.store.take(middle_slot(at))?;
        // Side by side, what the feed-forward half reads is the input of the layer.
        let (d_middle, beside) = match feed_forward {
            true => {
                let kept = sum_slots(at).take(self.model.config().kept_sums(layer));
                tape.sums = kept.map(|slot| sweep.store.take(slot)).collect::<Result<_>>()?;
                let (dy, beside_half) = match tape.factors.take() {
                    None => (dy, None),
                    Some(factors) => {
                        let (wave, parameters) = (&sweep.prepared.info, sweep.needs.parameters);
                        let (dy, beside) = self.factors_backward(layer, &read, wave, (&factors, dy), parameters)?;
                        (dy, Some(beside))
                    }
                };
                let gradients = self.ffn_backward(sweep, at, &read, dy, tape, observer)?;
                self.model.check_reads()?;
                let Some([d_read, around]) = gradients else { return Ok(None) };
                let around = beside_half.iter().fold(around, added);
                match self.model.config().is_parallel() {
                    true => (around, Some(d_read)),
                    false => (added(d_read, &around), None),
                }
            }
            false => (dy, None),
        };
        drop(read);
        if !sweep.depth.reaches_attention(at) {
            return Ok(None);
        }
        let x = sweep.store.take(input_slot(at))?;
        if !attention {
            let dx = match beside {
                Some(beside) => added(d_middle, &beside),
                None => d_middle,
            };
            return Ok(Some(beside_each_other(dx, beside_layer)));
        }
        let x = self.apart(&x).0;
        let weights = self.model.mixer(layer)?;
        let (table, spans) = (sweep.prepared.tables.of(self.model.config(), layer), &sweep.prepared.spans);
        let tape = match mixer {
            Some(tape) => tape,
            None => weights.project(&x, table, spans, &sweep.prepared.handover)?,
        };
        let wanted = Wanted { input: sweep.depth.reaches_below(at), parameters: sweep.needs.parameters };
        let dx = weights.backward(&x, &tape, spans, table, d_middle, &sweep.prepared.handover, wanted);
        self.model.check_reads()?;
        let dx = match (dx, beside) {
            (Some(dx), Some(beside)) => Some(added(dx, &beside)),
            (dx, _) => dx,
        };
        Ok(dx.map(|dx| beside_each_other(dx, beside_layer)))
    }

    /// The routing of a layer that an earlier run took forward: by the same kernels on the same numbers.
    fn routing_again(
        &self,
        sweep: &Backward<'_>,
        layer: usize,
        read: &Tensor<2>,
        router: &RouterLayer,
        observer: &mut dyn Observer,
    ) -> Result<LayerRouting> {
        let overlay = self.model.routing_overlay().map(|overlay| &**overlay);
        let logits = HostView::new(&router.linear.forward(read));
        let logits = logits.as_slice();
        let tokens = self.router_tokens(layer, router, read, logits, &sweep.prepared.info);
        let routing = LayerRouting::new(&tokens, self.identities(layer), router.scales.as_ref(), overlay)?;
        if sweep.needs.routing {
            let removed = overlay.and_then(|overlay| overlay.removed(layer)).unwrap_or_default();
            let experts = routing.applied.experts;
            let logits = visible_logits(routing.logits(logits), tokens.experts, experts, removed);
            observer.recall(&routing.trace(layer, &sweep.prepared.info, &logits))?;
        }
        Ok(routing)
    }

    /// Gradients through the feed-forward half at what it reads, and around it at what it is added to, unless it is the
    /// last one asked for.
    fn ffn_backward(
        &self,
        sweep: &Backward<'_>,
        at: usize,
        given: &Tensor<2>,
        dy: Tensor<2>,
        tape: LayerTape,
        observer: &mut dyn Observer,
    ) -> Result<Option<[Tensor<2>; 2]>> {
        let needs = sweep.needs;
        let layer = self.model.path().steps()[at].layer;
        let wave = &sweep.prepared.info;
        let stream = &self.apart(given).0;
        let want_input = sweep.depth.reaches_below_feed_forward(at);
        let parameters = needs.parameters;
        let ffn = self.model.ffn(layer)?;
        let (mixing, given) = ffn.open(stream);
        let given = &given;
        let z = ffn.normed(given);
        let dy = self.layer_input_backward(sweep, layer, &ffn, given, &tape.sums, dy)?;
        let BlockGradients { experts: d_blocks, dense: d_dense, around } =
            ffn.block_gradients(dy, mixing.as_ref(), &tape.sums, parameters);
        let [tokens, hidden] = z.dims();
        // a norm that is trained is behind the experts
        let want_dz = want_input || (parameters && (ffn.trains_norms() || ffn.trains_latent()));
        let mut d_router_input = None;
        let mut dz = want_dz.then(|| RowAccumulator::zeros(tokens, hidden, self.model.device()));
        let routing = match (tape.routing, &ffn.router) {
            (None, Some(router)) => {
                Some(self.routing_again(sweep, layer, &router.input(given, &z), router, observer)?)
            }
            (routing, _) => routing,
        };
        if let (Some(routing), Some(router)) = (&routing, &ffn.router) {
            let routed = &routing.applied;
            let kept = tape.experts.into_iter().map(Mutex::new).collect::<Vec<_>>();
            let expert_input = ffn.expert_input(&z);
            let latent = ffn.latent.as_ref().filter(|_| want_dz);
            let mut d_latent =
                latent.map(|_| RowAccumulator::zeros(tokens, expert_input.dims()[1], self.model.device()));
            let into = d_latent.as_mut().or(dz.as_mut());
            let mut d_weights = match self.modulated(layer, &expert_input, routed, needs)? {
                Some(modulated) => self.modulated_backward(
                    layer,
                    &modulated,
                    &expert_input,
                    &d_blocks,
                    routing,
                    &kept,
                    into,
                    parameters,
                )?,
                None => {
                    self.experts_backward(sweep, layer, &expert_input, &d_blocks, routing, &kept, into, observer)?
                }
            };
            let seen_d_weights = routing.identity.as_ref().map(|_| d_weights.clone());
            if let Some(identity) = &routing.identity {
                let along = row_products(&d_blocks, &expert_input);
                routing.identity_slots().for_each(|slot| d_weights[slot] = along[slot / routed.top_k]);
                if let Some(dz) = &mut dz {
                    identity.add_outputs(&d_blocks, dz);
                }
            }
            if let (Some(dz), Some(d_latent)) = (&mut dz, d_latent) {
                let wanted = Wanted { input: true, parameters };
                dz.add(&ffn.latent_gradient(&z, &d_latent.into_tensor(), wanted).expect("wanted"));
            }
            // what changes or replaces the routing may be trained itself
            let trained = parameters && (router.linear.is_trained() || !routing.is_own());
            if dz.is_some() || needs.router_gradients || trained {
                let overlay = self.model.routing_overlay().map(|overlay| &**overlay);
                let read = router.input(given, &z);
                let logits = HostView::new(&router.linear.forward(&read));
                let tokens = self.router_tokens(layer, router, &read, logits.as_slice(), wave);
                let (logits, columns) = (routing.logits(logits.as_slice()), tokens.experts);
                let removed = overlay.and_then(|overlay| overlay.removed(layer)).unwrap_or_default();
                let mut gradients = routing.backward(&tokens, &d_weights, overlay, parameters)?;
                if let Some(adapters) = self.model.adapters().filter(|_| parameters) {
                    if adapters.dense_router(layer) {
                        if router.table.is_some() {
                            let what = "router gradients from all experts in layer";
                            return Err(Error::Unsupported(format!("{what} {layer}, which routes by a table")));
                        }
                        if routing.identity.is_some() {
                            let what = "router gradients from all experts in layer";
                            return Err(Error::Unsupported(format!("{what} {layer}, which has identity experts")));
                        }
                        let values = self.expert_values(layer, &expert_input, &d_blocks, routing, &d_weights)?;
                        gradients.logits = self.model.router().dense_backward(logits, routed, &values);
                    }
                    let losses = adapters.router(layer);
                    let visible = visible_logits(logits, columns, routed.experts, removed);
                    let trace = routing.trace(layer, wave, &visible);
                    if routing.identity.is_none() {
                        losses.iter().for_each(|loss| loss.add_gradient(&trace, &mut gradients.logits));
                    } else if !losses.is_empty() {
                        let mut of_experts = vec![0.0; visible.len()];
                        losses.iter().for_each(|loss| loss.add_gradient(&trace, &mut of_experts));
                        let rows = gradients.logits.chunks_exact_mut(columns);
                        rows.zip(of_experts.chunks_exact(routed.experts.max(1)))
                            .for_each(|(all, own)| all.iter_mut().zip(own).for_each(|(all, own)| *all += own));
                    }
                }
                if needs.router_gradients {
                    observer.router(&RouterGradients {
                        layer,
                        wave,
                        experts: routed.experts,
                        top_k: routed.top_k,
                        input: &read,
                        logits: &visible_logits(logits, columns, routed.experts, removed),
                        selected: &routed.selected,
                        weights: &routed.weights,
                        d_weights: seen_d_weights.as_deref().unwrap_or(&d_weights),
                        d_logits: &first_columns(&gradients.logits, columns, routed.experts),
                        d_gains: &gradients.gains,
                    })?;
                }
                let below = routing.through_change(&tokens, gradients.logits, parameters)?;
                let d_logits = host::from_vec(below.logits, [tokens.tokens(), columns], self.model.device());
                let wanted = Wanted { input: dz.is_some(), parameters };
                let through = router.linear.backward(|| read.clone(), &d_logits, wanted);
                let beside = [gradients.input, below.input].into_iter().filter(|_| dz.is_some());
                let through = sum_of(std::iter::once(through).chain(beside));
                match (&mut dz, through) {
                    (Some(_), through @ Some(_)) if router.norm.is_some() => d_router_input = through,
                    (Some(dz), Some(through)) => dz.add(&through),
                    _ => {}
                }
            }
        }
        let mut d_dense_input = None;
        if let Some(dense) = ffn.dense.as_ref().filter(|dense| dz.is_some() || (parameters && dense.is_trained())) {
            if ffn.apart.is_some() {
                let mut through = dz.is_some().then(|| RowAccumulator::zeros(tokens, hidden, self.model.device()));
                let read = ffn.dense_input(given, &z);
                dense.backward(&read, &d_dense, tape.dense, through.as_mut(), parameters);
                d_dense_input = through.map(RowAccumulator::into_tensor);
            } else {
                dense.backward(&z, &d_dense, tape.dense, dz.as_mut(), parameters);
            }
        }
        let Some(mut dz) = dz else { return Ok(None) };
        let around = match ffn.carry {
            // What the blocks are added to is what they read.
            Some(carry) => {
                dz.add(&scaled(around, carry));
                Tensor::zeros([tokens, hidden], self.model.device())
            }
            None => around,
        };
        let through = ffn.input_gradient(given, dz, [d_dense_input, d_router_input], parameters);
        Ok(want_input.then(|| match (&ffn.streams, &mixing, tape.sums.first()) {
            (Some(streams), Some(mixing), Some(half)) => {
                streams.input_gradients(stream, mixing, half, &around, &through)
            }
            _ => [through, around],
        }))
    }

    /// Backward of the routed experts of a layer: the gradient of each routing weight `[T, k]`, and that of `z`, added
    /// to `dz`.
    #[allow(clippy::too_many_arguments)]
    fn experts_backward(
        &self,
        sweep: &Backward<'_>,
        layer: usize,
        z: &Tensor<2>,
        d_blocks: &Tensor<2>,
        routing: &LayerRouting,
        kept: &[Mutex<Option<Tensor<2>>>],
        mut dz: Option<&mut RowAccumulator>,
        observer: &mut dyn Observer,
    ) -> Result<Vec<f32>> {
        let (needs, wave) = (sweep.needs, &sweep.prepared.info);
        let routed = &routing.applied;
        let mut d_weights = vec![0.0f32; routed.weights.len()];
        let dispatch = routing.dispatch(true, usize::MAX);
        let output = needs.gradients && needs.outputs;
        let wanted = ExpertWanted { input: dz.is_some(), units: needs.gradients, output, parameters: needs.parameters };
        let run = |e: usize| {
            let kept = kept.get(e).and_then(|kept| lock(kept).take());
            self.expert_backward(layer, e, z, d_blocks, kept, &dispatch, wanted)
        };
        self.for_experts(routed.experts, run, |e, run: ExpertBackwardRun| {
            let tokens = dispatch.expert(e);
            let ExpertBackwardRun { weights, input, upstream, gradients, output, d_input } = run;
            if let Some(units) = &gradients.d_units {
                observer.expert(&ExpertTrace {
                    layer,
                    expert: e,
                    rows: tokens.rows,
                    routing_weights: &self.output_weights(tokens.weights),
                    segments: &segments(tokens.rows, wave),
                    input: &input,
                    units: Some(&gradients.units),
                    output: output.as_ref(),
                    backward: Some(ExpertGradients { upstream: &upstream, units, gate_up: &gradients.d_gate_up }),
                    expert_weights: &weights,
                })?;
            }
            if let (Some(dz), Some(d_input)) = (dz.as_deref_mut(), d_input) {
                dz.add_rows(tokens.rows, None, &d_input);
            }
            for (&slot, d) in tokens.slots.iter().zip(gradients.d_row_weights) {
                d_weights[slot as usize] = d;
            }
            Ok(())
        })?;
        Ok(d_weights)
    }
}

//! The two halves of a decoder layer, forward.

use burn::tensor::Tensor;

use super::{
    Engine, LayerChange,
    backward::added,
    experts::{ExpertRun, segments},
    prepare::Prepared,
    routing::{LayerRouting, visible_logits},
};
use crate::{
    error::{Error, Result},
    host::HostView,
    layers::{MixerTape, RouterLayer},
    memory::Keep,
    overlay::{RouterTokens, RoutingOverlay},
    router::Routed,
    trace::{ExpertTrace, HalfInput, IdentityTrace, Observer, SequenceInfo, Signals, WaveInfo},
};

/// What the forward sweep leaves for the backward sweep of one layer.
#[derive(Default)]
pub(crate) struct LayerTape {
    pub(super) mixer: Option<MixerTape>,
    pub(super) dense: Option<Vec<Tensor<2>>>,
    pub(super) experts: Vec<Option<Tensor<2>>>,
    pub(super) routing: Option<LayerRouting>,
    /// Sums of the blocks that a norm comes after.
    pub(super) sums: Vec<Tensor<2>>,
    /// What each token gets of the feed-forward half, where a rule says.
    pub(super) factors: Option<Vec<f32>>,
}

/// How the feed-forward half of a layer is run.
#[derive(Clone, Copy)]
pub(crate) struct FfnPass<'a> {
    /// Decoder layer.
    pub layer: usize,
    /// The wave its tokens are.
    pub wave: &'a WaveInfo,
    /// Activations to leave on the tape.
    pub keep: Keep,
    /// What the observer sees.
    pub needs: Signals,
    /// Nobody reads the output.
    pub skip_output: bool,
    /// Experts and routing to use instead of the model's.
    pub change: Option<&'a LayerChange>,
    /// Leave on the tape what a backward pass through norms after the blocks needs.
    pub keep_sums: bool,
}

impl<'a> FfnPass<'a> {
    /// A plain forward pass.
    pub fn new(layer: usize, wave: &'a WaveInfo) -> Self {
        Self {
            layer,
            wave,
            keep: Keep::default(),
            needs: Signals::NONE,
            skip_output: false,
            change: None,
            keep_sums: false,
        }
    }
}

/// A tensor and what goes beside it `[T, 2 H]`, where something does.
pub(crate) fn beside_each_other(x: Tensor<2>, beside: Option<Tensor<2>>) -> Tensor<2> {
    match beside {
        Some(beside) => Tensor::cat(vec![x, beside], 1),
        None => x,
    }
}

impl Engine<'_> {
    /// Output of the feed-forward half of decoder layer `layer` on `input`: `stream + ffn(norm(read))`, shown to
    /// `observer` (forward signals only). The T tokens are one sequence of which nothing is predicted. What a layer
    /// adds after that of an [input of its own](moe_checkpoint::LayerInputs) is not in it.
    ///
    /// # Errors
    /// [`Error::Input`] if the observer needs gradients or there is no such layer, and whatever it refuses.
    pub fn feed_forward<'t>(
        &self,
        layer: usize,
        input: impl Into<HalfInput<'t>>,
        observer: &mut dyn Observer,
    ) -> Result<Tensor<2>> {
        self.feed_forward_changed(layer, input, &LayerChange::default(), observer)
    }

    /// As [`feed_forward`](Self::feed_forward), with the layer changed.
    ///
    /// # Errors
    /// As [`feed_forward`](Self::feed_forward), and those of the change.
    pub fn feed_forward_changed<'t>(
        &self,
        layer: usize,
        input: impl Into<HalfInput<'t>>,
        change: &LayerChange,
        observer: &mut dyn Observer,
    ) -> Result<Tensor<2>> {
        let needs = observer.needs();
        if needs.backward() {
            return Err(Error::input("observer needs", "gradients", "forward signals only"));
        }
        let layers = self.model.config().layers.len();
        if layer >= layers {
            return Err(Error::input("layer", layer, format!("below {layers}")));
        }
        let input = input.into();
        let tokens = input.stream.dims()[0];
        let sequences = vec![SequenceInfo { tokens: 0..tokens, loss_tokens: 0 }];
        let wave = WaveInfo { id: 0, tokens, ids: Vec::new(), sequences };
        let pass = FfnPass { needs, change: Some(change), ..FfnPass::new(layer, &wave) };
        let output = self.ffn_forward(pass, input, &mut LayerTape::default(), observer)?;
        Ok(self.joined(layer, &output))
    }

    /// The residual stream after a layer, and what its experts or those of the layer before give beside it, where that
    /// joins it later: `[T, 2 H]` taken apart.
    pub(crate) fn apart(&self, x: &Tensor<2>) -> (Tensor<2>, Option<Tensor<2>>) {
        let hidden = self.model.config().hidden_size;
        match x.dims()[1] == 2 * hidden && self.model.config().has_shortcuts() {
            true => (x.clone().narrow(1, 0, hidden), Some(x.clone().narrow(1, hidden, hidden))),
            false => (x.clone(), None),
        }
    }

    /// The residual stream after layer `layer` as if what its experts give joined it there.
    pub(crate) fn joined(&self, layer: usize, output: &Tensor<2>) -> Tensor<2> {
        match (self.model.config().starts_shortcut(layer), self.apart(output)) {
            (true, (stream, Some(experts))) => added(stream, &experts),
            _ => output.clone(),
        }
    }

    /// Identity experts of a layer.
    pub(super) fn identities(&self, layer: usize) -> usize {
        self.model.config().moe(layer).map_or(0, |moe| moe.identities)
    }

    /// Routing of tokens with these router logits `[T, E]` in MoE layer `layer`, under `overlay` instead of the model's
    /// own.
    ///
    /// # Errors
    /// [`Error::Input`] if the layer has no experts, the logits are not a multiple of them, or the overlay does not
    /// fit.
    pub fn route(&self, layer: usize, logits: &[f32], overlay: Option<&dyn RoutingOverlay>) -> Result<Routed> {
        let experts = match self.model.config().moe(layer) {
            Some(moe) if logits.len().is_multiple_of(moe.router_rows().max(1)) => moe.router_rows(),
            Some(moe) => {
                let expected = format!("a multiple of the {} experts of layer {layer}", moe.router_rows());
                return Err(Error::input("router logits", logits.len(), expected));
            }
            None => return Err(Error::input("layer", layer, "one with routed experts")),
        };
        let ffn = self.model.ffn(layer)?;
        let Some(router) = &ffn.router else { return Err(Error::input("layer", layer, "one with a router")) };
        let tokens = logits.len() / experts.max(1);
        let ids = Vec::new();
        let wave = WaveInfo { id: 0, tokens, ids, sequences: vec![SequenceInfo { tokens: 0..tokens, loss_tokens: 0 }] };
        let tokens = RouterTokens {
            layer,
            experts,
            logits,
            bias: router.selection_bias.as_deref(),
            input: None,
            router: self.model.router(),
            table: router.table.as_deref(),
            wave: &wave,
        };
        Ok(LayerRouting::new(&tokens, self.identities(layer), router.scales.as_ref(), overlay)?.applied)
    }

    /// Where the tokens of a layer go, as the model routes them; `None` in a layer without experts.
    pub(crate) fn routed(&self, layer: usize, half: HalfInput<'_>, wave: &WaveInfo) -> Result<Option<Routed>> {
        let overlay = self.model.routing_overlay().map(|overlay| &**overlay);
        let ffn = self.model.ffn_routed_by(layer, overlay)?;
        let Some(router) = &ffn.router else { return Ok(None) };
        let half = ffn.open(&self.apart(half.read).0).1;
        let read = router.input(&half, &ffn.normed(&half));
        let logits = HostView::new(&router.linear.forward(&read));
        let tokens = self.router_tokens(layer, router, &read, logits.as_slice(), wave);
        Ok(Some(LayerRouting::new(&tokens, self.identities(layer), router.scales.as_ref(), overlay)?.applied))
    }

    /// The tokens of a layer as what routes them sees them.
    pub(super) fn router_tokens<'a>(
        &'a self,
        layer: usize,
        router: &'a RouterLayer,
        read: &'a Tensor<2>,
        logits: &'a [f32],
        wave: &'a WaveInfo,
    ) -> RouterTokens<'a> {
        RouterTokens {
            layer,
            experts: router.linear.weight.dims()[0],
            logits,
            bias: router.selection_bias.as_deref(),
            input: Some(read),
            router: self.model.router(),
            table: router.table.as_deref(),
            wave,
        }
    }

    /// What the feed-forward half of a layer is given, from the layer's input and what its attention half gives.
    pub(crate) fn half<'t>(&self, x: &'t Tensor<2>, middle: &'t Tensor<2>) -> HalfInput<'t> {
        HalfInput { stream: middle, read: if self.model.config().is_parallel() { x } else { middle } }
    }

    pub(super) fn attention_forward(
        &self,
        layer: usize,
        x: &Tensor<2>,
        prepared: &Prepared,
        tape: &mut LayerTape,
        keep: bool,
    ) -> Result<Tensor<2>> {
        let mixer = self.model.mixer(layer)?;
        let (x, beside) = self.apart(x);
        self.model.count().pass_half(x.dims()[0]);
        let table = prepared.tables.of(self.model.config(), layer);
        let projected = mixer.project(&x, table, &prepared.spans, &prepared.handover)?;
        let middle = mixer.mix(&x, &projected, &prepared.spans);
        if keep {
            tape.mixer = Some(projected);
        }
        self.model.check_reads()?;
        Ok(beside_each_other(middle, beside))
    }

    pub(crate) fn ffn_forward(
        &self,
        pass: FfnPass<'_>,
        HalfInput { stream, read: given }: HalfInput<'_>,
        tape: &mut LayerTape,
        observer: &mut dyn Observer,
    ) -> Result<Tensor<2>> {
        let ((stream, beside), given) = (self.apart(stream), self.apart(given).0);
        let (stream, given) = (&stream, &given);
        self.model.count().pass_half(stream.dims()[0]);
        let FfnPass { layer, wave, keep, needs, skip_output, change, keep_sums } = pass;
        let routing = change.and_then(|change| change.routing.as_ref()).or(self.model.routing_overlay()).map(|r| &**r);
        let overlay = change.and_then(|change| change.experts.as_deref());
        let ffn = self.model.ffn_routed_by(layer, routing)?;
        let (mixing, given) = ffn.open(given);
        let given = &given;
        let z = ffn.normed(given);
        let mut sums = ffn.sums(stream);
        if let Some(router) = &ffn.router {
            let read = router.input(given, &z);
            let logits = HostView::new(&router.linear.forward(&read));
            let logits = logits.as_slice();
            let tokens = self.router_tokens(layer, router, &read, logits, wave);
            let mut routed = LayerRouting::new(&tokens, ffn.identities, router.scales.as_ref(), routing)?;
            if let Some(stream) = self.model.expert_stream() {
                let skipped = stream.begin_layer(layer, &routed.applied);
                if let Some(next) = stream.next_layer(layer).filter(|_| stream.options().prefetch) {
                    // The next layer's router on what this one's reads: mostly the experts that it will choose.
                    let ahead = self.model.ffn(next)?;
                    if let Some(router) = &ahead.router {
                        let read = router.input(given, &z);
                        let logits = HostView::new(&router.linear.forward(&read));
                        let tokens = self.router_tokens(next, router, &read, logits.as_slice(), wave);
                        stream.prefetch(
                            next,
                            &LayerRouting::new(&tokens, ahead.identities, router.scales.as_ref(), None)?.applied,
                        );
                    }
                }
                if skipped.contains(&true) {
                    routed = routed.skipping(&skipped);
                }
            }
            let experts = routed.applied.experts;
            self.model.count().route(tokens.tokens());
            let logits = routed.logits(logits);
            let adapters = self.model.adapters().filter(|_| needs.parameters);
            let watchers = adapters.map(|adapters| adapters.router(layer)).unwrap_or_default();
            if needs.routing || !watchers.is_empty() {
                let removed = routing.and_then(|routing| routing.removed(layer)).unwrap_or_default();
                let visible = visible_logits(logits, tokens.experts, experts, removed);
                let trace = routed.trace(layer, wave, &visible);
                if needs.routing {
                    observer.layer(&trace)?;
                    if let Some(identity) = &routed.identity {
                        let rows = logits.chunks_exact(tokens.experts);
                        let logits: Vec<f32> = rows.flat_map(|row| &row[experts..]).copied().collect();
                        let (identities, weights) = (ffn.identities, &*identity.weights);
                        observer.identities(&IdentityTrace { layer, identities, logits: &logits, weights })?;
                    }
                }
                watchers.iter().for_each(|watcher| watcher.routed(&trace));
            }
            let read = ffn.expert_input(&z);
            let modulated = self.modulated(layer, &read, &routed.applied, needs)?;
            let main = modulated.as_ref().map_or(usize::MAX, |modulated| modulated.main);
            let dispatch = routed.dispatch(needs.experts() || needs.backward(), main);
            let observe = needs.experts() && !needs.gradients;
            if observe || !skip_output {
                tape.experts = vec![None; experts];
                let want_output = !skip_output || needs.outputs;
                let run = |e: usize| match &modulated {
                    Some(modulated) => self.modulated_forward(layer, e, modulated, &dispatch, overlay),
                    None => self.expert_forward(layer, e, &read, &dispatch, overlay, want_output, observe),
                };
                self.for_experts(experts, run, |e, run: ExpertRun| {
                    let tokens = dispatch.expert(e);
                    if observe {
                        observer.expert(&ExpertTrace {
                            layer,
                            expert: e,
                            rows: tokens.rows,
                            routing_weights: &self.output_weights(tokens.weights),
                            segments: &segments(tokens.rows, wave),
                            input: &run.input,
                            units: Some(&run.units),
                            output: run.output.as_ref().filter(|_| needs.outputs),
                            backward: None,
                            expert_weights: &run.weights,
                        })?;
                    }
                    if let Some(y) = run.output.as_ref().filter(|_| !skip_output) {
                        let weights = (!self.weights_inputs()).then_some(tokens.weights);
                        sums.experts().add_rows(tokens.rows, weights, y);
                    }
                    if keep.experts {
                        tape.experts[e] = Some(run.gate_up);
                    }
                    Ok(())
                })?;
            }
            if let Some(identity) = routed.identity.as_ref().filter(|_| !skip_output) {
                identity.add_outputs(&read, sums.experts());
            }
            tape.routing = Some(routed);
        }
        if let Some(dense) = ffn.dense.as_ref().filter(|_| !skip_output) {
            let z = ffn.dense_input(given, &z);
            if keep.dense {
                dense.forward(&z, sums.dense(), Some(tape.dense.get_or_insert_default()));
            } else {
                dense.forward(&z, sums.dense(), None);
            }
        }
        self.model.check_reads()?;
        let (output, kept) = ffn.output(stream, mixing.as_ref(), sums);
        if keep_sums {
            tape.sums = kept;
        }
        Ok(match beside {
            Some(experts) => added(output, &experts),
            None => output,
        })
    }
}

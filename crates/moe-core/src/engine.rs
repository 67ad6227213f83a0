//! Sweeps: a wave through the model layer by layer, forward and backward, experts outermost.
//!
//! Per wave, forward: attention per sequence, router for the whole wave, then each expert once for all its tokens. Head: loss and its
//! gradient in pieces of tokens and vocabulary. Backward, from the last to the first MoE layer: what was not kept is computed again
//! by the same kernels on the same shapes, so memory limits never change a bit of the result. See [`crate::memory`].

use std::{
    ops::Range,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::{
    data::Wave,
    error::{Error, Result},
    experts::ExpertTensors,
    host::{self, HostView},
    kernels::{
        loss::cross_entropy,
        rope::{Positions, RotaryTable},
        rows::{RowAccumulator, gather_rows},
        swiglu::SwigluGradients,
    },
    layers::{AttentionTape, FfnLayer},
    memory::{self, Keep, MemoryPlan, WaveSize},
    model::Model,
    overlay::ExpertOverlay,
    router::{Dispatch, Routed},
    store::HiddenStore,
    trace::{ExpertGradients, ExpertTrace, LayerTrace, Observer, Segment, SequenceInfo, Signals, WaveInfo},
};

/// How an [`Engine`] works.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Tokens whose logits exist at once. Part of the numerics.
    pub head_tokens: usize,
    /// Where layer inputs go when memory is short; the system's temporary directory by default.
    pub spill_dir: PathBuf,
    /// Compute the loss even if no observer needs gradients or logits.
    pub loss: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { head_tokens: 512, spill_dir: std::env::temp_dir(), loss: false }
    }
}

/// What a sweep over one wave found.
#[derive(Clone, Debug, PartialEq)]
pub struct WaveReport {
    /// Tokens.
    pub tokens: usize,
    /// Predicted tokens.
    pub loss_tokens: usize,
    /// Sum of the cross-entropy over the predicted tokens, in nats, if it was computed.
    pub loss: Option<f64>,
    /// Sum per sequence.
    pub sequence_losses: Option<Vec<f64>>,
}

/// Changes a layer in the middle of a forward sweep: the following layers see the changed one. For sequential pruning, merging
/// and refits.
pub trait LayerTransform {
    /// Called when MoE layer `layer` has been run and observed. `input [T, H]` is the experts' input (normed), `output [T, H]` the
    /// layer's output. Experts of the returned overlay replace those of the layer for this sweep.
    ///
    /// # Errors
    /// Whatever makes the transform impossible.
    fn transform(
        &mut self,
        layer: usize,
        input: &Tensor<2>,
        output: &Tensor<2>,
    ) -> Result<Option<Arc<dyn ExpertOverlay>>>;
}

/// Runs waves through a [`Model`].
#[derive(Debug)]
pub struct Engine<'m> {
    model: &'m Model,
    options: EngineOptions,
}

/// A wave prepared for the model.
struct Prepared {
    info: WaveInfo,
    ids: Vec<u32>,
    /// Next token of each position, where it counts.
    targets: Vec<Option<u32>>,
    spans: Vec<Range<usize>>,
    table: RotaryTable,
}

/// What the forward sweep leaves for the backward sweep of one layer.
#[derive(Default)]
pub(crate) struct LayerTape {
    attention: Option<AttentionTape>,
    dense: Option<Vec<Tensor<2>>>,
    experts: Vec<Option<Tensor<2>>>,
    routed: Option<Routed>,
}

/// Slots of the hidden store: the input of a layer and of its feed-forward half.
fn input_slot(layer: usize) -> usize {
    2 * layer
}

fn middle_slot(layer: usize) -> usize {
    2 * layer + 1
}

impl<'m> Engine<'m> {
    /// An engine on `model`.
    pub fn new(model: &'m Model, options: EngineOptions) -> Self {
        Self { model, options }
    }

    /// The memory plan of waves of `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Memory`] if the model's `max_memory` cannot hold them.
    pub fn plan(&self, tokens: usize, needs: Signals) -> Result<MemoryPlan> {
        let size = WaveSize {
            tokens,
            gradients: needs.gradients,
            head: self.needs_head(needs),
            head_tokens: self.options.head_tokens,
            experts_together: memory::experts_together(self.model.device()),
        };
        memory::plan(self.model.config(), size, memory::limit(self.model.max_memory()))
    }

    fn needs_head(&self, needs: Signals) -> bool {
        needs.gradients || needs.logits || self.options.loss
    }

    /// Runs one wave and shows it to `observer`.
    ///
    /// # Errors
    /// [`Error::Input`] for an empty wave or token ids outside the vocabulary, [`Error::Memory`], [`Error::NotFinite`] for a NaN
    /// or infinite loss, and whatever the observer refuses.
    pub fn run(&self, wave: &Wave, observer: &mut dyn Observer) -> Result<WaveReport> {
        self.run_with(wave, observer, None)
    }

    /// As [`run`](Self::run), with a transform of each MoE layer during the forward sweep. Gradients cannot be asked for: they
    /// would belong to neither model.
    ///
    /// # Errors
    /// As [`run`](Self::run); [`Error::Input`] if the observer needs gradients.
    pub fn run_transformed(
        &self,
        wave: &Wave,
        observer: &mut dyn Observer,
        transform: &mut dyn LayerTransform,
    ) -> Result<WaveReport> {
        if observer.needs().gradients {
            return Err(Error::input("observer needs", "gradients", "forward signals only, beside a layer transform"));
        }
        self.run_with(wave, observer, Some(transform))
    }

    fn run_with(
        &self,
        wave: &Wave,
        observer: &mut dyn Observer,
        mut transform: Option<&mut dyn LayerTransform>,
    ) -> Result<WaveReport> {
        let needs = observer.needs();
        let prepared = self.prepare(wave)?;
        let plan = self.plan(prepared.ids.len(), needs)?;
        self.model.set_residency(plan.residency);
        observer.begin_wave(&prepared.info)?;

        let layers = &self.model.config().layers;
        let first_moe = (0..layers.len()).find(|&l| self.model.config().moe(l).is_some()).unwrap_or(layers.len());
        let last_moe = (0..layers.len()).rev().find(|&l| self.model.config().moe(l).is_some());
        let head = self.needs_head(needs);
        let stop = if head || needs.hidden { layers.len() } else { last_moe.map_or(0, |l| l + 1) };
        let spill = plan.spill.then_some(self.options.spill_dir.as_path());
        let mut store = HiddenStore::new(2 * layers.len(), spill)?;
        let mut tapes: Vec<LayerTape> = (0..layers.len()).map(|_| LayerTape::default()).collect();

        let mut x = self.model.embed(&prepared.ids)?;
        for (layer, tape) in tapes.iter_mut().enumerate().take(stop) {
            if needs.hidden {
                observer.hidden(layer, &x)?;
            }
            let backward = needs.gradients && layer >= first_moe;
            let keep = if backward { plan.keep[layer] } else { Keep::default() };
            let middle = self.attention_forward(layer, &x, &prepared, tape, keep.attention && layer > first_moe)?;
            if backward && layer > first_moe {
                store.put(input_slot(layer), x)?;
            }
            let skip_output = !head && !needs.hidden && Some(layer) == last_moe && transform.is_none();
            x = self.ffn_forward(layer, &middle, &prepared.info, tape, keep, needs, skip_output, observer)?;
            if let Some(transform) = transform.as_deref_mut().filter(|_| self.model.config().moe(layer).is_some()) {
                let ffn = self.model.ffn(layer)?;
                let z = ffn.normed(&middle);
                if let Some(overlay) = transform.transform(layer, &z, &x)? {
                    x = self.transformed_output(layer, &ffn, &middle, &z, &overlay, tape)?;
                }
            }
            if backward {
                store.put(middle_slot(layer), middle)?;
            }
        }

        let mut report = WaveReport {
            tokens: prepared.ids.len(),
            loss_tokens: prepared.info.loss_tokens(),
            loss: None,
            sequence_losses: None,
        };
        if head {
            let (losses, dx) = self.head(x, &prepared, needs, observer)?;
            let sums: Vec<f64> = prepared.spans.iter().map(|s| losses[s.clone()].iter().sum()).collect();
            let total: f64 = sums.iter().sum();
            if !total.is_finite() {
                return Err(Error::NotFinite { what: "the loss".into(), wave: wave.id });
            }
            (report.loss, report.sequence_losses) = (Some(total), Some(sums));
            if let Some(dx) = dx {
                self.backward(dx, first_moe, &prepared, store, tapes, needs, observer)?;
            }
        }
        observer.end_wave(&prepared.info)?;
        self.model.checkpoint().release();
        Ok(report)
    }

    /// Output of the feed-forward half of decoder layer `layer` on `x [T, H]`: `x + ffn(norm(x))`, shown to `observer` (forward
    /// signals only). The T tokens are one sequence of which nothing is predicted.
    ///
    /// # Errors
    /// [`Error::Input`] if the observer needs gradients or there is no such layer, and whatever it refuses.
    pub fn feed_forward(&self, layer: usize, x: &Tensor<2>, observer: &mut dyn Observer) -> Result<Tensor<2>> {
        let needs = observer.needs();
        if needs.gradients {
            return Err(Error::input("observer needs", "gradients", "forward signals only"));
        }
        let layers = self.model.config().layers.len();
        if layer >= layers {
            return Err(Error::input("layer", layer, format!("below {layers}")));
        }
        let tokens = x.dims()[0];
        let sequences = vec![SequenceInfo { tokens: 0..tokens, loss_tokens: 0 }];
        let info = WaveInfo { id: 0, tokens, sequences };
        self.ffn_forward(layer, x, &info, &mut LayerTape::default(), Keep::default(), needs, false, observer)
    }

    fn prepare(&self, wave: &Wave) -> Result<Prepared> {
        let mut info = WaveInfo { id: wave.id, tokens: 0, sequences: Vec::new() };
        let (mut ids, mut targets, mut spans) = (Vec::new(), Vec::new(), Vec::new());
        for (i, sequence) in wave.sequences.iter().enumerate() {
            if sequence.ids.is_empty() {
                return Err(Error::input(format!("wave {} sequence {i}", wave.id), "no tokens", "at least one"));
            }
            let start = ids.len();
            ids.extend_from_slice(&sequence.ids);
            for t in 1..=sequence.ids.len() {
                targets.push(sequence.counts(t).then(|| sequence.ids[t]));
            }
            info.sequences.push(SequenceInfo { tokens: start..ids.len(), loss_tokens: sequence.loss_tokens() });
            spans.push(start..ids.len());
        }
        if ids.is_empty() {
            return Err(Error::input(format!("wave {}", wave.id), "no sequences", "at least one"));
        }
        info.tokens = ids.len();
        let positions: Vec<_> = spans.iter().map(|s| Positions { range: 0..s.len(), length: s.len() }).collect();
        let table = self.model.rope().table(&positions);
        Ok(Prepared { info, ids, targets, spans, table })
    }

    fn attention_forward(
        &self,
        layer: usize,
        x: &Tensor<2>,
        prepared: &Prepared,
        tape: &mut LayerTape,
        keep: bool,
    ) -> Result<Tensor<2>> {
        let attention = self.model.attention(layer)?;
        let projected = attention.project(x, &prepared.table);
        let middle = attention.mix(x, &projected, &prepared.spans);
        if keep {
            tape.attention = Some(projected);
        }
        Ok(middle)
    }

    #[allow(clippy::too_many_arguments)]
    pub(crate) fn ffn_forward(
        &self,
        layer: usize,
        middle: &Tensor<2>,
        wave: &WaveInfo,
        tape: &mut LayerTape,
        keep: Keep,
        needs: Signals,
        skip_output: bool,
        observer: &mut dyn Observer,
    ) -> Result<Tensor<2>> {
        let ffn = self.model.ffn(layer)?;
        let z = ffn.normed(middle);
        let mut out = ffn.accumulator(middle);
        if let Some(router) = &ffn.router {
            let logits = HostView::new(&router.linear.forward(&z));
            let experts = router.linear.weight.dims()[0];
            let routed = self.model.router().route(logits.as_slice(), experts, router.selection_bias.as_deref());
            if needs.routing {
                observer.layer(&LayerTrace {
                    layer,
                    wave,
                    experts,
                    top_k: routed.top_k,
                    logits: logits.as_slice(),
                    selected: &routed.selected,
                    weights: &routed.weights,
                })?;
            }
            let dispatch = routed.dispatch();
            let observe = needs.experts() && !needs.gradients;
            if observe || !skip_output {
                tape.experts = vec![None; experts];
                let run =
                    |e: usize| self.expert_forward(layer, e, &z, &dispatch, !skip_output || needs.outputs, observe);
                self.for_experts(experts, run, |e, run: ExpertRun| {
                    let tokens = dispatch.expert(e);
                    if observe {
                        observer.expert(&ExpertTrace {
                            layer,
                            expert: e,
                            rows: tokens.rows,
                            routing_weights: tokens.weights,
                            segments: &segments(tokens.rows, wave),
                            input: &run.input,
                            units: Some(&run.units),
                            output: run.output.as_ref().filter(|_| needs.outputs),
                            backward: None,
                            expert_weights: &run.weights,
                        })?;
                    }
                    if let Some(y) = run.output.as_ref().filter(|_| !skip_output) {
                        out.add_rows(tokens.rows, Some(tokens.weights), y);
                    }
                    if keep.experts {
                        tape.experts[e] = Some(run.gate_up);
                    }
                    Ok(())
                })?;
            }
            tape.routed = Some(routed);
        }
        if let Some(dense) = ffn.dense.as_ref().filter(|_| !skip_output) {
            if keep.dense {
                dense.forward(&z, &mut out, Some(tape.dense.get_or_insert_default()));
            } else {
                dense.forward(&z, &mut out, None);
            }
        }
        Ok(ffn.output(middle, out))
    }

    /// Calls `compute` for each expert and `then` with its result, if it has one, in ascending order. On the host a few experts are
    /// computed at a time, each mostly by one thread, which wastes less than sharing out every small product.
    fn for_experts<R: Send>(
        &self,
        experts: usize,
        compute: impl Fn(usize) -> Result<Option<R>> + Sync,
        mut then: impl FnMut(usize, R) -> Result<()>,
    ) -> Result<()> {
        let together = memory::experts_together(self.model.device());
        let all: Vec<usize> = (0..experts).collect();
        for chunk in all.chunks(together) {
            let results: Vec<Result<Option<R>>> = match chunk {
                [e] => vec![compute(*e)],
                _ => chunk.par_iter().map(|&e| compute(e)).collect(),
            };
            for (&e, result) in chunk.iter().zip(results) {
                if let Some(result) = result? {
                    then(e, result)?;
                }
            }
        }
        Ok(())
    }

    /// Runs one expert on its tokens; nothing for an expert without any.
    fn expert_forward(
        &self,
        layer: usize,
        expert: usize,
        z: &Tensor<2>,
        dispatch: &Dispatch,
        want_output: bool,
        observed: bool,
    ) -> Result<Option<ExpertRun>> {
        let tokens = dispatch.expert(expert);
        if tokens.rows.is_empty() {
            return Ok(None);
        }
        let weights = self.model.expert(layer, expert)?;
        if weights.is_zero() && !observed {
            return Ok(None);
        }
        let input = gather_rows(z, tokens.rows);
        let gate_up = weights.pre_activations(&input);
        let units = weights.units(&gate_up);
        let output = want_output.then(|| weights.output(&units));
        Ok(Some(ExpertRun { weights, input, gate_up, units, output }))
    }

    /// Output of a layer whose experts are replaced by an overlay.
    fn transformed_output(
        &self,
        layer: usize,
        ffn: &FfnLayer,
        middle: &Tensor<2>,
        z: &Tensor<2>,
        overlay: &Arc<dyn ExpertOverlay>,
        tape: &LayerTape,
    ) -> Result<Tensor<2>> {
        let mut out = ffn.accumulator(middle);
        let dispatch = tape.routed.as_ref().expect("an MoE layer was routed").dispatch();
        for e in 0..tape.routed.as_ref().map_or(0, |r| r.experts) {
            let tokens = dispatch.expert(e);
            if tokens.rows.is_empty() {
                continue;
            }
            let weights = self.model.replaced_expert(&**overlay, layer, e)?;
            let gate_up = weights.pre_activations(&gather_rows(z, tokens.rows));
            out.add_rows(tokens.rows, Some(tokens.weights), &weights.output(&weights.units(&gate_up)));
        }
        if let Some(dense) = &ffn.dense {
            dense.forward(z, &mut out, None);
        }
        Ok(ffn.output(middle, out))
    }

    /// Loss of every position, and the gradient of their sum at the last layer's output.
    fn head(
        &self,
        x: Tensor<2>,
        prepared: &Prepared,
        needs: Signals,
        observer: &mut dyn Observer,
    ) -> Result<(Vec<f64>, Option<Tensor<2>>)> {
        let norm = self.model.final_norm()?;
        let tokens = prepared.targets.len();
        // logits of positions without a target are computed only if someone looks at them
        let rows: Vec<u32> =
            (0..tokens as u32).filter(|&t| needs.logits || prepared.targets[t as usize].is_some()).collect();
        let mut losses = vec![0.0; tokens];
        let mut dx = needs.gradients.then(|| RowAccumulator::zeros(tokens, x.dims()[1], self.model.device()));
        for rows in rows.chunks(self.options.head_tokens) {
            let x = gather_rows(&x, rows);
            let blocks = self.model.head_forward(&norm.forward(&x))?; // [chunk, V_b] each
            if needs.logits {
                let logits = HostView::new(&Tensor::cat(blocks.clone(), 1));
                observer.logits(rows[0] as usize, &logits, self.model.config().vocab_size)?;
            }
            let targets: Vec<Option<u32>> = rows.iter().map(|&t| prepared.targets[t as usize]).collect();
            let result = cross_entropy(blocks, &targets, dx.is_some());
            for (&t, loss) in rows.iter().zip(result.losses) {
                losses[t as usize] = loss;
            }
            if let Some(dx) = &mut dx {
                let dh = self.model.head_backward(result.d_logits)?;
                dx.add_rows(rows, None, &norm.backward(&x, &dh));
            }
        }
        Ok((losses, dx.map(RowAccumulator::into_tensor)))
    }

    #[allow(clippy::too_many_arguments)]
    fn backward(
        &self,
        mut dy: Tensor<2>,
        first_moe: usize,
        prepared: &Prepared,
        mut store: HiddenStore,
        mut tapes: Vec<LayerTape>,
        needs: Signals,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        for layer in (first_moe..self.model.config().layers.len()).rev() {
            let tape = std::mem::take(&mut tapes[layer]);
            let middle = store.take(middle_slot(layer))?;
            let LayerTape { attention, dense, experts, routed } = tape;
            // below the first MoE layer nobody asks for gradients
            let want_input = layer > first_moe;
            let d_middle =
                self.ffn_backward(layer, &middle, dy, routed, dense, experts, prepared, want_input, needs, observer)?;
            let Some(d_middle) = d_middle else { return Ok(()) };
            drop(middle);
            let x = store.take(input_slot(layer))?;
            let weights = self.model.attention(layer)?;
            let tape = attention.unwrap_or_else(|| weights.project(&x, &prepared.table));
            dy = weights.backward(&x, &tape, &prepared.spans, &prepared.table, d_middle);
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn ffn_backward(
        &self,
        layer: usize,
        middle: &Tensor<2>,
        dy: Tensor<2>,
        routed: Option<Routed>,
        kept_dense: Option<Vec<Tensor<2>>>,
        kept_experts: Vec<Option<Tensor<2>>>,
        prepared: &Prepared,
        want_input: bool,
        needs: Signals,
        observer: &mut dyn Observer,
    ) -> Result<Option<Tensor<2>>> {
        let ffn = self.model.ffn(layer)?;
        let z = ffn.normed(middle);
        let d_blocks = ffn.block_gradient(&dy);
        let [tokens, hidden] = z.dims();
        let mut dz = want_input.then(|| RowAccumulator::zeros(tokens, hidden, self.model.device()));
        if let (Some(routed), Some(router)) = (&routed, &ffn.router) {
            let mut d_weights = vec![0.0f32; routed.weights.len()];
            let dispatch = routed.dispatch();
            let kept = kept_experts.into_iter().map(Mutex::new).collect::<Vec<_>>();
            let run = |e: usize| {
                let kept = kept.get(e).and_then(|kept| lock(kept).take());
                self.expert_backward(layer, e, &z, &d_blocks, kept, &dispatch, want_input, needs.outputs)
            };
            self.for_experts(routed.experts, run, |e, run: ExpertBackwardRun| {
                let tokens = dispatch.expert(e);
                let ExpertBackwardRun { weights, input, upstream, gradients, output, d_input } = run;
                let units = gradients.d_units.as_ref().expect("asked for");
                observer.expert(&ExpertTrace {
                    layer,
                    expert: e,
                    rows: tokens.rows,
                    routing_weights: tokens.weights,
                    segments: &segments(tokens.rows, &prepared.info),
                    input: &input,
                    units: Some(&gradients.units),
                    output: output.as_ref(),
                    backward: Some(ExpertGradients { upstream: &upstream, units, gate_up: &gradients.d_gate_up }),
                    expert_weights: &weights,
                })?;
                if let (Some(dz), Some(d_input)) = (&mut dz, d_input) {
                    dz.add_rows(tokens.rows, None, &d_input);
                    for (&slot, d) in tokens.slots.iter().zip(gradients.d_row_weights) {
                        d_weights[slot as usize] = d;
                    }
                }
                Ok(())
            })?;
            if let Some(dz) = &mut dz {
                let logits = HostView::new(&router.linear.forward(&z));
                let d_logits = self.model.router().backward(logits.as_slice(), routed, &d_weights);
                let d_logits = host::from_vec(d_logits, [tokens, routed.experts], self.model.device());
                dz.add(&router.linear.backward(&d_logits));
            }
        }
        let Some(mut dz) = dz else { return Ok(None) };
        if let Some(dense) = &ffn.dense {
            dense.backward(&z, &d_blocks, kept_dense, &mut dz);
        }
        Ok(Some(ffn.input_gradient(middle, dz, &dy)))
    }

    /// Gradients of one expert on its tokens; nothing for an expert without any.
    #[allow(clippy::too_many_arguments)]
    fn expert_backward(
        &self,
        layer: usize,
        expert: usize,
        z: &Tensor<2>,
        dy: &Tensor<2>,
        kept: Option<Tensor<2>>,
        dispatch: &Dispatch,
        want_input: bool,
        want_output: bool,
    ) -> Result<Option<ExpertBackwardRun>> {
        let tokens = dispatch.expert(expert);
        if tokens.rows.is_empty() {
            return Ok(None);
        }
        let weights = self.model.expert(layer, expert)?;
        let input = gather_rows(z, tokens.rows);
        let gate_up = kept.unwrap_or_else(|| weights.pre_activations(&input));
        let upstream = gather_rows(dy, tokens.rows); // [n, H], without the routing weight
        let gradients = weights.backward(&gate_up, &upstream, Some(tokens.weights), true);
        let output = want_output.then(|| weights.output(&gradients.units));
        let d_input = want_input.then(|| weights.gate_up.backward(&gradients.d_gate_up));
        Ok(Some(ExpertBackwardRun { weights, input, upstream, gradients, output, d_input }))
    }
}

/// An expert's forward pass on its tokens.
struct ExpertRun {
    weights: ExpertTensors,
    input: Tensor<2>,
    gate_up: Tensor<2>,
    units: Tensor<2>,
    output: Option<Tensor<2>>,
}

/// An expert's backward pass on its tokens.
struct ExpertBackwardRun {
    weights: ExpertTensors,
    input: Tensor<2>,
    upstream: Tensor<2>,
    gradients: SwigluGradients,
    output: Option<Tensor<2>>,
    d_input: Option<Tensor<2>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Groups an expert's rows, ascending wave tokens, by sequence.
fn segments(rows: &[u32], wave: &WaveInfo) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut start = 0;
    for (sequence, info) in wave.sequences.iter().enumerate() {
        let end = start + rows[start..].partition_point(|&t| (t as usize) < info.tokens.end);
        if end > start {
            segments.push(Segment { sequence, rows: start..end, loss_tokens: info.loss_tokens });
        }
        start = end;
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_grouped_by_sequence() {
        let sequence = |tokens: Range<usize>| SequenceInfo { loss_tokens: tokens.len() - 1, tokens };
        let wave = WaveInfo { id: 0, tokens: 12, sequences: vec![sequence(0..4), sequence(4..7), sequence(7..12)] };
        let found = segments(&[0, 3, 7, 8, 11], &wave);
        assert_eq!(
            found,
            [Segment { sequence: 0, rows: 0..2, loss_tokens: 3 }, Segment { sequence: 2, rows: 2..5, loss_tokens: 4 }]
        );
        assert!(segments(&[], &wave).is_empty());
    }
}

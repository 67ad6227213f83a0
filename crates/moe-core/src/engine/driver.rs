//! One wave through all layers.

use std::cell::RefCell;

use moe_checkpoint::ModelConfig;

use super::{
    Engine, UnfinishedWave, WaveReport,
    backward::{Backward, SLOTS, input_slot, middle_slot, sum_slots},
    depth::blend,
    forward::{FfnPass, LayerTape},
    prepare::Prepared,
};
use crate::{
    adapters::Depth,
    data::Wave,
    depth::PathStep,
    error::Result,
    memory::Keep,
    objective::Objective,
    store::HiddenStore,
    trace::{LayerOutput, Observer, Signals, SweepPart},
    wave_files::Part,
};

/// Whether a step of a path runs routed experts.
fn runs_experts(config: &ModelConfig, step: &PathStep) -> bool {
    step.feed_forward && config.moe(step.layer).is_some()
}

impl Engine<'_> {
    /// How deep the backward sweep goes for these signals, of which nobody looks at layers before `first`.
    pub(super) fn depth(&self, needs: Signals, first: usize) -> Depth {
        let config = self.model.config();
        let path = self.model.path();
        let looked_at = |step: &&PathStep| step.layer >= first && runs_experts(config, step);
        let first_moe = path.steps().iter().find(looked_at).map(|step| step.layer);
        let observed =
            (needs.gradients || needs.router_gradients).then_some(first_moe).flatten().map(Depth::FeedForward);
        let trained = self.model.adapters().filter(|_| needs.parameters).map(|adapters| adapters.depth());
        observed.into_iter().chain(trained).fold(Depth::Head, Depth::deeper)
    }

    /// The same in steps of the model's path, which is ascending where something goes back through it.
    fn depth_in_steps(&self, needs: Signals, first: usize) -> Depth {
        let steps = self.model.path().steps();
        let from = |layer: usize| steps.iter().position(|step| step.layer >= layer);
        let depth = self.depth(needs, first);
        let (Depth::Attention(layer) | Depth::FeedForward(layer)) = depth else { return depth };
        match (from(layer), depth) {
            (None, _) => Depth::Head,
            // what is after a layer that is left out: everything from the next one on
            (Some(step), _) if steps[step].layer > layer => Depth::Attention(step),
            (Some(step), Depth::Attention(_)) => Depth::Attention(step),
            (Some(step), _) => Depth::FeedForward(step),
        }
    }

    pub(super) fn sweep(
        &self,
        wave: &Wave,
        observer: &mut dyn Observer,
        objective: Option<&mut dyn Objective>,
        mut unfinished: Option<&mut UnfinishedWave>,
    ) -> Result<WaveReport> {
        let needs = observer.needs();
        self.check_depth(needs)?;
        if unfinished.is_some() {
            self.check_whole("files to go on from")?;
        }
        let prepared = Prepared::new(self.model, wave)?;
        let plan = self.plan_with(prepared.ids.len(), needs.backward(), objective.is_some())?;
        self.model.set_residency(plan.residency);
        observer.begin_wave(&prepared.info)?;

        let (config, device) = (self.model.config(), self.model.device());
        let steps = self.model.path().steps();
        let layers = steps.len();
        let depth = self.depth_in_steps(needs, observer.first_layer());
        if let Some(adapters) = self.model.adapters() {
            adapters.begin_wave(&prepared.info);
        }
        let last_moe = (0..layers).rev().find(|&step| runs_experts(config, &steps[step]));
        let to_the_end = objective.is_some() || needs.hidden;
        let stop = if to_the_end { layers } else { last_moe.map_or(0, |l| l + 1) };
        if let Some(unfinished) = unfinished.as_ref().filter(|_| !plan.spill) {
            unfinished.hold_files()?;
        }
        let mut store = match &unfinished {
            Some(unfinished) => HiddenStore::named(SLOTS * layers, unfinished.files().clone(), !plan.spill),
            None => HiddenStore::new(SLOTS * layers, plan.spill.then_some(self.options.spill_dir.as_path()))?,
        };
        let mut tapes: Vec<LayerTape> = (0..layers).map(|_| LayerTape::default()).collect();
        let mut report = WaveReport::new(&prepared.info);

        let done = unfinished.as_ref().and_then(|unfinished| unfinished.done());
        // layers that an earlier run took forward, and of these the ones that are left to go back through
        let (first, left) = match done {
            None => (0, 0),
            Some(SweepPart::Forward(layer)) => (layer + 1, layer + 1),
            Some(SweepPart::Head) => (stop, layers),
            Some(SweepPart::Backward(layer)) => (stop, layer),
        };
        for (layer, step) in steps.iter().enumerate().take(left) {
            if depth.reaches_feed_forward(layer) {
                store.adopt(middle_slot(layer), Part::Middle(layer), None, device);
                for (which, slot) in sum_slots(layer).take(config.kept_sums(step.layer)).enumerate() {
                    store.adopt(slot, Part::Sum(layer, which), None, device);
                }
            }
            if depth.reaches_attention(layer) {
                store.adopt(input_slot(layer), Part::Input(layer), None, device);
            }
        }
        let gradient = match (&done, &unfinished) {
            (Some(SweepPart::Head), Some(unfinished)) => {
                Some((layers, unfinished.load(Part::Gradient(layers), device)?))
            }
            (Some(SweepPart::Backward(layer)), Some(unfinished)) => {
                Some((*layer, unfinished.load(Part::Gradient(*layer), device)?))
            }
            _ => None,
        };
        let gradient = match gradient {
            Some(gradient) => {
                let kept = unfinished.as_ref().and_then(|unfinished| unfinished.report());
                (report.loss, report.sequence_losses) = kept.unwrap_or_default();
                Some(gradient)
            }
            None => {
                let mut x = match (&done, &unfinished) {
                    (Some(_), Some(unfinished)) => unfinished.load(Part::Input(first), device)?,
                    _ => self.model.embedded_streams(&prepared.ids)?,
                };
                for (at, tape) in tapes.iter_mut().enumerate().take(stop).skip(first) {
                    let PathStep { layer, attention, feed_forward } = steps[at];
                    if let Some(next) = steps[..stop].get(at + 1) {
                        self.model.read_ahead(next.layer);
                    }
                    if needs.hidden {
                        observer.hidden(layer, &self.apart(&x).0)?;
                    }
                    let rule = self.model.depth_rule();
                    if let Some(rule) = rule.filter(|_| !needs.backward()) {
                        x = self.decided_layer(layer, x, &prepared, &**rule, observer)?;
                        observer.done(SweepPart::Forward(layer))?;
                        continue;
                    }
                    let backward = needs.backward() && depth.reaches_feed_forward(at);
                    let through = backward && depth.reaches_attention(at);
                    let keep = if backward { plan.keep[layer] } else { Keep::default() };
                    let middle = match attention {
                        true => self.attention_forward(layer, &x, &prepared, tape, keep.attention && through)?,
                        false => x.clone(),
                    };
                    // What the feed-forward half reads, where that is not what the attention half gives.
                    let beside = config.is_parallel().then(|| x.clone());
                    if through {
                        match &unfinished {
                            // the layer before has left it
                            Some(_) if at > 0 => store.adopt(input_slot(at), Part::Input(at), Some(x), device),
                            Some(_) => store.put_named(input_slot(at), Part::Input(at), x)?,
                            None => store.put(input_slot(at), x)?,
                        }
                    }
                    if !feed_forward {
                        if backward {
                            store.put(middle_slot(at), middle.clone())?;
                        }
                        x = middle;
                        observer.done(SweepPart::Forward(layer))?;
                        continue;
                    }
                    let skip_output = !to_the_end && !needs.streams && Some(at) == last_moe;
                    let pass = FfnPass {
                        keep,
                        needs,
                        skip_output,
                        keep_sums: backward,
                        ..FfnPass::new(layer, &prepared.info)
                    };
                    let half = self.half(beside.as_ref().unwrap_or(&middle), &middle);
                    x = self.ffn_forward(pass, half, tape, observer)?;
                    if let Some(factors) = self.factors(layer, half.read, &prepared.info)? {
                        x = blend(half.stream, x, &factors);
                        tape.factors = Some(factors);
                    }
                    if needs.streams && config.moe(layer).is_some() {
                        observer.output(&LayerOutput {
                            layer,
                            position: 0,
                            wave: &prepared.info,
                            stream: half.stream,
                            input: &self.model.ffn(layer)?.carried(half.stream),
                            read: half.read,
                            output: &self.joined(layer, &x),
                            residual_factor: config.ffn_factor(layer) as f32,
                        })?;
                    }
                    if backward {
                        let read = beside.unwrap_or(middle);
                        match &unfinished {
                            Some(_) => store.put_named(middle_slot(at), Part::Middle(at), read)?,
                            None => store.put(middle_slot(at), read)?,
                        }
                        for (which, sum) in std::mem::take(&mut tape.sums).into_iter().enumerate() {
                            let slot = sum_slots(at).start + which;
                            match &unfinished {
                                Some(_) => store.put_named(slot, Part::Sum(at, which), sum)?,
                                None => store.put(slot, sum)?,
                            }
                        }
                    }
                    if !skip_output {
                        x = self.with_layer_input(layer, x, &prepared.ids)?;
                    }
                    observer.done(SweepPart::Forward(layer))?;
                    if let Some(unfinished) = unfinished.as_mut().filter(|_| !skip_output) {
                        unfinished.forward_done(layer, &x, depth)?;
                    }
                }
                if needs.hidden {
                    observer.last_hidden(&x)?;
                }
                let gradient = match objective {
                    Some(objective) => self.head(x, &prepared, needs, objective, observer, &mut report)?,
                    None => None,
                };
                if to_the_end {
                    observer.done(SweepPart::Head)?;
                }
                if let (Some(unfinished), Some(gradient)) = (&mut unfinished, &gradient) {
                    unfinished.head_done(gradient, &report)?;
                }
                gradient.map(|gradient| (layers, gradient))
            }
        };
        if let Some((from, gradient)) = gradient {
            let sweep =
                Backward { prepared: &prepared, store, tapes, depth, needs, from, d_embedded: RefCell::default() };
            self.backward(sweep, gradient, observer, unfinished)?;
        }
        observer.end_wave(&prepared.info)?;
        self.model.checkpoint().release();
        Ok(report)
    }
}

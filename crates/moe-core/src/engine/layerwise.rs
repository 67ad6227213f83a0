//! All waves through one layer after the other, so that a layer can be changed by what all of them showed.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::{
    Engine, WaveReport,
    forward::{FfnPass, LayerTape},
    prepare::Prepared,
};
use crate::{
    data::Wave,
    error::{Error, Result},
    memory::{self, MemoryPlan, WaveSize},
    objective::{CrossEntropy, Objective},
    overlay::{ExpertOverlay, RoutingOverlay},
    store::HiddenStore,
    trace::{LayerOutput, Nobody, Observer, Signals, SweepPart},
};

/// How a layer is changed for the rest of a sweep.
#[derive(Clone, Default)]
pub struct LayerChange {
    /// Applied to what the model's own overlay makes of the experts.
    pub experts: Option<Arc<dyn ExpertOverlay>>,
    /// Takes the place of the model's own routing overlay in this layer.
    pub routing: Option<Arc<dyn RoutingOverlay>>,
}

impl LayerChange {
    /// Whether nothing changes.
    pub fn is_none(&self) -> bool {
        self.experts.is_none() && self.routing.is_none()
    }
}

impl std::fmt::Debug for LayerChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { experts, routing } = self;
        f.debug_struct("LayerChange").field("experts", &experts.is_some()).field("routing", &routing.is_some()).finish()
    }
}

/// Watches a [layer-by-layer sweep](Engine::run_layerwise) and may change layers. In each layer it sees every wave from
/// `begin_wave` to `end_wave`, in order.
pub trait LayerVisitor: Observer {
    /// All waves have passed an MoE layer. With a change, they pass it again, unobserved, and the next layer sees the
    /// changed outputs.
    ///
    /// # Errors
    /// Whatever makes the change impossible.
    fn end_layer(&mut self, layer: usize) -> Result<LayerChange>;
}

/// Waves on their way through a model, one MoE layer at a time. For sweeps of two models side by side;
/// [`Engine::run_layerwise`] for one.
///
/// It holds two `[T, H]` tensors per wave, in memory or, if the model's `max_memory` leaves no room, in a file.
pub struct LayerSweep<'e> {
    engine: &'e Engine<'e>,
    waves: Vec<Prepared>,
    store: HiddenStore,
    next: usize,
}

/// Slots of the hidden store: a wave's residual stream before the next layer, what the feed-forward half of the last
/// one is added to, and what that reads where it is something else.
fn stream_slot(wave: usize) -> usize {
    3 * wave
}

fn middle_slot(wave: usize) -> usize {
    3 * wave + 1
}

fn beside_slot(wave: usize) -> usize {
    3 * wave + 2
}

impl Engine<'_> {
    /// Runs all waves together, layer by layer. Without changes, the result is that of [`run`](Self::run) on each wave,
    /// bit for bit.
    ///
    /// Reports have losses if [`EngineOptions::loss`](super::EngineOptions::loss) is set or the visitor needs logits.
    ///
    /// # Errors
    /// As [`run`](Self::run); [`Error::Input`] if the visitor needs gradients, which would belong to neither model, and
    /// for no waves.
    pub fn run_layerwise(&self, waves: &[Wave], visitor: &mut dyn LayerVisitor) -> Result<Vec<WaveReport>> {
        let needs = visitor.needs();
        let mut sweep = self.layer_sweep(waves)?;
        while sweep.step(visitor)?.is_some() {}
        let head = needs.logits || self.options.loss;
        let mut objective = CrossEntropy;
        sweep.finish(visitor, head.then_some(&mut objective))
    }

    /// The memory plan of a layer-by-layer sweep of these waves.
    ///
    /// # Errors
    /// [`Error::Memory`] if the model's `max_memory` cannot hold it; [`Error::Input`] for no waves.
    pub fn plan_layerwise(&self, waves: &[Wave]) -> Result<MemoryPlan> {
        let Some(largest) = waves.iter().map(Wave::tokens).max() else {
            return Err(Error::input("waves of a layer-by-layer sweep", 0, "at least one"));
        };
        let tokens: usize = waves.iter().map(Wave::tokens).sum();
        let size = WaveSize {
            tokens: largest,
            gradients: false,
            head: true,
            head_tokens: self.options.head_tokens,
            experts_together: memory::experts_together(self.model.device()),
            waiting: if self.model.config().is_parallel() { 3 } else { 2 }
                * 4
                * (tokens * self.model.config().stream_width()) as u64,
            waiting_keys: memory::lent_keys(self.model.config(), tokens - largest),
            decoded_per_use: self.model.decodes_per_use(),
            expert_cache: self.model.expert_cache_bytes(),
        };
        memory::plan(self.model.config(), size, memory::limit(self.model.max_memory()))
    }

    /// Starts a layer-by-layer sweep: the waves are embedded and stand before the first layer.
    ///
    /// # Errors
    /// As [`run`](Self::run); [`Error::Input`] for no waves.
    pub fn layer_sweep(&self, waves: &[Wave]) -> Result<LayerSweep<'_>> {
        self.check_whole("a layer-by-layer sweep")?;
        let plan = self.plan_layerwise(waves)?;
        let waves = waves.iter().map(|wave| Prepared::new(self.model, wave)).collect::<Result<Vec<_>>>()?;
        self.model.set_residency(plan.residency);
        let spill = plan.spill.then_some(self.options.spill_dir.as_path());
        let mut store = HiddenStore::new(3 * waves.len(), spill)?;
        for (position, wave) in waves.iter().enumerate() {
            store.put(stream_slot(position), self.model.embedded_streams(&wave.ids)?)?;
        }
        Ok(LayerSweep { engine: self, waves, store, next: 0 })
    }
}

impl LayerSweep<'_> {
    /// The MoE layer that the next [`step`](Self::step) passes.
    pub fn next_moe_layer(&self) -> Option<usize> {
        let config = self.engine.model.config();
        (self.next..config.layers.len()).find(|&layer| config.moe(layer).is_some())
    }

    /// Takes all waves through the next MoE layer, and the dense layers before it, and gives its index; nothing if none
    /// is left.
    ///
    /// # Errors
    /// As [`Engine::run_layerwise`].
    pub fn step(&mut self, visitor: &mut dyn LayerVisitor) -> Result<Option<usize>> {
        let needs = visitor.needs();
        if needs.backward() {
            return Err(Error::input("visitor needs", "gradients", "forward signals only, layer by layer"));
        }
        self.engine.check_streams(needs)?;
        let Some(layer) = self.next_moe_layer() else { return Ok(None) };
        self.dense_layers(layer, needs, visitor)?;
        let config = self.engine.model.config();
        for (position, wave) in self.waves.iter().enumerate() {
            visitor.begin_wave(&wave.info)?;
            let x = self.store.take(stream_slot(position))?;
            if needs.hidden {
                visitor.hidden(layer, &self.engine.apart(&x).0)?;
            }
            let mut tape = LayerTape::default();
            let input = self.engine.attention_forward(layer, &x, wave, &mut tape, false)?;
            let pass = FfnPass { needs, ..FfnPass::new(layer, &wave.info) };
            let half = self.engine.half(&x, &input);
            let output = self.engine.ffn_forward(pass, half, &mut tape, visitor)?;
            if needs.streams {
                visitor.output(&LayerOutput {
                    layer,
                    position,
                    wave: &wave.info,
                    stream: half.stream,
                    input: &self.engine.model.ffn(layer)?.carried(half.stream),
                    read: half.read,
                    output: &self.engine.joined(layer, &output),
                    residual_factor: config.ffn_factor(layer) as f32,
                })?;
            }
            visitor.done(SweepPart::Forward(layer))?;
            visitor.end_wave(&wave.info)?;
            if config.is_parallel() {
                self.store.put(beside_slot(position), x)?;
            }
            let output = self.engine.with_layer_input(layer, output, &wave.ids)?;
            self.store.put(middle_slot(position), input)?;
            self.store.put(stream_slot(position), output)?;
        }
        let change = visitor.end_layer(layer)?;
        for (position, wave) in self.waves.iter().enumerate() {
            let input = self.store.take(middle_slot(position))?;
            let beside = match config.is_parallel() {
                true => Some(self.store.take(beside_slot(position))?),
                false => None,
            };
            if !change.is_none() {
                let pass = FfnPass { change: Some(&change), ..FfnPass::new(layer, &wave.info) };
                let half = self.engine.half(beside.as_ref().unwrap_or(&input), &input);
                let output = self.engine.ffn_forward(pass, half, &mut LayerTape::default(), &mut Nobody)?;
                let output = self.engine.with_layer_input(layer, output, &wave.ids)?;
                self.store.put(stream_slot(position), output)?;
            }
        }
        self.next = layer + 1;
        self.engine.model.checkpoint().release();
        Ok(Some(layer))
    }

    /// The residual stream `[T, H]` of the wave at this position of the list, where the sweep stands, with what experts
    /// give that joins it later.
    ///
    /// # Errors
    /// [`Error::Input`] for a position outside the list, [`Error::Spill`].
    pub fn stream(&mut self, position: usize) -> Result<Tensor<2>> {
        if position >= self.waves.len() {
            return Err(Error::input("position of a wave", position, format!("below {}", self.waves.len())));
        }
        let stream = self.store.get(stream_slot(position))?;
        Ok(match self.next.checked_sub(1) {
            Some(layer) => self.engine.joined(layer, &stream),
            None => stream,
        })
    }

    /// Takes the waves through the layers that are left, unchanged, and to the objective, if there is one. Without one,
    /// nothing is left to do unless the observer needs layer inputs.
    ///
    /// # Errors
    /// As [`Engine::run_with`].
    pub fn finish(
        mut self,
        observer: &mut dyn Observer,
        mut objective: Option<&mut (dyn Objective + '_)>,
    ) -> Result<Vec<WaveReport>> {
        let needs = observer.needs();
        if needs.backward() {
            return Err(Error::input("observer needs", "gradients", "forward signals only, layer by layer"));
        }
        let mut reports: Vec<WaveReport> = self.waves.iter().map(|wave| WaveReport::new(&wave.info)).collect();
        if objective.is_some() || needs.hidden {
            self.dense_layers(self.engine.model.config().layers.len(), needs, observer)?;
        }
        if needs.hidden {
            for (position, wave) in self.waves.iter().enumerate() {
                let x = self.store.get(stream_slot(position))?;
                observer.begin_wave(&wave.info)?;
                observer.last_hidden(&x)?;
                observer.end_wave(&wave.info)?;
            }
        }
        if let Some(objective) = &mut objective {
            for (position, (wave, report)) in self.waves.iter().zip(&mut reports).enumerate() {
                observer.begin_wave(&wave.info)?;
                let x = self.store.take(stream_slot(position))?;
                self.engine.head(x, wave, needs, &mut **objective, observer, report)?;
                observer.end_wave(&wave.info)?;
            }
        }
        self.engine.model.checkpoint().release();
        Ok(reports)
    }

    /// Takes the waves up to layer `end`. Layers with experts are shown to nobody.
    fn dense_layers(&mut self, end: usize, needs: Signals, observer: &mut dyn Observer) -> Result<()> {
        for layer in self.next..end {
            for (position, wave) in self.waves.iter().enumerate() {
                let x = self.store.take(stream_slot(position))?;
                if needs.hidden {
                    observer.begin_wave(&wave.info)?;
                    observer.hidden(layer, &self.engine.apart(&x).0)?;
                    observer.end_wave(&wave.info)?;
                }
                let mut tape = LayerTape::default();
                let middle = self.engine.attention_forward(layer, &x, wave, &mut tape, false)?;
                let (pass, half) = (FfnPass::new(layer, &wave.info), self.engine.half(&x, &middle));
                let output = self.engine.ffn_forward(pass, half, &mut tape, &mut Nobody)?;
                let output = self.engine.with_layer_input(layer, output, &wave.ids)?;
                self.store.put(stream_slot(position), output)?;
            }
        }
        self.next = self.next.max(end);
        Ok(())
    }
}

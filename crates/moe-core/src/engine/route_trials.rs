//! The last layer with other routings, on what all layers before it gave once.

use std::collections::BTreeMap;

use burn::tensor::Tensor;

use super::{
    Engine, LayerChange, WaveReport,
    forward::{FfnPass, LayerTape},
    prepare::Prepared,
};
use crate::{
    data::Wave,
    error::{Error, Result},
    kernels::loss::{self, Losses},
    objective::Objective,
    trace::{LayerTrace, Nobody, Observer, Signals, WaveInfo},
};

/// What a routing of the last layer gave.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteTrial {
    /// Cross-entropy of the next token by the token it is predicted from, where it counts, in nats.
    pub losses: BTreeMap<usize, f64>,
    /// Experts per token.
    pub top_k: usize,
    /// The experts of every token `[T, k]`.
    pub selected: Vec<u32>,
    /// The logits of the router `[T, E]`.
    pub logits: Vec<f32>,
}

/// Cross-entropy, kept by row.
#[derive(Default)]
struct Recorder(Vec<f64>);

impl Objective for Recorder {
    fn begin_wave(&mut self, _: &WaveInfo) -> Result<()> {
        self.0.clear();
        Ok(())
    }

    fn losses(&mut self, blocks: Vec<Tensor<2>>, targets: &[Option<u32>], gradient: bool) -> Result<Losses> {
        let found = loss::cross_entropy(blocks, targets, gradient);
        self.0.extend(found.losses.iter().zip(targets).filter(|(_, target)| target.is_some()).map(|(loss, _)| *loss));
        Ok(found)
    }
}

/// Where tokens were sent.
#[derive(Default)]
struct Sent(Option<(usize, Vec<u32>, Vec<f32>)>);

impl Observer for Sent {
    fn needs(&self) -> Signals {
        Signals::ROUTING
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        self.0 = Some((trace.top_k, trace.selected.to_vec(), trace.logits.to_vec()));
        Ok(())
    }
}

impl Engine<'_> {
    /// The last layer, which has routed experts, the output head and the losses of a wave under each of these changes:
    /// all layers before it run once.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model whose last layer has no experts, or that is under a path or rule of layers;
    /// as [`run`](Self::run).
    pub fn route_trials(&self, wave: &Wave, changes: &[LayerChange]) -> Result<Vec<RouteTrial>> {
        self.check_whole("routings of the last layer")?;
        let config = self.model.config();
        let last = config.layers.len().saturating_sub(1);
        if config.moe(last).is_none() {
            return Err(Error::Unsupported("routings of the last layer of a model in which it has no experts".into()));
        }
        let prepared = Prepared::new(self.model, wave)?;
        let plan = self.plan_with(prepared.ids.len(), false, true)?;
        self.model.set_residency(plan.residency);
        let mut x = self.model.embedded_streams(&prepared.ids)?;
        for layer in 0..last {
            let mut tape = LayerTape::default();
            let middle = self.attention_forward(layer, &x, &prepared, &mut tape, false)?;
            let pass = FfnPass::new(layer, &prepared.info);
            x = self.ffn_forward(pass, self.half(&x, &middle), &mut tape, &mut Nobody)?;
            x = self.with_layer_input(layer, x, &prepared.ids)?;
        }
        let middle = self.attention_forward(last, &x, &prepared, &mut LayerTape::default(), false)?;
        let counted: Vec<usize> =
            (0..prepared.targets.len()).filter(|token| prepared.targets[*token].is_some()).collect();
        let mut trials = Vec::with_capacity(changes.len());
        for change in changes {
            let mut sent = Sent::default();
            let change = Some(change).filter(|change| !change.is_none());
            let pass = FfnPass { needs: sent.needs(), change, ..FfnPass::new(last, &prepared.info) };
            let output = self.ffn_forward(pass, self.half(&x, &middle), &mut LayerTape::default(), &mut sent)?;
            let output = self.with_layer_input(last, output, &prepared.ids)?;
            let (mut recorder, mut report) = (Recorder::default(), WaveReport::new(&prepared.info));
            self.head(output, &prepared, Signals::NONE, &mut recorder, &mut Nobody, &mut report)?;
            let (top_k, selected, logits) = sent.0.unwrap_or_default();
            let losses = counted.iter().copied().zip(recorder.0).collect();
            trials.push(RouteTrial { losses, top_k, selected, logits });
        }
        self.model.checkpoint().release();
        Ok(trials)
    }
}

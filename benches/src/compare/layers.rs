//! What single layers of a changed model get wrong.

use std::ops::Range;

use burn::tensor::Tensor;
use moe_core::data::Wave;
use moe_core::host::HostView;
use moe_core::trace::{Nobody, Observer, Signals};
use moe_core::{Engine, EngineOptions, LayerChange, LayerOutput, LayerVisitor, Model};

use crate::Result;

/// The error of each MoE layer by itself, on the stream that the full model gives it: the sum over tokens of `|y' -
/// y|^2` over that of `|y - x|^2`, for x and y the full model's stream before and after the layer's experts, and y'
/// what the changed layer makes of x. 0 for the full model, 1 for a layer that adds nothing to the stream.
pub struct LayerErrors {
    passes: Vec<Pass>,
    /// Tokens of each sequence, by wave.
    sequences: Vec<Vec<usize>>,
}

/// A wave and a layer of the full model.
struct Pass {
    layer: usize,
    wave: usize,
    before: Tensor<2>,
    after: Tensor<2>,
}

impl LayerErrors {
    /// Of a full model.
    ///
    /// # Errors
    /// Whatever stops it.
    pub fn record(model: &Model, waves: &[Wave]) -> Result<Self> {
        let mut recorder = Recorder(Vec::new());
        Engine::new(model, EngineOptions::default()).run_layerwise(waves, &mut recorder)?;
        let sequences = waves.iter().map(|wave| wave.sequences.iter().map(|sequence| sequence.len()).collect());
        Ok(Self { passes: recorder.0, sequences: sequences.collect() })
    }

    /// The mean error over the layers of `model`, for ranges of the sequences of all waves.
    ///
    /// # Errors
    /// Whatever stops it.
    pub fn of(&self, model: &Model, spans: &[Range<usize>]) -> Result<Vec<f64>> {
        let engine = Engine::new(model, EngineOptions::default());
        let layers = self.passes.iter().map(|pass| pass.layer + 1).max().unwrap_or(0);
        // by span and layer: squares of the error, and of what there is
        let mut sums = vec![vec![[0.0f64; 2]; layers]; spans.len()];
        for Pass { layer, wave, before, after } in &self.passes {
            let found = engine.feed_forward(*layer, before, &mut Nobody)?;
            let hidden = before.dims()[1];
            let (before, after, found) = (HostView::new(before), HostView::new(after), HostView::new(&found));
            let squares =
                |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum() };
            let first: usize = self.sequences[..*wave].iter().map(Vec::len).sum();
            let mut start = 0;
            for (position, tokens) in self.sequences[*wave].iter().enumerate() {
                let rows = start * hidden..(start + tokens) * hidden;
                let (x, y) = (&before.as_slice()[rows.clone()], &after.as_slice()[rows.clone()]);
                for (sums, _) in sums.iter_mut().zip(spans).filter(|(_, span)| span.contains(&(first + position))) {
                    sums[*layer][0] += squares(&found.as_slice()[rows.clone()], y);
                    sums[*layer][1] += squares(y, x);
                }
                start += tokens;
            }
        }
        let mean = |layers: Vec<[f64; 2]>| {
            let errors: Vec<f64> = layers.iter().filter(|sum| sum[1] > 0.0).map(|sum| sum[0] / sum[1]).collect();
            errors.iter().sum::<f64>() / errors.len().max(1) as f64
        };
        Ok(sums.into_iter().map(mean).collect())
    }
}

struct Recorder(Vec<Pass>);

impl Observer for Recorder {
    fn needs(&self) -> Signals {
        Signals::STREAMS
    }

    fn output(&mut self, output: &LayerOutput<'_>) -> moe_core::Result<()> {
        self.0.push(Pass {
            layer: output.layer,
            wave: output.position,
            before: output.input.clone(),
            after: output.output.clone(),
        });
        Ok(())
    }
}

impl LayerVisitor for Recorder {
    fn end_layer(&mut self, _: usize) -> moe_core::Result<LayerChange> {
        Ok(LayerChange::default())
    }
}

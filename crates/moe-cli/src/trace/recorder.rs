//! Writes what a sweep shows into a file.

use burn::tensor::Tensor;
use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, LayerTrace, Observer, Signals};

use super::output::TensorOutput;

/// Observes waves; `positions` is set to the places in `[B, S]` of the tokens of the next wave.
pub(super) struct Recorder {
    pub output: TensorOutput,
    pub positions: Vec<usize>,
    /// Decoder layer indices of the MoE layers.
    pub moe_layers: Vec<usize>,
    /// If gradients are asked for, predicted tokens of all waves.
    pub gradients_over: Option<usize>,
}

impl Recorder {
    /// What it needs.
    pub fn signals(gradients: bool) -> Signals {
        Signals { routing: true, hidden: true, logits: true, gradients, ..Signals::NONE }
    }

    /// Writes rows of `[.., width]` of wave tokens from `first` on to where they belong.
    fn rows(&mut self, name: &str, first: usize, values: &[f32], width: usize) -> moe_core::Result<()> {
        let count = values.len() / width;
        let mut row = 0;
        while row < count {
            // neighbors are written together
            let start = self.positions[first + row];
            let mut end = row + 1;
            while end < count && self.positions[first + end] == start + end - row {
                end += 1;
            }
            let written = self.output.write(name, start * width, &values[row * width..end * width]);
            written.map_err(moe_core::Error::observer)?;
            row = end;
        }
        Ok(())
    }
}

impl Observer for Recorder {
    fn needs(&self) -> Signals {
        Self::signals(self.gradients_over.is_some())
    }

    fn layer(&mut self, trace: &LayerTrace<'_>) -> moe_core::Result<()> {
        let n = self.moe_layers.iter().position(|layer| *layer == trace.layer).unwrap_or_default();
        self.rows(&format!("router_logits.{n}"), 0, trace.logits, trace.experts)
    }

    fn hidden(&mut self, layer: usize, hidden: &Tensor<2>) -> moe_core::Result<()> {
        self.rows(&format!("hidden.{layer}"), 0, HostView::new(hidden).as_slice(), hidden.dims()[1])
    }

    fn logits(&mut self, first: usize, logits: &HostView, vocab: usize) -> moe_core::Result<()> {
        self.rows("logits", first, logits.as_slice(), vocab)
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        let (Some(total), Some(backward), Some(units)) = (self.gradients_over, trace.backward, trace.units) else {
            return Ok(());
        };
        let mean = 1.0 / total.max(1) as f32;
        let weights = Tensor::<1>::from_floats(trace.routing_weights, &trace.input.device()).unsqueeze_dim::<2>(1);
        let output_gradient = backward.upstream.clone() * weights; // [n, H]
        let gate_up = backward.gate_up.clone().transpose().matmul(trace.input.clone()) * mean; // [2I, H]
        let down = output_gradient.transpose().matmul(units.clone()) * mean; // [H, I]
        let (gate_up, down) = (HostView::new(&gate_up), HostView::new(&down));
        let (gate, up) = gate_up.as_slice().split_at(gate_up.as_slice().len() / 2);
        for (part, values) in [("gate", gate), ("up", up), ("down", down.as_slice())] {
            let name = gradient_name(trace.layer, trace.expert, part);
            self.output.add(&name, 0, values).map_err(moe_core::Error::observer)?;
        }
        Ok(())
    }
}

/// Name of the gradient of one matrix of an expert.
pub(super) fn gradient_name(layer: usize, expert: usize, part: &str) -> String {
    format!("grad.layer.{layer}.expert.{expert}.{part}")
}

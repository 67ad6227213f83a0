//! Experts under factors that come from the experts of a token which do not run.

use std::sync::{Arc, Mutex};

use burn::tensor::Tensor;

use super::{
    Engine,
    experts::{ExpertRun, lock},
    routing::LayerRouting,
};
use crate::{
    adapters::{ExpertModulation, Modulation, Tokens, Wanted},
    error::{Error, Result},
    experts::ExpertTensors,
    kernels::rows::{RowAccumulator, gather_rows},
    overlay::ExpertOverlay,
    router::{Dispatch, Routed},
    trace::Signals,
};

/// The modulation of a layer's experts for a wave.
pub(super) struct Modulated {
    by: Arc<dyn ExpertModulation>,
    /// Experts of a token that run.
    pub main: usize,
    factors: Modulation,
    /// What gate projections read `[T, H]`.
    gate: Tensor<2>,
    /// What up projections read `[T, H]`.
    up: Tensor<2>,
}

/// Gradients of one expert on its tokens.
struct Gradients {
    d_row_weights: Vec<f32>,
    /// At the units' factors `[n, I]`.
    units: Tensor<2>,
    /// At what the gate and the up projection read `[n, H]`.
    inputs: [Tensor<2>; 2],
}

impl Engine<'_> {
    /// The modulation of a layer, if it has one.
    ///
    /// # Errors
    /// [`Error::Input`] for factors of another shape, [`Error::Unsupported`] where experts are observed.
    pub(super) fn modulated(
        &self,
        layer: usize,
        z: &Tensor<2>,
        routed: &Routed,
        needs: Signals,
    ) -> Result<Option<Modulated>> {
        let Some(by) = self.model.adapters().and_then(|adapters| adapters.modulation(layer)) else { return Ok(None) };
        if needs.experts() {
            return Err(Error::Unsupported(format!("observing the experts of layer {layer}, which are modulated")));
        }
        if self.weights_inputs() {
            let what = "modulated experts whose routing weights multiply what they read, in layer";
            return Err(Error::Unsupported(format!("{what} {layer}")));
        }
        let main = by.main_experts();
        if !(1..=routed.top_k).contains(&main) {
            let expected = format!("1 to {}", routed.top_k);
            return Err(Error::input(format!("main experts per token of layer {layer}"), main, expected));
        }
        let factors = by.factors(routed);
        let [tokens, hidden] = z.dims();
        let width = self.model.config().moe(layer).and_then(|moe| moe.widths.first().copied()).unwrap_or(0);
        for (what, found, expected) in [
            ("gate inputs", factors.gate.dims(), [tokens, hidden]),
            ("units", factors.units.dims(), [tokens, width]),
            ("up inputs", factors.up.dims(), [tokens, hidden]),
        ] {
            if found != expected {
                let what = format!("factors on {what} of layer {layer}");
                return Err(Error::input(what, format!("{found:?}"), format!("{expected:?}")));
            }
        }
        // one product per token, whatever the number of its experts
        let (gate, up) = (z.clone() * factors.gate.clone(), z.clone() * factors.up.clone());
        Ok(Some(Modulated { by, main, factors, gate, up }))
    }

    /// Runs one expert on its tokens; nothing for an expert without any.
    pub(super) fn modulated_forward(
        &self,
        layer: usize,
        expert: usize,
        modulated: &Modulated,
        dispatch: &Dispatch,
        overlay: Option<&dyn ExpertOverlay>,
    ) -> Result<Option<ExpertRun>> {
        let rows = dispatch.expert(expert).rows;
        if rows.is_empty() {
            return Ok(None);
        }
        let weights = match overlay {
            Some(overlay) => self.model.replaced_expert(overlay, layer, expert)?,
            None => self.model.expert(layer, expert)?,
        };
        modulated.check_width(layer, expert, &weights)?;
        self.model.count().expert(rows.len());
        let input = gather_rows(&modulated.gate, rows);
        let gate_up = modulated.pre_activations(&weights, &input, &gather_rows(&modulated.up, rows), rows);
        let units = weights.units(&gate_up) * gather_rows(&modulated.factors.units, rows);
        let output = Some(weights.output_for(&units, Tokens::Rows(rows)));
        Ok(Some(ExpertRun { weights, input, gate_up, units, output }))
    }

    /// Backward of all experts of a layer: the gradient of each routing weight `[T, k]`, and that of `z`, added to
    /// `dz`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn modulated_backward(
        &self,
        layer: usize,
        modulated: &Modulated,
        z: &Tensor<2>,
        dy: &Tensor<2>,
        routing: &LayerRouting,
        kept: &[Mutex<Option<Tensor<2>>>],
        dz: Option<&mut RowAccumulator>,
        parameters: bool,
    ) -> Result<Vec<f32>> {
        let ([tokens, hidden], device) = (z.dims(), self.model.device());
        let width = modulated.factors.units.dims()[1];
        let sum = |columns: usize| RowAccumulator::zeros(tokens, columns, device);
        let (mut gate, mut units, mut up) = (sum(hidden), sum(width), sum(hidden));
        let dispatch = routing.dispatch(true, modulated.main);
        let mut d_weights = vec![0.0f32; routing.applied.weights.len()];
        let run = |e: usize| {
            let kept = kept.get(e).and_then(|kept| lock(kept).take());
            self.modulated_expert(layer, e, modulated, dy, kept, &dispatch, parameters)
        };
        self.for_experts(routing.applied.experts, run, |e, gradients: Gradients| {
            let tokens = dispatch.expert(e);
            units.add_rows(tokens.rows, None, &gradients.units);
            let [d_gate, d_up] = gradients.inputs;
            gate.add_rows(tokens.rows, None, &d_gate);
            up.add_rows(tokens.rows, None, &d_up);
            tokens.slots.iter().zip(gradients.d_row_weights).for_each(|(&slot, d)| d_weights[slot as usize] = d);
            Ok(())
        })?;
        let (gate, up) = (gate.into_tensor(), up.into_tensor());
        if let Some(dz) = dz {
            dz.add(&(gate.clone() * modulated.factors.gate.clone()));
            dz.add(&(up.clone() * modulated.factors.up.clone()));
        }
        let d_factors = Modulation { gate: gate * z.clone(), units: units.into_tensor(), up: up * z.clone() };
        modulated.by.backward(&routing.applied, &d_factors, parameters, &mut d_weights);
        Ok(d_weights)
    }

    #[allow(clippy::too_many_arguments)]
    fn modulated_expert(
        &self,
        layer: usize,
        expert: usize,
        modulated: &Modulated,
        dy: &Tensor<2>,
        kept: Option<Tensor<2>>,
        dispatch: &Dispatch,
        parameters: bool,
    ) -> Result<Option<Gradients>> {
        let tokens = dispatch.expert(expert);
        if tokens.rows.is_empty() {
            return Ok(None);
        }
        let weights = self.model.expert(layer, expert)?;
        let rows = Tokens::Rows(tokens.rows);
        let inputs = [&modulated.gate, &modulated.up].map(|x| gather_rows(x, tokens.rows));
        let gate_up = kept.unwrap_or_else(|| modulated.pre_activations(&weights, &inputs[0], &inputs[1], tokens.rows));
        let upstream = gather_rows(dy, tokens.rows);
        let factors = gather_rows(&modulated.factors.units, tokens.rows);
        let weighed = Some(tokens.weights);
        let (gradients, d_factors) =
            weights.backward_scaled(&gate_up, Some(&factors), &upstream, weighed, rows, false, parameters);
        let d_inputs = pair_backward(&weights, &inputs, &gradients.d_gate_up, rows, parameters);
        Ok(Some(Gradients {
            d_row_weights: gradients.d_row_weights,
            units: d_factors.expect("there are factors"),
            inputs: d_inputs,
        }))
    }
}

impl Modulated {
    fn check_width(&self, layer: usize, expert: usize, weights: &ExpertTensors) -> Result<()> {
        let expected = self.factors.units.dims()[1];
        match weights.width() == expected {
            true => Ok(()),
            false => {
                let what = format!("width of modulated expert {expert} of layer {layer}");
                Err(Error::input(what, weights.width(), format!("{expected}, as of the layer's first expert")))
            }
        }
    }

    /// `[n, 2I]` of what gate and up read.
    fn pre_activations(&self, weights: &ExpertTensors, gate: &Tensor<2>, up: &Tensor<2>, rows: &[u32]) -> Tensor<2> {
        let (width, tokens) = (weights.width(), Tokens::Rows(rows));
        let parts = match weights.gate_up.split_rows(width) {
            Some([g, u]) => vec![g.forward_for(gate, None, tokens), u.forward_for(up, None, tokens)],
            // an adapter knows gate and up as one map
            None => {
                let part = |x: &Tensor<2>, from| weights.gate_up.forward_for(x, None, tokens).narrow(1, from, width);
                vec![part(gate, 0), part(up, width)]
            }
        };
        let both = Tensor::cat(parts, 1);
        match &weights.gate_up_bias {
            Some(bias) => both + bias.clone().unsqueeze::<2>(),
            None => both,
        }
    }
}

/// Gradients at what gate and up read, from that of the pre-activations `[n, 2I]`.
fn pair_backward(
    weights: &ExpertTensors,
    inputs: &[Tensor<2>; 2],
    d_gate_up: &Tensor<2>,
    tokens: Tokens<'_>,
    parameters: bool,
) -> [Tensor<2>; 2] {
    let width = weights.width();
    let part = |i: usize| d_gate_up.clone().narrow(1, i * width, width);
    match weights.gate_up.split_rows(width) {
        Some([gate, up]) => [gate.backward(&part(0)), up.backward(&part(1))],
        None => {
            let nothing = part(0).zeros_like();
            let wanted = Wanted { input: true, parameters };
            let through = |x: &Tensor<2>, parts| {
                let d = Tensor::cat(parts, 1);
                weights.gate_up.gradient(|| x.clone(), &d, tokens, wanted).expect("wanted")
            };
            [through(&inputs[0], vec![part(0), nothing.clone()]), through(&inputs[1], vec![nothing, part(1)])]
        }
    }
}

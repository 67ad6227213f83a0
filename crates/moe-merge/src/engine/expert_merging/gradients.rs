//! Gradients of coefficients: `d loss / d c_{k,l} = <d loss / d theta_l, tau_{k,l}>`, one expert's weight gradient at a
//! time.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use moe_checkpoint::ExpertPart;
use moe_core::host::{self, HostView};
use moe_core::trace::{ExpertTrace, Observer, Signals, WaveInfo};

use super::super::gradients::{Operands, weight_gradients, weighted};
use super::coefficients::{Coefficients, Cover};
use crate::{Error, Result};

/// Gradients of coefficients by tensor, `[tasks, chunks]`.
type Gradients = BTreeMap<String, Vec<f64>>;

/// Adds the inner products of an expert's weight gradient with its task vectors, times `factor`.
fn add(
    coefficients: &Coefficients,
    (layer, expert): (usize, usize),
    matrices: Option<[Vec<f32>; 3]>,
    factor: f64,
    into: &mut Gradients,
) -> Result<()> {
    let Some(matrices) = matrices else { return Ok(()) };
    for task in 0..coefficients.tasks() {
        let tau = coefficients.task_vector(task, layer, expert)?;
        for (which, gradient) in ExpertPart::ALL.into_iter().zip(&matrices) {
            let Cover { name, offset, chunk } = coefficients.cover(layer, expert, which);
            let chunks = coefficients.chunks();
            let Some(sums) = into.get_mut(&name) else { continue };
            let tau = tau.part(which).unwrap_or_default();
            for (i, (g, tau)) in gradient.iter().zip(tau).enumerate() {
                sums[task * chunks + (offset + i) / chunk] += factor * f64::from(*g) * f64::from(*tau);
            }
        }
    }
    Ok(())
}

/// Of the objective at the head.
pub(super) struct LogitGradients<'a> {
    coefficients: &'a Coefficients,
    gradients: &'a mut Gradients,
    factor: f64,
}

impl<'a> LogitGradients<'a> {
    pub fn new(coefficients: &'a Coefficients, gradients: &'a mut Gradients, factor: f64) -> Self {
        Self { coefficients, gradients, factor }
    }
}

impl Observer for LogitGradients<'_> {
    fn needs(&self) -> Signals {
        Signals::GRADIENTS
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        let (place, matrices) = ((trace.layer, trace.expert), weight_gradients(trace));
        add(self.coefficients, place, matrices, self.factor, self.gradients).map_err(moe_core::Error::observer)
    }
}

/// One expert of the layer in progress.
struct Pending {
    expert: usize,
    rows: Vec<u32>,
    weights: Vec<f32>,
    input: Tensor<2>,
    trace: moe_core::experts::ExpertTensors,
}

/// Of the mean squared difference of hidden states from a teacher's after each MoE layer: the gradient reaches the
/// experts of that layer alone.
pub(super) struct HiddenGradients<'a> {
    coefficients: &'a Coefficients,
    gradients: &'a mut Gradients,
    targets: &'a BTreeMap<usize, Tensor<2>>,
    factor: f64,
    pending: Vec<Pending>,
    layer: usize,
    /// The term itself, times the factor.
    pub loss: f64,
}

impl<'a> HiddenGradients<'a> {
    pub fn new(
        coefficients: &'a Coefficients,
        gradients: &'a mut Gradients,
        targets: &'a BTreeMap<usize, Tensor<2>>,
        factor: f64,
    ) -> Self {
        Self { coefficients, gradients, targets, factor, pending: Vec::new(), layer: 0, loss: 0.0 }
    }

    /// The state after the layer in progress is known.
    fn settle(&mut self, after: &Tensor<2>, target: &Tensor<2>) -> Result<()> {
        let layers = self.targets.len().saturating_sub(1).max(1) as f64;
        let hidden = after.dims()[1];
        let (after, target) = (HostView::new(after), HostView::new(target));
        let difference: Vec<f32> = after.as_slice().iter().zip(target.as_slice()).map(|(a, b)| a - b).collect();
        let share = self.factor / layers / difference.len().max(1) as f64;
        self.loss += share * difference.iter().map(|d| f64::from(*d).powi(2)).sum::<f64>();
        let residual = self.coefficients.base().config().ffn_factor(self.layer) as f32;
        for Pending { expert, rows, weights, input, trace } in std::mem::take(&mut self.pending) {
            let rows: Vec<f32> = rows
                .iter()
                .flat_map(|row| &difference[*row as usize * hidden..(*row as usize + 1) * hidden])
                .map(|d| 2.0 * residual * d)
                .collect();
            let n = weights.len();
            let upstream = host::from_vec(rows.clone(), [n, hidden], &input.device());
            let gate_up = trace.pre_activations(&input);
            let backward = trace.backward(&gate_up, &upstream, Some(&weights), false);
            let output = weighted(&rows, &weights, hidden);
            let (input, units, gate_up) =
                (HostView::new(&input), HostView::new(&backward.units), HostView::new(&backward.d_gate_up));
            let (input, units, gate_up) = (input.as_slice(), units.as_slice(), gate_up.as_slice());
            let matrices = Operands { hidden, input, units, output: &output, gate_up }.matrices();
            add(self.coefficients, (self.layer, expert), matrices, share, self.gradients)?;
        }
        Ok(())
    }
}

impl Observer for HiddenGradients<'_> {
    fn needs(&self) -> Signals {
        Signals { hidden: true, ..Signals::UNITS }
    }

    fn begin_wave(&mut self, _: &WaveInfo) -> moe_core::Result<()> {
        self.pending.clear();
        Ok(())
    }

    fn expert(&mut self, trace: &ExpertTrace<'_>) -> moe_core::Result<()> {
        self.layer = trace.layer;
        self.pending.push(Pending {
            expert: trace.expert,
            rows: trace.rows.to_vec(),
            weights: trace.routing_weights.to_vec(),
            input: trace.input.clone(),
            trace: trace.expert_weights.clone(),
        });
        Ok(())
    }

    fn hidden(&mut self, layer: usize, hidden: &Tensor<2>) -> moe_core::Result<()> {
        // The input of a layer is what the one before gave.
        if self.pending.is_empty() {
            return Ok(());
        }
        let Some(target) = self.targets.get(&layer) else {
            let error = Error::invalid_evidence(format!("no hidden state of the teacher before layer {layer}"));
            return Err(moe_core::Error::observer(error));
        };
        let target = target.clone();
        self.settle(hidden, &target).map_err(moe_core::Error::observer)
    }
}

//! One layer of a recurrent router, forward and backward, and the states that go from layer to layer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::Tensor;
use moe_core::{
    LogitTransform, RouterTokens, RuleGradients,
    host::{self, HostView},
};

use super::cell::{Cell, Parts};
use crate::Live;

/// What all layers share: the cell, and the states of the sweeps that are under way.
#[derive(Debug)]
pub(super) struct Shared {
    cell: Cell,
    width: usize,
    /// Weights of input and state `[gates r, r]`, biases of input and state `[1, gates r]`.
    lives: [Arc<Live>; 4],
    /// By wave.
    sweeps: Mutex<BTreeMap<u64, Sweep>>,
}

/// The states of the tokens of a wave.
#[derive(Debug, Default)]
struct Sweep {
    /// By place among the MoE layers.
    layers: Vec<Tape>,
    /// Gradient at the state of the last layer that has not gone back yet.
    carried: Option<Vec<f32>>,
}

/// What a layer keeps, `[T, ..]` each.
#[derive(Debug)]
struct Tape {
    u: Vec<f32>,
    before: Vec<f32>,
    input: Vec<f32>,
    state: Vec<f32>,
    after: Vec<f32>,
}

impl Tape {
    fn parts(&self, token: usize, r: usize, gates: usize) -> Parts<'_> {
        let (own, wide) = (token * r..(token + 1) * r, token * gates * r..(token + 1) * gates * r);
        Parts {
            input: &self.input[wide.clone()],
            state: &self.state[wide],
            u: &self.u[own.clone()],
            before: &self.before[own],
        }
    }
}

impl Shared {
    pub fn new(cell: Cell, width: usize, lives: [Arc<Live>; 4]) -> Self {
        Self { cell, width, lives, sweeps: Mutex::default() }
    }

    pub fn lives(&self) -> &[Arc<Live>; 4] {
        &self.lives
    }

    fn sweeps(&self) -> MutexGuard<'_, BTreeMap<u64, Sweep>> {
        self.sweeps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `x [T, r] W^T + b`, `[T, gates r]`.
    fn gate(&self, which: usize, x: &Tensor<2>) -> Vec<f32> {
        if self.cell.gates() == 0 {
            return Vec::new();
        }
        let product = x.clone().matmul(self.lives[which].value().transpose());
        HostView::new(&(product + self.lives[which + 2].value())).as_slice().to_vec()
    }
}

/// One MoE layer of a recurrent router.
#[derive(Debug)]
pub(super) struct RecurrentLayer {
    place: usize,
    shared: Arc<Shared>,
    /// `A [r, H]`.
    input: Arc<Live>,
    /// `G [E, r]`.
    output: Arc<Live>,
    /// Whether the model's own logits are left out.
    instead: bool,
}

impl RecurrentLayer {
    pub fn new(place: usize, shared: Arc<Shared>, input: Arc<Live>, output: Arc<Live>, instead: bool) -> Self {
        Self { place, shared, input, output, instead }
    }

    pub fn experts(&self) -> usize {
        self.output.shape()[0]
    }

    pub fn lives(&self) -> [&Arc<Live>; 2] {
        [&self.input, &self.output]
    }
}

fn missing(layer: usize, what: &str) -> moe_core::Error {
    moe_core::Error::Unsupported(format!(
        "a recurrent router in layer {layer} {what}: its states go from the first MoE layer to the last in one sweep"
    ))
}

impl LogitTransform for RecurrentLayer {
    fn forward(&self, tokens: &RouterTokens<'_>) -> moe_core::Result<Vec<f32>> {
        let (x, r) = (tokens.read()?, self.shared.width);
        let (count, device) = (tokens.tokens(), x.device());
        let u = x.clone().matmul(self.input.value().transpose());
        let mut sweeps = self.shared.sweeps();
        let sweep = sweeps.entry(tokens.wave.id).or_default();
        if self.place == 0 {
            *sweep = Sweep::default();
        }
        if sweep.layers.len() != self.place {
            return Err(missing(tokens.layer, "without the layers before it"));
        }
        let before = match sweep.layers.last() {
            Some(tape) if tape.after.len() == count * r => tape.after.clone(),
            Some(_) => return Err(missing(tokens.layer, "with other tokens than the layer before it")),
            None => vec![0.0; count * r],
        };
        let h = host::from_vec(before.clone(), [count, r], &device);
        let (input, state) = (self.shared.gate(0, &u), self.shared.gate(1, &h));
        let u = HostView::new(&u).as_slice().to_vec();
        let mut tape = Tape { u, before, input, state, after: Vec::new() };
        let mut after = vec![0.0; count * r];
        let gates = self.shared.cell.gates();
        for (t, row) in after.chunks_exact_mut(r).enumerate() {
            self.shared.cell.forward(&tape.parts(t, r, gates), row);
        }
        let h = host::from_vec(after.clone(), [count, r], &device);
        tape.after = after;
        sweep.layers.push(tape);
        let logits = HostView::new(&h.matmul(self.output.value().transpose()));
        Ok(match self.instead {
            true => logits.as_slice().to_vec(),
            false => tokens.logits.iter().zip(logits.as_slice()).map(|(own, more)| own + more).collect(),
        })
    }

    fn backward(
        &self,
        tokens: &RouterTokens<'_>,
        d_logits: &[f32],
        parameters: bool,
    ) -> moe_core::Result<RuleGradients> {
        let (x, r, gates) = (tokens.read()?, self.shared.width, self.shared.cell.gates());
        let (count, device) = (tokens.tokens(), x.device());
        let mut sweeps = self.shared.sweeps();
        let sweep = sweeps.entry(tokens.wave.id).or_default();
        if sweep.layers.len() != self.place + 1 {
            return Err(missing(tokens.layer, "backward without the layers after it"));
        }
        let Some(tape) = sweep.layers.pop() else {
            return Err(missing(tokens.layer, "backward without a forward pass"));
        };
        let tensor = |values: Vec<f32>, columns: usize| host::from_vec(values, [count, columns], &device);
        let d_logits_tensor = tensor(d_logits.to_vec(), tokens.experts);
        let mut d_after = HostView::new(&d_logits_tensor.clone().matmul(self.output.value())).as_slice().to_vec();
        if let Some(carried) = sweep.carried.take() {
            d_after.iter_mut().zip(carried).for_each(|(sum, d)| *sum += d);
        }
        let (mut d_input, mut d_state) = (vec![0.0; count * gates * r], vec![0.0; count * gates * r]);
        let (mut d_u, mut d_before) = (vec![0.0; count * r], vec![0.0; count * r]);
        for t in 0..count {
            let (own, wide) = (t * r..(t + 1) * r, t * gates * r..(t + 1) * gates * r);
            self.shared.cell.backward(
                &tape.parts(t, r, gates),
                &d_after[own.clone()],
                &mut d_input[wide.clone()],
                &mut d_state[wide],
                &mut d_u[own.clone()],
                &mut d_before[own],
            );
        }
        let (mut d_u, mut d_before) = (tensor(d_u, r), tensor(d_before, r));
        let [input_weight, state_weight, input_bias, state_bias] = self.shared.lives();
        if gates > 0 {
            let (d_input_tensor, d_state_tensor) =
                (tensor(d_input.clone(), gates * r), tensor(d_state.clone(), gates * r));
            d_u = d_u + d_input_tensor.clone().matmul(input_weight.value());
            d_before = d_before + d_state_tensor.clone().matmul(state_weight.value());
            if parameters {
                let (u, before) = (tensor(tape.u.clone(), r), tensor(tape.before.clone(), r));
                input_weight.add_product(&d_input_tensor, 0..gates * r, &u, 0..r, 1.0);
                state_weight.add_product(&d_state_tensor, 0..gates * r, &before, 0..r, 1.0);
                for (bias, d) in [(input_bias, &d_input), (state_bias, &d_state)] {
                    bias.add_gradient(|sum| {
                        d.chunks_exact(gates * r).for_each(|row| sum.iter_mut().zip(row).for_each(|(s, d)| *s += d));
                    });
                }
            }
        }
        if parameters {
            let after = tensor(tape.after.clone(), r);
            self.output.add_product(&d_logits_tensor, 0..tokens.experts, &after, 0..r, 1.0);
            self.input.add_product(&d_u, 0..r, x, 0..x.dims()[1], 1.0);
        }
        sweep.carried = (self.place > 0).then(|| HostView::new(&d_before).as_slice().to_vec());
        let own = if self.instead { vec![0.0; d_logits.len()] } else { d_logits.to_vec() };
        Ok(RuleGradients { logits: own, input: Some(d_u.matmul(self.input.value())) })
    }
}

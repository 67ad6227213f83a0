//! A router: logits, gates, balance, and the biases of a selection.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use moe_core::{
    adapters::Tokens,
    host::HostView,
    kernels::product::{Matrix, product},
    trace::WaveInfo,
};

use super::{
    balance::{Group, Running},
    gate::{Context, Gate, Gated},
};
use crate::{Live, SweepListener, lora::SweepClock};

/// `z = x W^T + b` and its gates, or gates of what the experts give themselves.
#[derive(Debug)]
pub(crate) struct Router {
    pub id: usize,
    pub gate: Gate,
    pub inference_gate: Option<Gate>,
    /// Numbers that the gates are: experts, or ranks.
    pub width: usize,
    /// `[N, in]`.
    pub weight: Option<Arc<Live>>,
    /// `[1, N]`.
    pub bias: Option<Arc<Live>>,
    pub trained: bool,
    pub group: Arc<Group>,
    pub running: Arc<Running>,
    pub clock: Arc<SweepClock>,
    pub selection: Mutex<Selection>,
}

/// The bias of a selection by rank, and what the wave chose, and sums of weights for their means.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    pub bias: Vec<f32>,
    /// Choices by first token, of a wave of training.
    counts: BTreeMap<usize, Vec<f64>>,
    /// Tokens and sums of weights, by first token, then of the waves before.
    weights: BTreeMap<usize, (usize, Vec<f64>)>,
    tokens: usize,
    sums: Vec<f64>,
}

impl Selection {
    pub fn new(bias: Vec<f32>) -> Self {
        Self { bias, ..Self::default() }
    }

    /// Mean weights over all tokens so far.
    pub fn mean(&self) -> Option<Vec<f64>> {
        let mut sums = self.sums.clone();
        let mut tokens = self.tokens;
        for (n, values) in self.weights.values() {
            tokens += n;
            sums.resize(values.len(), 0.0);
            sums.iter_mut().zip(values).for_each(|(sum, v)| *sum += v);
        }
        (tokens > 0).then(|| sums.into_iter().map(|sum| sum / tokens as f64).collect())
    }
}

impl SweepListener for Router {
    /// Moves the bias of the selection by what the wave before chose, if that was one of training.
    fn begin_wave(&self, _: &WaveInfo) {
        self.settle();
        let mut selection = self.selection.lock().unwrap_or_else(PoisonError::into_inner);
        for (n, values) in std::mem::take(&mut selection.weights).into_values() {
            selection.tokens += n;
            selection.sums.resize(values.len(), 0.0);
            selection.sums.iter_mut().zip(values).for_each(|(sum, v)| *sum += v);
        }
    }
}

impl Router {
    /// Moves the bias of the selection by what a wave of training chose.
    fn settle(&self) {
        let mut selection = self.selection.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = std::mem::take(&mut selection.counts);
        if let (Some(rate), false) = (self.gate.bias_rate(), counts.is_empty()) {
            let mut sum = vec![0.0; self.width];
            counts.values().for_each(|counts| sum.iter_mut().zip(counts).for_each(|(sum, c)| *sum += c));
            let mean = sum.iter().sum::<f64>() / sum.len() as f64;
            for (bias, count) in selection.bias.iter_mut().zip(sum) {
                let sign = if count < mean {
                    1.0
                } else if count > mean {
                    -1.0
                } else {
                    0.0
                };
                *bias += rate * sign;
            }
        }
    }

    /// The bias of the selection after all waves so far.
    pub fn settled_bias(&self) -> Vec<f32> {
        self.settle();
        self.selection.lock().unwrap_or_else(PoisonError::into_inner).bias.clone()
    }

    /// Puts another one in its place.
    pub fn set_bias(&self, bias: Vec<f32>) {
        let mut selection = self.selection.lock().unwrap_or_else(PoisonError::into_inner);
        selection.counts.clear();
        selection.bias = bias;
    }

    fn gate(&self) -> Gate {
        match self.inference_gate {
            Some(gate) if !self.clock.is_training() => gate,
            _ => self.gate,
        }
    }

    fn with_context<T>(&self, tokens: Tokens<'_>, f: impl FnOnce(&Context<'_>) -> T) -> T {
        let label = |row: usize| self.running.label(self.running.sequence(tokens.token(row))?);
        let bias = self.selection.lock().unwrap_or_else(PoisonError::into_inner).bias.clone();
        f(&Context { training: self.clock.is_training(), bias: &bias, labels: &label })
    }

    /// Logits `[n, N]` of `x [n, in]`; what the experts gave themselves where there is no router.
    pub fn logits(&self, x: Matrix<'_>, n: usize, own: &[f32]) -> Vec<f32> {
        let Some(weight) = &self.weight else { return own.to_vec() };
        let [experts, inputs] = weight.shape();
        let value = weight.value();
        let view = HostView::new(&value);
        let mut z = vec![0.0; n * experts];
        product(&mut z, experts, 0, false, 1.0, x, Matrix::new(view.as_slice(), experts, inputs).transposed());
        if let Some(bias) = &self.bias {
            let bias = bias.value();
            let bias = HostView::new(&bias);
            z.chunks_exact_mut(experts).for_each(|row| row.iter_mut().zip(bias.as_slice()).for_each(|(z, b)| *z += b));
        }
        z
    }

    /// Gates of logits, noted for the balance, in a forward pass.
    pub fn gates(&self, z: &[f32], n: usize, tokens: Tokens<'_>) -> Gated {
        let gated = self.with_context(tokens, |context| self.gate().forward(z, n, self.width, context));
        self.group.note(self.id, &gated, n, self.width, &|row| tokens.token(row));
        let mut selection = self.selection.lock().unwrap_or_else(PoisonError::into_inner);
        if n > 0 {
            let mut sums = vec![0.0; self.width];
            for row in gated.weights.chunks_exact(self.width) {
                sums.iter_mut().zip(row).for_each(|(sum, w)| *sum += f64::from(*w));
            }
            selection.weights.insert(tokens.token(0), (n, sums));
            if self.clock.is_training() && self.gate.bias_rate().is_some() {
                let mut counts = vec![0.0; self.width];
                for row in gated.chosen.chunks_exact(self.width) {
                    counts.iter_mut().zip(row).for_each(|(count, c)| *count += f64::from(u8::from(*c)));
                }
                selection.counts.insert(tokens.token(0), counts);
            }
        }
        gated
    }

    /// The gradient at the logits from that at the weights `dw [n, width]`, with that of the balance.
    pub fn d_logits(&self, z: &[f32], n: usize, gated: &Gated, dw: &[f32], tokens: Tokens<'_>) -> Vec<f32> {
        let dp = self.group.gradient(gated, n, self.width, &|row| tokens.token(row));
        self.with_context(tokens, |context| self.gate().backward(z, n, self.width, (gated, dw, &dp), context))
    }

    /// Gradients of the router, and that at its input, added to `dx`.
    pub fn backward(&self, x: Matrix<'_>, n: usize, dz: &[f32], dx: Option<&mut [f32]>, parameters: bool) {
        let Some(weight) = &self.weight else { return };
        let [experts, inputs] = weight.shape();
        let d = Matrix::new(dz, n, experts);
        if let Some(dx) = dx {
            let value = weight.value();
            let view = HostView::new(&value);
            product(dx, inputs, 0, true, 1.0, d, Matrix::new(view.as_slice(), experts, inputs));
        }
        if parameters && self.trained {
            weight.add_gradient(|sum| product(sum, inputs, 0, true, 1.0, d.transposed(), x));
            if let Some(bias) = &self.bias {
                bias.add_gradient(|sum| {
                    dz.chunks_exact(experts).for_each(|row| sum.iter_mut().zip(row).for_each(|(s, d)| *s += d));
                });
            }
        }
    }
}

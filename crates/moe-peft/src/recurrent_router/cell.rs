//! What makes the state of a token in a layer of that in the layer before.

use serde::{Deserialize, Serialize};

/// The cell that all layers share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cell {
    /// A gated recurrent unit, as published.
    #[default]
    Gru,
    /// `tanh(W u + b + U h + c)`.
    Rnn,
    /// `u`: no memory, a router of low rank.
    Identity,
}

/// What a cell kept of its forward pass for one token: `[gates r]` before the activations of the input's part and the
/// state's part.
pub(super) struct Parts<'a> {
    pub input: &'a [f32],
    pub state: &'a [f32],
    pub u: &'a [f32],
    pub before: &'a [f32],
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

impl Cell {
    /// Rows of its matrices, in widths of the state: reset, update and new of a GRU, in this order.
    pub fn gates(self) -> usize {
        match self {
            Self::Gru => 3,
            Self::Rnn => 1,
            Self::Identity => 0,
        }
    }

    /// The new state `[r]`.
    pub(super) fn forward(self, parts: &Parts<'_>, out: &mut [f32]) {
        let r = out.len();
        match self {
            Self::Identity => out.copy_from_slice(parts.u),
            Self::Rnn => {
                let sums = parts.input.iter().zip(parts.state);
                out.iter_mut().zip(sums).for_each(|(h, (a, b))| *h = (a + b).tanh());
            }
            Self::Gru => {
                for (i, h) in out.iter_mut().enumerate() {
                    let reset = sigmoid(parts.input[i] + parts.state[i]);
                    let update = sigmoid(parts.input[r + i] + parts.state[r + i]);
                    let new = (parts.input[2 * r + i] + reset * parts.state[2 * r + i]).tanh();
                    *h = (1.0 - update) * new + update * parts.before[i];
                }
            }
        }
    }

    /// From the gradient `d [r]` of the new state: writes those at both parts `[gates r]`, at the input `[r]` and at
    /// the state before `[r]`, without what goes through the matrices.
    pub(super) fn backward(
        self,
        parts: &Parts<'_>,
        d: &[f32],
        d_input: &mut [f32],
        d_state: &mut [f32],
        d_u: &mut [f32],
        d_before: &mut [f32],
    ) {
        let r = d.len();
        match self {
            Self::Identity => d_u.copy_from_slice(d),
            Self::Rnn => {
                for i in 0..r {
                    let h = (parts.input[i] + parts.state[i]).tanh();
                    let through = d[i] * (1.0 - h * h);
                    (d_input[i], d_state[i]) = (through, through);
                }
            }
            Self::Gru => {
                for i in 0..r {
                    let reset = sigmoid(parts.input[i] + parts.state[i]);
                    let update = sigmoid(parts.input[r + i] + parts.state[r + i]);
                    let new = (parts.input[2 * r + i] + reset * parts.state[2 * r + i]).tanh();
                    let d_new = d[i] * (1.0 - update) * (1.0 - new * new);
                    let d_update = d[i] * (parts.before[i] - new) * update * (1.0 - update);
                    let d_reset = d_new * parts.state[2 * r + i] * reset * (1.0 - reset);
                    (d_input[i], d_state[i]) = (d_reset, d_reset);
                    (d_input[r + i], d_state[r + i]) = (d_update, d_update);
                    (d_input[2 * r + i], d_state[2 * r + i]) = (d_new, d_new * reset);
                    d_before[i] = d[i] * update;
                }
            }
        }
    }
}

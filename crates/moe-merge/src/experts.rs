//! The experts of one layer as merging sees them: whole weights and units.

use moe_checkpoint::{Checkpoint, ExpertWeights};
use rayon::prelude::*;

use crate::linalg::transposed;
use crate::{Error, Result};

/// Weights of the routed experts of one MoE layer, read one expert at a time.
pub trait ExpertSource: Send + Sync {
    /// Number of experts, E.
    fn count(&self) -> usize;

    /// Weights of an expert in canonical form.
    ///
    /// # Errors
    /// Whatever keeps it from being read.
    fn expert(&self, expert: usize) -> Result<ExpertWeights>;

    /// Units of an expert.
    ///
    /// # Errors
    /// As [`ExpertSource::expert`].
    fn width(&self, expert: usize) -> Result<usize> {
        Ok(self.expert(expert)?.width)
    }
}

/// The experts of a layer of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct LayerExperts<'a> {
    /// The checkpoint.
    pub checkpoint: &'a Checkpoint,
    /// Decoder layer index.
    pub layer: usize,
}

impl ExpertSource for LayerExperts<'_> {
    fn count(&self) -> usize {
        self.checkpoint.config().moe(self.layer).map_or(0, |moe| moe.num_experts())
    }

    fn expert(&self, expert: usize) -> Result<ExpertWeights> {
        Ok(self.checkpoint.expert(self.layer, expert)?)
    }

    fn width(&self, expert: usize) -> Result<usize> {
        let count = self.count();
        let width = self.checkpoint.config().moe(self.layer).and_then(|moe| moe.widths.get(expert).copied());
        width.ok_or_else(|| moe_checkpoint::Error::UnknownExpert { layer: self.layer, expert, count }.into())
    }
}

/// The same function with units of zeros after its own, up to `width` of them.
pub(crate) fn padded(mut weights: ExpertWeights, width: usize) -> ExpertWeights {
    let (own, hidden) = (weights.width, weights.hidden);
    if width <= own {
        return weights;
    }
    weights.gate.resize(width * hidden, 0.0);
    weights.up.resize(width * hidden, 0.0);
    let mut down = vec![0.0; hidden * width];
    for (into, from) in down.chunks_exact_mut(width).zip(weights.down.chunks_exact(own.max(1))) {
        into[..own].copy_from_slice(from);
    }
    weights.down = down;
    for bias in [&mut weights.gate_bias, &mut weights.up_bias].into_iter().flatten() {
        bias.resize(width, 0.0);
    }
    ExpertWeights { width, ..weights }
}

impl ExpertSource for [ExpertWeights] {
    fn count(&self) -> usize {
        self.len()
    }

    fn expert(&self, expert: usize) -> Result<ExpertWeights> {
        let weights = self.get(expert).cloned();
        weights.ok_or_else(|| Error::parameter("expert", expert, format!("below {}", self.len())))
    }
}

impl ExpertSource for Vec<ExpertWeights> {
    fn count(&self) -> usize {
        self.len()
    }

    fn expert(&self, expert: usize) -> Result<ExpertWeights> {
        self.as_slice().expert(expert)
    }
}

/// Which matrices of an expert make up the vector of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UnitParts {
    pub gate: bool,
    pub up: bool,
    pub down: bool,
}

impl UnitParts {
    pub const ALL: Self = Self { gate: true, up: true, down: true };
    pub const OUTER: Self = Self { gate: false, up: true, down: true };
}

/// One vector per unit: its gate row, up row and down column, with the biases of gate and up if there are any, as a
/// row-major `[I, D]` matrix; and D.
pub(crate) fn unit_vectors(weights: &ExpertWeights, parts: UnitParts) -> (Vec<f32>, usize) {
    let ExpertWeights { width, hidden, .. } = *weights;
    let down = if parts.down { transposed(&weights.down, hidden, width) } else { Vec::new() };
    let matrices = [(parts.gate, &weights.gate), (parts.up, &weights.up), (parts.down, &down)];
    let matrices: Vec<&Vec<f32>> = matrices.into_iter().filter(|(wanted, _)| *wanted).map(|(_, m)| m).collect();
    let biases = [(parts.gate, &weights.gate_bias), (parts.up, &weights.up_bias)];
    let biases: Vec<&Vec<f32>> =
        biases.into_iter().filter(|(wanted, _)| *wanted).filter_map(|(_, bias)| bias.as_ref()).collect();
    let length = matrices.len() * hidden + biases.len();
    let mut out = vec![0.0; width * length];
    if length > 0 {
        out.par_chunks_mut(length).enumerate().with_min_len(32).for_each(|(unit, row)| {
            let (wide, narrow) = row.split_at_mut(matrices.len() * hidden);
            for (into, matrix) in wide.chunks_exact_mut(hidden.max(1)).zip(&matrices) {
                into.copy_from_slice(&matrix[unit * hidden..(unit + 1) * hidden]);
            }
            narrow.iter_mut().zip(&biases).for_each(|(into, bias)| *into = bias[unit]);
        });
    }
    (out, length)
}

/// The expert whose units are the rows of `vectors`, as [`unit_vectors`] of all parts lays them out; `like` says
/// whether there are biases and gives that of down.
pub(crate) fn from_unit_vectors(vectors: &[f32], like: &ExpertWeights) -> ExpertWeights {
    let hidden = like.hidden;
    let biased = like.gate_bias.is_some() && like.up_bias.is_some();
    let length = 3 * hidden + if biased { 2 } else { 0 };
    let width = vectors.len() / length.max(1);
    let part = |which: usize| -> Vec<f32> {
        vectors.chunks_exact(length).flat_map(|row| &row[which * hidden..(which + 1) * hidden]).copied().collect()
    };
    let bias = |which: usize| -> Option<Vec<f32>> {
        biased.then(|| vectors.chunks_exact(length).map(|row| row[3 * hidden + which]).collect())
    };
    ExpertWeights {
        gate: part(0),
        up: part(1),
        down: transposed(&part(2), width, hidden),
        gate_bias: bias(0),
        up_bias: bias(1),
        down_bias: like.down_bias.clone(),
        width,
        hidden,
    }
}

/// Refuses experts of different widths, or of which some have biases that others lack.
pub(crate) fn check_alike(layer: usize, first: (usize, &ExpertWeights), other: (usize, &ExpertWeights)) -> Result<()> {
    let biases = |w: &ExpertWeights| (w.gate_bias.is_some(), w.down_bias.is_some());
    let (a, b) = (first.1, other.1);
    let reason = if (a.width, a.hidden) != (b.width, b.hidden) {
        format!("they have {} and {} units; units of experts are merged one to one", a.width, b.width)
    } else if biases(a) != biases(b) {
        "only one of them has biases".to_string()
    } else {
        return Ok(());
    };
    Err(Error::Incompatible { layer, experts: vec![first.0, other.0], reason })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{biased_expert, expert};

    #[test]
    fn units_of_zeros_change_nothing() {
        use moe_checkpoint::Activation;
        let clamped = Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };
        for (weights, activation) in [
            (expert(5, 3, 4), Activation::Silu),
            (biased_expert(5, 3, 4), clamped),
            (expert(5, 0, 4), Activation::Gelu),
        ] {
            let x = crate::testing::noise(20, 6);
            let wider = padded(weights.clone(), 7);
            assert_eq!((wider.width, wider.down.len(), wider.gate.len()), (7, 35, 35));
            let (found, expected) = (wider.forward(&x, activation), weights.forward(&x, activation));
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6));
            assert_eq!(padded(weights.clone(), weights.width), weights);
        }
    }

    #[test]
    fn units_survive_being_vectors() {
        for weights in [expert(5, 7, 3), biased_expert(5, 7, 3)] {
            let (vectors, length) = unit_vectors(&weights, UnitParts::ALL);
            assert_eq!(vectors.len(), 7 * length);
            assert_eq!(from_unit_vectors(&vectors, &weights), weights);
        }
    }
}

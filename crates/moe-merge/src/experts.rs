//! The experts of one layer as merging sees them: whole weights, units, outputs on the host.

use moe_checkpoint::{Activation, Checkpoint, ExpertPart, ExpertWeights};
use rayon::prelude::*;

use crate::linalg::{product, transposed, view};
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

/// The same function with its units in another order: slot `i` gets unit `order[i]`, a permutation of the units.
pub fn permute_units(weights: &ExpertWeights, order: &[u32]) -> ExpertWeights {
    let ExpertWeights { width, hidden, .. } = *weights;
    let rows = |matrix: &[f32]| -> Vec<f32> {
        order.iter().flat_map(|&u| &matrix[u as usize * hidden..(u as usize + 1) * hidden]).copied().collect()
    };
    let bias = |bias: &Option<Vec<f32>>| bias.as_ref().map(|b| order.iter().map(|&u| b[u as usize]).collect());
    let columns = weights.down.chunks_exact(width.max(1)).flat_map(|row| order.iter().map(|&u| row[u as usize]));
    ExpertWeights {
        gate: rows(&weights.gate),
        up: rows(&weights.up),
        down: columns.collect(),
        gate_bias: bias(&weights.gate_bias),
        up_bias: bias(&weights.up_bias),
        down_bias: weights.down_bias.clone(),
        width,
        hidden,
    }
}

/// Unit activations `[n, I]` of inputs `[n, H]`.
pub fn unit_activations(weights: &ExpertWeights, inputs: &[f32], activation: Activation) -> Result<Vec<f32>> {
    let (hidden, width) = (weights.hidden, weights.width);
    let x = view(inputs, inputs.len() / hidden.max(1), hidden);
    let mut gate = product(x, view(&weights.gate, width, hidden).transpose());
    let mut up = product(x, view(&weights.up, width, hidden).transpose());
    for (values, bias) in [(&mut gate, &weights.gate_bias), (&mut up, &weights.up_bias)] {
        if let Some(bias) = bias {
            add_bias(values, bias);
        }
    }
    activate(gate, &up, activation)
}

/// Units of gate and up.
pub(crate) fn activate(mut gate: Vec<f32>, up: &[f32], activation: Activation) -> Result<Vec<f32>> {
    let act = activation_function(activation)?;
    gate.par_iter_mut().zip(up).with_min_len(1 << 12).for_each(|(gate, up)| *gate = act(*gate, *up));
    Ok(gate)
}

/// Outputs `[n, H]`, before the routing weight, of unit activations `[n, I]`.
pub fn outputs_of_units(weights: &ExpertWeights, units: &[f32]) -> Vec<f32> {
    let (hidden, width) = (weights.hidden, weights.width);
    if width == 0 {
        return Vec::new();
    }
    let mut out = product(view(units, units.len() / width, width), view(&weights.down, hidden, width).transpose());
    if let Some(bias) = &weights.down_bias {
        add_bias(&mut out, bias);
    }
    out
}

/// Outputs `[n, H]`, before the routing weight, of inputs `[n, H]`.
pub fn expert_outputs(weights: &ExpertWeights, inputs: &[f32], activation: Activation) -> Result<Vec<f32>> {
    if weights.width == 0 {
        let rows = inputs.len() / weights.hidden.max(1);
        let bias = weights.down_bias.clone().unwrap_or_else(|| vec![0.0; weights.hidden]);
        return Ok(bias.repeat(rows));
    }
    Ok(outputs_of_units(weights, &unit_activations(weights, inputs, activation)?))
}

/// Adds a bias to every row; an empty one is none.
pub(crate) fn add_bias(values: &mut [f32], bias: &[f32]) {
    if !bias.is_empty() {
        values.par_chunks_mut(bias.len()).for_each(|row| row.iter_mut().zip(bias).for_each(|(v, b)| *v += b));
    }
}

/// A unit of gate and up, in f64 inside.
fn activation_function(activation: Activation) -> Result<Box<dyn Fn(f32, f32) -> f32 + Send + Sync>> {
    fn gated(f: impl Fn(f64) -> f64 + Send + Sync + 'static) -> Box<dyn Fn(f32, f32) -> f32 + Send + Sync> {
        Box::new(move |gate, up| (f(f64::from(gate)) * f64::from(up)) as f32)
    }
    Ok(match activation {
        // Everywhere but here exactness costs nothing.
        Activation::Silu => Box::new(|gate: f32, up: f32| gate / (1.0 + (-gate).exp()) * up),
        Activation::Gelu => gated(|g| 0.5 * g * (1.0 + libm::erf(g * std::f64::consts::FRAC_1_SQRT_2))),
        Activation::GeluTanh => gated(|g| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
            0.5 * g * (1.0 + inner.tanh())
        }),
        Activation::ClampedSwiglu { alpha, limit } => Box::new(move |gate, up| {
            let gate = f64::from(gate).min(limit);
            (gate / (1.0 + (-alpha * gate).exp()) * (f64::from(up).clamp(-limit, limit) + 1.0)) as f32
        }),
        other => return Err(Error::parameter("activation", format!("{other:?}"), "one that is known to merging")),
    })
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

/// The expert whose units are the rows of `vectors`, as [`unit_vectors`] of all parts lays them out; `like` says whether
/// there are biases and gives that of down.
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

/// The values of a part of an expert; `None` for a bias that it does not have.
pub(crate) fn part(weights: &ExpertWeights, part: ExpertPart) -> Option<&[f32]> {
    match part {
        ExpertPart::Gate => Some(&weights.gate),
        ExpertPart::Up => Some(&weights.up),
        ExpertPart::Down => Some(&weights.down),
        ExpertPart::GateBias => weights.gate_bias.as_deref(),
        ExpertPart::UpBias => weights.up_bias.as_deref(),
        ExpertPart::DownBias => weights.down_bias.as_deref(),
        _ => None,
    }
}

/// The same, for changing.
pub(crate) fn part_mut(weights: &mut ExpertWeights, part: ExpertPart) -> Option<&mut [f32]> {
    match part {
        ExpertPart::Gate => Some(&mut weights.gate),
        ExpertPart::Up => Some(&mut weights.up),
        ExpertPart::Down => Some(&mut weights.down),
        ExpertPart::GateBias => weights.gate_bias.as_deref_mut(),
        ExpertPart::UpBias => weights.up_bias.as_deref_mut(),
        ExpertPart::DownBias => weights.down_bias.as_deref_mut(),
        _ => None,
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
    use crate::testing::{biased_expert, expert, noise};

    #[test]
    fn the_order_of_units_does_not_change_the_function() {
        for weights in [expert(5, 7, 3), biased_expert(5, 7, 3)] {
            let order = [4, 2, 0, 6, 1, 5, 3];
            let x = noise(4 * 5, 9);
            let found = expert_outputs(&permute_units(&weights, &order), &x, Activation::Silu).unwrap();
            let expected = expert_outputs(&weights, &x, Activation::Silu).unwrap();
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }

    #[test]
    fn the_outputs_of_units_add_up_to_that_of_the_expert() {
        let weights = expert(4, 6, 1);
        let x = noise(3 * 4, 2);
        let mut sum = vec![0.0; x.len()];
        for unit in 0..6 {
            let alone = ExpertWeights {
                gate: weights.gate[unit * 4..(unit + 1) * 4].to_vec(),
                up: weights.up[unit * 4..(unit + 1) * 4].to_vec(),
                down: (0..4).map(|h| weights.down[h * 6 + unit]).collect(),
                width: 1,
                hidden: 4,
                ..ExpertWeights::default()
            };
            let part = expert_outputs(&alone, &x, Activation::Silu).unwrap();
            sum.iter_mut().zip(part).for_each(|(sum, p)| *sum += p);
        }
        let whole = expert_outputs(&weights, &x, Activation::Silu).unwrap();
        assert!(sum.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn units_survive_being_vectors() {
        for weights in [expert(5, 7, 3), biased_expert(5, 7, 3)] {
            let (vectors, length) = unit_vectors(&weights, UnitParts::ALL);
            assert_eq!(vectors.len(), 7 * length);
            assert_eq!(from_unit_vectors(&vectors, &weights), weights);
        }
    }

    #[test]
    fn activations_are_those_of_their_definitions() {
        let unit = |activation, gate, up| activation_function(activation).unwrap()(gate, up);
        assert!((unit(Activation::Silu, 1.0, 2.0) - 2.0 * 0.731_058_6).abs() < 1e-6);
        assert!((unit(Activation::Gelu, 1.0, 2.0) - 2.0 * 0.841_344_7).abs() < 1e-6);
        assert!((unit(Activation::GeluTanh, 1.0, 2.0) - 2.0 * 0.841_192).abs() < 1e-6);
        let clamped = Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };
        assert!((unit(clamped, 9.0, -9.0) - -6.0 * 7.0 / (1.0 + (-1.702f32 * 7.0).exp())).abs() < 1e-4);
    }
}

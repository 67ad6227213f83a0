//! The weights of one routed expert in canonical form, as f32, and what can be done with them.

use rayon::prelude::*;

use crate::experts::ExpertPart;
use crate::products::{add_to_rows, product, view};
use crate::{Activation, Error, Result};

/// The weights of one routed expert: `down · (silu(gate · x) * (up · x))`. All matrices are row-major.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExpertWeights {
    /// Gate projection `[width, hidden]`.
    pub gate: Vec<f32>,
    /// Up projection `[width, hidden]`.
    pub up: Vec<f32>,
    /// Down projection `[hidden, width]`.
    pub down: Vec<f32>,
    /// Bias of the gate projection `[width]`; there together with that of up, and with that of down.
    pub gate_bias: Option<Vec<f32>>,
    /// Bias of the up projection `[width]`.
    pub up_bias: Option<Vec<f32>>,
    /// Bias of the down projection `[hidden]`; may be there alone.
    pub down_bias: Option<Vec<f32>>,
    /// Intermediate width `I`: the number of units.
    pub width: usize,
    /// Hidden size `H`.
    pub hidden: usize,
}

impl ExpertWeights {
    /// The values of a part; `None` for a bias that the expert does not have.
    pub fn part(&self, part: ExpertPart) -> Option<&[f32]> {
        match part {
            ExpertPart::Gate => Some(&self.gate),
            ExpertPart::Up => Some(&self.up),
            ExpertPart::Down => Some(&self.down),
            ExpertPart::GateBias => self.gate_bias.as_deref(),
            ExpertPart::UpBias => self.up_bias.as_deref(),
            ExpertPart::DownBias => self.down_bias.as_deref(),
        }
    }

    /// The values of a part, for changing; `None` for a bias that the expert does not have.
    pub fn part_mut(&mut self, part: ExpertPart) -> Option<&mut [f32]> {
        match part {
            ExpertPart::Gate => Some(&mut self.gate),
            ExpertPart::Up => Some(&mut self.up),
            ExpertPart::Down => Some(&mut self.down),
            ExpertPart::GateBias => self.gate_bias.as_deref_mut(),
            ExpertPart::UpBias => self.up_bias.as_deref_mut(),
            ExpertPart::DownBias => self.down_bias.as_deref_mut(),
        }
    }

    /// The expert of these units in this order: slot `i` gets unit `units[i]`. Fewer units prune it; a permutation of
    /// all of them leaves the function as it was.
    ///
    /// ```
    /// use moe_checkpoint::ExpertWeights;
    ///
    /// let (gate, up, down) = (vec![1.0, 2.0, 3.0], vec![4.0, 5.0, 6.0], vec![7.0, 8.0, 9.0]);
    /// let expert = ExpertWeights { gate, up, down, width: 3, hidden: 1, ..Default::default() };
    /// let kept = expert.select_units(&[0, 2])?;
    /// assert_eq!((kept.gate, kept.down, kept.width), (vec![1.0, 3.0], vec![7.0, 9.0], 2));
    /// # Ok::<(), moe_checkpoint::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a unit that the expert does not have.
    pub fn select_units(&self, units: &[u32]) -> Result<Self> {
        let Self { width, hidden, .. } = *self;
        if let Some(unit) = units.iter().find(|unit| **unit as usize >= width) {
            return Err(Error::OutOfRange {
                what: "unit".into(),
                found: unit.to_string(),
                expected: format!("an index below the width {width}"),
            });
        }
        let rows = |matrix: &[f32]| -> Vec<f32> {
            units.iter().flat_map(|&u| &matrix[u as usize * hidden..(u as usize + 1) * hidden]).copied().collect()
        };
        let bias = |bias: &Option<Vec<f32>>| bias.as_ref().map(|b| units.iter().map(|&u| b[u as usize]).collect());
        let columns = self.down.chunks_exact(width.max(1)).flat_map(|row| units.iter().map(|&u| row[u as usize]));
        Ok(Self {
            gate: rows(&self.gate),
            up: rows(&self.up),
            down: columns.collect(),
            gate_bias: bias(&self.gate_bias),
            up_bias: bias(&self.up_bias),
            down_bias: self.down_bias.clone(),
            width: units.len(),
            hidden,
        })
    }

    /// Unit activations `[n, I]` of inputs `[n, H]`.
    pub fn unit_activations(&self, inputs: &[f32], activation: Activation) -> Vec<f32> {
        let (hidden, width) = (self.hidden, self.width);
        let x = view(inputs, inputs.len() / hidden.max(1), hidden);
        let mut gate = product(x, view(&self.gate, width, hidden).transpose());
        let mut up = product(x, view(&self.up, width, hidden).transpose());
        for (values, bias) in [(&mut gate, &self.gate_bias), (&mut up, &self.up_bias)] {
            add_to_rows(values, bias.as_deref().unwrap_or_default());
        }
        activation.apply(&mut gate, &up);
        gate
    }

    /// Outputs `[n, H]`, before the routing weight, of unit activations `[n, I]`; nothing for an expert without units.
    pub fn outputs_of_units(&self, units: &[f32]) -> Vec<f32> {
        let (hidden, width) = (self.hidden, self.width);
        if width == 0 {
            return Vec::new();
        }
        let mut out = product(view(units, units.len() / width, width), view(&self.down, hidden, width).transpose());
        add_to_rows(&mut out, self.down_bias.as_deref().unwrap_or_default());
        out
    }

    /// Outputs `[n, H]`, before the routing weight, of inputs `[n, H]`.
    pub fn forward(&self, inputs: &[f32], activation: Activation) -> Vec<f32> {
        if self.width == 0 {
            let rows = inputs.len() / self.hidden.max(1);
            return self.down_bias.clone().unwrap_or_else(|| vec![0.0; self.hidden]).repeat(rows);
        }
        self.outputs_of_units(&self.unit_activations(inputs, activation))
    }

    /// The buffer of a part, made if there is none.
    pub(crate) fn buffer(&mut self, part: ExpertPart) -> &mut Vec<f32> {
        match part {
            ExpertPart::Gate => &mut self.gate,
            ExpertPart::Up => &mut self.up,
            ExpertPart::Down => &mut self.down,
            ExpertPart::GateBias => self.gate_bias.get_or_insert_default(),
            ExpertPart::UpBias => self.up_bias.get_or_insert_default(),
            ExpertPart::DownBias => self.down_bias.get_or_insert_default(),
        }
    }
}

impl Activation {
    /// The values of units, in place of their gates. Computed in f64 inside, but for SiLU.
    pub fn apply(self, gate: &mut [f32], up: &[f32]) {
        fn each(gate: &mut [f32], up: &[f32], unit: impl Fn(f32, f32) -> f32 + Send + Sync) {
            gate.par_iter_mut().zip(up).with_min_len(1 << 12).for_each(|(gate, up)| *gate = unit(*gate, *up));
        }
        fn gated(gate: &mut [f32], up: &[f32], function: impl Fn(f64) -> f64 + Send + Sync) {
            each(gate, up, |gate, up| (function(f64::from(gate)) * f64::from(up)) as f32);
        }
        match self {
            // Everywhere but here exactness costs nothing.
            Self::Silu => each(gate, up, |gate, up| gate / (1.0 + (-gate).exp()) * up),
            Self::Gelu => gated(gate, up, |g| 0.5 * g * (1.0 + libm::erf(g * std::f64::consts::FRAC_1_SQRT_2))),
            Self::GeluTanh => gated(gate, up, |g| {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
                0.5 * g * (1.0 + inner.tanh())
            }),
            Self::Relu => each(gate, up, |gate, up| gate.max(0.0) * up),
            Self::BoundedSilu { limit } => each(gate, up, |gate, up| {
                let gate = f64::from(gate);
                ((gate / (1.0 + (-gate).exp())).min(limit) * f64::from(up).clamp(-limit, limit)) as f32
            }),
            Self::LimitedSilu { limit } => each(gate, up, |gate, up| {
                let gate = f64::from(gate).min(limit);
                (gate / (1.0 + (-gate).exp()) * f64::from(up).clamp(-limit, limit)) as f32
            }),
            Self::ClampedSwiglu { alpha, limit } => each(gate, up, |gate, up| {
                let gate = f64::from(gate).min(limit);
                (gate / (1.0 + (-alpha * gate).exp()) * (f64::from(up).clamp(-limit, limit) + 1.0)) as f32
            }),
        }
    }

    /// The value of one unit.
    pub fn unit(self, gate: f32, up: f32) -> f32 {
        let mut value = [gate];
        self.apply(&mut value, &[up]);
        value[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An expert of numbers without a pattern, with or without biases.
    fn expert(hidden: usize, width: usize, biased: bool) -> ExpertWeights {
        let numbers = |len: usize, salt: usize| -> Vec<f32> {
            (0..len).map(|i| ((i * 7919 + salt * 104_729) % 1009) as f32 / 504.5 - 1.0).collect()
        };
        let bias = |len, salt| biased.then(|| numbers(len, salt));
        ExpertWeights {
            gate: numbers(hidden * width, 1),
            up: numbers(hidden * width, 2),
            down: numbers(hidden * width, 3),
            gate_bias: bias(width, 4),
            up_bias: bias(width, 5),
            down_bias: bias(hidden, 6),
            width,
            hidden,
        }
    }

    fn inputs(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 6151) % 701) as f32 / 350.5 - 1.0).collect()
    }

    fn close(found: &[f32], expected: &[f32]) -> bool {
        found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5)
    }

    #[test]
    fn the_order_of_units_does_not_change_the_function() {
        for biased in [false, true] {
            let weights = expert(5, 7, biased);
            let moved = weights.select_units(&[4, 2, 0, 6, 1, 5, 3]).unwrap();
            let x = inputs(4 * 5);
            assert!(close(&moved.forward(&x, Activation::Silu), &weights.forward(&x, Activation::Silu)));
        }
    }

    #[test]
    fn the_outputs_of_units_add_up_to_that_of_the_expert() {
        let (weights, x) = (expert(4, 6, false), inputs(3 * 4));
        let mut sum = vec![0.0; x.len()];
        for unit in 0..6 {
            let part = weights.select_units(&[unit]).unwrap().forward(&x, Activation::Silu);
            sum.iter_mut().zip(part).for_each(|(sum, p)| *sum += p);
        }
        assert!(close(&sum, &weights.forward(&x, Activation::Silu)));
    }

    #[test]
    fn an_expert_without_units_gives_its_bias() {
        let empty = expert(4, 6, true).select_units(&[]).unwrap();
        let bias = empty.down_bias.clone().unwrap();
        assert_eq!(empty.forward(&inputs(8), Activation::Silu), [bias.clone(), bias].concat());
        let error = empty.select_units(&[0]).unwrap_err().to_string();
        assert_eq!(error, "unit 0 does not exist; expected an index below the width 0");
    }

    #[test]
    fn activations_are_those_of_their_definitions() {
        assert!((Activation::Silu.unit(1.0, 2.0) - 2.0 * 0.731_058_6).abs() < 1e-6);
        assert!((Activation::Gelu.unit(1.0, 2.0) - 2.0 * 0.841_344_7).abs() < 1e-6);
        assert!((Activation::GeluTanh.unit(1.0, 2.0) - 2.0 * 0.841_192).abs() < 1e-6);
        let bounded = Activation::BoundedSilu { limit: 0.7 };
        assert!((bounded.unit(1.0, -2.0) + 0.7 * 0.7).abs() < 1e-6);
        assert!((bounded.unit(-1.0, 0.5) + 0.5 * 0.268_941_4).abs() < 1e-6);
        let limited = Activation::LimitedSilu { limit: 0.7 };
        assert!((limited.unit(1.0, -2.0) + 0.7 * 0.7 * 0.668_187_8).abs() < 1e-6);
        assert!((limited.unit(-1.0, 0.5) + 0.5 * 0.268_941_4).abs() < 1e-6);
        let clamped = Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };
        assert!((clamped.unit(9.0, -9.0) - -6.0 * 7.0 / (1.0 + (-1.702f32 * 7.0).exp())).abs() < 1e-4);
    }
}

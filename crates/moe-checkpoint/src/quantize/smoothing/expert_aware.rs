//! One smoothing for all experts of a layer (EAQuant, arXiv 2506.13329).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{LayerSmoothing, inputs_refusal, units_refusal};
use crate::experts::ExpertPart;
use crate::family::{LayerRole, Role};
use crate::{Checkpoint, Error, Result, Statistics};

/// The least magnitude that counts.
const LEAST: f64 = 1e-5;

/// Largest magnitudes of the inputs of routed experts, from a run over calibration data.
#[derive(Clone, Debug)]
pub struct InputRanges {
    statistics: Arc<Statistics>,
}

impl InputRanges {
    /// The name of the largest magnitudes of what an expert reads, `[1, H]` for gate and up and `[1, I]` for down, in
    /// [`Statistics`].
    pub fn statistic(layer: usize, expert: usize, part: ExpertPart) -> String {
        let what = if part == ExpertPart::Down { "units" } else { "inputs" };
        format!("quantize.largest_{what}.{layer}.{expert}")
    }

    /// Those that a run collected.
    pub fn new(statistics: Statistics) -> Self {
        Self { statistics: Arc::new(statistics) }
    }

    fn of(&self, layer: usize, expert: usize, part: ExpertPart, n: usize) -> Result<&[f64]> {
        let id = Self::statistic(layer, expert, part);
        let (values, _) = self.statistics.matrix(&id)?;
        if values.len() != n {
            let reason =
                format!("`{id}` has {} channels, the weight {n}: the calibration is of another model", values.len());
            return Err(Error::Quantize { format: "expert-aware smoothing".into(), reason });
        }
        Ok(values)
    }
}

/// Expert-aware smoothing: `s_ej = max_t |x_tj|^a / max_r |W_rj|^(1 - a)` over the tokens of an expert and the rows of
/// its gate and up, and `s_j = max_e s_ej`, the router among the `e`, since all of them read one norm. For down,
/// channels of units that stand out are brought down to the largest of the others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpertAware {
    /// `a`, in [0, 1]: 0.6 in the released code.
    pub alpha: f64,
    /// Whether the router's own factors are part of the maximum, as in the paper; the released code leaves them out.
    pub router: bool,
    /// Exponent of how far a channel of units stands out: 0.7 in the released code; 0 leaves units alone.
    pub units: f64,
    /// Whether factors are rounded to powers of two, so that folding them in is exact in every dtype.
    pub powers_of_two: bool,
}

impl Default for ExpertAware {
    fn default() -> Self {
        Self { alpha: 0.6, router: true, units: 0.7, powers_of_two: true }
    }
}

/// Largest magnitudes of the columns of a matrix.
fn largest_columns(values: &[f32], cols: usize, into: &mut [f64]) {
    for row in values.chunks(cols.max(1)) {
        row.iter().zip(&mut *into).for_each(|(value, largest)| *largest = largest.max(f64::from(value.abs())));
    }
}

impl ExpertAware {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Quantize`] for ones outside [0, 1].
    pub fn check(&self) -> Result<()> {
        for (field, value) in [("alpha", self.alpha), ("units", self.units)] {
            if !(0.0..=1.0).contains(&value) {
                let reason = format!("`{field}` is {value}; expected a number in [0, 1]");
                return Err(Error::Quantize { format: "expert-aware smoothing".into(), reason });
            }
        }
        Ok(())
    }

    /// Factors of one expert's inputs, from the largest inputs and the largest weights of every channel.
    pub fn expert_factors(&self, inputs: &[f64], weights: &[f64]) -> Vec<f64> {
        let factor = |(x, w): (&f64, &f64)| x.max(LEAST).powf(self.alpha) / w.max(LEAST).powf(1.0 - self.alpha);
        inputs.iter().zip(weights).map(factor).collect()
    }

    /// The factors of all layers of `model`. Layers whose inputs or units take no factors get none. An expert that no
    /// token of the calibration was routed to has inputs of the least magnitude that counts, so that it decides
    /// nothing.
    ///
    /// # Errors
    /// [`Error::Quantize`] for parameters outside [0, 1] and for ranges of another model; those of reading weights.
    pub fn factors(&self, model: &Checkpoint, ranges: &InputRanges) -> Result<Vec<LayerSmoothing>> {
        self.check()?;
        model.shape().layers.iter().map(|layer| self.layer(model, ranges, layer.layer)).collect()
    }

    fn layer(&self, model: &Checkpoint, ranges: &InputRanges, layer: usize) -> Result<LayerSmoothing> {
        let hidden = model.config().expert_hidden_size();
        let widths = model.shape().layer(layer).map_or(&[][..], |layer| &layer.widths);
        let mut found = LayerSmoothing { layer, ..LayerSmoothing::default() };
        if inputs_refusal(model, layer).is_none() {
            let mut all = vec![0f64; hidden];
            let mut most = vec![0f64; hidden];
            for (expert, width) in widths.iter().enumerate() {
                let inputs = ranges.of(layer, expert, ExpertPart::Gate, hidden)?;
                all.iter_mut().zip(inputs).for_each(|(all, own)| *all = all.max(*own));
                let mut weights = vec![0f64; hidden];
                for part in [ExpertPart::Gate, ExpertPart::Up] {
                    if let Some(raw) = model.set_part(layer, expert, part)? {
                        largest_columns(&raw.to_f32(), hidden, &mut weights);
                    }
                }
                model.release_set(layer, expert);
                if *width > 0 && inputs.iter().any(|input| *input > 0.0) {
                    let own = self.expert_factors(inputs, &weights);
                    most.iter_mut().zip(own).for_each(|(most, own)| *most = most.max(own));
                }
            }
            if self.router && !model.config().routing.own_norm {
                let mut weights = vec![0f64; hidden];
                largest_columns(&model.read_f32(Role::Layer(layer, LayerRole::Router))?, hidden, &mut weights);
                let own = self.expert_factors(&all, &weights);
                most.iter_mut().zip(own).for_each(|(most, own)| *most = most.max(own));
            }
            found.inputs = most.into_iter().map(|factor| factor.max(LEAST) as f32).collect();
        }
        if self.units > 0.0 && units_refusal(model, layer).is_none() {
            let units = widths.iter().enumerate().map(|(expert, width)| {
                let largest = ranges.of(layer, expert, ExpertPart::Down, *width)?;
                Ok(outlier_factors(largest, self.units))
            });
            found.units = units.collect::<Result<_>>()?;
        }
        Ok(if self.powers_of_two { found.powers_of_two() } else { found })
    }
}

/// Factors of channels that stand out: `(largest / largest of the others)^exponent`, 1 elsewhere. A channel stands out
/// where it is above the upper quantile (0.65) by one and a half times the distance to the lower one (0.35), and in the
/// upper of the two classes that Otsu's threshold makes.
fn outlier_factors(largest: &[f64], exponent: f64) -> Vec<f32> {
    let mut sorted: Vec<f64> = largest.to_vec();
    sorted.sort_by(f64::total_cmp);
    let none = vec![1.0; largest.len()];
    let Some(top) = sorted.last().filter(|top| **top > 0.0) else { return none };
    let quantile = |q: f64| sorted[((sorted.len() - 1) as f64 * q).round() as usize];
    let (low, high) = (quantile(0.35), quantile(0.65));
    let bound = (high + 1.5 * (high - low)).max(otsu(&sorted));
    let normal = sorted.iter().rev().find(|value| **value <= bound).copied().filter(|normal| *normal > 0.0);
    let Some(normal) = normal.filter(|normal| normal < top) else { return none };
    let factor = |value: &f64| if *value > bound { (value / normal).powf(exponent) as f32 } else { 1.0 };
    largest.iter().map(factor).collect()
}

/// The last value of the lower of the two classes of ascending values whose means are farthest apart, weighted by their
/// sizes.
fn otsu(sorted: &[f64]) -> f64 {
    let (count, total) = (sorted.len() as f64, sorted.iter().sum::<f64>());
    let mut best = (0.0, sorted.last().copied().unwrap_or(0.0));
    let mut below = 0.0;
    for (index, value) in sorted.iter().enumerate().take(sorted.len().saturating_sub(1)) {
        below += value;
        let size = (index + 1) as f64;
        let apart = below / size - (total - below) / (count - size);
        let between = size * (count - size) * apart * apart;
        if between > best.0 {
            best = (between, *value);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_that_stand_out_come_down_to_the_others() {
        let mut largest: Vec<f64> = (0..40).map(|at| 1.0 + 0.01 * f64::from(at)).collect();
        largest[7] = 50.0;
        let factors = outlier_factors(&largest, 0.7);
        assert!((f64::from(factors[7]) - (50.0f64 / 1.39).powf(0.7)).abs() < 1e-3, "{}", factors[7]);
        assert_eq!(factors.iter().filter(|factor| **factor != 1.0).count(), 1);
        assert_eq!(outlier_factors(&[1.0; 8], 0.7), [1.0; 8]);
        assert_eq!(outlier_factors(&[0.0; 8], 0.7), [1.0; 8]);
    }
}

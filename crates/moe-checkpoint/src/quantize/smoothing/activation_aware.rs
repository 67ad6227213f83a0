//! Factors that are searched for the least damage of rounding (AWQ, arXiv 2306.00978).

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{LayerSmoothing, inputs_refusal, units_refusal};
use crate::experts::ExpertPart;
use crate::formats::scheme::Scheme;
use crate::quantize::{InputMoments, WeightFormat};
use crate::{Checkpoint, Error, Result};

/// Most rows of a matrix whose damage is measured.
const ROWS: usize = 64;

/// Factors by the magnitudes of activations: `s = m^a` with `m` the root mean square of a channel over the tokens of
/// the calibration, and the exponent `a` that leaves the least of `tr((W - W') X^T X (W - W')^T)`, with `W'` the weight
/// rounded with the factors and divided by them. All experts of a layer read one norm, and have one `a` for gate and
/// up; every expert has its own for down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ActivationAware {
    /// Exponents that are tried, from 0 (no factors) up to below 1 in equal steps.
    pub grid: usize,
    /// Whether factors are rounded to powers of two, so that folding them in is exact in every dtype.
    pub powers_of_two: bool,
}

impl Default for ActivationAware {
    fn default() -> Self {
        Self { grid: 20, powers_of_two: true }
    }
}

/// What a search found for a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SmoothedLayer {
    /// The factors.
    pub factors: LayerSmoothing,
    /// The exponent for the inputs; 0 for no factors.
    pub exponent: f64,
    /// What rounding changes of the outputs of gate, up and down, squared and summed over the tokens of the calibration
    /// and the rows that were tried: without factors.
    pub damage_before: f64,
    /// The same with them.
    pub damage_after: f64,
}

impl ActivationAware {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Quantize`] for a grid of 0.
    pub fn check(&self) -> Result<()> {
        if self.grid == 0 {
            let reason = "a grid of 0 exponents; expected at least 1".to_string();
            return Err(Error::Quantize { format: "activation-aware scaling".into(), reason });
        }
        Ok(())
    }

    /// The factors of all layers of `model` for weights in `format`. Layers whose inputs or units take no factors get
    /// none, and so do units of experts that no token of the calibration was routed to.
    ///
    /// # Errors
    /// [`Error::Quantize`] for a grid of 0, and for moments of another model; those of reading weights.
    pub fn search(
        &self,
        model: &Checkpoint,
        format: &WeightFormat,
        moments: &InputMoments,
    ) -> Result<Vec<SmoothedLayer>> {
        self.check()?;
        let scheme = format.scheme();
        model.shape().layers.iter().map(|layer| self.layer(model, &scheme, moments, layer.layer)).collect()
    }

    fn layer(
        &self,
        model: &Checkpoint,
        scheme: &Scheme,
        moments: &InputMoments,
        layer: usize,
    ) -> Result<SmoothedLayer> {
        let hidden = model.config().expert_hidden_size();
        let widths = model.shape().layer(layer).map_or(&[][..], |layer| &layer.widths);
        let mut gate_up: Vec<Tried<'_>> = Vec::new();
        let mut down: Vec<Option<Tried<'_>>> = Vec::new();
        for (expert, width) in widths.iter().enumerate() {
            let read = |part, dims: (usize, usize), gram| -> Result<Option<Tried<'_>>> {
                let Some(raw) = model.set_part(layer, expert, part)? else { return Ok(None) };
                Ok(Some(Tried::new(scheme, &raw.to_f32(), dims, gram)))
            };
            if let Some(gram) = moments.of(layer, expert, ExpertPart::Gate, hidden)? {
                for part in [ExpertPart::Gate, ExpertPart::Up] {
                    gate_up.extend(read(part, (*width, hidden), gram)?);
                }
            }
            down.push(match moments.of(layer, expert, ExpertPart::Down, *width)? {
                Some(gram) => read(ExpertPart::Down, (hidden, *width), gram)?,
                None => None,
            });
            model.release_set(layer, expert);
        }
        let mut found = SmoothedLayer {
            factors: LayerSmoothing { layer, ..LayerSmoothing::default() },
            exponent: 0.0,
            damage_before: 0.0,
            damage_after: 0.0,
        };
        if inputs_refusal(model, layer).is_none() && !gate_up.is_empty() {
            let magnitudes = magnitudes(gate_up.iter().map(|tried| tried.gram), hidden);
            let best =
                self.best(&magnitudes, |factors| gate_up.iter().map(|tried| tried.damage(scheme, factors)).sum());
            (found.factors.inputs, found.exponent) = (best.factors, best.exponent);
            found.damage_before += best.before;
            found.damage_after += best.after;
        }
        if units_refusal(model, layer).is_none() {
            let mut units = Vec::new();
            for tried in &down {
                let Some(tried) = tried else {
                    units.push(Vec::new());
                    continue;
                };
                let magnitudes = magnitudes([tried.gram].into_iter(), tried.cols);
                let best = self.best(&magnitudes, |factors| tried.damage(scheme, factors));
                found.damage_before += best.before;
                found.damage_after += best.after;
                units.push(best.factors);
            }
            found.factors.units = units;
        }
        Ok(found)
    }

    fn best(&self, magnitudes: &[f64], damage: impl Fn(&[f32]) -> f64) -> Best {
        let ones = vec![1.0; magnitudes.len()];
        let before = damage(&ones);
        let mut best = Best { factors: ones, exponent: 0.0, before, after: before };
        for step in 1..self.grid {
            let exponent = step as f64 / self.grid as f64;
            let factors = self.factors(magnitudes, exponent);
            let after = damage(&factors);
            if after < best.after {
                best = Best { factors, exponent, before, after };
            }
        }
        best
    }

    /// `m^a`, around 1.
    fn factors(&self, magnitudes: &[f64], exponent: f64) -> Vec<f32> {
        let raised: Vec<f64> = magnitudes.iter().map(|magnitude| magnitude.max(1e-8).powf(exponent)).collect();
        let (low, high) = raised.iter().fold((f64::MAX, 0f64), |(low, high), s| (low.min(*s), high.max(*s)));
        let middle = (low * high).sqrt();
        let factors = raised.iter().map(|s| (s / middle).clamp(1e-4, 1e4) as f32);
        let layer = LayerSmoothing { inputs: factors.collect(), ..LayerSmoothing::default() };
        if self.powers_of_two { layer.powers_of_two().inputs } else { layer.inputs }
    }
}

struct Best {
    factors: Vec<f32>,
    exponent: f64,
    before: f64,
    after: f64,
}

/// Root sums of squares of channels, of which channels that are always zero get the mean.
fn magnitudes<'a>(grams: impl Iterator<Item = &'a [f64]>, n: usize) -> Vec<f64> {
    let mut squares = vec![0f64; n];
    for gram in grams {
        squares.iter_mut().enumerate().for_each(|(at, sum)| *sum += gram[at * n + at]);
    }
    let mean = squares.iter().sum::<f64>() / n.max(1) as f64;
    squares.iter().map(|sum| if *sum > 0.0 { sum.sqrt() } else { mean.sqrt() }).collect()
}

/// Rows of a matrix, and the second moments of its inputs.
struct Tried<'a> {
    values: Vec<f32>,
    cols: usize,
    gram: &'a [f64],
}

impl<'a> Tried<'a> {
    fn new(scheme: &Scheme, values: &[f32], (rows, cols): (usize, usize), gram: &'a [f64]) -> Self {
        // Rows that share scales stay together.
        let height = scheme.sides((rows, cols)).0;
        let bands = rows / height;
        let step = bands.div_ceil((ROWS / height).max(1)).max(1);
        let band = |band: usize| values[band * height * cols..(band + 1) * height * cols].iter().copied();
        Self { values: (0..bands).step_by(step).flat_map(band).collect(), cols, gram }
    }

    /// `tr((W - W') X^T X (W - W')^T)`.
    fn damage(&self, scheme: &Scheme, factors: &[f32]) -> f64 {
        let cols = self.cols;
        let mut scaled = self.values.clone();
        super::columns(&mut scaled, factors);
        let rounded = scheme.decode(&scheme.encode(&scaled, (self.values.len() / cols.max(1), cols)));
        let rows = self.values.par_chunks(cols.max(1)).zip(rounded.par_chunks(cols.max(1)));
        rows.map(|(values, rounded)| {
            let apart = values.iter().zip(rounded).zip(factors);
            let apart: Vec<f64> = apart.map(|((a, b), factor)| f64::from(a - b / factor)).collect();
            let through = |row: usize| {
                self.gram[row * cols..(row + 1) * cols].iter().zip(&apart).map(|(g, e)| g * e).sum::<f64>()
            };
            apart.iter().enumerate().map(|(row, e)| e * through(row)).sum::<f64>()
        })
        .collect::<Vec<f64>>()
        .into_iter()
        .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::scheme::Element;

    #[test]
    fn a_channel_of_large_inputs_gets_a_factor_that_halves_the_damage() {
        let (rows, n) = (16, 64);
        let mut state = 5u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        // Two channels whose weights are far from the largest of their groups are forty times as large as the others.
        let values: Vec<f32> = (0..rows * n).map(|at| if at % n < 2 { 0.2 * next() } else { next() }).collect();
        let gram: Vec<f64> = (0..n * n)
            .map(|at| match at % n == at / n {
                true => {
                    if at % n < 2 {
                        1600.0
                    } else {
                        1.0
                    }
                }
                false => 0.0,
            })
            .collect();
        let scheme = Scheme {
            element: Element::Integer(4),
            group: (1, 32),
            scale: crate::Dtype::BF16,
            zeros: false,
            global: None,
        };
        let tried = Tried::new(&scheme, &values, (rows, n), &gram);
        let magnitudes = magnitudes([&gram[..]].into_iter(), n);
        for powers_of_two in [true, false] {
            let search = ActivationAware { powers_of_two, ..ActivationAware::default() };
            let best = search.best(&magnitudes, |factors| tried.damage(&scheme, factors));
            assert!(best.after < 0.5 * best.before && best.exponent > 0.0, "{} of {}", best.after, best.before);
            assert!(best.factors[0] > best.factors[9]);
        }
        // Channels that are all alike leave nothing to gain.
        let best = ActivationAware::default().best(&vec![1.0; n], |factors| tried.damage(&scheme, factors));
        assert_eq!((best.exponent, best.after), (0.0, best.before));
    }
}

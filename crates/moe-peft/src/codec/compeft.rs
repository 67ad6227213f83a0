//! ComPEFT: sparse ternary task vectors.

use std::path::Path;

use moe_checkpoint::{Dtype, decode_f32, encode};
use serde::{Deserialize, Serialize};

use super::file::{DeltaCoding, DeltaTensor, DeltaWriter, base_of, io};
use super::golomb::{BitWriter, expected_bits, rice_parameter};
use super::report::DeltaReport;
use super::source::{Opened, TaskVector, elements};
use crate::{Error, Result};

/// Keeps the largest elements of a task vector, by magnitude over all its tensors together, and codes them in a few
/// bits each.
///
/// Source: ComPEFT (arXiv 2311.13171). Exactly `floor(density * elements)` elements are kept, the earlier of equal ones
/// first (tensors in the order of their names); the authors' code keeps one more, and all ties. Elements that are 0
/// need no place.
///
/// Two passes over the tensors find sigma and the threshold, a third one writes; memory is that of one piece of a
/// tensor.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ComPeft {
    /// Share of the elements that are kept, in [0, 1].
    pub density: f64,
    /// What becomes of them.
    pub values: KeptValues,
}

/// What kept elements become.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeptValues {
    /// `alpha sigma` with the element's sign; sigma is the unbiased standard deviation of the whole task vector about
    /// its mean.
    Scaled {
        /// Factor, above 0; tuned on validation data, about 0.5 to 10.
        alpha: f64,
    },
    /// The mean of the kept elements, signs included, with the element's sign: the `replace_factor` of -2 in the
    /// authors' code.
    SignedMean,
    /// The mean magnitude of the kept elements with the element's sign: sparse ternary compression (arXiv 1903.02891).
    MeanMagnitude,
    /// As they are, in this dtype: pruning alone, a `replace_factor` of -1.
    Unchanged {
        /// F32, F16 or BF16.
        dtype: Dtype,
    },
}

impl Default for ComPeft {
    fn default() -> Self {
        Self { density: 0.1, values: KeptValues::Scaled { alpha: 1.0 } }
    }
}

/// What the first passes over a task vector find.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Selection {
    elements: u64,
    sigma: f64,
    /// Elements with this magnitude, as bits, are kept as long as `ties` lasts, larger ones always.
    threshold: u32,
    ties: u64,
    kept: u64,
    /// Sum of the kept elements and of their magnitudes.
    sum: f64,
    magnitudes: f64,
}

impl ComPeft {
    /// # Errors
    /// [`Error::Input`] names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.density) {
            return Err(Error::input("density", self.density, "a number in [0, 1]"));
        }
        match self.values {
            KeptValues::Scaled { alpha } if !(alpha > 0.0 && alpha.is_finite()) => {
                Err(Error::input("alpha", alpha, "a finite number above 0"))
            }
            KeptValues::Unchanged { dtype } if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                Err(Error::input("dtype of kept values", dtype, "F32, F16 or BF16"))
            }
            _ => Ok(()),
        }
    }

    /// Writes the delta file, which appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::Input`] for options out of range, tensors that differ in name or shape from those of the base, and
    /// elements that are not finite; [`Error::Unsupported`] for quantized weights; what reading and writing fails with.
    pub fn encode(&self, from: TaskVector<'_>, to: &Path) -> Result<DeltaReport> {
        self.validate()?;
        let source = from.open()?;
        let selection = select(&source, self.density)?;
        let q = selection.kept as f64 / selection.elements.max(1) as f64;
        let rice = rice_parameter(q);
        let (coding, bits, scale) = match self.values {
            KeptValues::Unchanged { dtype } => {
                (DeltaCoding::Sparse { kept: selection.kept, rice, dtype }, dtype.bitsize() as u32, None)
            }
            values => {
                let scale = selection.scale(values)?;
                (DeltaCoding::Ternary { kept: selection.kept, rice, scale: scale.to_bits() }, 1, Some(scale))
            }
        };
        let mut writer = DeltaWriter::create(to)?;
        let mut out = BitWriter::new(&mut writer.payload);
        let (mut ties, mut gap) = (selection.ties, 0);
        let mut value = Vec::new();
        source.stream(|_, tau| {
            for tau in tau {
                if !selection.keeps(*tau, &mut ties) {
                    gap += 1;
                    continue;
                }
                out.gap(gap, rice).map_err(io(to))?;
                gap = 0;
                let code = match self.values {
                    KeptValues::Unchanged { dtype } => {
                        value.clear();
                        encode(dtype, &[*tau], &mut value);
                        value.iter().rev().fold(0, |code, byte| (code << 8) | u32::from(*byte))
                    }
                    _ => u32::from(tau.is_sign_negative()),
                };
                out.bits(code, bits).map_err(io(to))?;
            }
            Ok(())
        })?;
        out.finish().map_err(io(to))?;
        let tensors: Vec<DeltaTensor> = source.tensors().iter().map(DeltaTensor::from_spec).collect();
        let (table, file_bytes) = writer.finish(base_of(&source), coding, tensors)?;
        let per_kept = if selection.kept == 0 { 0.0 } else { expected_bits(q, rice) + f64::from(bits) };
        Ok(DeltaReport {
            tensors: table.tensors.len(),
            elements: selection.elements,
            kept: selection.kept,
            sigma: Some(selection.sigma),
            scale,
            payload_bytes: table.payload_bytes,
            file_bytes,
            expected_bytes: Some((selection.kept as f64 * per_kept / 8.0).ceil() as u64),
            dense_bytes: 2 * selection.elements,
        })
    }
}

impl DeltaTensor {
    pub(super) fn from_spec(spec: &moe_checkpoint::TensorSpec) -> Self {
        Self { name: spec.name.clone(), dtype: spec.dtype, shape: spec.shape.clone() }
    }
}

impl Selection {
    fn keeps(&self, tau: f32, ties: &mut u64) -> bool {
        let magnitude = magnitude(tau);
        if magnitude == 0 || magnitude < self.threshold || (magnitude == self.threshold && *ties == 0) {
            return false;
        }
        *ties -= u64::from(magnitude == self.threshold);
        true
    }

    /// The constant, rounded to f16 where that has all its digits, and to f32 where it is too small or too large for
    /// it.
    fn scale(&self, values: KeptValues) -> Result<f32> {
        let kept = self.kept.max(1) as f64;
        let scale = match values {
            KeptValues::Scaled { alpha } => alpha * self.sigma,
            KeptValues::SignedMean => self.sum / kept,
            _ => self.magnitudes / kept,
        };
        if !(scale as f32).is_finite() {
            return Err(Error::input("scale of the task vector", scale, "a finite f32"));
        }
        /// Smallest and largest normal f16.
        const NORMAL: std::ops::RangeInclusive<f64> = 6.103_515_625e-5..=65504.0;
        let (mut bytes, mut half) = (Vec::new(), Vec::new());
        encode(Dtype::F16, &[scale as f32], &mut bytes);
        decode_f32(Dtype::F16, &bytes, &mut half);
        Ok(if NORMAL.contains(&scale.abs()) { half[0] } else { scale as f32 })
    }
}

/// Bits of the magnitude, which are ordered as magnitudes are.
fn magnitude(value: f32) -> u32 {
    value.to_bits() & 0x7FFF_FFFF
}

/// Sigma, and the exact threshold by counting: first the upper halves of all magnitudes, then the lower halves of those
/// in the bucket of the threshold.
fn select(source: &Opened<'_>, density: f64) -> Result<Selection> {
    let total: u64 = source.tensors().iter().map(elements).sum();
    let mut spread = Spread::default();
    let mut upper = vec![0u64; 1 << 15];
    source.stream(|_, tau| {
        spread.add(tau);
        tau.iter().for_each(|tau| upper[(magnitude(*tau) >> 16) as usize] += 1);
        Ok(())
    })?;
    // A product like 0.29 * 100 must not lose one to rounding.
    let wanted = ((density * total as f64 * (1.0 + 4.0 * f64::EPSILON)).floor() as u64).min(total);
    let mut selection =
        Selection { elements: total, sigma: spread.sigma(), threshold: u32::MAX, ..Selection::default() };
    if wanted == 0 {
        return Ok(selection);
    }
    let (bucket, above) = find(&upper, wanted);
    let mut lower = vec![0u64; 1 << 16];
    source.stream(|_, tau| {
        let bits = tau.iter().map(|tau| magnitude(*tau)).filter(|bits| bits >> 16 == bucket);
        bits.for_each(|bits| lower[(bits & 0xFFFF) as usize] += 1);
        Ok(())
    })?;
    let (low, above_too) = find(&lower, wanted - above);
    selection.threshold = (bucket << 16) | low;
    selection.ties = wanted - above - above_too;
    if selection.threshold == 0 {
        // All that is not 0 is kept.
        selection.ties = 0;
    }
    let mut ties = selection.ties;
    let mut counted = selection;
    // Zeros are among the kept ones only if the threshold is 0.
    counted.kept = if selection.threshold == 0 { above + above_too } else { wanted };
    if counted.kept > 0 {
        source.stream(|_, tau| {
            for tau in tau.iter().filter(|tau| selection.keeps(**tau, &mut ties)) {
                counted.sum += f64::from(*tau);
                counted.magnitudes += f64::from(tau.abs());
            }
            Ok(())
        })?;
    }
    Ok(counted)
}

/// The bucket that the `wanted` largest end in, counted from the top, and how many are above it.
fn find(counts: &[u64], wanted: u64) -> (u32, u64) {
    let mut above = 0;
    for (bucket, count) in counts.iter().enumerate().rev() {
        if above + count >= wanted {
            return (bucket as u32, above);
        }
        above += count;
    }
    (0, above)
}

/// Mean and sum of squared distances from it, of pieces brought together (Chan et al.).
#[derive(Default)]
struct Spread {
    count: f64,
    mean: f64,
    squares: f64,
}

impl Spread {
    fn add(&mut self, values: &[f32]) {
        let count = values.len() as f64;
        if count == 0.0 {
            return;
        }
        let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum();
        let (total, difference) = (self.count + count, mean - self.mean);
        self.squares += squares + difference * difference * self.count * count / total;
        self.mean += difference * count / total;
        self.count = total;
    }

    fn sigma(&self) -> f64 {
        if self.count < 2.0 { 0.0 } else { (self.squares / (self.count - 1.0)).sqrt() }
    }
}

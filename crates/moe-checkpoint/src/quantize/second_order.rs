//! Rounding that makes up for its own errors (GPTQ, arXiv 2210.17323): columns are rounded one after the other, and
//! what rounding a column changes of the output is taken back by the columns that follow, as far as the second moments
//! of the inputs allow.

use std::collections::BTreeMap;
use std::sync::Arc;

use faer::linalg::solvers::DenseSolveCore;
use faer::{Mat, Side};
use rayon::prelude::*;

use crate::experts::ExpertPart;
use crate::formats::scheme::{Parted, Scheme};
use crate::{Checkpoint, Error, Fold, Result, Statistics};

/// Added to the diagonal of the second moments, in its mean: as the authors have it.
const DAMPING: f64 = 0.01;
/// About as many columns as have their changes gathered before later columns see them.
const BLOCK: usize = 128;

/// Second moments `X^T X` of the inputs of routed experts, from a run over calibration data.
#[derive(Clone, Debug)]
pub struct InputMoments {
    statistics: Arc<Statistics>,
}

impl InputMoments {
    /// The name of the second moments of the inputs of a part of an expert in [`Statistics`]: `[H, H]` for gate and up,
    /// `[I, I]` for down.
    pub fn statistic(layer: usize, expert: usize, part: ExpertPart) -> String {
        let what = if part == ExpertPart::Down { "units" } else { "inputs" };
        format!("quantize.{what}.{layer}.{expert}")
    }

    /// Those that a run collected.
    pub fn new(statistics: Statistics) -> Self {
        Self { statistics: Arc::new(statistics) }
    }

    /// A hash of all of them.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for id in self.statistics.ids().filter(|id| id.starts_with("quantize.")) {
            hasher.update(id.as_bytes());
            let values = self.statistics.matrix(id).map(|(values, _)| values).unwrap_or_default();
            for value in values {
                hasher.update(&value.to_le_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The same with experts that no token was routed to given the inputs of all others, as far as they read the same:
    /// gate and up. What their units would be nobody has seen.
    ///
    /// # Errors
    /// Those of [`Statistics::matrix`] for statistics of another model.
    pub fn with_unseen_experts(self, model: &Checkpoint) -> Result<Self> {
        let mut statistics = Statistics::clone(&self.statistics);
        for layer in &model.shape().layers {
            let ids: Vec<String> =
                (0..layer.num_experts()).map(|expert| Self::statistic(layer.layer, expert, ExpertPart::Gate)).collect();
            let mut all: Vec<f64> = Vec::new();
            let mut unseen = Vec::new();
            for id in &ids {
                let (sum, columns) = statistics.matrix(id)?;
                if (0..columns).all(|at| sum[at * columns + at] == 0.0) {
                    unseen.push((id, columns));
                }
                all.resize(sum.len(), 0.0);
                all.iter_mut().zip(sum).for_each(|(all, sum)| *all += sum);
            }
            for (id, columns) in unseen {
                let rows = all.len() / columns.max(1);
                statistics.matrix_mut(id, [rows, columns], Fold::Sum)?.copy_from_slice(&all);
            }
        }
        Ok(Self::new(statistics))
    }

    /// The second moments of the inputs of a part of an expert, `[n, n]`; `None` for an expert that no token was routed
    /// to.
    ///
    /// # Errors
    /// [`Error::Quantize`] for statistics of another model.
    pub(super) fn of(&self, layer: usize, expert: usize, part: ExpertPart, n: usize) -> Result<Option<&[f64]>> {
        let id = Self::statistic(layer, expert, part);
        let (sum, columns) = self.statistics.matrix(&id)?;
        if columns != n || sum.len() != n * n {
            let reason =
                format!("`{id}` is of {columns} columns, the weight has {n}: the calibration is of another model");
            return Err(Error::Quantize { format: "second-order rounding".into(), reason });
        }
        Ok((0..n).any(|at| sum[at * n + at] > 0.0).then_some(sum))
    }
}

/// The upper triangle `U` with `U^T U = (X^T X)^-1`, damped until it exists, row-major. Columns that no input reaches
/// are rounded by themselves.
fn triangle(moments: &[f64], n: usize) -> Option<Vec<f64>> {
    let mean = (0..n).map(|at| moments[at * n + at]).sum::<f64>() / n as f64;
    let mut damping = DAMPING * mean;
    for _ in 0..10 {
        let element = |row: usize, col: usize| {
            let value = moments[row * n + col];
            match row == col {
                false => value,
                true if value <= 0.0 => mean,
                true => value + damping,
            }
        };
        let damped = Mat::from_fn(n, n, element);
        if let Ok(factor) = damped.llt(Side::Lower) {
            let inverse = factor.inverse();
            if let Ok(factor) = inverse.llt(Side::Lower) {
                let lower = factor.L();
                let upper: Vec<f64> =
                    (0..n * n).map(|at| if at % n >= at / n { lower[(at % n, at / n)] } else { 0.0 }).collect();
                if upper.iter().all(|value| value.is_finite()) {
                    return Some(upper);
                }
            }
        }
        damping *= 10.0;
    }
    None
}

impl Scheme {
    /// The matrix rounded with these second moments of its inputs, `[cols, cols]`; to nearest where they cannot be
    /// inverted.
    pub(super) fn encode_second_order(&self, values: &[f32], dims: (usize, usize), moments: &[f64]) -> Parted {
        let (rows, cols) = dims;
        let Some(upper) = triangle(moments, cols) else { return self.encode(values, dims) };
        let ((height, width), (_, across)) = (self.sides(dims), self.groups(dims));
        let mut out = self.encode(values, dims);
        let global = out.global;
        // No group lies across blocks, but that of a whole row, which begins before any error.
        let step = if width < BLOCK {
            width * (BLOCK / width)
        } else if width < cols {
            width
        } else {
            BLOCK
        };
        let bands = out.codes.par_chunks_mut(height * cols).zip(out.scales.par_chunks_mut(across)).enumerate();
        let zeros: BTreeMap<usize, Vec<u8>> = bands
            .map(|(band, (codes, scales))| {
                let first = band * height;
                let count = height.min(rows - first);
                let mut work: Vec<f64> =
                    values[first * cols..(first + count) * cols].iter().map(|value| f64::from(*value)).collect();
                let mut zeros = Vec::new();
                for block in (0..cols).step_by(step) {
                    let block_end = cols.min(block + step);
                    let mut errors = vec![0f64; count * (block_end - block)];
                    for col in block..block_end {
                        if col % width == 0 {
                            let end = cols.min(col + width);
                            let group: Vec<f32> = work
                                .chunks_exact(cols)
                                .flat_map(|row| row[col..end].iter().map(|value| *value as f32))
                                .collect();
                            let (scale, zero) = self.parameters(&group, global);
                            scales[col / width] = scale;
                            zeros.push(zero);
                        }
                        let (scale, zero) = (scales[col / width], zeros[col / width]);
                        let zero = self.zeros.then_some(zero);
                        let pivot = upper[col * cols + col];
                        for (row, line) in work.chunks_exact_mut(cols).enumerate() {
                            let code = self.code(line[col] as f32, scale, zero, global);
                            codes[row * cols + col] = code;
                            let error = (line[col] - f64::from(self.value(code, scale, zero, global))) / pivot;
                            errors[row * (block_end - block) + col - block] = error;
                            let factors = &upper[col * cols + col + 1..col * cols + block_end];
                            line[col + 1..block_end].iter_mut().zip(factors).for_each(|(value, u)| *value -= error * u);
                        }
                    }
                    spread(&mut work, &errors, &upper, cols, block..block_end);
                }
                (band, zeros)
            })
            .collect();
        if self.zeros {
            for (band, zeros) in zeros {
                out.zeros[band * across..band * across + zeros.len()].copy_from_slice(&zeros);
            }
        }
        out
    }
}

/// Takes what the errors of a block of columns change back in the columns after it.
fn spread(work: &mut [f64], errors: &[f64], upper: &[f64], cols: usize, block: std::ops::Range<usize>) {
    for (line, errors) in work.chunks_exact_mut(cols).zip(errors.chunks_exact(block.len().max(1))) {
        for (col, error) in block.clone().zip(errors) {
            let factors = &upper[col * cols + block.end..(col + 1) * cols];
            line[block.end..].iter_mut().zip(factors).for_each(|(value, u)| *value -= error * u);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::scheme::Element;

    /// Correlated inputs, of which some columns are always zero.
    fn inputs(tokens: usize, n: usize) -> Vec<f64> {
        let mut state = 3u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
        };
        let mut out = vec![0.0; tokens * n];
        for row in out.chunks_exact_mut(n) {
            let shared = next();
            row.iter_mut().for_each(|value| *value = shared + 0.3 * next());
            row[5] = 0.0;
        }
        out
    }

    fn moments(inputs: &[f64], n: usize) -> Vec<f64> {
        let mut sum = vec![0.0; n * n];
        for row in inputs.chunks_exact(n) {
            for (at, sum) in sum.iter_mut().enumerate() {
                *sum += row[at / n] * row[at % n];
            }
        }
        sum
    }

    /// `|X (W - W')^T|^2`.
    fn damage(inputs: &[f64], n: usize, values: &[f32], rounded: &[f32]) -> f64 {
        let apart: Vec<f64> = values.iter().zip(rounded).map(|(a, b)| f64::from(a - b)).collect();
        let rows = apart.chunks_exact(n);
        let outputs = rows
            .flat_map(|row| inputs.chunks_exact(n).map(move |x| x.iter().zip(row).map(|(x, w)| x * w).sum::<f64>()));
        outputs.map(|output| output * output).sum()
    }

    #[test]
    fn outputs_change_less_than_by_rounding_to_nearest() {
        let (rows, n) = (8, 160);
        let values: Vec<f32> = inputs(rows, n).iter().map(|value| *value as f32).collect();
        let x = inputs(400, n);
        let sums = moments(&x, n);
        let int = |group, zeros| Scheme {
            element: Element::Integer(4),
            group,
            scale: crate::Dtype::BF16,
            zeros,
            global: None,
        };
        let e2m1 =
            Scheme { element: Element::E2m1, group: (1, 32), scale: crate::Dtype::U8, zeros: false, global: None };
        let fp8 =
            Scheme { element: Element::E4m3, group: (4, 80), scale: crate::Dtype::F32, zeros: false, global: None };
        for scheme in [int((1, 32), false), int((1, usize::MAX), false), int((1, 32), true), e2m1, fp8] {
            let nearest = scheme.decode(&scheme.encode(&values, (rows, n)));
            let second = scheme.decode(&scheme.encode_second_order(&values, (rows, n), &sums));
            let [nearest, second] = [nearest, second].map(|rounded| damage(&x, n, &values, &rounded));
            assert!(second < 0.5 * nearest, "{scheme:?}: {second} against {nearest}");
        }
    }

    #[test]
    fn inputs_without_correlation_are_rounded_to_nearest() {
        let (rows, n) = (4, 64);
        let values: Vec<f32> = inputs(rows, n).iter().map(|value| *value as f32).collect();
        let identity: Vec<f64> = (0..n * n).map(|at| if at % n == at / n { 2.0 } else { 0.0 }).collect();
        let scheme = Scheme {
            element: Element::Integer(4),
            group: (1, 32),
            scale: crate::Dtype::BF16,
            zeros: false,
            global: None,
        };
        assert_eq!(scheme.encode_second_order(&values, (rows, n), &identity), scheme.encode(&values, (rows, n)));
    }
}

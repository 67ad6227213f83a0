//! Zeros in the weights of experts, by the size of weights and of what they are multiplied with.

use std::collections::BTreeMap;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, ExpertPart, Extent, Statistics, Step};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::in_place::{self, PartChange};
use crate::{Error, Result};

/// Name of the statistic of the inputs of experts: `sum_t g_t^2 x_t[h]^2` over the tokens routed to an expert, a vector
/// `[H]` each, with the routing weight g as the model applies it.
pub const INPUT_SQUARES: &str = "input.square_weighted";
/// The same of the inputs of the down projection: `sum_t g_t^2 u_t[j]^2`, a value per unit.
pub const UNIT_SQUARES: &str = "unit.square_weighted";
/// Name of the method in the record of a model.
pub const SPARSE: &str = "sparse";

/// Which weights of an output row become zero. A weight counts `|w_ij| |g x_j|`, with the norm of its input over the
/// tokens routed to the expert, each times its routing weight g; the weights of one output row compete. Where inputs
/// were never seen, sizes of weights decide.
///
/// Source: MoE-Pruner (arXiv 2410.12013), Wanda with routing weights, in its unstructured and semi-structured forms.
/// The shapes stay, so that stock loaders read the outcome; engines with kernels for 2:4 gain by it, others do not.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Sparsity {
    /// This fraction of every row, in (0, 1): `floor(columns * ratio)` weights.
    Unstructured(f64),
    /// Of every group of neighboring inputs some stay.
    Pattern {
        /// Weights of a group that stay.
        keep: usize,
        /// Weights of a group; what is left of a row that it does not divide stays.
        of: usize,
    },
}

/// Weights of experts in all and that are zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SparseReport {
    /// Weights of gate, up and down of the stored experts.
    pub weights: u64,
    /// Those that become zero.
    pub zeros: u64,
}

/// A model with zeros in the weights of its experts.
#[derive(Debug)]
pub struct Sparse {
    model: Arc<Checkpoint>,
    report: SparseReport,
}

impl Sparse {
    /// The model: weights are made when they are read.
    pub fn model(&self) -> &Arc<Checkpoint> {
        &self.model
    }

    /// What became zero.
    pub fn report(&self) -> SparseReport {
        self.report
    }
}

impl Sparsity {
    /// 2:4, for which there are kernels.
    pub const TWO_OF_FOUR: Self = Self::Pattern { keep: 2, of: 4 };

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`].
    pub fn validate(self) -> Result<()> {
        match self {
            Self::Unstructured(ratio) if !(ratio > 0.0 && ratio < 1.0) => {
                Err(Error::parameter("sparsity.unstructured", ratio, "a number between 0 and 1, both excluded"))
            }
            Self::Pattern { keep, of } if keep == 0 || keep >= of => {
                Err(Error::parameter("sparsity.pattern", format!("{keep} of {of}"), "at least 1, and fewer than all"))
            }
            _ => Ok(()),
        }
    }

    /// Weights of a row of so many that become zero.
    pub fn zeros(self, columns: usize) -> usize {
        match self {
            Self::Unstructured(ratio) => ((columns as f64 * ratio).floor() as usize).min(columns),
            Self::Pattern { keep, of } => columns / of * (of - keep),
        }
    }

    /// Puts zeros into the rows of a matrix `[rows, columns]`, by the norms of its inputs `[columns]`.
    pub fn apply(self, matrix: &mut [f32], norms: &[f64]) {
        let columns = norms.len().max(1);
        // Never seen: no weight of the row counts, so that sizes decide.
        let unseen = norms.iter().all(|norm| *norm == 0.0);
        matrix.par_chunks_exact_mut(columns).for_each(|row| {
            let count = |column: usize, value: f32| {
                let size = f64::from(value).abs();
                (if unseen { size } else { size * norms[column] }, size)
            };
            let drop_least = |row: &mut [f32], first: usize, zeros: usize| {
                let mut order: Vec<usize> = (0..row.len()).collect();
                // Stable: of what counts the same and is as large, the earlier goes first.
                order.sort_by(|a, b| {
                    let (a, b) = (count(first + a, row[*a]), count(first + b, row[*b]));
                    a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
                });
                order.into_iter().take(zeros).for_each(|column| row[column] = 0.0);
            };
            match self {
                Self::Unstructured(_) => drop_least(row, 0, self.zeros(columns)),
                Self::Pattern { keep, of } => {
                    for (group, values) in row.chunks_exact_mut(of).enumerate() {
                        drop_least(values, group * of, of - keep);
                    }
                }
            }
        });
    }

    /// The model with zeros in its experts, by statistics of this very model. Experts that share a set of weights count
    /// together. A quantized model is decoded first.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`]; [`Error::OtherModel`] for statistics of another model; statistics without
    /// [`INPUT_SQUARES`] and [`UNIT_SQUARES`].
    pub fn on(self, base: &Arc<Checkpoint>, statistics: &Statistics) -> Result<Sparse> {
        self.validate()?;
        let provenance = statistics.provenance();
        if !base.is_model(&provenance.model) {
            let (path, expected) = (base.dir().to_path_buf(), provenance.model.clone());
            return Err(Error::OtherModel { what: "statistics", path, found: base.fingerprint(), expected });
        }
        let norms = norms(base, statistics)?;
        let (hidden, mut report) = (base.shape().hidden_size, SparseReport::default());
        for units in norms.values().map(|(_, units)| units.len()) {
            let of_rows = |rows: usize, columns: usize| ((rows * columns) as u64, (rows * self.zeros(columns)) as u64);
            // An expert without a gate has up and down alone.
            let inner = if base.shape().gateless { 1 } else { 2 };
            let matrices = std::iter::repeat_n(of_rows(units, hidden), inner).chain([of_rows(hidden, units)]);
            for (weights, zeros) in matrices {
                report.weights += weights;
                report.zeros += zeros;
            }
        }
        let percent = 100.0 * report.zeros as f64 / report.weights.max(1) as f64;
        let recipe = json!({ "sparsity": self, "data": provenance.data, "calibration": provenance.recipe });
        let summary = format!("{percent:.1}% of the weights of experts are zero");
        let base = base.dequantized()?;
        let step = Step::new(SPARSE, &base, recipe, summary);
        let model = in_place::model(&base, Change { sparsity: self, norms }, None, step)?;
        Ok(Sparse { model, report })
    }
}

/// Norms of the inputs of gate and up `[H]` and of down `[I]`, of every stored set.
type Norms = BTreeMap<(usize, usize), (Vec<f64>, Vec<f64>)>;

fn norms(base: &Checkpoint, statistics: &Statistics) -> Result<Norms> {
    let mut sums: Norms = BTreeMap::new();
    for layer in &base.shape().layers {
        let Some(moe) = base.config().moe(layer.layer) else { continue };
        for (expert, width) in layer.widths.iter().enumerate() {
            let inputs = statistics.vector(INPUT_SQUARES, Extent::Hidden, layer.layer, expert)?;
            let units = statistics.unit(UNIT_SQUARES, layer.layer, expert)?;
            let entry = sums
                .entry((layer.layer, moe.stored(expert)))
                .or_insert_with(|| (vec![0.0; inputs.len()], vec![0.0; *width]));
            entry.0.iter_mut().zip(inputs).for_each(|(sum, square)| *sum += square);
            entry.1.iter_mut().zip(units).for_each(|(sum, square)| *sum += square);
        }
    }
    for (inputs, units) in sums.values_mut() {
        inputs.iter_mut().chain(units).for_each(|square| *square = square.sqrt());
    }
    Ok(sums)
}

struct Change {
    sparsity: Sparsity,
    norms: Norms,
}

impl PartChange for Change {
    fn part(&self, base: &Checkpoint, layer: usize, set: usize, part: ExpertPart) -> Result<Option<Vec<f32>>> {
        let Some((inputs, units)) = self.norms.get(&(layer, set)) else { return Ok(None) };
        let norms = match part {
            ExpertPart::Gate | ExpertPart::Up => inputs,
            ExpertPart::Down => units,
            _ => return Ok(None),
        };
        let Some(own) = base.set_part(layer, set, part)? else { return Ok(None) };
        let mut values = own.to_f32();
        self.sparsity.apply(&mut values, norms);
        Ok(Some(values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_of_a_row_compete_by_their_size_times_that_of_their_input() {
        // Rows: |w| |x| = 4, 3, 2, 9 and 1, 9, 4, 6 with norms 1, 3, 2, 3.
        let weights = [-4.0, 1.0, 1.0, 3.0, 1.0, -3.0, 2.0, 2.0];
        let norms = [1.0, 3.0, 2.0, 3.0];
        let applied = |sparsity: Sparsity, norms: &[f64]| {
            let mut matrix = weights;
            sparsity.apply(&mut matrix, norms);
            matrix
        };
        assert_eq!(applied(Sparsity::Unstructured(0.5), &norms), [-4.0, 0.0, 0.0, 3.0, 0.0, -3.0, 0.0, 2.0]);
        assert_eq!(applied(Sparsity::Unstructured(0.3), &norms), [-4.0, 1.0, 0.0, 3.0, 0.0, -3.0, 2.0, 2.0]);
        // 1 of 2: of 4 and 3, of 2 and 9, of 1 and 9, of 4 and 6.
        let one = Sparsity::Pattern { keep: 1, of: 2 };
        assert_eq!(applied(one, &norms), [-4.0, 0.0, 0.0, 3.0, 0.0, -3.0, 0.0, 2.0]);
        assert_eq!(applied(Sparsity::TWO_OF_FOUR, &norms), [-4.0, 0.0, 0.0, 3.0, 0.0, -3.0, 0.0, 2.0]);
        // Never seen: by size, of equals the earlier goes.
        assert_eq!(applied(Sparsity::Unstructured(0.5), &[0.0; 4]), [-4.0, 0.0, 0.0, 3.0, 0.0, -3.0, 0.0, 2.0]);
    }

    #[test]
    fn what_a_group_does_not_divide_stays_and_counts_are_what_is_told() {
        let mut matrix = vec![1.0f32, 2.0, 3.0, 4.0, 0.5, 0.25];
        Sparsity::TWO_OF_FOUR.apply(&mut matrix, &[1.0; 6]);
        assert_eq!(matrix, [0.0, 0.0, 3.0, 4.0, 0.5, 0.25]);
        assert_eq!((Sparsity::TWO_OF_FOUR.zeros(6), Sparsity::Unstructured(0.5).zeros(7)), (2, 3));
        for bad in [Sparsity::Unstructured(1.0), Sparsity::Unstructured(f64::NAN), Sparsity::Pattern { keep: 4, of: 4 }]
        {
            assert!(bad.validate().is_err(), "{bad:?}");
        }
    }
}

//! One expert.

use moe_checkpoint::products::add_to_rows;
use moe_checkpoint::{Activation, ExpertWeights};

use super::{Compression, LowRankSparse, RowScore};
use crate::{Error, Result};

/// An expert whose matrices are low-rank and sparse.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CompactExpert {
    /// Gate `[I, H]`.
    pub gate: LowRankSparse,
    /// Up `[I, H]`.
    pub up: LowRankSparse,
    /// Down `[H, I]`.
    pub down: LowRankSparse,
    /// Biases of gate, up and down.
    pub biases: [Option<Vec<f32>>; 3],
}

impl CompactExpert {
    /// An expert split, with all rows of S.
    ///
    /// # Errors
    /// As [`LowRankSparse::split`].
    pub fn split(expert: &ExpertWeights, rank: usize) -> Result<Self> {
        let (width, hidden) = (expert.width, expert.hidden);
        Ok(Self {
            gate: LowRankSparse::split(&expert.gate, width, hidden, rank)?,
            up: LowRankSparse::split(&expert.up, width, hidden, rank)?,
            down: LowRankSparse::split(&expert.down, hidden, width, rank)?,
            biases: [expert.gate_bias.clone(), expert.up_bias.clone(), expert.down_bias.clone()],
        })
    }

    /// Scores of the rows of S of gate, up and down, while all rows are there. `importance` has a number per unit.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for Fisher scores without as many numbers as units.
    pub fn row_scores(&self, by: RowScore, importance: Option<&[f64]>) -> Result<[Vec<f64>; 3]> {
        let mean = |rows: &LowRankSparse, f: &dyn Fn(usize, usize, f64) -> f64| -> Vec<f64> {
            let row = |(row, values): (usize, &[f32])| {
                let sum: f64 = values.iter().enumerate().map(|(col, v)| f(row, col, f64::from(*v))).sum();
                sum / rows.cols.max(1) as f64
            };
            rows.sparse.chunks_exact(rows.cols.max(1)).enumerate().map(row).collect()
        };
        match by {
            RowScore::Magnitude => Ok([&self.gate, &self.up, &self.down].map(|m| mean(m, &|_, _, v| v.abs()))),
            RowScore::Fisher => {
                let width = self.gate.rows;
                let units = importance.filter(|units| units.len() == width).ok_or_else(|| {
                    let found = importance.map_or("no unit scores".to_string(), |i| format!("{} numbers", i.len()));
                    Error::parameter("compression.rows", found, format!("Fisher scores of {width} units"))
                })?;
                let inner = |row: usize, _: usize, v: f64| units[row] * v * v;
                let outer = |_: usize, col: usize, v: f64| units[col] * v * v;
                Ok([mean(&self.gate, &inner), mean(&self.up, &inner), mean(&self.down, &outer)])
            }
        }
    }

    /// The same with these rows of S of gate, up and down only.
    pub fn keep_rows(self, kept: [&[u32]; 3]) -> Self {
        Self {
            gate: self.gate.keep_rows(kept[0]),
            up: self.up.keep_rows(kept[1]),
            down: self.down.keep_rows(kept[2]),
            biases: self.biases,
        }
    }

    /// An expert compressed by itself: its rows of S compete with one another only.
    ///
    /// # Errors
    /// As [`CompactExpert::split`] and [`CompactExpert::row_scores`].
    pub fn compress(expert: &ExpertWeights, how: &Compression, importance: Option<&[f64]>) -> Result<Self> {
        how.validate()?;
        let split = Self::split(expert, how.rank)?;
        let scores = split.row_scores(how.rows, importance)?;
        let kept = super::kept_rows(&scores, how.keep_rows);
        Ok(split.keep_rows([&kept[0], &kept[1], &kept[2]]))
    }

    /// Parameters of all parts, biases included.
    pub fn parameters(&self) -> usize {
        let biases: usize = self.biases.iter().flatten().map(Vec::len).sum();
        self.gate.parameters() + self.up.parameters() + self.down.parameters() + biases
    }

    /// Outputs `[n, H]`, before the routing weight, of inputs `[n, H]`, without forming any of the matrices.
    pub fn forward(&self, inputs: &[f32], activation: Activation) -> Vec<f32> {
        let (mut gate, mut up) = (self.gate.forward(inputs), self.up.forward(inputs));
        for (values, bias) in [&mut gate, &mut up].into_iter().zip(&self.biases) {
            add_to_rows(values, bias.as_deref().unwrap_or_default());
        }
        activation.apply(&mut gate, &up);
        let mut out = self.down.forward(&gate);
        add_to_rows(&mut out, self.biases[2].as_deref().unwrap_or_default());
        out
    }

    /// The expert with its matrices formed.
    pub fn dense(&self) -> ExpertWeights {
        let [gate_bias, up_bias, down_bias] = self.biases.clone();
        ExpertWeights {
            gate: self.gate.dense(),
            up: self.up.dense(),
            down: self.down.dense(),
            gate_bias,
            up_bias,
            down_bias,
            width: self.gate.rows,
            hidden: self.gate.cols,
        }
    }
}

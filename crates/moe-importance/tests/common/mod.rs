//! One expert with random weights and the tokens of a few sequences, as an engine would show it, and its gradients by
//! brute force in f64.

pub mod catalog;
pub mod world;

use std::ops::Range;

use burn::tensor::{Device, Tensor};
use moe_checkpoint::{ExpertWeights, MoeLayerShape, MoeShape, Provenance, Statistics};
use moe_core::experts::ExpertTensors;
use moe_core::host::from_vec;
use moe_core::trace::{ExpertGradients, ExpertTrace, LayerTrace, Observer, Segment, SequenceInfo, WaveInfo};
use moe_importance::{Collection, Error, ExpertWeightsSource, Result, StatisticId};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Row-major matrix in f64.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub values: Vec<f64>,
}

impl Matrix {
    pub fn random(rows: usize, columns: usize, rng: &mut ChaCha8Rng) -> Self {
        // Numbers that f32 holds exactly, so that both sides start from the same.
        let values = (0..rows * columns).map(|_| f64::from(rng.next_u32() >> 20) / 2048.0 - 1.0).collect();
        Self { rows, columns, values }
    }

    pub fn at(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.columns + column]
    }

    /// `self other^T`.
    pub fn times_transposed(&self, other: &Matrix) -> Matrix {
        let dot = |i: usize, j: usize| (0..self.columns).map(|k| self.at(i, k) * other.at(j, k)).sum();
        let values = (0..self.rows * other.rows).map(|n| dot(n / other.rows, n % other.rows)).collect();
        Matrix { rows: self.rows, columns: other.rows, values }
    }

    pub fn transposed(&self) -> Matrix {
        let values = (0..self.rows * self.columns).map(|n| self.at(n % self.rows, n / self.rows)).collect();
        Matrix { rows: self.columns, columns: self.rows, values }
    }

    pub fn select_rows(&self, rows: &[usize]) -> Matrix {
        let values = rows.iter().flat_map(|r| (0..self.columns).map(|c| self.at(*r, c))).collect();
        Matrix { rows: rows.len(), columns: self.columns, values }
    }

    pub fn select_columns(&self, columns: &[usize]) -> Matrix {
        self.transposed().select_rows(columns).transposed()
    }

    pub fn tensor(&self) -> Tensor<2> {
        from_vec(self.values.iter().map(|v| *v as f32).collect(), [self.rows, self.columns], &Device::flex())
    }
}

/// Rows of a sequence that reach the expert, and how many tokens the sequence predicts.
#[derive(Clone, Copy, Debug)]
pub struct SequenceCase {
    pub rows: usize,
    pub loss_tokens: usize,
}

/// An expert and its tokens. The loss is `sum_t upstream_t . (weight_t f(x_t))`, so that upstream is its gradient at
/// the layer output.
#[derive(Clone, Debug)]
pub struct Case {
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
    pub input: Matrix,
    pub upstream: Matrix,
    pub routing: Vec<f64>,
    pub sequences: Vec<SequenceCase>,
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

impl Case {
    pub fn random(hidden: usize, width: usize, sequences: &[SequenceCase], seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let n = sequences.iter().map(|s| s.rows).sum();
        Self {
            gate: Matrix::random(width, hidden, &mut rng),
            up: Matrix::random(width, hidden, &mut rng),
            down: Matrix::random(hidden, width, &mut rng),
            input: Matrix::random(n, hidden, &mut rng),
            upstream: Matrix::random(n, hidden, &mut rng),
            routing: (0..n).map(|_| 0.125 + f64::from(rng.next_u32() >> 24) / 512.0).collect(),
            sequences: sequences.to_vec(),
        }
    }

    pub fn hidden(&self) -> usize {
        self.input.columns
    }

    pub fn width(&self) -> usize {
        self.gate.rows
    }

    /// Rows of each sequence.
    pub fn ranges(&self) -> Vec<Range<usize>> {
        let mut end = 0;
        let next = |s: &SequenceCase| {
            end += s.rows;
            end - s.rows..end
        };
        self.sequences.iter().map(next).collect()
    }

    /// Pre-activations and units: `(g, v, u)`, each `[n, I]`.
    fn forward(&self) -> (Matrix, Matrix, Matrix) {
        let (g, v) = (self.input.times_transposed(&self.gate), self.input.times_transposed(&self.up));
        let mut u = g.clone();
        u.values.iter_mut().zip(&v.values).for_each(|(g, v)| *g = *g * sigmoid(*g) * v);
        (g, v, u)
    }

    /// Loss of the rows of one sequence, for finite differences.
    pub fn loss(&self, rows: Range<usize>) -> f64 {
        let (_, _, u) = self.forward();
        let f = u.times_transposed(&self.down);
        rows.map(|t| self.routing[t] * (0..self.hidden()).map(|h| self.upstream.at(t, h) * f.at(t, h)).sum::<f64>())
            .sum()
    }

    /// Units, d_units, d_gate_up: what the backward of the engine yields.
    pub fn backward(&self) -> (Matrix, Matrix, Matrix) {
        let (g, v, u) = self.forward();
        let mut d = self.upstream.clone();
        let hidden = self.hidden();
        d.values.iter_mut().enumerate().for_each(|(n, d)| *d *= self.routing[n / hidden]);
        let du = d.times_transposed(&self.down.transposed());
        let (n, width) = (u.rows, self.width());
        let mut gate_up = Matrix { rows: n, columns: 2 * width, values: vec![0.0; n * 2 * width] };
        for t in 0..n {
            for j in 0..width {
                let (g, v, du) = (g.at(t, j), v.at(t, j), du.at(t, j));
                let s = sigmoid(g);
                gate_up.values[t * 2 * width + j] = du * v * s * (1.0 + g * (1.0 - s));
                gate_up.values[t * 2 * width + width + j] = du * g * s;
            }
        }
        (u, du, gate_up)
    }

    /// Gradients of the 3H weights of each unit from the given rows: `[I][3H]`, gate then up then down.
    pub fn weight_gradients(&self, rows: Range<usize>) -> Vec<Vec<f64>> {
        let (u, _, gate_up) = self.backward();
        let (hidden, width) = (self.hidden(), self.width());
        let side = |t: usize, j: usize, part: usize| match part {
            0 => gate_up.at(t, j),
            1 => gate_up.at(t, width + j),
            _ => u.at(t, j) * self.routing[t],
        };
        let shared =
            |t: usize, h: usize, part: usize| if part < 2 { self.input.at(t, h) } else { self.upstream.at(t, h) };
        let entry = |j: usize, n: usize| {
            rows.clone().map(|t| side(t, j, n / hidden) * shared(t, n % hidden, n / hidden)).sum::<f64>()
        };
        (0..width).map(|j| (0..3 * hidden).map(|n| entry(j, n)).collect()).collect()
    }

    pub fn permute_units(&self, order: &[usize]) -> Self {
        Self {
            gate: self.gate.select_rows(order),
            up: self.up.select_rows(order),
            down: self.down.select_columns(order),
            ..self.clone()
        }
    }

    pub fn permute_rows(&self, order: &[usize]) -> Self {
        Self {
            input: self.input.select_rows(order),
            upstream: self.upstream.select_rows(order),
            routing: order.iter().map(|t| self.routing[*t]).collect(),
            ..self.clone()
        }
    }

    pub fn weights(&self) -> ExpertWeights {
        let f32s = |m: &Matrix| m.values.iter().map(|v| *v as f32).collect();
        ExpertWeights {
            gate: f32s(&self.gate),
            up: f32s(&self.up),
            down: f32s(&self.down),
            width: self.width(),
            hidden: self.hidden(),
            ..Default::default()
        }
    }

    /// Shows the case to `observer` as expert `expert` of layer `layer`.
    pub fn show(&self, layer: usize, expert: usize, observer: &mut dyn Observer) -> moe_core::Result<()> {
        let (units, d_units, gate_up) = self.backward();
        let (input, upstream) = (self.input.tensor(), self.upstream.tensor());
        let (units, d_units, gate_up) = (units.tensor(), d_units.tensor(), gate_up.tensor());
        let routing: Vec<f32> = self.routing.iter().map(|w| *w as f32).collect();
        let rows: Vec<u32> = (0..self.input.rows as u32).collect();
        let segments: Vec<Segment> = self
            .ranges()
            .into_iter()
            .zip(&self.sequences)
            .enumerate()
            .filter(|(_, (rows, _))| !rows.is_empty())
            .map(|(sequence, (rows, s))| Segment { sequence, rows, loss_tokens: s.loss_tokens })
            .collect();
        let weights = ExpertTensors::new(self.weights(), &Device::flex());
        observer.expert(&ExpertTrace {
            layer,
            expert,
            rows: &rows,
            routing_weights: &routing,
            segments: &segments,
            input: &input,
            units: Some(&units),
            output: None,
            backward: Some(ExpertGradients { upstream: &upstream, units: &d_units, gate_up: &gate_up }),
            expert_weights: &weights,
        })
    }

    /// The wave of these sequences: each has one token more than it predicts, or as many as reach the expert.
    pub fn wave(&self, id: u64) -> WaveInfo {
        let mut end = 0;
        let next = |s: &SequenceCase| {
            let length = s.rows.max(s.loss_tokens + 1);
            end += length;
            SequenceInfo { tokens: end - length..end, loss_tokens: s.loss_tokens }
        };
        let sequences: Vec<_> = self.sequences.iter().map(next).collect();
        WaveInfo { id, tokens: end, ids: Vec::new(), sequences }
    }
}

/// A model of one MoE layer (decoder layer 3) of `experts` experts, all as large as `case`.
pub fn shape(case: &Case, experts: usize) -> MoeShape {
    MoeShape {
        gateless: false,
        hidden_size: case.hidden(),
        top_k: 1,
        layers: vec![MoeLayerShape { layer: 3, widths: vec![case.width(); experts] }],
    }
}

pub fn provenance() -> Provenance {
    Provenance::new("model", "data", "{}")
}

/// Runs a wave in which `case` is expert 1 of 2 in layer 3 and expert 0 gets no token.
pub fn observe(case: &Case, wave: u64, observer: &mut dyn Observer) -> moe_core::Result<()> {
    let info = case.wave(wave);
    observer.begin_wave(&info)?;
    let selected = vec![1; info.tokens];
    observer.layer(&LayerTrace {
        layer: 3,
        wave: &info,
        experts: 2,
        top_k: 1,
        logits: &[0.0, 2.0].repeat(info.tokens),
        selected: &selected,
        weights: &vec![0.5; info.tokens],
        scale: 1.0,
        idle: &[],
    })?;
    case.show(3, 1, observer)?;
    observer.end_wave(&info)
}

/// Statistics of [`observe`].
pub fn collect_one(case: &Case, ids: &[StatisticId]) -> Statistics {
    let mut collection = Collection::new(&shape(case, 2), provenance(), ids).unwrap();
    observe(case, 0, &mut collection).unwrap();
    collection.take().unwrap()
}

/// The same weights for every expert.
pub struct SameWeights(pub ExpertWeights);

impl ExpertWeightsSource for SameWeights {
    fn expert(&self, _: usize, _: usize) -> Result<ExpertWeights, Error> {
        Ok(self.0.clone())
    }
}

/// Asserts that the difference is at most `tolerance` times the largest expected value.
pub fn assert_close(found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().copied().fold(0.0, |a: f64, b| a.max(b.abs()));
    for (unit, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((f64::from(*a) - b).abs() <= tolerance * largest, "unit {unit}: {a}, expected {b} (largest {largest})");
    }
}

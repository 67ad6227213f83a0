//! Rotary position embedding of some columns of every head: default, linear, yarn and LongRoPE frequencies; pairs of
//! columns split by half (Llama) or interleaved (DeepSeek, Ernie).

use std::ops::Range;

use burn::tensor::{Device, Tensor};
use moe_checkpoint::human::variant;
use moe_checkpoint::{QueryGrowth, RopeConfig, RopeScaling};
use multiversion::multiversion;

use super::for_rows_mut;
use crate::{
    error::{Error, Result},
    host,
};

/// Frequencies of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct RotaryEmbedding {
    interleaved: bool,
    frequencies: Frequencies,
    /// Frequencies of sequences longer than so many tokens.
    long: Option<(usize, Frequencies)>,
    growth: Option<QueryGrowth>,
}

/// Inverse frequencies `[rotary_dim / 2]` and the factor on cos and sin.
#[derive(Clone, Debug, PartialEq)]
struct Frequencies {
    inverse: Vec<f32>,
    factor: f32,
}

/// Consecutive positions of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Positions {
    /// The positions.
    pub range: Range<usize>,
    /// Length that the sequence will have in the end: LongRoPE has other frequencies for long ones.
    pub length: usize,
}

/// `cos` and `sin` of some positions, `[positions, rotary_dim / 2]` each.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    half: usize,
    interleaved: bool,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Factor on the query of every row, where queries grow.
    growth: Option<Vec<f32>>,
}

impl RotaryEmbedding {
    /// Frequencies of a configuration; yarn as in arXiv 2309.00071 with the conventions of transformers.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a scaling this crate does not know.
    pub fn new(rope: &RopeConfig, rotary_dim: usize) -> Result<Self> {
        let half = rotary_dim / 2;
        let base = |i: usize| rope.theta.powf(2.0 * i as f64 / rotary_dim as f64);
        let mut long = None;
        let (frequencies, factor): (Vec<f64>, f64) = match &rope.scaling {
            RopeScaling::Default => ((0..half).map(|i| 1.0 / base(i)).collect(), 1.0),
            RopeScaling::Linear { factor } => ((0..half).map(|i| 1.0 / (base(i) * factor)).collect(), 1.0),
            RopeScaling::Yarn {
                factor,
                original_max_position,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale,
                mscale_all_dim,
                truncate,
            } => {
                // Dimension that turns `rotations` times over the original context.
                let dimension = |rotations: f64| {
                    rotary_dim as f64 * (*original_max_position as f64 / (rotations * 2.0 * std::f64::consts::PI)).ln()
                        / (2.0 * rope.theta.ln())
                };
                let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(rotary_dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let frequencies = (0..half)
                    .map(|i| {
                        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        let extrapolation = 1.0 - ramp;
                        (1.0 / (factor * base(i))) * (1.0 - extrapolation) + (1.0 / base(i)) * extrapolation
                    })
                    .collect();
                let magnitude = |scale: f64, m: f64| if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 };
                let attention = attention_factor.unwrap_or_else(|| match (mscale, mscale_all_dim) {
                    (Some(m), Some(all)) if *m != 0.0 && *all != 0.0 => {
                        magnitude(*factor, *m) / magnitude(*factor, *all)
                    }
                    _ => magnitude(*factor, 1.0),
                });
                (frequencies, attention)
            }
            // As in the paper, long sequences have frequencies of their own. transformers 5.23 keeps the
            // short ones for phimoe and changes the factor only: there, logits of long sequences differ.
            RopeScaling::LongRope { short_factor, long_factor, short_mscale, long_mscale, original_max_position } => {
                let divided = |factors: &[f64]| -> Result<Vec<f64>> {
                    if factors.len() != half {
                        let expected = format!("{half} divisors, half the rotated columns of a head");
                        return Err(Error::input("LongRoPE", format!("{} divisors", factors.len()), expected));
                    }
                    Ok(factors.iter().enumerate().map(|(i, factor)| 1.0 / (base(i) * factor)).collect())
                };
                long = Some((*original_max_position, Frequencies::new(divided(long_factor)?, *long_mscale)));
                (divided(short_factor)?, *short_mscale)
            }
            RopeScaling::Proportional { pairs, factor } => {
                ((0..half).map(|i| if i < *pairs { 1.0 / (base(i) * factor) } else { 0.0 }).collect(), 1.0)
            }
            RopeScaling::StretchedBase { alpha, dim } => {
                let theta = rope.theta * alpha.powf(*dim as f64 / (*dim as f64 - 2.0));
                ((0..half).map(|i| theta.powf(-2.0 * i as f64 / rotary_dim as f64)).collect(), 1.0)
            }
            RopeScaling::Llama3 { factor, low, high, original_max_position } => {
                let scaled = |i: usize| {
                    let turns = *original_max_position as f64 / (2.0 * std::f64::consts::PI * base(i));
                    let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    ((1.0 - smooth) / factor + smooth) / base(i)
                };
                ((0..half).map(scaled).collect(), 1.0)
            }
            other => return Err(Error::Unsupported(format!("rope scaling {}", variant(&other)))),
        };
        let frequencies = Frequencies::new(frequencies, factor);
        Ok(Self { interleaved: rope.interleaved, frequencies, long, growth: None })
    }

    /// The same with queries that grow with their position.
    pub fn with_growth(self, growth: Option<QueryGrowth>) -> Self {
        Self { growth, ..self }
    }

    /// Table of these positions, whatever sequences they are of, with the frequencies of short ones.
    pub fn table_at(&self, positions: impl IntoIterator<Item = usize>) -> RotaryTable {
        let Frequencies { inverse, factor } = &self.frequencies;
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for inverse in inverse {
                let angle = position as f32 * inverse;
                cos.push(angle.cos() * factor);
                sin.push(angle.sin() * factor);
            }
        }
        RotaryTable { half: inverse.len(), interleaved: self.interleaved, cos, sin, growth: None }
    }

    /// Table of the positions of some sequences, one after the other.
    pub fn table(&self, sequences: &[Positions]) -> RotaryTable {
        let half = self.frequencies.inverse.len();
        let rows: usize = sequences.iter().map(|s| s.range.len()).sum();
        let mut cos = Vec::with_capacity(rows * half);
        let mut sin = Vec::with_capacity(rows * half);
        for sequence in sequences {
            let frequencies = match &self.long {
                Some((limit, long)) if sequence.length > *limit => long,
                _ => &self.frequencies,
            };
            for position in sequence.range.clone() {
                for inverse in &frequencies.inverse {
                    // f32 angles, as in transformers: the rounding of large angles is part of the model
                    let angle = position as f32 * inverse;
                    cos.push(angle.cos() * frequencies.factor);
                    sin.push(angle.sin() * frequencies.factor);
                }
            }
        }
        let growth = self.growth.map(|growth| {
            let positions = sequences.iter().flat_map(|sequence| sequence.range.clone());
            positions
                .map(|p| (1.0 + growth.rate * (1.0 + ((p + growth.offset) / growth.length) as f64).ln()) as f32)
                .collect()
        });
        RotaryTable { half, interleaved: self.interleaved, cos, sin, growth }
    }
}

impl Frequencies {
    fn new(inverse: Vec<f64>, factor: f64) -> Self {
        Self { inverse: inverse.into_iter().map(|f| f as f32).collect(), factor: factor as f32 }
    }
}

impl RotaryTable {
    /// Rotates columns `first..first + rotary_dim` of each head of `x [n, heads * D]`, row t by table row t. With
    /// `inverse` the transposed rotation is applied, which is the gradient.
    pub fn rotate(&self, x: Tensor<2>, heads: usize, first: usize, inverse: bool) -> Tensor<2> {
        let device = x.device();
        if host::is_host(&device) {
            self.on_host(x, heads, first, inverse, &device)
        } else {
            self.on_device(x, heads, first, inverse)
        }
    }

    /// Columns of a head that are rotated.
    pub fn columns(&self) -> usize {
        2 * self.half
    }

    /// The same with the columns that are turned together neighboring or not.
    pub fn paired(&self, interleaved: bool) -> Self {
        Self { interleaved, ..self.clone() }
    }

    /// Queries `x [n, heads * D]` grown by their positions, or their gradient back: row t times the factor of row t.
    pub fn grow(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.growth {
            Some(factors) => {
                let device = x.device();
                x * host::from_vec(factors.clone(), [factors.len(), 1], &device)
            }
            None => x,
        }
    }

    fn on_host(&self, x: Tensor<2>, heads: usize, first: usize, inverse: bool, device: &Device) -> Tensor<2> {
        let [n, columns] = x.dims();
        let mut values = host::into_vec(x);
        let half = self.half;
        let sign = if inverse { -1.0 } else { 1.0 };
        for_rows_mut(&mut values, columns, |t, row| {
            let (cos, sin) = (&self.cos[t * half..(t + 1) * half], &self.sin[t * half..(t + 1) * half]);
            for head in row.chunks_exact_mut(columns / heads) {
                let part = &mut head[first..first + 2 * half];
                if self.interleaved {
                    rotate_pairs(part, cos, sin, sign);
                } else {
                    let (a, b) = part.split_at_mut(half);
                    rotate_halves(a, b, cos, sin, sign);
                }
            }
        });
        host::from_vec(values, [n, columns], device)
    }

    fn on_device(&self, x: Tensor<2>, heads: usize, first: usize, inverse: bool) -> Tensor<2> {
        let [n, columns] = x.dims();
        let (half, head_dim, device) = (self.half, columns / heads, x.device());
        let cos = host::from_vec(self.cos.clone(), [n, 1, half], &device);
        let sin = host::from_vec(self.sin.clone(), [n, 1, half], &device);
        let sin = if inverse { sin.neg() } else { sin };
        let x = x.reshape([n, heads, head_dim]);
        let part = x.clone().narrow(2, first, 2 * half);
        let (a, b) = if self.interleaved {
            let pairs = part.reshape([n, heads, half, 2]);
            let column = |i| pairs.clone().narrow(3, i, 1).reshape([n, heads, half]);
            (column(0), column(1))
        } else {
            (part.clone().narrow(2, 0, half), part.narrow(2, half, half)) // [n, heads, half]
        };
        let (a, b) = (a.clone() * cos.clone() - b.clone() * sin.clone(), b * cos + a * sin);
        let rotated = if self.interleaved {
            let shape = [n, heads, half, 1];
            Tensor::cat(vec![a.reshape(shape), b.reshape(shape)], 3).reshape([n, heads, 2 * half])
        } else {
            Tensor::cat(vec![a, b], 2) // [n, heads, rotary_dim]
        };
        let end = first + 2 * half;
        let mut parts = vec![rotated];
        if first > 0 {
            parts.insert(0, x.clone().narrow(2, 0, first));
        }
        if end < head_dim {
            parts.push(x.narrow(2, end, head_dim - end));
        }
        Tensor::cat(parts, 2).reshape([n, columns])
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn rotate_halves(a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        let s = s * sign;
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

fn rotate_pairs(x: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    for ((pair, c), s) in x.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
        let [a, b] = *pair;
        let s = s * sign;
        *pair = [a * c - b * s, b * c + a * s];
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, pattern};

    fn embedding(interleaved: bool, scaling: RopeScaling, rotary_dim: usize) -> RotaryEmbedding {
        RotaryEmbedding::new(&RopeConfig { theta: 1e4, interleaved, scaling }, rotary_dim).unwrap()
    }

    fn positions(range: Range<usize>, length: usize) -> Positions {
        Positions { range, length }
    }

    #[test]
    fn host_and_device_bodies_agree_and_inverse_undoes() {
        let x = pattern([5, 18], 1);
        for (interleaved, rotary_dim, first) in
            [(false, 6, 0), (true, 6, 0), (false, 4, 0), (true, 4, 2), (false, 2, 3)]
        {
            let table = embedding(interleaved, RopeScaling::Default, rotary_dim).table(&[positions(3..8, 8)]);
            let host = table.on_host(x.clone(), 3, first, false, &x.device());
            assert_close(&host, &table.on_device(x.clone(), 3, first, false), 1e-6);
            assert_close(&table.rotate(host.clone(), 3, first, true), &x, 1e-5);
            assert_close(&table.on_device(host, 3, first, true), &x, 1e-5);
        }
    }

    #[test]
    fn interleaved_pairs_are_permuted_halves() {
        let x = pattern([2, 6], 1);
        let permute = |x: &Tensor<2>, order: [usize; 6]| {
            let values = host::HostView::new(x).as_slice().chunks(6).flat_map(|row| order.map(|i| row[i])).collect();
            host::from_vec(values, [2, 6], &x.device())
        };
        let table = |interleaved| embedding(interleaved, RopeScaling::Default, 6).table(&[positions(4..6, 6)]);
        let halves = table(false).rotate(permute(&x, [0, 2, 4, 1, 3, 5]), 1, 0, false);
        assert_close(&permute(&halves, [0, 3, 1, 4, 2, 5]), &table(true).rotate(x, 1, 0, false), 1e-6);
    }

    #[test]
    fn linear_scaling_divides_positions() {
        let plain = embedding(false, RopeScaling::Default, 8);
        let linear = embedding(false, RopeScaling::Linear { factor: 2.0 }, 8);
        let (a, b) = (plain.table(&[positions(3..4, 4)]), linear.table(&[positions(6..7, 7)]));
        for (x, y) in a.cos.iter().zip(&b.cos) {
            assert!((x - y).abs() < 1e-6);
        }
    }

    #[test]
    fn long_rope_has_other_frequencies_for_long_sequences() {
        let scaling = RopeScaling::LongRope {
            short_factor: vec![1.0, 2.0],
            long_factor: vec![3.0, 4.0],
            short_mscale: 1.0,
            long_mscale: 1.5,
            original_max_position: 10,
        };
        let table = embedding(false, scaling, 4).table(&[positions(9..10, 10), positions(9..10, 11)]);
        let expected = [9.0f32.cos(), 0.045f32.cos(), 1.5 * 3.0f32.cos(), 1.5 * 0.0225f32.cos()];
        assert!(table.cos.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{:?}", table.cos);
    }
}

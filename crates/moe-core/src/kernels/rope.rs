//! Rotary position embedding, default, linear and yarn, in the half-split layout of Llama-like models.

use burn::tensor::{Device, Tensor};
use moe_checkpoint::{RopeConfig, RopeScaling};
use multiversion::multiversion;

use super::for_rows_mut;
use crate::{
    error::{Error, Result},
    host,
};

/// Inverse frequencies `[head_dim / 2]` and the factor on cos and sin.
#[derive(Clone, Debug, PartialEq)]
pub struct RotaryEmbedding {
    inverse_frequencies: Vec<f32>,
    attention_factor: f32,
}

/// `cos` and `sin` of some positions, `[positions, head_dim / 2]` each.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RotaryEmbedding {
    /// Frequencies of a configuration; yarn as in arXiv 2309.00071 with the conventions of transformers.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a scaling this crate does not know.
    pub fn new(rope: &RopeConfig, head_dim: usize) -> Result<Self> {
        let half = head_dim / 2;
        let base = |i: usize| rope.theta.powf(2.0 * i as f64 / head_dim as f64);
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
                    head_dim as f64 * (*original_max_position as f64 / (rotations * 2.0 * std::f64::consts::PI)).ln()
                        / (2.0 * rope.theta.ln())
                };
                let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
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
            other => return Err(Error::Unsupported(format!("rope scaling {other:?}"))),
        };
        Ok(Self {
            inverse_frequencies: frequencies.into_iter().map(|f| f as f32).collect(),
            attention_factor: factor as f32,
        })
    }

    /// Table of the given positions.
    pub fn table(&self, positions: impl ExactSizeIterator<Item = usize>) -> RotaryTable {
        let half = self.inverse_frequencies.len();
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        for position in positions {
            for frequency in &self.inverse_frequencies {
                // f32 angles, as in transformers: the rounding of large angles is part of the model
                let angle = position as f32 * frequency;
                cos.push(angle.cos() * self.attention_factor);
                sin.push(angle.sin() * self.attention_factor);
            }
        }
        RotaryTable { half, cos, sin }
    }
}

impl RotaryTable {
    /// Rotates the heads of `x [n, heads * head_dim]`, row t by table row t. With `inverse` the transposed rotation is
    /// applied, which is the gradient.
    pub fn rotate(&self, x: Tensor<2>, heads: usize, inverse: bool) -> Tensor<2> {
        let device = x.device();
        if host::is_host(&device) { self.on_host(x, inverse, &device) } else { self.on_device(x, heads, inverse) }
    }

    fn on_host(&self, x: Tensor<2>, inverse: bool, device: &Device) -> Tensor<2> {
        let [n, columns] = x.dims();
        let mut values = host::into_vec(x);
        let half = self.half;
        for_rows_mut(&mut values, columns, |t, row| {
            let (cos, sin) = (&self.cos[t * half..(t + 1) * half], &self.sin[t * half..(t + 1) * half]);
            for head in row.chunks_exact_mut(2 * half) {
                let (a, b) = head.split_at_mut(half);
                rotate_head(a, b, cos, sin, if inverse { -1.0 } else { 1.0 });
            }
        });
        host::from_vec(values, [n, columns], device)
    }

    fn on_device(&self, x: Tensor<2>, heads: usize, inverse: bool) -> Tensor<2> {
        let [n, columns] = x.dims();
        let (half, device) = (self.half, x.device());
        let cos = host::from_vec(self.cos.clone(), [n, 1, half], &device);
        let sin = host::from_vec(self.sin.clone(), [n, 1, half], &device);
        let sin = if inverse { sin.neg() } else { sin };
        let x = x.reshape([n, heads, 2 * half]);
        let (a, b) = (x.clone().narrow(2, 0, half), x.narrow(2, half, half)); // [n, heads, half]
        let rotated = Tensor::cat(
            vec![a.clone() * cos.clone() - b.clone() * sin.clone(), b * cos + a * sin],
            2, // [n, heads, head_dim]
        );
        rotated.reshape([n, columns])
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn rotate_head(a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        let s = s * sign;
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, pattern};

    fn table() -> RotaryTable {
        let rope = RopeConfig { theta: 10000.0, scaling: RopeScaling::Default };
        RotaryEmbedding::new(&rope, 6).unwrap().table(3..8)
    }

    #[test]
    fn host_and_device_bodies_agree_and_inverse_undoes() {
        let x = pattern([5, 18], 1);
        let host = table().on_host(x.clone(), false, &x.device());
        assert_close(&host, &table().on_device(x.clone(), 3, false), 1e-6);
        assert_close(&table().rotate(host.clone(), 3, true), &x, 1e-5);
        assert_close(&table().on_device(host, 3, true), &x, 1e-5);
    }

    #[test]
    fn linear_scaling_divides_positions() {
        let plain = RotaryEmbedding::new(&RopeConfig { theta: 1e4, scaling: RopeScaling::Default }, 8).unwrap();
        let linear =
            RotaryEmbedding::new(&RopeConfig { theta: 1e4, scaling: RopeScaling::Linear { factor: 2.0 } }, 8).unwrap();
        let (a, b) = (plain.table([3].into_iter()), linear.table([6].into_iter()));
        for (x, y) in a.cos.iter().zip(&b.cos) {
            assert!((x - y).abs() < 1e-6);
        }
    }
}

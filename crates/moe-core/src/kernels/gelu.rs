//! GELU and its derivative: exact (`x Phi(x)`, arXiv 1606.08415) and in the approximation by tanh.

use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use burn::tensor::{Tensor, activation};
use multiversion::multiversion;

use super::math;

/// `1 / sqrt(2 pi)`, the density of the standard normal distribution at 0.
const DENSITY: f32 = 0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
/// `2 sqrt(2 / pi)`: `(1 + tanh(z)) / 2` is `sigmoid(2 z)`.
const SLOPE: f32 = 2.0 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
const CUBIC: f32 = 0.044_715;

/// erf(x) to 4e-7: the rational function of odd degree 13 over even degree 8 that Eigen and XLA use, on [-4, 4],
/// outside of which f32 cannot tell erf from its sign.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let x2 = x * x;
    let mut p = -2.726_142e-10f32;
    p = p * x2 + 2.770_681_4e-8;
    p = p * x2 - 2.101_024e-6;
    p = p * x2 - 5.692_506_4e-5;
    p = p * x2 - 7.349_906e-4;
    p = p * x2 - 2.954_6e-3;
    p = p * x2 - 1.609_603_3e-2;
    let mut q = -1.456_607_2e-5f32;
    q = q * x2 - 2.133_740_6e-4;
    q = q * x2 - 1.682_827e-3;
    q = q * x2 - 7.373_329e-3;
    q = q * x2 - 1.426_474e-2;
    x * p / q
}

/// Phi(x), the standard normal distribution function.
#[inline(always)]
fn normal(x: f32) -> f32 {
    0.5 + 0.5 * erf(x * FRAC_1_SQRT_2)
}

/// `sigmoid(2 z)` and `d 2z / dx` for `z = sqrt(2 / pi) (x + 0.044715 x^3)`.
#[inline(always)]
fn tanh_parts(x: f32) -> (f32, f32) {
    (math::sigmoid(SLOPE * (x + CUBIC * x * x * x)), SLOPE * (1.0 + 3.0 * CUBIC * x * x))
}

/// `u = gelu(g) v`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
pub(super) fn row(g: &[f32], v: &[f32], u: &mut [f32]) {
    for ((u, g), v) in u.iter_mut().zip(g).zip(v) {
        *u = g * normal(*g) * v;
    }
}

/// Gradients of [`row`] from `du`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
pub(super) fn row_backward(g: &[f32], v: &[f32], du: &[f32], dg: &mut [f32], dv: &mut [f32]) {
    for ((((g, v), d), dg), dv) in g.iter().zip(v).zip(du).zip(dg).zip(dv) {
        let phi = normal(*g);
        *dg = d * v * (phi + g * DENSITY * math::exp(-0.5 * g * g));
        *dv = d * g * phi;
    }
}

/// `u = gelu(g) v` by tanh.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
pub(super) fn tanh_row(g: &[f32], v: &[f32], u: &mut [f32]) {
    for ((u, g), v) in u.iter_mut().zip(g).zip(v) {
        *u = g * tanh_parts(*g).0 * v;
    }
}

/// Gradients of [`tanh_row`] from `du`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
pub(super) fn tanh_row_backward(g: &[f32], v: &[f32], du: &[f32], dg: &mut [f32], dv: &mut [f32]) {
    for ((((g, v), d), dg), dv) in g.iter().zip(v).zip(du).zip(dg).zip(dv) {
        let (s, slope) = tanh_parts(*g);
        *dg = d * v * (s + g * s * (1.0 - s) * slope);
        *dv = d * g * s;
    }
}

/// `gelu(g)` and its derivative as tensor operations.
pub(super) fn on_device(g: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let phi = g.clone().mul_scalar(FRAC_1_SQRT_2).erf().add_scalar(1.0).mul_scalar(0.5);
    let density = (g.clone() * g.clone()).mul_scalar(-0.5).exp().mul_scalar(DENSITY);
    (g.clone() * phi.clone(), phi + g * density)
}

/// The same by tanh.
pub(super) fn tanh_on_device(g: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let square = g.clone() * g.clone();
    let s = activation::sigmoid((g.clone() * square.clone().mul_scalar(CUBIC).add_scalar(1.0)).mul_scalar(SLOPE));
    let h = g * s.clone();
    let slope = square.mul_scalar(3.0 * CUBIC).add_scalar(1.0).mul_scalar(SLOPE);
    (h.clone(), s.clone() + h * s.neg().add_scalar(1.0) * slope)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// erf(x) by its series, in f64: exact to 1e-12 for |x| <= 4.
    fn reference(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn erf_agrees_with_its_series() {
        // Tables: erf(1) and erf(1/2).
        assert!((reference(1.0) - 0.842_700_792_949_714_9).abs() < 1e-14);
        assert!((reference(0.5) - 0.520_499_877_813_046_5).abs() < 1e-14);
        for i in -4000..=4000 {
            let x = i as f32 * 1e-3;
            assert!((f64::from(erf(x)) - reference(f64::from(x))).abs() < 4e-7, "erf({x})");
        }
        assert!((erf(1e30) - 1.0).abs() < 1e-6 && (erf(f32::NEG_INFINITY) + 1.0).abs() < 1e-6);
    }

    #[test]
    fn known_values() {
        // torch.nn.functional.gelu in f64, exact and by tanh.
        let x = [-3.0f32, -1.0, -0.1, 0.0, 0.5, 2.0, 6.0];
        let exact = [-0.004_049_694, -0.158_655_25, -0.046_017_216, 0.0, 0.345_731_23, 1.954_499_7, 6.0];
        let tanh = [-0.003_637_392, -0.158_808, -0.046_017_25, 0.0, 0.345_714, 1.954_597_7, 6.0];
        let (mut u, ones) = ([0.0; 7], [1.0; 7]);
        row(&x, &ones, &mut u);
        assert!(u.iter().zip(exact).all(|(a, b)| (a - b).abs() < 1e-6), "{u:?}");
        tanh_row(&x, &ones, &mut u);
        assert!(u.iter().zip(tanh).all(|(a, b)| (a - b).abs() < 1e-6), "{u:?}");
    }
}

//! Scalar functions in a form that compilers turn into SIMD: no branches, no calls.

/// e^x with a relative error below 2e-7 for x in [-87, 88]; saturates outside instead of overflowing.
///
/// Range reduction x = n ln2 + r with |r| <= ln2/2, degree-6 polynomial in r (coefficients of the Cephes library),
/// exponent bits from n.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4;
    let r = r + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    let exponent = (shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32).wrapping_add(127) as u32;
    y * f32::from_bits(exponent << 23)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// x * sigmoid(x).
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// d silu(x) / dx, given s = sigmoid(x).
#[inline(always)]
pub fn silu_derivative(x: f32, s: f32) -> f32 {
    s * (1.0 + x * (1.0 - s))
}

/// Dot product with 16 partial sums, for use inside functions compiled for several instruction sets.
#[inline(always)]
pub fn dot_inline(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0.0f32; 16];
    let (ca, cb) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = ca.remainder().iter().zip(cb.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in ca.zip(cb) {
        for i in 0..16 {
            acc[i] += x[i] * y[i];
        }
    }
    acc.iter().sum::<f32>() + tail
}

/// Sum with 16 partial sums, for use inside functions compiled for several instruction sets.
#[inline(always)]
pub fn sum_inline(values: impl ExactSizeIterator<Item = f32>) -> f32 {
    let mut acc = [0.0f32; 16];
    for (i, x) in values.enumerate() {
        acc[i % 16] += x;
    }
    acc.iter().sum()
}

/// Dot product with 16 partial sums.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    dot_inline(a, b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_over_its_range() {
        for i in -8700..=8800 {
            let x = i as f32 * 0.01;
            let expected = (x as f64).exp();
            let relative = ((exp(x) as f64 - expected) / expected).abs();
            assert!(relative < 3e-7, "exp({x}) = {}, expected {expected}", exp(x));
        }
        assert!(exp(-1e30) >= 0.0 && exp(-1e30) < 2e-38);
        assert!(exp(f32::NEG_INFINITY) < 2e-38);
        assert!(exp(1e30).is_finite());
    }

    #[test]
    fn silu_derivative_matches_a_difference_quotient() {
        for i in -60..=60 {
            let x = i as f32 * 0.1;
            let h = 1e-3f32;
            let difference = (silu(x + h) as f64 - silu(x - h) as f64) / (2.0 * h as f64);
            assert!((silu_derivative(x, sigmoid(x)) as f64 - difference).abs() < 1e-3, "at {x}");
        }
    }

    #[test]
    fn dot_handles_tails() {
        for n in [0, 1, 15, 16, 17, 100] {
            let a: Vec<f32> = (0..n).map(|i| i as f32 * 0.5).collect();
            let b: Vec<f32> = (0..n).map(|i| 1.0 - i as f32 * 0.25).collect();
            let expected: f64 = a.iter().zip(&b).map(|(x, y)| *x as f64 * *y as f64).sum();
            assert!((dot(&a, &b) as f64 - expected).abs() <= 1e-3 * expected.abs().max(1.0));
        }
    }
}

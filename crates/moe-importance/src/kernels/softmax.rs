//! Softmax of router logits.

use moe_core::kernels::math::exp;
use multiversion::multiversion;

/// Softmax of `logits [E]` into `out [E]`. All of them are -inf: all zeros.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
pub(crate) fn softmax(logits: &[f32], out: &mut [f32]) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if largest == f32::NEG_INFINITY {
        return out.fill(0.0);
    }
    out.iter_mut().zip(logits).for_each(|(p, logit)| *p = exp(logit - largest));
    let scale = 1.0 / moe_core::kernels::math::sum_inline(out.iter().copied());
    out.iter_mut().for_each(|p| *p *= scale);
}

#[cfg(test)]
mod tests {
    use super::softmax;

    #[test]
    fn probabilities_sum_to_one_and_survive_extremes() {
        let mut out = [0.0; 4];
        softmax(&[1000.0, 1000.0, 998.0, f32::NEG_INFINITY], &mut out);
        let e = (-2.0f32).exp();
        for (found, expected) in out.iter().zip([1.0 / (2.0 + e), 1.0 / (2.0 + e), e / (2.0 + e), 0.0]) {
            assert!((found - expected).abs() < 1e-6, "{out:?}");
        }
        softmax(&[f32::NEG_INFINITY; 4], &mut out);
        assert_eq!(out, [0.0; 4]);
    }
}

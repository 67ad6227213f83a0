//! Products of small matrices, row-major, on one thread: those of one chunk of one head.

use multiversion::multiversion;

use super::math;

/// `out [m, n] = a [m, width] b [n, width]^T`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
pub(super) fn product_nt(a: &[f32], b: &[f32], width: usize, out: &mut [f32]) {
    let n = b.len() / width;
    for (a, out) in a.chunks_exact(width).zip(out.chunks_exact_mut(n)) {
        for (b, out) in b.chunks_exact(width).zip(out) {
            *out = math::dot_inline(a, b);
        }
    }
}

/// `out [m, n] += a [m, inner] b [inner, n]`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
pub(super) fn add_product(a: &[f32], b: &[f32], inner: usize, out: &mut [f32], n: usize) {
    for (a, out) in a.chunks_exact(inner).zip(out.chunks_exact_mut(n)) {
        let (fours, fours_b) = (a.chunks_exact(4), b.chunks_exact(4 * n));
        let (rest, rest_b) = (fours.remainder(), fours_b.remainder());
        for (a, b) in fours.zip(fours_b) {
            let ((b0, b1), (b2, b3)) = (b[..2 * n].split_at(n), b[2 * n..].split_at(n));
            for j in 0..n {
                out[j] += a[0] * b0[j] + a[1] * b1[j] + a[2] * b2[j] + a[3] * b3[j];
            }
        }
        for (a, b) in rest.iter().zip(rest_b.chunks_exact(n)) {
            out.iter_mut().zip(b).for_each(|(out, b)| *out += a * b);
        }
    }
}

/// `out [m, n] += a [inner, m]^T b [inner, n]`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
pub(super) fn add_transposed_product(a: &[f32], b: &[f32], m: usize, out: &mut [f32], n: usize) {
    for (a, b) in a.chunks_exact(m).zip(b.chunks_exact(n)) {
        for (a, out) in a.iter().zip(out.chunks_exact_mut(n)) {
            if *a != 0.0 {
                out.iter_mut().zip(b).for_each(|(out, b)| *out += a * b);
            }
        }
    }
}

/// `out += factor x`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
pub(super) fn add_scaled(x: &[f32], factor: f32, out: &mut [f32]) {
    out.iter_mut().zip(x).for_each(|(out, x)| *out += factor * x);
}

/// `out -= sum of factors[j] rows[j]`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
pub(super) fn subtract_rows(factors: &[f32], rows: &[f32], out: &mut [f32]) {
    let n = out.len();
    for (factor, row) in factors.iter().zip(rows.chunks_exact(n)) {
        out.iter_mut().zip(row).for_each(|(out, x)| *out -= factor * x);
    }
}

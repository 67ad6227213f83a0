//! RMSNorm, forward and backward.

use burn::tensor::Tensor;
use multiversion::multiversion;

use super::{math, new_rows};
use crate::host::{self, HostView};

/// `y[t] = weight * x[t] / sqrt(mean(x[t]^2) + eps)` for `x [n, d]`, `weight [d]`.
pub fn rms_norm(x: &Tensor<2>, weight: &Tensor<1>, eps: f32) -> Tensor<2> {
    if host::is_host(&x.device()) { on_host(x, weight, eps) } else { on_device(x, weight, eps) }
}

/// Gradient of [`rms_norm`] with respect to `x`, given `dy [n, d]`.
pub fn rms_norm_backward(x: &Tensor<2>, weight: &Tensor<1>, eps: f32, dy: &Tensor<2>) -> Tensor<2> {
    if host::is_host(&x.device()) {
        backward_on_host(x, weight, eps, dy)
    } else {
        backward_on_device(x, weight, eps, dy)
    }
}

fn on_host(x: &Tensor<2>, weight: &Tensor<1>, eps: f32) -> Tensor<2> {
    let [n, d] = x.dims();
    let (xs, ws) = (HostView::new(x), HostView::new(weight));
    let (xs, ws) = (xs.as_slice(), ws.as_slice());
    let out = new_rows(n, d, |t, y| norm_row(&xs[t * d..(t + 1) * d], ws, eps, y));
    host::from_vec(out, [n, d], &x.device())
}

fn on_device(x: &Tensor<2>, weight: &Tensor<1>, eps: f32) -> Tensor<2> {
    x.clone() * inverse_rms(x, eps) * weight.clone().unsqueeze::<2>() // [n, d]
}

/// `1 / sqrt(mean(x^2) + eps)` as `[n, 1]`.
fn inverse_rms(x: &Tensor<2>, eps: f32) -> Tensor<2> {
    x.clone().powi_scalar(2).mean_dim(1).add_scalar(eps).sqrt().recip()
}

fn backward_on_host(x: &Tensor<2>, weight: &Tensor<1>, eps: f32, dy: &Tensor<2>) -> Tensor<2> {
    let [n, d] = x.dims();
    let (xs, ws, dys) = (HostView::new(x), HostView::new(weight), HostView::new(dy));
    let (xs, ws, dys) = (xs.as_slice(), ws.as_slice(), dys.as_slice());
    let out = new_rows(n, d, |t, dx| {
        let rows = t * d..(t + 1) * d;
        norm_row_backward(&xs[rows.clone()], ws, eps, &dys[rows], dx);
    });
    host::from_vec(out, [n, d], &x.device())
}

fn backward_on_device(x: &Tensor<2>, weight: &Tensor<1>, eps: f32, dy: &Tensor<2>) -> Tensor<2> {
    let d = x.dims()[1];
    let r = inverse_rms(x, eps); // [n, 1]
    let wdy = dy.clone() * weight.clone().unsqueeze::<2>(); // [n, d]
    let inner = (wdy.clone() * x.clone()).sum_dim(1); // [n, 1]
    let along = r.clone().powi_scalar(3) * inner / d as f32; // [n, 1]
    wdy * r - x.clone() * along
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn norm_row(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let r = 1.0 / (math::dot_inline(x, x) / x.len() as f32 + eps).sqrt();
    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
        *y = w * (x * r);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn norm_row_backward(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let d = x.len() as f32;
    let r = 1.0 / (math::dot_inline(x, x) / d + eps).sqrt();
    for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(weight) {
        *dx = w * dy;
    }
    let along = r * r * r * math::dot_inline(dx, x) / d;
    for (dx, x) in dx.iter_mut().zip(x) {
        *dx = *dx * r - x * along;
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, device, pattern};

    #[test]
    fn host_and_device_bodies_agree() {
        let (x, w) = (pattern([7, 37], 1), pattern([1, 37], 2).reshape([37]));
        let dy = pattern([7, 37], 3);
        assert_close(&on_host(&x, &w, 1e-6), &on_device(&x, &w, 1e-6), 1e-5);
        assert_close(&backward_on_host(&x, &w, 1e-6, &dy), &backward_on_device(&x, &w, 1e-6, &dy), 1e-5);
    }

    #[test]
    fn backward_matches_a_difference_quotient() {
        let (x, w, dy) = (pattern([1, 6], 1), pattern([1, 6], 2).reshape([6]), pattern([1, 6], 3));
        let dx = host::into_vec(rms_norm_backward(&x, &w, 1e-6, &dy));
        let xs = host::into_vec(x);
        for j in 0..6 {
            let at = |h: f32| -> f64 {
                let mut moved = xs.clone();
                moved[j] += h;
                let y = rms_norm(&host::from_vec(moved, [1, 6], &device()), &w, 1e-6);
                host::into_vec(y * dy.clone()).iter().map(|v| *v as f64).sum()
            };
            let difference = (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!((difference - dx[j] as f64).abs() < 2e-3, "dx[{j}] = {}, difference quotient {difference}", dx[j]);
        }
    }
}

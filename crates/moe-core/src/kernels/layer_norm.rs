//! LayerNorm with weight and bias, forward and backward.

use burn::tensor::Tensor;
use multiversion::multiversion;

use super::{math, new_rows};
use crate::host::{self, HostView};

/// `y[t] = weight * (x[t] - mean) / sqrt(variance + eps) + bias` for `x [n, d]`, `weight` and `bias [d]`; mean and
/// variance over the row.
pub fn layer_norm(x: &Tensor<2>, weight: &Tensor<1>, bias: &Tensor<1>, eps: f32) -> Tensor<2> {
    if host::is_host(&x.device()) { on_host(x, weight, bias, eps) } else { on_device(x, weight, bias, eps) }
}

/// Gradient of [`layer_norm`] with respect to `x`, given `dy [n, d]`.
pub fn layer_norm_backward(x: &Tensor<2>, weight: &Tensor<1>, eps: f32, dy: &Tensor<2>) -> Tensor<2> {
    if host::is_host(&x.device()) {
        backward_on_host(x, weight, eps, dy)
    } else {
        backward_on_device(x, weight, eps, dy)
    }
}

fn on_host(x: &Tensor<2>, weight: &Tensor<1>, bias: &Tensor<1>, eps: f32) -> Tensor<2> {
    let [n, d] = x.dims();
    let (xs, ws, bs) = (HostView::new(x), HostView::new(weight), HostView::new(bias));
    let (xs, ws, bs) = (xs.as_slice(), ws.as_slice(), bs.as_slice());
    let out = new_rows(n, d, |t, y| norm_row(&xs[t * d..(t + 1) * d], ws, bs, eps, y));
    host::from_vec(out, [n, d], &x.device())
}

fn on_device(x: &Tensor<2>, weight: &Tensor<1>, bias: &Tensor<1>, eps: f32) -> Tensor<2> {
    let (normed, _) = standardize(x, eps);
    normed * weight.clone().unsqueeze::<2>() + bias.clone().unsqueeze::<2>() // [n, d]
}

/// `(x - mean) / deviation [n, d]` and `1 / deviation [n, 1]`.
fn standardize(x: &Tensor<2>, eps: f32) -> (Tensor<2>, Tensor<2>) {
    let centered = x.clone() - x.clone().mean_dim(1);
    let inverse = centered.clone().powi_scalar(2).mean_dim(1).add_scalar(eps).sqrt().recip();
    (centered * inverse.clone(), inverse)
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
    let (normed, inverse) = standardize(x, eps);
    let wdy = dy.clone() * weight.clone().unsqueeze::<2>(); // [n, d]
    let along = (wdy.clone() * normed.clone()).mean_dim(1); // [n, 1]
    (wdy.clone() - wdy.mean_dim(1) - normed * along) * inverse
}

/// Mean and inverse deviation of a row; two passes, since the mean may be much larger than the deviation.
#[inline(always)]
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let d = x.len() as f32;
    let mean = math::sum_inline(x.iter().copied()) / d;
    let variance = math::sum_inline(x.iter().map(|x| (x - mean) * (x - mean))) / d;
    (mean, 1.0 / (variance + eps).sqrt())
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn norm_row(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
    let (mean, inverse) = moments(x, eps);
    for (((y, x), w), b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
        *y = w * ((x - mean) * inverse) + b;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn norm_row_backward(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let d = x.len() as f32;
    let (mean, inverse) = moments(x, eps);
    for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(weight) {
        *dx = w * dy;
    }
    let level = math::sum_inline(dx.iter().copied()) / d;
    let along = math::sum_inline(dx.iter().zip(x).map(|(dx, x)| dx * (x - mean) * inverse)) / d;
    for (dx, x) in dx.iter_mut().zip(x) {
        *dx = (*dx - level - (x - mean) * inverse * along) * inverse;
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, device, pattern};

    #[test]
    fn host_and_device_bodies_agree() {
        let vector = |seed| pattern([1, 37], seed).reshape([37]);
        let (x, w, b, dy) = (pattern([7, 37], 1), vector(2), vector(3), pattern([7, 37], 4));
        assert_close(&on_host(&x, &w, &b, 1e-5), &on_device(&x, &w, &b, 1e-5), 1e-5);
        assert_close(&backward_on_host(&x, &w, 1e-5, &dy), &backward_on_device(&x, &w, 1e-5, &dy), 1e-5);
    }

    #[test]
    fn backward_matches_a_difference_quotient() {
        let (x, w, dy) = (pattern([1, 6], 1), pattern([1, 6], 2).reshape([6]), pattern([1, 6], 3));
        let dx = host::into_vec(layer_norm_backward(&x, &w, 1e-5, &dy));
        let xs = host::into_vec(x);
        for j in 0..6 {
            let at = |h: f32| -> f64 {
                let mut moved = xs.clone();
                moved[j] += h;
                let y = layer_norm(&host::from_vec(moved, [1, 6], &device()), &w, &w, 1e-5);
                host::into_vec(y * dy.clone()).iter().map(|v| *v as f64).sum()
            };
            let difference = (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!((difference - dx[j] as f64).abs() < 2e-3, "dx[{j}] = {}, difference quotient {difference}", dx[j]);
        }
    }
}

//! The gated unit `u = silu(g) * v` on stacked pre-activations, forward and backward.

use burn::tensor::{Tensor, activation};
use multiversion::multiversion;

use super::{for_rows_mut, math, zeros};
use crate::host::{self, HostView};

/// `u [n, I] = silu(g) * v` for `gate_up [n, 2I] = [g | v]`.
pub fn swiglu(gate_up: &Tensor<2>) -> Tensor<2> {
    if host::is_host(&gate_up.device()) { on_host(gate_up) } else { on_device(gate_up) }
}

/// Gradients of [`swiglu`].
#[derive(Debug)]
pub struct SwigluGradients {
    /// The unit activations again, `u [n, I]`.
    pub units: Tensor<2>,
    /// d loss / d u with the row weight applied, `[n, I]`; only where asked for.
    pub d_units: Option<Tensor<2>>,
    /// d loss / d `[g | v]` with the row weight applied, `[n, 2I]`.
    pub d_gate_up: Tensor<2>,
    /// `sum_j du[t,j] u[t,j]` without the row weight `[n]`: the gradient of a factor on row t of the block's output.
    pub d_row_weights: Vec<f32>,
}

/// Backward of `row_weights[t] * down(swiglu(gate_up[t]))` from `du [n, I]`, the gradient at the units of the *unweighted*
/// output. `row_weights` of `None` are ones.
pub fn swiglu_backward(
    gate_up: &Tensor<2>,
    du: Tensor<2>,
    row_weights: Option<&[f32]>,
    want_d_units: bool,
) -> SwigluGradients {
    if host::is_host(&gate_up.device()) {
        backward_on_host(gate_up, du, row_weights, want_d_units)
    } else {
        backward_on_device(gate_up, du, row_weights, want_d_units)
    }
}

fn on_host(gate_up: &Tensor<2>) -> Tensor<2> {
    let [n, double] = gate_up.dims();
    let width = double / 2;
    let view = HostView::new(gate_up);
    let values = view.as_slice();
    let mut out = zeros(n * width);
    for_rows_mut(&mut out, width, |t, u| {
        let (g, v) = values[t * double..(t + 1) * double].split_at(width);
        swiglu_row(g, v, u);
    });
    host::from_vec(out, [n, width], &gate_up.device())
}

fn on_device(gate_up: &Tensor<2>) -> Tensor<2> {
    let width = gate_up.dims()[1] / 2;
    let (g, v) = (gate_up.clone().narrow(1, 0, width), gate_up.clone().narrow(1, width, width));
    activation::silu(g) * v
}

fn backward_on_host(
    gate_up: &Tensor<2>,
    du: Tensor<2>,
    row_weights: Option<&[f32]>,
    want_d_units: bool,
) -> SwigluGradients {
    let ([n, double], device) = (gate_up.dims(), gate_up.device());
    let width = double / 2;
    let view = HostView::new(gate_up);
    let values = view.as_slice();
    let mut d_units = host::into_vec(du); // scaled in place by the row weights
    let mut units = zeros(n * width);
    let mut d_gate_up = zeros(n * double);
    let mut d_row_weights = zeros(n);
    let step = super::rows_per_piece(double);
    use rayon::prelude::*;
    if width > 0 {
        units
            .par_chunks_mut(step * width)
            .zip(d_units.par_chunks_mut(step * width))
            .zip(d_gate_up.par_chunks_mut(step * double))
            .zip(d_row_weights.par_chunks_mut(step))
            .enumerate()
            .for_each(|(piece, (((units, d_units), d_gate_up), d_row_weights))| {
                for (i, dw) in d_row_weights.iter_mut().enumerate() {
                    let t = piece * step + i;
                    let (g, v) = values[t * double..(t + 1) * double].split_at(width);
                    let (dg, dv) = d_gate_up[i * double..(i + 1) * double].split_at_mut(width);
                    let weight = row_weights.map_or(1.0, |w| w[t]);
                    let columns = i * width..(i + 1) * width;
                    let u = &mut units[columns.clone()];
                    let du = &mut d_units[columns];
                    swiglu_row(g, v, u);
                    *dw = math::dot(du, u);
                    swiglu_row_backward(g, v, weight, du, dg, dv);
                }
            });
    }
    SwigluGradients {
        units: host::from_vec(units, [n, width], &device),
        d_units: want_d_units.then(|| host::from_vec(d_units, [n, width], &device)),
        d_gate_up: host::from_vec(d_gate_up, [n, double], &device),
        d_row_weights,
    }
}

fn backward_on_device(
    gate_up: &Tensor<2>,
    du: Tensor<2>,
    row_weights: Option<&[f32]>,
    want_d_units: bool,
) -> SwigluGradients {
    let [n, double] = gate_up.dims();
    let width = double / 2;
    let (g, v) = (gate_up.clone().narrow(1, 0, width), gate_up.clone().narrow(1, width, width)); // [n, I]
    let s = activation::sigmoid(g.clone());
    let silu = g.clone() * s.clone();
    let units = silu.clone() * v.clone();
    let d_row_weights = host::into_vec((du.clone() * units.clone()).sum_dim(1).reshape([n]));
    let du = match row_weights {
        Some(w) => du * host::from_vec(w.to_vec(), [n, 1], &gate_up.device()),
        None => du,
    };
    // d silu = s (1 + g (1 - s))
    let derivative = s.clone() * (g * (s.neg().add_scalar(1.0))).add_scalar(1.0);
    let d_gate_up = Tensor::cat(vec![du.clone() * v * derivative, du.clone() * silu], 1); // [n, 2I]
    SwigluGradients { units, d_units: want_d_units.then_some(du), d_gate_up, d_row_weights }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn swiglu_row(g: &[f32], v: &[f32], u: &mut [f32]) {
    for ((u, g), v) in u.iter_mut().zip(g).zip(v) {
        *u = math::silu(*g) * v;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn swiglu_row_backward(g: &[f32], v: &[f32], weight: f32, du: &mut [f32], dg: &mut [f32], dv: &mut [f32]) {
    for ((((g, v), du), dg), dv) in g.iter().zip(v).zip(du).zip(dg).zip(dv) {
        let s = math::sigmoid(*g);
        let d = *du * weight;
        *du = d;
        *dg = d * v * math::silu_derivative(*g, s);
        *dv = d * g * s;
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, pattern};

    #[test]
    fn host_and_device_bodies_agree() {
        for (n, width) in [(1, 1), (5, 7), (40, 33)] {
            let (gate_up, du) = (pattern([n, 2 * width], 1), pattern([n, width], 2));
            assert_close(&on_host(&gate_up), &on_device(&gate_up), 1e-5);
            let weights: Vec<f32> = (0..n).map(|i| 0.1 + i as f32 * 0.05).collect();
            let a = backward_on_host(&gate_up, du.clone(), Some(&weights), true);
            let b = backward_on_device(&gate_up, du.clone(), Some(&weights), true);
            assert_close(&a.units, &b.units, 1e-5);
            assert_close(&a.d_gate_up, &b.d_gate_up, 1e-5);
            assert_close(&a.d_units.unwrap(), &b.d_units.unwrap(), 1e-5);
            for (x, y) in a.d_row_weights.iter().zip(&b.d_row_weights) {
                assert!((x - y).abs() < 1e-4, "{x} {y}");
            }
        }
    }

    #[test]
    fn width_zero_is_empty() {
        let gate_up = Tensor::<2>::zeros([3, 0], &crate::kernels::testing::device());
        assert_eq!(swiglu(&gate_up).dims(), [3, 0]);
        let gradients = swiglu_backward(&gate_up, gate_up.clone(), None, true);
        assert_eq!(gradients.d_gate_up.dims(), [3, 0]);
        assert_eq!(gradients.d_row_weights, vec![0.0; 3]);
    }
}

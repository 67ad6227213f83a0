//! The gated unit on stacked pre-activations (arXiv 2002.05202), forward and backward: SwiGLU `u = silu(g) * v`, its
//! clamped form in gpt-oss, and GEGLU `u = gelu(g) * v`.

use burn::tensor::{Bool, Tensor, activation};
use multiversion::multiversion;

use super::{gelu, math, new_rows, zeroed, zeros};
use crate::host::{self, HostView};

/// How gate and up become a unit.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum GatedActivation {
    /// `silu(g) * v`.
    #[default]
    Silu,
    /// `g' sigmoid(alpha g') (v' + 1)` with `g' = min(g, limit)` and `v'` clamped to `[-limit, limit]`; gradients of
    /// clamped values are zero.
    ClampedSilu {
        /// Slope inside the sigmoid.
        alpha: f32,
        /// Bound of gate and up.
        limit: f32,
    },
    /// `gelu(g) * v` with `gelu(x) = x Phi(x)`.
    Gelu,
    /// `gelu(g) * v` with the approximation by tanh.
    GeluTanh,
    /// `relu(g) * v`.
    Relu,
    /// `silu(min(g, limit)) * v'` with `v'` clamped to `[-limit, limit]`; gradients of clamped values are zero.
    LimitedSilu {
        /// Bound of gate and up.
        limit: f32,
    },
    /// `min(silu(g), limit) * v'` with `v'` clamped to `[-limit, limit]`; gradients of clamped values are zero.
    BoundedSilu {
        /// Bound of the activated gate and of up.
        limit: f32,
    },
}

/// Units `[n, I]` of `gate_up [n, 2I] = [g | v]`.
pub fn swiglu(gate_up: &Tensor<2>, kind: GatedActivation) -> Tensor<2> {
    if host::is_host(&gate_up.device()) { on_host(gate_up, kind) } else { on_device(gate_up, kind) }
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

/// Backward of `row_weights[t] * down(swiglu(gate_up[t]))` from `du [n, I]`, the gradient at the units of the
/// *unweighted* output. `row_weights` of `None` are ones.
pub fn swiglu_backward(
    gate_up: &Tensor<2>,
    kind: GatedActivation,
    du: Tensor<2>,
    row_weights: Option<&[f32]>,
    want_d_units: bool,
) -> SwigluGradients {
    if host::is_host(&gate_up.device()) {
        backward_on_host(gate_up, kind, du, row_weights, want_d_units)
    } else {
        backward_on_device(gate_up, kind, du, row_weights, want_d_units)
    }
}

fn on_host(gate_up: &Tensor<2>, kind: GatedActivation) -> Tensor<2> {
    let [n, double] = gate_up.dims();
    let width = double / 2;
    let view = HostView::new(gate_up);
    let values = view.as_slice();
    let out = new_rows(n, width, |t, u| {
        let (g, v) = values[t * double..(t + 1) * double].split_at(width);
        kind.row(g, v, u);
    });
    host::from_vec(out, [n, width], &gate_up.device())
}

fn on_device(gate_up: &Tensor<2>, kind: GatedActivation) -> Tensor<2> {
    let DeviceUnit { h, w, .. } = kind.on_device(gate_up);
    h * w
}

fn backward_on_host(
    gate_up: &Tensor<2>,
    kind: GatedActivation,
    du: Tensor<2>,
    row_weights: Option<&[f32]>,
    want_d_units: bool,
) -> SwigluGradients {
    let ([n, double], device) = (gate_up.dims(), gate_up.device());
    let width = double / 2;
    let view = HostView::new(gate_up);
    let values = view.as_slice();
    let mut d_units = host::into_vec(du); // scaled in place by the row weights
    let (mut units, mut d_gate_up) = (Vec::with_capacity(n * width), Vec::with_capacity(n * double));
    let mut d_row_weights = zeros(n);
    let step = super::rows_per_piece(double);
    use rayon::prelude::*;
    if width > 0 {
        units.spare_capacity_mut()[..n * width]
            .par_chunks_mut(step * width)
            .zip(d_units.par_chunks_mut(step * width))
            .zip(d_gate_up.spare_capacity_mut()[..n * double].par_chunks_mut(step * double))
            .zip(d_row_weights.par_chunks_mut(step))
            .enumerate()
            .for_each(|(piece, (((units, d_units), d_gate_up), d_row_weights))| {
                let (units, d_gate_up) = (zeroed(units), zeroed(d_gate_up));
                for (i, dw) in d_row_weights.iter_mut().enumerate() {
                    let t = piece * step + i;
                    let (g, v) = values[t * double..(t + 1) * double].split_at(width);
                    let (dg, dv) = d_gate_up[i * double..(i + 1) * double].split_at_mut(width);
                    let weight = row_weights.map_or(1.0, |w| w[t]);
                    let columns = i * width..(i + 1) * width;
                    let u = &mut units[columns.clone()];
                    let du = &mut d_units[columns];
                    kind.row(g, v, u);
                    *dw = math::dot(du, u);
                    kind.row_backward(g, v, weight, du, dg, dv);
                }
            });
    }
    // SAFETY: the pieces cover both, and each was zeroed; without columns, both are empty.
    unsafe {
        units.set_len(n * width);
        d_gate_up.set_len(n * double);
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
    kind: GatedActivation,
    du: Tensor<2>,
    row_weights: Option<&[f32]>,
    want_d_units: bool,
) -> SwigluGradients {
    let n = gate_up.dims()[0];
    let DeviceUnit { h, derivative, w, clamped } = kind.on_device(gate_up);
    let units = h.clone() * w.clone();
    let d_row_weights = host::into_vec((du.clone() * units.clone()).sum_dim(1).reshape([n]));
    let du = match row_weights {
        Some(weights) => du * host::from_vec(weights.to_vec(), [n, 1], &gate_up.device()),
        None => du,
    };
    let (mut dg, mut dv) = (du.clone() * w * derivative, du.clone() * h);
    if let Some((gate, up)) = clamped {
        (dg, dv) = (dg.mask_fill(gate, 0.0), dv.mask_fill(up, 0.0));
    }
    let d_gate_up = Tensor::cat(vec![dg, dv], 1); // [n, 2I]
    SwigluGradients { units, d_units: want_d_units.then_some(du), d_gate_up, d_row_weights }
}

/// The unit as tensor operations: every kind is `h(g) w(v)`.
struct DeviceUnit {
    /// `h(g) [n, I]`.
    h: Tensor<2>,
    /// `h'(g) [n, I]`.
    derivative: Tensor<2>,
    /// `w(v) [n, I]`, `v` or `v + 1`.
    w: Tensor<2>,
    /// Where gate and up are clamped, so that their gradient is zero `[n, I]`.
    clamped: Option<(Tensor<2, Bool>, Tensor<2, Bool>)>,
}

impl GatedActivation {
    fn on_device(self, gate_up: &Tensor<2>) -> DeviceUnit {
        let width = gate_up.dims()[1] / 2;
        let (g, v) = (gate_up.clone().narrow(1, 0, width), gate_up.clone().narrow(1, width, width)); // [n, I]
        // x sigmoid(alpha x) and its derivative, s (1 + alpha x (1 - s))
        let silu = |x: Tensor<2>, alpha: f32| {
            let s = activation::sigmoid(x.clone().mul_scalar(alpha));
            let slope = (x.clone().mul_scalar(alpha) * s.clone().neg().add_scalar(1.0)).add_scalar(1.0);
            (x * s.clone(), s * slope)
        };
        let ((h, derivative), w, clamped) = match self {
            Self::Silu => (silu(g, 1.0), v, None),
            Self::ClampedSilu { alpha, limit } => {
                let clamped = (g.clone().greater_elem(limit), v.clone().abs().greater_elem(limit));
                (silu(g.clamp_max(limit), alpha), v.clamp(-limit, limit).add_scalar(1.0), Some(clamped))
            }
            Self::Gelu => (gelu::on_device(g), v, None),
            Self::GeluTanh => (gelu::tanh_on_device(g), v, None),
            Self::Relu => ((activation::relu(g.clone()), g.greater_elem(0.0).float()), v, None),
            Self::LimitedSilu { limit } => {
                let clamped = (g.clone().greater_elem(limit), v.clone().abs().greater_elem(limit));
                (silu(g.clamp_max(limit), 1.0), v.clamp(-limit, limit), Some(clamped))
            }
            Self::BoundedSilu { limit } => {
                let (h, derivative) = silu(g, 1.0);
                let clamped = (h.clone().greater_elem(limit), v.clone().abs().greater_elem(limit));
                ((h.clamp_max(limit), derivative), v.clamp(-limit, limit), Some(clamped))
            }
        };
        DeviceUnit { h, derivative, w, clamped }
    }

    fn row(self, g: &[f32], v: &[f32], u: &mut [f32]) {
        match self {
            Self::Silu => swiglu_row(g, v, u),
            Self::ClampedSilu { alpha, limit } => clamped_row(g, v, alpha, limit, u),
            Self::Gelu => gelu::row(g, v, u),
            Self::GeluTanh => gelu::tanh_row(g, v, u),
            Self::Relu => u.iter_mut().zip(g).zip(v).for_each(|((u, g), v)| *u = g.max(0.0) * v),
            Self::LimitedSilu { limit } => limited_row(g, v, limit, u),
            Self::BoundedSilu { limit } => bounded_row(g, v, limit, u),
        }
    }

    fn row_backward(self, g: &[f32], v: &[f32], weight: f32, du: &mut [f32], dg: &mut [f32], dv: &mut [f32]) {
        du.iter_mut().for_each(|d| *d *= weight);
        match self {
            Self::Silu => swiglu_row_backward(g, v, du, dg, dv),
            Self::ClampedSilu { alpha, limit } => clamped_row_backward(g, v, alpha, limit, du, dg, dv),
            Self::Gelu => gelu::row_backward(g, v, du, dg, dv),
            Self::GeluTanh => gelu::tanh_row_backward(g, v, du, dg, dv),
            Self::Relu => relu_row_backward(g, v, du, dg, dv),
            Self::LimitedSilu { limit } => limited_row_backward(g, v, limit, du, dg, dv),
            Self::BoundedSilu { limit } => bounded_row_backward(g, v, limit, du, dg, dv),
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn swiglu_row(g: &[f32], v: &[f32], u: &mut [f32]) {
    for ((u, g), v) in u.iter_mut().zip(g).zip(v) {
        *u = math::silu(*g) * v;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn swiglu_row_backward(g: &[f32], v: &[f32], du: &[f32], dg: &mut [f32], dv: &mut [f32]) {
    for ((((g, v), d), dg), dv) in g.iter().zip(v).zip(du).zip(dg).zip(dv) {
        let s = math::sigmoid(*g);
        *dg = d * v * math::silu_derivative(*g, s);
        *dv = d * g * s;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn limited_row(g: &[f32], v: &[f32], limit: f32, u: &mut [f32]) {
    for ((u, g), v) in u.iter_mut().zip(g).zip(v) {
        *u = math::silu(g.min(limit)) * v.clamp(-limit, limit);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn limited_row_backward(g: &[f32], v: &[f32], limit: f32, du: &[f32], dg: &mut [f32], dv: &mut [f32]) {
    for ((((g, v), d), dg), dv) in g.iter().zip(v).zip(du).zip(dg).zip(dv) {
        let (gate, up) = (g.min(limit), v.clamp(-limit, limit));
        let s = math::sigmoid(gate);
        *dg = if *g > limit { 0.0 } else { d * up * math::silu_derivative(gate, s) };
        *dv = if v.abs() > limit { 0.0 } else { d * gate * s };
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn clamped_row(g: &[f32], v: &[f32], alpha: f32, limit: f32, u: &mut [f32]) {
    for ((u, g), v) in u.iter_mut().zip(g).zip(v) {
        let g = g.min(limit);
        *u = g * math::sigmoid(alpha * g) * (v.clamp(-limit, limit) + 1.0);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn clamped_row_backward(g: &[f32], v: &[f32], alpha: f32, limit: f32, du: &[f32], dg: &mut [f32], dv: &mut [f32]) {
    for ((((g, v), d), dg), dv) in g.iter().zip(v).zip(du).zip(dg).zip(dv) {
        let (inside_g, inside_v) = (*g <= limit, v.abs() <= limit);
        let (g, v) = (g.min(limit), v.clamp(-limit, limit) + 1.0);
        let s = math::sigmoid(alpha * g);
        *dg = if inside_g { d * v * math::silu_derivative(alpha * g, s) } else { 0.0 };
        *dv = if inside_v { d * g * s } else { 0.0 };
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn bounded_row(g: &[f32], v: &[f32], limit: f32, u: &mut [f32]) {
    for ((u, g), v) in u.iter_mut().zip(g).zip(v) {
        *u = math::silu(*g).min(limit) * v.clamp(-limit, limit);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn bounded_row_backward(g: &[f32], v: &[f32], limit: f32, du: &[f32], dg: &mut [f32], dv: &mut [f32]) {
    for ((((g, v), d), dg), dv) in g.iter().zip(v).zip(du).zip(dg).zip(dv) {
        let s = math::sigmoid(*g);
        let (inside_h, inside_v) = (g * s <= limit, v.abs() <= limit);
        *dg = if inside_h { d * v.clamp(-limit, limit) * math::silu_derivative(*g, s) } else { 0.0 };
        *dv = if inside_v { d * (g * s).min(limit) } else { 0.0 };
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn relu_row_backward(g: &[f32], v: &[f32], du: &[f32], dg: &mut [f32], dv: &mut [f32]) {
    for ((((g, v), d), dg), dv) in g.iter().zip(v).zip(du).zip(dg).zip(dv) {
        *dg = if *g > 0.0 { d * v } else { 0.0 };
        *dv = d * g.max(0.0);
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, device, pattern};

    /// The limit is inside the range of the patterns, so that clamping happens.
    const KINDS: [GatedActivation; 7] = [
        GatedActivation::Silu,
        GatedActivation::ClampedSilu { alpha: 1.7, limit: 0.6 },
        GatedActivation::BoundedSilu { limit: 0.3 },
        GatedActivation::LimitedSilu { limit: 0.4 },
        GatedActivation::Gelu,
        GatedActivation::GeluTanh,
        GatedActivation::Relu,
    ];

    #[test]
    fn host_and_device_bodies_agree() {
        for kind in KINDS {
            for (n, width) in [(1, 1), (5, 7), (40, 33)] {
                let (gate_up, du) = (pattern([n, 2 * width], 1), pattern([n, width], 2));
                assert_close(&on_host(&gate_up, kind), &on_device(&gate_up, kind), 1e-5);
                let weights: Vec<f32> = (0..n).map(|i| 0.1 + i as f32 * 0.05).collect();
                let a = backward_on_host(&gate_up, kind, du.clone(), Some(&weights), true);
                let b = backward_on_device(&gate_up, kind, du.clone(), Some(&weights), true);
                assert_close(&a.units, &b.units, 1e-5);
                assert_close(&a.d_gate_up, &b.d_gate_up, 1e-5);
                assert_close(&a.d_units.unwrap(), &b.d_units.unwrap(), 1e-5);
                for (x, y) in a.d_row_weights.iter().zip(&b.d_row_weights) {
                    assert!((x - y).abs() < 1e-4, "{x} {y}");
                }
            }
        }
    }

    #[test]
    fn backward_matches_a_difference_quotient() {
        for kind in KINDS {
            let (gate_up, du) = (pattern([2, 12], 5), pattern([2, 6], 6));
            let found = host::into_vec(swiglu_backward(&gate_up, kind, du.clone(), Some(&[1.0, 2.0]), false).d_gate_up);
            let values = host::into_vec(gate_up);
            let weighted = du * host::from_vec(vec![1.0, 2.0], [2, 1], &device());
            let at = |i: usize, h: f32| -> f64 {
                let mut moved = values.clone();
                moved[i] += h;
                let units = swiglu(&host::from_vec(moved, [2, 12], &device()), kind);
                host::into_vec(units * weighted.clone()).iter().map(|x| f64::from(*x)).sum()
            };
            for (i, found) in found.into_iter().enumerate() {
                let numeric = (at(i, 1e-3) - at(i, -1e-3)) / 2e-3;
                assert!((numeric - f64::from(found)).abs() < 1e-3, "{kind:?} {i}: {found} and {numeric}");
            }
        }
    }

    #[test]
    fn width_zero_is_empty() {
        let gate_up = Tensor::<2>::zeros([3, 0], &device());
        assert_eq!(swiglu(&gate_up, GatedActivation::Silu).dims(), [3, 0]);
        let gradients = swiglu_backward(&gate_up, GatedActivation::Silu, gate_up.clone(), None, true);
        assert_eq!(gradients.d_gate_up.dims(), [3, 0]);
        assert_eq!(gradients.d_row_weights, vec![0.0; 3]);
    }
}

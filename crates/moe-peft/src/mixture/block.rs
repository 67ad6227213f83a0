//! Mixtures beside a feed-forward block as a whole.

use std::sync::Arc;

use burn::tensor::Tensor;
use moe_core::{
    adapters::{BlockAdapter, Tokens, Wanted},
    experts::ExpertTensors,
    host::{self, HostView},
    kernels::{
        product::{Matrix, product},
        swiglu::swiglu_backward,
    },
};

use super::router::Router;
use crate::{Live, lora::Dropout};

/// `f(x) = sum_e w_e FFN_e(x)`, where `FFN_e` is the frozen block with the LoRA of expert e on gate, up and down, and
/// one router decides for all three.
///
/// The frozen gate and up are computed once for all experts, and so is the frozen down, which is linear: it is given
/// `sum_e w_e u_e`.
#[derive(Debug)]
pub(crate) struct MixtureBlock {
    pub router: Arc<Router>,
    /// Gate, up and down: `A [N r, in]`, `B [out, N r]` of all experts.
    pub maps: [(Arc<Live>, Arc<Live>); 3],
    pub rank: usize,
    pub scale: f32,
    pub trained: bool,
    /// Of the inputs of gate, up and down.
    pub dropout: [Option<Dropout>; 3],
}

/// An expert's pass over its tokens.
struct Expert {
    rows: Vec<usize>,
    gate_up: Tensor<2>,
    units: Tensor<2>,
    /// Inputs of gate, up and down as their LoRA sees them, with what dropout did.
    inputs: [(Vec<f32>, Option<Vec<f32>>); 3],
    /// `s B A` of the units `[m, H]`.
    down: Vec<f32>,
}

/// Rows of a matrix.
fn gather(values: &[f32], width: usize, rows: &[usize]) -> Vec<f32> {
    rows.iter().flat_map(|row| values[row * width..(row + 1) * width].iter().copied()).collect()
}

impl MixtureBlock {
    /// `s B_e A_e x` of one map, added to columns of `out` from `first`; `x [m, in]`.
    fn add(&self, map: usize, expert: usize, x: &[f32], m: usize, out: &mut [f32], (width, first): (usize, usize)) {
        let (a, b) = &self.maps[map];
        let ([all, inputs], [outputs, _], r) = (a.shape(), b.shape(), self.rank);
        let (a, b) = (a.value(), b.value());
        let (a, b) = (HostView::new(&a), HostView::new(&b));
        let a = Matrix::new(&a.as_slice()[expert * r * inputs..(expert + 1) * r * inputs], r, inputs);
        let b = Matrix::new(b.as_slice(), outputs, all).columns(expert * r..(expert + 1) * r);
        let mut hidden = vec![0.0; m * r];
        product(&mut hidden, r, 0, false, 1.0, Matrix::new(x, m, inputs), a.transposed());
        product(out, width, first, true, self.scale, Matrix::new(&hidden, m, r), b.transposed());
    }

    /// Gradients of one map of an expert from columns of `dy` from `first`; that at its input is added to `dx [m, in]`.
    #[allow(clippy::too_many_arguments)]
    fn gradients(
        &self,
        map: usize,
        expert: usize,
        x: &[f32],
        m: usize,
        (dy, width, first): (&[f32], usize, usize),
        dx: &mut [f32],
        parameters: bool,
    ) {
        let (live_a, live_b) = &self.maps[map];
        let ([all, inputs], [outputs, _], r) = (live_a.shape(), live_b.shape(), self.rank);
        let (a, b) = (live_a.value(), live_b.value());
        let (a, b) = (HostView::new(&a), HostView::new(&b));
        let range = expert * r * inputs..(expert + 1) * r * inputs;
        let a = Matrix::new(&a.as_slice()[range.clone()], r, inputs);
        let b = Matrix::new(b.as_slice(), outputs, all).columns(expert * r..(expert + 1) * r);
        let (x, dy) = (Matrix::new(x, m, inputs), Matrix::new(dy, m, width).columns(first..first + outputs));
        let mut d_hidden = vec![0.0; m * r];
        product(&mut d_hidden, r, 0, false, self.scale, dy, b);
        let d_hidden = Matrix::new(&d_hidden, m, r);
        product(dx, inputs, 0, true, 1.0, d_hidden, a);
        if parameters && self.trained {
            let mut hidden = vec![0.0; m * r];
            product(&mut hidden, r, 0, false, 1.0, x, a.transposed());
            let hidden = Matrix::new(&hidden, m, r);
            live_a.add_gradient(|sum| product(&mut sum[range], inputs, 0, true, 1.0, d_hidden.transposed(), x));
            live_b.add_gradient(|sum| product(sum, all, expert * r, true, self.scale, dy.transposed(), hidden));
        }
    }

    fn expert(
        &self,
        base: &ExpertTensors,
        expert: usize,
        rows: Vec<usize>,
        (x, gate_up): (&Tensor<2>, &[f32]),
        tokens: Tokens<'_>,
    ) -> Expert {
        let (device, [_, hidden], m) = (x.device(), x.dims(), rows.len());
        let width = base.width();
        let own: Vec<u32> = rows.iter().map(|row| tokens.token(*row) as u32).collect();
        let input = gather(HostView::new(x).as_slice(), hidden, &rows);
        let drop = |map: usize, input: &[f32]| match Dropout::apply(
            self.dropout[map].as_ref(),
            input,
            m,
            Tokens::Rows(&own),
        ) {
            Some((dropped, factors)) => (dropped, Some(factors)),
            None => (input.to_vec(), None),
        };
        let (gate, up) = (drop(0, &input), drop(1, &input));
        let mut values = gather(gate_up, 2 * width, &rows);
        self.add(0, expert, &gate.0, m, &mut values, (2 * width, 0));
        self.add(1, expert, &up.0, m, &mut values, (2 * width, width));
        let gate_up = host::from_vec(values, [m, 2 * width], &device);
        let units = base.units(&gate_up);
        let down_input = drop(2, HostView::new(&units).as_slice());
        let mut down = vec![0.0; m * hidden];
        self.add(2, expert, &down_input.0, m, &mut down, (hidden, 0));
        Expert { rows, gate_up, units, inputs: [gate, up, down_input], down }
    }

    /// Rows that use each expert.
    fn users(&self, weights: &[f32], n: usize) -> Vec<Vec<usize>> {
        let width = self.router.width;
        (0..width).map(|e| (0..n).filter(|row| weights[row * width + e] != 0.0).collect()).collect()
    }
}

impl BlockAdapter for MixtureBlock {
    fn forward(&self, base: &ExpertTensors, x: &Tensor<2>, tokens: Tokens<'_>) -> Tensor<2> {
        let ([n, hidden], device, experts) = (x.dims(), x.device(), self.router.width);
        if n == 0 {
            return x.clone();
        }
        let view = HostView::new(x);
        let z = self.router.logits(Matrix::new(view.as_slice(), n, hidden), n, &[]);
        let weights = self.router.gates(&z, n, tokens).weights;
        let gate_up = base.pre_activations_for(x, tokens);
        let gate_up = HostView::new(&gate_up);
        let width = base.width();
        let (mut units, mut added) = (vec![0.0; n * width], vec![0.0; n * hidden]);
        for (expert, rows) in self.users(&weights, n).into_iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
            let pass = self.expert(base, expert, rows, (x, gate_up.as_slice()), tokens);
            let u = HostView::new(&pass.units);
            for (i, row) in pass.rows.iter().enumerate() {
                let w = weights[row * experts + expert];
                let add = |sum: &mut [f32], values: &[f32]| sum.iter_mut().zip(values).for_each(|(s, v)| *s += w * v);
                add(&mut units[row * width..(row + 1) * width], &u.as_slice()[i * width..(i + 1) * width]);
                add(&mut added[row * hidden..(row + 1) * hidden], &pass.down[i * hidden..(i + 1) * hidden]);
            }
        }
        let output = base.output_for(&host::from_vec(units, [n, width], &device), tokens);
        let mut output = host::into_vec(output);
        output.iter_mut().zip(added).for_each(|(y, a)| *y += a);
        host::from_vec(output, [n, hidden], &device)
    }

    fn backward(
        &self,
        base: &ExpertTensors,
        x: &Tensor<2>,
        dy: &Tensor<2>,
        tokens: Tokens<'_>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let ([n, hidden], device, experts) = (x.dims(), x.device(), self.router.width);
        if n == 0 {
            return wanted.input.then(|| x.clone());
        }
        let (xs, dys) = (HostView::new(x), HostView::new(dy));
        let whole = Matrix::new(xs.as_slice(), n, hidden);
        let z = self.router.logits(whole, n, &[]);
        let gated = self.router.gates(&z, n, tokens);
        let gate_up = base.pre_activations_for(x, tokens);
        let gate_up = HostView::new(&gate_up);
        let width = base.width();
        // at the frozen down projection's input, without the weights of the experts
        let d_units = base.down.backward(dy);
        let d_units = HostView::new(&d_units);
        let mut d_gate_up = vec![0.0; n * 2 * width];
        let mut dx = vec![0.0; n * hidden];
        let mut dw = vec![0.0; n * experts];
        for (expert, rows) in self.users(&gated.weights, n).into_iter().enumerate().filter(|(_, rows)| !rows.is_empty())
        {
            let pass = self.expert(base, expert, rows, (x, gate_up.as_slice()), tokens);
            let m = pass.rows.len();
            let mut dy = gather(dys.as_slice(), hidden, &pass.rows);
            let mut du = gather(d_units.as_slice(), width, &pass.rows);
            let u = HostView::new(&pass.units);
            for (i, row) in pass.rows.iter().enumerate() {
                let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
                let (own, units) = (i * hidden..(i + 1) * hidden, i * width..(i + 1) * width);
                dw[row * experts + expert] = dot(&dy[own.clone()], &pass.down[own.clone()])
                    + dot(&du[units.clone()], &u.as_slice()[units.clone()]);
                let w = gated.weights[row * experts + expert];
                dy[own].iter_mut().for_each(|d| *d *= w);
                du[units].iter_mut().for_each(|d| *d *= w);
            }
            let back = |d: Vec<f32>, factors: &Option<Vec<f32>>| match factors {
                Some(factors) => d.iter().zip(factors).map(|(d, f)| d * f).collect(),
                None => d,
            };
            let mut apart = vec![0.0; m * width];
            let (input, factors) = &pass.inputs[2];
            self.gradients(2, expert, input, m, (&dy, hidden, 0), &mut apart, wanted.parameters);
            du.iter_mut().zip(back(apart, factors)).for_each(|(d, a)| *d += a);
            let du = host::from_vec(du, [m, width], &device);
            let d = swiglu_backward(&pass.gate_up, base.activation, du, None, false).d_gate_up;
            let d = HostView::new(&d);
            for (i, row) in pass.rows.iter().enumerate() {
                let into = &mut d_gate_up[row * 2 * width..(row + 1) * 2 * width];
                into.iter_mut().zip(&d.as_slice()[i * 2 * width..]).for_each(|(sum, d)| *sum += d);
            }
            for map in 0..2 {
                let mut apart = vec![0.0; m * hidden];
                let (input, factors) = &pass.inputs[map];
                let d = (d.as_slice(), 2 * width, map * width);
                self.gradients(map, expert, input, m, d, &mut apart, wanted.parameters);
                let apart = back(apart, factors);
                for (i, row) in pass.rows.iter().enumerate() {
                    let into = &mut dx[row * hidden..(row + 1) * hidden];
                    into.iter_mut().zip(&apart[i * hidden..]).for_each(|(sum, d)| *sum += d);
                }
            }
        }
        let dz = self.router.d_logits(&z, n, &gated, &dw, tokens);
        self.router.backward(whole, n, &dz, Some(&mut dx), wanted.parameters);
        wanted.input.then(|| {
            let d_gate_up = host::from_vec(d_gate_up, [n, 2 * width], &device);
            let through = base.gate_up.backward(&d_gate_up);
            dx.iter_mut().zip(HostView::new(&through).as_slice()).for_each(|(dx, d)| *dx += d);
            host::from_vec(dx, [n, hidden], &device)
        })
    }
}

//! Mixtures beside linear maps.

use std::{ops::Range, sync::Arc};

use burn::tensor::Tensor;
use moe_core::{
    adapters::{LinearAdapter, Tokens, Wanted},
    host::{self, HostView},
    kernels::{
        product::{Matrix, product},
        weight::Weight,
    },
};

use super::router::Router;
use crate::{Live, lora::Dropout};

/// Experts beside some rows of a map: `y += s ((x A^T) o w) B^T`, where `A [N r, in]` and `B [out, N r]` are those of
/// all experts and the gates `w` stand for each rank of an expert. All experts at once are two products of the size of
/// one LoRA of rank `N r`; what is not chosen has a gate of 0.
#[derive(Debug)]
pub(crate) struct Mixture {
    pub rows: Range<usize>,
    pub router: Arc<Router>,
    pub a: Arc<Live>,
    pub b: Arc<Live>,
    pub train_a: bool,
    pub train_b: bool,
    pub scale: f32,
    /// Atoms of earlier tasks, before those that are trained: `A_0 [R_0, in]`, `B_0 [out, R_0]` with what they count in
    /// it.
    pub earlier: Option<Earlier>,
    /// Whether the router sees the input with dropout, as in SMoRA.
    pub router_sees_dropped: bool,
    pub dropout: Option<Dropout>,
}

/// Frozen ranks.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Earlier {
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub rank: usize,
}

/// The mixtures of a linear map `[out, in]`.
#[derive(Debug)]
pub(crate) struct MixtureLinear {
    pub dims: [usize; 2],
    pub mixtures: Vec<Arc<Mixture>>,
}

/// What a mixture computed on its way.
struct Pass {
    /// `x A^T [n, R]`.
    hidden: Vec<f32>,
    z: Vec<f32>,
    gated: super::gate::Gated,
}

impl Mixture {
    /// Ranks of earlier tasks, and all ranks.
    fn ranks(&self) -> (usize, usize) {
        let earlier = self.earlier.as_ref().map_or(0, |earlier| earlier.rank);
        (earlier, earlier + self.a.shape()[0])
    }

    /// Ranks that share a gate.
    fn per_gate(&self) -> usize {
        self.ranks().1 / self.router.width.max(1)
    }

    fn hidden(&self, x: Matrix<'_>, n: usize) -> Vec<f32> {
        let ((before, all), [rank, inputs]) = (self.ranks(), self.a.shape());
        let mut hidden = vec![0.0; n * all];
        if let Some(earlier) = &self.earlier {
            product(&mut hidden, all, 0, false, 1.0, x, Matrix::new(&earlier.a, before, inputs).transposed());
        }
        let a = self.a.value();
        let a = HostView::new(&a);
        product(&mut hidden, all, before, false, 1.0, x, Matrix::new(a.as_slice(), rank, inputs).transposed());
        hidden
    }

    fn pass(&self, x: Matrix<'_>, routed: Matrix<'_>, n: usize, tokens: Tokens<'_>) -> Pass {
        let hidden = self.hidden(x, n);
        let z = self.router.logits(routed, n, &hidden);
        let gated = self.router.gates(&z, n, tokens);
        Pass { hidden, z, gated }
    }

    /// `(x A^T) o w`.
    fn gated(&self, pass: &Pass) -> Vec<f32> {
        let per = self.per_gate();
        let hidden = pass.hidden.chunks_exact(per.max(1)).zip(&pass.gated.weights);
        hidden.flat_map(|(hidden, w)| hidden.iter().map(move |h| h * w)).collect()
    }

    /// `dw` and `d hidden` from `d gated`: the gradient at the product of both.
    fn split(&self, pass: &Pass, d: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let per = self.per_gate().max(1);
        let pairs = d.chunks_exact(per).zip(pass.hidden.chunks_exact(per));
        let dw = pairs.map(|(d, h)| d.iter().zip(h).map(|(d, h)| d * h).sum()).collect();
        let d_hidden = d.chunks_exact(per).zip(&pass.gated.weights).flat_map(|(d, w)| d.iter().map(move |d| d * w));
        (dw, d_hidden.collect())
    }

    fn add(&self, x: Matrix<'_>, routed: Matrix<'_>, n: usize, tokens: Tokens<'_>, y: &mut [f32], width: usize) {
        let ((before, all), out) = (self.ranks(), self.rows.len());
        let gated = self.gated(&self.pass(x, routed, n, tokens));
        let gated = Matrix::new(&gated, n, all);
        let first = self.rows.start;
        if let Some(earlier) = &self.earlier {
            let b = Matrix::new(&earlier.b, out, before).transposed();
            product(y, width, first, true, 1.0, gated.columns(0..before), b);
        }
        let b = self.b.value();
        let b = HostView::new(&b);
        let b = Matrix::new(b.as_slice(), out, all - before).transposed();
        product(y, width, first, true, self.scale, gated.columns(before..all), b);
    }

    /// Gradients from `dy [n, width]`. That at the input goes to `dx`, that at the router's input to `d_routed` or,
    /// without one, to `dx`.
    #[allow(clippy::too_many_arguments)]
    fn backward(
        &self,
        (x, routed): (Matrix<'_>, Matrix<'_>),
        n: usize,
        tokens: Tokens<'_>,
        (dy, width): (&[f32], usize),
        mut dx: Option<&mut [f32]>,
        d_routed: Option<&mut [f32]>,
        parameters: bool,
    ) {
        let ((before, all), [rank, inputs], out) = (self.ranks(), self.a.shape(), self.rows.len());
        let pass = self.pass(x, routed, n, tokens);
        let gated = self.gated(&pass);
        let dy = Matrix::new(dy, n, width).columns(self.rows.clone());
        let (a, b) = (self.a.value(), self.b.value());
        let (a, b) = (HostView::new(&a), HostView::new(&b));
        let mut d_gated = vec![0.0; n * all];
        if let Some(earlier) = &self.earlier {
            product(&mut d_gated, all, 0, false, 1.0, dy, Matrix::new(&earlier.b, out, before));
        }
        product(&mut d_gated, all, before, false, self.scale, dy, Matrix::new(b.as_slice(), out, rank));
        let (dw, mut d_hidden) = self.split(&pass, &d_gated);
        let dz = self.router.d_logits(&pass.z, n, &pass.gated, &dw, tokens);
        match self.router.weight.is_some() {
            true => match d_routed {
                Some(into) => self.router.backward(routed, n, &dz, Some(into), parameters),
                None => self.router.backward(routed, n, &dz, dx.as_deref_mut(), parameters),
            },
            // the experts gave themselves their logits
            false => d_hidden.iter_mut().zip(&dz).for_each(|(d, dz)| *d += dz),
        }
        let d_hidden = Matrix::new(&d_hidden, n, all);
        if let Some(dx) = dx {
            if let Some(earlier) = &self.earlier {
                let a = Matrix::new(&earlier.a, before, inputs);
                product(dx, inputs, 0, true, 1.0, d_hidden.columns(0..before), a);
            }
            let a = Matrix::new(a.as_slice(), rank, inputs);
            product(dx, inputs, 0, true, 1.0, d_hidden.columns(before..all), a);
        }
        if parameters && self.train_a {
            let d = d_hidden.columns(before..all).transposed();
            self.a.add_gradient(|sum| product(sum, inputs, 0, true, 1.0, d, x));
        }
        if parameters && self.train_b {
            let gated = Matrix::new(&gated, n, all).columns(before..all);
            self.b.add_gradient(|sum| product(sum, rank, 0, true, self.scale, dy.transposed(), gated));
        }
    }
}

impl LinearAdapter for MixtureLinear {
    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn is_linear(&self) -> bool {
        false
    }

    fn trained(&self) -> usize {
        let values = |live: &Arc<Live>, trained: bool| if trained { live.shape()[0] * live.shape()[1] } else { 0 };
        let mixture = |mixture: &Arc<Mixture>| {
            let experts = values(&mixture.a, mixture.train_a) + values(&mixture.b, mixture.train_b);
            let router = [&mixture.router.weight, &mixture.router.bias];
            experts + router.into_iter().flatten().map(|live| values(live, mixture.router.trained)).sum::<usize>()
        };
        self.mixtures.iter().map(mixture).sum()
    }

    fn forward(&self, base: &Weight, x: &Tensor<2>, tokens: Tokens<'_>) -> Tensor<2> {
        let y = base.forward_for(x, None, tokens);
        let ([out, inputs], n, device) = (self.dims, x.dims()[0], x.device());
        if n == 0 || out == 0 {
            return y;
        }
        let view = HostView::new(x);
        let whole = Matrix::new(view.as_slice(), n, inputs);
        let mut values = host::into_vec(y);
        for mixture in &self.mixtures {
            let dropped = Dropout::apply(mixture.dropout.as_ref(), view.as_slice(), n, tokens);
            let x = dropped.as_ref().map_or(whole, |(x, _)| Matrix::new(x, n, inputs));
            let routed = if mixture.router_sees_dropped { x } else { whole };
            mixture.add(x, routed, n, tokens, &mut values, out);
        }
        host::from_vec(values, [n, out], &device)
    }

    fn backward(
        &self,
        base: &Weight,
        x: &Tensor<2>,
        dy: &Tensor<2>,
        tokens: Tokens<'_>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let ([out, inputs], n, device) = (self.dims, x.dims()[0], x.device());
        let mut dx = wanted.input.then(|| host::into_vec(base.backward(dy)));
        if n > 0 && out > 0 {
            let (xs, dys) = (HostView::new(x), HostView::new(dy));
            let whole = Matrix::new(xs.as_slice(), n, inputs);
            for mixture in &self.mixtures {
                let dropped = Dropout::apply(mixture.dropout.as_ref(), xs.as_slice(), n, tokens);
                let input = dropped.as_ref().map_or(whole, |(x, _)| Matrix::new(x, n, inputs));
                let routed = if mixture.router_sees_dropped { input } else { whole };
                let dy = (dys.as_slice(), out);
                let (Some(dx), Some((_, factors))) = (dx.as_mut(), &dropped) else {
                    let dx = dx.as_deref_mut();
                    mixture.backward((input, routed), n, tokens, dy, dx, None, wanted.parameters);
                    continue;
                };
                // what flows through dropped inputs is gathered apart
                let mut apart = vec![0.0; n * inputs];
                let direct = (!mixture.router_sees_dropped).then_some(dx.as_mut_slice());
                let both = (input, routed);
                mixture.backward(both, n, tokens, dy, Some(&mut apart), direct, wanted.parameters);
                dx.iter_mut().zip(apart).zip(factors).for_each(|((dx, d), f)| *dx += d * f);
            }
        }
        dx.map(|dx| host::from_vec(dx, [n, inputs], &device))
    }

    fn matrix(&self, _: &Weight) -> Option<Tensor<2>> {
        None
    }

    fn digest(&self, _: &mut dyn FnMut(&[u8])) {}
}

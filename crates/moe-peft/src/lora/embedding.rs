//! Low-rank additions to embeddings, and rows of them that are trained by themselves.

use std::{collections::BTreeMap, sync::Arc};

use burn::tensor::Tensor;
use moe_core::{
    adapters::{EmbeddingAdapter, LinearAdapter, Tokens, Wanted},
    host::{self, HostView},
    kernels::weight::Weight,
};

use crate::Live;

/// `E + s B A` of embeddings `E [V, H]`, with `B [V, r]` and `A [r, H]`: a token's row is `e + s b A`.
#[derive(Debug)]
pub(super) struct LoraEmbedding {
    pub hidden: usize,
    pub terms: Vec<EmbeddingTerm>,
}

#[derive(Debug)]
pub(super) struct EmbeddingTerm {
    pub a: Arc<Live>,
    pub b: Arc<Live>,
    pub scale: f32,
}

impl EmbeddingAdapter for LoraEmbedding {
    fn rows(&self, ids: &[u32], base: &[f32]) -> Vec<f32> {
        let mut rows = base.to_vec();
        for EmbeddingTerm { a, b, scale } in &self.terms {
            let (rank, a, b) = (a.shape()[0], HostView::new(&a.value()), HostView::new(&b.value()));
            for (id, row) in ids.iter().zip(rows.chunks_exact_mut(self.hidden)) {
                let b = &b.as_slice()[*id as usize * rank..][..rank];
                for (b, a) in b.iter().zip(a.as_slice().chunks_exact(self.hidden)) {
                    row.iter_mut().zip(a).for_each(|(row, a)| *row += scale * b * a);
                }
            }
        }
        rows
    }

    fn add_gradient(&self, ids: &[u32], gradient: &[f32]) {
        for EmbeddingTerm { a, b, scale } in &self.terms {
            let rank = a.shape()[0];
            let (values_a, values_b) = (HostView::new(&a.value()), HostView::new(&b.value()));
            let rows = || ids.iter().map(|id| *id as usize).zip(gradient.chunks_exact(self.hidden));
            if a.is_trained() {
                a.add_gradient(|sum| {
                    for (id, g) in rows() {
                        let b = &values_b.as_slice()[id * rank..][..rank];
                        for (b, sum) in b.iter().zip(sum.chunks_exact_mut(self.hidden)) {
                            sum.iter_mut().zip(g).for_each(|(sum, g)| *sum += scale * b * g);
                        }
                    }
                });
            }
            if b.is_trained() {
                b.add_gradient(|sum| {
                    for (id, g) in rows() {
                        let sum = &mut sum[id * rank..][..rank];
                        for (sum, a) in sum.iter_mut().zip(values_a.as_slice().chunks_exact(self.hidden)) {
                            *sum += scale * a.iter().zip(g).map(|(a, g)| a * g).sum::<f32>();
                        }
                    }
                });
            }
        }
    }
}

/// Rows of a matrix `[V, H]` in place of the base's: `rows[id]` is the row of the trained values `[n, H]` that stands
/// for token `id`.
#[derive(Debug)]
pub(super) struct TokenRows {
    pub rows: BTreeMap<u32, usize>,
    pub hidden: usize,
    pub live: Arc<Live>,
}

impl EmbeddingAdapter for TokenRows {
    fn rows(&self, ids: &[u32], base: &[f32]) -> Vec<f32> {
        let (mut rows, live) = (base.to_vec(), HostView::new(&self.live.value()));
        for (id, row) in ids.iter().zip(rows.chunks_exact_mut(self.hidden)) {
            if let Some(own) = self.rows.get(id) {
                row.copy_from_slice(&live.as_slice()[own * self.hidden..][..self.hidden]);
            }
        }
        rows
    }

    fn add_gradient(&self, ids: &[u32], gradient: &[f32]) {
        if self.live.is_trained() {
            self.live.add_gradient(|sum| {
                for (id, g) in ids.iter().zip(gradient.chunks_exact(self.hidden)) {
                    let Some(own) = self.rows.get(id) else { continue };
                    sum[own * self.hidden..][..self.hidden].iter_mut().zip(g).for_each(|(sum, g)| *sum += g);
                }
            });
        }
    }
}

/// The same rows in a block of the output head that is the embeddings' tensor. `rows` are those of the block, and of
/// the trained values.
#[derive(Debug)]
pub(super) struct TiedRows {
    pub dims: [usize; 2],
    pub rows: Vec<(usize, usize)>,
    pub live: Arc<Live>,
}

impl LinearAdapter for TiedRows {
    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn forward(&self, base: &Weight, x: &Tensor<2>, tokens: Tokens<'_>) -> Tensor<2> {
        let ([out, inputs], n, device) = (self.dims, x.dims()[0], x.device());
        let mut y = host::into_vec(base.forward_for(x, None, tokens));
        let (x, live) = (HostView::new(x), HostView::new(&self.live.value()));
        for (y, x) in y.chunks_exact_mut(out.max(1)).zip(x.as_slice().chunks_exact(inputs.max(1))) {
            for (row, own) in &self.rows {
                let w = &live.as_slice()[own * inputs..][..inputs];
                y[*row] = w.iter().zip(x).map(|(w, x)| w * x).sum();
            }
        }
        host::from_vec(y, [n, out], &device)
    }

    fn backward(
        &self,
        base: &Weight,
        x: &Tensor<2>,
        dy: &Tensor<2>,
        _: Tokens<'_>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let ([out, inputs], n, device) = (self.dims, x.dims()[0], x.device());
        let (xs, dys) = (HostView::new(x), HostView::new(dy));
        if wanted.parameters && self.live.is_trained() {
            self.live.add_gradient(|sum| {
                for (dy, x) in dys.as_slice().chunks_exact(out.max(1)).zip(xs.as_slice().chunks_exact(inputs.max(1))) {
                    for (row, own) in &self.rows {
                        let sum = &mut sum[own * inputs..][..inputs];
                        sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += dy[*row] * x);
                    }
                }
            });
        }
        wanted.input.then(|| {
            let mut rest = dys.as_slice().to_vec();
            for dy in rest.chunks_exact_mut(out.max(1)) {
                self.rows.iter().for_each(|(row, _)| dy[*row] = 0.0);
            }
            let mut dx = host::into_vec(base.backward(&host::from_vec(rest, [n, out], &device)));
            let live = HostView::new(&self.live.value());
            for (dy, dx) in dys.as_slice().chunks_exact(out.max(1)).zip(dx.chunks_exact_mut(inputs.max(1))) {
                for (row, own) in &self.rows {
                    let w = &live.as_slice()[own * inputs..][..inputs];
                    dx.iter_mut().zip(w).for_each(|(dx, w)| *dx += dy[*row] * w);
                }
            }
            host::from_vec(dx, [n, inputs], &device)
        })
    }

    fn matrix(&self, base: &Weight) -> Option<Tensor<2>> {
        let base = base.to_tensor();
        let (device, mut matrix) = (base.device(), host::into_vec(base));
        let live = HostView::new(&self.live.value());
        for (row, own) in &self.rows {
            let inputs = self.dims[1];
            matrix[row * inputs..][..inputs].copy_from_slice(&live.as_slice()[own * inputs..][..inputs]);
        }
        Some(host::from_vec(matrix, self.dims, &device))
    }

    fn digest(&self, add: &mut dyn FnMut(&[u8])) {
        for (row, own) in &self.rows {
            [row, own].iter().for_each(|at| add(&(**at as u64).to_le_bytes()));
        }
        self.live.digest(add);
    }
}

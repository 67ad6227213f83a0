//! Weights of the model that are trained themselves.

use std::sync::Arc;

use burn::tensor::Tensor;
use moe_core::{
    adapters::{EmbeddingAdapter, LinearAdapter, Tokens, VectorAdapter, Wanted},
    host::HostView,
    kernels::weight::Weight,
};

use crate::Live;

/// A weight `[out, in]` in place of the checkpoint's, all of it trained: `dw = dy^T x`. As long as its values are
/// [those of the base](Live::is_base), the base runs in its stored form.
#[derive(Debug)]
pub struct OwnMatrix(pub Arc<Live>);

impl LinearAdapter for OwnMatrix {
    fn dims(&self) -> [usize; 2] {
        self.0.shape()
    }

    fn replaces(&self) -> bool {
        !self.0.is_base()
    }

    fn trained(&self) -> usize {
        if self.0.is_trained() { self.0.shape().iter().product() } else { 0 }
    }

    fn forward(&self, base: &Weight, x: &Tensor<2>, tokens: Tokens<'_>) -> Tensor<2> {
        if self.0.is_base() {
            return base.forward_for(x, None, tokens);
        }
        x.clone().matmul(self.0.value().transpose())
    }

    fn backward(
        &self,
        base: &Weight,
        x: &Tensor<2>,
        dy: &Tensor<2>,
        _: Tokens<'_>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        if self.0.is_base() {
            return wanted.input.then(|| base.backward(dy));
        }
        let [rows, columns] = self.0.shape();
        if wanted.parameters && self.0.is_trained() {
            self.0.add_product(dy, 0..rows, x, 0..columns, 1.0);
        }
        wanted.input.then(|| dy.clone().matmul(self.0.value()))
    }

    fn matrix(&self, base: &Weight) -> Option<Tensor<2>> {
        Some(if self.0.is_base() { base.to_tensor() } else { self.0.value() })
    }

    fn digest(&self, add: &mut dyn FnMut(&[u8])) {
        self.0.digest(add);
    }
}

/// A vector in place of the checkpoint's, trained.
#[derive(Debug)]
pub struct OwnVector(pub Arc<Live>);

impl VectorAdapter for OwnVector {
    fn trained(&self) -> usize {
        if self.0.is_trained() { self.0.shape().iter().product() } else { 0 }
    }

    fn value(&self) -> Tensor<1> {
        let len = self.0.shape().iter().product::<usize>();
        self.0.value().reshape([len])
    }

    fn add_gradient(&self, gradient: &[f32]) {
        if self.0.is_trained() {
            self.0.add_gradient(|sum| sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g));
        }
    }
}

/// Embeddings `[V, H]` in blocks of rows, trained; the blocks of a tied head are the same ones.
#[derive(Debug)]
pub struct OwnEmbedding {
    blocks: Vec<Arc<Live>>,
    rows: usize,
    hidden: usize,
}

impl OwnEmbedding {
    /// Blocks of `rows` rows, the last maybe fewer.
    pub fn new(blocks: Vec<Arc<Live>>, rows: usize, hidden: usize) -> Self {
        Self { blocks, rows: rows.max(1), hidden }
    }
}

impl EmbeddingAdapter for OwnEmbedding {
    fn replaces(&self) -> bool {
        true
    }

    fn rows(&self, ids: &[u32], _: &[f32]) -> Vec<f32> {
        let views: Vec<HostView> = self.blocks.iter().map(|live| HostView::new(&live.value())).collect();
        let row = |id: &u32| {
            let start = *id as usize % self.rows * self.hidden;
            &views[*id as usize / self.rows].as_slice()[start..start + self.hidden]
        };
        ids.iter().flat_map(row).copied().collect()
    }

    fn add_gradient(&self, ids: &[u32], gradient: &[f32]) {
        for (block, live) in self.blocks.iter().enumerate().filter(|(_, live)| live.is_trained()) {
            live.add_gradient(|sum| {
                for (id, gradient) in ids.iter().zip(gradient.chunks_exact(self.hidden)) {
                    if *id as usize / self.rows == block {
                        let start = *id as usize % self.rows * self.hidden;
                        sum[start..start + self.hidden].iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
                    }
                }
            });
        }
    }
}

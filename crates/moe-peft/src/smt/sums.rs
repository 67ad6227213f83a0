//! A warm-up that leaves the weights as they are: sums of gradients by block, without the gradients.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use burn::tensor::Tensor;
use moe_core::{
    Engine, EngineOptions,
    adapters::{LinearAdapter, Tokens, Wanted},
    host::{self, HostView},
    kernels::{outer::add_transposed_product, weight::Weight},
    trace::{Observer, Signals},
};
use rayon::prelude::*;

use super::{BlockScore, BlockScores, Smt};
use crate::{AdapterSet, Error, Result, Setting, TuningMethod, trainable_tensors};

/// The map itself, whose gradient `dy^T x` is summed by blocks.
#[derive(Debug)]
struct Summing {
    dims: [usize; 2],
    /// Rows and columns of a block; `None` sums every value.
    block: Option<usize>,
    /// 1 over the predicted tokens of the step.
    factor: Arc<RwLock<f32>>,
    sums: Mutex<Vec<f32>>,
}

impl Summing {
    /// Of a block, `sum_ij (dy^T x)_ij = sum_t (sum_i dy_ti) (sum_j x_tj)`: a product of what is summed before, so that
    /// the gradient itself is never formed.
    fn add(&self, x: &Tensor<2>, dy: &Tensor<2>) {
        let factor = *self.factor.read().unwrap_or_else(PoisonError::into_inner);
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let (rows, columns) = match self.block {
            Some(size) => (by_block(dy, size), by_block(x, size)),
            None => (dy.clone(), x.clone()),
        };
        let [down, across] = [rows.dims()[1], columns.dims()[1]];
        sums.resize(down * across, 0.0);
        add_transposed_product(&rows, 0..down, &columns, 0..across, factor, &mut sums);
    }
}

/// Sums of so many neighboring columns of `x [n, columns]`: `[n, blocks]`.
fn by_block(x: &Tensor<2>, size: usize) -> Tensor<2> {
    let [n, columns] = x.dims();
    let blocks = columns.div_ceil(size);
    let view = HostView::new(x);
    let rows = view.as_slice().par_chunks_exact(columns.max(1));
    let sums: Vec<f32> = rows.flat_map_iter(|row| row.chunks(size).map(|part| part.iter().sum::<f32>())).collect();
    host::from_vec(sums, [n, blocks], &x.device())
}

impl LinearAdapter for Summing {
    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn forward(&self, base: &Weight, x: &Tensor<2>, tokens: Tokens<'_>) -> Tensor<2> {
        base.forward_for(x, None, tokens)
    }

    fn backward(
        &self,
        base: &Weight,
        x: &Tensor<2>,
        dy: &Tensor<2>,
        _: Tokens<'_>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        if wanted.parameters {
            self.add(x, dy);
        }
        wanted.input.then(|| base.backward(dy))
    }

    fn matrix(&self, base: &Weight) -> Option<Tensor<2>> {
        Some(base.to_tensor())
    }

    fn digest(&self, _: &mut dyn FnMut(&[u8])) {}
}

struct Gradients;

impl Observer for Gradients {
    fn needs(&self) -> Signals {
        Signals::PARAMETERS
    }
}

/// Sums the gradients of `steps` steps at the weights as they are: the waves in order, over and over, each step's
/// gradient that of its mean loss. Memory beside a sweep is one f32 per block with [`BlockScore::MeanAbs`], and one per
/// value of the targeted maps otherwise; neither weights nor gradients of weights exist in f32.
///
/// # Errors
/// What stops the model; [`Error::Input`] for no waves.
pub fn sum_gradients(smt: &Smt, on: &Setting<'_>, steps: usize) -> Result<BlockScores> {
    if on.waves.is_empty() {
        return Err(Error::input("waves to sum gradients on", 0, "at least one"));
    }
    let places = trainable_tensors::linear_maps(on.model.checkpoint());
    let mut scores = BlockScores::new(*smt, &places, trainable_tensors::vocabulary(on.model.checkpoint())?)?;
    let block = (smt.score == BlockScore::MeanAbs).then_some(smt.block);
    let factor = Arc::new(RwLock::new(0.0));
    let mut set = AdapterSet::new();
    let mut watched = Vec::new();
    for place in places.iter().filter(|place| smt.targets(place.site) && !place.dims.contains(&0)) {
        let summing = Summing { dims: place.dims, block, factor: factor.clone(), sums: Mutex::default() };
        let summing = Arc::new(summing);
        set.add(place.site, summing.clone())?;
        watched.push((place.site, summing));
    }
    if on.router_losses != Default::default() {
        on.router_losses.install(on, &mut set)?;
    }
    let model = on.model.with_adapters(Arc::new(set))?;
    let engine = Engine::new(&model, EngineOptions { loss: true, ..EngineOptions::default() });
    let mut waves = on.waves.iter().cycle();
    for _ in 0..steps {
        let step: Vec<_> = waves.by_ref().take(on.waves_per_step.max(1).min(on.waves.len())).collect();
        let tokens: usize = step.iter().map(|wave| wave.loss_tokens()).sum();
        *factor.write().unwrap_or_else(PoisonError::into_inner) = 1.0 / tokens.max(1) as f32;
        for wave in step {
            engine.run(wave, &mut Gradients)?;
        }
    }
    let take = |summing: &Summing| std::mem::take(&mut *summing.sums.lock().unwrap_or_else(PoisonError::into_inner));
    let mut sums: std::collections::BTreeMap<_, _> =
        watched.iter().map(|(site, summing)| (*site, take(summing))).filter(|(_, sums)| !sums.is_empty()).collect();
    scores.restore_some(|site| sums.remove(&site))?;
    Ok(scores)
}

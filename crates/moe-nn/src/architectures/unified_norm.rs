//! Unified Normalization: a batch norm for transformers, with smoothed statistics and a filter of outliers.

use burn::config::Config;
use burn::module::{Flag, Module, Param, RunningState};
use burn::nn::{Initializer, Linear};
use burn::tensor::{Device, Gradients, Tensor, TensorData};

use crate::routing::host;
use crate::smoothed_scale::smoothed_scale;

/// Configuration of [`UnifiedNorm`].
#[derive(Config, Debug)]
pub struct UnifiedNormConfig {
    /// Hidden size.
    pub d_model: usize,
    /// Steps that statistics are smoothed over.
    #[config(default = 4)]
    pub window: usize,
    /// Steps before they are smoothed.
    #[config(default = 4000)]
    pub warmup: usize,
    /// Whether a batch whose statistics stand out is normalized by itself and forgotten; advised for images, not for
    /// text.
    #[config(default = false)]
    pub filter: bool,
    /// Epsilon beside mean squares.
    #[config(default = 1e-5)]
    pub epsilon: f64,
    /// How much of the running statistics stays in a step.
    #[config(default = 0.9)]
    pub momentum: f64,
}

/// Unified Normalization (arXiv 2208.01313): `gamma x / sqrt(v) + beta` with one v per dimension for all tokens, so
/// that a trained norm is [folded](Self::fold) into the linear map that follows. In training, v is the geometric mean
/// of the batches' mean squares over a window, and the gradient's projection along the normalized input is smoothed as
/// well: the mean over the window, and a running mean of these.
///
/// Call [`UnifiedNorm::observe`] with the gradients of each backward pass. The projection that a step subtracts is that
/// of the steps before, where the published code has the current one among them.
#[derive(Module, Debug)]
pub struct UnifiedNorm {
    /// The scale, `[hidden]`.
    pub gamma: Param<Tensor<1>>,
    /// The shift, `[hidden]`.
    pub beta: Param<Tensor<1>>,
    /// Running mean squares, `[hidden]`: what evaluation divides by the root of.
    pub running: RunningState<Tensor<1>>,
    /// Mean squares of the last batches, `[window, hidden]`.
    pub window: RunningState<Tensor<2>>,
    /// The smoothed mean of `gradient * normalized input`, `[hidden]`.
    pub projection: RunningState<Tensor<1>>,
    /// Those means of the last batches, `[window, hidden]`.
    pub projections: RunningState<Tensor<2>>,
    /// What gradients of the last batch were multiplied by, `[hidden]`.
    pub factor: RunningState<Tensor<1>>,
    /// Steps so far, batches that were left out, tokens of the last batch, whether it was smoothed, and whether it was
    /// left out, `[5]`.
    pub counts: RunningState<Tensor<1>>,
    /// Whether it learns statistics. [`Module::valid`] turns it off.
    pub training: Param<Flag>,
    warmup: usize,
    filter: bool,
    epsilon: f64,
    momentum: f64,
}

impl UnifiedNormConfig {
    /// Makes the norm.
    ///
    /// # Panics
    ///
    /// If the window is empty, or the momentum is not within 0 and 1.
    pub fn init(&self, device: &Device) -> UnifiedNorm {
        assert!(self.window > 0, "the window is empty");
        assert!((0.0..1.0).contains(&self.momentum), "the momentum must be within 0 and 1, found {}", self.momentum);
        let d = self.d_model;
        UnifiedNorm {
            gamma: Initializer::Ones.init([d], device),
            beta: Initializer::Zeros.init([d], device),
            running: RunningState::new(Tensor::ones([d], device)),
            window: RunningState::new(Tensor::zeros([self.window, d], device)),
            projection: RunningState::new(Tensor::zeros([d], device)),
            projections: RunningState::new(Tensor::zeros([self.window, d], device)),
            factor: RunningState::new(Tensor::ones([d], device)),
            counts: RunningState::new(Tensor::zeros([5], device)),
            training: Param::from_bool(true),
            warmup: self.warmup,
            filter: self.filter,
            epsilon: self.epsilon,
            momentum: self.momentum,
        }
    }
}

/// The geometric mean of the rows of a window `[rows][width]`.
fn geometric(window: &[f32], width: usize) -> Vec<f32> {
    let rows = window.len() / width;
    let mean = |i: usize| (0..rows).map(|row| f64::from(window[row * width + i]).ln()).sum::<f64>() / rows as f64;
    (0..width).map(|i| mean(i).exp() as f32).collect()
}

/// Whether the arithmetic mean of a window is further above its geometric mean than the roots of the last window
/// varied, in some dimension.
fn stands_out(before: &[f32], after: &[f32], width: usize) -> bool {
    let (rows, count) = (before.len() / width, before.len() as f64);
    let roots = || before.iter().map(|value| f64::from(*value).sqrt());
    let mean = roots().sum::<f64>() / count;
    let variance = roots().map(|root| (root - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
    let arithmetic = |i: usize| (0..rows).map(|row| f64::from(after[row * width + i])).sum::<f64>() / rows as f64;
    let means = geometric(after, width);
    (0..width).any(|i| arithmetic(i) - f64::from(means[i]) > variance * rows as f64)
}

impl UnifiedNorm {
    fn set<const D: usize>(state: &RunningState<Tensor<D>>, values: Vec<f32>) {
        let (shape, device) = (state.value_sync().dims(), state.value_sync().device());
        state.update(Tensor::from_data(TensorData::new(values, shape), &device));
        state.value_sync();
    }

    /// `[tokens, hidden] -> [tokens, hidden]`.
    ///
    /// # Panics
    ///
    /// If there is no token in training.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let training = self.training.val().is_enabled() && x.device().is_autodiff();
        let affine = |normed: Tensor<2>| normed * self.gamma.val().unsqueeze() + self.beta.val().unsqueeze();
        if !training {
            let root = (self.running.value_sync() + self.epsilon).sqrt();
            return affine(x / root.unsqueeze());
        }
        let [tokens, width] = x.dims();
        assert!(tokens > 0, "statistics of no token");
        let current = host(&x.clone().detach().square().mean_dim(0));
        let (running, mut counts) = (host(&self.running.value_sync()), host(&self.counts.value_sync()));
        let (before, projection) = (host(&self.window.value_sync()), host(&self.projection.value_sync()));
        let size = before.len() / width;
        counts[0] += 1.0;
        counts[2] = tokens as f32;
        let step = counts[0] as usize;
        let place = (step % size) * width;
        let mut window = before.clone();
        window[place..place + width].copy_from_slice(&current);
        let mut left_out = false;
        if self.filter && step >= self.warmup && step > size && stands_out(&before, &window, width) {
            window[place..place + width].copy_from_slice(&running);
            counts[1] += 1.0;
            left_out = true;
        }
        let smooths = step > size && step >= self.warmup && size > 1 && !left_out;
        (counts[3], counts[4]) = (f32::from(smooths), f32::from(left_out));
        let squares = if smooths { geometric(&window, width) } else { current };
        // The gradient is brought to the scale of the running statistics, once these have settled.
        let compensates = smooths && step > self.warmup.max(1000);
        let epsilon = self.epsilon as f32;
        let ratio = |i: usize| ((squares[i] + epsilon) / (running[i] + epsilon)).sqrt().clamp(0.2, 5.0);
        let factor: Vec<f32> = (0..width).map(|i| if compensates { ratio(i) } else { 1.0 }).collect();
        let roots: Vec<f32> = squares.iter().map(|square| (square + epsilon).sqrt()).collect();
        let m = self.momentum as f32;
        Self::set(&self.running, running.iter().zip(&squares).map(|(old, new)| m * old + (1.0 - m) * new).collect());
        Self::set(&self.window, window);
        Self::set(&self.counts, counts);
        Self::set(&self.factor, factor.clone());
        affine(smoothed_scale(x, &roots, &factor, smooths.then_some(&projection[..])))
    }

    /// Smooths the projection of the gradient, from the gradients of a backward pass over the last batch. The mean of
    /// `gradient of the normalized input * normalized input` is gamma times the gradient of gamma, per token.
    pub fn observe(&self, gradients: &Gradients) {
        let Some(gradient) = self.gamma.val().grad(gradients) else { return };
        let counts = host(&self.counts.value_sync());
        let (step, tokens, smooths, left_out) =
            (counts[0] as usize, counts[2].max(1.0), counts[3] > 0.0, counts[4] > 0.0);
        let (gradient, gamma, factor) = (host(&gradient), host(&self.gamma.val()), host(&self.factor.value_sync()));
        let (old, mut all) = (host(&self.projection.value_sync()), host(&self.projections.value_sync()));
        let (width, size) = (gamma.len(), all.len() / gamma.len());
        let current: Vec<f32> = (0..width).map(|i| factor[i] * gamma[i] * gradient[i] / tokens).collect();
        let place = (step % size) * width;
        all[place..place + width].copy_from_slice(if left_out { &old } else { &current });
        let mean = |i: usize| (0..size).map(|row| all[row * width + i]).sum::<f32>() / size as f32;
        let m = self.momentum as f32;
        let moved = |i: usize| m * old[i] + (1.0 - m) * if smooths { mean(i) } else { current[i] };
        Self::set(&self.projection, (0..width).map(moved).collect());
        Self::set(&self.projections, all);
    }

    /// Batches that the filter left out.
    pub fn left_out(&self) -> usize {
        host(&self.counts.value_sync())[1] as usize
    }

    /// The linear map that is this norm, as in evaluation, and then `next`.
    pub fn fold(&self, next: &Linear) -> Linear {
        let scale = self.gamma.val() / (self.running.value_sync() + self.epsilon).sqrt();
        super::progressive_norm::folded(scale, self.beta.val(), next)
    }
}

//! Averaged gate and up, fitted down.

use faer::Mat;
use serde::{Deserialize, Serialize};

use super::{Combination, GroupSink, GroupWeights, LayerJob, averaged, combine_groups};
use crate::evidence::TokenSample;
use crate::linalg::{cross_gram, gram_of_rows, solve_right};
use crate::plan::Group;
use crate::router::RouterAddition;
use crate::{Error, Result};

/// Gate and up are averaged; down is fitted by least squares so that the merged units reproduce what the members gave:
/// `D = (Y^T U + l D_0) (U^T U + l I)^-1`, U the merged units of the sampled tokens, Y the target, `D_0` the averaged
/// down. The ridge pulls towards the average, so on the tokens of the fit the result is never worse than it.
///
/// Source: MergeMoE (arXiv 2510.14436), from a digest: the fit follows it; the ridge and the choice of tokens are
/// inferred. Memory: `8 I (2 I + 3 H)` bytes beside the units `[S, I]` and outputs `[S, H]` of the sampled tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeastSquaresDown {
    /// The weights of gate and up.
    pub weights: GroupWeights,
    /// What the outputs are fitted to.
    #[serde(default)]
    pub target: FitTarget,
    /// Ridge, as a share of the mean diagonal element of `U^T U`.
    #[serde(default = "default_ridge")]
    pub ridge: f64,
    /// With fewer tokens than this the average stays.
    #[serde(default = "default_tokens")]
    pub min_tokens: usize,
}

fn default_ridge() -> f64 {
    1e-3
}

fn default_tokens() -> usize {
    36
}

/// What the output of a merged expert is fitted to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FitTarget {
    /// `sum_e w_e f_e(x)` with the weights of the group, on the tokens routed to a member, or on all where those are
    /// too few.
    #[default]
    Weighted,
    /// `sum_e g_t[e] f_e(x_t)`, what token t got of the members it was routed to, by a merged expert that is weighted
    /// with `sum_e g_t[e]`.
    Routed,
}

impl Combination for LeastSquaresDown {
    fn combine(&self, job: &LayerJob<'_>, sink: GroupSink<'_>) -> Result<Vec<RouterAddition>> {
        combine_groups(job, sink, |group| {
            let what = "a sample of the layer's tokens".to_string();
            let sample = job.sample.filter(|sample| sample.tokens() > 0).ok_or(Error::MissingEvidence {
                layer: job.plan.layer,
                part: "least squares",
                what,
            })?;
            let mut merged = averaged(job, group)?;
            let Some(Fit { inputs, scale, target }) = self.fit(job, group, sample)? else { return Ok(merged) };
            let (width, hidden) = (merged.width, merged.hidden);
            let mut units = merged.unit_activations(&inputs, job.activation); // [T, I]
            let mut target = target; // [T, H]
            let bias = merged.down_bias.clone().unwrap_or_default();
            let rows = units.chunks_exact_mut(width.max(1)).zip(target.chunks_exact_mut(hidden.max(1)));
            for ((units, target), scale) in rows.zip(&scale) {
                units.iter_mut().for_each(|u| *u *= scale);
                target.iter_mut().zip(&bias).for_each(|(y, b)| *y -= scale * b);
            }
            let mut gram = gram_of_rows(&units, width);
            let ridge = self.ridge * (0..width).map(|i| gram[(i, i)]).sum::<f64>() / width.max(1) as f64;
            if ridge <= 0.0 {
                // No unit ever fires, or nothing holds an ill-posed fit.
                return Ok(merged);
            }
            (0..width).for_each(|i| gram[(i, i)] += ridge);
            let mut cross = cross_gram(&target, hidden, &units, width);
            let start = Mat::from_fn(hidden, width, |h, i| f64::from(merged.down[h * width + i]));
            cross += faer::Scale(ridge) * start;
            let down = solve_right(&gram, &cross)?;
            merged.down = (0..hidden * width).map(|k| down[(k / width, k % width)] as f32).collect();
            if merged.down.iter().any(|v| !v.is_finite()) {
                return Err(Error::numerics("least squares", "a fitted weight is not finite; use a larger ridge"));
            }
            Ok(merged)
        })
    }

    fn weights(&self) -> GroupWeights {
        self.weights
    }

    fn needs_sample(&self) -> bool {
        true
    }

    fn validate(&self) -> Result<()> {
        match self.ridge.is_finite() && self.ridge > 0.0 {
            true => Ok(()),
            false => Err(Error::parameter("combination.ridge", self.ridge, "a positive number")),
        }
    }
}

/// Tokens of a fit.
struct Fit {
    /// `[T, H]`
    inputs: Vec<f32>,
    /// Weight of the merged expert `[T]`.
    scale: Vec<f32>,
    /// What it is to give, weighted so `[T, H]`.
    target: Vec<f32>,
}

impl LeastSquaresDown {
    /// The tokens of a group's fit; `None` if they are too few.
    fn fit(&self, job: &LayerJob<'_>, group: &Group, sample: &TokenSample) -> Result<Option<Fit>> {
        let gates: Vec<Vec<f32>> = group.members.iter().map(|e| sample.weights_of(*e as usize)).collect();
        let total: Vec<f32> = (0..sample.tokens()).map(|t| gates.iter().map(|g| g[t]).sum()).collect();
        let mut tokens: Vec<usize> = (0..sample.tokens()).filter(|t| total[*t] != 0.0).collect();
        if tokens.len() < self.min_tokens {
            if self.target == FitTarget::Routed || sample.tokens() < self.min_tokens {
                return Ok(None);
            }
            tokens = (0..sample.tokens()).collect();
        }
        let hidden = sample.hidden;
        let inputs: Vec<f32> =
            tokens.iter().flat_map(|t| &sample.inputs[t * hidden..(t + 1) * hidden]).copied().collect();
        let mut target = vec![0.0f64; inputs.len()];
        for ((expert, weight), gate) in group.members.iter().zip(group.shares()).zip(&gates) {
            let outputs = job.experts.expert(*expert as usize)?.forward(&inputs, job.activation);
            let rows = target.chunks_exact_mut(hidden).zip(outputs.chunks_exact(hidden));
            for ((target, output), token) in rows.zip(&tokens) {
                let weight = match self.target {
                    FitTarget::Weighted => weight,
                    FitTarget::Routed => f64::from(gate[*token]),
                };
                target.iter_mut().zip(output).for_each(|(y, f)| *y += weight * f64::from(*f));
            }
        }
        let scale = match self.target {
            FitTarget::Weighted => vec![1.0; tokens.len()],
            FitTarget::Routed => tokens.iter().map(|t| total[*t]).collect(),
        };
        Ok(Some(Fit { inputs, scale, target: target.into_iter().map(|y| y as f32).collect() }))
    }
}

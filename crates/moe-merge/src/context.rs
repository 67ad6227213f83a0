//! One MoE layer as the parts of a recipe see it.

use std::ops::Range;
use std::sync::OnceLock;

use moe_checkpoint::Activation;

use crate::evidence::{LayerEvidence, OutputMean};
use crate::experts::ExpertSource;
use crate::importance::ranked;
use crate::linalg::dot;
use crate::{Error, Result};

/// One MoE layer: its experts, its router and what is known of it.
#[derive(Clone, Copy)]
pub struct LayerContext<'a> {
    /// Decoder layer index.
    pub layer: usize,
    /// Its experts.
    pub experts: &'a dyn ExpertSource,
    /// Weight of its router `[E, H]`, if it was read.
    pub router: Option<&'a [f32]>,
    /// What is known of it.
    pub evidence: &'a LayerEvidence,
    /// How gate and up become a unit.
    pub activation: Activation,
    /// Importance of every expert `[E]`: the order in which dominants are chosen and others are assigned.
    pub importance: &'a [f64],
    /// Experts that stay as they are `[E]`: they absorb nobody and nobody absorbs them.
    pub protected: &'a [bool],
    /// Groups of neighboring experts of which as many must stay dominant in each, since the router selects among groups
    /// and rows of the others go; 1 where it does not matter.
    pub router_groups: usize,
}

impl LayerContext<'_> {
    /// Number of experts, E.
    pub fn count(&self) -> usize {
        self.experts.count()
    }

    /// Experts by falling importance; ties by index.
    pub fn ranked(&self) -> Vec<usize> {
        ranked(self.importance)
    }

    /// Mean outputs of every expert `[E, H]`: collected ones, or those of the sampled tokens, on which every expert is
    /// run.
    ///
    /// # Errors
    /// [`Error::MissingEvidence`] without either.
    pub fn mean_outputs(&self, over: OutputMean) -> Result<Vec<f64>> {
        if let Some(found) = self.evidence.outputs.get(&over) {
            return Ok(found.clone());
        }
        let what =
            format!("mean outputs over {} or a sample of the layer's tokens", moe_checkpoint::human::variant(&over));
        let sample = self.evidence.sample.as_ref().filter(|sample| sample.tokens() > 0);
        let sample = sample.ok_or_else(|| self.evidence.missing("output similarity", what))?;
        let hidden = sample.hidden;
        let mut means = vec![0.0f64; self.count() * hidden];
        for (expert, mean) in means.chunks_exact_mut(hidden).enumerate() {
            let weights: Option<Vec<f32>> = match over {
                OutputMean::All => None,
                OutputMean::Routed => Some(sample.weights_of(expert).iter().map(|w| f32::from(*w != 0.0)).collect()),
                OutputMean::Gated => Some(sample.probabilities_of(expert)),
            };
            if over == OutputMean::Routed && weights.iter().flatten().all(|w| *w == 0.0) {
                continue;
            }
            let outputs = self.experts.expert(expert)?.forward(&sample.inputs, self.activation);
            let mut count = 0.0;
            for (token, output) in outputs.chunks_exact(hidden).enumerate() {
                let weight = weights.as_ref().map_or(1.0, |weights| f64::from(weights[token]));
                count += if over == OutputMean::Routed { weight } else { 1.0 };
                mean.iter_mut().zip(output).for_each(|(mean, y)| *mean += weight * f64::from(*y));
            }
            mean.iter_mut().for_each(|mean| *mean /= count);
        }
        Ok(means)
    }

    /// The experts of each group of the router, and how many of them stay dominant of `count` in all.
    ///
    /// # Errors
    /// [`Error::Infeasible`] for a number that groups cannot share.
    pub(crate) fn blocks(&self, count: usize) -> Result<(Vec<Range<usize>>, usize)> {
        let (experts, groups) = (self.count(), self.router_groups.max(1));
        if !count.is_multiple_of(groups) || !experts.is_multiple_of(groups) {
            let reason = format!(
                "{count} of {experts} experts are to stay, but the router selects among {groups} groups of experts and needs as \
                 many in each: choose a multiple of {groups}"
            );
            return Err(self.infeasible(reason));
        }
        let size = experts / groups;
        Ok(((0..groups).map(|group| group * size..(group + 1) * size).collect(), count / groups))
    }

    pub(crate) fn infeasible(&self, reason: impl Into<String>) -> Error {
        Error::infeasible(format!("layer {}", self.layer), reason)
    }
}

/// Inner products of the experts of a layer in some feature space: all that clustering needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Gram {
    /// Number of experts, E.
    pub count: usize,
    /// `[E, E]` row-major, symmetric.
    pub values: Vec<f64>,
}

impl Gram {
    /// From a row-major matrix `[E, E]`; its two triangles are averaged.
    pub fn new(count: usize, values: &[f64]) -> Self {
        let at = |i: usize, j: usize| values[i * count + j];
        let symmetric = (0..count * count).map(|k| (at(k / count, k % count) + at(k % count, k / count)) / 2.0);
        Self { count, values: symmetric.collect() }
    }

    /// Of vectors of this length, `[E, length]`.
    pub fn of_vectors(vectors: &[f64], count: usize) -> Self {
        let length = vectors.len() / count.max(1);
        let row = |i: usize| &vectors[i * length..(i + 1) * length];
        let product = |i: usize, j: usize| row(i).iter().zip(row(j)).map(|(a, b)| a * b).sum::<f64>();
        Self { count, values: (0..count * count).map(|k| product(k / count, k % count)).collect() }
    }

    /// Inner product of two experts.
    pub fn at(&self, i: usize, j: usize) -> f64 {
        self.values[i * self.count + j]
    }

    /// Cosine of two experts, in [-1, 1]; 0 if one of them is the zero vector.
    pub fn cosine(&self, i: usize, j: usize) -> f64 {
        let norms = (self.at(i, i) * self.at(j, j)).sqrt();
        if norms > 0.0 { (self.at(i, j) / norms).clamp(-1.0, 1.0) } else { 0.0 }
    }

    /// Euclidean distance of two experts.
    pub fn distance(&self, i: usize, j: usize) -> f64 {
        (self.at(i, i) + self.at(j, j) - 2.0 * self.at(i, j)).max(0.0).sqrt()
    }

    /// The Gram matrix of the same vectors at length 1; zero vectors stay.
    pub fn normalized(&self) -> Self {
        let one = |i: usize, j: usize| match i == j {
            true => f64::from(u8::from(self.at(i, i) > 0.0)),
            false => self.cosine(i, j),
        };
        let values = (0..self.count * self.count).map(|k| one(k / self.count, k % self.count));
        Self { count: self.count, values: values.collect() }
    }

    /// The same with experts in another order: row `i` is expert `order[i]`.
    pub fn reordered(&self, order: &[usize]) -> Self {
        let values = order.iter().flat_map(|i| order.iter().map(|j| self.at(*i, *j)));
        Self { count: order.len(), values: values.collect() }
    }
}

/// Gram matrix of long f32 vectors of which a few are in memory at a time.
pub(crate) fn gram_of_blocks(count: usize, load: &dyn Fn(usize) -> Result<Vec<f32>>) -> Result<Gram> {
    use rayon::prelude::*;
    /// Experts in memory at once, twice.
    const BLOCK: usize = 6;
    let mut values = vec![0.0; count * count];
    let blocks: Vec<std::ops::Range<usize>> =
        (0..count).step_by(BLOCK).map(|start| start..count.min(start + BLOCK)).collect();
    for (at, rows) in blocks.iter().enumerate() {
        let left = rows.clone().map(load).collect::<Result<Vec<_>>>()?;
        for columns in &blocks[at..] {
            let loaded = OnceLock::new();
            let right: &Vec<Vec<f32>> = match columns == rows {
                true => &left,
                false => {
                    let right = columns.clone().map(load).collect::<Result<Vec<_>>>()?;
                    loaded.get_or_init(|| right)
                }
            };
            let pairs: Vec<(usize, usize)> =
                rows.clone().flat_map(|i| columns.clone().filter(move |j| *j >= i).map(move |j| (i, j))).collect();
            let products: Vec<f64> =
                pairs.par_iter().map(|(i, j)| dot(&left[i - rows.start], &right[j - columns.start])).collect();
            for ((i, j), product) in pairs.into_iter().zip(products) {
                (values[i * count + j], values[j * count + i]) = (product, product);
            }
        }
    }
    Ok(Gram { count, values })
}

//! What routers begin with.

use moe_checkpoint::ExpertWeights;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::RouterStart;
use super::partition::Partition;
use crate::evidence::TokenSample;
use crate::linalg::{cross_gram, gram_of_rows, solve_right};
use crate::{Error, Result};

/// A generator of its own for a purpose: a layer, an expert, a matrix.
pub(super) fn generator(seed: u64, purpose: [u64; 3]) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream((purpose[0] << 40) | (purpose[1] << 8) | purpose[2]);
    random
}

/// A number of the standard normal distribution (Box and Muller).
pub(super) fn normal(random: &mut ChaCha8Rng) -> f32 {
    let (radius, angle): (f64, f64) = (1.0 - random.random::<f64>(), random.random());
    ((-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()) as f32
}

/// What the rows of a router follow from.
pub(super) struct Start<'a> {
    pub start: RouterStart,
    pub layer: usize,
    pub experts: usize,
    pub parts: usize,
    pub top_k: usize,
    /// What the network's output is multiplied by where the teacher compares parts with it.
    pub target: f32,
    pub hidden: usize,
    pub seed: u64,
    /// Directions that were given, `[experts, hidden]`.
    pub prototypes: Option<&'a [f32]>,
    /// Tokens that the layer saw.
    pub sample: Option<&'a TokenSample>,
    /// Tokens of each domain.
    pub domains: Vec<&'a TokenSample>,
}

impl Start<'_> {
    /// The rows, `[experts, hidden]`; `network` gives the dense network and its partition, where they are needed.
    pub fn rows(
        &self,
        network: impl FnOnce() -> Result<(ExpertWeights, Partition)>,
        activation: moe_checkpoint::Activation,
    ) -> Result<Vec<f32>> {
        let missing = |part, what: &str| Error::MissingEvidence { layer: self.layer, part, what: what.into() };
        match self.start {
            RouterStart::Zero => Ok(vec![0.0; self.experts * self.hidden]),
            RouterStart::Random { std } => {
                let mut rows = Vec::with_capacity(self.experts * self.hidden);
                let mut random = generator(self.seed, [self.layer as u64, 0, 0]);
                for _ in 0..self.experts / self.parts_of_copies() {
                    let row: Vec<f32> = (0..self.hidden).map(|_| normal(&mut random) * std as f32).collect();
                    (0..self.parts_of_copies()).for_each(|_| rows.extend_from_slice(&row));
                }
                Ok(rows)
            }
            RouterStart::Prototypes => {
                Ok(self.prototypes.ok_or_else(|| missing("the router", "directions of experts"))?.to_vec())
            }
            RouterStart::Teacher { ridge } if !self.domains.is_empty() => {
                let inputs: Vec<f32> = self.domains.iter().flat_map(|sample| &sample.inputs).copied().collect();
                let share = 1.0 / self.experts as f32;
                let labels = self.domains.iter().enumerate().flat_map(|(domain, sample)| {
                    let label = move |expert: usize| if expert == domain { 1.0 - share } else { -share };
                    (0..sample.tokens() * self.experts).map(move |place| label(place % self.experts))
                });
                self.fitted(&inputs, &labels.collect::<Vec<f32>>(), ridge)
            }
            RouterStart::Teacher { ridge } => {
                let sample = self.sample.ok_or_else(|| missing("the router", "a sample of tokens"))?;
                let (network, partition) = network()?;
                self.teacher(sample, &network, &partition, activation, ridge)
            }
        }
    }

    /// Parts whose rows are alike: those of one copy, if there are several copies.
    fn parts_of_copies(&self) -> usize {
        if self.experts > self.parts { self.parts } else { 1 }
    }

    /// `W = Y^T X (X^T X + lambda I)^-1` for labels `Y [S, E]`: 1 for the k experts with the smallest
    /// `|F_e(x) - t F(x)|^2`, less `k / E`, where `t` is the target's factor.
    fn teacher(
        &self,
        sample: &TokenSample,
        network: &ExpertWeights,
        partition: &Partition,
        activation: moe_checkpoint::Activation,
        ridge: f64,
    ) -> Result<Vec<f32>> {
        let (tokens, hidden, share) = (sample.tokens(), self.hidden, self.top_k as f32 / self.experts as f32);
        if tokens == 0 {
            return Err(Error::MissingEvidence { layer: self.layer, part: "the router", what: "a token".into() });
        }
        let routed = network.select_units(&partition.parts.concat())?;
        let mut target = routed.forward(&sample.inputs, activation); // [S, H]
        target.iter_mut().for_each(|value| *value *= self.target);
        let mut distances = vec![0f64; tokens * self.experts];
        for (expert, units) in partition.parts.iter().enumerate() {
            let output = network.select_units(units)?.forward(&sample.inputs, activation);
            for (token, (output, target)) in output.chunks_exact(hidden).zip(target.chunks_exact(hidden)).enumerate() {
                let distance = output.iter().zip(target).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                distances[token * self.experts + expert] = distance;
            }
        }
        let mut labels = vec![-share; tokens * self.experts];
        for (labels, distances) in labels.chunks_exact_mut(self.experts).zip(distances.chunks_exact(self.experts)) {
            let mut order: Vec<usize> = (0..self.experts).collect();
            order.sort_by(|a, b| distances[*a].total_cmp(&distances[*b]).then(a.cmp(b)));
            order.into_iter().take(self.top_k).for_each(|expert| labels[expert] += 1.0);
        }
        self.fitted(&sample.inputs, &labels, ridge)
    }

    /// The rows whose logits are nearest to `labels [S, E]` on `inputs [S, H]`.
    fn fitted(&self, inputs: &[f32], labels: &[f32], ridge: f64) -> Result<Vec<f32>> {
        let hidden = self.hidden;
        let mut gram = gram_of_rows(inputs, hidden);
        let mean = (0..hidden).map(|i| gram[(i, i)]).sum::<f64>() / hidden as f64;
        (0..hidden).for_each(|i| gram[(i, i)] += ridge * mean.max(f64::MIN_POSITIVE));
        let rows = solve_right(&gram, &cross_gram(labels, self.experts, inputs, hidden))?; // [E, H]
        Ok((0..self.experts * hidden).map(|i| rows[(i / hidden, i % hidden)] as f32).collect())
    }
}

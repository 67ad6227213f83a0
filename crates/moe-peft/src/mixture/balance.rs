//! Losses that keep routers from using few experts.
//!
//! Each is a mean over tokens or a figure of a whole wave. Its gradient joins that of the *sum* of token losses, so
//! that it is multiplied by the wave's predicted tokens: the objective is that of a mean loss plus the balance loss.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use moe_core::trace::WaveInfo;
use serde::{Deserialize, Serialize};

use super::gate::{Gated, entropy, entropy_gradient};
use crate::{Error, Result, SweepListener};

/// A balance loss. `N` experts, `T` tokens, `p` probabilities, `w` weights, `P_i` the mean of `p_i`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Balance {
    /// Nothing is added to the loss.
    None {},
    /// `c N sum_i f_i P_i`: `f_i` the share of choices that are expert i. With `per_choice`, of tokens, as in Mixtral's
    /// code: k times as much.
    Load {
        /// `c`.
        coefficient: f64,
        /// Which routers count together.
        scope: Scope,
        /// Whether the shares of all choices together are 1 or k.
        per_choice: bool,
    },
    /// `entropy mean H + load N sum_i mean(w_i) P_i` with the entropy of [`Gate::Uncertain`](super::Gate::Uncertain)
    /// (DynMoLE). Both over real tokens only; the authors' mean of `H` has padding in it.
    Entropy {
        /// Of the entropy.
        q: f64,
        /// Added to probabilities in it.
        epsilon: f64,
        /// Coefficient of the entropy.
        entropy: f64,
        /// Coefficient of the load.
        load: f64,
    },
    /// `weight D(Z)`, `Z_bi = Q_bi (1 + delta if the group of i is the type of sequence b, else 1 - delta)`, `Q_bi` the
    /// sum of `p_i` over the sequence; the first half of the experts is the group of type 1, the second that of type 0
    /// (LoRAMoE). Only sequences with a label count. Minimizing makes `Z` equal, so that the group of a sequence's type
    /// gets *less*: the convention of the code.
    Localized {
        /// Factor of the term in the loss.
        weight: f64,
        /// How much the groups differ.
        delta: f64,
        /// `D`.
        dispersion: Dispersion,
    },
    /// `load sum_i f_i P_i - entropy mean H` with Shannon's entropy in nats and `f` the share of tokens whose best is i
    /// (LoRA-Mixer). As written, a positive `entropy` spreads the routing.
    Specialization {
        /// Coefficient of the load.
        load: f64,
        /// Coefficient of the entropy, of either sign.
        entropy: f64,
    },
}

/// Which routers a loss counts together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Each by itself.
    Router,
    /// Those of a layer.
    Layer,
    /// All of the model.
    Model,
}

/// How [`Balance::Localized`] measures inequality; the variance is unbiased.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dispersion {
    /// Variance over the squared mean: the code.
    CvSquared,
    /// Variance over the mean: the paper.
    VarOverMean,
}

impl Balance {
    /// That of MoLA: over the routers of a layer, 1 where experts are used alike.
    pub fn mola(coefficient: f64) -> Self {
        Self::Load { coefficient, scope: Scope::Layer, per_choice: false }
    }

    /// That of MixLoRA and Mixtral: over all routers, k where experts are used alike.
    pub fn mixtral(coefficient: f64) -> Self {
        Self::Load { coefficient, scope: Scope::Model, per_choice: true }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let values: Vec<(&str, f64, bool)> = match *self {
            Self::None {} => vec![],
            Self::Load { coefficient, .. } => vec![("coefficient", coefficient, true)],
            Self::Entropy { q, epsilon, entropy, load } => {
                vec![("q", q, true), ("epsilon", epsilon, true), ("entropy", entropy, true), ("load", load, true)]
            }
            Self::Localized { weight, delta, .. } => vec![("weight", weight, true), ("delta", delta, true)],
            Self::Specialization { load, entropy } => vec![("load", load, true), ("entropy", entropy, false)],
        };
        for (field, value, positive) in values {
            if !value.is_finite() || (positive && value < 0.0) {
                let expected = if positive { "a finite number of 0 or more" } else { "a finite number" };
                return Err(Error::input(format!("balance.{field}"), value, expected));
            }
        }
        Ok(())
    }
}

/// What a router did with some tokens of a wave.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chunk {
    pub tokens: usize,
    /// Choices of each expert.
    pub counts: Vec<f64>,
    /// Tokens whose most probable it is.
    pub first: Vec<f64>,
    /// Sums over the tokens.
    pub p: Vec<f64>,
    pub w: Vec<f64>,
    pub entropy: f64,
    /// Sums of `p` by sequence.
    pub sequences: BTreeMap<usize, Vec<f64>>,
}

impl Chunk {
    fn add(&mut self, other: &Self) {
        let add = |sum: &mut Vec<f64>, values: &[f64]| {
            sum.resize(sum.len().max(values.len()), 0.0);
            sum.iter_mut().zip(values).for_each(|(sum, v)| *sum += v);
        };
        self.tokens += other.tokens;
        self.entropy += other.entropy;
        add(&mut self.counts, &other.counts);
        add(&mut self.first, &other.first);
        add(&mut self.p, &other.p);
        add(&mut self.w, &other.w);
        for (sequence, p) in &other.sequences {
            add(self.sequences.entry(*sequence).or_default(), p);
        }
    }
}

/// The wave that is running, for all routers of a mixture.
#[derive(Debug, Default)]
pub(crate) struct Running {
    state: RwLock<State>,
    /// Labels of the sequences of waves.
    labels: RwLock<BTreeMap<u64, Vec<usize>>>,
}

#[derive(Debug, Default)]
struct State {
    loss_tokens: usize,
    sequences: Vec<Range<usize>>,
    labels: Vec<usize>,
}

impl Running {
    pub fn set_labels(&self, labels: BTreeMap<u64, Vec<usize>>) {
        *self.labels.write().unwrap_or_else(PoisonError::into_inner) = labels;
    }

    pub fn begin(&self, wave: &WaveInfo) {
        let labels = self.labels.read().unwrap_or_else(PoisonError::into_inner);
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = State {
            loss_tokens: wave.loss_tokens(),
            sequences: wave.sequences.iter().map(|sequence| sequence.tokens.clone()).collect(),
            labels: labels.get(&wave.id).cloned().unwrap_or_default(),
        };
    }

    pub fn loss_tokens(&self) -> usize {
        self.state.read().unwrap_or_else(PoisonError::into_inner).loss_tokens
    }

    /// The sequence of a token.
    pub fn sequence(&self, token: usize) -> Option<usize> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.sequences.iter().position(|range| range.contains(&token))
    }

    pub fn label(&self, sequence: usize) -> Option<usize> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).labels.get(sequence).copied()
    }
}

/// Routers whose loss counts together.
#[derive(Debug)]
pub(crate) struct Group {
    pub balance: Balance,
    running: Arc<Running>,
    /// By router and first token: a layer that is computed again gives the same again.
    chunks: Mutex<BTreeMap<(usize, usize), Chunk>>,
}

impl SweepListener for Group {
    fn begin_wave(&self, _: &WaveInfo) {
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Group {
    pub fn new(balance: Balance, running: Arc<Running>) -> Arc<Self> {
        Arc::new(Self { balance, running, chunks: Mutex::default() })
    }

    /// Notes the gates of rows of a wave.
    pub fn note(&self, router: usize, gated: &Gated, n: usize, width: usize, token: &dyn Fn(usize) -> usize) {
        if self.balance == (Balance::None {}) || gated.p.is_empty() || n == 0 {
            return;
        }
        let mut chunk = Chunk { tokens: n, ..Chunk::default() };
        for values in [&mut chunk.counts, &mut chunk.first, &mut chunk.p, &mut chunk.w] {
            values.resize(width, 0.0);
        }
        let by_sequence = matches!(self.balance, Balance::Localized { .. });
        for row in 0..n {
            let range = row * width..(row + 1) * width;
            let p = &gated.p[range.clone()];
            for (i, at) in range.enumerate() {
                chunk.counts[i] += f64::from(u8::from(gated.chosen[at]));
                chunk.p[i] += f64::from(p[i]);
                chunk.w[i] += f64::from(gated.weights[at]);
            }
            let best = (1..width).fold(0, |best, i| if p[i] > p[best] { i } else { best });
            chunk.first[best] += 1.0;
            chunk.entropy += match self.balance {
                Balance::Entropy { q, epsilon, .. } => entropy(p, q, epsilon),
                Balance::Specialization { .. } => entropy(p, 1.0, 0.0) * (width as f64).ln(),
                _ => 0.0,
            };
            if by_sequence && let Some(sequence) = self.running.sequence(token(row)) {
                let sums = chunk.sequences.entry(sequence).or_insert_with(|| vec![0.0; width]);
                sums.iter_mut().zip(p).for_each(|(sum, p)| *sum += f64::from(*p));
            }
        }
        let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        chunks.insert((router, token(0)), chunk);
    }

    fn total(&self) -> Chunk {
        let chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        let mut total = Chunk::default();
        chunks.values().for_each(|chunk| total.add(chunk));
        total
    }

    /// The loss of the wave so far.
    pub fn loss(&self) -> f64 {
        loss(&self.balance, &self.total(), |sequence| self.running.label(sequence))
    }

    /// The gradient of predicted tokens times the loss with respect to `p [n, N]`; empty if there is none.
    pub fn gradient(&self, gated: &Gated, n: usize, width: usize, token: &dyn Fn(usize) -> usize) -> Vec<f32> {
        if self.balance == (Balance::None {}) || gated.p.is_empty() {
            return Vec::new();
        }
        let total = self.total();
        let factor = self.running.loss_tokens() as f64;
        let tokens = total.tokens.max(1) as f64;
        let mut d = vec![0.0f32; n * width];
        let localized = match self.balance {
            Balance::Localized { .. } => localized_gradient(&self.balance, &total, |s| self.running.label(s)),
            _ => BTreeMap::new(),
        };
        let shares = shares(&self.balance, &total);
        for row in 0..n {
            let range = row * width..(row + 1) * width;
            let (p, chosen, d) = (&gated.p[range.clone()], &gated.chosen[range.clone()], &mut d[range]);
            let mut add = |i: usize, value: f64| d[i] += (factor * value) as f32;
            match self.balance {
                Balance::None {} => {}
                Balance::Load { coefficient, .. } => {
                    (0..width).for_each(|i| add(i, coefficient * width as f64 * shares[i] / tokens));
                }
                Balance::Entropy { q, epsilon, entropy, load } => {
                    for (i, slope) in entropy_gradient(p, q, epsilon).enumerate() {
                        let used = f64::from(u8::from(chosen[i]));
                        let load = load * width as f64 * (used * total.p[i] + total.w[i]) / tokens;
                        add(i, (entropy * slope + load) / tokens);
                    }
                }
                Balance::Specialization { load, entropy } => {
                    for (i, slope) in entropy_gradient(p, 1.0, 0.0).enumerate() {
                        add(i, (load * shares[i] - entropy * slope * (width as f64).ln()) / tokens);
                    }
                }
                Balance::Localized { .. } => {
                    if let Some(values) = self.running.sequence(token(row)).and_then(|s| localized.get(&s)) {
                        (0..width).for_each(|i| add(i, values[i]));
                    }
                }
            }
        }
        d
    }
}

/// `f`.
fn shares(balance: &Balance, total: &Chunk) -> Vec<f64> {
    let (values, sum) = match balance {
        Balance::Load { per_choice: false, .. } => (&total.counts, total.counts.iter().sum::<f64>()),
        Balance::Specialization { .. } => (&total.first, total.tokens as f64),
        _ => (&total.counts, total.tokens as f64),
    };
    values.iter().map(|value| value / sum.max(1.0)).collect()
}

fn loss(balance: &Balance, total: &Chunk, label: impl Fn(usize) -> Option<usize>) -> f64 {
    let (tokens, n) = (total.tokens.max(1) as f64, total.p.len() as f64);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    match *balance {
        Balance::None {} => 0.0,
        Balance::Load { coefficient, .. } => coefficient * n * dot(&shares(balance, total), &total.p) / tokens,
        Balance::Entropy { entropy, load, .. } => {
            entropy * total.entropy / tokens + load * n * dot(&total.w, &total.p) / (tokens * tokens)
        }
        Balance::Specialization { load, entropy } => {
            load * dot(&shares(balance, total), &total.p) / tokens - entropy * total.entropy / tokens
        }
        Balance::Localized { weight, delta, dispersion } => {
            let z: Vec<f64> = weighted(total, delta, label).into_values().flatten().map(|(z, _)| z).collect();
            match moments(&z) {
                Some((mean, variance)) => match dispersion {
                    Dispersion::CvSquared => weight * variance / (mean * mean + 1e-10),
                    Dispersion::VarOverMean => weight * variance / (mean + 1e-10),
                },
                None => 0.0,
            }
        }
    }
}

/// `Z` and the factor in it, by sequence with a label.
fn weighted(total: &Chunk, delta: f64, label: impl Fn(usize) -> Option<usize>) -> BTreeMap<usize, Vec<(f64, f64)>> {
    let of = |(sequence, q): (&usize, &Vec<f64>)| {
        let kind = label(*sequence)?;
        let factor = |i: usize| {
            let group = usize::from(i < q.len() / 2);
            if group == kind { 1.0 + delta } else { 1.0 - delta }
        };
        Some((*sequence, q.iter().enumerate().map(|(i, q)| (q * factor(i), factor(i))).collect()))
    };
    total.sequences.iter().filter_map(of).collect()
}

/// Mean and unbiased variance; `None` of fewer than two.
fn moments(z: &[f64]) -> Option<(f64, f64)> {
    let n = z.len() as f64;
    (z.len() > 1).then(|| {
        let mean = z.iter().sum::<f64>() / n;
        (mean, z.iter().map(|z| (z - mean).powi(2)).sum::<f64>() / (n - 1.0))
    })
}

/// The gradient at `Q`, by sequence.
fn localized_gradient(
    balance: &Balance,
    total: &Chunk,
    label: impl Fn(usize) -> Option<usize>,
) -> BTreeMap<usize, Vec<f64>> {
    let Balance::Localized { weight, delta, dispersion } = *balance else { return BTreeMap::new() };
    let weighted = weighted(total, delta, label);
    let z: Vec<f64> = weighted.values().flatten().map(|(z, _)| *z).collect();
    let Some((mean, variance)) = moments(&z) else { return BTreeMap::new() };
    let n = z.len() as f64;
    let slope = |z: f64| {
        let d_variance = 2.0 * (z - mean) / (n - 1.0);
        match dispersion {
            Dispersion::CvSquared => {
                let square = mean * mean + 1e-10;
                d_variance / square - variance * 2.0 * mean / n / (square * square)
            }
            Dispersion::VarOverMean => d_variance / (mean + 1e-10) - variance / n / (mean + 1e-10).powi(2),
        }
    };
    let of = |values: Vec<(f64, f64)>| values.into_iter().map(|(z, factor)| weight * slope(z) * factor).collect();
    weighted.into_iter().map(|(sequence, values)| (sequence, of(values))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mixture::gate::{Context, Gate};
    use moe_core::trace::SequenceInfo;

    fn logits(p: &[f32]) -> Vec<f32> {
        p.iter().map(|p| p.ln()).collect()
    }

    fn gates(gate: Gate, p: &[f32], n: usize) -> Gated {
        let labels: &dyn Fn(usize) -> Option<usize> = &|_| None;
        gate.forward(&logits(p), n, p.len() / n, &Context { training: true, bias: &[], labels })
    }

    fn group(balance: Balance, labels: Vec<usize>) -> Arc<Group> {
        let running = Arc::new(Running::default());
        running.set_labels([(3, labels)].into());
        let sequence = |tokens: Range<usize>| SequenceInfo { loss_tokens: tokens.len(), tokens };
        running.begin(&WaveInfo { id: 3, tokens: 2, ids: Vec::new(), sequences: vec![sequence(0..1), sequence(1..2)] });
        Group::new(balance, running)
    }

    #[test]
    fn shares_of_choices_and_of_tokens() {
        let p = [0.4, 0.3, 0.2, 0.1, 0.1, 0.6, 0.1, 0.2];
        let gated = gates(Gate::TopK { k: 2 }, &p, 2);
        let loss = |balance| {
            let group = group(balance, vec![]);
            group.note(0, &gated, 2, 4, &|row| row);
            // again, as when a layer is computed again
            group.note(0, &gated, 2, 4, &|row| row);
            group.loss()
        };
        assert!((loss(Balance::mola(1.0)) - 1.3).abs() < 1e-6);
        assert!((loss(Balance::mixtral(1.0)) - 2.6).abs() < 1e-6);
    }

    #[test]
    fn sequences_of_two_types() {
        let balance = |delta, dispersion| Balance::Localized { weight: 1.0, delta, dispersion };
        let chunk = Chunk {
            tokens: 8,
            p: vec![0.0; 4],
            sequences: [(0, vec![2.0, 1.0, 1.0, 0.0]), (1, vec![0.5, 0.5, 1.0, 2.0])].into(),
            ..Chunk::default()
        };
        let label = |sequence: usize| Some(1 - sequence);
        let found = |delta, dispersion| loss(&balance(delta, dispersion), &chunk, label);
        assert!((found(0.1, Dispersion::CvSquared) - 0.582_443).abs() < 1e-6);
        assert!((found(0.1, Dispersion::VarOverMean) - 0.611_565).abs() < 1e-6);
        // without groups it is the dispersion of Q, and nothing where that is constant
        let (mean, variance) = moments(&[2.0, 1.0, 1.0, 0.0, 0.5, 0.5, 1.0, 2.0]).unwrap();
        assert!((found(0.0, Dispersion::CvSquared) - variance / (mean * mean)).abs() < 1e-9);
        let constant = Chunk { sequences: [(0, vec![1.0; 4])].into(), ..chunk.clone() };
        assert!(loss(&balance(0.0, Dispersion::CvSquared), &constant, label).abs() < 1e-12);
        // and nothing without labels
        assert_eq!(loss(&balance(0.1, Dispersion::CvSquared), &chunk, |_| None), 0.0);
    }

    #[test]
    fn gradients_are_those_of_difference_quotients() {
        let p = [0.4f32, 0.3, 0.2, 0.1, 0.15, 0.5, 0.1, 0.25];
        for (balance, gate) in [
            (Balance::mola(0.5), Gate::TopK { k: 2 }),
            (Balance::mixtral(0.5), Gate::TopK { k: 2 }),
            (Balance::Entropy { q: 1.1, epsilon: 1e-5, entropy: 0.3, load: 0.7 }, Gate::Dense {}),
            (Balance::Specialization { load: 0.6, entropy: 0.2 }, Gate::Dense {}),
            (Balance::Localized { weight: 0.5, delta: 0.1, dispersion: Dispersion::CvSquared }, Gate::Dense {}),
            (Balance::Localized { weight: 0.5, delta: 0.1, dispersion: Dispersion::VarOverMean }, Gate::Dense {}),
        ] {
            let group = group(balance, vec![1, 0]);
            let gated = gates(gate, &p, 2);
            group.note(0, &gated, 2, 4, &|row| row);
            let found = group.gradient(&gated, 2, 4, &|row| row);
            for (i, found) in found.iter().enumerate() {
                // of two predicted tokens; probabilities move by themselves, choices stay
                let at = |h: f32| {
                    let mut moved = gates(gate, &p, 2);
                    moved.p[i] += h;
                    if gate == (Gate::Dense {}) {
                        moved.weights[i] += h;
                    }
                    group.note(0, &moved, 2, 4, &|row| row);
                    2.0 * group.loss()
                };
                let quotient = (at(1e-3) - at(-1e-3)) / 2e-3;
                assert!((quotient - f64::from(*found)).abs() < 2e-3, "{balance:?} {i}: {found} {quotient}");
            }
        }
    }
}

//! Generation with a key/value cache, many prompts at a time, without padding.

use std::ops::Range;

use burn::tensor::{Device, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{
    engine::{Engine, EngineOptions, FfnPass, LayerTape},
    error::{Error, Result},
    host::{self, HostView},
    kernels::{attention::AttentionShape, rope::Positions, rows::gather_rows},
    layers::slice_rows,
    memory::{self, MemoryPlan, WaveSize},
    model::Model,
    trace::{Nobody, WaveInfo},
};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    /// The most likely token; the lower id on a tie.
    Greedy,
    /// Temperature and nucleus sampling: from the smallest set of tokens whose probability reaches `top_p`.
    TopP {
        /// Divides the logits; above 0.
        temperature: f32,
        /// In (0, 1].
        top_p: f32,
        /// Seed; every prompt has its own stream, so results do not depend on batching.
        seed: u64,
    },
}

/// Options of [`generate`].
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// New tokens per prompt, at most.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Token ids that end a completion (not part of it).
    pub stop: Vec<u32>,
    /// Prompt tokens processed together, about; bounds memory.
    pub batch_tokens: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 64, sampling: Sampling::Greedy, stop: Vec::new(), batch_tokens: 8192 }
    }
}

/// Continues each prompt. `ended(completion)` may end one early, after the token it has just seen.
///
/// # Errors
/// [`Error::Input`] for an empty prompt, an id outside the vocabulary or sampling parameters out of range;
/// [`Error::Memory`] if `max_memory` cannot hold the job.
pub fn generate(
    model: &Model,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    mut ended: impl FnMut(&[u32]) -> bool,
) -> Result<Vec<Vec<u32>>> {
    if let Sampling::TopP { temperature, top_p, .. } = options.sampling {
        if !(temperature > 0.0 && temperature.is_finite()) {
            return Err(Error::input("temperature", temperature, "a finite number above 0"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::input("top_p", top_p, "a number in (0, 1]"));
        }
    }
    if let Some(i) = prompts.iter().position(Vec::is_empty) {
        return Err(Error::input(format!("prompt {i}"), "no tokens", "at least one"));
    }
    check_memory(model, prompts, options)?;
    let mut completions = Vec::with_capacity(prompts.len());
    for batch in batches(prompts, options.batch_tokens) {
        completions.extend(generate_batch(model, &prompts[batch.clone()], batch.start, options, &mut ended)?);
    }
    Ok(completions)
}

/// Checks that the memory limit of `model` can hold every batch.
///
/// # Errors
/// [`Error::Memory`].
pub fn check_memory(model: &Model, prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<()> {
    batches(prompts, options.batch_tokens).into_iter().try_for_each(|batch| plan(model, &prompts[batch]).map(drop))
}

/// Consecutive prompts of about `tokens` tokens.
fn batches(prompts: &[Vec<u32>], tokens: usize) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut filled = 0;
    for (i, prompt) in prompts.iter().enumerate() {
        match batches.last_mut().filter(|_| filled + prompt.len() <= tokens) {
            Some(batch) => batch.end = i + 1,
            None => {
                batches.push(i..i + 1);
                filled = 0;
            }
        }
        filled += prompt.len();
    }
    batches
}

fn plan(model: &Model, prompts: &[Vec<u32>]) -> Result<MemoryPlan> {
    let size = WaveSize {
        tokens: prompts.iter().map(Vec::len).sum(),
        gradients: false,
        head: true,
        head_tokens: prompts.len(),
        experts_together: memory::experts_together(model.device()),
        waiting: 0,
    };
    memory::plan(model.config(), size, memory::limit(model.max_memory()))
}

fn generate_batch(
    model: &Model,
    prompts: &[Vec<u32>],
    first: usize,
    options: &GenerateOptions,
    ended: &mut impl FnMut(&[u32]) -> bool,
) -> Result<Vec<Vec<u32>>> {
    let plan = plan(model, prompts)?;
    model.set_residency(plan.residency);

    let lengths = prompts.iter().map(|prompt| prompt.len() + options.max_new_tokens).collect();
    let mut decoder = Decoder::new(model, lengths);
    let mut completions = vec![Vec::new(); prompts.len()];
    let mut random: Vec<ChaCha8Rng> = match options.sampling {
        Sampling::TopP { seed, .. } => (first..first + prompts.len())
            .map(|i| {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream(i as u64);
                rng
            })
            .collect(),
        Sampling::Greedy => Vec::new(),
    };
    let mut active: Vec<usize> = (0..prompts.len()).collect();
    let mut input: Vec<Vec<u32>> = prompts.to_vec();
    for _ in 0..options.max_new_tokens {
        if active.is_empty() {
            break;
        }
        let logits = decoder.step(&active, &input)?;
        let logits = HostView::new(&logits);
        let vocab = model.config().vocab_size;
        let mut still = Vec::new();
        input.clear();
        for (&sequence, logits) in active.iter().zip(logits.as_slice().chunks_exact(vocab)) {
            let token = match options.sampling {
                Sampling::Greedy => greedy(logits),
                Sampling::TopP { temperature, top_p, .. } => {
                    sample(logits, temperature, top_p, random[sequence].random::<f32>())
                }
            };
            if options.stop.contains(&token) {
                continue;
            }
            completions[sequence].push(token);
            if !ended(&completions[sequence]) {
                still.push(sequence);
                input.push(vec![token]);
            }
        }
        active = still;
    }
    Ok(completions)
}

fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// Nucleus sampling with `random` in [0, 1).
fn sample(logits: &[f32], temperature: f32, top_p: f32, random: f32) -> u32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut candidates: Vec<(u32, f32)> =
        logits.iter().enumerate().map(|(i, l)| (i as u32, ((l - max) / temperature).exp())).collect();
    candidates.sort_by(|a, b| b.1.total_cmp(&a.1));
    let total: f32 = candidates.iter().map(|c| c.1).sum();
    let mut mass = 0.0;
    let nucleus = candidates
        .iter()
        .position(|c| {
            mass += c.1;
            mass >= top_p * total
        })
        .map_or(candidates.len(), |i| i + 1);
    let mut remaining = random * candidates[..nucleus].iter().map(|c| c.1).sum::<f32>();
    for (id, weight) in &candidates[..nucleus] {
        if remaining < *weight {
            return *id;
        }
        remaining -= weight;
    }
    candidates[nucleus - 1].0
}

/// Keys and values of one sequence in one layer, `[length, kv_heads * D]` each. Values of latent attention are its keys.
#[derive(Default)]
struct KeyValues {
    length: usize,
    keys: Growing,
    values: Option<Growing>,
}

/// Rows that accumulate on their device.
#[derive(Default)]
struct Growing {
    host: Vec<f32>,
    device: Option<Tensor<2>>,
}

impl KeyValues {
    fn push(&mut self, k: Tensor<2>, v: Option<Tensor<2>>, device: &Device) {
        self.length += k.dims()[0];
        self.keys.push(k, device);
        if let Some(v) = v {
            self.values.get_or_insert_default().push(v, device);
        }
    }

    fn values(&self) -> &Growing {
        self.values.as_ref().unwrap_or(&self.keys)
    }
}

impl Growing {
    fn push(&mut self, rows: Tensor<2>, device: &Device) {
        if host::is_host(device) {
            self.host.extend_from_slice(HostView::new(&rows).as_slice());
        } else {
            self.device = Some(match self.device.take() {
                Some(all) => Tensor::cat(vec![all, rows], 0),
                None => rows,
            });
        }
    }
}

struct Decoder<'m> {
    model: &'m Model,
    engine: Engine<'m>,
    /// `[layer][sequence]`.
    cache: Vec<Vec<KeyValues>>,
    /// Tokens each sequence may have in the end.
    lengths: Vec<usize>,
}

impl<'m> Decoder<'m> {
    fn new(model: &'m Model, lengths: Vec<usize>) -> Self {
        let layers = model.config().layers.iter();
        let cache = layers.map(|_| lengths.iter().map(|_| KeyValues::default()).collect()).collect();
        Self { model, engine: Engine::new(model, EngineOptions::default()), cache, lengths }
    }

    /// Feeds new tokens of the sequences `active`; logits after the last token of each, `[active, V]`.
    fn step(&mut self, active: &[usize], input: &[Vec<u32>]) -> Result<Tensor<2>> {
        let (model, device) = (self.model, self.model.device());
        let ids: Vec<u32> = input.iter().flatten().copied().collect();
        let mut spans = Vec::with_capacity(active.len());
        let mut start = 0;
        for tokens in input {
            spans.push(start..start + tokens.len());
            start += tokens.len();
        }
        let positions: Vec<Positions> = active
            .iter()
            .zip(&spans)
            .map(|(&s, span)| {
                let start = self.cache[0][s].length;
                Positions { range: start..start + span.len(), length: self.lengths[s] }
            })
            .collect();
        let table = model.rope().table(&positions);
        let info = WaveInfo { id: 0, tokens: ids.len(), sequences: Vec::new() };
        let mut x = model.embed(&ids)?;
        for layer in 0..model.config().layers.len() {
            let attention = model.attention(layer)?;
            let entry = attention.cache_entry(&x, &table);
            for (&sequence, span) in active.iter().zip(&spans) {
                let rows = |t: &Tensor<2>| slice_rows(t, span);
                self.cache[layer][sequence].push(rows(&entry.k), entry.v.as_ref().map(rows), device);
            }
            let heads = self.attend(layer, &entry.q, active, &spans, &attention.cached_shape());
            let middle = attention.residual(&x, &attention.cached_heads(heads));
            x = self.engine.ffn_forward(FfnPass::new(layer, &info), &middle, &mut LayerTape::default(), &mut Nobody)?;
        }
        let last: Vec<u32> = spans.iter().map(|s| s.end as u32 - 1).collect();
        let norm = model.final_norm()?;
        let h = norm.forward(&gather_rows(&x, &last));
        Ok(Tensor::cat(model.head_forward(&h)?, 1))
    }

    fn attend(
        &self,
        layer: usize,
        q: &Tensor<2>,
        active: &[usize],
        spans: &[Range<usize>],
        shape: &AttentionShape,
    ) -> Tensor<2> {
        let cache = &self.cache[layer];
        #[cfg(feature = "flex")]
        if host::is_host(&q.device()) {
            use crate::kernels::attention::cpu::{Cached, forward_spans};
            let cached: Vec<Cached<'_>> = active
                .iter()
                .zip(spans)
                .map(|(&s, span)| Cached {
                    queries: span.clone(),
                    keys: &cache[s].keys.host,
                    values: &cache[s].values().host,
                })
                .collect();
            return forward_spans(q, &cached, shape);
        }
        let outputs = active
            .iter()
            .zip(spans)
            .map(|(&s, span)| {
                let rows = |x: &Growing| x.device.clone().expect("pushed above");
                let (k, v) = (rows(&cache[s].keys), rows(cache[s].values()));
                crate::kernels::attention::attention_cached(&slice_rows(q, span), &k, &v, shape)
            })
            .collect();
        Tensor::cat(outputs, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_lower_id_on_a_tie() {
        assert_eq!(greedy(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(greedy(&[f32::NEG_INFINITY, -5.0]), 1);
    }

    #[test]
    fn sampling_stays_in_the_nucleus_and_follows_probabilities() {
        let logits = [0.0, 2.0, 1.0, -3.0];
        assert!((0..100).all(|i| sample(&logits, 1.0, 0.5, i as f32 / 100.0) == 1));
        let n = 10_000;
        let hits = (0..n).filter(|&i| sample(&logits, 1.0, 1.0, i as f32 / n as f32) == 2).count();
        let total: f64 = logits.iter().map(|l: &f32| (*l as f64).exp()).sum();
        assert!((hits as f64 / n as f64 - 1f64.exp() / total).abs() < 1e-3);
        assert_eq!(sample(&logits, 0.01, 1.0, 0.999), 1);
    }
}

//! Generation with a key/value cache, many prompts at a time, without padding.

use std::ops::Range;

use burn::tensor::{Device, Tensor};
use moe_checkpoint::{LayerConfig, Mixer};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{
    engine::{Engine, EngineOptions, FfnPass, LayerTape},
    error::{Error, Result},
    host::{self, HostView},
    kernels::{attention::AttentionShape, rope::Positions, rows::gather_rows},
    layers::{ConvolutionState, DeltaState, MambaState, MixerLayer, slice_rows},
    memory::{self, MemoryPlan, Residency, WaveSize},
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
    /// Prompt tokens processed together, about. Batches are smaller where the memory limit of the model asks for it;
    /// that changes the sums that make a logit in their last bits only.
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
    if let Some(longest) = prompts.iter().map(Vec::len).max() {
        model.check_length(longest + options.max_new_tokens)?;
    }
    let mut completions = Vec::with_capacity(prompts.len());
    for (batch, plan) in batches(model, prompts, options)? {
        model.set_residency(plan.residency);
        completions.extend(generate_batch(model, &prompts[batch.clone()], batch.start, options, &mut ended)?);
    }
    Ok(completions)
}

/// Checks that the memory limit of `model` can hold every prompt and its completion.
///
/// # Errors
/// [`Error::Memory`].
pub fn check_memory(model: &Model, prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<()> {
    batches(model, prompts, options).map(drop)
}

/// Consecutive prompts of about `batch_tokens` tokens together, and how each batch uses memory.
fn batches(model: &Model, prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<Vec<(Range<usize>, MemoryPlan)>> {
    let limit = memory::limit(model.max_memory());
    let mut batches: Vec<(Range<usize>, MemoryPlan)> = Vec::new();
    let mut filled = 0;
    for (i, prompt) in prompts.iter().enumerate() {
        if let Some((batch, current)) = batches.last_mut().filter(|_| filled + prompt.len() <= options.batch_tokens)
            && let Ok(larger) = plan(model, &prompts[batch.start..=i], options, limit)
            // All weights in memory is worth more than a larger batch. Where they are read again for every token, it is
            // not.
            && (larger.residency == current.residency || !everything_stays(model, current))
        {
            (batch.end, *current) = (i + 1, larger);
            filled += prompt.len();
        } else {
            batches.push((i..i + 1, plan(model, &prompts[i..=i], options, limit)?));
            filled = prompt.len();
        }
    }
    Ok(batches)
}

fn everything_stays(model: &Model, plan: &MemoryPlan) -> bool {
    let experts = model.checkpoint().shape().layers.iter().map(|layer| layer.num_experts()).sum::<usize>();
    plan.residency == Residency { head: true, layers: model.config().layers.len(), experts }
}

/// How a batch uses `limit` bytes, the keys and values of the tokens that there may be in the end included.
fn plan(model: &Model, prompts: &[Vec<u32>], options: &GenerateOptions, limit: u64) -> Result<MemoryPlan> {
    let tokens = prompts.iter().map(Vec::len).sum();
    let size = WaveSize {
        tokens,
        gradients: false,
        head: true,
        head_tokens: prompts.len(),
        experts_together: memory::experts_together(model.device()),
        waiting: 0,
        decoded_per_use: model.decodes_per_use(),
    };
    let in_the_end = tokens.saturating_add(prompts.len().saturating_mul(options.max_new_tokens)) as u64;
    let states = (prompts.len() as u64).saturating_mul(memory::sequence_state_bytes(model.config()));
    let cache = in_the_end.saturating_mul(memory::cached_token_bytes(model.config())).saturating_add(states);
    match memory::plan(model.config(), size, limit.saturating_sub(cache)) {
        Ok(plan) => Ok(MemoryPlan { expected: plan.expected + cache, ..plan }),
        Err(Error::Memory { needed, what, .. }) => {
            let what = format!("{what} and keys and values of {in_the_end} tokens");
            Err(Error::Memory { limit, needed: needed.saturating_add(cache), what })
        }
        Err(other) => Err(other),
    }
}

fn generate_batch(
    model: &Model,
    prompts: &[Vec<u32>],
    first: usize,
    options: &GenerateOptions,
    ended: &mut impl FnMut(&[u32]) -> bool,
) -> Result<Vec<Vec<u32>>> {
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

/// Keys and values of one sequence in one layer, `[length, kv_heads * D]` each. Values of latent attention are its
/// keys.
#[derive(Default)]
struct KeyValues {
    keys: Growing,
    values: Option<Growing>,
}

/// What is kept of one sequence in one layer.
// One per layer, and the larger variant is the usual one.
#[allow(clippy::large_enum_variant)]
enum Kept {
    /// Its keys and values, which grow.
    Attention(KeyValues),
    /// The state of a linear attention, which does not; none before the first token.
    Delta(Option<DeltaState>),
    /// The last rows of a short convolution; none before the first token.
    Convolution(Option<ConvolutionState>),
    /// The state of a state space layer; none before the first token.
    Mamba(Option<MambaState>),
    /// Nothing, of a layer that does not look at other tokens.
    None,
}

/// Rows that accumulate on their device.
#[derive(Default)]
struct Growing {
    host: Vec<f32>,
    device: Option<Tensor<2>>,
}

impl KeyValues {
    /// Adds tokens of a sequence that has at most `length` of them in the end.
    fn push(&mut self, k: Tensor<2>, v: Option<Tensor<2>>, length: usize, device: &Device) {
        self.keys.push(k, length, device);
        if let Some(v) = v {
            self.values.get_or_insert_default().push(v, length, device);
        }
    }

    fn values(&self) -> &Growing {
        self.values.as_ref().unwrap_or(&self.keys)
    }
}

impl Growing {
    fn push(&mut self, rows: Tensor<2>, length: usize, device: &Device) {
        if host::is_host(device) {
            if self.host.is_empty() {
                // No more than planned for, which doubling would exceed. Pages are taken as they are written.
                self.host.reserve_exact(length * rows.dims()[1]);
            }
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
    cache: Vec<Vec<Kept>>,
    /// Tokens of each sequence that were fed.
    fed: Vec<usize>,
    /// Tokens each sequence may have in the end.
    lengths: Vec<usize>,
}

impl<'m> Decoder<'m> {
    fn new(model: &'m Model, lengths: Vec<usize>) -> Self {
        let layers = model.config().layers.iter();
        let empty = |layer: &LayerConfig| match layer.mixer {
            Mixer::DeltaNet(_) => Kept::Delta(None),
            Mixer::ShortConvolution { .. } => Kept::Convolution(None),
            Mixer::Mamba(_) => Kept::Mamba(None),
            Mixer::None => Kept::None,
            _ => Kept::Attention(KeyValues::default()),
        };
        let cache = layers.map(|layer| lengths.iter().map(|_| empty(layer)).collect()).collect();
        let fed = vec![0; lengths.len()];
        Self { model, engine: Engine::new(model, EngineOptions::default()), cache, fed, lengths }
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
                let start = self.fed[s];
                Positions { range: start..start + span.len(), length: self.lengths[s] }
            })
            .collect();
        active.iter().zip(&spans).for_each(|(&s, span)| self.fed[s] += span.len());
        let tables = model.rotary_tables(&positions);
        let info = WaveInfo { id: 0, tokens: ids.len(), sequences: Vec::new() };
        let mut x = model.embed(&ids)?;
        for layer in 0..model.config().layers.len() {
            let middle = match model.mixer(layer)? {
                MixerLayer::Attention(attention) => {
                    let entry = attention.cache_entry(&x, tables.of(model.config(), layer));
                    for (&sequence, span) in active.iter().zip(&spans) {
                        let rows = |t: &Tensor<2>| slice_rows(t, span);
                        let v = entry.v.as_ref().map(rows);
                        if let Kept::Attention(kept) = &mut self.cache[layer][sequence] {
                            kept.push(rows(&entry.k), v, self.lengths[sequence], device);
                        }
                    }
                    let heads = self.attend(layer, &entry.q, active, &spans, &attention.cached_shape());
                    attention.residual(&x, &attention.cached_heads(heads, entry.gate.as_ref()))
                }
                MixerLayer::Delta(delta) => {
                    let mut states: Vec<DeltaState> = Vec::with_capacity(active.len());
                    for &sequence in active {
                        states.push(match &mut self.cache[layer][sequence] {
                            Kept::Delta(state) => state.take().unwrap_or_else(|| delta.start()),
                            _ => unreachable!("the cache was made for the kinds of the layers"),
                        });
                    }
                    let middle = delta.step(&x, &spans, &mut states.iter_mut().collect::<Vec<_>>());
                    for (&sequence, state) in active.iter().zip(states) {
                        self.cache[layer][sequence] = Kept::Delta(Some(state));
                    }
                    middle
                }
                MixerLayer::Convolution(convolution) => {
                    let mut states: Vec<ConvolutionState> = Vec::with_capacity(active.len());
                    for &sequence in active {
                        states.push(match &mut self.cache[layer][sequence] {
                            Kept::Convolution(state) => state.take().unwrap_or_else(|| convolution.start()),
                            _ => unreachable!("the cache was made for the kinds of the layers"),
                        });
                    }
                    let middle = convolution.step(&x, &spans, &mut states);
                    for (&sequence, state) in active.iter().zip(states) {
                        self.cache[layer][sequence] = Kept::Convolution(Some(state));
                    }
                    middle
                }
                MixerLayer::Mamba(mamba) => {
                    let mut states: Vec<MambaState> = Vec::with_capacity(active.len());
                    for &sequence in active {
                        states.push(match &mut self.cache[layer][sequence] {
                            Kept::Mamba(state) => state.take().unwrap_or_else(|| mamba.start()),
                            _ => unreachable!("the cache was made for the kinds of the layers"),
                        });
                    }
                    let middle = mamba.step(&x, &spans, &mut states);
                    for (&sequence, state) in active.iter().zip(states) {
                        self.cache[layer][sequence] = Kept::Mamba(Some(state));
                    }
                    middle
                }
                MixerLayer::None => x.clone(),
            };
            let (pass, half) = (FfnPass::new(layer, &info), self.engine.half(&x, &middle));
            x = self.engine.ffn_forward(pass, half, &mut LayerTape::default(), &mut Nobody)?;
        }
        let last: Vec<u32> = spans.iter().map(|s| s.end as u32 - 1).collect();
        let norm = model.final_norm()?;
        let h = norm.forward(&gather_rows(&x, &last));
        let logits = Tensor::cat(model.head_forward(&h)?, 1);
        model.check_reads()?;
        Ok(logits)
    }

    fn attend(
        &self,
        layer: usize,
        q: &Tensor<2>,
        active: &[usize],
        spans: &[Range<usize>],
        shape: &AttentionShape,
    ) -> Tensor<2> {
        let cache = |s: usize| match &self.cache[layer][s] {
            Kept::Attention(kept) => kept,
            _ => unreachable!("only attention has keys"),
        };
        #[cfg(feature = "flex")]
        if host::is_host(&q.device()) {
            use crate::kernels::attention::cpu::{Cached, forward_spans};
            let cached: Vec<Cached<'_>> = active
                .iter()
                .zip(spans)
                .map(|(&s, span)| Cached {
                    queries: span.clone(),
                    keys: &cache(s).keys.host,
                    values: &cache(s).values().host,
                })
                .collect();
            return forward_spans(q, &cached, shape);
        }
        let outputs = active
            .iter()
            .zip(spans)
            .map(|(&s, span)| {
                let rows = |x: &Growing| x.device.clone().expect("pushed above");
                let (k, v) = (rows(&cache(s).keys), rows(cache(s).values()));
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

    #[cfg(feature = "flex")]
    fn fixture(name: &str, max_memory: Option<u64>) -> Model {
        let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity");
        Model::open(fixtures.join(name), &Device::flex(), max_memory).unwrap()
    }

    #[cfg(feature = "flex")]
    fn needed(model: &Model, prompts: &[Vec<u32>], options: &GenerateOptions) -> u64 {
        match check_memory(model, prompts, options) {
            Err(Error::Memory { needed, limit: 1, .. }) => needed,
            other => panic!("expected a memory error, found {other:?}"),
        }
    }

    #[cfg(feature = "flex")]
    #[test]
    fn keys_and_values_count_in_memory() {
        let prompts = [vec![3; 5]];
        // two heads of keys and of values of 8 numbers in each of 3 layers; a latent of 16 and 8 rotated in each of 2
        for (name, row) in [("tf5/qwen2_moe", 3 * 2 * 2 * 8), ("tf5/deepseek_v3_yarn", 2 * (16 + 8))] {
            let model = fixture(name, Some(1));
            let [few, many] = [10, 1010].map(|max_new_tokens| {
                needed(&model, &prompts, &GenerateOptions { max_new_tokens, ..Default::default() })
            });
            assert_eq!(many - few, 1000 * 4 * row, "{name}");
        }
    }

    #[cfg(feature = "flex")]
    #[test]
    fn a_small_limit_splits_batches_and_continues_alike() {
        let prompts: Vec<Vec<u32>> =
            (0..5u32).map(|p| (0..p + 3).map(|i| (p * 17 + i * 5) % 90 + 3).collect()).collect();
        let options = GenerateOptions { max_new_tokens: 12, ..Default::default() };
        for name in ["tf5/qwen2_moe", "tf5/deepseek_v3_yarn"] {
            let unlimited = fixture(name, None);
            assert_eq!(batches(&unlimited, &prompts, &options).unwrap().len(), 1);
            let alone = prompts.iter().map(|p| needed(&fixture(name, Some(1)), std::slice::from_ref(p), &options));
            let small = fixture(name, alone.max());
            let split = batches(&small, &prompts, &options).unwrap();
            assert!(split.len() > 2, "{name}: {split:?}");
            assert!(split.iter().all(|(_, plan)| plan.expected <= small.max_memory().unwrap()));
            let covered: Vec<usize> = split.iter().flat_map(|(batch, _)| batch.clone()).collect();
            assert_eq!(covered, [0, 1, 2, 3, 4]);
            let [a, b] = [unlimited, small].map(|model| generate(&model, &prompts, &options, |_| false).unwrap());
            assert_eq!(a, b, "{name}");
        }
    }

    #[cfg(feature = "flex")]
    #[test]
    fn weights_that_stay_are_not_pushed_out_by_a_larger_batch() {
        let prompts = vec![vec![5; 20]; 8];
        let options = GenerateOptions { max_new_tokens: 200, ..Default::default() };
        let (whole, one) = (fixture("tf5/qwen2_moe", None), fixture("tf5/qwen2_moe", Some(1)));
        let all = plan(&whole, &prompts, &options, memory::limit(None)).unwrap();
        assert!(everything_stays(&whole, &all));
        // one prompt and all weights fit, and a little more
        let alone = plan(&whole, &prompts[..1], &options, memory::limit(None)).unwrap().expected;
        let limited = fixture("tf5/qwen2_moe", Some(alone + 1000));
        let split = batches(&limited, &prompts, &options).unwrap();
        assert_eq!(split.len(), 8);
        assert!(split.iter().all(|(_, plan)| everything_stays(&limited, plan)));
        // without them, all prompts would fit
        assert!(needed(&one, &prompts[..2], &options) < alone);
    }
}

//! Generation with a key/value cache, many prompts at a time, without padding: all from the start by [`generate`], or
//! coming and going between tokens by [`Sequences`].

mod sequences;

use std::ops::Range;

use burn::tensor::Tensor;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub use self::sequences::{Made, ScoredToken, SequenceOptions, Sequences};
pub use crate::decode::Sampling;
use crate::{
    decode::{Decoder, Decoding, DecodingReport, SharedPass, Wanted, speculate},
    error::{Error, Result},
    host::HostView,
    memory::{self, MemoryPlan, Residency, WaveSize},
    model::Model,
};

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
    ended: impl FnMut(&[u32]) -> bool,
) -> Result<Vec<Vec<u32>>> {
    Ok(generate_with(model, prompts, options, &Decoding::default(), ended)?.0)
}

/// Continues each prompt by a way of decoding, which may ask other models as well; without any, [`generate`].
///
/// The memory limit of each model is divided by the number of models that take part.
///
/// # Errors
/// As [`generate`].
pub fn generate_with(
    model: &Model,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    decoding: &Decoding<'_>,
    mut ended: impl FnMut(&[u32]) -> bool,
) -> Result<(Vec<Vec<u32>>, DecodingReport)> {
    options.sampling.validate()?;
    let models: Vec<&Model> = std::iter::once(model).chain(decoding.others()).collect();
    if let Some(i) = prompts.iter().position(Vec::is_empty) {
        return Err(Error::input(format!("prompt {i}"), "no tokens", "at least one"));
    }
    for model in &models {
        check_causal(model)?;
    }
    let mut report = DecodingReport::default();
    if let Some(found) = decoding.by_prompt(model, prompts, options, &mut ended)? {
        report.tokens = found.iter().map(Vec::len).sum();
        report.steps = report.tokens;
        return Ok((found, report));
    }
    let mut completions = Vec::with_capacity(prompts.len());
    for (batch, plans) in batches(&models, prompts, options)? {
        models.iter().zip(plans).for_each(|(model, plan)| model.set_residency(plan.residency));
        let (new, did) = generate_batch(&models, &prompts[batch.clone()], batch.start, options, decoding, &mut ended)?;
        completions.extend(new);
        report.add(&did);
    }
    Ok((completions, report))
}

/// Refuses routing of a token by what comes after it.
fn check_causal(model: &Model) -> Result<()> {
    let Some(overlay) = model.routing_overlay() else { return Ok(()) };
    let rules = (0..model.config().layers.len()).filter_map(|layer| Some((layer, overlay.rule(layer)?)));
    match rules.into_iter().find(|(_, rule)| !rule.is_causal()) {
        Some((layer, _)) => Err(Error::Unsupported(format!(
            "generation with the routing rule of layer {layer}, under which experts of a token depend on later tokens"
        ))),
        None => Ok(()),
    }
}

/// Checks that the memory limit of `model` can hold every prompt and its completion.
///
/// # Errors
/// [`Error::Memory`].
pub fn check_memory(model: &Model, prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<()> {
    batches(&[model], prompts, options).map(drop)
}

/// Consecutive prompts of about `batch_tokens` tokens together, and how each batch uses the memory of each model.
fn batches(
    models: &[&Model],
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
) -> Result<Vec<(Range<usize>, Vec<MemoryPlan>)>> {
    let share = |model: &Model| memory::limit(model.max_memory()) / models.len() as u64;
    let plans = |prompts: &[Vec<u32>]| -> Result<Vec<MemoryPlan>> {
        models.iter().map(|model| plan(model, prompts, options, share(model))).collect()
    };
    let mut batches: Vec<(Range<usize>, Vec<MemoryPlan>)> = Vec::new();
    let mut filled = 0;
    for (i, prompt) in prompts.iter().enumerate() {
        // All weights in memory is worth more than a larger batch. Where they are read again for every token, it is
        // not.
        let may_grow = |current: &[MemoryPlan], larger: &[MemoryPlan]| {
            let pairs = models.iter().zip(current.iter().zip(larger));
            pairs.into_iter().all(|(model, (current, larger))| {
                larger.residency == current.residency || !everything_stays(model, current)
            })
        };
        if let Some((batch, current)) = batches.last_mut().filter(|_| filled + prompt.len() <= options.batch_tokens)
            && let Ok(larger) = plans(&prompts[batch.start..=i])
            && may_grow(current, &larger)
        {
            (batch.end, *current) = (i + 1, larger);
            filled += prompt.len();
        } else {
            batches.push((i..i + 1, plans(&prompts[i..=i])?));
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
    let tokens: usize = prompts.iter().map(Vec::len).sum();
    let in_the_end = tokens.saturating_add(prompts.len().saturating_mul(options.max_new_tokens)) as u64;
    plan_of(model, [tokens, prompts.len()], prompts.len() as u64, in_the_end, limit)
}

/// How `limit` bytes are used where at most `tokens` are fed together and logits of `rows` of them computed, for so
/// many sequences of so many tokens in the end.
fn plan_of(
    model: &Model,
    [tokens, rows]: [usize; 2],
    sequences: u64,
    in_the_end: u64,
    limit: u64,
) -> Result<MemoryPlan> {
    let size = WaveSize {
        tokens,
        gradients: false,
        head: true,
        head_tokens: rows,
        experts_together: memory::experts_together(model.device()),
        waiting: 0,
        waiting_keys: 0,
        decoded_per_use: model.decodes_per_use(),
        expert_cache: model.expert_cache_bytes(),
    };
    let states = sequences.saturating_mul(memory::sequence_state_bytes(model.config()));
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
    models: &[&Model],
    prompts: &[Vec<u32>],
    first: usize,
    options: &GenerateOptions,
    decoding: &Decoding<'_>,
    ended: &mut impl FnMut(&[u32]) -> bool,
) -> Result<(Vec<Vec<u32>>, DecodingReport)> {
    let lengths: Vec<usize> = prompts.iter().map(|prompt| prompt.len() + options.max_new_tokens).collect();
    let mut decoders: Vec<Decoder<'_>> = models.iter().map(|model| Decoder::new(model, lengths.clone())).collect();
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
    if let Some(speculative) = decoding.speculative() {
        let (Some(draft), Some(target)) = (decoders.pop(), decoders.pop()) else {
            return Err(Error::input("models of a speculation", 1, "the model and a draft"));
        };
        let how = (speculative, options.sampling, options.stop.as_slice(), options.max_new_tokens);
        return speculate(target, draft, prompts, random, how, ended);
    }
    let mut shared = match decoders.as_slice() {
        [strong, weak] if decoding.shares_passes() => SharedPass::new(strong, weak, prompts.len()),
        _ => None,
    };
    let mut completions = vec![Vec::new(); prompts.len()];
    let mut report = DecodingReport::default();
    let mut active: Vec<usize> = (0..prompts.len()).collect();
    let mut input: Vec<Vec<u32>> = prompts.to_vec();
    let vocab = models[0].config().vocab_size;
    for _ in 0..options.max_new_tokens {
        if active.is_empty() {
            break;
        }
        let logits: Vec<Tensor<2>> = match (&mut shared, decoders.as_mut_slice()) {
            (Some(shared), [strong, weak]) => shared.feed([strong, weak], &active, &input, &mut report)?.into(),
            (_, decoders) => {
                let feed = |decoder: &mut Decoder<'_>| decoder.feed(&active, &input, Wanted::Last);
                decoders.iter_mut().map(feed).collect::<Result<_>>()?
            }
        };
        let logits: Vec<HostView> = logits.iter().map(HostView::new).collect();
        let mut still = Vec::new();
        input.clear();
        for (row, &sequence) in active.iter().enumerate() {
            let of = row * vocab..(row + 1) * vocab;
            let rows: Vec<&[f32]> = logits.iter().map(|view| &view.as_slice()[of.clone()]).collect();
            let mixed = decoding.mix().map(|mix| mix.mix(&rows));
            let number = match options.sampling {
                Sampling::Greedy => 0.0,
                Sampling::TopP { .. } => random[sequence].random::<f32>(),
            };
            let token = options.sampling.choose(mixed.as_deref().unwrap_or(rows[0]), number);
            report.steps += 1;
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
    report.tokens = completions.iter().map(Vec::len).sum();
    Ok((completions, report))
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn fixture(name: &str, max_memory: Option<u64>) -> Model {
        let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/parity");
        Model::open(fixtures.join(name), &Device::flex(), max_memory).unwrap()
    }

    fn needed(model: &Model, prompts: &[Vec<u32>], options: &GenerateOptions) -> u64 {
        match check_memory(model, prompts, options) {
            Err(Error::Memory { needed, limit: 1, .. }) => needed,
            other => panic!("expected a memory error, found {other:?}"),
        }
    }

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

    #[test]
    fn a_small_limit_splits_batches_and_continues_alike() {
        let prompts: Vec<Vec<u32>> =
            (0..5u32).map(|p| (0..p + 3).map(|i| (p * 17 + i * 5) % 90 + 3).collect()).collect();
        let options = GenerateOptions { max_new_tokens: 12, ..Default::default() };
        for name in ["tf5/qwen2_moe", "tf5/deepseek_v3_yarn"] {
            let unlimited = fixture(name, None);
            assert_eq!(batches(&[&unlimited], &prompts, &options).unwrap().len(), 1);
            let alone = prompts.iter().map(|p| needed(&fixture(name, Some(1)), std::slice::from_ref(p), &options));
            let small = fixture(name, alone.max());
            let split = batches(&[&small], &prompts, &options).unwrap();
            assert!(split.len() > 2, "{name}: {split:?}");
            assert!(split.iter().all(|(_, plan)| plan[0].expected <= small.max_memory().unwrap()));
            let covered: Vec<usize> = split.iter().flat_map(|(batch, _)| batch.clone()).collect();
            assert_eq!(covered, [0, 1, 2, 3, 4]);
            let [a, b] = [unlimited, small].map(|model| generate(&model, &prompts, &options, |_| false).unwrap());
            assert_eq!(a, b, "{name}");
        }
    }

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
        let split = batches(&[&limited], &prompts, &options).unwrap();
        assert_eq!(split.len(), 8);
        assert!(split.iter().all(|(_, plan)| everything_stays(&limited, &plan[0])));
        // without them, all prompts would fit
        assert!(needed(&one, &prompts[..2], &options) < alone);
    }
}

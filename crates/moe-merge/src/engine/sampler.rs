//! A sample of the tokens that MoE layers see.

use std::collections::BTreeMap;

use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, LayerTrace};

use crate::evidence::TokenSample;

/// Keeps the same `size` tokens of every layer: those whose identity (wave and place) hashes to the smallest numbers. So the
/// sample depends neither on the order of the waves nor on which layer is looked at, and every token is as likely as any other.
///
/// Memory per layer: `4 (H + E + 2 k)` bytes for each sampled token.
#[derive(Debug)]
pub(crate) struct TokenSampler {
    size: usize,
    seed: u64,
    layers: BTreeMap<usize, Reservoir>,
}

/// Order of a token: its hash, then its identity.
type Key = (u64, u64, u32);

#[derive(Debug, Default)]
struct Reservoir {
    experts: usize,
    top_k: usize,
    hidden: usize,
    tokens: BTreeMap<Key, Token>,
    /// Tokens of the current wave that wait for their input, by place.
    waiting: BTreeMap<u32, Key>,
}

#[derive(Debug, Default)]
struct Token {
    input: Vec<f32>,
    logits: Vec<f32>,
    selected: Vec<u32>,
    weights: Vec<f32>,
}

impl TokenSampler {
    pub fn new(size: usize, seed: u64) -> Self {
        Self { size, seed, layers: BTreeMap::new() }
    }

    /// Chooses among the tokens of a wave; their inputs follow with the experts.
    pub fn layer(&mut self, trace: &LayerTrace<'_>) {
        let reservoir = self.layers.entry(trace.layer).or_default();
        (reservoir.experts, reservoir.top_k) = (trace.experts, trace.top_k);
        reservoir.waiting.clear();
        for token in 0..trace.wave.tokens as u32 {
            let key = (hash(self.seed, trace.wave.id, token), trace.wave.id, token);
            let full = reservoir.tokens.len() >= self.size;
            if full && reservoir.tokens.last_key_value().is_none_or(|(last, _)| *last < key) {
                continue;
            }
            let at = token as usize;
            let slots = at * trace.top_k..(at + 1) * trace.top_k;
            let entry = Token {
                input: Vec::new(),
                logits: trace.logits[at * trace.experts..(at + 1) * trace.experts].to_vec(),
                selected: trace.selected[slots.clone()].to_vec(),
                weights: trace.weights[slots].to_vec(),
            };
            reservoir.tokens.insert(key, entry);
            reservoir.waiting.insert(token, key);
            if full && let Some((gone, _)) = reservoir.tokens.pop_last() {
                reservoir.waiting.retain(|_, key| *key != gone);
            }
        }
    }

    /// Takes the inputs of chosen tokens that are among an expert's.
    pub fn expert(&mut self, trace: &ExpertTrace<'_>) {
        let Some(reservoir) = self.layers.get_mut(&trace.layer) else { return };
        if reservoir.waiting.is_empty() {
            return;
        }
        let hidden = trace.input.dims()[1];
        reservoir.hidden = hidden;
        let input = HostView::new(trace.input);
        for (row, token) in trace.rows.iter().enumerate() {
            if let Some(key) = reservoir.waiting.remove(token)
                && let Some(entry) = reservoir.tokens.get_mut(&key)
            {
                entry.input = input.as_slice()[row * hidden..(row + 1) * hidden].to_vec();
            }
        }
    }

    /// The sample of a layer, in the order of the tokens; nothing is kept of it.
    pub fn take(&mut self, layer: usize) -> Option<TokenSample> {
        let reservoir = self.layers.remove(&layer)?;
        let Reservoir { experts, top_k, hidden, tokens, .. } = reservoir;
        let mut sample = TokenSample { hidden, experts, top_k, ..TokenSample::default() };
        let mut ordered: Vec<((u64, u32), Token)> =
            tokens.into_iter().map(|((_, wave, token), entry)| ((wave, token), entry)).collect();
        ordered.sort_by_key(|(place, _)| *place);
        // A token that no expert was shown for has no input.
        for (_, token) in ordered.into_iter().filter(|(_, token)| !token.input.is_empty()) {
            sample.inputs.extend(token.input);
            sample.logits.extend(token.logits);
            sample.selected.extend(token.selected);
            sample.weights.extend(token.weights);
        }
        Some(sample)
    }
}

/// A number without a pattern for every token (SplitMix64).
fn hash(seed: u64, wave: u64, token: u32) -> u64 {
    let mix = |mut x: u64| {
        x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    };
    mix(mix(mix(seed) ^ wave) ^ u64::from(token))
}

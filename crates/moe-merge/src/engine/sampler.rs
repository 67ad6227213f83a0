//! A sample of the tokens that MoE layers see.

use std::collections::BTreeMap;

use moe_checkpoint::{ArrayKind, Fold, MoeShape, Statistics};
use moe_core::host::HostView;
use moe_core::trace::{ExpertTrace, LayerTrace, Signals, WaveInfo};
use moe_importance::collectors::Collector;
use moe_importance::{Error, Result, StatisticId, StatisticSpec};
use serde_json::{Value, json};

use crate::evidence::sample::{KEY, columns, sample_name};

/// Keeps the same `size` tokens of every layer: those whose identity (wave and place) hashes to the smallest numbers.
/// So the sample depends neither on the order of the waves nor on which layer is looked at, and every token is as
/// likely as any other.
///
/// Memory per layer: `8 (H + E + 2 k)` bytes for each sampled token.
#[derive(Debug)]
pub(crate) struct TokenSampler {
    size: usize,
    seed: u64,
    specs: Vec<StatisticSpec>,
    /// Columns of a row by layer.
    columns: BTreeMap<usize, usize>,
    layers: BTreeMap<usize, Reservoir>,
}

/// Order of a token: its hash, then its identity.
type Key = (u64, u64, u32);

/// Tokens of the wave in progress.
#[derive(Debug, Default)]
struct Reservoir {
    tokens: BTreeMap<Key, Token>,
    /// Tokens that wait for their input, by place.
    waiting: BTreeMap<u32, Key>,
}

#[derive(Debug, Default)]
struct Token {
    input: Vec<f32>,
    /// Logits, selected experts, weights.
    routing: Vec<f64>,
}

impl TokenSampler {
    /// Of the layers of a model of this shape that selects `top_k` experts for a token.
    pub fn new(size: usize, seed: u64, shape: &MoeShape, top_k: usize) -> Self {
        let columns: BTreeMap<usize, usize> = shape
            .layers
            .iter()
            .map(|layer| (layer.layer, columns(shape.hidden_size, layer.num_experts(), top_k)))
            .collect();
        let spec = |(layer, columns): (&usize, &usize)| StatisticSpec {
            id: StatisticId::from(sample_name(*layer)),
            kind: ArrayKind::Matrix { rows: size, columns: *columns },
            fold: Fold::Lowest { key: KEY },
        };
        Self { size, seed, specs: columns.iter().map(spec).collect(), columns, layers: BTreeMap::new() }
    }

    /// Chooses among the tokens of a wave; their inputs follow with the experts.
    fn choose(&mut self, trace: &LayerTrace<'_>) {
        let reservoir = self.layers.entry(trace.layer).or_default();
        for token in 0..trace.wave.tokens as u32 {
            let key = (hash(self.seed, trace.wave.id, token), trace.wave.id, token);
            let full = reservoir.tokens.len() >= self.size;
            if full && reservoir.tokens.last_key_value().is_none_or(|(last, _)| *last < key) {
                continue;
            }
            let at = token as usize;
            let slots = at * trace.top_k..(at + 1) * trace.top_k;
            let logits = trace.logits[at * trace.experts..(at + 1) * trace.experts].iter().copied().map(f64::from);
            let selected = trace.selected[slots.clone()].iter().copied().map(f64::from);
            let weights = trace.weights[slots].iter().copied().map(f64::from);
            let entry = Token { input: Vec::new(), routing: logits.chain(selected).chain(weights).collect() };
            reservoir.tokens.insert(key, entry);
            reservoir.waiting.insert(token, key);
            if full && let Some((gone, _)) = reservoir.tokens.pop_last() {
                reservoir.waiting.retain(|_, key| *key != gone);
            }
        }
    }
}

impl Collector for TokenSampler {
    fn statistics(&self) -> &[StatisticSpec] {
        &self.specs
    }

    fn needs(&self) -> Signals {
        Signals::ROUTING | Signals::UNITS
    }

    fn recipe(&self) -> Option<Value> {
        Some(json!({ "sample": { "tokens": self.size, "seed": self.seed } }))
    }

    fn goes_on(&self) -> bool {
        true
    }

    /// Chooses the same tokens again.
    fn recall(&mut self, trace: &LayerTrace<'_>) -> Result<()> {
        self.choose(trace);
        Ok(())
    }

    fn begin_wave(&mut self, _: &WaveInfo) -> Result<()> {
        self.layers.clear();
        Ok(())
    }

    fn layer(&mut self, trace: &LayerTrace<'_>, _: &mut Statistics) -> Result<()> {
        self.choose(trace);
        Ok(())
    }

    /// Takes the inputs of chosen tokens that are among an expert's.
    fn expert(&mut self, trace: &ExpertTrace<'_>, _: &mut Statistics) -> Result<()> {
        let Some(reservoir) = self.layers.get_mut(&trace.layer) else { return Ok(()) };
        if reservoir.waiting.is_empty() {
            return Ok(());
        }
        let hidden = trace.input.dims()[1];
        let input = HostView::new(trace.input);
        for (row, token) in trace.rows.iter().enumerate() {
            if let Some(key) = reservoir.waiting.remove(token)
                && let Some(entry) = reservoir.tokens.get_mut(&key)
            {
                entry.input = input.as_slice()[row * hidden..(row + 1) * hidden].to_vec();
            }
        }
        Ok(())
    }

    fn end_layer(&mut self, layer: usize, into: &mut Statistics) -> Result<()> {
        if let Some((reservoir, columns)) = self.layers.remove(&layer).zip(self.columns.get(&layer)) {
            let mut rows = Vec::with_capacity(reservoir.tokens.len() * columns);
            // A token that no expert was shown for has no input.
            for ((hash, wave, token), entry) in reservoir.tokens.iter().filter(|(_, token)| !token.input.is_empty()) {
                // Numbers of 16 bits: what a wave's file keeps exactly.
                let parts =
                    |n: u64, bits: u32| (0..bits / 16).rev().map(move |part| ((n >> (16 * part)) & 0xFFFF) as f64);
                rows.extend(parts(*hash, 64).chain(parts(*wave, 64)).chain(parts(u64::from(*token), 32)));
                rows.extend(entry.input.iter().copied().map(f64::from));
                rows.extend(&entry.routing);
            }
            if !rows.len().is_multiple_of(*columns) {
                return Err(Error::Trace {
                    layer,
                    expert: None,
                    field: "selected",
                    found: format!("tokens of {} numbers", rows.len() / reservoir.tokens.len().max(1)),
                    expected: format!("{columns}, with as many experts per token as the model's config says"),
                });
            }
            into.add_rows(&sample_name(layer), [self.size, *columns], KEY, &rows)?;
        }
        Ok(())
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

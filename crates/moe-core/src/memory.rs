//! How much memory a job uses and what it may keep.

use burn::tensor::Device;
use moe_checkpoint::{
    AttentionKind, ChannelDelta, CompressedAttention, DeltaNet, Ffn, HeadMixture, KeyCompression, LayerConfig,
    LightningAttention, Mamba, Mixer, ModelConfig, OutputGate, QkNorm,
};

use crate::{
    error::{Error, Result},
    host,
    kernels::CHUNK,
    layers::DENSE_ROWS,
};

/// Memory of this process as the kernel reports it, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Largest resident size so far.
    pub peak: u64,
    /// Resident size now.
    pub resident: u64,
    /// Resident anonymous memory now: what the process allocated.
    pub anonymous: u64,
    /// Resident pages of mapped files now: the kernel can drop them at any time.
    pub mapped: u64,
}

/// Reads `/proc/self/status`; `None` where there is none.
pub fn process_memory() -> Option<ProcessMemory> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find(|l| l.starts_with(name))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    };
    Some(ProcessMemory {
        peak: field("VmHWM:")?,
        resident: field("VmRSS:")?,
        anonymous: field("RssAnon:")?,
        mapped: field("RssFile:")?,
    })
}

/// Begins to count the [peak](ProcessMemory::peak) anew, from what is resident now. Whether the system did so.
pub fn reset_peak() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Memory the machine could still give out, in bytes; `None` where `/proc/meminfo` does not tell.
pub fn available_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("MemAvailable:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Tells the C library's allocator (glibc; nothing elsewhere) to keep freed blocks of up to 1 GiB for the next
/// allocation instead of giving them back to the kernel at once. A sweep frees and allocates the same large temporaries
/// over and over, and fresh pages cost more than the arithmetic on them. For programs to call once at their start; a
/// library has no business changing its host's allocator.
pub fn keep_freed_memory() {
    #[cfg(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets two numbers of the allocator; valid at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
    }
}

/// Bytes of f32 tensors made of `elements`.
const fn f32s(elements: usize) -> u64 {
    4 * elements as u64
}

/// Most vocabulary rows of the output head converted at once.
pub(crate) fn head_block_rows(hidden: usize) -> usize {
    ((64 << 20) / (4 * hidden.max(1))).max(64).next_multiple_of(64)
}

/// Routed experts computed side by side on `device`.
pub(crate) fn experts_together(device: &Device) -> usize {
    if host::is_host(device) { rayon::current_num_threads().clamp(1, 4) } else { 1 }
}

/// What of the weights stays in memory, converted to f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Residency {
    /// The output head.
    pub head: bool,
    /// Attention, norms, router, shared and dense blocks of the first so many layers.
    pub layers: usize,
    /// The first so many routed experts, counted layer by layer.
    pub experts: usize,
}

/// Activations of a layer kept from the forward for the backward sweep, instead of being computed again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// Queries, keys and values.
    pub attention: bool,
    /// Pre-activations of the dense or shared block.
    pub dense: bool,
    /// Pre-activations of the routed experts.
    pub experts: bool,
}

/// How one kind of wave uses memory. Never changes results, only time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights that stay.
    pub residency: Residency,
    /// Kept activations of each decoder layer.
    pub keep: Vec<Keep>,
    /// Whether layer inputs and other waves wait in a file instead of in memory.
    pub spill: bool,
    /// Expected peak, in bytes.
    pub expected: u64,
}

/// What a wave looks like, as far as memory goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaveSize {
    /// Its tokens.
    pub tokens: usize,
    /// Whether there is a backward sweep.
    pub gradients: bool,
    /// Whether logits are computed.
    pub head: bool,
    /// Tokens per piece of the head.
    pub head_tokens: usize,
    /// Routed experts computed side by side.
    pub experts_together: usize,
    /// Bytes of other waves that wait for their turn, in memory or in a file.
    pub waiting: u64,
    /// Bytes of keys and values of other waves that wait in memory for layers that read them.
    pub waiting_keys: u64,
    /// Whether weights are decoded wherever they are used, so that none of them stays converted.
    pub decoded_per_use: bool,
    /// Bytes of a cache of experts, in whose stead none stays converted; 0 without one.
    pub expert_cache: u64,
}

/// Code, stacks, mapped pages, the tokenizer, and what the allocator keeps between blocks.
const BASE: u64 = 160 << 20;

/// Elements that the part of a layer needs that looks at other tokens.
struct MixerSize {
    /// Of its weights.
    weights: usize,
    /// Per token, to keep for the backward pass.
    tape: usize,
    /// Per token, while it runs.
    work: usize,
}

impl MixerSize {
    fn new(config: &ModelConfig, layer: usize, tokens: usize) -> Self {
        match &config.layers[layer].mixer {
            Mixer::DeltaNet(delta) => Self::delta(config.hidden_size, delta),
            Mixer::ChannelDelta(delta) => Self::channel_delta(config.hidden_size, delta),
            Mixer::ShortConvolution { kernel } => {
                let h = config.hidden_size;
                Self { weights: h * (4 * h + kernel), tape: 3 * h, work: 8 * h }
            }
            Mixer::Mamba(mamba) => Self::mamba(config.hidden_size, mamba),
            Mixer::Lightning(lightning) => Self::lightning(config.hidden_size, lightning),
            Mixer::HeadMixture(mixture) => Self::head_mixture(config.hidden_size, mixture),
            Mixer::Compressed(compressed) => Self::compressed(config, compressed),
            Mixer::None => Self { weights: 0, tape: 0, work: 0 },
            _ => Self::attention(config, layer).with_indexer(config, layer, tokens),
        }
    }

    /// The same with an indexer where the layer has one, and the keys that queries of a wave of so many tokens see.
    fn with_indexer(self, config: &ModelConfig, layer: usize, tokens: usize) -> Self {
        let Some(selection) = &config.attention_of(layer).selects else { return self };
        let chosen = if tokens > selection.keys { selection.keys } else { 0 };
        let (weights, work) = match (selection.is_own(layer), &config.attention.kind) {
            (true, AttentionKind::Latent(latent)) => {
                let (dim, queries) = (selection.head_dim, selection.heads * selection.head_dim);
                let rank = latent.q_lora_rank.unwrap_or(config.hidden_size);
                let weights = queries * rank + (dim + selection.heads) * config.hidden_size;
                (weights, 2 * (queries + dim + selection.heads) + rank + chosen)
            }
            _ => (0, 0),
        };
        Self { weights: self.weights + weights, tape: self.tape + chosen, work: self.work + work }
    }

    fn delta(h: usize, delta: &DeltaNet) -> Self {
        let (channels, values, heads) = (delta.channels(), delta.values(), delta.value_heads);
        // States at the beginnings of chunks of all heads, as if they were computed at once.
        let states = delta.value_heads * delta.key_head_dim * delta.value_head_dim / CHUNK;
        Self {
            weights: h * (channels + 2 * values + 2 * heads) + channels * delta.kernel,
            tape: channels + values + 2 * heads,
            work: 3 * channels + 4 * values + 4 * heads + states,
        }
    }

    fn channel_delta(h: usize, delta: &ChannelDelta) -> Self {
        let (width, heads) = (delta.width(), delta.heads);
        // States at the beginnings of chunks of all heads, as if they were computed at once.
        let states = width * delta.head_dim / CHUNK;
        let wide = if delta.low_rank { delta.head_dim * (h + width) } else { h * width };
        Self {
            weights: h * (4 * width + heads) + 2 * wide + 3 * width * delta.kernel,
            tape: 5 * width + heads,
            work: 15 * width + 4 * heads + states,
        }
    }

    fn mamba(h: usize, mamba: &Mamba) -> Self {
        let (channels, values, heads) = (mamba.channels(), mamba.values(), mamba.heads);
        // States at the beginnings of chunks of all heads, as if they were computed at once.
        let states = values * mamba.state / CHUNK;
        Self {
            weights: h * (2 * values + channels + heads) + channels * mamba.kernel,
            tape: channels + values + heads,
            work: 5 * channels + 6 * values + 4 * heads + states,
        }
    }

    fn head_mixture(h: usize, mixture: &HeadMixture) -> Self {
        let (width, chosen) = (mixture.width(), mixture.top_k * mixture.width());
        Self {
            weights: h * (2 * mixture.experts * width + 2 * width + mixture.experts),
            tape: chosen + 2 * width + mixture.experts + 2 * mixture.top_k,
            work: 5 * chosen + 4 * width + 2 * mixture.experts,
        }
    }

    fn compressed(config: &ModelConfig, a: &CompressedAttention) -> Self {
        let (h, q, d) = (config.hidden_size, a.queries(), a.head_dim);
        let (groups, streams) = (a.output_groups * a.output_rank, config.stream_width());
        let columns = a.compression.as_ref().map_or(0, |c| 2 * c.series() * d);
        let (index_weights, index_work, chosen) = match a.compression.as_ref().and_then(|c| c.indexer.as_ref()) {
            Some(i) => {
                let queries = i.heads * i.head_dim;
                let weights = a.query_rank * queries + h * (4 * i.head_dim + i.heads);
                (weights, queries + i.heads + 5 * i.head_dim, i.keys)
            }
            None => (0, 0, 0),
        };
        let mixing = config.streams.as_ref().map_or(0, |s| s.rows());
        let projections = a.query_rank * (h + q) + h * (d + columns + groups) + a.output_rank * q;
        Self {
            weights: projections + index_weights + mixing * streams,
            tape: h + a.query_rank + q + d + columns + mixing + chosen,
            work: 4 * q + 4 * d + 2 * columns + 2 * groups + 3 * h + 4 * streams + 2 * mixing + index_work,
        }
    }

    fn lightning(h: usize, lightning: &LightningAttention) -> Self {
        let width = lightning.width();
        // States at the beginnings of chunks of all heads, as if they were computed at once.
        let states = width * lightning.head_dim / CHUNK;
        Self { weights: 5 * h * width, tape: 4 * width, work: 14 * width + states }
    }

    fn attention(config: &ModelConfig, layer: usize) -> Self {
        let (h, a) = (config.hidden_size, config.attention_of(layer));
        let q = a.num_heads * a.head_dim;
        let values = a.num_heads * a.value_head_dim();
        match &a.kind {
            AttentionKind::Latent(latent) => {
                let down = latent.kv_lora_rank + latent.qk_rope_head_dim;
                let up = a.num_heads * (latent.qk_nope_head_dim + latent.v_head_dim);
                let gates = if a.gate == OutputGate::Head { a.num_heads } else { 0 };
                let (query, rank) = latent.q_lora_rank.map_or((h * q, 0), |rank| (rank * (h + q), rank));
                Self {
                    weights: query + h * down + latent.kv_lora_rank * up + h * (values + gates),
                    tape: 2 * q + values + down + rank,
                    work: up + values + rank + down,
                }
            }
            _ => {
                // Keys and values of another layer are counted as what that hands on.
                let own = config.layers[layer].keys_of.is_none();
                let kv = if own { a.num_kv_heads * a.head_dim } else { 0 };
                let saved = a.qk_norm != QkNorm::None || a.qkv_clip.is_some();
                let gate = if a.gate == OutputGate::None { 0 } else { q };
                let values = if a.value_norm { kv } else { 0 };
                let tape = q + 2 * kv + gate + values + if saved { q + kv } else { 0 };
                Self { weights: h * (2 * q + gate + 2 * kv), tape, work: q + 3 * gate }
            }
        }
    }
}

/// Bytes that generation keeps of one token: its keys and values in every layer that has them, or their latents.
pub(crate) fn cached_token_bytes(config: &ModelConfig) -> u64 {
    let row = |layer: usize| {
        let a = config.attention_of(layer);
        match &a.kind {
            AttentionKind::Latent(latent) => {
                let indexed = a.selects.as_ref().filter(|selection| selection.is_own(layer));
                latent.kv_lora_rank + latent.qk_rope_head_dim + indexed.map_or(0, |selection| selection.head_dim)
            }
            _ => a.num_kv_heads * (a.head_dim + a.value_head_dim()),
        }
    };
    let has_keys = |mixer: &Mixer| matches!(mixer, Mixer::Attention | Mixer::HeadMixture(_));
    let own_keys = |layer: &LayerConfig| has_keys(&layer.mixer) && layer.keys_of.is_none();
    let growing = (0..config.layers.len()).filter(|layer| own_keys(&config.layers[*layer]));
    // Of compressed keys, one for several tokens.
    let compressed = config.layers.iter().filter_map(|layer| match &layer.mixer {
        Mixer::Compressed(a) => a.compression.as_ref().map(|c| (c, a.head_dim)),
        _ => None,
    });
    let entries = compressed.map(|(c, d)| (d + c.indexer.as_ref().map_or(0, |i| i.head_dim)).div_ceil(c.rate));
    f32s(growing.map(row).sum::<usize>() + entries.sum::<usize>())
}

/// Bytes that generation keeps of one sequence however long it is: the states of linear attention and of short
/// convolutions.
pub(crate) fn sequence_state_bytes(config: &ModelConfig) -> u64 {
    let states = config.layers.iter().map(|layer| match &layer.mixer {
        Mixer::DeltaNet(delta) => {
            delta.values() * delta.key_head_dim + delta.kernel.saturating_sub(1) * delta.channels()
        }
        Mixer::ChannelDelta(delta) => {
            delta.width() * delta.head_dim + delta.kernel.saturating_sub(1) * 3 * delta.width()
        }
        Mixer::ShortConvolution { kernel } => kernel.saturating_sub(1) * config.hidden_size,
        Mixer::Lightning(lightning) => lightning.width() * lightning.head_dim,
        Mixer::Mamba(mamba) => mamba.values() * mamba.state + mamba.kernel.saturating_sub(1) * mamba.channels(),
        Mixer::Compressed(a) => {
            // Keys and gates of one or two groups of tokens.
            let of = |c: &KeyCompression, d: usize| 2 * c.series() * c.series() * c.rate * d;
            let both = |c: &KeyCompression| of(c, a.head_dim) + c.indexer.as_ref().map_or(0, |i| of(c, i.head_dim));
            a.window * a.head_dim + a.compression.as_ref().map_or(0, both)
        }
        _ => 0,
    });
    f32s(states.sum())
}

/// Bytes of the keys that layers choose for layers after them, in a wave of so many tokens.
fn shared_keys(config: &ModelConfig, tokens: usize) -> u64 {
    let Some(selection) = config.attention.selects.as_ref().filter(|selection| tokens > selection.keys) else {
        return 0;
    };
    let layers = (0..config.layers.len()).filter(|layer| selection.is_shared(*layer)).count();
    f32s(layers * tokens * selection.keys)
}

/// Bytes of the keys and values that layers lend to layers after them, in waves of so many tokens.
pub(crate) fn lent_keys(config: &ModelConfig, tokens: usize) -> u64 {
    let row = |layer: usize| {
        let a = config.attention_of(layer);
        a.num_kv_heads * (a.head_dim + a.value_head_dim())
    };
    f32s((0..config.layers.len()).filter(|layer| config.lends_keys(*layer)).map(row).sum::<usize>() * tokens)
}

/// Plans a wave within `limit` bytes.
///
/// # Errors
/// [`Error::Memory`] if not even the streamed pieces fit.
pub fn plan(config: &ModelConfig, size: WaveSize, limit: u64) -> Result<MemoryPlan> {
    let (h, t) = (config.hidden_size, size.tokens);
    let hidden = f32s(t * config.stream_width());
    let mut phases: Vec<(String, u64)> = Vec::new();
    if size.head {
        let block = f32s(head_block_rows(h).min(config.vocab_size) * h);
        let logits = f32s(size.head_tokens.min(t) * config.vocab_size);
        phases.push(("the output head".into(), 2 * block + logits + f32s(4 * size.head_tokens.min(t) * h)));
    }
    let mut layer_weights = Vec::new();
    let mut expert_bytes = Vec::new();
    let mut kept = Vec::new(); // bytes of [attention, dense, experts] activations per layer
    for (i, layer) in config.layers.iter().enumerate() {
        let mixer = MixerSize::new(config, i, t);
        let (mixer_weights, tape) = (f32s(mixer.weights), f32s(t * mixer.tape));
        let mixing =
            mixer_weights + tape + f32s(t * mixer.work) + hidden + if size.gradients { tape + hidden } else { 0 };
        if phases.iter().all(|(_, bytes)| *bytes < mixing) {
            phases.push(("an attention layer".into(), mixing));
        }
        let (dense_width, dense_gateless, moe) = match &layer.ffn {
            Ffn::None => (0, false, None),
            Ffn::Dense { intermediate_size, gateless } => (*intermediate_size, *gateless, None),
            Ffn::Moe(moe) => {
                let shared = moe.shared.as_ref();
                (shared.map_or(0, |s| s.intermediate_size), shared.is_some_and(|s| s.gateless), Some(moe))
            }
        };
        let rows = t.min(DENSE_ROWS);
        let dense_weights = f32s(if dense_gateless { 2 } else { 3 } * dense_width * h);
        let norms = 4 * config.kept_sums(i) as u64 * hidden;
        let streams = config.streams.as_ref().map_or(0, |streams| streams.rows() * config.stream_width());
        let mut work = dense_weights + f32s(rows * (2 * h + 6 * dense_width)) + 3 * hidden + norms;
        let mut experts_kept = 0;
        if let Some(moe) = moe {
            let (experts, widest) = (moe.num_experts().max(1), moe.widths.iter().copied().max().unwrap_or(0));
            let k = config.routing.top_k.min(experts);
            // an expert rarely gets more than four times its fair share
            let routed = t.min(4 * t * k / experts + 64);
            // what experts read and give, and their matrices
            let (e, matrices) = (config.expert_hidden_size(), if moe.gateless { 2 } else { 3 });
            let expert =
                size.experts_together as u64 * (2 * f32s(matrices * widest * e) + f32s(routed * (4 * e + 8 * widest)));
            let latent = config.expert_latent.map_or(0, |latent| f32s(3 * t * latent + 2 * latent * h));
            work = work.max(dense_weights + expert + 3 * hidden + norms + latent + f32s(t * (experts + 4 * k)));
            experts_kept = f32s(t * k * 2 * moe.widths.iter().sum::<usize>() / experts);
            expert_bytes.extend(moe.stored_widths().iter().map(|w| f32s(matrices * w * e)));
        }
        if let Some(inputs) = config.layer_inputs {
            let weights = f32s(3 * inputs.width * h);
            phases.push((format!("the input of layer {i}"), weights + f32s(t * 8 * inputs.width) + 6 * hidden));
        }
        if config.has_shortcuts() {
            // The stream, and what goes beside it to the end of the next layer.
            work += 2 * hidden;
        }
        phases.push((format!("the feed-forward part of layer {i}"), work));
        let around = config.expert_latent.filter(|_| moe.is_some()).map_or(0, |latent| 2 * latent);
        let rows = moe.map_or(0, |m| m.router_rows()) + around;
        let of_input = config.layer_inputs.map_or(0, |inputs| 3 * inputs.width);
        layer_weights.push(mixer_weights + dense_weights + f32s(h * (rows + of_input) + streams));
        kept.push([tape, f32s(t * 2 * dense_width), experts_kept]);
    }
    let (what, largest) = phases.into_iter().max_by_key(|(_, bytes)| *bytes).unwrap_or_default();
    let lent = lent_keys(config, t) * if size.gradients { 2 } else { 1 } + size.waiting_keys;
    let needed = BASE + largest + hidden + size.expert_cache + shared_keys(config, t) + lent;
    if needed > limit {
        return Err(Error::Memory { limit, needed, what: format!("{what}, with a wave of {t} tokens,") });
    }
    let mut free = limit - needed;
    let mut take = |bytes: u64| {
        let fits = bytes <= free;
        if fits {
            free -= bytes;
        }
        fits
    };
    let layers = config.layers.len();
    let sums: usize = (0..layers).map(|layer| config.kept_sums(layer)).sum();
    let wide = (0..layers).filter(|layer| config.ends_shortcut(*layer)).count();
    let inputs = if size.gradients { (2 * (layers + wide) + sums) as u64 * hidden } else { 0 };
    let spill = !take(inputs + size.waiting);
    let stays = !size.decoded_per_use;
    let head = stays && size.head && take(f32s(config.vocab_size * h));
    let mut residency = Residency { head, ..Residency::default() };
    let mut keep = vec![Keep::default(); layers];
    if size.gradients {
        // Every kept number saves the same work, 2H operations; later layers first, since their activations live
        // shorter.
        for (keep, [attention, dense, experts]) in keep.iter_mut().zip(kept).rev() {
            *keep = Keep { experts: take(experts), dense: take(dense), attention: take(attention) };
        }
    }
    while stays && residency.layers < layers && take(layer_weights[residency.layers]) {
        residency.layers += 1;
    }
    while stays
        && size.expert_cache == 0
        && residency.experts < expert_bytes.len()
        && take(expert_bytes[residency.experts])
    {
        residency.experts += 1;
    }
    Ok(MemoryPlan { residency, keep, spill, expected: limit - free })
}

/// The limit to plan for: `max_memory`, or six tenths of what the machine has left.
pub fn limit(max_memory: Option<u64>) -> u64 {
    max_memory.or_else(|| available_memory().map(|bytes| bytes / 10 * 6)).unwrap_or(u64::MAX / 2)
}

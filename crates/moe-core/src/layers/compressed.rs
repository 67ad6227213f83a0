//! Attention to the last keys and to compressed ones of all before, of DeepSeek-V4, with its norm and the residual
//! streams around it.
//!
//! Queries go through a latent and are divided by their root mean square head by head. One head of keys, normed, serves
//! as that of the values. Queries and keys rotate in their last columns; the outputs of the heads, sums of rotated
//! keys, rotate back. Groups of heads have an output projection each, and what they give one together.

use std::{ops::Range, sync::Arc};

use burn::tensor::{Device, Tensor};

use super::{HyperConnection, Linear, Mixing, Norm, QueryProjection, sum_of};
use crate::{
    adapters::Wanted,
    host::{self, HostView},
    kernels::{
        attention::Selection,
        compressed::{CompressedShape, PoolShape, Seen, attend, attend_backward, choose, pool, pool_backward},
        rope::{RotaryEmbedding, RotaryTable},
        weight::Weight,
    },
};

/// Attention to compressed keys, with its norm and streams. `n` streams of width `H`.
#[derive(Clone, Debug)]
pub struct CompressedLayer {
    /// How it reads and writes the streams.
    pub streams: Arc<HyperConnection>,
    /// Norm of what it reads `[H]`.
    pub norm: Norm,
    /// Queries `[n, heads * D]`.
    pub query: QueryProjection,
    /// Division of every query head by its root mean square `[D]`.
    pub query_norm: Norm,
    /// Keys, one head `[D, H]`.
    pub key: Linear,
    /// Their norm `[D]`.
    pub key_norm: Norm,
    /// Output projections of the groups of heads `[R, heads * D / groups]` each.
    pub groups: Vec<Weight>,
    /// Projection of what they give `[H, groups * R]`.
    pub join: Linear,
    /// Heads, window, rate and sinks.
    pub shape: CompressedShape,
    /// Rotation of queries and of all keys.
    pub rope: RotaryEmbedding,
    /// What compresses keys, where they are.
    pub compressor: Option<Compressor>,
    /// What chooses the compressed keys that a query sees, where that is not all.
    pub indexer: Option<Box<EntryIndexer>>,
}

/// What compresses keys.
#[derive(Clone, Debug)]
pub struct Compressor {
    /// Keys of every token `[columns, H]`.
    pub key: Linear,
    /// Logits of their weights `[columns, H]`.
    pub gate: Linear,
    /// Bias on those for each place in a group `[rate, columns]`.
    pub bias: Arc<[f32]>,
    /// Norm of the compressed keys `[D]`.
    pub norm: Norm,
    /// Which keys make a compressed one.
    pub shape: PoolShape,
}

/// An indexer over compressed keys of its own. It is not trained, and no gradient goes through what it chooses.
#[derive(Clone, Debug)]
pub struct EntryIndexer {
    /// What compresses its keys.
    pub compressor: Compressor,
    /// Queries, from the latent of queries `[heads * D, R_q]`.
    pub query: Weight,
    /// Weights of its heads `[heads, H]`.
    pub heads: Weight,
    /// Its heads, and the rate.
    pub shape: CompressedShape,
    /// Most compressed keys that a query sees.
    pub keys: usize,
}

/// What the backward pass of a [`CompressedLayer`] needs of the forward pass.
#[derive(Clone, Debug)]
pub struct CompressedTape {
    mixing: Mixing,
    /// What the norm reads `[T, H]`.
    read: Tensor<2>,
    latent: Option<Tensor<2>>,
    /// Before their norm `[T, heads * D]`.
    queries: Tensor<2>,
    /// Before their norm `[T, D]`.
    keys: Tensor<2>,
    /// Keys and gates that are compressed `[T, columns]`.
    compressed: Option<[Tensor<2>; 2]>,
    /// Compressed keys that queries see, where these are not all.
    chosen: Option<Arc<Selection>>,
}

#[cfg(test)]
impl CompressedTape {
    /// `other` with this one's choice of keys.
    pub(super) fn with_choice_of(&self, other: Self) -> Self {
        Self { chosen: self.chosen.clone(), ..other }
    }
}

/// What a compressor keeps of a sequence, row-major.
#[derive(Clone, Debug, Default)]
struct Pooled {
    /// Keys `[.., columns]` of tokens that a compressed key to come is made of.
    keys: Vec<f32>,
    /// Their gates.
    gate: Vec<f32>,
    /// Compressed keys `[.., D]`.
    entries: Vec<f32>,
}

/// What generation keeps of a sequence.
#[derive(Clone, Debug, Default)]
pub struct CompressedState {
    /// Tokens so far.
    fed: usize,
    /// Keys of the last ones, at most a window less one `[.., D]`.
    keys: Vec<f32>,
    compressor: Pooled,
    indexer: Pooled,
}

/// Rotated queries and keys, and the rotation.
struct Ready {
    q: Vec<f32>,
    keys: Vec<f32>,
    table: RotaryTable,
}

impl Compressor {
    /// Compressed keys, before and after norm and rotation, of consecutive tokens whose first group is number `group`.
    /// Of the first `skipped` groups none are made.
    fn entries(
        &self,
        keys: &[f32],
        gate: &[f32],
        rope: &RotaryEmbedding,
        [group, skipped]: [usize; 2],
        device: &Device,
    ) -> (Tensor<2>, Vec<f32>) {
        let width = self.shape.width;
        let pooled = pool(keys, gate, &self.bias, &self.shape, skipped);
        let count = pooled.len() / width;
        let pooled = host::from_vec(pooled, [count, width], device);
        if count == 0 {
            return (pooled, Vec::new());
        }
        let table = self.table(rope, group + skipped, count);
        let rotated = table.rotate(self.norm.forward(&pooled), 1, width - table.columns(), false);
        (pooled, host::into_vec(rotated))
    }

    /// Rotation of compressed keys from number `first` on, each by the position of its first token.
    fn table(&self, rope: &RotaryEmbedding, first: usize, count: usize) -> RotaryTable {
        rope.table_at((first..first + count).map(|group| group * self.shape.rate))
    }

    fn rows(&self, z: &Tensor<2>) -> [Tensor<2>; 2] {
        [self.key.forward(z), self.gate.forward(z)]
    }
}

impl Pooled {
    /// Adds the keys and gates of further tokens, and the compressed keys of the groups that they complete.
    fn push(&mut self, compressor: &Compressor, keys: &[f32], gate: &[f32], rope: &RotaryEmbedding, device: &Device) {
        let (shape, columns) = (compressor.shape, compressor.shape.columns());
        self.keys.extend_from_slice(keys);
        self.gate.extend_from_slice(gate);
        let made = self.entries.len() / shape.width;
        // with overlapping groups, the last whole one is kept for the next
        let before = usize::from(shape.overlapping && made > 0);
        let (_, entries) = compressor.entries(&self.keys, &self.gate, rope, [made - before, before], device);
        self.entries.extend(entries);
        let whole = self.keys.len() / columns / shape.rate;
        let done = whole.saturating_sub(usize::from(shape.overlapping)) * shape.rate * columns;
        self.keys.drain(..done);
        self.gate.drain(..done);
    }
}

impl EntryIndexer {
    /// Rotated queries and weights of the heads, of what attention reads and of the normed latent of queries.
    fn read(&self, z: &Tensor<2>, latent: &Tensor<2>, table: &RotaryTable) -> [Vec<f32>; 2] {
        let CompressedShape { heads, head_dim, .. } = self.shape;
        let queries = table.rotate(self.query.forward(latent, None), heads, head_dim - table.columns(), false);
        let factor = ((heads * head_dim) as f32).powf(-0.5);
        [queries, self.heads.forward(z, None).mul_scalar(factor)].map(host::into_vec)
    }
}

impl CompressedLayer {
    /// The rotation of queries and keys of whole sequences.
    fn table(&self, sequences: &[Range<usize>]) -> RotaryTable {
        self.rope.table_at(sequences.iter().flat_map(|sequence| 0..sequence.len()))
    }

    fn first_rotated(&self, table: &RotaryTable) -> usize {
        self.shape.head_dim - table.columns()
    }

    /// Queries divided by their root mean squares, head by head.
    fn normed_queries(&self, queries: &Tensor<2>) -> Tensor<2> {
        let [n, columns] = queries.dims();
        let heads = queries.clone().reshape([n * self.shape.heads, self.shape.head_dim]);
        self.query_norm.forward(&heads).reshape([n, columns])
    }

    /// The projections of streams `x [T, n H]`.
    pub fn project(&self, x: &Tensor<2>, sequences: &[Range<usize>]) -> CompressedTape {
        let (mut tape, z) = self.projected(x);
        if let Some(indexer) = self.choosing(sequences) {
            let latent =
                tape.latent.as_ref().and_then(|latent| self.query.normed(latent)).expect("queries have a latent");
            let [queries, heads] = indexer.read(&z, &latent, &self.table(sequences));
            let [keys, gate] = indexer.compressor.rows(&z);
            let (keys, gate) = (HostView::new(&keys), HostView::new(&gate));
            let entries = self.entries(&indexer.compressor, keys.as_slice(), gate.as_slice(), sequences, &x.device());
            let seen = whole(sequences, &[], &entries, self.shape.head_dim);
            tape.chosen = Some(Arc::new(choose(&queries, &heads, &seen, &indexer.shape, indexer.keys)));
        }
        tape
    }

    /// The indexer, where it has to choose.
    fn choosing(&self, sequences: &[Range<usize>]) -> Option<&EntryIndexer> {
        let longest = sequences.iter().map(Range::len).max().unwrap_or(0);
        self.indexer.as_deref().filter(|indexer| longest / self.shape.rate.max(1) > indexer.keys)
    }

    /// Projections without a choice of keys, and what they read.
    fn projected(&self, x: &Tensor<2>) -> (CompressedTape, Tensor<2>) {
        let (mixing, read) = self.streams.open(x);
        let z = self.norm.forward(&read);
        let (queries, latent) = self.query.forward(&z);
        let compressed = self.compressor.as_ref().map(|compressor| compressor.rows(&z));
        let keys = self.key.forward(&z);
        (CompressedTape { mixing, read, latent, queries, keys, compressed, chosen: None }, z)
    }

    fn ready(&self, tape: &CompressedTape, table: RotaryTable) -> Ready {
        let first = self.first_rotated(&table);
        let q = table.rotate(self.normed_queries(&tape.queries), self.shape.heads, first, false);
        let keys = table.rotate(self.key_norm.forward(&tape.keys), 1, first, false);
        Ready { q: host::into_vec(q), keys: host::into_vec(keys), table }
    }

    /// Compressed keys of every sequence.
    fn entries(
        &self,
        compressor: &Compressor,
        keys: &[f32],
        gate: &[f32],
        sequences: &[Range<usize>],
        device: &Device,
    ) -> Vec<Vec<f32>> {
        let columns = compressor.shape.columns();
        let of = |sequence: &Range<usize>| {
            let rows = sequence.start * columns..sequence.end * columns;
            compressor.entries(&keys[rows.clone()], &gate[rows], &self.rope, [0, 0], device).1
        };
        sequences.iter().map(of).collect()
    }

    /// Compressed keys of every sequence; none of a layer without.
    fn all_entries(&self, tape: &CompressedTape, sequences: &[Range<usize>]) -> Vec<Vec<f32>> {
        match (&self.compressor, &tape.compressed) {
            (Some(compressor), Some([keys, gate])) => {
                let (keys, gate) = (HostView::new(keys), HostView::new(gate));
                self.entries(compressor, keys.as_slice(), gate.as_slice(), sequences, &tape.read.device())
            }
            _ => vec![Vec::new(); sequences.len()],
        }
    }

    /// What the groups of heads give `[n, groups * R]`, of outputs of the heads that rotated back.
    fn grouped(&self, heads: &Tensor<2>) -> Tensor<2> {
        let width = heads.dims()[1] / self.groups.len();
        let of =
            |(group, weight): (usize, &Weight)| weight.forward(&heads.clone().narrow(1, group * width, width), None);
        Tensor::cat(self.groups.iter().enumerate().map(of).collect(), 1)
    }

    /// Outputs of the heads, rotated back.
    fn heads(&self, out: Vec<f32>, table: &RotaryTable, like: &Tensor<2>) -> Tensor<2> {
        let columns = self.shape.heads * self.shape.head_dim;
        let out = host::from_vec(out, [like.dims()[0], columns], &like.device());
        table.rotate(out, self.shape.heads, self.first_rotated(table), true)
    }

    /// The streams after the layer, given the projections of `x`.
    pub fn mix(&self, x: &Tensor<2>, tape: &CompressedTape, sequences: &[Range<usize>]) -> Tensor<2> {
        let ready = self.ready(tape, self.table(sequences));
        let entries = self.all_entries(tape, sequences);
        let seen = whole(sequences, &ready.keys, &entries, self.shape.head_dim);
        let out = attend(&ready.q, &seen, &self.shape, tape.chosen.as_deref());
        let heads = self.heads(out, &ready.table, x);
        self.streams.close(x, &tape.mixing, &self.join.forward(&self.grouped(&heads)))
    }

    /// Gradient with respect to `x`, if it is wanted, from the gradient of [`mix`](Self::mix)'s result; and those of
    /// what is trained.
    pub fn backward(
        &self,
        x: &Tensor<2>,
        tape: &CompressedTape,
        sequences: &[Range<usize>],
        dy: Tensor<2>,
        wanted: Wanted,
    ) -> Option<Tensor<2>> {
        let CompressedShape { heads: head_count, head_dim, .. } = self.shape;
        let through = Wanted { input: true, ..wanted };
        let Ready { q, keys, table } = self.ready(tape, self.table(sequences));
        let (first, device) = (self.first_rotated(&table), x.device());
        let entries = self.all_entries(tape, sequences);
        let seen = whole(sequences, &keys, &entries, head_dim);
        let chosen = tape.chosen.as_deref();
        let heads = self.heads(attend(&q, &seen, &self.shape, chosen), &table, x);
        let grouped = self.grouped(&heads);
        let half = wanted.input.then(|| self.join.forward(&grouped));
        let d_half = self.streams.half_gradient(&tape.mixing, &dy);
        let d_grouped = self.join.backward(|| grouped, &d_half, through)?;
        let rank = d_grouped.dims()[1] / self.groups.len();
        let of = |(group, weight): (usize, &Weight)| weight.backward(&d_grouped.clone().narrow(1, group * rank, rank));
        let d_heads = Tensor::cat(self.groups.iter().enumerate().map(of).collect(), 1);
        let d_heads = host::into_vec(table.rotate(d_heads, head_count, first, false));
        let (dq, d_keys, d_entries) = attend_backward(&q, &seen, &self.shape, chosen, &d_heads);
        let tokens = x.dims()[0];
        let unrotated = |values: Vec<f32>, heads: usize| {
            table.rotate(host::from_vec(values, [tokens, heads * head_dim], &device), heads, first, true)
        };
        let by_head = |x: Tensor<2>| x.reshape([tokens * head_count, head_dim]);
        let dq = by_head(unrotated(dq, head_count));
        let dq = self.query_norm.backward(&by_head(tape.queries.clone()), &dq, false);
        let dq = dq.reshape([tokens, head_count * head_dim]);
        let d_keys = self.key_norm.backward(&tape.keys, &unrotated(d_keys, 1), wanted.parameters);
        let z = || self.norm.forward(&tape.read);
        let wanted_z = Wanted { input: wanted.input || self.norm.is_trained(), ..wanted };
        let mut gradients =
            vec![self.query.backward(&z, tape.latent.as_ref(), &dq, wanted_z), self.key.backward(z, &d_keys, wanted_z)];
        if let (Some(compressor), Some(compressed)) = (&self.compressor, &tape.compressed) {
            let [d_key, d_gate] = self.pooled_gradients(compressor, compressed, sequences, d_entries, wanted);
            gradients.push(compressor.key.backward(z, &d_key, wanted_z));
            gradients.push(compressor.gate.backward(z, &d_gate, wanted_z));
        }
        let d_read = self.norm.backward(&tape.read, &sum_of(gradients)?, wanted.parameters);
        let half = half?;
        sum_of(self.streams.input_gradients(x, &tape.mixing, &half, &dy, &d_read).map(Some))
    }

    /// Gradients at the keys and gates that are compressed, from those at the compressed keys of every sequence.
    fn pooled_gradients(
        &self,
        compressor: &Compressor,
        [keys, gate]: &[Tensor<2>; 2],
        sequences: &[Range<usize>],
        d_entries: Vec<Vec<f32>>,
        wanted: Wanted,
    ) -> [Tensor<2>; 2] {
        let (dims, device) = (keys.dims(), keys.device());
        let (columns, width) = (dims[1], compressor.shape.width);
        let (all_keys, all_gates) = (HostView::new(keys), HostView::new(gate));
        let mut sums = [vec![0.0; dims[0] * columns], vec![0.0; dims[0] * columns]];
        for (sequence, d) in sequences.iter().zip(d_entries).filter(|(_, d)| !d.is_empty()) {
            let rows = sequence.start * columns..sequence.end * columns;
            let (keys, gate) = (&all_keys.as_slice()[rows.clone()], &all_gates.as_slice()[rows.clone()]);
            let (pooled, _) = compressor.entries(keys, gate, &self.rope, [0, 0], &device);
            let count = d.len() / width;
            let table = compressor.table(&self.rope, 0, count);
            let d = table.rotate(host::from_vec(d, [count, width], &device), 1, width - table.columns(), true);
            let d = host::into_vec(compressor.norm.backward(&pooled, &d, wanted.parameters));
            let gradients = pool_backward(keys, gate, &compressor.bias, &compressor.shape, &d);
            for (sum, gradient) in sums.iter_mut().zip(gradients) {
                sum[rows.clone()].copy_from_slice(&gradient);
            }
        }
        sums.map(|values| host::from_vec(values, dims, &device))
    }

    /// The state before the first token of a sequence.
    pub fn start(&self) -> CompressedState {
        CompressedState::default()
    }

    /// The streams after the layer of further tokens `x [n, n H]` of some sequences, whose states move on.
    pub fn step(&self, x: &Tensor<2>, sequences: &[Range<usize>], states: &mut [CompressedState]) -> Tensor<2> {
        let (mut tape, z) = self.projected(x);
        let positions =
            sequences.iter().zip(states.iter()).flat_map(|(sequence, state)| state.fed..state.fed + sequence.len());
        let ready = self.ready(&tape, self.rope.table_at(positions));
        let d = self.shape.head_dim;
        let indexed = self.indexer.as_deref().map(|indexer| {
            let latent =
                tape.latent.as_ref().and_then(|latent| self.query.normed(latent)).expect("queries have a latent");
            (indexer, indexer.read(&z, &latent, &ready.table), indexer.compressor.rows(&z).map(host::into_vec))
        });
        let compressed = tape.compressed.take().map(|rows| rows.map(host::into_vec));
        let mut firsts = Vec::with_capacity(states.len());
        for (sequence, state) in sequences.iter().zip(states.iter_mut()) {
            firsts.push(state.fed - state.keys.len() / d);
            state.keys.extend_from_slice(&ready.keys[sequence.start * d..sequence.end * d]);
            let push = |pooled: &mut Pooled, compressor: &Compressor, [keys, gate]: &[Vec<f32>; 2]| {
                let columns = compressor.shape.columns();
                let rows = sequence.start * columns..sequence.end * columns;
                pooled.push(compressor, &keys[rows.clone()], &gate[rows], &self.rope, &x.device());
            };
            if let (Some(compressor), Some(rows)) = (&self.compressor, &compressed) {
                push(&mut state.compressor, compressor, rows);
            }
            if let Some((indexer, _, rows)) = &indexed {
                push(&mut state.indexer, &indexer.compressor, rows);
            }
        }
        let seen = |entries: fn(&CompressedState) -> &[f32]| -> Vec<Seen<'_>> {
            let of = |((sequence, state), first): ((&Range<usize>, _), &usize)| {
                let state: &CompressedState = state;
                let (queries, start) = (sequence.clone(), state.fed);
                Seen { queries, start, keys: &state.keys, first: *first, entries: entries(state) }
            };
            sequences.iter().zip(states.iter()).zip(&firsts).map(of).collect()
        };
        let chosen = indexed.map(|(indexer, [queries, heads], _)| {
            choose(&queries, &heads, &seen(|state| &state.indexer.entries), &indexer.shape, indexer.keys)
        });
        let out = attend(&ready.q, &seen(|state| &state.compressor.entries), &self.shape, chosen.as_ref());
        for (sequence, state) in sequences.iter().zip(states.iter_mut()) {
            state.fed += sequence.len();
            let kept = (self.shape.window - 1).min(state.fed) * d;
            state.keys.drain(..state.keys.len().saturating_sub(kept));
        }
        let heads = self.heads(out, &ready.table, x);
        self.streams.close(x, &tape.mixing, &self.join.forward(&self.grouped(&heads)))
    }
}

/// Whole sequences with their keys, rows of `keys`, and compressed keys.
fn whole<'a>(sequences: &[Range<usize>], keys: &'a [f32], entries: &'a [Vec<f32>], width: usize) -> Vec<Seen<'a>> {
    let of = |(sequence, entries): (&Range<usize>, &'a Vec<f32>)| Seen {
        queries: sequence.clone(),
        start: 0,
        keys: keys.get(sequence.start * width..sequence.end * width).unwrap_or_default(),
        first: 0,
        entries,
    };
    sequences.iter().zip(entries).map(of).collect()
}

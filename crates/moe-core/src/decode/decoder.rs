//! A model that is fed tokens of sequences and keeps what it needs of those before.

use std::{ops::Range, sync::Arc};

use burn::tensor::Tensor;

use super::cache::{Kept, Mark};
use crate::{
    engine::{Engine, EngineOptions, FfnPass, LayerTape, beside_each_other},
    error::{Error, Result},
    kernels::{
        attention::{AttentionShape, Selection},
        rope::Positions,
        rows::{RowAccumulator, gather_rows},
    },
    layers::{
        AttentionLayer, CacheEntry, ChosenKeys, CompressedState, ConvolutionState, DeltaState, LightningState,
        MambaState, MixerLayer, slice_rows,
    },
    model::{Model, RotaryTables},
    trace::{HalfInput, Nobody, SequenceInfo, WaveInfo},
};

/// Which rows of what was fed logits are computed of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted<'a> {
    /// The last one of each sequence.
    Last,
    /// So many of the last ones of each sequence.
    Tail(&'a [usize]),
}

/// A model with the caches of some sequences.
pub(crate) struct Decoder<'m> {
    model: &'m Model,
    engine: Engine<'m>,
    /// The layer of each place.
    mixers: Vec<usize>,
    /// By place: a step of the model's path, or a layer and round where depth is decided while it runs. `[sequence]`
    /// each.
    cache: Vec<Vec<Kept>>,
    /// How often each sequence goes through a layer, decided from its prompt: `[layer][sequence]`.
    times: Vec<Vec<u8>>,
    /// Tokens of each sequence that were fed.
    fed: Vec<usize>,
    /// Tokens each sequence may have in the end.
    lengths: Vec<usize>,
    /// Where each sequence was before its last tokens were fed, where somebody may go back.
    marks: Vec<Option<(usize, Vec<Mark>)>>,
    /// Sequences that have ended, whose numbers are free.
    ended: Vec<usize>,
}

/// New tokens of some sequences.
pub(super) struct Fed {
    /// The rows of every sequence.
    spans: Vec<Range<usize>>,
    tables: RotaryTables,
    info: WaveInfo,
    ids: Vec<u32>,
    /// Keys that layers chose.
    chosen: ChosenKeys,
}

impl Fed {
    /// Before the first layer.
    pub(super) fn batch<'a>(&'a self, active: &'a [usize]) -> Batch<'a> {
        self.batch_of(active, &self.chosen)
    }

    /// The same for another model, in which layers choose keys of their own.
    pub(super) fn batch_of<'a>(&'a self, active: &'a [usize], chosen: &'a ChosenKeys) -> Batch<'a> {
        Batch { active, spans: &self.spans, tables: &self.tables, info: &self.info, ids: &self.ids, chosen }
    }
}

/// Tokens of some sequences on their way through the layers.
pub(super) struct Batch<'a> {
    active: &'a [usize],
    spans: &'a [Range<usize>],
    tables: &'a RotaryTables,
    pub(super) info: &'a WaveInfo,
    ids: &'a [u32],
    pub(super) chosen: &'a ChosenKeys,
}

impl<'m> Decoder<'m> {
    /// For sequences that have at most these numbers of tokens in the end.
    pub fn new(model: &'m Model, lengths: Vec<usize>) -> Self {
        let config = model.config();
        let mixers: Vec<usize> = match model.depth_rule() {
            // two rounds of every layer
            Some(_) => (0..config.layers.len()).flat_map(|layer| [layer; 2]).collect(),
            None => model.path().steps().iter().map(|step| step.layer).collect(),
        };
        let cache = mixers.iter().map(|_| Vec::with_capacity(lengths.len())).collect();
        let times = vec![Vec::with_capacity(lengths.len()); config.layers.len()];
        let engine = Engine::new(model, EngineOptions::default());
        let (fed, marks, ended) = (Vec::new(), Vec::new(), Vec::new());
        let mut decoder = Self { model, engine, mixers, cache, times, fed, lengths: Vec::new(), marks, ended };
        for length in lengths {
            decoder.admit(length);
        }
        decoder
    }

    /// A further sequence, that has at most `length` tokens in the end: its number, which may be that of one that has
    /// [ended](Self::dismiss).
    pub fn admit(&mut self, length: usize) -> usize {
        if let Some(sequence) = self.ended.pop() {
            self.lengths[sequence] = length;
            return sequence;
        }
        let layers = &self.model.config().layers;
        for (place, layer) in self.cache.iter_mut().zip(&self.mixers) {
            place.push(Kept::empty(&layers[*layer].mixer));
        }
        self.times.iter_mut().for_each(|times| times.push(1));
        self.fed.push(0);
        self.lengths.push(length);
        self.marks.push(None);
        self.lengths.len() - 1
    }

    /// Forgets a sequence.
    pub fn dismiss(&mut self, sequence: usize) {
        let layers = &self.model.config().layers;
        for (place, layer) in self.cache.iter_mut().zip(&self.mixers) {
            place[sequence] = Kept::empty(&layers[*layer].mixer);
        }
        self.times.iter_mut().for_each(|times| times[sequence] = 1);
        (self.fed[sequence], self.marks[sequence]) = (0, None);
        self.ended.push(sequence);
    }

    /// The model.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Tokens of a sequence that were fed.
    pub fn fed(&self, sequence: usize) -> usize {
        self.fed[sequence]
    }

    /// Notes where these sequences are, to [go back](Self::rewind) to.
    pub fn mark(&mut self, active: &[usize]) {
        for &sequence in active {
            let kept = self.cache.iter().map(|place| place[sequence].mark()).collect();
            self.marks[sequence] = Some((self.fed[sequence], kept));
        }
    }

    /// Forgets the tokens of a sequence after the first `length`, of which those after its mark may have to be fed
    /// again: gives where to go on from, `length` itself where keys and values are all that is kept.
    pub fn rewind(&mut self, sequence: usize, length: usize) -> usize {
        let Some((marked, marks)) = self.marks[sequence].take() else { return self.fed[sequence] };
        if length >= self.fed[sequence] {
            return self.fed[sequence];
        }
        let growing = marks.iter().all(|mark| matches!(mark, Mark::Rows(_) | Mark::None));
        let target = if growing { length } else { marked };
        for (place, mark) in self.cache.iter_mut().zip(marks) {
            let mark = match mark {
                // a layer that the sequence does not go through has no rows
                Mark::Rows(rows) if growing => {
                    Mark::Rows(rows + if place[sequence].is_fed() { target - marked } else { 0 })
                }
                other => other,
            };
            place[sequence].rewind(mark);
        }
        self.fed[sequence] = target;
        target
    }

    /// Feeds new tokens of the sequences `active`; logits `[rows, V]` after the rows that are wanted.
    pub fn feed(&mut self, active: &[usize], input: &[Vec<u32>], wanted: Wanted<'_>) -> Result<Tensor<2>> {
        let model = self.model;
        let (fed, mut x) = self.begin(active, input)?;
        let batch = fed.batch(active);
        if model.depth_rule().is_some() {
            for layer in 0..model.config().layers.len() {
                // Other tokens may pass the next layer, which can therefore take no keys from this one.
                let batch = Batch { chosen: &ChosenKeys::default(), ..batch };
                x = self.decided_layer(layer, x, &batch)?;
            }
        } else {
            let path = model.path();
            for (place, step) in path.steps().iter().enumerate() {
                let middle = match step.attention {
                    true => self.mix(place, step.layer, &x, &batch)?,
                    false => x.clone(),
                };
                x = match step.feed_forward {
                    true => self.feed_forward(step.layer, self.engine.half(&x, &middle), &batch)?,
                    false => middle,
                };
            }
        }
        self.end(active, &fed, &x, wanted)
    }

    /// New tokens of the sequences `active`, embedded.
    pub(super) fn begin(&self, active: &[usize], input: &[Vec<u32>]) -> Result<(Fed, Tensor<2>)> {
        let ids: Vec<u32> = input.iter().flatten().copied().collect();
        let mut spans = Vec::with_capacity(active.len());
        let mut start = 0;
        for tokens in input {
            spans.push(start..start + tokens.len());
            start += tokens.len();
        }
        let tables = self.model.rotary_tables(&self.positions(active, &spans));
        let info = WaveInfo { ids: ids.clone(), ..info_of(&spans) };
        let embedded = self.model.embedded_streams(&ids)?;
        Ok((Fed { spans, tables, info, ids, chosen: ChosenKeys::default() }, embedded))
    }

    /// Logits of what left the last layer; its tokens have been fed.
    pub(super) fn end(&mut self, active: &[usize], fed: &Fed, x: &Tensor<2>, wanted: Wanted<'_>) -> Result<Tensor<2>> {
        self.has_fed(active, fed);
        let rows: Vec<u32> = match wanted {
            Wanted::Last => fed.spans.iter().map(|s| s.end as u32 - 1).collect(),
            Wanted::Tail(counts) => {
                let tail = |(span, count): (&Range<usize>, &usize)| (span.end - count.min(&span.len()))..span.end;
                fed.spans.iter().zip(counts).flat_map(tail).map(|row| row as u32).collect()
            }
        };
        let norm = self.model.final_norm()?;
        let h = norm.forward(&gather_rows(x, &rows));
        let logits = Tensor::cat(self.model.head_forward(&h)?, 1);
        self.model.check_reads()?;
        Ok(logits)
    }

    /// Tokens have been fed, whoever took them through the layers.
    pub(super) fn has_fed(&mut self, active: &[usize], fed: &Fed) {
        active.iter().zip(&fed.spans).for_each(|(&s, span)| self.fed[s] += span.len());
    }

    /// What runs its layers.
    pub(super) fn engine(&self) -> &Engine<'m> {
        &self.engine
    }

    /// Keeps of a sequence at a place what `other` keeps of it.
    pub(super) fn keep_as(&mut self, other: &Self, place: usize, sequence: usize) {
        self.cache[place][sequence] = other.cache[place][sequence].clone();
    }

    fn positions(&self, active: &[usize], spans: &[Range<usize>]) -> Vec<Positions> {
        let of = |(&s, span): (&usize, &Range<usize>)| {
            let start = self.fed[s];
            Positions { range: start..start + span.len(), length: self.lengths[s] }
        };
        active.iter().zip(spans).map(of).collect()
    }

    /// A layer that some sequences pass and others repeat, and whose feed-forward half some tokens skip.
    fn decided_layer(&mut self, layer: usize, x: Tensor<2>, batch: &Batch<'_>) -> Result<Tensor<2>> {
        let rule = self.model.depth_rule().expect("asked for with a rule").clone();
        // decided once, from the prompt
        let new: Vec<usize> = (0..batch.active.len()).filter(|i| self.fed[batch.active[*i]] == 0).collect();
        if !new.is_empty() {
            let (part, rows, spans) = part_of(&x, batch.spans, &new);
            let info = info_of(&spans);
            if let Some(times) = rule.times(layer, &part, &info)? {
                self.engine.check_times(layer, &times, new.len())?;
                new.iter().zip(times).for_each(|(i, times)| self.times[layer][batch.active[*i]] = times);
            }
            drop(rows);
        }
        let mut x = x;
        for round in 0..2 {
            let run: Vec<usize> =
                (0..batch.active.len()).filter(|i| self.times[layer][batch.active[*i]] > round).collect();
            if run.is_empty() {
                break;
            }
            let place = 2 * layer + usize::from(round);
            if run.len() == batch.active.len() {
                let middle = self.mix(place, layer, &x, batch)?;
                let half = self.engine.half(&x, &middle);
                x = self.engine.decided_feed_forward(layer, half, batch.info, &*rule, &mut Nobody)?;
                continue;
            }
            let (part, rows, spans) = part_of(&x, batch.spans, &run);
            let active: Vec<usize> = run.iter().map(|i| batch.active[*i]).collect();
            let tables = self.model.rotary_tables(&self.positions(&active, &spans));
            let info = info_of(&spans);
            let batch = Batch { active: &active, spans: &spans, tables: &tables, info: &info, ..*batch };
            let middle = self.mix(place, layer, &part, &batch)?;
            let half = self.engine.half(&part, &middle);
            let part = self.engine.decided_feed_forward(layer, half, &info, &*rule, &mut Nobody)?;
            let mut whole = RowAccumulator::from_tensor(x);
            whole.set_rows(&rows, &part);
            x = whole.into_tensor();
        }
        Ok(x)
    }

    /// The rest of a layer.
    pub(super) fn feed_forward(&self, layer: usize, half: HalfInput<'_>, batch: &Batch<'_>) -> Result<Tensor<2>> {
        let pass = FfnPass::new(layer, batch.info);
        let output = self.engine.ffn_forward(pass, half, &mut LayerTape::default(), &mut Nobody)?;
        self.engine.with_layer_input(layer, output, batch.ids)
    }

    /// The half of a layer that looks at other tokens.
    pub(super) fn mix(&mut self, place: usize, layer: usize, x: &Tensor<2>, batch: &Batch<'_>) -> Result<Tensor<2>> {
        let (x, beside) = self.engine.apart(x);
        self.model.count().pass_half(x.dims()[0]);
        let middle = self.mixed(place, layer, &x, batch)?;
        Ok(beside_each_other(middle, beside))
    }

    /// The same of the residual stream alone.
    fn mixed(&mut self, place: usize, layer: usize, x: &Tensor<2>, batch: &Batch<'_>) -> Result<Tensor<2>> {
        let Batch { active, spans, tables, .. } = *batch;
        let (model, device) = (self.model, self.model.device());
        let cache = &mut self.cache[place];
        Ok(match model.mixer(layer)? {
            MixerLayer::Attention(attention) => {
                let entry = attention.cache_entry(x, tables.of(model.config(), layer));
                for (&sequence, span) in active.iter().zip(spans) {
                    let rows = |t: &Tensor<2>| slice_rows(t, span);
                    let v = entry.v.as_ref().map(rows);
                    if let (Kept::Attention(kept), Some(k)) = (&mut cache[sequence], &entry.k) {
                        let length = self.lengths[sequence];
                        kept.push(rows(k), v, length, device);
                        let may_choose = attention.choice.as_ref().is_some_and(|choice| length > choice.keys());
                        if let Some(indexed) = entry.indexed.as_ref().filter(|_| may_choose) {
                            kept.indexed.push(rows(&indexed.keys), length, device);
                        }
                    }
                }
                let selection = self.chosen_keys(place, &attention, &entry, batch)?;
                let shape = attention.cached_shape();
                let place = attention.keys_of().map_or(Ok(place), |layer| self.place_of(layer))?;
                let heads = self.attend(place, &entry.q, active, spans, &shape, selection.as_deref());
                attention.residual(x, &attention.cached_heads(heads, entry.gate.as_ref()))
            }
            MixerLayer::Delta(delta) => {
                with_delta_states(cache, active, || delta.start(), |states| delta.step(x, spans, states))
            }
            MixerLayer::Convolution(convolution) => {
                let mut states: Vec<ConvolutionState> = Vec::with_capacity(active.len());
                for &sequence in active {
                    states.push(match &mut cache[sequence] {
                        Kept::Convolution(state) => state.take().unwrap_or_else(|| convolution.start()),
                        _ => unreachable!("the cache was made for the kinds of the layers"),
                    });
                }
                let middle = convolution.step(x, spans, &mut states);
                for (&sequence, state) in active.iter().zip(states) {
                    cache[sequence] = Kept::Convolution(Some(state));
                }
                middle
            }
            MixerLayer::Mamba(mamba) => {
                let mut states: Vec<MambaState> = Vec::with_capacity(active.len());
                for &sequence in active {
                    states.push(match &mut cache[sequence] {
                        Kept::Mamba(state) => state.take().unwrap_or_else(|| mamba.start()),
                        _ => unreachable!("the cache was made for the kinds of the layers"),
                    });
                }
                let middle = mamba.step(x, spans, &mut states);
                for (&sequence, state) in active.iter().zip(states) {
                    cache[sequence] = Kept::Mamba(Some(state));
                }
                middle
            }
            MixerLayer::Lightning(lightning) => {
                let mut states: Vec<LightningState> = Vec::with_capacity(active.len());
                for &sequence in active {
                    states.push(match &mut cache[sequence] {
                        Kept::Lightning(state) => state.take().unwrap_or_else(|| lightning.start()),
                        _ => unreachable!("the cache was made for the kinds of the layers"),
                    });
                }
                let middle = lightning.step(x, spans, &mut states);
                for (&sequence, state) in active.iter().zip(states) {
                    cache[sequence] = Kept::Lightning(Some(state));
                }
                middle
            }
            MixerLayer::Compressed(compressed) => {
                let mut states: Vec<CompressedState> = Vec::with_capacity(active.len());
                for &sequence in active {
                    states.push(match &mut cache[sequence] {
                        Kept::Compressed(state) => state.take().map_or_else(|| compressed.start(), |state| *state),
                        _ => unreachable!("the cache was made for the kinds of the layers"),
                    });
                }
                let middle = compressed.step(x, spans, &mut states);
                for (&sequence, state) in active.iter().zip(states) {
                    cache[sequence] = Kept::Compressed(Some(Box::new(state)));
                }
                middle
            }
            MixerLayer::HeadMixture(mixture) => {
                let tape = mixture.project(x, tables.of(model.config(), layer));
                for (&sequence, span) in active.iter().zip(spans) {
                    if let Kept::Attention(kept) = &mut cache[sequence] {
                        let (k, v) = (slice_rows(&tape.k, span), slice_rows(&tape.v, span));
                        kept.push(k, Some(v), self.lengths[sequence], device);
                    }
                }
                mixture.finish(x, &tape, &self.attend(place, &tape.q, active, spans, &mixture.shape, None))
            }
            MixerLayer::None => x.clone(),
        })
    }

    /// The place whose cache has the keys and values of a layer.
    fn place_of(&self, layer: usize) -> Result<usize> {
        self.mixers.iter().position(|other| *other == layer).ok_or_else(|| {
            Error::Unsupported(format!("a path without layer {layer}, whose keys and values a layer after it reads"))
        })
    }

    /// The keys that new queries see, where these are not all before them.
    fn chosen_keys(
        &self,
        place: usize,
        attention: &AttentionLayer,
        entry: &CacheEntry,
        batch: &Batch<'_>,
    ) -> Result<Option<Arc<Selection>>> {
        let kept = |sequence: usize| match &self.cache[place][sequence] {
            Kept::Attention(kept) => kept,
            _ => unreachable!("only attention has keys"),
        };
        let Some(choice) = &attention.choice else { return Ok(None) };
        if batch.active.iter().all(|&sequence| kept(sequence).keys.rows() <= choice.keys()) {
            return Ok(None);
        }
        let device = self.model.device();
        let indexed = || entry.indexed.clone().expect("the layer has an indexer");
        let selection = choice.choose(batch.chosen, indexed, |_| {
            let spans = batch.active.iter().zip(batch.spans);
            spans
                .map(|(&sequence, span)| {
                    let long = kept(sequence).keys.rows() > choice.keys();
                    (span.clone(), long.then(|| kept(sequence).indexed.tensor(device)))
                })
                .collect()
        })?;
        Ok(Some(selection))
    }

    fn attend(
        &self,
        place: usize,
        q: &Tensor<2>,
        active: &[usize],
        spans: &[Range<usize>],
        shape: &AttentionShape,
        selection: Option<&Selection>,
    ) -> Tensor<2> {
        let cache = |s: usize| match &self.cache[place][s] {
            Kept::Attention(kept) => kept,
            _ => unreachable!("only attention has keys"),
        };
        #[cfg(feature = "flex")]
        if crate::host::is_host(&q.device()) {
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
            return forward_spans(q, &cached, shape, selection);
        }
        let outputs = active
            .iter()
            .zip(spans)
            .map(|(&s, span)| {
                let (k, v) = (cache(s).keys.on_device(), cache(s).values().on_device());
                let part = selection.map(|selection| selection.part(span));
                crate::kernels::attention::attention_cached(&slice_rows(q, span), &k, &v, shape, part.as_ref())
            })
            .collect();
        Tensor::cat(outputs, 0)
    }
}

/// What `step` makes of the states of sequences in a layer with linear attention, which it moves on.
fn with_delta_states(
    cache: &mut [Kept],
    active: &[usize],
    start: impl Fn() -> DeltaState,
    step: impl FnOnce(&mut [&mut DeltaState]) -> Tensor<2>,
) -> Tensor<2> {
    let mut states: Vec<DeltaState> = Vec::with_capacity(active.len());
    for &sequence in active {
        states.push(match &mut cache[sequence] {
            Kept::Delta(state) => state.take().unwrap_or_else(&start),
            _ => unreachable!("the cache was made for the kinds of the layers"),
        });
    }
    let middle = step(&mut states.iter_mut().collect::<Vec<_>>());
    for (&sequence, state) in active.iter().zip(states) {
        cache[sequence] = Kept::Delta(Some(state));
    }
    middle
}

fn info_of(spans: &[Range<usize>]) -> WaveInfo {
    let sequence = |span: &Range<usize>| SequenceInfo { tokens: span.clone(), loss_tokens: 0 };
    let tokens = spans.last().map_or(0, |span| span.end);
    WaveInfo { id: 0, tokens, ids: Vec::new(), sequences: spans.iter().map(sequence).collect() }
}

/// The rows of some of the spans, which rows they are, and their spans among themselves.
pub(crate) fn part_of(
    x: &Tensor<2>,
    spans: &[Range<usize>],
    which: &[usize],
) -> (Tensor<2>, Vec<u32>, Vec<Range<usize>>) {
    let rows: Vec<u32> = which.iter().flat_map(|i| spans[*i].clone()).map(|row| row as u32).collect();
    let mut start = 0;
    let mut own = Vec::with_capacity(which.len());
    for i in which {
        own.push(start..start + spans[*i].len());
        start += spans[*i].len();
    }
    (gather_rows(x, &rows), rows, own)
}

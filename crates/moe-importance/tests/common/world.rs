//! A few MoE layers with random routing, experts and gradients, shown to an observer as an engine would, wave by wave.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::Device;
use moe_checkpoint::{ExpertWeights, MoeLayerShape, MoeShape, Statistics};
use moe_core::experts::ExpertTensors;
use moe_core::trace::{
    ExpertGradients, ExpertTrace, LayerOutput, LayerTrace, Observer, RouterGradients, Segment, SequenceInfo, SweepPart,
    WaveInfo,
};
use moe_importance::{Collection, Error, ExpertWeightsSource, Result, StatisticId};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::{Case, Matrix, provenance};

/// What the routing weights of every world carry, as models with a `routed_scaling_factor` have it.
pub const SCALE: f32 = 0.5;

/// One routed expert and all tokens that reach it.
#[derive(Clone, Debug)]
pub struct WorldExpert {
    /// Weights, and inputs, upstream gradients and routing weights of its rows.
    pub case: Case,
    /// Token of each row, ascending.
    pub tokens: Vec<usize>,
}

impl WorldExpert {
    /// Outputs before the routing weight `[n, H]`.
    pub fn outputs(&self) -> Matrix {
        self.case.backward().0.times_transposed(&self.case.down)
    }

    /// The rows whose tokens are in `range`.
    fn within(&self, range: &Range<usize>) -> Self {
        let kept: Vec<usize> = (0..self.tokens.len()).filter(|row| range.contains(&self.tokens[*row])).collect();
        Self { case: self.case.permute_rows(&kept), tokens: kept.iter().map(|row| self.tokens[*row]).collect() }
    }
}

/// One MoE layer.
#[derive(Clone, Debug)]
pub struct WorldLayer {
    /// Decoder layer index.
    pub layer: usize,
    /// `[T, H]`.
    pub input: Matrix,
    /// `[T, E]`.
    pub logits: Matrix,
    /// `[T, E]`.
    pub d_logits: Matrix,
    /// `[E, H]`.
    pub router: Matrix,
    /// `[T][k]`.
    pub selected: Vec<Vec<usize>>,
    /// `[T][k]`: softmax probabilities over all experts, not renormalized.
    pub weights: Vec<Vec<f64>>,
    pub experts: Vec<WorldExpert>,
}

impl WorldLayer {
    /// What every expert of a token adds to the residual stream, by token: the expert and `[H]`.
    pub fn added(&self) -> Vec<Vec<(usize, Vec<f64>)>> {
        let mut added = vec![Vec::new(); self.input.rows];
        for (e, expert) in self.experts.iter().enumerate() {
            let outputs = expert.outputs();
            for (row, token) in expert.tokens.iter().enumerate() {
                let value = |h: usize| expert.case.routing[row] * outputs.at(row, h);
                added[*token].push((e, (0..outputs.columns).map(value).collect()));
            }
        }
        added
    }

    /// The residual stream after the layer `[T, H]`, where `input` is what it is before.
    pub fn stream(&self) -> Matrix {
        let mut stream = self.input.clone();
        for (token, added) in self.added().into_iter().enumerate() {
            for (h, value) in added.iter().flat_map(|(_, values)| values.iter().enumerate()) {
                stream.values[token * stream.columns + h] += value;
            }
        }
        stream
    }

    /// Softmax over all experts of a token.
    pub fn softmax(&self, token: usize) -> Vec<f64> {
        let row: Vec<f64> = (0..self.logits.columns).map(|e| self.logits.at(token, e)).collect();
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = row.iter().map(|z| (z - largest).exp()).sum();
        row.iter().map(|z| (z - largest).exp() / total).collect()
    }
}

#[derive(Clone, Debug)]
pub struct World {
    pub hidden: usize,
    pub top_k: usize,
    /// Tokens and predicted tokens of each sequence.
    pub sequences: Vec<(usize, usize)>,
    pub layers: Vec<WorldLayer>,
}

impl World {
    /// Decoder layers 1 and 3 with experts of these widths. The last expert of each layer gets no token.
    pub fn random(hidden: usize, widths: &[usize], top_k: usize, sequences: &[(usize, usize)], seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let tokens = sequences.iter().map(|(tokens, _)| tokens).sum();
        let mut layer = |layer| {
            let input = Matrix::random(tokens, hidden, &mut rng);
            let router = Matrix::random(widths.len(), hidden, &mut rng);
            let mut logits = input.times_transposed(&router);
            for (n, z) in logits.values.iter_mut().enumerate() {
                // Exact in f32, and far away for the expert that nobody is routed to.
                *z = f64::from(*z as f32) - if n % widths.len() == widths.len() - 1 { 50.0 } else { 0.0 };
            }
            let upstream = Matrix::random(tokens, hidden, &mut rng);
            let weights = |rng: &mut ChaCha8Rng| -> Vec<[Matrix; 3]> {
                let matrices = |width: &usize| {
                    let [gate, up] = [(); 2].map(|()| Matrix::random(*width, hidden, rng));
                    [gate, up, Matrix::random(hidden, *width, rng)]
                };
                widths.iter().map(matrices).collect()
            };
            let weights = weights(&mut rng);
            route(layer, input, logits, router, &upstream, &weights, top_k)
        };
        let layers = vec![layer(1), layer(3)];
        Self { hidden, top_k, sequences: sequences.to_vec(), layers }
    }

    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(|(tokens, _)| tokens).sum()
    }

    /// Tokens of a sequence.
    pub fn range(&self, sequence: usize) -> Range<usize> {
        let start = self.sequences[..sequence].iter().map(|(tokens, _)| tokens).sum();
        start..start + self.sequences[sequence].0
    }

    pub fn shape(&self) -> MoeShape {
        let widths = |layer: &WorldLayer| layer.experts.iter().map(|e| e.case.width()).collect();
        let layers = self.layers.iter().map(|l| MoeLayerShape { layer: l.layer, widths: widths(l) }).collect();
        MoeShape { gateless: false, hidden_size: self.hidden, top_k: self.top_k, layers }
    }

    /// Experts of layer `l` in the order of `experts`, units of each in the order of `units`.
    pub fn permute(&self, l: usize, experts: &[usize], units: &[Vec<usize>]) -> Self {
        let mut world = self.clone();
        let layer = &mut world.layers[l];
        let position: BTreeMap<usize, usize> = experts.iter().enumerate().map(|(to, from)| (*from, to)).collect();
        layer.logits = layer.logits.select_columns(experts);
        layer.d_logits = layer.d_logits.select_columns(experts);
        layer.router = layer.router.select_rows(experts);
        layer.selected.iter_mut().flatten().for_each(|e| *e = position[e]);
        let permuted = |from: &usize| {
            let expert = &self.layers[l].experts[*from];
            WorldExpert { case: expert.case.permute_units(&units[*from]), tokens: expert.tokens.clone() }
        };
        layer.experts = experts.iter().map(permuted).collect();
        world
    }

    fn info(&self, wave: u64, sequences: &Range<usize>) -> WaveInfo {
        let offset = self.range(sequences.start).start;
        let infos = sequences.clone().map(|s| {
            let range = self.range(s);
            SequenceInfo { tokens: range.start - offset..range.end - offset, loss_tokens: self.sequences[s].1 }
        });
        let sequences: Vec<_> = infos.collect();
        let tokens = sequences.last().map_or(0, |s| s.tokens.end);
        WaveInfo { id: wave, tokens, ids: Vec::new(), sequences }
    }

    /// Shows these sequences as one wave: routing first layer first, then experts and routers last layer first.
    pub fn observe(&self, wave: u64, sequences: Range<usize>, observer: &mut dyn Observer) -> moe_core::Result<()> {
        let info = self.info(wave, &sequences);
        let offset = self.range(sequences.start).start;
        let tokens = offset..offset + info.tokens;
        let f32s = |m: &Matrix| -> Vec<f32> {
            m.values[tokens.start * m.columns..tokens.end * m.columns].iter().map(|v| *v as f32).collect()
        };
        observer.begin_wave(&info)?;
        let routing = |layer: &WorldLayer| -> (Vec<u32>, Vec<f32>) {
            let selected = layer.selected[tokens.clone()].iter().flatten().map(|e| *e as u32).collect();
            (selected, layer.weights[tokens.clone()].iter().flatten().map(|w| *w as f32).collect())
        };
        for layer in &self.layers {
            let (selected, weights) = routing(layer);
            observer.layer(&LayerTrace {
                layer: layer.layer,
                wave: &info,
                experts: layer.experts.len(),
                top_k: self.top_k,
                logits: &f32s(&layer.logits),
                selected: &selected,
                weights: &weights,
                scale: SCALE,
                idle: &[],
            })?;
            let rows: Vec<usize> = tokens.clone().collect();
            let input = layer.input.select_rows(&rows).tensor();
            observer.output(&LayerOutput {
                layer: layer.layer,
                position: 0,
                wave: &info,
                stream: &input,
                input: &input,
                read: &input,
                output: &layer.stream().select_rows(&rows).tensor(),
                residual_factor: 1.0,
            })?;
        }
        for layer in self.layers.iter().rev() {
            for (e, expert) in layer.experts.iter().enumerate() {
                let expert = expert.within(&tokens);
                if !expert.tokens.is_empty() {
                    show(layer.layer, e, &expert, &info, offset, observer)?;
                }
            }
            let (selected, weights) = routing(layer);
            let rows: Vec<usize> = tokens.clone().collect();
            observer.router(&RouterGradients {
                layer: layer.layer,
                wave: &info,
                experts: layer.experts.len(),
                top_k: self.top_k,
                input: &layer.input.select_rows(&rows).tensor(),
                logits: &f32s(&layer.logits),
                selected: &selected,
                weights: &weights,
                d_weights: &vec![0.0; weights.len()],
                d_logits: &f32s(&layer.d_logits),
                d_gains: &vec![0.0; layer.experts.len()],
            })?;
            // Whichever of the two sweeps shows experts to the observer, this layer is done.
            observer.done(SweepPart::Forward(layer.layer))?;
            observer.done(SweepPart::Backward(layer.layer))?;
        }
        observer.end_wave(&info)
    }

    /// Statistics of all sequences as one wave.
    pub fn collect(&self, ids: &[StatisticId]) -> Statistics {
        let mut collection = Collection::new(&self.shape(), provenance(), ids).unwrap();
        self.observe(0, 0..self.sequences.len(), &mut collection).unwrap();
        let mut statistics = collection.take().unwrap();
        statistics.round_to_f32();
        statistics
    }
}

impl ExpertWeightsSource for World {
    fn expert(&self, layer: usize, expert: usize) -> Result<ExpertWeights, Error> {
        let layer = self.layers.iter().find(|l| l.layer == layer).ok_or(Error::NoWeights { layer, expert })?;
        Ok(layer.experts[expert].case.weights())
    }

    fn router(&self, layer: usize) -> Result<Vec<f32>, Error> {
        let layer = self.layers.iter().find(|l| l.layer == layer).ok_or(Error::NoRouter { layer })?;
        Ok(layer.router.values.iter().map(|v| *v as f32).collect())
    }
}

/// Routes by the softmax over all experts, and finds the gradients of the logits.
fn route(
    layer: usize,
    input: Matrix,
    logits: Matrix,
    router: Matrix,
    upstream: &Matrix,
    weights: &[[Matrix; 3]],
    top_k: usize,
) -> WorldLayer {
    let (tokens, experts) = (logits.rows, logits.columns);
    let d_logits = Matrix { rows: tokens, columns: experts, values: vec![0.0; tokens * experts] };
    let mut world =
        WorldLayer { layer, input, logits, d_logits, router, selected: vec![], weights: vec![], experts: vec![] };
    let mut rows: Vec<(Vec<usize>, Vec<f64>)> = vec![Default::default(); experts];
    for t in 0..tokens {
        let p = world.softmax(t);
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
        order.truncate(top_k);
        for e in &order {
            rows[*e].0.push(t);
            rows[*e].1.push(f64::from(p[*e] as f32));
        }
        world.weights.push(order.iter().map(|e| f64::from(p[*e] as f32)).collect());
        world.selected.push(order);
    }
    for ([gate, up, down], (tokens, routing)) in weights.iter().zip(rows) {
        let case = Case {
            gate: gate.clone(),
            up: up.clone(),
            down: down.clone(),
            input: world.input.select_rows(&tokens),
            upstream: upstream.select_rows(&tokens),
            routing,
            sequences: vec![],
        };
        world.experts.push(WorldExpert { case, tokens });
    }
    for e in 0..experts {
        let expert = &world.experts[e];
        let outputs = expert.outputs();
        for (row, t) in expert.tokens.clone().into_iter().enumerate() {
            let expert = &world.experts[e];
            let dw: f64 = (0..outputs.columns).map(|h| expert.case.upstream.at(row, h) * outputs.at(row, h)).sum();
            let (w, p) = (expert.case.routing[row], world.softmax(t));
            for (other, p) in p.iter().enumerate() {
                let delta = if other == e { 1.0 } else { 0.0 };
                world.d_logits.values[t * experts + other] += dw * w * (delta - p);
            }
        }
    }
    world
}

fn show(
    layer: usize,
    expert: usize,
    of: &WorldExpert,
    wave: &WaveInfo,
    offset: usize,
    observer: &mut dyn Observer,
) -> moe_core::Result<()> {
    let (units, d_units, gate_up) = of.case.backward();
    let output = units.times_transposed(&of.case.down).tensor();
    let (input, upstream) = (of.case.input.tensor(), of.case.upstream.tensor());
    let (units, d_units, gate_up) = (units.tensor(), d_units.tensor(), gate_up.tensor());
    let rows: Vec<u32> = of.tokens.iter().map(|t| (t - offset) as u32).collect();
    let routing: Vec<f32> = of.case.routing.iter().map(|w| *w as f32).collect();
    let count = |end: usize| rows.partition_point(|t| (*t as usize) < end);
    let segment = |(sequence, info): (usize, &SequenceInfo)| {
        let rows = count(info.tokens.start)..count(info.tokens.end);
        (!rows.is_empty()).then_some(Segment { sequence, rows, loss_tokens: info.loss_tokens })
    };
    let segments: Vec<Segment> = wave.sequences.iter().enumerate().filter_map(segment).collect();
    observer.expert(&ExpertTrace {
        layer,
        expert,
        rows: &rows,
        routing_weights: &routing,
        segments: &segments,
        input: &input,
        units: Some(&units),
        output: Some(&output),
        backward: Some(ExpertGradients { upstream: &upstream, units: &d_units, gate_up: &gate_up }),
        expert_weights: &ExpertTensors::new(of.case.weights(), &Device::flex()),
    })
}

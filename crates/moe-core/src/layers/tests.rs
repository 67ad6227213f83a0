//! Whole attention layers against difference quotients, and expanded against absorbed latent attention.

use moe_checkpoint::{RopeConfig, RopeScaling};

use super::*;
use crate::{
    adapters::Wanted,
    host,
    kernels::{
        attention::{AttentionShape, attention_cached},
        compressed::{CompressedShape, PoolShape},
        delta::{DecayPer, DeltaShape},
        latent::LatentHeads,
        rope::{Positions, RotaryEmbedding, RotaryTable},
        testing::{assert_close, pattern},
    },
};

pub(super) const HIDDEN: usize = 6;
pub(super) const TOKENS: usize = 5;

pub(super) fn weight(shape: [usize; 2], seed: u32) -> Weight {
    Weight::dense(pattern(shape, seed))
}

fn vector(len: usize, seed: u32) -> Tensor<1> {
    pattern([1, len], seed).reshape([len])
}

pub(super) fn linear(shape: [usize; 2], seed: u32) -> Linear {
    Linear::new(weight(shape, seed), Some(vector(shape[0], seed + 100)))
}

pub(super) fn norm(len: usize, seed: u32, bias: bool) -> Norm {
    Norm::new(vector(len, seed).add_scalar(1.5), bias.then(|| vector(len, seed + 100)), 1e-5)
}

pub(super) fn table(rotary_dim: usize, interleaved: bool) -> RotaryTable {
    let rope = RopeConfig { theta: 100.0, interleaved, scaling: RopeScaling::Default };
    RotaryEmbedding::new(&rope, rotary_dim).unwrap().table(&[Positions { range: 0..TOKENS, length: TOKENS }])
}

fn shape(kv_heads: usize, head_dim: usize, value_dim: usize) -> AttentionShape {
    AttentionShape { heads: 2, kv_heads, head_dim, value_dim, scale: 0.5, window: None, chunk: None, sinks: None }
}

pub(super) fn grouped(per_head: bool, clip: Option<f32>) -> AttentionLayer {
    let norms = HeadNorms {
        query: norm(if per_head { 4 } else { 8 }, 4, false),
        key: norm(4, 5, false),
        per_head,
        after_rotation: false,
    };
    AttentionLayer {
        norm: Some(norm(HIDDEN, 6, true)),
        output_norm: None,
        projections: Projections::Grouped(Box::new(GroupedProjections {
            qkv: QkvProjections::Separate(Box::new([
                linear([8, HIDDEN], 1),
                linear([4, HIDDEN], 2),
                linear([4, HIDDEN], 3),
            ])),
            norms: Some(norms),
            clip,
            value_norm: None,
            rotary: true,
            grows: false,
            gate: HeadGate::None,
        })),
        output: linear([HIDDEN, 8], 7),
        shape: shape(1, 4, 4),
        residual: 0.7,
        carry: None,
        choice: None,
        lent_as: None,
    }
}

fn latent(low_rank: bool) -> AttentionLayer {
    let heads = LatentHeads { heads: 2, nope: 3, rope: 2, value: 4 };
    let query = match low_rank {
        true => QueryProjection::LowRank(Box::new(LowRankQuery {
            down: linear([5, HIDDEN], 1),
            norm: norm(5, 2, false),
            up: weight([10, 5], 3),
        })),
        false => QueryProjection::Full(weight([10, HIDDEN], 4)),
    };
    AttentionLayer {
        norm: Some(norm(HIDDEN, 5, false)),
        output_norm: None,
        projections: Projections::Latent(Box::new(LatentProjections {
            rotary: true,
            gate: None,
            query,
            kv_down: linear([3 + 2, HIDDEN], 6),
            kv_norm: norm(3, 7, false),
            kv_scale: 1.5,
            kv_up: weight([2 * (3 + 4), 3], 8),
            heads,
        })),
        output: linear([HIDDEN, 8], 9),
        shape: shape(2, 5, 4),
        residual: 1.0,
        carry: None,
        choice: None,
        lent_as: None,
    }
}

fn check_gradient(layer: &AttentionLayer, table: &RotaryTable) {
    let (x, dy) = (pattern([TOKENS, HIDDEN], 20), pattern([TOKENS, HIDDEN], 21));
    let sequences = [0..2, 2..TOKENS];
    let tape = layer.project(&x, table, &Handover::default()).unwrap();
    let found = host::into_vec(
        layer
            .backward(
                &x,
                &tape,
                &sequences,
                table,
                dy.clone(),
                &Handover::default(),
                Wanted { input: true, parameters: false },
            )
            .unwrap(),
    );
    let values = host::into_vec(x);
    for (i, found) in found.into_iter().enumerate() {
        let at = |h: f32| -> f64 {
            let mut moved = values.clone();
            moved[i] += h;
            let x = host::from_vec(moved, [TOKENS, HIDDEN], &dy.device());
            let y = layer.mix(&x, &layer.project(&x, table, &Handover::default()).unwrap(), &sequences);
            host::into_vec(y * dy.clone()).into_iter().map(f64::from).sum()
        };
        let numeric = (at(2e-3) - at(-2e-3)) / 4e-3;
        let close = (numeric - f64::from(found)).abs() < 4e-3 * (1.0 + numeric.abs());
        assert!(close, "{i}: {found} and {numeric}");
    }
}

#[test]
fn grouped_attention_has_the_gradient_of_a_difference_quotient() {
    check_gradient(&grouped(true, None), &table(4, false));
    check_gradient(&grouped(false, None), &table(2, true));
    check_gradient(&grouped(false, Some(0.9)), &table(4, false));
}

fn gated(per_head: bool) -> AttentionLayer {
    let mut layer = grouped(per_head, None);
    if let Projections::Grouped(projections) = &mut layer.projections {
        projections.gate = HeadGate::Query;
        if let QkvProjections::Separate(qkv) = &mut projections.qkv {
            qkv[0] = linear([16, HIDDEN], 1);
        }
    }
    layer
}

#[test]
fn gated_attention_has_the_gradient_of_a_difference_quotient() {
    check_gradient(&gated(true), &table(2, false));
}

#[test]
fn every_kind_of_grouped_projections_has_the_gradient_of_a_difference_quotient() {
    let changed = |change: &dyn Fn(&mut GroupedProjections)| {
        let mut layer = grouped(true, None);
        layer.output_norm = Some(norm(HIDDEN, 8, false));
        if let Projections::Grouped(projections) = &mut layer.projections {
            change(projections);
        }
        layer
    };
    let packed = || QkvProjections::Packed(Box::new(linear([16, HIDDEN], 9)));
    let tied = || QkvProjections::Tied(Box::new([linear([8, HIDDEN], 1), linear([4, HIDDEN], 2)]));
    for layer in [
        changed(&|p| p.qkv = packed()),
        changed(&|p| p.qkv = tied()),
        changed(&|p| p.value_norm = Some(norm(4, 10, false))),
        changed(&|p| p.gate = HeadGate::Projection(Box::new(linear([8, HIDDEN], 11)))),
        changed(&|p| {
            if let Some(norms) = &mut p.norms {
                norms.after_rotation = true;
            }
        }),
        AttentionLayer { norm: None, shape: AttentionShape { chunk: Some(2), ..shape(1, 4, 4) }, ..changed(&|_| {}) },
    ] {
        check_gradient(&layer, &table(4, false));
    }
}

fn delta(grouped: bool) -> DeltaLayer {
    let shape = DeltaShape { key_heads: 2, value_heads: 4, key_dim: 3, value_dim: 2, decay: DecayPer::Head };
    let small = |len: usize, seed: u32| host::into_vec(pattern([1, len], seed));
    DeltaLayer {
        norm: norm(HIDDEN, 6, false),
        inputs: match grouped {
            true => DeltaProjections::Grouped(Box::new([linear([28, HIDDEN], 1), linear([8, HIDDEN], 2)])),
            false => DeltaProjections::Separate(Box::new([
                linear([20, HIDDEN], 1),
                linear([8, HIDDEN], 2),
                linear([4, HIDDEN], 3),
                linear([4, HIDDEN], 4),
            ])),
        },
        taps: small(3 * 20, 7).into(),
        rate: [0.3, 0.7, 0.1, 1.2].into(),
        rate_bias: small(4, 8).into(),
        lower_bound: None,
        gate: GateActivation::Silu,
        output_norm: norm(2, 9, false),
        output: linear([HIDDEN, 8], 10),
        shape,
    }
}

/// Kimi delta attention, its wide projections in one matrix or through narrow ones, its decays bounded or not.
fn channel_delta(low_rank: bool) -> DeltaLayer {
    let shape = DeltaShape { key_heads: 2, value_heads: 2, key_dim: 3, value_dim: 3, decay: DecayPer::Channel };
    let small = |len: usize, seed: u32| host::into_vec(pattern([1, len], seed));
    let wide = |seed: u32| match low_rank {
        true => WideProjection::LowRank(Box::new([linear([2, HIDDEN], seed), linear([6, 2], seed + 1)])),
        false => WideProjection::Full(Box::new(linear([6, HIDDEN], seed))),
    };
    DeltaLayer {
        norm: norm(HIDDEN, 6, false),
        inputs: DeltaProjections::Apart(Box::new(ApartProjections {
            qkv: [1, 2, 3].map(|seed| linear([6, HIDDEN], seed)),
            gate: wide(11),
            beta: linear([2, HIDDEN], 4),
            decay: wide(13),
        })),
        taps: small(3 * 18, 7).into(),
        rate: [0.3, 0.7].into(),
        rate_bias: small(6, 8).into(),
        lower_bound: (!low_rank).then_some(-2.0),
        gate: GateActivation::Sigmoid,
        output_norm: norm(3, 9, false),
        output: linear([HIDDEN, 6], 10),
        shape,
    }
}

#[test]
fn gated_delta_net_has_the_gradient_of_a_difference_quotient() {
    for layer in [delta(false), delta(true), channel_delta(false), channel_delta(true)] {
        let (x, dy) = (pattern([TOKENS, HIDDEN], 20), pattern([TOKENS, HIDDEN], 21));
        let sequences = [0..2, 2..TOKENS];
        let wanted = Wanted { input: true, parameters: false };
        let found = host::into_vec(layer.backward(&x, &layer.project(&x), &sequences, dy.clone(), wanted).unwrap());
        let values = host::into_vec(x);
        for (i, found) in found.into_iter().enumerate() {
            let at = |h: f32| -> f64 {
                let mut moved = values.clone();
                moved[i] += h;
                let x = host::from_vec(moved, [TOKENS, HIDDEN], &dy.device());
                let y = layer.mix(&x, &layer.project(&x), &sequences);
                host::into_vec(y * dy.clone()).into_iter().map(f64::from).sum()
            };
            // Norms of two and three numbers bend: the quotient without its error of the second order.
            let quotient = |h: f32| (at(h) - at(-h)) / (2.0 * f64::from(h));
            let numeric = (4.0 * quotient(1e-3) - quotient(2e-3)) / 3.0;
            let close = (numeric - f64::from(found)).abs() < 6e-3 * (1.0 + numeric.abs());
            assert!(close, "{i}: {found} and {numeric}");
        }
    }
}

fn convolution() -> ConvolutionLayer {
    ConvolutionLayer {
        norm: norm(HIDDEN, 6, false),
        input: linear([3 * HIDDEN, HIDDEN], 1),
        taps: host::into_vec(pattern([1, 3 * HIDDEN], 7)).into(),
        output: linear([HIDDEN, HIDDEN], 10),
    }
}

#[test]
fn a_short_convolution_has_the_gradient_of_a_difference_quotient_and_steps_through_a_text_as_it_sweeps() {
    let layer = convolution();
    let (x, dy) = (pattern([TOKENS, HIDDEN], 20), pattern([TOKENS, HIDDEN], 21));
    let sequences = [0..2, 2..TOKENS];
    let wanted = Wanted { input: true, parameters: false };
    let found = host::into_vec(layer.backward(&x, &layer.project(&x), &sequences, dy.clone(), wanted).unwrap());
    let values = host::into_vec(x.clone());
    for (i, found) in found.into_iter().enumerate() {
        let at = |h: f32| -> f64 {
            let mut moved = values.clone();
            moved[i] += h;
            let x = host::from_vec(moved, [TOKENS, HIDDEN], &dy.device());
            let y = layer.mix(&x, &layer.project(&x), &sequences);
            host::into_vec(y * dy.clone()).into_iter().map(f64::from).sum()
        };
        let numeric = (at(2e-3) - at(-2e-3)) / 4e-3;
        let close = (numeric - f64::from(found)).abs() < 4e-3 * (1.0 + numeric.abs());
        assert!(close, "{i}: {found} and {numeric}");
    }
    let whole = layer.mix(&x, &layer.project(&x), std::slice::from_ref(&(0..TOKENS)));
    let mut states = [layer.start()];
    let pieces = [0..2, 2..3, 3..TOKENS].map(|rows| {
        let piece = x.clone().narrow(0, rows.start, rows.len());
        layer.step(&piece, std::slice::from_ref(&(0..rows.len())), &mut states)
    });
    assert_close(&Tensor::cat(pieces.to_vec(), 0), &whole, 1e-5);
}

#[test]
fn gated_delta_net_steps_through_a_text_as_it_sweeps() {
    for layer in [delta(true), channel_delta(true)] {
        steps_through_a_text_as_it_sweeps(&layer);
    }
}

fn steps_through_a_text_as_it_sweeps(layer: &DeltaLayer) {
    let x = pattern([TOKENS, HIDDEN], 20);
    let whole = layer.mix(&x, &layer.project(&x), std::slice::from_ref(&(0..TOKENS)));
    let mut state = layer.start();
    let pieces = [0..2, 2..3, 3..TOKENS].map(|rows| {
        let piece = x.clone().narrow(0, rows.start, rows.len());
        layer.step(&piece, std::slice::from_ref(&(0..rows.len())), &mut [&mut state])
    });
    assert_close(&Tensor::cat(pieces.to_vec(), 0), &whole, 1e-5);
}

#[test]
fn clipping_bounds_queries_keys_and_values_and_stops_gradients() {
    let layer = grouped(false, Some(0.9));
    let tape = layer.project(&pattern([TOKENS, HIDDEN], 20), &table(4, false), &Handover::default()).unwrap();
    let largest = |x: &Tensor<2>| host::into_vec(x.clone()).into_iter().fold(0.0f32, |m, v| m.max(v.abs()));
    assert_eq!(largest(&tape.v), 0.9); // some values do reach the bound
    assert!(largest(&tape.q) <= 0.9 * 2f32.sqrt() + 1e-6);
}

#[test]
fn latent_attention_has_the_gradient_of_a_difference_quotient() {
    check_gradient(&latent(false), &table(2, true));
    check_gradient(&latent(true), &table(2, false));
}

#[test]
fn absorbed_latent_attention_equals_the_expanded_one() {
    for low_rank in [false, true] {
        let (layer, table) = (latent(low_rank), table(2, true));
        let x = pattern([TOKENS, HIDDEN], 20);
        let tape = layer.project(&x, &table, &Handover::default()).unwrap();
        let expanded = layer.mix(&x, &tape, std::slice::from_ref(&(0..TOKENS)));
        let entry = layer.cache_entry(&x, &table);
        let keys = entry.k.unwrap();
        assert_eq!((keys.dims(), entry.v.is_none()), ([TOKENS, 5], true));
        let heads = attention_cached(&entry.q, &keys, &keys, &layer.cached_shape(), None);
        assert_close(&layer.residual(&x, &layer.cached_heads(heads, None)), &expanded, 1e-5);
    }
}

/// Checks the gradient of a layer `run` at `x` against difference quotients of `sum(dy * run(x))`.
pub(super) fn check_quotients(x: &Tensor<2>, dy: &Tensor<2>, found: Tensor<2>, run: impl Fn(&Tensor<2>) -> Tensor<2>) {
    let values = host::into_vec(x.clone());
    for (i, found) in host::into_vec(found).into_iter().enumerate() {
        let at = |h: f32| -> f64 {
            let mut moved = values.clone();
            moved[i] += h;
            let y = run(&host::from_vec(moved, x.dims(), &dy.device()));
            host::into_vec(y * dy.clone()).into_iter().map(f64::from).sum()
        };
        // The quotient without its error of the second order.
        let quotient = |h: f32| (at(h) - at(-h)) / (2.0 * f64::from(h));
        let numeric = (4.0 * quotient(1e-3) - quotient(2e-3)) / 3.0;
        let close = (numeric - f64::from(found)).abs() < 6e-3 * (1.0 + numeric.abs());
        assert!(close, "{i}: {found} and {numeric}");
    }
}

#[test]
fn lightning_attention_has_the_gradient_of_a_difference_quotient_and_steps_through_a_text_as_it_sweeps() {
    for carry in [None, Some(1.3)] {
        let layer = LightningLayer {
            norm: norm(HIDDEN, 6, false),
            qkv: linear([18, HIDDEN], 1),
            gate: linear([6, HIDDEN], 2),
            output_norm: norm(6, 3, false),
            output: linear([HIDDEN, 6], 4),
            rates: [-0.7, -0.2].into(),
            head_dim: 3,
            residual: 0.6,
            carry,
        };
        let (x, dy) = (pattern([TOKENS, HIDDEN], 20), pattern([TOKENS, HIDDEN], 21));
        let sequences = [0..2, 2..TOKENS];
        let wanted = Wanted { input: true, parameters: false };
        let found = layer.backward(&x, &layer.project(&x), &sequences, dy.clone(), wanted).unwrap();
        check_quotients(&x, &dy, found, |x| layer.mix(x, &layer.project(x), &sequences));
        let whole = layer.mix(&x, &layer.project(&x), std::slice::from_ref(&(0..TOKENS)));
        let mut states = [layer.start()];
        let pieces = [0..2, 2..3, 3..TOKENS].map(|rows| {
            let piece = x.clone().narrow(0, rows.start, rows.len());
            layer.step(&piece, std::slice::from_ref(&(0..rows.len())), &mut states)
        });
        assert_close(&Tensor::cat(pieces.to_vec(), 0), &whole, 1e-5);
    }
}

#[test]
fn a_mixture_of_heads_has_the_gradient_of_a_difference_quotient() {
    let rule = moe_checkpoint::Routing::new(2, moe_checkpoint::RoutingKind::TopKSoftmax);
    let shape = AttentionShape { heads: 4, ..shape(2, 2, 2) };
    let layer = HeadMixtureLayer {
        norm: norm(HIDDEN, 6, false),
        router: weight([3, HIDDEN], 5),
        rule: crate::router::Router::new(&rule).unwrap(),
        queries: (0..3).map(|expert| weight([4, HIDDEN], 30 + expert)).collect(),
        outputs: (0..3).map(|expert| weight([HIDDEN, 4], 40 + expert)).collect(),
        key_value: linear([8, HIDDEN], 1),
        bias: vector(HIDDEN, 2),
        shape,
    };
    let (x, dy, table) = (pattern([TOKENS, HIDDEN], 20), pattern([TOKENS, HIDDEN], 21), table(2, false));
    let sequences = [0..2, 2..TOKENS];
    let wanted = Wanted { input: true, parameters: false };
    let found = layer.backward(&x, &layer.project(&x, &table), &sequences, &table, dy.clone(), wanted).unwrap();
    check_quotients(&x, &dy, found, |x| layer.mix(x, &layer.project(x, &table), &sequences));
}

const STREAMS: usize = 3;

fn hyper_connection(seed: u32) -> HyperConnection {
    let width = STREAMS * HIDDEN;
    HyperConnection {
        norm: Norm::new(Tensor::ones([width], &pattern([1, 1], 1).device()), None, 1e-5),
        map: weight([15, width], seed),
        base: host::into_vec(pattern([1, 15], seed + 1)).into(),
        scale: [0.9, 1.3, 1.1],
        count: STREAMS,
        iterations: 4,
        eps: 1e-3,
    }
}

#[test]
fn hyper_connections_have_the_gradient_of_a_difference_quotient() {
    let streams = hyper_connection(50);
    let [x, dy] = [20, 21].map(|seed| pattern([TOKENS, STREAMS * HIDDEN], seed));
    // A half that is a linear map of what it reads.
    let half = weight([HIDDEN, HIDDEN], 22);
    let run = |x: &Tensor<2>| {
        let (mixing, read) = streams.open(x);
        streams.close(x, &mixing, &half.forward(&read, None))
    };
    let (mixing, read) = streams.open(&x);
    let d_read = half.backward(&streams.half_gradient(&mixing, &dy));
    let gradients = streams.input_gradients(&x, &mixing, &half.forward(&read, None), &dy, &d_read);
    check_quotients(&x, &dy, sum_of(gradients.map(Some)).unwrap(), run);
    // Mixtures are nearly doubly stochastic, so that equal streams stay equal but for the half.
    let same = pattern([TOKENS, HIDDEN], 23).repeat(&[1, STREAMS]);
    let (mixing, _) = streams.open(&same);
    let mixed = streams.close(&same, &mixing, &Tensor::zeros([TOKENS, HIDDEN], &same.device()));
    assert_close(&mixed, &same, 2e-2);
}

#[test]
fn what_the_head_reads_of_streams_has_the_gradient_of_a_difference_quotient() {
    let width = STREAMS * HIDDEN;
    let sum = StreamSum {
        norm: Norm::new(Tensor::ones([width], &pattern([1, 1], 1).device()), None, 1e-5),
        map: weight([STREAMS, width], 30),
        base: [0.3, -0.2, 0.1].into(),
        scale: 1.2,
        eps: 1e-3,
    };
    let input = HeadInput { norm: norm(HIDDEN, 6, false), streams: Some(Box::new(sum)) };
    let (x, dy) = (pattern([TOKENS, width], 20), pattern([TOKENS, HIDDEN], 21));
    check_quotients(&x, &dy, input.backward(&x, &dy, false), |x| input.forward(x));
}

/// Attention with a window of two tokens and one compressed key for `rate` tokens, if any; with an indexer, groups
/// overlap and a query sees `chosen` keys.
fn compressed(rate: usize, chosen: Option<usize>) -> CompressedLayer {
    let series = if chosen.is_some() { 2 } else { 1 };
    let compressor = |width: usize, seed: u32| Compressor {
        key: linear([series * width, HIDDEN], seed),
        gate: linear([series * width, HIDDEN], seed + 1),
        bias: host::into_vec(pattern([rate, series * width], seed + 2)).into(),
        norm: norm(width, seed + 3, false),
        shape: PoolShape { rate, width, overlapping: chosen.is_some() },
    };
    let rope = RopeConfig { theta: 100.0, interleaved: true, scaling: RopeScaling::Default };
    let shape = CompressedShape { heads: 2, head_dim: 4, window: 2, rate, sinks: [0.3, -0.4].into() };
    CompressedLayer {
        streams: Arc::new(hyper_connection(60)),
        norm: norm(HIDDEN, 6, false),
        query: QueryProjection::LowRank(Box::new(LowRankQuery {
            down: linear([5, HIDDEN], 1),
            norm: norm(5, 2, false),
            up: weight([8, 5], 3),
        })),
        query_norm: Norm::new(Tensor::ones([4], &pattern([1, 1], 1).device()), None, 1e-5),
        key: linear([4, HIDDEN], 4),
        key_norm: norm(4, 5, false),
        groups: vec![weight([3, 4], 7), weight([3, 4], 8)],
        join: linear([HIDDEN, 6], 9),
        rope: RotaryEmbedding::new(&rope, 2).unwrap(),
        compressor: (rate > 0).then(|| compressor(4, 70)),
        indexer: chosen.map(|keys| {
            Box::new(EntryIndexer {
                compressor: compressor(4, 80),
                query: weight([12, 5], 90),
                heads: weight([3, HIDDEN], 91),
                shape: CompressedShape { heads: 3, sinks: [].into(), ..shape.clone() },
                keys,
            })
        }),
        shape,
    }
}

#[test]
fn attention_to_compressed_keys_has_the_gradient_of_a_difference_quotient_and_steps_as_it_sweeps() {
    for layer in [compressed(0, None), compressed(3, None), compressed(2, Some(4)), compressed(2, Some(2))] {
        let tokens = 9;
        let [x, dy] = [20, 21].map(|seed| pattern([tokens, STREAMS * HIDDEN], seed));
        let sequences = [0..2, 2..tokens];
        let wanted = Wanted { input: true, parameters: false };
        let tape = layer.project(&x, &sequences);
        let found = layer.backward(&x, &tape, &sequences, dy.clone(), wanted).unwrap();
        // The choice of keys stays: no gradient goes through it.
        check_quotients(&x, &dy, found, |x| {
            layer.mix(x, &tape.with_choice_of(layer.project(x, &sequences)), &sequences)
        });
        let whole = 0..tokens;
        let whole = std::slice::from_ref(&whole);
        let swept = layer.mix(&x, &layer.project(&x, whole), whole);
        let mut states = [layer.start()];
        let pieces = [0..1, 1..2, 2..6, 6..7, 7..tokens].map(|rows| {
            let piece = x.clone().narrow(0, rows.start, rows.len());
            layer.step(&piece, std::slice::from_ref(&(0..rows.len())), &mut states)
        });
        assert_close(&Tensor::cat(pieces.to_vec(), 0), &swept, 1e-5);
    }
}

#[test]
fn compressed_keys_show_no_token_what_comes_after_it() {
    for layer in [compressed(3, None), compressed(2, Some(2))] {
        let x = pattern([9, STREAMS * HIDDEN], 20);
        let (whole, half) = (0..9, 0..5);
        let (whole, half) = (std::slice::from_ref(&whole), std::slice::from_ref(&half));
        let all = layer.mix(&x, &layer.project(&x, whole), whole);
        let first = x.narrow(0, 0, 5);
        assert_close(&layer.mix(&first, &layer.project(&first, half), half), &all.narrow(0, 0, 5), 1e-6);
    }
}

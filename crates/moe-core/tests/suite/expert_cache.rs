//! Experts read through a cache: the same tokens, fewer bytes.
#![cfg(feature = "flex")]

use std::path::PathBuf;
use std::sync::Arc;

use moe_checkpoint::{Checkpoint, QuantizeOptions, Quantized, WeightFormat};
use moe_core::{
    Model,
    device::device,
    expert_cache::{
        CacheState, EvictionPolicy, ExpertCacheOptions, ExpertCacheStatistics, ExpertKey, ExpertLevel, LowPrecision,
        Precision, expert_levels,
    },
    generate::{GenerateOptions, generate},
};

fn tiny_moe() -> Arc<Checkpoint> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    Arc::new(Checkpoint::open(path).unwrap())
}

fn int4(base: &Arc<Checkpoint>) -> Arc<Checkpoint> {
    let format = WeightFormat::Int { bits: 4, group_size: Some(32), symmetric: true };
    let quantized = Quantized::on(base, &QuantizeOptions::new(format)).unwrap();
    quantized.model().packed_in_memory().unwrap()
}

fn tokens(model: &Model) -> Vec<Vec<u32>> {
    let prompts = vec![(0..9).map(|i| (i * 137 + 31) % 2048).collect()];
    let options = GenerateOptions { max_new_tokens: 24, ..GenerateOptions::default() };
    generate(model, &prompts, &options, |_| false).unwrap()
}

fn run(base: &Arc<Checkpoint>, options: ExpertCacheOptions) -> (Vec<Vec<u32>>, ExpertCacheStatistics) {
    let model = Model::new(base.clone(), &device("flex").unwrap(), None).unwrap();
    let model = model.with_expert_cache(options).unwrap();
    let tokens = tokens(&model);
    (tokens, model.expert_cache_statistics().unwrap())
}

fn options(bytes: u64, policy: EvictionPolicy) -> ExpertCacheOptions {
    ExpertCacheOptions { bytes, policy, low: None, prefetch: false, skip: None }
}

#[test]
fn a_cache_of_any_size_and_policy_gives_the_tokens_of_the_model() {
    let base = tiny_moe();
    let expected = tokens(&Model::new(base.clone(), &device("flex").unwrap(), None).unwrap());
    let all: u64 = (0..4).map(|layer| base.expert_bytes_on_disk(layer).unwrap()).sum();
    let mut read = Vec::new();
    for bytes in [0, all / 4, all / 2, all] {
        for policy in [EvictionPolicy::Lru, EvictionPolicy::priority(), EvictionPolicy::Distance] {
            for prefetch in [false, true] {
                let (found, statistics) = run(&base, ExpertCacheOptions { prefetch, ..options(bytes, policy) });
                assert_eq!(found, expected, "{bytes} {policy:?} {prefetch}");
                assert!(statistics.peak_bytes <= bytes, "{statistics:?}");
                assert_eq!(statistics.misses[1], 0);
                if !prefetch {
                    assert_eq!(statistics.bytes_read, statistics.misses[0] * all / 64, "{statistics:?}");
                }
                if bytes == all {
                    assert!(statistics.bytes_read <= all, "every expert is read once: {statistics:?}");
                }
                if policy == EvictionPolicy::Lru && !prefetch {
                    read.push(statistics.bytes_read);
                }
            }
        }
    }
    assert!(read.windows(2).all(|pair| pair[1] <= pair[0]) && read[3] < read[0], "{read:?}");
}

#[test]
fn experts_of_small_gate_scores_are_read_in_four_bits() {
    let base = tiny_moe();
    let all: u64 = (0..4).map(|layer| base.expert_bytes_on_disk(layer).unwrap()).sum();
    let low = |threshold| Some(LowPrecision { model: int4(&base), threshold });
    let (plain, full) = run(&base, options(all / 4, EvictionPolicy::Lru));
    let (found, one) = run(&base, ExpertCacheOptions { low: low(1.0), ..options(all / 4, EvictionPolicy::Lru) });
    // Which thread is first decides who is still there, and not what comes out.
    assert_eq!(found, plain);
    assert!(one.misses[0] > 0 && one.misses[1] == 0, "at 1 all are high: {one:?}");
    let (_, half) = run(&base, ExpertCacheOptions { low: low(0.6), ..options(all / 4, EvictionPolicy::Lru) });
    assert!(half.misses[1] > 0 && half.bytes_read < full.bytes_read, "{half:?} {full:?}");
    assert!(half.hit_rate() >= full.hit_rate(), "{half:?} {full:?}");
    let (_, first) = run(&base, ExpertCacheOptions { low: low(0.0), ..options(all / 4, EvictionPolicy::Lru) });
    assert!(first.bytes_read < half.bytes_read, "{first:?} {half:?}");
}

#[test]
fn what_is_loaded_ahead_is_what_is_asked_for() {
    let base = tiny_moe();
    let all: u64 = (0..4).map(|layer| base.expert_bytes_on_disk(layer).unwrap()).sum();
    let (_, ahead) = run(&base, ExpertCacheOptions { prefetch: true, ..options(all / 2, EvictionPolicy::Lru) });
    assert!(ahead.prefetched > 0 && ahead.prefetched_used > 0, "{ahead:?}");
    assert!(ahead.prefetched_used <= ahead.prefetched);
}

#[test]
fn what_does_not_go_with_a_cache_is_refused() {
    let base = tiny_moe();
    let model = || Model::new(base.clone(), &device("flex").unwrap(), None).unwrap();
    let threshold = Some(LowPrecision { model: base.clone(), threshold: 1.5 });
    let wrong = ExpertCacheOptions { low: threshold, ..options(0, EvictionPolicy::Lru) };
    let error = model().with_expert_cache(wrong).unwrap_err().to_string();
    assert!(error.contains("threshold") && error.contains("1.5"), "{error}");
    let low = Some(LowPrecision { model: base.clone(), threshold: 0.6 });
    let wrong = ExpertCacheOptions { low, skip: Some(0.5), ..options(0, EvictionPolicy::Lru) };
    let error = model().with_expert_cache(wrong).unwrap_err().to_string();
    assert!(error.contains("skip") && error.contains("0.6"), "{error}");
}

#[test]
fn an_expert_from_its_stored_bytes_is_the_expert() {
    let base = tiny_moe();
    let packed = int4(&base);
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../moe-checkpoint/tests/fixtures/quantized");
    let mut models = vec![base, packed.clone()];
    for name in ["gptq-v1-sym-qwen3_moe", "bnb-nf4-nested-qwen3_moe", "mxfp4-gpt_oss", "mlx-affine4-qwen3_moe"] {
        models.push(Arc::new(Checkpoint::open(fixtures.join(name)).unwrap()));
    }
    for model in &models {
        for layer in &model.shape().layers {
            for expert in 0..layer.num_experts() {
                let stored = model.stored_expert(layer.layer, expert).unwrap();
                let found = model.decode_expert(layer.layer, expert, &stored).unwrap();
                assert_eq!(found, model.expert(layer.layer, expert).unwrap(), "{}", model.dir().display());
            }
        }
    }
    // Codes and scales, not what they decode to.
    let stored = packed.stored_expert(1, 3).unwrap().bytes();
    assert!(stored < 3 * 96 * 128, "{stored}");
}

/// Which experts of a token are high, where none is skipped.
fn high_precision(scores: &[f32], threshold: f32) -> Vec<bool> {
    let levels = expert_levels(scores, threshold, 1.0);
    levels.into_iter().map(|level| level == ExpertLevel::Runs(Precision::High)).collect()
}

#[test]
fn the_first_experts_of_a_token_are_read_in_high_precision() {
    assert_eq!(high_precision(&[0.1, 0.7, 0.2], 0.6), [false, true, false]);
    // Two equal scores: the second has one half before it.
    assert_eq!(high_precision(&[0.5, 0.5], 0.6), [true, true]);
    assert_eq!(high_precision(&[0.2, 0.5, 0.3], 1.0), [true; 3]);
    // The order of the scores and their sum do not matter.
    assert_eq!(high_precision(&[1.4, 0.2, 0.4], 0.6), [true, false, false]);
    assert_eq!(high_precision(&[0.9, 0.1], 0.0), [true, false]);
}

#[test]
fn the_last_experts_of_a_token_are_skipped() {
    let (high, low) = (ExpertLevel::Runs(Precision::High), ExpertLevel::Runs(Precision::Low));
    // Before them lie 0, 0.65, 0.85 and 0.95 of the scores.
    let scores = [0.1, 0.65, 0.05, 0.2];
    assert_eq!(expert_levels(&scores, 0.6, 0.9), [low, high, ExpertLevel::Skipped, low]);
    assert_eq!(
        expert_levels(&scores, 0.6, 0.6),
        [ExpertLevel::Skipped, high, ExpertLevel::Skipped, ExpertLevel::Skipped]
    );
    assert_eq!(expert_levels(&scores, 1.0, 1.0), [high; 4]);
    assert_eq!(expert_levels(&[0.0, 0.0], 0.0, 0.0), [high; 2], "scores of nothing decide nothing");
}

#[test]
fn skipped_experts_are_neither_read_nor_computed() {
    let base = tiny_moe();
    let all: u64 = (0..4).map(|layer| base.expert_bytes_on_disk(layer).unwrap()).sum();
    let (plain, full) = run(&base, options(0, EvictionPolicy::Lru));
    let skipping = |skip| ExpertCacheOptions { skip: Some(skip), ..options(0, EvictionPolicy::Lru) };
    let (same, none) = run(&base, skipping(1.0));
    assert_eq!((same, none.skipped, none.bytes_read), (plain, 0, full.bytes_read));
    let (_, some) = run(&base, skipping(0.6));
    assert!(some.skipped > 0 && some.bytes_read < full.bytes_read, "{some:?} {full:?}");
    // Nothing but the first expert of a token: what a model of one expert per token gives that keeps its weight.
    let (_, one) = run(&base, skipping(0.0));
    assert!(one.bytes_read < some.bytes_read, "{one:?} {some:?}");
    assert_eq!(one.bytes_read, one.misses[0] * all / 64);
    // Three levels read less than two.
    let low = || Some(LowPrecision { model: int4(&base), threshold: 0.5 });
    let (_, two) = run(&base, ExpertCacheOptions { low: low(), ..options(0, EvictionPolicy::Lru) });
    let (_, three) = run(&base, ExpertCacheOptions { low: low(), ..skipping(0.7) });
    assert!(three.skipped > 0 && three.bytes_read < two.bytes_read, "{three:?} {two:?}");
}

fn key(layer: usize, expert: usize) -> ExpertKey {
    ExpertKey { layer, expert, precision: Precision::High }
}

#[test]
fn no_more_is_held_than_there_is_room_for_and_nothing_that_is_pinned_goes() {
    let mut cache = CacheState::new(30, EvictionPolicy::Lru, 2);
    cache.begin_layer(0);
    assert!(cache.put(key(1, 0), (), 10, true));
    for expert in 0..6 {
        assert!(cache.put(key(0, expert), (), 10, false));
        assert!(cache.used() <= 30 && cache.contains(1, 0, Precision::High), "{expert}");
    }
    assert!(!cache.put(key(0, 9), (), 40, false), "larger than everything");
    assert!(cache.contains(1, 0, Precision::High));
    cache.begin_layer(1);
    assert!(cache.get(1, 0, Precision::High).is_some());
    let statistics = cache.statistics();
    assert_eq!((statistics.prefetched, statistics.prefetched_used, statistics.hits), (1, 1, 1));
    assert_eq!(statistics.bytes_read, 10 + 60 + 40);
}

#[test]
fn a_copy_in_high_precision_serves_low_needs_and_not_the_other_way_round() {
    let mut cache = CacheState::new(100, EvictionPolicy::Lru, 1);
    cache.begin_layer(0);
    cache.put(ExpertKey { precision: Precision::Low, ..key(0, 0) }, "low", 10, false);
    assert_eq!(cache.get(0, 0, Precision::High), None);
    assert_eq!(cache.get(0, 0, Precision::Low), Some("low"));
    cache.put(key(0, 0), "high", 40, false);
    assert_eq!(cache.get(0, 0, Precision::Low), Some("high"));
    assert_eq!(cache.statistics().misses, [1, 0]);
}

/// Misses of a trace of steps over two layers in which expert 0 of each is used in every second step.
fn misses(policy: EvictionPolicy) -> u64 {
    let mut cache = CacheState::new(60, policy, 2);
    for step in 0..200usize {
        for layer in 0..2 {
            cache.begin_layer(layer);
            let experts = if step % 2 == 0 { [0, 1 + step % 7] } else { [8 + step % 5, 1 + step % 7] };
            for expert in experts {
                if cache.get(layer, expert, Precision::High).is_none() {
                    cache.put(key(layer, expert), (), 10, false);
                }
            }
        }
    }
    let [high, low] = cache.statistics().misses;
    high + low
}

#[test]
fn frequent_experts_stay_where_recency_alone_would_let_them_go() {
    let (lru, priority) =
        (misses(EvictionPolicy::Lru), misses(EvictionPolicy::Priority { weights: [0.1, 0.7, 0.2, 0.0] }));
    assert!(priority < lru, "{priority} against {lru}");
}

#[test]
fn of_equal_uses_the_farther_layer_goes_first() {
    let mut cache = CacheState::new(30, EvictionPolicy::Distance, 4);
    cache.begin_layer(0);
    for layer in 1..4 {
        assert!(cache.get(layer, 0, Precision::High).is_none());
        cache.put(key(layer, 0), (), 10, false);
    }
    cache.put(key(0, 0), (), 10, false);
    assert!(!cache.contains(3, 0, Precision::High));
    assert!(cache.contains(1, 0, Precision::High) && cache.contains(2, 0, Precision::High));
}

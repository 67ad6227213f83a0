//! What every allocator promises, over units and over whole experts.

use crate::synthetic;

use moe_checkpoint::{Granularity, MoeShape, Pool, ScoreTable};
use moe_prune::{
    AllocationRequest, Allocator, AllocatorConfig, Budget, CurveSource, DepthPrior, Error, Evolution, ExpertLimits,
    Global, Hybrid, LayerKept, Limits, Normalization, Normalized, PerLayer, Prior, ProtectionMask, RateDistortion, Rco,
    Uniform, WidthLimits, Within,
};
use proptest::prelude::*;
use synthetic::{Additive, Noise, Planted, emptied, experts_request, shape, table};

fn normalized(by: Normalization) -> AllocatorConfig {
    AllocatorConfig::Normalized(Normalized { by })
}

/// All that decide from scores alone.
fn from_scores() -> Vec<AllocatorConfig> {
    let mut all = vec![
        AllocatorConfig::Uniform(Uniform::default()),
        AllocatorConfig::Layer(PerLayer::default()),
        AllocatorConfig::Global(Global::default()),
        AllocatorConfig::Hybrid(Hybrid::default()),
        AllocatorConfig::RateDistortion(RateDistortion::default()),
        AllocatorConfig::RateDistortion(RateDistortion { within: Within::Even, ..RateDistortion::default() }),
        AllocatorConfig::RateDistortion(RateDistortion { within: Within::Expert, ..RateDistortion::default() }),
    ];
    all.extend(
        [
            Normalization::Lamp,
            Normalization::LampOfSquares,
            Normalization::Sum,
            Normalization::Mean,
            Normalization::Max,
            Normalization::Coverage,
        ]
        .map(normalized),
    );
    for within in [Within::Compete, Within::Even, Within::Expert] {
        for prior in [
            Prior::Linear { first: 0.7, last: 1.3 },
            Prior::Trapezoid { edge: 0.5, top: 1.0, rise: 0.4, fall: 0.8 },
            Prior::Erk,
        ] {
            all.push(AllocatorConfig::DepthPrior(DepthPrior { prior, within }));
        }
    }
    all
}

/// Those that ask a model, made cheap.
fn from_model() -> Vec<AllocatorConfig> {
    let measured = CurveSource::Measured { points: 4, statistic: Default::default() };
    vec![
        AllocatorConfig::RateDistortion(RateDistortion { curves: measured, ..RateDistortion::default() }),
        AllocatorConfig::Evolution(Evolution { population: 4, generations: 2, ..Evolution::default() }),
    ]
}

fn request<'a>(
    scores: &'a ScoreTable,
    shape: &'a MoeShape,
    budget: Budget,
    protect: &'a ProtectionMask,
    round_to: usize,
) -> AllocationRequest<'a> {
    let limits = match scores.granularity {
        Granularity::Unit => Limits::Units(WidthLimits { round_to, ..WidthLimits::default() }),
        Granularity::Expert => Limits::Experts(ExpertLimits::default()),
    };
    AllocationRequest { scores, shape, budget, protect, limits, gone: None }
}

/// Curves of a model whose layers differ, for `experts` experts of this width.
fn probe(layers: usize, experts: usize, width: usize) -> Additive {
    let curve = |l: usize| (0..=experts).map(|r| (1 + l) as f64 * (r * r) as f64).collect();
    Additive::new(width, (0..layers).map(curve).collect())
}

/// Units that have to stay: protected ones, as whole blocks of `step`, and one expert per layer where experts go.
fn floors(shape: &MoeShape, protect: &ProtectionMask, granularity: Granularity, step: usize) -> usize {
    let protected =
        |layer: usize, expert: usize, width: usize| protect.count(layer, expert, width).next_multiple_of(step);
    let of_layer = |layer: &moe_checkpoint::MoeLayerShape| -> usize {
        let widths = layer.widths.iter().enumerate();
        let sum: usize = widths.map(|(expert, width)| protected(layer.layer, expert, *width)).sum();
        if granularity == Granularity::Expert { sum.max(step) } else { sum }
    };
    shape.layers.iter().map(of_layer).sum()
}

fn units(kept: &[LayerKept]) -> usize {
    kept.iter().flat_map(|layer| &layer.experts).map(Vec::len).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// The budget is met to the unit (or multiple, or expert), protected ones stay, the report is right, and twice is
    /// the same.
    #[test]
    fn promises(
        layers in 1usize..5, experts in 2usize..7, blocks in 1usize..5, round_to in 1usize..4,
        seed in any::<u64>(), ratio in 0.01f64..0.7, protected in 0usize..3, by_parameters in any::<bool>(),
    ) {
        let width = blocks * round_to;
        let shape = shape(layers, experts, width);
        let mut noise = Noise(seed);
        let (of_units, of_experts) = (noise.units(&shape), noise.experts(&shape));
        let mut protect = ProtectionMask::none();
        for index in 0..protected {
            protect.protect_unit(shape.layers[index % layers].layer, (seed as usize + index) % experts, (index % width) as u32);
        }
        let all = shape.units();
        let asked = (all as f64 * ratio).floor() as usize;
        let budget = match by_parameters {
            false => Budget::Ratio(ratio),
            true => Budget::KeepParameters(((all - asked) * shape.parameters_per_unit()).min(shape.parameters() as usize - 1) as u64),
        };
        for (scores, step) in [(&of_units, round_to), (&of_experts, width)] {
            for config in from_scores().into_iter().chain(from_model()) {
                let request = request(scores, &shape, budget, &protect, round_to);
                let mut model = probe(layers, experts, width);
                let found = match config.allocate_with(&request, &mut model) {
                    Ok(found) => found,
                    // Fixed shares may be below a floor; free ones only where all floors together are.
                    Err(Error::Infeasible { .. }) => {
                        let fixed = matches!(config, AllocatorConfig::Uniform(_) | AllocatorConfig::Layer(_));
                        let room = if by_parameters { (all - asked) / step * step } else { (all - asked).next_multiple_of(step) };
                        prop_assert!(fixed || floors(&shape, &protect, scores.granularity, step) > room, "{:?}", config);
                        continue;
                    }
                    Err(other) => return Err(TestCaseError::fail(format!("{config:?}: {other}"))),
                };
                let kept = found.kept();
                let total = units(&kept);
                let keep = if by_parameters { (all - asked).min(all - 1) } else { all - asked };
                let fixed = matches!(config, AllocatorConfig::Uniform(_) | AllocatorConfig::Layer(_));
                if by_parameters {
                    prop_assert!(total <= keep, "{:?}: {} of {}", config, total, keep);
                    prop_assert!(fixed || keep - total < step, "{:?}: {} of {}", config, total, keep);
                } else {
                    prop_assert!(total >= keep, "{:?}: {} of {}", config, total, keep);
                    prop_assert!(fixed || total - keep < step, "{:?}: {} of {}", config, total, keep);
                }
                prop_assert_eq!(found.dropped, all - total);
                prop_assert_eq!(found.cost, (total * shape.parameters_per_unit()) as u64);
                prop_assert!(found.predicted.is_some_and(f64::is_finite));
                for (layer, kept) in shape.layers.iter().zip(&kept) {
                    prop_assert_eq!(layer.layer, kept.layer);
                    for (expert, kept) in kept.experts.iter().enumerate() {
                        prop_assert!(kept.len().is_multiple_of(step.min(width)));
                        prop_assert!(kept.windows(2).all(|pair| pair[0] < pair[1]));
                        for unit in 0..width as u32 {
                            prop_assert!(!protect.is_protected(layer.layer, expert, unit) || kept.contains(&unit), "{:?}", config);
                        }
                    }
                }
                let again = config.allocate_with(&request, &mut probe(layers, experts, width)).unwrap();
                prop_assert_eq!(&again, &found);
                let json = serde_json::to_string(&config).unwrap();
                prop_assert_eq!(serde_json::from_str::<AllocatorConfig>(&json).unwrap(), config);
            }
        }
    }
}

#[test]
fn a_budget_that_asks_for_nothing_keeps_everything() {
    let shape = shape(3, 4, 5);
    let mut noise = Noise(1);
    let none = ProtectionMask::none();
    for scores in [noise.units(&shape), noise.experts(&shape)] {
        for config in from_scores().into_iter().chain(from_model()) {
            let request = request(&scores, &shape, Budget::Ratio(1e-6), &none, 1);
            let found = config.allocate_with(&request, &mut probe(3, 4, 5)).unwrap();
            assert_eq!((found.dropped, units(&found.kept())), (0, shape.units()), "{config:?}");
            assert!(found.predicted.unwrap().abs() < 1e-12, "{config:?}");
        }
    }
}

#[test]
fn one_layer_scored_ten_times_higher_moves_raw_ranks_only() {
    let shape = shape(3, 4, 6);
    let mut noise = Noise(2);
    let none = ProtectionMask::none();
    for scores in [noise.units(&shape), noise.experts(&shape)] {
        let mut scaled = scores.clone();
        // A power of two: sums scale exactly.
        scaled.layers[1].scores.iter_mut().flatten().for_each(|score| *score *= 16.0);
        let kept = |config: &AllocatorConfig, scores: &ScoreTable| {
            config.allocate(&request(scores, &shape, Budget::Ratio(0.5), &none, 1)).unwrap().kept()
        };
        let global = AllocatorConfig::Global(Global::default());
        assert_ne!(kept(&global, &scores), kept(&global, &scaled));
        for config in from_scores() {
            if let AllocatorConfig::Normalized(_) = config {
                assert_eq!(kept(&config, &scores), kept(&config, &scaled), "{config:?}");
            }
        }
    }
}

#[test]
fn identical_layers_share_alike() {
    let layer = vec![vec![3.0, 1.0, 8.0, 5.0], vec![2.0, 9.0, 4.0, 7.0]];
    let scores = table(Granularity::Unit, &[layer.clone(), layer.clone(), layer]);
    let (shape, none) = (shape(3, 2, 4), ProtectionMask::none());
    let request = request(&scores, &shape, Budget::Ratio(0.5), &none, 1);
    let expected = AllocatorConfig::Layer(PerLayer::default()).allocate(&request).unwrap().kept();
    let alike = [Normalization::Lamp, Normalization::Sum, Normalization::Coverage].map(normalized).into_iter().chain([
        AllocatorConfig::Global(Global::default()),
        AllocatorConfig::Hybrid(Hybrid::default()),
        AllocatorConfig::DepthPrior(DepthPrior { prior: Prior::Erk, within: Within::Compete }),
    ]);
    for config in alike {
        assert_eq!(config.allocate(&request).unwrap().kept(), expected, "{config:?}");
    }
}

#[test]
fn lamp_empties_no_layer_and_coverage_takes_from_what_is_even() {
    // The first layer scores far below the second.
    let scores = table(Granularity::Unit, &[vec![vec![1e-4, 2e-4, 1e-4, 3e-4]], vec![vec![5.0, 6.0, 7.0, 8.0]]]);
    let (shape, none) = (shape(2, 1, 4), ProtectionMask::none());
    let widths = |config: AllocatorConfig, ratio| {
        let request = request(&scores, &shape, Budget::Ratio(ratio), &none, 1);
        let kept = config.allocate(&request).unwrap().kept();
        kept.iter().map(|layer| layer.experts[0].len()).collect::<Vec<_>>()
    };
    assert_eq!(widths(AllocatorConfig::Global(Global::default()), 0.5), [0, 4]);
    assert!(widths(normalized(Normalization::Lamp), 0.74).iter().all(|width| *width > 0));
    // One unit holds 97% of the first layer: coverage leaves it that one.
    let scores = table(Granularity::Unit, &[vec![vec![0.01, 0.01, 0.01, 1.0]], vec![vec![0.3; 4]]]);
    let request = request(&scores, &shape, Budget::Ratio(0.5), &none, 1);
    let kept = normalized(Normalization::Coverage).allocate(&request).unwrap().kept();
    assert_eq!((kept[0].experts[0].as_slice(), kept[1].experts[0].len()), (&[3u32][..], 3));
}

#[test]
fn hybrid_lies_between_global_and_layer() {
    let shape = shape(4, 3, 8);
    let (scores, none) = (Noise(5).units(&shape), ProtectionMask::none());
    let mut scores = scores;
    scores.layers[0].scores.iter_mut().flatten().for_each(|score| *score *= 1e-3);
    let request = request(&scores, &shape, Budget::Ratio(0.5), &none, 1);
    let first = |guaranteed| {
        let found = Hybrid { guaranteed }.allocate(&request).unwrap();
        assert_eq!(found.dropped, 48);
        found.layers[0].units()
    };
    assert_eq!([first(0.0), first(0.5), first(1.0)], [0, 6, 12]);
    let global = Global::default().allocate(&request).unwrap().kept();
    assert_eq!(Hybrid { guaranteed: 0.0 }.allocate(&request).unwrap().kept(), global);
    assert!(Hybrid { guaranteed: 1.5 }.allocate(&request).unwrap_err().to_string().contains("[0, 1]"));
}

#[test]
fn depth_priors_give_layers_their_weight() {
    let shape = shape(3, 2, 10);
    let (scores, none) = (Noise(7).units(&shape), ProtectionMask::none());
    let kept = |prior: Prior, within, ratio| {
        let request = request(&scores, &shape, Budget::Ratio(ratio), &none, 1);
        let found = DepthPrior { prior, within }.allocate(&request).unwrap();
        found.layers.iter().map(|layer| layer.widths()).collect::<Vec<_>>()
    };
    let sums = |widths: Vec<Vec<usize>>| widths.iter().map(|w| w.iter().sum()).collect::<Vec<usize>>();
    assert_eq!(sums(kept(Prior::Weights(vec![1.0, 2.0, 3.0]), Within::Compete, 0.5)), [5, 10, 15]);
    // The last layer would keep 24 of its 20: the others share the rest, 1 to 2.
    assert_eq!(sums(kept(Prior::Weights(vec![1.0, 2.0, 4.0]), Within::Compete, 0.3)), [7, 15, 20]);
    assert_eq!(kept(Prior::Linear { first: 1.5, last: 0.5 }, Within::Even, 0.5), [[7, 8], [5, 5], [2, 3]]);
    let error = DepthPrior { prior: Prior::Weights(vec![1.0, 0.0, 0.0]), within: Within::Compete }
        .allocate(&request(&scores, &shape, Budget::Ratio(0.5), &none, 1))
        .unwrap_err();
    assert!(matches!(&error, Error::Infeasible { asked: 30, .. }), "{error}");
}

#[test]
fn infeasible_budgets_are_errors() {
    let shape = MoeShape { top_k: 2, ..shape(3, 4, 4) };
    let mut noise = Noise(3);
    let none = ProtectionMask::none();
    let mut protect = ProtectionMask::none();
    for layer in &shape.layers {
        for expert in 0..3 {
            protect.protect_expert(layer.layer, expert);
        }
    }
    let mut all = from_scores();
    all.extend(from_model());
    all.push(AllocatorConfig::Rco(Rco::default()));
    let of_experts = noise.experts(&shape);
    let of_units = noise.units(&shape);
    for config in all {
        // Two of four experts have to stay; three are protected.
        let too_few = request(&of_experts, &shape, Budget::Ratio(0.8), &none, 1);
        let limits = Limits::Experts(ExpertLimits { min_experts: 2, ..ExpertLimits::default() });
        let too_few = AllocationRequest { limits, ..too_few };
        let error = config.allocate_with(&too_few, &mut probe(3, 4, 4)).unwrap_err();
        assert!(matches!(error, Error::Infeasible { .. }), "{config:?}: {error}");
        let protected = request(&of_experts, &shape, Budget::Ratio(0.5), &protect, 1);
        let error = config.allocate_with(&protected, &mut probe(3, 4, 4)).unwrap_err();
        assert!(matches!(error, Error::Infeasible { .. }), "{config:?}: {error}");
        if let AllocatorConfig::Rco(_) = config {
            continue;
        }
        let of_units = request(&of_units, &shape, Budget::Ratio(0.5), &protect, 1);
        let error = config.allocate_with(&of_units, &mut probe(3, 4, 4)).unwrap_err();
        assert!(matches!(error, Error::Infeasible { .. }), "{config:?}: {error}");
    }
}

#[test]
fn floors_hold_at_the_tightest_budget_and_are_reported() {
    let shape = MoeShape { top_k: 2, ..shape(3, 4, 4) };
    // The first layer scores lowest: a free ranking would empty it.
    let scores =
        synthetic::expert_table(&[vec![0.1, 0.2, 0.3, 0.4], vec![5.0, 6.0, 7.0, 8.0], vec![1.0, 2.0, 3.0, 4.0]]);
    let none = ProtectionMask::none();
    let request = request(&scores, &shape, Budget::Ratio(0.5), &none, 1);
    for config in from_scores().into_iter().chain(from_model()) {
        let found = config.allocate_with(&request, &mut probe(3, 4, 4)).unwrap();
        assert!(found.layers.iter().all(|layer| layer.experts() == 2), "{config:?}");
    }
    let wider = AllocationRequest { budget: Budget::Ratio(0.34), ..request };
    let found = Global::default().allocate(&wider).unwrap();
    assert_eq!(found.layers.iter().map(|layer| layer.experts()).collect::<Vec<_>>(), [2, 4, 2]);
    let hits: Vec<_> = found.floor_hits.iter().map(|id| (id.layer, id.expert)).collect();
    assert_eq!(hits, [(1, 2), (1, 3)]);
    assert_eq!(found.uniform_experts(), None);
}

#[test]
fn what_has_to_ask_the_model_says_so() {
    let shape = shape(2, 4, 4);
    let (scores, none) = (Noise(4).experts(&shape), ProtectionMask::none());
    let request = experts_request(&scores, &shape, Budget::Ratio(0.5), &none);
    for config in from_model().into_iter().chain([AllocatorConfig::Rco(Rco::default())]) {
        assert!(matches!(config.allocate(&request), Err(Error::NeedsProbe { .. })), "{config:?}");
    }
    let of_units = Noise(4).units(&shape);
    let limits = Limits::Units(WidthLimits::default());
    let of_units = AllocationRequest { scores: &of_units, limits, ..request };
    let error = Rco::default().allocate_with(&of_units, &mut probe(2, 4, 4)).unwrap_err().to_string();
    assert!(error.contains("whole experts"), "{error}");
    let narrow = ScoreTable { pool: Pool::Layer, additive: Some(Pool::Layer), ..scores.clone() };
    let narrow = AllocationRequest { scores: &narrow, ..request };
    for config in
        [AllocatorConfig::Global(Global::default()), AllocatorConfig::RateDistortion(RateDistortion::default())]
    {
        assert!(matches!(config.allocate(&narrow), Err(Error::PoolTooNarrow { .. })), "{config:?}");
    }
    normalized(Normalization::Lamp).allocate(&narrow).unwrap();
}

#[test]
fn what_does_not_add_up_is_not_added() {
    let shape = shape(2, 4, 4);
    let (scores, none) = (Noise(4).experts(&shape), ProtectionMask::none());
    let shares = ScoreTable { additive: None, ..scores };
    let request = experts_request(&shares, &shape, Budget::Ratio(0.5), &none);
    let sums = [Normalization::Lamp, Normalization::LampOfSquares, Normalization::Sum, Normalization::Coverage];
    for config in sums.map(normalized).into_iter().chain([AllocatorConfig::RateDistortion(RateDistortion::default())]) {
        let error = config.allocate(&request).unwrap_err();
        assert!(matches!(error, Error::NotAdditive { supported: None, .. }), "{config:?}: {error}");
    }
    let error = normalized(Normalization::Sum).allocate(&request).unwrap_err().to_string();
    assert_eq!(
        error,
        "the scores may not be added, but the normalization by a share of the layer adds them up over one layer"
    );
    for by in [Normalization::Mean, Normalization::Max] {
        let found = normalized(by).allocate(&request).unwrap();
        assert!(found.predicted.is_none() && found.layers.iter().all(|layer| layer.predicted.is_none()), "{by:?}");
    }
    let within = ScoreTable { additive: Some(Pool::Layer), ..shares.clone() };
    let within = AllocationRequest { scores: &within, ..request };
    let found = normalized(Normalization::Lamp).allocate(&within).unwrap();
    assert!(found.predicted.is_none() && found.layers.iter().all(|layer| layer.predicted.is_some()));
    let error = RateDistortion::default().allocate(&within).unwrap_err().to_string();
    assert_eq!(
        error,
        "the scores may be added within one layer, but a distortion curve of scores adds them up over the whole model"
    );
}

#[test]
fn groups_lose_as_many_each() {
    let shape = MoeShape { top_k: 2, ..shape(3, 8, 2) };
    let none = ProtectionMask::none();
    let scores = Noise(9).experts(&shape);
    let limits = Limits::Experts(ExpertLimits { groups: 4, ..ExpertLimits::default() });
    let request = AllocationRequest { limits, ..experts_request(&scores, &shape, Budget::Ratio(0.4), &none) };
    let mut planted = Planted { experts: 8, importance: vec![1.0; 24], pairs: vec![], settled: vec![] };
    let rco = AllocatorConfig::Rco(Rco { steps: 3, ..Rco::default() });
    for config in from_scores().into_iter().chain([rco]) {
        let kept = config.allocate_with(&request, &mut planted).unwrap().kept();
        for lost in emptied(&kept) {
            let counts: Vec<usize> = (0..4).map(|group| lost.iter().filter(|e| **e / 2 == group).count()).collect();
            assert!(counts.iter().all(|count| *count == counts[0]), "{config:?}: {counts:?}");
        }
    }
}

#[test]
fn recipes_of_earlier_versions_still_read() {
    for (json, expected) in [
        (r#"{"type":"uniform"}"#, AllocatorConfig::Uniform(Uniform::default())),
        (r#"{"type":"layer"}"#, AllocatorConfig::Layer(PerLayer::default())),
        (r#"{"type":"global"}"#, AllocatorConfig::Global(Global::default())),
        (r#"{"type":"normalized"}"#, normalized(Normalization::Lamp)),
        (r#"{"type":"rate_distortion"}"#, AllocatorConfig::RateDistortion(RateDistortion::default())),
        (r#"{"type":"rco","steps":200}"#, AllocatorConfig::Rco(Rco::default())),
        (r#"{"type":"evolution"}"#, AllocatorConfig::Evolution(Evolution::default())),
    ] {
        assert_eq!(serde_json::from_str::<AllocatorConfig>(json).unwrap(), expected);
    }
    assert!(serde_json::from_str::<AllocatorConfig>(r#"{"type":"rco","step":200}"#).is_err());
}

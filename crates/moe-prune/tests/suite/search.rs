//! Allocators and pruners that search, against brute force and planted answers.

use crate::synthetic;

use moe_checkpoint::Granularity;
use moe_prune::{
    AllocationRequest, Allocator, AllocatorConfig, Budget, CurveSource, DepthPrior, DistortionCurves, Error, Evolution,
    Fitness, GeneticPruner, Global, Limits, NovicePruner, Prior, ProtectionMask, PruneRequest, Pruner, RateDistortion,
    Rco, Statistic, SubsetPruner, WidthLimits, Within,
};
use proptest::prelude::*;
use synthetic::{Additive, Noise, Planted, emptied, expert_table, experts_request, shape, table};

fn measured(points: usize) -> RateDistortion {
    let curves = CurveSource::Measured { points, statistic: Statistic::Mean };
    RateDistortion { curves, ..RateDistortion::default() }
}

/// Expert scores that fall with the index, so that the last experts go first.
fn descending(layers: usize, experts: usize) -> moe_checkpoint::ScoreTable {
    expert_table(&vec![(0..experts).map(|e| (experts - e) as f32).collect(); layers])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn measured_curves_are_allocated_as_brute_force_does(
        steps in prop::collection::vec(prop::collection::vec(0u8..30, 5), 4),
        drop in 1usize..20,
    ) {
        // Rising, otherwise of any form: 0, then five steps. One expert has to stay.
        let curves: Vec<Vec<f64>> = steps
            .iter()
            .map(|steps| steps.iter().fold(vec![0.0], |mut curve, step| {
                curve.push(curve[curve.len() - 1] + f64::from(*step));
                curve
            }))
            .collect();
        let (shape, scores, none) = (shape(4, 6, 3), descending(4, 6), ProtectionMask::none());
        let budget = Budget::Ratio((drop as f64 + 0.5) / 24.0);
        let mut model = Additive::new(3, curves.clone());
        let found = measured(5).allocate_with(&experts_request(&scores, &shape, budget, &none), &mut model).unwrap();
        let mut best = f64::INFINITY;
        for code in 0..6usize.pow(4) {
            let lost: Vec<usize> = (0..4).map(|l| code / 6usize.pow(l) % 6).collect();
            if lost.iter().sum::<usize>() == drop {
                best = best.min(lost.iter().zip(&curves).map(|(lost, curve)| curve[*lost]).sum());
            }
        }
        prop_assert!((found.predicted.unwrap() - best).abs() < 1e-9, "{:?} instead of {best}", found.predicted);
        prop_assert_eq!(found.measured, found.predicted);
        prop_assert_eq!(found.dropped, 3 * drop);
        prop_assert_eq!(model.runs, 4 * 5 + 1);
    }
}

#[test]
fn a_cliff_is_kept_above_and_concave_curves_are_not_walked_greedily() {
    let (scores, none) = (descending(2, 6), ProtectionMask::none());
    let shape = shape(2, 6, 3);
    let lost = |curves: Vec<Vec<f64>>, allocator: RateDistortion| {
        let request = experts_request(&scores, &shape, Budget::Ratio(0.5), &none);
        let found = allocator.allocate_with(&request, &mut Additive::new(3, curves)).unwrap();
        emptied(&found.kept()).iter().map(Vec::len).collect::<Vec<_>>()
    };
    // The first layer breaks down after two; the second costs more per expert until then.
    let cliff = vec![vec![0.0, 0.1, 0.2, 90.0, 91.0, 92.0], (0..6).map(|r| r as f64).collect()];
    assert_eq!(lost(cliff, measured(5)), [2, 4]);
    // Losing one expert of the second layer is dear, losing more of it costs nothing: greedy, which takes the cheapest
    // next step, never starts.
    let concave = vec![vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0], vec![0.0, 1.5, 1.6, 1.7, 1.8, 1.9]];
    assert_eq!(lost(concave, measured(5)), [1, 5]);
    let equal = vec![vec![1.0; 6], vec![1.0; 6]];
    assert_eq!(lost(equal, measured(5)).iter().sum::<usize>(), 6);
    // Local errors, scaled by one measured point each, find the same cliff.
    let cliff = vec![vec![0.0, 0.1, 0.2, 90.0, 91.0, 92.0], (0..6).map(|r| r as f64).collect()];
    let curves = CurveSource::LayerErrors { points: 5, statistic: Statistic::Mean };
    assert_eq!(lost(cliff, RateDistortion { curves, ..RateDistortion::default() }), [2, 4]);
}

#[test]
fn additivity_is_reported() {
    let (scores, none, shape) = (descending(3, 6), ProtectionMask::none(), shape(3, 6, 2));
    let curves: Vec<Vec<f64>> = (1..4).map(|l| (0..6).map(|r| (l * r) as f64).collect()).collect();
    let mut model = Additive { interaction: 0.5, ..Additive::new(2, curves) };
    let request = experts_request(&scores, &shape, Budget::Ratio(0.75), &none);
    let found = measured(5).allocate_with(&request, &mut model).unwrap();
    assert_eq!((found.predicted.unwrap(), found.measured.unwrap()), (5.0 + 10.0 + 9.0, 24.0 + 0.5 * 5.0 * 10.0 * 9.0));
    assert_eq!(found.layers.iter().map(|layer| layer.predicted.unwrap()).collect::<Vec<_>>(), [5.0, 10.0, 9.0]);
}

#[test]
fn blocks_that_do_not_divide_the_budget_still_meet_it() {
    let shape = shape(3, 4, 7);
    let (scores, none) = (Noise(11).units(&shape), ProtectionMask::none());
    let limits = Limits::Units(WidthLimits::default());
    let request = |ratio| AllocationRequest {
        scores: &scores,
        shape: &shape,
        budget: Budget::Ratio(ratio),
        protect: &none,
        limits,
        gone: None,
    };
    // Sums of ascending scores are convex: the least sum is that of the global ranking.
    for ratio in [0.1, 0.35, 0.5, 0.9] {
        let global = Global::default().allocate(&request(ratio)).unwrap();
        for within in [Within::Compete, Within::Expert] {
            let exact = RateDistortion { within, block: Some(1), ..RateDistortion::default() };
            let found = exact.allocate(&request(ratio)).unwrap();
            assert_eq!(found.kept(), global.kept(), "{ratio} {within:?}");
            assert!((found.predicted.unwrap() - global.predicted.unwrap()).abs() < 1e-9);
        }
        for block in [3, 5, 100] {
            let coarse = RateDistortion { block: Some(block), ..RateDistortion::default() };
            let found = coarse.allocate(&request(ratio)).unwrap();
            assert_eq!(found.dropped, global.dropped, "{ratio} {block}");
            assert!(found.predicted.unwrap() >= global.predicted.unwrap() - 1e-9);
        }
    }
}

#[test]
fn curves_are_a_file_that_fits_one_order() {
    let (scores, none, shape) = (descending(2, 6), ProtectionMask::none(), shape(2, 6, 3));
    let request = experts_request(&scores, &shape, Budget::Ratio(0.5), &none);
    let mut model =
        Additive::new(3, vec![(0..6).map(|r| r as f64).collect(), (0..6).map(|r| (r * r) as f64).collect()]);
    let mut told = Vec::new();
    let mut tell = |done, of| told.push((done, of));
    let curves = DistortionCurves::measure(&request, Within::Compete, 5, &mut model, &mut tell).unwrap();
    assert_eq!((told[0], told[9]), ((1, 10), (10, 10)));
    assert_eq!(curves.curves[1].points[3].dropped, 9);
    assert_eq!(curves.curves[1].points[3].distortion.mean, 9.0);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("curves.json");
    curves.save(&path).unwrap();
    assert_eq!(DistortionCurves::load(&path).unwrap(), curves);
    let source = |statistic| CurveSource::File { path: path.clone(), statistic };
    let from_file = |statistic| RateDistortion { curves: source(statistic), ..RateDistortion::default() };
    let found = from_file(Statistic::Mean).allocate(&request).unwrap();
    assert_eq!((found.kept(), found.measured), (measured(5).allocate_with(&request, &mut model).unwrap().kept(), None));
    let worst = from_file(Statistic::Worst).allocate_with(&request, &mut model).unwrap();
    let twice = found.predicted.map(|sum| 2.0 * sum);
    assert_eq!((worst.predicted, worst.measured), (twice, twice));

    let refused = |scores: &moe_checkpoint::ScoreTable, part: &str| {
        let request = AllocationRequest { scores, ..request };
        let error = from_file(Statistic::Mean).allocate(&request).unwrap_err();
        assert!(matches!(error, Error::InvalidCurves { .. }) && error.to_string().contains(part), "{error}");
    };
    let mut other = scores.clone();
    other.scorer = "{}".into();
    refused(&other, "order of scorer");
    let mut other = scores.clone();
    other.provenance.model = "another".into();
    refused(&other, "fingerprint");
    for (text, part) in [("{\"version\": 9}", "version 9"), ("{\"version\": 1}", "missing field"), ("[", "EOF")] {
        std::fs::write(&path, text).unwrap();
        let error = DistortionCurves::load(&path).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("curves.json"), "{error}");
    }
}

/// 3 layers of 8 experts. What one expert costs says keep the first of every layer; the pairs say which of the cheap
/// ones must not go together.
fn planted() -> Planted {
    let mut noise = Noise(21);
    let importance = (0..24).map(|e| if e % 8 < 2 { 2.0 + noise.next() } else { 0.02 * noise.next() }).collect();
    // Each expert of 2, 4, 6 stands in for its neighbor: losing both is dear.
    let pairs = (0..3).flat_map(|l| [2, 4, 6].map(|e| (8 * l + e, 8 * l + e + 1, 1.0))).collect();
    Planted { experts: 8, importance, pairs, settled: Vec::new() }
}

#[test]
fn gradient_search_finds_what_single_scores_cannot() {
    let (shape, none) = (shape(3, 8, 4), ProtectionMask::none());
    let mut model = planted();
    // Scores are the cost of losing that expert alone: what a criterion without interactions sees.
    let alone: Vec<f32> = model.importance.iter().map(|a| *a as f32).collect();
    let scores = expert_table(&alone.chunks(8).map(<[f32]>::to_vec).collect::<Vec<_>>());
    let request = experts_request(&scores, &shape, Budget::Ratio(9.0 / 24.0), &none);
    let global = model.cost_of(&Global::default().allocate(&request).unwrap().kept());
    // The cheaper one of every pair.
    let best: f64 = model.pairs.iter().map(|(i, j, _)| model.importance[*i].min(model.importance[*j])).sum();
    assert!(global > 1.0 + best, "{global} {best}");
    for seed in 0..3 {
        let rco = Rco { seed, ..Rco::default() };
        let found = rco.allocate_with(&request, &mut model).unwrap();
        let lost = emptied(&found.kept());
        assert_eq!(lost.iter().map(Vec::len).sum::<usize>(), 9);
        assert!(lost.iter().all(|layer| layer.iter().all(|e| *e >= 2)), "{lost:?}");
        assert!(model.cost_of(&found.kept()) < best + 0.05, "seed {seed}: {:?} instead of {best}", found.predicted);
        assert_eq!((found.seed, found.measured), (Some(seed), Some(model.cost_of(&found.kept()))));
        assert!((found.predicted.unwrap() - found.measured.unwrap()).abs() < 1e-9);
        assert_eq!(rco.allocate_with(&request, &mut model).unwrap(), found);
    }
    // Without interactions it is the ranking by importance, whatever the scores say.
    model.pairs.clear();
    model.importance = (0..24).map(|e| 1.5f64.powi(e * 7 % 24)).collect();
    let cheapest = |ranks: std::ops::Range<i32>| ranks.map(|rank| 1.5f64.powi(rank)).sum::<f64>();
    let found = Rco::default().allocate_with(&request, &mut model).unwrap();
    assert!((found.predicted.unwrap() - cheapest(0..9)).abs() < 1e-9, "{:?}", found.predicted);
    let mut protect = ProtectionMask::none();
    protect.protect_expert(1, 0);
    let request = AllocationRequest { protect: &protect, ..request };
    let found = Rco::default().allocate_with(&request, &mut model).unwrap();
    assert!((found.predicted.unwrap() - cheapest(1..10)).abs() < 1e-9, "the cheapest is protected: {found:?}");
}

#[test]
fn evolution_finds_planted_counts_and_repeats_itself() {
    let (shape, none) = (shape(4, 8, 2), ProtectionMask::none());
    let scores = descending(4, 8);
    // Each layer may lose this many for nothing, and must not lose more.
    let free = [6, 1, 5, 4];
    let curve = |free: usize| (0..8).map(|r: usize| 10.0 * r.saturating_sub(free) as f64).collect::<Vec<f64>>();
    let mut model = Additive::new(2, free.map(curve).to_vec());
    let request = experts_request(&scores, &shape, Budget::Ratio(0.5), &none);
    for fitness in [Fitness::Overlap, Fitness::Mean, Fitness::Worst] {
        let evolution = Evolution { fitness, generations: 40, ..Evolution::default() };
        let found = evolution.allocate_with(&request, &mut model).unwrap();
        assert_eq!(emptied(&found.kept()).iter().map(Vec::len).collect::<Vec<_>>(), free, "{fitness:?}");
        assert_eq!((found.predicted, found.measured), (Some(0.0), Some(0.0)));
    }
    // With no time to converge seeds differ, and one seed does not.
    let hasty = |seed| Evolution { seed, population: 3, generations: 1, ..Evolution::default() };
    let hard: Vec<Vec<f64>> =
        (1..5).map(|l| (0..8).map(|r| (l * r * r) as f64 + (r * 5 % 7) as f64).collect()).collect();
    let mut model = Additive::new(2, hard);
    let mut run = |seed| hasty(seed).allocate_with(&request, &mut model).unwrap();
    assert_eq!(run(1), run(1));
    let all: Vec<_> = (0..8).map(|seed| run(seed).kept()).collect();
    assert!(all.iter().any(|kept| *kept != all[0]));
}

/// The sets of four of eight experts, and what each costs in a layer.
fn brute_force(model: &Planted, layer: usize) -> Vec<(f64, Vec<u32>)> {
    let subsets = (0u32..256).filter(|subset| subset.count_ones() == 4);
    let mut all: Vec<(f64, Vec<u32>)> = subsets
        .map(|subset| {
            let lost = |e: &usize| e / 8 == layer && subset & (1 << (e % 8)) != 0;
            let gains: Vec<f64> = (0..24).map(|e| if lost(&e) { 0.0 } else { 1.0 }).collect();
            (model.cost(&gains), (0..8).filter(|e| subset & (1 << e) != 0).collect())
        })
        .collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    all
}

#[test]
fn genetic_search_finds_the_best_set_of_a_layer() {
    let (shape, none) = (shape(3, 8, 4), ProtectionMask::none());
    let scores = descending(3, 8);
    let mut model = planted();
    let request = PruneRequest::new(&scores, &shape, Budget::Ratio(0.5), &none);
    let allocator = AllocatorConfig::Uniform(Default::default());
    let alone = GeneticPruner { allocator, keep: 1, block: 1, population: 16, ..GeneticPruner::default() };
    for seed in 0..3 {
        let found = GeneticPruner { seed, ..alone.clone() }.prune_with(&request, &mut model).unwrap();
        for layer in 0..3 {
            assert_eq!(found.plan.kept[layer].removed, brute_force(&model, layer)[0].1, "seed {seed}, layer {layer}");
        }
        assert_eq!(found.allocation.measured, Some(model.cost_of(&found.plan.kept)));
        assert_eq!(found.allocation.seed, Some(seed));
    }
    let once = alone.prune_with(&request, &mut model).unwrap();
    assert_eq!(alone.prune_with(&request, &mut model).unwrap(), once, "the same seed draws the same");
    // What is protected stays, and fewer sets than the population are no trouble.
    let mut protect = ProtectionMask::none();
    (0..3).for_each(|expert| protect.protect_expert(3, expert));
    let held = PruneRequest { protect: &protect, ..request };
    let found = alone.prune_with(&held, &mut model).unwrap();
    assert!(found.plan.kept[1].removed.iter().all(|expert| *expert >= 3), "{:?}", found.plan.kept[1].removed);
}

#[test]
fn blocks_of_layers_see_what_single_layers_cannot() {
    let (shape, none) = (shape(3, 8, 4), ProtectionMask::none());
    let scores = descending(3, 8);
    let mut model = planted();
    let request = PruneRequest::new(&scores, &shape, Budget::Ratio(0.5), &none);
    // What the best sets of the first two layers lose must not go together.
    let [first, second] = [0, 1].map(|layer| brute_force(&model, layer)[0].1.clone());
    let only = |set: &[u32], other: &[u32]| *set.iter().find(|e| !other.contains(e)).unwrap() as usize;
    let next = brute_force(&model, 0)[1].1.clone();
    model.pairs.push((only(&first, &next), 8 + second[0] as usize, 0.5));
    let pruner = |keep, block| GeneticPruner {
        allocator: AllocatorConfig::Uniform(Default::default()),
        keep,
        block,
        ..GeneticPruner::default()
    };
    let cost = |keep, block, model: &mut Planted| {
        let found = pruner(keep, block).prune_with(&request, model).unwrap();
        model.cost_of(&found.plan.kept)
    };
    let (alone, one_by_one, together) = (cost(1, 1, &mut model), cost(3, 1, &mut model), cost(3, 2, &mut model));
    assert!(together < alone && together <= one_by_one, "{together}, {one_by_one}, {alone}");
    // The best that the kept sets of both layers have, by trying all.
    let sets = [0, 1, 2].map(|layer| brute_force(&model, layer)[..3].to_vec());
    let mut best = f64::INFINITY;
    for (a, b) in (0..9).map(|code| (code / 3, code % 3)) {
        let lost = |e: usize| match e / 8 {
            0 => sets[0][a].1.contains(&(e as u32)),
            1 => sets[1][b].1.contains(&(e as u32 - 8)),
            _ => sets[2][0].1.contains(&(e as u32 - 16)),
        };
        best = best.min(model.cost(&(0..24).map(|e| if lost(e) { 0.0 } else { 1.0 }).collect::<Vec<_>>()));
    }
    assert!((together - best).abs() < 1e-9, "{together} instead of {best}");
}

#[test]
fn layers_keep_in_proportion_to_what_losing_one_of_their_experts_does() {
    let (shape, none) = (shape(3, 8, 4), ProtectionMask::none());
    let scores = descending(3, 8);
    // 1, 2 and 3 per expert: of 12 experts the layers keep 2, 4 and 6.
    let importance = (0..24).map(|e| (1 + e / 8) as f64).collect();
    let mut model = Planted { experts: 8, importance, pairs: Vec::new(), settled: Vec::new() };
    let request = experts_request(&scores, &shape, Budget::Ratio(0.5), &none);
    let prior = DepthPrior { prior: Prior::Importance, within: Within::default() };
    let found = prior.allocate_with(&request, &mut model).unwrap();
    assert_eq!(emptied(&found.kept()).iter().map(Vec::len).collect::<Vec<_>>(), [6, 4, 2]);
    let error = prior.allocate(&request).unwrap_err();
    assert!(matches!(error, Error::NeedsProbe { .. }), "{error}");
    model.importance = vec![0.0; 24];
    let error = prior.allocate_with(&request, &mut model).unwrap_err().to_string();
    assert!(error.contains("no expert is missed"), "{error}");
}

#[test]
fn genetic_search_refuses_what_it_cannot_do() {
    let (shape, none, scores) = (shape(3, 8, 4), ProtectionMask::none(), descending(3, 8));
    let request = PruneRequest::new(&scores, &shape, Budget::Ratio(0.5), &none);
    let default = GeneticPruner::default;
    for (pruner, field) in [
        (GeneticPruner { population: 1, ..default() }, "population"),
        (GeneticPruner { mutation: 1.5, ..default() }, "mutation"),
        (GeneticPruner { keep: 0, ..default() }, "keep"),
        (GeneticPruner { keep: 33, ..default() }, "keep"),
        (GeneticPruner { block: 0, ..default() }, "block"),
        (GeneticPruner { keep: 10, block: 5, ..default() }, "block"),
    ] {
        let error = pruner.prune_with(&request, &mut planted()).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
    let error = default().prune(&scores, &shape, Budget::Ratio(0.5), &none).unwrap_err();
    assert!(matches!(error, Error::NeedsProbe { .. }), "{error}");
}

#[test]
fn subset_search_is_brute_force_per_layer() {
    let (shape, none) = (shape(3, 8, 4), ProtectionMask::none());
    let scores = descending(3, 8);
    let mut model = planted();
    let request = PruneRequest::new(&scores, &shape, Budget::Ratio(0.5), &none);
    let found = SubsetPruner::default().prune_with(&request, &mut model).unwrap();
    for layer in 0..3 {
        let mut best = (f64::INFINITY, 0);
        for subset in 0u32..256 {
            if subset.count_ones() == 4 {
                let gains: Vec<f64> =
                    (0..24).map(|e| if e / 8 == layer && subset & (1 << (e % 8)) != 0 { 0.0 } else { 1.0 }).collect();
                let cost = model.cost(&gains);
                if cost < best.0 {
                    best = (cost, subset);
                }
            }
        }
        let expected: Vec<u32> = (0..8).filter(|e| best.1 & (1 << e) != 0).collect();
        assert_eq!(found.plan.kept[layer].removed, expected);
        assert!((found.allocation.layers[layer].predicted.unwrap() - best.0.sqrt()).abs() < 1e-12);
    }
    assert!(model.settled.is_empty());
    // Layers that see what earlier ones lost.
    let progressive = SubsetPruner { progressive: true, ..SubsetPruner::default() };
    let found = progressive.prune_with(&request, &mut model).unwrap();
    let settled: Vec<_> = found.plan.kept.iter().map(|layer| (layer.layer, layer.removed.clone())).collect();
    assert_eq!(model.settled, settled);

    // Sampled: no worse than the lowest scores, the same for a seed.
    model.settled.clear();
    let sampled = SubsetPruner { limit: 12, seed: 3, ..SubsetPruner::default() };
    let one = sampled.prune_with(&request, &mut model).unwrap();
    assert_eq!(sampled.prune_with(&request, &mut model).unwrap(), one);
    let lowest = model.layer_errors_of(&[4, 5, 6, 7]);
    assert!(one.allocation.layers.iter().zip(lowest).all(|(layer, lowest)| layer.predicted.unwrap() <= lowest));
    // Protected experts and groups.
    let mut protect = ProtectionMask::none();
    protect.protect_unit(1, 6, 0);
    let request = PruneRequest { protect: &protect, ..request };
    for limit in [10_000, 9] {
        let grouped = SubsetPruner { groups: 2, limit, ..SubsetPruner::default() };
        let plan = grouped.prune_with(&request, &mut model).unwrap().plan;
        assert!(!plan.kept[0].removed.contains(&6));
        assert!(plan.kept.iter().all(|layer| layer.removed.iter().filter(|e| **e < 4).count() == 2));
    }
}

impl Planted {
    fn layer_errors_of(&mut self, subset: &[u32]) -> Vec<f64> {
        let error = |layer: usize| {
            let gains: Vec<f64> =
                (0..24).map(|e| if e / 8 == layer && subset.contains(&(e as u32 % 8)) { 0.0 } else { 1.0 }).collect();
            self.cost(&gains).sqrt()
        };
        (0..3).map(error).collect()
    }
}

#[test]
fn novices_keep_their_row_of_the_router_and_ties_may_go_together() {
    let (shape, none) = (shape(2, 4, 3), ProtectionMask::none());
    let scores = expert_table(&[vec![1.0, 2.0, 2.0, 3.0], vec![4.0, 1.0, 5.0, 6.0]]);
    let plan = NovicePruner::default().prune(&scores, &shape, Budget::Ratio(0.5), &none).unwrap().plan;
    // A tie goes by index: the lower one first.
    assert_eq!(emptied(&plan.kept), [vec![0, 1], vec![0, 1]]);
    assert!(plan.kept.iter().all(|layer| layer.removed.is_empty()));
    let strict = NovicePruner { strict: true, ..NovicePruner::default() };
    let found = strict.prune(&scores, &shape, Budget::Ratio(0.5), &none).unwrap();
    assert_eq!(emptied(&found.plan.kept), [vec![0, 1, 2], vec![0, 1]]);
    assert_eq!((found.allocation.asked_dropped, found.allocation.dropped), (12, 15));
    // No floor: the router may select novices only.
    let all_but_one = NovicePruner { allocator: moe_prune::AllocatorConfig::Global(Global::default()), strict: false };
    let plan = all_but_one.prune(&scores, &shape, Budget::Ratio(0.8), &none).unwrap().plan;
    assert_eq!(emptied(&plan.kept), [vec![0, 1, 2, 3], vec![0, 1]]);
    let of_units = table(Granularity::Unit, &[vec![vec![1.0; 3]; 4], vec![vec![1.0; 3]; 4]]);
    let error = NovicePruner::default().prune(&of_units, &shape, Budget::Ratio(0.5), &none).unwrap_err();
    assert!(matches!(error, Error::NeedsExpertScores));
}

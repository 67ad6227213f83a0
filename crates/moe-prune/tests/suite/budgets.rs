//! Budgets are met, on the side that they promise, by every pruner with every allocator.

use crate::synthetic;

use moe_checkpoint::{Granularity, MoeLayerShape, MoeShape, ScoreTable};
use moe_prune::{
    AllocatorConfig, Budget, CurveSource, DepthPrior, Distortion, Error, Evolution, ExpertPruner, Global, Hybrid,
    LayerKept, ModelProbe, Normalization, Normalized, NovicePruner, PerLayer, Prior, Progressive, ProtectionMask,
    PruneRequest, Pruned, Pruner, PrunerConfig, RateDistortion, Rco, Result, Schedule, Scope, Statistic, SubsetPruner,
    TwoLevelPruner, Uniform, UnitPruner, WideExpertPruner, Within,
};
use proptest::prelude::*;
use synthetic::Noise;

/// A model that misses what it lost, experts of higher index more.
struct Missing;

impl ModelProbe for Missing {
    fn distortion(&mut self, kept: &[LayerKept]) -> Result<Distortion> {
        let experts = |layer: &LayerKept| -> f64 {
            layer.experts.iter().enumerate().map(|(e, kept)| (e + 1) as f64 / (1.0 + kept.len() as f64)).sum()
        };
        let mean = kept.iter().map(experts).sum();
        Ok(Distortion { mean, worst: mean, overlap: 1.0 / (1.0 + mean) })
    }

    fn gain_gradient(&mut self, gains: &[Vec<f32>], _: usize) -> Result<(f64, Vec<Vec<f32>>)> {
        let layer = |gains: &Vec<f32>| (0..gains.len()).map(|e| -(e as f32)).collect();
        Ok((1.0, gains.iter().map(layer).collect()))
    }

    fn layer_errors(&mut self, _: usize, candidates: &[Vec<u32>]) -> Result<Vec<f64>> {
        Ok(candidates.iter().map(|gone| gone.iter().map(|e| f64::from(*e) + 1.0).sum()).collect())
    }

    fn settle(&mut self, _: usize, _: &[u32]) -> Result<()> {
        Ok(())
    }
}

fn allocators() -> Vec<AllocatorConfig> {
    let rate = |curves, within| AllocatorConfig::RateDistortion(RateDistortion { curves, within, block: None });
    let measured = CurveSource::Measured { points: 2, statistic: Statistic::Mean };
    let depth = |prior, within| AllocatorConfig::DepthPrior(DepthPrior { prior, within });
    vec![
        AllocatorConfig::Uniform(Uniform::default()),
        AllocatorConfig::Layer(PerLayer::default()),
        AllocatorConfig::Global(Global::default()),
        AllocatorConfig::Normalized(Normalized { by: Normalization::Lamp }),
        AllocatorConfig::Normalized(Normalized { by: Normalization::Mean }),
        AllocatorConfig::Hybrid(Hybrid { guaranteed: 0.5 }),
        depth(Prior::Linear { first: 1.0, last: 2.0 }, Within::Compete),
        depth(Prior::Erk, Within::Even),
        depth(Prior::Erk, Within::Expert),
        rate(CurveSource::Scores, Within::Compete),
        rate(CurveSource::Scores, Within::Expert),
        rate(measured, Within::Even),
        AllocatorConfig::Evolution(Evolution { population: 3, generations: 2, ..Evolution::default() }),
    ]
}

fn of_units(round_to: usize) -> Vec<PrunerConfig> {
    let unit = |allocator| UnitPruner::with_allocator(allocator).round_to(round_to);
    let mut all: Vec<PrunerConfig> = allocators().into_iter().map(|a| PrunerConfig::Unit(unit(a))).collect();
    for units in [unit(AllocatorConfig::Global(Global::default())), unit(AllocatorConfig::Layer(PerLayer::default()))] {
        all.push(PrunerConfig::TwoLevel(TwoLevelPruner { units, ..TwoLevelPruner::default() }));
    }
    let mut wide = WideExpertPruner::default();
    wide.limits.round_to = round_to;
    all.push(PrunerConfig::Wide(wide));
    all
}

fn of_experts() -> Vec<PrunerConfig> {
    let rco = AllocatorConfig::Rco(Rco { steps: 2, samples: 2, ..Rco::default() });
    let local = CurveSource::LayerErrors { points: 2, statistic: Statistic::Mean };
    let local = AllocatorConfig::RateDistortion(RateDistortion { curves: local, ..RateDistortion::default() });
    let mut all = vec![
        PrunerConfig::Subset(SubsetPruner {
            allocator: AllocatorConfig::Global(Global::default()),
            ..Default::default()
        }),
        PrunerConfig::Expert(ExpertPruner::with_allocator(local)),
    ];
    for allocator in allocators().into_iter().chain([rco]) {
        all.push(PrunerConfig::Expert(ExpertPruner::with_allocator(allocator.clone())));
        all.push(PrunerConfig::Novice(NovicePruner { allocator, strict: false }));
    }
    all
}

/// Whether whole experts are what is counted, so that units of experts of different width are not.
fn counts_experts(pruner: &PrunerConfig) -> bool {
    match pruner {
        PrunerConfig::Expert(ExpertPruner { allocator, .. }) | PrunerConfig::Novice(NovicePruner { allocator, .. }) => {
            matches!(allocator, AllocatorConfig::Uniform(_))
        }
        PrunerConfig::TwoLevel(_) | PrunerConfig::Subset(_) => true,
        _ => false,
    }
}

fn prune(pruner: &PrunerConfig, shape: &MoeShape, scores: &ScoreTable, budget: Budget) -> Option<Pruned> {
    let none = ProtectionMask::none();
    match pruner.prune_with(&PruneRequest::new(scores, shape, budget, &none), &mut Missing) {
        Ok(pruned) => Some(pruned),
        Err(Error::Infeasible { .. }) => None,
        Err(error) => panic!("{pruner:?}: {error}"),
    }
}

fn shapes(widths: impl Strategy<Value = usize>) -> impl Strategy<Value = MoeShape> {
    prop::collection::vec(prop::collection::vec(widths, 4), 1..4).prop_map(|layers| {
        let layers = layers.into_iter().enumerate();
        let layers = layers.map(|(l, widths)| MoeLayerShape { layer: 2 * l + 1, widths }).collect();
        MoeShape { gateless: false, hidden_size: 2, top_k: 1, layers }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_ratio_never_drops_more_but_for_the_remainder_of_widths(
        shape in shapes(1usize..40),
        ratio in 0.02..0.97f64,
        round_to in prop::sample::select(vec![1usize, 2, 8]),
        seed in 0u64..1 << 32,
    ) {
        let asked = (shape.units() as f64 * ratio).floor() as usize;
        let (units, experts) = (Noise(seed).units(&shape), Noise(seed).experts(&shape));
        let remainder: usize = shape.layers.iter().flat_map(|l| &l.widths).map(|width| width % round_to).sum();
        let even = shape.layers.iter().flat_map(|l| &l.widths).all(|width| *width == shape.layers[0].widths[0]);
        for pruner in of_units(round_to).into_iter().chain(of_experts()) {
            let (table, more) = match pruner.needs().granularity {
                Granularity::Unit => (&units, remainder),
                Granularity::Expert => (&experts, 0),
            };
            if counts_experts(&pruner) && !even {
                continue;
            }
            let Some(Pruned { plan, allocation }) = prune(&pruner, &shape, table, Budget::Ratio(ratio)) else { continue };
            let dropped = shape.units() - plan.units_kept();
            prop_assert_eq!(dropped, allocation.dropped);
            prop_assert!(dropped <= asked + more, "{:?}: {} of {} and {}", pruner, dropped, asked, more);
            prop_assert!(dropped <= asked || !plan.notes.is_empty(), "{:?}: no note", pruner);
        }
    }

    #[test]
    fn a_number_of_parameters_is_never_exceeded(
        shape in shapes(1usize..40),
        part in 0.05..0.95f64,
        round_to in prop::sample::select(vec![1usize, 2, 8]),
        seed in 0u64..1 << 32,
    ) {
        let keep = ((shape.parameters() as f64 * part) as u64).max(1);
        let (units, experts) = (Noise(seed).units(&shape), Noise(seed).experts(&shape));
        for pruner in of_units(round_to).into_iter().chain(of_experts()) {
            let unit = pruner.needs().granularity == Granularity::Unit;
            let even = shape.layers.iter().flat_map(|l| &l.widths).all(|width| *width == shape.layers[0].widths[0]);
            if counts_experts(&pruner) && !even {
                continue;
            }
            let table = if unit { &units } else { &experts };
            let Some(pruned) = prune(&pruner, &shape, table, Budget::KeepParameters(keep)) else { continue };
            let kept = pruned.plan.units_kept() as u64 * shape.parameters_per_unit() as u64;
            prop_assert!(kept <= keep, "{:?}: {} of {}", pruner, kept, keep);
        }
    }

    #[test]
    fn rounds_drop_no_more_than_one_round_may(
        widths in prop::sample::select(vec![8usize, 16, 24]),
        ratio in 0.05..0.95f64,
        seed in 0u64..1 << 32,
    ) {
        let shape = synthetic::shape(2, 4, widths);
        let asked = (shape.units() as f64 * ratio).floor() as usize;
        let (scores, none) = (Noise(seed).units(&shape), ProtectionMask::none());
        for pruner in of_units(8) {
            if matches!(pruner, PrunerConfig::TwoLevel(_)) || pruner.needs().probe.any() {
                continue;
            }
            let rounds = Progressive { pruner, rounds: 3, schedule: Schedule::Geometric };
            match rounds.run(&shape, "model", Budget::Ratio(ratio), &none, |_| Ok(scores.clone())) {
                Ok(pruned) => prop_assert!(shape.units() - pruned.plan.units_kept() <= asked, "{:?}", rounds),
                Err(Error::Infeasible { .. }) => {}
                Err(error) => panic!("{rounds:?}: {error}"),
            }
        }
    }
}

#[test]
fn two_levels_and_a_multiple_stay_within_the_ratio() {
    // 48 experts of 512 units in 2 layers, 5% of 49,152 units: 2,457.
    let shape = synthetic::shape(2, 48, 512);
    let scores = Noise(3).units(&shape);
    let units = UnitPruner::new(Scope::Global).round_to(8);
    let pruner = TwoLevelPruner { units, ..TwoLevelPruner::default() };
    let plan = pruner.prune(&scores, &shape, Budget::Ratio(0.05), &ProtectionMask::none()).unwrap().plan;
    let dropped = shape.units() - plan.units_kept();
    assert!(dropped <= 2457 && dropped > 2457 - 8, "{dropped}");
    assert!(plan.notes.is_empty());
}

#[test]
fn a_remainder_beyond_the_ratio_is_told() {
    let shape = synthetic::shape(1, 4, 10);
    let scores = Noise(3).units(&shape);
    let pruned = UnitPruner::new(Scope::Expert).prune(&scores, &shape, Budget::Ratio(0.1), &ProtectionMask::none());
    let pruned = pruned.unwrap();
    assert_eq!((pruned.allocation.asked_dropped, pruned.allocation.dropped), (4, 8));
    assert_eq!(
        pruned.plan.notes,
        [
            "8 units go where the ratio asks for 4 at most: widths are multiples of 8, and the remainder, 8 units, always goes"
        ]
    );
}

#[test]
fn falling_curves_do_not_drop_more_than_the_budget_asks_for() {
    // Without its lowest experts, every layer would be better: scores are negative.
    let shape = synthetic::shape(2, 4, 4);
    let scores = synthetic::expert_table(&[vec![-4.0, -3.0, 1.0, 2.0], vec![-2.0, -1.0, 3.0, 4.0]]);
    let pruner = ExpertPruner::with_allocator(AllocatorConfig::RateDistortion(RateDistortion::default()));
    let plan = pruner.prune(&scores, &shape, Budget::Ratio(0.25), &ProtectionMask::none()).unwrap().plan;
    assert_eq!((&plan.kept[0].removed, &plan.kept[1].removed), (&vec![0, 1], &vec![]));
}

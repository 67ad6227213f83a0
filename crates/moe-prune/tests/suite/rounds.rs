//! Pruners of several steps: rounds scored anew, two levels, wide experts; plans after plans.

use crate::synthetic;

use moe_checkpoint::{Granularity, MoeShape, Reduction, ScoreTable};
use moe_prune::{
    AllocatorConfig, Budget, DepthPrior, Error, ExpertPruner, Global, Normalization, Normalized, PerLayer, Prior,
    Progressive, ProtectionMask, PrunePlan, Pruner, PrunerConfig, Schedule, Scope, TwoLevelPruner, UnitPruner,
    WideExpertPruner, Within,
};
use proptest::prelude::*;
use synthetic::{Noise, emptied, shape};

fn unit_pruners() -> Vec<PrunerConfig> {
    let with = |allocator| PrunerConfig::Unit(UnitPruner::with_allocator(allocator));
    vec![
        PrunerConfig::Unit(UnitPruner::new(Scope::Expert).round_to(1)),
        PrunerConfig::Unit(UnitPruner::new(Scope::Layer)),
        PrunerConfig::Unit(UnitPruner::new(Scope::Global)),
        with(AllocatorConfig::Normalized(Normalized { by: Normalization::Lamp })),
        with(AllocatorConfig::DepthPrior(DepthPrior { prior: Prior::Erk, within: Within::Even })),
    ]
}

fn expert_pruners() -> Vec<PrunerConfig> {
    let with = |allocator| PrunerConfig::Expert(ExpertPruner::with_allocator(allocator));
    vec![
        PrunerConfig::Expert(ExpertPruner::new()),
        with(AllocatorConfig::Layer(PerLayer::default())),
        with(AllocatorConfig::Global(Global::default())),
    ]
}

/// Whether everything that one plan keeps, the other keeps too.
fn within(small: &PrunePlan, large: &PrunePlan) -> bool {
    let pairs = small.kept.iter().zip(&large.kept).flat_map(|(a, b)| a.experts.iter().zip(&b.experts));
    pairs.into_iter().all(|(a, b)| a.iter().all(|unit| b.contains(unit)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Scores that do not change make rounds equal to one shot; tables may come in either shape.
    #[test]
    fn rounds_of_constant_scores_are_one_shot(seed in any::<u64>(), ratio in 0.05f64..0.6, rounds in 1usize..5, linear in any::<bool>()) {
        let shape = shape(3, 4, 6);
        let mut noise = Noise(seed);
        let (of_units, of_experts) = (noise.units(&shape), noise.experts(&shape));
        let schedule = if linear { Schedule::Linear } else { Schedule::Geometric };
        let none = ProtectionMask::none();
        for (scores, pruners) in [(&of_units, unit_pruners()), (&of_experts, expert_pruners())] {
            for pruner in pruners {
                if let PrunerConfig::Unit(UnitPruner { allocator: AllocatorConfig::Normalized(_), .. }) = pruner {
                    continue; // what is left is normalized anew
                }
                let one_shot = pruner.prune(scores, &shape, Budget::Ratio(ratio), &none).unwrap().plan;
                let run = |reduced: bool| {
                    let score = |plan: &PrunePlan| if reduced { plan.restrict(scores) } else { Ok(scores.clone()) };
                    let driver = Progressive { pruner: pruner.clone(), rounds, schedule };
                    driver.run(&shape, "model", Budget::Ratio(ratio), &none, score).unwrap().plan
                };
                for reduced in [false, true] {
                    prop_assert_eq!(&run(reduced).kept, &one_shot.kept, "{:?}", pruner);
                }
            }
        }
    }

    /// Scores that change: what is gone stays gone, and the budget is met as by one shot.
    #[test]
    fn rounds_only_take_away(seed in any::<u64>(), ratio in 0.05f64..0.6, rounds in 2usize..5) {
        let shape = shape(3, 4, 6);
        let none = ProtectionMask::none();
        let mut noise = Noise(seed);
        for (pruners, experts) in [(unit_pruners(), false), (expert_pruners(), true)] {
            for pruner in pruners {
                let mut fresh = |shape: &MoeShape| if experts { noise.experts(shape) } else { noise.units(shape) };
                let one_shot = pruner.prune(&fresh(&shape), &shape, Budget::Ratio(ratio), &none).unwrap().plan;
                let mut seen: Vec<PrunePlan> = Vec::new();
                let score = |plan: &PrunePlan| -> moe_prune::Result<ScoreTable> {
                    seen.push(plan.clone());
                    Ok(fresh(&shape))
                };
                let driver = Progressive { pruner: pruner.clone(), rounds, schedule: Schedule::Geometric };
                let found = driver.run(&shape, "model", Budget::Ratio(ratio), &none, score).unwrap();
                seen.push(found.plan.clone());
                prop_assert_eq!(seen.len(), rounds + 1);
                prop_assert!(seen.windows(2).all(|pair| within(&pair[1], &pair[0])), "{:?}", pruner);
                prop_assert_eq!(found.plan.units_kept(), one_shot.units_kept(), "{:?}", pruner);
                prop_assert_eq!(&found.plan.recipe["pruner"]["type"], "progressive");
            }
        }
    }

    /// A plan after a plan, and scores there and back.
    #[test]
    fn plans_compose(seed in any::<u64>()) {
        let shape = shape(3, 4, 6);
        let (none, mut noise) = (ProtectionMask::none(), Noise(seed));
        let of_experts = noise.experts(&shape);
        let of_units = noise.units(&shape);
        let first = ExpertPruner::new().prune(&of_experts, &shape, Budget::Ratio(0.5), &none).unwrap().plan;
        let rest = first.restrict(&of_units).unwrap();
        rest.validate_for(&first.pruned_shape()).unwrap();
        let second = UnitPruner::new(Scope::Global).prune(&rest, &first.pruned_shape(), Budget::Ratio(0.5), &none).unwrap().plan;
        let both = first.then(&second).unwrap();
        prop_assert_eq!((both.units_kept(), both.pruned_shape()), (second.units_kept(), second.pruned_shape()));
        prop_assert!(within(&both, &first));
        let twice = second.restrict(&rest).unwrap();
        prop_assert_eq!(&both.restrict(&of_units).unwrap().layers, &twice.layers);
        let back = both.expand(&twice).unwrap();
        back.validate_for(&shape).unwrap();
        for ((kept, back), scores) in both.kept.iter().zip(&back.layers).zip(&of_units.layers) {
            for (expert, units) in kept.experts.iter().enumerate() {
                for unit in 0..6u32 {
                    let expected = if units.contains(&unit) { scores.scores[expert][unit as usize] } else { 0.0 };
                    prop_assert_eq!(back.scores[expert][unit as usize], expected);
                }
            }
        }
        prop_assert!(second.then(&first).is_err());
    }

    #[test]
    fn both_levels_meet_the_budget_together(seed in any::<u64>(), ratio in 0.02f64..0.9, part in 0.05f64..0.95, protected in 0usize..3) {
        let shape = shape(3, 4, 6);
        let scores = Noise(seed).units(&shape);
        let mut protect = ProtectionMask::none();
        (0..protected).for_each(|index| protect.protect_unit(2 * index + 1, index, 5 - index as u32));
        let pruner = TwoLevelPruner { expert_part: part, ..TwoLevelPruner::default() };
        let found = match pruner.prune(&scores, &shape, Budget::Ratio(ratio), &protect) {
            Ok(found) => found,
            Err(Error::Infeasible { .. }) => return Ok(()),
            Err(other) => return Err(TestCaseError::fail(other.to_string())),
        };
        let asked = (72.0 * ratio).floor() as usize;
        prop_assert_eq!((found.allocation.asked_dropped, found.allocation.dropped), (asked, asked));
        prop_assert_eq!(found.plan.units_kept(), 72 - asked);
        let removed: usize = found.plan.kept.iter().map(|layer| layer.removed.len()).sum();
        prop_assert_eq!(removed, 3 * (4.0 * (asked as f64 * part / 72.0)).floor() as usize);
        for (index, layer) in found.plan.kept.iter().enumerate().take(protected) {
            prop_assert!(layer.experts[index].contains(&(5 - index as u32)));
        }
    }
}

#[test]
fn wide_experts_stay_whole_at_every_budget() {
    let shape = shape(4, 5, 8);
    let scores = Noise(3).units(&shape);
    let none = ProtectionMask::none();
    let best = scores.to_experts(Reduction::Sum).unwrap();
    for (whole, ratio) in [(0.2, 0.5), (0.2, 0.75), (0.3, 0.4), (0.0, 0.5)] {
        let pruner = WideExpertPruner { whole, ..WideExpertPruner::default() };
        let found = pruner.prune(&scores, &shape, Budget::Ratio(ratio), &none).unwrap();
        assert_eq!(found.allocation.dropped, (160.0 * ratio) as usize);
        let full: Vec<usize> =
            found.plan.kept.iter().map(|l| l.experts.iter().filter(|kept| kept.len() == 8).count()).collect();
        assert_eq!(full.iter().sum::<usize>(), (20.0 * whole) as usize, "{full:?}");
        assert!(full.is_sorted(), "more in deeper layers: {full:?}");
        for (layer, scores) in found.plan.kept.iter().zip(&best.layers) {
            let widths = layer.experts.iter().map(Vec::len).zip(&scores.scores);
            let least =
                widths.clone().filter(|(width, _)| *width == 8).map(|(_, score)| score[0]).fold(f32::MAX, f32::min);
            assert!(widths.clone().filter(|(width, _)| *width < 8).all(|(_, score)| score[0] <= least));
            let slim: Vec<usize> = widths.map(|(width, _)| width).filter(|width| *width < 8).collect();
            assert!(slim.iter().max().unwrap() - slim.iter().min().unwrap() <= 1, "{slim:?}");
        }
        assert!(found.allocation.protected.is_empty());
    }
    // More whole experts than the budget holds.
    let pruner = WideExpertPruner { whole: 0.6, ..WideExpertPruner::default() };
    let error = pruner.prune(&scores, &shape, Budget::Ratio(0.5), &none).unwrap_err();
    assert!(matches!(error, Error::Infeasible { .. }), "{error}");
}

#[test]
fn pruners_read_recipes_of_earlier_versions() {
    let expert: PrunerConfig = serde_json::from_str(r#"{"type":"expert","groups":4}"#).unwrap();
    assert_eq!(expert, PrunerConfig::Expert(ExpertPruner::new().groups(4)));
    for json in [r#"{"type":"novice"}"#, r#"{"type":"subset"}"#, r#"{"type":"two_level"}"#, r#"{"type":"wide"}"#] {
        let pruner: PrunerConfig = serde_json::from_str(json).unwrap();
        let text = serde_json::to_string(&pruner).unwrap();
        assert_eq!(serde_json::from_str::<PrunerConfig>(&text).unwrap(), pruner);
    }
    assert!(serde_json::from_str::<PrunerConfig>(r#"{"type":"expert","group":4}"#).is_err());
}

#[test]
fn rounds_refuse_what_they_cannot_do() {
    let shape = shape(2, 3, 4);
    let (scores, none) = (Noise(1).units(&shape), ProtectionMask::none());
    let pruner = PrunerConfig::Unit(UnitPruner::new(Scope::Global));
    let run = |rounds, score: &dyn Fn(&PrunePlan) -> moe_prune::Result<ScoreTable>| {
        let driver = Progressive { pruner: pruner.clone(), rounds, schedule: Schedule::Linear };
        driver.run(&shape, "model", Budget::Ratio(0.5), &none, score).map(|pruned| pruned.plan)
    };
    assert!(matches!(run(0, &|_| Ok(scores.clone())), Err(Error::InvalidParameter { field: "rounds", .. })));
    let other = Noise(1).units(&synthetic::shape(2, 3, 5));
    assert!(run(2, &|_| Ok(other.clone())).unwrap_err().to_string().contains("layer 1, expert 0"));
    let experts = Noise(1).experts(&shape);
    assert!(matches!(run(1, &|_| Ok(experts.clone())), Err(Error::NeedsUnitScores)));
    assert_eq!(scores.granularity, Granularity::Unit);
    assert_eq!(emptied(&run(1, &|_| Ok(scores.clone())).unwrap().kept).len(), 2);
}

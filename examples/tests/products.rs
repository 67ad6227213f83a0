//! Every scorer with every pruner and every allocator, on a model small enough for all of them.

use std::collections::BTreeSet;
use std::path::Path;

use moe_checkpoint::{Granularity, Pool, Reduction, ScoreTable};
use moe_core::data::{Sequence, Wave};
use moe_core::device::device;
use moe_core::{Engine, EngineOptions, Model};
use moe_importance::{Calibration, Scorer, ScorerConfig};
use moe_prune::{
    AllocatorConfig, Budget, CurveSource, DepthPrior, EngineProbe, Error, Evolution, ExpertPruner, Global, Hybrid,
    Normalization, Normalized, NovicePruner, PerLayer, Prior, ProbeOptions, ProtectionMask, PruneRequest, Pruner,
    PrunerConfig, RateDistortion, Rco, Scope, Statistic, SubsetPruner, TwoLevelPruner, Uniform, UnitPruner,
    WideExpertPruner, Within,
};

fn model() -> Model {
    let fixture = "../crates/moe-checkpoint/tests/fixtures/parity/tf5/qwen2_moe";
    Model::open(Path::new(env!("CARGO_MANIFEST_DIR")).join(fixture), &device("flex").unwrap(), None).unwrap()
}

/// Two tokens, which choose three of eight experts each: some see none.
fn waves() -> Vec<Wave> {
    vec![Wave { id: 0, sequences: vec![Sequence::new(vec![11, 48])] }]
}

fn allocators() -> Vec<AllocatorConfig> {
    let rate = |curves| AllocatorConfig::RateDistortion(RateDistortion { curves, ..RateDistortion::default() });
    let mut all = vec![
        AllocatorConfig::Uniform(Uniform::default()),
        AllocatorConfig::Layer(PerLayer::default()),
        AllocatorConfig::Global(Global::default()),
        AllocatorConfig::Hybrid(Hybrid::default()),
        AllocatorConfig::DepthPrior(DepthPrior {
            prior: Prior::Linear { first: 0.9, last: 1.1 },
            within: Within::Compete,
        }),
        AllocatorConfig::DepthPrior(DepthPrior { prior: Prior::Erk, within: Within::Even }),
        rate(CurveSource::Scores),
        rate(CurveSource::Measured { points: 2, statistic: Statistic::Mean }),
        AllocatorConfig::Evolution(Evolution { population: 2, generations: 1, ..Evolution::default() }),
    ];
    let by = [
        Normalization::Lamp,
        Normalization::LampOfSquares,
        Normalization::Sum,
        Normalization::Mean,
        Normalization::Max,
        Normalization::Coverage,
    ];
    all.extend(by.map(|by| AllocatorConfig::Normalized(Normalized { by })));
    all
}

fn pruners(granularity: Granularity) -> Vec<PrunerConfig> {
    match granularity {
        Granularity::Unit => {
            let mut all: Vec<PrunerConfig> =
                allocators().into_iter().map(|a| PrunerConfig::Unit(UnitPruner::with_allocator(a))).collect();
            all.push(PrunerConfig::Unit(UnitPruner::new(Scope::Global).round_to(4).min_width(4)));
            all.push(PrunerConfig::TwoLevel(TwoLevelPruner::default()));
            all.push(PrunerConfig::Wide(WideExpertPruner::default()));
            all
        }
        _ => {
            let local = CurveSource::LayerErrors { points: 2, statistic: Statistic::Mean };
            let rco = AllocatorConfig::Rco(Rco { steps: 2, samples: 2, ..Rco::default() });
            let each = allocators().into_iter().chain([rco]);
            let mut all: Vec<PrunerConfig> = each
                .flat_map(|allocator| {
                    [
                        PrunerConfig::Expert(ExpertPruner::with_allocator(allocator.clone())),
                        PrunerConfig::Novice(NovicePruner { allocator, strict: false }),
                    ]
                })
                .collect();
            let local = AllocatorConfig::RateDistortion(RateDistortion { curves: local, ..RateDistortion::default() });
            all.push(PrunerConfig::Expert(ExpertPruner::with_allocator(local)));
            all.push(PrunerConfig::Subset(SubsetPruner::default()));
            all.push(PrunerConfig::Subset(SubsetPruner { limit: 3, progressive: true, ..SubsetPruner::default() }));
            all
        }
    }
}

/// Tables of both granularities from one scorer's.
fn both(table: ScoreTable, magnitude: &ScoreTable) -> [ScoreTable; 2] {
    match table.granularity {
        Granularity::Unit => {
            let reduction = if table.adds_up(Pool::Expert) { Reduction::Sum } else { Reduction::Mean };
            [table.to_experts(reduction).unwrap(), table]
        }
        _ => [ScoreTable::broadcast(&table, magnitude).unwrap(), table],
    }
}

#[test]
fn every_scorer_feeds_every_pruner_with_every_allocator() {
    let model = model();
    let checkpoint = model.checkpoint().clone();
    let shape = checkpoint.shape();
    let waves = waves();
    let scorers: Vec<Box<dyn Scorer>> = ScorerConfig::NAMES
        .iter()
        .map(|name| {
            let config: ScorerConfig = serde_json::from_value(serde_json::json!({ "type": name })).unwrap();
            config.build().unwrap()
        })
        .collect();
    let calibration = Calibration::of_waves(&model, &waves).scorers(scorers.iter().map(|scorer| &**scorer));
    let statistics = calibration.run(&mut |_| {}).unwrap();
    let score = |scorer: &dyn Scorer| scorer.score(&statistics, checkpoint.as_ref()).unwrap();
    let magnitude = scorers.iter().find(|scorer| scorer.name() == "magnitude").map(|s| score(&**s)).unwrap();

    let engine = Engine::new(&model, EngineOptions::default());
    let mut probe = EngineProbe::new(&engine, waves, ProbeOptions::default()).unwrap();
    let mut protect = ProtectionMask::none();
    let last = shape.layers.last().unwrap();
    protect.protect_unit(shape.layers[0].layer, 0, 1);
    protect.protect_unit(last.layer, last.num_experts() - 1, last.widths[0] as u32 - 1);
    let (units, ratio) = (shape.units(), 0.3);
    let asked = (units as f64 * ratio).floor() as usize;
    let (mut done, mut refused, mut silent) = (0, 0, 0);
    let (mut too_narrow, mut not_additive) = (BTreeSet::new(), BTreeSet::new());

    for scorer in &scorers {
        for table in both(score(&**scorer), &magnitude) {
            let name = scorer.name();
            let negative = table.layers.iter().flat_map(|l| l.scores.iter().flatten()).any(|score| *score < 0.0);
            let never_routed =
                table.layers.iter().flat_map(|l| l.routed.iter().flatten()).filter(|count| **count == 0).count();
            silent += never_routed;
            let step = if table.granularity == Granularity::Expert { shape.layers[0].widths[0] } else { 1 };
            for pruner in pruners(table.granularity) {
                let what = format!("{name}, {}", serde_json::to_string(&pruner).unwrap());
                let request = PruneRequest::new(&table, shape, Budget::Ratio(ratio), &protect);
                let found = match pruner.prune_with(&request, &mut probe) {
                    Ok(found) => found,
                    Err(Error::PoolTooNarrow { wanted, supported }) => {
                        assert!(wanted > supported && supported == table.pool, "{what}");
                        too_narrow.insert(name.to_string());
                        refused += 1;
                        continue;
                    }
                    Err(Error::NotAdditive { wanted, supported, .. }) => {
                        assert!(!table.adds_up(wanted) && supported == table.additive, "{what}");
                        not_additive.insert(name.to_string());
                        refused += 1;
                        continue;
                    }
                    Err(Error::Checkpoint(error)) if error.to_string().contains("may not be added") => {
                        assert!(!table.adds_up(Pool::Expert), "{what}");
                        not_additive.insert(name.to_string());
                        refused += 1;
                        continue;
                    }
                    Err(Error::InvalidParameter { field: "scores", .. }) if negative => continue,
                    Err(other) => panic!("{what}: {other}"),
                };
                // To the unit or expert; one width or number for all, and multiples, are as near as they can be.
                let excess = asked as isize - found.allocation.dropped as isize;
                let slack = match &pruner {
                    PrunerConfig::Unit(pruner) if pruner.limits.round_to > 1 => pruner.limits.round_to,
                    PrunerConfig::Unit(UnitPruner { allocator: AllocatorConfig::Uniform(_), .. }) => {
                        shape.layers.iter().map(|layer| layer.num_experts()).sum()
                    }
                    PrunerConfig::Unit(UnitPruner { allocator: AllocatorConfig::Layer(_), .. })
                    | PrunerConfig::Expert(ExpertPruner { allocator: AllocatorConfig::Uniform(_), .. })
                    | PrunerConfig::Novice(NovicePruner { allocator: AllocatorConfig::Uniform(_), .. })
                    | PrunerConfig::Subset(_) => step * shape.layers.len(),
                    _ => step,
                };
                assert!((0..slack as isize).contains(&excess), "{what}: {excess} of {slack}");
                assert_eq!(found.plan.units_kept(), units - found.allocation.dropped, "{what}");
                assert!(found.allocation.predicted.is_none_or(f64::is_finite), "{what}");
                found.plan.validate(shape).unwrap();
                for protected in protect.entries() {
                    let kept = &found.plan.layer(protected.layer).unwrap().experts[protected.expert];
                    assert!(protected.units.iter().flatten().all(|unit| kept.contains(unit)), "{what}");
                }
                assert_eq!(found.plan.never_routed.len(), never_routed, "{what}");
                assert_eq!(pruner.prune_with(&request, &mut probe).unwrap(), found, "{what}");
                let next_to_nothing = PruneRequest { budget: Budget::Ratio(1e-9), ..request };
                let kept = pruner.prune_with(&next_to_nothing, &mut probe).unwrap().plan;
                assert_eq!(kept.units_kept(), units, "{what}");
                done += 1;
            }
        }
    }
    // What is compared within layers is never compared between them, and what is no amount is never added.
    for name in ["reap", "ean", "man", "tenp", "esft", "bias", "aimer"] {
        assert!(too_narrow.contains(name), "{name}: compared over the model");
    }
    for name in ["frequency", "routing_weight", "seer", "dern", "esft", "mone", "router_score"] {
        assert!(not_additive.contains(name), "{name}: added up");
    }
    for name in ["fisher", "coupled", "taylor", "magnitude", "activation"] {
        assert!(!too_narrow.contains(name) && !not_additive.contains(name), "{name}: refused");
    }
    assert!(silent > 0, "every expert saw a token: the data is too long for this test");
    assert!(done + refused > 50 * scorers.len() && done > 35 * scorers.len(), "{done} combinations, {refused} refused");
}

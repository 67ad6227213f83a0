//! Recipes as JSON, and methods that are not of this crate.

use crate::synthetic;

use std::path::PathBuf;

use moe_checkpoint::{Granularity, Pool, ScoreTable};
use moe_prune::{
    Allocation, AllocationRequest, Allocator, AllocatorConfig, Budget, CurveSource, DepthPrior, Error, Evolution,
    ExpertPruner, Fitness, GeneticPruner, Global, Hybrid, LayerKept, ModelProbe, Needs, NoProbe, Normalization,
    Normalized, NovicePruner, PerLayer, Prior, Progressive, ProtectionMask, PruneRequest, Pruner, PrunerConfig,
    Questions, RateDistortion, Rco, Result, Schedule, Scope, Statistic, SubsetPruner, TwoLevelPruner, Uniform,
    UnitPruner, WideExpertPruner, Within,
};
use serde_json::{Value, json};
use synthetic::{Noise, shape};

fn allocators() -> Vec<AllocatorConfig> {
    let sources = [
        CurveSource::Scores,
        CurveSource::Measured { points: 3, statistic: Statistic::Worst },
        CurveSource::LayerErrors { points: 2, statistic: Statistic::Mean },
        CurveSource::File { path: PathBuf::from("curves.json"), statistic: Statistic::Mean },
    ];
    let priors = [
        Prior::Weights(vec![1.0, 2.0]),
        Prior::Linear { first: 1.0, last: 2.0 },
        Prior::Trapezoid { edge: 1.0, top: 2.0, rise: 0.25, fall: 0.75 },
        Prior::Erk,
        Prior::Importance,
    ];
    let mut all = vec![
        AllocatorConfig::Uniform(Uniform::default()),
        AllocatorConfig::Layer(PerLayer::default()),
        AllocatorConfig::Global(Global::default()),
        AllocatorConfig::Normalized(Normalized { by: Normalization::Coverage }),
        AllocatorConfig::Hybrid(Hybrid::default()),
        AllocatorConfig::Rco(Rco::default()),
        AllocatorConfig::Evolution(Evolution { fitness: Fitness::Worst, ..Evolution::default() }),
    ];
    all.extend(sources.map(|curves| {
        AllocatorConfig::RateDistortion(RateDistortion { curves, block: Some(2), ..RateDistortion::default() })
    }));
    all.extend(priors.map(|prior| AllocatorConfig::DepthPrior(DepthPrior { prior, within: Within::Even })));
    all
}

fn pruners() -> Vec<PrunerConfig> {
    let mut all = vec![
        PrunerConfig::Unit(UnitPruner::new(Scope::Expert).min_width(8).exact(true)),
        PrunerConfig::Expert(ExpertPruner::default().groups(2)),
        PrunerConfig::Novice(NovicePruner { strict: true, ..NovicePruner::default() }),
        PrunerConfig::Subset(SubsetPruner::default()),
        PrunerConfig::Genetic(GeneticPruner::default()),
        PrunerConfig::TwoLevel(TwoLevelPruner::default()),
        PrunerConfig::Wide(WideExpertPruner::default()),
    ];
    all.extend(allocators().into_iter().map(|allocator| PrunerConfig::Unit(UnitPruner::with_allocator(allocator))));
    all
}

/// The same JSON with a field that no method has, once for every object in it.
fn with_a_stranger(value: &Value) -> Vec<Value> {
    let mut found = Vec::new();
    match value {
        Value::Object(fields) => {
            let mut more = fields.clone();
            more.insert("stranger".into(), json!(8));
            found.push(Value::Object(more));
            for (key, inner) in fields {
                for changed in with_a_stranger(inner) {
                    let mut fields = fields.clone();
                    fields.insert(key.clone(), changed);
                    found.push(Value::Object(fields));
                }
            }
        }
        Value::Array(items) => {
            for (index, inner) in items.iter().enumerate() {
                for changed in with_a_stranger(inner) {
                    let mut items = items.clone();
                    items[index] = changed;
                    found.push(Value::Array(items));
                }
            }
        }
        _ => {}
    }
    found
}

/// Reads back what it was, and refuses a field that it does not know, wherever in it.
fn is_strict<T: serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(recipe: &T, json: Value) {
    assert_eq!(&serde_json::from_value::<T>(json.clone()).unwrap(), recipe, "{json}");
    let strangers = with_a_stranger(&json);
    assert!(!strangers.is_empty(), "{json}");
    for stranger in strangers {
        let text = stranger.to_string();
        assert!(serde_json::from_str::<T>(&text).is_err(), "{text}");
    }
}

#[test]
fn every_recipe_reads_back_and_refuses_what_it_does_not_know() {
    for allocator in allocators() {
        assert!(allocator.recipe()["type"].is_string());
        is_strict(&allocator, allocator.recipe());
    }
    for pruner in pruners() {
        assert_eq!(serde_json::to_value(&pruner).unwrap(), pruner.recipe());
        is_strict(&pruner, pruner.recipe());
        let rounds = Progressive { pruner, rounds: 3, schedule: Schedule::Linear };
        let mut recipe = rounds.recipe();
        assert_eq!(recipe.as_object_mut().unwrap().remove("type"), Some("progressive".into()));
        is_strict(&rounds, recipe);
    }
    let parameters = [Budget::KeepParameters(5), Budget::DropParameters(5), Budget::KeepTotalParameters(5)];
    for budget in parameters.into_iter().chain([Budget::Ratio(0.5), Budget::KeepBytes(5)]) {
        is_strict(&budget, serde_json::to_value(budget).unwrap());
    }
    let mut mask = ProtectionMask::none();
    mask.protect_unit(1, 2, 3);
    is_strict(&mask, serde_json::to_value(&mask).unwrap());
}

#[test]
fn an_option_beside_the_object_it_belongs_to_is_refused() {
    let text = r#"{"type":"unit","allocator":{"type":"uniform"},"round_to":8}"#;
    let error = serde_json::from_str::<PrunerConfig>(text).unwrap_err().to_string();
    assert!(error.contains("round_to"), "{error}");
    let text = r#"{"type":"unit","allocator":{"type":"uniform","round_to":8}}"#;
    let error = serde_json::from_str::<PrunerConfig>(text).unwrap_err().to_string();
    assert!(error.contains("round_to"), "{error}");
}

/// Keeps the first units of every expert, as many as the budget leaves of each.
struct First;

impl Allocator for First {
    fn recipe(&self) -> Value {
        json!({ "type": "first", "of": "every expert" })
    }

    fn needs(&self, granularity: Granularity) -> Needs {
        Needs::new(granularity, Pool::Expert)
    }

    fn allocate_with(&self, request: &AllocationRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        request.validate(&self.needs(request.granularity()), probe)?;
        let Budget::Ratio(ratio) = request.budget else { unreachable!() };
        let first = |width: &usize| (0..(*width as f64 * (1.0 - ratio)) as u32).collect();
        let layers = request.shape.layers.iter();
        let kept = layers.map(|l| LayerKept::of_units(l.layer, l.widths.iter().map(first).collect())).collect();
        request.allocation(self.recipe(), kept)
    }
}

/// The same as a pruner that asks the model, although it need not.
struct AskingFirst;

impl Pruner for AskingFirst {
    fn recipe(&self) -> Value {
        json!({ "type": "asking_first" })
    }

    fn needs(&self) -> Needs {
        Needs::new(Granularity::Unit, Pool::Expert).asking(Questions { distortion: true, ..Questions::NONE })
    }

    fn allocate_with(&self, request: &PruneRequest<'_>, probe: &mut dyn ModelProbe) -> Result<Allocation> {
        UnitPruner::with_allocator(AllocatorConfig::own(First)).allocate_with(request, probe)
    }
}

#[test]
fn an_allocator_of_ones_own_works_in_every_pruner_and_its_plan_says_so() {
    let shape = shape(2, 4, 8);
    let (scores, none) = (Noise(5).units(&shape), ProtectionMask::none());
    let pruner = PrunerConfig::Unit(UnitPruner::with_allocator(AllocatorConfig::own(First)));
    assert_eq!(pruner, pruner.clone());
    let found = pruner.prune(&scores, &shape, Budget::Ratio(0.5), &none).unwrap();
    assert_eq!(found.plan.recipe["pruner"]["allocator"], First.recipe());
    assert_eq!(found.allocation.allocator, First.recipe());
    assert!(found.plan.kept.iter().flat_map(|layer| &layer.experts).all(|kept| *kept == [0, 1, 2, 3]));
    let expected: f64 = scores.layers.iter().flat_map(|l| &l.scores).flat_map(|s| &s[4..]).map(|s| f64::from(*s)).sum();
    assert!((found.allocation.predicted.unwrap() - expected).abs() < 1e-9);
    assert_eq!((found.allocation.asked_dropped, found.allocation.dropped), (32, 32));
    // In rounds, as in one.
    let rounds = Progressive { pruner, rounds: 3, schedule: Schedule::Linear };
    let plan = rounds.run(&shape, "model", Budget::Ratio(0.5), &none, |_| Ok(scores.clone())).unwrap().plan;
    assert_eq!(plan.kept, found.plan.kept);
    assert_eq!(plan.recipe["pruner"], rounds.recipe());
    assert_eq!(plan.recipe["pruner"]["pruner"]["allocator"], First.recipe());
    // What is protected is not silently dropped by a method that does not look.
    let mut protect = ProtectionMask::none();
    protect.protect_unit(1, 2, 7);
    let error = rounds.pruner.prune(&scores, &shape, Budget::Ratio(0.5), &protect).unwrap_err().to_string();
    assert!(error.contains("layer 1, expert 2") && error.contains("unit 7 is protected"), "{error}");
}

#[test]
fn what_a_pruner_needs_is_checked_before_any_work() {
    let shape = shape(2, 4, 8);
    let (units, none) = (Noise(5).units(&shape), ProtectionMask::none());
    let own = PrunerConfig::own(AskingFirst);
    let request = PruneRequest::new(&units, &shape, Budget::Ratio(0.5), &none);
    let error = own.prune_with(&request, &mut NoProbe).unwrap_err();
    assert!(matches!(error, Error::NeedsProbe { .. }), "{error}");
    let mut scored = 0;
    let rounds = Progressive { pruner: own, rounds: 2, schedule: Schedule::Linear };
    let error = rounds.run(&shape, "model", Budget::Ratio(0.5), &none, |_| {
        scored += 1;
        Ok(units.clone())
    });
    assert!(matches!(error, Err(Error::NeedsProbe { .. })));
    assert_eq!(scored, 0);
    let experts = Noise(5).experts(&shape);
    let error = rounds.pruner.prune(&experts, &shape, Budget::Ratio(0.5), &none).unwrap_err();
    assert!(matches!(error, Error::NeedsProbe { .. } | Error::NeedsUnitScores), "{error}");
    // Of every built-in pruner and allocator, too: nobody asks what nobody answers.
    for pruner in pruners() {
        let needs = pruner.needs();
        let table: &ScoreTable = if needs.granularity == Granularity::Unit { &units } else { &experts };
        let result = pruner.prune(table, &shape, Budget::Ratio(0.5), &none);
        assert_eq!(needs.probe.any(), matches!(result, Err(Error::NeedsProbe { .. })), "{pruner:?}: {result:?}");
    }
}

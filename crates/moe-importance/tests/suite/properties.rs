//! What holds for every scorer in every configuration.
#![cfg(feature = "flex")]

use crate::common;

use std::collections::BTreeSet;

use common::catalog::{catalog, scorers};
use common::provenance;
use common::world::World;
use moe_checkpoint::{Granularity, Pool, Reduction, ScoreTable, Statistics, StatisticsStore};
use moe_importance::{Collection, Scorer, ScorerConfig, StatisticId};
use proptest::prelude::*;

const SEQUENCES: [(usize, usize); 4] = [(7, 6), (12, 11), (3, 0), (9, 8)];

fn world(seed: u64) -> World {
    World::random(10, &[5, 6, 0, 5, 4], 2, &SEQUENCES, seed)
}

fn needs() -> Vec<StatisticId> {
    let ids: BTreeSet<StatisticId> = scorers().iter().flat_map(|scorer| scorer.needs().statistics).collect();
    ids.into_iter().collect()
}

/// Whether a score depends on the place of its unit or on how the data is cut, by definition.
fn depends_on_place(scorer: &dyn Scorer) -> bool {
    scorer.name() == "random"
}

fn depends_on_waves(scorer: &dyn Scorer) -> bool {
    let recipe = scorer.recipe().to_string();
    recipe.contains(r#""sample":"wave""#) || recipe.contains(r#""clip":true"#)
}

fn bits(table: &ScoreTable) -> Vec<u32> {
    table.layers.iter().flat_map(|l| l.scores.iter().flatten()).map(|s| s.to_bits()).collect()
}

fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f32, |a, b| a.max(b.abs()));
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * largest, "{what}: score {i} is {a}, expected {b} (largest {largest})");
    }
}

#[test]
fn the_catalog_has_every_scorer() {
    let all = scorers();
    let names: BTreeSet<&str> = all.iter().map(|scorer| scorer.name()).collect();
    assert_eq!(names, BTreeSet::from_iter(ScorerConfig::NAMES.iter().copied()));
    let distinct: BTreeSet<String> = scorers().iter().map(|scorer| scorer.recipe().to_string()).collect();
    assert_eq!(distinct.len(), catalog().len(), "no configuration twice");
}

#[test]
fn recipes_survive_a_round_trip_and_unknown_fields_are_named() {
    for json in catalog() {
        let config: ScorerConfig = serde_json::from_str(&json).unwrap();
        let scorer = config.build().unwrap();
        let back: ScorerConfig = serde_json::from_str(&scorer.recipe().to_string()).unwrap();
        assert_eq!(back, config, "{json}");
        assert_eq!(back.build().unwrap().recipe(), scorer.recipe());
        let unknown = json.replacen('{', r#"{"fantasy":1,"#, 1);
        let error = serde_json::from_str::<ScorerConfig>(&unknown).unwrap_err().to_string();
        let expected = format!("scorer `{}`: field `fantasy`: unknown field `fantasy`", scorer.name());
        assert!(error.contains(&expected), "{error}");
    }
}

#[test]
fn every_scorer_is_finite_where_nobody_is_routed() {
    let world = world(1);
    let statistics = world.collect(&needs());
    for scorer in scorers() {
        // A score table refuses numbers that are not finite.
        let table = scorer.score(&statistics, &world).unwrap();
        table.validate_for(&world.shape()).unwrap();
        assert_eq!(table.granularity, scorer.needs().granularity);
        assert_eq!(table.scorer, scorer.recipe().to_string());
        let of_data = !scorer.needs().statistics.is_empty();
        for layer in &table.layers {
            if let Some(routed) = layer.routed.as_ref().filter(|_| of_data) {
                assert_eq!((routed[4], routed.iter().sum::<u64>()), (0, 62), "{}", scorer.recipe());
            }
            // What reads routed tokens alone is exactly 0 there.
            let whole_router = ["bias", "router_score", "router_taylor", "units"].contains(&scorer.name());
            if of_data && !whole_router {
                assert!(layer.scores[4].iter().all(|score| *score == 0.0), "{}", scorer.recipe().to_string());
            }
        }
    }
}

#[test]
fn one_collection_serves_all_scorers_and_each_alone() {
    let world = world(2);
    let all = world.collect(&needs());
    for scorer in scorers() {
        let alone = scorer.score(&world.collect(&scorer.needs().statistics), &world).unwrap();
        let shared = scorer.score(&all, &world).unwrap();
        assert_eq!(bits(&alone), bits(&shared), "{}", scorer.recipe());
    }
}

#[test]
fn a_second_run_has_the_bits_of_the_first() {
    let (first, second) = (world(3), world(3));
    let statistics = [first.collect(&needs()), second.collect(&needs())];
    assert_eq!(statistics[0], statistics[1]);
    for scorer in scorers() {
        let [a, b] = [(&statistics[0], &first), (&statistics[1], &second)].map(|(s, w)| scorer.score(s, w).unwrap());
        assert_eq!(bits(&a), bits(&b), "{}", scorer.recipe());
    }
}

/// The waves of the world, a sequence each, in a store.
fn store(world: &World, directory: &std::path::Path, waves: impl IntoIterator<Item = usize>) -> StatisticsStore {
    let shape = world.shape();
    let mut store = StatisticsStore::create_or_resume(directory, &shape, &provenance()).unwrap();
    for wave in waves {
        let mut collection = Collection::new(&shape, provenance(), &needs()).unwrap();
        world.observe(wave as u64, wave..wave + 1, &mut collection).unwrap();
        store.write(&collection.take().unwrap()).unwrap();
    }
    store
}

#[test]
fn resumed_and_sharded_collections_have_the_bits_of_one_and_merged_ones_its_scores() {
    let world = world(4);
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let whole = store(&world, &at("whole"), 0..4).fold().unwrap();
    drop(store(&world, &at("resumed"), 0..2));
    assert_eq!(store(&world, &at("resumed"), 2..4).fold().unwrap(), whole);
    store(&world, &at("odd"), [1, 3]);
    let mut even = store(&world, &at("even"), [2, 0]);
    even.absorb(at("odd")).unwrap();
    assert_eq!(even.fold().unwrap(), whole);
    let path = at("statistics.safetensors");
    whole.save(&path).unwrap();
    assert_eq!(Statistics::load(&path).unwrap(), whole);

    let once = world.collect(&needs());
    assert_eq!((once.tokens(), once.sequences()), (whole.tokens(), whole.sequences()));
    for scorer in scorers().into_iter().filter(|scorer| !depends_on_waves(scorer.as_ref())) {
        let [once, merged] = [&once, &whole].map(|statistics| scorer.score(statistics, &world).unwrap());
        for (once, merged) in once.layers.iter().zip(&merged.layers) {
            assert_eq!(once.routed, merged.routed);
            assert_close(&merged.scores.concat(), &once.scores.concat(), 2e-6, &scorer.recipe().to_string());
        }
    }
}

#[test]
fn every_scorer_feeds_units_and_experts() {
    let world = world(5);
    let statistics = world.collect(&needs());
    for json in catalog() {
        let config: ScorerConfig = serde_json::from_str(&json).unwrap();
        let magnitude: ScorerConfig = serde_json::from_str(r#"{"type":"magnitude"}"#).unwrap();
        let units = config.clone().into_units(magnitude).unwrap().build().unwrap();
        let own = config.build().unwrap();
        let sum = config.clone().into_experts(Reduction::Sum);
        let adds_up = own.needs().granularity == Granularity::Expert || own.needs().additive.is_some();
        assert_eq!(sum.is_ok(), adds_up, "{json}");
        let experts = sum.or_else(|_| config.clone().into_experts(Reduction::Mean)).unwrap().build().unwrap();
        let original = own.score(&statistics, &world).unwrap();
        let statistics = world.collect(&[units.needs().statistics, experts.needs().statistics].concat());
        let (units, experts) = (units.score(&statistics, &world).unwrap(), experts.score(&statistics, &world).unwrap());
        units.validate_for(&world.shape()).unwrap();
        experts.validate_for(&world.shape()).unwrap();
        assert_eq!((units.granularity, experts.granularity), (Granularity::Unit, Granularity::Expert));
        if original.granularity == Granularity::Unit {
            assert_eq!(bits(&units), bits(&original), "{json}");
            continue;
        }
        assert_eq!(bits(&experts), bits(&original), "{json}");
        // Units of a lower expert all come before those of a higher one, wherever the two may be compared.
        let of = |table: &ScoreTable| -> Vec<(usize, Vec<f32>)> {
            table.layers.iter().flat_map(|l| l.scores.iter().map(|s| (l.layer, s.clone()))).collect()
        };
        let pairs: Vec<_> = of(&original).into_iter().map(|(layer, s)| (layer, s[0])).zip(of(&units)).collect();
        for ((layer, a), (_, a_units)) in &pairs {
            let comparable = |other: usize| original.pool == Pool::Global || other == *layer;
            for ((_, b), (_, b_units)) in pairs.iter().filter(|((other, b), _)| comparable(*other) && a < b) {
                assert!(a_units.iter().all(|x| b_units.iter().all(|y| x < y)), "{json}: {a} and {b}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn permuted_experts_and_units_permute_the_scores(
        seed in 0u64..1000,
        experts in Just((0..5).collect::<Vec<usize>>()).prop_shuffle(),
        orders in [5usize, 6, 0, 5, 4].map(|n| Just((0..n).collect::<Vec<usize>>()).prop_shuffle()),
    ) {
        let world = world(seed);
        let permuted = world.permute(1, &experts, &orders);
        let (before, after) = (world.collect(&needs()), permuted.collect(&needs()));
        for scorer in scorers().into_iter().filter(|scorer| !depends_on_place(scorer.as_ref())) {
            let (before, after) = (scorer.score(&before, &world).unwrap(), scorer.score(&after, &permuted).unwrap());
            assert_close(&after.layers[0].scores.concat(), &before.layers[0].scores.concat(), 3e-6, &scorer.recipe().to_string());
            let expected: Vec<f32> = experts
                .iter()
                .flat_map(|from| {
                    let scores = &before.layers[1].scores[*from];
                    match scorer.needs().granularity {
                        Granularity::Unit => orders[*from].iter().map(|unit| scores[*unit]).collect(),
                        Granularity::Expert => scores.clone(),
                    }
                })
                .collect();
            assert_close(&after.layers[1].scores.concat(), &expected, 3e-6, &scorer.recipe().to_string());
        }
    }
}

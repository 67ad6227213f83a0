//! Score tables: validation, their file, and conversion between units and experts.

use std::fs;

use moe_checkpoint::{
    Denominator, Error, Granularity, LayerScores, MoeLayerShape, MoeShape, Pool, Provenance, Reduction, ScoreTable,
};
use proptest::prelude::*;
use safetensors::SafeTensors;
use tempfile::tempdir;

fn table(granularity: Granularity, pool: Pool, layers: Vec<(usize, Vec<Vec<f32>>)>) -> ScoreTable {
    ScoreTable {
        scorer: r#"{"type":"test"}"#.into(),
        granularity,
        pool,
        additive: Some(pool),
        denominator: Denominator::AllTokens,
        layers: layers
            .into_iter()
            .map(|(layer, scores)| LayerScores { layer, scores, routed: None, whole: None })
            .collect(),
        provenance: Provenance::new("model", "data", "{}"),
    }
}

fn units(pool: Pool, layers: Vec<(usize, Vec<Vec<f32>>)>) -> ScoreTable {
    table(Granularity::Unit, pool, layers)
}

fn experts(pool: Pool, layers: Vec<(usize, Vec<f32>)>) -> ScoreTable {
    let layers = layers.into_iter().map(|(layer, values)| (layer, values.into_iter().map(|v| vec![v]).collect()));
    table(Granularity::Expert, pool, layers.collect())
}

fn any_layers() -> impl Strategy<Value = Vec<(usize, Vec<Vec<f32>>)>> {
    let expert = prop::collection::vec(-1e6f32..1e6, 0..6);
    prop::collection::btree_map(0usize..40, prop::collection::vec(expert, 1..5), 1..5)
        .prop_map(|layers| layers.into_iter().collect())
}

proptest! {
    #[test]
    fn round_trip(layers in any_layers(), counts in prop::option::of(0u64..1 << 40)) {
        let directory = tempdir().unwrap();
        let path = directory.path().join("scores.safetensors");
        let mut table = units(Pool::Layer, layers);
        for layer in &mut table.layers {
            layer.routed = counts.map(|count| (0..layer.scores.len() as u64).map(|e| count + e).collect());
        }
        table.save(&path).unwrap();
        prop_assert_eq!(ScoreTable::load(&path).unwrap(), table);
    }

    #[test]
    fn broken_files_do_not_panic(cut in 0usize..2000, at in 0usize..2000, with in any::<u8>()) {
        let directory = tempdir().unwrap();
        let path = directory.path().join("scores.safetensors");
        units(Pool::Global, vec![(3, vec![vec![1.0, 2.0], vec![3.0]])]).save(&path).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..cut.min(bytes.len() - 1)]).unwrap();
        prop_assert!(ScoreTable::load(&path).is_err());
        let at = at % bytes.len();
        bytes[at] = with;
        fs::write(&path, bytes).unwrap();
        let _ = ScoreTable::load(&path);
    }

    /// The ranks order units exactly as the pairs (expert score, tie-breaker) do.
    #[test]
    fn broadcast_is_lexicographic(
        layers in prop::collection::vec(
            prop::collection::vec((0u8..4, prop::collection::vec(0u8..4, 0..5)), 1..5), 1..4),
    ) {
        let number = |v: &u8| f32::from(*v) - 1.5;
        let enumerated = || layers.iter().enumerate();
        let experts = experts(Pool::Global, enumerated().map(|(l, es)| (l, es.iter().map(|e| number(&e.0)).collect())).collect());
        let ties = units(
            Pool::Global,
            enumerated().map(|(l, es)| (l, es.iter().map(|e| e.1.iter().map(number).collect()).collect())).collect(),
        );
        let ranked = ScoreTable::broadcast(&experts, &ties).unwrap();
        let mut pairs = Vec::new();
        for (layer, experts) in enumerated() {
            for (expert, (score, ties)) in experts.iter().enumerate() {
                for (unit, tie) in ties.iter().enumerate() {
                    pairs.push(((*score, *tie), ranked.layers[layer].scores[expert][unit]));
                }
            }
        }
        for (a, rank_a) in &pairs {
            for (b, rank_b) in &pairs {
                prop_assert_eq!(a.cmp(b), rank_a.total_cmp(rank_b));
            }
        }
    }
}

#[test]
fn the_file_has_one_tensor_per_layer() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("scores.safetensors");
    units(Pool::Global, vec![(1, vec![vec![1.0, 2.0], vec![3.0]]), (5, vec![vec![4.0, 5.0]; 3])]).save(&path).unwrap();
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("layer.1").unwrap().shape(), [2, 2]);
    assert_eq!(file.tensor("layer.5").unwrap().shape(), [3, 2]);
    let padding = f32::from_le_bytes(file.tensor("layer.1").unwrap().data()[12..].try_into().unwrap());
    assert!(padding.is_nan());
}

#[test]
fn numbers_must_be_finite_and_the_place_is_named() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let table = units(Pool::Global, vec![(4, vec![vec![0.0], vec![0.0, bad]])]);
        let message = table.validate().unwrap_err().to_string();
        assert!(message.contains("layer 4, expert 1, unit 1"), "{message}");
        assert!(table.save(tempdir().unwrap().path().join("t")).is_err());
    }
}

#[test]
fn a_table_of_another_shape_is_refused() {
    let layer = |layer, widths: &[usize]| MoeLayerShape { layer, widths: widths.to_vec() };
    let shape = |layers| MoeShape { gateless: false, hidden_size: 4, top_k: 1, layers };
    let table = units(Pool::Global, vec![(1, vec![vec![1.0, 2.0], vec![3.0]])]);
    table.validate_for(&shape(vec![layer(1, &[2, 1])])).unwrap();
    for (other, part) in [
        (shape(vec![layer(0, &[2, 1])]), "MoE layers [1]"),
        (shape(vec![layer(1, &[2, 1, 1])]), "2 experts"),
        (shape(vec![layer(1, &[2, 2])]), "expert 1"),
    ] {
        let message = table.validate_for(&other).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    experts(Pool::Global, vec![(1, vec![0.5, 0.25])]).validate_for(&shape(vec![layer(1, &[7, 9])])).unwrap();
}

#[test]
fn reductions() {
    let table = units(Pool::Layer, vec![(0, vec![vec![1.0, 2.0, 6.0], vec![], vec![-1.0]])]);
    let values = |reduction| table.to_experts(reduction).unwrap().layers[0].scores.concat();
    assert_eq!(values(Reduction::Sum), [9.0, 0.0, -1.0]);
    assert_eq!(values(Reduction::Mean), [3.0, 0.0, -1.0]);
    assert_eq!(values(Reduction::Max), [6.0, 0.0, -1.0]);
    let top = |n| Reduction::Top(std::num::NonZeroUsize::new(n).unwrap());
    assert_eq!(values(top(1)), values(Reduction::Max));
    assert_eq!(values(top(2)), [4.0, 0.0, -1.0]);
    assert_eq!(values(top(9)), values(Reduction::Mean));
    assert_eq!(serde_json::to_string(&top(2)).unwrap(), r#"{"top":2}"#);
    let reduced = table.to_experts(Reduction::Sum).unwrap();
    assert_eq!((reduced.granularity, reduced.pool), (Granularity::Expert, Pool::Layer));
    assert_eq!(reduced.additive, Some(Pool::Layer));
    assert_eq!(table.to_experts(Reduction::Mean).unwrap().additive, None, "means of experts do not add up");
    let within = ScoreTable { additive: Some(Pool::Expert), ..table.clone() };
    assert_eq!(within.to_experts(Reduction::Sum).unwrap().additive, None, "what adds up within an expert only");
    let shares = ScoreTable { additive: None, ..table.clone() };
    let error = shares.to_experts(Reduction::Sum).unwrap_err().to_string();
    assert!(error.contains(r#"scores of `{"type":"test"}` may not be added"#), "{error}");
    assert!(shares.to_experts(Reduction::Max).is_ok());
    assert_eq!(reduced.to_experts(Reduction::Max).unwrap(), reduced);
    let large = units(Pool::Layer, vec![(0, vec![vec![f32::MAX, f32::MAX]])]);
    assert!(matches!(large.to_experts(Reduction::Sum), Err(Error::NonFinite { .. })));
}

#[test]
fn a_narrow_tie_breaker_is_only_read_inside_its_pool() {
    let equal = experts(Pool::Global, vec![(0, vec![0.0, 0.0]), (1, vec![0.0, 0.0])]);
    let ties = vec![(0, vec![vec![9.0, 8.0], vec![1.0, 2.0]]), (1, vec![vec![0.0, 0.0], vec![5.0, 4.0]])];
    let ranks = |pool| {
        let table = ScoreTable::broadcast(&equal, &units(pool, ties.clone())).unwrap();
        assert_eq!(table.pool, Pool::Global);
        table.layers.into_iter().map(|l| l.scores).collect::<Vec<_>>()
    };
    assert_eq!(ranks(Pool::Expert), [[[1.0, 0.0], [2.0, 3.0]], [[4.0, 4.0], [6.0, 5.0]]]);
    assert_eq!(ranks(Pool::Layer), [[[3.0, 2.0], [0.0, 1.0]], [[4.0, 4.0], [6.0, 5.0]]]);
    assert_eq!(ranks(Pool::Global), [[[6.0, 5.0], [1.0, 2.0]], [[0.0, 0.0], [4.0, 3.0]]]);
}

#[test]
fn broadcast_refuses_tables_that_do_not_fit() {
    let unit_table = units(Pool::Global, vec![(0, vec![vec![1.0], vec![2.0]])]);
    let expert_table = experts(Pool::Global, vec![(0, vec![1.0, 2.0])]);
    assert!(ScoreTable::broadcast(&unit_table, &unit_table).is_err());
    assert!(ScoreTable::broadcast(&expert_table, &expert_table).is_err());
    let fewer = units(Pool::Global, vec![(0, vec![vec![1.0]])]);
    assert!(ScoreTable::broadcast(&expert_table, &fewer).is_err());
    let mut foreign = unit_table.clone();
    foreign.provenance.model = "other".into();
    assert!(ScoreTable::broadcast(&expert_table, &foreign).is_err());
    ScoreTable::broadcast(&expert_table, &unit_table).unwrap();
}

#[test]
fn pools_are_ordered() {
    assert!(Pool::Global.supports(Pool::Layer) && Pool::Layer.supports(Pool::Expert));
    assert!(!Pool::Expert.supports(Pool::Layer) && !Pool::Layer.supports(Pool::Global));
}

#[test]
fn nothing_adds_up_over_more_than_it_may_be_compared_over() {
    let wide = ScoreTable { additive: Some(Pool::Global), ..units(Pool::Layer, vec![(0, vec![vec![1.0]])]) };
    let error = wide.validate().unwrap_err().to_string();
    assert!(error.contains("additive: found global, expected layer at most"), "{error}");
    assert!(units(Pool::Layer, vec![]).adds_up(Pool::Expert) && !units(Pool::Layer, vec![]).adds_up(Pool::Global));
}

#[test]
fn a_table_of_the_first_version_may_not_be_added_up() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("scores.safetensors");
    let table = units(Pool::Global, vec![(1, vec![vec![1.0, 2.0], vec![3.0]])]);
    table.save(&path).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    // The header's JSON is JSON in a string; as long as before, so that nothing moves.
    for (from, to) in
        [(r#"\"version\":2"#, r#"\"version\":1"#), (r#"\"additive\":\"global\""#, r#"\"ignored_\":\"global\""#)]
    {
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    }
    fs::write(&path, bytes).unwrap();
    assert_eq!(ScoreTable::load(&path).unwrap(), ScoreTable { additive: None, ..table });
}

#[test]
fn tables_of_several_domains_are_added_with_weights() {
    let of = |data: &str, scores: [f32; 3], routed: Option<Vec<u64>>| {
        let mut table = units(Pool::Layer, vec![(4, vec![scores[..2].to_vec(), scores[2..].to_vec()])]);
        table.layers[0].routed = routed;
        table.provenance.data = data.into();
        table
    };
    let (code, prose) = (of("code", [1.0, 2.0, 4.0], Some(vec![3, 0])), of("prose", [0.5, 0.0, 8.0], Some(vec![1, 0])));
    let sum = ScoreTable::weighted_sum(&[(0.5, &code), (2.0, &prose)]).unwrap();
    assert_eq!(sum.layers[0].scores, [vec![1.5, 1.0], vec![18.0]]);
    assert_eq!(sum.layers[0].routed, Some(vec![4, 0]));
    assert_eq!((sum.pool, sum.additive, sum.denominator), (Pool::Layer, Some(Pool::Layer), Denominator::AllTokens));
    let recipe: serde_json::Value = serde_json::from_str(&sum.provenance.recipe).unwrap();
    assert_eq!(recipe["sum"][1], serde_json::json!({ "weight": 2.0, "data": "prose", "recipe": "{}" }));
    assert_ne!(sum.provenance.data, ScoreTable::weighted_sum(&[(2.0, &prose), (0.5, &code)]).unwrap().provenance.data);
    let silent = of("speech", [0.0; 3], None);
    assert_eq!(ScoreTable::weighted_sum(&[(1.0, &code), (1.0, &silent)]).unwrap().layers[0].routed, None);
    let alone = ScoreTable::weighted_sum(&[(1.0, &code)]).unwrap();
    assert_eq!(alone.layers, code.layers);

    let refused = |weights: [f64; 2], other: &ScoreTable| {
        ScoreTable::weighted_sum(&[(weights[0], &code), (weights[1], other)]).unwrap_err().to_string()
    };
    let changed = |change: &dyn Fn(&mut ScoreTable)| {
        let mut table = prose.clone();
        change(&mut table);
        refused([1.0, 1.0], &table)
    };
    for (error, part) in [
        (ScoreTable::weighted_sum(&[]).unwrap_err().to_string(), "found 0, expected at least 1"),
        (refused([1.0, -1.0], &prose), "table 1: weight: found -1, expected a number of 0 or more"),
        (refused([1.0, f64::NAN], &prose), "table 1: weight: found NaN"),
        (refused([0.0, 0.0], &prose), "weights: found 0 for every table"),
        (refused([1.0, 1.0], &code), "table 1: data: found `code`, which table 0 has already"),
        (changed(&|t| t.scorer = "{}".into()), "table 1: scorer: found {}, expected"),
        (changed(&|t| t.pool = Pool::Global), "table 1: pool: found global, expected layer as in table 0"),
        (changed(&|t| t.additive = None), "table 1: additive: found nothing, expected layer"),
        (
            changed(&|t| t.denominator = Denominator::RoutedTokens),
            "denominator: found routed_tokens, expected all_tokens",
        ),
        (changed(&|t| t.provenance.model = "other".into()), "table 1: model: found other, expected model"),
        (changed(&|t| t.layers[0].layer = 5), "table 1: MoE layers: found [5], expected [4]"),
        (changed(&|t| t.layers[0].scores[0].push(1.0)), "scores per expert of layer 4: found [3, 1], expected [2, 1]"),
    ] {
        assert!(error.contains(part), "{error}: {part}");
    }
    let experts = experts(Pool::Layer, vec![(4, vec![1.0, 1.0])]);
    let ranks = ScoreTable::broadcast(
        &experts,
        &units(Pool::Layer, code.layers.iter().map(|l| (4, l.scores.clone())).collect()),
    );
    let error = ScoreTable::weighted_sum(&[(1.0, &ranks.unwrap())]).unwrap_err().to_string();
    assert!(error.contains("ranks cannot be added"), "{error}");
    assert!(
        refused([1.0, 1.0], &ScoreTable { provenance: prose.provenance.clone(), ..experts }).contains("granularity")
    );
}

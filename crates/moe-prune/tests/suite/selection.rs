//! What is selected: the drop rules of Fisher-MoE, budgets, floors, width multiples, protection.

use moe_checkpoint::{
    Denominator, Granularity, LayerScores, MoeLayerShape, MoeShape, Pool, Provenance, Reduction, ScoreTable,
};
use moe_prune::{Budget, Error, ProtectionMask, Pruned, Pruner, PrunerConfig, Scope, UnitPruner};
use proptest::prelude::*;

const SCOPES: [Scope; 3] = [Scope::Expert, Scope::Layer, Scope::Global];

fn table(layers: &[(usize, Vec<Vec<f32>>)]) -> (ScoreTable, MoeShape) {
    let widths = |scores: &[Vec<f32>]| scores.iter().map(Vec::len).collect();
    let shape = MoeShape {
        gateless: false,
        hidden_size: 4,
        top_k: 1,
        layers: layers.iter().map(|(layer, s)| MoeLayerShape { layer: *layer, widths: widths(s) }).collect(),
    };
    let scores = ScoreTable {
        scorer: r#"{"type":"test"}"#.into(),
        granularity: Granularity::Unit,
        pool: Pool::Global,
        additive: Some(Pool::Global),
        denominator: Denominator::AllTokens,
        layers: layers
            .iter()
            .map(|(layer, scores)| LayerScores { layer: *layer, scores: scores.clone(), routed: None, whole: None })
            .collect(),
        provenance: Provenance::new("model", "data", "{}"),
    };
    (scores, shape)
}

fn prune(pruner: &UnitPruner, layers: &[(usize, Vec<Vec<f32>>)], budget: Budget) -> Result<Pruned, Error> {
    let (scores, shape) = table(layers);
    pruner.prune(&scores, &shape, budget, &ProtectionMask::none())
}

fn kept(pruned: &Pruned) -> Vec<Vec<Vec<u32>>> {
    pruned.plan.kept.iter().map(|layer| layer.experts.clone()).collect()
}

/// The rule as the method page has it: stable ascending sort over natural order, the first `floor(N * ratio)` go.
fn reference(layers: &[(usize, Vec<Vec<f32>>)], scope: Scope, ratio: f64) -> Vec<Vec<Vec<u32>>> {
    let mut kept: Vec<Vec<Vec<u32>>> =
        layers.iter().map(|(_, s)| s.iter().map(|u| (0..u.len() as u32).collect()).collect()).collect();
    let mut pools: Vec<Vec<(f32, usize, usize, u32)>> = Vec::new();
    for (l, (_, experts)) in layers.iter().enumerate() {
        for (e, units) in experts.iter().enumerate() {
            let new = match scope {
                Scope::Expert => true,
                Scope::Layer => e == 0,
                Scope::Global => l == 0 && e == 0,
            };
            if new {
                pools.push(Vec::new());
            }
            let pool = pools.last_mut().unwrap();
            pool.extend(units.iter().enumerate().map(|(u, score)| (*score, l, e, u as u32)));
        }
    }
    for mut pool in pools {
        pool.sort_by(|a, b| a.0.partial_cmp(&b.0).unwrap());
        let drop = (pool.len() as f64 * ratio).floor() as usize;
        for (_, l, e, unit) in &pool[..drop] {
            kept[*l][*e].retain(|u| u != unit);
        }
    }
    kept
}

/// Ragged layers, with few distinct values so that ties abound.
fn any_layers() -> impl Strategy<Value = Vec<(usize, Vec<Vec<f32>>)>> {
    let value = prop_oneof![(0u8..5).prop_map(|v| f32::from(v) - 1.0), Just(-0.0f32), -10.0f32..10.0];
    let expert = prop::collection::vec(value, 0..20);
    prop::collection::btree_map(0usize..40, prop::collection::vec(expert, 1..6), 1..5)
        .prop_map(|layers| layers.into_iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_scope_is_the_stable_sort(layers in any_layers(), ratio in 0.01f64..0.99) {
        for scope in SCOPES {
            let pruned = prune(&UnitPruner::new(scope).round_to(1), &layers, Budget::Ratio(ratio)).unwrap();
            prop_assert_eq!(kept(&pruned), reference(&layers, scope, ratio), "scope {}", scope);
            prop_assert_eq!(pruned.allocation.dropped, pruned.allocation.asked_dropped);
        }
    }

    #[test]
    fn parameter_budgets_are_met_to_the_unit(layers in any_layers(), share in 0.0f64..1.0) {
        let (scores, shape) = table(&layers);
        prop_assume!(shape.parameters() > 2);
        let count = 1 + (share * (shape.parameters() - 2) as f64) as u64;
        let none = ProtectionMask::none();
        for scope in SCOPES {
            let pruner = UnitPruner::new(scope).round_to(1);
            let keep = pruner.prune(&scores, &shape, Budget::KeepParameters(count), &none).unwrap();
            let drop = pruner.prune(&scores, &shape, Budget::DropParameters(count), &none).unwrap();
            let dropped = shape.parameters() - drop.allocation.cost;
            prop_assert!(keep.allocation.cost <= count && dropped >= count, "scope {}", scope);
            if scope != Scope::Expert {
                prop_assert!(count - keep.allocation.cost < 12 && dropped - count < 12, "scope {}", scope);
            }
        }
    }

    /// Widths are multiples, the total is the nearest multiple at or above the budget, whatever the scope. Widths of
    /// the model are multiples here, as in every real one.
    #[test]
    fn widths_are_multiples_and_the_rounded_budget_is_met(
        blocks in prop::collection::vec(prop::collection::vec(0usize..5, 1..5), 1..5),
        multiple in 1usize..9,
        ratio in 0.01f64..0.99,
        seed in any::<u32>(),
    ) {
        let mut state = seed;
        let mut value = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 24) as f32
        };
        let layers: Vec<(usize, Vec<Vec<f32>>)> = blocks
            .iter()
            .enumerate()
            .map(|(l, experts)| {
                (l, experts.iter().map(|n| (0..n * multiple).map(|_| value()).collect()).collect())
            })
            .collect();
        for scope in [Scope::Layer, Scope::Global] {
            let pruner = UnitPruner::new(scope).round_to(multiple);
            let pruned = prune(&pruner, &layers, Budget::Ratio(ratio)).unwrap();
            let shape = pruned.plan.pruned_shape();
            prop_assert!(shape.layers.iter().flat_map(|l| &l.widths).all(|w| w % multiple == 0));
            let asked = pruned.plan.shape.units() - pruned.allocation.asked_dropped;
            prop_assert_eq!(shape.units(), asked.next_multiple_of(multiple), "scope {}", scope);
            let exact = prune(&pruner.clone().exact(true), &layers, Budget::Ratio(ratio));
            if asked.is_multiple_of(multiple) {
                prop_assert_eq!(exact.unwrap().plan.kept, pruned.plan.kept);
            } else {
                prop_assert!(matches!(exact, Err(Error::Inexact { .. })), "expected a refusal");
            }
        }
        let pruned = prune(&UnitPruner::new(Scope::Expert).round_to(multiple), &layers, Budget::Ratio(ratio)).unwrap();
        for (layer, kept) in layers.iter().zip(&pruned.plan.kept) {
            for (units, kept) in layer.1.iter().zip(&kept.experts) {
                let width = units.len() - (units.len() as f64 * ratio).floor() as usize;
                prop_assert_eq!(kept.len(), width.next_multiple_of(multiple));
            }
        }
    }

    #[test]
    fn protected_units_and_minimum_widths_hold(
        layers in any_layers(),
        ratio in 0.01f64..0.99,
        min_width in 0usize..6,
        protect in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..6),
        whole in any::<bool>(),
    ) {
        let (scores, shape) = table(&layers);
        let mut mask = ProtectionMask::none();
        for (l, e, u) in protect {
            let layer = &shape.layers[l.index(shape.layers.len())];
            let expert = e.index(layer.widths.len());
            if whole {
                mask.protect_expert(layer.layer, expert);
            } else if layer.widths[expert] > 0 {
                mask.protect_unit(layer.layer, expert, u.index(layer.widths[expert]) as u32);
            }
        }
        for scope in SCOPES {
            let pruner = UnitPruner::new(scope).round_to(1).min_width(min_width);
            let pruned = match pruner.prune(&scores, &shape, Budget::Ratio(ratio), &mask) {
                Ok(pruned) => pruned,
                Err(Error::Infeasible { .. }) => continue,
                Err(other) => return Err(TestCaseError::fail(other.to_string())),
            };
            prop_assert_eq!(pruned.allocation.dropped, pruned.allocation.asked_dropped);
            for (layer, kept) in shape.layers.iter().zip(&pruned.plan.kept) {
                for (expert, (width, kept)) in layer.widths.iter().zip(&kept.experts).enumerate() {
                    prop_assert!(kept.len() >= min_width.min(*width));
                    for unit in 0..*width as u32 {
                        prop_assert!(!mask.is_protected(layer.layer, expert, unit) || kept.contains(&unit));
                    }
                }
            }
        }
    }

    /// Experts in another order give the same plan in that order, where scores are distinct.
    #[test]
    fn permuting_experts_permutes_the_plan(
        order in Just((0usize..6).collect::<Vec<_>>()).prop_shuffle(),
        values in Just((0u16..6 * 8).map(f32::from).collect::<Vec<_>>()).prop_shuffle(),
        ratio in 0.01f64..0.99,
        multiple in prop::sample::select(vec![1usize, 2]),
    ) {
        // Distinct sums of pairs too.
        let experts: Vec<Vec<f32>> = values.chunks(8).map(|c| c.iter().map(|v| v * v * 1.001 + v).collect()).collect();
        let permuted: Vec<Vec<f32>> = order.iter().map(|e| experts[*e].clone()).collect();
        for scope in SCOPES {
            let pruner = UnitPruner::new(scope).round_to(multiple);
            let plain = kept(&prune(&pruner, &[(3, experts.clone())], Budget::Ratio(ratio)).unwrap());
            let other = kept(&prune(&pruner, &[(3, permuted.clone())], Budget::Ratio(ratio)).unwrap());
            let expected: Vec<_> = order.iter().map(|e| plain[0][*e].clone()).collect();
            prop_assert_eq!(&other[0], &expected, "scope {}", scope);
        }
    }

    #[test]
    fn the_same_request_gives_the_same_plan(layers in any_layers(), ratio in 0.01f64..0.99) {
        for scope in SCOPES {
            let pruner = UnitPruner::new(scope);
            let json = |pruned: Result<Pruned, Error>| pruned.unwrap().plan.to_json().unwrap();
            let budget = Budget::Ratio(ratio);
            prop_assert_eq!(json(prune(&pruner, &layers, budget)), json(prune(&pruner, &layers, budget)));
        }
    }
}

#[test]
fn ties_drop_the_lower_index_first() {
    let zeros = vec![(1, vec![vec![0.0; 3]; 2]), (4, vec![vec![0.0; 3]; 2])];
    let dropped =
        |scope, ratio| kept(&prune(&UnitPruner::new(scope).round_to(1), &zeros, Budget::Ratio(ratio)).unwrap());
    // floor(12 * 0.4) = 4, floor(6 * 0.4) = 2, floor(3 * 0.4) = 1.
    assert_eq!(dropped(Scope::Global, 0.4), [vec![vec![], vec![1, 2]], vec![vec![0, 1, 2], vec![0, 1, 2]]]);
    assert_eq!(dropped(Scope::Layer, 0.4), [[vec![2], vec![0, 1, 2]], [vec![2], vec![0, 1, 2]]]);
    assert_eq!(dropped(Scope::Expert, 0.4), [[[1, 2], [1, 2]], [[1, 2], [1, 2]]]);
    // floor(3 * 0.3) = 0: nothing goes.
    assert_eq!(dropped(Scope::Expert, 0.3), [[[0, 1, 2], [0, 1, 2]], [[0, 1, 2], [0, 1, 2]]]);
}

#[test]
fn blocks_of_a_width_multiple_go_by_their_sum() {
    // Blocks of two from the top: expert 0 has {1, 9} then {2, 3} by rank: (9 + 3) and (2 + 1); expert 1 has 4 + 4 and
    // 2 + 2.
    let layers = vec![(0, vec![vec![1.0, 9.0, 2.0, 3.0], vec![4.0, 2.0, 2.0, 4.0]])];
    let pruned = prune(&UnitPruner::new(Scope::Global).round_to(2), &layers, Budget::Ratio(0.3)).unwrap();
    // floor(8 * 0.3) = 2 units go: the block of sum 3.
    assert_eq!(kept(&pruned), [[vec![1, 3], vec![0, 1, 2, 3]]]);
    assert_eq!(pruned.allocation.predicted, Some(3.0));
    assert_eq!(pruned.allocation.cost, 6 * 12);
}

#[test]
fn a_width_that_is_no_multiple_loses_its_remainder_and_says_so() {
    let layers = vec![(0, vec![vec![5.0; 10], vec![6.0; 10]])];
    let pruner = UnitPruner::new(Scope::Global).round_to(8);
    let pruned = prune(&pruner, &layers, Budget::Ratio(0.1)).unwrap();
    assert_eq!((pruned.allocation.asked_dropped, pruned.allocation.dropped), (2, 4));
    assert_eq!((pruned.plan.ratio.asked, pruned.plan.ratio.achieved), (0.1, 0.2));
    let error = prune(&pruner.exact(true), &layers, Budget::Ratio(0.1)).unwrap_err().to_string();
    assert!(error.contains("2 units") && error.contains("multiple of 8 allow 4"), "{error}");
}

#[test]
fn floor_hits_are_reported() {
    let layers = vec![(0, vec![vec![0.0, 0.0, 0.0], vec![5.0, 6.0, 7.0]])];
    let pruner = UnitPruner::new(Scope::Global).min_width(1);
    let pruned = prune(&pruner, &layers, Budget::Ratio(0.5)).unwrap();
    assert_eq!(kept(&pruned), [[vec![2], vec![1, 2]]]);
    assert_eq!(pruned.allocation.floor_hits.len(), 1);
    assert_eq!((pruned.allocation.floor_hits[0].layer, pruned.allocation.floor_hits[0].expert), (0, 0));
    let error = prune(&pruner.min_width(2), &layers, Budget::Ratio(0.5)).unwrap_err();
    assert!(matches!(&error, Error::Infeasible { asked: 3, .. }) && error.to_string().contains("need 4"), "{error}");
}

#[test]
fn identical_layers_make_global_equal_to_the_layer_quota() {
    let layer = vec![vec![3.0, 1.0, 8.0, 5.0], vec![2.0, 9.0, 4.0, 7.0]];
    let layers: Vec<_> = (0..3).map(|l| (l, layer.clone())).collect();
    let plan = |scope| kept(&prune(&UnitPruner::new(scope), &layers, Budget::Ratio(0.5)).unwrap());
    assert_eq!(plan(Scope::Global), plan(Scope::Layer));
    // Raw scores are compared: a layer scored ten times higher keeps everything it can.
    let mut scaled = layers.clone();
    scaled[1].1.iter_mut().flatten().for_each(|score| *score *= 10.0);
    let global = kept(&prune(&UnitPruner::new(Scope::Global), &scaled, Budget::Ratio(0.5)).unwrap());
    assert_eq!(global[1].iter().map(Vec::len).sum::<usize>(), 8);
    let quota = kept(&prune(&UnitPruner::new(Scope::Layer), &scaled, Budget::Ratio(0.5)).unwrap());
    assert_eq!(quota, plan(Scope::Layer));
}

#[test]
fn scopes_need_scores_that_may_be_compared() {
    let layers = vec![(0, vec![vec![1.0, 2.0], vec![3.0, 4.0]])];
    let (mut scores, shape) = table(&layers);
    let refused = |scores: &ScoreTable, scope| {
        UnitPruner::new(scope).prune(scores, &shape, Budget::Ratio(0.5), &ProtectionMask::none()).err()
    };
    for (pool, allowed) in [(Pool::Expert, 1), (Pool::Layer, 2), (Pool::Global, 3)] {
        (scores.pool, scores.additive) = (pool, Some(pool));
        for (index, scope) in SCOPES.into_iter().enumerate() {
            let error = refused(&scores, scope);
            assert_eq!(error.is_none(), index < allowed, "{pool:?} {scope}");
            assert!(error.is_none_or(|e| matches!(e, Error::PoolTooNarrow { .. })));
        }
    }
    let experts = scores.to_experts(Reduction::Sum).unwrap();
    assert!(matches!(refused(&experts, Scope::Global), Some(Error::NeedsUnitScores)));
    let units = ScoreTable::broadcast(&experts, &scores).unwrap();
    assert!(refused(&units, Scope::Global).is_none());
    scores.layers[0].scores[1][0] = f32::NAN;
    let message = refused(&scores, Scope::Global).unwrap().to_string();
    assert!(message.contains("layer 0, expert 1, unit 0"), "{message}");
}

#[test]
fn parameters_are_checked() {
    let layers = vec![(0, vec![vec![1.0, 2.0], vec![3.0, 4.0]])];
    for bad in [0.0, 1.0, f64::NAN] {
        assert!(matches!(
            prune(&UnitPruner::new(Scope::Global), &layers, Budget::Ratio(bad)),
            Err(Error::InvalidParameter { field: "ratio", .. })
        ));
    }
    assert!(matches!(
        prune(&UnitPruner::new(Scope::Global).round_to(0), &layers, Budget::Ratio(0.5)),
        Err(Error::InvalidParameter { field: "round_to", .. })
    ));
    assert_eq!("layer".parse::<Scope>().unwrap(), Scope::Layer);
    assert!("Layer".parse::<Scope>().unwrap_err().to_string().contains("`expert`, `layer` or `global`"));
}

#[test]
fn a_never_routed_expert_is_emptied_first_and_reported() {
    let layers = vec![(2, vec![vec![1.0, 2.0, 3.0], vec![0.0, 0.0, 0.0]])];
    let (mut scores, shape) = table(&layers);
    scores.layers[0].routed = Some(vec![9, 0]);
    let none = ProtectionMask::none();
    let pruned = UnitPruner::new(Scope::Global).prune(&scores, &shape, Budget::Ratio(0.5), &none).unwrap();
    assert_eq!(kept(&pruned), [[vec![0, 1, 2], vec![]]]);
    assert_eq!(pruned.plan.never_routed.len(), 1);
    assert_eq!((pruned.plan.never_routed[0].layer, pruned.plan.never_routed[0].expert), (2, 1));
    // One width for all still keeps its share of it.
    let uniform = UnitPruner::new(Scope::Expert).round_to(1).prune(&scores, &shape, Budget::Ratio(0.5), &none).unwrap();
    assert_eq!(kept(&uniform), [[[1, 2], [1, 2]]]);
}

#[test]
fn recipes_are_json() {
    let pruner = PrunerConfig::Unit(UnitPruner::new(Scope::Layer).round_to(8).min_width(16));
    let json = serde_json::to_string(&pruner).unwrap();
    assert_eq!(
        json,
        r#"{"type":"unit","allocator":{"type":"layer"},"limits":{"round_to":8,"min_width":16,"exact":false}}"#
    );
    assert_eq!(serde_json::from_str::<PrunerConfig>(&json).unwrap(), pruner);
    let short: PrunerConfig = serde_json::from_str(r#"{"type":"unit","allocator":{"type":"global"}}"#).unwrap();
    assert_eq!(short, PrunerConfig::Unit(UnitPruner::new(Scope::Global)));
    assert!(serde_json::from_str::<PrunerConfig>(r#"{"type":"unit","allocator":{"type":"local"}}"#).is_err());
    let pruned = prune(&UnitPruner::new(Scope::Global), &[(0, vec![vec![1.0, 2.0]])], Budget::Ratio(0.5)).unwrap();
    assert_eq!(pruned.plan.recipe["budget"]["ratio"], 0.5);
    assert_eq!(pruned.plan.recipe["scorer"]["type"], "test");
}

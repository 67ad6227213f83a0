//! Rules on logits alone, against their definitions.

use moe_checkpoint::{GroupScore, Groups, Routing, RoutingKind};

use super::*;
use crate::{
    overlay::{LogitTransform, RouterTokens, RoutingRule},
    router::{Routed, Router},
    trace::{SequenceInfo, WaveInfo},
};

const E: usize = 6;

fn router(renormalize: bool) -> Router {
    Router::new(&Routing::new(2, RoutingKind::SoftmaxTopK { renormalize })).unwrap()
}

fn sigmoid() -> Router {
    let kind = RoutingKind::Sigmoid { renormalize: true, correction_bias: true, groups: None };
    Router::new(&Routing::new(3, kind)).unwrap()
}

fn wave(sequences: &[usize]) -> WaveInfo {
    let mut start = 0;
    let mut infos = Vec::new();
    for n in sequences {
        infos.push(SequenceInfo { tokens: start..start + n, loss_tokens: n - 1 });
        start += n;
    }
    WaveInfo { id: 0, tokens: start, ids: Vec::new(), sequences: infos }
}

fn logits(tokens: usize) -> Vec<f32> {
    // without ties
    (0..tokens * E).map(|i| (i as f32 * 12.9898 + 0.7).sin() * 2.0).collect()
}

fn tokens<'a>(router: &'a Router, logits: &'a [f32], experts: usize, wave: &'a WaveInfo) -> RouterTokens<'a> {
    RouterTokens { layer: 0, experts, logits, bias: None, input: None, router, table: None, wave }
}

/// Experts with a weight, by token.
fn sets(routed: &Routed) -> Vec<Vec<u32>> {
    let rows = routed.selected.chunks(routed.top_k).zip(routed.weights.chunks(routed.top_k));
    rows.map(|(s, w)| s.iter().zip(w).filter(|(_, w)| **w != 0.0).map(|(e, _)| *e).collect()).collect()
}

/// Compares the gradient of a rule with difference quotients of its weights, the members of each token unchanged.
fn check_gradient(rule: &dyn RoutingRule, router: &Router, wave: &WaveInfo) {
    let start = logits(wave.tokens);
    let at = tokens(router, &start, E, wave);
    let routed = rule.route(&at).unwrap();
    let d: Vec<f32> = (0..routed.weights.len()).map(|i| ((i * 7) % 5) as f32 - 1.7).collect();
    let found = rule.backward(&at, &routed, &d, false).unwrap().logits;
    let mut compared = 0;
    for i in 0..start.len() {
        let value = |h: f32| {
            let mut moved = start.clone();
            moved[i] += h;
            let again = rule.route(&tokens(router, &moved, E, wave)).unwrap();
            let weight = |e: u32, t: usize| -> f64 {
                let row = t * again.top_k..(t + 1) * again.top_k;
                let slot = again.selected[row.clone()].iter().position(|other| *other == e);
                slot.map_or(0.0, |slot| f64::from(again.weights[row.start + slot]))
            };
            let slots = routed.selected.iter().zip(&d).enumerate();
            let sum: f64 = slots
                .filter(|(slot, _)| routed.weights[*slot] != 0.0)
                .map(|(slot, (&e, d))| weight(e, slot / routed.top_k) * f64::from(*d))
                .sum();
            let sorted = |mut set: Vec<u32>| {
                set.sort_unstable();
                set
            };
            (sum, sets(&again).into_iter().map(sorted).collect::<Vec<_>>())
        };
        let ((up, a), (down, b)) = (value(4e-3), value(-4e-3));
        if a == b {
            let numeric = (up - down) / 8e-3;
            assert!((numeric - f64::from(found[i])).abs() < 2e-3, "{rule:?} {i}: {numeric} {}", found[i]);
            compared += 1;
        }
    }
    assert!(compared * 2 > start.len(), "{rule:?}: {compared}");
}

/// The rule of layer 0 of a configuration, without a model: by its parts.
fn top_p(tau: f64, mass: Mass, limit: usize, router: &Router, logits: &[f32], experts: usize) -> Vec<Vec<u32>> {
    let rule = super::top_p::tests::rule(tau, 1, limit, mass);
    sets(&rule.route(&tokens(router, logits, experts, &wave(&[logits.len() / experts]))).unwrap())
}

#[test]
fn top_p_is_strict_and_keeps_the_expert_that_crosses() {
    let own = router(false);
    // two equal shares: one half does not exceed one half
    let half = [0.0, 0.0, f32::NEG_INFINITY];
    assert_eq!(top_p(0.5, Mass::AllExperts, 3, &own, &half, 3)[0].len(), 2);
    assert_eq!(top_p(0.49, Mass::AllExperts, 3, &own, &half, 3)[0].len(), 1);
    assert_eq!(top_p(0.0, Mass::AllExperts, 3, &own, &half, 3)[0], [0]);
    // nothing exceeds 1: all stay
    assert_eq!(top_p(1.0, Mass::AllExperts, 4, &own, &[1.0, 0.0, 2.0, 3.0], 4)[0], [3, 2, 0, 1]);
    assert_eq!(top_p(1.0, Mass::AllExperts, 2, &own, &[1.0, 0.0, 2.0, 3.0], 4)[0], [3, 2]);
    // one expert with everything; a uniform row
    for tau in [0.0, 0.3, 0.9] {
        assert_eq!(top_p(tau, Mass::AllExperts, 3, &own, &[90.0, 0.0, 0.0], 3)[0], [0]);
        let uniform = top_p(tau, Mass::AllExperts, 8, &own, &[0.0; 8], 8)[0].len();
        assert_eq!(uniform, (tau * 8.0).floor() as usize + 1);
    }
}

#[test]
fn top_p_grows_with_its_share_and_follows_a_permutation() {
    let (own, logits) = (router(true), logits(20));
    let mut last = vec![0; 20];
    for tau in [0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0] {
        let sizes: Vec<usize> = top_p(tau, Mass::AllExperts, E, &own, &logits, E).iter().map(|set| set.len()).collect();
        assert!(sizes.iter().zip(&last).all(|(now, before)| now >= before));
        last = sizes;
    }
    let permuted: Vec<f32> = logits.chunks(E).flat_map(|row| [3, 0, 5, 1, 2, 4].map(|e: usize| row[e])).collect();
    let (a, b) =
        (top_p(0.6, Mass::AllExperts, E, &own, &logits, E), top_p(0.6, Mass::AllExperts, E, &own, &permuted, E));
    for (a, b) in a.iter().zip(&b) {
        assert_eq!(*a, b.iter().map(|e| [3, 0, 5, 1, 2, 4][*e as usize]).collect::<Vec<u32>>());
    }
}

#[test]
fn the_mass_of_the_models_own_experts_adds_none_and_at_one_is_the_model() {
    for own in [router(true), router(false), sigmoid()] {
        let (logits, k) = (logits(12), own.top_k());
        let whole = own.route(&logits, E, None);
        let rule = super::top_p::tests::rule(1.0, 1, k, Mass::TrainedTopK);
        let wave = wave(&[12]);
        assert_eq!(rule.route(&tokens(&own, &logits, E, &wave)).unwrap(), whole);
        let some = top_p(0.7, Mass::TrainedTopK, k, &own, &logits, E);
        for (some, whole) in some.iter().zip(whole.selected.chunks(k)) {
            assert!(some.iter().all(|e| whole.contains(e)) && !some.is_empty());
        }
    }
}

#[test]
fn a_threshold_is_top_k_beside_null_experts_with_a_constant_logit() {
    let own = router(true);
    let (logits, wave) = (logits(30), wave(&[30]));
    for nulls in 0..=3 {
        for c in [-1.0f32, 0.35, 1.2, f32::NEG_INFINITY] {
            let rule = super::threshold::tests::rule(c, Some(nulls));
            let found = sets(&rule.route(&tokens(&own, &logits, E, &wave)).unwrap());
            for (row, found) in logits.chunks(E).zip(found) {
                // true experts first on a tie
                let mut all: Vec<(f32, usize)> = row.iter().copied().zip(0..).collect();
                all.extend((0..nulls).map(|n| (c, E + n)));
                all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                let expected: Vec<u32> = all[..2].iter().filter(|(_, e)| *e < E).map(|(_, e)| *e as u32).collect();
                assert_eq!(found, expected, "{nulls} {c} {row:?}");
            }
        }
    }
}

/// Who is left, by a scalar loop: choices in order of priority, each taken while there is room.
fn reference(routed: &Routed, rows: std::ops::Range<usize>, capacity: usize, policy: DropPolicy) -> Vec<bool> {
    let k = routed.top_k;
    let mut kept = vec![false; routed.weights.len()];
    for e in 0..routed.experts as u32 {
        let mine = |slot: &usize| routed.selected[*slot] == e;
        let mut slots: Vec<usize> = (rows.start * k..rows.end * k).filter(mine).collect();
        slots.sort_by(|a, b| {
            let weight = |slot: &usize| routed.weights[*slot];
            let first = |slot: &usize| routed.weights[slot / k * k];
            let by_rank = (a % k).cmp(&(b % k));
            let order = match policy {
                DropPolicy::Weight => weight(b).total_cmp(&weight(a)),
                DropPolicy::Position => by_rank,
                DropPolicy::BatchPriority => by_rank.then(first(b).total_cmp(&first(a))),
            };
            order.then(a.cmp(b))
        });
        slots.into_iter().take(capacity).for_each(|slot| kept[slot] = true);
    }
    kept
}

#[test]
fn an_expert_drops_whom_its_policy_says_and_keeps_no_more_than_its_capacity() {
    let own = router(false);
    let (logits, wave) = (logits(24), wave(&[14, 10]));
    let whole = own.route(&logits, E, None);
    for policy in [DropPolicy::Weight, DropPolicy::Position, DropPolicy::BatchPriority] {
        for group in [CapacityGroup::Sequence, CapacityGroup::Wave] {
            for factor in [0.3, 0.8, 1.0] {
                let capacity = Capacity { policy, group, ..Capacity::new(factor) };
                let rule = super::capacity::tests::rule(capacity.clone());
                let found = rule.route(&tokens(&own, &logits, E, &wave)).unwrap();
                let groups: &[_] = if group == CapacityGroup::Wave { &[(0, 24)] } else { &[(0, 14), (14, 24)] };
                for rows in groups.iter().map(|(start, end)| *start..*end) {
                    let c = CapacityFormula::Megatron.capacity(factor, rows.len(), E, 2);
                    let expected = reference(&whole, rows.clone(), c, policy);
                    for (slot, kept) in expected.iter().enumerate().take(rows.end * 2).skip(rows.start * 2) {
                        let weight = if *kept { whole.weights[slot] } else { 0.0 };
                        assert_eq!(found.weights[slot], weight, "{capacity:?} {slot}");
                    }
                }
            }
        }
    }
}

#[test]
fn room_for_everyone_drops_nobody_and_what_is_left_may_be_divided_by_its_sum() {
    let own = router(false);
    let (logits, wave) = (logits(10), wave(&[10]));
    let whole = own.route(&logits, E, None);
    let run =
        |capacity: Capacity| super::capacity::tests::rule(capacity).route(&tokens(&own, &logits, E, &wave)).unwrap();
    assert_eq!(run(Capacity::new(E as f64)), whole);
    let found = run(Capacity { renormalize: true, ..Capacity::new(0.5) });
    for weights in found.weights.chunks(2) {
        let sum: f32 = weights.iter().sum();
        assert!(sum == 0.0 || (sum - 1.0).abs() < 1e-6);
    }
    assert!(found.weights.chunks(2).any(|w| w == [0.0, 0.0]), "nobody lost both");
    let second = run(Capacity { second_threshold: Some(0.2), ..Capacity::new(E as f64) });
    let dropped = second.weights.chunks(2).filter(|w| w[1] == 0.0).count();
    assert!(dropped < 10 && second.weights.chunks(2).zip(whole.weights.chunks(2)).all(|(a, b)| a[0] == b[0]));
    assert!(second.weights.chunks(2).zip(whole.weights.chunks(2)).all(|(a, b)| a[1] == b[1] || b[1] < 0.2));
}

#[test]
fn capacities_follow_their_sources() {
    // T = 100, E = 8, k = 2
    assert_eq!(CapacityFormula::Megatron.capacity(1.25, 100, 8, 2), 32);
    assert_eq!(CapacityFormula::Switch.capacity(1.25, 100, 8, 2), 16);
    assert_eq!(CapacityFormula::StMoe.capacity(1.25, 100, 8, 2), 15);
    assert_eq!(CapacityFormula::Switch.capacity(1.0, 8, 8, 1), 4);
}

#[test]
fn every_expert_chooses_as_many_tokens_and_a_later_token_changes_an_earlier_one() {
    let own = router(true);
    let (mut logits, wave) = (logits(12), wave(&[12]));
    let choice = ExpertChoice { factor: 2.0, group: CapacityGroup::Wave, acausal: true };
    let rule = super::expert_choice::tests::rule(choice);
    let found = sets(&rule.route(&tokens(&own, &logits, E, &wave)).unwrap());
    for e in 0..E as u32 {
        assert_eq!(found.iter().filter(|set| set.contains(&e)).count(), 4); // round(2 * 12 / 6)
    }
    let chosen = found[0].clone();
    // the last token becomes the one that every expert wants most
    let others: Vec<f32> = logits[..E].to_vec();
    logits[11 * E..].copy_from_slice(&others);
    logits[11 * E..]
        .iter_mut()
        .enumerate()
        .for_each(|(e, z)| *z = if chosen.contains(&(e as u32)) { 9.0 } else { 0.0 });
    let again = sets(&rule.route(&tokens(&own, &logits, E, &wave)).unwrap());
    assert_ne!(again[..11], found[..11]);
    assert!(!rule.is_causal());
}

#[test]
fn forced_sequences_go_to_their_labels_experts_and_others_where_the_model_says() {
    let own = router(true);
    let (logits, wave) = (logits(9), wave(&[4, 5]));
    let whole = own.route(&logits, E, None);
    let forced = Forced {
        experts: vec![vec![5, 1, 2], vec![0]],
        label: None,
        weights: ForcedWeights::Equal,
        labels: [(0, vec![0])].into(),
    };
    let rule = super::forced::tests::rule(forced.clone());
    let found = rule.route(&tokens(&own, &logits, E, &wave)).unwrap();
    assert!(sets(&found)[..4].iter().all(|set| *set == [5, 1, 2]));
    assert_eq!(found.weights[..3], [1.0 / 3.0; 3]);
    assert_eq!(sets(&found)[4..], sets(&whole)[4..]);
    let one = super::forced::tests::rule(Forced { label: Some(1), labels: [].into(), ..forced.clone() });
    let found = one.route(&tokens(&own, &logits, E, &wave)).unwrap();
    assert!(sets(&found).iter().all(|set| *set == [0]));
    for weights in [ForcedWeights::Model, ForcedWeights::Raw, ForcedWeights::Renorm, ForcedWeights::Equal] {
        check_gradient(&super::forced::tests::rule(Forced { weights, ..forced.clone() }), &own, &wave);
    }
}

#[test]
fn gradients_of_rules_match_difference_quotients() {
    let wave = wave(&[7, 5]);
    for own in [router(true), router(false), sigmoid()] {
        let rules: Vec<Box<dyn RoutingRule>> = vec![
            Box::new(super::top_p::tests::rule(0.7, 1, E, Mass::AllExperts)),
            Box::new(super::top_p::tests::rule(0.6, 1, own.top_k(), Mass::TrainedTopK)),
            Box::new(super::threshold::tests::rule(0.4, None)),
            Box::new(super::capacity::tests::rule(Capacity::new(0.7))),
            Box::new(super::capacity::tests::rule(Capacity { renormalize: true, ..Capacity::new(0.7) })),
            Box::new(super::expert_choice::tests::rule(ExpertChoice {
                factor: 1.5,
                group: CapacityGroup::Sequence,
                acausal: true,
            })),
            Box::new(super::top_k::KRule { k: 4, combine: Default::default() }),
            Box::new(super::selection_bias::tests::rule(vec![0.3, 0.0, -0.2, 0.0, 0.5, 0.0])),
        ];
        for rule in rules {
            check_gradient(&*rule, &own, &wave);
        }
    }
}

#[test]
fn gradients_of_changed_logits_match_difference_quotients() {
    let (own, wave) = (router(true), wave(&[6]));
    let start = logits(6);
    let changes: Vec<Box<dyn LogitTransform>> = vec![
        Box::new(LogitShift::new(vec![0.1, -0.4, 0.0, 2.0, 0.3, 0.0])),
        Box::new(super::intervention::tests::steered(vec![1, 4], Steering::Soft { lambda: -0.7 })),
        Box::new(super::intervention::tests::steered(vec![2], Steering::Hard { noise: 0.0, seed: 1 })),
    ];
    for change in changes {
        let d: Vec<f32> = (0..start.len()).map(|i| ((i * 11) % 7) as f32 - 2.6).collect();
        let found = change.backward(&tokens(&own, &start, E, &wave), &d, true).unwrap().logits;
        for i in 0..start.len() {
            let value = |h: f32| -> f64 {
                let mut moved = start.clone();
                moved[i] += h;
                let out = change.forward(&tokens(&own, &moved, E, &wave)).unwrap();
                out.iter().zip(&d).map(|(z, d)| f64::from(*z) * f64::from(*d)).sum()
            };
            let numeric = (value(1e-3) - value(-1e-3)) / 2e-3;
            assert!((numeric - f64::from(found[i])).abs() < 2e-2, "{change:?} {i}: {numeric} {}", found[i]);
        }
    }
    let shift = LogitShift::new(vec![0.0; E]);
    let d = vec![0.5; start.len()];
    shift.backward(&tokens(&own, &start, E, &wave), &d, true).unwrap();
    shift.backward(&tokens(&own, &start, E, &wave), &d, false).unwrap();
    assert_eq!(shift.take_gradient(), vec![3.0; E]);
    assert_eq!(shift.take_gradient(), vec![0.0; E]);
}

#[test]
fn a_hard_intervention_puts_its_experts_before_all_others_and_a_ban_behind() {
    let own = router(true);
    let (logits, wave) = (logits(40), wave(&[40]));
    for noise in [0.0, 1e-6, 0.1] {
        let hard = super::intervention::tests::steered(vec![3, 0], Steering::Hard { noise, seed: 7 });
        let changed = hard.forward(&tokens(&own, &logits, E, &wave)).unwrap();
        for set in sets(&own.route(&changed, E, None)) {
            assert!(set.contains(&3) && set.contains(&0), "{set:?}");
        }
    }
    let ban = super::intervention::tests::steered(vec![3, 0], Steering::Ban {});
    let changed = ban.forward(&tokens(&own, &logits, E, &wave)).unwrap();
    assert!(sets(&own.route(&changed, E, None)).iter().all(|set| !set.contains(&3) && !set.contains(&0)));
}

#[test]
fn group_limits_bound_what_a_token_can_reach() {
    let groups = Groups { count: 3, top: 1, score: GroupScore::TopTwoSum };
    let kind = RoutingKind::Sigmoid { renormalize: true, correction_bias: false, groups: Some(groups) };
    let own = Router::new(&Routing::new(2, kind)).unwrap();
    assert_eq!((own.reachable(E), router(true).reachable(E)), (2, E));
    let found = top_p(1.0, Mass::AllExperts, own.reachable(E), &own, &logits(20), E);
    assert!(found.iter().all(|set| set.len() == 2 && set[0] / 2 == set[1] / 2), "{found:?}");
}

#[test]
fn sampled_routes_have_k_different_experts_with_the_weights_of_their_own_logits() {
    for own in [router(true), router(false), sigmoid()] {
        let (wave, logits) = (wave(&[40]), logits(40));
        let tokens = tokens(&own, &logits, E, &wave);
        let plain = own.route(&logits, E, None);
        assert_eq!(super::sampled::tests::rule(0.0, 1).route(&tokens).unwrap(), plain);
        let (first, second) = (super::sampled::tests::rule(1.0, 1), super::sampled::tests::rule(1.0, 2));
        let (a, b) = (first.route(&tokens).unwrap(), second.route(&tokens).unwrap());
        assert_eq!(a, super::sampled::tests::rule(1.0, 1).route(&tokens).unwrap());
        assert!(a.selected != b.selected && a.selected != plain.selected);
        for (t, set) in sets(&a).into_iter().enumerate() {
            let mut different = set.clone();
            different.sort_unstable();
            different.dedup();
            assert_eq!((different.len(), set.len()), (own.top_k(), own.top_k()), "{t}");
        }
        // with little noise, mostly the model's own
        let little = super::sampled::tests::rule(0.05, 3).route(&tokens).unwrap();
        let same = sets(&little).iter().zip(sets(&plain)).filter(|(a, b)| **a == *b).count();
        assert!(same > 25, "{same}");
        check_gradient(&first, &own, &wave);
    }
}

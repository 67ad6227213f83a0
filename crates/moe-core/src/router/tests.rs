use super::*;

fn softmax(renormalize: bool) -> Router {
    scores(Score::Softmax { floor: 0.0 }, renormalize, None)
}

fn scores(score: Score, renormalize: bool, groups: Option<GroupLimit>) -> Router {
    Router { top_k: 2, scale: 1.5, norm_eps: 1e-20, rule: Rule::Scores { score, renormalize, groups } }
}

#[test]
fn selects_the_largest_and_breaks_ties_by_index() {
    let routed = softmax(false).route(&[0.0, 2.0, 2.0, -1.0, 5.0, 5.0, 5.0, 5.0], 4, None);
    assert_eq!(routed.selected, [1, 2, 0, 1]);
    let p = 1.0 / (2.0 + (-2.0f32).exp() + (-3.0f32).exp());
    assert!((routed.weights[0] - 1.5 * p).abs() < 1e-6);
    let renormalized = softmax(true).route(&[0.0, 2.0, 2.0, -1.0], 4, None);
    assert!((renormalized.weights[0] - 0.75).abs() < 1e-6);
}

#[test]
fn top_k_larger_than_the_number_of_experts_takes_all() {
    let routed = Router { top_k: 5, ..softmax(true) }.route(&[1.0, 0.0], 2, None);
    assert_eq!((routed.top_k, routed.selected), (2, vec![0, 1]));
}

#[test]
fn a_selection_bias_changes_the_choice_and_not_the_weights() {
    let (logits, bias) = ([0.5f32, 1.0, -1.0, 0.0], [0.0, -2.0, 2.0, 0.0]);
    let sigmoid = |z: f32| 1.0 / (1.0 + (-z).exp());
    let routed = scores(Score::Sigmoid, false, None).route(&logits, 4, Some(&bias));
    assert_eq!(routed.selected, [2, 0]);
    assert!((routed.weights[0] - 1.5 * sigmoid(-1.0)).abs() < 1e-6);
    let routed = scores(Score::Sigmoid, true, None).route(&logits, 4, Some(&bias));
    let sum = sigmoid(-1.0) + sigmoid(0.5);
    assert!((routed.weights[1] - 1.5 * sigmoid(0.5) / sum).abs() < 1e-6);
    let routed = softmax(true).route(&logits, 4, Some(&bias));
    assert_eq!(routed.selected, [2, 0]);
    assert!((routed.weights[1] - 1.5 / (1.0 + (-1.5f32).exp())).abs() < 1e-6);
}

#[test]
fn a_small_sum_of_selected_scores_counts_as_the_floor() {
    let bias = [-2.0, 0.0, 0.0];
    let routed = scores(Score::Softmax { floor: 0.5 }, true, None).route(&[5.0, 1.0, 0.0], 3, Some(&bias));
    let p = 1f32.exp() / (5f32.exp() + 1f32.exp() + 1.0);
    assert_eq!(routed.selected, [1, 2]);
    assert!((routed.weights[0] - 1.5 * p / 0.5).abs() < 1e-6);
}

#[test]
fn groups_limit_the_choice() {
    let logits = [0.9f32, 0.0, 0.6, 0.5, -1.0, 0.2];
    let by = |rank, score| {
        scores(score, false, Some(GroupLimit { count: 3, top: 1, rank })).route(&logits, 6, None).selected
    };
    assert_eq!(by(GroupRank::Largest, Score::Softmax { floor: 0.0 }), [0, 1]);
    assert_eq!(by(GroupRank::TwoLargest, Score::Sigmoid), [2, 3]);
    assert_eq!(by(GroupRank::TwoLargest, Score::Softmax { floor: 0.0 }), [2, 3]);
}

#[test]
fn groups_that_do_not_fit_are_refused() {
    let router = scores(Score::Sigmoid, false, Some(GroupLimit { count: 4, top: 1, rank: GroupRank::TwoLargest }));
    assert!(router.check(8).is_ok());
    assert!(router.check(10).unwrap_err().to_string().contains("multiple of its 4 groups"));
    assert!(router.check(4).unwrap_err().to_string().contains("at least the 2 experts"));
    assert!(softmax(true).check(1).is_ok());
}

#[test]
fn sparsemixer_weighs_against_close_competitors() {
    let router = Router { top_k: 2, scale: 1.0, norm_eps: 0.0, rule: Rule::Sparsemixer { jitter: 0.1 } };
    // 1.0 and 0.9 are within 20%, 0.5 is not; once 1.0 is taken, 0.9 is alone
    let routed = router.route(&[0.5, 1.0, 0.9, -3.0], 4, None);
    assert_eq!(routed.selected, [1, 2]);
    assert!((routed.weights[0] - 1.0 / (1.0 + (-0.1f32).exp())).abs() < 1e-6);
    assert!((routed.weights[1] - 1.0).abs() < 1e-6);
}

#[test]
fn backward_matches_a_difference_quotient() {
    let limit = GroupLimit { count: 2, top: 1, rank: GroupRank::TwoLargest };
    let (groups, by_largest) = (Some(limit), Some(GroupLimit { rank: GroupRank::Largest, ..limit }));
    let soft = |floor| Score::Softmax { floor };
    let cases = [
        (softmax(false), None),
        (softmax(true), None),
        (scores(soft(1e-12), true, None), Some([0.4, 0.0, 0.0, 0.0, -0.3, 0.2])),
        (scores(soft(0.9), true, None), Some([0.4, 0.0, -2.0, 0.0, -0.3, 0.2])),
        (scores(soft(0.0), false, by_largest), None),
        (scores(Score::Sigmoid, false, groups), Some([0.4, 0.0, 0.0, 0.0, -0.3, 0.2])),
        (scores(Score::Sigmoid, true, groups), Some([0.4, 0.0, 0.0, 0.0, -0.3, 0.2])),
        (scores(Score::SqrtSoftplus, true, None), Some([0.4, 0.0, 0.0, 0.0, -0.3, 0.2])),
        (scores(Score::SqrtSoftplus, false, None), None),
        (Router { top_k: 2, scale: 1.5, norm_eps: 0.0, rule: Rule::Sparsemixer { jitter: 0.25 } }, None),
    ];
    let logits = [0.3f32, -0.2, 1.1, 0.8, -0.5, 0.7];
    let d = [0.7f32, -1.3];
    for (case, (router, bias)) in cases.into_iter().enumerate() {
        let bias = bias.as_ref().map(|b| b.as_slice());
        let routed = router.route(&logits, 6, bias);
        let gradient = router.backward(&logits, &routed, &d);
        for i in 0..6 {
            let at = |h: f32| {
                let mut moved = logits;
                moved[i] += h;
                let r = router.route(&moved, 6, bias);
                assert_eq!(r.selected, routed.selected);
                r.weights.iter().zip(d).map(|(w, d)| *w as f64 * d as f64).sum::<f64>()
            };
            let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!((numeric - gradient[i] as f64).abs() < 1e-3, "{case} {i}: {numeric} {}", gradient[i]);
        }
    }
}

/// A router without experts is the router of a model whose rows, biases and gradients of those experts are gone.
#[test]
fn removing_experts_is_slicing_the_router() {
    let limit = GroupLimit { count: 2, top: 1, rank: GroupRank::TwoLargest };
    let soft = |floor| Score::Softmax { floor };
    let bias = [0.4f32, 0.0, -2.0, 0.0, -0.3, 0.2, 0.1, 0.9];
    let top_3 = |router: Router| Router { top_k: 3, ..router };
    let cases = [
        (softmax(false), None),
        (softmax(true), None), // also top-k, then softmax
        (top_3(softmax(true)), None),
        (scores(soft(0.9), true, None), Some(bias)),
        (scores(Score::Sigmoid, true, None), Some(bias)),
        (scores(Score::Sigmoid, false, None), None),
        (scores(Score::SqrtSoftplus, true, None), Some(bias)),
        (scores(soft(0.0), false, Some(GroupLimit { rank: GroupRank::Largest, ..limit })), None),
        (scores(Score::Sigmoid, true, Some(limit)), Some(bias)),
        (Router { top_k: 2, scale: 1.5, norm_eps: 0.0, rule: Rule::Sparsemixer { jitter: 0.25 } }, None),
    ];
    // two of each group of four; the first two have the largest logits and the last the largest bias
    let removed = [0u32, 3, 5, 7];
    let left = [1u32, 2, 4, 6];
    let logits = [1.9f32, -0.2, 1.1, 0.8, -0.5, 1.7, 0.3, 0.6, 0.0, 0.1, -0.7, 2.0, 0.45, 0.4, 0.2, 2.1];
    let sliced = |values: &[f32]| -> Vec<f32> {
        values.chunks(8).flat_map(|row| left.iter().map(|&e| row[e as usize])).collect()
    };
    for (case, (router, bias)) in cases.into_iter().enumerate() {
        let (bias, sliced_bias) = (bias.as_ref().map(|b| &b[..]), bias.as_ref().map(|b| sliced(b)));
        router.check_without(8, &removed).unwrap();
        let found = router.route_without(&logits, 8, bias, &removed);
        let expected = router.route(&sliced(&logits), 4, sliced_bias.as_deref());
        let selected: Vec<u32> = expected.selected.iter().map(|&e| left[e as usize]).collect();
        assert_eq!((found.experts, found.top_k), (8, expected.top_k), "case {case}");
        assert_eq!((&found.selected, &found.weights), (&selected, &expected.weights), "case {case}");
        let d: Vec<f32> = (0..found.weights.len()).map(|i| 0.7 - 0.4 * i as f32).collect();
        let gradient = router.backward_without(&logits, &found, &d, &removed);
        assert_eq!(sliced(&gradient), router.backward(&sliced(&logits), &expected, &d), "case {case}");
        assert!(removed.iter().all(|&e| gradient[e as usize] == 0.0 && gradient[8 + e as usize] == 0.0));
        assert_eq!(router.route_without(&logits, 8, bias, &[]), router.route(&logits, 8, bias));
    }
}

#[test]
fn groups_must_lose_as_many_experts_each() {
    let groups = Some(GroupLimit { count: 2, top: 1, rank: GroupRank::TwoLargest });
    let router = scores(Score::Sigmoid, false, groups);
    let message = |removed: &[u32]| router.check_without(8, removed).unwrap_err().to_string();
    assert!(message(&[0]).contains("[3, 4]"), "{}", message(&[0]));
    assert!(message(&[0, 1, 2, 4, 5, 6]).contains("two best"));
    assert!(softmax(true).check_without(8, &[0]).is_ok());
}

/// Scores, and the divisor of the chosen ones, in f64.
fn dense_weights(router: &Router, logits: &[f32], selected: &[u32], stopped: Option<f64>) -> (Vec<f64>, f64) {
    let Rule::Scores { score, renormalize, .. } = router.rule else { unreachable!() };
    let z: Vec<f64> = logits.iter().map(|z| f64::from(*z)).collect();
    let sum: f64 = z.iter().map(|z| z.exp()).sum();
    let p: Vec<f64> = match score {
        Score::Sigmoid => z.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect(),
        Score::SqrtSoftplus => z.iter().map(|z| (1.0 + z.exp()).ln().sqrt()).collect(),
        Score::Softmax { .. } => z.iter().map(|z| z.exp() / sum).collect(),
    };
    let chosen: f64 = selected.iter().map(|&e| p[e as usize]).sum();
    let divisor = match score {
        _ if !renormalize => 1.0,
        Score::Softmax { floor } => chosen.max(f64::from(floor)),
        Score::Sigmoid | Score::SqrtSoftplus => chosen,
    };
    // experts that were not chosen are divided by a constant
    let by = |e: usize| if selected.contains(&(e as u32)) { divisor } else { stopped.unwrap_or(divisor) };
    let scale = f64::from(router.scale);
    ((0..z.len()).map(|e| scale * p[e] / by(e)).collect(), divisor)
}

#[test]
fn the_dense_gradient_is_that_of_the_mixture_of_all_experts() {
    let logits = [0.3f32, -0.8, 1.1, 0.4, -0.2, 0.9];
    let values = [0.7f32, -1.2, 0.4, 2.0, -0.3, 1.5];
    let routers = [
        softmax(false),
        softmax(true),
        scores(Score::Sigmoid, false, None),
        scores(Score::Sigmoid, true, None),
        scores(Score::SqrtSoftplus, true, None),
        scores(Score::SqrtSoftplus, false, None),
        scores(Score::Softmax { floor: 0.9 }, true, None), // above what two experts can have
        scores(Score::Softmax { floor: 0.1 }, true, None),
        scores(Score::Softmax { floor: 0.0 }, false, Some(GroupLimit { count: 3, top: 1, rank: GroupRank::Largest })),
    ];
    for router in routers {
        let routed = router.route(&logits, 6, None);
        let found = router.dense_backward(&logits, &routed, &values);
        let (_, divisor) = dense_weights(&router, &logits, &routed.selected, None);
        let output = |logits: &[f32]| -> f64 {
            let (u, _) = dense_weights(&router, logits, &routed.selected, Some(divisor));
            u.iter().zip(values).map(|(u, v)| u * f64::from(v)).sum()
        };
        for e in 0..6 {
            let at = |h: f32| {
                let mut moved = logits;
                moved[e] += h;
                output(&moved)
            };
            let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!((numeric - f64::from(found[e])).abs() < 2e-4, "{router:?} {e}: {numeric} {}", found[e]);
        }
        // all experts chosen: the sparse gradient
        let all = Router {
            top_k: 6,
            rule: match router.rule.clone() {
                Rule::Scores { score, renormalize, .. } => Rule::Scores { score, renormalize, groups: None },
                other => other,
            },
            ..router.clone()
        };
        let routed = all.route(&logits, 6, None);
        let weights: Vec<f32> = routed.selected.iter().map(|&e| values[e as usize]).collect();
        let (sparse, dense) = (all.backward(&logits, &routed, &weights), all.dense_backward(&logits, &routed, &values));
        assert!(sparse.iter().zip(&dense).all(|(a, b)| (a - b).abs() < 1e-5), "{all:?}: {sparse:?} {dense:?}");
        // experts in another order: gradients in that order
        let turned = |x: &[f32]| x.iter().rev().copied().collect::<Vec<_>>();
        let routed = all.route(&turned(&logits), 6, None);
        let back = turned(&all.dense_backward(&turned(&logits), &routed, &turned(&values)));
        assert!(back.iter().zip(&dense).all(|(a, b)| (a - b).abs() < 1e-6));
    }
    let sparsemixer = Router { top_k: 2, scale: 1.0, norm_eps: 0.0, rule: Rule::Sparsemixer { jitter: 0.01 } };
    assert!(sparsemixer.check_dense().unwrap_err().to_string().contains("SparseMixer"));
}

#[test]
fn what_is_added_to_the_sum_of_weights_is_that_of_the_model() {
    // The scores are small enough that 1e-6, as LFM2 has it, makes a good part of the divisor.
    let logits = [-14.0f32, -15.0, -30.0];
    let [p, q] = [14.0f32, 15.0].map(|z| 1.0 / (1.0 + z.exp()));
    let plain = scores(Score::Sigmoid, true, None);
    let dense = Router { norm_eps: 1e-6, ..plain.clone() };
    assert!((plain.route(&logits, 3, None).weights[0] - 1.5 * p / (p + q)).abs() < 1e-5);
    let routed = dense.route(&logits, 3, None);
    let expected = 1.5 * p / (p + q + 1e-6);
    assert!((routed.weights[0] - expected).abs() < 1e-5 && expected < 0.7, "{:?} {expected}", routed.weights);
    // The gradient knows of it, too.
    let at = |h: f32| dense.route(&[logits[0] + h, logits[1], logits[2]], 3, None).weights;
    let numeric = (at(1e-2)[0] - at(-1e-2)[0]) / 2e-2;
    let found = dense.backward(&logits, &routed, &[1.0, 0.0])[0];
    assert!((numeric - found).abs() < 1e-3, "{numeric} {found}");
}

#[test]
fn a_table_chooses_and_scores_weigh() {
    use moe_checkpoint::ExpertTable;

    let table = ExpertTable::new("a table", 2, 4, vec![3, 1, 0, 2, 2, 3]).unwrap();
    let router = scores(Score::SqrtSoftplus, true, None);
    let logits = [0.4f32, -1.0, 2.0, 0.7, 0.1, 0.2, -0.3, 0.9];
    let score = |z: f32| (1.0 + z.exp()).ln().sqrt();
    let close = |found: &[f32], expected: [f32; 4]| {
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?} {expected:?}");
    };
    let shares = |a: f32, b: f32| [1.5 * score(a) / (score(a) + score(b)), 1.5 * score(b) / (score(a) + score(b))];
    let routed = router.route_by(&table, &[2, 0], &logits, 4, &[]);
    assert_eq!(routed.selected, [2, 3, 3, 1]);
    let ([a, b], [c, d]) = (shares(2.0, 0.7), shares(0.9, 0.2));
    close(&routed.weights, [a, b, c, d]);
    // Without expert 3, both tokens go to the one of those left that their number points at, or the next.
    let left = router.route_by(&table, &[2, 0], &logits, 4, &[3]);
    assert_eq!((left.selected.as_slice(), left.experts), (&[2, 0, 1, 0][..], 4));
    let ([a, b], [c, d]) = (shares(2.0, 0.4), shares(0.2, 0.1));
    close(&left.weights, [a, b, c, d]);
    let one = router.at_most(1).route_by(&table, &[2, 0], &logits, 4, &[]);
    assert_eq!((one.selected.as_slice(), one.top_k), (&[2, 3][..], 1));
}

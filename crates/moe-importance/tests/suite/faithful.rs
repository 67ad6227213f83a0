//! Scores against gradients by brute force: the criteria mean what their pages say.
#![cfg(feature = "flex")]

use crate::common;

use common::{Case, SameWeights, SequenceCase, assert_close, collect_one};
use moe_importance::scorers::{Activation, Average, Criterion, Fisher, Magnitude, Weighting};
use moe_importance::{NoWeights, Scorer};
use proptest::prelude::*;

fn sequences(pairs: &[(usize, usize)]) -> Vec<SequenceCase> {
    pairs.iter().map(|(rows, loss_tokens)| SequenceCase { rows: *rows, loss_tokens: *loss_tokens }).collect()
}

/// Scores of expert 0 (never routed) and expert 1.
fn score(case: &Case, criterion: Criterion) -> [Vec<f32>; 2] {
    let scorer = Fisher::new(criterion);
    let table = scorer.score(&collect_one(case, &scorer.needs().statistics), &NoWeights).unwrap();
    let [layer] = &table.layers[..] else { panic!("one MoE layer") };
    assert_eq!(layer.layer, 3);
    layer.scores.clone().try_into().unwrap()
}

/// What the page says, from weight gradients per sequence, or per token for the token criterion.
fn expected(case: &Case, criterion: Criterion) -> Vec<f64> {
    let samples: Vec<_> = match criterion {
        Criterion::Token => (0..case.input.rows).map(|t| (t..t + 1, 1.0)).collect(),
        _ => case
            .ranges()
            .into_iter()
            .zip(&case.sequences)
            .filter(|(_, s)| s.loss_tokens > 0)
            .map(|(rows, s)| (rows, 1.0 / s.loss_tokens as f64))
            .collect(),
    };
    let mut scores = vec![0.0; case.width()];
    for (rows, scale) in samples {
        for (score, gradients) in scores.iter_mut().zip(case.weight_gradients(rows)) {
            let f = |g: f64| if criterion == Criterion::Abs { g.abs() } else { g * g };
            *score += gradients.iter().map(|g| f(g * scale)).sum::<f64>();
        }
    }
    let n = match criterion {
        Criterion::Token => case.wave(0).tokens as f64,
        Criterion::Sequence => case.sequences.len() as f64,
        Criterion::Abs => (case.sequences.len() * 3 * case.hidden()) as f64,
    };
    scores.iter().map(|score| score / n).collect()
}

const CRITERIA: [Criterion; 3] = [Criterion::Token, Criterion::Sequence, Criterion::Abs];

#[test]
fn brute_force_gradients_are_those_of_finite_differences() {
    let case = Case::random(5, 3, &sequences(&[(2, 4), (3, 2)]), 1);
    for rows in case.ranges() {
        let gradients = case.weight_gradients(rows.clone());
        for (j, gradients) in gradients.iter().enumerate() {
            for h in 0..5 {
                let difference = |change: &dyn Fn(&mut Case, f64)| {
                    let loss = |step: f64| {
                        let mut case = case.clone();
                        change(&mut case, step);
                        case.loss(rows.clone())
                    };
                    (loss(1e-5) - loss(-1e-5)) / 2e-5
                };
                let found = [
                    difference(&|case, step| case.gate.values[j * 5 + h] += step),
                    difference(&|case, step| case.up.values[j * 5 + h] += step),
                    difference(&|case, step| case.down.values[h * 3 + j] += step),
                ];
                for (part, found) in found.into_iter().enumerate() {
                    let expected = gradients[part * 5 + h];
                    assert!((found - expected).abs() < 1e-8, "{found} and {expected}");
                }
            }
        }
    }
}

#[test]
fn every_criterion_is_its_definition() {
    // Two sequences of different length; then long ones, for which gradients are cheaper than Gram matrices; then one
    // without a row, one without a predicted token, and sizes that fill no vector.
    for (hidden, width, lengths) in [
        (6, 5, sequences(&[(3, 7), (2, 4)])),
        (8, 6, sequences(&[(4, 5), (9, 20), (30, 29)])),
        (33, 50, sequences(&[(1, 3), (0, 6), (4, 0), (12, 11), (40, 60)])),
    ] {
        let case = Case::random(hidden, width, &lengths, 7);
        for criterion in CRITERIA {
            let [never, scores] = score(&case, criterion);
            assert_close(&scores, &expected(&case, criterion), 1e-5);
            assert_eq!(never, vec![0.0; width], "a never-routed expert scores exactly 0");
        }
    }
}

#[test]
fn gram_matrices_and_gradients_give_the_same_squares() {
    // With H = 16 and I = 12, up to 8 rows take Gram matrices. The same 8 rows twice in one sequence double the
    // gradient.
    let case = Case::random(16, 12, &sequences(&[(8, 8)]), 3);
    let twice: Vec<usize> = (0..8).chain(0..8).collect();
    let mut doubled = case.permute_rows(&twice);
    doubled.sequences = sequences(&[(16, 16)]);
    let (short, long) = (score(&case, Criterion::Sequence), score(&doubled, Criterion::Sequence));
    // Twice the rows over twice the predicted tokens: the same mean loss.
    assert_close(&long[1], &short[1].iter().map(|s| f64::from(*s)).collect::<Vec<_>>(), 1e-5);
}

#[test]
fn absolute_values_are_taken_before_averaging_and_are_not_squares() {
    // Unit 0: opposite gradients in two sequences, which cancel in their mean. Unit 1: in sequence 0 only, three times
    // as large.
    let mut case = Case::random(4, 2, &sequences(&[(1, 1), (1, 1)]), 5);
    // Without gate and up gradients: down is 0, and so is du. Units are then read from the down gradients alone.
    case.down.values.fill(0.0);
    case.gate.values = vec![1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
    case.up.values = vec![1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0];
    case.input.values = vec![1.0, 1.5, 0.0, 0.0, 1.0, 0.0, 1.5, 0.0];
    case.upstream.values = vec![1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0];
    case.routing = vec![1.0, 1.0];
    // |mean gradient| orders unit 1 above unit 0 = 0, abs orders unit 0 above unit 1, squares order unit 1 above unit
    // 0.
    let mean: Vec<f64> = {
        let [a, b] = [0..1, 1..2].map(|rows| case.weight_gradients(rows));
        let norm = |j: usize| a[j].iter().zip(&b[j]).map(|(a, b)| (a + b).abs()).sum::<f64>();
        vec![norm(0), norm(1)]
    };
    assert!(mean[0] < 1e-12 && mean[1] > 1.0);
    let abs = score(&case, Criterion::Abs)[1].clone();
    let squares = score(&case, Criterion::Sequence)[1].clone();
    assert!(abs[0] > abs[1], "{abs:?}");
    assert!(squares[0] < squares[1], "{squares:?}");
    assert_close(&abs, &expected(&case, Criterion::Abs), 1e-5);
}

#[test]
fn data_that_an_expert_never_saw_still_counts() {
    let case = Case::random(6, 4, &sequences(&[(5, 8)]), 11);
    let mut with_unrouted = case.clone();
    with_unrouted.sequences = sequences(&[(5, 8), (0, 8)]);
    for criterion in CRITERIA {
        let (alone, beside) = (score(&case, criterion), score(&with_unrouted, criterion));
        // Both sequences have 9 tokens.
        let half: Vec<f64> = alone[1].iter().map(|s| f64::from(*s) / 2.0).collect();
        assert_close(&beside[1], &half, 1e-6);
    }
}

#[test]
fn activation_and_magnitude_are_their_definitions() {
    let case = Case::random(6, 4, &sequences(&[(5, 8), (2, 3)]), 13);
    let weights = SameWeights(case.weights());
    let (units, _, _) = case.backward();
    let sum = |j: usize| (0..7).map(|t| units.at(t, j).abs()).sum::<f64>();
    let norm = |m: &common::Matrix, j: usize| (0..6).map(|h| m.at(j, h).powi(2)).sum::<f64>();
    let down = case.down.transposed();
    // 9 and 4 tokens in the wave; the layer trace routes all 13 of them to expert 1.
    for denominator in [Average::AllTokens, Average::RoutedTokens] {
        let scorer = Activation::new(denominator, Weighting::None);
        let table = scorer.score(&collect_one(&case, &scorer.needs().statistics), &weights).unwrap();
        assert_eq!(table.layers[0].scores[0], vec![0.0; 4]);
        assert_eq!(table.layers[0].routed, Some(vec![0, 13]));
        let expected: Vec<f64> = (0..4).map(|j| sum(j) / 13.0 * norm(&down, j).sqrt()).collect();
        assert_close(&table.layers[0].scores[1], &expected, 1e-5);
    }
    let table = Magnitude::new().score(&collect_one(&case, &[]), &weights).unwrap();
    let expected: Vec<f64> =
        (0..4).map(|j| (norm(&case.gate, j) + norm(&case.up, j) + norm(&down, j)).sqrt()).collect();
    assert_close(&table.layers[0].scores[0], &expected, 1e-6);
    assert_eq!(table.layers[0].routed, None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn scores_follow_their_units_and_not_the_order_of_tokens(
        seed in 0u64..1000,
        order in Just((0..14).collect::<Vec<usize>>()).prop_shuffle(),
        first in Just((0..6).collect::<Vec<usize>>()).prop_shuffle(),
        second in Just((6..19).collect::<Vec<usize>>()).prop_shuffle(),
    ) {
        let case = Case::random(10, 14, &sequences(&[(6, 9), (13, 13)]), seed);
        let by_unit = case.permute_units(&order);
        let by_row = case.permute_rows(&[first, second].concat());
        for criterion in CRITERIA {
            let scores = score(&case, criterion)[1].clone();
            let permuted: Vec<f64> = order.iter().map(|j| f64::from(scores[*j])).collect();
            // Sums over units at the expert's output round in another order, and nothing else does.
            assert_close(&score(&by_unit, criterion)[1], &permuted, 1e-6);
            let same: Vec<f64> = scores.iter().map(|s| f64::from(*s)).collect();
            assert_close(&score(&by_row, criterion)[1], &same, 1e-6);
        }
    }
}

//! Losses against their closed forms.

use crate::common;

use burn::tensor::{Tensor, TensorData};
use common::*;
use moe_nn::losses::*;
use moe_nn::{Assignment, Combine, Routing, Score};

fn routing(rows: &[[f32; 4]], slots: usize, experts: Vec<u32>, num_experts: usize) -> Routing {
    let flat: Vec<f32> = rows.iter().flatten().copied().collect();
    let logits = Tensor::<2>::from_data(TensorData::new(flat, [rows.len(), 4]), &plain());
    let scores = Score::Softmax.of(logits.clone());
    let assignment = Assignment::new(rows.len(), slots, experts);
    let weights = Combine::Raw.weights(&logits, &scores, &assignment);
    Routing { logits, scores, assignment, weights, num_experts }
}

#[track_caller]
fn assert_is(loss: Tensor<1>, expected: f32) {
    let found = values(&loss)[0];
    assert!((found - expected).abs() < 1e-4, "{found}, not {expected}");
}

#[test]
fn balance_is_the_number_of_experts_per_token_when_even() {
    let even = routing(&[[0.0; 4], [0.0; 4]], 2, vec![0, 1, 2, 3], 4);
    assert_is(balance(&even), 2.0);
    assert_is(expert_balance(&even), 1.0);
    assert_is(importance(&even), 0.0);
    // All tokens and all probability at two experts: E * (1 * 1/2 + 1 * 1/2).
    let skewed = routing(&[[50.0, 50.0, 0.0, 0.0]; 2], 2, vec![0, 1, 0, 1], 4);
    assert_is(balance(&skewed), 4.0);
    assert_is(importance(&skewed), 1.0);
}

#[test]
fn balance_of_layers_is_that_of_their_tokens_together() {
    let first = routing(&[[50.0, 0.0, 0.0, 0.0]; 2], 1, vec![0, 0], 4);
    let second = routing(&[[0.0, 50.0, 0.0, 0.0]; 2], 1, vec![1, 1], 4);
    assert_is(balance_of_layers(&[&first, &second]), 2.0);
    let together = routing(
        &[[50.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0], [0.0, 50.0, 0.0, 0.0], [0.0, 50.0, 0.0, 0.0]],
        1,
        vec![0, 0, 1, 1],
        4,
    );
    assert_is(balance(&together), 2.0);
}

#[test]
fn groups_of_one_expert_have_the_expert_loss() {
    let some = routing(&[[1.0, 0.5, 0.0, -1.0], [0.3, 0.1, 2.0, 0.0]], 2, vec![0, 1, 2, 0], 4);
    assert_is(device_balance(&some, 4), values(&expert_balance(&some))[0]);
    assert!(values(&device_balance(&some, 2))[0] > 0.9);
}

#[test]
fn null_experts_share_one_load() {
    let none = Assignment::NONE;
    let rows = [[0.2, 0.1, 1.0, 0.5], [0.4, 0.0, 0.3, 2.0]];
    let swapped = rows.map(|[a, b, c, d]| [a, b, d, c]);
    let experts = vec![0, none, 1, none];
    let (a, b) = (routing(&rows, 2, experts.clone(), 2), routing(&swapped, 2, experts, 2));
    assert_is(balance(&a), values(&balance(&b))[0]);
    // Two of four places are empty: half a token for each of the two null columns.
    let p = values(&a.scores.clone().mean_dim(0));
    assert_is(balance(&a), 4.0 * (0.5 * p[0] + 0.5 * p[1] + 0.5 * p[2] + 0.5 * p[3]));
}

#[test]
fn the_z_loss_is_the_squared_log_sum() {
    let some = routing(&[[1.0, 2.0, 3.0, 4.0], [0.0; 4]], 1, vec![3, 0], 4);
    let sum = |row: [f32; 4]| row.iter().map(|x| x.exp()).sum::<f32>().ln();
    assert_is(router_z(&some), (sum([1.0, 2.0, 3.0, 4.0]).powi(2) + sum([0.0; 4]).powi(2)) / 2.0);
}

#[test]
fn entropy_and_mutual_information_have_their_extremes() {
    let decided = |expert: usize| std::array::from_fn(|i| if i == expert { 100.0 } else { 0.0 });
    let balanced = routing(&[decided(0), decided(1), decided(2), decided(3)], 1, vec![0, 1, 2, 3], 4);
    assert_is(mutual_information(&balanced), -(4f32.ln()));
    assert_is(entropy(&balanced), 0.0);
    let alike = routing(&[[1.0, 0.0, 2.0, 0.5]; 3], 1, vec![2, 2, 2], 4);
    assert_is(mutual_information(&alike), 0.0);
    let even = routing(&[[0.0; 4]], 1, vec![0], 4);
    assert_is(entropy(&even), 4f32.ln());
}

#[test]
fn the_gradient_of_the_balance_loss_moves_probability_to_idle_experts() {
    let device = autodiff();
    let logits = Tensor::<2>::zeros([2, 4], &device).require_grad();
    let scores = Score::Softmax.of(logits.clone());
    let assignment = Assignment::new(2, 1, vec![0, 0]);
    let weights = Combine::Raw.weights(&logits, &scores, &assignment);
    let routing = Routing { logits: logits.clone(), scores, assignment, weights, num_experts: 4 };
    let gradients = values(&logits.grad(&balance(&routing).backward()).unwrap());
    assert!(gradients[0] > 0.0 && gradients[1..4].iter().all(|&gradient| gradient < 0.0), "{gradients:?}");
}

#[test]
fn a_budget_is_met_where_the_mean_is_the_target() {
    let used = Tensor::<1>::from_floats([0.2, 0.6], &plain());
    assert_is(budget(used.clone(), 0.4), 0.0);
    assert_is(budget(used, 0.5), 0.01);
}

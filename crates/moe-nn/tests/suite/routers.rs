//! What each router promises.

use crate::common;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Tensor, TensorData};
use common::*;
use moe_nn::*;

const ANY: RouteContext<'static> = RouteContext { token_ids: None, padding: None, causal: false };

/// Makes the logits of a gate its input.
fn pass_through(gate: &mut Linear) {
    let [input, experts] = gate.weight.dims();
    assert_eq!(input, experts);
    gate.weight = Param::from_tensor(Tensor::eye(experts, &gate.weight.device()));
}

fn rows<const N: usize, const E: usize>(rows: [[f32; E]; N]) -> Tensor<2> {
    Tensor::from_data(TensorData::from(rows), &plain())
}

#[test]
fn equal_scores_go_to_the_lower_index() {
    let mut router = TopKRouterConfig::new(4, 4).with_top_k(2).init(&plain());
    pass_through(&mut router.gate);
    let routing = router.route(rows([[1.0, 2.0, 2.0, 2.0], [0.0; 4]]), &ANY);
    assert_eq!(routing.assignment, Assignment::new(2, 2, vec![1, 2, 0, 1]));
}

#[test]
fn weights_follow_the_rule() {
    let logits = rows([[1.0, 0.5, -0.5, 0.0]]);
    let weights = |combine, score| {
        let config = TopKRouterConfig::new(4, 4).with_combine(combine).with_score(score).with_scale(2.0);
        let mut router = config.init(&plain());
        pass_through(&mut router.gate);
        values(&router.route(logits.clone(), &ANY).weights)
    };
    let e = |x: f32| x.exp();
    let all = e(1.0) + e(0.5) + e(-0.5) + 1.0;
    let close = |found: Vec<f32>, expected: [f32; 2]| {
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?} {expected:?}");
    };
    close(weights(Combine::Raw, Score::Softmax), [2.0 * e(1.0) / all, 2.0 * e(0.5) / all]);
    let chosen = e(1.0) + e(0.5);
    close(weights(Combine::Renormalize, Score::Softmax), [2.0 * e(1.0) / chosen, 2.0 * e(0.5) / chosen]);
    close(weights(Combine::SoftmaxOfChosen, Score::Sigmoid), [2.0 * e(1.0) / chosen, 2.0 * e(0.5) / chosen]);
    let sigmoid = |x: f32| 1.0 / (1.0 + e(-x));
    close(weights(Combine::Raw, Score::Sigmoid), [2.0 * sigmoid(1.0), 2.0 * sigmoid(0.5)]);
    let root = |x: f32| (1.0 + e(x)).ln().sqrt();
    close(weights(Combine::Raw, Score::SqrtSoftplus), [2.0 * root(1.0), 2.0 * root(0.5)]);
}

#[test]
fn experts_come_from_the_best_groups() {
    let router = |by_best| {
        let groups = Some(GroupLimit { groups: 2, chosen: 1, by_best });
        let mut router = TopKRouterConfig::new(4, 4).with_groups(groups).init(&plain());
        pass_through(&mut router.gate);
        router
    };
    // The first group has the best expert, the second the best pair.
    let x = rows([[3.0, 0.0, 2.5, 2.5]]);
    assert_eq!(router(1).route(x.clone(), &ANY).assignment.token(0), [0, 1]);
    assert_eq!(router(2).route(x, &ANY).assignment.token(0), [2, 3]);
}

#[test]
fn noise_belongs_to_training() {
    for noise in [Noise::Jitter { eps: 0.5 }, Noise::Gumbel, Noise::Learned] {
        let router = TopKRouterConfig::new(6, 8).with_noise(noise).init(&autodiff());
        let x = random([64, 6], &plain());
        let training = Tensor::from_inner(x.clone());
        let [first, second] = [0, 1].map(|_| router.route(training.clone(), &ANY).assignment);
        assert_ne!(first, second, "{noise:?}");
        let valid = router.valid();
        assert_eq!(valid.route(x.clone(), &ANY).assignment, valid.route(x, &ANY).assignment, "{noise:?}");
    }
}

#[test]
fn the_selection_bias_moves_towards_balance_and_not_into_weights() {
    let mut router = TopKRouterConfig::new(3, 3).with_top_k(1).with_selection_bias(true).init(&autodiff());
    pass_through(&mut router.gate);
    let x = Tensor::from_inner(rows([[1.0, 0.9, 0.0], [1.0, 0.9, 0.0]]));
    let before = router.route(x.clone(), &ANY);
    assert_eq!(before.assignment.loads(3), [2, 0, 0]);
    router.update_bias(0.1);
    assert_eq!(values(&router.selection_bias.as_ref().unwrap().value()), [-0.1, 0.1, 0.1]);
    assert_eq!(values(&router.loads.as_ref().unwrap().value()), [0.0; 3]);
    let after = router.route(x, &ANY);
    assert_eq!(after.assignment.loads(3), [0, 2, 0]);
    assert_eq!(values(&after.weights), [1.0, 1.0]);
}

#[test]
fn top_p_takes_as_many_experts_as_the_mass_needs() {
    let of = |mass: f64, row: [f32; 4]| {
        let mut router = TopPRouterConfig::new(4, 4).with_mass(mass).init(&plain());
        pass_through(&mut router.gate);
        router.route(rows([row]), &ANY).assignment.filled()
    };
    for mass in [0.01, 0.4, 0.99] {
        assert_eq!(of(mass, [100.0, 0.0, 0.0, 0.0]), 1);
    }
    assert_eq!([0.2, 0.3, 0.6, 0.8, 1.0].map(|mass| of(mass, [0.0; 4])), [1, 2, 3, 4, 4]);
    let limited = TopPRouterConfig::new(4, 4).with_mass(1.0).with_min_k(1).with_max_k(Some(2)).init(&plain());
    assert_eq!(limited.route(rows([[0.0; 4]]), &ANY).assignment.filled(), 2);
}

#[test]
fn null_experts_leave_places_empty_and_true_weights_sum_to_one() {
    let mut router = NullExpertRouterConfig::new(4, 2, 2).with_top_k(2).init(&plain());
    pass_through(&mut router.gate);
    let routing = router.route(rows([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 0.5], [0.0, 0.0, 2.0, 2.0]]), &ANY);
    let none = Assignment::NONE;
    assert_eq!(routing.assignment, Assignment::new(3, 2, vec![0, 1, none, 1, none, none]));
    let sums = values(&routing.weights.clone().sum_dim(1));
    assert!((sums[0] - 1.0).abs() < 1e-6 && (sums[1] - 1.0).abs() < 1e-6 && sums[2] == 0.0, "{sums:?}");
    // A token without a true expert passes the layer as zeros.
    let output = dispatch(random([3, 4], &plain()), &routing, |rows, _| rows.ones_like());
    assert_eq!(values(&output)[8..], [0.0; 4]);
}

#[test]
fn without_null_experts_ada_moe_is_top_k() {
    let top_k = TopKRouterConfig::new(6, 4).with_top_k(2).init(&plain());
    let null = NullExpertRouterConfig::new(6, 4, 0).with_top_k(2).init_from(&top_k);
    let x = random([9, 6], &plain());
    let (a, b) = (top_k.route(x.clone(), &ANY), null.route(x.clone(), &ANY));
    assert_eq!(a.assignment, b.assignment);
    assert_close(&a.weights, &b.weights, 1e-6);
    // Copies of the rows tie with their originals, which go first.
    let doubled = NullExpertRouterConfig::new(6, 4, 8).with_top_k(3).init_from(&top_k).route(x, &ANY);
    assert!((0..9).all(|token| doubled.assignment.token(token)[1..] == [Assignment::NONE; 2]));
}

#[test]
fn all_experts_choose_equally_many_tokens() {
    let router = ExpertChoiceRouterConfig::new(6, 4).with_capacity_factor(1.0).init(&plain());
    let routing = router.route(random([16, 6], &plain()), &ANY);
    assert_eq!(routing.assignment.loads(4), [4; 4]);
}

#[test]
#[should_panic(expected = "a causal model cannot use it")]
fn expert_choice_refuses_causal_models() {
    let router = ExpertChoiceRouterConfig::new(6, 4).init(&plain());
    router.route(random([16, 6], &plain()), &RouteContext { causal: true, ..ANY });
}

#[test]
fn balanced_routing_is_nearly_even_where_the_logits_are_not() {
    let config = BalancedRouterConfig::new(4, 4).with_iterations(1000).with_tolerance(1e-9);
    let mut router = config.init(&autodiff());
    pass_through(&mut router.gate);
    let x = random([400, 4], &plain()) + rows([[2.0, 0.0, 0.0, 0.0]]);
    let skewed = router.valid().route(x.clone(), &ANY).assignment.loads(4);
    let even = router.route(Tensor::from_inner(x), &ANY).assignment.loads(4);
    assert!(skewed[0] > 250, "{skewed:?}");
    assert!(even.iter().all(|&load| (60..=140).contains(&load)), "{even:?}");
}

#[test]
fn hashing_deals_ids_out_evenly() {
    let router = HashRouterConfig::new(4, 40).with_top_k(2).init();
    let ids: Vec<u32> = (0..40).collect();
    let context = RouteContext { token_ids: Some(&ids), ..ANY };
    let routing = router.route(random([40, 6], &plain()), &context);
    let mut first = [0; 4];
    for token in 0..40 {
        let experts = routing.assignment.token(token);
        assert_ne!(experts[0], experts[1]);
        first[experts[0] as usize] += 1;
    }
    assert_eq!(first, [10; 4]);
    assert!(values(&routing.weights).iter().all(|&weight| weight == 0.5));
    assert_eq!(HashRouterConfig::new(4, 40).with_top_k(2).init().experts_of(7), router.experts_of(7));
}

#[test]
fn a_random_router_takes_more_experts_as_training_goes_on_and_never_learns() {
    for schedule in [GrowthSchedule::Linear, GrowthSchedule::Cosine, GrowthSchedule::Exponential] {
        let config = RandomRouterConfig::new(6, 8, 2, 8).with_schedule(schedule);
        let router = config.init(&autodiff());
        let k: Vec<usize> = (0..=20).map(|step| router.clone().at(f64::from(step) / 20.0).top_k()).collect();
        assert_eq!((k[0], k[20]), (2, 8), "{schedule:?}");
        assert!(k.is_sorted(), "{k:?}");
    }
    let router = RandomRouterConfig::new(6, 8, 2, 8).init(&autodiff());
    let experts = GatedExpertsConfig::new(6, 5, 8).init(&autodiff());
    let layer = MoeLayer::new(router, experts);
    let gradients = layer.forward(random([9, 6], &autodiff())).hidden.sum().backward();
    assert!(layer.router.gate.weight.val().grad(&gradients).is_none());
    assert!(layer.experts.up.val().grad(&gradients).is_some());
}

#[test]
fn a_router_of_two_layers_samples_in_training_only() {
    for kind in [GateKind::Mlp, GateKind::Cosine] {
        let router = MlpRouterConfig::new(6, 8).with_d_router(5).with_kind(kind).with_sampled(2).init(&autodiff());
        let x = random([64, 6], &plain());
        let valid = router.valid();
        assert_eq!(valid.route(x.clone(), &ANY).assignment, valid.route(x.clone(), &ANY).assignment);
        let sampled = router.route(Tensor::from_inner(x.clone()), &ANY).assignment;
        assert_ne!(sampled, valid.route(x, &ANY).assignment);
        assert!((0..64).all(|token| sampled.token(token)[0] != sampled.token(token)[1]));
    }
}

#[test]
fn the_state_of_a_recurrent_router_goes_from_layer_to_layer() {
    let device = plain();
    let cell = GruCellConfig::new(5).init(&device);
    let config = RecurrentRouterConfig::new(6, 8).with_d_router(5);
    let [first, second] = [0, 1].map(|_| config.init(&device));
    let (a, b) = (random([4, 6], &device), random([4, 6], &device));
    let later = |x: Tensor<2>| {
        let (_, state) = first.route(x, None, &cell);
        second.route(a.clone(), Some(state), &cell).0.logits
    };
    assert_ne!(values(&later(a.clone())), values(&later(b)));
    // No time recurrence: one token alone is routed as among others.
    let (_, state) = first.route(a.clone().narrow(0, 2, 1), None, &cell);
    let alone = second.route(a.clone().narrow(0, 2, 1), Some(state), &cell).0.logits;
    assert_close(&alone, &later(a.clone()).narrow(0, 2, 1), 1e-5);
}

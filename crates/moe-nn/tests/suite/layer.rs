//! What a layer equals.

use crate::common;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Int, Tensor, TensorData};
use common::*;
use moe_nn::*;

fn linear(matrices: &Param<Tensor<3>>, expert: usize) -> Linear {
    let [_, input, output] = matrices.dims();
    let weight = matrices.val().narrow(0, expert, 1).reshape([input, output]);
    Linear { weight: Param::from_tensor(weight), bias: None }
}

/// One expert as a dense network.
fn dense(experts: &GatedExperts, expert: usize, device: &Device) -> FeedForward {
    let [_, d, f] = experts.up.dims();
    let mut network = FeedForwardConfig::new(d, f).init(device);
    network.gate = linear(&experts.gate, expert);
    network.up = linear(&experts.up, expert);
    network.down = linear(&experts.down, expert);
    network
}

#[test]
fn one_expert_is_the_feed_forward_network() {
    let device = plain();
    let layer = MoeConfig::new(6, 10, 1).with_top_k(1).init(&device);
    let x = random([9, 6], &device);
    assert_close(&layer.forward(x.clone()).hidden, &dense(&layer.experts, 0, &device).forward(x), 1e-5);
}

#[test]
fn all_experts_per_token_are_the_dense_mixture() {
    let device = plain();
    let layer = MoeConfig::new(6, 10, 4).with_top_k(4).init(&device);
    let x = random([9, 6], &device);
    let output = layer.forward(x.clone());
    let mixture = (0..4).fold(x.zeros_like(), |sum, expert| {
        let weight = output.routing.scores.clone().slice([0..9, expert..expert + 1]);
        sum + dense(&layer.experts, expert, &device).forward(x.clone()) * weight
    });
    assert_close(&output.hidden, &mixture, 1e-5);
}

#[test]
fn the_order_of_experts_does_not_matter() {
    let device = plain();
    let layer = MoeConfig::new(6, 10, 5).with_top_k(2).init(&device);
    let order = Tensor::<1, Int>::from_data(TensorData::from([3i64, 0, 4, 1, 2]), &device);
    let mut permuted = layer.clone();
    let stack = |matrices: &Param<Tensor<3>>| Param::from_tensor(matrices.val().select(0, order.clone()));
    permuted.experts.gate = stack(&layer.experts.gate);
    permuted.experts.up = stack(&layer.experts.up);
    permuted.experts.down = stack(&layer.experts.down);
    permuted.router.gate.weight = Param::from_tensor(layer.router.gate.weight.val().select(1, order));
    let x = random([3, 7, 6], &device);
    assert_close(&layer.forward(x.clone()).hidden, &permuted.forward(x).hidden, 1e-5);
}

#[test]
fn a_shared_expert_is_added_to_what_experts_say() {
    let device = plain();
    let shared = SharedExpertConfig::new(6, 4).with_gated(true);
    let layer = MoeConfig::new(6, 10, 4).with_shared(Some(shared)).init(&device);
    let x = random([9, 6], &device);
    let shared = layer.shared.clone().unwrap();
    let gate = burn::tensor::activation::sigmoid(shared.gate.as_ref().unwrap().forward(x.clone()));
    let alone = MoeLayer { shared: None, ..layer.clone() }.forward(x.clone()).hidden;
    let expected = alone + shared.network.forward(x.clone()) * gate;
    assert_close(&layer.forward(x).hidden, &expected, 1e-5);
}

#[test]
fn padding_comes_out_as_zeros_and_changes_nothing_else() {
    let device = plain();
    let losses = LossWeights { balance: 1.0, z: 1.0, ..LossWeights::default() };
    let layer = MoeConfig::new(6, 10, 4).with_losses(losses).init(&device);
    let x = random([5, 6], &device);
    let padding = [false, true, false, false, true];
    let output = layer.forward_in(x.clone(), &RouteContext { padding: Some(&padding), ..RouteContext::default() });
    let real = Tensor::<1, Int>::from_data(TensorData::from([0i64, 2, 3]), &device);
    let alone = layer.forward(x.select(0, real.clone()));
    assert_close(&output.hidden.clone().select(0, real), &alone.hidden, 1e-6);
    assert_eq!(values(&output.hidden.narrow(0, 1, 1)), [0.0; 6]);
    assert_eq!(values(&output.losses.total().unwrap()), values(&alone.losses.total().unwrap()));
    assert_eq!(output.routing.assignment.tokens(), 3);
}

#[test]
fn no_expert_takes_more_than_its_capacity() {
    let device = plain();
    let capacity = Capacity { train: 0.25, eval: 0.5 };
    let layer = MoeConfig::new(6, 10, 4).with_capacity(Some(capacity)).init(&device);
    let x = random([16, 6], &device);
    let output = layer.forward(x.clone());
    let loads = output.routing.assignment.loads(4); // 16 tokens, 2 of 4 experts each: 8 on average, 4 at most
    assert!(loads.iter().all(|&load| load <= 4) && loads.contains(&4), "{loads:?}");
    let free = MoeConfig::new(6, 10, 4).init(&device);
    let free = MoeLayer { router: layer.router.clone(), experts: layer.experts.clone(), ..free }.forward(x);
    assert!(free.routing.assignment.filled() > output.routing.assignment.filled());

    let training = layer.train().forward(random([16, 6], &autodiff()));
    assert!(training.routing.assignment.loads(4).iter().all(|&load| load <= 2));
}

#[test]
fn a_layer_takes_no_token_and_one_token() {
    let device = plain();
    let layer = MoeConfig::new(6, 10, 4).init(&device);
    assert_eq!(layer.forward(Tensor::<2>::zeros([0, 6], &device)).hidden.dims(), [0, 6]);
    assert_eq!(layer.forward(random([1, 6], &device)).hidden.dims(), [1, 6]);
}

#[test]
fn a_record_brings_a_layer_back() {
    let device = plain();
    let router = TopKRouterConfig::new(0, 0).with_selection_bias(true).with_bias(true);
    let config = MoeConfig::new(6, 10, 4).with_router(Some(router)).with_shared(Some(SharedExpertConfig::new(0, 3)));
    let (layer, other) = (config.init(&device), config.init(&device));
    let x = random([9, 6], &device);
    let expected = layer.forward(x.clone()).hidden;
    assert_ne!(values(&expected), values(&other.forward(x.clone()).hidden));
    let loaded = other.load_record(layer.into_record());
    assert_eq!(values(&loaded.forward(x).hidden), values(&expected));
}

#[test]
fn configurations_survive_json() {
    use burn::config::Config;
    let router = TopKRouterConfig::new(6, 4).with_noise(Noise::Jitter { eps: 0.01 });
    let config = MoeConfig::new(6, 10, 4)
        .with_router(Some(router))
        .with_capacity(Some(Capacity { train: 1.25, eval: 2.0 }))
        .with_losses(LossWeights { balance: 0.01, ..LossWeights::default() });
    let read = MoeConfig::load_binary(config.to_string().as_bytes()).unwrap();
    assert_eq!(read.to_string(), config.to_string());
    let unknown = r#"{"d_model":6,"d_ff":10,"num_experts":4,"losses":{"balanse":1.0}}"#;
    assert!(MoeConfig::load_binary(unknown.as_bytes()).is_err());
}

#[test]
#[should_panic(expected = "experts per token must be within 1..=4, the number of experts; found 5")]
fn more_experts_per_token_than_there_are_is_refused() {
    MoeConfig::new(6, 10, 4).with_top_k(5).init(&plain());
}

#[test]
#[should_panic(expected = "the router has 3 experts, but there are 4")]
fn a_router_of_another_number_of_experts_is_refused() {
    let device = plain();
    MoeLayer::new(TopKRouterConfig::new(6, 3).init(&device), GatedExpertsConfig::new(6, 10, 4).init(&device));
}

#[test]
fn a_routing_record_counts() {
    let device = plain();
    let layer = MoeConfig::new(6, 10, 4).with_top_k(4).init(&device);
    let record = RoutingRecord::of(&layer.forward(random([9, 6], &device)).routing);
    assert_eq!((record.loads.as_slice(), record.idle), ([9, 9, 9, 9].as_slice(), 0));
    assert!((record.max_over_mean - 1.0).abs() < 1e-6 && (record.load_entropy - 1.0).abs() < 1e-6);
    assert!((record.mean_weights.iter().sum::<f32>() - 1.0).abs() < 1e-5);
}

#[test]
fn low_rank_and_modulated_experts_begin_as_their_common_network() {
    let device = plain();
    let x = random([9, 6], &device);
    let router = TopKRouterConfig::new(6, 3).init(&device);
    let low_rank = LowRankExpertsConfig::new(6, 5, 3, 2).with_common(true).init(&device);
    let expected = low_rank.network.as_ref().unwrap().forward(x.clone());
    assert_close(&MoeLayer::new(router.clone(), low_rank).forward(x.clone()).hidden, &expected, 1e-5);
    let film = FilmExpertsConfig::new(6, 5, 3).init(&device);
    let expected = film.network.forward(x.clone());
    assert_close(&MoeLayer::new(router, film).forward(x).hidden, &expected, 1e-5);
}

#[test]
fn low_rank_experts_are_gated_experts_with_multiplied_matrices() {
    let device = plain();
    let low_rank = LowRankExpertsConfig::new(6, 5, 3, 2).init(&device);
    let product = |map: &LowRankMap| Param::from_tensor(map.a.val().matmul(map.b.val()));
    let mut gated = GatedExpertsConfig::new(6, 5, 3).init(&device);
    gated.gate = product(&low_rank.gate);
    gated.up = product(&low_rank.up);
    gated.down = product(&low_rank.down);
    let router = TopKRouterConfig::new(6, 3).init(&device);
    let x = random([9, 6], &device);
    let expected = MoeLayer::new(router.clone(), gated).forward(x.clone()).hidden;
    assert_close(&MoeLayer::new(router, low_rank).forward(x).hidden, &expected, 1e-5);
}

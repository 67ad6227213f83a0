//! What each architecture promises.

mod common;

use burn::module::Module;
use burn::tensor::Tensor;
use common::*;
use moe_nn::architectures::*;
use moe_nn::*;

const ANY: RouteContext<'static> = RouteContext { token_ids: None, padding: None, causal: false };

#[test]
fn segments_keep_the_active_size_and_one_segment_is_plain_top_k() {
    let config = DeepSeekMoeConfig::new(8, 12, 4, 2);
    let layer = config.layer();
    assert_eq!((layer.num_experts, layer.top_k, layer.d_ff), (15, 7, 3));
    assert_eq!(layer.top_k * layer.d_ff + layer.shared.as_ref().unwrap().d_ff, 24);
    let plain = DeepSeekMoeConfig::new(8, 12, 4, 2).with_segments(1).with_shared(0).layer();
    assert_eq!((plain.num_experts, plain.top_k, plain.d_ff, plain.shared.is_none()), (4, 2, 12, true));
    let device = common::plain();
    assert_eq!(config.init(&device).forward(random([5, 8], &device)).hidden.dims(), [5, 8]);
}

#[test]
fn one_round_is_a_layer_with_a_residual_and_rounds_call_as_many_experts() {
    let device = plain();
    let x = random([9, 8], &device);
    let chain = ChainOfExpertsConfig::new(8, 6, 5).with_top_k(4).with_rounds(1).with_shared_ff(7).init(&device);
    let mut layer = MoeLayer::new(chain.routers[0].clone(), chain.experts.clone());
    layer.shared = chain.shared.clone();
    assert_close(&chain.forward(x.clone(), &ANY).0, &(layer.forward(x.clone()).hidden + x.clone()), 1e-5);

    let chain = ChainOfExpertsConfig::new(8, 6, 5).with_top_k(4).with_rounds(2).init(&device);
    let (_, routings) = chain.forward(x.clone(), &ANY);
    assert_eq!(routings.iter().map(|routing| routing.assignment.filled()).sum::<usize>(), 36);
    let other = chain.forward(x * 3.0, &ANY).1;
    assert_ne!(values(&other[1].logits), values(&routings[1].logits));
}

#[test]
fn one_block_serves_all_depths_and_its_gradient_is_the_sum() {
    let device = autodiff();
    let config = WideNetConfig::new(8, 3, AttentionConfig::new(2, 2, 4), MoeConfig::new(8, 6, 4));
    let net = config.init(&device);
    let block = WideNetConfig { depth: 0, ..config.clone() }.init(&device).num_params();
    assert_eq!(net.num_params(), block + 3 * 2 * 8);
    let (output, _, routings) = net.forward(random([2, 5, 8], &device));
    assert_eq!((output.dims(), routings.len()), ([2, 5, 8], 3));
    let gradients = output.sum().backward();
    assert!(net.moe.experts.up.val().grad(&gradients).is_some());
    assert!(net.ffn_norms.iter().all(|norm| norm.gamma.val().grad(&gradients).is_some()));
}

#[test]
fn the_routers_of_a_stack_hear_of_each_other_and_learn_through_the_state() {
    let device = autodiff();
    let router = RecurrentRouterConfig::new(8, 5).with_d_router(4);
    let stack = RmoeStackConfig::new(2, router, 6).init(&device);
    let x = random([7, 8], &device);
    let (first, _, state) = stack.forward(0, x, None);
    let (second, _, _) = stack.forward(1, first.detach(), Some(state));
    let gradients = second.square().sum().backward();
    assert!(stack.routers[0].project.weight.val().grad(&gradients).is_some(), "through the state alone");
}

#[test]
fn all_parts_of_a_union_are_the_network() {
    let device = plain();
    let network = FeedForwardConfig::new(8, 12).init(&device);
    let x = random([7, 8], &device);
    let union = UnionOfExpertsConfig::new(4, 4).init_from(&network, &device);
    assert_close(&union.forward(x.clone(), &ANY).0, &network.forward(x.clone()), 1e-5);
    let some = UnionOfExpertsConfig::new(4, 2).with_routing(UnionRouting::Sequence).init_from(&network, &device);
    let routing = some.forward(x, &ANY).1;
    assert!((1..7).all(|token| routing.assignment.token(token) == routing.assignment.token(0)));
}

#[test]
fn modulation_begins_as_the_common_network_and_samples_keep_weights_normalized() {
    let x = random([7, 8], &plain());
    let layer = MofmeLayerConfig::new(8, 6, 5).with_samples(4).with_dropout(0.3).init(&autodiff());
    let valid = layer.valid();
    assert_close(&valid.forward(x.clone(), &ANY).0, &valid.network.forward(x.clone()), 1e-5);
    // With gamma 1 and beta 0 the weights' sum is all that shows.
    let trained = layer.forward(Tensor::from_inner(x.clone()), &ANY).0;
    assert_close(&trained.inner(), &valid.network.forward(x), 1e-4);
    // It is what the experts that run once per chosen expert compute.
    let mut film = FilmExpertsConfig::new(8, 6, 5).init(&plain());
    let mut layer = valid;
    layer.gamma = burn::module::Param::from_tensor(random([5, 6], &plain()));
    layer.beta = burn::module::Param::from_tensor(random([5, 6], &plain()));
    (film.network, film.gamma, film.beta) = (layer.network.clone(), layer.gamma.clone(), layer.beta.clone());
    let x = random([7, 8], &plain());
    let dispatched = MoeLayer::new(layer.router.clone(), film).forward(x.clone()).hidden;
    assert_close(&layer.forward(x, &ANY).0, &dispatched, 1e-4);
}

#[test]
fn a_module_beside_a_frozen_model_begins_as_nothing_and_pools_by_means() {
    let device = plain();
    let mome = MomeConfig::new(8, 2, 4).init(&device);
    let (output, _) = mome.forward(random([7, 8], &device), &ANY);
    assert!(values(&output).iter().all(|value| *value == 0.0));
    let x = Tensor::<2>::from_floats([[1.0], [3.0], [5.0]], &device);
    assert_eq!(values(&Mome::pooled(x, 2)), [2.0, 5.0]);
}

#[test]
fn a_duo_layer_mixes_in_training_and_chooses_in_evaluation() {
    let layer = DuoLayerConfig::new(8, 12, 4).init(&autodiff());
    let x = random([7, 8], &plain());
    let valid = layer.valid();
    let output = valid.forward(x.clone());
    let [big, small] = [valid.big.forward(x.clone()), valid.small.forward(x.clone())].map(|output| values(&output));
    for (token, share) in values(&output.big).iter().enumerate() {
        let chosen = if *share >= 0.5 { &big } else { &small };
        assert_eq!(values(&output.hidden)[token * 8..][..8], chosen[token * 8..][..8]);
    }
    let trained = layer.forward(Tensor::from_inner(x));
    let gradients = losses::budget(trained.big, 0.1).backward();
    assert!(layer.router.weight.val().grad(&gradients).is_some());
}

#[test]
fn a_scaled_norm_and_its_fold_agree() {
    let device = plain();
    let x = random([7, 8], &device);
    let first = ScaledNormConfig::new(8, 1).init(&device);
    assert_close(&first.forward(x.clone()), &first.norm.forward(x.clone()), 0.0);
    let fourth = ScaledNormConfig::new(8, 4).init(&device);
    assert_close(&fourth.forward(x.clone()), &(first.norm.forward(x.clone()) / 2.0), 1e-6);
    assert_close(&fourth.clone().folded().forward(x.clone()), &fourth.forward(x), 1e-6);
}

#[test]
fn a_memory_reads_its_best_slots_and_trains_no_others() {
    let device = plain();
    for values_of in [MemoryValues::Vector, MemoryValues::Expert] {
        let config = MemoryLayerConfig::new(8, 3).with_top_k(3).with_values(values_of).with_softmax(false);
        let layer = config.init(&device);
        let x = random([5, 8], &device);
        let (output, slots) = layer.forward(x.clone());
        assert_eq!((output.dims(), slots.len(), layer.slots()), ([5, 8], 15, 9));
        let again = layer.forward(x * 2.0).0;
        assert_ne!(values(&again), values(&output));
    }
    let layer = MemoryLayerConfig::new(8, 6).with_heads(2).with_top_k(4).init(&autodiff());
    let (output, slots) = layer.forward(random([5, 8], &autodiff()));
    let gradients = output.square().sum().backward();
    let of_values = values(&layer.values.val().grad(&gradients).unwrap());
    for slot in 0..36u32 {
        let touched = of_values[slot as usize * 8..][..8].iter().any(|value| *value != 0.0);
        assert_eq!(touched, slots.contains(&slot), "slot {slot}");
    }
    assert!(layer.query.weight.val().grad(&gradients).is_some() && layer.keys.val().grad(&gradients).is_some());
}

//! What each architecture promises.

use crate::common;

use burn::module::{Module, Param};
use burn::nn::{LayerNormConfig, LinearConfig};
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
fn a_model_with_layer_norms_is_one_with_crms_norms_of_one_coordinate_less() {
    let device = plain();
    let linear = |inputs, outputs, bias| LinearConfig::new(inputs, outputs).with_bias(bias).init(&device);
    let (embed, write, head) = (linear(5, 8, false), linear(6, 8, true), linear(8, 3, true));
    let read = linear(8, 6, true);
    let norm = || {
        let mut norm = LayerNormConfig::new(8).init(&device);
        norm.gamma = Param::from_tensor(random([8], &device) + 1.0);
        norm.beta = Some(Param::from_tensor(random([8], &device)));
        norm
    };
    let norms = [norm(), norm()];
    let x = random([7, 5], &device) * 4.0;
    // stream, network, stream, head
    let stream = embed.forward(x.clone());
    let stream = stream.clone() + write.forward(read.forward(norms[0].forward(stream)).tanh());
    let expected = head.forward(norms[1].forward(stream));
    let (crms, first, last) =
        (CrmsNormConfig::new(8).init(), CrmsNorm::reader(&norms[0], &read), CrmsNorm::reader(&norms[1], &head));
    let stream = CrmsNorm::writer(&embed).forward(x);
    assert_eq!(stream.dims(), [7, 7]);
    let written = CrmsNorm::writer(&write).forward(first.forward(crms.forward(stream.clone())).tanh());
    assert_close(&last.forward(crms.forward(stream + written)), &expected, 1e-5);
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

#[test]
fn attention_of_one_expert_is_stick_breaking_attention_and_sees_no_later_token() {
    let device = plain();
    let router = MlpRouterConfig::new(8, 1).with_top_k(1).with_d_router(4);
    let one = StickBreakingAttentionConfig::new(8, 2, 3, router).init(&device);
    let x = random([1, 6, 8], &device);
    let heads = |map: Tensor<3>| map.reshape([1, 6, 2, 3]).swap_dims(1, 2);
    let query = x.clone().matmul(one.query.val());
    let logits = heads(query).matmul(heads(one.key.forward(x.clone())).transpose()) / 3f64.sqrt();
    let seen = stick_breaking(logits).matmul(heads(one.value.forward(x.clone())));
    let expected = seen.swap_dims(1, 2).reshape([1, 6, 6]).matmul(one.output.val());
    assert_close(&one.forward(x.clone()).0, &expected, 1e-5);

    let router = MlpRouterConfig::new(8, 5).with_d_router(4);
    let layer = StickBreakingAttentionConfig::new(8, 2, 3, router).init(&device);
    let later = Tensor::cat(vec![x.clone().narrow(1, 0, 4), random([1, 2, 8], &device)], 1);
    let of = |x: &Tensor<3>| layer.forward(x.clone()).0.narrow(1, 0, 4);
    assert_close(&of(&x), &of(&later), 1e-6);
    // Sequences of a batch do not see each other.
    let both = layer.forward(Tensor::cat(vec![x.clone(), later.clone()], 0)).0;
    assert_close(&both.narrow(0, 1, 1), &layer.forward(later).0, 1e-5);
}

#[test]
fn experts_of_attention_learn_through_queries_outputs_keys_and_gate() {
    let router = MlpRouterConfig::new(8, 3).with_d_router(4).with_dropout(0.0);
    let layer = drawn(StickBreakingAttentionConfig::new(8, 1, 4, router).init(&autodiff()), 0.3);
    let x = random([1, 5, 8], &plain());
    let loss = |layer: &StickBreakingAttention, x: Tensor<3>| layer.forward(x).0.square().sum();
    let gradients = loss(&layer, Tensor::from_inner(x.clone())).backward();
    let valid = layer.valid();
    let with = |change: &dyn Fn(&mut StickBreakingAttention)| {
        let mut layer = valid.clone();
        change(&mut layer);
        loss(&layer, x.clone()).into_scalar::<f32>()
    };
    use burn::module::Param;
    let query = layer.query.val().grad(&gradients).unwrap();
    check_gradient(&valid.query.val(), &query, |moved| with(&|l| l.query = Param::from_tensor(moved.clone())));
    let output = layer.output.val().grad(&gradients).unwrap();
    check_gradient(&valid.output.val(), &output, |moved| with(&|l| l.output = Param::from_tensor(moved.clone())));
    let key = layer.key.weight.val().grad(&gradients).unwrap();
    check_gradient(&valid.key.weight.val(), &key, |moved| with(&|l| l.key.weight = Param::from_tensor(moved.clone())));
    assert!(layer.router.gate.weight.val().grad(&gradients).is_some());
}

#[test]
fn a_mixture_of_equal_attentions_is_the_attention_for_any_router() {
    let device = plain();
    let config = AttentionConfig::new(4, 2, 2);
    let attention = config.init(8, &device);
    let x = random([2, 5, 8], &device);
    for shared_keys in [false, true] {
        let mixture =
            AttentionMixture::of(&[attention.clone(), attention.clone(), attention.clone()], shared_keys, &device);
        assert_eq!(mixture.keys.len(), if shared_keys { 1 } else { 3 });
        let (output, weights) = mixture.forward(x.clone());
        assert_eq!(weights.dims(), [10, 3]);
        assert_close(&output, &attention.forward(x.clone()), 1e-5);
    }
    let of = |shared: bool| AttentionMixtureConfig::new(8, 3, config.clone()).with_shared_keys(shared).init(&device);
    // Two key and two value maps of 8 x 4 fewer.
    assert_eq!(of(false).num_params() - of(true).num_params(), 4 * 32);
    let (own, shared) = (of(false), of(true));
    let first = own.forward(x.clone()).0;
    assert_ne!(values(&first), values(&attention.forward(x.clone())));
    assert_eq!(shared.forward(x).0.dims(), [2, 5, 8]);
}

#[test]
fn a_context_filters_the_pool_and_tokens_mix_what_is_left() {
    let layer = CoarseToFineConfig::new(8, 4, 6, 5).with_chosen(2).init(&autodiff());
    let (x, context) = (random([3, 4, 8], &autodiff()), random([3, 4], &autodiff()));
    let output = layer.forward(x.clone(), context.clone());
    let coarse = values(&output.coarse);
    for sequence in 0..3 {
        let logits = &coarse[sequence * 5..][..5];
        for token in 0..4 {
            let chosen = output.routing.assignment.token(sequence * 4 + token);
            let least = chosen.iter().map(|expert| logits[*expert as usize]).fold(f32::INFINITY, f32::min);
            assert!((0..5).filter(|expert| !chosen.contains(expert)).all(|expert| logits[expert as usize] <= least));
        }
    }
    let sums = values(&output.routing.weights.clone().sum_dim(1));
    assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-6), "{sums:?}");
    // The coarse choice learns from its labels alone: it is a hard one.
    let gradients = output.hidden.clone().square().sum().backward();
    assert!(layer.coarse.weight.val().grad(&gradients).is_none());
    assert!(layer.fine.weight.val().grad(&gradients).is_some());
    let helped = Tensor::<2>::from_floats([[1.0, 0.0, 0.0, 1.0, 0.0]; 3], &autodiff());
    let gradients = output.coarse_loss(helped).backward();
    assert!(layer.coarse.weight.val().grad(&gradients).is_some());
    // With the whole pool it is a dense mixture by softmax.
    let all = CoarseToFineConfig::new(8, 4, 6, 5).with_chosen(5).init(&plain());
    let router = TopKRouterConfig::new(8, 5).with_top_k(5).init(&plain());
    let mut dense = MoeLayer::new(router, all.experts.clone());
    dense.router.gate = all.fine.clone();
    let flat = x.inner();
    let expected = dense.forward(flat.clone()).hidden;
    assert_close(&all.forward(flat, context.inner()).hidden, &expected, 1e-5);
}

#[test]
fn a_task_is_chosen_for_a_sequence_and_its_capabilities_are_fused() {
    let experts = CapabilityExpertsConfig::new(8, 6, 3).with_capabilities(2).with_rank(2);
    let model = TwoLevelRewardConfig::new(experts.clone()).init(&autodiff());
    let (better, worse) = (random([4, 5, 8], &autodiff()), random([4, 5, 8], &autodiff()));
    let lengths = [5, 3, 1, 4];
    let reward = |hidden: &Tensor<3>| model.forward(hidden.clone(), &lengths).0;
    let margin = |a: &Tensor<3>, b: &Tensor<3>| {
        values(&TwoLevelReward::preference_loss(reward(a), reward(b)))[0] - std::f32::consts::LN_2
    };
    // loss(d) - loss(-d) = -mean(d): swapping turns the sign of the margin.
    let mean = values(&(reward(&better) - reward(&worse)).mean())[0];
    assert!((margin(&better, &worse) - margin(&worse, &better) + mean).abs() < 1e-5);
    // What follows the last token does not count.
    let tail = Tensor::cat(vec![better.clone().narrow(1, 0, 3), random([4, 2, 8], &autodiff())], 1);
    let of = |hidden: Tensor<3>| values(&model.forward(hidden, &[3, 3, 1, 2]).0);
    assert_eq!(of(better.clone()), of(tail));

    // Tasks that no sequence went to have no gradient, and the last phase trains what fuses alone.
    let (rewards, routing) = model.forward(better.clone(), &lengths);
    let gradients = rewards.sum().backward();
    let of_fuse = values(&model.experts.fuse.val().grad(&gradients).unwrap());
    for (task, load) in routing.assignment.loads(3).into_iter().enumerate() {
        let touched = of_fuse[task * 16 * 8..][..16 * 8].iter().any(|value| *value != 0.0);
        assert_eq!(touched, load > 0, "task {task}");
    }
    let (_, routing) = model.forward(better.clone(), &lengths);
    let labeled = TwoLevelReward::task_loss(&routing, &[0, 1, 2, 0]).backward();
    assert!(model.router.gate.weight.val().grad(&labeled).is_some());
    let mut last = model.clone();
    last.experts = last.experts.fusing_only();
    let gradients = last.forward(better, &lengths).0.sum().backward();
    assert!(last.experts.up[0].a.val().grad(&gradients).is_none());
    assert!(last.experts.network.up.val().grad(&gradients).is_none());
    assert!(last.experts.fuse.val().grad(&gradients).is_some());

    // Additions begin at zero: all capabilities see the same.
    let plain = experts.init(&plain());
    let other = CapabilityExperts { up: plain.up.iter().rev().cloned().collect(), ..plain.clone() };
    let x = random([6, 8], &common::plain());
    let segments = Segments::even(3, 2);
    assert_close(&plain.forward(x.clone(), &segments), &other.forward(x, &segments), 0.0);
}

#[test]
fn a_progressive_norm_goes_from_a_layer_norm_to_a_linear_map() {
    let norm = ProgressiveNormConfig::new(6).init(&autodiff());
    let x = random([32, 6], &autodiff()) * 2.0 + 1.0;
    assert_close(&norm.forward(x.clone()), &norm.layer.forward(x.clone()), 1e-5);
    let half = norm.clone().at(0.5);
    let batch = norm.batch.forward(x.clone()) + x.clone();
    let mean = (norm.layer.forward(x.clone()) + batch.clone()) / 2.0;
    assert_close(&half.forward(x.clone()), &mean, 1e-5);
    let last = norm.at(1.0);
    assert_eq!(last.lambda(), 0.0);
    assert_close(&last.forward(x.clone()), &batch, 1e-5);

    // In evaluation it is affine, whatever its place, and folds into the next map, with a bias or without.
    let valid = last.at(0.3).valid();
    let x = x.inner();
    for bias in [false, true] {
        let next = burn::nn::LinearConfig::new(6, 4).with_bias(bias).init(&plain());
        assert_close(&valid.fold(&next).forward(x.clone()), &next.forward(valid.forward(x.clone())), 1e-5);
    }
    let tokens = |from: usize| valid.forward(x.clone().narrow(0, from, 4));
    assert_close(&valid.forward(x.clone()).narrow(0, 8, 4), &tokens(8), 1e-6);
}

#[test]
fn a_unified_norm_smooths_its_statistics_and_its_gradient() {
    let device = autodiff();
    let norm = UnifiedNormConfig::new(4).with_window(2).with_warmup(0).init(&device);
    let batch = |scale: f64| random([64, 4], &plain()) * scale;
    let (first, second, third) = (batch(1.0), batch(2.0), batch(3.0));
    let squares = |x: &Tensor<2>| values(&x.clone().square().mean_dim(0));
    let root = |squares: Vec<f32>| {
        let roots: Vec<f32> = squares.iter().map(|square| (square + 1e-5).sqrt()).collect();
        Tensor::<2>::from_data(burn::tensor::TensorData::new(roots, [1, 4]), &plain())
    };
    // By the batch's own statistics until the window is full, and with the derivative of a norm by them.
    let x = Tensor::<2>::from_inner(first.clone()).require_grad();
    let output = norm.forward(x.clone());
    assert_close(&output.clone().inner(), &(first.clone() / root(squares(&first))), 1e-4);
    let direction = random([64, 4], &plain());
    let gradients = (output * Tensor::from_inner(direction.clone())).sum().backward();
    let by_itself = |x: Tensor<2>| {
        let root = (x.clone().square().mean_dim(0) + 1e-5).sqrt();
        (x / root * direction.clone()).sum().into_scalar::<f32>()
    };
    check_gradient(&first, &x.grad(&gradients).unwrap(), by_itself);
    norm.observe(&gradients);

    norm.forward(Tensor::from_inner(second.clone()));
    let before = values(&norm.projection.value_sync());
    let x = Tensor::<2>::from_inner(third.clone()).require_grad();
    let output = norm.forward(x.clone());
    let geometric: Vec<f32> = squares(&second).iter().zip(squares(&third)).map(|(a, b)| (a * b).sqrt()).collect();
    let z = third.clone() / root(geometric.clone());
    assert_close(&output.clone().inner(), &z, 1e-4);
    // g / s - p z / s with the projection of the steps before.
    let gradients = (output * Tensor::from_inner(direction.clone())).sum().backward();
    let projection = Tensor::<2>::from_data(burn::tensor::TensorData::new(before, [1, 4]), &plain());
    let expected = (direction.clone() - z.clone() * projection) / root(geometric);
    assert_close(&x.grad(&gradients).unwrap(), &expected, 1e-4);
    // The gradient of gamma gives the projection of this step.
    let old = values(&norm.projection.value_sync());
    norm.observe(&gradients);
    let current = values(&(direction * z).mean_dim(0));
    let kept = values(&norm.projections.value_sync());
    let found = values(&norm.projection.value_sync());
    for (i, (current, old)) in current.iter().zip(&old).enumerate() {
        // The third step has the second row of the window, the second was not observed.
        assert!((kept[4 + i] - current).abs() < 1e-4, "{kept:?}, {current}");
        let mean = (kept[i] + kept[4 + i]) / 2.0;
        assert!((found[i] - (0.9 * old + 0.1 * mean)).abs() < 1e-5);
    }
    let valid = norm.valid();
    let next = burn::nn::LinearConfig::new(4, 3).init(&plain());
    assert_close(&valid.fold(&next).forward(first.clone()), &next.forward(valid.forward(first)), 1e-5);
}

#[test]
fn a_unified_norm_leaves_out_a_batch_that_stands_out() {
    let norm = UnifiedNormConfig::new(4).with_window(3).with_warmup(0).with_filter(true).init(&autodiff());
    let forward = |x: Tensor<2>| norm.forward(Tensor::from_inner(x)).inner();
    for _ in 0..6 {
        forward(random([64, 4], &plain()));
    }
    let (running, left_out) = (values(&norm.running.value_sync()), norm.left_out());
    let outlier = random([64, 4], &plain()) * 1000.0;
    let output = forward(outlier.clone());
    assert_eq!(norm.left_out(), left_out + 1);
    // It is normalized by itself, and its place in the window is taken by the running statistics.
    let deviation = values(&output.square().mean_dim(0));
    assert!(deviation.iter().all(|square| (square - 1.0).abs() < 1e-3), "{deviation:?}");
    let window = values(&norm.window.value_sync());
    assert!(window.iter().all(|square| *square < 10.0), "{window:?}");
    assert!(window.windows(4).any(|row| row == running), "{window:?}, {running:?}");
}

#[test]
fn prompts_go_to_the_model_of_their_category() {
    let table = CategoryTable { models: vec![2, 0, 1] };
    let config = CompositionRouterConfig::new(6, table.clone());
    let router = config.init(&autodiff());
    let embeddings = random([7, 6], &autodiff()) * 3.0;
    let sent = router.forward(embeddings.clone());
    let logits = values(&sent.logits);
    for (prompt, (category, model)) in sent.categories.iter().zip(&sent.models).enumerate() {
        let row = &logits[prompt * 3..][..3];
        assert!(row.iter().all(|logit| *logit <= row[*category]));
        assert_eq!(*model, table.models[*category]);
    }
    let gradients = sent.category_loss(&[0, 1, 2, 0, 1, 2, 0]).backward();
    assert!(router.category.weight.val().grad(&gradients).is_some());
    // No prompt is clear enough for a limit of nothing: all are general, which is the last category.
    let mut careful = config.with_uncertain_above(Some(0.0)).init(&plain());
    careful.category = burn::module::Module::valid(&router.category);
    let sent = careful.forward(embeddings.clone().inner());
    assert!(sent.categories.iter().all(|category| *category == 2) && sent.models.iter().all(|model| *model == 1));
    let other = router.with_table(CategoryTable { models: vec![5, 5, 5] });
    assert!(other.forward(embeddings).models.iter().all(|model| *model == 5));
}

/// A small memory of two keys per side of which every token reads all four slots, so that no choice moves.
fn whole_memory() -> UltraMemConfig {
    UltraMemConfig::new(6, 2).with_top_k(4).with_key_dim(3).with_value_dim(4).with_pre_value_dim(3)
}

#[test]
fn a_memory_of_all_slots_is_the_sum_over_slots() {
    let device = plain();
    let memory = whole_memory().init(&device);
    let layer = &memory.layers[0];
    let x = random([5, 6], &device);
    let (output, rows) = memory.forward(0, x.clone());
    assert!(rows.chunks(4).all(|rows| {
        let mut rows = rows.to_vec();
        rows.sort_unstable();
        rows == [0, 1, 2, 3]
    }));
    let query = layer.query.forward(x.clone()).reshape([5, 2, 2, 3]).permute([1, 2, 0, 3]);
    let scores = layer.query_norm.forward(query).matmul(layer.key_norm.forward(layer.keys.val()).transpose());
    let (scores, cores) = (values(&scores), values(&layer.cores.val())); // [2, rank, tokens, keys]
    let score = |side: usize, component: usize, token: usize, key: usize| {
        scores[((side * 2 + component) * 5 + token) * 2 + key]
    };
    let (reads, table) = (values(&memory.table.reads.val()), values(&memory.table.values.val()));
    let projected = values(&layer.project.forward(x));
    let mut given = vec![0f32; 5 * 4];
    for token in 0..5 {
        for slot in 0..4 {
            let inner: f32 = (0..3).map(|i| projected[token * 3 + i] * reads[slot * 3 + i]).sum();
            for core in 0..2 {
                let g: f32 = (0..4)
                    .map(|i| score(0, i / 2, token, slot / 2) * cores[core * 4 + i] * score(1, i % 2, token, slot % 2))
                    .sum();
                (0..2).for_each(|i| given[token * 4 + core * 2 + i] += inner * g * table[slot * 4 + core * 2 + i]);
            }
        }
    }
    let given = Tensor::<2>::from_data(burn::tensor::TensorData::new(given, [5, 4]), &device);
    assert_close(&output, &layer.output.forward(given), 1e-5);
}

#[test]
fn a_memory_learns_through_scores_reads_and_values() {
    use burn::module::Param;
    // Small values would make gradients too small to compare.
    let memory = drawn(whole_memory().init(&autodiff()), 0.6);
    let x = random([5, 6], &plain());
    let loss = |memory: &UltraMem, x: Tensor<2>| memory.forward(0, x).0.square().sum();
    let gradients = loss(&memory, Tensor::from_inner(x.clone())).backward();
    let valid = memory.valid();
    let with = |change: &dyn Fn(&mut UltraMem)| {
        let mut memory = valid.clone();
        change(&mut memory);
        loss(&memory, x.clone()).into_scalar::<f32>()
    };
    let (layer, at) = (&memory.layers[0], &valid.layers[0]);
    let keys = layer.keys.val().grad(&gradients).unwrap();
    check_gradient(&at.keys.val(), &keys, |moved| with(&|m| m.layers[0].keys = Param::from_tensor(moved.clone())));
    let cores = layer.cores.val().grad(&gradients).unwrap();
    check_gradient(&at.cores.val(), &cores, |moved| with(&|m| m.layers[0].cores = Param::from_tensor(moved.clone())));
    let query = layer.query.weight.val().grad(&gradients).unwrap();
    let change = |moved: Tensor<2>| with(&|m| m.layers[0].query.weight = Param::from_tensor(moved.clone()));
    check_gradient(&at.query.weight.val(), &query, change);
    let reads = memory.table.reads.val().grad(&gradients).unwrap();
    check_gradient(&valid.table.reads.val(), &reads, |moved| {
        with(&|m| m.table.reads = Param::from_tensor(moved.clone()))
    });
    let given = memory.table.values.val().grad(&gradients).unwrap();
    check_gradient(&valid.table.values.val(), &given, |moved| {
        with(&|m| m.table.values = Param::from_tensor(moved.clone()))
    });
}

#[test]
fn layers_reach_their_share_of_a_ring_and_add_up_where_they_meet() {
    let rows = |memory: &UltraMem, layer: usize, seed: u64| {
        let device = memory.table.values.val().device();
        device.seed(seed);
        let mut rows = memory.forward(layer, random([200, 6], &device)).1;
        rows.sort_unstable();
        rows.dedup();
        rows
    };
    let large = UltraMemInit::VarianceMatched { d_ff: 64, layers: 3, score_deviation: 0.0 };
    let config = UltraMemConfig::new(6, 4).with_layers(3).with_top_k(2).with_key_dim(3).with_init(large);
    let own = config.init(&plain());
    for layer in 0..3u32 {
        assert!(rows(&own, layer as usize, 1).iter().all(|row| (16 * layer..16 * (layer + 1)).contains(row)));
    }
    let shared = config.clone().with_share(Some(0.75)).init(&autodiff());
    assert_eq!((shared.layers[2].keys.dims()[2], shared.table.values.dims()[0]), (6, 48)); // 36 of 48 rows
    // The third window begins at row 32 and wraps.
    assert!(rows(&shared, 2, 1).iter().all(|row| *row >= 32 || *row < 20));
    let x = random([40, 6], &autodiff());
    let of = |layers: &[usize]| {
        let sum = layers.iter().map(|layer| shared.forward(*layer, x.clone()).0.square().sum()).reduce(|a, b| a + b);
        shared.table.values.val().grad(&sum.unwrap().backward()).unwrap()
    };
    assert_close(&of(&[0, 1]), &(of(&[0]) + of(&[1])), 1e-5);
    // Rows that nobody read have no gradient at all.
    let read = shared.forward(0, x.clone()).1;
    for (row, gradient) in values(&of(&[0])).chunks(32).enumerate() {
        assert_eq!(gradient.iter().any(|value| *value != 0.0), read.contains(&(row as u32)), "row {row}");
    }
    // Several key pairs per row reach the same rows, in an order that the seed gives again.
    let expanded = || config.clone().with_expand(2).with_seed(7).init(&plain());
    assert_eq!(expanded().layers[0].keys.dims()[2], 8);
    assert!(rows(&expanded(), 0, 1).iter().all(|row| *row < 16));
    plain().seed(5);
    let first = expanded();
    plain().seed(5);
    let x = random([9, 6], &plain());
    assert_eq!(first.forward(0, x.clone()).1, first.clone().forward(0, x).1);
}

#[test]
fn values_may_begin_with_the_variance_of_a_network() {
    let (d, d_ff, layers) = (128, 256, 4);
    let init = UltraMemInit::VarianceMatched { d_ff, layers, score_deviation: 0.5 };
    let config = UltraMemConfig::new(d, 8).with_value_dim(64).with_pre_value_dim(32).with_top_k(16).with_init(init);
    let memory = config.init(&plain());
    let deviation = |table: &Tensor<2>| {
        let values = values(table);
        (values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32).sqrt()
    };
    let expected = (0.2 * (d_ff * d) as f32 / (16.0 * 1.25 * 32.0 * 64.0 * layers as f32)).powf(0.25);
    let found = deviation(&memory.table.values.val());
    assert!((found / expected - 1.0).abs() < 0.1, "{found}, expected {expected}");
}

#[test]
fn one_router_decides_for_all_layers_before_the_first_and_by_earlier_tokens_alone() {
    use burn::tensor::{Int, TensorData};
    let config = ReadMeConfig::new(PreGateConfig::new(11, 3).with_d_model(8).with_heads(2), 6, 2, 5, 4);
    let model = config.init(&autodiff());
    let ids = |values: [i64; 6]| Tensor::<2, Int>::from_data(TensorData::new(values.to_vec(), [1, 6]), &autodiff());
    let routing = model.router.route(ids([1, 2, 3, 4, 5, 6]));
    let other = model.router.route(ids([1, 2, 3, 10, 0, 9]));
    let first = |routing: &Routing| routing.logits.clone().narrow(0, 0, 3);
    assert_close(&first(&routing), &first(&other), 1e-6);
    assert!(values(&routing.weights).iter().all(|weight| *weight == 1.0));
    // Each token runs through the shared network and its one expert, the same one in every layer.
    let x = random([6, 6], &autodiff());
    for layer in 0..2 {
        let output = model.forward(layer, x.clone(), &routing);
        for token in 0..6 {
            let row = x.clone().narrow(0, token, 1);
            let expert = routing.assignment.token(token)[0] as usize;
            let part = |of: &burn::module::Param<Tensor<3>>| of.val().narrow(0, expert, 1).squeeze_dim::<2>(0);
            let experts = &model.experts[layer];
            let gate = Activation::Silu.of(row.clone().matmul(part(&experts.gate)));
            let own = (gate * row.clone().matmul(part(&experts.up))).matmul(part(&experts.down));
            let expected = model.shared[layer].forward(row) + own;
            assert_close(&output.clone().narrow(0, token, 1), &expected, 1e-5);
        }
    }
    // The loss is the cross-entropy with 0.75 of a smoothed label and 0.25 of a softmax, by hand for a uniform router.
    let mut uniform = routing.clone();
    uniform.logits = uniform.logits.zeros_like();
    let scores = [3.0, 0.0, -3.0].repeat(6);
    let loss = values(&PreGate::loss(&uniform, &scores))[0];
    assert!((loss - 3f32.ln()).abs() < 1e-5, "{loss}");
    let gradients = PreGate::loss(&routing, &scores).backward();
    assert!(model.router.embedding.weight.val().grad(&gradients).is_some());
    let towards = |best: usize| {
        let mut routing = routing.clone();
        let row: Vec<f32> = (0..3).map(|expert| if expert == best { 1.0 } else { 0.0 }).collect();
        routing.logits = Tensor::from_data(TensorData::new(row.repeat(6), [6, 3]), &autodiff());
        values(&PreGate::loss(&routing, &scores))[0]
    };
    assert!(towards(0) < towards(1) && towards(1) < towards(2));
}

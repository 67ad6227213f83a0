//! Gradients against difference quotients, with the choice of experts held fixed.

use crate::common;

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use common::*;
use moe_nn::*;

/// Experts 0 and 2 have rows, expert 1 has none.
const OFFSETS: [usize; 4] = [0, 3, 3, 5];

#[test]
fn grouped_products_are_products_with_the_matrix_of_each_row() {
    let device = plain();
    let (rows, matrices) = (random([5, 4], &device), random([3, 4, 6], &device));
    let product = grouped_product(rows.clone(), matrices.clone(), &OFFSETS);
    let of = |expert: usize, from: usize, to: usize| {
        rows.clone().narrow(0, from, to - from).matmul(matrices.clone().narrow(0, expert, 1).reshape([4, 6]))
    };
    assert_close(&product, &Tensor::cat(vec![of(0, 0, 3), of(2, 3, 5)], 0), 1e-5);
    let other = random([5, 6], &device);
    let outer = grouped_outer(rows.clone(), other.clone(), &OFFSETS);
    let first = rows.narrow(0, 0, 3).transpose().matmul(other.narrow(0, 0, 3));
    assert_close(&outer.clone().narrow(0, 0, 1).reshape([4, 6]), &first, 1e-5);
    assert_eq!(values(&outer.narrow(0, 1, 1)), [0.0; 24]);
}

#[test]
fn gradients_of_grouped_products_are_difference_quotients() {
    let (rows, matrices, other) = (random([5, 4], &plain()), random([3, 4, 6], &plain()), random([5, 6], &plain()));
    let product = |rows: Tensor<2>, matrices: Tensor<3>| {
        let weights = Tensor::from_inner(other.clone());
        let weights = if rows.device().is_autodiff() { weights } else { other.clone() };
        (grouped_product(rows, matrices, &OFFSETS).tanh() * weights).sum()
    };
    let scalar = |loss: Tensor<1>| values(&loss)[0];
    let (r, m) = (Tensor::from_inner(rows.clone()).require_grad(), Tensor::from_inner(matrices.clone()).require_grad());
    let gradients = product(r.clone(), m.clone()).backward();
    check_gradient(&rows, &r.grad(&gradients).unwrap(), |rows| scalar(product(rows, matrices.clone())));
    check_gradient(&matrices, &m.grad(&gradients).unwrap(), |matrices| scalar(product(rows.clone(), matrices)));

    let outer = |left: Tensor<2>, right: Tensor<2>| grouped_outer(left, right, &OFFSETS).tanh().sum();
    let (l, r) = (Tensor::from_inner(rows.clone()).require_grad(), Tensor::from_inner(other.clone()).require_grad());
    let gradients = outer(l.clone(), r.clone()).backward();
    check_gradient(&rows, &l.grad(&gradients).unwrap(), |left| scalar(outer(left, other.clone())));
    check_gradient(&other, &r.grad(&gradients).unwrap(), |right| scalar(outer(rows.clone(), right)));
}

/// The gradients of a layer of three experts: of the input, of the router, and of one parameter of the experts.
fn check_layer<X: ExpertNetworks, const D: usize>(
    experts: X,
    parameter: impl Fn(&X) -> Tensor<D>,
    with_parameter: impl Fn(X, Tensor<D>) -> X,
) {
    // Logits are the first three numbers of a token, and far apart: a small step changes no choice.
    let mut router = TopKRouterConfig::new(6, 3).with_top_k(2).init(&autodiff());
    let eye = Tensor::cat(vec![Tensor::<2>::eye(3, &autodiff()), Tensor::zeros([3, 3], &autodiff())], 0);
    router.gate.weight = Param::from_tensor(eye);
    let layer = MoeLayer::new(router, experts);
    let rows = (0..7).flat_map(|token| {
        let mut row = [0.0, 0.0, 0.0, 0.3, -0.2, 0.5];
        row[token % 3] = 1.5;
        row[(token + 1 + token / 3 % 2) % 3] = -1.0;
        row
    });
    let rows = Tensor::<2>::from_data(TensorData::new(rows.collect::<Vec<f32>>(), [7, 6]), &plain());
    let start = rows + random([7, 6], &plain()) * 0.05;
    let loss = |layer: &MoeLayer<TopKRouter, X>, x: Tensor<2>| layer.forward(x).hidden.tanh().sum();

    let x = Tensor::from_inner(start.clone()).require_grad();
    let gradients = loss(&layer, x.clone()).backward();
    let valid = layer.valid();
    let scalar = |loss: Tensor<1>| values(&loss)[0];
    check_gradient(&start, &x.grad(&gradients).unwrap(), |x| scalar(loss(&valid, x)));

    let of_experts = parameter(&layer.experts).grad(&gradients).unwrap();
    check_gradient(&parameter(&valid.experts), &of_experts, |moved| {
        let mut layer = valid.clone();
        layer.experts = with_parameter(layer.experts, moved);
        scalar(loss(&layer, start.clone()))
    });

    let gate = layer.router.gate.weight.val().grad(&gradients).unwrap();
    check_gradient(&valid.router.gate.weight.val(), &gate, |moved| {
        let mut layer = valid.clone();
        layer.router.gate.weight = Param::from_tensor(moved);
        scalar(loss(&layer, start.clone()))
    });
}

#[test]
fn gradients_of_gated_experts_are_difference_quotients() {
    let experts = GatedExpertsConfig::new(6, 5, 3).with_bias(true).init(&autodiff());
    check_layer(
        experts,
        |x| x.gate.val(),
        |mut x, gate| {
            x.gate = Param::from_tensor(gate);
            x
        },
    );
    let clamped = Some(Clamped { limit: 7.0, alpha: 1.702 });
    let experts = GatedExpertsConfig::new(6, 5, 3).with_clamped(clamped).init(&autodiff());
    check_layer(
        experts,
        |x| x.down.val(),
        |mut x, down| {
            x.down = Param::from_tensor(down);
            x
        },
    );
}

#[test]
fn gradients_of_experts_without_a_gate_are_difference_quotients() {
    let experts = MlpExpertsConfig::new(6, 5, 3).with_bias(true).init(&autodiff());
    check_layer(
        experts,
        |x| x.up.val(),
        |mut x, up| {
            x.up = Param::from_tensor(up);
            x
        },
    );
}

#[test]
fn gradients_of_low_rank_experts_are_difference_quotients() {
    let mut experts = LowRankExpertsConfig::new(6, 5, 3, 2).with_common(true).init(&autodiff());
    experts.up.b = Param::from_tensor(random([3, 2, 5], &autodiff()));
    check_layer(
        experts,
        |x| x.down.b.val(),
        |mut x, b| {
            x.down.b = Param::from_tensor(b);
            x
        },
    );
}

#[test]
fn gradients_of_modulated_experts_are_difference_quotients() {
    let mut experts = FilmExpertsConfig::new(6, 5, 3).init(&autodiff());
    experts.beta = Param::from_tensor(random([3, 5], &autodiff()));
    check_layer(
        experts,
        |x| x.gamma.val(),
        |mut x, gamma| {
            x.gamma = Param::from_tensor(gamma);
            x
        },
    );
}

#[test]
fn ternary_weights_pass_their_gradient_straight_through() {
    let weights = Tensor::from_inner(random([2, 3, 4], &plain())).require_grad();
    let made = ternary(weights.clone());
    for expert in 0..2 {
        let made = values(&made.clone().narrow(0, expert, 1));
        let kept = values(&weights.clone().narrow(0, expert, 1));
        let scale = kept.iter().map(|value| value.abs()).sum::<f32>() / 12.0;
        for (made, kept) in made.iter().zip(kept) {
            assert!((made - (kept / scale).round().clamp(-1.0, 1.0) * scale).abs() < 1e-5);
        }
    }
    let factors = random([2, 3, 4], &plain());
    let gradients = (made * Tensor::from_inner(factors.clone())).sum().backward();
    assert_close(&weights.grad(&gradients).unwrap(), &factors, 1e-6);
}

#[test]
fn a_soft_layer_has_the_gradients_of_its_function() {
    let experts = GatedExpertsConfig::new(6, 5, 3).init(&autodiff());
    let layer = SoftMoeConfig::new(6).with_slots(2).init(experts, &autodiff());
    let context = RouteContext::default();
    let start = random([7, 6], &plain());
    let x = Tensor::from_inner(start.clone()).require_grad();
    let gradients = layer.forward(x.clone(), &context).sum().backward();
    let valid = layer.valid();
    check_gradient(&start, &x.grad(&gradients).unwrap(), |x| values(&valid.forward(x, &context).sum())[0]);
}

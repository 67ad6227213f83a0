use super::*;

fn parameters(values: &[f32]) -> Parameters {
    let mut parameters = Parameters::new();
    parameters.insert("w", values.to_vec());
    parameters
}

/// Steps with these gradients; the values after each.
fn steps(optimizer: Optimizer, parameters: &mut Parameters, rate: f64, gradients: &[&[f32]]) -> Vec<Vec<f32>> {
    let mut after = Vec::new();
    for gradient in gradients {
        parameters.gradient_mut("w").unwrap().copy_from_slice(gradient);
        optimizer.step(parameters, rate, 1.0).unwrap();
        assert!(parameters.get("w").unwrap().gradient().is_empty());
        after.push(parameters.get("w").unwrap().values.clone());
    }
    after
}

fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= tolerance * expected.abs().max(1.0), "{found} instead of {expected}");
    }
}

#[test]
fn two_steps_of_adamw_by_hand() {
    let adam = AdamW { beta1: 0.5, beta2: 0.75, epsilon: 1e-8, weight_decay: 0.1 };
    let after = steps(Optimizer::AdamW(adam), &mut parameters(&[2.0]), 0.1, &[&[4.0], &[-2.0]]);
    // the first step is the sign of the gradient, and decay
    let w = 2.0 - 0.1 * (1.0 + 0.2);
    assert_close(&after[0], &[w], 1e-6);
    let (m, v) = (0.5 * 2.0 - 1.0, 0.75 * 4.0 + 0.25 * 4.0);
    assert_close(&after[1], &[w - 0.1 * (m / 0.75 / f32::sqrt(v / (1.0 - 0.5625)) + 0.1 * w)], 1e-6);
}

const START: [f32; 6] = [0.519, -1.313, 0.192, 0.543, -2.219, 0.259];
const GRADIENTS: [&[f32]; 5] = [
    &[1.541, -0.293, -2.179, 0.568, -1.085, -1.399],
    &[0.403, 0.838, -0.719, -0.403, -0.597, 0.182],
    &[-0.857, 1.101, -1.071, 0.123, -0.566, 0.373],
    &[-0.892, -1.509, 0.37, 1.457, 0.94, 0.775],
    &[0.192, 1.264, -1.29, -0.791, -0.021, -0.718],
];

/// Values that `torch.optim` 2.15 has after five steps with a rate of 0.03.
#[test]
fn five_steps_of_pytorch() {
    let adamw = AdamW { beta2: 0.95, weight_decay: 0.1, ..AdamW::default() };
    let sgd = Sgd { momentum: 0.9, nesterov: true, weight_decay: 0.1, ..Sgd::default() };
    let rms_prop = RmsProp { momentum: 0.5, ..RmsProp::default() };
    let ada_grad = AdaGrad { rate_decay: 0.1, ..AdaGrad::default() };
    let expected = [
        (Optimizer::AdamW(adamw), [0.450_289_52, -1.307_076_5, 0.312_819_33, 0.472_217_65, -2.083_113_4, 0.311_958_64]),
        (Optimizer::Sgd(sgd), [0.381_347_45, -1.371_069_1, 0.722_149_85, 0.401_114_14, -1.903_924_7, 0.356_466_6]),
        (
            Optimizer::RmsProp(rms_prop),
            [0.217_580_02, -1.500_573_2, 1.245_160_6, -0.077_098_03, -1.399_634_6, 0.539_636_25],
        ),
        (
            Optimizer::AdaGrad(ada_grad),
            [0.502_121_03, -1.322_543_3, 0.247_428_83, 0.513_077_1, -2.178_299_2, 0.276_807_58],
        ),
    ];
    for (optimizer, expected) in expected {
        let after = steps(optimizer, &mut parameters(&START), 0.03, &GRADIENTS);
        assert_close(&after[4], &expected, 1e-6);
    }
}

/// A step of one of Burn's optimizers, on plain tensors.
fn burn_steps<O: burn_optim::Optimizer>(optimizer: &O, rate: f64) -> Vec<f32> {
    use ::burn::tensor::{Device, Tensor, TensorData};
    let device = Device::default();
    let tensor = |values: &[f32]| Tensor::<1>::from_data(TensorData::new(values.to_vec(), [values.len()]), &device);
    let (mut values, mut state) = (tensor(&START), None);
    for gradient in GRADIENTS {
        (values, state) = optimizer.step::<1>(rate, values, tensor(gradient), state);
    }
    crate::host::into_vec(values)
}

#[test]
fn ours_agree_with_burns() {
    let adamw = AdamW { epsilon: 1e-6, weight_decay: 0.2, ..AdamW::default() };
    let burns = burn_optim::AdamWConfig::new().with_epsilon(1e-6).with_weight_decay(0.2).build();
    let after = steps(Optimizer::AdamW(adamw), &mut parameters(&START), 0.05, &GRADIENTS);
    assert_close(&after[4], &burn_steps(&burns, 0.05), 1e-5);

    let lamb = Lamb { weight_decay: 0.2, ..Lamb::default() };
    let burns = burn_optim::LambConfig::new().with_weight_decay(0.2).build();
    let after = steps(Optimizer::Lamb(lamb), &mut parameters(&START), 0.05, &GRADIENTS);
    assert_close(&after[4], &burn_steps(&burns, 0.05), 1e-5);

    // the adapter, with its state taken apart and put together between steps
    let lion = Lion { weight_decay: 0.1, ..Lion::default() };
    let after = steps(Optimizer::Lion(lion), &mut parameters(&START), 0.05, &GRADIENTS);
    assert_close(&after[4], &burn_steps(&lion.build(), 0.05), 1e-7);
    let adan = Adan { weight_decay: 0.1, ..Adan::default() };
    let after = steps(Optimizer::Adan(adan), &mut parameters(&START), 0.05, &GRADIENTS);
    assert_close(&after[4], &burn_steps(&adan.build(), 0.05), 1e-7);
}

/// Two experts of one tensor take the steps that they take as two tensors, and the ratio is that of norms.
#[test]
fn every_piece_has_its_own_trust_ratio() {
    let lamb = Lamb { weight_decay: 0.1, ..Lamb::default() };
    let mut fused = Parameters::new();
    fused.add("w", Parameter::new(START.to_vec()).in_groups(2).unwrap());
    let fused = steps(Optimizer::Lamb(lamb), &mut fused, 0.1, &GRADIENTS);
    for piece in [0..3, 3..6] {
        let gradients = GRADIENTS.map(|gradient| &gradient[piece.clone()]);
        let own = steps(Optimizer::Lamb(lamb), &mut parameters(&START[piece.clone()]), 0.1, &gradients);
        assert_eq!(fused[4][piece], own[4]);
    }
    let whole = steps(Optimizer::Lamb(lamb), &mut parameters(&START), 0.1, &GRADIENTS);
    assert_ne!(fused[4], whole[4]);

    // the first step without decay: the direction is the sign, its norm sqrt(2), the ratio 5 / sqrt(2)
    let plain = Optimizer::Lamb(Lamb { epsilon: 1e-12, ..Lamb::default() });
    let after = steps(plain, &mut parameters(&[3.0, -4.0]), 0.1, &[&[2.0, 0.5]]);
    let size = 0.1 * 5.0 / 2f32.sqrt();
    assert_close(&after[0], &[3.0 - size, -4.0 - size], 1e-6);
    let capped = Optimizer::Lamb(Lamb { epsilon: 1e-12, max_ratio: Some(0.5), ..Lamb::default() });
    assert_close(&steps(capped, &mut parameters(&[3.0, -4.0]), 0.1, &[&[2.0, 0.5]])[0], &[2.95, -4.05], 1e-6);
    // zeros have no norm: the ratio is 1
    assert_close(&steps(plain, &mut parameters(&[0.0, 0.0]), 0.1, &[&[2.0, -0.5]])[0], &[-0.1, 0.1], 1e-6);
}

#[test]
fn frozen_and_unseen_parameters_stay_as_they_are() {
    for optimizer in
        [Optimizer::AdamW(AdamW { weight_decay: 0.5, ..AdamW::default() }), Optimizer::Lion(Lion::default())]
    {
        let mut parameters = Parameters::new();
        ["seen", "unseen", "frozen"].into_iter().for_each(|name| parameters.insert(name, vec![1.0, 2.0]));
        parameters.gradient_mut("frozen").unwrap().fill(1.0);
        parameters.set_active("frozen", false).unwrap();
        for _ in 0..2 {
            parameters.gradient_mut("seen").unwrap().fill(1.0);
            optimizer.step(&mut parameters, 0.1, 1.0).unwrap();
        }
        for (name, parameter) in parameters.iter() {
            assert_eq!(parameter.values == [1.0, 2.0], name != "seen", "{name}");
            assert_eq!(
                (parameter.state().steps, parameter.state().bytes() > 0),
                if name == "seen" { (2, true) } else { (0, false) }
            );
        }
    }
}

#[test]
fn the_factor_of_gradients_counts_before_anything_else() {
    for optimizer in [Optimizer::default(), Optimizer::Lamb(Lamb::default()), Optimizer::Sgd(Sgd::default())] {
        let scaled: Vec<f32> = GRADIENTS[0].iter().map(|g| g * 0.25).collect();
        let expected = steps(optimizer, &mut parameters(&START), 0.1, &[&scaled]);
        let mut parameters = parameters(&START);
        parameters.gradient_mut("w").unwrap().copy_from_slice(GRADIENTS[0]);
        optimizer.step(&mut parameters, 0.1, 0.25).unwrap();
        assert_eq!(parameters.get("w").unwrap().values, expected[0]);
    }
}

#[test]
fn optimizers_are_json() {
    let kinds = ["adamw", "lamb", "sgd", "rmsprop", "adagrad", "lion", "adan"];
    for kind in kinds {
        let json = format!(r#"{{"type":"{kind}","weight_decay":0.25}}"#);
        let optimizer: Optimizer = serde_json::from_str(&json).unwrap();
        optimizer.validate().unwrap();
        let written = serde_json::to_value(optimizer).unwrap();
        assert_eq!((written["type"].as_str(), written["weight_decay"].as_f64()), (Some(kind), Some(0.25)));
        let bad = format!(r#"{{"type":"{kind}","weight_decay":-1.0}}"#);
        let error = serde_json::from_str::<Optimizer>(&bad).unwrap().validate().unwrap_err().to_string();
        assert!(error.contains("weight_decay: found -1"), "{error}");
    }
    assert!(serde_json::from_str::<Optimizer>(r#"{"type":"adamw","rate":1}"#).is_err());
    let adam = |adam: AdamW| adam.validate().unwrap_err().to_string();
    assert!(adam(AdamW { beta2: 1.0, ..AdamW::default() }).contains("beta2: found 1"));
    assert!(adam(AdamW { epsilon: 0.0, ..AdamW::default() }).contains("epsilon"));
}

mod projection {
    use super::*;
    use crate::train::{ParameterGroup, Projection};

    fn matrix(shape: &[usize], projection: Option<Projection>) -> Parameters {
        let values = (0..shape.iter().product()).map(|i: usize| ((i * 5) % 7) as f32 / 7.0).collect();
        let mut parameters = Parameters::new();
        parameters.add("w", Parameter::with_shape(values, shape).unwrap());
        parameters.assign(&[ParameterGroup { projection, ..ParameterGroup::default() }]);
        parameters
    }

    fn gradient(seed: usize, len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * i * 3 + i * seed + seed) % 13) as f32 / 13.0 - 0.5).collect()
    }

    /// With all vectors and no refresh, the direction is Adam's in the rotated basis, rotated back.
    #[test]
    fn a_full_rank_is_adam_in_another_basis() {
        for shape in [[5, 3], [3, 5]] {
            let projection = Projection { rank: 9, gap: 1000, ..Projection::default() };
            let mut parameters = matrix(&shape, Some(projection));
            let adam = AdamW { weight_decay: 0.1, ..AdamW::default() };
            let before = parameters.get("w").unwrap().values.clone();
            let gradients: Vec<Vec<f32>> = (0..3).map(|seed| gradient(seed, 15)).collect();
            let borrowed: Vec<&[f32]> = gradients.iter().map(Vec::as_slice).collect();
            let after = steps(Optimizer::AdamW(adam), &mut parameters, 0.1, &borrowed);
            let basis = &parameters.get("w").unwrap().state().arrays["basis"];
            assert_eq!(basis.shape, [1, 3, 3]);
            let v = |i: usize, k: usize| f64::from(basis.values[i * 3 + k]);
            // orthonormal
            for (a, b) in (0..9).map(|i| (i / 3, i % 3)) {
                let dot: f64 = (0..3).map(|i| v(i, a) * v(i, b)).sum();
                assert!((dot - f64::from(u8::from(a == b))).abs() < 1e-6);
            }
            let [rows, cols] = shape;
            let (mut w, mut m, mut s) =
                (before.iter().map(|w| f64::from(*w)).collect::<Vec<_>>(), [0.0; 15], [0.0; 15]);
            for (t, g) in gradients.iter().enumerate() {
                let g = |i: usize, j: usize| f64::from(g[i * cols + j]);
                let mut direction = [0.0; 15];
                for (i, j) in (0..15).map(|at| (at / cols, at % cols)) {
                    let rotated: f64 = match rows > cols {
                        true => (0..3).map(|k| g(i, k) * v(k, j)).sum(),
                        false => (0..3).map(|k| v(k, i) * g(k, j)).sum(),
                    };
                    let at = i * cols + j;
                    m[at] = 0.9 * m[at] + 0.1 * rotated;
                    s[at] = 0.999 * s[at] + 0.001 * rotated * rotated;
                    let correct = |beta: f64| 1.0 - beta.powi(t as i32 + 1);
                    direction[at] = m[at] / correct(0.9) / ((s[at] / correct(0.999)).sqrt() + 1e-8);
                }
                for (i, j) in (0..15).map(|at| (at / cols, at % cols)) {
                    let back: f64 = match rows > cols {
                        true => (0..3).map(|k| direction[i * cols + k] * v(j, k)).sum(),
                        false => (0..3).map(|k| v(i, k) * direction[k * cols + j]).sum(),
                    };
                    w[i * cols + j] -= 0.1 * (back + 0.1 * w[i * cols + j]);
                }
                let w: Vec<f32> = w.iter().map(|w| *w as f32).collect();
                assert_close(&after[t], &w, 2e-5);
            }
        }
    }

    #[test]
    fn moments_are_small_and_stacks_are_matrices_side_by_side() {
        for shape in [[6, 4], [4, 6]] {
            let projection = Projection { rank: 2, gap: 2, scale: 0.25, ..Projection::default() };
            let gradients: Vec<Vec<f32>> = (0..5).map(|seed| gradient(seed, 48)).collect();
            let borrowed: Vec<&[f32]> = gradients.iter().map(Vec::as_slice).collect();
            let mut stack = matrix(&[2, shape[0], shape[1]], Some(projection));
            let start = stack.get("w").unwrap().values.clone();
            let after = steps(Optimizer::default(), &mut stack, 0.1, &borrowed);
            let small = if shape[0] > shape[1] { [2, 6, 2] } else { [2, 2, 6] };
            for moment in ["first", "second"] {
                assert_eq!(stack.get("w").unwrap().state().arrays[moment].shape, small);
            }
            for half in [0..24, 24..48] {
                let mut own = matrix(&shape, Some(projection));
                own.get_mut("w").unwrap().values.copy_from_slice(&start[half.clone()]);
                let halves: Vec<&[f32]> = borrowed.iter().map(|gradient| &gradient[half.clone()]).collect();
                let own = steps(Optimizer::default(), &mut own, 0.1, &halves);
                assert_eq!(after[4][half], own[4]);
            }
            // what a projected step changes has the projection's rank
            let first: Vec<f32> = after[0].iter().zip(&start).map(|(a, b)| a - b).take(24).collect();
            let matrix = faer::Mat::from_fn(shape[0], shape[1], |i, j| f64::from(first[i * shape[1] + j]));
            let values: Vec<f64> = matrix.singular_values().unwrap();
            assert!(values[1] > 1e-3 && values[2] < 1e-5 * values[0], "{values:?}");
        }
    }

    #[test]
    fn vectors_have_no_projection_and_moments_may_start_anew() {
        let projection = Projection { rank: 2, gap: 1, ..Projection::default() };
        let mut plain = matrix(&[6], Some(projection));
        let start = plain.get("w").unwrap().values.clone();
        let after = steps(Optimizer::default(), &mut plain, 0.1, &GRADIENTS);
        assert_eq!(after, steps(Optimizer::default(), &mut parameters(&start), 0.1, &GRADIENTS));
        let gradients: Vec<Vec<f32>> = (0..3).map(|seed| gradient(seed, 12)).collect();
        let borrowed: Vec<&[f32]> = gradients.iter().map(Vec::as_slice).collect();
        let run = |reset_moments| {
            let mut parameters = matrix(&[4, 3], Some(Projection { reset_moments, ..projection }));
            steps(Optimizer::default(), &mut parameters, 0.1, &borrowed)
        };
        assert_eq!(run(true)[0], run(false)[0]);
        assert_ne!(run(true)[2], run(false)[2]);
    }
}

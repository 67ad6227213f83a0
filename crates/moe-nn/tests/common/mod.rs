//! What the tests share: devices, closeness, difference quotients.
#![allow(dead_code)]

use burn::tensor::{Device, Distribution, Tensor, TensorData};

pub fn plain() -> Device {
    Device::default()
}

pub fn autodiff() -> Device {
    Device::default().autodiff()
}

pub fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

pub fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor.try_to_vec_as::<f32>().unwrap()
}

#[track_caller]
pub fn assert_close<const D: usize>(left: &Tensor<D>, right: &Tensor<D>, tolerance: f32) {
    assert_eq!(left.dims(), right.dims());
    let distance = values(left).iter().zip(values(right)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(distance <= tolerance, "the largest difference is {distance}");
}

/// Checks a gradient against central differences of `loss` in some entries of `at`.
#[track_caller]
pub fn check_gradient<const D: usize>(at: &Tensor<D>, gradient: &Tensor<D>, loss: impl Fn(Tensor<D>) -> f32) {
    let (start, gradient, device) = (values(at), values(gradient), plain());
    let step = 1e-2f32;
    let entries = (0..start.len()).step_by((start.len() / 12).max(1));
    let mut largest = 0f32;
    for entry in entries {
        let moved = |by: f32| {
            let mut moved = start.clone();
            moved[entry] += by;
            loss(Tensor::from_data(TensorData::new(moved, at.dims()), &device))
        };
        let quotient = (moved(step) - moved(-step)) / (2.0 * step);
        let tolerance = 2e-2 * (1.0 + quotient.abs());
        assert!(
            (quotient - gradient[entry]).abs() < tolerance,
            "entry {entry}: difference quotient {quotient}, gradient {}",
            gradient[entry]
        );
        largest = largest.max(quotient.abs());
    }
    assert!(largest > 1e-3, "the loss does not depend on what is checked");
}

//! What the tests share: devices, closeness, difference quotients.

use std::cell::RefCell;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub fn plain() -> Device {
    Device::default()
}

pub fn autodiff() -> Device {
    Device::default().autodiff()
}

thread_local! {
    /// Burn draws for all threads from one generator, so that what a test gets depends on the others. A test has a
    /// thread of its own.
    static GENERATOR: RefCell<ChaCha8Rng> = RefCell::new(ChaCha8Rng::seed_from_u64(0));
}

/// A number of a normal distribution with deviation 1.
fn normal() -> f32 {
    let uniform = || GENERATOR.with_borrow_mut(|generator| generator.random::<f64>());
    let (radius, angle) = ((-2.0 * (1.0 - uniform()).ln()).sqrt(), std::f64::consts::TAU * uniform());
    (radius * angle.cos()) as f32
}

/// Values of a normal distribution with deviation 1, the same in every run of a test.
pub fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| normal()).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// A module whose weights are drawn anew with this deviation, the same in every run of a test. What begins with one
/// value everywhere, such as the scales of norms, stays.
pub fn drawn<M: Module>(module: M, deviation: f32) -> M {
    struct Draw(f32);
    impl ModuleMapper for Draw {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|tensor| {
                let start = values(&tensor);
                if start.windows(2).all(|pair| pair[0] == pair[1]) {
                    return tensor;
                }
                (random(tensor.dims(), &tensor.device()) * self.0).set_require_grad(tensor.is_require_grad())
            })
        }
    }
    module.map(&mut Draw(deviation))
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

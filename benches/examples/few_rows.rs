//! A few rows times a matrix of f32, as generation asks for: `Weight::forward_for` beside Burn's product of the same
//! tensors, in turn, the best of five rounds each.
//!
//! ```sh
//! cargo run --release -p moe-benches --example few_rows
//! ```

use std::hint::black_box;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use moe_core::adapters::Tokens;
use moe_core::kernels::weight::Weight;

fn main() {
    let device = Device::flex();
    println!("{:>12} {:>5} {:>10} {:>10} {:>7} {:>9}", "[out, in]", "rows", "Burn, us", "here, us", "ratio", "GFLOP/s");
    for [outputs, inputs] in [[704, 512], [2816, 2048], [2048, 1408]] {
        let random = |rows: usize| Tensor::<2>::random([rows, inputs], Distribution::Default, &device);
        let matrix = random(outputs);
        let weight = Weight::dense(matrix.clone());
        for rows in [1, 2, 4, 8, 12, 16, 60] {
            let x = random(rows);
            let all: Vec<u32> = (0..rows as u32).collect();
            let repeats = (200_000_000 / (rows * outputs * inputs)).clamp(3, 300);
            let round = |product: &dyn Fn() -> Tensor<2>| {
                let start = Instant::now();
                (0..repeats).for_each(|_| drop(black_box(product())));
                start.elapsed().as_secs_f64() / repeats as f64
            };
            let (mut burn, mut here) = (f64::MAX, f64::MAX);
            for _ in 0..5 {
                burn = burn.min(round(&|| x.clone().matmul(matrix.clone().transpose())));
                here = here.min(round(&|| weight.forward_for(&x, None, Tokens::Rows(&all))));
            }
            let speed = 2e-9 * (rows * outputs * inputs) as f64 / here;
            let (ratio, size) = (burn / here, format!("{outputs}x{inputs}"));
            println!("{size:>12} {rows:>5} {:>10.1} {:>10.1} {ratio:>7.2} {speed:>9.1}", burn * 1e6, here * 1e6);
        }
    }
}

//! Sums over weight gradients of one expert that are never stored.
//!
//! As in `moe_core::kernels`, each has a host body for the CPU backend and a body of Burn tensor operations for every
//! other device.

#[cfg(feature = "flex")]
mod fused;
pub(crate) mod gram;
pub(crate) mod output_rows;
pub(crate) mod softmax;
pub(crate) mod unit_sums;
pub(crate) mod weight_gradient;

#[cfg(all(test, feature = "flex"))]
mod tests {
    use std::ops::Range;

    use burn::tensor::Device;
    use moe_core::host::{HostView, from_vec};

    use super::weight_gradient::{ExpertOperands, HostOperands};

    /// Calls `f` with operands and segments of sizes around tile heights, piece sizes and vector lengths.
    pub(super) fn for_every_size(f: impl Fn(&ExpertOperands<'_>, &[(Range<usize>, f64)])) {
        let device = Device::flex();
        let value = |i: usize| ((i * 7919 % 2003) as f32 - 1001.0) * 1e-3;
        for (hidden, width, lengths) in
            [(1, 1, vec![1]), (33, 13, vec![3, 5]), (64, 100, vec![2, 40]), (70, 12, vec![7]), (16, 61, vec![1; 130])]
        {
            let n: usize = lengths.iter().sum();
            let tensor = |columns: usize, salt: usize| {
                from_vec((0..n * columns).map(|i| value(i + salt)).collect(), [n, columns], &device)
            };
            let (input, gate_up, units, upstream) =
                (tensor(hidden, 1), tensor(2 * width, 500), tensor(width, 900), tensor(hidden, 1300));
            let weights: Vec<f32> = (0..n).map(|i| 0.25 + 0.5 * value(i).abs()).collect();
            let operands = ExpertOperands {
                input: &input,
                gate_up: &gate_up,
                units: &units,
                upstream: &upstream,
                routing_weights: &weights,
                host: Some(HostOperands {
                    input: HostView::new(&input),
                    gate_up: HostView::new(&gate_up),
                    units: HostView::new(&units),
                    upstream: HostView::new(&upstream),
                }),
            };
            let mut end = 0;
            let mut segment = |(i, length): (usize, &usize)| {
                end += length;
                (end - length..end, 0.5 + i as f64)
            };
            let segments: Vec<_> = lengths.iter().enumerate().map(&mut segment).collect();
            f(&operands, &segments);
        }
    }

    pub(super) fn assert_close(found: &[f64], expected: &[f64]) {
        let largest = expected.iter().copied().fold(0.0, f64::max);
        for (unit, (a, b)) in found.iter().zip(expected).enumerate() {
            assert!((a - b).abs() <= 3e-6 * largest, "unit {unit} of {}: {a}, expected {b}", expected.len());
        }
    }
}

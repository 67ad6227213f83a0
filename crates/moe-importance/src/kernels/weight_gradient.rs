//! Row sums of functions of weight gradients.

use std::ops::Range;

use burn::tensor::Tensor;
use moe_core::host;
#[cfg(feature = "flex")]
use moe_core::host::HostView;
use moe_core::trace::{ExpertGradients, ExpertTrace};

/// What is summed over the entries of a weight gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Absolute values.
    Magnitude,
    /// Squares of the gradients.
    Square,
}

/// The factors of one expert's weight gradients: gate and up are `gate_up^T input`, down (transposed) is `units^T
/// (routing weight * upstream)`.
pub(crate) struct ExpertOperands<'a> {
    pub input: &'a Tensor<2>,
    pub gate_up: &'a Tensor<2>,
    pub units: &'a Tensor<2>,
    pub upstream: &'a Tensor<2>,
    pub routing_weights: &'a [f32],
    #[cfg(feature = "flex")]
    pub host: Option<HostOperands>,
}

/// The same factors in host memory, row-major.
#[cfg(feature = "flex")]
pub(crate) struct HostOperands {
    pub input: HostView,
    pub gate_up: HostView,
    pub units: HostView,
    pub upstream: HostView,
}

impl<'a> ExpertOperands<'a> {
    pub fn new(trace: &ExpertTrace<'a>, gradients: &ExpertGradients<'a>, units: &'a Tensor<2>) -> Self {
        Self {
            input: trace.input,
            gate_up: gradients.gate_up,
            units,
            upstream: gradients.upstream,
            routing_weights: trace.routing_weights,
            #[cfg(feature = "flex")]
            host: host::is_host(&trace.input.device()).then(|| HostOperands {
                input: HostView::new(trace.input),
                gate_up: HostView::new(gradients.gate_up),
                units: HostView::new(units),
                upstream: HostView::new(gradients.upstream),
            }),
        }
    }

    pub fn hidden(&self) -> usize {
        self.input.dims()[1]
    }

    pub fn width(&self) -> usize {
        self.units.dims()[1]
    }

    /// Rows of a sequence on the device: input, gate_up, units, and upstream times routing weight.
    pub fn rows(&self, rows: &Range<usize>) -> [Tensor<2>; 4] {
        let cut = |tensor: &Tensor<2>| tensor.clone().slice([rows.clone()]);
        let weights = self.routing_weights[rows.clone()].to_vec();
        let weights = host::from_vec(weights, [rows.len(), 1], &self.input.device());
        [cut(self.input), cut(self.gate_up), cut(self.units), cut(self.upstream) * weights]
    }
}

/// For each of `segments`, rows of one sequence and a scale: forms the gradients of gate, up and down from those rows
/// alone and adds `scale * sum of f(entry)` over the 3H weights of each unit to `out [I]`. Segments are added in order.
pub(crate) fn add_row_sums(
    entry: Entry,
    operands: &ExpertOperands<'_>,
    segments: &[(Range<usize>, f64)],
    out: &mut [f64],
) {
    if segments.is_empty() || out.is_empty() {
        return;
    }
    #[cfg(feature = "flex")]
    if let Some(host) = &operands.host {
        return super::fused::add_row_sums(entry, operands, host, segments, out);
    }
    add_row_sums_on_device(entry, operands, segments, out);
}

/// The body for any device.
fn add_row_sums_on_device(
    entry: Entry,
    operands: &ExpertOperands<'_>,
    segments: &[(Range<usize>, f64)],
    out: &mut [f64],
) {
    let width = operands.width();
    let mut total: Option<Tensor<2>> = None;
    for (rows, scale) in segments {
        let [input, gate_up, units, upstream] = operands.rows(rows);
        let sums = |left: Tensor<2>, right: Tensor<2>| {
            let gradient = left.transpose().matmul(right); // [2I, H] or [I, H]
            let entries = match entry {
                Entry::Magnitude => gradient.abs(),
                Entry::Square => gradient.powi_scalar(2),
            };
            entries.sum_dim(1) // [2I, 1] or [I, 1]
        };
        let gate_up = sums(gate_up, input).reshape([2, width]).sum_dim(0); // [1, I]
        let sum = (gate_up + sums(units, upstream).reshape([1, width])).mul_scalar(*scale as f32);
        total = Some(match total {
            Some(total) => total + sum,
            None => sum,
        });
    }
    for (out, sum) in out.iter_mut().zip(total.map(host::into_vec).unwrap_or_default()) {
        *out += f64::from(sum);
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::super::tests::{assert_close, for_every_size};
    use super::*;

    #[test]
    fn both_bodies_form_the_same_sums() {
        for_every_size(|operands, segments| {
            for entry in [Entry::Magnitude, Entry::Square] {
                let mut sums = [vec![1.0; operands.width()], vec![1.0; operands.width()]];
                add_row_sums(entry, operands, segments, &mut sums[0]);
                add_row_sums_on_device(entry, operands, segments, &mut sums[1]);
                assert_close(&sums[0], &sums[1]);
            }
        });
    }

    #[test]
    fn every_vector_length_forms_the_same_sums() {
        for_every_size(|operands, segments| {
            for entry in [Entry::Magnitude, Entry::Square] {
                for sums in super::super::fused::with_every_vector_length(entry, operands, segments) {
                    let mut expected = vec![0.0; operands.width()];
                    add_row_sums_on_device(entry, operands, segments, &mut expected);
                    assert_close(&sums, &expected);
                }
            }
        });
    }
}

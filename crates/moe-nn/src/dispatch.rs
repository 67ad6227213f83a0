//! Tokens to experts and back.

use burn::tensor::{IndexingUpdateOp, Tensor};

use crate::assignment::Segments;
use crate::routing::Routing;

/// Runs experts on their tokens and adds their weighted outputs per token: `[tokens, hidden] -> [tokens, hidden]`.
///
/// Tokens are copied once, sorted by expert, to `[rows, hidden]` with a row per filled place; `experts` maps these to
/// outputs of the same shape; the outputs are weighted and added where their tokens are. There is no padding: the cost
/// is that of the filled places, however uneven the loads are.
pub fn dispatch(x: Tensor<2>, routing: &Routing, experts: impl FnOnce(Tensor<2>, &Segments) -> Tensor<2>) -> Tensor<2> {
    let ([tokens, hidden], device, dtype) = (x.dims(), x.device(), x.dtype());
    let segments = Segments::of(&routing.assignment, routing.num_experts);
    let zeros = Tensor::<2>::zeros([tokens, hidden], (&device, dtype));
    if segments.rows() == 0 {
        return zeros;
    }
    let sorted = segments.tokens(&device);
    let outputs = experts(x.select(0, sorted.clone()), &segments); // [rows, hidden]
    let places = tokens * routing.assignment.slots();
    let weights = routing.weights.clone().reshape([places, 1]).select(0, segments.places(&device)); // [rows, 1]
    zeros.select_assign(0, sorted, outputs * weights.cast(dtype), IndexingUpdateOp::Add)
}

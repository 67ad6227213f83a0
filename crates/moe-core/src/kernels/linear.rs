//! Linear maps with weights stored as `[out, in]`.

use burn::tensor::Tensor;

use super::for_rows_mut;
use crate::host::{self, HostView};

/// `x w^T + b` for `x [n, in]`, `w [out, in]`, `b [out]`.
pub fn linear(x: &Tensor<2>, w: &Tensor<2>, b: Option<&Tensor<1>>) -> Tensor<2> {
    let y = x.clone().matmul(w.clone().transpose()); // [n, out]
    match b {
        Some(b) => add_bias(y, b),
        None => y,
    }
}

/// `dy w`: the gradient of [`linear`] with respect to `x`.
pub fn linear_backward(dy: &Tensor<2>, w: &Tensor<2>) -> Tensor<2> {
    dy.clone().matmul(w.clone())
}

fn add_bias(y: Tensor<2>, b: &Tensor<1>) -> Tensor<2> {
    let device = y.device();
    if !host::is_host(&device) {
        return y + b.clone().unsqueeze::<2>();
    }
    let shape = y.dims();
    let view = HostView::new(b);
    let bias = view.as_slice();
    let mut values = host::into_vec(y);
    for_rows_mut(&mut values, shape[1], |_, row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
    host::from_vec(values, shape, &device)
}

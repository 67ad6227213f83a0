//! A division per dimension whose derivative is that of a norm with smoothed statistics.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, backend_extension};
use burn::tensor::{Tensor, TensorData};

/// The operation of a backend. All but `x` are `[1, width]`.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    Cube: cfg(any(feature = "wgpu", feature = "vulkan", feature = "cuda")),
    Autodiff,
)]
pub(crate) trait SmoothedScale: Backend {
    /// `z = x * inverse`, `[rows, width]`. The derivative is `(g * factor - p * z) * inverse`, with `p = projection`,
    /// or the mean over rows of `g * factor * z` where `own` says so, as it is in a norm by the batch's own statistics.
    fn smoothed_scale(
        x: FloatTensor<Self>,
        inverse: FloatTensor<Self>,
        factor: FloatTensor<Self>,
        projection: FloatTensor<Self>,
        own: bool,
    ) -> FloatTensor<Self> {
        let _ = (factor, projection, own);
        Self::float_mul(x, inverse)
    }
}

#[cfg(feature = "flex")]
impl SmoothedScale for burn::backend::Flex {}

#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "cuda"))]
impl SmoothedScale for burn::backend::Cube {}

impl<B: SmoothedScale, C: CheckpointStrategy> SmoothedScale for Autodiff<B, C> {
    fn smoothed_scale(
        x: FloatTensor<Self>,
        inverse: FloatTensor<Self>,
        factor: FloatTensor<Self>,
        projection: FloatTensor<Self>,
        own: bool,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Scale;

        impl<B: SmoothedScale> Backward<B, 1> for Scale {
            type State = ([FloatTensor<B>; 4], bool);

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let [to_x] = ops.parents;
                let grad = grads.consume::<B>(&ops.node);
                let ([z, inverse, factor, projection], own) = ops.state;
                let Some(node) = to_x else { return };
                let grad = B::float_mul(grad, factor);
                let projection = match own {
                    true => B::float_mean_dim(B::float_mul(grad.clone(), z.clone()), 0),
                    false => projection,
                };
                let along = B::float_mul(z, projection);
                grads.register::<B>(node.id, B::float_mul(B::float_sub(grad, along), inverse));
            }
        }

        let [inverse, factor, projection] = [inverse, factor, projection].map(|tensor| tensor.into_primitive());
        match Scale.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let z = B::float_mul(x.into_primitive(), inverse.clone());
                prep.finish(([z.clone(), inverse, factor, projection], own), z)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::float_mul(x.into_primitive(), inverse)),
        }
    }
}

/// `x / roots` per dimension, `[rows, width]`, with the derivative that [`SmoothedScale::smoothed_scale`] says.
pub(crate) fn smoothed_scale(x: Tensor<2>, roots: &[f32], factor: &[f32], projection: Option<&[f32]>) -> Tensor<2> {
    let (device, width) = (x.device(), roots.len());
    let row = |values: Vec<f32>| Tensor::<2>::from_data(TensorData::new(values, [1, width]), &device).into_dispatch();
    let inverse = row(roots.iter().map(|root| root.recip()).collect());
    let given = row(projection.map_or_else(|| vec![0.0; width], <[f32]>::to_vec));
    let factor = row(factor.to_vec());
    let own = projection.is_none();
    Tensor::from_dispatch(<Dispatch as SmoothedScale>::smoothed_scale(x.into_dispatch(), inverse, factor, given, own))
}

//! Reading and building tensors on the host.
//!
//! On the CPU backend a tensor already lives in host memory: a [`HostView`] borrows it without copying, and
//! [`from_vec`] moves a vector into a tensor. On other devices the same calls copy. Kernels that Burn's CPU backend
//! runs slowly (element-wise functions, gathers, softmax) are written once on top of this.

use burn::tensor::{Device, Tensor, TensorData};

#[cfg(feature = "flex")]
use burn::backend::{Flex, flex::FlexTensor};

/// Read access to the values of a tensor, row-major.
#[derive(Debug)]
pub struct HostView(Inner);

#[derive(Debug)]
enum Inner {
    #[cfg(feature = "flex")]
    Flex(FlexTensor),
    Data(TensorData),
}

impl HostView {
    /// Views `tensor` (f32); borrows on the CPU backend if it is contiguous, copies otherwise.
    pub fn new<const D: usize>(tensor: &Tensor<D>) -> Self {
        #[cfg(feature = "flex")]
        if is_host(&tensor.device()) {
            let flex = tensor.clone().try_into_primitive::<Flex>().expect("a tensor of a flex device is a flex tensor");
            return Self(Inner::Flex(if flex.is_contiguous() { flex } else { flex.to_contiguous() }));
        }
        Self(Inner::Data(tensor.to_data()))
    }

    /// The values.
    pub fn as_slice(&self) -> &[f32] {
        match &self.0 {
            #[cfg(feature = "flex")]
            Inner::Flex(tensor) => tensor.as_slice::<f32>().expect("made contiguous f32 on construction"),
            Inner::Data(data) => data.as_slice::<f32>().expect("tensors of this crate are f32"),
        }
    }
}

/// Moves row-major `values` into a tensor of `shape` on `device`.
pub fn from_vec<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    debug_assert_eq!(values.len(), shape.iter().product::<usize>());
    #[cfg(feature = "flex")]
    if is_host(device) {
        return Tensor::from_primitive::<Flex>(FlexTensor::from_data(TensorData::new(values, shape)));
    }
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Takes the values out of a tensor; no copy on the CPU backend when nothing else holds the tensor.
pub fn into_vec<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec::<f32>().expect("tensors of this crate are f32")
}

/// Whether tensors of `device` live in host memory and the host kernels apply.
pub fn is_host(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    {
        matches!(device.as_dispatch(), burn::backend::DispatchDevice::Flex(_))
    }
    #[cfg(not(feature = "flex"))]
    {
        let _ = device;
        false
    }
}

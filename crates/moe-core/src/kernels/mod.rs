//! The numeric kernels of the decoder, forward and backward.
//!
//! Each kernel has one signature and two bodies: a host body for the CPU backend (SIMD loops and rayon over the
//! tensor's own memory, see [`crate::host`]), where Burn's element-wise kernels are the bottleneck, and a body of Burn
//! tensor operations for every other device. Tests run both bodies on the CPU backend and compare them.

#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), path = "amx_absent.rs")]
pub(crate) mod amx;
pub mod attention;
#[cfg_attr(not(target_arch = "x86_64"), path = "bf16_dot_absent.rs")]
pub(crate) mod bf16_dot;
pub mod compressed;
pub mod convolution;
pub mod delta;
pub mod divergence;
mod few_rows;
mod gelu;
pub mod indexer;
pub mod latent;
pub mod layer_norm;
pub mod loss;
pub mod math;
pub mod norm;
pub mod outer;
mod packed;
pub mod product;
mod recurrence;
pub mod reduce;
pub mod rope;
pub mod rows;
mod small_products;
pub mod ssd;
pub mod swiglu;
pub mod weight;

use std::mem::MaybeUninit;

use burn::tensor::{Device, Int, Tensor, TensorData};
use rayon::prelude::*;

pub use recurrence::CHUNK;

/// Rows per parallel piece so that a piece holds about 16k elements: big enough to pay for the hand-over.
pub(crate) fn rows_per_piece(columns: usize) -> usize {
    (16 * 1024 / columns.max(1)).max(1)
}

/// Calls `f(row_index, row)` for each row of `data` (`columns` wide), in parallel.
pub(crate) fn for_rows_mut(data: &mut [f32], columns: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if data.is_empty() || columns == 0 {
        return;
    }
    let step = rows_per_piece(columns);
    if data.len() <= step * columns {
        data.chunks_exact_mut(columns).enumerate().for_each(|(i, row)| f(i, row));
        return;
    }
    data.par_chunks_mut(step * columns).enumerate().for_each(|(piece, rows)| {
        for (i, row) in rows.chunks_exact_mut(columns).enumerate() {
            f(piece * step + i, row);
        }
    });
}

/// `n` rows of `columns` values, each written by `f(row_index, row)`, in parallel. A row is zero when its turn comes:
/// it is zeroed in the cache, and not all rows in memory before.
pub(crate) fn new_rows(n: usize, columns: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let len = n * columns;
    let mut rows = Vec::with_capacity(len);
    if len > 0 {
        let step = rows_per_piece(columns);
        let all = &mut rows.spare_capacity_mut()[..len];
        let piece = |(piece, rows): (usize, &mut [MaybeUninit<f32>])| {
            for (i, row) in rows.chunks_exact_mut(columns).enumerate() {
                f(piece * step + i, zeroed(row));
            }
        };
        match n <= step {
            true => piece((0, all)),
            false => all.par_chunks_mut(step * columns).enumerate().for_each(piece),
        }
    }
    // SAFETY: the chunks are rows and cover all of them, and each was zeroed.
    unsafe { rows.set_len(len) };
    rows
}

/// Memory that nothing was written to, as zeros.
pub(crate) fn zeroed(memory: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    memory.fill(MaybeUninit::new(0.0));
    // SAFETY: every value was written above, and `MaybeUninit<f32>` lies in memory as `f32` does.
    unsafe { &mut *(std::ptr::from_mut(memory) as *mut [f32]) }
}

/// Row indices as a device tensor.
pub(crate) fn index_tensor(rows: &[u32], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i32> = rows.iter().map(|&r| r as i32).collect();
    Tensor::from_data(TensorData::new(ids, [rows.len()]), device)
}

/// An uninitialized-looking but zeroed buffer; `calloc` gives fresh zero pages without touching them.
pub(crate) fn zeros(len: usize) -> Vec<f32> {
    vec![0.0; len]
}

#[cfg(all(test, feature = "flex"))]
pub(crate) mod testing {
    use burn::tensor::{Device, Tensor};

    use crate::host;

    pub fn device() -> Device {
        Device::flex()
    }

    /// Deterministic values in [-1, 1).
    pub fn pattern(shape: [usize; 2], seed: u32) -> Tensor<2> {
        let values = (0..shape[0] * shape[1])
            .map(|i| {
                let mut x = (i as u32).wrapping_mul(0x9E37_79B9) ^ seed.wrapping_mul(0x85EB_CA6B);
                x = (x ^ (x >> 15)).wrapping_mul(0x2C1B_3C6D);
                x = (x ^ (x >> 12)).wrapping_mul(0x297A_2D39);
                ((x ^ (x >> 15)) >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        host::from_vec(values, shape, &device())
    }

    #[track_caller]
    pub fn assert_close(a: &Tensor<2>, b: &Tensor<2>, tolerance: f32) {
        assert_eq!(a.dims(), b.dims());
        let (a, b) = (host::HostView::new(a), host::HostView::new(b));
        for (i, (x, y)) in a.as_slice().iter().zip(b.as_slice()).enumerate() {
            assert!((x - y).abs() <= tolerance, "element {i}: {x} and {y}");
        }
    }
}

//! Gathering the rows of an expert's tokens and adding its outputs back.

use burn::tensor::{Device, Tensor};
use rayon::prelude::*;

use super::{for_rows_mut, index_tensor, new_rows, rows_per_piece, zeros};
use crate::host::{self, HostView};

/// `x[rows]`, `[rows.len(), columns]`.
pub fn gather_rows(x: &Tensor<2>, rows: &[u32]) -> Tensor<2> {
    let device = x.device();
    if !host::is_host(&device) {
        return x.clone().select(0, index_tensor(rows, &device));
    }
    let columns = x.dims()[1];
    let view = HostView::new(x);
    let values = view.as_slice();
    let out = new_rows(rows.len(), columns, |i, row| {
        let start = rows[i] as usize * columns;
        row.copy_from_slice(&values[start..start + columns]);
    });
    host::from_vec(out, [rows.len(), columns], &device)
}

/// A `[tokens, columns]` sum that rows are added to, in place on the host device.
#[derive(Debug)]
pub struct RowAccumulator {
    tokens: usize,
    columns: usize,
    device: Device,
    sum: Sum,
}

#[derive(Debug)]
enum Sum {
    Host(Vec<f32>),
    // Option: taken and put back around an operation, so that the tensor is never shared while it is updated
    Device(Option<Box<Tensor<2>>>),
}

impl RowAccumulator {
    /// All zeros.
    pub fn zeros(tokens: usize, columns: usize, device: &Device) -> Self {
        let sum = if host::is_host(device) {
            Sum::Host(zeros(tokens * columns))
        } else {
            Sum::Device(Some(Box::new(Tensor::zeros([tokens, columns], device))))
        };
        Self { tokens, columns, device: device.clone(), sum }
    }

    /// Starts from an existing tensor.
    pub fn from_tensor(tensor: Tensor<2>) -> Self {
        let ([tokens, columns], device) = (tensor.dims(), tensor.device());
        let sum = if host::is_host(&device) {
            Sum::Host(host::into_vec(tensor))
        } else {
            Sum::Device(Some(Box::new(tensor)))
        };
        Self { tokens, columns, device, sum }
    }

    /// `sum[rows[i]] += weights[i] * y[i]`, with weights of 1 where none are given. `rows` must not repeat.
    pub fn add_rows(&mut self, rows: &[u32], weights: Option<&[f32]>, y: &Tensor<2>) {
        if rows.is_empty() {
            return;
        }
        let columns = self.columns;
        match &mut self.sum {
            Sum::Host(sum) => {
                let view = HostView::new(y);
                let y = view.as_slice();
                let target = SharedRows(sum.as_mut_ptr());
                let tokens = self.tokens;
                rows.par_iter().enumerate().with_min_len(rows_per_piece(columns)).for_each(|(i, &row)| {
                    assert!((row as usize) < tokens, "row {row} of {tokens} tokens");
                    // SAFETY: in bounds (checked above), and `rows` do not repeat, so no two tasks share a row.
                    let out = unsafe { target.row(row as usize, columns) };
                    add_scaled(out, weights.map_or(1.0, |w| w[i]), &y[i * columns..(i + 1) * columns]);
                });
            }
            Sum::Device(sum) => {
                let y = match weights {
                    Some(w) => y.clone() * host::from_vec(w.to_vec(), [w.len(), 1], &self.device),
                    None => y.clone(),
                };
                let taken = sum.take().expect("put back below");
                *sum = Some(Box::new(taken.select_assign(
                    0,
                    index_tensor(rows, &self.device),
                    y,
                    burn::tensor::IndexingUpdateOp::Add,
                )));
            }
        }
    }

    /// `sum += y` for all rows.
    pub fn add(&mut self, y: &Tensor<2>) {
        match &mut self.sum {
            Sum::Host(sum) => {
                let view = HostView::new(y);
                let y = view.as_slice();
                let columns = self.columns;
                for_rows_mut(sum, columns, |t, out| add_scaled(out, 1.0, &y[t * columns..(t + 1) * columns]));
            }
            Sum::Device(sum) => *sum = sum.take().map(|s| Box::new(*s + y.clone())),
        }
    }

    /// Lets `f` change the sum `[tokens, columns]` on the host, given the number of columns. On another device it comes
    /// and goes.
    pub(crate) fn on_host(&mut self, f: impl FnOnce(&mut [f32], usize)) {
        match &mut self.sum {
            Sum::Host(sum) => f(sum, self.columns),
            Sum::Device(sum) => {
                let mut values = host::into_vec(*sum.take().expect("put back below"));
                f(&mut values, self.columns);
                *sum = Some(Box::new(host::from_vec(values, [self.tokens, self.columns], &self.device)));
            }
        }
    }

    /// `sum[rows[i]] = y[i]`.
    pub(crate) fn set_rows(&mut self, rows: &[u32], y: &Tensor<2>) {
        let view = HostView::new(y);
        self.on_host(|sum, columns| {
            for (&row, y) in rows.iter().zip(view.as_slice().chunks_exact(columns.max(1))) {
                sum[row as usize * columns..(row as usize + 1) * columns].copy_from_slice(y);
            }
        });
    }

    /// The sum.
    pub fn into_tensor(self) -> Tensor<2> {
        match self.sum {
            Sum::Host(sum) => host::from_vec(sum, [self.tokens, self.columns], &self.device),
            Sum::Device(sum) => *sum.expect("always put back"),
        }
    }
}

struct SharedRows(*mut f32);

// SAFETY: used only for disjoint rows, see `add_rows`.
unsafe impl Sync for SharedRows {}

impl SharedRows {
    /// SAFETY: the row must be in bounds and not be borrowed elsewhere.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row(&self, row: usize, columns: usize) -> &mut [f32] {
        unsafe { std::slice::from_raw_parts_mut(self.0.add(row * columns), columns) }
    }
}

#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn add_scaled(out: &mut [f32], scale: f32, y: &[f32]) {
    for (o, y) in out.iter_mut().zip(y) {
        *o += scale * y;
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, device, pattern};

    #[test]
    fn gathered_rows_come_back_weighted() {
        let x = pattern([6, 5], 4);
        let rows = [4, 0, 5];
        let gathered = gather_rows(&x, &rows);
        assert_close(&gathered, &x.clone().select(0, index_tensor(&rows, &device())), 0.0);
        let weights = [0.5, 2.0, -1.0];
        let mut sum = RowAccumulator::from_tensor(x.clone());
        sum.add_rows(&rows, Some(&weights), &gathered);
        sum.add(&x);
        let got = host::into_vec(sum.into_tensor());
        let x = host::into_vec(x);
        for t in 0..6 {
            let factor = 2.0 + rows.iter().position(|&r| r as usize == t).map_or(0.0, |i| weights[i]);
            for j in 0..5 {
                assert!((got[t * 5 + j] - factor * x[t * 5 + j]).abs() < 1e-5);
            }
        }
    }
}

//! Keys and values of latent attention put together from their parts, forward and backward.

use burn::tensor::Tensor;

use super::{for_rows_mut, zeros};
use crate::host::{self, HostView};

/// Sizes of the heads of latent attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentHeads {
    /// Number of heads.
    pub heads: usize,
    /// Columns of a key head without position.
    pub nope: usize,
    /// Columns of a key head that are rotated; shared by all heads.
    pub rope: usize,
    /// Columns of a value head.
    pub value: usize,
}

impl LatentHeads {
    /// Columns of a key head.
    pub fn key(&self) -> usize {
        self.nope + self.rope
    }

    /// Columns of a head of the projection from the latent: key without position, then value.
    fn projected(&self) -> usize {
        self.nope + self.value
    }

    /// Keys `[n, heads * (nope + rope)]` and values `[n, heads * value]` from the projection of the latent
    /// `kv [n, heads * (nope + value)]` and the rotated key `shared [n, rope]`.
    pub fn join(&self, kv: &Tensor<2>, shared: &Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        if host::is_host(&kv.device()) { self.join_on_host(kv, shared) } else { self.join_on_device(kv, shared) }
    }

    /// Gradients of [`join`](Self::join) with respect to `kv` and `shared`.
    pub fn join_backward(&self, dk: &Tensor<2>, dv: &Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        if host::is_host(&dk.device()) { self.backward_on_host(dk, dv) } else { self.backward_on_device(dk, dv) }
    }

    fn join_on_host(&self, kv: &Tensor<2>, shared: &Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let (n, device) = (kv.dims()[0], kv.device());
        let (kv, shared) = (HostView::new(kv), HostView::new(shared));
        let (kv, shared) = (kv.as_slice(), shared.as_slice());
        let (k_columns, v_columns) = (self.heads * self.key(), self.heads * self.value);
        let (mut k, mut v) = (zeros(n * k_columns), zeros(n * v_columns));
        let row = |t: usize| kv[t * self.heads * self.projected()..].chunks_exact(self.projected());
        for_rows_mut(&mut k, k_columns, |t, k| {
            for (k, kv) in k.chunks_exact_mut(self.key()).zip(row(t)) {
                k[..self.nope].copy_from_slice(&kv[..self.nope]);
                k[self.nope..].copy_from_slice(&shared[t * self.rope..(t + 1) * self.rope]);
            }
        });
        for_rows_mut(&mut v, v_columns, |t, v| {
            for (v, kv) in v.chunks_exact_mut(self.value).zip(row(t)) {
                v.copy_from_slice(&kv[self.nope..]);
            }
        });
        (host::from_vec(k, [n, k_columns], &device), host::from_vec(v, [n, v_columns], &device))
    }

    fn join_on_device(&self, kv: &Tensor<2>, shared: &Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let n = kv.dims()[0];
        let kv = kv.clone().reshape([n, self.heads, self.projected()]);
        let shared = shared.clone().reshape([n, 1, self.rope]).repeat_dim(1, self.heads);
        let k = Tensor::cat(vec![kv.clone().narrow(2, 0, self.nope), shared], 2); // [n, heads, nope + rope]
        let v = kv.narrow(2, self.nope, self.value);
        (k.reshape([n, self.heads * self.key()]), v.reshape([n, self.heads * self.value]))
    }

    fn backward_on_host(&self, dk: &Tensor<2>, dv: &Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let (n, device) = (dk.dims()[0], dk.device());
        let (dk, dv) = (HostView::new(dk), HostView::new(dv));
        let (dk, dv) = (dk.as_slice(), dv.as_slice());
        let columns = self.heads * self.projected();
        let (mut d_kv, mut d_shared) = (zeros(n * columns), zeros(n * self.rope));
        let keys =
            |t: usize| dk[t * self.heads * self.key()..(t + 1) * self.heads * self.key()].chunks_exact(self.key());
        for_rows_mut(&mut d_kv, columns, |t, d_kv| {
            let values = dv[t * self.heads * self.value..].chunks_exact(self.value);
            for ((d_kv, dk), dv) in d_kv.chunks_exact_mut(self.projected()).zip(keys(t)).zip(values) {
                d_kv[..self.nope].copy_from_slice(&dk[..self.nope]);
                d_kv[self.nope..].copy_from_slice(dv);
            }
        });
        for_rows_mut(&mut d_shared, self.rope, |t, d_shared| {
            for dk in keys(t) {
                d_shared.iter_mut().zip(&dk[self.nope..]).for_each(|(sum, d)| *sum += d);
            }
        });
        (host::from_vec(d_kv, [n, columns], &device), host::from_vec(d_shared, [n, self.rope], &device))
    }

    fn backward_on_device(&self, dk: &Tensor<2>, dv: &Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let n = dk.dims()[0];
        let dk = dk.clone().reshape([n, self.heads, self.key()]);
        let dv = dv.clone().reshape([n, self.heads, self.value]);
        let d_shared = dk.clone().narrow(2, self.nope, self.rope).sum_dim(1).reshape([n, self.rope]);
        let d_kv = Tensor::cat(vec![dk.narrow(2, 0, self.nope), dv], 2); // [n, heads, nope + value]
        (d_kv.reshape([n, self.heads * self.projected()]), d_shared)
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, pattern};

    const HEADS: LatentHeads = LatentHeads { heads: 3, nope: 4, rope: 2, value: 5 };

    #[test]
    fn host_and_device_bodies_agree() {
        let (kv, shared) = (pattern([7, 27], 1), pattern([7, 2], 2));
        let (a, b) = (HEADS.join_on_host(&kv, &shared), HEADS.join_on_device(&kv, &shared));
        assert_close(&a.0, &b.0, 0.0);
        assert_close(&a.1, &b.1, 0.0);
        let (dk, dv) = (pattern([7, 18], 3), pattern([7, 15], 4));
        let (a, b) = (HEADS.backward_on_host(&dk, &dv), HEADS.backward_on_device(&dk, &dv));
        assert_close(&a.0, &b.0, 0.0);
        assert_close(&a.1, &b.1, 1e-6);
    }

    #[test]
    fn backward_is_the_transpose() {
        let (kv, shared, dk, dv) = (pattern([3, 27], 1), pattern([3, 2], 2), pattern([3, 18], 3), pattern([3, 15], 4));
        let sum = |x: Tensor<2>| host::into_vec(x).into_iter().map(f64::from).sum::<f64>();
        let (k, v) = HEADS.join(&kv, &shared);
        let (d_kv, d_shared) = HEADS.join_backward(&dk, &dv);
        let forward = sum(k * dk) + sum(v * dv);
        let backward = sum(kv * d_kv) + sum(shared * d_shared);
        assert!((forward - backward).abs() < 1e-4, "{forward} and {backward}");
    }
}

//! CorDA: adapters that begin along the covariance of a map's inputs (arXiv 2406.05223).

use std::{collections::BTreeMap, path::Path};

use burn::tensor::Tensor;
use faer::{Mat, linalg::solvers::DenseSolveCore};
use moe_checkpoint::{Fold, MatrixId};
use moe_core::{Model, adapters::Site, data::Wave, host::HostView, kernels::outer::add_transposed_product};

use super::{config::CordaMethod, init, maps::Maps};
use crate::{
    Error, Result,
    input_watch::{run, statistic, sums, watch},
    trainable_tensors::Place,
};

/// `X^T X` of the inputs of linear maps, averaged over batches. Gate and up read the same inputs.
#[derive(Clone, Debug, Default)]
pub struct Covariances {
    by_site: BTreeMap<Site, Vec<f64>>,
}

impl Covariances {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives the covariance of the inputs of a map, `[in, in]`.
    ///
    /// # Errors
    /// [`Error::Input`] for another size, a number that is not finite, or a map that the model does not have.
    pub fn insert(&mut self, maps: &Maps<'_>, map: MatrixId, covariance: Vec<f64>) -> Result<()> {
        let (site, [_, inputs]) = match (maps.site(map), maps.dims(map)) {
            (Some((site, ..)), Some(dims)) => (site, dims),
            _ => return Err(Error::input("a map", map, "a map of the model")),
        };
        if covariance.len() != inputs * inputs || covariance.iter().any(|c| !c.is_finite()) {
            let found = format!("{} numbers, or one that is not finite", covariance.len());
            let what = format!("covariance of the inputs of {map}");
            return Err(Error::input(what, found, format!("{inputs} x {inputs} finite numbers")));
        }
        self.by_site.insert(site, covariance);
        Ok(())
    }

    /// That of a map's inputs.
    pub fn of(&self, maps: &Maps<'_>, map: MatrixId) -> Option<&[f64]> {
        self.by_site.get(&maps.site(map)?.0).map(Vec::as_slice)
    }

    /// Runs a model on `waves` and sums `X^T X` of the inputs `X [tokens, in]` of `which` maps, each batch divided by
    /// `|max X|^2` (the largest number, signed, then its absolute value: what the authors' and PEFT's code do), and by
    /// the number of batches. A batch is what a map is given at a time: a wave, for an expert its tokens of the wave.
    /// Finished waves are kept in `store`, if there is one, and not run again.
    ///
    /// # Errors
    /// Those of the engine; [`Error::Input`] for a map that no token reached, such as an expert that was never chosen;
    /// a store of something else.
    pub fn collect(model: &Model, waves: &[Wave], which: &[MatrixId], store: Option<&Path>) -> Result<Self> {
        let maps = Maps::new(model.checkpoint());
        let mut places: BTreeMap<Site, ([usize; 2], MatrixId)> = BTreeMap::new();
        for map in which {
            let (Some((site, _, out)), Some([_, inputs])) = (maps.site(*map), maps.dims(*map)) else {
                return Err(Error::input("a map", map, "a map of the model"));
            };
            places.entry(site).or_insert(([out, inputs], *map));
        }
        let watched = places.iter().map(|(site, (dims, _))| Place { site: *site, dims: *dims });
        let (watched, collector) = watch(
            model,
            watched,
            Gram::add,
            |site, [_, n]| vec![sums(statistic("covariance", site), n, n), sums(statistic("batches", site), 1, 1)],
            |site, [_, n], seen: Gram, into| {
                let sums = into.matrix_mut(&statistic("covariance", site), [n, n], Fold::Sum)?;
                sums.iter_mut().zip(seen.sum).for_each(|(sum, seen)| *sum += seen);
                into.matrix_mut(&statistic("batches", site), [1, 1], Fold::Sum)?[0] += seen.batches as f64;
                Ok(())
            },
        )?;
        let statistics = run(&watched, collector, waves, store)?;
        let mut by_site = BTreeMap::new();
        for (site, (_, map)) in places {
            let batches = statistics.matrix(&statistic("batches", site))?.0.iter().sum::<f64>();
            if batches == 0.0 {
                let expected = "tokens that reach it: more waves, or another initializer for it";
                return Err(Error::input(format!("covariance of the inputs of {map}"), "no token", expected));
            }
            let (sum, _) = statistics.matrix(&statistic("covariance", site))?;
            by_site.insert(site, sum.iter().map(|c| c / batches).collect());
        }
        Ok(Self { by_site })
    }
}

/// Sums of `X^T X`.
#[derive(Debug, Default)]
struct Gram {
    sum: Vec<f64>,
    batches: usize,
}

impl Gram {
    fn add(&mut self, x: &Tensor<2>) {
        let max = HostView::new(x).as_slice().iter().copied().fold(f32::NEG_INFINITY, f32::max).abs();
        if max > 0.0 && max.is_finite() {
            let inputs = x.dims()[1];
            let mut gram = vec![0.0; inputs * inputs];
            add_transposed_product(x, 0..inputs, x, 0..inputs, 1.0 / (max * max), &mut gram);
            self.sum.resize(inputs * inputs, 0.0);
            self.sum.iter_mut().zip(gram).for_each(|(sum, g)| *sum += f64::from(g));
            self.batches += 1;
        }
    }
}

/// Damping of the covariance at first, in its mean diagonal.
const DAMPING: f64 = 0.01;
/// `||C inv(C) - I||` from which on a covariance has to be damped more.
const INVERSE_ERROR: f64 = 0.05;

/// `A` and `B` from `W C = U S V^T`, where `C` is the damped covariance: `W = U S (V^T C^-1)` exactly, of which the
/// `rank` largest components (IPM) or smallest (KPM) are taken, `B = U sqrt(S / s)`, `A = sqrt(S / s) V^T C^-1`.
pub(crate) fn factors(
    weight: &[f32],
    dims: [usize; 2],
    rank: usize,
    s: f64,
    covariance: &[f64],
    method: CordaMethod,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let inputs = dims[1];
    let (damped, inverse) = damped(covariance, inputs)?;
    let (u, singular, v) = init::svd(&(init::matrix(weight, dims) * damped), "a weight times a covariance")?;
    // (V^T C^-1)^T, with the inverse as it is, symmetric or not
    let v = inverse.transpose() * v;
    let all = singular.len();
    let columns = match method {
        CordaMethod::Ipm => 0..rank,
        CordaMethod::Kpm => all - rank..all,
    };
    Ok(init::split(u.as_ref(), &singular, v.as_ref(), columns, s))
}

/// `C + d mean(diag C) I` and its inverse, `d` doubled until the inverse is one.
fn damped(covariance: &[f64], n: usize) -> Result<(Mat<f64>, Mat<f64>)> {
    let mean = (0..n).map(|i| covariance[i * n + i]).sum::<f64>() / n.max(1) as f64;
    let mut damping = DAMPING;
    for _ in 0..64 {
        let damped = Mat::from_fn(n, n, |i, j| covariance[i * n + j] + if i == j { damping * mean } else { 0.0 });
        let inverse = damped.partial_piv_lu().inverse();
        let product = &damped * &inverse;
        let error: f64 = (0..n * n)
            .map(|i| (product[(i / n, i % n)] - f64::from(u8::from(i / n == i % n))).powi(2))
            .sum::<f64>()
            .sqrt();
        if error < INVERSE_ERROR {
            return Ok((damped, inverse));
        }
        damping *= 2.0;
    }
    Err(Error::input("a covariance", format!("one of mean diagonal {mean} without an inverse"), "one with variance"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize, seed: u64) -> Vec<f32> {
        let mut random = init::random(seed, "corda");
        (0..len).map(|_| init::normal(&mut random) as f32).collect()
    }

    fn product(a: &[f32], b: &[f32], dims: [usize; 2], rank: usize, s: f64) -> Vec<f64> {
        let [out, inputs] = dims;
        (0..out * inputs)
            .map(|i| {
                let (o, j) = (i / inputs, i % inputs);
                s * (0..rank).map(|r| f64::from(b[o * rank + r]) * f64::from(a[r * inputs + j])).sum::<f64>()
            })
            .collect()
    }

    fn gram(x: &[f32], n: usize) -> Vec<f64> {
        let dot = |i: usize, j: usize| x.chunks_exact(n).map(|x| f64::from(x[i]) * f64::from(x[j])).sum::<f64>();
        (0..n * n).map(|i| dot(i / n, i % n)).collect()
    }

    #[test]
    fn all_components_together_are_the_weight_and_both_methods_take_others() {
        let dims = [6, 8];
        let (w, c) = (numbers(48, 1), gram(&numbers(20 * 8, 2), 8));
        for method in [CordaMethod::Ipm, CordaMethod::Kpm] {
            let (a, b) = factors(&w, dims, 6, 0.7, &c, method).unwrap();
            assert!(product(&a, &b, dims, 6, 0.7).iter().zip(&w).all(|(a, b)| (a - f64::from(*b)).abs() < 1e-4));
        }
        // three largest and three smallest make the whole: they are disjoint
        let part = |method| {
            let (a, b) = factors(&w, dims, 3, 0.7, &c, method).unwrap();
            product(&a, &b, dims, 3, 0.7)
        };
        let (large, small) = (part(CordaMethod::Ipm), part(CordaMethod::Kpm));
        assert!(large.iter().zip(&small).zip(&w).all(|((l, s), w)| (l + s - f64::from(*w)).abs() < 1e-4));
    }

    #[test]
    fn with_equal_variances_the_largest_components_are_those_of_the_weight() {
        let dims = [5, 4];
        let w = numbers(20, 3);
        let identity: Vec<f64> = (0..16).map(|i| f64::from(u8::from(i % 5 == 0))).collect();
        let (a, b) = factors(&w, dims, 2, 1.0, &identity, CordaMethod::Ipm).unwrap();
        let (u, singular, v) = init::svd(&init::matrix(&w, dims), "w").unwrap();
        for (i, found) in product(&a, &b, dims, 2, 1.0).iter().enumerate() {
            let expected: f64 = (0..2).map(|k| u[(i / 4, k)] * singular[k] * v[(i % 4, k)]).sum();
            assert!((found - expected).abs() < 1e-5);
        }
    }

    #[test]
    fn a_covariance_without_an_inverse_is_damped_more() {
        // an eigenvalue that the first damping makes 0: mean 1, damping 0.01
        let mut c: Vec<f64> = (0..9).map(|i| f64::from(u8::from(i % 4 == 0))).collect();
        (c[0], c[4], c[8]) = (-0.01, 1.0, 2.01);
        let (damped, inverse) = damped(&c, 3).unwrap();
        assert!((damped[(0, 0)] - 0.01).abs() < 1e-12 && inverse[(0, 0)].is_finite());
        let (a, b) = factors(&numbers(6, 4), [2, 3], 1, 1.0, &c, CordaMethod::Kpm).unwrap();
        assert!(a.iter().chain(&b).all(|v| v.is_finite()));
        assert!(super::damped(&[0.0; 4], 2).is_err());
    }
}

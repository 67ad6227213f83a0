//! How adapters begin.

use std::collections::BTreeSet;

use faer::Mat;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    config::{Init, LoraConfig, scale},
    corda::{self, Covariances},
    dora::squared_norm,
    linear::Start,
    maps::{Maps, Naming},
    targets::Share,
    weights::{LoraWeights, LowRank},
};
use crate::{Error, Result};
use moe_checkpoint::{MatrixId, Role};

impl LoraConfig {
    /// A new adapter for a model. `covariances` of the inputs of maps are for CorDA alone.
    ///
    /// Random values of a map follow from the seed and its name, so that they do not depend on what else is adapted.
    ///
    /// # Errors
    /// Those of [`LoraConfig::targets`] and of reading weights; [`Error::Input`] for a rank above what a decomposition
    /// gives, and for missing covariances.
    pub fn init(&self, maps: &Maps<'_>, covariances: Option<&Covariances>) -> Result<LoraWeights> {
        let targets = self.targets(maps)?;
        let mut weights = LoraWeights { dropout: self.lora_dropout, config: self.clone(), ..LoraWeights::default() };
        for (map, share) in targets {
            weights.maps.insert(map, self.begin(maps, map, share, covariances)?);
        }
        let checkpoint = maps.checkpoint();
        for role in self.saved_whole(maps, weights.maps.keys())? {
            weights.whole.insert(role, checkpoint.read_f32(role)?);
        }
        for &token in &self.trainable_token_indices {
            let row = token as usize..token as usize + 1;
            weights.tokens.insert(token, checkpoint.read_f32_rows(Role::Embedding, row)?);
        }
        Ok(weights)
    }

    /// The tensors of `modules_to_save`, once they and `trainable_token_indices` are found to fit the model and the
    /// additions beside them.
    pub(crate) fn saved_whole<'m>(
        &self,
        maps: &Maps<'_>,
        beside: impl Iterator<Item = &'m MatrixId> + Clone,
    ) -> Result<BTreeSet<Role>> {
        let checkpoint = maps.checkpoint();
        let mut found = BTreeSet::new();
        for module in &self.modules_to_save {
            let roles = maps.of_module(module);
            if roles.is_empty() {
                let expected =
                    "modules outside experts, by name or end of path, such as `lm_head`, `embed_tokens`, `norm`";
                return Err(Error::input(
                    "modules_to_save",
                    format!("`{module}`, which no module is called"),
                    expected,
                ));
            }
            found.extend(roles);
        }
        let (embeddings, head) = (checkpoint.role(Role::Embedding)?, checkpoint.role(Role::LmHead)?);
        let vocabulary = found.iter().find(|role| matches!(role, Role::Embedding | Role::LmHead));
        if let Some(role) = vocabulary.filter(|_| embeddings.name == head.name) {
            let expected = "`trainable_token_indices`, which trains rows of both, or {\"type\": \"own\", \"embeddings\": true}: embeddings \
                            and output head are one tensor in this model";
            return Err(Error::input("modules_to_save", format!("`{}`", maps.module_of(*role)), expected));
        }
        for role in &found {
            let twice = |map: &MatrixId| matches!((map, role), (MatrixId::Layer(layer, of), Role::Layer(l, r)) if layer == l && of == r);
            if let Some(map) = beside.clone().find(|map| twice(map)) {
                let found = format!("`{}`, and an addition to {map}", maps.module_of(*role));
                return Err(Error::input("modules_to_save", found, "one of both"));
            }
        }
        let vocabulary = checkpoint.config().vocab_size;
        if let Some(token) = self.trainable_token_indices.iter().find(|token| **token as usize >= vocabulary) {
            return Err(Error::input(
                "trainable_token_indices",
                token,
                format!("below the vocabulary size {vocabulary}"),
            ));
        }
        if !self.trainable_token_indices.is_empty() && found.contains(&Role::Embedding) {
            let found = "rows of the embeddings, and in `modules_to_save` all of them";
            return Err(Error::input("trainable_token_indices", found, "one of both"));
        }
        Ok(found)
    }

    /// The same with other values, for which no weight is read.
    pub(crate) fn outlined(&self, maps: &Maps<'_>) -> Result<LoraWeights> {
        let mut weights = LoraWeights { dropout: self.lora_dropout, config: self.clone(), ..LoraWeights::default() };
        for (map, Share { rank, alpha }) in self.targets(maps)? {
            let missing = || Error::input("an adapted map", map, "a map of the model");
            let [out, inputs] = maps.dims(map).ok_or_else(missing)?;
            let (a, b) = (vec![0.0; rank * inputs], vec![0.0; out * rank]);
            let changes = self.init_lora_weights.changes_base();
            let start = changes.then(|| Start { a: a.clone(), b: b.clone(), rank });
            let magnitude = self.use_dora.then(|| vec![1.0; out]);
            let low = LowRank::new(a, b, rank, alpha);
            weights.maps.insert(map, LowRank { rslora: self.use_rslora, start, magnitude, ..low });
        }
        for role in self.saved_whole(maps, weights.maps.keys())? {
            let elements = maps.checkpoint().role(role)?.shape.iter().product();
            weights.whole.insert(role, vec![0.0; elements]);
        }
        let row = vec![0.0; maps.checkpoint().config().hidden_size];
        weights.tokens = self.trainable_token_indices.iter().map(|token| (*token, row.clone())).collect();
        Ok(weights)
    }

    fn begin(
        &self,
        maps: &Maps<'_>,
        map: MatrixId,
        share: Share,
        covariances: Option<&Covariances>,
    ) -> Result<LowRank> {
        let Share { rank, alpha } = share;
        let dims = maps.dims(map).ok_or_else(|| Error::input("an adapted map", map, "a map of the model"))?;
        let [out, inputs] = dims;
        let mut random = random(self.seed, &maps.path(map, Naming::PerExpert));
        let decomposed = self.init_lora_weights.changes_base();
        let s = scale(alpha, rank, self.use_rslora);
        let (a, b) = match self.init_lora_weights {
            Init::Kaiming => (kaiming(&mut random, rank, inputs), vec![0.0; out * rank]),
            Init::Gaussian => {
                let a = (0..rank * inputs).map(|_| (normal(&mut random) / rank as f64) as f32).collect();
                (a, vec![0.0; out * rank])
            }
            Init::Random => (kaiming(&mut random, rank, inputs), kaiming(&mut random, out, rank)),
            Init::Orthogonal => orthogonal(&mut random, dims, rank),
            Init::Pissa { niter } => pissa(&maps.matrix(map)?, dims, rank, s, niter, &mut random)?,
            Init::Olora => olora(&maps.matrix(map)?, dims, rank),
            Init::Corda(method) => {
                let covariance = covariances.and_then(|all| all.of(maps, map)).ok_or_else(|| {
                    Error::input(format!("covariance of the inputs of {map}"), "none", "one, for CorDA")
                })?;
                corda::factors(&maps.matrix(map)?, dims, rank, s, covariance, method)?
            }
        };
        let mut low = LowRank { rslora: self.use_rslora, ..LowRank::new(a, b, rank, alpha) };
        if decomposed {
            low.start = Some(Start { a: low.a.clone(), b: low.b.clone(), rank });
        }
        if self.use_dora {
            low.magnitude = Some(magnitudes(&maps.matrix(map)?, &low, dims));
        }
        Ok(low)
    }
}

/// `||W + s B A||` per row.
pub(crate) fn magnitudes(weight: &[f32], low: &LowRank, [out, inputs]: [usize; 2]) -> Vec<f32> {
    let s = low.scale() as f32;
    let row = |o: usize| {
        let mut row = weight[o * inputs..(o + 1) * inputs].to_vec();
        for (r, b) in low.b[o * low.rank..(o + 1) * low.rank].iter().enumerate().filter(|(_, b)| **b != 0.0) {
            row.iter_mut().zip(&low.a[r * inputs..]).for_each(|(w, a)| *w += s * b * a);
        }
        squared_norm(&row).sqrt() as f32
    };
    (0..out).map(row).collect()
}

/// Numbers for one map.
pub(crate) fn random(seed: u64, name: &str) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(name.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}

/// Uniform in ±1/sqrt(columns).
pub(crate) fn kaiming(random: &mut ChaCha8Rng, rows: usize, columns: usize) -> Vec<f32> {
    let bound = 1.0 / (columns.max(1) as f64).sqrt();
    (0..rows * columns).map(|_| (random.random_range(-1.0..1.0f64) * bound) as f32).collect()
}

/// A standard normal number, by Box and Muller.
pub(crate) fn normal(random: &mut ChaCha8Rng) -> f64 {
    let (u, v) = (1.0 - random.random::<f64>(), random.random::<f64>());
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

fn normal_matrix(random: &mut ChaCha8Rng, rows: usize, columns: usize) -> Mat<f64> {
    Mat::from_fn(rows, columns, |_, _| normal(random))
}

/// Row-major f32.
fn values(matrix: faer::MatRef<'_, f64>) -> Vec<f32> {
    (0..matrix.nrows()).flat_map(|i| (0..matrix.ncols()).map(move |j| matrix[(i, j)] as f32)).collect()
}

/// `A = (N Q_odd)^T / 10`, `B = N' Q_even / 10` with alternate rows of one orthogonal matrix, so that `B A = 0`.
fn orthogonal(random: &mut ChaCha8Rng, [out, inputs]: [usize; 2], rank: usize) -> (Vec<f32>, Vec<f32>) {
    let q = normal_matrix(random, rank, rank).qr().compute_thin_Q();
    let half = rank / 2;
    let odd = Mat::from_fn(half, rank, |i, j| q[(2 * i, j)] / 10.0);
    let even = Mat::from_fn(half, rank, |i, j| q[(2 * i + 1, j)] / 10.0);
    let a = normal_matrix(random, inputs, half) * odd; // [in, r]
    let b = normal_matrix(random, out, half) * even; // [out, r]
    (values(a.transpose()), values(b.as_ref()))
}

pub(crate) fn matrix(weight: &[f32], [out, inputs]: [usize; 2]) -> Mat<f64> {
    Mat::from_fn(out, inputs, |i, j| f64::from(weight[i * inputs + j]))
}

/// `B = U sqrt(S / s)`, `A = sqrt(S / s) V^T` of chosen singular triples: `columns` of `u` and `v`.
pub(crate) fn split(
    u: faer::MatRef<'_, f64>,
    singular: &[f64],
    v: faer::MatRef<'_, f64>,
    columns: std::ops::Range<usize>,
    s: f64,
) -> (Vec<f32>, Vec<f32>) {
    let root = |j: usize| (singular[j].max(0.0) / s).sqrt();
    let a = columns.clone().flat_map(|j| (0..v.nrows()).map(move |i| (root(j) * v[(i, j)]) as f32)).collect();
    let columns = &columns;
    let b = (0..u.nrows()).flat_map(|i| columns.clone().map(move |j| (root(j) * u[(i, j)]) as f32)).collect();
    (a, b)
}

/// Singular triples, largest first.
pub(crate) fn svd(matrix: &Mat<f64>, what: &str) -> Result<(Mat<f64>, Vec<f64>, Mat<f64>)> {
    let svd = matrix.thin_svd().map_err(|error| {
        Error::input(format!("singular values of {what}"), moe_checkpoint::human::variant(&error), "finite weights")
    })?;
    let singular = svd.S().column_vector().iter().copied().collect();
    Ok((svd.U().to_owned(), singular, svd.V().to_owned()))
}

/// The leading `rank` triples; with `niter` by that many rounds of a subspace iteration from a random start (Halko et
/// al., arXiv 0909.4061, algorithm 4.4).
fn pissa(
    weight: &[f32],
    dims: [usize; 2],
    rank: usize,
    s: f64,
    niter: Option<usize>,
    random: &mut ChaCha8Rng,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let w = matrix(weight, dims);
    let Some(rounds) = niter else {
        let (u, singular, v) = svd(&w, "a weight")?;
        return Ok(split(u.as_ref(), &singular, v.as_ref(), 0..rank, s));
    };
    let mut basis = (&w * normal_matrix(random, dims[1], rank)).qr().compute_thin_Q(); // [out, r]
    for _ in 0..rounds {
        let back = (w.transpose() * &basis).qr().compute_thin_Q(); // [in, r]
        basis = (&w * back).qr().compute_thin_Q();
    }
    let (u, singular, v) = svd(&(basis.transpose() * &w), "a weight")?; // [r, in]
    Ok(split((&basis * u).as_ref(), &singular, v.as_ref(), 0..rank, s))
}

/// `W = Q R`: `B` the first columns of `Q`, `A` the first rows of `R`. What is taken from the weight is `s B A`, as in
/// PEFT.
fn olora(weight: &[f32], dims: [usize; 2], rank: usize) -> (Vec<f32>, Vec<f32>) {
    let qr = matrix(weight, dims).qr();
    let q = qr.compute_thin_Q();
    let r = qr.thin_R().to_owned();
    (values(r.as_ref().subrows(0, rank)), values(q.as_ref().subcols(0, rank)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(a: &[f32], b: &[f32], rank: usize, s: f64) -> Vec<f64> {
        let (inputs, out) = (a.len() / rank, b.len() / rank);
        let entry = |i: usize| {
            let (o, j) = (i / inputs, i % inputs);
            s * (0..rank).map(|r| f64::from(b[o * rank + r]) * f64::from(a[r * inputs + j])).sum::<f64>()
        };
        (0..out * inputs).map(entry).collect()
    }

    fn weight([out, inputs]: [usize; 2]) -> Vec<f32> {
        let mut random = random(5, "w");
        (0..out * inputs).map(|_| normal(&mut random) as f32).collect()
    }

    #[test]
    fn kaiming_has_its_bound_and_variance() {
        let a = kaiming(&mut random(1, "x"), 64, 400);
        assert!(a.iter().all(|a| a.abs() <= 0.05));
        let variance = a.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>() / a.len() as f64;
        assert!((variance * 1200.0 - 1.0).abs() < 0.03, "{variance}");
        assert_ne!(kaiming(&mut random(1, "x"), 1, 4), kaiming(&mut random(1, "y"), 1, 4));
    }

    #[test]
    fn orthogonal_factors_cancel() {
        let (a, b) = orthogonal(&mut random(2, "x"), [7, 9], 4);
        assert!(product(&a, &b, 4, 1.0).iter().all(|v| v.abs() < 1e-6));
        assert!(a.iter().chain(&b).all(|v| *v != 0.0));
    }

    #[test]
    fn pissa_takes_the_leading_part_and_few_rounds_find_it() {
        let dims = [9, 12];
        let w = weight(dims);
        let (u, singular, v) = svd(&matrix(&w, dims), "w").unwrap();
        let (a, b) = pissa(&w, dims, 3, 0.5, None, &mut random(1, "x")).unwrap();
        let leading = product(&a, &b, 3, 0.5);
        for (i, found) in leading.iter().enumerate() {
            let expected: f64 = (0..3).map(|k| u[(i / 12, k)] * singular[k] * v[(i % 12, k)]).sum();
            assert!((found - expected).abs() < 1e-5);
        }
        let (a, b) = pissa(&w, dims, 3, 0.5, Some(60), &mut random(1, "x")).unwrap();
        let close = product(&a, &b, 3, 0.5).iter().zip(&leading).all(|(a, b)| (a - b).abs() < 1e-3);
        assert!(close);
        // all of it at full rank
        let (a, b) = pissa(&w, dims, 9, 2.0, None, &mut random(1, "x")).unwrap();
        assert!(product(&a, &b, 9, 2.0).iter().zip(&w).all(|(a, b)| (a - f64::from(*b)).abs() < 1e-5));
    }

    #[test]
    fn olora_at_full_rank_is_the_weight() {
        for dims in [[5, 8], [8, 5]] {
            let w = weight(dims);
            let (a, b) = olora(&w, dims, 5);
            assert!(product(&a, &b, 5, 1.0).iter().zip(&w).all(|(a, b)| (a - f64::from(*b)).abs() < 1e-5));
            let (a, b) = olora(&w, dims, 2);
            assert_eq!((a.len(), b.len()), (2 * dims[1], dims[0] * 2));
            // orthonormal columns
            let dot = |i: usize, j: usize| (0..dims[0]).map(|o| b[o * 2 + i] * b[o * 2 + j]).sum::<f32>();
            assert!((dot(0, 0) - 1.0).abs() < 1e-5 && dot(0, 1).abs() < 1e-5);
        }
    }
}

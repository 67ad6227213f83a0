//! Several adapters as one.

use std::collections::{BTreeMap, BTreeSet};

use moe_checkpoint::MatrixId;

use faer::Mat;
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    lora::{LoraWeights, LowRank, split, svd},
};

/// How adapters become one (`add_weighted_adapter` of PEFT).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Combination {
    /// All ranks side by side: exactly the weighted sum of the additions.
    Cat,
    /// `A = sum sign(w_i) sqrt(|w_i s_i|) A_i`, `B = sum sqrt(|w_i s_i|) B_i`: of one rank, and not the sum, since
    /// `B_i` meets `A_j`.
    Linear,
    /// The weighted sum, cut to its largest singular values.
    Svd {
        /// How many.
        rank: usize,
    },
}

/// The adapters with their weights as one. Maps that only some of them have are combined from those.
///
/// # Errors
/// [`Error::Input`] without adapters, for a weight that is not finite or 0, and for unequal ranks in
/// [`Combination::Linear`]; [`Error::Unsupported`] for DoRA, whose additions are not additions of low rank.
pub fn combine(adapters: &[(&LoraWeights, f64)], how: Combination) -> Result<LoraWeights> {
    let Some((first, _)) = adapters.first() else {
        return Err(Error::input("adapters to combine", "none", "at least one"));
    };
    for (index, (weights, weight)) in adapters.iter().enumerate() {
        if !weight.is_finite() || *weight == 0.0 {
            return Err(Error::input(format!("weight {index}"), weight, "a finite number other than 0"));
        }
        if let Some(map) = weights.maps.iter().find(|(_, low)| low.magnitude.is_some()).map(|(map, _)| map) {
            return Err(Error::Unsupported(format!("combining adapters with DoRA, as that of {map}")));
        }
        if !(weights.whole.is_empty() && weights.tokens.is_empty()) {
            let what = "combining adapters with tensors or rows that stand in place of the base's (`modules_to_save`, trained biases, \
                        `trainable_token_indices`); merge them into the base one after the other";
            return Err(Error::Unsupported(what.into()));
        }
    }
    if how == (Combination::Svd { rank: 0 }) {
        return Err(Error::input("rank", 0, "at least 1"));
    }
    let all: BTreeSet<MatrixId> = adapters.iter().flat_map(|(weights, _)| weights.maps.keys().copied()).collect();
    let mut maps = BTreeMap::new();
    for map in all {
        let parts: Vec<(LowRank, f64)> =
            adapters.iter().filter_map(|(weights, w)| Some((weights.maps.get(&map)?.plain(), *w))).collect();
        let dims = parts.first().map_or([0, 0], |(low, _)| low.dims());
        if let Some((other, _)) = parts.iter().find(|(low, _)| low.dims() != dims) {
            return Err(Error::input(format!("shape of {map}"), format!("{:?}", other.dims()), format!("{dims:?}")));
        }
        let combined = match how {
            Combination::Cat => cat(&parts, dims),
            Combination::Linear => linear(map, &parts)?,
            Combination::Svd { rank } => cut(map, &cat(&parts, dims), rank)?,
        };
        let mut bias: Option<Vec<f64>> = None;
        for (low, weight) in &parts {
            let Some(own) = &low.bias else { continue };
            let sum = bias.get_or_insert_with(|| vec![0.0; own.len()]);
            sum.iter_mut().zip(own).for_each(|(sum, c)| *sum += weight * low.scale() * f64::from(*c));
        }
        let scale = combined.scale();
        let bias = bias.map(|sum| sum.into_iter().map(|c| (c / scale) as f32).collect());
        maps.insert(map, LowRank { bias, ..combined });
    }
    Ok(LoraWeights { maps, config: first.config.clone(), ..LoraWeights::default() })
}

/// `A' = [A_1; A_2; ..]`, `B' = [w_1 s_1 B_1, w_2 s_2 B_2, ..]`, of scale 1.
fn cat(parts: &[(LowRank, f64)], [out, _]: [usize; 2]) -> LowRank {
    let rank: usize = parts.iter().map(|(low, _)| low.rank).sum();
    let a = parts.iter().flat_map(|(low, _)| low.a.iter().copied()).collect();
    let mut b = Vec::with_capacity(out * rank);
    for row in 0..out {
        for (low, weight) in parts {
            let factor = weight * low.scale();
            b.extend(low.b[row * low.rank..(row + 1) * low.rank].iter().map(|b| (factor * f64::from(*b)) as f32));
        }
    }
    LowRank::new(a, b, rank, rank as f64)
}

fn linear(map: MatrixId, parts: &[(LowRank, f64)]) -> Result<LowRank> {
    let rank = parts[0].0.rank;
    if let Some((other, _)) = parts.iter().find(|(low, _)| low.rank != rank) {
        return Err(Error::input(format!("rank of {map}"), other.rank, format!("{rank}, that of the first adapter")));
    }
    let sum = |values: fn(&LowRank) -> &Vec<f32>, signed: bool| {
        let mut sum = vec![0.0f64; values(&parts[0].0).len()];
        for (low, weight) in parts {
            let factor = (weight * low.scale()).abs().sqrt() * if signed { weight.signum() } else { 1.0 };
            sum.iter_mut().zip(values(low)).for_each(|(sum, v)| *sum += factor * f64::from(*v));
        }
        sum.into_iter().map(|v| v as f32).collect()
    };
    Ok(LowRank::new(sum(|low| &low.a, true), sum(|low| &low.b, false), rank, rank as f64))
}

/// `B A = Q_b (R_b R_a^T) Q_a^T`: the singular triples of the small matrix in the middle are those of the whole.
fn cut(map: MatrixId, low: &LowRank, rank: usize) -> Result<LowRank> {
    let ([out, inputs], r, s) = (low.dims(), low.rank, low.scale());
    let a = Mat::from_fn(inputs, r, |i, j| f64::from(low.a[j * inputs + i])).qr();
    let b = Mat::from_fn(out, r, |i, j| s * f64::from(low.b[i * r + j])).qr();
    let middle = b.thin_R() * a.thin_R().transpose();
    let (u, singular, v) = svd(&middle.to_owned(), &map.to_string())?;
    let kept = rank.min(singular.len());
    let (u, v) = (b.compute_thin_Q() * u, a.compute_thin_Q() * v);
    let (a, b) = split(u.as_ref(), &singular, v.as_ref(), 0..kept, 1.0);
    Ok(LowRank::new(a, b, kept, kept as f64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_checkpoint::LayerRole;

    const MAP: MatrixId = MatrixId::Layer(0, LayerRole::Query);

    fn adapter(seed: usize, rank: usize, alpha: f64) -> LoraWeights {
        let numbers =
            |len: usize, seed: usize| (0..len).map(|i| ((i * 7 + seed * 5) % 11) as f32 / 5.0 - 1.0).collect();
        let low = LowRank::new(numbers(rank * 6, seed), numbers(5 * rank, seed + 3), rank, alpha);
        LoraWeights { maps: [(MAP, low)].into(), ..LoraWeights::default() }
    }

    fn delta(weights: &LoraWeights) -> Vec<f64> {
        let low = &weights.maps[&MAP];
        let entry = |o: usize, i: usize| {
            let dot: f64 =
                (0..low.rank).map(|r| f64::from(low.b[o * low.rank + r]) * f64::from(low.a[r * 6 + i])).sum();
            low.scale() * dot
        };
        (0..5).flat_map(|o| (0..6).map(move |i| (o, i))).map(|(o, i)| entry(o, i)).collect()
    }

    fn close(a: &[f64], b: &[f64]) -> bool {
        a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5)
    }

    #[test]
    fn side_by_side_is_the_sum_and_so_are_all_singular_values() {
        let (x, y) = (adapter(1, 2, 3.0), adapter(2, 3, 1.5));
        let sum: Vec<f64> = delta(&x).iter().zip(delta(&y)).map(|(x, y)| 0.7 * x - 0.4 * y).collect();
        let cat = combine(&[(&x, 0.7), (&y, -0.4)], Combination::Cat).unwrap();
        assert!(cat.maps[&MAP].rank == 5 && close(&delta(&cat), &sum));
        let svd = combine(&[(&x, 0.7), (&y, -0.4)], Combination::Svd { rank: 5 }).unwrap();
        assert!(close(&delta(&svd), &sum));
        let error = |rank: usize| {
            let cut = delta(&combine(&[(&x, 0.7), (&y, -0.4)], Combination::Svd { rank }).unwrap());
            cut.iter().zip(&sum).map(|(a, b)| (a - b).powi(2)).sum::<f64>()
        };
        assert!(error(1) > error(2) && error(2) > error(4));
    }

    #[test]
    fn linear_of_one_is_itself_and_of_two_has_cross_terms() {
        let (x, y) = (adapter(1, 2, 3.0), adapter(2, 2, 1.0));
        let one = combine(&[(&x, 1.0)], Combination::Linear).unwrap();
        assert!(close(&delta(&one), &delta(&x)));
        let negative = combine(&[(&x, -1.0)], Combination::Linear).unwrap();
        let expected: Vec<f64> = delta(&x).iter().map(|v| -v).collect();
        assert!(close(&delta(&negative), &expected));
        let two = combine(&[(&x, 1.0), (&y, 1.0)], Combination::Linear).unwrap();
        let sum: Vec<f64> = delta(&x).iter().zip(delta(&y)).map(|(x, y)| x + y).collect();
        assert!(!close(&delta(&two), &sum));
        let other = combine(&[(&x, 1.0), (&adapter(3, 3, 1.0), 1.0)], Combination::Linear).unwrap_err().to_string();
        assert!(other.contains("rank of query of layer 0: found 3"), "{other}");
        assert!(combine(&[(&x, 0.0)], Combination::Cat).is_err() && combine(&[], Combination::Cat).is_err());
    }
}

//! How strongly refitted matrices are held to what they were.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What a ridge is a multiple of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RidgeScale {
    /// The mean over all kept units of the layer. An expert of few tokens changes little, so that a narrow calibration
    /// spares what the model knows besides.
    #[default]
    Layer,
    /// The mean over the kept units of each expert: one of few tokens follows them as closely as one of many.
    Expert,
}

impl RidgeScale {
    /// `lambda` of each expert, from the sums of its diagonal and their lengths.
    pub(super) fn lambdas(self, ridge: f64, diagonals: &[(f64, usize)]) -> Vec<f64> {
        let mean = |(sum, n): (f64, usize)| ridge * sum / n.max(1) as f64;
        let all = diagonals.iter().fold((0.0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
        diagonals
            .iter()
            .map(|one| match self {
                Self::Layer => mean(all),
                Self::Expert => mean(*one),
            })
            .collect()
    }
}

/// Refuses a ridge that leaves the normal equations singular.
pub(super) fn check_ridge(ridge: f64) -> Result<()> {
    match ridge > 0.0 && ridge.is_finite() {
        true => Ok(()),
        false => Err(Error::InvalidParameter {
            field: "ridge",
            found: ridge.to_string(),
            expected: "a finite number above 0".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_tokens_mean_little_change() {
        let diagonals = [(90.0, 3), (6.0, 3), (0.0, 0)];
        assert_eq!(RidgeScale::Layer.lambdas(0.5, &diagonals), [8.0; 3]);
        assert_eq!(RidgeScale::Expert.lambdas(0.5, &diagonals), [15.0, 1.0, 0.0]);
    }
}

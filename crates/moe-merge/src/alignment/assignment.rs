//! The assignment problem.

use ndarray::Array2;

use crate::{Error, Result};

/// The column of every row of a square matrix `[n, n]` so that each column is taken once and the sum is smallest, by
/// the algorithm of Jonker and Volgenant (1987).
///
/// Solved in f64 on costs shifted to start at 0: shortest paths compare sums of many costs.
///
/// # Errors
/// [`Error::Numerics`] for costs that are not finite.
///
/// ```
/// assert_eq!(moe_merge::assign(&[4.0, 1.0, 3.0, 2.0, 0.0, 5.0, 3.0, 2.0, 2.0], 3)?, [1, 0, 2]);
/// # Ok::<(), moe_merge::Error>(())
/// ```
pub fn assign(costs: &[f32], n: usize) -> Result<Vec<u32>> {
    let failed = |reason: String| Error::numerics(format!("assignment of {n} units"), reason);
    if costs.len() != n * n {
        return Err(failed(format!("{} costs, expected {}", costs.len(), n * n)));
    }
    if let Some(cost) = costs.iter().find(|cost| !cost.is_finite()) {
        return Err(failed(format!("a cost is {cost}")));
    }
    if n <= 1 {
        // The solver looks for a second smallest cost.
        return Ok((0..n as u32).collect());
    }
    let least = costs.iter().copied().fold(f32::INFINITY, f32::min);
    let shifted = costs.iter().map(|cost| f64::from(*cost) - f64::from(least)).collect();
    let matrix = Array2::from_shape_vec((n, n), shifted).map_err(|error| failed(error.to_string()))?;
    let (columns, _) = lapjv::lapjv(&matrix).map_err(|error| failed(error.to_string()))?;
    let mut taken = vec![false; n];
    for column in &columns {
        if *column >= n || std::mem::replace(&mut taken[*column], true) {
            return Err(failed("the solver gave no assignment".into()));
        }
    }
    Ok(columns.into_iter().map(|column| column as u32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    fn cheapest(costs: &[f32], n: usize, row: usize, taken: u32) -> f64 {
        if row == n {
            return 0.0;
        }
        let free = (0..n).filter(|c| taken & (1 << c) == 0);
        free.map(|c| f64::from(costs[row * n + c]) + cheapest(costs, n, row + 1, taken | (1 << c)))
            .fold(f64::INFINITY, f64::min)
    }

    #[test]
    fn no_assignment_is_cheaper() {
        for n in 1..8 {
            for seed in 0..20 {
                let mut costs = noise(n * n, seed * 10 + n as u64);
                if seed % 3 == 0 {
                    // Many ties.
                    costs.iter_mut().for_each(|c| *c = (*c * 3.0).round());
                }
                let columns = assign(&costs, n).unwrap();
                let found: f64 = columns.iter().enumerate().map(|(r, c)| f64::from(costs[r * n + *c as usize])).sum();
                assert!((found - cheapest(&costs, n, 0, 0)).abs() < 1e-6, "{n} {seed}");
            }
        }
    }

    #[test]
    fn impossible_costs_are_refused() {
        assert!(assign(&[1.0, f32::NAN, 0.0, 0.0], 2).unwrap_err().to_string().contains("NaN"));
        assert!(assign(&[1.0; 3], 2).is_err());
        assert_eq!(assign(&[], 0).unwrap(), [0u32; 0]);
        assert_eq!(assign(&[3.0], 1).unwrap(), [0]);
    }
}

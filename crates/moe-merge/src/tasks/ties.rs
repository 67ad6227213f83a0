//! TIES.

use serde::{Deserialize, Serialize};

use moe_checkpoint::{ExpertId, ExpertPart};

use super::TaskRule;
use crate::{Error, Result};

/// Trim each task vector to its largest elements, elect for each element the sign of their sum, and add the mean of
/// those that have it: `theta_0 + scale * mean_{k: sign agrees} tau_k`.
///
/// Source: TIES-Merging (arXiv 2306.01708). The paper trims over the whole model; here each matrix of each expert is
/// trimmed by itself, exactly `floor(density * n)` elements of it, ties to the earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ties {
    /// Share of the elements of each task vector that stay.
    #[serde(default = "density")]
    pub density: f64,
    /// Factor on the merged task vector.
    #[serde(default = "one")]
    pub scale: f64,
}

fn density() -> f64 {
    0.2
}

fn one() -> f64 {
    1.0
}

impl TaskRule for Ties {
    fn change(&self, _: ExpertId, _: ExpertPart, mut tasks: Vec<Vec<f32>>) -> Vec<f32> {
        tasks.iter_mut().for_each(|task| trim(task, self.density));
        let length = tasks.first().map_or(0, Vec::len);
        let element = |i: usize| {
            let sum: f64 = tasks.iter().map(|task| f64::from(task[i])).sum();
            let agreeing = tasks.iter().map(|task| f64::from(task[i])).filter(|tau| tau * sum > 0.0);
            let (total, count) = agreeing.fold((0.0, 0.0), |(total, count), tau| (total + tau, count + 1.0));
            if count > 0.0 { (self.scale * total / count) as f32 } else { 0.0 }
        };
        (0..length).map(element).collect()
    }

    fn validate(&self, _: usize) -> Result<()> {
        if !(self.density > 0.0 && self.density <= 1.0) {
            return Err(Error::parameter("rule.density", self.density, "a number in (0, 1]"));
        }
        match self.scale.is_finite() {
            true => Ok(()),
            false => Err(Error::parameter("rule.scale", self.scale, "a finite number")),
        }
    }
}

/// Zeroes all but the `floor(density * n)` largest magnitudes.
fn trim(values: &mut [f32], density: f64) {
    let kept = ((values.len() as f64 * density).floor() as usize).min(values.len());
    if kept == values.len() {
        return;
    }
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    let larger = |a: &u32, b: &u32| {
        let magnitude = |i: &u32| values[*i as usize].abs();
        magnitude(b).total_cmp(&magnitude(a)).then(a.cmp(b))
    };
    order.select_nth_unstable_by(kept, larger);
    let dropped: Vec<u32> = order.split_off(kept);
    dropped.into_iter().for_each(|i| values[i as usize] = 0.0);
}

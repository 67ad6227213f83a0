//! Task arithmetic.

use serde::{Deserialize, Serialize};

use moe_checkpoint::{ExpertId, ExpertPart};

use super::TaskRule;
use crate::{Error, Result};

/// `theta_0 + sum_k s_k tau_k`. Source: task arithmetic (arXiv 2212.04089).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskArithmetic {
    /// Factor of every task, or one for all.
    pub scales: Vec<f64>,
}

impl TaskRule for TaskArithmetic {
    fn change(&self, _: ExpertId, _: ExpertPart, tasks: Vec<Vec<f32>>) -> Vec<f32> {
        let mut sum = vec![0.0f64; tasks.first().map_or(0, Vec::len)];
        for (index, task) in tasks.iter().enumerate() {
            let scale = self.scales[index.min(self.scales.len() - 1)];
            sum.iter_mut().zip(task).for_each(|(sum, tau)| *sum += scale * f64::from(*tau));
        }
        sum.into_iter().map(|v| v as f32).collect()
    }

    fn validate(&self, tasks: usize) -> Result<()> {
        if self.scales.len() != 1 && self.scales.len() != tasks {
            let expected = format!("1, or {tasks}, as many as tasks");
            return Err(Error::parameter("rule.scales", format!("{} numbers", self.scales.len()), expected));
        }
        match self.scales.iter().find(|scale| !scale.is_finite()) {
            Some(scale) => Err(Error::parameter("rule.scales", scale, "finite numbers")),
            None => Ok(()),
        }
    }
}

//! Gradients of an expert's router row.

use moe_checkpoint::{Denominator, Extent, Pool, ScoreTable, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::table::{divisor, expert_table};
use super::{ExpertWeightsSource, Needs, Scorer};
use crate::statistics::{ROUTED_TOKENS, ROUTER_GRADIENT_ABS, ROUTER_GRADIENT_SQUARE, ROUTER_GRADIENT_SQUARES};
use crate::{Error, Result};

/// Which function of the gradient G_s of a router row, from sequence s's mean loss, is averaged over sequences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterForm {
    /// `sqrt(mean_s |w * G_s|_2^2)` with the row w: the root mean square over sequences of the published
    /// `||w * dL/dw||_2`, which needs the row only when scoring.
    #[default]
    Taylor,
    /// `mean_s mean_h |G_s[h]|`.
    Abs,
    /// `mean_s sum_h G_s[h]^2`: diagonal empirical Fisher.
    Square,
}

/// How strongly the loss reacts to an expert's router row. Rows of experts that a model's routing never differentiates
/// score 0.
///
/// Source: expert-drop baselines shipped with HectorHHZ/Less-is-MoE (arXiv 2606.05538). They do not say how batches are
/// put together; here each sequence is a sample, as for [`Fisher`](super::Fisher).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RouterTaylor {
    /// Default [`RouterForm::Taylor`].
    pub form: RouterForm,
}

impl RouterTaylor {
    /// With this form.
    pub fn new(form: RouterForm) -> Self {
        Self { form }
    }
}

impl Scorer for RouterTaylor {
    fn name(&self) -> &str {
        "router_taylor"
    }

    fn recipe(&self) -> Value {
        super::config::recipe(*self)
    }

    fn needs(&self) -> Needs {
        let gradients = match self.form {
            RouterForm::Taylor => ROUTER_GRADIENT_SQUARES,
            RouterForm::Abs => ROUTER_GRADIENT_ABS,
            RouterForm::Square => ROUTER_GRADIENT_SQUARE,
        };
        Needs::experts([gradients, ROUTED_TOKENS]).additive(Pool::Global).weights(self.form == RouterForm::Taylor)
    }

    fn score(&self, statistics: &Statistics, weights: &dyn ExpertWeightsSource) -> Result<ScoreTable> {
        let sequences = divisor(self, statistics.sequences(), "sequences")?;
        let hidden = statistics.shape().hidden_size;
        let mut rows = std::collections::BTreeMap::new();
        if self.form == RouterForm::Taylor {
            for layer in &statistics.shape().layers {
                let row = weights.router(layer.layer)?; // [E, H]
                let expected = layer.num_experts() * hidden;
                if row.len() != expected {
                    return Err(Error::RouterMismatch { layer: layer.layer, found: row.len(), expected });
                }
                rows.insert(layer.layer, row);
            }
        }
        expert_table(self, statistics, Denominator::Sequences, |layer, expert| {
            Ok(match self.form {
                RouterForm::Abs => statistics.expert(ROUTER_GRADIENT_ABS.as_str(), layer)?[expert] / sequences,
                RouterForm::Square => statistics.expert(ROUTER_GRADIENT_SQUARE.as_str(), layer)?[expert] / sequences,
                RouterForm::Taylor => {
                    let squares = statistics.vector(ROUTER_GRADIENT_SQUARES.as_str(), Extent::Hidden, layer, expert)?;
                    let row = &rows[&layer][expert * hidden..][..hidden];
                    let sum: f64 = row.iter().zip(squares).map(|(w, g)| f64::from(*w).powi(2) * g).sum();
                    (sum / sequences).sqrt()
                }
            })
        })
    }
}

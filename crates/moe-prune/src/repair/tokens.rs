//! How much each calibration token counts.

use moe_core::LayerOutput;
use moe_core::host::HostView;
use serde::{Deserialize, Serialize};

/// How much the squared error of each token counts in a fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenWeight {
    /// As much as any other. Few tokens with huge activations, such as the first of a sequence in many models, then
    /// decide.
    Equal,
    /// Divided by the mean square of the residual stream after the layer. Later layers see the stream normed, so that
    /// an error is as bad as it is long beside the stream.
    #[default]
    Relative,
}

impl TokenWeight {
    /// Factors on the error of each token, not squared `[T]`.
    pub(super) fn factors(self, output: &LayerOutput<'_>) -> Vec<f32> {
        let [tokens, hidden] = output.output.dims();
        if self == Self::Equal {
            return vec![1.0; tokens];
        }
        let view = HostView::new(output.output);
        let mean_square = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / hidden as f64;
        let rows = view.as_slice().chunks_exact(hidden);
        rows.map(|row| 1.0 / mean_square(row).max(f64::MIN_POSITIVE).sqrt() as f32).collect()
    }
}

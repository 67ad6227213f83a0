//! The routed-expert shape of a model: which layers are MoE layers and how wide each of their experts is.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Routed-expert shape of a whole model, as statistics, scores and plans record it.
///
/// A *unit* is one FFN intermediate dimension of one expert: gate row `j`, up row `j` and down column `j`.
/// Dense layers do not appear; MoE layers appear in ascending decoder layer order.
///
/// ```
/// use moe_checkpoint::{MoeLayerShape, MoeShape};
///
/// let shape = MoeShape { gateless: false, hidden_size: 8, top_k: 2, layers: vec![MoeLayerShape { layer: 1, widths: vec![4, 4, 2] }] };
/// shape.validate()?;
/// assert_eq!(shape.units(), 10);
/// assert_eq!(shape.parameters(), 10 * 3 * 8);
/// assert_eq!(shape.layer(1).map(|l| l.num_experts()), Some(3));
/// # Ok::<(), moe_checkpoint::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoeShape {
    /// Width of what routed experts read and give, `H`: that of the residual stream, or of the
    /// [latent](crate::ModelConfig::expert_latent) in models whose experts read one.
    pub hidden_size: usize,
    /// Experts selected per token.
    pub top_k: usize,
    /// MoE layers in ascending decoder layer order.
    pub layers: Vec<MoeLayerShape>,
    /// Whether a unit has no gate row: two vectors instead of three.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub gateless: bool,
}

/// One MoE layer of a [`MoeShape`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoeLayerShape {
    /// Decoder layer index (dense layers are counted).
    pub layer: usize,
    /// Intermediate width of every routed expert; a width of 0 is an expert without units.
    pub widths: Vec<usize>,
}

impl MoeLayerShape {
    /// Number of routed experts.
    pub fn num_experts(&self) -> usize {
        self.widths.len()
    }

    /// Units of the layer, the sum of its experts' widths.
    pub fn units(&self) -> usize {
        self.widths.iter().sum()
    }

    /// Start of every expert in an array that holds the units of the layer expert after expert, and the end of the
    /// last one: `num_experts + 1` numbers.
    pub fn offsets(&self) -> Vec<usize> {
        let mut offsets = Vec::with_capacity(self.widths.len() + 1);
        let mut end = 0;
        offsets.push(end);
        for width in &self.widths {
            end += width;
            offsets.push(end);
        }
        offsets
    }
}

impl MoeShape {
    /// Units of the whole model.
    pub fn units(&self) -> usize {
        self.layers.iter().map(MoeLayerShape::units).sum()
    }

    /// Parameters that one unit holds: a gate row, an up row and a down column, `3 * hidden_size`; without a gate,
    /// `2 * hidden_size`.
    pub fn parameters_per_unit(&self) -> usize {
        if self.gateless { 2 * self.hidden_size } else { 3 * self.hidden_size }
    }

    /// Parameters of all routed experts.
    pub fn parameters(&self) -> u64 {
        self.units() as u64 * self.parameters_per_unit() as u64
    }

    /// The MoE layer with this decoder layer index.
    pub fn layer(&self, layer: usize) -> Option<&MoeLayerShape> {
        self.position(layer).map(|position| &self.layers[position])
    }

    /// Position in [`MoeShape::layers`] of the MoE layer with this decoder layer index.
    pub fn position(&self, layer: usize) -> Option<usize> {
        self.layers.binary_search_by_key(&layer, |l| l.layer).ok()
    }

    /// The common width of all experts of the model, if they have one.
    pub fn uniform_width(&self) -> Option<usize> {
        let mut widths = self.layers.iter().flat_map(|l| l.widths.iter().copied());
        let first = widths.next()?;
        widths.all(|width| width == first).then_some(first)
    }

    /// Checks that the shape makes sense: a hidden size, layers strictly ascending, at least `top_k >= 1` experts in
    /// every layer, and totals that can be counted.
    ///
    /// # Errors
    /// [`Error::InvalidShape`] names the field, what was found and what was expected.
    pub fn validate(&self) -> Result<()> {
        let invalid = |field: &str, found: String, expected: &str| {
            Err(Error::InvalidShape { field: field.to_string(), found, expected: expected.to_string() })
        };
        if self.hidden_size == 0 {
            return invalid("hidden_size", "0".into(), "at least 1");
        }
        if self.top_k == 0 {
            return invalid("top_k", "0".into(), "at least 1");
        }
        for pair in self.layers.windows(2) {
            if pair[0].layer >= pair[1].layer {
                let found = format!("{} before {}", pair[0].layer, pair[1].layer);
                return invalid("layers", found, "strictly ascending decoder layer indices");
            }
        }
        let mut units = 0usize;
        for layer in &self.layers {
            if layer.widths.len() < self.top_k {
                let found = format!("{} experts in layer {}", layer.widths.len(), layer.layer);
                return invalid("layers.widths", found, &format!("at least top_k = {}", self.top_k));
            }
            let counted = layer.widths.iter().try_fold(units, |sum, width| sum.checked_add(*width));
            // Parameters are counted too, hence the product.
            match counted.filter(|sum| sum.checked_mul(self.hidden_size).and_then(|p| p.checked_mul(24)).is_some()) {
                Some(sum) => units = sum,
                None => return invalid("layers.widths", "widths too large to count".into(), "sizes that fit memory"),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(layers: &[(usize, &[usize])]) -> MoeShape {
        let layers = layers.iter().map(|(layer, widths)| MoeLayerShape { layer: *layer, widths: widths.to_vec() });
        MoeShape { gateless: false, hidden_size: 4, top_k: 2, layers: layers.collect() }
    }

    #[test]
    fn counts_and_lookups() {
        let shape = shape(&[(1, &[3, 0, 2]), (4, &[1, 1])]);
        shape.validate().unwrap();
        assert_eq!(shape.units(), 7);
        assert_eq!(shape.parameters(), 7 * 12);
        assert_eq!(MoeShape { gateless: true, ..shape.clone() }.parameters(), 7 * 8);
        assert_eq!(shape.position(4), Some(1));
        assert_eq!(shape.layer(2), None);
        assert_eq!(shape.layers[0].offsets(), vec![0, 3, 3, 5]);
        assert_eq!(shape.uniform_width(), None);
    }

    #[test]
    fn uniform_width_needs_agreement_across_layers() {
        assert_eq!(shape(&[(0, &[4, 4]), (1, &[4, 4])]).uniform_width(), Some(4));
        assert_eq!(shape(&[(0, &[4, 4]), (1, &[5, 5])]).uniform_width(), None);
        assert_eq!(shape(&[]).uniform_width(), None);
    }

    #[test]
    fn invalid_shapes_are_named() {
        let message = |shape: MoeShape| shape.validate().unwrap_err().to_string();
        assert!(message(shape(&[(3, &[1, 1]), (3, &[1, 1])])).contains("ascending"));
        assert!(message(shape(&[(3, &[1])])).contains("top_k"));
        assert!(message(shape(&[(0, &[usize::MAX, 2])])).contains("too large"));
        assert!(
            message(MoeShape { gateless: false, hidden_size: 0, top_k: 1, layers: vec![] }).contains("hidden_size")
        );
    }
}

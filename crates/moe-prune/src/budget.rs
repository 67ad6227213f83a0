//! How much of a model is kept.

use std::sync::Arc;

use moe_checkpoint::{Checkpoint, ExpertLayout, ExpertPart, MoeLayerShape, MoeShape};
use serde::{Deserialize, Serialize};

use crate::ranking::Side;
use crate::{Error, Result};

/// How much of the routed experts is kept. Everything else of a model (attention, router, shared experts, embeddings)
/// is outside the budget.
///
/// ```
/// use moe_prune::Budget;
///
/// let budget: Budget = serde_json::from_str(r#"{"ratio": 0.5}"#).unwrap();
/// assert_eq!(budget, Budget::Ratio(0.5));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Budget {
    /// Fraction of the units to drop, in (0, 1). A pool of `N` units drops `floor(N * ratio)`, never more, with one
    /// exception: where widths are multiples ([`WidthLimits::round_to`](crate::WidthLimits::round_to)), what of a width
    /// fills no multiple goes whatever the ratio, and [`Allocation::notes`](crate::Allocation::notes) say by how much
    /// that exceeds it. [`Uniform`](crate::Uniform) and [`SubsetPruner`](crate::SubsetPruner) count whole experts, not
    /// their units.
    Ratio(f64),
    /// Parameters of routed experts to keep at most. One unit is
    /// [`MoeShape::parameters_per_unit`] of them.
    KeepParameters(u64),
    /// Parameters of routed experts to drop at least.
    DropParameters(u64),
    /// Parameters of the whole model to keep at most. Has to be resolved against the checkpoint: [`Budget::resolve`].
    KeepTotalParameters(u64),
    /// Bytes of the whole checkpoint to keep at most. Quantized weights count as they are stored, since a model that is
    /// pruned to one width stays quantized; one that is to be written as BF16 is budgeted as
    /// [`Checkpoint::dequantized`]. Has to be resolved against the checkpoint: [`Budget::resolve`].
    KeepBytes(u64),
    /// Experts that every MoE layer keeps, all of which have as many now: what a pruner of whole experts is to leave.
    /// Has to be resolved against the checkpoint: [`Budget::resolve`].
    ExpertsPerLayer(usize),
}

impl Budget {
    /// As [`resolve`](Self::resolve), with the bytes of what will be written: pruned to one width
    /// ([`PruneForm::Uniform`](crate::PruneForm::Uniform)), a quantized model stays in its format if it is to; the
    /// other forms are BF16.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    pub fn resolve_as(self, checkpoint: &Arc<Checkpoint>, stays_quantized: bool) -> Result<Self> {
        match checkpoint.quantization().is_some() && !stays_quantized {
            true => self.resolve(&checkpoint.dequantized()?),
            false => self.resolve(checkpoint),
        }
    }

    /// The budget in parameters of routed experts, where it is one of a whole checkpoint; others stay as they are. What
    /// is not in routed experts is kept, so that it is taken off first; where layers are stored in different types, the
    /// widest counts, so that the result is never larger than asked.
    ///
    /// ```no_run
    /// use std::sync::Arc;
    /// use moe_checkpoint::Checkpoint;
    /// use moe_prune::Budget;
    ///
    /// let model = Arc::new(Checkpoint::open("models/Qwen1.5-MoE-A2.7B")?);
    /// let budget = Budget::KeepBytes(16 << 30).resolve(&model)?; // what fits on the card
    /// # Ok::<(), moe_prune::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] with what the checkpoint has, for a budget that it meets already or that what is not
    /// pruned exceeds by itself; [`Error::Checkpoint`] for one that cannot be read.
    pub fn resolve(self, checkpoint: &Arc<Checkpoint>) -> Result<Self> {
        if let Self::ExpertsPerLayer(keep) = self {
            return Self::of_experts(checkpoint.shape(), keep);
        }
        let (field, asked, what) = match self {
            Self::KeepTotalParameters(count) => ("keep_total_parameters", count, "parameters"),
            Self::KeepBytes(count) => ("keep_bytes", count, "bytes"),
            other => return Ok(other),
        };
        if checkpoint.grouped() {
            let expected = "a budget of routed experts: the experts of this model share sets of weights".into();
            return Err(Error::InvalidParameter { field, found: asked.to_string(), expected });
        }
        let shape = checkpoint.shape();
        let written = checkpoint.dequantized()?;
        let (total, per_unit, in_units) = match self {
            Self::KeepBytes(_) => {
                let (mut widest, mut sum) = (0, 0);
                if checkpoint.quantization().is_some() {
                    // Codes with their share of scales and whatever else a weight is stored as, rounded up.
                    for layer in &shape.layers {
                        let bytes = checkpoint.expert_bytes_on_disk(layer.layer)?;
                        let units: usize = layer.widths.iter().sum();
                        widest = widest.max(bytes.div_ceil(units.max(1) as u64));
                        sum += bytes;
                    }
                    (checkpoint.bytes_on_disk(), widest, sum)
                } else {
                    for (layer, expert, width) in experts(shape) {
                        let unit = unit_bytes(&written, layer, expert)?;
                        widest = widest.max(unit);
                        sum += unit * width as u64;
                    }
                    (written.bytes_on_disk(), widest, sum)
                }
            }
            _ => (written.parameters(), shape.parameters_per_unit() as u64, shape.parameters()),
        };
        let fixed = total.saturating_sub(in_units);
        let keep = asked.saturating_sub(fixed) / per_unit.max(1);
        if asked <= fixed || keep == 0 || asked >= total {
            let expected = format!(
                "more than {fixed} and less than {total}: the model has {total} {what}, {fixed} of them outside the units of \
                 routed experts"
            );
            return Err(Error::InvalidParameter { field, found: asked.to_string(), expected });
        }
        // A budget of less than all never keeps all, whatever the types of the layers are.
        let keep = keep.min(shape.units() as u64 - 1);
        Ok(Self::KeepParameters(keep * shape.parameters_per_unit() as u64))
    }

    /// The ratio that leaves `keep` experts in every layer.
    fn of_experts(shape: &MoeShape, keep: usize) -> Result<Self> {
        let counts: Vec<usize> = shape.layers.iter().map(MoeLayerShape::num_experts).collect();
        let (least, most) =
            (counts.iter().copied().min().unwrap_or_default(), counts.iter().copied().max().unwrap_or_default());
        if keep == 0 || keep >= least || least != most {
            let found = keep.to_string();
            let expected = match least == most {
                true => format!("between 1 and {}: every layer has {least} experts", least.max(1) - 1),
                false => format!("another budget: layers have {least} to {most} experts"),
            };
            return Err(Error::InvalidParameter { field: "experts_per_layer", found, expected });
        }
        let mut ratio = (least - keep) as f64 / least as f64;
        // A quotient that is rounded down would leave one more.
        while (least as f64 * ratio).floor() < (least - keep) as f64 {
            ratio = ratio.next_up();
        }
        Ok(Self::Ratio(ratio))
    }

    /// Checks the budget by itself and against what the model has.
    ///
    /// # Errors
    /// [`Error::InvalidParameter`] for a ratio outside (0, 1), or a parameter count that is not between 0 and that of
    /// the model, both excluded.
    pub fn validate(&self, shape: &MoeShape) -> Result<()> {
        let invalid = |field, found: String, expected: String| Err(Error::InvalidParameter { field, found, expected });
        let total = shape.parameters();
        match *self {
            Budget::Ratio(ratio) if !(ratio > 0.0 && ratio < 1.0) => {
                invalid("ratio", ratio.to_string(), "a number in (0, 1), both ends excluded".into())
            }
            Budget::KeepParameters(count) | Budget::DropParameters(count) if count == 0 || count >= total => {
                let field = match self {
                    Budget::KeepParameters(_) => "keep_parameters",
                    _ => "drop_parameters",
                };
                let expected = format!("between 1 and {}: the model has {total} in routed experts", total.max(1) - 1);
                invalid(field, count.to_string(), expected)
            }
            Budget::KeepTotalParameters(count) | Budget::KeepBytes(count) => {
                let expected = "a budget in units of routed experts: Budget::resolve makes one for a checkpoint".into();
                invalid("budget", format!("{count} of a whole checkpoint"), expected)
            }
            Budget::ExpertsPerLayer(count) => {
                let expected = "a ratio: Budget::resolve makes one for a checkpoint".into();
                invalid("budget", format!("{count} experts per layer"), expected)
            }
            _ => Ok(()),
        }
    }

    /// The fraction of the units of routed experts that goes: the ratio, or what a number of parameters comes to. For
    /// pruners that share a ratio out by a rule of their own.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn ratio(&self, shape: &MoeShape) -> Result<f64> {
        self.validate(shape)?;
        Ok(match *self {
            Budget::Ratio(ratio) => ratio,
            _ => 1.0 - self.kept_units(shape) as f64 / shape.units().max(1) as f64,
        })
    }

    /// Units kept in a pool of `units` units where `ratio` applies to each pool by itself: `units - floor(units *
    /// ratio)`. `None` for a parameter budget, which belongs to the whole model.
    pub(crate) fn kept_of_pool(&self, units: usize) -> Option<usize> {
        match *self {
            // The product is rounded to f64 before the floor, as in the released code.
            Budget::Ratio(ratio) => Some(units - ((units as f64 * ratio).floor() as usize).min(units)),
            _ => None,
        }
    }

    /// Units kept in the whole model.
    pub(crate) fn kept_units(&self, shape: &MoeShape) -> usize {
        let (units, per_unit) = (shape.units(), shape.parameters_per_unit() as u64);
        match *self {
            Budget::Ratio(_) => self.kept_of_pool(units).unwrap_or(units),
            // Fits: validated to be less than what the model has.
            Budget::KeepParameters(count) => (count / per_unit) as usize,
            Budget::DropParameters(count) => units.saturating_sub(count.div_ceil(per_unit) as usize),
            // Never here: refused by `validate`.
            Budget::KeepTotalParameters(_) | Budget::KeepBytes(_) | Budget::ExpertsPerLayer(_) => units,
        }
    }

    /// On which side of it a plan ends where blocks do not meet it: a ratio bounds what goes, numbers of parameters
    /// what stays.
    pub(crate) fn side(&self) -> Side {
        match self {
            Budget::Ratio(_) => Side::AtLeast,
            _ => Side::AtMost,
        }
    }
}

/// Layer, expert and width of all routed experts.
fn experts(shape: &MoeShape) -> impl Iterator<Item = (usize, usize, usize)> {
    let of_layer = |layer: &MoeLayerShape| {
        let number = layer.layer;
        layer.widths.clone().into_iter().enumerate().map(move |(expert, width)| (number, expert, width))
    };
    shape.layers.iter().flat_map(of_layer)
}

/// Bytes that one unit of an expert takes.
fn unit_bytes(checkpoint: &Checkpoint, layer: usize, expert: usize) -> Result<u64> {
    let hidden = checkpoint.shape().hidden_size;
    // Where files have no gate, it is the up projection.
    let gateless = checkpoint.expert_layout(layer)? == ExpertLayout::Gateless;
    let parts = ExpertPart::ALL.into_iter().chain([ExpertPart::GateBias, ExpertPart::UpBias]);
    let parts = parts.filter(|part| !gateless || *part != ExpertPart::Gate);
    let mut bytes = 0;
    for part in parts {
        if let Some(dtype) = checkpoint.expert_dtype(layer, expert, part)? {
            let (rows, cols) = part.dims(hidden, 1);
            bytes += (rows * cols * dtype.bitsize() / 8) as u64;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> MoeShape {
        let layers = vec![MoeLayerShape { layer: 0, widths: vec![10, 11] }];
        MoeShape { gateless: false, hidden_size: 2, top_k: 1, layers }
    }

    #[test]
    fn the_ratio_excludes_its_ends() {
        for bad in [0.0, 1.0, -0.5, 1.5, f64::NAN, f64::INFINITY] {
            let message = Budget::Ratio(bad).validate(&shape()).unwrap_err().to_string();
            assert!(message.contains("ratio") && message.contains("(0, 1)"), "{message}");
        }
        Budget::Ratio(1e-9).validate(&shape()).unwrap();
    }

    #[test]
    fn counts_are_floored_in_favor_of_the_bound() {
        // 21 units of 6 parameters.
        assert_eq!(Budget::Ratio(0.5).kept_units(&shape()), 11);
        assert_eq!(Budget::KeepParameters(65).kept_units(&shape()), 10);
        assert_eq!(Budget::DropParameters(61).kept_units(&shape()), 10);
        assert_eq!(Budget::DropParameters(60).kept_units(&shape()), 11);
    }

    #[test]
    fn every_budget_of_routed_experts_is_a_ratio() {
        assert_eq!(Budget::Ratio(0.3).ratio(&shape()).unwrap(), 0.3);
        // 10 of 21 units stay, and 11.
        assert_eq!(Budget::KeepParameters(65).ratio(&shape()).unwrap(), 1.0 - 10.0 / 21.0);
        assert_eq!(Budget::DropParameters(60).ratio(&shape()).unwrap(), 1.0 - 11.0 / 21.0);
        assert!(Budget::KeepBytes(60).ratio(&shape()).unwrap_err().to_string().contains("whole checkpoint"));
    }

    #[test]
    fn experts_per_layer_are_a_ratio_that_no_rounding_spoils() {
        for experts in 2..130 {
            let layers = vec![MoeLayerShape { layer: 0, widths: vec![3; experts] }];
            let shape = MoeShape { gateless: false, hidden_size: 2, top_k: 1, layers };
            for keep in 1..experts {
                let Budget::Ratio(ratio) = Budget::of_experts(&shape, keep).unwrap() else { unreachable!() };
                assert_eq!((experts as f64 * ratio).floor() as usize, experts - keep, "{keep} of {experts}");
            }
            assert!(Budget::of_experts(&shape, experts).unwrap_err().to_string().contains("experts_per_layer"));
        }
        let layers = vec![3, 4].into_iter().enumerate();
        let layers = layers.map(|(layer, count)| MoeLayerShape { layer, widths: vec![2; count] }).collect();
        let ragged = MoeShape { gateless: false, hidden_size: 2, top_k: 1, layers };
        assert!(Budget::of_experts(&ragged, 2).unwrap_err().to_string().contains("3 to 4 experts"));
    }

    #[test]
    fn parameter_budgets_stay_inside_the_model() {
        for bad in [0, 126, 1000] {
            assert!(Budget::KeepParameters(bad).validate(&shape()).is_err());
            assert!(Budget::DropParameters(bad).validate(&shape()).unwrap_err().to_string().contains("125"));
        }
    }
}

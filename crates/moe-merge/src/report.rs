//! What a plan does to a checkpoint, for people and machines.

use std::fmt;

use moe_checkpoint::human::size;
use moe_checkpoint::{BeforeAfter, ExpertId, Ratio};
use serde::{Deserialize, Serialize};

use crate::merged::OutputForm;

/// What a plan did to a checkpoint. [`Display`](fmt::Display) gives a plain-text table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeReport {
    /// How the result is written.
    pub form: OutputForm,
    /// Name of the recipe.
    pub recipe: String,
    /// Fraction of the experts that went.
    pub ratio: Ratio,
    /// Bytes of all tensors.
    pub bytes: BeforeAfter,
    /// MoE layers in ascending order.
    pub layers: Vec<LayerMergeReport>,
    /// Experts that no calibration token was routed to: averages by usage hold nothing of them.
    pub never_used: Vec<ExpertId>,
    /// What else a user should know of the result.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// One MoE layer of a [`MergeReport`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerMergeReport {
    /// Decoder layer index.
    pub layer: usize,
    /// Routed experts before, and sets of weights after.
    pub experts: BeforeAfter,
    /// Rows of the router.
    pub router_rows: BeforeAfter,
    /// Groups of one.
    pub alone: usize,
    /// Members of the largest group.
    pub largest: usize,
    /// Experts in no group.
    pub dissolved: usize,
    /// Experts that were protected.
    pub protected: usize,
    /// Bytes of the routed experts.
    pub bytes: BeforeAfter,
}

/// Experts listed by name; the rest are counted.
const LISTED: usize = 12;

impl fmt::Display for MergeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>5} {:>8} {:>8} {:>6} {:>6} {:>8} {:>9} {:>9} {:>12} {:>12}",
            "layer",
            "experts",
            "sets",
            "rows",
            "alone",
            "largest",
            "dissolved",
            "protected",
            "bytes before",
            "bytes after"
        )?;
        for layer in &self.layers {
            writeln!(
                f,
                "{:>5} {:>8} {:>8} {:>6} {:>6} {:>8} {:>9} {:>9} {:>12} {:>12}",
                layer.layer,
                layer.experts.before,
                layer.experts.after,
                layer.router_rows.after,
                layer.alone,
                layer.largest,
                layer.dissolved,
                layer.protected,
                size(layer.bytes.before),
                size(layer.bytes.after)
            )?;
        }
        let Self { form, recipe, ratio, bytes, .. } = self;
        writeln!(
            f,
            "{recipe}: {:.4}% of the experts went ({:.4}% asked)",
            100.0 * ratio.achieved,
            100.0 * ratio.asked
        )?;
        write!(f, "weights, written as {form}: {}", bytes.sizes())?;
        for note in &self.notes {
            write!(f, "\nnote: {note}")?;
        }
        if !self.never_used.is_empty() {
            let names: Vec<_> = self.never_used.iter().take(LISTED).map(|id| format!("({id})")).collect();
            let rest = self.never_used.len() - names.len();
            let rest = if rest > 0 { format!(" and {rest} more") } else { String::new() };
            let count = self.never_used.len();
            write!(f, "\nnever used by the calibration data: {count} experts, {}{rest}", names.join(", "))?;
        }
        Ok(())
    }
}

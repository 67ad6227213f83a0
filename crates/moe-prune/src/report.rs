//! What a plan does to a checkpoint, for people and machines.

use std::fmt;

use moe_checkpoint::human::{count, size};
use moe_checkpoint::{BeforeAfter, Checkpoint, ExpertId, Ratio};
use serde::{Deserialize, Serialize};

use crate::form::Export;
use crate::{PrunePlan, Result};

/// What a plan does to a checkpoint. [`Display`](fmt::Display) gives a plain-text table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// How the result is written.
    pub export: Export,
    /// Fraction of routed-expert units dropped.
    pub ratio: Ratio,
    /// Units of all routed experts.
    pub units: BeforeAfter,
    /// Elements of all tensors.
    pub parameters: BeforeAfter,
    /// Bytes of all tensors as written; a masked export stays as large as it was.
    pub bytes: BeforeAfter,
    /// MoE layers in ascending order.
    pub layers: Vec<LayerReport>,
    /// Experts that no calibration token was routed to.
    pub never_routed: Vec<ExpertId>,
    /// What else a user should know of the result.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// One MoE layer of a [`Report`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Decoder layer index.
    pub layer: usize,
    /// Routed experts.
    pub experts: usize,
    /// Experts that go wholly, with their rows of the router.
    #[serde(default)]
    pub removed: usize,
    /// Experts left without units, which the router still chooses; in a fine-grained export they go with their rows of
    /// the router.
    pub emptied: usize,
    /// Experts as written: those that are left, or pieces of them.
    #[serde(default)]
    pub written: usize,
    /// Units of the layer.
    pub units: BeforeAfter,
    /// Narrowest expert after the plan.
    pub min_width: usize,
    /// Mean width after the plan.
    pub mean_width: f64,
    /// Widest expert after the plan.
    pub max_width: usize,
    /// Bytes of the routed experts as written.
    pub bytes: BeforeAfter,
}

impl Report {
    /// What a plan does to a checkpoint of its shape; what is left is counted by whoever makes it.
    pub(crate) fn of(plan: &PrunePlan, checkpoint: &Checkpoint, export: Export) -> Result<Self> {
        let before = |before: u64| BeforeAfter { before, after: before };
        let mut report = Self {
            export,
            ratio: plan.ratio,
            units: BeforeAfter { before: plan.shape.units() as u64, after: plan.units_kept() as u64 },
            parameters: before(checkpoint.parameters()),
            bytes: before(checkpoint.bytes_on_disk()),
            layers: Vec::with_capacity(plan.kept.len()),
            never_routed: plan.never_routed.clone(),
            notes: plan.notes.iter().cloned().chain(plan.top_k_clamp().map(|clamp| clamp.to_string())).collect(),
        };
        for (kept, shape) in plan.kept.iter().zip(&plan.shape.layers) {
            let widths: Vec<usize> = kept.experts.iter().map(Vec::len).collect();
            let (units, after) = (shape.units(), widths.iter().sum::<usize>());
            report.layers.push(LayerReport {
                layer: kept.layer,
                experts: widths.len(),
                removed: kept.removed.len(),
                written: widths.len() - kept.removed.len(),
                emptied: widths.iter().filter(|width| **width == 0).count() - kept.removed.len(),
                units: BeforeAfter { before: units as u64, after: after as u64 },
                min_width: kept.experts_kept().into_iter().map(|expert| widths[expert]).min().unwrap_or(0),
                mean_width: after as f64 / (widths.len() - kept.removed.len()).max(1) as f64,
                max_width: widths.iter().copied().max().unwrap_or(0),
                bytes: before(checkpoint.expert_bytes_on_disk(kept.layer)?),
            });
        }
        Ok(report)
    }
}

/// Experts listed by name in the table; the rest are counted.
const LISTED: usize = 12;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>5} {:>8} {:>9} {:>9} {:>8} {:>6} {:>8} {:>6} {:>6} {:>12} {:>12}",
            "layer",
            "experts",
            "units",
            "kept",
            "dropped",
            "min",
            "mean",
            "max",
            "empty",
            "bytes before",
            "bytes after"
        )?;
        for layer in &self.layers {
            writeln!(
                f,
                "{:>5} {:>8} {:>9} {:>9} {:>8} {:>6} {:>8.1} {:>6} {:>6} {:>12} {:>12}",
                layer.layer,
                layer.experts,
                layer.units.before,
                layer.units.after,
                layer.units.before - layer.units.after,
                layer.min_width,
                layer.mean_width,
                layer.max_width,
                layer.emptied,
                size(layer.bytes.before),
                size(layer.bytes.after)
            )?;
        }
        let Self { units, parameters, bytes, ratio, .. } = self;
        let dropped = units.before - units.after;
        writeln!(
            f,
            "{} of {} routed-expert units dropped: {:.4}% ({:.4}% asked)",
            count(dropped),
            count(units.before),
            100.0 * ratio.achieved,
            100.0 * ratio.asked
        )?;
        writeln!(f, "parameters: {}", parameters.counts())?;
        write!(f, "weights, {} export: {}", self.export, bytes.sizes())?;
        for note in &self.notes {
            write!(f, "\nnote: {note}")?;
        }
        if !self.never_routed.is_empty() {
            let names: Vec<_> = self.never_routed.iter().take(LISTED).map(|id| format!("({id})")).collect();
            let rest = self.never_routed.len() - names.len();
            let rest = if rest > 0 { format!(" and {rest} more") } else { String::new() };
            let count = self.never_routed.len();
            write!(f, "\nnever routed to by the calibration data: {count} experts, {}{rest}", names.join(", "))?;
        }
        Ok(())
    }
}

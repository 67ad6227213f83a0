//! What the record of a pruned model tells.

use moe_checkpoint::{ExpertId, MoeShape, Mtp, Ratio};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::target::Target;
use super::{Export, PruneForm, PruneOptions};
use crate::plan::LayerKept;
use crate::{EditSource, Error, PrunePlan, Report, Result};

/// The method of a pruning step in a [record](moe_checkpoint::Record).
pub const PRUNE_METHOD: &str = "prune";

/// The recipe of a pruning step: `Record::load(dir)?.recipe::<PruneRecord>(PRUNE_METHOD)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PruneRecord {
    /// The form.
    pub export: Export,
    /// What it did.
    pub report: Report,
    /// What became of layers that predict further tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtp: Option<Mtp>,
    /// Digest of the edits that were applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edits: Option<String>,
    /// Pieces of every expert, in a fine-grained form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pieces: Option<usize>,
    /// Pieces per token, if the form said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Factors of experts in a fine-grained form, as in [`FineGrained::scales`](crate::FineGrained::scales).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scales: Option<Vec<Vec<f32>>>,
    /// Digest of where every unit went, which a ranking of pieces has a say in.
    pub experts: String,
    /// The plan, in the indices of the checkpoint it was applied to, with its recipe; kept units as bits.
    #[serde(serialize_with = "pack", deserialize_with = "unpack")]
    pub plan: PrunePlan,
}

impl PruneRecord {
    pub(super) fn new(plan: &PrunePlan, options: &PruneOptions<'_>, target: &Target, report: &Report) -> Self {
        let how = match options.form {
            PruneForm::FineGrained(how) => Some(how),
            _ => None,
        };
        Self {
            export: options.form.export(),
            report: report.clone(),
            mtp: options.mtp,
            edits: options.edits.as_deref().map(EditSource::digest),
            pieces: how.map(|how| how.pieces),
            top_k: how.and_then(|how| how.top_k),
            scales: how.and_then(|how| how.scales).map(<[_]>::to_vec),
            experts: target.digest(),
            plan: plan.clone(),
        }
    }

    pub(super) fn to_value(&self) -> Result<Value> {
        serde_json::to_value(self).map_err(|error| Error::invalid_plan(error.to_string()))
    }

    /// What was done, in a sentence for people.
    pub(super) fn summary(&self) -> String {
        let Report { units, ratio, .. } = &self.report;
        let dropped = units.before - units.after;
        let mut text = format!(
            "{dropped} of {} units of the routed experts dropped ({:.2}%), {} form",
            units.before,
            100.0 * ratio.achieved,
            self.export
        );
        if let Some(pieces) = self.pieces {
            text += &format!(", experts in {pieces} pieces");
        }
        if self.edits.is_some() {
            text += ", with repaired weights";
        }
        text
    }
}

/// A plan whose kept units are bits of hexadecimal digits, unit 8i + j in bit j of byte i: a list of numbers is ten
/// times as long.
#[derive(Serialize, Deserialize)]
struct Packed {
    version: u64,
    model: String,
    shape: MoeShape,
    ratio: Ratio,
    recipe: Value,
    never_routed: Vec<ExpertId>,
    kept: Vec<PackedLayer>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct PackedLayer {
    layer: usize,
    experts: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    removed: Vec<u32>,
}

fn pack<S: Serializer>(plan: &PrunePlan, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    let layer = |kept: &LayerKept| PackedLayer {
        layer: kept.layer,
        experts: kept.experts.iter().map(|units| to_bits(units)).collect(),
        removed: kept.removed.clone(),
    };
    let packed = Packed {
        version: plan.version,
        model: plan.model.clone(),
        shape: plan.shape.clone(),
        ratio: plan.ratio,
        recipe: plan.recipe.clone(),
        never_routed: plan.never_routed.clone(),
        kept: plan.kept.iter().map(layer).collect(),
        notes: plan.notes.clone(),
    };
    packed.serialize(serializer)
}

fn unpack<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<PrunePlan, D::Error> {
    use serde::de::Error as _;
    let Packed { version, model, shape, ratio, recipe, never_routed, kept, notes } = Packed::deserialize(deserializer)?;
    let layer = |PackedLayer { layer, experts, removed }: PackedLayer| {
        let units = |bits: &String| {
            from_bits(bits).ok_or_else(|| {
                D::Error::custom(format!("layer {layer}: `{bits}` are no kept units, expected hexadecimal digits"))
            })
        };
        let experts = experts.iter().map(units).collect::<std::result::Result<_, D::Error>>()?;
        Ok(LayerKept { layer, experts, removed })
    };
    let kept = kept.into_iter().map(layer).collect::<std::result::Result<_, D::Error>>()?;
    let plan = PrunePlan { version, model, shape, ratio, recipe, never_routed, kept, notes };
    plan.validate(&plan.shape).map_err(D::Error::custom)?;
    Ok(plan)
}

fn to_bits(units: &[u32]) -> String {
    let mut bytes = vec![0u8; units.last().map_or(0, |last| *last as usize / 8 + 1)];
    units.iter().for_each(|unit| bytes[*unit as usize / 8] |= 1 << (unit % 8));
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_bits(digits: &str) -> Option<Vec<u32>> {
    let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
    let mut units = Vec::new();
    for (at, pair) in pairs.iter().enumerate() {
        if !pair.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        let byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        units.extend((0..8).filter(|bit| byte & (1 << bit) != 0).map(|bit| (8 * at + bit) as u32));
    }
    rest.is_empty().then_some(units)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_bits_and_come_back() {
        assert_eq!(to_bits(&[0, 2, 9]), "0502");
        for units in [vec![], vec![0], vec![7, 8, 15], (0..300).step_by(7).collect()] {
            assert_eq!(from_bits(&to_bits(&units)), Some(units));
        }
        assert_eq!(from_bits("050"), None);
        assert_eq!(from_bits("0g"), None);
        assert_eq!(from_bits("+1"), None);
    }
}

//! Units and experts that nothing may drop.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{Error, MoeShape, Result};

/// Units and whole experts that stay, whatever they score.
///
/// ```
/// use moe_checkpoint::ProtectionMask;
///
/// let mut mask = ProtectionMask::none();
/// mask.protect_expert(1, 68);
/// mask.protect_unit(2, 3, 17);
/// assert!(mask.is_protected(1, 68, 0) && mask.is_protected(2, 3, 17) && !mask.is_protected(2, 3, 18));
/// assert_eq!(
///     serde_json::to_string(&mask).unwrap(),
///     r#"[{"layer":1,"expert":68},{"layer":2,"expert":3,"units":[17]}]"#
/// );
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Protected>", into = "Vec<Protected>")]
pub struct ProtectionMask {
    /// By (decoder layer, expert); `None` protects the whole expert.
    entries: BTreeMap<(usize, usize), Option<BTreeSet<u32>>>,
}

/// One line of a mask: some units of an expert, or all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Protected {
    /// Decoder layer index.
    pub layer: usize,
    /// Index of the expert in its layer.
    pub expert: usize,
    /// Units, ascending; absent for the whole expert.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub units: Option<Vec<u32>>,
}

impl ProtectionMask {
    /// Protects nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// Whether nothing is protected.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Protects all units of an expert.
    pub fn protect_expert(&mut self, layer: usize, expert: usize) {
        self.entries.insert((layer, expert), None);
    }

    /// Protects one unit.
    pub fn protect_unit(&mut self, layer: usize, expert: usize, unit: u32) {
        if let Some(units) = self.entries.entry((layer, expert)).or_insert_with(|| Some(BTreeSet::new())) {
            units.insert(unit);
        }
    }

    /// Whether a unit is protected.
    pub fn is_protected(&self, layer: usize, expert: usize, unit: u32) -> bool {
        match self.entries.get(&(layer, expert)) {
            None => false,
            Some(None) => true,
            Some(Some(units)) => units.contains(&unit),
        }
    }

    /// Protected units of an expert of this width.
    pub fn count(&self, layer: usize, expert: usize, width: usize) -> usize {
        match self.entries.get(&(layer, expert)) {
            None => 0,
            Some(None) => width,
            Some(Some(units)) => units.len(),
        }
    }

    /// Protects what another mask protects, too.
    pub fn merge(&mut self, other: &ProtectionMask) {
        for ((layer, expert), units) in &other.entries {
            match units {
                None => self.protect_expert(*layer, *expert),
                Some(units) => units.iter().for_each(|unit| self.protect_unit(*layer, *expert, *unit)),
            }
        }
    }

    /// What is protected, by layer and expert.
    pub fn entries(&self) -> Vec<Protected> {
        self.clone().into()
    }

    /// Checks that everything that is protected exists.
    ///
    /// # Errors
    /// [`Error::UnknownProtected`] names the first that does not.
    pub fn validate(&self, shape: &MoeShape) -> Result<()> {
        for ((layer, expert), units) in &self.entries {
            let unknown = |what: String, expected: String| Err(Error::UnknownProtected { what, expected });
            let Some(found) = shape.layer(*layer) else {
                let layers: Vec<_> = shape.layers.iter().map(|l| l.layer).collect();
                return unknown(format!("layer {layer}"), format!("the MoE layers are {layers:?}"));
            };
            let Some(width) = found.widths.get(*expert) else {
                return unknown(
                    format!("expert {expert} of layer {layer}"),
                    format!("the layer has {} experts", found.num_experts()),
                );
            };
            if let Some(unit) = units.iter().flatten().find(|unit| **unit as usize >= *width) {
                return unknown(
                    format!("unit {unit} of layer {layer}, expert {expert}"),
                    format!("the expert has {width} units"),
                );
            }
        }
        Ok(())
    }
}

impl From<Vec<Protected>> for ProtectionMask {
    fn from(entries: Vec<Protected>) -> Self {
        let mut mask = Self::none();
        for Protected { layer, expert, units } in entries {
            match units {
                None => mask.protect_expert(layer, expert),
                Some(units) => units.into_iter().for_each(|unit| mask.protect_unit(layer, expert, unit)),
            }
        }
        mask
    }
}

impl From<ProtectionMask> for Vec<Protected> {
    fn from(mask: ProtectionMask) -> Self {
        mask.entries
            .into_iter()
            .map(|((layer, expert), units)| Protected { layer, expert, units: units.map(|u| u.into_iter().collect()) })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MoeLayerShape;

    #[test]
    fn a_whole_expert_wins_over_its_units() {
        for order in [[true, false], [false, true]] {
            let mut mask = ProtectionMask::none();
            for whole in order {
                if whole { mask.protect_expert(0, 1) } else { mask.protect_unit(0, 1, 3) }
            }
            assert_eq!(mask.count(0, 1, 8), 8);
        }
    }

    #[test]
    fn what_does_not_exist_is_named() {
        let layers = vec![MoeLayerShape { layer: 2, widths: vec![4, 4] }];
        let shape = MoeShape { gateless: false, hidden_size: 2, top_k: 1, layers };
        for (json, part) in [
            (r#"[{"layer":1,"expert":0}]"#, "MoE layers are [2]"),
            (r#"[{"layer":2,"expert":2}]"#, "2 experts"),
            (r#"[{"layer":2,"expert":1,"units":[1,4]}]"#, "unit 4"),
        ] {
            let mask: ProtectionMask = serde_json::from_str(json).unwrap();
            let message = mask.validate(&shape).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
